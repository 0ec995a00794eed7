/* Every function that is not marked blocking, called in every kind of callback: it returns at once and does what it says there
 * too. Arguments: a folder of encoders, the folder of a language model, and an empty folder. */
#include "harness.h"

#define ASK "{\"model\":\"tiny-chat\",\"prompt\":[1,316,207,1910],\"max_tokens\":4,\"temperature\":0,\"ignore_eos\":true}"
#define EMBED "{\"model\":\"bert\",\"input\":\"a stone\"}"
#define RERANK "{\"model\":\"bert-rerank\",\"query\":\"a\",\"documents\":[\"b\"]}"

/* Longest that a function which does not block may take in a callback, in seconds, on a busy machine. */
#define AT_ONCE 2.0

static omlx_pool *pool;
static const char *encoders, *chat;
static char download_json[512];
static pthread_t main_thread;

static void on_log(void *user_data, uint32_t level, const char *message) {
    (void)user_data, (void)level, (void)message;
}

static void on_wake_nothing(void *user_data) {
    (void)user_data;
}

static int32_t on_progress_nothing(void *user_data, const omlx_download_progress *progress) {
    (void)user_data, (void)progress;
    return 0;
}

static void errors_and_versions(void) {
    omlx_error *error = NULL;
    CHECK(omlx_version()[0] != '\0' && omlx_mlx_version()[0] != '\0' && omlx_abi_version() == OMLX_ABI_VERSION);
    CHECK(strcmp(omlx_status_name(OMLX_E_BUSY), "OMLX_E_BUSY") == 0);
    CHECK_STATUS(OMLX_OK, omlx_check_abi(OMLX_ABI_VERSION, &error));
    CHECK(omlx_check_abi(OMLX_ABI_VERSION + 1, &error) == OMLX_E_UNSUPPORTED);
    CHECK(omlx_error_status(error) == OMLX_E_UNSUPPORTED && omlx_error_message(error)[0] != '\0');
    CHECK(omlx_error_retry_after_ms(error) == 0);
    omlx_error_release(error);
}

static void take(omlx_string *text, const char *part) {
    CHECK(omlx_string_len(text) > 0 && strstr(omlx_string_data(text), part) != NULL);
    omlx_string_release(text);
}

static void pool_functions(void) {
    omlx_string *text = NULL;
    omlx_error *error = NULL;
    omlx_cache_limits limits = OMLX_CACHE_LIMITS_INIT;
    omlx_pool_retain(pool);
    omlx_pool_release(pool);
    CHECK_STATUS(OMLX_OK, omlx_pool_metrics(pool, OMLX_METRICS_FORMAT_JSON, &text, &error));
    take(text, "\"models\"");
    CHECK_STATUS(OMLX_OK, omlx_pool_status(pool, &text, &error));
    take(text, "\"memory\"");
    CHECK_STATUS(OMLX_OK, omlx_pool_models(pool, &text, &error));
    take(text, "tiny-chat");
    CHECK_STATUS(OMLX_OK, omlx_pool_set_memory_limit(pool, 0, 0, &error));
    CHECK_STATUS(OMLX_OK, omlx_model_configure(pool, "bert", "{\"ttl_seconds\":600}", 19, &error));
    CHECK_STATUS(OMLX_OK, omlx_model_settings(pool, "bert", &text, &error));
    take(text, "600");
    CHECK_STATUS(OMLX_OK, omlx_cache_stats(pool, "tiny-chat", &text, &error));
    take(text, "{");
    CHECK_STATUS(OMLX_OK, omlx_cache_get_limits(pool, &limits, &error));
    CHECK(limits.struct_size == sizeof limits && limits.cold_bytes == 0);
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(on_log, OMLX_LOG_LEVEL_ERROR, NULL, NULL, &error));
    CHECK_STATUS(OMLX_OK, omlx_set_log_hook(NULL, OMLX_LOG_LEVEL_ERROR, NULL, NULL, &error));
    /* What hosts get of functions that block, without calling these. */
    CHECK(omlx_tokens_count(NULL) == 0 && omlx_tokens_data(NULL) == NULL);
    omlx_tokens_release(NULL);
}

enum { KINDS = 3 };

/* The kinds of requests. */
static const struct { const char *json; omlx_status (*start)(omlx_pool *, const char *, size_t,
    const omlx_generate_options *, omlx_request **, omlx_error **); } kinds[KINDS] = {
    {ASK, omlx_generate}, {EMBED, omlx_embed}, {RERANK, omlx_rerank}};

/* A request is started, handed around and ended; it goes on or not as the header says. */
static void request_functions(void) {
    int i;
    for (i = 0; i < KINDS; i++) {
        const omlx_event *event = NULL;
        omlx_request *request = NULL;
        omlx_error *error = NULL;
        omlx_status status;
        CHECK_STATUS(OMLX_OK, kinds[i].start(pool, kinds[i].json, strlen(kinds[i].json), NULL, &request, &error));
        CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, on_wake_nothing, NULL, NULL, &error));
        status = omlx_request_next(request, 0, &event, NULL);
        CHECK(status == OMLX_OK || status == OMLX_E_TIMEOUT);
        CHECK(omlx_request_model(request)[0] != '\0');
        omlx_request_retain(request);
        omlx_request_release(request);
        omlx_request_cancel(request);
        omlx_request_release(request);
    }
}

static void download_functions(void) {
    omlx_download_progress progress = OMLX_DOWNLOAD_PROGRESS_INIT;
    omlx_download *download = NULL;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_download_start(pool, download_json, strlen(download_json), &download, &error));
    CHECK_STATUS(OMLX_OK, omlx_download_set_callback(download, on_progress_nothing, NULL, NULL, &error));
    CHECK_STATUS(OMLX_OK, omlx_download_status(download, &progress, &error));
    CHECK(omlx_download_wait(download, 0, NULL, NULL) != OMLX_OK);
    omlx_download_retain(download);
    omlx_download_release(download);
    omlx_download_cancel(download);
    omlx_download_release(download);
}

/* What took too long, or waits for what the callback holds up, shows here. */
static void call_everything(const char *where) {
    double before = now();
    errors_and_versions();
    pool_functions();
    request_functions();
    download_functions();
    if (now() - before > AT_ONCE) {
        failures++;
        fprintf(stderr, "in the %s function something blocked: %.1f s\n", where, now() - before);
    }
}

typedef struct place {
    const char *name;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int calls, destroyed;
} place;

static void enter(place *p) {
    int first;
    pthread_mutex_lock(&p->lock);
    first = p->calls++ == 0;
    pthread_mutex_unlock(&p->lock);
    if (first)
        call_everything(p->name);
}

static int32_t in_event(void *user_data, const omlx_event *event) {
    (void)event;
    enter(user_data);
    return 0;
}

static void in_wake(void *user_data) {
    enter(user_data);
}

static int32_t in_progress(void *user_data, const omlx_download_progress *progress) {
    (void)progress;
    enter(user_data);
    return 0;
}

static void gone(place *p) {
    pthread_mutex_lock(&p->lock);
    p->destroyed++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

static void in_destroy(void *user_data) {
    call_everything("destroy");
    gone(user_data);
}

static void wait_place(place *p) {
    pthread_mutex_lock(&p->lock);
    while (p->destroyed == 0)
        pthread_cond_wait(&p->changed, &p->lock);
    CHECK(p->calls > 0 && p->destroyed == 1);
    pthread_mutex_unlock(&p->lock);
}

#define PLACE(name) {name, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0}

static void every_kind_of_callback(void) {
    place event = PLACE("event"), wake = PLACE("wake"), progress = PLACE("progress");
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    const omlx_event *read = NULL;
    omlx_request *request = NULL;
    omlx_download *download = NULL;
    omlx_error *error = NULL;
    omlx_status status;

    options.callback = in_event;
    options.user_data = &event;
    options.destroy = in_destroy;
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, ASK, strlen(ASK), &options, NULL, &error));
    wait_place(&event);

    CHECK_STATUS(OMLX_OK, omlx_generate(pool, ASK, strlen(ASK), NULL, &request, &error));
    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, in_wake, &wake, in_destroy, &error));
    while (omlx_request_next(request, -1, &read, NULL) == OMLX_OK)
        ;
    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, NULL, NULL, NULL, &error));
    wait_place(&wake);
    omlx_request_release(request);

    CHECK_STATUS(OMLX_OK, omlx_download_start(pool, download_json, strlen(download_json), &download, &error));
    CHECK_STATUS(OMLX_OK, omlx_download_set_callback(download, in_progress, &progress, in_destroy, &error));
    status = omlx_download_wait(download, -1, NULL, NULL);
    CHECK(status == OMLX_E_OFFLINE || status == OMLX_E_BUSY); /* One of the others may still be ending. */
    wait_place(&progress);
    omlx_download_release(download);
}

/* A pool of its own, so that a callback can give back its last reference. */
static omlx_pool *fresh_pool(void) {
    omlx_pool *fresh = open_pool(encoders);
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_pool_add_model(fresh, chat, "tiny-chat", &error));
    return fresh;
}

/* A callback that reads its own request, which has none to read; that cancels itself; that gives its pool's handle back: the last
 * one, on the thread of the callbacks. */
typedef struct own {
    recorder r;
    omlx_pool *pool;
    omlx_request *request;
} own;

static int32_t on_own_event(void *user_data, const omlx_event *event) {
    own *o = user_data;
    const omlx_event *read = NULL;
    int first;
    pthread_mutex_lock(&o->r.lock);
    while (o->request == NULL)
        pthread_cond_wait(&o->r.changed, &o->r.lock);
    first = o->r.text_events == 0 && event->kind == OMLX_EVENT_KIND_TEXT;
    pthread_mutex_unlock(&o->r.lock);
    if (first) {
        CHECK(omlx_request_next(o->request, 0, &read, NULL) == OMLX_E_INVALID_ARGUMENT);
        CHECK(omlx_request_set_wake(o->request, on_wake_nothing, NULL, NULL, NULL) == OMLX_E_INVALID_ARGUMENT);
        omlx_request_cancel(o->request);
        omlx_request_release(o->request);
        omlx_pool_release(o->pool);
    }
    record(&o->r, event);
    return 0;
}

static void on_own_destroy(void *user_data) {
    on_destroy(&((own *)user_data)->r);
}

static void a_callback_ends_everything(void) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    own o;
    o.request = NULL;
    o.pool = fresh_pool();
    recorder_init(&o.r);
    options.callback = on_own_event;
    options.user_data = &o;
    options.destroy = on_own_destroy;
    CHECK_STATUS(OMLX_OK, omlx_generate(o.pool, ASK, strlen(ASK), &options, &request, &error));
    pthread_mutex_lock(&o.r.lock);
    o.request = request;
    pthread_cond_broadcast(&o.r.changed);
    pthread_mutex_unlock(&o.r.lock);
    wait_destroyed(&o.r);
    CHECK(o.r.done_events == 1 && o.r.events_after_done == 0);
    CHECK(o.r.status == OMLX_E_CANCELLED || o.r.status == OMLX_E_CLOSED || o.r.status == OMLX_OK);
    recorder_free(&o.r);
}

/* A function that ends what it is told of, and whatever that belongs to. */
typedef struct ender {
    place of;
    omlx_pool *pool;
    omlx_request *request;
    omlx_download *download;
    struct ender *next;
    int at_end, returned, acted, on_main_thread;
} ender;

#define ENDER {PLACE("ending"), NULL, NULL, NULL, NULL, 0, 0, 0, 0}

static void on_end_destroy(void *user_data) {
    ender *e = user_data;
    pthread_mutex_lock(&e->of.lock);
    CHECK(e->of.calls == e->returned); /* Not during a call. */
    pthread_mutex_unlock(&e->of.lock);
    gone(&e->of);
}

static int calls_of(ender *e) {
    int calls;
    pthread_mutex_lock(&e->of.lock);
    calls = e->of.calls;
    pthread_mutex_unlock(&e->of.lock);
    return calls;
}

/* Begins a call; whether to act in it, which happens once. */
static int begin_call(ender *e, int may_act) {
    int acts;
    pthread_mutex_lock(&e->of.lock);
    CHECK(e->of.destroyed == 0);
    e->of.calls++;
    acts = may_act && !e->acted;
    if (acts) {
        e->acted = 1;
        e->on_main_thread = pthread_equal(pthread_self(), main_thread) != 0;
    }
    pthread_mutex_unlock(&e->of.lock);
    return acts;
}

static void end_call(ender *e) {
    pthread_mutex_lock(&e->of.lock);
    e->returned++;
    pthread_mutex_unlock(&e->of.lock);
}

static void on_ending_wake(void *user_data) {
    ender *e = user_data;
    if (begin_call(e, 1)) {
        const omlx_event *event = NULL;
        omlx_status status;
        int events = 0;
        while ((status = omlx_request_next(e->request, 0, &event, NULL)) == OMLX_OK)
            events++;
        CHECK(events > 0 && (status == OMLX_E_TIMEOUT || status == OMLX_E_CLOSED));
        omlx_request_cancel(e->request);
        CHECK(omlx_request_set_wake(e->request, NULL, NULL, NULL, NULL) == OMLX_OK);
        omlx_request_release(e->request);
        omlx_pool_release(e->pool);
    }
    end_call(e);
}

/* A wake function reads and ends its own request, and gives back the last references of that and of the pool: on a thread of an
 * engine, or, where an event waits already, within `omlx_request_set_wake`. */
static void a_wake_ends_everything(void) {
    int kind, round, at_once[2] = {0, 0};
    for (kind = 0; kind < KINDS; kind++) {
        for (round = 0; round < 6; round++) {
            omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
            const char *json = kinds[kind].json;
            omlx_error *error = NULL;
            ender e = ENDER;
            e.pool = fresh_pool();
            /* Without it the first event comes when the model is loaded. */
            options.loading_events = round % 2;
            CHECK_STATUS(OMLX_OK, kinds[kind].start(e.pool, json, strlen(json), &options, &e.request, &error));
            CHECK_STATUS(OMLX_OK, omlx_request_set_wake(e.request, on_ending_wake, &e, on_end_destroy, &error));
            wait_place(&e.of);
            at_once[e.on_main_thread]++;
        }
    }
    CHECK(at_once[0] > 0 && at_once[1] > 0);
}

static int32_t on_ending_progress(void *user_data, const omlx_download_progress *progress) {
    ender *e = user_data;
    int over = progress->state >= OMLX_DOWNLOAD_STATE_DONE, acts = begin_call(e, over || !e->at_end);
    if (acts && e->next != NULL) {
        /* The next one is told at once. */
        e->next->download = e->download;
        CHECK(omlx_download_set_callback(e->download, on_ending_progress, e->next, on_end_destroy, NULL) == OMLX_OK);
        CHECK(calls_of(e->next) > 0);
    } else if (acts) {
        omlx_download_progress now = OMLX_DOWNLOAD_PROGRESS_INIT;
        CHECK(omlx_download_status(e->download, &now, NULL) == OMLX_OK && now.state >= progress->state);
        CHECK(!over || omlx_download_wait(e->download, 0, NULL, NULL) != OMLX_E_TIMEOUT);
        omlx_download_cancel(e->download);
        CHECK(omlx_download_set_callback(e->download, NULL, NULL, NULL, NULL) == OMLX_OK);
        omlx_download_release(e->download);
    }
    end_call(e);
    return 0;
}

/* A progress callback ends its download and gives back the last reference of that, or has another one take its place that does: in
 * its first call, or in that with the last state, on a thread of the download. The download may be over before, and the pool's
 * handle gone. */
static void a_progress_callback_ends_its_download(void) {
    int round, at_once[2] = {0, 0};
    for (round = 0; round < 48; round++) {
        omlx_pool *own_pool = fresh_pool();
        omlx_error *error = NULL;
        ender first = ENDER, second = ENDER;
        first.next = round & 1 ? &second : NULL;
        first.at_end = round & 8;
        CHECK_STATUS(OMLX_OK, omlx_download_start(own_pool, download_json, strlen(download_json), &first.download, &error));
        if (round & 2)
            omlx_download_wait(first.download, -1, NULL, NULL);
        if (round & 4)
            omlx_pool_release(own_pool);
        CHECK_STATUS(OMLX_OK, omlx_download_set_callback(first.download, on_ending_progress, &first, on_end_destroy, &error));
        wait_place(&first.of);
        if (first.next != NULL)
            wait_place(&second.of);
        at_once[first.on_main_thread]++;
        if (!(round & 4))
            omlx_pool_release(own_pool);
    }
    CHECK(at_once[0] > 0 && at_once[1] > 0);
}

int main(int argc, char **argv) {
    omlx_error *error = NULL;
    if (argc != 4)
        return 2;
    main_thread = pthread_self();
    encoders = argv[1];
    chat = argv[2];
    pool = fresh_pool();
    snprintf(download_json, sizeof download_json, "{\"repo\":\"org/name\",\"folder\":\"%s\",\"offline\":true}", argv[3]);
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    every_kind_of_callback();
    a_progress_callback_ends_its_download();
    omlx_pool_release(pool);
    a_callback_ends_everything();
    a_wake_ends_everything();
    return finish("callbacks");
}
