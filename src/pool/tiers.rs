//! Opens the tiers of a pool.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::metrics::{self, Numbers};
use crate::cache::hot::HotTier;
use crate::cache::ssd::{Codec, ColdModelStats, ColdOptions, ColdTier, Folder};
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
    /// The same as a part of the host's memory, or of its container's, in percent. Not together with `hot_bytes`.
    pub hot_percent: Option<u32>,
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
    /// The same as a part of that memory, in percent.
    pub hot_percent: Option<u32>,
    /// Of all files.
    pub cold: Option<u64>,
    /// Of the files of one model; `u64::MAX` is none.
    pub cold_per_model: Option<u64>,
}

/// Bytes of the hot tier, if they are settled, of `memory` bytes.
fn hot_limit(bytes: Option<u64>, percent: Option<u32>, memory: u64) -> Result<Option<u64>> {
    match (bytes, percent) {
        (Some(_), Some(_)) => Err(Error::invalid_argument("bytes and percent of the hot tier at once")),
        (None, Some(percent @ 1..=100)) => Ok(Some(memory / 100 * u64::from(percent))),
        (None, Some(percent)) => Err(Error::invalid_argument(format!("{percent} percent of the memory"))),
        (bytes, None) => Ok(bytes),
    }
}

impl TierLimits {
    /// Those that hold; `cold_per_model` is `None` where there is none.
    pub(super) fn of(tiers: &Tiers) -> Self {
        let cold = tiers.cold.as_ref().map(|cold| cold.tier.options());
        Self {
            hot: Some(tiers.hot.limit()),
            hot_percent: None,
            cold: cold.as_ref().map(|options| options.limit),
            cold_per_model: cold.and_then(|options| options.model_quota),
        }
    }

    /// Sets them, where the host has `memory` bytes; what is beyond them goes.
    pub(super) fn apply(self, tiers: &Tiers, memory: u64) -> Result<()> {
        if let Some(bytes) = hot_limit(self.hot, self.hot_percent, memory)? {
            tiers.write_evicted(tiers.hot.set_limit(bytes));
        }
        match &tiers.cold {
            Some(cold) => {
                let mut options = cold.tier.options();
                options.limit = self.cold.unwrap_or(options.limit);
                options.model_quota = self.cold_per_model.or(options.model_quota).filter(|&quota| quota < u64::MAX);
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

/// What a model's cache is like, as a JSON object: the engine's metrics if it is loaded, and its part of each tier.
pub(super) fn stats(tiers: &Tiers, model: &str, metrics: Option<&EngineMetrics>) -> Result<String> {
    let json = |value: serde_json::Result<Value>| value.map_err(|e| Error::internal(format!("statistics: {e}")));
    let mut stats = match metrics {
        Some(metrics) => json(serde_json::to_value(metrics))?,
        None => Value::Object(Map::new()),
    };
    let hot = tiers.hot.stats();
    stats["hot"] = json(serde_json::to_value(hot.models.get(model)))?;
    if let Some(cold) = &tiers.cold {
        let cold = cold.tier.stats();
        stats["cold"] = cold.models.get(model).map_or(Value::Null, |own| Value::Object(cold_numbers("", own)));
        stats["cold_total"] = Value::Object(cold_numbers("", &cold.sums));
        stats["cold_limit"] = cold.limit.into();
    }
    Ok(stats.to_string())
}

/// The numbers of the cold tier, with `prefix` before their names.
pub(super) fn cold_numbers(prefix: &str, stats: &ColdModelStats) -> Numbers {
    let mut numbers = Numbers::new();
    metrics::add(&mut numbers, prefix, stats);
    if let Some(bytes) = stats.written_bytes_per_new_token() {
        numbers.insert(format!("{prefix}written_bytes_per_new_token"), bytes.into());
    }
    numbers
}

impl TierOptions {
    /// Opens them for models that may take `limit` bytes, where the host has `memory`. `Busy` if another process uses the
    /// folder.
    pub(super) fn open(&self, device: Device, memory: u64, limit: u64) -> Result<Tiers> {
        let apart = device.has_own_memory();
        let write_bytes = if apart { WRITE_BYTES } else { WRITE_BYTES.min(limit / SHARE_OF_LIMIT) };
        let hot = hot_limit(self.hot_bytes, self.hot_percent, memory)?;
        let hot = hot.unwrap_or(if apart { mlx::physical_memory() as u64 / 8 } else { 0 });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn the_hot_tier_has_bytes_or_a_part_of_the_memory() {
        assert_eq!(hot_limit(None, None, 1000).unwrap(), None);
        assert_eq!(hot_limit(Some(7), None, 1000).unwrap(), Some(7));
        assert_eq!(hot_limit(None, Some(20), 1000).unwrap(), Some(200));
        for (bytes, percent) in [(None, Some(0)), (None, Some(101)), (Some(7), Some(20))] {
            assert_eq!(hot_limit(bytes, percent, 1000).unwrap_err().status(), Status::InvalidArgument);
        }
    }
}
