//! What the cold tier holds, in memory: spans and where they are, the ledger of bytes, and the order of eviction. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::index::record_len;
use super::pins::{Pin, Pins};
use super::rate::ReadRate;
use super::segment::{Segment, SegmentName};
use super::{Codec, ColdModelStats, Record};
use crate::cache::prefix::{BlockKey, chain_key};
use crate::cache::spans::{Piece, Span, SpanId, SpanIndex};

/// What a second of recomputation per gigabyte is worth in the order of eviction: a minute of age.
const AGE_OF_COST: f64 = 60.0 * 1e3 * 1e9;

/// What a file takes beyond its bytes: its name in the folder, and the lists of blocks that file systems keep.
const FILE_OVERHEAD: u64 = 8 * 1024;

/// Which spans can follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupKey {
    /// What the rows depend on.
    pub fingerprint: [u8; 32],
    /// The cache group.
    pub group: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// How the rows are written: exact reads never see what another codec wrote.
    pub codec: Codec,
}

/// A stored segment.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it is.
    pub segment: Arc<Segment>,
    /// Its name.
    pub name: SegmentName,
    /// Bytes of its file.
    pub bytes: u64,
    /// Bytes of its record in the index.
    pub record: u64,
    /// When it was used last: milliseconds since 1970.
    pub last_use: u64,
    /// The key of all tokens up to its end.
    pub end: BlockKey,
    /// Its place among the models.
    model: usize,
    /// Its place among the groups.
    group: usize,
}

#[derive(Debug)]
struct Group {
    key: GroupKey,
    spans: SpanIndex,
}

/// All segments of a model name.
#[derive(Debug)]
struct Model {
    name: Arc<str>,
    /// Bytes charged: files, also those being written or not yet removed.
    charged: u64,
    /// All spans that may be leaves, the least valuable first. Which ones are is only found out when it matters.
    order: BTreeSet<(u64, SpanId)>,
    stats: ColdModelStats,
    reads: ReadClock,
    /// Tokens that engines have computed; counted by them.
    new_tokens: Arc<AtomicU64>,
}

/// How long at least one read was under way.
#[derive(Debug, Default)]
struct ReadClock {
    active: usize,
    since: Option<Instant>,
    total: Duration,
}

impl ReadClock {
    fn begin(&mut self) {
        self.active += 1;
        self.since.get_or_insert_with(Instant::now);
    }

    fn end(&mut self) {
        self.active -= 1;
        if self.active == 0 {
            self.total += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        }
    }

    fn seconds(&self) -> f64 {
        (self.total + self.since.map_or(Duration::ZERO, |since| since.elapsed())).as_secs_f64()
    }
}

/// Changes that the index on disk does not have yet.
#[derive(Debug, Default)]
pub struct Pending {
    /// New segments.
    pub put: HashSet<SpanId>,
    /// Removed ones.
    pub drop: HashSet<SegmentName>,
    /// Segments with a later use.
    pub uses: HashSet<SpanId>,
    /// Whether a pin came or went.
    pub pins: bool,
    /// New remembered hashes.
    pub hashes: Vec<Vec<u8>>,
}

/// A file that should be gone but could not be removed.
#[derive(Debug)]
pub struct Stuck {
    /// Its segment, whose name stays busy: nothing may be written that is removed later.
    pub name: SegmentName,
    /// Its name in the folder.
    pub file: String,
    /// Bytes charged for it.
    pub charge: u64,
    /// Its model.
    pub model: usize,
}

/// The memory of the tier.
#[derive(Debug, Default)]
pub struct Catalog {
    groups: Vec<Group>,
    group_of: HashMap<GroupKey, usize>,
    models: Vec<Model>,
    model_of: HashMap<Arc<str>, usize>,
    entries: HashMap<SpanId, Entry>,
    by_name: HashMap<SegmentName, SpanId>,
    /// How many spans end with a key.
    ends: HashMap<BlockKey, usize>,
    next: SpanId,
    /// Spans that are out of the order since another one follows the key, or is being written behind it.
    blocked: HashMap<BlockKey, Vec<SpanId>>,
    /// Spans that are out of the order since a pinned prefix needs them.
    protected: Vec<SpanId>,
    /// Keys that spans are being written behind.
    writing: HashMap<BlockKey, usize>,
    /// Names that are being written or removed.
    busy: HashSet<SegmentName>,
    pins: Pins,
    charged: u64,
    record_bytes: u64,
    /// Hashes of weight files by a key of the caller's.
    pub hashes: BTreeMap<Vec<u8>, [u8; 32]>,
    /// What the index has to learn.
    pub pending: Pending,
    /// Files to be removed when the disk lets them.
    pub stuck: Vec<Stuck>,
    /// Bytes of files being written.
    pub in_flight: u64,
    reads: ReadClock,
    rate: ReadRate,
}

/// Bytes that a file of `bytes` is charged with.
pub fn charge(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096) + FILE_OVERHEAD
}

impl Catalog {
    /// The place of a model name.
    pub fn model(&mut self, name: &Arc<str>) -> usize {
        if let Some(&at) = self.model_of.get(name) {
            return at;
        }
        let (order, stats, reads) = (BTreeSet::new(), ColdModelStats::default(), ReadClock::default());
        self.models.push(Model { name: Arc::clone(name), charged: 0, order, stats, reads, new_tokens: Arc::default() });
        self.model_of.insert(Arc::clone(name), self.models.len() - 1);
        self.models.len() - 1
    }

    /// The place of a model name that is known.
    pub fn known_model(&self, name: &str) -> Option<usize> {
        self.model_of.get(name).copied()
    }

    fn group(&mut self, key: GroupKey) -> usize {
        if let Some(&at) = self.group_of.get(&key) {
            return at;
        }
        self.groups.push(Group { key, spans: SpanIndex::new(key.block_tokens) });
        self.group_of.insert(key, self.groups.len() - 1);
        self.groups.len() - 1
    }

    /// What follows the first `from` tokens; see [`SpanIndex::find`].
    pub fn find(&self, key: &GroupKey, root: &BlockKey, tokens: &[u32], from: usize) -> Vec<(Piece, u64)> {
        let Some(&group) = self.group_of.get(key) else { return Vec::new() };
        let pieces = self.groups[group].spans.find(root, tokens, from);
        // Without its entry (which cannot be) the rest would not follow either.
        pieces.into_iter().map_while(|piece| Some((piece, self.entries.get(&piece.span)?.bytes))).collect()
    }

    /// The longest beginning of `tokens`, of more than `from` of them, whose state is there, and the bytes of its file.
    pub fn find_state(&self, key: &GroupKey, root: &BlockKey, tokens: &[u32], from: usize) -> Option<(Piece, u64)> {
        let piece = self.groups[*self.group_of.get(key)?].spans.find_state(root, tokens, from)?;
        Some((piece, self.entries.get(&piece.span)?.bytes))
    }

    /// Whether what is behind the first `at` of `tokens` agrees with the rest; see [`SpanIndex::agrees_behind`].
    pub fn agrees_behind(&self, key: &GroupKey, root: &BlockKey, tokens: &[u32], at: usize) -> Option<bool> {
        self.groups[*self.group_of.get(key)?].spans.agrees_behind(root, tokens, at)
    }

    /// Whether a segment is there, being written, or of no use beside what is there.
    pub fn has(&self, key: &GroupKey, name: &SegmentName, span: &Span) -> bool {
        let held = || self.group_of.get(key).map_or(0, |&group| self.groups[group].spans.held(span));
        self.busy.contains(name) || self.by_name.contains_key(name) || held() == span.tokens.len()
    }

    /// Whether a stored span ends where this one begins: only then it can be found as it is.
    pub fn continues(&self, span: &Span) -> bool {
        span.start == 0 || self.ends.contains_key(&span.parent)
    }

    /// A stored segment.
    pub fn get(&self, id: SpanId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// All stored segments.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        self.entries.values()
    }

    /// Adds a segment whose bytes are charged already. Returns the segments that it makes useless.
    pub fn insert(&mut self, name: SegmentName, record: Record) -> (SpanId, Vec<SpanId>) {
        let (id, group) = self.add(name, record);
        let segment = Arc::clone(&self.entries[&id].segment);
        (id, self.groups[group].spans.insert(id, &segment.span))
    }

    /// Adds all segments of an empty catalog, and charges for them; `true` for those that the index does not know. Returns
    /// those that others make useless.
    pub fn fill(&mut self, records: impl ExactSizeIterator<Item = (SegmentName, Record, bool)>) -> Vec<SpanId> {
        self.entries.reserve(records.len());
        self.by_name.reserve(records.len());
        self.ends.reserve(records.len());
        for (name, record, new) in records {
            let (model, bytes) = (self.model(&record.segment.model), record.bytes);
            self.charge(model, charge(bytes));
            let (id, _) = self.add(name, record);
            if new {
                self.pending.put.insert(id);
            }
        }
        // The oldest first, so that a block that several spans have is the same one's at every start.
        let mut ids: Vec<(SpanId, &Entry)> = self.entries.iter().map(|(&id, entry)| (id, entry)).collect();
        ids.sort_unstable_by_key(|&(id, entry)| (entry.last_use, id));
        let mut useless = Vec::new();
        for (at, group) in self.groups.iter_mut().enumerate() {
            let own = ids.iter().filter(|(_, entry)| entry.group == at);
            useless.extend(group.spans.fill(own.map(|&(id, entry)| (id, &entry.segment.span))));
        }
        useless
    }

    fn add(&mut self, name: SegmentName, record: Record) -> (SpanId, usize) {
        let Record { segment, end, bytes, last_use } = record;
        let Segment { fingerprint, group, block_tokens, codec, .. } = segment;
        let group = self.group(GroupKey { fingerprint, group, block_tokens, codec });
        let model = self.model(&segment.model);
        let id = self.next;
        self.next += 1;
        let record = record_len(&segment);
        let entry = Entry { name, segment: Arc::new(segment), bytes, record, last_use, end, model, group };
        *self.ends.entry(end).or_default() += 1;
        self.models[model].order.insert((value(&entry), id));
        self.models[model].stats.entries += 1;
        self.models[model].stats.bytes += bytes;
        self.record_bytes += record;
        self.by_name.insert(entry.name, id);
        self.entries.insert(id, entry);
        (id, group)
    }

    /// Removes a segment that is not needed, or not there, any more. Its bytes stay charged until its file is gone, and its
    /// name stays busy.
    pub fn take(&mut self, id: SpanId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.by_name.remove(&entry.name);
        let model = &mut self.models[entry.model];
        model.order.remove(&(value(&entry), id));
        model.stats.entries -= 1;
        model.stats.bytes -= entry.bytes;
        self.record_bytes -= entry.record;
        if let Some(count) = self.ends.get_mut(&entry.end) {
            *count -= 1;
            if *count == 0 {
                self.ends.remove(&entry.end);
            }
        }
        let Group { key, spans } = &mut self.groups[entry.group];
        spans.remove(id, &entry.segment.span);
        self.pending.put.remove(&id);
        self.pending.uses.remove(&id);
        self.pending.drop.insert(entry.name);
        self.busy.insert(entry.name);
        let (mut parent, block_tokens) = (entry.segment.span.parent, key.block_tokens);
        for tokens in entry.segment.span.tokens.chunks(block_tokens) {
            self.unblock(&parent);
            parent = chain_key(&parent, tokens);
        }
        Some(entry)
    }

    /// Notes a use.
    pub fn touch(&mut self, id: SpanId, now: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let listed = self.models[entry.model].order.remove(&(value(entry), id));
        entry.last_use = entry.last_use.max(now);
        if listed {
            self.models[entry.model].order.insert((value(entry), id));
        }
        self.pending.uses.insert(id);
    }

    /// The segment to lose first, of one model or of all: a leaf that no pin needs.
    pub fn victim(&mut self, model: Option<usize>) -> Option<SpanId> {
        loop {
            // Spans that another one follows, or a pin needs, leave the order until that changes.
            let first = |at: usize| self.models[at].order.first().map(|&(value, id)| (value, id, at));
            let (value, id, at) = match model {
                Some(at) => first(at)?,
                None => (0..self.models.len()).filter_map(first).min()?,
            };
            let entry = self.entries.get(&id)?;
            let segment = Arc::clone(&entry.segment);
            if self.pins.protect(&segment.span, segment.block_tokens) {
                self.protected.push(id);
            } else if let Some(key) = self.follower_key(id, entry) {
                self.blocked.entry(key).or_default().push(id);
            } else {
                return Some(id);
            }
            self.models[at].order.remove(&(value, id));
        }
    }

    /// A key of the segment that another one follows or is being written behind.
    fn follower_key(&self, id: SpanId, entry: &Entry) -> Option<BlockKey> {
        let span = &entry.segment.span;
        if !self.writing.is_empty() {
            let mut key = span.parent;
            for tokens in span.tokens.chunks(entry.segment.block_tokens) {
                key = chain_key(&key, tokens);
                if self.writing.contains_key(&key) {
                    return Some(key);
                }
            }
        }
        // Spans that overlap can follow each other in a circle; the one that begins later counts as the follower.
        let begins = |id: SpanId| self.entries.get(&id).map(|entry| (entry.segment.span.start, id));
        let mut followers = self.groups[entry.group].spans.followers(id, span);
        followers.find(|&(_, follower)| begins(follower) > Some((span.start, id))).map(|(key, _)| key)
    }

    fn unblock(&mut self, key: &BlockKey) {
        for id in self.blocked.remove(key).into_iter().flatten() {
            self.list_again(id);
        }
    }

    fn list_again(&mut self, id: SpanId) {
        if let Some(entry) = self.entries.get(&id) {
            self.models[entry.model].order.insert((value(entry), id));
        }
    }

    /// Marks a segment as being written: its name is busy, and what it follows stays.
    pub fn begin(&mut self, name: SegmentName, parent: BlockKey) {
        self.busy.insert(name);
        *self.writing.entry(parent).or_default() += 1;
    }

    /// The end of [`Self::begin`].
    pub fn end(&mut self, name: &SegmentName, parent: &BlockKey) {
        self.busy.remove(name);
        if let Some(count) = self.writing.get_mut(parent) {
            *count -= 1;
            if *count == 0 {
                self.writing.remove(parent);
                self.unblock(parent);
            }
        }
    }

    /// The file of a segment that was taken is gone, or waits to be removed.
    pub fn gone(&mut self, entry: &Entry, removed: bool) {
        let charge = charge(entry.bytes);
        if removed {
            self.busy.remove(&entry.name);
            self.discharge(entry.model, charge);
        } else {
            self.stick(Stuck { name: entry.name, file: entry.name.file(), charge, model: entry.model });
        }
    }

    /// A file could not be removed.
    pub fn stick(&mut self, stuck: Stuck) {
        self.busy.insert(stuck.name);
        self.stuck.push(stuck);
    }

    /// A stuck file is gone at last.
    pub fn unstuck(&mut self, stuck: &Stuck) {
        if self.stuck.iter().all(|other| other.name != stuck.name) {
            self.busy.remove(&stuck.name);
        }
        self.discharge(stuck.model, stuck.charge);
    }

    /// Charges a model with bytes.
    pub fn charge(&mut self, model: usize, bytes: u64) {
        self.models[model].charged += bytes;
        self.charged += bytes;
    }

    /// Gives bytes back.
    pub fn discharge(&mut self, model: usize, bytes: u64) {
        self.models[model].charged -= bytes;
        self.charged -= bytes;
    }

    /// Bytes charged: all models, or one.
    pub fn charged(&self, model: Option<usize>) -> u64 {
        model.map_or(self.charged, |at| self.models[at].charged)
    }

    /// How many models there are names of.
    pub fn model_count(&self) -> usize {
        self.models.len()
    }

    /// Bytes of all records of the index.
    pub fn record_bytes(&self) -> u64 {
        self.record_bytes
    }

    /// Counters of a model, to be added to.
    pub fn stats_mut(&mut self, model: usize) -> &mut ColdModelStats {
        &mut self.models[model].stats
    }

    /// Counters of the model of an entry, to be added to.
    pub fn stats_of(&mut self, entry: &Entry) -> &mut ColdModelStats {
        &mut self.models[entry.model].stats
    }

    /// Names and counters of all models that have, or had, segments.
    pub fn stats(&self) -> BTreeMap<String, ColdModelStats> {
        let stats = |model: &Model| ColdModelStats {
            read_seconds: model.reads.seconds(),
            new_tokens: model.new_tokens.load(Ordering::Relaxed),
            ..model.stats.clone()
        };
        self.models.iter().map(|model| (model.name.to_string(), stats(model))).collect()
    }

    /// Seconds in which at least one read was under way.
    pub fn read_seconds(&self) -> f64 {
        self.reads.seconds()
    }

    /// Bytes per second that reads would get now; `assumed` before there were any.
    pub fn read_rate(&self, assumed: f64) -> f64 {
        self.rate.bytes_per_second(assumed, Instant::now())
    }

    /// A segment is being read.
    pub fn begin_read(&mut self, entry: &Entry) {
        self.rate.begin(Instant::now());
        self.reads.begin();
        self.models[entry.model].reads.begin();
    }

    /// The end of [`Self::begin_read`]; so many bytes were read.
    pub fn end_read(&mut self, entry: &Entry, bytes: u64) {
        self.rate.end(bytes, Instant::now());
        self.models[entry.model].reads.end();
        self.reads.end();
    }

    /// Where engines count the tokens of a model that they compute.
    pub fn new_tokens(&self, model: usize) -> Arc<AtomicU64> {
        Arc::clone(&self.models[model].new_tokens)
    }

    /// The pinned prefixes.
    pub fn pins(&self) -> &[Pin] {
        self.pins.list()
    }

    /// Pins a prefix.
    pub fn pin(&mut self, pin: Pin) -> bool {
        let new = self.pins.add(pin);
        self.pending.pins |= new;
        new
    }

    /// Lets the pinned prefixes go of everything that segments of a model are of.
    pub fn unpin_all(&mut self, model: usize) {
        let own = self.entries.values().filter(|entry| entry.model == model);
        let own: HashSet<[u8; 32]> = own.map(|entry| entry.segment.fingerprint).collect();
        let pins = self.pins.list().iter().filter(|pin| own.contains(&pin.fingerprint));
        for pin in pins.cloned().collect::<Vec<_>>() {
            self.unpin(&pin);
        }
    }

    /// Lets a pinned prefix go.
    pub fn unpin(&mut self, pin: &Pin) -> bool {
        let gone = self.pins.remove(pin);
        self.pending.pins |= gone;
        for id in std::mem::take(&mut self.protected) {
            self.list_again(id);
        }
        gone
    }
}

/// When a segment's turn to go comes: its age, made younger by what it would cost to compute it again.
fn value(entry: &Entry) -> u64 {
    entry.last_use.saturating_add((entry.segment.cost / entry.bytes as f64 * AGE_OF_COST) as u64)
}
