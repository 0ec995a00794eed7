/* Handles given back in every order, one after the other and from several threads at once, while requests run. Arguments: the
 * folder of the models, and an empty folder. */
#include "harness.h"

#define ASK "{\"prompt\":[1,316,207,1910],\"max_tokens\":40,\"temperature\":0,\"ignore_eos\":true}"

/* What a pool hands out. */
enum { POOL, PULLED, CALLED, DOWNLOAD, HANDLES };

typedef struct handles {
    omlx_pool *pool;
    omlx_request *pulled, *called;
    omlx_download *download;
    recorder r;
    pthread_barrier_t *together;
} handles;

static const char *models_dir;
static char download_json[512];

static void make(handles *h) {
    omlx_error *error = NULL;
    h->pool = open_pool(models_dir);
    recorder_init(&h->r);
    h->called = start(h->pool, ASK, &h->r);
    CHECK_STATUS(OMLX_OK, omlx_generate(h->pool, ASK, strlen(ASK), NULL, &h->pulled, &error));
    CHECK_STATUS(OMLX_OK, omlx_download_start(h->pool, download_json, strlen(download_json), &h->download, &error));
}

static void give_back(handles *h, int which) {
    switch (which) {
    case POOL: omlx_pool_release(h->pool); break;
    case PULLED: omlx_request_release(h->pulled); break;
    case CALLED: omlx_request_release(h->called); break;
    default: omlx_download_release(h->download); break;
    }
}

/* However it went: the callback has heard of the end, once. */
static void check_callback(handles *h) {
    wait_destroyed(&h->r);
    CHECK(h->r.done_events == 1 && h->r.destroyed == 1 && h->r.events_after_done == 0);
    CHECK(h->r.status == OMLX_OK || h->r.status == OMLX_E_CLOSED);
    recorder_free(&h->r);
}

static int orders;

/* Gives back what `left` still has, in all orders. */
static void in_every_order(int *order, int length, unsigned left, long pause_ms) {
    int which, i;
    for (which = 0; which < HANDLES; which++) {
        if (left & 1u << which) {
            order[length] = which;
            in_every_order(order, length + 1, left & ~(1u << which), pause_ms);
        }
    }
    if (left == 0) {
        handles h;
        make(&h);
        for (i = 0; i < HANDLES; i++) {
            give_back(&h, order[i]);
            sleep_ms(pause_ms);
        }
        check_callback(&h);
        orders++;
    }
}

typedef struct job {
    handles *h;
    int which;
} job;

static void *run_job(void *argument) {
    job *j = argument;
    pthread_barrier_wait(j->h->together);
    give_back(j->h, j->which);
    return NULL;
}

static void all_at_once(void) {
    pthread_barrier_t together;
    pthread_t threads[HANDLES];
    job jobs[HANDLES];
    handles h;
    int i;
    pthread_barrier_init(&together, NULL, HANDLES);
    make(&h);
    h.together = &together;
    for (i = 0; i < HANDLES; i++) {
        jobs[i].h = &h;
        jobs[i].which = i;
        pthread_create(&threads[i], NULL, run_job, &jobs[i]);
    }
    for (i = 0; i < HANDLES; i++)
        pthread_join(threads[i], NULL);
    check_callback(&h);
    pthread_barrier_destroy(&together);
}

/* References of one handle, taken and dropped by many threads; the last one ends it. */
static void *take_and_drop(void *argument) {
    handles *h = argument;
    int i;
    for (i = 0; i < 2000; i++) {
        omlx_pool_retain(h->pool);
        omlx_request_retain(h->pulled);
        omlx_download_retain(h->download);
        omlx_download_release(h->download);
        omlx_request_release(h->pulled);
        omlx_pool_release(h->pool);
    }
    return NULL;
}

static void references_from_many_threads(void) {
    pthread_t threads[HANDLES];
    handles h;
    int i;
    make(&h);
    for (i = 0; i < HANDLES; i++)
        pthread_create(&threads[i], NULL, take_and_drop, &h);
    for (i = 0; i < HANDLES; i++)
        pthread_join(threads[i], NULL);
    for (i = 0; i < HANDLES; i++)
        give_back(&h, i);
    check_callback(&h);
}

int main(int argc, char **argv) {
    int order[HANDLES], i;
    if (argc != 3)
        return 2;
    models_dir = argv[1];
    snprintf(download_json, sizeof download_json, "{\"repo\":\"org/name\",\"folder\":\"%s\",\"offline\":true}", argv[2]);
    in_every_order(order, 0, (1u << HANDLES) - 1, 0);
    in_every_order(order, 0, (1u << HANDLES) - 1, 3);
    CHECK(orders == 48);
    for (i = 0; i < 20; i++)
        all_at_once();
    references_from_many_threads();
    return finish("orders");
}
