//! `omlx_cache_*`: what is kept of earlier requests.

use std::ffi::c_char;
use std::time::Duration;

use super::{SizedOptions, borrow, boundary, omlx_error, omlx_pool, omlx_string, optional_string, output};
use crate::engine::Request;
use crate::error::{Error, Status};
use crate::pool::{TierLimits, TierSet};

/// Where rows of keys and values are kept; values may be added up.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_cache_tier {
    /// The pools that models compute with.
    Pools = 1,
    /// The host's memory, where pools lie in another one.
    Hot = 2,
    /// Files in `omlx_pool_options.cache_dir`.
    Cold = 4,
}

/// State of a model's cache as a JSON object: if it is loaded, blocks used, cached and free, the tokens and bytes of one,
/// entries, prompt tokens computed and found in the cache; in `"hot"` and `"cold"` the model's part of the other tiers
/// (entries, bytes, tokens found there), and in `"cold_total"` that of all models together. Of files also what was read and
/// written since the pool was opened: `"read_bytes"` by `"read_seconds"` is the rate of restoring,
/// `"written_bytes_per_new_token"` the price of a computed token. A `model` of NULL is the default model; it may be the
/// id of one that is no longer there, but in the files.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such model, and nothing cached of one), `OMLX_E_UNSUPPORTED` (an embedding model or a
/// reranker).
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

/// Forgets what is cached of a model (of all models, if `model` is NULL) and neither in use nor pinned. `tiers` is a sum
/// of `omlx_cache_tier`, or 0 for all of them. `bytes`, which may be NULL, receives how much room that makes. What is left
/// of a model that is no longer there is forgotten by its id of before, pinned or not. Blocking while files are written and
/// removed, and while the model loads.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such model, and nothing cached of one), `OMLX_E_TIMEOUT` (files are still being written
/// after ten seconds; none was removed).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_clear(
    pool: *mut omlx_pool,
    model: *const c_char,
    tiers: u32,
    bytes: *mut u64,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, model) = unsafe { (borrow(pool, "pool")?, optional_string(model, "model")?) };
        let has = |tier: omlx_cache_tier| tiers == 0 || tiers & tier as u32 != 0;
        if tiers >= 2 * omlx_cache_tier::Cold as u32 {
            return Err(Error::invalid_argument(format!("there are no cache tiers {tiers}")));
        }
        let (pools, hot, cold) = (has(omlx_cache_tier::Pools), has(omlx_cache_tier::Hot), has(omlx_cache_tier::Cold));
        let freed = pool.pool.cache_clear(model, TierSet { pools, hot, cold })?;
        if !bytes.is_null() {
            // SAFETY: not NULL, so it points to a number the host lets us write.
            unsafe { bytes.write(freed) };
        }
        Ok(())
    })
}

/// Where the tokens of a request's prompt are cached, as a JSON object: `"tokens"` (all but the last, which is computed in
/// any case), those in the `"pool"`, in the `"hot"` and in the `"cold"` tier, those `"missing"`; `"stopped_by"` why the
/// match went no further (`"complete"`, `"other_tokens"`, `"not_cached"`, `"not_identified"`: the model's files are still
/// being read, and other tiers not known); and by what has been measured so far `"restore_seconds"` and
/// `"compute_seconds"` to the first token. `request_json` is as for `omlx_generate`. Blocking while the model loads and
/// the tokenizer is read.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_TEMPLATE`, `OMLX_E_NOT_FOUND` (no such model, or not loaded).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_find(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    text: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, json) =
            unsafe { (borrow(pool, "pool")?, super::bytes(request_json.cast(), request_len, "request_json")?) };
        let text = output(text, "text")?;
        omlx_string::write(pool.pool.cache_find(&Request::from_json(json, false)?)?, text)
    })
}

/// Brings what other tiers have of a request's prompt into the pools, so that the request itself begins sooner. `tokens`,
/// which may be NULL, receives how many are there then. Blocking until that is done.
///
/// Errors: as `omlx_cache_find`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_prefetch(
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
        let found = pool.pool.cache_prefetch(&Request::from_json(json, false)?)?;
        if !tokens.is_null() {
            // SAFETY: not NULL, so it points to a number the host lets us write.
            unsafe { tokens.write(found as u64) };
        }
        Ok(())
    })
}

/// Writes what a model (all that are loaded, if `model` is NULL) has computed and no file has yet. Blocking until it is
/// on the disk, or for `timeout_ms`. Without it that happens when a model has nothing to do for five seconds, when it is
/// unloaded, and when the pool is closed.
///
/// Errors: `OMLX_E_TIMEOUT`, `OMLX_E_IO` (something could not be written), `OMLX_E_UNSUPPORTED` (the pool has no
/// `cache_dir`), `OMLX_E_NOT_FOUND` (no such model, or not loaded).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_flush(
    pool: *mut omlx_pool,
    model: *const c_char,
    timeout_ms: u32,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, model) = unsafe { (borrow(pool, "pool")?, optional_string(model, "model")?) };
        pool.pool.cache_flush(model, Duration::from_millis(timeout_ms.into()))
    })
}

/// Limits of a pool's cache that can change while it is open. Start from `OMLX_CACHE_LIMITS_INIT`; zero leaves a limit as
/// it is, and `UINT64_MAX` in `cold_bytes_per_model` ends that one.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct omlx_cache_limits {
    /// `sizeof(omlx_cache_limits)`, set by `OMLX_CACHE_LIMITS_INIT`.
    pub struct_size: u32,
    /// As `omlx_pool_options.hot_percent`.
    pub hot_percent: u32,
    /// As `omlx_pool_options.hot_bytes`.
    pub hot_bytes: u64,
    /// As `omlx_pool_options.cold_bytes`.
    pub cold_bytes: u64,
    /// As `omlx_pool_options.cold_bytes_per_model`.
    pub cold_bytes_per_model: u64,
}

impl Default for omlx_cache_limits {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            hot_percent: 0,
            hot_bytes: 0,
            cold_bytes: 0,
            cold_bytes_per_model: 0,
        }
    }
}

// SAFETY: repr(C), the size comes first, and every other field is an integer.
unsafe impl SizedOptions for omlx_cache_limits {
    const MIN_SIZE: usize = 32;
}

/// Changes limits of a pool's cache; what is beyond them goes. Blocking while files are removed.
///
/// Errors: `OMLX_E_INVALID_ARGUMENT` (`hot_bytes` and `hot_percent` at once, or more than 100 percent),
/// `OMLX_E_UNSUPPORTED` (limits on files without a `cache_dir`).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_set_limits(
    pool: *mut omlx_pool,
    limits: *const omlx_cache_limits,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        if limits.is_null() {
            return Err(Error::invalid_argument("limits is NULL"));
        }
        // SAFETY: valid, by the header's contract.
        let limits = unsafe { super::options(limits, "limits") }?;
        let nonzero = |n: u64| (n > 0).then_some(n);
        pool.pool.set_cache_limits(TierLimits {
            hot: nonzero(limits.hot_bytes),
            hot_percent: (limits.hot_percent > 0).then_some(limits.hot_percent),
            cold: nonzero(limits.cold_bytes),
            cold_per_model: nonzero(limits.cold_bytes_per_model),
        })
    })
}

/// The limits that hold, in bytes: `hot_percent` is 0, `cold_bytes` without a `cache_dir` too, and `cold_bytes_per_model` is
/// `UINT64_MAX` where there is none. `limits` starts from `OMLX_CACHE_LIMITS_INIT`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_cache_get_limits(
    pool: *mut omlx_pool,
    limits: *mut omlx_cache_limits,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let limits = output(limits, "limits")?;
        // SAFETY: NULL or valid, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        let now = pool.pool.cache_limits();
        let now = omlx_cache_limits {
            hot_bytes: now.hot.unwrap_or(0),
            cold_bytes: now.cold.unwrap_or(0),
            cold_bytes_per_model: now.cold_per_model.unwrap_or(u64::MAX),
            ..omlx_cache_limits::default()
        };
        // SAFETY: not NULL, and the struct begins with its size.
        unsafe { super::write_sized(limits, now, "limits") }
    })
}

/// Keeps what is cached of the beginning of a request's prompt until it is unpinned: neither other requests nor
/// `omlx_cache_clear` take its place. With a `cache_dir` it is kept there too, and comes back with the model; without one
/// it goes with it. `tokens`, which may be NULL, receives for how many tokens, 0 if nothing of it can be kept; run the
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
