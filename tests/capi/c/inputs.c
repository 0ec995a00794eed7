/* What hosts pass in, good and bad, and what the text functions make of it. Argument: the folder of the models. */
#include "harness.h"

#include <sys/stat.h>
#include <unistd.h>

static const char *models_dir;

/* Expects `omlx_generate` to refuse `len` bytes, to run the destroy function, and to leave the output alone. */
static void refused_bytes(omlx_pool *pool, const char *json, size_t len, omlx_status expected) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_request *const untouched = (omlx_request *)&options;
    omlx_request *request = untouched;
    omlx_error *error = NULL;
    recorder r;
    recorder_init(&r);
    options.callback = on_event;
    options.user_data = &r;
    options.destroy = on_destroy;
    if (!CHECK_STATUS(expected, omlx_generate(pool, json, len, &options, &request, &error)))
        fprintf(stderr, "  for %.80s\n", json);
    CHECK(request == untouched);
    CHECK(r.destroyed == 1 && r.text_events == 0 && r.done_events == 0);
    recorder_free(&r);
}

static void refused(omlx_pool *pool, const char *json, omlx_status expected) {
    refused_bytes(pool, json, strlen(json), expected);
}

static void bad_requests(omlx_pool *pool) {
    static const char nul_inside[] = "{\"prompt\":\"a\0b\"}";
    static char deep[200001];
    refused(pool, "{\"model\":\"nothing\",\"prompt\":\"x\"}", OMLX_E_NOT_FOUND);
    refused(pool, "", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"x\"} and more", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"\xff\xfe\"}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"\xc3\"}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"\\ud800\"}", OMLX_E_INVALID_REQUEST);
    refused_bytes(pool, nul_inside, sizeof nul_inside - 1, OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"messages\":[]}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"x\",\"max_tokens\":1e400}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"x\",\"max_tokens\":99999999999999999999999999}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"x\",\"n\":17}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"prompt\":\"x\",\"unheard_of\":1}", OMLX_E_INVALID_REQUEST);
    refused(pool, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"x\"},"
                  "{\"type\":\"image_url\",\"image_url\":{\"url\":\"data:,\"}}]}]}", OMLX_E_UNSUPPORTED);
    memset(deep, '[', sizeof deep - 1);
    refused(pool, deep, OMLX_E_INVALID_REQUEST);
    memcpy(deep, "{\"messages\":", 12);
    refused(pool, deep, OMLX_E_INVALID_REQUEST);
}

/* A lenient request ignores the key that a strict one refuses. */
static void lenient_requests(omlx_pool *pool) {
    const char *json = "{\"prompt\":[5,6],\"unheard_of\":{\"a\":1},\"max_tokens\":1,\"ignore_eos\":true}";
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    const omlx_event *event = NULL;
    CHECK_STATUS(OMLX_E_INVALID_REQUEST, omlx_generate(pool, json, strlen(json), &options, &request, &error));
    options.lenient = 1;
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, strlen(json), &options, &request, &error));
    do
        CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
    while (event != NULL && event->kind != OMLX_EVENT_KIND_DONE);
    CHECK(event->status == OMLX_OK);
    omlx_request_release(request);
}

/* What can be told only on other threads arrives in the done event. */
static void late_failures(omlx_pool *pool) {
    static const struct { const char *json; omlx_status status; } cases[] = {
        {"{\"prompt\":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20]}", OMLX_E_CONTEXT_LENGTH},
        {"{\"prompt\":[99999999]}", OMLX_E_INVALID_REQUEST},
        {"{\"prompt\":[1],\"logit_bias\":{\"99999999\":1}}", OMLX_E_INVALID_REQUEST},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"chat_template\":\"nothing\"}", OMLX_E_INVALID_REQUEST},
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        recorder r;
        recorder_init(&r);
        omlx_request_release(start(pool, cases[i].json, &r));
        wait_destroyed(&r);
        check_ended(&r, cases[i].status, OMLX_FINISH_REASON_ERROR);
        CHECK(r.text_events == 0 && r.usage.completion_tokens == 0);
        recorder_free(&r);
    }
}

/* A NUL character is a character like others where JSON allows it. */
static void nul_characters(omlx_pool *pool) {
    const char *json = "{\"prompt\":\"a\\u0000b\",\"max_tokens\":1,\"ignore_eos\":true}";
    recorder r;
    recorder_init(&r);
    omlx_request_release(start(pool, json, &r));
    wait_destroyed(&r);
    check_ended(&r, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    recorder_free(&r);
}

static void option_structs_of_other_sizes(omlx_pool *pool) {
    struct { omlx_pool_options known; char tail[64]; } pool_options;
    struct { omlx_generate_options known; char tail[64]; } options;
    const char *json = "{\"prompt\":[5,6],\"max_tokens\":1,\"ignore_eos\":true}";
    const omlx_pool_options pool_init = OMLX_POOL_OPTIONS_INIT;
    const omlx_generate_options init = OMLX_GENERATE_OPTIONS_INIT;
    omlx_pool *other = NULL;
    omlx_error *error = NULL;
    recorder r;

    memset(&pool_options, 0, sizeof pool_options);
    pool_options.known = pool_init;
    pool_options.known.models_dir = models_dir;
    pool_options.known.struct_size = sizeof pool_options;
    CHECK_STATUS(OMLX_OK, omlx_pool_open(&pool_options.known, &other, &error));
    omlx_pool_release(other);
    pool_options.tail[sizeof pool_options.tail - 1] = 1;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_open(&pool_options.known, &other, &error));
    pool_options.known.struct_size = sizeof(uint32_t);
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_open(&pool_options.known, &other, &error));
    pool_options.known = pool_init;
    pool_options.known.device = 77;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_open(&pool_options.known, &other, &error));
    pool_options.known = pool_init;
    pool_options.known.precision = 9;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_open(&pool_options.known, &other, &error));
    pool_options.known = pool_init;
    pool_options.known.threads = 1u << 20;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_open(&pool_options.known, &other, &error));
    /* The struct of an older header ends before these two. */
    pool_options.known.struct_size = offsetof(omlx_pool_options, threads);
    CHECK_STATUS(OMLX_OK, omlx_pool_open(&pool_options.known, &other, &error));
    omlx_pool_release(other);
    pool_options.known = pool_init;
    pool_options.known.models_dir = "no/such/folder";
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_pool_open(&pool_options.known, &other, &error));

    recorder_init(&r);
    memset(&options, 0, sizeof options);
    options.known = init;
    options.known.callback = on_event;
    options.known.user_data = &r;
    options.known.destroy = on_destroy;
    options.known.struct_size = sizeof options;
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, strlen(json), &options.known, NULL, &error));
    wait_destroyed(&r);
    check_ended(&r, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    options.tail[0] = 1;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_generate(pool, json, strlen(json), &options.known, NULL, &error));
    CHECK(r.destroyed == 2); /* Refused, but what it understood it honours. */
    options.known.struct_size = sizeof(uint32_t);
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_generate(pool, json, strlen(json), &options.known, NULL, &error));
    CHECK(r.destroyed == 2); /* It cannot know where the function would be. */
    recorder_free(&r);
}

static void tokens_and_text(omlx_pool *pool) {
    const char *text = "Tell me a short story about a fox. \xc3\xa4\xe2\x82\xac\xf0\x9f\xa6\x8a";
    omlx_tokens *tokens = NULL;
    omlx_string *back = NULL;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_tokenize(pool, NULL, text, strlen(text), 0, &tokens, &error));
    CHECK(omlx_tokens_count(tokens) > 5 && omlx_tokens_count(tokens) < strlen(text));
    CHECK_STATUS(OMLX_OK, omlx_detokenize(pool, "tiny-chat", omlx_tokens_data(tokens), omlx_tokens_count(tokens), &back, &error));
    CHECK(omlx_string_len(back) == strlen(text) && strcmp(omlx_string_data(back), text) == 0);
    omlx_tokens_release(tokens);
    omlx_string_release(back);
    CHECK_STATUS(OMLX_OK, omlx_tokenize(pool, NULL, "", 0, 0, &tokens, &error));
    CHECK(omlx_tokens_count(tokens) == 0 && omlx_tokens_data(tokens) == NULL);
    omlx_tokens_release(tokens);
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_tokenize(pool, NULL, "\xff", 1, 0, &tokens, &error));
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_tokenize(pool, "nothing", text, strlen(text), 0, &tokens, &error));
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_tokenize(pool, "\xff", text, strlen(text), 0, &tokens, &error));
}

static void templates(omlx_pool *pool) {
    const char *json = "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi \\\"you\\\"\"}]}";
    const char *expected = "<|im_start|>user\nHi \"you\"<|im_end|>\n<|im_start|>assistant\n";
    const char *prompt = "{\"prompt\":\"x\"}", *broken = "{\"messages\":";
    const char *foreign = "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}],\"store\":true}";
    omlx_string *text = NULL;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_render_template(pool, json, strlen(json), 0, &text, &error));
    CHECK(strcmp(omlx_string_data(text), expected) == 0);
    omlx_string_release(text);
    CHECK_STATUS(OMLX_E_INVALID_REQUEST, omlx_render_template(pool, prompt, strlen(prompt), 0, &text, &error));
    CHECK_STATUS(OMLX_E_INVALID_REQUEST, omlx_render_template(pool, broken, strlen(broken), 0, &text, &error));
    /* A key of somebody else's API. */
    CHECK_STATUS(OMLX_E_INVALID_REQUEST, omlx_render_template(pool, foreign, strlen(foreign), 0, &text, &error));
    CHECK_STATUS(OMLX_OK, omlx_render_template(pool, foreign, strlen(foreign), 1, &text, &error));
    omlx_string_release(text);
}

static int models_contain(omlx_pool *pool, const char *what) {
    omlx_string *models = NULL;
    omlx_error *error = NULL;
    int found;
    CHECK_STATUS(OMLX_OK, omlx_pool_models(pool, &models, &error));
    found = strstr(omlx_string_data(models), what) != NULL;
    CHECK(omlx_string_data(models)[0] == '[' && strlen(omlx_string_data(models)) == omlx_string_len(models));
    omlx_string_release(models);
    return found;
}

static void configure(omlx_pool *pool, const char *id, const char *json) {
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_model_configure(pool, id, json, strlen(json), &error));
}

/* What a pool tells of its models, and what it is for. */
static void model_facts(void) {
    const char *unknown = "{\"kind\":\"vision\"}";
    omlx_pool *pool = open_pool(models_dir);
    omlx_error *error = NULL;
    CHECK(models_contain(pool, "\"kind\":\"llm\"") && models_contain(pool, "\"license\":\"apache-2.0\""));
    CHECK(models_contain(pool, "\"quantization\":{\"bits\":") && models_contain(pool, "\"mode\":\"affine\"}"));
    CHECK(!models_contain(pool, "\"problem") && !models_contain(pool, "\"alias\""));
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    configure(pool, "tiny-chat", "{\"alias\":\"chat\",\"kind\":\"embedding\"}");
    CHECK(models_contain(pool, "\"alias\":\"chat\"") && models_contain(pool, "\"kind\":\"embedding\""));
    CHECK(models_contain(pool, "\"loaded\":false")); /* What ran was of the other kind. */
    configure(pool, "chat", "{\"kind\":null}");
    CHECK(models_contain(pool, "\"kind\":\"llm\""));
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "chat", &error));
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_model_configure(pool, "chat", unknown, strlen(unknown), &error));
    end_pool(pool);
}

static void write_file(const char *path, const char *content) {
    FILE *file = fopen(path, "w");
    CHECK(file != NULL && fputs(content, file) >= 0 && fclose(file) == 0);
}

/* A hub's cache that changes while a pool looks at it. */
static void models_that_come_and_go(void) {
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    char cache[] = "/tmp/omlx-hub-XXXXXX", path[4][256];
    omlx_error *error = NULL;
    omlx_pool *pool = NULL;
    size_t i;
    CHECK(mkdtemp(cache) != NULL);
    snprintf(path[0], sizeof path[0], "%s/models--org--new", cache);
    snprintf(path[1], sizeof path[1], "%s/models--org--new/snapshots", cache);
    snprintf(path[2], sizeof path[2], "%s/models--org--new/snapshots/0123", cache);
    snprintf(path[3], sizeof path[3], "%s/models--org--new/snapshots/0123/config.json", cache);
    options.models_dir = models_dir;
    options.hub_cache = cache;
    CHECK_STATUS(OMLX_OK, omlx_pool_open(&options, &pool, &error));
    for (i = 0; i < 3; i++)
        CHECK(mkdir(path[i], 0700) == 0);
    write_file(path[3], "{\"model_type\":\"llava\",\"vision_config\":{},\"max_position_embeddings\":8}");
    CHECK(!models_contain(pool, "org/new"));
    CHECK_STATUS(OMLX_OK, omlx_pool_rescan(pool, &error));
    CHECK(models_contain(pool, "\"id\":\"org/new\"") && models_contain(pool, "\"kind\":\"vision\""));
    CHECK(models_contain(pool, "\"problem\":\"unsupported: vision"));
    CHECK(models_contain(pool, "\"problem_status\":\"OMLX_E_UNSUPPORTED\""));
    refused(pool, "{\"model\":\"org/new\",\"prompt\":\"x\"}", OMLX_E_UNSUPPORTED);
    CHECK(remove(path[3]) == 0);
    for (i = 3; i > 0; i--)
        CHECK(rmdir(path[i - 1]) == 0);
    CHECK_STATUS(OMLX_OK, omlx_pool_rescan(pool, &error));
    CHECK(!models_contain(pool, "org/new") && models_contain(pool, "tiny-chat"));
    CHECK(rmdir(cache) == 0);
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_pool_rescan(pool, &error));
    CHECK(models_contain(pool, "tiny-chat"));
    CHECK_STATUS(OMLX_OK, omlx_pool_close(pool, &error));
    CHECK_STATUS(OMLX_E_CLOSED, omlx_pool_rescan(pool, &error));
    omlx_pool_release(pool);
}

static void model_lists(void) {
    omlx_pool *pool = open_pool(models_dir);
    omlx_error *error = NULL;
    char folder[4096];
    snprintf(folder, sizeof folder, "%s/tiny-chat", models_dir);
    CHECK(models_contain(pool, "\"id\":\"tiny-chat\"") && models_contain(pool, "\"model_type\":\"qwen3\""));
    CHECK(models_contain(pool, "\"loaded\":false") && !models_contain(pool, "\"device\""));
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    CHECK(models_contain(pool, "\"loaded\":true") && models_contain(pool, "\"device\":"));
    CHECK_STATUS(OMLX_OK, omlx_pool_add_model(pool, folder, "other", &error));
    CHECK(models_contain(pool, "\"id\":\"other\""));
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_add_model(pool, folder, "other", &error));
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_add_model(pool, folder, NULL, &error)); /* tiny-chat is there. */
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_pool_add_model(pool, folder, "", &error));
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_pool_add_model(pool, "no/such/folder", "new", &error));
    /* With two models, a request must name one. */
    refused(pool, "{\"prompt\":\"x\"}", OMLX_E_INVALID_REQUEST);
    end_pool(pool);
}

typedef struct log_lines { pthread_mutex_t lock; int lines, loaded, destroyed; } log_lines;

static void on_log(void *user_data, uint32_t level, const char *message) {
    log_lines *log = user_data;
    pthread_mutex_lock(&log->lock);
    log->lines++;
    log->loaded += level == OMLX_LOG_LEVEL_INFO && strstr(message, "loaded") != NULL;
    pthread_mutex_unlock(&log->lock);
}

static void on_log_destroy(void *user_data) {
    ((log_lines *)user_data)->destroyed++;
}

static void log_hooks(void) {
    static log_lines info = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0}, silent = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0};
    omlx_error *error = NULL;
    omlx_pool *pool = open_pool(models_dir);
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(on_log, OMLX_LOG_LEVEL_INFO, &info, on_log_destroy, &error));
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    CHECK(info.loaded == 1 && info.destroyed == 0);
    CHECK_STATUS(OMLX_OK, omlx_model_unload(pool, "tiny-chat", 0, NULL, &error));
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(on_log, OMLX_LOG_LEVEL_ERROR, &silent, on_log_destroy, &error));
    CHECK(info.destroyed == 1);
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    CHECK(silent.lines == 0 && info.loaded == 1);
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_set_log_hook(on_log, 99, &info, on_log_destroy, &error));
    CHECK(info.destroyed == 2 && silent.destroyed == 0);
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(NULL, 0, NULL, NULL, &error));
    CHECK(silent.destroyed == 1);
    end_pool(pool);
}

static void versions(void) {
    omlx_error *error = NULL;
    CHECK(omlx_abi_version() == OMLX_ABI_VERSION);
    CHECK_STATUS(OMLX_OK, omlx_check_abi(OMLX_ABI_VERSION, &error));
    CHECK_STATUS(OMLX_E_UNSUPPORTED, omlx_check_abi(OMLX_ABI_VERSION + 1, &error));
    CHECK(strcmp(omlx_status_name(OMLX_E_CONTEXT_LENGTH), "OMLX_E_CONTEXT_LENGTH") == 0);
    CHECK(strcmp(omlx_status_name(-7), "OMLX_E_UNKNOWN") == 0);
}

int main(int argc, char **argv) {
    omlx_pool *pool, *small = NULL;
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    omlx_error *error = NULL;
    if (argc != 2)
        return 2;
    models_dir = argv[1];
    versions();
    pool = open_pool(models_dir);
    bad_requests(pool);
    lenient_requests(pool);
    nul_characters(pool);
    option_structs_of_other_sizes(pool);
    tokens_and_text(pool);
    templates(pool);
    end_pool(pool);
    options.models_dir = models_dir;
    options.context_length = 16;
    CHECK_STATUS(OMLX_OK, omlx_pool_open(&options, &small, &error));
    late_failures(small);
    end_pool(small);
    model_lists();
    model_facts();
    models_that_come_and_go();
    log_hooks();
    return finish("inputs");
}
