/* A program outside of the source tree: the bundled model answers. */
#include <omlx.h>
#include <stdio.h>
#include <string.h>

int main(void) {
    const char *json = "{\"messages\":[{\"role\":\"user\",\"content\":\"What is 12 plus 30?\"}],\"temperature\":0}";
    const omlx_event *event = NULL;
    omlx_request *request = NULL;
    omlx_error *error = NULL;
    omlx_pool *pool = NULL;
    int32_t status = OMLX_E_INTERNAL;
    if (omlx_check_abi(OMLX_ABI_VERSION, &error) != OMLX_OK || omlx_pool_open(NULL, &pool, &error) != OMLX_OK ||
        omlx_generate(pool, json, strlen(json), NULL, &request, &error) != OMLX_OK) {
        fprintf(stderr, "%s\n", omlx_error_message(error));
        return 1;
    }
    while (omlx_request_next(request, -1, &event, NULL) == OMLX_OK) {
        fwrite(event->text, 1, event->text_len, stdout);
        if (event->kind == OMLX_EVENT_KIND_DONE)
            status = event->status;
    }
    printf("\n");
    omlx_request_release(request);
    omlx_pool_close(pool, NULL);
    omlx_pool_release(pool);
    return status != OMLX_OK;
}
