// Errors, spans, and how the C functions are called. Part of omlx.hpp.
#ifndef OMLX_BASE_HPP
#define OMLX_BASE_HPP

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "omlx.h"

namespace omlx {

/// Why a call or a request failed. `what()` is the status's name and the message.
class error : public std::runtime_error {
public:
    error(omlx_status code, const std::string &message, std::chrono::milliseconds retry_after = {})
        : std::runtime_error(std::string(omlx_status_name(code)) + ": " + message), code_(code), retry_after_(retry_after) {}

    omlx_status code() const noexcept { return code_; }
    /// What went wrong, for people.
    const char *message() const noexcept { return what() + std::strlen(omlx_status_name(code_)) + 2; }
    /// When it makes sense to try again, after `OMLX_E_BUSY`; 0 if that is not known.
    std::chrono::milliseconds retry_after() const noexcept { return retry_after_; }

private:
    omlx_status code_;
    std::chrono::milliseconds retry_after_;
};

/// Values that lie one after the other in somebody else's memory.
template <class T> class span {
public:
    constexpr span() noexcept = default;
    constexpr span(const T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    span(const std::vector<T> &values) noexcept : data_(values.data()), size_(values.size()) {}

    constexpr const T *data() const noexcept { return data_; }
    constexpr std::size_t size() const noexcept { return size_; }
    constexpr bool empty() const noexcept { return size_ == 0; }
    constexpr const T *begin() const noexcept { return data_; }
    constexpr const T *end() const noexcept { return data_ + size_; }
    constexpr const T &operator[](std::size_t index) const noexcept { return data_[index]; }
    std::vector<T> to_vector() const { return std::vector<T>(begin(), end()); }

private:
    const T *data_ = nullptr;
    std::size_t size_ = 0;
};

namespace detail {

template <auto Release> struct releaser {
    template <class T> void operator()(T *handle) const noexcept { Release(handle); }
};

template <class T, auto Release> using owned = std::unique_ptr<T, releaser<Release>>;

inline error to_error(omlx_status status, const omlx_error *details) {
    return error(status, omlx_error_message(details), std::chrono::milliseconds(omlx_error_retry_after_ms(details)));
}

/// Runs a function that takes an `omlx_error **` last, and throws what it reports.
template <class F> void call(F &&function) {
    omlx_error *details = nullptr;
    const omlx_status status = function(&details);
    const owned<omlx_error, omlx_error_release> owner(details);
    if (status != OMLX_OK)
        throw to_error(status, details);
}

inline std::string take(omlx_string *text) {
    const owned<omlx_string, omlx_string_release> owner(text);
    return std::string(omlx_string_data(text), omlx_string_len(text));
}

/// Runs a function whose output is a text.
template <class F> std::string text_of(F &&function) {
    omlx_string *text = nullptr;
    call([&](omlx_error **error) { return function(&text, error); });
    return take(text);
}

/// A text for C, or NULL for an empty one.
class c_text {
public:
    explicit c_text(std::string_view text) : text_(text) {
        if (text_.find('\0') != std::string::npos)
            throw error(OMLX_E_INVALID_ARGUMENT, "a NUL character in a name");
    }
    const char *get() const noexcept { return text_.empty() ? nullptr : text_.c_str(); }

private:
    std::string text_;
};

inline std::int64_t wait_ms(std::chrono::milliseconds timeout) noexcept {
    return std::max<std::int64_t>(timeout.count(), 0);
}

} // namespace detail

/// `text` as a JSON string, with its quotes: for requests that are put together by hand.
inline std::string json_string(std::string_view text) {
    static const char digits[] = "0123456789abcdef";
    std::string json = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            json += '\\';
            json += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            json += "\\u00";
            json += digits[c >> 4];
            json += digits[c & 15];
        } else {
            json += c;
        }
    }
    return json + '"';
}

} // namespace omlx

#endif
