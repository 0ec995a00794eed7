/* Many threads at once on the model that computes nothing, for a detector of races: requests in every form, cancelled and released at
 * random points, while others ask the pool, change it, and load and unload its model. Arguments: the folder with that model; and
 * "buffer", "string" or "callback" for a host that breaks the header's contract, which the detector must report. */
#include "harness.h"

#define SHORT "{\"prompt\":[1,316,207,1910],\"max_tokens\":12,\"ignore_eos\":true,\"logprobs\":true}"
#define LONG "{\"prompt\":[1,316,207,1910],\"max_tokens\":3000,\"ignore_eos\":true}"
#define CHAT "{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}],\"max_tokens\":8,\"n\":2,\"ignore_eos\":true}"

enum { THREADS = 6, ROUNDS = 25 };

static const char *models_dir;

static unsigned next_random(unsigned *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 16;
}

/* A count of the host's, which its callbacks change on the library's threads. */
typedef struct counter {
    pthread_mutex_t lock;
    int value;
} counter;

static void count(counter *c) {
    pthread_mutex_lock(&c->lock);
    c->value++;
    pthread_mutex_unlock(&c->lock);
}

static int counted(counter *c) {
    int value;
    pthread_mutex_lock(&c->lock);
    value = c->value;
    pthread_mutex_unlock(&c->lock);
    return value;
}

static void on_log(void *user_data, uint32_t level, const char *message) {
    CHECK(level >= OMLX_LOG_LEVEL_ERROR && level <= OMLX_LOG_LEVEL_DEBUG && message[0] != '\0');
    count(user_data);
}

typedef struct job {
    omlx_pool *pool;
    unsigned seed;
    /* Wake functions that were set. */
    int set;
    /* Calls of them and of their destroy function. */
    counter woken, returned;
} job;

static void on_return(void *user_data) { count(&((job *)user_data)->returned); }
static void on_job_wake(void *user_data) { count(&((job *)user_data)->woken); }

static void *cancel_later(void *request) {
    sleep_ms(1);
    omlx_request_cancel(request);
    omlx_request_release(request);
    return NULL;
}

/* In the pull form: a part of it, or all; sometimes with a wake function, sometimes cancelled by another thread. */
static void pull(job *j, const char *json, unsigned *random) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    const omlx_event *event = NULL;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    pthread_t canceller;
    unsigned left = next_random(random) % 20;
    int other = next_random(random) % 3 == 0, wakes = next_random(random) % 2;
    options.loading_events = options.started_event = 1;
    if (omlx_generate(j->pool, json, strlen(json), &options, &request, &error) != OMLX_OK) {
        /* The queue is full. */
        CHECK(omlx_error_status(error) == OMLX_E_BUSY);
        omlx_error_release(error);
        return;
    }
    if (other) {
        omlx_request_retain(request);
        pthread_create(&canceller, NULL, cancel_later, request);
    }
    if (wakes) {
        j->set++;
        CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, on_job_wake, j, on_return, &error));
    }
    CHECK(strcmp(omlx_request_model(request), "omlx-null") == 0);
    while (left-- > 0 && omlx_request_next(request, 200, &event, NULL) == OMLX_OK)
        CHECK(event->text != NULL && (event->token_count == 0 || event->tokens[0] < 4096));
    if (next_random(random) % 2)
        omlx_request_cancel(request);
    omlx_request_release(request);
    if (other)
        pthread_join(canceller, NULL);
}

static void *ask(void *argument) {
    job *j = argument;
    unsigned random = j->seed;
    recorder r;
    int i;
    for (i = 0; i < ROUNDS; i++) {
        static const char *const kinds[] = {SHORT, LONG, CHAT};
        const char *json = kinds[next_random(&random) % 3];
        omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
        omlx_request *request = NULL;
        if (next_random(&random) % 2) {
            pull(j, json, &random);
            continue;
        }
        recorder_init(&r);
        r.cancel_at_first = next_random(&random) % 2 || json == kinds[1];
        options.callback = on_event;
        options.user_data = &r;
        options.destroy = on_destroy;
        if (omlx_generate(j->pool, json, strlen(json), &options, &request, NULL) == OMLX_OK) {
            if (next_random(&random) % 3 == 0)
                omlx_request_cancel(request);
            omlx_request_release(request);
        }
        wait_destroyed(&r);
        CHECK(r.events_after_done == 0 && r.done_events <= 1);
        recorder_free(&r);
    }
    return NULL;
}

static void *inquire(void *argument) {
    job *j = argument;
    omlx_string *text = NULL;
    omlx_tokens *tokens = NULL;
    omlx_error *error = NULL;
    int i;
    for (i = 0; i < 2 * ROUNDS; i++) {
        CHECK_STATUS(OMLX_OK, omlx_pool_status(j->pool, &text, &error));
        omlx_string_release(text);
        CHECK_STATUS(OMLX_OK, omlx_pool_models(j->pool, &text, &error));
        omlx_string_release(text);
        CHECK_STATUS(OMLX_OK, omlx_pool_metrics(j->pool, OMLX_METRICS_FORMAT_PROMETHEUS, &text, &error));
        omlx_string_release(text);
        CHECK_STATUS(OMLX_OK, omlx_cache_stats(j->pool, "omlx-null", &text, &error));
        omlx_string_release(text);
        CHECK_STATUS(OMLX_OK, omlx_tokenize(j->pool, "omlx-null", "word word", 9, 0, &tokens, &error));
        CHECK_STATUS(OMLX_OK, omlx_detokenize(j->pool, "omlx-null", omlx_tokens_data(tokens), omlx_tokens_count(tokens), &text,
                                              &error));
        omlx_string_release(text);
        omlx_tokens_release(tokens);
        CHECK(omlx_model_load(j->pool, "nothing", &error) == OMLX_E_NOT_FOUND && omlx_error_message(error)[0] != '\0');
        omlx_error_release(error);
        error = NULL;
        sleep_ms(2);
    }
    return NULL;
}

static void *change(void *argument) {
    job *j = argument;
    omlx_error *error = NULL;
    omlx_string *text = NULL;
    unsigned random = j->seed;
    int i;
    for (i = 0; i < ROUNDS; i++) {
        const char *settings = next_random(&random) % 2 ? "{\"alias\":\"nothing-much\",\"ttl_seconds\":100}" : "{\"alias\":null}";
        CHECK_STATUS(OMLX_OK, omlx_model_configure(j->pool, "omlx-null", settings, strlen(settings), &error));
        CHECK_STATUS(OMLX_OK, omlx_model_settings(j->pool, "omlx-null", &text, &error));
        omlx_string_release(text);
        CHECK_STATUS(OMLX_OK, omlx_pool_set_memory_limit(j->pool, 0, 40 + next_random(&random) % 40, &error));
        CHECK_STATUS(OMLX_OK, omlx_pool_rescan(j->pool, &error));
        sleep_ms(5);
        if (i % 5 == 0)
            CHECK_STATUS(OMLX_OK, omlx_model_unload(j->pool, "omlx-null", next_random(&random) % 2, NULL, &error));
        CHECK_STATUS(OMLX_OK, omlx_cache_clear(j->pool, NULL, 0, NULL, &error));
    }
    return NULL;
}

static void everything_at_once(void) {
    void *(*const roles[])(void *) = {ask, ask, ask, ask, inquire, change};
    omlx_error *error = NULL;
    /* The library may still be about to call the hook when it has been removed. */
    static counter lines = {PTHREAD_MUTEX_INITIALIZER, 0};
    pthread_t threads[THREADS];
    job jobs[THREADS];
    int i, pass;
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(on_log, OMLX_LOG_LEVEL_DEBUG, &lines, NULL, &error));
    for (pass = 0; pass < 2; pass++) {
        omlx_pool *pool = open_pool(models_dir);
        recorder last;
        for (i = 0; i < THREADS; i++) {
            jobs[i].pool = pool;
            jobs[i].seed = (unsigned)(1 + i + THREADS * pass);
            jobs[i].set = jobs[i].woken.value = jobs[i].returned.value = 0;
            pthread_mutex_init(&jobs[i].woken.lock, NULL);
            pthread_mutex_init(&jobs[i].returned.lock, NULL);
            pthread_create(&threads[i], NULL, roles[i], &jobs[i]);
        }
        for (i = 0; i < THREADS; i++)
            pthread_join(threads[i], NULL);
        /* One is running when the pool closes; the other time the handle alone goes. */
        recorder_init(&last);
        omlx_request_release(start(pool, LONG, &last));
        if (pass == 0)
            CHECK_STATUS(OMLX_OK, omlx_pool_close(pool, &error));
        omlx_pool_release(pool);
        wait_destroyed(&last);
        CHECK(last.done_events == 1);
        recorder_free(&last);
        for (i = 0; i < THREADS; i++) {
            while (counted(&jobs[i].returned) < jobs[i].set)
                sleep_ms(1);
            CHECK(counted(&jobs[i].returned) == jobs[i].set);
        }
    }
    CHECK(counted(&lines) > 0);
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(NULL, OMLX_LOG_LEVEL_DEBUG, NULL, NULL, &error));
}

/* What breaks the contract. The second thread only sleeps before its part: nothing orders the two, but both always happen. */
static char buffer[] = SHORT;
static omlx_string *string;
static volatile int uncounted;

static void *write_buffer(void *argument) {
    sleep_ms(1000);
    memset(buffer, ' ', strlen(SHORT));
    return argument;
}

static void *release_string(void *argument) {
    sleep_ms(1000);
    omlx_string_release(string);
    return argument;
}

static int32_t count_without_lock(void *user_data, const omlx_event *event) {
    (void)event, (void)user_data;
    ++uncounted;
    return 0;
}

static void break_the_contract(const char *how) {
    omlx_pool *pool = open_pool(models_dir);
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_error *error = NULL;
    omlx_request *request = NULL;
    pthread_t second;
    if (strcmp(how, "buffer") == 0) {
        /* Text is copied before the call returns, and must not change until then. */
        pthread_create(&second, NULL, write_buffer, NULL);
        CHECK_STATUS(OMLX_OK, omlx_generate(pool, buffer, strlen(SHORT), NULL, &request, &error));
        pthread_join(second, NULL);
        omlx_request_release(request);
    } else if (strcmp(how, "string") == 0) {
        /* Freed while another thread uses it. */
        CHECK_STATUS(OMLX_OK, omlx_pool_models(pool, &string, &error));
        pthread_create(&second, NULL, release_string, NULL);
        CHECK(omlx_string_len(string) > 0);
        pthread_join(second, NULL);
    } else {
        /* Callbacks come on threads of the library. */
        options.callback = count_without_lock;
        CHECK_STATUS(OMLX_OK, omlx_generate(pool, SHORT, strlen(SHORT), &options, &request, &error));
        while (uncounted == 0)
            sleep_ms(10);
        omlx_request_release(request);
    }
    end_pool(pool);
}

int main(int argc, char **argv) {
    if (argc < 2)
        return 2;
    models_dir = argv[1];
    if (argc > 2)
        break_the_contract(argv[2]);
    else
        everything_at_once();
    return finish("races");
}
