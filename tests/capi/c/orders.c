/* Handles given back in every order, each on a thread of its own, one after the other and all at once, while requests run; and what
 * has one owner outlives them. Arguments: a folder of encoders, the folder of a language model, and an empty folder. */
#include "harness.h"

#define ASK "{\"model\":\"tiny-chat\",\"prompt\":[1,316,207,1910],\"max_tokens\":40,\"temperature\":0,\"ignore_eos\":true}"
#define EMBED "{\"model\":\"bert\",\"input\":[\"a stone\",\"a river\"]}"
#define RERANK "{\"model\":\"bert-rerank\",\"query\":\"a\",\"documents\":[\"b\",\"c\"]}"

/* What a pool hands out. */
enum { POOL, PULLED, CALLED, ENCODED, DOWNLOAD, HANDLES, ORDERS = 120 };

typedef struct handles {
    omlx_pool *pool;
    omlx_request *pulled, *called, *encoded;
    omlx_download *download;
    omlx_string *models;
    omlx_tokens *tokens;
    omlx_error *refusal;
    recorder r;
    pthread_barrier_t *together;
} handles;

static const char *encoders, *chat;
static char download_json[512];

static void make(handles *h, int reranks) {
    omlx_error *error = NULL;
    recorder_init(&h->r);
    h->refusal = NULL;
    h->pool = open_pool(encoders);
    CHECK_STATUS(OMLX_OK, omlx_pool_add_model(h->pool, chat, "tiny-chat", &error));
    CHECK_STATUS(OMLX_OK, omlx_pool_models(h->pool, &h->models, &error));
    CHECK_STATUS(OMLX_OK, omlx_tokenize(h->pool, "tiny-chat", "Hello there", 11, 0, &h->tokens, &error));
    CHECK(omlx_model_load(h->pool, "nothing", &h->refusal) == OMLX_E_NOT_FOUND);
    h->called = start(h->pool, ASK, &h->r);
    CHECK_STATUS(OMLX_OK, omlx_generate(h->pool, ASK, strlen(ASK), NULL, &h->pulled, &error));
    if (reranks)
        CHECK_STATUS(OMLX_OK, omlx_rerank(h->pool, RERANK, strlen(RERANK), NULL, &h->encoded, &error));
    else
        CHECK_STATUS(OMLX_OK, omlx_embed(h->pool, EMBED, strlen(EMBED), NULL, &h->encoded, &error));
    CHECK_STATUS(OMLX_OK, omlx_download_start(h->pool, download_json, strlen(download_json), &h->download, &error));
}

static void give_back(handles *h, int which) {
    switch (which) {
    case POOL: omlx_pool_release(h->pool); break;
    case PULLED: omlx_request_release(h->pulled); break;
    case CALLED: omlx_request_release(h->called); break;
    case ENCODED: omlx_request_release(h->encoded); break;
    default: omlx_download_release(h->download); break;
    }
}

/* When all handles are gone: the callback hears of the end, once, and what has one owner is as it was. */
static void check_rest(handles *h) {
    size_t i;
    wait_destroyed(&h->r);
    CHECK(h->r.done_events == 1 && h->r.destroyed == 1 && h->r.events_after_done == 0);
    CHECK(h->r.status == OMLX_OK || h->r.status == OMLX_E_CLOSED);
    recorder_free(&h->r);
    CHECK(omlx_string_len(h->models) == strlen(omlx_string_data(h->models)));
    CHECK(strstr(omlx_string_data(h->models), "\"tiny-chat\"") != NULL);
    omlx_string_release(h->models);
    CHECK(omlx_tokens_count(h->tokens) > 1);
    for (i = 0; i < omlx_tokens_count(h->tokens); i++)
        CHECK(omlx_tokens_data(h->tokens)[i] < 1 << 20);
    omlx_tokens_release(h->tokens);
    CHECK(omlx_error_status(h->refusal) == OMLX_E_NOT_FOUND && strstr(omlx_error_message(h->refusal), "nothing") != NULL);
    omlx_error_release(h->refusal);
}

/* Threads that take their turns. */
typedef struct turns {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int now;
    long pause_ms;
} turns;

typedef struct job {
    handles *h;
    turns *t;
    int which, turn;
} job;

static void *in_turn(void *argument) {
    job *j = argument;
    pthread_mutex_lock(&j->t->lock);
    while (j->t->now != j->turn)
        pthread_cond_wait(&j->t->changed, &j->t->lock);
    give_back(j->h, j->which);
    sleep_ms(j->t->pause_ms);
    j->t->now++;
    pthread_cond_broadcast(&j->t->changed);
    pthread_mutex_unlock(&j->t->lock);
    return NULL;
}

static void in_order(const int *order, int reranks, long pause_ms) {
    turns t = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0};
    pthread_t threads[HANDLES];
    job jobs[HANDLES];
    handles h;
    int i;
    t.pause_ms = pause_ms;
    make(&h, reranks);
    for (i = 0; i < HANDLES; i++) {
        jobs[i].h = &h;
        jobs[i].t = &t;
        jobs[i].which = order[i];
        jobs[i].turn = i;
        pthread_create(&threads[i], NULL, in_turn, &jobs[i]);
    }
    for (i = 0; i < HANDLES; i++)
        pthread_join(threads[i], NULL);
    CHECK(t.now == HANDLES);
    check_rest(&h);
}

static int orders;

/* Gives back what `left` still has, in all orders. Embeddings and scores alternate, so that with another `pass` each order has the
 * other ones. */
static void in_every_order(int *order, int length, unsigned left, int pass, long pause_ms) {
    int which;
    for (which = 0; which < HANDLES; which++) {
        if (left & 1u << which) {
            order[length] = which;
            in_every_order(order, length + 1, left & ~(1u << which), pass, pause_ms);
        }
    }
    if (left == 0)
        in_order(order, (orders++ + pass) % 2, pause_ms);
}

static void *at_once(void *argument) {
    job *j = argument;
    pthread_barrier_wait(j->h->together);
    give_back(j->h, j->which);
    return NULL;
}

static void all_at_once(int reranks) {
    pthread_barrier_t together;
    pthread_t threads[HANDLES];
    job jobs[HANDLES];
    handles h;
    int i;
    pthread_barrier_init(&together, NULL, HANDLES);
    make(&h, reranks);
    h.together = &together;
    for (i = 0; i < HANDLES; i++) {
        jobs[i].h = &h;
        jobs[i].which = i;
        pthread_create(&threads[i], NULL, at_once, &jobs[i]);
    }
    for (i = 0; i < HANDLES; i++)
        pthread_join(threads[i], NULL);
    check_rest(&h);
    pthread_barrier_destroy(&together);
}

/* References of one handle, taken and dropped by many threads; the last one ends it. */
static void *take_and_drop(void *argument) {
    handles *h = argument;
    int i;
    for (i = 0; i < 2000; i++) {
        omlx_pool_retain(h->pool);
        omlx_request_retain(h->pulled);
        omlx_request_retain(h->encoded);
        omlx_download_retain(h->download);
        omlx_download_release(h->download);
        omlx_request_release(h->encoded);
        omlx_request_release(h->pulled);
        omlx_pool_release(h->pool);
    }
    return NULL;
}

static void references_from_many_threads(void) {
    pthread_t threads[HANDLES];
    handles h;
    int i;
    make(&h, 0);
    for (i = 0; i < HANDLES; i++)
        pthread_create(&threads[i], NULL, take_and_drop, &h);
    for (i = 0; i < HANDLES; i++)
        pthread_join(threads[i], NULL);
    for (i = 0; i < HANDLES; i++)
        give_back(&h, i);
    check_rest(&h);
}

int main(int argc, char **argv) {
    int order[HANDLES], i;
    if (argc != 4)
        return 2;
    encoders = argv[1];
    chat = argv[2];
    snprintf(download_json, sizeof download_json, "{\"repo\":\"org/name\",\"folder\":\"%s\",\"offline\":true}", argv[3]);
    in_every_order(order, 0, (1u << HANDLES) - 1, 0, 0);
    in_every_order(order, 0, (1u << HANDLES) - 1, 1, 3);
    CHECK(orders == 2 * ORDERS);
    for (i = 0; i < 20; i++)
        all_at_once(i % 2);
    references_from_many_threads();
    return finish("orders");
}
