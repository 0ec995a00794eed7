//! Opens the tiers of a pool.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::cache::hot::HotTier;
use crate::cache::ssd::{Codec, ColdOptions, ColdTier, Folder};
use crate::engine::{Cold, EngineMetrics, Tiers};
use crate::error::{Error, Result};
use crate::mlx::{self, Device};

/// Files take at most this part of what the disk has free, theirs included.
const SHARE_OF_DISK: u64 = 10;

/// And this much.
const MOST_OF_DISK: u64 = 64 << 30;

/// Nothing is written that leaves less of the disk free.
const LEAST_FREE: u64 = 2 << 30;

/// Rows that wait to be written take this much memory at most.
const WRITE_BYTES: u64 = 256 << 20;

/// And this part of the limit of memory, where that counts them.
const SHARE_OF_LIMIT: u64 = 64;

/// Threads that read files.
const READERS: usize = 4;

/// What is cached outside the pools; `Default` is nothing.
#[derive(Debug, Clone, Default)]
pub struct TierOptions {
    /// Where files are kept; `None` keeps none.
    pub folder: Option<PathBuf>,
    /// Bytes that the files may take; `None` is a tenth of what is free when the pool opens, 64 GiB at most.
    pub cold_bytes: Option<u64>,
    /// Bytes that the files of one model may take.
    pub cold_bytes_per_model: Option<u64>,
    /// How rows are stored in files.
    pub codec: Codec,
    /// Rows go to the files as soon as they are computed.
    pub write_through: bool,
    /// Keeps users of one folder apart.
    pub namespace: Vec<u8>,
    /// Rows come from the tiers even where it were faster to compute them: for tests and measurements.
    pub always_restore: bool,
    /// Bytes that rows may take in the host's memory besides the pools; `None` is an eighth of it where pools lie in
    /// another memory, and nothing elsewhere: what nobody uses stays in the pools there.
    pub hot_bytes: Option<u64>,
}

/// Some of the places where rows are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TierSet {
    /// The pools of loaded models.
    pub pools: bool,
    /// The host's memory.
    pub hot: bool,
    /// Files.
    pub cold: bool,
}

impl TierSet {
    /// Every place.
    pub const ALL: Self = Self { pools: true, hot: true, cold: true };
}

/// New limits in bytes; `None` leaves one as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct TierLimits {
    /// Of rows in the host's memory.
    pub hot: Option<u64>,
    /// Of all files.
    pub cold: Option<u64>,
    /// Of the files of one model.
    pub cold_per_model: Option<u64>,
}

impl TierLimits {
    /// Sets them; what is beyond them goes.
    pub(super) fn apply(self, tiers: &Tiers) -> Result<()> {
        if let Some(bytes) = self.hot {
            tiers.write_evicted(tiers.hot.set_limit(bytes));
        }
        match &tiers.cold {
            Some(cold) => {
                let mut options = cold.tier.options();
                options.limit = self.cold.unwrap_or(options.limit);
                options.model_quota = self.cold_per_model.or(options.model_quota);
                cold.tier.set_limits(options);
                Ok(())
            }
            None if self.cold.or(self.cold_per_model).is_some() => {
                Err(Error::unsupported("the pool was opened without a folder for its cache"))
            }
            None => Ok(()),
        }
    }
}

/// Bytes of the host's memory that rows may take in the hot tier and on their way to files.
pub(super) fn host_bytes(tiers: &Tiers) -> u64 {
    let writing = tiers.cold.as_ref().map_or(0, Cold::write_bytes);
    tiers.hot.limit() + writing as u64
}

/// What a model's cache is like, as a JSON object: the engine's metrics, and its part of each tier.
pub(super) fn stats(tiers: &Tiers, model: &str, metrics: &EngineMetrics) -> Result<String> {
    let json = |value: serde_json::Result<Value>| value.map_err(|e| Error::internal(format!("statistics: {e}")));
    let mut stats = json(serde_json::to_value(metrics))?;
    let hot = tiers.hot.stats();
    stats["hot"] = json(serde_json::to_value(hot.models.get(model)))?;
    if let Some(cold) = &tiers.cold {
        let cold = cold.tier.stats();
        stats["cold"] = json(serde_json::to_value(cold.models.get(model)))?;
        stats["cold_total"] = json(serde_json::to_value(&cold.sums))?;
        stats["cold_limit"] = cold.limit.into();
    }
    Ok(stats.to_string())
}

impl TierOptions {
    /// Opens them for models that may take `limit` bytes. `Busy` if another process uses the folder.
    pub(super) fn open(&self, device: Device, limit: u64) -> Result<Tiers> {
        let apart = device.has_own_memory();
        let write_bytes = if apart { WRITE_BYTES } else { WRITE_BYTES.min(limit / SHARE_OF_LIMIT) };
        let hot = self.hot_bytes.unwrap_or(if apart { mlx::physical_memory() as u64 / 8 } else { 0 });
        let cold = match &self.folder {
            Some(folder) => {
                let storage = Folder::new(folder).map_err(|e| Error::io(folder.display(), &e))?;
                let limit = self.cold_bytes.unwrap_or(u64::MAX);
                let (model_quota, codec) = (self.cold_bytes_per_model, self.codec);
                let mut options = ColdOptions { limit, model_quota, min_free: LEAST_FREE, codec };
                let tier = ColdTier::open(Arc::new(storage), options.clone())?;
                if self.cold_bytes.is_none() {
                    let (free, _) = tier.disk_bytes()?;
                    options.limit = ((free + tier.stats().sums.bytes) / SHARE_OF_DISK).min(MOST_OF_DISK);
                    tier.set_limits(options);
                }
                Some(Cold::new(tier, write_bytes as usize, READERS)?)
            }
            None => None,
        };
        Ok(Tiers {
            hot: Arc::new(HotTier::new(hot)),
            cold,
            write_through: self.write_through,
            always_restore: self.always_restore,
            namespace: self.namespace.clone(),
        })
    }
}
