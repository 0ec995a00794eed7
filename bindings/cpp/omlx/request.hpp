// Requests: fetched, and with a callback. Part of omlx.hpp.
#ifndef OMLX_REQUEST_HPP
#define OMLX_REQUEST_HPP

#include <iterator>
#include <optional>
#include <utility>

#include "callback.hpp"
#include "event.hpp"

namespace omlx {

/// A request whose events are fetched: by `next`, by `for (const omlx::event &event : request)`, or all of them by
/// `answer`, `embeddings` or `scores`. One thread at a time fetches. Destroying it cancels it.
class request {
public:
    explicit request(omlx_request *handle) noexcept : handle_(handle) {}

    /// The next event, however long it takes; nothing after the done event.
    std::optional<event> next() { return fetch(-1); }

    /// The next event if it comes in time. Nothing if it does not, and after the done event: see `over`.
    std::optional<event> try_next(std::chrono::milliseconds timeout = {}) { return fetch(detail::wait_ms(timeout)); }

    /// Whether the done event was fetched.
    bool over() const noexcept { return over_; }

    /// Id of the model that answers.
    std::string_view model() const noexcept { return omlx_request_model(get()); }

    /// How it ended, once it has.
    const outcome &result() const noexcept { return result_; }

    /// Has `wake` called when an event becomes available, on a thread of the library or in this call: see
    /// `omlx_request_set_wake`. It may still be running when this object is gone; what it captures is destroyed later.
    template <class F> void on_wake(F wake) {
        static_assert(std::is_nothrow_invocable_v<F &>, "a wake function must be noexcept");
        using callback = detail::bare_callback<F>;
        void *user_data = callback::give(std::move(wake));
        const omlx_wake_fn function = [](void *data) { callback::borrow(data)(); };
        detail::call([&](omlx_error **error) {
            return omlx_request_set_wake(get(), function, user_data, callback::destroy, error);
        });
    }

    void remove_wake() {
        detail::call([&](omlx_error **error) { return omlx_request_set_wake(get(), nullptr, nullptr, nullptr, error); });
    }

    /// Asks it to end; its done event comes within one step of the model.
    void cancel() noexcept { omlx_request_cancel(get()); }

    /// Reads to the end: all answers, in the order of their choices.
    std::vector<omlx::answer> answers() {
        std::vector<omlx::answer> all(1);
        while (const std::optional<event> told = next())
            add(all, *told);
        if (all.size() == 1)
            all[0].finish_reason = result_.finish_reason;
        return all;
    }

    /// Reads to the end: the answer, or the first one.
    omlx::answer answer() { return std::move(answers().front()); }

    /// Reads an `embed` to the end.
    omlx::embeddings embeddings() {
        omlx::embeddings read;
        while (const std::optional<event> told = next()) {
            if (told->is(OMLX_EVENT_KIND_EMBEDDINGS))
                read = {told->rows(), told->columns(), told->values().to_vector(), told->truncated()};
        }
        check_finished();
        return read;
    }

    /// Reads a `rerank` to the end.
    omlx::scores scores() {
        omlx::scores read;
        while (const std::optional<event> told = next()) {
            if (told->is(OMLX_EVENT_KIND_SCORES))
                read = {told->values().to_vector(), told->order().to_vector(), told->truncated()};
        }
        check_finished();
        return read;
    }

    /// Fetches as it advances.
    class iterator {
    public:
        using iterator_category = std::input_iterator_tag;
        using value_type = event;
        using difference_type = std::ptrdiff_t;
        using pointer = const event *;
        using reference = const event &;

        iterator() noexcept = default;
        explicit iterator(request &owner) : owner_(&owner), current_(owner.next()) {}

        reference operator*() const noexcept { return *current_; }
        pointer operator->() const noexcept { return &*current_; }
        iterator &operator++() {
            current_ = owner_->next();
            return *this;
        }
        void operator++(int) { ++*this; }
        /// Only whether both are at the end can be told.
        friend bool operator==(const iterator &a, const iterator &b) noexcept {
            return a.current_.has_value() == b.current_.has_value();
        }
        friend bool operator!=(const iterator &a, const iterator &b) noexcept { return !(a == b); }

    private:
        request *owner_ = nullptr;
        std::optional<event> current_;
    };

    iterator begin() { return iterator(*this); }
    iterator end() noexcept { return iterator(); }

    omlx_request *get() const noexcept { return handle_.get(); }

private:
    detail::owned<omlx_request, omlx_request_release> handle_;
    bool over_ = false;
    outcome result_;

    std::optional<event> fetch(std::int64_t timeout) {
        const omlx_event *fetched = nullptr;
        omlx_error *details = nullptr;
        const omlx_status status = omlx_request_next(get(), timeout, &fetched, &details);
        const detail::owned<omlx_error, omlx_error_release> owner(details);
        if (status == OMLX_E_TIMEOUT || status == OMLX_E_CLOSED)
            return std::nullopt;
        if (status != OMLX_OK)
            throw detail::to_error(status, details);
        const event told(*fetched);
        if (told.is(OMLX_EVENT_KIND_DONE)) {
            over_ = true;
            result_ = {told.finish_reason(), told.usage()};
            told.check();
        }
        return told;
    }

    /// What was cancelled has no result.
    void check_finished() const {
        if (result_.finish_reason == OMLX_FINISH_REASON_CANCELLED)
            throw error(OMLX_E_CANCELLED, "the request was cancelled");
    }

    static void add(std::vector<omlx::answer> &all, const event &told) {
        if (told.is(OMLX_EVENT_KIND_DONE))
            return;
        if (told.choice() >= all.size())
            all.resize(told.choice() + 1);
        omlx::answer &whole = all[told.choice()];
        whole.tokens.insert(whole.tokens.end(), told.tokens().begin(), told.tokens().end());
        if (told.is(OMLX_EVENT_KIND_TEXT)) {
            whole.text += told.text();
        } else if (told.is(OMLX_EVENT_KIND_REASONING)) {
            whole.reasoning += told.text();
        } else if (told.is(OMLX_EVENT_KIND_TOOL_CALL)) {
            if (told.tool_index() >= whole.tool_calls.size())
                whole.tool_calls.resize(told.tool_index() + 1);
            tool_call &call = whole.tool_calls[told.tool_index()];
            call.id = told.tool_id();
            call.name = told.tool_name();
            call.arguments += told.text();
        } else if (told.is(OMLX_EVENT_KIND_CHOICE_DONE)) {
            whole.finish_reason = told.finish_reason();
        }
    }
};

/// A request whose events go to a callback, on a thread of the library. Destroying it cancels it and waits until the
/// callback has returned for the last time, unless that happens in the callback itself.
class callback_request {
public:
    /// Waits for the end; then no callback runs any more. Throws what the callback has thrown, or why the request failed.
    outcome wait() {
        state &watched = alive();
        watched.wait();
        watched.rethrow();
        return watched.check();
    }

    /// Whether it ended in time. Throws nothing of the request's.
    bool wait_for(std::chrono::milliseconds timeout) { return alive().wait_for(timeout); }

    /// Asks it to end; its done event comes within one step of the model.
    void cancel() noexcept { omlx_request_cancel(get()); }

    omlx_request *get() const noexcept { return running_ ? running_->handle.get() : nullptr; }

private:
    friend class pool;

    class state : public detail::callback_state {
    public:
        using argument = event;
        virtual bool deliver(const event &told) = 0;

        static std::int32_t receive(void *user_data, const omlx_event *source) noexcept {
            state &self = detail::shared_state<state>::borrow(user_data);
            const event told(*source);
            if (told.is(OMLX_EVENT_KIND_DONE))
                self.keep(told);
            return self.run([&] { return self.deliver(told); }) ? 0 : 1;
        }

        outcome check() {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (result_.finish_reason == OMLX_FINISH_REASON_ERROR)
                throw error(status_, message_);
            return result_;
        }

    private:
        void keep(const event &done) noexcept {
            const std::lock_guard<std::mutex> lock(mutex_);
            result_ = {done.finish_reason(), done.usage()};
            status_ = done.status();
            try {
                message_ = done.error_message();
            } catch (...) {
                // No memory for the message: the status has to do.
            }
        }

        outcome result_;
        omlx_status status_ = OMLX_OK;
        std::string message_;
    };

    struct running {
        explicit running(std::shared_ptr<state> shared) noexcept : watched(std::move(shared)) {}
        running(const running &) = delete;
        running &operator=(const running &) = delete;
        ~running() {
            if (!handle)
                return;
            omlx_request_cancel(handle.get());
            watched->wait();
        }

        std::shared_ptr<state> watched;
        detail::owned<omlx_request, omlx_request_release> handle;
    };

    explicit callback_request(std::unique_ptr<running> started) noexcept : running_(std::move(started)) {}

    state &alive() const {
        if (!running_)
            throw error(OMLX_E_INVALID_ARGUMENT, "the request was moved away");
        return *running_->watched;
    }

    std::unique_ptr<running> running_;
};

} // namespace omlx

#endif
