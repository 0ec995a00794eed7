/* A conversation with a local model in the terminal.
 *
 *   chat [MODELS_DIR [MODEL]]
 *
 * c++ -std=c++17 -Iinclude -Ibindings/cpp examples/cpp/chat.cpp -Ltarget/release -lomlx -Wl,-rpath,target/release -o chat
 */
#include <iostream>
#include <string>

#include "omlx.hpp"

static std::string message(const char *role, const std::string &content) {
    return std::string("{\"role\":\"") + role + "\",\"content\":" + omlx::json_string(content) + '}';
}

int main(int argc, char **argv) try {
    omlx::pool_options options;
    options.models_dir = argc > 1 ? argv[1] : "models";
    options.default_model = argc > 2 ? argv[2] : nullptr;
    omlx::pool pool(options);

    std::string messages, line;
    while (std::cerr << "> " && std::getline(std::cin, line)) {
        messages += (messages.empty() ? "" : ",") + message("user", line);
        std::string answer;
        // What the last turn has computed is still cached: only the new words are.
        for (const omlx::event &event : pool.generate("{\"messages\":[" + messages + "]}")) {
            if (event.is(OMLX_EVENT_KIND_TEXT)) {
                std::cout << event.text() << std::flush;
                answer += event.text();
            } else if (event.is(OMLX_EVENT_KIND_DONE)) {
                const omlx_usage &usage = event.usage();
                std::cout << '\n';
                std::cerr << '[' << usage.prompt_tokens << " prompt tokens, " << usage.cached_tokens << " of them cached, "
                          << usage.tokens_per_second << " tokens/s]\n";
            }
        }
        messages += ',' + message("assistant", answer);
    }
} catch (const omlx::error &error) {
    std::cerr << error.what() << '\n';
    return 1;
}
