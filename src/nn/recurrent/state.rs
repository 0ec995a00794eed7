//! States of sequences: what recurrent layers keep instead of keys and values.
//!
//! A slot has all of one sequence, or of one snapshot of it. With the CPU kernels states are written in place, behind MLX's
//! back; with MLX's operations they are gathered, advanced and scattered, and the pool's old array is taken out for that.

use std::sync::Arc;

use mlx_rs::{Array, Dtype, ops};

use crate::error::{Error, Result};
use crate::kernels::{Backend, StatePlacement, StateRun};
use crate::mlx;

/// What a layer keeps of a sequence, as arrays without their first axis, the slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    /// Shape and type of each array: the inputs of the convolution's last rows, and with a recurrence its state.
    pub arrays: Vec<(Vec<usize>, Dtype)>,
}

impl StateLayout {
    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.arrays.iter().map(|(shape, dtype)| shape.iter().product::<usize>() * mlx::item_size(*dtype)).sum()
    }
}

/// The states of one layer, by slots.
#[derive(Debug)]
pub struct StatePools {
    backend: Backend,
    layout: StateLayout,
    slots: usize,
    /// `[slots, ..]` each; `None` only while it is being replaced.
    arrays: Vec<Option<Array>>,
}

impl StatePools {
    /// Pools of `slots` slots. What a slot holds that nobody has written is anything.
    pub fn new(backend: Backend, layout: &StateLayout, slots: usize) -> Result<Self> {
        let mut pools = Self { backend, layout: layout.clone(), slots: 0, arrays: Vec::new() };
        for (shape, dtype) in &layout.arrays {
            let empty = ops::zeros_dtype(&dims(0, shape)?, *dtype)?;
            empty.eval()?;
            pools.arrays.push(Some(empty));
        }
        pools.resize(slots)?;
        Ok(pools)
    }

    /// What a slot holds.
    pub fn layout(&self) -> &StateLayout {
        &self.layout
    }

    /// Slots that there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of all arrays.
    pub fn bytes(&self) -> usize {
        self.arrays.iter().flatten().map(Array::nbytes).sum()
    }

    /// Changes the number of slots, one array at a time; no step may be on its way. Those behind a smaller number are lost.
    pub fn resize(&mut self, slots: usize) -> Result<()> {
        for at in 0..self.arrays.len() {
            // It stays where the new one fails.
            let old = self.array(at)?;
            let new = match &self.backend {
                Backend::Cpu(cpu) => cpu.resize_rows(old, slots)?,
                Backend::Mlx | Backend::Gpu(_) => {
                    let (shape, dtype) = &self.layout.arrays[at];
                    let (kept, empty) = (slots.min(self.slots), ops::zeros_dtype(&dims(slots, shape)?, *dtype)?);
                    mlx::write_rows(empty, &mlx::rows(old, 0, kept)?, 0, kept)?
                }
            };
            new.eval()?;
            crate::kernels::check()?;
            self.arrays[at] = Some(new);
        }
        self.slots = slots;
        Ok(())
    }

    /// All arrays `[slots, ..]`, for evaluation and to copy slots from. The CPU kernels write to them in place.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.arrays.iter().flatten()
    }

    /// Array `at` of the layout.
    pub fn array(&self, at: usize) -> Result<&Array> {
        self.arrays[at].as_ref().ok_or_else(missing)
    }

    fn take(&mut self, at: usize) -> Result<Array> {
        self.arrays[at].take().ok_or_else(missing)
    }

    /// Makes other arrays of all, in their order, of which nothing else refers to any. No step may be on its way.
    pub fn replace(&mut self, mut change: impl FnMut(Array) -> Result<Array>) -> Result<()> {
        for at in 0..self.arrays.len() {
            let new = change(self.take(at)?)?;
            self.arrays[at] = Some(new);
        }
        Ok(())
    }

    /// Copies whole slots without a step; the result is to be evaluated where there is one, the arrays elsewhere.
    pub fn copy(&mut self, placement: &Arc<StatePlacement>) -> Result<Option<Array>> {
        match &self.backend {
            Backend::Cpu(cpu) => {
                let arrays: Vec<&Array> = self.arrays().collect();
                cpu.copy_slots(&arrays, Arc::clone(placement)).map(Some)
            }
            Backend::Mlx | Backend::Gpu(_) => {
                let mut index = StateIndex::new(placement);
                (0..self.arrays.len()).try_for_each(|at| self.copy_array(at, &mut index))?;
                Ok(None)
            }
        }
    }

    fn copy_array(&mut self, at: usize, index: &mut StateIndex) -> Result<()> {
        if let Some((from, to)) = index.copies()? {
            let pool = self.take(at)?;
            // All are read before one is written.
            let slots = pool.take_axis(from, 0)?;
            self.arrays[at] = Some(mlx::scatter(pool, &[to], &slots.expand_dims(1)?)?);
        }
        Ok(())
    }

    /// With MLX's operations: makes a step's copies in array `at`, hands the states of each part to `advance`, zeros for
    /// sequences that begin, and keeps what it returns. Parts are those of `index`.
    pub(super) fn advance(
        &mut self,
        at: usize,
        index: &mut StateIndex,
        mut advance: impl FnMut(&Part, Array) -> Result<Array>,
    ) -> Result<()> {
        self.copy_array(at, index)?;
        let old = self.take(at)?;
        let mut states = Vec::new();
        for part in index.parts()? {
            let state = old.take_axis(&part.slots, 0)?;
            let state = match &part.goes_on {
                None => state,
                Some(goes_on) => {
                    let mut shape = vec![1; state.ndim()];
                    shape[0] = state.dim(0);
                    let zero = ops::zeros_dtype(&[1], state.dtype())?;
                    ops::select(&goes_on.reshape(&shape)?, &state, &zero)?
                }
            };
            states.push((part.slots.clone(), advance(part, state)?.as_dtype(old.dtype())?));
        }
        let mut pool = old;
        for (slots, state) in states {
            pool = mlx::scatter(pool, &[&slots], &state.expand_dims(1)?)?;
        }
        self.arrays[at] = Some(pool);
        Ok(())
    }
}

fn missing() -> Error {
    Error::internal("a layer without states")
}

fn dims(slots: usize, shape: &[usize]) -> Result<Vec<i32>> {
    let all = std::iter::once(&slots).chain(shape).map(|&n| i32::try_from(n));
    all.collect::<std::result::Result<_, _>>().map_err(|_| Error::internal("more than 2^31 states"))
}

/// A step's runs as index arrays for MLX's operations, made when first needed and shared by all layers.
#[derive(Debug)]
pub struct StateIndex {
    placement: Arc<StatePlacement>,
    parts: Option<Vec<Part>>,
    copies: Option<(Array, Array)>,
}

/// Runs that are computed by one call: all of single rows that follow each other, or one of several rows.
#[derive(Debug)]
pub(super) struct Part {
    /// The first row of the step.
    pub first: usize,
    /// How many runs.
    pub count: usize,
    /// Rows of each.
    pub length: usize,
    /// `[count]` i32.
    slots: Array,
    /// `[count]`: which do not begin; `None` if none does.
    goes_on: Option<Array>,
}

impl Part {
    fn new(runs: &[StateRun]) -> Result<Self> {
        let slots: Vec<i32> = runs.iter().map(|run| run.slot as i32).collect();
        let goes_on: Vec<bool> = runs.iter().map(|run| !run.begins).collect();
        let any_begins = goes_on.contains(&false);
        let goes_on = any_begins.then(|| Array::from_slice(&goes_on, &[runs.len() as i32]));
        let (first, length) = (runs[0].rows.start, runs[0].rows.len());
        Ok(Self { first, count: runs.len(), length, slots: mlx::indices(&slots)?, goes_on })
    }

    /// The part's rows of `x [T, columns]`: `[count, length, columns]`.
    pub fn rows(&self, x: &Array) -> Result<Array> {
        let rows = mlx::rows(x, self.first, self.end())?;
        Ok(rows.reshape(&[self.count as i32, self.length as i32, x.dim(1)])?)
    }

    fn end(&self) -> usize {
        self.first + self.count * self.length
    }
}

impl StateIndex {
    /// Of a step.
    pub fn new(placement: &Arc<StatePlacement>) -> Self {
        Self { placement: Arc::clone(placement), parts: None, copies: None }
    }

    /// The step's own.
    pub fn placement(&self) -> &Arc<StatePlacement> {
        &self.placement
    }

    pub(super) fn parts(&mut self) -> Result<&[Part]> {
        if self.parts.is_none() {
            let single = |run: &StateRun| run.rows.len() == 1;
            let together = |a: &StateRun, b: &StateRun| single(a) && single(b) && a.rows.end == b.rows.start;
            let parts = self.placement.runs.chunk_by(together).map(Part::new).collect::<Result<_>>()?;
            self.parts = Some(parts);
        }
        Ok(self.parts.as_deref().unwrap_or_default())
    }

    fn copies(&mut self) -> Result<Option<&(Array, Array)>> {
        let copies = &self.placement.copies;
        if self.copies.is_none() && !copies.is_empty() {
            let from: Vec<i32> = copies.iter().map(|copy| copy.0 as i32).collect();
            let to: Vec<i32> = copies.iter().map(|copy| copy.1 as i32).collect();
            self.copies = Some((mlx::indices(&from)?, mlx::indices(&to)?));
        }
        Ok(self.copies.as_ref())
    }

    /// What the parts gave, `[count, length, columns]` each, as rows of a step `[rows, columns]`: zeros for those of no run.
    pub(super) fn join(&mut self, parts: Vec<Array>, rows: usize) -> Result<Array> {
        let (mut all, mut at) = (Vec::new(), 0);
        let first = parts.first().ok_or_else(|| Error::internal("a step without runs"))?;
        let (columns, dtype) = (first.dim(2), first.dtype());
        let nobody = |count: usize| ops::zeros_dtype(&[count as i32, columns], dtype);
        for (part, given) in self.parts()?.iter().zip(parts) {
            if part.first > at {
                all.push(nobody(part.first - at)?);
            }
            all.push(given.reshape(&[-1, columns])?);
            at = part.end();
        }
        if rows > at {
            all.push(nobody(rows - at)?);
        }
        match &all[..] {
            [one] => Ok(one.clone()),
            _ => Ok(ops::concatenate(&all, 0)?),
        }
    }
}
