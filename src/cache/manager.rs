//! The blocks of all sequences of a model: tables, sharing, copy-on-write, and the index of what is cached. Pure.
//!
//! A table's whole blocks enter the index when the step that writes them in the last layer is planned: steps run in order,
//! and a layer writes a step's rows before it attends, so that even another sequence of the same step may share them.
//! Shared blocks are never written. A sequence that would write to one copies it first; what it copies must come from an
//! earlier step. Of models with states a sequence has one of those too, in a slot ([`Snapshots`]), and what is cached serves it
//! as far as both go.

mod lookup;

use std::collections::HashMap;

use super::blocks::{BlockCounts, BlockId, BlockPool};
use super::group::GroupKind;
use super::prefix::{BlockKey, NodeId, PrefixIndex, ROOT};
use super::snapshots::{SlotCopy, SlotId, Snapshots, State, Unsaved};

/// Rows to copy from one block to another, before a step writes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Cache group of both blocks.
    pub group: usize,
    /// Whose rows.
    pub from: BlockId,
    /// Where to.
    pub to: BlockId,
}

/// Where the rows of a sequence are. Its blocks are given back to the manager that made it, never dropped.
#[derive(Debug)]
#[must_use = "blocks of a lost table are lost"]
pub struct Table {
    /// Of each group, the blocks of positions `0..`, `block_tokens..` and so on; `None` behind a window.
    groups: Vec<Vec<Option<BlockId>>>,
    /// What its layers keep besides; `None` without tokens, or for models without states.
    state: Option<State>,
    /// The last whole block that is in the index.
    node: NodeId,
    /// Tokens up to the end of it.
    indexed: usize,
}

impl Table {
    /// Places for blocks that it has, in every group.
    pub fn places(&self) -> usize {
        self.groups.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Where its state is, if it has one.
    pub fn state(&self) -> Option<SlotId> {
        self.state.as_ref().map(State::slot)
    }

    /// Its sequence's first `computed` tokens have passed all layers with the step that is being planned.
    pub fn complete(&mut self, computed: usize) {
        self.state.iter_mut().for_each(|state| state.complete(computed));
    }

    /// Blocks of a group that it holds.
    pub fn held(&self, group: usize) -> usize {
        self.blocks(group).flatten().count()
    }

    /// Blocks of a group; `None` where nobody reads the rows any more.
    pub fn blocks(&self, group: usize) -> impl Iterator<Item = Option<BlockId>> {
        self.groups[group].iter().copied()
    }
}

/// What the index had for a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Tokens that need not be computed, counted from the beginning.
    pub tokens: usize,
    /// Tokens whose rows are there: more than `tokens` where nobody has the state behind them.
    pub rows: usize,
    /// More will be there when the step that is being planned has run.
    pub more_soon: bool,
}

/// Rows of consecutive blocks that are in the pools alone, to be copied to another tier; or a state, as the row of the last
/// token that it stands for: its group is the one behind the others, its block is a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Save {
    /// Cache group of the blocks.
    pub group: usize,
    /// All tokens of the sequence up to the end of the last block.
    pub tokens: Vec<u32>,
    /// Tokens before the first block, or before the last token of a state.
    pub start: usize,
    /// Whole blocks, or a single incomplete one; or a slot.
    pub blocks: Vec<BlockId>,
}

/// Not enough blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// In this group; others may be short as well.
    pub group: usize,
}

/// What becomes of a table's last block when rows are to be written to it.
#[derive(Debug, Clone, Copy)]
enum Tail {
    /// It is written to.
    Own,
    /// Others need it: it is copied.
    Copied,
    /// It is cached, but there is no block for a copy: it is written to, and no longer cached.
    Taken,
}

#[derive(Debug)]
struct Group {
    kind: GroupKind,
    pool: BlockPool<NodeId>,
}

/// Allocator and index of a model's cache groups, which all have blocks of the same number of tokens.
#[derive(Debug)]
pub struct BlockManager {
    block_tokens: usize,
    groups: Vec<Group>,
    index: PrefixIndex,
    /// The step that is being planned.
    step: u64,
    pins: HashMap<BlockKey, Pin>,
    /// Tokens of a save at most; `None` while there is no other tier.
    save_tokens: Option<usize>,
    /// What was evicted and has to be saved before a step runs.
    evicted: Vec<Save>,
    /// Of models whose layers keep more than rows.
    snapshots: Option<Snapshots>,
}

/// What a pin holds.
#[derive(Debug)]
struct Pin {
    /// With the group of each.
    blocks: Vec<(usize, BlockId)>,
    state: Option<SlotId>,
}

impl BlockManager {
    /// Groups without blocks; `key` stands for the model in block keys.
    pub fn new(block_tokens: usize, groups: &[GroupKind], key: BlockKey) -> Self {
        let group = |&kind| Group { kind, pool: BlockPool::new(0) };
        Self {
            block_tokens,
            groups: groups.iter().map(group).collect(),
            index: PrefixIndex::new(groups.len(), key),
            step: 1,
            pins: HashMap::new(),
            save_tokens: None,
            evicted: Vec::new(),
            snapshots: None,
        }
    }

    /// The same for a model whose layers keep states.
    pub fn with_snapshots(self, snapshots: Snapshots) -> Self {
        Self { snapshots: Some(snapshots), ..self }
    }

    /// The states, for models that have some.
    pub fn snapshots(&mut self) -> Option<&mut Snapshots> {
        self.snapshots.as_mut()
    }

    /// Whether sequences have more than rows.
    pub fn has_states(&self) -> bool {
        self.snapshots.is_some()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Cache groups.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Which rows a group keeps.
    pub fn kind(&self, group: usize) -> GroupKind {
        self.groups[group].kind
    }

    /// Blocks that a group can hand out.
    pub fn available(&self, group: usize) -> usize {
        self.groups[group].pool.available()
    }

    /// How many blocks of a group are in which state.
    pub fn counts(&self, group: usize) -> BlockCounts {
        self.groups[group].pool.counts()
    }

    /// Cached entries: whole blocks, the ends of prompts and answers, and states.
    pub fn entries(&self) -> usize {
        self.index.entries() + self.snapshots.as_ref().map_or(0, Snapshots::entries)
    }

    /// Blocks of a group that exist.
    pub fn capacity(&self, group: usize) -> usize {
        self.groups[group].pool.capacity()
    }

    /// More blocks exist in a group.
    pub fn grow(&mut self, group: usize, capacity: usize) {
        self.groups[group].pool.grow(capacity);
    }

    /// The fewest blocks of a group that lose nothing.
    pub fn least_capacity(&self, group: usize) -> usize {
        self.groups[group].pool.least_capacity()
    }

    /// Fewer blocks exist in a group; none that is used or cached is lost.
    pub fn shrink(&mut self, group: usize, capacity: usize) {
        self.groups[group].pool.shrink(capacity);
    }

    /// Another step is being planned: what the steps before write is there for it.
    pub fn next_step(&mut self) {
        self.step += 1;
    }

    /// From now on there is another tier, which takes rows of up to `tokens` tokens at a time.
    pub fn save_in_runs_of(&mut self, tokens: usize) {
        self.save_tokens = Some(tokens.max(self.block_tokens));
        self.snapshots.iter_mut().for_each(Snapshots::save);
    }

    /// What has been evicted since the last call and nobody saved. Its rows are still there until the next step is
    /// launched; they may be on their way until the step before it has ended.
    pub fn take_evicted(&mut self) -> Vec<Save> {
        let states = self.snapshots.as_mut().map(Snapshots::take_evicted).unwrap_or_default();
        let mut evicted = std::mem::take(&mut self.evicted);
        evicted.extend(states.into_iter().map(|state| self.save_of(state)));
        evicted
    }

    fn save_of(&self, (tokens, slot): Unsaved) -> Save {
        Save { group: self.groups.len(), start: tokens.len() - 1, tokens: tokens.to_vec(), blocks: vec![slot] }
    }

    /// Rows that should be saved next, beginnings first, and which the steps before the newest one have written. They count
    /// as saved from now on.
    pub fn next_save(&mut self) -> Option<Save> {
        let most = self.save_tokens?;
        let Some((node, group)) = self.index.unsaved().find(|&(node, group)| self.is_ready(node, group)) else {
            let state = self.snapshots.as_mut()?.next_save(self.step)?;
            return Some(self.save_of(state));
        };
        let mut first = node;
        while self.is_ready(self.index.parent(first), group) {
            first = self.index.parent(first);
        }
        let mut run = vec![first];
        let whole = |node: &NodeId| self.index.tokens(*node).len() == self.block_tokens;
        while whole(&run[run.len() - 1]) && (run.len() + 1) * self.block_tokens <= most {
            let mut next = self.index.children(run[run.len() - 1]);
            let Some(next) = next.find(|&next| whole(&next) && self.is_ready(next, group)) else { break };
            run.push(next);
        }
        Some(self.save(&run, group))
    }

    /// Blocks whose rows are in the pools alone, and states.
    pub fn unsaved(&self) -> usize {
        self.index.unsaved().len() + self.snapshots.as_ref().map_or(0, Snapshots::unsaved)
    }

    /// Makes the state of all of `tokens`, which came from another tier, one that others find.
    pub fn keep_restored_state(&mut self, table: &Table, tokens: &[u32]) {
        self.keep_state(table, tokens);
        self.snapshots.iter_mut().for_each(|snapshots| snapshots.set_saved(tokens));
    }

    /// Rows of a group, of `tokens` behind the first `start` (whole blocks), came from another tier.
    pub fn set_saved(&mut self, group: usize, tokens: &[u32], start: usize) {
        let mut node = ROOT;
        for (at, block) in tokens.chunks(self.block_tokens).enumerate() {
            let Some(child) = self.index.child(node, block) else { return };
            if at * self.block_tokens >= start {
                self.index.set_saved(child, group);
            }
            node = child;
        }
    }

    fn is_ready(&self, node: NodeId, group: usize) -> bool {
        self.index.is_unsaved(node, group) && self.index.written(node) < self.step
    }

    /// The rows of consecutive nodes, which are saved now.
    fn save(&mut self, run: &[NodeId], group: usize) -> Save {
        let tokens = self.index.all_tokens(run[run.len() - 1]);
        let own: usize = run.iter().map(|&node| self.index.tokens(node).len()).sum();
        run.iter().for_each(|&node| self.index.set_saved(node, group));
        let blocks = run.iter().filter_map(|&node| self.index.block(node, group)).collect();
        Save { group, start: tokens.len() - own, tokens, blocks }
    }

    /// The table of a new sequence.
    pub fn table(&self) -> Table {
        Table { groups: vec![Vec::new(); self.groups.len()], state: None, node: ROOT, indexed: 0 }
    }

    /// The table of another sequence that goes on from the same tokens. Both copy a shared block before they write to it.
    pub fn fork(&mut self, table: &Table) -> Table {
        for (group, blocks) in self.groups.iter_mut().zip(&table.groups) {
            blocks.iter().flatten().for_each(|&block| group.pool.retain(block));
        }
        let state = self.snapshots.as_mut().and_then(|snapshots| snapshots.fork(table.state.as_ref()));
        Table { groups: table.groups.clone(), state, node: table.node, indexed: table.indexed }
    }

    /// A slot for the state of `tokens` tokens that comes from elsewhere; `None` if there is no slot.
    pub fn receive_state(&mut self, table: &mut Table, tokens: usize) -> Option<SlotId> {
        let snapshots = self.snapshots.as_mut()?;
        let state = snapshots.receive(tokens)?;
        let slot = state.slot();
        snapshots.release(table.state.replace(state));
        Some(slot)
    }

    /// Makes room for rows that come from elsewhere, or for none of them: of `start..end` those that a sequence needs which
    /// goes on at `end`. `table` has the blocks before `start`, all of them whole.
    pub fn extend_with_restored(&mut self, table: &mut Table, start: usize, end: usize) -> Result<(), Shortage> {
        let (start, needed) = (start / self.block_tokens, end.div_ceil(self.block_tokens));
        let first = |kind: GroupKind| kind.first_block(end, self.block_tokens).max(start);
        for (at, group) in self.groups.iter().enumerate() {
            if needed.saturating_sub(first(group.kind)) > group.pool.available() {
                return Err(Shortage { group: at });
            }
        }
        for at in 0..self.groups.len() {
            let first = self.groups[at].kind.first_block(end, self.block_tokens);
            for place in table.groups[at].len()..needed {
                let block = if place < first { None } else { Some(self.take(at)?) };
                table.groups[at].push(block);
            }
        }
        Ok(())
    }

    /// Makes room for rows `start..end` of a sequence, or for none of them. `start` follows the sequence's last row;
    /// what lies behind its windows is given back. Rows of shared blocks that must be copied first are added to `copies`.
    pub fn extend(
        &mut self,
        table: &mut Table,
        start: usize,
        end: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Result<(), Shortage> {
        self.leave_window(table, start);
        let needed = end.div_ceil(self.block_tokens);
        let tail = start / self.block_tokens;
        let mut shared = vec![Tail::Own; self.groups.len()];
        for (at, group) in self.groups.iter().enumerate() {
            let blocks = &table.groups[at];
            let (new, available) = (needed.saturating_sub(blocks.len()), group.pool.available());
            let block = blocks.get(tail).copied().flatten().filter(|&block| !self.writable(at, block, start));
            shared[at] = match block {
                None if new <= available => Tail::Own,
                Some(_) if new < available => Tail::Copied,
                // Nobody else holds it: what is cached there has to go instead.
                Some(block) if new <= available && group.pool.references(block) == 1 => Tail::Taken,
                _ => return Err(Shortage { group: at }),
            };
        }
        for (at, shared) in shared.into_iter().enumerate() {
            match (shared, table.groups[at].get(tail).copied().flatten()) {
                (Tail::Copied, Some(from)) => {
                    let to = self.take(at)?;
                    if !start.is_multiple_of(self.block_tokens) {
                        copies.push(BlockCopy { group: at, from, to });
                    }
                    table.groups[at][tail] = Some(to);
                    self.groups[at].pool.release(from);
                }
                (Tail::Taken, Some(block)) => {
                    if let Some(node) = self.groups[at].pool.content(block) {
                        self.groups[at].pool.forget(block);
                        self.index.remove_block(node, at);
                    }
                }
                _ => {}
            }
            while table.groups[at].len() < needed {
                let block = self.take(at)?;
                table.groups[at].push(Some(block));
            }
        }
        Ok(())
    }

    /// Where the state of a sequence goes on whose tokens from `start` on are to pass the layers, and what is to be copied there
    /// first. `None` for models without states, and where there is no state to go on from.
    pub fn advance_state(&mut self, table: &mut Table, start: usize) -> Option<(SlotId, Option<SlotCopy>)> {
        self.snapshots.as_mut()?.advance(&mut table.state, start)
    }

    /// Keeps the state that a sequence has now for others, if it is that of exactly `tokens`.
    pub fn keep_state(&mut self, table: &Table, tokens: &[u32]) {
        let step = self.step;
        self.snapshots.iter_mut().for_each(|snapshots| snapshots.keep(table.state.as_ref(), tokens, step));
    }

    /// Whether rows from position `start` on may be written to a block: nobody else holds it, and none of its cached
    /// tokens is there.
    fn writable(&self, group: usize, block: BlockId, start: usize) -> bool {
        let pool = &self.groups[group].pool;
        let cached = pool.content(block).map_or(0, |node| self.index.tokens(node).len());
        pool.references(block) == 1 && cached <= start % self.block_tokens
    }

    fn take(&mut self, group: usize) -> Result<BlockId, Shortage> {
        let (block, evicted) = self.groups[group].pool.take().ok_or(Shortage { group })?;
        if let Some(node) = evicted {
            self.save_before_eviction(node, group);
            self.index.remove_block(node, group);
        }
        Ok(block)
    }

    /// Notes what is to be saved of a node that goes, together with what is before it and was not saved either.
    fn save_before_eviction(&mut self, node: NodeId, group: usize) {
        let Some(most) = self.save_tokens.filter(|_| self.index.is_unsaved(node, group)) else { return };
        let mut run = vec![node];
        while self.index.tokens(node).len() == self.block_tokens && (run.len() + 1) * self.block_tokens <= most {
            let before = self.index.parent(run[run.len() - 1]);
            if !self.is_ready(before, group) {
                break;
            }
            run.push(before);
        }
        run.reverse();
        let save = self.save(&run, group);
        self.evicted.push(save);
    }

    /// Puts whole blocks of a sequence into the index: `tokens` are known, and the rows of the first `computed` of them
    /// are written by the step that is being planned or before. Blocks that are there already are shared instead.
    pub fn index(&mut self, table: &mut Table, tokens: &[u32], computed: usize) {
        let computed = computed.min(tokens.len());
        while table.indexed + self.block_tokens <= computed {
            let block = &tokens[table.indexed..table.indexed + self.block_tokens];
            let node = self.index.child(table.node, block);
            let node = node.unwrap_or_else(|| self.index.insert(table.node, block));
            self.attach(table, node, table.indexed / self.block_tokens);
            while let Some(shorter) = self.index.shorter_child(table.node, block) {
                self.forget(shorter);
            }
            table.node = node;
            table.indexed += self.block_tokens;
        }
    }

    /// Puts the last, incomplete block of a sequence into the index.
    pub fn index_tail(&mut self, table: &mut Table, tokens: &[u32], computed: usize) {
        self.index(table, tokens, computed);
        let tail = &tokens[table.indexed..computed.min(tokens.len())];
        let place = table.indexed / self.block_tokens;
        let known = self.index.closest_child(table.node, tail).is_some_and(|(_, common)| common == tail.len());
        // A block that came from the index and was not written to holds nothing new.
        let own = |(at, group): (usize, &Group)| {
            let block = table.groups[at].get(place).copied().flatten();
            block.is_some_and(|block| group.pool.references(block) == 1)
        };
        if tail.is_empty() || known || !self.groups.iter().enumerate().all(own) {
            return;
        }
        while let Some(shorter) = self.index.shorter_child(table.node, tail) {
            self.forget(shorter);
        }
        // There may be one whose block in a group was evicted.
        let node = self.index.child(table.node, tail);
        let node = node.unwrap_or_else(|| self.index.insert(table.node, tail));
        self.attach(table, node, place);
    }

    /// Makes a node and a place of a table have the same blocks.
    fn attach(&mut self, table: &mut Table, node: NodeId, place: usize) {
        for (at, group) in self.groups.iter_mut().enumerate() {
            let Some(own) = table.groups[at].get(place).copied().flatten() else { continue };
            match self.index.block(node, at) {
                Some(known) if known != own => {
                    group.pool.retain(known);
                    group.pool.release(own);
                    table.groups[at][place] = Some(known);
                }
                Some(_) => {}
                None => {
                    if let Some(old) = group.pool.content(own) {
                        self.index.remove_block(old, at);
                    }
                    group.pool.set_content(own, node);
                    self.index.set_block(node, at, own, self.step);
                }
            }
        }
    }

    /// Removes a node that has no children, and its blocks' content.
    fn forget(&mut self, node: NodeId) {
        for (at, group) in self.groups.iter_mut().enumerate() {
            if let Some(block) = self.index.block(node, at) {
                group.pool.forget(block);
                self.index.remove_block(node, at);
            }
        }
    }

    /// Gives back blocks whose rows no token from position `start` on needs.
    fn leave_window(&mut self, table: &mut Table, start: usize) {
        // The last indexed block stays, as in `find`.
        let last = (table.indexed / self.block_tokens).saturating_sub(1);
        for at in 0..self.groups.len() {
            let first = self.groups[at].kind.first_position(start) / self.block_tokens;
            self.leave(table, at, first.min(last));
        }
    }

    /// Gives back the blocks of a group before the place `first`.
    fn leave(&mut self, table: &mut Table, group: usize, first: usize) {
        let blocks = &mut table.groups[group];
        let first = first.min(blocks.len());
        // Those before were given back earlier.
        for block in blocks[..first].iter_mut().rev() {
            let Some(block) = block.take() else { break };
            self.groups[group].pool.leave(block);
        }
    }

    /// Gives back all blocks of a sequence; those in the index stay cached.
    pub fn release(&mut self, table: Table) {
        for (group, blocks) in self.groups.iter_mut().zip(table.groups) {
            // From the end, so that the beginning of a prompt outlives what follows it.
            blocks.into_iter().rev().flatten().for_each(|block| group.pool.release(block));
        }
        if let Some(snapshots) = &mut self.snapshots {
            snapshots.release(table.state);
        }
    }

    /// Forgets what nobody uses and nothing pins; returns how many blocks of each group became free, and how many slots of states.
    pub fn clear(&mut self) -> (Vec<usize>, usize) {
        let mut freed = Vec::with_capacity(self.groups.len());
        for at in 0..self.groups.len() {
            let cached: Vec<BlockId> = self.groups[at].pool.cached().collect();
            freed.push(cached.len());
            for block in cached {
                if let Some(node) = self.groups[at].pool.content(block) {
                    self.groups[at].pool.forget(block);
                    self.index.remove_block(node, at);
                }
            }
        }
        (freed, self.snapshots.as_mut().map_or(0, Snapshots::clear))
    }

    /// Keeps what is cached of the beginning of `tokens` until it is unpinned; returns for how many tokens. Pinning the
    /// same tokens again takes note of what has been cached since.
    pub fn pin(&mut self, tokens: &[u32]) -> usize {
        self.unpin(tokens);
        let mut table = self.table();
        let found = self.find(&mut table, tokens, 0, tokens.len());
        let blocks = table.groups.into_iter().enumerate();
        let blocks = blocks.flat_map(|(at, blocks)| blocks.into_iter().flatten().map(move |block| (at, block)));
        let state = table.state;
        let state = self.snapshots.as_mut().and_then(|snapshots| snapshots.pin(state));
        let holds = self.snapshots.is_none() || state.is_some();
        let pin = Pin { blocks: blocks.collect(), state };
        self.pins.insert(super::prefix::chain_key(self.index.key(ROOT), tokens), pin);
        if holds { found.tokens } else { 0 }
    }

    /// Ends a pin; whether there was one.
    pub fn unpin(&mut self, tokens: &[u32]) -> bool {
        let Some(Pin { blocks, state }) = self.pins.remove(&super::prefix::chain_key(self.index.key(ROOT), tokens))
        else {
            return false;
        };
        if let (Some(snapshots), Some(slot)) = (&mut self.snapshots, state) {
            snapshots.unpin(slot);
        }
        for (group, block) in blocks.into_iter().rev() {
            self.groups[group].pool.release(block);
        }
        true
    }
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
