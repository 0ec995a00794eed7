/* Times prefill and decode of a model from outside: token ids in, token ids out, against the wall clock.
 *
 *   bench MODEL_DIR [-p PROMPT_TOKENS] [-n STEPS]
 *
 * Prints JSON lines: {"engine":"omlx","device":..,"name":"prefill512"|"decode","batch":1,"tok_s":..}
 * prefillN is N tokens over the time from omlx_generate to the first token; decode is the rate of the tokens after the
 * first, with the prompt as context. The model is loaded and warm.
 *
 * cc -O2 -Iinclude examples/c/bench.c -Ltarget/release -lomlx -Wl,-rpath,target/release -o bench
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "omlx.h"

typedef struct timing {
    double first_token; /* seconds from omlx_generate */
    double last_token;
    size_t tokens;
    size_t tokens_with_first; /* that the first event brought: they are not timed as decoded */
} timing;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int fail(const char *what, omlx_error *error) {
    fprintf(stderr, "%s: %s\n", what, omlx_error_message(error));
    omlx_error_release(error);
    return EXIT_FAILURE;
}

/* A request of `count` token ids, the same few in turn: speed does not depend on which. To be freed. */
static char *write_request(long count, long steps, unsigned salt) {
    char *json = malloc((size_t)count * 8 + 128), *end = json;
    long i;
    if (json == NULL)
        return NULL;
    end += sprintf(end, "{\"ignore_eos\":true,\"temperature\":0,\"max_tokens\":%ld,\"prompt\":[", steps);
    for (i = 0; i < count; i++)
        end += sprintf(end, "%s%ld", i > 0 ? "," : "", (i * 7 + (long)salt) % 200 + 10);
    strcpy(end, "]}");
    return json;
}

/* Runs one request to its end and writes when its tokens came. */
static int run(omlx_pool *pool, const char *json, timing *out) {
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    timing timing = {0, 0, 0, 0};
    double start = now();
    if (omlx_generate(pool, json, strlen(json), NULL, &request, &error) != OMLX_OK)
        return fail("omlx_generate", error);
    for (;;) {
        const omlx_event *event = NULL;
        if (omlx_request_next(request, -1, &event, &error) != OMLX_OK)
            return fail("omlx_request_next", error);
        if (event->token_count > 0) {
            timing.last_token = now() - start;
            if (timing.tokens == 0) {
                timing.first_token = timing.last_token;
                timing.tokens_with_first = event->token_count;
            }
            timing.tokens += event->token_count;
        }
        if (event->kind == OMLX_EVENT_KIND_DONE) {
            int failed = event->status != OMLX_OK;
            if (failed)
                fprintf(stderr, "%s: %s\n", omlx_status_name(event->status), event->error_message);
            omlx_request_release(request);
            *out = timing;
            return failed ? EXIT_FAILURE : EXIT_SUCCESS;
        }
    }
}

/* Copies the string behind `key` in the list of models, which has one model. */
static int find(const char *json, const char *key, char *out, size_t size) {
    const char *start = strstr(json, key), *stop;
    if (start == NULL)
        return 0;
    start += strlen(key);
    stop = strchr(start, '"');
    if (stop == NULL || (size_t)(stop - start) >= size)
        return 0;
    memcpy(out, start, (size_t)(stop - start));
    out[stop - start] = '\0';
    return 1;
}

static int bench(omlx_pool *pool, long prompt, long steps) {
    char id[256], device[32];
    omlx_string *models = NULL;
    omlx_error *error = NULL;
    timing prefill = {0, 0, 0, 0}, decode = {0, 0, 0, 0};
    char *warm_up = write_request(prompt, 4, 1), *first = write_request(prompt, 1, 2);
    char *all = write_request(prompt, steps, 2);
    int code;

    if (warm_up == NULL || first == NULL || all == NULL)
        return EXIT_FAILURE;
    if (omlx_pool_models(pool, &models, &error) != OMLX_OK)
        return fail("omlx_pool_models", error);
    if (!find(omlx_string_data(models), "\"id\":\"", id, sizeof id)) {
        fprintf(stderr, "no model\n");
        return EXIT_FAILURE;
    }
    omlx_string_release(models);
    if (omlx_model_load(pool, id, &error) != OMLX_OK)
        return fail("omlx_model_load", error);
    if (omlx_pool_models(pool, &models, &error) != OMLX_OK)
        return fail("omlx_pool_models", error);
    if (!find(omlx_string_data(models), "\"device\":\"", device, sizeof device))
        strcpy(device, "unknown");
    omlx_string_release(models);

    code = run(pool, warm_up, &prefill);
    if (code == EXIT_SUCCESS)
        code = run(pool, first, &prefill);
    /* The same prompt, which is in the cache now. */
    if (code == EXIT_SUCCESS)
        code = run(pool, all, &decode);
    free(warm_up);
    free(first);
    free(all);
    if (code != EXIT_SUCCESS)
        return code;
    printf("{\"engine\":\"omlx\",\"device\":\"%s\",\"name\":\"prefill%ld\",\"batch\":1,\"tok_s\":%.2f}\n", device,
           prompt, (double)prompt / prefill.first_token);
    if (decode.tokens > decode.tokens_with_first)
        printf("{\"engine\":\"omlx\",\"device\":\"%s\",\"name\":\"decode\",\"batch\":1,\"tok_s\":%.2f}\n", device,
               (double)(decode.tokens - decode.tokens_with_first) / (decode.last_token - decode.first_token));
    return EXIT_SUCCESS;
}

int main(int argc, char **argv) {
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    omlx_pool *pool = NULL;
    omlx_error *error = NULL;
    long prompt = 512, steps = 64;
    int code, i;

    for (i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "-p") == 0)
            prompt = atol(argv[i + 1]);
        else if (strcmp(argv[i], "-n") == 0)
            steps = atol(argv[i + 1]);
        else
            break;
    }
    if (argc < 2 || i != argc || prompt < 1 || steps < 1) {
        fprintf(stderr, "usage: %s MODEL_DIR [-p PROMPT_TOKENS] [-n STEPS]\n", argv[0]);
        return 2;
    }
    options.models_dir = argv[1];
    if (omlx_pool_open(&options, &pool, &error) != OMLX_OK)
        return fail("omlx_pool_open", error);
    code = bench(pool, prompt, steps);
    omlx_pool_close(pool, NULL);
    omlx_pool_release(pool);
    return code;
}
