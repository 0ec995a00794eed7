// Callbacks of the host, whatever they throw. Part of omlx.hpp.
#ifndef OMLX_CALLBACK_HPP
#define OMLX_CALLBACK_HPP

#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>

namespace omlx {
namespace detail {

/// What the owner of a callback shares with the library, which holds one reference until its destroy call.
class callback_state {
public:
    callback_state() = default;
    callback_state(const callback_state &) = delete;
    callback_state &operator=(const callback_state &) = delete;
    virtual ~callback_state() = default;

    /// Waits until no callback will run any more. Returns at once inside the callback itself, which could only wait for its
    /// own end.
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return over_ || runs_on_ == std::this_thread::get_id(); });
    }

    bool wait_for(std::chrono::milliseconds timeout) {
        std::unique_lock<std::mutex> lock(mutex_);
        return changed_.wait_for(lock, timeout, [this] { return over_; });
    }

    /// Throws what the callback has thrown.
    void rethrow() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (const std::exception_ptr thrown = thrown_) {
            lock.unlock();
            std::rethrow_exception(thrown);
        }
    }

protected:
    /// Runs a callback, unless an earlier one has thrown. Whether it wants more.
    template <class F> bool run(F &&callback) noexcept {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (thrown_)
                return false;
            runs_on_ = std::this_thread::get_id();
        }
        bool more = false;
        std::exception_ptr thrown;
        try {
            more = callback();
        } catch (...) {
            thrown = std::current_exception();
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        runs_on_ = std::thread::id();
        thrown_ = thrown;
        return more;
    }

    std::mutex mutex_;

private:
    template <class State> friend class shared_state;

    void end() noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        over_ = true;
        changed_.notify_all();
    }

    std::condition_variable changed_;
    bool over_ = false;
    std::thread::id runs_on_;
    std::exception_ptr thrown_;
};

/// The reference that the library holds, behind a `user_data`.
template <class State> class shared_state {
public:
    static void *give(const std::shared_ptr<State> &state) { return new std::shared_ptr<State>(state); }

    static State &borrow(void *user_data) noexcept { return **static_cast<std::shared_ptr<State> *>(user_data); }

    /// The destroy function.
    static void destroy(void *user_data) noexcept {
        const std::unique_ptr<std::shared_ptr<State>> held(static_cast<std::shared_ptr<State> *>(user_data));
        (*held)->end();
    }
};

/// A callable behind `State::deliver`. One that returns nothing always wants more.
template <class State, class F> class callback_to final : public State {
public:
    explicit callback_to(F callback) : callback_(std::move(callback)) {}

private:
    using argument = typename State::argument;
    using result = std::invoke_result_t<F &, const argument &>;
    static_assert(std::is_void_v<result> || std::is_same_v<result, bool>, "a callback returns nothing, or whether to go on");

    bool deliver(const argument &told) override {
        if constexpr (std::is_void_v<result>) {
            callback_(told);
            return true;
        } else {
            return callback_(told);
        }
    }

    F callback_;
};

/// A callable that lives behind a `user_data` of its own, and may not throw.
template <class F> struct bare_callback {
    static void *give(F callback) { return new F(std::move(callback)); }
    static F &borrow(void *user_data) noexcept { return *static_cast<F *>(user_data); }
    static void destroy(void *user_data) noexcept { delete static_cast<F *>(user_data); }
};

} // namespace detail
} // namespace omlx

#endif
