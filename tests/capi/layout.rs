//! Sizes and places of the library's structs as Rust has them, in the form of `include/omlx.abi`.

use std::fmt::Write;
use std::mem::{align_of, offset_of, size_of};

use omlx::capi::*;

/// Size of the field that `_place` returns a pointer to.
fn size_behind<S, F>(_place: impl Fn(*const S) -> *const F) -> usize {
    size_of::<F>()
}

/// Writes the lines of one struct.
macro_rules! lines {
    ($text:ident, $name:ident: $($field:ident),* $(,)?) => {
        let _ = writeln!($text, "struct {} size {} align {}", stringify!($name), size_of::<$name>(), align_of::<$name>());
        $(let _ = writeln!(
            $text,
            "    {} {} {}",
            offset_of!($name, $field),
            // SAFETY: nothing is read: the place alone is taken, and never of a real pointer.
            size_behind(|value: *const $name| unsafe { &raw const (*value).$field }),
            stringify!($field)
        );)*
    };
}

/// All structs with all fields, in the header's order: one that is missing here differs from C.
pub fn of_rust() -> String {
    let mut text = String::new();
    lines!(text, omlx_pool_options:
        struct_size, device, dtype, context_length, models_dir, default_model, prefill_chunk, keep_environment, threads,
        precision, max_sequences, queue_length, cache_bytes, block_tokens, target_latency_ms, cache_dir, cold_bytes,
        cold_bytes_per_model, hot_bytes, cache_namespace, cache_write_through, cache_codec, memory_limit, memory_percent,
        ttl_seconds, settings_file, hub_cache, hot_percent, reserved);
    lines!(text, omlx_token_logprob: token, logprob, bytes, byte_count, top, top_count);
    lines!(text, omlx_usage:
        prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, seconds_to_first_token, tokens_per_second);
    lines!(text, omlx_event:
        struct_size, kind, choice, finish_reason, text, text_len, tokens, token_count, logprobs, logprob_count, status,
        tool_index, tool_id, tool_name, error_message, usage, values, rows, columns, order, order_count, truncated,
        loaded_bytes, total_bytes, stop_string);
    lines!(text, omlx_generate_options: struct_size, lenient, callback, user_data, destroy, loading_events, started_event);
    lines!(text, omlx_download_progress:
        struct_size, state, bytes_done, bytes_total, bytes_kept, files_done, files_total, retries);
    lines!(text, omlx_cache_limits: struct_size, hot_percent, hot_bytes, cold_bytes, cold_bytes_per_model);
    text
}
