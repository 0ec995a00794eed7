/* What is kept of prompts: found, brought, written, pinned, cleared, over two pools. Arguments: the folder of the models,
 * and one for the cache. */
#include "harness.h"

#define PROMPT "[1,316,207,1910,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40]"
#define OTHER "[1,316,207,1910,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,999,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40]"
#define ASK(prompt) "{\"prompt\":" prompt ",\"max_tokens\":1,\"temperature\":0,\"ignore_eos\":true}"

/* All tokens of the prompt but the last, which is computed in any case. */
#define CACHED 39

static const char *models_dir, *cache_dir;

static omlx_pool *open_cached(void) {
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    omlx_pool *pool = NULL;
    omlx_error *error = NULL;
    options.models_dir = models_dir;
    options.cache_dir = cache_dir;
    options.cold_bytes = 1 << 30;
    CHECK_STATUS(OMLX_OK, omlx_pool_open(&options, &pool, &error));
    return pool;
}

/* The value behind `"key":` in a text of JSON, or behind the first one in the object of `"object":`. */
static const char *value(const char *json, const char *object, const char *key) {
    char name[64];
    if (object != NULL) {
        snprintf(name, sizeof name, "\"%s\":{", object);
        json = strstr(json, name);
        if (json == NULL)
            return "";
    }
    snprintf(name, sizeof name, "\"%s\":", key);
    json = strstr(json, name);
    return json == NULL ? "" : json + strlen(name);
}

static double number(const char *json, const char *object, const char *key) {
    char *end = NULL;
    const char *text = value(json, object, key);
    double parsed = strtod(text, &end);
    return end == text ? -1 : parsed;
}

static int is(const char *json, const char *key, const char *expected) {
    const char *text = value(json, NULL, key);
    size_t len = strlen(expected);
    return text[0] == '"' && strncmp(text + 1, expected, len) == 0 && text[len + 1] == '"';
}

/* Where the tokens of a request are. Freed by the caller. */
static omlx_string *find(omlx_pool *pool, const char *json) {
    omlx_string *text = NULL;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_cache_find(pool, json, strlen(json), &text, &error));
    return text;
}

static void check_found(omlx_pool *pool, const char *json, double in_pool, double cold, const char *stopped_by) {
    omlx_string *text = find(pool, json);
    const char *found = omlx_string_data(text);
    int as_expected = number(found, NULL, "tokens") == CACHED && number(found, NULL, "pool") == in_pool &&
                      number(found, NULL, "hot") == 0 && number(found, NULL, "cold") == cold &&
                      number(found, NULL, "missing") == CACHED - in_pool - cold && is(found, "stopped_by", stopped_by) &&
                      (number(found, NULL, "restore_seconds") > 0) == (cold > 0) &&
                      number(found, NULL, "compute_seconds") >= 0;
    CHECK(as_expected);
    if (!as_expected)
        fprintf(stderr, "  %s\n", found);
    omlx_string_release(text);
}

/* Loads the model, and waits until other tiers know it. */
static void load(omlx_pool *pool) {
    omlx_error *error = NULL;
    int known = 0, i;
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    for (i = 0; i < 12000 && !known; i++) {
        omlx_string *text = find(pool, ASK("[1,2]"));
        known = !is(omlx_string_data(text), "stopped_by", "not_identified");
        omlx_string_release(text);
        if (!known)
            sleep_ms(5);
    }
    CHECK(known);
}

static size_t ask(omlx_pool *pool, const char *json) {
    recorder r;
    size_t cached;
    recorder_init(&r);
    omlx_request_release(start(pool, json, &r));
    wait_destroyed(&r);
    check_ended(&r, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    cached = r.usage.cached_tokens;
    recorder_free(&r);
    return cached;
}

static double stat_of(omlx_pool *pool, const char *object, const char *key) {
    omlx_string *text = NULL;
    omlx_error *error = NULL;
    double found;
    CHECK_STATUS(OMLX_OK, omlx_cache_stats(pool, "tiny-chat", &text, &error));
    found = number(omlx_string_data(text), object, key);
    omlx_string_release(text);
    return found;
}

static void a_prompt_is_found_written_and_pinned(void) {
    omlx_pool *pool = open_cached();
    omlx_error *error = NULL;
    uint64_t tokens = 0;
    CHECK(stat_of(pool, NULL, "cold_limit") == 1 << 30 && stat_of(pool, NULL, "steps") == -1);
    load(pool);
    check_found(pool, ASK(PROMPT), 0, 0, "not_cached");
    CHECK(ask(pool, ASK(PROMPT)) == 0);
    check_found(pool, ASK(PROMPT), CACHED, 0, "complete");
    check_found(pool, ASK(OTHER), 19, 0, "other_tokens");
    CHECK_STATUS(OMLX_OK, omlx_cache_flush(pool, NULL, 60000, &error));
    CHECK(stat_of(pool, "cold", "entries") > 0 && stat_of(pool, "cold", "written_bytes_per_new_token") > 0);
    CHECK_STATUS(OMLX_OK, omlx_cache_pin(pool, ASK(PROMPT), strlen(ASK(PROMPT)), &tokens, &error));
    CHECK(tokens == CACHED + 1);
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_cache_unpin(pool, ASK(OTHER), strlen(ASK(OTHER)), &error));
    end_pool(pool);
}

static void it_comes_back_and_is_cleared(void) {
    omlx_pool *pool = open_cached();
    omlx_error *error = NULL;
    uint64_t tokens = 0, bytes = 0;
    load(pool);
    /* Pinned, it is not cleared; and it comes back by itself. */
    CHECK_STATUS(OMLX_OK, omlx_cache_clear(pool, NULL, 0, NULL, &error));
    CHECK_STATUS(OMLX_OK, omlx_cache_prefetch(pool, ASK(PROMPT), strlen(ASK(PROMPT)), &tokens, &error));
    CHECK(tokens == CACHED);
    check_found(pool, ASK(PROMPT), CACHED, 0, "complete");
    CHECK(ask(pool, ASK(PROMPT)) == CACHED);
    CHECK(stat_of(pool, "cold", "hit_tokens") > 0 && stat_of(pool, "cold", "read_seconds") > 0);
    CHECK_STATUS(OMLX_OK, omlx_cache_unpin(pool, ASK(PROMPT), strlen(ASK(PROMPT)), &error));
    /* The pools alone, then the rest. */
    CHECK_STATUS(OMLX_OK, omlx_cache_clear(pool, "tiny-chat", OMLX_CACHE_TIER_POOLS, &bytes, &error));
    CHECK(bytes > 0);
    check_found(pool, ASK(PROMPT), 0, CACHED, "complete");
    check_found(pool, ASK(OTHER), 0, 19, "other_tokens");
    CHECK_STATUS(OMLX_OK, omlx_cache_clear(pool, "tiny-chat", OMLX_CACHE_TIER_HOT | OMLX_CACHE_TIER_COLD, &bytes, &error));
    CHECK(bytes > 0);
    check_found(pool, ASK(PROMPT), 0, 0, "not_cached");
    CHECK(stat_of(pool, "cold", "entries") == 0);
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_cache_clear(pool, "nobody", 0, NULL, &error));
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_cache_clear(pool, NULL, 8, NULL, &error));
    end_pool(pool);
}

static void limits_change(void) {
    omlx_pool *pool = open_cached();
    omlx_cache_limits limits = OMLX_CACHE_LIMITS_INIT, now = OMLX_CACHE_LIMITS_INIT;
    omlx_error *error = NULL;
    limits.cold_bytes = 1 << 20;
    limits.cold_bytes_per_model = UINT64_MAX;
    limits.hot_percent = 1;
    CHECK_STATUS(OMLX_OK, omlx_cache_set_limits(pool, &limits, &error));
    CHECK(stat_of(pool, NULL, "cold_limit") == 1 << 20);
    CHECK_STATUS(OMLX_OK, omlx_cache_get_limits(pool, &now, &error));
    CHECK(now.struct_size == sizeof now && now.hot_percent == 0 && now.hot_bytes > 0);
    CHECK(now.cold_bytes == 1 << 20 && now.cold_bytes_per_model == UINT64_MAX);
    /* What was read can be set. */
    CHECK_STATUS(OMLX_OK, omlx_cache_set_limits(pool, &now, &error));
    now.struct_size = 4;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_cache_get_limits(pool, &now, &error));
    limits.hot_bytes = 1;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_cache_set_limits(pool, &limits, &error));
    limits.hot_bytes = 0;
    limits.hot_percent = 101;
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_cache_set_limits(pool, &limits, &error));
    end_pool(pool);
}

/* Nothing is kept without a folder, and hosts hear of it. */
static void without_a_folder(void) {
    omlx_pool *pool = open_pool(models_dir);
    omlx_cache_limits limits = OMLX_CACHE_LIMITS_INIT;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_E_UNSUPPORTED, omlx_cache_flush(pool, NULL, 1000, &error));
    limits.cold_bytes = 1 << 20;
    CHECK_STATUS(OMLX_E_UNSUPPORTED, omlx_cache_set_limits(pool, &limits, &error));
    end_pool(pool);
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    models_dir = argv[1];
    cache_dir = argv[2];
    a_prompt_is_found_written_and_pinned();
    it_comes_back_and_is_cleared();
    limits_change();
    without_a_folder();
    return finish("cache");
}
