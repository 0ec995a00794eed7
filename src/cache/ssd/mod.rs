//! The cold tier: rows of keys and values on disk, that survive restarts. Pure: nothing of MLX.
//!
//! One folder for all models and one process at a time. Each span of tokens is a file (a *segment*, `FORMAT.md`), written
//! to a temporary name, made durable, renamed, and then noted in an index; whatever the index has lost is read again from
//! the files' headers. Nothing is believed that was read: checksums, model, layout and tokens must agree, otherwise the
//! segment is removed and the rows are computed again. A cache may lose, it may never lie.

mod background;
mod catalog;
mod codec;
mod folder;
mod index;
mod model;
mod pins;
mod rate;
mod recover;
pub mod segment;
mod storage;
mod tier;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

pub use background::{ColdReader, ColdWriter, DEFAULT_WRITE_BYTES, ReadDone};
pub use folder::Folder;
pub use model::{ColdModel, ColdPiece, ModelId, Stored};
pub use segment::{head_bytes, row_buffer};
pub use storage::{Access, FolderLock, Listed, Storage, StorageFile};
pub use tier::ColdTier;

use crate::cache::prefix::BlockKey;

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum Codec {
    /// As they are, bit for bit.
    #[default]
    Exact = 0,
    /// As signed bytes with a scale for each token and head: half the bytes of 16-bit rows, with an error of at most 1/254
    /// of the largest number of the token's head, besides the rounding of the rows' own format.
    Bits8 = 1,
}

impl Codec {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Exact => "exact",
            Codec::Bits8 => "bits8",
        }
    }

    /// The codec of a name.
    pub fn parse(name: &str) -> Option<Self> {
        [Codec::Exact, Codec::Bits8].into_iter().find(|codec| codec.name() == name)
    }
}

/// What the cold tier may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColdOptions {
    /// Bytes of the folder, as `du` counts them: segments, index, folders, and room for the index to grow.
    pub limit: u64,
    /// Bytes of the segments of any one model name.
    pub model_quota: Option<u64>,
    /// Nothing is written that would leave fewer bytes of the disk free.
    pub min_free: u64,
    /// How new segments are written. Segments in another codec are not found until it is chosen again.
    pub codec: Codec,
}

impl ColdOptions {
    /// All that `limit` bytes allow, in exact form, while the disk has 1 GiB left.
    pub fn new(limit: u64) -> Self {
        Self { limit, model_quota: None, min_free: 1 << 30, codec: Codec::Exact }
    }
}

/// Counters of the tier since it was opened.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ColdStats {
    /// Bytes of the index file.
    pub index_bytes: u64,
    /// The limit on the whole folder.
    pub limit: u64,
    /// Of all models together.
    pub sums: ColdModelStats,
    /// By model name.
    pub models: BTreeMap<String, ColdModelStats>,
}

/// Counters of a model name since the tier was opened; entries and bytes are what there is now.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ColdModelStats {
    /// Segments.
    pub entries: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Useful tokens of the spans that were read.
    pub hit_tokens: u64,
    /// Bytes of the files that were read.
    pub read_bytes: u64,
    /// Time in which at least one read was under way, in seconds: what divides `read_bytes` to the rate of restoring.
    pub read_seconds: f64,
    /// Tokens that were computed: what divides `written_bytes` to the price of caching.
    pub new_tokens: u64,
    /// Tokens of the spans that were written.
    pub written_tokens: u64,
    /// Bytes of the files that were written.
    pub written_bytes: u64,
    /// Segments that had to go for others, or for a smaller limit.
    pub evicted: u64,
    /// Bytes of their files.
    pub evicted_bytes: u64,
    /// Spans that were not written since there was no room for them.
    pub refused: u64,
    /// Files that were not what they should be, and were removed.
    pub damaged: u64,
}

impl ColdModelStats {
    /// Bytes that were written for each token that was computed, if any was.
    pub fn written_bytes_per_new_token(&self) -> Option<f64> {
        (self.new_tokens > 0).then(|| self.written_bytes as f64 / self.new_tokens as f64)
    }

    /// Adds the counters of another model.
    fn add(&mut self, other: &Self) {
        self.entries += other.entries;
        self.bytes += other.bytes;
        self.hit_tokens += other.hit_tokens;
        self.read_bytes += other.read_bytes;
        self.read_seconds += other.read_seconds;
        self.new_tokens += other.new_tokens;
        self.written_tokens += other.written_tokens;
        self.written_bytes += other.written_bytes;
        self.evicted += other.evicted;
        self.evicted_bytes += other.evicted_bytes;
        self.refused += other.refused;
        self.damaged += other.damaged;
    }
}

/// What the index knows of a segment.
#[derive(Debug, Clone)]
struct Record {
    segment: segment::Segment,
    /// The key of all tokens up to its end.
    end: BlockKey,
    /// Bytes of the file.
    bytes: u64,
    /// Milliseconds since 1970.
    last_use: u64,
}

type SharedStorage = Arc<dyn Storage>;
