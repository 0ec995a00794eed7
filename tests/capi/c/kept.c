/* A host as it was when an interface was promised: built with every header that is kept, it must run with every later
 * library. It uses all structs that may grow. It stands alone, so that nothing newer comes into it; it may get more, never
 * less. Arguments: a folder of encoders, the folder of a language model, and an empty folder. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "omlx.h"

static int failures;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            failures++; \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        } \
    } while (0)

#define ASK "{\"model\":\"tiny-chat\",\"prompt\":[1,316,207,1910],\"max_tokens\":4,\"temperature\":0,\"ignore_eos\":true}"
#define EMBED "{\"model\":\"bert\",\"input\":[\"a river\",\"a stone\"]}"
#define RERANK "{\"model\":\"bert-rerank\",\"query\":\"a river\",\"documents\":[\"water\",\"a stone\",\"fish\"],\"top_n\":2}"

/* What stands behind a struct, which the library must leave alone. */
#define CANARY 0xa5a5a5a5a5a5a5a5u

typedef struct count {
    size_t tokens;
    int done, calls, destroyed;
} count;

/* Alive for ever: the last call may come late. */
static count woken, downloaded;

static int32_t on_event(void *user_data, const omlx_event *event) {
    count *seen = user_data;
    seen->tokens += event->token_count;
    seen->done += event->kind == OMLX_EVENT_KIND_DONE;
    return 0;
}

static void on_wake(void *user_data) {
    ((count *)user_data)->calls++;
}

static int32_t on_progress(void *user_data, const omlx_download_progress *progress) {
    count *seen = user_data;
    seen->calls++;
    seen->done += progress->state == OMLX_DOWNLOAD_STATE_FAILED;
    return 0;
}

static void on_destroy(void *user_data) {
    ((count *)user_data)->destroyed++;
}

static void tokens_and_text(omlx_pool *pool) {
    omlx_string *text = NULL;
    omlx_tokens *tokens = NULL;
    omlx_error *error = NULL;
    CHECK(omlx_pool_models(pool, &text, &error) == OMLX_OK && strstr(omlx_string_data(text), "tiny-chat") != NULL);
    omlx_string_release(text);
    CHECK(omlx_tokenize(pool, "tiny-chat", "Hello", 5, 0, &tokens, &error) == OMLX_OK && omlx_tokens_count(tokens) > 0);
    CHECK(omlx_detokenize(pool, "tiny-chat", omlx_tokens_data(tokens), omlx_tokens_count(tokens), &text, &error) == OMLX_OK);
    CHECK(omlx_string_len(text) == 5 && strcmp(omlx_string_data(text), "Hello") == 0);
    omlx_tokens_release(tokens);
    omlx_string_release(text);
}

static void errors(omlx_pool *pool) {
    omlx_error *error = NULL;
    CHECK(omlx_model_load(pool, "nothing", &error) == OMLX_E_NOT_FOUND);
    CHECK(omlx_error_status(error) == OMLX_E_NOT_FOUND && omlx_error_retry_after_ms(error) == 0);
    CHECK(strstr(omlx_error_message(error), "nothing") != NULL);
    CHECK(strcmp(omlx_status_name(OMLX_E_NOT_FOUND), "OMLX_E_NOT_FOUND") == 0);
    omlx_error_release(error);
}

static void limits(omlx_pool *pool) {
    struct { omlx_cache_limits known; uint64_t behind; } now = {OMLX_CACHE_LIMITS_INIT, CANARY};
    omlx_cache_limits wanted = OMLX_CACHE_LIMITS_INIT;
    omlx_error *error = NULL;
    wanted.hot_bytes = 1 << 20;
    CHECK(omlx_cache_set_limits(pool, &wanted, &error) == OMLX_OK);
    CHECK(omlx_cache_get_limits(pool, &now.known, &error) == OMLX_OK);
    CHECK(now.known.struct_size == sizeof now.known && now.known.hot_percent == 0 && now.known.hot_bytes == 1 << 20);
    CHECK(now.known.cold_bytes == 0 && now.known.cold_bytes_per_model == UINT64_MAX && now.behind == CANARY);
}

static void pulled(omlx_pool *pool) {
    const omlx_event *event = NULL;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    size_t tokens = 0;
    int32_t status = -1;
    CHECK(omlx_generate(pool, ASK, strlen(ASK), NULL, &request, &error) == OMLX_OK);
    CHECK(strcmp(omlx_request_model(request), "tiny-chat") == 0);
    CHECK(omlx_request_set_wake(request, on_wake, &woken, on_destroy, &error) == OMLX_OK);
    while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK) {
        tokens += event->token_count;
        if (event->kind == OMLX_EVENT_KIND_DONE) {
            status = event->status;
            CHECK(event->finish_reason == OMLX_FINISH_REASON_LENGTH && event->usage.completion_tokens == 4);
        }
    }
    CHECK(status == OMLX_OK && tokens == 4);
    omlx_request_release(request);
}

/* The result of an `omlx_embed` or `omlx_rerank`. */
static void encoded(omlx_request *request, uint32_t kind, size_t rows) {
    const omlx_event *event = NULL;
    int results = 0, ends = 0;
    while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK) {
        if (event->kind == kind) {
            results++;
            CHECK(event->rows == rows && event->columns > 0 && event->values != NULL && event->truncated == 0);
            CHECK(event->order_count == (kind == OMLX_EVENT_KIND_SCORES ? 2u : 0u));
            CHECK(event->order_count == 0 || event->values[event->order[0]] >= event->values[event->order[1]]);
        }
        ends += event->kind == OMLX_EVENT_KIND_DONE && event->status == OMLX_OK && event->usage.prompt_tokens > 0;
    }
    CHECK(results == 1 && ends == 1);
    omlx_request_release(request);
}

static void encoders(omlx_pool *pool) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    CHECK(omlx_embed(pool, EMBED, strlen(EMBED), &options, &request, &error) == OMLX_OK);
    encoded(request, OMLX_EVENT_KIND_EMBEDDINGS, 2);
    CHECK(omlx_rerank(pool, RERANK, strlen(RERANK), &options, &request, &error) == OMLX_OK);
    encoded(request, OMLX_EVENT_KIND_SCORES, 3);
}

static void downloads(omlx_pool *pool, const char *folder) {
    struct { omlx_download_progress known; uint64_t behind; } now = {OMLX_DOWNLOAD_PROGRESS_INIT, CANARY};
    omlx_download *download = NULL;
    omlx_string *result = NULL;
    omlx_error *error = NULL;
    char json[512];
    snprintf(json, sizeof json, "{\"repo\":\"org/name\",\"folder\":\"%s\",\"offline\":true}", folder);
    CHECK(omlx_download_start(pool, json, strlen(json), &download, &error) == OMLX_OK);
    CHECK(omlx_download_set_callback(download, on_progress, &downloaded, on_destroy, &error) == OMLX_OK);
    CHECK(omlx_download_wait(download, -1, &result, &error) == OMLX_E_OFFLINE && result == NULL);
    CHECK(omlx_error_status(error) == OMLX_E_OFFLINE && strstr(omlx_error_message(error), "org/name") != NULL);
    omlx_error_release(error);
    error = NULL;
    CHECK(omlx_download_status(download, &now.known, &error) == OMLX_OK);
    CHECK(now.known.struct_size == sizeof now.known && now.known.state == OMLX_DOWNLOAD_STATE_FAILED);
    CHECK(now.known.bytes_done == 0 && now.known.retries == 0 && now.behind == CANARY);
    CHECK(downloaded.calls > 0 && downloaded.done == 1);
    omlx_download_release(download);
}

static void called(omlx_pool *pool) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_error *error = NULL;
    count seen = {0, 0, 0, 0};
    options.callback = on_event;
    options.user_data = &seen;
    options.destroy = on_destroy;
    CHECK(omlx_generate(pool, ASK, strlen(ASK), &options, NULL, &error) == OMLX_OK);
    CHECK(omlx_pool_close(pool, &error) == OMLX_OK); /* It waits for callbacks. */
    CHECK(seen.done == 1 && seen.destroyed == 1);
    CHECK(woken.calls > 0 && woken.destroyed == 1);
}

int main(int argc, char **argv) {
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    omlx_pool *pool = NULL;
    omlx_error *error = NULL;
    if (argc != 4)
        return 2;
    if (omlx_check_abi(OMLX_ABI_VERSION, &error) != OMLX_OK) {
        fprintf(stderr, "%s\n", omlx_error_message(error));
        omlx_error_release(error);
        return 3;
    }
    options.models_dir = argv[1];
    if (omlx_pool_open(&options, &pool, &error) != OMLX_OK) {
        fprintf(stderr, "%s\n", omlx_error_message(error));
        omlx_error_release(error);
        return 4;
    }
    CHECK(omlx_pool_add_model(pool, argv[2], "tiny-chat", &error) == OMLX_OK);
    tokens_and_text(pool);
    errors(pool);
    limits(pool);
    pulled(pool);
    encoders(pool);
    downloads(pool, argv[3]);
    called(pool);
    omlx_pool_release(pool);
    printf("kept: %d failures\n", failures);
    return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
