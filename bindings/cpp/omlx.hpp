// omlx.hpp - libomlx for C++17 and later: the C functions of omlx.h as types that clean up after themselves.
//
//   Errors     Whatever fails throws `omlx::error`. A request that fails while it runs throws it in the place of its done
//              event; one that was cancelled ends with a done event, whose finish reason says so.
//   Handles    can be moved, not copied. A moved-from one may be destroyed and assigned to; its functions throw.
//   Callbacks  are any callable. What an event or progress callback throws ends its request or download, never crosses a C
//              frame, and is thrown again by the handle's `wait`. Wake functions and log hooks must be `noexcept`.
//   Texts      are UTF-8. A view in an event lives until the callback returns or the next event is fetched. Where a
//              model's id may be left out, an empty one is the default model.
//   Numbers    Enumerations are those of omlx.h (OMLX_EVENT_KIND_TEXT, ...), so there is one list of them.
//
// What the functions do, what blocks, and what may be called where, is said in omlx.h.
#ifndef OMLX_HPP
#define OMLX_HPP

#if __cplusplus < 201703L && (!defined(_MSVC_LANG) || _MSVC_LANG < 201703L)
#error "omlx.hpp needs C++17 or later; omlx.h works with any C++"
#endif


#include <type_traits>

#include "omlx.h"
#include "omlx/base.hpp"
#include "omlx/callback.hpp"
#include "omlx/download.hpp"
#include "omlx/event.hpp"
#include "omlx/request.hpp"

namespace omlx {

/// Options of a pool: the fields of `omlx_pool_options`, all defaults. Its texts are copied when the pool is opened.
struct pool_options : omlx_pool_options {
    pool_options() noexcept : omlx_pool_options(OMLX_POOL_OPTIONS_INIT) {}
};

/// Limits of a pool's cache: the fields of `omlx_cache_limits`, nothing changed.
struct cache_limits : omlx_cache_limits {
    cache_limits() noexcept : omlx_cache_limits(OMLX_CACHE_LIMITS_INIT) {}
};

/// An engine pool. Destroying it closes it: requests and downloads end, and when the destructor returns, callbacks have
/// returned, too (except the one in which it is destroyed).
class pool {
public:
    /// Opens a pool, loading no model. Throws if the library that is loaded does not fit this header.
    explicit pool(const pool_options &options = {}) {
        detail::call([](omlx_error **error) { return omlx_check_abi(OMLX_ABI_VERSION, error); });
        omlx_pool *opened = nullptr;
        detail::call([&](omlx_error **error) { return omlx_pool_open(&options, &opened, error); });
        handle_.reset(opened);
    }

    /// Ends everything and waits for that. Further calls throw `OMLX_E_CLOSED`.
    void close() {
        detail::call([&](omlx_error **error) { return omlx_pool_close(get(), error); });
    }

    // Requests ------------------------------------------------------------------------------------------------------

    /// Starts a generation.
    request generate(std::string_view json, request_options options = {}) { return start(omlx_generate, json, options); }

    /// Starts a generation whose events go to `callback`, which takes a `const omlx::event &` and returns nothing, or
    /// `false` to cancel.
    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, const event &>>>
    callback_request generate(std::string_view json, F callback, request_options options = {}) {
        return start(omlx_generate, json, options, std::move(callback));
    }

    /// Starts to compute vectors: `pool.embed(json).embeddings()`.
    request embed(std::string_view json, request_options options = {}) { return start(omlx_embed, json, options); }

    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, const event &>>>
    callback_request embed(std::string_view json, F callback, request_options options = {}) {
        return start(omlx_embed, json, options, std::move(callback));
    }

    /// Starts to compute scores: `pool.rerank(json).scores()`.
    request rerank(std::string_view json, request_options options = {}) { return start(omlx_rerank, json, options); }

    template <class F, class = std::enable_if_t<std::is_invocable_v<F &, const event &>>>
    callback_request rerank(std::string_view json, F callback, request_options options = {}) {
        return start(omlx_rerank, json, options, std::move(callback));
    }

    // State and models ----------------------------------------------------------------------------------------------

    /// JSON: memory, and models that are loaded.
    std::string status() const {
        return detail::text_of([&](auto **text, auto **error) { return omlx_pool_status(get(), text, error); });
    }

    std::string metrics(omlx_metrics_format format = OMLX_METRICS_FORMAT_JSON) const {
        return detail::text_of([&](auto **text, auto **error) { return omlx_pool_metrics(get(), format, text, error); });
    }

    /// Both 0 is automatic.
    void set_memory_limit(std::uint64_t bytes, std::uint32_t percent = 0) {
        detail::call([&](omlx_error **error) { return omlx_pool_set_memory_limit(get(), bytes, percent, error); });
    }

    /// JSON: all models, with what is known of each.
    std::string models() const {
        return detail::text_of([&](auto **text, auto **error) { return omlx_pool_models(get(), text, error); });
    }

    /// An empty `id` is the folder's name.
    void add_model(std::string_view folder, std::string_view id = {}) {
        const detail::c_text path(folder), name(id);
        detail::call([&](omlx_error **error) { return omlx_pool_add_model(get(), path.get(), name.get(), error); });
    }

    void rescan() {
        detail::call([&](omlx_error **error) { return omlx_pool_rescan(get(), error); });
    }

    void load(std::string_view id) {
        const detail::c_text name(id);
        detail::call([&](omlx_error **error) { return omlx_model_load(get(), name.get(), error); });
    }

    /// Bytes that became free. With `drain` the model's requests end first; else they are cancelled.
    std::uint64_t unload(std::string_view id, bool drain = false) {
        const detail::c_text name(id);
        std::uint64_t freed = 0;
        detail::call([&](omlx_error **error) { return omlx_model_unload(get(), name.get(), drain, &freed, error); });
        return freed;
    }

    void configure(std::string_view id, std::string_view json) {
        const detail::c_text name(id);
        detail::call([&](omlx_error **error) {
            return omlx_model_configure(get(), name.get(), json.data(), json.size(), error);
        });
    }

    std::string settings(std::string_view id) const {
        const detail::c_text name(id);
        return detail::text_of([&](auto **text, auto **error) { return omlx_model_settings(get(), name.get(), text, error); });
    }

    // Downloads -----------------------------------------------------------------------------------------------------

    /// Starts a download: {"repo": "org/name"}, see `omlx_download_start`.
    omlx::download download(std::string_view json) {
        omlx_download *handle = nullptr;
        detail::call([&](omlx_error **error) {
            return omlx_download_start(get(), json.data(), json.size(), &handle, error);
        });
        return omlx::download(handle);
    }

    /// The same with a callback that takes a `const omlx_download_progress &` and returns nothing, or `false` to cancel.
    template <class F> omlx::download download(std::string_view json, F progress) {
        omlx::download started = download(json);
        started.watch(std::move(progress));
        return started;
    }

    // Tokens and templates ------------------------------------------------------------------------------------------

    std::vector<std::uint32_t> tokenize(std::string_view text, std::string_view model = {}, bool add_special_tokens = false) const {
        const detail::c_text name(model);
        omlx_tokens *tokens = nullptr;
        detail::call([&](omlx_error **error) {
            const char *data = text.empty() ? "" : text.data();
            return omlx_tokenize(get(), name.get(), data, text.size(), add_special_tokens, &tokens, error);
        });
        const detail::owned<omlx_tokens, omlx_tokens_release> owner(tokens);
        return span<std::uint32_t>(omlx_tokens_data(tokens), omlx_tokens_count(tokens)).to_vector();
    }

    std::string detokenize(span<std::uint32_t> tokens, std::string_view model = {}) const {
        const detail::c_text name(model);
        const std::uint32_t none = 0;
        const std::uint32_t *data = tokens.empty() ? &none : tokens.data();
        return detail::text_of([&](auto **text, auto **error) {
            return omlx_detokenize(get(), name.get(), data, tokens.size(), text, error);
        });
    }

    /// The prompt that a chat template makes of a request; `lenient` as in `request_options`.
    std::string render_template(std::string_view json, bool lenient = false) const {
        return detail::text_of([&](auto **text, auto **error) {
            return omlx_render_template(get(), json.data(), json.size(), lenient, text, error);
        });
    }

    // Cache ---------------------------------------------------------------------------------------------------------

    /// JSON: what is cached of a model.
    std::string cache_stats(std::string_view model = {}) const {
        const detail::c_text name(model);
        return detail::text_of([&](auto **text, auto **error) { return omlx_cache_stats(get(), name.get(), text, error); });
    }

    /// JSON: where the tokens of a request's prompt are cached.
    std::string cache_find(std::string_view json) const {
        return detail::text_of([&](auto **text, auto **error) {
            return omlx_cache_find(get(), json.data(), json.size(), text, error);
        });
    }

    /// Tokens of a request's prompt that are in the pools afterwards.
    std::uint64_t cache_prefetch(std::string_view json) {
        return count([&](std::uint64_t *tokens, omlx_error **error) {
            return omlx_cache_prefetch(get(), json.data(), json.size(), tokens, error);
        });
    }

    /// An empty `model` is all that are loaded.
    void cache_flush(std::chrono::milliseconds timeout, std::string_view model = {}) {
        const detail::c_text name(model);
        const auto ms = static_cast<std::uint32_t>(std::min<std::int64_t>(detail::wait_ms(timeout), UINT32_MAX));
        detail::call([&](omlx_error **error) { return omlx_cache_flush(get(), name.get(), ms, error); });
    }

    /// Bytes that became free. An empty `model` is all of them; `tiers` is a sum of `omlx_cache_tier`, or 0 for all.
    std::uint64_t cache_clear(std::string_view model = {}, std::uint32_t tiers = 0) {
        const detail::c_text name(model);
        return count([&](std::uint64_t *bytes, omlx_error **error) {
            return omlx_cache_clear(get(), name.get(), tiers, bytes, error);
        });
    }

    /// The limits that hold.
    cache_limits get_cache_limits() const {
        cache_limits limits;
        detail::call([&](omlx_error **error) { return omlx_cache_get_limits(get(), &limits, error); });
        return limits;
    }

    void set_cache_limits(const cache_limits &limits) {
        detail::call([&](omlx_error **error) { return omlx_cache_set_limits(get(), &limits, error); });
    }

    /// Tokens of a request's prompt that are kept until it is unpinned.
    std::uint64_t cache_pin(std::string_view json) {
        return count([&](std::uint64_t *tokens, omlx_error **error) {
            return omlx_cache_pin(get(), json.data(), json.size(), tokens, error);
        });
    }

    void cache_unpin(std::string_view json) {
        detail::call([&](omlx_error **error) { return omlx_cache_unpin(get(), json.data(), json.size(), error); });
    }

    omlx_pool *get() const noexcept { return handle_.get(); }

private:
    using start_function = decltype(&omlx_generate);

    static void end(omlx_pool *handle) noexcept {
        omlx_pool_close(handle, nullptr);
        omlx_pool_release(handle);
    }

    static omlx_generate_options c_options(request_options options) noexcept {
        omlx_generate_options c = OMLX_GENERATE_OPTIONS_INIT;
        c.lenient = options.lenient;
        c.loading_events = options.loading_events;
        c.started_event = options.started_event;
        return c;
    }

    request start(start_function function, std::string_view json, request_options options) {
        const omlx_generate_options c = c_options(options);
        omlx_request *handle = nullptr;
        detail::call([&](omlx_error **error) { return function(get(), json.data(), json.size(), &c, &handle, error); });
        return request(handle);
    }

    template <class F>
    callback_request start(start_function function, std::string_view json, request_options options, F callback) {
        using state = callback_request::state;
        omlx_generate_options c = c_options(options);
        auto running = std::make_unique<callback_request::running>(
            std::make_shared<detail::callback_to<state, F>>(std::move(callback)));
        c.callback = state::receive;
        c.destroy = detail::shared_state<state>::destroy;
        c.user_data = detail::shared_state<state>::give(running->watched);
        omlx_request *handle = nullptr;
        detail::call([&](omlx_error **error) { return function(get(), json.data(), json.size(), &c, &handle, error); });
        running->handle.reset(handle);
        return callback_request(std::move(running));
    }

    template <class F> static std::uint64_t count(F &&function) {
        std::uint64_t number = 0;
        detail::call([&](omlx_error **error) { return function(&number, error); });
        return number;
    }

    detail::owned<omlx_pool, end> handle_;
};

// Library -----------------------------------------------------------------------------------------------------------

inline std::string_view version() noexcept { return omlx_version(); }

/// The version of MLX that the library needs.
inline std::string_view mlx_version() noexcept { return omlx_mlx_version(); }

/// Has `hook` called with the library's log lines up to `max_level`, on any thread, several at once. It takes an
/// `omlx_log_level` and a `std::string_view`, is `noexcept`, and must not call the library.
template <class F> void set_log_hook(omlx_log_level max_level, F hook) {
    static_assert(std::is_nothrow_invocable_v<F &, omlx_log_level, std::string_view>, "a log hook must be noexcept");
    using callback = detail::bare_callback<F>;
    void *user_data = callback::give(std::move(hook));
    const omlx_log_fn function = [](void *data, std::uint32_t level, const char *message) {
        callback::borrow(data)(static_cast<omlx_log_level>(level), std::string_view(message));
    };
    detail::call([&](omlx_error **error) {
        return omlx_set_log_hook(function, max_level, user_data, callback::destroy, error);
    });
}

inline void remove_log_hook() {
    detail::call([](omlx_error **error) {
        return omlx_set_log_hook(nullptr, OMLX_LOG_LEVEL_ERROR, nullptr, nullptr, error);
    });
}

} // namespace omlx

#endif // OMLX_HPP
