use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::cache::rows::{LayerRows, RowLayout, RowType};

/// Of the models, by number: two that share a block size, and one with another.
const BLOCKS: [usize; 3] = [4, 4, 8];

fn model(number: usize) -> HotModel {
    let name = ["a", "b", "c"][number];
    HotModel { name: name.into(), fingerprint: *blake3::hash(name.as_bytes()).as_bytes(), block_tokens: BLOCKS[number] }
}

/// What tells rows of a token apart.
fn mark(model: usize, group: usize, token: u32) -> u8 {
    (token as usize * 6 + model * 2 + group) as u8
}

/// Rows that tell their tokens, large enough that more tokens need more pages.
fn rows(model: usize, group: usize, tokens: &[u32]) -> Arc<RowBuffer> {
    let layers = vec![LayerRows { layer: 0, keys: (1, 1024), values: (1, 1) }];
    let mut rows = RowBuffer::new(Arc::new(RowLayout { dtype: RowType::F32, state: None, layers }), tokens.len(), 0);
    for (at, token) in tokens.iter().enumerate() {
        rows.rows_mut(0, at..at + 1).0.fill(mark(model, group, *token));
    }
    Arc::new(rows)
}

fn span(number: usize, group: usize, prefix: &[u32], tokens: &[u32]) -> Span {
    let root = root_key(&model(number).fingerprint, group);
    let parent = prefix.chunks(BLOCKS[number]).fold(root, |key, tokens| chain_key(&key, tokens));
    Span { parent, start: prefix.len(), tokens: tokens.into() }
}

fn put(tier: &HotTier, number: usize, tokens: &[u32], start: usize, cost: f64) -> Vec<Vec<u32>> {
    let (prefix, own) = tokens.split_at(start);
    let evicted = tier.put(&model(number), 0, span(number, 0, prefix, own), rows(number, 0, own), cost, true);
    evicted.iter().map(|evicted| evicted.span.tokens.to_vec()).collect()
}

fn found(tier: &HotTier, number: usize, tokens: &[u32]) -> Vec<SpanId> {
    tier.find(&model(number), 0, tokens, 0).iter().map(|piece| piece.span).collect()
}

/// Bytes of rows of up to three tokens.
fn one() -> u64 {
    rows(0, 0, &[1]).bytes() as u64
}

#[test]
fn what_is_worth_least_goes_first_and_ends_before_beginnings() {
    let tier = HotTier::new(4 * one());
    assert!(put(&tier, 0, &[1, 2, 3, 4], 0, 1.0).is_empty());
    assert!(put(&tier, 0, &[1, 2, 3, 4, 5], 4, 5.0).is_empty());
    assert!(put(&tier, 0, &[9, 9], 0, 2.0).is_empty());
    // The first is worth least, but the second goes on from it.
    assert_eq!(put(&tier, 0, &[8, 8], 0, 3.0), [[9, 9]]);
    tier.used(found(&tier, 0, &[1, 2, 3, 4, 5])[1], 1);
    // What was there before the last eviction is worth less than the same cost now.
    assert_eq!(put(&tier, 0, &[7, 7], 0, 2.5), [[8, 8]]);
    assert_eq!(put(&tier, 0, &[6, 6], 0, 1e-9), [[6, 6]], "itself");
    let before = tier.stats();
    let long: Vec<u32> = (50..90).collect();
    assert_eq!(put(&tier, 0, &long, 0, 1e9), std::slice::from_ref(&long), "it does not fit at all");
    assert_eq!(tier.stats(), before, "nothing else had to go for it");
}

#[test]
fn costs_that_are_no_numbers_are_worth_nothing() {
    let tier = HotTier::new(3 * one());
    for (token, cost) in [(1, f64::INFINITY), (2, f64::NAN), (3, -1.0)] {
        assert!(put(&tier, 0, &[token], 0, cost).is_empty());
    }
    for (token, gone) in [(11, 1), (12, 2), (13, 3)] {
        assert_eq!(put(&tier, 0, &[token], 0, 1.0), [[gone]]);
    }
}

#[test]
fn models_and_dirt_are_kept_apart() {
    let (tier, first, second) = (HotTier::new(20 * one()), model(0), model(1));
    put(&tier, 0, &[1, 2, 3, 4], 0, 1.0);
    put(&tier, 1, &[1, 2, 3, 4], 0, 1.0);
    assert!(put(&tier, 1, &[1, 2, 3], 0, 1.0).is_empty(), "it is there already");
    let clean = |model: &HotModel| {
        let dirty = tier.dirty(Some(model));
        dirty.iter().for_each(|&id| tier.mark_clean(id));
        dirty.len()
    };
    assert_eq!((clean(&first), clean(&first), clean(&second)), (1, 0, 1));
    tier.used(found(&tier, 0, &[1, 2])[0], 2);
    let bytes = rows(0, 0, &[1, 2, 3, 4]).bytes() as u64;
    assert_eq!(tier.stats().models["a"], HotModelStats { entries: 1, tokens: 4, bytes, hit_tokens: 2 });
    assert_eq!(tier.clear(Some("a")), bytes);
    assert!(found(&tier, 0, &[1, 2]).is_empty() && !found(&tier, 1, &[1, 2]).is_empty());
    assert_eq!(tier.set_limit(0).len(), 1);
    assert_eq!(tier.stats().bytes, 0);
}

#[test]
fn all_goes_that_is_elsewhere_or_can_be_written() {
    let tier = HotTier::new(20 * one());
    put(&tier, 0, &[9, 9], 0, 1.0);
    put(&tier, 0, &[1, 2, 3, 4], 0, 1.0);
    put(&tier, 0, &[1, 2, 3, 4, 5], 4, 2.0);
    put(&tier, 0, &[8, 8], 0, 3.0);
    tier.mark_clean(found(&tier, 0, &[9, 9])[0]);
    tier.mark_clean(found(&tier, 0, &[8, 8])[0]);
    let released = |room| tier.release(room).iter().map(|gone| gone.span.tokens.to_vec()).collect::<Vec<_>>();
    assert_eq!(released(one() - 1), [[9, 9]], "the next one is nowhere else");
    assert_eq!(released(one()), [[5]], "nor is the one behind it");
    assert_eq!(released(0), Vec::<Vec<u32>>::new());
    assert_eq!(released(u64::MAX), [vec![1, 2, 3, 4], vec![8, 8]]);
    assert_eq!((tier.bytes(), tier.limit()), (0, 20 * one()));
    put(&tier, 0, &[7, 7], 0, 1.0);
    assert_eq!(tier.bytes(), one(), "it may be full again");
}

#[test]
fn what_was_not_written_stays_dirty() {
    let tier = HotTier::new(20 * one());
    put(&tier, 0, &[1, 2, 3, 4, 5], 4, 1.0);
    put(&tier, 1, &[7], 0, 1.0);
    put(&tier, 0, &[1, 2, 3, 4], 0, 1.0);
    let dirty = tier.dirty(Some(&model(0)));
    assert_eq!(dirty.iter().map(|&id| tier.stored(id).unwrap().span.start).collect::<Vec<_>>(), [0, 4]);
    assert_eq!(tier.dirty(None).len(), 3);
    tier.mark_clean(dirty[0]);
    assert_eq!(tier.dirty(Some(&model(0))), dirty[1..], "the one that nobody wrote");
    tier.clear(None);
    assert!(tier.stored(dirty[1]).is_none() && tier.dirty(None).is_empty());
}

/// What happens to the tier. `at` counts around the entries.
#[derive(Debug, Clone)]
enum Action {
    Put { model: usize, group: usize, family: u32, blocks: (usize, usize), rest: usize, cost: u32, dirty: bool },
    Use { model: usize, group: usize, family: u32 },
    Clean { at: usize },
    CleanAll { model: usize },
    Limit { spans: u64 },
    Clear { model: Option<usize> },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let place = || (0usize..3, 0usize..2, 0u32..4);
    let put = (place(), (0usize..4, 0usize..4), 0usize..4, 0u32..9, any::<bool>());
    let action = prop_oneof![
        16 => put.prop_map(|((model, group, family), blocks, rest, cost, dirty)| {
            Action::Put { model, group, family, blocks, rest, cost, dirty }
        }),
        8 => place().prop_map(|(model, group, family)| Action::Use { model, group, family }),
        1 => (0usize..20).prop_map(|at| Action::Clean { at }),
        1 => (0usize..3).prop_map(|model| Action::CleanAll { model }),
        1 => (0u64..40).prop_map(|spans| Action::Limit { spans }),
        1 => prop::option::of(0usize..3).prop_map(|model| Action::Clear { model }),
    ];
    prop::collection::vec(action, 1..120)
}

/// Families share their first tokens.
fn family(family: u32) -> Vec<u32> {
    (0..80).map(|at| at + 80 * family * u32::from(at > 9)).collect()
}

/// What left: of which model and group, which tokens, and whether they were nowhere else.
type Gone = (Arc<str>, usize, Span, bool);

/// The same tier without any order: it looks at everything.
#[derive(Default)]
struct Naive {
    limit: u64,
    clock: f64,
    next: SpanId,
    entries: BTreeMap<SpanId, Entry>,
    indices: BTreeMap<usize, SpanIndex>,
    /// The rule that the negative control leaves out.
    ignores_leaves: bool,
}

impl Naive {
    fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.rows.bytes() as u64).sum()
    }

    fn is_leaf(&self, id: SpanId) -> bool {
        let entry = &self.entries[&id];
        self.indices[&entry.model.block_tokens].is_leaf(id, &entry.span)
    }

    fn put(&mut self, mut entry: Entry) -> Vec<Gone> {
        let size = entry.model.block_tokens;
        let index = self.indices.entry(size).or_insert_with(|| SpanIndex::new(size));
        if index.held(&entry.span) == entry.span.tokens.len() {
            return Vec::new();
        }
        if entry.rows.bytes() as u64 > self.limit {
            return vec![gone(&entry)];
        }
        let id = self.next;
        self.next += 1;
        let useless = index.insert(id, &entry.span);
        entry.credit = self.clock + entry.cost / entry.rows.bytes() as f64;
        self.entries.insert(id, entry);
        useless.into_iter().for_each(|id| drop(self.remove(id)));
        self.shrink()
    }

    fn remove(&mut self, id: SpanId) -> Entry {
        let entry = self.entries.remove(&id).unwrap();
        self.indices.get_mut(&entry.model.block_tokens).unwrap().remove(id, &entry.span);
        entry
    }

    fn shrink(&mut self) -> Vec<Gone> {
        let mut all = Vec::new();
        while self.bytes() > self.limit {
            let worth = |&(id, entry): &(&SpanId, &Entry)| {
                (!self.ignores_leaves && !self.is_leaf(*id), entry.credit.to_bits(), *id)
            };
            let Some((&id, _)) = self.entries.iter().min_by_key(worth) else { break };
            let entry = self.remove(id);
            self.clock = self.clock.max(entry.credit);
            all.push(gone(&entry));
        }
        all
    }
}

fn gone(entry: &Entry) -> Gone {
    (Arc::clone(&entry.model.name), entry.group, entry.span.clone(), entry.dirty)
}

fn all_gone(evicted: Vec<Evicted>) -> Vec<Gone> {
    evicted.into_iter().map(|it| (it.model.name, it.group, it.span, it.dirty)).collect()
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, one: T, other: T) -> Result<(), String> {
    if one == other { Ok(()) } else { Err(format!("{what}: {one:?} instead of {other:?}")) }
}

/// Does the same to a tier and to the naive one, and tells where they differ. `filled` makes the rows.
fn compare(
    actions: &[Action],
    ignores_leaves: bool,
    filled: impl Fn(usize, usize, &[u32]) -> Arc<RowBuffer>,
) -> Result<(), String> {
    let limit = 24 * one();
    let (tier, mut naive) = (HotTier::new(limit), Naive { limit, ignores_leaves, ..Naive::default() });
    for action in actions {
        let nth = |naive: &Naive, at: usize| naive.entries.keys().nth(at).copied();
        match *action {
            Action::Put { model: number, group, family: of, blocks: (start, count), rest, cost, dirty } => {
                // Whole blocks, or less than one.
                let size = BLOCKS[number];
                let tokens = if count > 0 { count * size } else { rest + 1 };
                let all = family(of);
                let (prefix, own) = all[..start * size + tokens].split_at(start * size);
                let (span, rows) = (span(number, group, prefix, own), filled(number, group, own));
                let (model, cost) = (model(number), f64::from(cost));
                let evicted = tier.put(&model, group, span.clone(), Arc::clone(&rows), cost, dirty);
                let entry = Entry { model, group, span, rows, cost, dirty, credit: 0.0, leaf: true };
                same("evicted", all_gone(evicted), naive.put(entry))?;
            }
            Action::Use { model: number, group, family: of } => use_family(&tier, &mut naive, number, group, of)?,
            Action::Clean { at } => {
                let Some(id) = nth(&naive, at) else { continue };
                tier.mark_clean(id);
                naive.entries.get_mut(&id).unwrap().dirty = false;
            }
            Action::CleanAll { model: number } => {
                let own = naive.entries.iter_mut().filter(|(_, entry)| entry.model.name == model(number).name);
                let mut dirty: Vec<_> = own.filter(|(_, entry)| entry.dirty).collect();
                dirty.sort_by_key(|(id, entry)| (entry.span.start, **id));
                same("dirty", tier.dirty(Some(&model(number))), dirty.iter().map(|(id, _)| **id).collect())?;
                for (id, entry) in dirty {
                    same("as it would leave", all_gone(tier.stored(*id).into_iter().collect()), vec![gone(entry)])?;
                    tier.mark_clean(*id);
                    entry.dirty = false;
                }
            }
            Action::Limit { spans } => {
                naive.limit = spans * one();
                same("beyond the limit", all_gone(tier.set_limit(naive.limit)), naive.shrink())?;
            }
            Action::Clear { model: number } => {
                let name = number.map(|number| model(number).name);
                let before = naive.bytes();
                let own = |entry: &Entry| name.as_ref().is_none_or(|name| entry.model.name == *name);
                let ids: Vec<_> = naive.entries.iter().filter(|(_, entry)| own(entry)).map(|(&id, _)| id).collect();
                ids.into_iter().for_each(|id| drop(naive.remove(id)));
                same("cleared", tier.clear(name.as_deref()), before - naive.bytes())?;
            }
        }
        check(&tier, &naive)?;
    }
    tier.clear(None);
    let state = lock(&tier.state);
    same("blocks of nobody", state.blocks.values().all(|it| it.index.is_empty() && it.owners.is_empty()), true)?;
    same("places of nobody", state.leaves.len() + state.inner.len() + state.entries.len(), 0)?;
    let left = state.stats.values().map(|stats| stats.entries + stats.tokens + stats.bytes).sum::<u64>();
    same("counted though gone", (left, state.bytes), (0, 0))
}

/// Takes what there is of a family; all rows must be those of their tokens.
fn use_family(tier: &HotTier, naive: &mut Naive, number: usize, group: usize, of: u32) -> Result<(), String> {
    let (tokens, model) = (family(of), model(number));
    let pieces = tier.find(&model, group, &tokens, 0);
    let root = root_key(&model.fingerprint, group);
    let index = naive.indices.get(&model.block_tokens);
    same("found", pieces.clone(), index.map_or_else(Vec::new, |index| index.find(&root, &tokens, 0)))?;
    for piece in pieces {
        let rows = tier.get(piece.span).ok_or("it was found")?;
        for at in 0..piece.tokens {
            let row = rows.rows(0, piece.skip + at..piece.skip + at + 1).0;
            same("row", row.to_vec(), vec![mark(number, group, tokens[piece.position + at]); row.len()])?;
        }
        tier.used(piece.span, piece.tokens);
        let entry = naive.entries.get_mut(&piece.span).unwrap();
        entry.credit = naive.clock + entry.cost / entry.rows.bytes() as f64;
    }
    Ok(())
}

/// Whether the tier holds what the naive one holds, and its orders say what is true.
fn check(tier: &HotTier, naive: &Naive) -> Result<(), String> {
    let state = lock(&tier.state);
    let mut ids: Vec<_> = state.entries.keys().copied().collect();
    ids.sort_unstable();
    same("entries", ids, naive.entries.keys().copied().collect())?;
    same("bytes", state.bytes, naive.bytes())?;
    let models: u64 = state.stats.values().map(|stats| stats.bytes).sum();
    same("bytes by model", models, state.bytes)?;
    same("within the limit", state.bytes <= state.limit, true)?;
    let listed = |leaf: bool| {
        let own = naive.entries.iter().filter(move |&(&id, _)| naive.is_leaf(id) == leaf);
        own.map(|(&id, entry)| (entry.credit.to_bits(), id)).collect::<BTreeSet<_>>()
    };
    same("leaves", &state.leaves, &listed(true))?;
    same("inner", &state.inner, &listed(false))
}

proptest! {
    #[test]
    fn the_order_is_that_of_looking_at_everything(actions in actions()) {
        prop_assert_eq!(compare(&actions, false, rows), Ok(()));
    }
}

/// Errors of many histories with a defect, which must not go unnoticed.
fn noticed(ignores_leaves: bool, filled: impl Fn(usize, usize, &[u32]) -> Arc<RowBuffer>) -> Vec<String> {
    let mut runner = TestRunner::deterministic();
    let histories = (0..40).map(|_| actions().new_tree(&mut runner).unwrap().current());
    histories.filter_map(|actions| compare(&actions, ignores_leaves, &filled).err()).collect()
}

#[test]
fn defects_are_noticed() {
    assert_eq!(noticed(false, rows), [""; 0]);
    assert!(noticed(true, rows).iter().any(|error| error.starts_with("evicted")), "beginnings before ends");
    let of_another_group = |model, group: usize, tokens: &[u32]| rows(model, 1 - group, tokens);
    assert!(noticed(false, of_another_group).iter().any(|error| error.starts_with("row")), "rows of others");
}
