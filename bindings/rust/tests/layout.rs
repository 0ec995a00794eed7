//! The declarations that were made of the header, against the library itself and against a second reading of the header.

use std::mem::{align_of, offset_of, size_of};

use omlx::capi;
use omlx_client::Status;

/// What the client compiles.
#[expect(non_camel_case_types, dead_code, reason = "as in the client, which uses more of it")]
mod ffi {
    include!(concat!(env!("OUT_DIR"), "/omlx.rs"));
}

const HEADER: &str = include_str!("../../../include/omlx.h");
const RUST: &str = include_str!(concat!(env!("OUT_DIR"), "/omlx.rs"));

/// Compares size, alignment and the places of some fields with the library's own struct.
macro_rules! same_layout {
    ($name:ident: $($field:ident),*) => {
        assert_eq!(size_of::<ffi::$name>(), size_of::<capi::$name>(), stringify!($name));
        assert_eq!(align_of::<ffi::$name>(), align_of::<capi::$name>(), stringify!($name));
        $(assert_eq!(offset_of!(ffi::$name, $field), offset_of!(capi::$name, $field), stringify!($field));)*
    };
}

#[test]
fn structs_are_the_librarys() {
    same_layout!(omlx_pool_options: struct_size, models_dir, cache_bytes, memory_percent, hub_cache);
    same_layout!(omlx_generate_options: struct_size, callback, user_data, destroy, loading_events, started_event);
    same_layout!(omlx_event: kind, text, tokens, logprobs, status, error_message, usage, values, total_bytes);
    same_layout!(omlx_token_logprob: token, logprob, bytes, byte_count, top, top_count);
    same_layout!(omlx_usage: prompt_tokens, completion_tokens, tokens_per_second);
    same_layout!(omlx_download_progress: struct_size, state, bytes_done, retries);
    same_layout!(omlx_cache_limits: struct_size, hot_bytes, cold_bytes_per_model);
}

#[test]
fn nothing_of_the_header_is_left_out() {
    // Every name at the beginning of a line of code, or behind `typedef`, found in another way than the reader's.
    let code = HEADER.lines().filter(|line| !line.starts_with([' ', '/', '}']));
    let words = code.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    let names: std::collections::BTreeSet<&str> =
        words.filter(|word| word.starts_with("omlx_") && *word != "omlx_").collect();
    assert!(names.len() > 60, "{names:?}");
    let missing: Vec<_> = names.iter().filter(|name| !RUST.contains(**name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let constants = HEADER.lines().filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "));
    for (name, value) in constants.filter(|(name, _)| name.starts_with("OMLX_")) {
        assert!(RUST.contains(&format!("pub const {name}: ")), "{name}");
        assert!(RUST.contains(&format!(" = {value};")), "{name} = {value}");
    }
}

#[test]
fn every_status_has_a_name_here() {
    let codes = HEADER.lines().filter_map(|line| line.trim().strip_prefix("OMLX_E_")?.strip_suffix(','));
    let codes: Vec<i32> = codes.filter_map(|line| line.split_once(" = ")?.1.parse().ok()).collect();
    assert!(codes.len() >= 20);
    for code in codes {
        let status = Status::from_code(code);
        assert!(!matches!(status, Status::Other(_)), "{code} is not known: {}", status.name());
        assert_eq!(status.code(), code);
    }
    assert_eq!(Status::from_code(12345), Status::Other(12345));
}
