//! The worker's exchange of rows with other tiers: what leaves the pools is saved, what a request needs is brought back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::super::identity::ModelIdentity;
use super::super::restore::{Restored, Then, Wait, whole_blocks};
use super::super::tiers::{CROWDED, Has, InPools, ModelTiers, SPAN_TOKENS, Stop, TierGroup, Whereabouts};
use super::{CacheCommand, Worker};
use crate::cache::Save;
use crate::error::{Error, Result};
use crate::kernels;

/// Rows are saved for this long at most when an engine ends.
pub(super) const LAST_SAVES: Duration = Duration::from_secs(10);

/// What is to be saved although nothing has to leave the pools.
#[derive(Debug, Default)]
pub(super) struct Saving {
    /// Everything, bit by bit, until nothing is left.
    pub(super) all: bool,
    /// Who is to be told then.
    answers: Vec<Sender<bool>>,
    /// Something was lost since the last answer.
    lost: bool,
}

impl Saving {
    /// It is over, or cannot be done.
    fn answer(&mut self, kept: bool) {
        self.all = false;
        self.lost = false;
        // Whoever asked may have gone.
        for answer in self.answers.drain(..) {
            let _ = answer.send(kept);
        }
    }
}

impl Worker<'_> {
    /// Errors only for defects.
    pub(super) fn handle_cache(&mut self, command: CacheCommand) -> Result<()> {
        let blocks = self.scheduler.blocks();
        // What the steps on their way write is there for any later one.
        blocks.next_step();
        // Whoever asked may have gone.
        match command {
            CacheCommand::Clear(answer) => {
                let (blocks, slots) = blocks.clear();
                let rows: usize = blocks.into_iter().zip(&self.block_bytes).map(|(blocks, bytes)| blocks * bytes).sum();
                let _ = answer.send(rows + slots * self.runner.states().slot_bytes());
            }
            CacheCommand::Pin(tokens, answer) => {
                let _ = answer.send(self.pin(&tokens)?);
                self.tiers.iter().for_each(|tiers| tiers.pin(&tokens, true));
            }
            CacheCommand::Unpin(tokens, answer) => {
                let pinned = blocks.unpin(&tokens);
                self.tiers.iter().for_each(|tiers| tiers.pin(&tokens, false));
                let _ = answer.send(pinned);
            }
            CacheCommand::Save(answer) => {
                self.saving.all = true;
                self.saving.answers.push(answer);
            }
            CacheCommand::Release(answer) => {
                let freed = self.give_back().unwrap_or_else(|error| {
                    tracing::warn!(model = self.options.id, %error, "no memory could be given back");
                    0
                });
                let _ = answer.send(freed);
            }
            CacheCommand::Prefetch(tokens, answer) => self.bring(tokens.into(), Then::Tell(answer))?,
            CacheCommand::Find(tokens, answer) => {
                let tokens = &tokens[..tokens.len().saturating_sub(1)];
                let (has, others) = (Has::of(blocks, tokens), blocks.goes_on_after(tokens));
                let token_seconds = self.scheduler.seconds_per_token(tokens.len());
                let pools = InPools { has, others, token_seconds };
                let moving = self.restores.moving();
                let found = self.tiers.as_ref().map(|tiers| tiers.whereabouts(tokens, &pools, moving));
                let mut found = found.unwrap_or_else(|| Whereabouts::in_pools(tokens.len(), &pools));
                if found.missing > 0 && self.unidentified {
                    found.stopped_by = Stop::NotIdentified;
                }
                let _ = answer.send(found);
            }
        }
        Ok(())
    }

    /// Pins what the pools have of `tokens`: of how many of them.
    fn pin(&mut self, tokens: &[u32]) -> Result<usize> {
        let pinned = self.scheduler.blocks().pin(tokens);
        // Where there were too few slots for another pinned state, there may be more now.
        Ok(if self.grow_states()? { self.scheduler.blocks().pin(tokens) } else { pinned })
    }

    /// From now on rows come from other tiers and go there.
    pub(super) fn identified(&mut self, identified: Result<([u8; 32], ModelIdentity)>) -> Result<()> {
        self.unidentified = false;
        let states = self.runner.states();
        let has_states = !states.is_empty();
        let states = states.row_layout().map(|layout| TierGroup { kind: None, layout });
        let pages = self.runner.pages();
        let group = |(group, &kind)| Some(TierGroup { kind: Some(kind), layout: pages.row_layout(group)? });
        let groups: Option<Vec<_>> = pages.layout().groups.iter().enumerate().map(group).collect();
        let groups = groups.filter(|_| has_states == states.is_some());
        let groups = groups.map(|groups| groups.into_iter().chain(states).collect());
        let known = identified.and_then(|(fingerprint, identity)| {
            identity.check()?;
            let groups = groups.ok_or_else(|| Error::unsupported("rows of this number format stay in the pools"))?;
            self.options.tiers.model(&self.options.id, fingerprint, pages.block_tokens(), groups)
        });
        match known {
            Ok(tiers) => {
                self.scheduler.blocks().save_in_runs_of(SPAN_TOKENS);
                let pins = tiers.pins();
                self.tiers = Some(tiers);
                self.bring_waiting()?;
                pins.into_iter().try_for_each(|tokens| self.bring(tokens, Then::Pin))?;
            }
            Err(error) => {
                tracing::warn!(model = self.options.id, %error, "only the pools cache");
                self.saving.answer(false);
                self.bring_waiting()?;
            }
        }
        Ok(())
    }

    /// Whether the model may soon be identified, and rows of it found that are not to be computed meanwhile.
    fn is_identifying(&self) -> bool {
        self.unidentified && self.identifying.is_some_and(|until| Instant::now() < until)
    }

    /// Looks for the rows of what has waited until the model is identified.
    fn bring_waiting(&mut self) -> Result<()> {
        self.restores.take_all().into_iter().try_for_each(|(tokens, then)| self.bring(tokens, then))
    }

    /// Gets what other tiers have of `tokens`, if that is faster than to compute it, and then goes on.
    pub(super) fn bring(&mut self, tokens: Arc<[u32]>, then: Then) -> Result<()> {
        if self.is_identifying() {
            self.restores.begin(tokens, 0, Vec::new(), then);
            return Ok(());
        }
        let blocks = self.scheduler.blocks();
        // The last token is computed in any case.
        let limit = tokens.len().saturating_sub(1);
        // What the steps on their way write is there for any later one.
        blocks.next_step();
        let has = Has::of(blocks, &tokens[..limit]);
        let pool = has.tokens;
        let token_seconds = self.scheduler.seconds_per_token(tokens.len());
        let moving = self.restores.moving();
        let mut fetches = self.tiers.as_ref().map(|tiers| tiers.find(&tokens[..limit], &has, token_seconds, moving));
        // The pools have the end as well.
        fetches.iter_mut().filter(|fetches| fetches.iter().all(|fetch| fetch.end() <= pool)).for_each(Vec::clear);
        match fetches {
            Some(fetches) if !fetches.is_empty() || !self.restores.is_empty() => {
                let from = whole_blocks(&has, &fetches, self.scheduler.blocks().block_tokens());
                self.restores.begin(tokens, from, fetches, then);
                Ok(())
            }
            _ => self.restored((tokens, then, pool)),
        }
    }

    fn restored(&mut self, (tokens, then, reached): Restored) -> Result<()> {
        match then {
            Then::Run(sequences) => sequences.into_iter().for_each(|sequence| self.scheduler.admit(sequence)),
            Then::Tell(answer) => {
                let _ = answer.send(reached);
            }
            Then::Pin => {
                self.scheduler.blocks().next_step();
                self.pin(&tokens)?;
            }
        }
        Ok(())
    }

    /// Moves rows that have come from other tiers into the pools: between two steps a single span, so that running
    /// answers hardly notice.
    pub(super) fn restore(&mut self) -> Result<()> {
        for cancelled in self.restores.take_cancelled(&mut self.scheduler) {
            self.restored(cancelled)?;
        }
        if self.tiers.is_none() && !self.is_identifying() {
            self.bring_waiting()?;
        }
        self.scheduler.expect_others(self.restores.have_sequences());
        loop {
            let Some(tiers) = &self.tiers else { return Ok(()) };
            self.restores.ask(tiers, &mut self.scheduler, self.myself);
            let waits = self.restores.waits_for(&mut self.scheduler);
            let goes_on = waits == Wait::Nothing;
            let none = vec![0; self.block_bytes.len()];
            self.scheduler.reserve_blocks(if let Wait::Blocks(blocks) = waits { blocks } else { none });
            if !goes_on || !self.settle()? {
                return Ok(());
            }
            self.restores.make_room(&mut self.scheduler);
            if !self.save_evicted()? {
                return Ok(());
            }
            let most = if self.stepping { 1 } else { usize::MAX };
            if let Some(restored) = self.restores.place(&mut self.runner, &mut self.scheduler, most)? {
                self.restored(restored)?;
            }
            if self.stepping {
                return Ok(());
            }
        }
    }

    pub(super) fn end_restores(&mut self) {
        for (_, then, _) in self.restores.end(&mut self.scheduler) {
            if let Then::Run(sequences) = then {
                sequences.into_iter().for_each(|sequence| self.scheduler.admit(sequence));
            }
        }
    }

    /// Waits for the step on its way, if there is one, and has prompts beside the steps stop. Whether all is well: otherwise the
    /// sequences have ended.
    pub(super) fn settle(&mut self) -> Result<bool> {
        let waited = self.in_flight.as_ref().map_or(Ok(()), |(step, _)| step.wait());
        let stopped = self.runner.stop_beside();
        match kernels::check().and(waited).and(stopped) {
            Ok(()) => {
                self.note_stop();
                Ok(true)
            }
            Err(error) => self.fail(error).map(|()| false),
        }
    }

    /// Saves what has been evicted, before anything else is written there. Whether all is well, as in `settle`.
    pub(super) fn save_evicted(&mut self) -> Result<bool> {
        let evicted = self.scheduler.blocks().take_evicted();
        if !evicted.is_empty() && !self.settle()? {
            return Ok(false);
        }
        evicted.into_iter().for_each(|save| self.save(save));
        Ok(true)
    }

    /// Hands rows to the other tiers. A step that writes them must not be on its way.
    fn save(&mut self, save: Save) {
        let Some(tiers) = &self.tiers else { return };
        let mut rows = tiers.buffer(&save);
        let token_seconds = self.scheduler.seconds_per_token(save.tokens.len()).unwrap_or_default();
        // Without a state everything before it is computed again, too.
        let tokens = if rows.layout().is_state() { save.tokens.len() } else { rows.tokens() };
        let read = self.runner.read_rows(&save, &mut rows);
        let saved = read.map(|()| tiers.save(save, rows, tokens as f64 * token_seconds));
        match saved {
            Ok(saved) => self.saving.lost |= !saved,
            Err(error) => {
                tracing::warn!(model = self.options.id, %error, "cached rows are lost");
                self.saving.lost = true;
            }
        }
    }

    /// Saves what need not leave the pools yet, as far as the options or a host ask for it: a span between two steps, more
    /// when `idle`.
    pub(super) fn save_ahead(&mut self, idle: bool) {
        let Some(tiers) = &self.tiers else {
            if !self.unidentified {
                self.saving.answer(false);
            }
            return;
        };
        if !self.saving.all && !tiers.write_through() {
            return;
        }
        let blocks = self.scheduler.blocks();
        if idle {
            blocks.next_step();
        }
        for _ in 0..if idle { 8 } else { 1 } {
            if !self.tiers.as_ref().is_some_and(ModelTiers::has_room) {
                return;
            }
            match self.scheduler.blocks().next_save() {
                Some(save) => self.save(save),
                None if self.saving.all && !self.tiers.as_ref().is_none_or(ModelTiers::write_dirty) => return,
                None => {
                    let kept = !self.saving.lost;
                    return self.saving.answer(kept);
                }
            }
        }
    }

    /// Saves everything, for a while, and waits until it is written.
    pub(super) fn save_at_the_end(&mut self) {
        let deadline = Instant::now() + LAST_SAVES;
        if self.tiers.is_none() || !self.settle().unwrap_or(false) {
            return;
        }
        self.save_for(LAST_SAVES);
        if let Some(tiers) = &self.tiers {
            let written = tiers.flush(deadline.saturating_duration_since(Instant::now()));
            if self.saving.lost || !written || self.scheduler.blocks().unsaved() > 0 {
                tracing::warn!(model = self.options.id, "not all cached rows could be written before the end");
            }
        }
    }

    /// Hands over everything that has not been saved, as far as that goes in `time`. No step may be on its way.
    pub(super) fn save_for(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        self.scheduler.blocks().next_step();
        while self.tiers.is_some() && Instant::now() < deadline {
            if !self.tiers.as_ref().is_some_and(ModelTiers::has_room) {
                std::thread::sleep(CROWDED);
                continue;
            }
            let Some(save) = self.scheduler.blocks().next_save() else { break };
            self.save(save);
        }
    }
}
