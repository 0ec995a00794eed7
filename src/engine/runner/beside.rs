//! A step whose answers and whose piece of a prompt pass their layers at the same time, each on a stream of its own.
//!
//! Answers wait for memory and prompts for multiplications, so together they take less time than one after the other.

use std::sync::Arc;

use mlx_rs::Array;

use super::{Held, Pass, Runner, start};
use crate::engine::scheduler::StepPlan;
use crate::engine::shape::Shape;
use crate::error::Result;
use crate::fault;
use crate::kernels::cpu::threads::Sharing;
use crate::kernels::{Side, end_sharing};

/// What is on its way beside the answers.
pub(super) struct Beside {
    /// Computed last.
    end: Array,
    /// Ends with whichever side ends first.
    pub sharing: Arc<Sharing>,
}

impl Beside {
    /// Waits until it is computed.
    pub fn wait(&self) -> Result<()> {
        Ok(self.end.eval()?)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Nothing may write to the pools any more when whoever had these rows has gone.
        let _ = self.end.eval();
    }
}

impl Runner {
    /// Whether the first `answers` runs and the others can do without each other: nothing is copied for one of them that the
    /// other has, no state is written, and no token is drawn behind a prompt.
    pub(super) fn can_run_parallel(&self, plan: &StepPlan, answers: usize) -> bool {
        let copies = !plan.copies.is_empty() || !plan.slot_copies.is_empty();
        self.parallel && !copies && self.states.is_empty() && !plan.runs[answers..].iter().any(|run| run.samples)
    }

    /// Takes the first `answers` runs through all layers and the others through those that the plan says: hidden
    /// states of the answers. Their evaluation has begun.
    pub(super) fn forward_beside(
        &mut self,
        plan: &StepPlan,
        answers: usize,
        sharing: Arc<Sharing>,
        pass: &mut Pass,
    ) -> Result<(Array, Shape)> {
        let (depth, layers) = (self.model.depth(), plan.layers.clone());
        let (runs, prompts) = plan.runs.split_at(answers);
        let (alone, piece) = (self.pack(runs, (&[], &[]))?, self.pack(prompts, (&[], &[]))?);
        let side = self.side.take().map_or_else(Side::new, Ok)?;
        let mut rows = if layers.start == 0 {
            let tokens = self.tokens(prompts, &piece.packed.shape)?;
            side.run(|| self.model.embed(&tokens))?
        } else {
            self.held_rows(prompts)?
        };
        let mut x = self.model.embed(&self.tokens(runs, &alone.packed.shape)?)?;
        // MLX begins what it is given in the order in which it gets it, and not all at once: in slices that take either side about
        // as long, both always have something to do. Answers first, so that they go on while this thread has no core.
        let slice = |at: usize| depth * at / (layers.len() + 1)..depth * (at + 1) / (layers.len() + 1);
        x = self.pass(x, slice(0), &alone, pass)?;
        start([&x].into_iter())?;
        let mut prompt_pass = Pass::default();
        for (at, layer) in layers.clone().enumerate() {
            rows = side.run(|| {
                let rows = self.pass(rows, layer..layer + 1, &piece, &mut prompt_pass)?;
                fault::in_graph("beside", &self.id, rows)
            })?;
            if layer + 1 == depth {
                // Only keys and values are wanted of the last layer.
                rows = prompt_pass.written.take().unwrap_or(rows);
            }
            start([&rows].into_iter())?;
            x = self.pass(x, slice(at + 1), &alone, pass)?;
            start([&x].into_iter())?;
        }
        let end = side.run(|| end_sharing(&sharing, &rows))?;
        start([&end].into_iter())?;
        self.side = Some(side);
        if layers.end < depth {
            self.piece = Some(Held { rows, runs: prompts.iter().map(|run| (run.sequence, run.tokens())).collect() });
        }
        pass.beside = Some(Beside { end, sharing });
        Ok((x, alone.packed.shape))
    }
}
