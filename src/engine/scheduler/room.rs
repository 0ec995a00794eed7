//! How many blocks of each cache group there are for sequences, and how many there should be.

use super::Scheduler;
use crate::cache::manager::Table;
use crate::engine::events::FinishReason;
use crate::engine::sequence::Sequence;
use crate::error::{Error, Status};

impl Scheduler {
    /// Blocks that may ever exist in a group.
    pub fn blocks_limit(&self, group: usize) -> usize {
        self.limits.blocks[group]
    }

    /// Blocks of a group that a sequence of so many tokens holds at a time, at most.
    pub fn most_blocks(&self, group: usize, tokens: usize) -> usize {
        self.blocks.kind(group).most_blocks(tokens, self.limits.prefill_chunk, self.blocks.block_tokens())
    }

    /// Blocks, of each group, of the sequences that were admitted and have not begun. What is cached of them becomes the last
    /// to be evicted: somebody is about to take blocks, and what was just brought for them is older than what has just ended.
    pub fn owed_blocks(&mut self) -> Vec<usize> {
        let Self { waiting, blocks, .. } = self;
        waiting.iter().for_each(|sequence| _ = blocks.peek(&sequence.tokens));
        let owed = |group| self.waiting.iter().map(|sequence| self.most_blocks(group, sequence.tokens.len() + 1)).sum();
        (0..self.blocks.groups()).map(owed).collect()
    }

    /// So many blocks of each group should be free for rows that come from elsewhere.
    pub fn reserve_blocks(&mut self, blocks: Vec<usize>) {
        self.reserved = blocks;
    }

    /// No more blocks of each group than this can be had; for the moment, unless that is `firm`.
    pub fn limit_blocks(&mut self, blocks: &[usize], firm: bool) {
        self.limits.blocks.copy_from_slice(blocks);
        self.firm = firm;
    }

    /// The number of blocks of each group that there should be: more than there are if sequences wait for some, or if cached
    /// ones had to go although more may exist.
    pub fn wanted_blocks(&self) -> Vec<usize> {
        (0..self.blocks.groups()).map(|group| self.wanted_in(group)).collect()
    }

    fn wanted_in(&self, group: usize) -> usize {
        let capacity = self.blocks.capacity(group);
        let free = self.blocks.counts(group).free;
        let spare = self.limits.prefill_chunk.div_ceil(self.blocks.block_tokens()) + self.running.len();
        let (wanted, reserved) = (self.wanted[group], self.reserved[group].saturating_sub(free));
        if wanted == 0 && reserved == 0 && (free >= spare || self.is_idle()) {
            return capacity;
        }
        let more = (capacity + wanted.max(spare).max(reserved)).max(capacity * 2);
        more.min(self.limits.blocks[group]).max(capacity)
    }

    /// Blocks of each group without which sequences cannot go on: of the last plan.
    pub fn needed_blocks(&self) -> &[usize] {
        &self.wanted
    }

    /// The end of a sequence that all blocks together do not hold: an answer ends there, a prompt has no answer.
    pub(super) fn too_long(&self, sequence: &Sequence) -> Result<FinishReason, Error> {
        if sequence.completion_len() > 0 {
            return Ok(FinishReason::Length);
        }
        let needed = sequence.tokens.len() + 1;
        let short = |group: &usize| self.most_blocks(*group, needed) > self.limits.blocks[*group];
        let blocks = (0..self.blocks.groups()).filter(short).map(|group| self.limits.blocks[group]).min();
        let blocks = blocks.or(self.limits.blocks.iter().copied().min()).unwrap_or(0);
        let tokens = blocks * self.blocks.block_tokens();
        let what = format!("{needed} tokens do not fit the KV cache, whose limit is {tokens} tokens");
        Err(Error::new(Status::OutOfMemory, what))
    }

    /// Blocks of a group that a running sequence still needs for the tokens it has.
    pub(super) fn outstanding(&self, sequence: &Sequence, group: usize) -> usize {
        let table = sequence.table.as_ref();
        table.map_or(0, |table| self.outstanding_on(table, table.places(), sequence.tokens.len(), group))
    }

    /// The same of a sequence of `tokens` tokens that has the first `places` blocks of `table`: one token more than it has, so
    /// that it does not stop at once.
    pub(super) fn outstanding_on(&self, table: &Table, places: usize, tokens: usize, group: usize) -> usize {
        let all = (tokens + 1).div_ceil(self.blocks.block_tokens());
        let held = table.blocks(group).take(places).flatten().count();
        // Some of those that it has it may give back before it takes others.
        all.saturating_sub(places).min(self.most_blocks(group, tokens + 1).saturating_sub(held))
    }
}
