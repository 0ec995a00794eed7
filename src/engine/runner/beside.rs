//! A piece of a prompt that passes its layers beside the steps of answers, on a stream of its own.
//!
//! Answers wait for memory and prompts for multiplications, so together they take less time than one after the other. No step
//! waits for the piece: a layer of it may begin in one step and end in the next.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::Receiver;
use mlx_rs::Array;

use super::{Held, Pass, Placed, Runner, start};
use crate::engine::scheduler::Run;
use crate::engine::shape::Shape;
use crate::error::Result;
use crate::fault;
use crate::kernels::cpu::threads::Sharing;
use crate::kernels::{Backend, Side, after};

/// Layers that are on their way at a time: one is computed, the next one follows it at once.
const AHEAD: usize = 2;

/// Layers of the answers that are handed to MLX at a time. It begins what it gets in that order, and makes its caller wait when it
/// has a lot; the piece needs its next layer meanwhile.
const SLICE: usize = 4;

/// No layer takes so long.
const LONGEST: Duration = Duration::from_secs(10);

/// A piece on its way.
pub(super) struct Beside {
    side: Rc<Side>,
    runs: Vec<Run>,
    placed: Placed,
    /// Hidden states behind the last layer that has begun.
    rows: Array,
    /// Layers that it has not begun.
    left: Range<usize>,
    begun: usize,
    /// How many of those that it has begun have ended.
    ended: Arc<AtomicUsize>,
    /// With the step that is on its way.
    sharing: Option<Arc<Sharing>>,
}

impl Beside {
    fn on_their_way(&self) -> usize {
        self.begun - self.ended.load(Ordering::Acquire)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Nothing may write to the pools any more when whoever had these rows has gone.
        let _ = self.rows.eval();
    }
}

impl Runner {
    /// Whether prompts can be computed beside answers: no state is written, and there are threads for both.
    pub fn computes_beside(&self) -> bool {
        self.parallel && self.states.is_empty() && matches!(&self.backend, Backend::Cpu(cpu) if cpu.can_share())
    }

    /// Whether a piece is on its way.
    pub fn is_beside(&self) -> bool {
        self.beside.is_some()
    }

    /// The layers that it is in.
    pub fn layers_beside(&self) -> Range<usize> {
        self.beside.as_ref().map_or(0..0, |beside| beside.left.start - beside.on_their_way()..beside.left.start)
    }

    /// Begins to take `prompts` through `layers`.
    pub(super) fn begin_beside(&mut self, prompts: &[Run], layers: Range<usize>) -> Result<()> {
        let placed = self.pack(prompts, (&[], &[]))?;
        let side = match &self.side {
            Some(side) => Rc::clone(side),
            None => Rc::clone(self.side.insert(Rc::new(Side::new()?))),
        };
        let rows = if layers.start == 0 {
            let tokens = self.tokens(prompts, &placed.packed.shape)?;
            side.run(|| self.model.embed(&tokens))?
        } else {
            self.held_rows(prompts)?
        };
        let (runs, ended) = (prompts.to_vec(), Arc::default());
        self.beside = Some(Beside { side, runs, placed, rows, left: layers, begun: 0, ended, sharing: None });
        Ok(())
    }

    /// Has the step that is being described share the threads with the piece, if there is one.
    pub(super) fn share(&mut self) -> Option<Arc<Sharing>> {
        let (Some(beside), Backend::Cpu(cpu)) = (&mut self.beside, &self.backend) else { return None };
        beside.sharing = cpu.share();
        beside.sharing.clone()
    }

    /// Takes answers through all layers while a piece is on its way: hidden states. Their evaluation has begun.
    pub(super) fn forward_alone(&mut self, runs: &[Run], pass: &mut Pass) -> Result<(Array, Shape)> {
        let (alone, depth) = (self.pack(runs, (&[], &[]))?, self.model.depth());
        let mut x = self.model.embed(&self.tokens(runs, &alone.packed.shape)?)?;
        for first in (0..depth).step_by(SLICE) {
            x = self.pass(x, first..depth.min(first + SLICE), &alone, pass)?;
            start([&x].into_iter())?;
            self.feed()?;
        }
        Ok((x, alone.packed.shape))
    }

    /// Begins the next layers of the piece when others have ended. [`stopped`](Self::stopped) tells when it is through.
    pub fn feed(&mut self) -> Result<()> {
        let Some(mut beside) = self.beside.take() else { return Ok(()) };
        while beside.on_their_way() < AHEAD
            && let Some(layer) = beside.left.next()
        {
            self.begin_layer(&mut beside, layer)?;
        }
        if beside.on_their_way() > 0 {
            self.beside = Some(beside);
            return Ok(());
        }
        self.end_beside(beside)
    }

    /// The same until a step has `ended`.
    pub(super) fn feed_until(&mut self, ended: &AtomicBool) -> Result<()> {
        // Whoever reads the step waits for it, should nobody tell.
        while !ended.load(Ordering::Acquire) && self.progress.1.recv_timeout(LONGEST).is_ok() {
            self.feed()?;
        }
        Ok(())
    }

    /// Is told when a layer of the piece has ended.
    pub fn progress(&self) -> &Receiver<()> {
        &self.progress.1
    }

    fn begin_layer(&mut self, beside: &mut Beside, layer: usize) -> Result<()> {
        let side = Rc::clone(&beside.side);
        let mut pass = Pass::default();
        let mut rows = side.run(|| {
            let rows = self.pass(beside.rows.clone(), layer..layer + 1, &beside.placed, &mut pass)?;
            fault::in_graph("beside", &self.id, rows)
        })?;
        if layer + 1 == self.model.depth() {
            // Only keys and values are wanted of the last layer.
            rows = pass.written.unwrap_or(rows);
        }
        let (ended, told) = (Arc::clone(&beside.ended), self.progress.0.clone());
        let end = move || {
            ended.fetch_add(1, Ordering::Release);
            // The receiver has gone only when nobody waits any more.
            let _ = told.send(());
        };
        let end = side.run(|| after(&rows, end))?;
        start([&rows, &end].into_iter())?;
        beside.rows = rows;
        beside.begun += 1;
        Ok(())
    }

    /// Has the piece stop behind the layers that it has begun, and waits for them.
    pub fn stop_beside(&mut self) -> Result<()> {
        self.beside.take().map_or(Ok(()), |beside| self.end_beside(beside))
    }

    fn end_beside(&mut self, beside: Beside) -> Result<()> {
        beside.rows.eval()?;
        // The step on its way has all threads from here on.
        beside.sharing.iter().for_each(|sharing| sharing.end());
        if beside.left.start < self.model.depth() {
            let runs = beside.runs.iter().map(|run| (run.sequence, run.tokens())).collect();
            self.piece = Some(Held { rows: beside.rows.clone(), runs });
        }
        self.stopped = Some(beside.left.start);
        Ok(())
    }

    /// The layer behind which the piece has stopped, once after it has.
    pub fn stopped(&mut self) -> Option<usize> {
        self.stopped.take()
    }
}
