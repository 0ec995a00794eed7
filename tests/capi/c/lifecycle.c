/* Requests, pools and models from birth to death, in every order. Argument: the folder of the models. */
#include "harness.h"

#define SHORT "{\"prompt\":[1,316,207,1910],\"max_tokens\":4,\"temperature\":0,\"ignore_eos\":true}"
#define LONG "{\"prompt\":[1,316,207,1910],\"max_tokens\":1500,\"temperature\":0,\"ignore_eos\":true}"

static const char *models_dir;

/* Reads a pull request to its end; the done event's status. */
static int32_t drain(omlx_request *request, size_t *tokens) {
    const omlx_event *event = NULL;
    int32_t status = -1;
    *tokens = 0;
    while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK) {
        *tokens += event->token_count;
        if (event->kind == OMLX_EVENT_KIND_DONE)
            status = event->status;
    }
    return status;
}

static omlx_request *start_pull(omlx_pool *pool, const char *json) {
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, strlen(json), NULL, &request, &error));
    return request;
}

static void a_request_streams(omlx_pool *pool) {
    recorder r;
    recorder_init(&r);
    omlx_request_release(start(pool, SHORT, &r)); /* It goes on without its handle. */
    wait_destroyed(&r);
    check_ended(&r, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    CHECK(r.tokens == 4 && r.text_len > 0);
    CHECK(r.usage.prompt_tokens == 4 && r.usage.completion_tokens == 4 && r.usage.cached_tokens == 0);
    CHECK(r.usage.seconds_to_first_token > 0 && r.usage.tokens_per_second > 0);
    recorder_free(&r);
}

/* A tool call arrives in pieces that name it, in order, and no other text. */
static void a_tool_call_streams(omlx_pool *pool) {
    static const char json[] =
        "{\"messages\":[{\"role\":\"user\",\"content\":\"Set a timer for 97 minutes.\"}],\"temperature\":0,\"tools\":["
        "{\"type\":\"function\",\"function\":{\"name\":\"set_timer\",\"description\":\"Start a timer.\",\"parameters\":{"
        "\"type\":\"object\",\"properties\":{\"minutes\":{\"type\":\"integer\"}},\"required\":[\"minutes\"]}}}]}";
    char arguments[256] = "", id[64] = "";
    const omlx_event *event = NULL;
    omlx_request *request = start_pull(pool, json);
    size_t pieces = 0;
    uint32_t reason = OMLX_FINISH_REASON_NONE;
    while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK) {
        CHECK(event->tool_id != NULL && event->tool_name != NULL);
        if (event->kind == OMLX_EVENT_KIND_TOOL_CALL) {
            if (pieces++ == 0)
                snprintf(id, sizeof id, "%s", event->tool_id);
            CHECK(event->tool_index == 0 && strcmp(event->tool_name, "set_timer") == 0);
            CHECK(strncmp(event->tool_id, "call_", 5) == 0 && strcmp(event->tool_id, id) == 0);
            strncat(arguments, event->text, sizeof arguments - strlen(arguments) - 1);
        } else {
            CHECK(event->text_len == 0 && event->tool_id[0] == '\0' && event->tool_name[0] == '\0');
        }
        if (event->kind == OMLX_EVENT_KIND_DONE)
            reason = event->finish_reason;
    }
    CHECK(pieces > 0 && reason == OMLX_FINISH_REASON_TOOL_CALLS);
    CHECK(strcmp(arguments, "{\"minutes\": 97}") == 0);
    omlx_request_release(request);
}

/* What is known before the first text, and what ended the answer. */
static void a_start_and_a_stop_string_are_told(omlx_pool *pool) {
    static const char json[] =
        "{\"messages\":[{\"role\":\"user\",\"content\":\"What is 12 plus 30?\"}],\"temperature\":0,\"stop\":[\"no\",\"42\"]}";
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    const omlx_event *event = NULL;
    omlx_error *error = NULL;
    uint64_t before = 0;
    int round;
    options.started_event = 1;
    for (round = 0; round < 2; round++) {
        omlx_request *request = NULL;
        CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, strlen(json), &options, &request, &error));
        CHECK(strcmp(omlx_request_model(request), "tiny-chat") == 0);
        CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
        CHECK(event->kind == OMLX_EVENT_KIND_STARTED && event->usage.completion_tokens == 0);
        CHECK(event->usage.prompt_tokens > 1 && event->stop_string[0] == '\0');
        /* The second time all but the last token is cached; the first time what other chats begin with. */
        CHECK(round == 0 ? event->usage.cached_tokens + 1 < event->usage.prompt_tokens
                         : event->usage.cached_tokens == before - 1);
        before = event->usage.prompt_tokens;
        do
            CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
        while (event->kind == OMLX_EVENT_KIND_TEXT && event->stop_string[0] == '\0');
        CHECK(event->kind == OMLX_EVENT_KIND_DONE && event->finish_reason == OMLX_FINISH_REASON_STOP);
        CHECK(strcmp(event->stop_string, "42") == 0 && event->usage.prompt_tokens == before);
        omlx_request_release(request);
    }
}

static void a_callback_cancels_at_the_first_token(omlx_pool *pool) {
    recorder r;
    omlx_request *request;
    recorder_init(&r);
    r.cancel_at_first = 1;
    request = start(pool, LONG, &r);
    wait_destroyed(&r);
    check_ended(&r, OMLX_E_CANCELLED, OMLX_FINISH_REASON_CANCELLED);
    CHECK(r.text_events == 1);
    CHECK(r.usage.prompt_tokens == 4 && r.usage.completion_tokens >= 1 && r.usage.completion_tokens < 1500);
    omlx_request_cancel(request); /* Ended: ignored. */
    omlx_request_release(request);
    recorder_free(&r);
}

static void a_host_cancels(omlx_pool *pool) {
    recorder r, queued;
    omlx_request *request, *behind;
    recorder_init(&r);
    recorder_init(&queued);
    request = start(pool, LONG, &r);
    behind = start(pool, LONG, &queued);
    wait_first_text(&r);
    omlx_request_cancel(behind);
    omlx_request_cancel(request);
    wait_destroyed(&r);
    wait_destroyed(&queued);
    check_ended(&r, OMLX_E_CANCELLED, OMLX_FINISH_REASON_CANCELLED);
    check_ended(&queued, OMLX_E_CANCELLED, OMLX_FINISH_REASON_CANCELLED);
    omlx_request_release(behind);
    omlx_request_release(request);
    recorder_free(&r);
    recorder_free(&queued);
}

static void a_slow_callback_delays_only_itself(omlx_pool *pool) {
    recorder slow, other;
    recorder_init(&slow);
    recorder_init(&other);
    slow.sleep_at_first_ms = 3000;
    omlx_request_release(start(pool, SHORT, &slow));
    omlx_request_release(start(pool, SHORT, &other));
    wait_destroyed(&other);
    pthread_mutex_lock(&slow.lock);
    CHECK(slow.done_events == 0);
    pthread_mutex_unlock(&slow.lock);
    wait_destroyed(&slow);
    check_ended(&slow, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    check_ended(&other, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    CHECK(slow.text_len == other.text_len && memcmp(slow.text, other.text, slow.text_len) == 0);
    /* What came while it slept was merged: first event, one event for the rest. */
    CHECK(slow.text_events <= 2 && slow.tokens == 4);
    recorder_free(&slow);
    recorder_free(&other);
}

typedef struct waker {
    pthread_mutex_t lock;
    int calls, destroyed;
    long sleep_once_ms;
    pthread_t host;
} waker;

static void on_wake(void *user_data) {
    waker *w = user_data;
    long ms = 0;
    pthread_mutex_lock(&w->lock);
    w->calls++;
    /* The host's own thread calls it too, for an event that was there already. */
    if (!pthread_equal(pthread_self(), w->host)) {
        ms = w->sleep_once_ms;
        w->sleep_once_ms = 0;
    }
    pthread_mutex_unlock(&w->lock);
    sleep_ms(ms);
}

static void on_wake_destroy(void *user_data) {
    waker *w = user_data;
    pthread_mutex_lock(&w->lock);
    w->destroyed++;
    pthread_mutex_unlock(&w->lock);
}

static int waker_calls(waker *w) {
    int calls;
    pthread_mutex_lock(&w->lock);
    calls = w->calls;
    pthread_mutex_unlock(&w->lock);
    return calls;
}

static int waker_awaits_sleep(waker *w) {
    int awaits;
    pthread_mutex_lock(&w->lock);
    awaits = w->sleep_once_ms > 0;
    pthread_mutex_unlock(&w->lock);
    return awaits;
}

/* The engine may be about to call it when the request ends: then it is the engine that lets go of it last. */
static void wait_waker_destroyed(waker *w) {
    int destroyed;
    do {
        sleep_ms(1);
        pthread_mutex_lock(&w->lock);
        destroyed = w->destroyed;
        pthread_mutex_unlock(&w->lock);
    } while (destroyed == 0);
    CHECK(destroyed == 1);
}

static void the_pull_form_waits_as_told(omlx_pool *pool) {
    waker w = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 1000, pthread_self()};
    const omlx_event *event = NULL;
    omlx_error *error = NULL;
    omlx_request *request = start_pull(pool, LONG);
    double before;
    int seen_timeout = 0, i;

    CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
    CHECK(event != NULL && event->kind == OMLX_EVENT_KIND_TEXT);
    /* Reading is faster than computing, so a timeout of 0 finds nothing soon. */
    for (i = 0; i < 1000 && !seen_timeout; i++)
        seen_timeout = omlx_request_next(request, 0, &event, NULL) == OMLX_E_TIMEOUT;
    CHECK(seen_timeout);
    /* The wake function holds up the engine's thread: behind the event that it told of there is none for a while. */
    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, on_wake, &w, on_wake_destroy, &error));
    while (waker_awaits_sleep(&w))
        omlx_request_next(request, 10, &event, NULL);
    while (omlx_request_next(request, 0, &event, NULL) == OMLX_OK)
        ;
    before = now();
    CHECK_STATUS(OMLX_E_TIMEOUT, omlx_request_next(request, 50, &event, &error));
    CHECK(now() - before >= 0.049);
    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, NULL, NULL, NULL, &error));
    omlx_request_cancel(request);
    do
        CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
    while (event->kind != OMLX_EVENT_KIND_DONE);
    CHECK(event->status == OMLX_E_CANCELLED && event->finish_reason == OMLX_FINISH_REASON_CANCELLED);
    /* After the done event there is nothing, whatever the timeout. */
    CHECK_STATUS(OMLX_E_CLOSED, omlx_request_next(request, 0, &event, &error));
    CHECK_STATUS(OMLX_E_CLOSED, omlx_request_next(request, 10, &event, &error));
    CHECK_STATUS(OMLX_E_CLOSED, omlx_request_next(request, -1, &event, &error));
    /* A failed call wrote nothing: the done event is still there. */
    CHECK(event->kind == OMLX_EVENT_KIND_DONE && event->error_message[0] != '\0');
    omlx_request_release(request);
    wait_waker_destroyed(&w);
}

static void a_wake_function_is_told_of_events(omlx_pool *pool) {
    waker w = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0, pthread_self()};
    waker late = {PTHREAD_MUTEX_INITIALIZER, 0, 0, 0, pthread_self()};
    const omlx_event *event = NULL;
    omlx_error *error = NULL;
    omlx_request *request = start_pull(pool, SHORT);
    size_t tokens = 0;
    int done = 0, calls = 0;

    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, on_wake, &w, on_wake_destroy, &error));
    /* A run loop: sleeps until it is woken, then reads all there is. */
    while (!done) {
        while (waker_calls(&w) == calls)
            sleep_ms(1);
        calls = waker_calls(&w);
        while (omlx_request_next(request, 0, &event, NULL) == OMLX_OK) {
            tokens += event->token_count;
            done = event->kind == OMLX_EVENT_KIND_DONE;
        }
    }
    CHECK(tokens == 4);
    omlx_request_release(request);
    wait_waker_destroyed(&w);

    /* Set while an event is waiting, it is called at once. The one before is let go. */
    w.calls = w.destroyed = 0;
    request = start_pull(pool, SHORT);
    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, on_wake, &w, on_wake_destroy, &error));
    while (waker_calls(&w) == 0)
        sleep_ms(1);
    CHECK_STATUS(OMLX_OK, omlx_request_set_wake(request, on_wake, &late, on_wake_destroy, &error));
    CHECK(waker_calls(&late) >= 1);
    wait_waker_destroyed(&w);
    omlx_request_release(request);
    wait_waker_destroyed(&late);
}

static void references_count(void) {
    omlx_pool *pool = open_pool(models_dir);
    omlx_request *request;
    omlx_error *error = NULL;
    const omlx_event *event = NULL;
    size_t tokens = 0;
    recorder r;

    omlx_pool_retain(pool);
    omlx_pool_release(pool);
    request = start_pull(pool, SHORT);
    omlx_request_retain(request);
    omlx_request_release(request);
    CHECK(drain(request, &tokens) == OMLX_OK && tokens == 4);
    omlx_request_release(request);

    /* The request outlives its pool's last handle, and hears of the end. */
    request = start_pull(pool, LONG);
    CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
    omlx_pool_release(pool);
    CHECK(drain(request, &tokens) == OMLX_E_CLOSED && tokens < 1500);
    omlx_request_release(request);

    /* So does a callback, whose request has no handle any more. */
    pool = open_pool(models_dir);
    recorder_init(&r);
    omlx_request_release(start(pool, LONG, &r));
    wait_first_text(&r);
    omlx_pool_release(pool);
    wait_destroyed(&r);
    check_ended(&r, OMLX_E_CLOSED, OMLX_FINISH_REASON_ERROR);
    recorder_free(&r);

    /* An unread request that is released is cancelled: it does not hold up the next one. */
    pool = open_pool(models_dir);
    omlx_request_release(start_pull(pool, LONG));
    request = start_pull(pool, SHORT);
    CHECK(drain(request, &tokens) == OMLX_OK && tokens == 4);
    omlx_request_release(request);
    end_pool(pool);
}

static void a_pool_closes_while_generating(void) {
    omlx_pool *pool = open_pool(models_dir);
    omlx_request *request, *refused = NULL;
    omlx_error *error = NULL;
    recorder r, queued, closing;

    recorder_init(&r);
    recorder_init(&queued);
    request = start(pool, LONG, &r);
    omlx_request_release(start(pool, LONG, &queued));
    wait_first_text(&r);
    CHECK_STATUS(OMLX_OK, omlx_pool_close(pool, &error));
    /* Closing waited for the callbacks. */
    check_ended(&r, OMLX_E_CLOSED, OMLX_FINISH_REASON_ERROR);
    check_ended(&queued, OMLX_E_CLOSED, OMLX_FINISH_REASON_ERROR);
    CHECK_STATUS(OMLX_E_CLOSED, omlx_generate(pool, SHORT, strlen(SHORT), NULL, &refused, &error));
    CHECK_STATUS(OMLX_E_CLOSED, omlx_model_load(pool, "tiny-chat", &error));
    CHECK_STATUS(OMLX_OK, omlx_pool_close(pool, &error));
    omlx_pool_release(pool);
    omlx_request_release(request);

    /* While the model loads. */
    pool = open_pool(models_dir);
    recorder_free(&queued);
    recorder_init(&queued);
    omlx_request_release(start(pool, LONG, &queued));
    end_pool(pool);
    check_ended(&queued, OMLX_E_CLOSED, OMLX_FINISH_REASON_ERROR);

    /* From within a callback. */
    pool = open_pool(models_dir);
    recorder_init(&closing);
    closing.close_at_first = pool;
    omlx_request_release(start(pool, LONG, &closing));
    wait_destroyed(&closing);
    check_ended(&closing, OMLX_E_CLOSED, OMLX_FINISH_REASON_ERROR);
    end_pool(pool);
    recorder_free(&r);
    recorder_free(&queued);
    recorder_free(&closing);
}

static void a_model_unloads_and_loads_again(omlx_pool *pool) {
    omlx_error *error = NULL;
    recorder r, again;
    recorder_init(&r);
    recorder_init(&again);
    CHECK_STATUS(OMLX_OK, omlx_model_load(pool, "tiny-chat", &error));
    omlx_request_release(start(pool, LONG, &r));
    wait_first_text(&r);
    CHECK_STATUS(OMLX_OK, omlx_model_unload(pool, "tiny-chat", 0, NULL, &error));
    wait_destroyed(&r);
    check_ended(&r, OMLX_E_CANCELLED, OMLX_FINISH_REASON_CANCELLED);
    CHECK_STATUS(OMLX_OK, omlx_model_unload(pool, "tiny-chat", 0, NULL, &error)); /* Not loaded: fine. */
    omlx_request_release(start(pool, SHORT, &again));
    wait_destroyed(&again);
    check_ended(&again, OMLX_OK, OMLX_FINISH_REASON_LENGTH);
    CHECK(again.text_len > 0);
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_model_load(pool, "nothing", &error));
    CHECK_STATUS(OMLX_E_NOT_FOUND, omlx_model_unload(pool, "nothing", 0, NULL, &error));
    recorder_free(&r);
    recorder_free(&again);
}

int main(int argc, char **argv) {
    omlx_pool *pool;
    if (argc != 2)
        return 2;
    models_dir = argv[1];
    pool = open_pool(models_dir);
    a_request_streams(pool);
    a_tool_call_streams(pool);
    a_start_and_a_stop_string_are_told(pool);
    a_callback_cancels_at_the_first_token(pool);
    a_host_cancels(pool);
    a_slow_callback_delays_only_itself(pool);
    the_pull_form_waits_as_told(pool);
    a_wake_function_is_told_of_events(pool);
    a_model_unloads_and_loads_again(pool);
    end_pool(pool);
    references_count();
    a_pool_closes_while_generating();
    return finish("lifecycle");
}
