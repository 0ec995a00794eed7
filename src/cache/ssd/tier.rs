//! The tier itself: opening, the ledger of bytes on disk, eviction, and the index that follows.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use super::catalog::{Catalog, Entry, Pending, charge};
use super::index::{Changes, Index, IndexSpace, record_bytes};
use super::model::{ColdModel, ModelId};
use super::pins::Pin;
use super::recover;
use super::segment::clip;
use super::storage::FolderLock;
use super::{Codec, ColdModelStats, ColdOptions, ColdStats, SharedStorage};
use crate::cache::spans::SpanId;
use crate::error::{Error, Result, Status};
use crate::sync::lock;

/// Bytes of the limit kept for 256 folders, the lock and the tag for backups.
pub(super) const FOLDERS: u64 = (256 + 32) * 4096;
/// Bytes of the limit kept for an index without records; redb begins with much less and then doubles.
const EMPTY_INDEX: u64 = 256 * 1024;
/// New and removed segments that the index learns of at once: each time costs the disk about as much as a small segment.
const COMMIT_AT: usize = 32;
/// Milliseconds in which a segment counts as used lately.
const LATELY: u64 = 60_000;

/// Rows of keys and values on disk: one folder, all models, any thread.
#[derive(Debug)]
pub struct ColdTier {
    pub(super) storage: SharedStorage,
    pub(super) options: Mutex<ColdOptions>,
    /// Never held while a file is read or written.
    pub(super) catalog: Mutex<Catalog>,
    /// Held while the index is written, before the catalog's lock.
    pub(super) index: Mutex<Index>,
    pub(super) index_space: Arc<IndexSpace>,
    /// Kinds of errors that were logged.
    pub(super) logged: Mutex<HashSet<(&'static str, io::ErrorKind)>>,
    _lock: LockHolder,
}

/// Keeps other processes out.
struct LockHolder(#[allow(dead_code, reason = "held, not read")] FolderLock);

impl std::fmt::Debug for LockHolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LockHolder")
    }
}

/// Whether there is room for a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// There is, and it is charged.
    Charged,
    /// Nothing more can be evicted for it.
    None,
}

impl ColdTier {
    /// Opens the tier in `storage`: reads the index, compares it with the files, and evicts what is beyond the limit.
    ///
    /// Fails with [`Status::Busy`] while another holder uses the folder, and with [`Status::Io`] if it cannot be read.
    pub fn open(storage: SharedStorage, options: ColdOptions) -> Result<Arc<Self>> {
        let place = storage.place();
        let failed = |error: io::Error| Error::io(format_args!("cold tier {place}"), &error);
        let Some(holder) = storage.lock().map_err(failed)? else {
            return Err(Error::new(Status::Busy, format!("cold tier {place}: another process uses this folder")));
        };
        let index_space = Arc::new(IndexSpace::default());
        // The file must be allowed to be repaired before it is known what else there is.
        index_space.allowed.store(u64::MAX, Ordering::SeqCst);
        let ((index, contents), files) = std::thread::scope(|scope| {
            // With many segments both take a while.
            let files = scope.spawn(|| recover::files(&*storage));
            let index = Index::open(Arc::clone(&storage), Arc::clone(&index_space));
            (index, files.join().unwrap_or_else(|_| Err(io::Error::other("listing it panicked"))))
        });
        let mut catalog = Catalog::default();
        let complete = contents.is_some() && index.works();
        recover::fill(&*storage, &mut catalog, files.map_err(failed)?, contents.unwrap_or_default());
        let tier = Arc::new(Self {
            storage,
            options: Mutex::new(options),
            catalog: Mutex::new(catalog),
            index: Mutex::new(index),
            index_space,
            logged: Mutex::default(),
            _lock: LockHolder(holder),
        });
        tier.shrink();
        let outcome = if complete { tier.sync() } else { tier.rewrite_index() };
        if let Err(error) = outcome {
            tracing::warn!("{error}");
        }
        Ok(tier)
    }

    /// The tier as a model sees it.
    pub fn model(self: &Arc<Self>, id: ModelId) -> Result<ColdModel> {
        ColdModel::new(Arc::clone(self), id)
    }

    /// What it holds and what it did.
    pub fn stats(&self) -> ColdStats {
        let catalog = self.catalog();
        let (models, read_seconds) = (catalog.stats(), catalog.read_seconds());
        drop(catalog);
        let mut sums = ColdModelStats::default();
        models.values().for_each(|model| sums.add(model));
        // Models read at the same time.
        sums.read_seconds = read_seconds;
        let index_bytes = self.index_space.total();
        ColdStats { index_bytes, limit: lock(&self.options).limit, sums, models }
    }

    /// Bytes per second that reads would get now, by what was read lately; `assumed` before anything was.
    pub fn read_rate(&self, assumed: f64) -> f64 {
        self.catalog().read_rate(assumed)
    }

    /// Removes all segments, or those of one model name, that no pinned prefix needs. Returns how many bytes of files went.
    pub fn clear(&self, model: Option<&str>) -> u64 {
        let mut freed = 0;
        loop {
            let mut catalog = self.catalog();
            let scope = match model.map(|name| catalog.known_model(clip(name))) {
                Some(None) => break,
                scope => scope.flatten(),
            };
            let Some(entry) = catalog.victim(scope).and_then(|id| catalog.take(id)) else { break };
            drop(catalog);
            freed += entry.bytes;
            self.remove_file(&entry);
        }
        self.commit_or_warn();
        freed
    }

    /// The same for a model name that no model has any more: its pins go too, since nobody could end them.
    pub fn forget(&self, model: &str) -> u64 {
        let mut catalog = self.catalog();
        let known = catalog.known_model(clip(model));
        known.into_iter().for_each(|at| catalog.unpin_all(at));
        drop(catalog);
        self.clear(Some(model))
    }

    /// Whether there are, or were, segments of a model name.
    pub fn knows(&self, model: &str) -> bool {
        self.catalog().known_model(clip(model)).is_some()
    }

    /// Sets other limits, and evicts at once what is beyond them.
    pub fn set_limits(&self, options: ColdOptions) {
        *lock(&self.options) = options;
        self.shrink();
        self.commit_or_warn();
    }

    /// The options in force.
    pub fn options(&self) -> ColdOptions {
        lock(&self.options).clone()
    }

    /// Bytes of the disk that are free, and of the whole disk.
    pub fn disk_bytes(&self) -> Result<(u64, u64)> {
        let both = self.storage.free_bytes().and_then(|free| Ok((free, self.storage.total_bytes()?)));
        both.map_err(|error| self.error("its disk", &error))
    }

    /// Makes the index durable: last uses too, which it otherwise learns with the next segment.
    pub fn sync(&self) -> Result<()> {
        self.retry_stuck();
        self.commit()
    }

    /// The hash that was remembered under a key.
    pub fn remembered_hash(&self, key: &[u8]) -> Option<[u8; 32]> {
        self.catalog().hashes.get(key).copied()
    }

    /// Remembers a hash; a failure only costs computing it again after a restart.
    pub fn remember_hash(&self, key: &[u8], hash: [u8; 32]) {
        let mut catalog = self.catalog();
        catalog.hashes.insert(key.to_vec(), hash);
        catalog.pending.hashes.push(key.to_vec());
        drop(catalog);
        self.commit_or_warn();
    }

    pub(super) fn catalog(&self) -> MutexGuard<'_, Catalog> {
        lock(&self.catalog)
    }

    pub(super) fn codec(&self) -> Codec {
        lock(&self.options).codec
    }

    pub(super) fn error(&self, what: &str, error: &io::Error) -> Error {
        Error::io(format_args!("cold tier {}: {what}", self.storage.place()), error)
    }

    /// Logs an error of the disk, each kind once.
    pub(super) fn log(&self, what: &'static str, error: &io::Error) {
        if lock(&self.logged).insert((what, error.kind())) {
            tracing::warn!("cold tier {}: {what}: {error} (further ones are not logged)", self.storage.place());
        }
    }

    /// Makes room for a file of a model and charges for it, evicting what is worth least. `record` is what the index will
    /// grow by. What is of no use yet, since the tokens before it are not stored, replaces nothing that was used lately.
    pub(super) fn reserve(&self, model: usize, bytes: u64, record: u64, use_now: bool) -> io::Result<Room> {
        self.retry_stuck();
        let charged = charge(bytes);
        let mut evicted = 0;
        loop {
            let ColdOptions { limit, model_quota, min_free, .. } = self.options();
            let free = self.storage.free_bytes()?;
            let mut catalog = self.catalog();
            let limit = self.segment_limit(&catalog, limit, record);
            let over_quota = model_quota.is_some_and(|quota| catalog.charged(Some(model)) + charged > quota);
            let over_limit = catalog.charged(None) + charged > limit;
            let short = (min_free + charged + catalog.in_flight).saturating_sub(free);
            if !over_quota && !over_limit && short == 0 {
                catalog.charge(model, charged);
                catalog.in_flight += charged;
                self.allow_index(&catalog);
                return Ok(Room::Charged);
            }
            // What does not fit into an empty tier evicts nothing. A disk that others fill, or that gives freed bytes back
            // late, does not empty the tier: for its sake no more goes than comes.
            let for_disk = !over_quota && !over_limit;
            let hopeless = charged > limit || model_quota.is_some_and(|quota| charged > quota);
            if hopeless || (for_disk && (short > charged || evicted >= charged)) {
                return Ok(Room::None);
            }
            let scope = over_quota.then_some(model);
            let victim = catalog.victim(scope);
            let lately = |entry: &Entry| entry.last_use.saturating_add(LATELY) > now();
            if !use_now && victim.and_then(|id| catalog.get(id)).is_some_and(lately) {
                return Ok(Room::None);
            }
            let Some(entry) = victim.and_then(|id| self.evict(&mut catalog, id)) else {
                return Ok(Room::None);
            };
            drop(catalog);
            evicted += entry.bytes;
            self.remove_file(&entry);
        }
    }

    /// Bytes that segments may be charged with, once the index has `record` more bytes in it.
    fn segment_limit(&self, catalog: &Catalog, limit: u64, record: u64) -> u64 {
        let old = self.index_space.old.load(Ordering::SeqCst);
        // The file doubles when it is full.
        let index = (2 * self.index_space.length.load(Ordering::SeqCst)).max(index_bytes(catalog, record));
        limit.saturating_sub(FOLDERS + old + index)
    }

    /// Tells the index file how long it may become.
    fn allow_index(&self, catalog: &Catalog) {
        let allowed = lock(&self.options).limit.saturating_sub(FOLDERS + catalog.charged(None));
        self.index_space.allowed.store(allowed, Ordering::SeqCst);
    }

    /// Evicts until all limits are kept.
    fn shrink(&self) {
        loop {
            let ColdOptions { limit, model_quota, .. } = self.options();
            let mut catalog = self.catalog();
            self.allow_index(&catalog);
            let limit = self.segment_limit(&catalog, limit, 0);
            let over = |&at: &usize| model_quota.is_some_and(|quota| catalog.charged(Some(at)) > quota);
            let victim = match (0..catalog.model_count()).find(over) {
                Some(at) => catalog.victim(Some(at)),
                None if catalog.charged(None) > limit => catalog.victim(None),
                None => return,
            };
            let Some(entry) = victim.and_then(|id| self.evict(&mut catalog, id)) else { return };
            drop(catalog);
            self.remove_file(&entry);
        }
    }

    fn evict(&self, catalog: &mut Catalog, id: SpanId) -> Option<Entry> {
        let entry = catalog.take(id)?;
        let stats = catalog.stats_of(&entry);
        stats.evicted += 1;
        stats.evicted_bytes += entry.bytes;
        Some(entry)
    }

    /// Removes the file of a segment that was taken out of the catalog.
    pub(super) fn remove_file(&self, entry: &Entry) {
        let removed = self.removed(&entry.name.file());
        self.catalog().gone(entry, removed);
    }

    /// Removes a file; `false` if it is still there.
    pub(super) fn removed(&self, file: &str) -> bool {
        match self.storage.remove(file) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => {
                self.log("a file cannot be removed", &error);
                false
            }
        }
    }

    /// Tries again to remove what could not be removed.
    fn retry_stuck(&self) {
        let stuck = std::mem::take(&mut self.catalog().stuck);
        for file in stuck {
            let removed = self.removed(&file.file);
            let mut catalog = self.catalog();
            if removed { catalog.unstuck(&file) } else { catalog.stick(file) }
        }
    }

    /// Brings the index up to date. If it has failed before, it is written again from memory.
    pub(super) fn commit(&self) -> Result<()> {
        let mut index = lock(&self.index);
        let outcome = if index.works() {
            let changes = self.take_pending();
            if changes.is_empty() {
                return Ok(());
            }
            let outcome = index.commit(&changes);
            // After much was removed, the file is mostly empty.
            let long = self.index_space.length.load(Ordering::SeqCst) > 4 * index_bytes(&self.catalog(), 0);
            if outcome.is_ok() && long { index.rewrite(self.take_all()) } else { outcome }
        } else {
            let all = self.take_all();
            index.rewrite(all)
        };
        outcome.map_err(|error| self.index_error(&error))
    }

    fn rewrite_index(&self) -> Result<()> {
        let mut index = lock(&self.index);
        let all = self.take_all();
        index.rewrite(all).map_err(|error| self.index_error(&error))
    }

    fn index_error(&self, error: &super::index::IndexError) -> Error {
        Error::new(Status::Io, format!("cold tier {}: the index cannot be written: {error}", self.storage.place()))
    }

    /// The same where nobody waits for the outcome: the segments are safe without the index.
    pub(super) fn commit_or_warn(&self) {
        if let Err(error) = self.commit() {
            self.log("the index cannot be written", &io::Error::other(error));
        }
    }

    /// The same when enough has come together: until then, a restart reads it from the headers of the files.
    pub(super) fn commit_some(&self) {
        let enough = |Pending { put, drop, .. }: &Pending| put.len() + drop.len() >= COMMIT_AT;
        let enough = enough(&self.catalog().pending);
        if enough {
            self.commit_or_warn();
        }
    }

    fn take_pending(&self) -> Changes {
        let mut catalog = self.catalog();
        let pending = std::mem::take(&mut catalog.pending);
        let entries = |ids: HashSet<SpanId>| ids.into_iter().filter_map(|id| catalog.get(id)).collect::<Vec<_>>();
        let put = entries(pending.put);
        Changes {
            drop: pending.drop.into_iter().collect(),
            put: put.into_iter().map(record_of).collect(),
            uses: entries(pending.uses).into_iter().map(|entry| (entry.name, entry.last_use)).collect(),
            pins: pending.pins.then(|| catalog.pins().to_vec()),
            hashes: remembered(&catalog, pending.hashes),
        }
    }

    fn take_all(&self) -> Changes {
        let mut catalog = self.catalog();
        catalog.pending = Default::default();
        let hashes = catalog.hashes.keys().cloned().collect();
        Changes {
            put: catalog.entries().map(record_of).collect(),
            pins: Some(catalog.pins().to_vec()),
            hashes: remembered(&catalog, hashes),
            ..Changes::default()
        }
    }

    pub(super) fn pin(&self, pin: Pin) -> Result<()> {
        if self.catalog().pin(pin) { self.commit() } else { Ok(()) }
    }

    pub(super) fn unpin(&self, pin: &Pin) -> Result<()> {
        if self.catalog().unpin(pin) { self.commit() } else { Ok(()) }
    }
}

impl Drop for ColdTier {
    fn drop(&mut self) {
        self.commit_or_warn();
    }
}

/// Bytes that an index of all segments, and of `record` bytes more, may take when it is new.
fn index_bytes(catalog: &Catalog, record: u64) -> u64 {
    3 * (catalog.record_bytes() + record) + EMPTY_INDEX
}

fn record_of(entry: &Entry) -> (super::segment::SegmentName, Vec<u8>, u64) {
    (entry.name, record_bytes(&entry.segment, &entry.end, entry.bytes), entry.last_use)
}

fn remembered(catalog: &Catalog, keys: Vec<Vec<u8>>) -> Vec<(Vec<u8>, [u8; 32])> {
    keys.into_iter().filter_map(|key| catalog.hashes.get(&key).map(|&hash| (key.clone(), hash))).collect()
}

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
