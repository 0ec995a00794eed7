//! `omlx_cache_*`: what is kept of earlier requests.

use std::ffi::c_char;

use super::{borrow, boundary, omlx_error, omlx_pool, omlx_string, optional_string};
use crate::engine::Request;
use crate::error::Status;

/// State of a loaded model's cache as a JSON object: blocks used, cached and free, the tokens and bytes of one, entries,
/// prompt tokens computed and found in the cache. A `model` of NULL is the default model.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such model, or not loaded).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_stats(
    pool: *mut omlx_pool,
    model: *const c_char,
    text: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, model) = unsafe { (borrow(pool, "pool")?, optional_string(model, "model")?) };
        omlx_string::write(pool.pool.cache_stats(model)?, text)
    })
}

/// Forgets what is cached and neither in use nor pinned. `bytes`, which may be NULL, receives how much room that makes
/// for later requests. Blocking while the model loads.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such model, or not loaded).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_clear(
    pool: *mut omlx_pool,
    model: *const c_char,
    bytes: *mut u64,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, model) = unsafe { (borrow(pool, "pool")?, optional_string(model, "model")?) };
        let freed = pool.pool.cache_clear(model)?;
        if !bytes.is_null() {
            // SAFETY: not NULL, so it points to a number the host lets us write.
            unsafe { bytes.write(freed as u64) };
        }
        Ok(())
    })
}

/// Keeps what is cached of the beginning of a request's prompt, until it is unpinned or the model is unloaded: neither
/// other requests nor `omlx_cache_clear` take its place. `tokens`, which may be NULL, receives for how many tokens; run the
/// request first, with a `max_tokens` of 1 if no answer is wanted. Pinning again adds what has been cached since.
/// `request_json` is as for `omlx_generate`. Blocking while the model loads and the tokenizer is read.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_TEMPLATE`, `OMLX_E_NOT_FOUND` (no such model, or not loaded).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_pin(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    tokens: *mut u64,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, json) =
            unsafe { (borrow(pool, "pool")?, super::bytes(request_json.cast(), request_len, "request_json")?) };
        let pinned = pool.pool.cache_pin(&Request::from_json(json, false)?)?;
        if !tokens.is_null() {
            // SAFETY: not NULL, so it points to a number the host lets us write.
            unsafe { tokens.write(pinned as u64) };
        }
        Ok(())
    })
}

/// Ends the pin of a request's prompt. Blocking like `omlx_cache_pin`.
///
/// Errors: as `omlx_cache_pin`, and `OMLX_E_NOT_FOUND` if it was not pinned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_unpin(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, json) =
            unsafe { (borrow(pool, "pool")?, super::bytes(request_json.cast(), request_len, "request_json")?) };
        pool.pool.cache_unpin(&Request::from_json(json, false)?)
    })
}
