// Downloads of models. Part of omlx.hpp.
#ifndef OMLX_DOWNLOAD_HPP
#define OMLX_DOWNLOAD_HPP

#include <optional>

#include "base.hpp"
#include "callback.hpp"

namespace omlx {

/// A download. Destroying it cancels it; its progress callback does not run afterwards.
class download {
public:
    /// How far it is.
    omlx_download_progress status() const {
        omlx_download_progress progress = OMLX_DOWNLOAD_PROGRESS_INIT;
        detail::call([&](omlx_error **error) { return omlx_download_status(get(), &progress, error); });
        return progress;
    }

    /// Waits for the end: a JSON object with "id", "folder", "commit" and "changed". Throws what the progress callback has
    /// thrown, or why the download failed.
    std::string wait() { return *finish(-1); }

    /// As `wait`; nothing if it takes longer.
    std::optional<std::string> wait_for(std::chrono::milliseconds timeout) { return finish(detail::wait_ms(timeout)); }

    /// Asks it to end; what has been fetched stays for the next attempt.
    void cancel() noexcept { omlx_download_cancel(get()); }

    omlx_download *get() const noexcept { return running_ ? running_->handle.get() : nullptr; }

private:
    friend class pool;

    class state : public detail::callback_state {
    public:
        using argument = omlx_download_progress;
        virtual bool deliver(const argument &progress) = 0;

        static std::int32_t receive(void *user_data, const omlx_download_progress *progress) noexcept {
            state &self = detail::shared_state<state>::borrow(user_data);
            return self.run([&] { return self.deliver(*progress); }) ? 0 : 1;
        }
    };

    struct running {
        explicit running(omlx_download *download) noexcept : handle(download) {}
        running(const running &) = delete;
        running &operator=(const running &) = delete;
        ~running() {
            if (!watched)
                return;
            omlx_download_set_callback(handle.get(), nullptr, nullptr, nullptr, nullptr);
            watched->wait();
        }

        detail::owned<omlx_download, omlx_download_release> handle;
        std::shared_ptr<state> watched;
    };

    explicit download(omlx_download *handle) : running_(new running(handle)) {}

    template <class F> void watch(F callback) {
        const std::shared_ptr<state> watched = std::make_shared<detail::callback_to<state, F>>(std::move(callback));
        void *user_data = detail::shared_state<state>::give(watched);
        running_->watched = watched;
        detail::call([&](omlx_error **error) {
            return omlx_download_set_callback(get(), state::receive, user_data, detail::shared_state<state>::destroy, error);
        });
    }

    std::optional<std::string> finish(std::int64_t timeout) {
        omlx_string *result = nullptr;
        omlx_error *details = nullptr;
        const omlx_status status = omlx_download_wait(get(), timeout, &result, &details);
        const detail::owned<omlx_error, omlx_error_release> owner(details);
        if (status == OMLX_E_TIMEOUT)
            return std::nullopt;
        if (status == OMLX_OK)
            return detail::take(result);
        if (running_ && running_->watched)
            running_->watched->rethrow();
        throw detail::to_error(status, details);
    }

    std::unique_ptr<running> running_;
};

} // namespace omlx

#endif
