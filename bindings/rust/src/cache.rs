//! The cache of a pool and its tiers.

use std::time::Duration;

use crate::error::{Result, check};
use crate::ffi;
use crate::pool::Pool;
use crate::text::OptionalText;

/// Places where keys and values are kept; [`Tiers::ALL`] is all of them, and `|` adds them up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiers(u32);

impl Tiers {
    /// All of them.
    pub const ALL: Self = Self(0);
    /// The pools that models compute with.
    pub const POOLS: Self = Self(ffi::OMLX_CACHE_TIER_POOLS);
    /// The host's memory, where pools lie in another one.
    pub const HOT: Self = Self(ffi::OMLX_CACHE_TIER_HOT);
    /// Files.
    pub const COLD: Self = Self(ffi::OMLX_CACHE_TIER_COLD);
}

impl std::ops::BitOr for Tiers {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        if self == Self::ALL || other == Self::ALL { Self::ALL } else { Self(self.0 | other.0) }
    }
}

/// Limits that can change while a pool is open; 0 leaves one as it is, or says that there is none of the kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the header describes the fields by these names")]
pub struct CacheLimits {
    pub hot_percent: u32,
    pub hot_bytes: u64,
    pub cold_bytes: u64,
    pub cold_bytes_per_model: u64,
}

impl Pool {
    /// State of a loaded model's cache, a JSON object.
    pub fn cache_stats(&self, model: Option<&str>) -> Result<String> {
        let model = OptionalText::new("model", model)?;
        // SAFETY: the pool and the name live for the call.
        self.text(|pool, text, error| unsafe { ffi::omlx_cache_stats(pool, model.pointer(), text, error) })
    }

    /// Where the tokens of a request's prompt are cached, a JSON object. Blocking.
    pub fn cache_find(&self, json: &str) -> Result<String> {
        let (data, len) = (json.as_ptr().cast(), json.len());
        // SAFETY: the pool and the JSON live for the call.
        self.text(|pool, text, error| unsafe { ffi::omlx_cache_find(pool, data, len, text, error) })
    }

    /// Brings what other tiers have of a request's prompt into the pools; returns its tokens there. Blocking.
    pub fn cache_prefetch(&self, json: &str) -> Result<u64> {
        let (data, len, mut tokens) = (json.as_ptr().cast(), json.len(), 0);
        // SAFETY: the pool, the JSON and the output live for the call.
        check(|error| unsafe { ffi::omlx_cache_prefetch(self.pointer(), data, len, &mut tokens, error) })?;
        Ok(tokens)
    }

    /// Writes what has been computed and no file has yet. Blocking.
    pub fn cache_flush(&self, model: Option<&str>, timeout: Duration) -> Result<()> {
        let model = OptionalText::new("model", model)?;
        let milliseconds = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        // SAFETY: the pool and the name live for the call.
        check(|error| unsafe { ffi::omlx_cache_flush(self.pointer(), model.pointer(), milliseconds, error) })
    }

    /// Forgets what is cached of a model, or of all, in some tiers; returns the bytes. Blocking.
    pub fn cache_clear(&self, model: Option<&str>, tiers: Tiers) -> Result<u64> {
        let (model, mut bytes) = (OptionalText::new("model", model)?, 0);
        // SAFETY: the pool, the name and the output live for the call.
        check(|error| unsafe { ffi::omlx_cache_clear(self.pointer(), model.pointer(), tiers.0, &mut bytes, error) })?;
        Ok(bytes)
    }

    /// Changes limits; what is beyond them goes. Blocking.
    pub fn set_cache_limits(&self, limits: CacheLimits) -> Result<()> {
        let limits = ffi::omlx_cache_limits {
            struct_size: size_of::<ffi::omlx_cache_limits>() as u32,
            hot_percent: limits.hot_percent,
            hot_bytes: limits.hot_bytes,
            cold_bytes: limits.cold_bytes,
            cold_bytes_per_model: limits.cold_bytes_per_model,
        };
        // SAFETY: the pool and the limits live for the call.
        check(|error| unsafe { ffi::omlx_cache_set_limits(self.pointer(), &limits, error) })
    }

    /// The limits that hold, in bytes.
    pub fn cache_limits(&self) -> Result<CacheLimits> {
        let mut limits = ffi::omlx_cache_limits {
            struct_size: size_of::<ffi::omlx_cache_limits>() as u32,
            hot_percent: 0,
            hot_bytes: 0,
            cold_bytes: 0,
            cold_bytes_per_model: 0,
        };
        // SAFETY: the pool and the limits live for the call.
        check(|error| unsafe { ffi::omlx_cache_get_limits(self.pointer(), &mut limits, error) })?;
        let ffi::omlx_cache_limits { hot_percent, hot_bytes, cold_bytes, cold_bytes_per_model, .. } = limits;
        Ok(CacheLimits { hot_percent, hot_bytes, cold_bytes, cold_bytes_per_model })
    }

    /// Keeps what is cached of the beginning of a request's prompt; returns its tokens. Blocking.
    pub fn cache_pin(&self, json: &str) -> Result<u64> {
        let (data, len, mut tokens) = (json.as_ptr().cast(), json.len(), 0);
        // SAFETY: the pool, the JSON and the output live for the call.
        check(|error| unsafe { ffi::omlx_cache_pin(self.pointer(), data, len, &mut tokens, error) })?;
        Ok(tokens)
    }

    /// Ends the pin of a request's prompt. Blocking.
    pub fn cache_unpin(&self, json: &str) -> Result<()> {
        let (data, len) = (json.as_ptr().cast(), json.len());
        // SAFETY: the pool and the JSON live for the call.
        check(|error| unsafe { ffi::omlx_cache_unpin(self.pointer(), data, len, error) })
    }
}
