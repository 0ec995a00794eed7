/* A host as it was when an interface was promised: built with every header that is kept, it must run with every later
 * library. It stands alone, so that nothing newer comes into it; it may get more, never less. Argument: the models. */
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

static const char request_json[] =
    "{\"model\":\"tiny-chat\",\"prompt\":[1,316,207,1910],\"max_tokens\":4,\"temperature\":0,\"ignore_eos\":true}";

typedef struct count {
    size_t tokens;
    int done, destroyed;
} count;

static int32_t on_event(void *user_data, const omlx_event *event) {
    count *seen = user_data;
    seen->tokens += event->token_count;
    seen->done += event->kind == OMLX_EVENT_KIND_DONE;
    return 0;
}

static void on_destroy(void *user_data) {
    ((count *)user_data)->destroyed++;
}

static void requests(omlx_pool *pool) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    const omlx_event *event = NULL;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    count seen = {0, 0, 0};
    size_t tokens = 0;
    int32_t status = -1;
    CHECK(omlx_generate(pool, request_json, strlen(request_json), NULL, &request, &error) == OMLX_OK);
    while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK) {
        tokens += event->token_count;
        if (event->kind == OMLX_EVENT_KIND_DONE) {
            status = event->status;
            CHECK(event->finish_reason == OMLX_FINISH_REASON_LENGTH && event->usage.completion_tokens == 4);
        }
    }
    CHECK(status == OMLX_OK && tokens == 4);
    omlx_request_release(request);

    options.callback = on_event;
    options.user_data = &seen;
    options.destroy = on_destroy;
    CHECK(omlx_generate(pool, request_json, strlen(request_json), &options, NULL, &error) == OMLX_OK);
    CHECK(omlx_pool_close(pool, &error) == OMLX_OK); /* It waits for callbacks. */
    CHECK(seen.done == 1 && seen.destroyed == 1);
}

int main(int argc, char **argv) {
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    omlx_pool *pool = NULL;
    omlx_error *error = NULL;
    omlx_string *text = NULL;
    omlx_tokens *tokens = NULL;
    if (argc != 2)
        return 2;
    if (omlx_check_abi(OMLX_ABI_VERSION, &error) != OMLX_OK) {
        fprintf(stderr, "%s\n", omlx_error_message(error));
        omlx_error_release(error);
        return 3;
    }
    options.models_dir = argv[1];
    CHECK(omlx_pool_open(&options, &pool, &error) == OMLX_OK);
    CHECK(omlx_pool_models(pool, &text, &error) == OMLX_OK && strstr(omlx_string_data(text), "tiny-chat") != NULL);
    omlx_string_release(text);
    CHECK(omlx_tokenize(pool, "tiny-chat", "Hello", 5, 0, &tokens, &error) == OMLX_OK && omlx_tokens_count(tokens) > 0);
    CHECK(omlx_detokenize(pool, "tiny-chat", omlx_tokens_data(tokens), omlx_tokens_count(tokens), &text, &error) == OMLX_OK);
    CHECK(omlx_string_len(text) == 5 && strcmp(omlx_string_data(text), "Hello") == 0);
    omlx_tokens_release(tokens);
    omlx_string_release(text);
    CHECK(omlx_model_load(pool, "nothing", &error) == OMLX_E_NOT_FOUND && omlx_error_status(error) == OMLX_E_NOT_FOUND);
    omlx_error_release(error);
    requests(pool);
    omlx_pool_release(pool);
    printf("kept: %d failures\n", failures);
    return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}
