/* Vectors and scores of texts: pulled, through callbacks, cancelled, and refused. */
#include "harness.h"

/* Pulls the events of a request; the result's numbers go to `values`. Returns the status of the end. */
static int32_t pull(omlx_request *request, uint32_t kind, float *values, size_t room, size_t *rows, size_t *columns) {
    const omlx_event *event = NULL;
    omlx_error *error = NULL;
    int results = 0;
    uint64_t loaded = 0;
    for (;;) {
        CHECK_STATUS(OMLX_OK, omlx_request_next(request, -1, &event, &error));
        CHECK(event->struct_size == sizeof *event && event->text != NULL && event->error_message != NULL);
        if (event->kind == OMLX_EVENT_KIND_DONE)
            break;
        if (event->kind == OMLX_EVENT_KIND_LOADING) {
            CHECK(results == 0 && event->loaded_bytes <= event->total_bytes && event->loaded_bytes >= loaded);
            loaded = event->loaded_bytes;
            continue;
        }
        CHECK(event->kind == kind && results++ == 0);
        *rows = event->rows;
        *columns = event->columns;
        CHECK(event->values != NULL && event->rows * event->columns <= room);
        memcpy(values, event->values, event->rows * event->columns * sizeof *values);
        if (kind == OMLX_EVENT_KIND_SCORES) {
            CHECK(event->order_count > 0 && event->columns == 1);
            if (event->order_count > 1)
                CHECK(event->values[event->order[0]] >= event->values[event->order[1]]);
        } else {
            CHECK(event->order == NULL && event->order_count == 0);
        }
    }
    CHECK((event->status == OMLX_OK) == (results == 1));
    CHECK(event->status != OMLX_OK || event->usage.prompt_tokens > 0);
    return event->status;
}

static void vectors(omlx_pool *pool) {
    const char *two = "{\"model\":\"bert\",\"input\":[\"a river\",\"a stone\"]}";
    const char *one = "{\"model\":\"bert\",\"input\":\"a stone\"}";
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    float both[4096], alone[4096];
    size_t rows = 0, columns = 0, i;
    options.loading_events = 1;
    CHECK_STATUS(OMLX_OK, omlx_embed(pool, two, strlen(two), &options, &request, &error));
    CHECK(pull(request, OMLX_EVENT_KIND_EMBEDDINGS, both, 4096, &rows, &columns) == OMLX_OK);
    CHECK(rows == 2 && columns > 1);
    omlx_request_release(request);
    CHECK_STATUS(OMLX_OK, omlx_embed(pool, one, strlen(one), NULL, &request, &error));
    CHECK(pull(request, OMLX_EVENT_KIND_EMBEDDINGS, alone, 4096, &rows, &columns) == OMLX_OK);
    CHECK(rows == 1);
    for (i = 0; i < columns; i++) {
        float difference = both[columns + i] - alone[i];
        CHECK(difference < 1e-5f && difference > -1e-5f);
    }
    omlx_request_release(request);
}

static void scores(omlx_pool *pool) {
    const char *json = "{\"model\":\"bert-rerank\",\"query\":\"a river\",\"documents\":[\"a stone\",\"a river\"],\"top_n\":2}";
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    float values[2];
    size_t rows = 0, columns = 0;
    CHECK_STATUS(OMLX_OK, omlx_rerank(pool, json, strlen(json), NULL, &request, &error));
    CHECK(pull(request, OMLX_EVENT_KIND_SCORES, values, 2, &rows, &columns) == OMLX_OK);
    CHECK(rows == 2 && values[0] >= 0.0f && values[0] <= 1.0f);
    omlx_request_release(request);
}

/* Callbacks get the same events, and a refused request calls nothing but the destroy function. */
static void callbacks(omlx_pool *pool) {
    const char *json = "{\"model\":\"bert\",\"input\":\"a stone\"}";
    const char *bad = "{\"model\":\"bert\",\"input\":[]}";
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_error *error = NULL;
    recorder good, refused;
    recorder_init(&good);
    recorder_init(&refused);
    options.callback = on_event;
    options.destroy = on_destroy;
    options.user_data = &good;
    CHECK_STATUS(OMLX_OK, omlx_embed(pool, json, strlen(json), &options, NULL, &error));
    wait_destroyed(&good);
    check_ended(&good, OMLX_OK, OMLX_FINISH_REASON_STOP);
    CHECK(good.usage.prompt_tokens > 2 && good.usage.completion_tokens == 0);
    options.user_data = &refused;
    CHECK_STATUS(OMLX_E_INVALID_REQUEST, omlx_embed(pool, bad, strlen(bad), &options, NULL, &error));
    CHECK(refused.destroyed == 1 && refused.done_events == 0);
    CHECK_STATUS(OMLX_E_INVALID_ARGUMENT, omlx_rerank(pool, json, strlen(json), NULL, NULL, &error));
    recorder_free(&good);
    recorder_free(&refused);
}

static void released_and_closed(omlx_pool *pool) {
    const char *json = "{\"model\":\"bert\",\"input\":[\"a\",\"b\",\"c\"]}";
    omlx_request *kept = NULL, *dropped = NULL;
    omlx_error *error = NULL;
    float values[4096];
    size_t rows = 0, columns = 0;
    int32_t status;
    CHECK_STATUS(OMLX_OK, omlx_embed(pool, json, strlen(json), NULL, &dropped, &error));
    omlx_request_release(dropped);
    CHECK_STATUS(OMLX_OK, omlx_embed(pool, json, strlen(json), NULL, &kept, &error));
    CHECK_STATUS(OMLX_OK, omlx_pool_close(pool, &error));
    status = pull(kept, OMLX_EVENT_KIND_EMBEDDINGS, values, 4096, &rows, &columns);
    CHECK(status == OMLX_OK || status == OMLX_E_CLOSED);
    omlx_request_release(kept);
    CHECK_STATUS(OMLX_E_CLOSED, omlx_embed(pool, json, strlen(json), NULL, &kept, &error));
    omlx_pool_release(pool);
}

int main(int argc, char **argv) {
    omlx_pool *pool;
    if (argc != 2)
        return 2;
    pool = open_pool(argv[1]);
    vectors(pool);
    scores(pool);
    callbacks(pool);
    released_and_closed(pool);
    return finish("encode");
}
