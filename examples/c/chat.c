/* One answer of a local model, streamed to the terminal.
 *
 *   chat [-m MODELS_DIR] [-t TEMPERATURE] [-p fast|exact] PROMPT
 *
 * cc -Iinclude examples/c/chat.c -Ltarget/release -lomlx -lpthread -Wl,-rpath,target/release -o chat
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "omlx.h"

typedef struct answer {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int done, failed;
} answer;

/* Called on a thread of the library, one event at a time. */
static int32_t on_event(void *user_data, const omlx_event *event) {
    answer *answer = user_data;
    if (event->kind == OMLX_EVENT_KIND_TEXT || event->kind == OMLX_EVENT_KIND_REASONING) {
        fwrite(event->text, 1, event->text_len, stdout);
        fflush(stdout);
    } else if (event->kind == OMLX_EVENT_KIND_DONE) {
        const omlx_usage *usage = &event->usage;
        printf("\n");
        if (event->status != OMLX_OK)
            fprintf(stderr, "%s: %s\n", omlx_status_name(event->status), event->error_message);
        fprintf(stderr, "[%llu prompt tokens, %llu tokens, first after %.2f s, %.1f tokens/s]\n",
                (unsigned long long)usage->prompt_tokens, (unsigned long long)usage->completion_tokens,
                usage->seconds_to_first_token, usage->tokens_per_second);
        pthread_mutex_lock(&answer->lock);
        answer->failed = event->status != OMLX_OK;
        answer->done = 1;
        pthread_cond_signal(&answer->changed);
        pthread_mutex_unlock(&answer->lock);
    }
    return ferror(stdout); /* Anything but 0 cancels the request. */
}

/* The request as JSON, to be freed. */
static char *write_request(const char *prompt, const char *temperature) {
    const char *format = "{\"temperature\":%s,\"messages\":[{\"role\":\"user\",\"content\":\"";
    char *json = malloc(strlen(format) + strlen(temperature) + 6 * strlen(prompt) + 8);
    char *end = json;
    if (json == NULL)
        return NULL;
    end += sprintf(end, format, temperature);
    for (; *prompt != '\0'; prompt++) {
        if (*prompt == '"' || *prompt == '\\' || (unsigned char)*prompt < 0x20)
            end += sprintf(end, "\\u%04x", (unsigned)*prompt);
        else
            *end++ = *prompt;
    }
    strcpy(end, "\"}]}");
    return json;
}

int main(int argc, char **argv) {
    answer answer = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 1};
    omlx_pool_options pool_options = OMLX_POOL_OPTIONS_INIT;
    omlx_generate_options options = OMLX_GENERATE_OPTIONS_INIT;
    const char *temperature = "0";
    omlx_error *error = NULL;
    omlx_pool *pool = NULL;
    char *json;
    int i;

    pool_options.models_dir = "models";
    for (i = 1; i + 2 < argc && argv[i][0] == '-'; i += 2) {
        if (strcmp(argv[i], "-m") == 0)
            pool_options.models_dir = argv[i + 1];
        else if (strcmp(argv[i], "-t") == 0)
            temperature = argv[i + 1];
        else if (strcmp(argv[i], "-p") == 0 && strcmp(argv[i + 1], "exact") == 0) {
            pool_options.precision = OMLX_PRECISION_EXACT;
            pool_options.dtype = OMLX_DTYPE_F32;
        }
    }
    if (i + 1 != argc || (json = write_request(argv[i], temperature)) == NULL) {
        fprintf(stderr, "usage: %s [-m MODELS_DIR] [-t TEMPERATURE] [-p fast|exact] PROMPT\n", argv[0]);
        return EXIT_FAILURE;
    }
    options.callback = on_event;
    options.user_data = &answer;
    if (omlx_pool_open(&pool_options, &pool, &error) == OMLX_OK &&
        omlx_generate(pool, json, strlen(json), &options, NULL, &error) == OMLX_OK) {
        pthread_mutex_lock(&answer.lock);
        while (!answer.done)
            pthread_cond_wait(&answer.changed, &answer.lock);
        pthread_mutex_unlock(&answer.lock);
    } else {
        fprintf(stderr, "%s: %s\n", omlx_status_name(omlx_error_status(error)), omlx_error_message(error));
        omlx_error_release(error);
    }
    omlx_pool_close(pool, NULL); /* Waits until the callback has returned; a NULL pool is only an error code. */
    omlx_pool_release(pool);
    free(json);
    return answer.failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
