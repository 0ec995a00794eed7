//! A model of the arrays: every row remembers which tokens it stands for, so that a wrong block is a wrong content.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

/// Stands for a token and all before it.
type Row = u64;

fn row(tokens: &[u32]) -> Row {
    tokens.iter().fold(17, |hash, &token| (hash ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23))
}

struct Fake {
    id: usize,
    tokens: Vec<u32>,
    computed: usize,
    table: Table,
}

/// Sequences over a manager, and what the blocks' rows hold.
struct Machine {
    manager: BlockManager,
    kinds: Vec<GroupKind>,
    rows: HashMap<(usize, BlockId, usize), Row>,
    sequences: Vec<Fake>,
    pins: Vec<Vec<u32>>,
    next: usize,
    hits: usize,
    /// Another tier: the tokens up to each row that was saved, and how often rows came back.
    saved: HashSet<(usize, Vec<u32>)>,
    restored: usize,
}

/// What one sequence does in a step.
struct Planned {
    at: usize,
    start: usize,
    end: usize,
}

#[derive(Debug, Clone)]
enum Action {
    /// A sequence with a prompt made of a shared beginning and own tokens.
    Start {
        family: u32,
        shared: usize,
        own: usize,
    },
    /// A step of so many tokens for some sequences, beginning with the given one.
    Step {
        first: usize,
        count: usize,
        tokens: usize,
    },
    /// Sampled tokens become known.
    Sample {
        which: usize,
        tokens: Vec<u32>,
    },
    Fork {
        which: usize,
    },
    End {
        which: usize,
        tail: bool,
    },
    Pin {
        which: usize,
        tokens: usize,
    },
    Unpin {
        which: usize,
    },
    Clear,
    Grow {
        group: usize,
        blocks: usize,
    },
    Shrink {
        group: usize,
    },
    /// Saves what may be saved, so many runs at most.
    Save {
        runs: usize,
    },
    /// Brings back what another tier has of a sequence's tokens.
    Restore {
        which: usize,
    },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let which = 0usize..64;
    let action = prop_oneof![
        4 => (0u32..3, 0usize..40, 0usize..12).prop_map(|(family, shared, own)| Action::Start { family, shared, own }),
        8 => (which.clone(), 1usize..5, prop_oneof![1usize..6, 2usize..60])
            .prop_map(|(first, count, tokens)| Action::Step { first, count, tokens }),
        4 => (which.clone(), prop::collection::vec(0u32..2, 1..6))
            .prop_map(|(which, tokens)| Action::Sample { which, tokens }),
        1 => which.clone().prop_map(|which| Action::Fork { which }),
        3 => (which.clone(), any::<bool>()).prop_map(|(which, tail)| Action::End { which, tail }),
        1 => (which.clone(), 0usize..50).prop_map(|(which, tokens)| Action::Pin { which, tokens }),
        1 => which.prop_map(|which| Action::Unpin { which }),
        1 => Just(Action::Clear),
        1 => (0usize..3, 1usize..12).prop_map(|(group, blocks)| Action::Grow { group, blocks }),
        1 => (0usize..3).prop_map(|group| Action::Shrink { group }),
        1 => (1usize..4).prop_map(|runs| Action::Save { runs }),
        3 => (0usize..64).prop_map(|which| Action::Restore { which }),
    ];
    prop::collection::vec(action, 1..60)
}

impl Machine {
    fn new(block_tokens: usize, kinds: &[GroupKind], blocks: usize) -> Self {
        let mut manager = BlockManager::new(block_tokens, kinds, [7; 32]);
        (0..kinds.len()).for_each(|group| manager.grow(group, blocks));
        manager.save_in_runs_of(3 * block_tokens);
        Self {
            manager,
            kinds: kinds.to_vec(),
            rows: HashMap::new(),
            sequences: Vec::new(),
            pins: Vec::new(),
            next: 0,
            hits: 0,
            saved: HashSet::new(),
            restored: 0,
        }
    }

    fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        let count = self.sequences.len().max(1);
        match action {
            Action::Start { family, shared, own } => {
                let id = self.next;
                self.next += 1;
                let mut tokens: Vec<u32> = (0..*shared as u32).map(|i| i * 7 % 5 + family * 10).collect();
                tokens.extend((0..=*own as u32).map(|i| if i == 0 { id as u32 % 4 } else { i % 3 }));
                let table = self.manager.table();
                self.sequences.push(Fake { id, tokens, computed: 0, table });
            }
            Action::Step { first, count, tokens } => self.step(*first, *count, *tokens)?,
            Action::Sample { which, tokens } => {
                if let Some(sequence) = self.sequences.get_mut(which % count) {
                    sequence.tokens.extend(tokens);
                }
            }
            Action::Fork { which } => {
                if let Some(sequence) = self.sequences.get(which % count) {
                    let table = self.manager.fork(&sequence.table);
                    let (tokens, computed) = (sequence.tokens.clone(), sequence.computed);
                    self.sequences.push(Fake { id: self.next, tokens, computed, table });
                    self.next += 1;
                }
            }
            Action::End { which, tail } => {
                if !self.sequences.is_empty() {
                    let mut gone = self.sequences.swap_remove(which % count);
                    if *tail {
                        self.manager.next_step();
                        self.manager.index_tail(&mut gone.table, &gone.tokens, gone.computed);
                    }
                    self.manager.release(gone.table);
                }
            }
            Action::Pin { which, tokens } => {
                if let Some(sequence) = self.sequences.get(which % count) {
                    let tokens = sequence.tokens[..(*tokens).min(sequence.tokens.len())].to_vec();
                    self.manager.next_step();
                    self.manager.pin(&tokens);
                    self.pins.retain(|pinned| *pinned != tokens);
                    self.pins.push(tokens);
                }
            }
            Action::Unpin { which } => {
                if !self.pins.is_empty() {
                    let tokens = self.pins.swap_remove(which % self.pins.len());
                    prop_assert!(self.manager.unpin(&tokens) && !self.manager.unpin(&tokens));
                }
            }
            Action::Clear => {
                self.manager.clear();
                prop_assert!((0..self.kinds.len()).all(|group| self.manager.counts(group).cached == 0));
            }
            Action::Grow { group, blocks } => {
                let group = group % self.kinds.len();
                self.manager.grow(group, self.manager.capacity(group) + blocks);
            }
            Action::Shrink { group } => {
                let group = group % self.kinds.len();
                self.manager.shrink(group, self.manager.least_capacity(group));
            }
            Action::Save { runs } => {
                self.manager.next_step();
                for _ in 0..*runs {
                    let Some(save) = self.manager.next_save() else { break };
                    self.save(&save)?;
                }
            }
            Action::Restore { which } => {
                if let Some(tokens) = self.sequences.get(which % count).map(|sequence| sequence.tokens.clone()) {
                    self.restore(&tokens)?;
                }
            }
        }
        self.check_references()
    }

    /// Saved rows are those of their tokens, and whole blocks or a single incomplete one.
    fn save(&mut self, save: &Save) -> Result<(), TestCaseError> {
        let (block_tokens, own) = (self.manager.block_tokens(), save.tokens.len() - save.start);
        prop_assert!(save.start.is_multiple_of(block_tokens) && own > 0 && own <= 3 * block_tokens);
        prop_assert!(own.is_multiple_of(block_tokens) || own < block_tokens);
        prop_assert_eq!(save.blocks.len(), own.div_ceil(block_tokens));
        for position in save.start..save.tokens.len() {
            let block = save.blocks[(position - save.start) / block_tokens];
            let found = self.rows.get(&(save.group, block, position % block_tokens));
            prop_assert_eq!(found, Some(&row(&save.tokens[..=position])), "a saved row of {}", position);
            self.saved.insert((save.group, save.tokens[..=position].to_vec()));
        }
        Ok(())
    }

    fn save_evicted(&mut self) -> Result<(), TestCaseError> {
        self.manager.take_evicted().iter().try_for_each(|save| self.save(save))
    }

    /// What an engine does with rows that another tier has.
    fn restore(&mut self, tokens: &[u32]) -> Result<(), TestCaseError> {
        self.manager.next_step();
        let block_tokens = self.manager.block_tokens();
        let limit = &tokens[..tokens.len() - 1];
        let from = self.manager.peek(limit) / block_tokens * block_tokens;
        // Of a window the rows before the end are enough.
        let needed = |kind: GroupKind, end: usize| (kind.first_block(end, block_tokens) * block_tokens).max(from)..end;
        let is_saved = |&end: &usize| {
            let mut groups = self.kinds.iter().enumerate();
            groups.all(|(at, &kind)| {
                needed(kind, end).all(|at_row| self.saved.contains(&(at, tokens[..=at_row].to_vec())))
            })
        };
        let end = (from + 1..=limit.len()).rev().find(is_saved).unwrap_or(from);
        let mut table = self.manager.table();
        let found = self.manager.find(&mut table, tokens, 0, from);
        prop_assert_eq!(found.tokens, from);
        let room = end > from && self.manager.extend_with_restored(&mut table, from, end).is_ok();
        self.save_evicted()?;
        if room {
            for (group, &kind) in self.kinds.iter().enumerate() {
                let blocks: Vec<_> = table.blocks(group).collect();
                for position in needed(kind, end) {
                    let Some(block) = blocks[position / block_tokens] else {
                        return Err(TestCaseError::fail("no block for a row that came"));
                    };
                    self.rows.insert((group, block, position % block_tokens), row(&tokens[..=position]));
                }
                let own = blocks[from / block_tokens..].iter().flatten().count();
                prop_assert_eq!(own, needed(kind, end).len().div_ceil(block_tokens), "blocks that no row comes to");
            }
            let unsaved = self.manager.unsaved();
            self.manager.index_tail(&mut table, &tokens[..end], end);
            for (group, &kind) in self.kinds.iter().enumerate() {
                self.manager.set_saved(group, &tokens[..end], needed(kind, end).start);
            }
            prop_assert!(self.manager.unsaved() <= unsaved, "restored rows would be saved again");
            self.restored += end - from;
        }
        self.manager.release(table);
        self.manager.next_step();
        prop_assert!(!room || self.manager.peek(limit) >= end, "what was brought is not found");
        Ok(())
    }

    /// Plans a step as a scheduler does, then does what a runner does: copies, writes, reads.
    fn step(&mut self, first: usize, count: usize, mut tokens: usize) -> Result<(), TestCaseError> {
        self.manager.next_step();
        let (mut copies, mut planned) = (Vec::new(), Vec::new());
        for offset in 0..count.min(self.sequences.len()) {
            let at = (first + offset) % self.sequences.len();
            let Fake { tokens: known, computed, table, .. } = &mut self.sequences[at];
            let found = self.manager.find(table, known, *computed, known.len().saturating_sub(1));
            prop_assert!(found.tokens >= *computed && (found.tokens < known.len() || found.tokens == *computed));
            self.hits += found.tokens - *computed;
            *computed = found.tokens;
            let (start, end) = (*computed, known.len().min(*computed + tokens));
            if found.more_soon || start == end || self.manager.extend(table, start, end, &mut copies).is_err() {
                continue;
            }
            for (group, kind) in self.kinds.iter().enumerate() {
                let most = kind.most_blocks(end, end - start, self.manager.block_tokens());
                prop_assert!(
                    table.held(group) <= most,
                    "{:?} holds {} blocks for {start}..{end}",
                    kind,
                    table.held(group)
                );
            }
            tokens -= end - start;
            *computed = end;
            self.manager.index(table, known, end);
            if end == known.len() {
                self.manager.index_tail(table, known, end);
            }
            planned.push(Planned { at, start, end });
        }
        self.save_evicted()?;
        for copy in copies {
            for offset in 0..self.manager.block_tokens() {
                match self.rows.get(&(copy.group, copy.from, offset)).copied() {
                    Some(row) => self.rows.insert((copy.group, copy.to, offset), row),
                    None => self.rows.remove(&(copy.group, copy.to, offset)),
                };
            }
        }
        self.write(&planned)?;
        self.read(&planned)
    }

    fn write(&mut self, planned: &[Planned]) -> Result<(), TestCaseError> {
        let mut written = HashMap::new();
        for Planned { at, start, end } in planned {
            let sequence = &self.sequences[*at];
            for group in 0..self.kinds.len() {
                let blocks: Vec<_> = sequence.table.blocks(group).map(|block| block.unwrap_or(BlockId::MAX)).collect();
                for position in *start..*end {
                    let place =
                        (group, blocks[position / self.manager.block_tokens()], position % self.manager.block_tokens());
                    let row = row(&sequence.tokens[..=position]);
                    // Two sequences with the same tokens may share what both would write.
                    let before = written.insert(place, row);
                    prop_assert!(before.is_none_or(|before| before == row), "two sequences write to {place:?}");
                    self.rows.insert(place, row);
                }
            }
        }
        Ok(())
    }

    fn read(&self, planned: &[Planned]) -> Result<(), TestCaseError> {
        for Planned { at, start, end } in planned {
            let sequence = &self.sequences[*at];
            for (group, kind) in self.kinds.iter().enumerate() {
                let blocks: Vec<_> = sequence.table.blocks(group).map(|block| block.unwrap_or(BlockId::MAX)).collect();
                for position in kind.first_position(*start)..*end {
                    let block_tokens = self.manager.block_tokens();
                    let found = self.rows.get(&(group, blocks[position / block_tokens], position % block_tokens));
                    let expected = row(&sequence.tokens[..=position]);
                    prop_assert_eq!(found, Some(&expected), "sequence {} reads another's {}", sequence.id, position);
                }
            }
        }
        Ok(())
    }

    /// References are exactly those of tables and pins, and every block is in one state.
    fn check_references(&self) -> Result<(), TestCaseError> {
        for group in 0..self.kinds.len() {
            let pool = &self.manager.groups[group].pool;
            let mut expected = vec![0u32; pool.capacity()];
            let tables =
                self.sequences.iter().flat_map(|sequence| sequence.table.groups[group].iter().flatten().copied());
            let pinned = self
                .manager
                .pins
                .values()
                .flat_map(|pin| &pin.blocks)
                .filter(|(at, _)| *at == group)
                .map(|&(_, block)| block);
            tables.chain(pinned).for_each(|block| expected[block as usize] += 1);
            let found: Vec<u32> = (0..pool.capacity()).map(|id| pool.references(id as BlockId)).collect();
            prop_assert_eq!(&found, &expected);
            let used = expected.iter().filter(|&&references| references > 0).count();
            let counts = pool.counts();
            prop_assert_eq!(counts.used, used);
            prop_assert_eq!(counts.used + counts.cached + counts.free, pool.capacity());
            // The index and the blocks agree on who holds what.
            for id in 0..pool.capacity() as BlockId {
                if let Some(node) = pool.content(id) {
                    prop_assert_eq!(self.manager.index.block(node, group), Some(id));
                }
            }
        }
        Ok(())
    }

    /// Nothing is left when everybody has gone.
    fn end(mut self) -> Result<(), TestCaseError> {
        for sequence in std::mem::take(&mut self.sequences) {
            self.manager.release(sequence.table);
        }
        for tokens in std::mem::take(&mut self.pins) {
            prop_assert!(self.manager.unpin(&tokens));
        }
        self.check_references()?;
        prop_assert!((0..self.kinds.len()).all(|group| self.manager.counts(group).used == 0), "a leak at idle");
        self.manager.clear();
        prop_assert_eq!(self.manager.entries(), 0);
        prop_assert!((0..self.kinds.len()).all(|at| self.manager.counts(at).free == self.manager.capacity(at)));
        Ok(())
    }
}

fn groups() -> impl Strategy<Value = Vec<GroupKind>> {
    prop_oneof![
        Just(vec![GroupKind::Full]),
        (1usize..20).prop_map(|window| vec![GroupKind::Full, GroupKind::Window(window)]),
        (1usize..20).prop_map(|window| vec![GroupKind::Window(window)]),
        (1usize..20, 1usize..20).prop_map(|(one, other)| vec![GroupKind::Window(one), GroupKind::Window(other)]),
    ]
}

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400);
    ProptestConfig { cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn rows_are_always_the_sequences_own(
        kinds in groups(),
        (block_tokens, blocks) in (1usize..9, 0usize..40),
        actions in actions(),
    ) {
        let mut machine = Machine::new(block_tokens, &kinds, blocks);
        for action in &actions {
            machine.act(action)?;
        }
        machine.end()?;
    }
}

/// What is evicted is saved first, together with what is before it, and comes back for the next request.
#[test]
fn evicted_rows_come_back_from_another_tier() {
    let mut machine = Machine::new(4, &[GroupKind::Full], 8);
    let first: Vec<u32> = (0..22).collect();
    let at = start(&mut machine, &first);
    machine.act(&Action::Step { first: at, count: 1, tokens: 22 }).unwrap();
    machine.act(&Action::End { which: at, tail: true }).unwrap();
    assert_eq!((machine.manager.unsaved(), machine.saved.len()), (6, 0));
    // Another prompt takes all blocks.
    let at = start(&mut machine, &(100..130).collect::<Vec<_>>());
    machine.act(&Action::Step { first: at, count: 1, tokens: 30 }).unwrap();
    machine.act(&Action::End { which: at, tail: true }).unwrap();
    assert_eq!((machine.saved.len(), machine.manager.peek(&first)), (22, 0));
    start(&mut machine, &first);
    machine.act(&Action::Restore { which: 0 }).unwrap();
    assert_eq!((machine.restored, machine.manager.peek(&first[..21])), (21, 21));
    machine.act(&Action::Step { first: 0, count: 1, tokens: 22 }).unwrap();
    assert_eq!(machine.hits, 21);
    // Negative control: rows that are not the tokens' own must not pass.
    machine.manager.next_step();
    while machine.manager.next_save().is_some() {}
    let at = start(&mut machine, &[7, 7, 7, 7, 7]);
    machine.act(&Action::Step { first: at, count: 1, tokens: 5 }).unwrap();
    machine.manager.next_step();
    let mut save = machine.manager.next_save().unwrap();
    save.tokens[0] = 8;
    assert!(machine.save(&save).is_err());
}

/// Runs the same actions with rows spoiled in one block of a table: the machine must notice.
#[test]
fn a_wrong_block_is_noticed() {
    let mut machine = Machine::new(4, &[GroupKind::Full], 20);
    machine.act(&Action::Start { family: 1, shared: 20, own: 3 }).unwrap();
    machine.act(&Action::Step { first: 0, count: 1, tokens: 16 }).unwrap();
    machine.sequences[0].table.groups[0].swap(1, 2);
    assert!(machine.step(0, 1, 4).is_err());
}

fn start(machine: &mut Machine, tokens: &[u32]) -> usize {
    let table = machine.manager.table();
    machine.sequences.push(Fake { id: machine.next, tokens: tokens.to_vec(), computed: 0, table });
    machine.next += 1;
    machine.sequences.len() - 1
}

#[test]
fn a_repeated_prompt_computes_its_last_token_only() {
    for (length, block_tokens) in [(1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (11, 4), (12, 16), (40, 16)] {
        let tokens: Vec<u32> = (0..length).collect();
        let mut machine = Machine::new(block_tokens, &[GroupKind::Full], 40);
        let first = start(&mut machine, &tokens);
        machine.step(first, 1, 1000).unwrap();
        for running in [true, false] {
            if !running {
                let sequence = machine.sequences.swap_remove(0);
                machine.manager.release(sequence.table);
            }
            machine.hits = 0;
            let again = start(&mut machine, &tokens);
            machine.step(again, 1, 1000).unwrap();
            assert_eq!(machine.hits, length as usize - 1, "{length} tokens in blocks of {block_tokens}, {running}");
        }
    }
}

#[test]
fn sequences_of_one_step_compute_their_common_beginning_once() {
    let mut machine = Machine::new(16, &[GroupKind::Full], 200);
    let system: Vec<u32> = (0..200).map(|i| i % 97).collect();
    for own in 0..16 {
        let suffix = [1000 + own, 5, 6];
        start(&mut machine, &[&system[..], &suffix].concat());
    }
    let mut computed = 0;
    // In order, as a scheduler gives out its budget.
    for _ in 0..200 {
        let before: usize = machine.sequences.iter().map(|sequence| sequence.computed).sum();
        let hits = machine.hits;
        machine.step(0, 16, 50).unwrap();
        let after: usize = machine.sequences.iter().map(|sequence| sequence.computed).sum();
        computed += after - before - (machine.hits - hits);
    }
    assert_eq!(computed, 200 + 16 * 3);
    // Twelve whole blocks are shared; each sequence has one of its own.
    assert_eq!(machine.manager.counts(0).used, 12 + 16);
}

#[test]
fn the_beginning_of_a_prompt_outlives_what_follows_it() {
    let mut machine = Machine::new(4, &[GroupKind::Full], 6);
    let tokens: Vec<u32> = (0..24).collect();
    let first = start(&mut machine, &tokens);
    machine.step(first, 1, 1000).unwrap();
    let sequence = machine.sequences.pop().unwrap();
    machine.manager.release(sequence.table);
    // Two blocks for another prompt: the two at the end of the first one go.
    let other = start(&mut machine, &[90, 91, 92, 93, 94, 95]);
    machine.step(other, 1, 1000).unwrap();
    let mut table = machine.manager.table();
    assert_eq!(machine.manager.find(&mut table, &tokens, 0, 24).tokens, 16);
    machine.manager.release(table);
}

#[test]
fn pinned_prefixes_are_neither_evicted_nor_cleared() {
    let mut machine = Machine::new(4, &[GroupKind::Full], 4);
    let tokens: Vec<u32> = (0..10).collect();
    let first = start(&mut machine, &tokens);
    machine.step(first, 1, 1000).unwrap();
    let sequence = machine.sequences.pop().unwrap();
    machine.manager.release(sequence.table);
    machine.manager.next_step();
    assert_eq!(machine.manager.pin(&tokens[..8]), 8);
    machine.manager.clear();
    let other = start(&mut machine, &[90, 91, 92, 93, 94, 95, 96, 97, 98]);
    machine.step(other, 1, 1000).unwrap();
    assert_eq!(machine.sequences[other].computed, 0, "only two blocks are left for three");
    let mut table = machine.manager.table();
    assert_eq!(machine.manager.find(&mut table, &tokens, 0, 10).tokens, 8);
    machine.manager.release(table);
    assert!(machine.manager.unpin(&tokens[..8]));
    machine.step(other, 1, 1000).unwrap();
    assert_eq!(machine.sequences[other].computed, 9);
}

#[test]
fn keys_name_the_tokens_and_the_model() {
    let key = |model: [u8; 32], blocks: &[&[u32]]| {
        blocks.iter().fold(model, |key, block| super::super::prefix::chain_key(&key, block))
    };
    assert_eq!(key([1; 32], &[&[1, 2], &[3]]), key([1; 32], &[&[1, 2], &[3]]));
    assert_ne!(key([1; 32], &[&[1, 2]]), key([2; 32], &[&[1, 2]]));
    assert_ne!(key([1; 32], &[&[1, 2], &[3]]), key([1; 32], &[&[1, 2, 3]]));
}

#[path = "manager_window_tests.rs"]
mod windows;
