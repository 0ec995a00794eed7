//! Which tokens the next step computes. Pure: no MLX, no threads, no clock of its own.
//!
//! A sequence has known tokens and a count of computed ones that chases them; prompt chunks and single decode
//! tokens are the same thing. A step takes tokens of many sequences: first one of each that decodes, then prompts within
//! a budget, first come, first served. A step may be planned on tokens that the step before is still computing; those are
//! then read, and if one ends its sequence the extra step's token is dropped.

use std::time::{Duration, Instant};

use super::events::FinishReason;
use super::pace::Pace;
use super::sequence::{SampledToken, Sequence, SequenceId, cancelled};
use crate::cache::blocks::BlockId;
use crate::cache::manager::{BlockCopy, BlockManager, Table};
use crate::error::{Error, Status};

/// A sequence of a lower class that has waited so long is taken as one of the class above.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a step computes.
#[derive(Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Done before anything else, in this order.
    pub copies: Vec<BlockCopy>,
    /// Tokens of each sequence, in the order of the step's rows.
    pub runs: Vec<Run>,
    /// How many of the runs belong to prompts, and the tokens of those.
    pub prompt_runs: usize,
    /// See `prompt_runs`.
    pub prompt_tokens: usize,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, PartialEq)]
pub struct Run {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Which tokens.
    pub input: StepInput,
    /// Position of the first of them in the sequence.
    pub start: usize,
    /// Whether the step samples a token after the last of them.
    pub samples: bool,
    /// The sequence's blocks, group by group.
    pub tables: Vec<Vec<Option<BlockId>>>,
}

/// Input tokens of a run.
#[derive(Debug, PartialEq)]
pub enum StepInput {
    /// Token ids known on the host.
    Known(Vec<u32>),
    /// The one token that this sequence's last step sampled and that nobody has read yet.
    Unread,
}

/// What a scheduler keeps to.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Sequences that run at the same time.
    pub sequences: usize,
    /// Prompt tokens of a step.
    pub prefill_chunk: usize,
    /// What a step should take while answers are running.
    pub target_latency: Duration,
    /// Blocks that may ever exist in a group.
    pub blocks: usize,
}

/// What has happened since the start, and how things stand.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counters {
    /// Sequences that wait, and that run.
    pub waiting: usize,
    /// See `waiting`.
    pub running: usize,
    /// Tokens of prompts computed, those computed again after a preemption included.
    pub prompt_tokens: u64,
    /// Prompt tokens that were in the cache instead.
    pub cached_tokens: u64,
    /// Tokens sampled and read.
    pub completion_tokens: u64,
    /// Sequences that had to give their blocks to others for a while.
    pub preemptions: u64,
}

/// Owns all sequences and blocks of an engine.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    waiting: Vec<Sequence>,
    /// In the order in which they began.
    running: Vec<Sequence>,
    pace: Pace,
    counters: Counters,
    /// Blocks without which the last plan was smaller than it could have been.
    wanted: usize,
    /// Free blocks that there should be besides.
    reserved: usize,
}

/// Why a sequence is not in the plan.
enum Refused {
    /// Nothing to do, or not yet.
    NotNow,
    /// There are not enough blocks for the run.
    NoBlocks,
}

impl Scheduler {
    /// Without sequences; `blocks` has as many blocks as there are now, at most `limits.blocks`.
    pub fn new(limits: Limits, blocks: BlockManager) -> Self {
        Self {
            pace: Pace::new(limits.target_latency, limits.prefill_chunk),
            limits,
            blocks,
            waiting: Vec::new(),
            running: Vec::new(),
            counters: Counters::default(),
            wanted: 0,
            reserved: 0,
        }
    }

    /// Queues a sequence.
    pub fn admit(&mut self, sequence: Sequence) {
        self.waiting.push(sequence);
    }

    /// The blocks, for statistics and for what hosts ask of the cache.
    pub fn blocks(&mut self) -> &mut BlockManager {
        &mut self.blocks
    }

    /// Blocks that may ever exist in a group.
    pub fn blocks_limit(&self) -> usize {
        self.limits.blocks
    }

    /// Whether another sequence would begin at once, if there are blocks for it.
    pub fn has_place(&self) -> bool {
        self.running.len() + self.waiting.len() < self.limits.sequences
    }

    /// So many blocks should be free for rows that come from elsewhere.
    pub fn reserve(&mut self, blocks: usize) {
        self.reserved = blocks;
    }

    /// Seconds that a prompt token takes, if one has been computed.
    pub fn seconds_per_token(&self) -> Option<f64> {
        self.pace.seconds_per_token()
    }

    /// No more blocks than this can be had.
    pub fn limit_blocks(&mut self, blocks: usize) {
        self.limits.blocks = blocks;
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        Counters { waiting: self.waiting.len(), running: self.running.len(), ..self.counters }
    }

    /// Whether there is no sequence at all.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// The number of blocks that there should be: more than there are if sequences wait for some, or if cached ones had
    /// to go although more may exist.
    pub fn wanted_blocks(&self) -> usize {
        let capacity = self.blocks.capacity(0);
        let free = self.blocks.counts(0).free;
        let spare = self.limits.prefill_chunk.div_ceil(self.blocks.block_tokens()) + self.running.len();
        let reserved = self.reserved.saturating_sub(free);
        if self.wanted == 0 && reserved == 0 && (free >= spare || self.is_idle()) {
            return capacity;
        }
        (capacity + self.wanted.max(spare).max(reserved)).max(capacity * 2).min(self.limits.blocks).max(capacity)
    }

    /// A step took `seconds`.
    pub fn observe(&mut self, seconds: f64, decodes: bool, prompt_tokens: usize) {
        self.pace.observe(seconds, decodes, prompt_tokens);
    }

    /// Ends cancelled sequences; returns all that have ended so.
    pub fn reap_cancelled(&mut self) -> Vec<SequenceId> {
        let gone = |sequence: &mut Sequence| sequence.is_cancelled();
        let gone: Vec<Sequence> = self.waiting.extract_if(.., gone).chain(self.running.extract_if(.., gone)).collect();
        let ids = gone.iter().map(|sequence| sequence.id).collect();
        for sequence in gone {
            self.finish(sequence, Err(cancelled()));
        }
        ids
    }

    /// The next step; one without runs if there is nothing to compute now. Sequences that can never run have ended then,
    /// and are added to `ended`.
    pub fn plan(&mut self, now: Instant, ended: &mut Vec<SequenceId>) -> StepPlan {
        self.blocks.next_step();
        self.wanted = 0;
        let mut plan = StepPlan::default();
        // Whoever needs one token only: answers that are running, and prompts that the cache had.
        let mut at = 0;
        while at < self.running.len() {
            at += if self.running[at].left() == 1 { self.try_schedule(at, 1, &mut plan, ended) } else { 1 };
        }
        let most = self.pace.budget(!plan.runs.is_empty());
        let decoding = plan.runs.len();
        let budget = |plan: &StepPlan| most.saturating_sub(plan.runs[decoding..].iter().map(Run::tokens).sum());
        at = 0;
        while at < self.running.len() && budget(&plan) > 0 {
            at += if self.running[at].left() > 1 { self.try_schedule(at, budget(&plan), &mut plan, ended) } else { 1 };
        }
        while budget(&plan) > 0 && self.start_next(now, ended) {
            self.try_schedule(self.running.len() - 1, budget(&plan), &mut plan, ended);
        }
        plan.prompt_runs = plan.runs.len() - decoding;
        plan.prompt_tokens = most - budget(&plan);
        plan
    }

    /// Adds a run of the running sequence `at`, making room for it if need be. Returns how far to go to the next one.
    fn try_schedule(&mut self, at: usize, budget: usize, plan: &mut StepPlan, ended: &mut Vec<SequenceId>) -> usize {
        loop {
            match self.schedule(at, budget, plan) {
                Ok(run) => {
                    plan.runs.push(run);
                    return 1;
                }
                Err(Refused::NotNow) => return 1,
                Err(Refused::NoBlocks) => {}
            }
            self.wanted += self.limits.prefill_chunk.div_ceil(self.blocks.block_tokens()).max(1);
            if self.blocks.capacity(0) < self.limits.blocks {
                // More are coming: a pause of a few steps costs less than computing something again.
                return 1;
            }
            // The last to have begun gives up its blocks, unless this step needs them.
            let planned = |sequence: &Sequence| plan.runs.iter().any(|run| run.sequence == sequence.id);
            match self.running.iter().rposition(|sequence| !planned(sequence) && sequence.table.is_some()) {
                Some(victim) if victim > at => self.preempt(victim),
                Some(_) if self.running.len() > 1 => {
                    self.preempt(at);
                    return 0;
                }
                // Alone: there is nothing more to be had.
                _ => {
                    let sequence = self.running.remove(at);
                    ended.push(sequence.id);
                    let end = self.too_long(&sequence);
                    self.finish(sequence, end);
                    return 0;
                }
            }
        }
    }

    /// The end of a sequence that all blocks together do not hold: an answer ends there, a prompt has no answer.
    fn too_long(&self, sequence: &Sequence) -> Result<FinishReason, Error> {
        if sequence.completion_len() > 0 {
            return Ok(FinishReason::Length);
        }
        let (needed, tokens) = (sequence.tokens.len() + 1, self.limits.blocks * self.blocks.block_tokens());
        let what = format!("{needed} tokens do not fit the KV cache, whose limit is {tokens} tokens");
        Err(Error::new(Status::OutOfMemory, what))
    }

    fn schedule(&mut self, at: usize, budget: usize, plan: &mut StepPlan) -> Result<Run, Refused> {
        // A reader that is far behind makes its own sequence wait, but not the ones behind it.
        let others_wait = !self.waiting.is_empty();
        let sequence = &mut self.running[at];
        if sequence.sink_is_full() && !others_wait {
            return Err(Refused::NotNow);
        }
        let Some(mut table) = sequence.table.take() else { return Err(Refused::NotNow) };
        let run = self.schedule_on(at, &mut table, budget, &mut plan.copies);
        self.running[at].table = Some(table);
        run
    }

    fn schedule_on(
        &mut self,
        at: usize,
        table: &mut Table,
        budget: usize,
        copies: &mut Vec<BlockCopy>,
    ) -> Result<Run, Refused> {
        let sequence = &mut self.running[at];
        let known = sequence.tokens.len();
        let (input, start, end) = if sequence.computed < known {
            let found = self.blocks.find(table, &sequence.tokens, sequence.computed, known - 1);
            self.counters.cached_tokens += sequence.skip_to(found.tokens) as u64;
            if found.more_soon {
                return Err(Refused::NotNow);
            }
            let (start, end) = (found.tokens, known.min(found.tokens + budget));
            (StepInput::Known(sequence.tokens[start..end].to_vec()), start, end)
        } else {
            // All known tokens are computed: go on from the newest sampled one, if the answer may be longer.
            let start = sequence.computed;
            let generated = sequence.completion_len() + sequence.unread;
            if sequence.unread == 0 || start >= known + sequence.unread || generated >= sequence.max_tokens {
                return Err(Refused::NotNow);
            }
            (StepInput::Unread, start, start + 1)
        };
        self.blocks.extend(table, start, end, copies).map_err(|_| Refused::NoBlocks)?;
        let prompt = sequence.prompt_len;
        self.counters.prompt_tokens += (end.min(prompt) - start.min(prompt)) as u64;
        let samples = sequence.run_to(end);
        self.blocks.index(table, &sequence.tokens, end);
        if end == prompt {
            self.blocks.index_tail(table, &sequence.tokens, end);
        }
        let tables = (0..self.blocks.groups()).map(|group| table.blocks(group).collect()).collect();
        Ok(Run { sequence: sequence.id, input, start, samples, tables })
    }

    /// Lets the next waiting sequence run, if there is room for it.
    fn start_next(&mut self, now: Instant, ended: &mut Vec<SequenceId>) -> bool {
        if self.running.len() >= self.limits.sequences {
            return false;
        }
        // What a step has sampled and nobody has read cannot be computed again.
        let ready = self.waiting.iter().enumerate().filter(|(_, sequence)| sequence.unread == 0);
        let rank = |sequence: &Sequence| {
            let waited = now.saturating_duration_since(sequence.queued).as_secs() / PATIENCE.as_secs();
            ((sequence.priority as u64).saturating_sub(waited), sequence.id)
        };
        let Some(next) = ready.min_by_key(|(_, sequence)| rank(sequence)).map(|(at, _)| at) else { return false };
        let mut table = self.blocks.table();
        let sequence = &self.waiting[next];
        let blocks_of = |tokens: usize| tokens.div_ceil(self.blocks.block_tokens());
        // One token more than it has, so that it does not stop at once.
        let needed = blocks_of(sequence.tokens.len() + 1);
        let found = self.blocks.find(&mut table, &sequence.tokens, 0, sequence.tokens.len() - 1);
        let reserved: usize = self.running.iter().map(|other| self.outstanding(other)).sum();
        let missing = (needed + reserved).saturating_sub(found.tokens / self.blocks.block_tokens());
        let (available, capacity) = (self.blocks.available(), self.blocks.capacity(0));
        if missing > available {
            self.blocks.release(table);
            self.wanted += missing - available;
            if needed > self.limits.blocks {
                let sequence = self.waiting.remove(next);
                ended.push(sequence.id);
                let end = self.too_long(&sequence);
                self.finish(sequence, end);
                return self.start_next(now, ended);
            }
            // Everything may run that has all there is.
            if !self.running.is_empty() || capacity < self.limits.blocks {
                return false;
            }
            table = self.blocks.table();
        }
        let mut sequence = self.waiting.remove(next);
        let hit = if missing > available { 0 } else { found.tokens };
        self.counters.cached_tokens += sequence.skip_to(hit) as u64;
        sequence.table = Some(table);
        sequence.ticket = None;
        self.running.push(sequence);
        true
    }

    /// Blocks that a running sequence still needs for the tokens it has.
    fn outstanding(&self, sequence: &Sequence) -> usize {
        let has = sequence.table.as_ref().map_or(0, Table::places);
        (sequence.tokens.len() + 1).div_ceil(self.blocks.block_tokens()).saturating_sub(has)
    }

    /// Takes the blocks of a running sequence, which waits until there is room again. What it has computed stays cached
    /// as long as nobody needs the blocks.
    fn preempt(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        if let Some(mut table) = sequence.table.take() {
            self.blocks.index_tail(&mut table, &sequence.tokens, sequence.computed);
            self.blocks.release(table);
        }
        sequence.computed = 0;
        self.counters.preemptions += 1;
        self.waiting.push(sequence);
    }

    /// Takes a token read from the device; returns the sequence if it ended.
    ///
    /// The token of a sequence that has ended meanwhile is dropped.
    pub fn commit(&mut self, id: SequenceId, sampled: SampledToken, now: Instant) -> Option<SequenceId> {
        let all = self.running.iter_mut().chain(&mut self.waiting);
        let sequence = all.into_iter().find(|sequence| sequence.id == id)?;
        self.counters.completion_tokens += 1;
        let end = match sequence.accept(sampled, now) {
            Ok(None) => {
                if let Some(table) = &mut sequence.table {
                    self.blocks.index(table, &sequence.tokens, sequence.computed);
                }
                return None;
            }
            Ok(Some(reason)) => Ok(reason),
            Err(error) => Err(error),
        };
        let place = |sequences: &[Sequence]| sequences.iter().position(|sequence| sequence.id == id);
        let sequence = match place(&self.running) {
            Some(at) => self.running.remove(at),
            None => self.waiting.remove(place(&self.waiting)?),
        };
        self.finish(sequence, end);
        Some(id)
    }

    /// A step failed: ends all running sequences, whose rows may be anything, and forgets what is cached.
    pub fn fail_running(&mut self, error: &Error) -> Vec<SequenceId> {
        let running = std::mem::take(&mut self.running);
        let ids = running.iter().map(|sequence| sequence.id).collect();
        for mut sequence in running {
            if let Some(table) = sequence.table.take() {
                self.blocks.release(table);
            }
            sequence.finish(Err(error.clone()));
        }
        self.blocks.clear();
        ids
    }

    /// Ends everything with `error`, and forgets what is cached.
    pub fn fail_all(&mut self, error: &Error) {
        self.fail_running(error);
        self.end_all(error);
    }

    /// Ends everything with `error`; what has been computed stays cached.
    pub fn end_all(&mut self, error: &Error) {
        let all: Vec<Sequence> = self.running.drain(..).chain(self.waiting.drain(..)).collect();
        all.into_iter().for_each(|sequence| self.finish(sequence, Err(error.clone())));
    }

    fn finish(&mut self, mut sequence: Sequence, end: Result<FinishReason, Error>) {
        if let Some(mut table) = sequence.table.take() {
            self.blocks.index_tail(&mut table, &sequence.tokens, sequence.computed);
            self.blocks.release(table);
        }
        sequence.finish(end);
    }
}

impl Run {
    /// How many tokens.
    pub fn tokens(&self) -> usize {
        match &self.input {
            StepInput::Known(tokens) => tokens.len(),
            StepInput::Unread => 1,
        }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
