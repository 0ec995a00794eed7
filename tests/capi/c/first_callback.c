/* How long it takes from omlx_generate to the first callback, with a model that computes nothing. Prints microseconds: the best
 * median of several rounds, because what else the machine does can only add. Arguments: the folder of the model, rounds. */
#include "harness.h"

#define REQUESTS 200

static const char json[] = "{\"prompt\":[1,316,207,1910],\"max_tokens\":1,\"ignore_eos\":true}";

typedef struct seen {
    recorder r;
    double first;
} seen;

static int32_t on_first_event(void *user_data, const omlx_event *event) {
    seen *s = user_data;
    if (s->first == 0)
        s->first = now();
    record(&s->r, event);
    return 0;
}

static void on_seen_destroy(void *user_data) {
    on_destroy(&((seen *)user_data)->r);
}

static double ask(omlx_pool *pool) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_error *error = NULL;
    seen s;
    double began;
    s.first = 0;
    recorder_init(&s.r);
    options.callback = on_first_event;
    options.user_data = &s;
    options.destroy = on_seen_destroy;
    began = now();
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, sizeof json - 1, &options, NULL, &error));
    wait_destroyed(&s.r);
    check_ended(&s.r, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    /* The token itself was in the first event. */
    CHECK(s.r.tokens == 1 && s.r.text_events == 1 && strcmp(s.r.text, "word") == 0);
    recorder_free(&s.r);
    return s.first - began;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    double times[REQUESTS], best = 1;
    omlx_pool *pool;
    int rounds, i;
    if (argc != 3)
        return 2;
    pool = open_pool(argv[1]);
    for (i = 0; i < 20; i++)
        ask(pool);
    for (rounds = atoi(argv[2]); rounds > 0; rounds--) {
        for (i = 0; i < REQUESTS; i++)
            times[i] = ask(pool);
        qsort(times, REQUESTS, sizeof times[0], ascending);
        if (times[REQUESTS / 2] < best)
            best = times[REQUESTS / 2];
    }
    end_pool(pool);
    printf("%.1f\n", best * 1e6);
    return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
