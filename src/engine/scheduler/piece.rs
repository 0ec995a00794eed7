//! Prompt tokens that do not pass all layers in one step: in slices, or beside the steps.

use super::{Run, Scheduler, StepPlan};
use crate::engine::pace::Work;
use crate::engine::sequence::Sequence;

/// Prompt tokens that pass the layers together. They count as computed, and other sequences may share their blocks, when the
/// step that takes them through the last layer is planned.
#[derive(Debug, Default)]
pub(super) struct Piece {
    /// As their tables were at the beginning; none if there is no piece.
    pub(super) runs: Vec<Run>,
    /// Layers passed.
    passed: usize,
    /// It passes others beside the steps.
    pub(super) beside: bool,
}

impl Piece {
    /// One that has passed no layer.
    pub(super) fn new(runs: Vec<Run>) -> Self {
        Self { runs, ..Self::default() }
    }
}

impl Scheduler {
    /// Has the piece pass layers in the step that is being planned, all that are left if nobody waits for a token, or beside it.
    pub(super) fn pass_layers(&mut self, decodes: bool, plan: &mut StepPlan) {
        let works = self.piece.runs.iter().map(|run| Work::of_run(run.start, run.tokens()));
        let (work, from, last) = (works.fold(Work::default(), Work::and), self.piece.passed, self.limits.layers);
        // Tokens are drawn by steps.
        let end = last - usize::from(self.draws());
        let runs = if decodes && plan.copies.is_empty() && from < end && self.pace.goes_beside(work, last - from) {
            plan.layers = from..end;
            (plan.beside, self.piece.beside) = (true, true);
            self.piece.runs.clone()
        } else {
            plan.layers = from..from + self.pace.slice(decodes, work, last - from);
            self.advance(plan.layers.end)
        };
        plan.runs.extend(runs);
    }

    /// Whether a token is drawn behind the piece.
    fn draws(&self) -> bool {
        let of = |run: &Run| self.running.iter().find(|sequence| sequence.id == run.sequence);
        let ends = |run: &Run| of(run).is_some_and(|sequence| run.start + run.tokens() >= sequence.tokens.len());
        self.piece.runs.iter().any(ends)
    }

    /// The prompts beside the steps have passed the layers below `end`, and have stopped there.
    pub fn passed(&mut self, end: usize) {
        self.piece.beside = false;
        self.advance(end);
    }

    /// Whether the prompts beside the steps are to stop, because one of their sequences is cancelled.
    pub fn piece_ends(&self) -> bool {
        let cancelled = |sequence: &Sequence| {
            sequence.is_cancelled() && self.piece.runs.iter().any(|run| run.sequence == sequence.id)
        };
        self.piece.beside && self.running.iter().any(cancelled)
    }

    /// The piece has passed the layers below `end`, or does in the step that is being planned; its runs.
    fn advance(&mut self, end: usize) -> Vec<Run> {
        self.piece.passed = end;
        if end < self.limits.layers {
            return self.piece.runs.clone();
        }
        let mut runs = std::mem::take(&mut self.piece).runs;
        for run in &mut runs {
            let place = self.running.iter().position(|sequence| sequence.id == run.sequence);
            let Some((at, mut table)) = place.and_then(|at| Some((at, self.running[at].table.take()?))) else {
                continue;
            };
            run.samples = self.complete(at, &mut table, run.start + run.tokens());
            self.running[at].table = Some(table);
        }
        runs
    }
}
