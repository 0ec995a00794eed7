//! The hot tier: rows in the host's memory, of all models of a pool, within a number of bytes. Pure.
//!
//! For machines whose pools lie in another memory than the host's. What has to go for others is what is worth least by its
//! bytes, as in GreedyDual-Size (Cao and Irani, Cost-Aware WWW Proxy Caching Algorithms, 1997): a span's credit is its cost
//! per byte, above that of what went last when it was used last. A span that others go on from stays longer than they do.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use serde::Serialize;

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
    indices: HashMap<usize, SpanIndex>,
    /// All entries, the least valuable first; credits are not negative, so that their bits are in their order.
    order: BTreeSet<(u64, SpanId)>,
    /// Credit of what went last.
    clock: f64,
    stats: BTreeMap<Arc<str>, HotModelStats>,
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
        let mut state = lock(&self.state);
        let index = state.indices.entry(model.block_tokens).or_insert_with(|| SpanIndex::new(model.block_tokens));
        if index.held(&span) == span.tokens.len() {
            return Vec::new();
        }
        let id = state.next;
        state.next += 1;
        state.add(id, Entry { model: model.clone(), group, span, rows, cost, dirty, credit: 0.0 });
        state.shrink()
    }

    /// What follows the first `from` of `tokens` (whole blocks) without a gap.
    pub fn find(&self, model: &HotModel, group: usize, tokens: &[u32], from: usize) -> Vec<Piece> {
        let state = lock(&self.state);
        let index = state.indices.get(&model.block_tokens);
        index.map_or_else(Vec::new, |index| index.find(&root_key(&model.fingerprint, group), tokens, from))
    }

    /// The rows of a span that was found, if it is still there.
    pub fn get(&self, span: SpanId) -> Option<Arc<RowBuffer>> {
        lock(&self.state).entries.get(&span).map(|entry| Arc::clone(&entry.rows))
    }

    /// A request takes `tokens` of a span.
    pub fn used(&self, span: SpanId, tokens: usize) {
        let mut state = lock(&self.state);
        let Some(entry) = state.remove_from_order(span) else { return };
        let name = Arc::clone(&entry.model.name);
        state.stats.entry(name).or_default().hit_tokens += tokens as u64;
        state.order_by_credit(span);
    }

    /// What is nowhere else, of one model; it counts as written from now on.
    pub fn take_dirty(&self, model: &HotModel) -> Vec<Evicted> {
        let mut state = lock(&self.state);
        let own = state.entries.iter_mut().filter(|(_, entry)| entry.model.fingerprint == model.fingerprint);
        let mut dirty: Vec<_> = own.filter(|(_, entry)| entry.dirty).collect();
        // Beginnings first: what follows them is of no use alone.
        dirty.sort_by_key(|(id, entry)| (entry.span.start, **id));
        dirty
            .into_iter()
            .map(|(_, entry)| {
                let evicted = entry.evicted();
                entry.dirty = false;
                evicted
            })
            .collect()
    }

    /// Forgets everything, or everything of the models of one name; returns how many bytes that were.
    pub fn clear(&self, model: Option<&str>) -> u64 {
        let mut state = lock(&self.state);
        let before = state.bytes;
        let named = |entry: &Entry| model.is_none_or(|name| *entry.model.name == *name);
        let gone: Vec<SpanId> = state.entries.iter().filter(|(_, entry)| named(entry)).map(|(&id, _)| id).collect();
        gone.into_iter().for_each(|id| drop(state.remove(id)));
        before - state.bytes
    }

    /// Sets another limit; returns what has to go.
    pub fn set_limit(&self, limit: u64) -> Vec<Evicted> {
        let mut state = lock(&self.state);
        state.limit = limit;
        state.shrink()
    }

    /// What it holds.
    pub fn stats(&self) -> HotStats {
        let state = lock(&self.state);
        HotStats { limit: state.limit, bytes: state.bytes, models: state.stats.clone() }
    }
}

impl State {
    fn add(&mut self, id: SpanId, entry: Entry) {
        let bytes = entry.rows.bytes() as u64;
        let stats = self.stats.entry(Arc::clone(&entry.model.name)).or_default();
        stats.entries += 1;
        stats.tokens += entry.span.tokens.len() as u64;
        stats.bytes += bytes;
        self.bytes += bytes;
        let index = self.indices.get_mut(&entry.model.block_tokens);
        let useless = index.map_or_else(Vec::new, |index| index.insert(id, &entry.span));
        self.entries.insert(id, entry);
        self.order_by_credit(id);
        // The longer block has their rows too.
        useless.into_iter().for_each(|id| drop(self.remove(id)));
    }

    /// An entry was used now.
    fn order_by_credit(&mut self, id: SpanId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.credit = self.clock + entry.cost.max(0.0) / entry.rows.bytes() as f64;
        self.order.insert((entry.credit.to_bits(), id));
    }

    fn remove_from_order(&mut self, id: SpanId) -> Option<&Entry> {
        let entry = self.entries.get(&id)?;
        self.order.remove(&(entry.credit.to_bits(), id));
        Some(entry)
    }

    fn remove(&mut self, id: SpanId) -> Option<Entry> {
        self.remove_from_order(id)?;
        let entry = self.entries.remove(&id)?;
        let bytes = entry.rows.bytes() as u64;
        self.bytes -= bytes;
        if let Some(stats) = self.stats.get_mut(&entry.model.name) {
            stats.entries -= 1;
            stats.tokens -= entry.span.tokens.len() as u64;
            stats.bytes -= bytes;
        }
        if let Some(index) = self.indices.get_mut(&entry.model.block_tokens) {
            index.remove(id, &entry.span);
        }
        Some(entry)
    }

    /// Lets go what is beyond the limit.
    fn shrink(&mut self) -> Vec<Evicted> {
        let mut evicted = Vec::new();
        while self.bytes > self.limit {
            let is_leaf = |id: &SpanId| {
                let entry = &self.entries[id];
                self.indices[&entry.model.block_tokens].is_leaf(*id, &entry.span)
            };
            let ids = || self.order.iter().map(|&(_, id)| id);
            let Some(id) = ids().find(is_leaf).or_else(|| ids().next()) else { break };
            let Some(entry) = self.remove(id) else { break };
            self.clock = self.clock.max(entry.credit);
            evicted.push(entry.evicted());
        }
        evicted
    }
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::prefix::chain_key;
    use crate::cache::rows::{LayerRows, RowLayout, RowType};

    const BLOCK: usize = 4;

    fn model(name: &str) -> HotModel {
        let fingerprint = *blake3::hash(name.as_bytes()).as_bytes();
        HotModel { name: name.into(), fingerprint, block_tokens: BLOCK }
    }

    /// Rows that tell their tokens.
    fn rows(tokens: &[u32]) -> Arc<RowBuffer> {
        let layers = vec![LayerRows { layer: 0, keys: (1, 4), values: (1, 4) }];
        let layout = Arc::new(RowLayout { dtype: RowType::F32, layers });
        let mut rows = RowBuffer::new(layout, tokens.len(), 0);
        for (at, token) in tokens.iter().enumerate() {
            rows.rows_mut(0, at..at + 1).0.fill(*token as u8);
        }
        Arc::new(rows)
    }

    fn span(model: &HotModel, prefix: &[u32], tokens: &[u32]) -> Span {
        let root = root_key(&model.fingerprint, 0);
        let parent = prefix.chunks(BLOCK).fold(root, |key, tokens| chain_key(&key, tokens));
        Span { parent, start: prefix.len(), tokens: tokens.into() }
    }

    fn put(tier: &HotTier, model: &HotModel, tokens: &[u32], start: usize, cost: f64) -> Vec<Vec<u32>> {
        let (prefix, own) = tokens.split_at(start);
        let evicted = tier.put(model, 0, span(model, prefix, own), rows(own), cost, true);
        evicted.iter().map(|evicted| evicted.span.tokens.to_vec()).collect()
    }

    fn one() -> u64 {
        rows(&[1]).bytes() as u64
    }

    #[test]
    fn what_is_worth_least_goes_first_and_ends_before_beginnings() {
        let (tier, model) = (HotTier::new(3 * one()), model("a"));
        assert!(put(&tier, &model, &[1, 2, 3, 4], 0, 1.0).is_empty());
        assert!(put(&tier, &model, &[1, 2, 3, 4, 5], 4, 5.0).is_empty());
        assert!(put(&tier, &model, &[9, 9], 0, 2.0).is_empty());
        // The first is worth least, but the second goes on from it.
        assert_eq!(put(&tier, &model, &[8, 8], 0, 3.0), [[9, 9]]);
        let second = tier.find(&model, 0, &[1, 2, 3, 4, 5], 0)[1].span;
        tier.used(second, 1);
        // What was there before the last eviction is worth less than the same cost now.
        assert_eq!(put(&tier, &model, &[7, 7], 0, 2.5), [[8, 8]]);
        assert_eq!(put(&tier, &model, &[6, 6], 0, 1e-9), [[6, 6]], "itself");
        assert_eq!(put(&HotTier::new(10), &model, &[6, 6], 0, 1.0), [[6, 6]], "it does not fit at all");
    }

    #[test]
    fn models_and_dirt_are_kept_apart() {
        let (tier, first, second) = (HotTier::new(10 * one()), model("a"), model("b"));
        put(&tier, &first, &[1, 2, 3, 4], 0, 1.0);
        put(&tier, &second, &[1, 2, 3, 4], 0, 1.0);
        assert!(put(&tier, &second, &[1, 2, 3], 0, 1.0).is_empty(), "it is there already");
        assert_eq!(tier.take_dirty(&first).len(), 1);
        assert_eq!((tier.take_dirty(&first).len(), tier.take_dirty(&second).len()), (0, 1));
        tier.used(tier.find(&first, 0, &[1, 2], 0)[0].span, 2);
        assert_eq!(tier.stats().models["a"], HotModelStats { entries: 1, tokens: 4, bytes: one(), hit_tokens: 2 });
        assert_eq!(tier.clear(Some("a")), one());
        assert!(tier.find(&first, 0, &[1, 2], 0).is_empty() && !tier.find(&second, 0, &[1, 2], 0).is_empty());
        assert_eq!(tier.set_limit(0).len(), 1);
        assert_eq!(tier.stats().bytes, 0);
    }

    /// A span of a family of tokens, used or put.
    #[derive(Debug, Clone)]
    enum Action {
        Put { family: u32, start: usize, tokens: usize, cost: f64 },
        Use { family: u32 },
        Limit { spans: u64 },
        Clear,
    }

    fn actions() -> impl Strategy<Value = Vec<Action>> {
        let action = prop_oneof![
            8 => (0u32..4, 0usize..5, 1usize..13, 0.0..9.0).prop_map(|(family, start, tokens, cost)| {
                // Whole blocks, or less than one.
                let tokens = if tokens > BLOCK { tokens / BLOCK * BLOCK } else { tokens };
                Action::Put { family, start: start * BLOCK, tokens, cost }
            }),
            4 => (0u32..4).prop_map(|family| Action::Use { family }),
            1 => (0u64..12).prop_map(|spans| Action::Limit { spans }),
            1 => Just(Action::Clear),
        ];
        prop::collection::vec(action, 1..60)
    }

    fn family(family: u32) -> Vec<u32> {
        (0..40).map(|at| at + 50 * family * u32::from(at > 5)).collect()
    }

    proptest! {
        #[test]
        fn the_limit_is_kept_and_rows_are_those_of_their_tokens(actions in actions()) {
            let (tier, model) = (HotTier::new(6 * one()), model("m"));
            for action in actions {
                match action {
                    Action::Put { family: of, start, tokens, cost } => {
                        put(&tier, &model, &family(of)[..start + tokens], start, cost);
                    }
                    Action::Use { family: of } => {
                        let tokens = family(of);
                        let mut reached = 0;
                        for piece in tier.find(&model, 0, &tokens, 0) {
                            prop_assert_eq!(piece.position, reached);
                            reached += piece.tokens;
                            let rows = tier.get(piece.span).expect("it was found");
                            for at in 0..piece.tokens {
                                let found = rows.rows(0, piece.skip + at..piece.skip + at + 1).0[0];
                                prop_assert_eq!(found, tokens[piece.position + at] as u8);
                            }
                            tier.used(piece.span, piece.tokens);
                        }
                    }
                    Action::Limit { spans } => drop(tier.set_limit(spans * one())),
                    Action::Clear => drop(tier.clear(None)),
                }
                let state = lock(&tier.state);
                let bytes: usize = state.entries.values().map(|entry| entry.rows.bytes()).sum();
                prop_assert!(state.bytes == bytes as u64 && state.bytes <= state.limit);
                prop_assert_eq!(state.order.len(), state.entries.len());
                let ids: BTreeSet<_> = state.order.iter().map(|&(_, id)| id).collect();
                prop_assert!(ids.iter().all(|id| state.entries.contains_key(id)));
            }
            tier.clear(None);
            prop_assert!(lock(&tier.state).indices.values().all(SpanIndex::is_empty), "blocks of nobody");
        }
    }
}
