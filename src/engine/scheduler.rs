//! Which tokens the next step computes. Pure: no MLX, no threads, no clock of its own.
//!
//! A sequence has known tokens and a count of computed ones that chases them; prompt chunks and single decode
//! tokens are the same thing. A step takes tokens of many sequences: first one of each that decodes, then prompts within
//! a budget, first come, first served. Beside decoding sequences the prompt tokens of a step are a *piece*: either it passes a
//! few layers only, and the steps behind it take it through the others; or it passes them beside the steps, which do not wait for
//! it. A step may be planned on tokens that the step before
//! is still computing; those are then read, and if one ends its sequence the extra step's token is dropped.

mod piece;
mod room;
mod sharing;

use std::ops::Range;
use std::time::{Duration, Instant};

use super::events::FinishReason;
use super::pace::{Pace, Work};
use super::sequence::{SampledToken, Sequence, SequenceId, cancelled};
use crate::cache::blocks::BlockId;
use crate::cache::manager::{BlockCopy, BlockManager, Table};
use crate::cache::snapshots::{SlotCopy, SlotId};
use crate::error::Error;
use crate::text::grammar::TokenMask;
use piece::Piece;

/// A sequence of a lower class that has waited so long is taken as one of the class above.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a step computes.
#[derive(Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Done before anything else, in this order.
    pub copies: Vec<BlockCopy>,
    /// Likewise, of states.
    pub slot_copies: Vec<SlotCopy>,
    /// Tokens of each sequence, in the order of the step's rows.
    pub runs: Vec<Run>,
    /// How many of the runs, the last ones, belong to prompts.
    pub prompt_runs: usize,
    /// The layers that those pass: of [`Limits::layers`]. The other runs pass all of them.
    pub layers: Range<usize>,
    /// Whether they do so beside this step and those behind it. How far they came is then to be told to [`Scheduler::passed`].
    pub beside: bool,
    /// What the prompts cost.
    pub work: Work,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Whose tokens.
    pub sequence: SequenceId,
    /// Which tokens.
    pub input: StepInput,
    /// Position of the first of them in the sequence.
    pub start: usize,
    /// Whether the step samples a token after the last of them; it has then passed all layers.
    pub samples: bool,
    /// The sequence's blocks, group by group.
    pub tables: Vec<Vec<Option<BlockId>>>,
    /// Where its state is, for models that have some.
    pub state: Option<SlotId>,
}

/// Input tokens of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum StepInput {
    /// Token ids known on the host.
    Known(Vec<u32>),
    /// The one token that this sequence's last step sampled and that nobody has read yet.
    Unread,
}

/// What a scheduler keeps to.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Sequences that run at the same time.
    pub sequences: usize,
    /// Prompt tokens of a step.
    pub prefill_chunk: usize,
    /// Layers behind any of which prompt tokens may wait for the next step; 1 if they pass all that the model has at once.
    pub layers: usize,
    /// Whether they may pass them beside steps. No step is then planned before the one before it is read.
    pub beside: bool,
    /// What a step should take while answers are running.
    pub target_latency: Duration,
    /// Blocks that may ever exist in each group.
    pub blocks: Vec<usize>,
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
    /// Steps in which prompt tokens passed some of the layers only.
    pub partial_steps: u64,
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
    /// Sequences that have ended, whose hosts do not know yet.
    ends: Vec<(Sequence, Result<FinishReason, Error>)>,
    /// Prompt tokens that have passed some of the layers.
    piece: Piece,
    pace: Pace,
    counters: Counters,
    /// There will never be more blocks than the limit.
    firm: bool,
    /// Of each group, blocks without which the last plan was smaller than it could have been.
    wanted: Vec<usize>,
    /// Free blocks that there should be besides.
    reserved: Vec<usize>,
    /// Sequences wait for a place that are not here yet.
    others_come: bool,
}

/// What a sequence may take of a step.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Tokens.
    tokens: usize,
    /// Whether they pass all layers in this step.
    whole: bool,
}

/// Why a sequence is not in the plan.
enum Refused {
    /// Nothing to do, or not yet.
    NotNow,
    /// There are not enough blocks for the run in this group.
    NoBlocks(usize),
}

impl Scheduler {
    /// Without sequences; `blocks` has as many blocks as there are now, at most `limits.blocks`.
    pub fn new(limits: Limits, blocks: BlockManager) -> Self {
        let groups = blocks.groups();
        Self {
            pace: Pace::new(limits.target_latency, limits.prefill_chunk, limits.layers, limits.beside),
            piece: Piece::default(),
            limits,
            blocks,
            waiting: Vec::new(),
            running: Vec::new(),
            ends: Vec::new(),
            counters: Counters::default(),
            firm: true,
            wanted: vec![0; groups],
            reserved: vec![0; groups],
            others_come: false,
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

    /// Whether another sequence would begin at once, if there are blocks for it.
    pub fn has_place(&self) -> bool {
        self.running.len() + self.waiting.len() < self.limits.sequences
    }

    /// Whether sequences wait for a place before they are admitted, since their rows come from elsewhere.
    pub fn expect_others(&mut self, others_come: bool) {
        self.others_come = others_come;
    }

    /// Seconds that a token of a prompt of `tokens` takes on average, if one has been computed.
    pub fn seconds_per_token(&self, tokens: usize) -> Option<f64> {
        self.pace.seconds_per_token(tokens)
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        Counters { waiting: self.waiting.len(), running: self.running.len(), ..self.counters }
    }

    /// Whether there is no sequence at all.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Takes their blocks from all sequences; they go on from what is cached, or from the beginning.
    pub fn preempt_all(&mut self) {
        for at in (0..self.running.len()).rev() {
            if self.running[at].table.is_some() {
                self.preempt(at);
            }
        }
    }

    /// Whether no sequence could give up its blocks to another one.
    pub fn is_alone(&self) -> bool {
        self.running.len() <= 1
    }

    /// A step took `seconds`.
    pub fn observe(&mut self, seconds: f64, decodes: bool, work: Work) {
        self.pace.observe(seconds, decodes, work);
    }

    /// A step of answers took `seconds` beside prompts.
    pub fn observe_beside(&mut self, seconds: f64) {
        self.pace.observe_beside(seconds);
    }

    /// How long after a step beside prompts the next one is to begin.
    pub fn pause(&self) -> Duration {
        self.pace.pause()
    }

    /// Something else takes so much of the next step.
    pub fn reserve_time(&mut self, time: Duration) {
        self.pace.reserve(time);
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
        self.wanted.fill(0);
        let mut plan = StepPlan::default();
        // Whoever needs one token only: answers that are running, and prompts that the cache had.
        let mut at = 0;
        while at < self.running.len() {
            let share = Share { tokens: 1, whole: true };
            at += if self.running[at].left() == 1 { self.try_schedule(at, share, &mut plan, ended) } else { 1 };
        }
        let answers = plan.runs.len();
        plan.layers = 0..self.limits.layers;
        if self.piece.beside || answers > 0 && self.pace.measures() {
            plan.work.layers = plan.layers.len();
            return plan;
        }
        if self.piece.runs.is_empty() {
            // Nobody waits for a token, or there is no stop on the way.
            let whole = answers == 0 || self.limits.layers == 1;
            self.add_prompts(whole, now, &mut plan, ended);
            if !whole {
                self.piece = Piece::new(plan.runs.split_off(answers));
            }
        }
        if !self.piece.runs.is_empty() {
            self.pass_layers(answers > 0, &mut plan);
        }
        self.counters.partial_steps += u64::from(plan.layers.len() < self.limits.layers);
        plan.prompt_runs = plan.runs.len() - answers;
        let work = plan.runs[answers..].iter().map(|run| Work::of_run(run.start, run.tokens()));
        plan.work = Work { layers: plan.layers.len(), ..work.fold(Work::default(), Work::and) };
        plan
    }

    /// Adds prompt tokens that begin to pass the layers, as many as may.
    fn add_prompts(&mut self, whole: bool, now: Instant, plan: &mut StepPlan, ended: &mut Vec<SequenceId>) {
        let answers = plan.runs.len();
        let share = |pace: &Pace, plan: &StepPlan, start: usize| {
            let taken = plan.runs[answers..].iter().map(Run::tokens).sum();
            Share { tokens: pace.piece(answers > 0, start).saturating_sub(taken), whole }
        };
        let mut at = 0;
        while at < self.running.len() {
            let share = share(&self.pace, plan, self.running[at].computed);
            let takes = self.running[at].left() > 1 && share.tokens > 0;
            at += if takes { self.try_schedule(at, share, plan, ended) } else { 1 };
        }
        while share(&self.pace, plan, 0).tokens > 0 && self.start_next(now, ended) {
            at = self.running.len() - 1;
            match share(&self.pace, plan, self.running[at].computed) {
                Share { tokens: 0, .. } => break,
                share => self.try_schedule(at, share, plan, ended),
            };
        }
    }

    /// Adds a run of the running sequence `at`, making room for it if need be. Returns how far to go to the next one.
    fn try_schedule(&mut self, at: usize, share: Share, plan: &mut StepPlan, ended: &mut Vec<SequenceId>) -> usize {
        loop {
            let short = match self.schedule(at, share, plan) {
                Ok(run) => {
                    plan.runs.push(run);
                    return 1;
                }
                Err(Refused::NotNow) => return 1,
                Err(Refused::NoBlocks(group)) => group,
            };
            self.wanted[short] += self.limits.prefill_chunk.div_ceil(self.blocks.block_tokens()).max(1);
            // More are coming: a pause of a few steps costs less than computing something again. And what is computed beside the
            // steps needs its blocks until it is through.
            if self.blocks.capacity(short) < self.limits.blocks[short] || self.piece.beside {
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
                // Others may give some back.
                _ if !self.firm => return 1,
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

    fn schedule(&mut self, at: usize, share: Share, plan: &mut StepPlan) -> Result<Run, Refused> {
        // A reader that is far behind makes its own sequence wait, but not the ones behind it.
        let others_wait = self.others_come || !self.waiting.is_empty();
        let sequence = &mut self.running[at];
        let on_its_way = self.piece.runs.iter().any(|run| run.sequence == sequence.id);
        if on_its_way || sequence.sink_is_full() && !others_wait {
            return Err(Refused::NotNow);
        }
        let Some(mut table) = sequence.table.take() else { return Err(Refused::NotNow) };
        let run = self.schedule_on(at, &mut table, share, plan);
        self.running[at].table = Some(table);
        run
    }

    fn schedule_on(&mut self, at: usize, table: &mut Table, share: Share, plan: &mut StepPlan) -> Result<Run, Refused> {
        let sequence = &mut self.running[at];
        let known = sequence.tokens.len();
        let (input, start, end) = if sequence.computed < known {
            let found = self.blocks.find(table, &sequence.tokens, sequence.computed, known - 1);
            self.counters.cached_tokens += sequence.skip_to(found.tokens) as u64;
            if found.more_soon || self.goes_on_as_another(at, plan) {
                return Err(Refused::NotNow);
            }
            let sequence = &self.running[at];
            let (start, end) = (found.tokens, known.min(found.tokens + share.tokens));
            let end = self.next_mark(sequence, start).map_or(end, |mark| end.min(mark));
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
        self.blocks.extend(table, start, end, &mut plan.copies).map_err(|short| Refused::NoBlocks(short.group))?;
        let state = self.place_state(table, start, plan)?;
        self.running[at].tell_start();
        let samples = share.whole && self.complete(at, table, end);
        let tables = (0..self.blocks.groups()).map(|group| table.blocks(group).collect()).collect();
        Ok(Run { sequence: self.running[at].id, input, start, samples, tables, state })
    }

    /// The step that is being planned computes the running sequence `at` up to `end`, in the last layer too: so others may
    /// share its blocks. Whether a token is sampled behind it.
    fn complete(&mut self, at: usize, table: &mut Table, end: usize) -> bool {
        let sequence = &mut self.running[at];
        let (start, prompt) = (sequence.computed, sequence.prompt_len);
        self.counters.prompt_tokens += (end.min(prompt) - start.min(prompt)) as u64;
        let samples = sequence.run_to(end);
        table.complete(end);
        self.blocks.index(table, &sequence.tokens, end);
        let keeps_state = self.blocks.has_states() && sequence.marks.contains(end, self.blocks.block_tokens());
        if end == prompt || keeps_state {
            self.blocks.index_tail(table, &sequence.tokens, end);
        }
        if keeps_state {
            self.blocks.keep_state(table, &sequence.tokens[..end]);
        }
        samples
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
        let found = self.blocks.find(&mut table, &sequence.tokens, 0, sequence.tokens.len() - 1);
        let whole = found.tokens / self.blocks.block_tokens();
        let length = sequence.tokens.len();
        let missing = |group: usize| {
            let others: usize = self.running.iter().map(|other| self.outstanding(other, group)).sum();
            let missing = self.outstanding_on(&table, whole, length, group) + others;
            missing.saturating_sub(self.blocks.available(group))
        };
        let missing: Vec<usize> = (0..self.blocks.groups()).map(missing).collect();
        let short = missing.iter().any(|&missing| missing > 0);
        if short {
            self.blocks.release(table);
            self.wanted.iter_mut().zip(&missing).for_each(|(wanted, missing)| *wanted += missing);
            let mut groups = 0..self.blocks.groups();
            if groups.any(|group| self.most_blocks(group, length + 1) > self.limits.blocks[group]) {
                let sequence = self.waiting.remove(next);
                ended.push(sequence.id);
                let end = self.too_long(&sequence);
                self.finish(sequence, end);
                return self.start_next(now, ended);
            }
            // Everything may run that has all there is.
            let grows = |group: usize| missing[group] > 0 && self.blocks.capacity(group) < self.limits.blocks[group];
            if !self.running.is_empty() || (0..missing.len()).any(grows) {
                return false;
            }
            table = self.blocks.table();
        }
        let mut sequence = self.waiting.remove(next);
        let block_tokens = self.blocks.block_tokens();
        if self.blocks.has_states() && found.rows > found.tokens + block_tokens {
            sequence.marks.branch(found.rows, block_tokens);
        }
        let hit = if short { 0 } else { found.tokens };
        self.counters.cached_tokens += sequence.skip_to(hit) as u64;
        sequence.table = Some(table);
        sequence.ticket = None;
        self.running.push(sequence);
        true
    }

    /// Takes the blocks of a running sequence, which waits until there is room again. What it has computed stays cached
    /// as long as nobody needs the blocks.
    fn preempt(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        self.give_back(&mut sequence);
        sequence.computed = 0;
        self.counters.preemptions += 1;
        self.waiting.push(sequence);
    }

    /// The tokens that may come next in a sequence that samples in the last plan; `None` if all may.
    pub fn mask(&mut self, id: SequenceId) -> Option<TokenMask> {
        self.running.iter_mut().find(|sequence| sequence.id == id)?.mask()
    }

    /// Whether a mask is to be asked for, for some sequence that samples in `plan`.
    pub fn guides(&self, plan: &StepPlan) -> bool {
        let guided = |run: &Run| self.running.iter().any(|s| s.id == run.sequence && s.is_guided());
        self.waits_for_masks(plan) || plan.runs.iter().any(|run| run.samples && guided(run))
    }

    /// Whether such a mask depends on a token that has not been read: then the step before is to be committed first.
    pub fn waits_for_masks(&self, plan: &StepPlan) -> bool {
        let waits = |run: &Run| self.running.iter().any(|s| s.id == run.sequence && s.depends_on_unread());
        plan.runs.iter().any(|run| run.samples && run.input == StepInput::Unread && waits(run))
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
        self.piece = Piece::default();
        let ids = running.iter().map(|sequence| sequence.id).collect();
        for mut sequence in running {
            if let Some(table) = sequence.table.take() {
                self.blocks.release(table);
            }
            self.ends.push((sequence, Err(error.clone())));
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
        self.give_back(&mut sequence);
        self.ends.push((sequence, end));
    }

    /// Tells hosts of the tokens that were committed since it was last called: once for all of a step, so that a host with one
    /// thread for many requests is not woken for each.
    pub fn tell_tokens(&mut self) {
        let waiting = self.waiting.iter().filter(|sequence| sequence.completion_len() > 0);
        self.running.iter().chain(waiting).for_each(Sequence::tell);
    }

    /// Tells hosts of the sequences that have ended. Apart from their ending, so that whoever hears of it finds it in the
    /// counters.
    pub fn tell_ends(&mut self) {
        self.ends.drain(..).for_each(|(sequence, end)| sequence.finish(end));
    }

    /// Releases the blocks of a sequence that no longer runs; what it has computed in all layers stays cached.
    fn give_back(&mut self, sequence: &mut Sequence) {
        self.piece.runs.retain(|run| run.sequence != sequence.id);
        if let Some(mut table) = sequence.table.take() {
            self.blocks.index_tail(&mut table, &sequence.tokens, sequence.computed);
            if let Some(computed) = sequence.tokens.get(..sequence.computed) {
                self.blocks.keep_state(&table, computed);
            }
            self.blocks.release(table);
        }
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
