// A program outside of the source tree: the bundled model answers.
#include <iostream>
#include <omlx.hpp>

int main() try {
    omlx::pool pool;
    const char *json = R"({"messages":[{"role":"user","content":"What is 12 plus 30?"}],"temperature":0})";
    std::cout << pool.generate(json).answer().text << '\n';
} catch (const omlx::error &error) {
    std::cerr << error.what() << '\n';
    return 1;
}
