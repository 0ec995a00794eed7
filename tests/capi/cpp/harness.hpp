// What the C++ tests share.
#ifndef HARNESS_HPP
#define HARNESS_HPP

#include <atomic>
#include <iostream>
#include <string>

#include "omlx.hpp"

inline std::atomic<int> failures{0};

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            failures++; \
            std::cerr << __FILE__ << ':' << __LINE__ << ": " << #condition << '\n'; \
        } \
    } while (0)

// Expects `expression` to throw an `omlx::error` with this code.
#define CHECK_THROWS(expected, expression) \
    do { \
        try { \
            static_cast<void>(expression); \
            failures++; \
            std::cerr << __FILE__ << ':' << __LINE__ << ": nothing was thrown by " << #expression << '\n'; \
        } catch (const omlx::error &thrown) { \
            CHECK(thrown.code() == (expected)); \
            CHECK(thrown.message()[0] != '\0'); \
        } \
    } while (0)

inline omlx::pool open_pool(const char *models_dir) {
    omlx::pool_options options;
    options.models_dir = models_dir;
    return omlx::pool(options);
}

inline bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

inline int finish(const char *name) {
    std::cout << name << ": " << failures << " failures\n";
    return failures == 0 ? 0 : 1;
}

#endif
