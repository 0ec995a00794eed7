/* What the C tests share: checks that count failures, and a recorder of a request's events. */
#ifndef HARNESS_H
#define HARNESS_H

#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "omlx.h"

static int failures;

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            failures++; \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        } \
    } while (0)

/* Checks a status; `error` is the variable whose address the call was given. */
#define CHECK_STATUS(expected, call) check_status(__FILE__, __LINE__, expected, call, &error)

static inline int check_status(const char *file, int line, omlx_status expected, omlx_status status, omlx_error **error) {
    int as_expected = status == expected && (*error != NULL) == (status != OMLX_OK) && omlx_error_status(*error) == status;
    if (!as_expected) {
        failures++;
        fprintf(stderr, "%s:%d: %s instead of %s: %s\n", file, line, omlx_status_name(status), omlx_status_name(expected),
                omlx_error_message(*error));
    }
    omlx_error_release(*error);
    *error = NULL;
    return as_expected;
}

static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void sleep_ms(long ms) {
    struct timespec t;
    t.tv_sec = ms / 1000;
    t.tv_nsec = ms % 1000 * 1000000;
    nanosleep(&t, NULL);
}

/* What a callback saw. */
typedef struct recorder {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    char text[4096];
    size_t text_len;
    size_t tokens;
    int text_events, done_events, events_after_done, destroyed;
    int32_t status;
    uint32_t finish_reason;
    omlx_usage usage;
    char message[512];
    /* What the callback shall do. */
    int cancel_at_first;
    long sleep_at_first_ms;
    omlx_pool *close_at_first;
} recorder;

static inline void recorder_init(recorder *r) {
    memset(r, 0, sizeof *r);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
}

static inline void recorder_free(recorder *r) {
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->lock);
}

static inline void record(recorder *r, const omlx_event *event) {
    pthread_mutex_lock(&r->lock);
    r->events_after_done += r->done_events > 0 || r->destroyed > 0;
    if (event->kind == OMLX_EVENT_KIND_TEXT) {
        r->text_events++;
        r->tokens += event->token_count;
        if (r->text_len + event->text_len < sizeof r->text) {
            memcpy(r->text + r->text_len, event->text, event->text_len);
            r->text_len += event->text_len;
        }
    } else if (event->kind == OMLX_EVENT_KIND_DONE) {
        r->done_events++;
        r->status = event->status;
        r->finish_reason = event->finish_reason;
        r->usage = event->usage;
        snprintf(r->message, sizeof r->message, "%s", event->error_message);
    }
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

static inline int32_t on_event(void *user_data, const omlx_event *event) {
    recorder *r = user_data;
    int first = event->kind == OMLX_EVENT_KIND_TEXT && r->text_events == 0;
    CHECK(event->struct_size == sizeof *event && event->text != NULL && event->error_message != NULL);
    CHECK(event->text[event->text_len] == '\0' && (event->tokens != NULL) == (event->token_count > 0));
    record(r, event);
    if (first && r->sleep_at_first_ms > 0)
        sleep_ms(r->sleep_at_first_ms);
    if (first && r->close_at_first != NULL)
        CHECK(omlx_pool_close(r->close_at_first, NULL) == OMLX_OK);
    return first && r->cancel_at_first;
}

static inline void on_destroy(void *user_data) {
    recorder *r = user_data;
    pthread_mutex_lock(&r->lock);
    r->destroyed++;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

/* Starts `json` with `r` as its callback; the handle, or NULL where it failed. */
static inline omlx_request *start(omlx_pool *pool, const char *json, recorder *r) {
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    options.callback = on_event;
    options.user_data = r;
    options.destroy = on_destroy;
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, strlen(json), &options, &request, &error));
    return request;
}

/* Waits until the destroy function ran: the last thing that happens to a request. */
static inline void wait_destroyed(recorder *r) {
    pthread_mutex_lock(&r->lock);
    while (r->destroyed == 0)
        pthread_cond_wait(&r->changed, &r->lock);
    pthread_mutex_unlock(&r->lock);
}

static inline void wait_first_text(recorder *r) {
    pthread_mutex_lock(&r->lock);
    while (r->text_events == 0 && r->done_events == 0)
        pthread_cond_wait(&r->changed, &r->lock);
    pthread_mutex_unlock(&r->lock);
}

/* What holds for every request that has ended. */
static inline void check_ended(recorder *r, int32_t status, uint32_t finish_reason) {
    CHECK(r->done_events == 1 && r->destroyed == 1 && r->events_after_done == 0);
    CHECK(r->status == status && r->finish_reason == finish_reason);
    CHECK((r->message[0] != '\0') == (status != OMLX_OK));
    if (r->status != status)
        fprintf(stderr, "  %s: %s\n", omlx_status_name(r->status), r->message);
}

static inline omlx_pool *open_pool(const char *models_dir) {
    omlx_pool_options options = OMLX_POOL_OPTIONS_INIT;
    omlx_pool *pool = NULL;
    omlx_error *error = NULL;
    options.models_dir = models_dir;
    CHECK_STATUS(OMLX_OK, omlx_pool_open(&options, &pool, &error));
    return pool;
}

/* Closes and releases. */
static inline void end_pool(omlx_pool *pool) {
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_pool_close(pool, &error));
    omlx_pool_release(pool);
}

static inline int finish(const char *name) {
    printf("%s: %d failures\n", name, failures);
    return failures > 0 ? EXIT_FAILURE : EXIT_SUCCESS;
}

#endif
