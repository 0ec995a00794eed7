//! The hot tier: rows in the host's memory, of all models of a pool, within a number of bytes. Pure.
//!
//! For machines whose pools lie in another memory than the host's. What has to go for others is what is worth least by its
//! bytes, as in GreedyDual-Size (Cao and Irani, Cost-Aware WWW Proxy Caching Algorithms, 1997): a span's credit is its cost
//! per byte, above that of what went last when it was used last. A span that others go on from stays longer than they do:
//! spans are in one of two orders, of those that have followers and of those that have none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use serde::Serialize;

use super::prefix::{BlockKey, chain_key};
use super::rows::RowBuffer;
use super::spans::{Piece, Span, SpanId, SpanIndex, root_key};
use crate::sync::lock;

/// A model as the tier knows it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HotModel {
    /// For statistics and clearing.
    pub name: Arc<str>,
    /// All that its rows depend on.
    pub fingerprint: [u8; 32],
    /// Tokens of a block.
    pub block_tokens: usize,
}

/// A span that left the tier, or is to be written.
#[derive(Debug)]
pub struct Evicted {
    /// Whose rows.
    pub model: HotModel,
    /// Cache group of the rows.
    pub group: usize,
    /// Which tokens.
    pub span: Span,
    /// Theirs.
    pub rows: Arc<RowBuffer>,
    /// Seconds to compute them again.
    pub cost: f64,
    /// They are nowhere else.
    pub dirty: bool,
}

/// Rows in the host's memory. All methods may be called from any thread; none copies rows.
#[derive(Debug)]
pub struct HotTier {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    limit: u64,
    bytes: u64,
    entries: HashMap<SpanId, Entry>,
    next: SpanId,
    /// By block size.
    blocks: HashMap<usize, Blocks>,
    /// Entries that may go, the least valuable first; credits are not negative, so that their bits are in their order.
    leaves: BTreeSet<(u64, SpanId)>,
    /// Those that others go on from, in the same order.
    inner: BTreeSet<(u64, SpanId)>,
    /// Credit of what went last.
    clock: f64,
    stats: BTreeMap<Arc<str>, HotModelStats>,
}

/// The blocks of all entries that have blocks of one size.
#[derive(Debug)]
struct Blocks {
    block_tokens: usize,
    index: SpanIndex,
    /// By the key of the tokens up to their end: the entry that the index has a whole block from.
    owners: HashMap<BlockKey, SpanId>,
}

#[derive(Debug)]
struct Entry {
    model: HotModel,
    group: usize,
    span: Span,
    rows: Arc<RowBuffer>,
    cost: f64,
    dirty: bool,
    credit: f64,
    /// No other entry goes on from it.
    leaf: bool,
}

/// What the tier holds, and what it was good for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HotStats {
    /// Bytes that it may hold.
    pub limit: u64,
    /// Bytes that it holds.
    pub bytes: u64,
    /// By model name.
    pub models: BTreeMap<Arc<str>, HotModelStats>,
}

/// A model's part of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct HotModelStats {
    /// Spans.
    pub entries: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Tokens that requests have taken from here.
    pub hit_tokens: u64,
}

impl HotTier {
    /// An empty tier of `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self { state: Mutex::new(State { limit, ..State::default() }) }
    }

    /// Bytes that it may hold.
    pub fn limit(&self) -> u64 {
        lock(&self.state).limit
    }

    /// Keeps rows whose computation took `cost` seconds; `dirty` if they are nowhere else. Returns what has to go for them,
    /// which may be they themselves.
    pub fn put(
        &self,
        model: &HotModel,
        group: usize,
        span: Span,
        rows: Arc<RowBuffer>,
        cost: f64,
        dirty: bool,
    ) -> Vec<Evicted> {
        debug_assert_eq!(rows.tokens(), span.tokens.len(), "rows of all tokens");
        let mut state = lock(&self.state);
        let blocks = state.blocks.entry(model.block_tokens).or_insert_with(|| Blocks::new(model.block_tokens));
        if blocks.index.held(&span) == span.tokens.len() {
            return Vec::new();
        }
        let model = model.clone();
        let entry = Entry { model, group, span, rows, cost, dirty, credit: 0.0, leaf: true };
        // Otherwise everything would have to go before it.
        if entry.rows.bytes() as u64 > state.limit {
            return vec![entry.evicted()];
        }
        let replaced = state.add(entry);
        let evicted = state.shrink();
        // Giving memory back takes time that others need not wait for.
        drop(state);
        drop(replaced);
        evicted
    }

    /// What follows the first `from` of `tokens` (whole blocks) without a gap.
    pub fn find(&self, model: &HotModel, group: usize, tokens: &[u32], from: usize) -> Vec<Piece> {
        let state = lock(&self.state);
        let Some(blocks) = state.blocks.get(&model.block_tokens) else { return Vec::new() };
        blocks.index.find(&root_key(&model.fingerprint, group), tokens, from)
    }

    /// The longest beginning of `tokens`, of more than `from` of them, whose state is there.
    pub fn find_state(&self, model: &HotModel, group: usize, tokens: &[u32], from: usize) -> Option<Piece> {
        let state = lock(&self.state);
        let blocks = state.blocks.get(&model.block_tokens)?;
        blocks.index.find_state(&root_key(&model.fingerprint, group), tokens, from)
    }

    /// Whether what is behind the first `at` of `tokens` agrees with the rest; see [`SpanIndex::agrees_behind`].
    pub fn agrees_behind(&self, model: &HotModel, group: usize, tokens: &[u32], at: usize) -> Option<bool> {
        let state = lock(&self.state);
        let blocks = state.blocks.get(&model.block_tokens)?;
        blocks.index.agrees_behind(&root_key(&model.fingerprint, group), tokens, at)
    }

    /// Whether it has anything of the models of a name.
    pub fn knows(&self, model: &str) -> bool {
        lock(&self.state).stats.get(model).is_some_and(|stats| stats.entries > 0)
    }

    /// The rows of a span that was found, if it is still there.
    pub fn get(&self, span: SpanId) -> Option<Arc<RowBuffer>> {
        lock(&self.state).entries.get(&span).map(|entry| Arc::clone(&entry.rows))
    }

    /// A request takes `tokens` of a span.
    pub fn used(&self, span: SpanId, tokens: usize) {
        let mut state = lock(&self.state);
        let Some(name) = state.entries.get(&span).map(|entry| Arc::clone(&entry.model.name)) else { return };
        state.stats.entry(name).or_default().hit_tokens += tokens as u64;
        state.relist(span, State::renew);
    }

    /// Which spans are nowhere else, of one model or of all: beginnings first, as what follows is of no use alone.
    pub fn dirty(&self, model: Option<&HotModel>) -> Vec<SpanId> {
        let state = lock(&self.state);
        let own = |entry: &Entry| model.is_none_or(|model| entry.model.fingerprint == model.fingerprint);
        let dirty = state.entries.iter().filter(|(_, entry)| entry.dirty && own(entry));
        let mut dirty: Vec<_> = dirty.map(|(&id, entry)| (entry.span.start, id)).collect();
        dirty.sort_unstable();
        dirty.into_iter().map(|(_, id)| id).collect()
    }

    /// A span as it would leave, to be written while it stays.
    pub fn stored(&self, span: SpanId) -> Option<Evicted> {
        lock(&self.state).entries.get(&span).map(Entry::evicted)
    }

    /// A span is somewhere else too.
    pub fn mark_clean(&self, span: SpanId) {
        if let Some(entry) = lock(&self.state).entries.get_mut(&span) {
            entry.dirty = false;
        }
    }

    /// Forgets everything, or everything of the models of one name; returns how many bytes that were.
    pub fn clear(&self, model: Option<&str>) -> u64 {
        let mut state = lock(&self.state);
        let before = state.bytes;
        let named = |entry: &Entry| model.is_none_or(|name| *entry.model.name == *name);
        let gone: Vec<SpanId> = state.entries.iter().filter(|(_, entry)| named(entry)).map(|(&id, _)| id).collect();
        let gone: Vec<_> = gone.into_iter().filter_map(|id| state.remove(id)).collect();
        let freed = before - state.bytes;
        drop(state);
        drop(gone);
        freed
    }

    /// Sets another limit; returns what has to go.
    pub fn set_limit(&self, limit: u64) -> Vec<Evicted> {
        let mut state = lock(&self.state);
        state.limit = limit;
        state.shrink()
    }

    /// Lets spans go whatever the limit is, the least valuable first, up to one that is nowhere else and not within `room`
    /// bytes of such.
    pub fn release(&self, mut room: u64) -> Vec<Evicted> {
        lock(&self.state).evict(|_, entry| {
            let bytes = if entry.dirty { entry.rows.bytes() as u64 } else { 0 };
            let goes = bytes <= room;
            room = room.saturating_sub(bytes);
            goes
        })
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// What it holds.
    pub fn stats(&self) -> HotStats {
        let state = lock(&self.state);
        HotStats { limit: state.limit, bytes: state.bytes, models: state.stats.clone() }
    }
}

impl State {
    /// Adds an entry, used now. Returns those whose rows it has too.
    fn add(&mut self, entry: Entry) -> Vec<Entry> {
        let id = self.next;
        self.next += 1;
        let bytes = entry.rows.bytes() as u64;
        let stats = self.stats.entry(Arc::clone(&entry.model.name)).or_default();
        stats.entries += 1;
        stats.tokens += entry.span.tokens.len() as u64;
        stats.bytes += bytes;
        self.bytes += bytes;
        let (block_tokens, span) = (entry.model.block_tokens, entry.span.clone());
        let useless = self.blocks.get_mut(&block_tokens).map_or_else(Vec::new, |blocks| blocks.insert(id, &span));
        self.entries.insert(id, entry);
        self.relist(id, State::renew);
        self.relist_before(block_tokens, &span);
        useless.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    fn remove(&mut self, id: SpanId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.unlist(id, &entry);
        let bytes = entry.rows.bytes() as u64;
        self.bytes -= bytes;
        if let Some(stats) = self.stats.get_mut(&entry.model.name) {
            stats.entries -= 1;
            stats.tokens -= entry.span.tokens.len() as u64;
            stats.bytes -= bytes;
        }
        let block_tokens = entry.model.block_tokens;
        if let Some(blocks) = self.blocks.get_mut(&block_tokens) {
            blocks.remove(id, &entry.span);
        }
        self.relist_before(block_tokens, &entry.span);
        Some(entry)
    }

    /// An entry is used now.
    fn renew(clock: f64, entry: &mut Entry) {
        // Whatever the costs are, credits are numbers that have an order.
        let cost = if entry.cost.is_finite() { entry.cost.max(0.0) } else { 0.0 };
        entry.credit = clock + cost / entry.rows.bytes() as f64;
    }

    /// Changes what an entry's place in the order depends on, and looks again whether others go on from it.
    fn relist(&mut self, id: SpanId, change: impl FnOnce(f64, &mut Entry)) {
        let Some(mut entry) = self.entries.remove(&id) else { return };
        self.unlist(id, &entry);
        change(self.clock, &mut entry);
        let blocks = self.blocks.get(&entry.model.block_tokens);
        entry.leaf = blocks.is_none_or(|blocks| blocks.index.is_leaf(id, &entry.span));
        let order = if entry.leaf { &mut self.leaves } else { &mut self.inner };
        order.insert((entry.credit.to_bits(), id));
        self.entries.insert(id, entry);
    }

    fn unlist(&mut self, id: SpanId, entry: &Entry) {
        let order = if entry.leaf { &mut self.leaves } else { &mut self.inner };
        order.remove(&(entry.credit.to_bits(), id));
    }

    /// Blocks of `span` came or went: lists those anew that they go on from.
    fn relist_before(&mut self, block_tokens: usize, span: &Span) {
        let Some(blocks) = self.blocks.get(&block_tokens) else { return };
        let parents = std::iter::once(span.parent).chain(ends(span, block_tokens));
        let mut owners: Vec<SpanId> = parents.filter_map(|key| blocks.owners.get(&key).copied()).collect();
        owners.dedup();
        owners.into_iter().for_each(|id| self.relist(id, |_, _| {}));
    }

    /// Lets go what is beyond the limit.
    fn shrink(&mut self) -> Vec<Evicted> {
        self.evict(|state, _| state.bytes > state.limit)
    }

    /// Lets the least valuable go as long as that one `goes`.
    fn evict(&mut self, mut goes: impl FnMut(&Self, &Entry) -> bool) -> Vec<Evicted> {
        let mut evicted = Vec::new();
        // There may be none without followers: two spans can go on from each other's blocks.
        while let Some(&(_, id)) = self.leaves.first().or(self.inner.first()) {
            if !self.entries.get(&id).is_some_and(|entry| goes(self, entry)) {
                break;
            }
            let Some(entry) = self.remove(id) else { break };
            self.clock = self.clock.max(entry.credit);
            evicted.push(entry.evicted());
        }
        evicted
    }
}

impl Blocks {
    fn new(block_tokens: usize) -> Self {
        Self { block_tokens, index: SpanIndex::new(block_tokens), owners: HashMap::new() }
    }

    /// As [`SpanIndex::insert`], which leaves blocks that are there with their owners.
    fn insert(&mut self, id: SpanId, span: &Span) -> Vec<SpanId> {
        for key in ends(span, self.block_tokens) {
            self.owners.entry(key).or_insert(id);
        }
        self.index.insert(id, span)
    }

    fn remove(&mut self, id: SpanId, span: &Span) {
        for key in ends(span, self.block_tokens) {
            if self.owners.get(&key) == Some(&id) {
                self.owners.remove(&key);
            }
        }
        self.index.remove(id, span);
    }
}

/// The key behind each whole block of a span.
fn ends(span: &Span, block_tokens: usize) -> impl Iterator<Item = BlockKey> {
    let blocks = span.tokens.chunks_exact(block_tokens);
    blocks.scan(span.parent, |key, tokens| {
        *key = chain_key(key, tokens);
        Some(*key)
    })
}

impl Entry {
    fn evicted(&self) -> Evicted {
        Evicted {
            model: self.model.clone(),
            group: self.group,
            span: self.span.clone(),
            rows: Arc::clone(&self.rows),
            cost: self.cost,
            dirty: self.dirty,
        }
    }
}

#[cfg(test)]
#[path = "hot_tests.rs"]
mod tests;
