//! Products of activations with weight matrices: `y = x W^T` for one or several matrices over the same input.
//!
//! Work is cut into units of two panels of 16 weight rows. A unit computes its columns for all rows of activations into
//! a block of f32 (`integer.rs`: packed weights times quantised activations; `dot.rs`: everything in f32; `gemm.rs`: the same
//! for many rows), and then finishes them: bias, activation function, residual.

mod finish;
mod laid_out;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::dot;
use super::floats::{Floats, FloatsMut, SharedMut};
use super::gemm::WIDTH;
use super::integer::{Integer, WeightRows};
use super::matrix::{Matrix, Storage};
use super::quantize::{BlockParts, Order, Quantize, QuantizedRows};
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;
use laid_out::{LaidOut, TOGETHER};

pub use laid_out::{laid_out_len, lay_out};

/// Rows of a panel.
pub const PANEL: usize = LANES;

/// Panels that a unit computes together.
pub const PAIR: usize = 2;

/// Larger buffers are not kept: threads of MLX's never end, and neither would what they keep.
const KEPT_BYTES: usize = 8 << 20;

/// How products with packed weights are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Activations are rounded to 8 bits per group. With dense weights they are not, but from some number of rows on sums are
    /// added in another order, which is faster, and with weights in bf16 activations are rounded to bf16, too, where the
    /// processor multiplies that.
    #[default]
    Fast,
    /// Activations as they are, f32 accumulation in a fixed order: a row's bits do not depend on the other rows.
    Exact,
}

/// A projection: a matrix, and what is added to its product.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// The weights.
    pub matrix: Matrix<'a>,
    /// `[rows]` for each of the stacked matrices.
    pub bias: Option<Floats<'a>>,
}

/// What becomes of the products.
#[derive(Debug, Clone, Copy)]
pub enum Finish<'a> {
    /// The projections' outputs side by side: `[M, sum of rows]`.
    Concat,
    /// Of one projection, added to `[M, rows]`.
    Add(&'a [f32]),
    /// Of two projections of the same shape, `silu(first) * second`: `[M, rows]`.
    SwiGlu,
    /// Of two projections of the same shape, `gelu(first) * second` with the approximation by `tanh`: `[M, rows]`.
    GeGlu,
    /// Of two projections of the same shape, `(second + 1) * first * sigmoid(alpha * first)`, where the first is at most `limit` and
    /// the second between `-limit` and `limit` (gpt-oss): `[M, rows]`.
    ClampedSwiGlu {
        /// Steepness of the gate.
        alpha: f32,
        /// Bound of both.
        limit: f32,
    },
    /// Of one projection, the Gaussian error linear unit of it: `[M, rows]`.
    Gelu,
    /// Of one projection, the square of its positive part: `[M, rows]`.
    SquaredRelu,
}

impl Finish<'_> {
    /// Whether the first of two projections gates the second.
    fn is_gated(&self) -> bool {
        matches!(self, Finish::SwiGlu | Finish::GeGlu | Finish::ClampedSwiGlu { .. })
    }
}

/// A product to compute.
#[derive(Debug)]
pub struct MatMul<'a> {
    /// Activations `[M, columns]`.
    pub x: &'a [f32],
    /// At least one; all with the same number of columns.
    pub projections: &'a [Projection<'a>],
    /// For each row of activations the one of the stacked matrices it is multiplied with; rows of one expert should
    /// be neighbours. Without it there is one matrix.
    pub experts: Option<&'a [u32]>,
    /// Matrices stacked in each projection.
    pub stacked: usize,
    /// What becomes of the products.
    pub finish: Finish<'a>,
    /// How products with packed weights are computed.
    pub precision: Precision,
}

/// Two panels that are computed together; of an odd number the last is alone. The first is always there.
#[derive(Debug, Clone, Copy)]
struct Unit {
    panels: [Option<Panel>; PAIR],
}

/// Sixteen rows of a matrix, or fewer at its end.
#[derive(Debug, Clone, Copy)]
struct Panel {
    /// Index of the projection.
    pub projection: usize,
    /// Its first row in the matrix.
    pub first: usize,
    /// Rows of the matrix in it.
    pub rows: usize,
}

impl Unit {
    /// Index of the first panel's projection.
    fn projection(&self) -> usize {
        self.panels[0].map_or(0, |panel| panel.projection)
    }
}

thread_local! {
    /// Quantised activations, kept for the next product unless they are large.
    static QUANTIZED: RefCell<Vec<QuantizedRows>> = const { RefCell::new(Vec::new()) };
    /// Accumulators of a unit, `[M, PAIR * PANEL]`.
    static ACCUMULATORS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl MatMul<'_> {
    /// Columns of the output.
    pub fn width(&self) -> usize {
        match self.finish {
            Finish::Concat => self.projections.iter().map(|p| p.matrix.rows).sum(),
            _ => self.projections[0].matrix.rows,
        }
    }

    fn columns(&self) -> usize {
        self.projections[0].matrix.columns
    }

    /// Rows of activations.
    pub fn rows(&self) -> usize {
        self.x.len() / self.columns().max(1)
    }

    /// Computes the product into `out [M, width]`. Panics if the sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, mut out: FloatsMut<'_>) {
        self.check(out.len());
        if out.is_empty() {
            return;
        }
        let (segments, units) = (self.segments(), self.units());
        if self.is_stored_laid_out() {
            return self.run_stored(isa, workers, &units, SharedMut::new(&mut out));
        }
        if self.has_many_rows() {
            return self.run_laid_out(isa, workers, &units, SharedMut::new(&mut out));
        }
        QUANTIZED.with_borrow_mut(|kept| {
            let quantized = self.quantize(isa, workers, &segments, kept);
            let out = SharedMut::new(&mut out);
            // Of several experts only the last one's need to be short.
            let shortest = if segments.len() > 1 { 2 } else { 8 };
            let runs = shrinking_runs(units.len(), workers.count(), units.len() / (shortest * workers.count()));
            workers.run(runs.len() * segments.len(), &|task| {
                let (expert, rows) = &segments[task / runs.len()];
                let units = &units[runs[task % runs.len()].clone()];
                let rows = rows.clone();
                let laid_out = None;
                isa.run(Units { product: self, quantized: &quantized, laid_out, units, expert: *expert, rows, out });
            });
            kept.retain(|rows| rows.bytes.capacity() <= KEPT_BYTES);
        });
    }

    fn check(&self, out: usize) {
        let columns = self.columns();
        assert_eq!(self.x.len(), self.rows() * columns, "activations of {columns} columns");
        for projection in self.projections {
            assert_eq!(projection.matrix.columns, columns, "projections of one input");
            projection.matrix.check(self.stacked);
            let biases = projection.matrix.rows * self.stacked;
            assert!(projection.bias.is_none_or(|b| b.len() == biases), "size of a bias");
        }
        assert_eq!(out, self.rows() * self.width(), "size of the output");
        assert!(!self.finish.is_gated() || !self.is_stored_laid_out(), "units of two matrices that are laid out apart");
        match self.finish {
            Finish::Concat => {}
            Finish::Gelu | Finish::SquaredRelu => assert!(self.projections.len() == 1, "one projection"),
            Finish::Add(residual) => {
                assert!(self.projections.len() == 1 && residual.len() == out, "a residual of the output's size");
            }
            Finish::SwiGlu | Finish::GeGlu | Finish::ClampedSwiGlu { .. } => {
                let same = |p: &[Projection<'_>]| p.len() == 2 && p[0].matrix.rows == p[1].matrix.rows;
                assert!(same(self.projections), "two projections of the same shape");
            }
        }
        match self.experts {
            None => assert_eq!(self.stacked, 1, "a stack of matrices needs to know the experts"),
            Some(experts) => {
                assert_eq!(experts.len(), self.rows(), "one expert a row");
                assert!(experts.iter().all(|&e| (e as usize) < self.stacked), "an expert that does not exist");
            }
        }
    }

    /// Runs of rows with the same expert.
    fn segments(&self) -> Vec<(usize, Range<usize>)> {
        let Some(experts) = self.experts else { return vec![(0, 0..self.rows())] };
        let mut start = 0;
        let runs = experts.chunk_by(|a, b| a == b);
        runs.map(|run| {
            let rows = start..start + run.len();
            start = rows.end;
            (run[0] as usize, rows)
        })
        .collect()
    }

    fn units(&self) -> Vec<Unit> {
        let panels = |projection: usize| {
            let rows = self.projections[projection].matrix.rows;
            (0..rows).step_by(PANEL).map(move |first| Panel { projection, first, rows: PANEL.min(rows - first) })
        };
        if self.finish.is_gated() {
            return panels(0).zip(panels(1)).map(|(a, b)| Unit { panels: [Some(a), Some(b)] }).collect();
        }
        let of_all = self.projections.iter().map(|p| p.matrix.rows.div_ceil(PAIR * PANEL)).sum();
        let mut units = Vec::with_capacity(of_all);
        for projection in 0..self.projections.len() {
            let mut panels = panels(projection);
            while let Some(first) = panels.next() {
                units.push(Unit { panels: [Some(first), panels.next()] });
            }
        }
        units
    }

    /// The activations in every order that a packed matrix needs, made in `kept`.
    fn quantize<'k>(
        &self,
        isa: Isa,
        workers: &Workers,
        segments: &[(usize, Range<usize>)],
        kept: &'k mut Vec<QuantizedRows>,
    ) -> Vec<(Order, &'k QuantizedRows)> {
        let mut orders: Vec<Order> = Vec::new();
        for projection in self.projections {
            if let (Storage::Packed(packed), Precision::Fast) = (&projection.matrix.storage, self.precision) {
                let order = Order::of(packed);
                if !orders.contains(&order) {
                    orders.push(order);
                }
            }
        }
        kept.resize_with(orders.len().max(kept.len()), QuantizedRows::default);
        for (order, target) in orders.iter().zip(kept.iter_mut()) {
            self.quantize_rows(isa, workers, segments, *order, target);
        }
        orders.into_iter().zip(kept.iter()).collect()
    }

    fn quantize_rows(
        &self,
        isa: Isa,
        workers: &Workers,
        segments: &[(usize, Range<usize>)],
        order: Order,
        target: &mut QuantizedRows,
    ) {
        let columns = self.columns();
        let groups = columns / order.group;
        target.resize(self.rows(), columns, groups);
        let (mut x, mut bytes, mut scales, mut sums) =
            (self.x, &mut target.bytes[..], &mut target.scales[..], &mut target.sums[..]);
        let mut blocks = Vec::new();
        for (_, rows) in segments {
            let mut left = rows.len();
            while left > 0 {
                let n = left.min(isa.rows_together());
                let out = BlockParts {
                    bytes: bytes.split_off_mut(..n * columns).unwrap_or_default(),
                    scales: scales.split_off_mut(..n * groups).unwrap_or_default(),
                    sums: sums.split_off_mut(..n * groups).unwrap_or_default(),
                };
                let x = x.split_off(..n * columns).unwrap_or_default();
                blocks.push(Quantize { x, columns, order, out });
                left -= n;
            }
        }
        // A row is less than a microsecond of work: threads are worth it only for many.
        const ROWS_PER_TASK: usize = 16;
        if self.rows() < 2 * ROWS_PER_TASK {
            return blocks.into_iter().for_each(|block| isa.run(block));
        }
        let per_task = (ROWS_PER_TASK * blocks.len()).div_ceil(self.rows());
        let mut tasks = Vec::new();
        while !blocks.is_empty() {
            tasks.push(Mutex::new(blocks.split_off(blocks.len().saturating_sub(per_task))));
        }
        workers.run(tasks.len(), &|task| {
            let blocks = std::mem::take(&mut *tasks[task].lock().unwrap_or_else(PoisonError::into_inner));
            blocks.into_iter().for_each(|block| isa.run(block));
        });
    }
}

/// `0..len` in runs of at least `least` for `threads` to take in this order: the first are long, because each begins without having
/// prefetched, and the last short, so that all threads end together (Polychronopoulos and Kuck 1987, "Guided Self-Scheduling").
fn shrinking_runs(len: usize, threads: usize, least: usize) -> Vec<Range<usize>> {
    let (mut runs, mut first) = (Vec::new(), 0);
    while first < len {
        let run = ((len - first) / (2 * threads)).max(least).clamp(1, len - first);
        runs.push(first..first + run);
        first += run;
    }
    runs
}

/// Some units for the rows of one expert.
struct Units<'a> {
    product: &'a MatMul<'a>,
    quantized: &'a [(Order, &'a QuantizedRows)],
    /// The units' weights, if they are laid out.
    laid_out: Option<LaidOut<'a>>,
    units: &'a [Unit],
    expert: usize,
    rows: Range<usize>,
    out: SharedMut,
}

impl Work for Units<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // Taken, not borrowed in a closure: a closure would be compiled without the instruction set.
        let mut acc = ACCUMULATORS.take();
        // The last tile of rows may have more than there are.
        let of_rows = self.rows.len().next_multiple_of(S::ROWS_TOGETHER) * PAIR * PANEL;
        let len = if self.laid_out.is_some() { self.rows.len() * TOGETHER * WIDTH } else { of_rows };
        if acc.len() < len {
            acc.resize(len, 0.0);
        }
        if let Some(laid_out) = self.laid_out {
            let mut first = 0;
            while first < self.units.len() {
                first += self.compute_laid_out(simd, first, laid_out, &mut acc);
            }
        } else {
            for unit in self.units {
                match unit.panels {
                    [Some(a), Some(b)] if self.alike(&a, &b) => self.compute(simd, &[a, b], 0, &mut acc),
                    [Some(a), Some(b)] => {
                        self.compute(simd, &[a], 0, &mut acc);
                        self.compute(simd, &[b], PANEL, &mut acc);
                    }
                    [Some(a), None] => self.compute(simd, &[a], 0, &mut acc),
                    [None, _] => {}
                }
                self.finish(simd, unit, &mut acc);
            }
        }
        if acc.capacity() * size_of::<f32>() <= KEPT_BYTES {
            ACCUMULATORS.set(acc);
        }
    }
}

impl Units<'_> {
    fn storage(&self, panel: &Panel) -> &Storage<'_> {
        &self.product.projections[panel.projection].matrix.storage
    }

    /// Whether two panels can be computed together: neighbours, or packed in the same format.
    fn alike(&self, a: &Panel, b: &Panel) -> bool {
        match (self.storage(a), self.storage(b)) {
            (Storage::Packed(p), Storage::Packed(q)) => {
                a.projection == b.projection
                    || (self.product.precision == Precision::Fast && p.coding == q.coding && p.group == q.group)
            }
            _ => a.projection == b.projection,
        }
    }

    /// Products of panels that are alike with all rows, into `acc` from column `at` on.
    #[inline(always)]
    fn compute<S: Simd>(&self, simd: S, panels: &[Panel], at: usize, acc: &mut [f32]) {
        let matrix = &self.product.projections[panels[0].projection].matrix;
        let stacked = self.expert * matrix.rows;
        let first = panels[0].first + stacked;
        let rows: usize = panels.iter().map(|panel| panel.rows).sum();
        let columns = matrix.columns;
        let x = &self.product.x[self.rows.start * columns..self.rows.end * columns];
        match (&matrix.storage, self.product.precision) {
            (Storage::Packed(packed), Precision::Fast) => {
                let order = Order::of(packed);
                let x = self.quantized.iter().find(|(known, _)| *known == order);
                let (_, x) = x.expect("activations are quantised in the order of every matrix");
                // Gate and up advance side by side, the panels of one matrix in pairs.
                let next = if self.product.finish.is_gated() { PANEL } else { PAIR * PANEL };
                let mut weights = [WeightRows { packed, first, rows: panels[0].rows, next }; PAIR];
                for (weights, panel) in weights.iter_mut().zip(panels) {
                    if let Storage::Packed(packed) = self.storage(panel) {
                        *weights = WeightRows { packed, first: panel.first + stacked, rows: panel.rows, next };
                    }
                }
                let x_rows = self.rows.clone();
                Integer { panels: &weights[..panels.len()], columns, x, x_rows }.run(simd, &mut acc[at..]);
            }
            (Storage::Packed(packed), Precision::Exact) => {
                dot::packed(simd, packed, columns, first, rows, x, &mut acc[at..]);
            }
            (Storage::Dense(numbers), _) => dot::dense(simd, numbers, columns, first, rows, x, &mut acc[at..]),
            (Storage::LaidOut(_), _) => unreachable!("what is laid out is multiplied by another path"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::shrinking_runs;

    #[test]
    fn runs_shrink_and_are_all_there_is() {
        for threads in 1..9 {
            for len in 0..300 {
                for shortest in [0, 1, 7, len] {
                    let runs = shrinking_runs(len, threads, shortest);
                    let all: Vec<usize> = runs.iter().cloned().flatten().collect();
                    assert_eq!(all, (0..len).collect::<Vec<_>>());
                    let lens: Vec<usize> = runs.iter().map(|run| run.len()).collect();
                    assert!(lens.iter().all(|&run| run > 0) && lens.is_sorted_by(|a, b| a >= b), "{lens:?}");
                    // All but the last one, which takes what is left.
                    let (_, but_last) = lens.split_last().unwrap_or((&0, &[]));
                    assert!(but_last.iter().all(|&run| run >= shortest), "{lens:?}");
                }
            }
        }
        assert_eq!(
            shrinking_runs(16, 2, 1).iter().map(|run| run.len()).collect::<Vec<_>>(),
            [4, 3, 2, 1, 1, 1, 1, 1, 1, 1]
        );
    }
}
