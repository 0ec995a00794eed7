//! How large the pools are: they grow when blocks are short and there is memory, and shrink when nobody needs it.

use std::time::{Duration, Instant};

use super::super::memory::Denied;
use super::exchange::LAST_SAVES;
use super::{PAUSED, Worker};
use crate::cache::snapshots::Snapshots;
use crate::error::Result;
use crate::fault;
use crate::kernels;

/// What it costs to make the pools larger.
#[derive(Debug, Default)]
pub(super) struct Growth {
    /// How long it took in this turn.
    pub(super) turn: Duration,
    /// Seconds for each byte that there was, as of the last turn with any.
    byte: f64,
}

impl Worker<'_> {
    /// Bytes of the cache: the pools, and the slots of states that are there for snapshots.
    pub(super) fn cache_bytes(&mut self) -> usize {
        let slots = self.runner.states().slots();
        self.runner.pages().bytes() + self.snapshot_bytes(slots)
    }

    /// The part of the cache in `slots` slots of states; those that sequences need at the same time count as workspace.
    fn snapshot_bytes(&mut self, slots: usize) -> usize {
        let reserve = Snapshots::reserve(self.options.max_sequences);
        slots.saturating_sub(reserve) * self.runner.states().slot_bytes()
    }

    /// Makes more slots if snapshots had to go for want of some and there is memory. All that there are move, which running
    /// answers wait for: so there are half as many more each time. Whether there are more.
    pub(super) fn grow_states(&mut self) -> Result<bool> {
        let Some(snapshots) = self.scheduler.blocks().snapshots() else { return Ok(false) };
        let (wanted, capacity) = (snapshots.wanted(), snapshots.capacity());
        // Pools on their way have memory that they do not take yet.
        if wanted == capacity || self.runner.pages().is_resizing() {
            return Ok(false);
        }
        let more = self.snapshot_bytes(wanted) - self.snapshot_bytes(capacity);
        let bytes = self.cache_bytes() + more + self.runner.states().largest();
        let granted = self.memory.grow(bytes as u64);
        if granted && !self.settle()? {
            return Ok(false);
        }
        let started = Instant::now();
        let outcome = if granted { self.runner.states().resize(wanted) } else { Ok(()) };
        self.growth.turn += started.elapsed();
        if let Err(error) = outcome {
            tracing::warn!(model = self.options.id, %error, "no memory for more states");
            let _ = kernels::check();
        }
        let slots = self.runner.states().slots();
        self.scheduler.blocks().snapshots().into_iter().for_each(|snapshots| snapshots.grow(slots));
        let bytes = self.cache_bytes() as u64;
        self.memory.has(bytes);
        Ok(slots > capacity)
    }

    /// Gives back slots behind the last one that holds something. No step may be on its way.
    fn shrink_states(&mut self) -> Result<()> {
        let Some(snapshots) = self.scheduler.blocks().snapshots() else { return Ok(()) };
        let slots = snapshots.shrink();
        if slots < self.runner.states().slots() {
            self.runner.states().resize(slots)?;
        }
        Ok(())
    }

    /// Makes the pools as large as the scheduler wants them and there is memory for, a part a turn, because running answers
    /// wait for it, and whatever hosts ask for; whether they grew or are going to.
    pub(super) fn resize(&mut self) -> Result<bool> {
        let wanted = self.affordable_blocks();
        let beside = self.runner.layers_beside();
        let pages = self.runner.pages();
        self.growth.turn = Duration::ZERO;
        let begins = !pages.is_resizing() && wanted != pages.capacities();
        if begins {
            pages.resize(&wanted);
        }
        let outcome = if pages.is_resizing() && !begins && !pages.resizes_next(beside) {
            // A failure shows when it is read.
            let _ = self.in_flight.as_ref().map(|(step, _)| step.wait());
            let started = Instant::now();
            fault::pause("pages.slow", &self.options.id);
            let outcome = pages.resize_part().map(drop);
            self.growth.turn = started.elapsed();
            self.growth.byte = self.growth.turn.as_secs_f64() / pages.bytes().max(1) as f64;
            outcome
        } else {
            // The step before the first part is planned with the time that it takes. And nothing moves that prompts beside the
            // steps may be writing to.
            Ok(())
        };
        let capacities = pages.capacities().to_vec();
        // The next part delays the token of the step that is about to be planned.
        let next = if pages.is_resizing() { self.growth.byte * pages.bytes() as f64 } else { 0.0 };
        self.scheduler.reserve_time(Duration::from_secs_f64(next));
        if let Err(error) = outcome {
            tracing::warn!(model = self.options.id, %error, blocks = ?capacities, "the KV cache cannot grow");
            pages.stop_resizing();
            self.scheduler.limit_blocks(&capacities, true);
            self.most_blocks.clone_from(&capacities);
            let _ = kernels::check();
        }
        let mut grown = pages.is_resizing();
        if !grown {
            let bytes = self.cache_bytes();
            self.memory.has(bytes as u64);
        }
        let blocks = self.scheduler.blocks();
        for (group, capacity) in capacities.into_iter().enumerate() {
            grown |= capacity > blocks.capacity(group);
            blocks.grow(group, capacity);
        }
        Ok(grown)
    }

    /// The blocks of each group that there should be, as far as there is memory for them, which is then taken.
    fn affordable_blocks(&mut self) -> Vec<usize> {
        let pages = self.runner.pages();
        let (capacities, now) = (pages.capacities().to_vec(), Instant::now());
        if pages.is_resizing() || !self.memory.may_ask(now) {
            return capacities;
        }
        self.scheduler.limit_blocks(&self.most_blocks, true);
        let wanted = self.scheduler.wanted_blocks();
        if wanted == capacities {
            self.memory.content();
            return capacities;
        }
        let slots = self.runner.states().slots();
        let snapshots = self.snapshot_bytes(slots);
        let pages = self.runner.pages();
        if self.memory.grow((pages.bytes_to_hold(&wanted) + snapshots) as u64) {
            return wanted;
        }
        // Less than the scheduler wants is better than nothing, and what sequences need comes first.
        let needed = self.scheduler.needed_blocks();
        let needs = needed.iter().any(|&blocks| blocks > 0);
        let more = wanted.iter().zip(&capacities).zip(needed);
        let mut more: Vec<usize> =
            more.map(|((wanted, now), &needed)| if needs { needed.min(wanted - now) } else { wanted - now }).collect();
        while more.iter().any(|&more| more > 0) {
            let enough: Vec<usize> = capacities.iter().zip(&more).map(|(now, more)| now + more).collect();
            if self.memory.grow((pages.bytes_to_hold(&enough) + snapshots) as u64) {
                return enough;
            }
            more.iter_mut().for_each(|more| *more /= 2);
        }
        let next = wanted.iter().zip(&capacities).zip(needed);
        let next = next.map(|((wanted, now), &needed)| now + usize::from(wanted > now && (!needs || needed > 0)));
        let bytes = pages.bytes_to_hold(&next.collect::<Vec<_>>()) + snapshots;
        let alone = self.scheduler.is_alone();
        match self.memory.deny(bytes as u64, needs, alone, now) {
            Denied::MakeDo => self.scheduler.limit_blocks(&capacities, alone),
            Denied::Pause => {}
            Denied::Yield => self.yields = true,
        }
        capacities
    }

    /// Gives back all that no sequence uses; returns how many bytes.
    pub(super) fn give_back(&mut self) -> Result<u64> {
        if !self.settle()? {
            return Ok(0);
        }
        let before = self.cache_bytes();
        self.save_for(if self.scheduler.is_idle() { LAST_SAVES } else { PAUSED });
        let blocks = self.scheduler.blocks();
        blocks.clear();
        let least: Vec<usize> = (0..blocks.groups()).map(|group| blocks.least_capacity(group)).collect();
        least.iter().enumerate().for_each(|(group, &least)| blocks.shrink(group, least));
        let pages = self.runner.pages();
        pages.resize(&least);
        pages.resize_all()?;
        self.shrink_states()?;
        crate::mlx::return_free_memory();
        let bytes = self.cache_bytes();
        self.memory.has(bytes as u64);
        Ok(before.saturating_sub(bytes) as u64)
    }

    /// Gives back blocks behind the last one that holds something.
    pub(super) fn shrink(&mut self) -> Result<()> {
        let blocks = self.scheduler.blocks();
        let pages = self.runner.pages();
        let mut capacities = pages.capacities().to_vec();
        for (group, capacity) in capacities.iter_mut().enumerate() {
            let least = blocks.least_capacity(group);
            // Not for a few blocks.
            if least < *capacity * 3 / 4 {
                blocks.shrink(group, least);
                *capacity = least;
            }
        }
        let before = self.cache_bytes();
        let pages = self.runner.pages();
        if capacities != pages.capacities() {
            pages.resize(&capacities);
            pages.resize_all()?;
        }
        self.shrink_states()?;
        let bytes = self.cache_bytes();
        if bytes == before {
            return Ok(());
        }
        crate::mlx::return_free_memory();
        self.memory.has(bytes as u64);
        Ok(())
    }
}
