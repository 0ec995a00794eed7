// What requests tell, piece by piece and as a whole. Part of omlx.hpp.
#ifndef OMLX_EVENT_HPP
#define OMLX_EVENT_HPP

#include "base.hpp"

namespace omlx {

/// What a request tells. A view: see the top of this file for how long its texts live.
class event {
public:
    explicit event(const omlx_event &source) noexcept {
        // An older library fills less of it.
        std::memcpy(&raw_, &source, std::min<std::size_t>(source.struct_size, sizeof raw_));
    }

    omlx_event_kind kind() const noexcept { return static_cast<omlx_event_kind>(raw_.kind); }
    bool is(omlx_event_kind kind) const noexcept { return raw_.kind == kind; }
    std::size_t choice() const noexcept { return raw_.choice; }
    omlx_finish_reason finish_reason() const noexcept { return static_cast<omlx_finish_reason>(raw_.finish_reason); }
    /// A piece of the answer, if `kind()` is text; else of reasoning, of a call's arguments, or base64.
    std::string_view text() const noexcept { return {raw_.text, raw_.text_len}; }
    span<std::uint32_t> tokens() const noexcept { return {raw_.tokens, raw_.token_count}; }
    span<omlx_token_logprob> logprobs() const noexcept { return {raw_.logprobs, raw_.logprob_count}; }
    omlx_status status() const noexcept { return static_cast<omlx_status>(raw_.status); }
    std::string_view error_message() const noexcept { return raw_.error_message; }
    std::size_t tool_index() const noexcept { return raw_.tool_index; }
    std::string_view tool_id() const noexcept { return raw_.tool_id; }
    std::string_view tool_name() const noexcept { return raw_.tool_name; }
    const omlx_usage &usage() const noexcept { return raw_.usage; }
    span<float> values() const noexcept { return {raw_.values, raw_.rows * raw_.columns}; }
    std::size_t rows() const noexcept { return raw_.rows; }
    std::size_t columns() const noexcept { return raw_.columns; }
    span<std::uint32_t> order() const noexcept { return {raw_.order, raw_.order_count}; }
    std::size_t truncated() const noexcept { return raw_.truncated; }
    std::uint64_t loaded_bytes() const noexcept { return raw_.loaded_bytes; }
    std::uint64_t total_bytes() const noexcept { return raw_.total_bytes; }
    std::string_view stop_string() const noexcept { return raw_.stop_string; }

    /// Throws the error of a request that failed.
    void check() const {
        if (raw_.kind == OMLX_EVENT_KIND_DONE && raw_.finish_reason == OMLX_FINISH_REASON_ERROR)
            throw error(status(), raw_.error_message);
    }

private:
    omlx_event raw_{};
};

/// How a request is delivered.
struct request_options {
    /// Ignore keys of the JSON that the library does not know.
    bool lenient = false;
    /// Begin with `OMLX_EVENT_KIND_LOADING` while the model is being loaded.
    bool loading_events = false;
    /// An `OMLX_EVENT_KIND_STARTED` before the first text.
    bool started_event = false;
};

struct tool_call {
    std::string id, name;
    /// JSON.
    std::string arguments;
};

/// A whole answer.
struct answer {
    std::string text, reasoning;
    std::vector<tool_call> tool_calls;
    std::vector<std::uint32_t> tokens;
    omlx_finish_reason finish_reason = OMLX_FINISH_REASON_NONE;
};

/// The vectors of an `embed`, in the order of its texts.
struct embeddings {
    std::size_t rows = 0, columns = 0;
    std::vector<float> values;
    std::size_t truncated = 0;

    span<float> operator[](std::size_t row) const noexcept { return {values.data() + row * columns, columns}; }
};

/// The scores of a `rerank`, in the order of its documents; `order` has the best documents first.
struct scores {
    std::vector<float> values;
    std::vector<std::uint32_t> order;
    std::size_t truncated = 0;
};

/// How a request ended.
struct outcome {
    omlx_finish_reason finish_reason = OMLX_FINISH_REASON_NONE;
    omlx_usage usage{};
};

} // namespace omlx

#endif
