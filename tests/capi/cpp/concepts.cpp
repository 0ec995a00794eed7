// What the types of the C++ header are to the language.
#include "omlx.hpp"

#include <iterator>
#include <type_traits>
#if __cplusplus >= 202002L
#include <ranges>
#endif

template <class T> constexpr bool is_handle() {
    return std::is_nothrow_move_constructible_v<T> && std::is_nothrow_move_assignable_v<T> && !std::is_copy_constructible_v<T> &&
           !std::is_copy_assignable_v<T> && std::is_nothrow_destructible_v<T>;
}

static_assert(is_handle<omlx::pool>() && is_handle<omlx::request>());
static_assert(is_handle<omlx::callback_request>() && is_handle<omlx::download>());
static_assert(std::is_base_of_v<std::runtime_error, omlx::error> && std::is_nothrow_copy_constructible_v<omlx::error>);
static_assert(std::is_trivially_copyable_v<omlx::event> && std::is_trivially_copyable_v<omlx::span<float>>);
static_assert(sizeof(omlx::pool) == sizeof(void *), "a handle costs what its pointer does");

#if __cplusplus >= 202002L
static_assert(std::ranges::input_range<omlx::request>);
static_assert(std::ranges::contiguous_range<const omlx::span<float>>);
#endif
