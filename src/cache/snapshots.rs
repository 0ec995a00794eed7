//! States of sequences in slots: those of the living, and snapshots that later sequences go on from. Pure.
//!
//! What recurrent layers keep of a sequence stands for all tokens up to a position, and for nothing before it: a snapshot is
//! of use to whoever begins with exactly its tokens. One takes as much memory as the rows of some thousand tokens, so there
//! are few, and they are looked through one by one; tokens are compared as they are.
//!
//! Slots follow the rules of blocks: a slot that somebody else needs is never written to, but copied first, and what a step
//! writes there is there for the next one.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::blocks::{BlockCounts, BlockId, BlockPool};

/// Names a slot: all that the recurrent layers keep of one sequence.
pub type SlotId = BlockId;

/// A whole slot to be copied, before a step writes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotCopy {
    /// Whose state.
    pub from: SlotId,
    /// Where to.
    pub to: SlotId,
}

/// The state that a sequence goes on from. It is given back to the snapshots that made it, never dropped.
#[derive(Debug)]
pub struct State {
    slot: SlotId,
    /// Tokens that it stands for; `None` while they pass the layers, some of which are behind the others.
    tokens: Option<usize>,
}

impl State {
    /// Where it is.
    pub fn slot(&self) -> SlotId {
        self.slot
    }

    /// The first `tokens` tokens of its sequence have passed all layers when the step that is being planned has run.
    pub fn complete(&mut self, tokens: usize) {
        self.tokens = Some(tokens);
    }
}

#[derive(Debug)]
struct Snapshot {
    tokens: Rc<[u32]>,
    slot: SlotId,
    /// The step that wrote it.
    written: u64,
    /// It is somewhere else too.
    saved: bool,
}

/// A snapshot that is in the slots alone: its tokens, and where it is.
pub type Unsaved = (Rc<[u32]>, SlotId);

/// The slots of a model, and the tokens that their snapshots stand for.
#[derive(Debug)]
pub struct Snapshots {
    slots: BlockPool<u64>,
    /// By age.
    kept: BTreeMap<u64, Snapshot>,
    next: u64,
    /// Slots that sequences may need at the same time, and slots that there may be at most.
    reserve: usize,
    most: usize,
    /// Slots that pins hold.
    pinned: usize,
    /// A snapshot had to go although there may be more slots.
    pressed: bool,
    /// Snapshots go to another tier.
    saves: bool,
    evicted: Vec<Unsaved>,
}

impl Snapshots {
    /// Slots for `sequences` that run at the same time; `most` in all, if there is memory for so many.
    pub fn new(sequences: usize, most: usize) -> Self {
        let reserve = Self::reserve(sequences);
        Self {
            slots: BlockPool::new(reserve),
            kept: BTreeMap::new(),
            next: 0,
            reserve,
            most: most.max(reserve),
            pinned: 0,
            pressed: false,
            saves: false,
            evicted: Vec::new(),
        }
    }

    /// The fewest slots with which `sequences` can run at the same time. One that leaves a snapshot has that and its copy for a
    /// moment, and another one may be brought from elsewhere.
    pub fn reserve(sequences: usize) -> usize {
        sequences + 2
    }

    /// Slots that there are.
    pub fn capacity(&self) -> usize {
        self.slots.capacity()
    }

    /// Slots that there should be.
    pub fn wanted(&self) -> usize {
        let capacity = self.capacity();
        if self.pressed { (capacity + (capacity / 2).max(4)).min(self.most).max(capacity) } else { capacity }
    }

    /// There are more slots, or there will not be more for the moment.
    pub fn grow(&mut self, capacity: usize) {
        self.slots.grow(capacity);
        self.pressed = false;
    }

    /// Gives up slots behind the last one that holds something, but none that running sequences may need beside pins; how many
    /// are left.
    pub fn shrink(&mut self) -> usize {
        self.slots.shrink(self.reserve + self.pinned);
        self.capacity()
    }

    /// How many slots are in which state.
    pub fn counts(&self) -> BlockCounts {
        self.slots.counts()
    }

    /// Snapshots that there are.
    pub fn entries(&self) -> usize {
        self.kept.len()
    }

    /// Of the longest snapshot of the beginning of `tokens`, of more than `from` of them, that `serves`: where it is, which step
    /// wrote it, and what `serves` says of so many tokens.
    pub fn longest<T>(
        &self,
        tokens: &[u32],
        from: usize,
        serves: impl Fn(usize) -> Option<T>,
    ) -> Option<(SlotId, u64, T)> {
        let fits = |kept: &&Snapshot| (from + 1..=tokens.len()).contains(&kept.tokens.len());
        let mut longer: Vec<&Snapshot> = self.kept.values().filter(fits).collect();
        longer.sort_unstable_by_key(|kept| std::cmp::Reverse(kept.tokens.len()));
        let mut begins = longer.into_iter().filter(|kept| tokens.starts_with(&kept.tokens));
        begins.find_map(|kept| Some((kept.slot, kept.written, serves(kept.tokens.len())?)))
    }

    /// How many tokens all snapshots of beginnings of `tokens` stand for.
    pub fn lengths(&self, tokens: &[u32]) -> Vec<usize> {
        let begins = self.kept.values().filter(|kept| tokens.starts_with(&kept.tokens));
        begins.map(|kept| kept.tokens.len()).collect()
    }

    /// A sequence goes on from a snapshot of its first `tokens` tokens; `state` is what it had.
    pub fn take_up(&mut self, state: &mut Option<State>, slot: SlotId, tokens: usize) {
        self.slots.retain(slot);
        self.release(state.replace(State { slot, tokens: Some(tokens) }));
    }

    /// A sequence that goes on from the same state.
    pub fn fork(&mut self, state: Option<&State>) -> Option<State> {
        state.map(|state| {
            self.slots.retain(state.slot);
            State { slot: state.slot, tokens: state.tokens }
        })
    }

    /// A slot of its own for a sequence whose tokens from `start` on are to pass the layers, and what is to be copied there.
    /// `None` if `state` is not that of the tokens before, or there is no slot: neither happens to sequences that were
    /// planned as they should be.
    pub fn advance(&mut self, state: &mut Option<State>, start: usize) -> Option<(SlotId, Option<SlotCopy>)> {
        let before = state.as_ref().map(|state| (state.slot, state.tokens));
        let (slot, copy) = match before {
            None if start == 0 => (self.take()?, None),
            Some((slot, Some(tokens))) if tokens == start => {
                if self.slots.references(slot) == 1 && self.slots.content(slot).is_none() {
                    (slot, None)
                } else {
                    let to = self.take()?;
                    self.slots.release(slot);
                    (to, Some(SlotCopy { from: slot, to }))
                }
            }
            _ => return None,
        };
        *state = Some(State { slot, tokens: None });
        Some((slot, copy))
    }

    /// Makes a snapshot of a sequence's state, if it stands for exactly `tokens` and there is none of them; `step` has
    /// written it at the latest.
    pub fn keep(&mut self, state: Option<&State>, tokens: &[u32], step: u64) {
        let Some(state) = state.filter(|state| state.tokens == Some(tokens.len()) && !tokens.is_empty()) else {
            return;
        };
        if self.slots.content(state.slot).is_some() {
            return;
        }
        if let Some(known) = self.kept.values().find(|kept| *kept.tokens == *tokens).map(|kept| kept.slot) {
            // It was of use just now, if only nearly.
            self.slots.retain(known);
            return self.slots.release(known);
        }
        self.slots.set_content(state.slot, self.next);
        self.kept.insert(self.next, Snapshot { tokens: tokens.into(), slot: state.slot, written: step, saved: false });
        self.next += 1;
    }

    /// Gives back the state of a sequence; a snapshot stays.
    pub fn release(&mut self, state: Option<State>) {
        state.into_iter().for_each(|state| self.slots.release(state.slot));
    }

    /// Keeps the snapshot that a sequence goes on from, if enough slots are left: otherwise more are wanted. Gives back the
    /// state.
    pub fn pin(&mut self, state: Option<State>) -> Option<SlotId> {
        let state = state?;
        if self.capacity() <= self.reserve + self.pinned {
            self.pressed = self.capacity() < self.most;
            self.release(Some(state));
            return None;
        }
        self.pinned += 1;
        Some(state.slot)
    }

    /// Ends a pin.
    pub fn unpin(&mut self, slot: SlotId) {
        self.pinned -= 1;
        self.slots.release(slot);
    }

    /// Forgets what nobody uses and nothing pins; returns how many slots became free.
    pub fn clear(&mut self) -> usize {
        let cached: Vec<SlotId> = self.slots.cached().collect();
        for &slot in &cached {
            if let Some(name) = self.slots.content(slot) {
                self.slots.forget(slot);
                self.kept.remove(&name);
            }
        }
        cached.len()
    }

    /// From now on there is another tier.
    pub fn save(&mut self) {
        self.saves = true;
    }

    /// What has gone since the last call and was nowhere else: still there until the next step is launched.
    pub fn take_evicted(&mut self) -> Vec<Unsaved> {
        std::mem::take(&mut self.evicted)
    }

    /// A snapshot to be saved next, which a step before `step` has written. It counts as saved from now on.
    pub fn next_save(&mut self, step: u64) -> Option<Unsaved> {
        let ready = |kept: &&mut Snapshot| !kept.saved && kept.written < step;
        let kept = self.kept.values_mut().filter(|_| self.saves).find(ready)?;
        kept.saved = true;
        Some((Rc::clone(&kept.tokens), kept.slot))
    }

    /// Snapshots that are nowhere else.
    pub fn unsaved(&self) -> usize {
        self.kept.values().filter(|kept| !kept.saved).count()
    }

    /// A slot for a state of `tokens` tokens that comes from elsewhere, which [`keep`](Self::keep) makes a snapshot.
    pub fn receive(&mut self, tokens: usize) -> Option<State> {
        let slot = self.take()?;
        Some(State { slot, tokens: Some(tokens) })
    }

    /// The snapshot of exactly `tokens` came from another tier.
    pub fn set_saved(&mut self, tokens: &[u32]) {
        let same = self.kept.values_mut().filter(|kept| *kept.tokens == *tokens);
        same.for_each(|kept| kept.saved = true);
    }

    fn take(&mut self) -> Option<SlotId> {
        let (slot, evicted) = self.slots.take()?;
        if let Some(kept) = evicted.and_then(|name| self.kept.remove(&name)) {
            self.pressed = self.capacity() < self.most;
            if self.saves && !kept.saved {
                self.evicted.push((kept.tokens, slot));
            }
        }
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence that has computed `tokens` from nothing, its state kept.
    fn kept(snapshots: &mut Snapshots, tokens: &[u32], step: u64) -> Option<State> {
        let mut state = None;
        snapshots.advance(&mut state, 0).expect("a slot");
        state.iter_mut().for_each(|state| state.complete(tokens.len()));
        snapshots.keep(state.as_ref(), tokens, step);
        state
    }

    fn end_with(snapshots: &mut Snapshots, tokens: &[u32]) -> SlotId {
        let state = kept(snapshots, tokens, 1);
        let slot = state.as_ref().map_or(0, State::slot);
        snapshots.release(state);
        slot
    }

    #[test]
    fn the_longest_that_serves_is_found_by_its_tokens() {
        let mut snapshots = Snapshots::new(4, 6);
        for tokens in [&[1, 2][..], &[1, 2, 3, 4], &[1, 9]] {
            end_with(&mut snapshots, tokens);
        }
        let longest = |tokens: &[u32], from, most: usize| {
            snapshots.longest(tokens, from, |tokens| (tokens <= most).then_some(tokens)).map(|(_, _, tokens)| tokens)
        };
        assert_eq!(longest(&[1, 2, 3, 4, 5], 0, 9), Some(4));
        assert_eq!(longest(&[1, 2, 3, 4, 5], 0, 3), Some(2), "rows end before");
        assert_eq!(longest(&[1, 2, 3, 4, 5], 4, 9), None, "that is there already");
        assert_eq!(longest(&[1, 2, 3], 0, 9), Some(2));
        assert_eq!(longest(&[1, 9, 3], 0, 9), Some(2));
        assert_eq!(longest(&[2, 2, 3], 0, 9), None);
    }

    #[test]
    fn a_kept_state_is_copied_before_its_sequence_goes_on() {
        let mut snapshots = Snapshots::new(2, 4);
        let mut first = kept(&mut snapshots, &[1, 2], 1);
        let (slot, _, found) = snapshots.longest(&[1, 2, 3], 0, Some).unwrap();
        let mut second = None;
        snapshots.take_up(&mut second, slot, found);
        for state in [&mut first, &mut second] {
            let (to, copy) = snapshots.advance(state, 2).unwrap();
            assert_eq!(copy, Some(SlotCopy { from: slot, to }));
            assert!(to != slot && snapshots.advance(state, 2).is_none(), "it is on its way");
            state.iter_mut().for_each(|state| state.complete(3));
            assert_eq!(snapshots.advance(state, 3), Some((to, None)), "in place");
        }
        assert!(snapshots.advance(&mut None, 3).is_none(), "from nothing in the middle");
        assert!(snapshots.longest(&[1, 2, 3], 0, Some).is_some_and(|(kept, _, _)| kept == slot));
        snapshots.release(first);
        snapshots.release(second);
        assert_eq!(snapshots.counts(), BlockCounts { used: 0, cached: 1, free: 3 });
    }

    /// As many sequences as may run always get a slot, whatever is kept and pinned.
    #[test]
    fn running_sequences_are_never_short_of_slots() {
        let mut snapshots = Snapshots::new(3, 100);
        snapshots.grow(7);
        let mut pins = Vec::new();
        for own in 0..10 {
            let state = kept(&mut snapshots, &[own, 5], 1);
            pins.extend(snapshots.pin(state));
        }
        assert_eq!(pins.len(), 2, "pins leave what is needed");
        assert!(snapshots.wanted() > 7, "more slots for more pins");
        assert_eq!(snapshots.shrink(), 7, "what is needed beside pins is not given up");
        let mut running: Vec<_> = (0..3).map(|own| kept(&mut snapshots, &[20 + own, 5], 1)).collect();
        for state in &mut running {
            assert!(snapshots.advance(state, 2).is_some());
        }
        pins.into_iter().for_each(|slot| snapshots.unpin(slot));
        running.into_iter().for_each(|state| snapshots.release(state));
        assert_eq!(snapshots.counts().used, 0);
    }

    #[test]
    fn what_goes_is_saved_once() {
        let mut snapshots = Snapshots::new(1, 3);
        end_with(&mut snapshots, &[1]);
        end_with(&mut snapshots, &[2]);
        assert_eq!(snapshots.next_save(9), None, "there is no other tier");
        snapshots.save();
        assert_eq!(snapshots.next_save(1), None, "it may be on its way");
        assert_eq!(snapshots.next_save(2).map(|(tokens, _)| tokens), Some(Rc::from([1])));
        assert_eq!(snapshots.unsaved(), 1);
        // The first one goes, then the second, which nobody has saved.
        for own in 3..6 {
            end_with(&mut snapshots, &[own]);
        }
        let evicted: Vec<_> = snapshots.take_evicted().into_iter().map(|(tokens, _)| tokens[0]).collect();
        assert_eq!(evicted, [2]);
        assert_eq!(snapshots.clear(), 3);
        assert_eq!((snapshots.unsaved(), snapshots.entries()), (0, 0));
    }

    #[test]
    fn a_state_that_stands_for_other_tokens_is_not_kept() {
        let mut snapshots = Snapshots::new(1, 3);
        let mut state = None;
        snapshots.advance(&mut state, 0).unwrap();
        snapshots.keep(state.as_ref(), &[1, 2], 1);
        assert_eq!(snapshots.entries(), 0, "it has not passed all layers");
        state.iter_mut().for_each(|state| state.complete(3));
        snapshots.keep(state.as_ref(), &[1, 2], 1);
        assert_eq!(snapshots.entries(), 0);
        snapshots.release(state);
    }
}
