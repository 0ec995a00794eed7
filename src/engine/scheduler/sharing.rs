//! What sequences have in common: states that one leaves for others, and when waiting for another's work is cheaper.

use super::{Refused, Run, Scheduler, StepPlan};
use crate::cache::manager::Table;
use crate::cache::snapshots::SlotId;
use crate::engine::sequence::Sequence;

impl Scheduler {
    /// Where the state of a run is that begins at `start`.
    pub(super) fn place_state(
        &mut self,
        table: &mut Table,
        start: usize,
        plan: &mut StepPlan,
    ) -> Result<Option<SlotId>, Refused> {
        if !self.blocks.has_states() {
            return Ok(None);
        }
        let placed = self.blocks.advance_state(table, start);
        debug_assert!(placed.is_some(), "a state for every sequence");
        let (slot, copy) = placed.ok_or(Refused::NotNow)?;
        plan.slot_copies.extend(copy);
        Ok(Some(slot))
    }

    /// Where a run of `sequence` from `start` on has to end, so that its state can be kept there.
    pub(super) fn next_mark(&self, sequence: &Sequence, start: usize) -> Option<usize> {
        let marks = self.blocks.has_states().then_some(&sequence.marks);
        marks.and_then(|marks| marks.next(start, self.blocks.block_tokens()))
    }

    /// Whether a run of `plan` computes what the running sequence `at` would, at its beginning, or, where that does not help
    /// without a state, on the way to one that serves both: waiting for it is cheaper.
    pub(super) fn goes_on_as_another(&self, at: usize, plan: &StepPlan) -> bool {
        let sequence = &self.running[at];
        let start = sequence.computed;
        // The last token is computed in any case.
        let length = sequence.tokens.len();
        let reusable = start + 1 < length;
        let same = |run: &Run| {
            let Some(other) = self.running.iter().find(|other| other.id == run.sequence) else { return false };
            if self.blocks.has_states() {
                let mark = self.next_mark(other, run.start).filter(|mark| (start + 1..length).contains(mark));
                return mark.is_some_and(|mark| other.tokens.get(..mark) == sequence.tokens.get(..mark));
            }
            let known = other.tokens.get(..=start);
            (run.start..run.start + run.tokens()).contains(&start) && known == Some(&sequence.tokens[..=start])
        };
        reusable && plan.runs.iter().any(same)
    }
}
