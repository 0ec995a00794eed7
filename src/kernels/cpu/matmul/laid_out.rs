//! Products whose weights lie as `gemm.rs` reads them: laid out for one product with many rows, or once and for all.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use super::super::floats::{Floats, SharedMut, as_bf16, as_f16};
use super::super::gemm::{PackLanes, RoundPairs, TimesPanels, WIDTH, as_pairs, lanes_at};
use super::super::matrix::{Matrix, Storage};
use super::super::simd::{Isa, Simd, Work};
use super::super::threads::Workers;
use super::{Finish, KEPT_BYTES, MatMul, PANEL, Precision, Projection, Unit, Units};

/// Rows from which on dense weights are laid out for `gemm.rs`.
const MANY_ROWS: usize = 64;

/// Rows of a task of such a product.
const TASK_ROWS: usize = 48;

/// Units that are multiplied together when weights are laid out.
pub(super) const TOGETHER: usize = 2;

/// Bytes of weights that are laid out at once: all threads read them from the cache that they share, or from their own.
const LAID_OUT: usize = 3 << 19;

thread_local! {
    /// Weights as they are laid out.
    static PANELS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Activations as pairs of bf16.
    static ROUNDED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Units whose weights are in the cache together.
fn units_at_once(workers: &Workers, depth: usize) -> usize {
    (LAID_OUT / (depth * WIDTH * size_of::<f32>()).max(1)).max(workers.count())
}

/// Numbers of a matrix that is laid out: its rows fill whole units.
pub fn laid_out_len(rows: usize, columns: usize) -> usize {
    rows.next_multiple_of(WIDTH) * columns
}

/// Lays out a dense matrix as [`Storage::LaidOut`] has it, for the same instruction set only.
pub fn lay_out(isa: Isa, workers: &Workers, matrix: Matrix<'_>, panels: &mut [f32]) {
    matrix.check(1);
    assert_eq!(panels.len(), laid_out_len(matrix.rows, matrix.columns), "size of a matrix that is laid out");
    let (projections, precision) = ([Projection { matrix, bias: None }], Precision::Fast);
    let (experts, stacked, finish) = (None, 1, Finish::Concat);
    let product = MatMul { x: &[], projections: &projections, experts, stacked, finish, precision };
    product.lay_out(isa, workers, &product.units(), false, panels);
}

impl MatMul<'_> {
    /// Whether weights are worth laying out.
    pub(super) fn has_many_rows(&self) -> bool {
        let dense = |projection: &Projection<'_>| matches!(projection.matrix.storage, Storage::Dense(_));
        self.rows() >= MANY_ROWS
            && self.precision == Precision::Fast
            && self.experts.is_none()
            && self.projections.iter().all(dense)
    }

    /// Whether all weights are stored as `gemm.rs` reads them. Some alone cannot be.
    pub(super) fn is_stored_laid_out(&self) -> bool {
        let laid_out = |projection: &Projection<'_>| matches!(projection.matrix.storage, Storage::LaidOut(_));
        let any = self.projections.iter().any(laid_out);
        assert!(!any || self.projections.iter().all(laid_out), "matrices of one product lie differently");
        any
    }

    /// Whether many rows are multiplied as pairs of bf16.
    fn is_in_pairs(&self, isa: Isa) -> bool {
        let bf16 = |p: &Projection<'_>| matches!(p.matrix.storage, Storage::Dense(Floats::Bf16(_)));
        isa.has_dot_bf16() && self.columns().is_multiple_of(2) && self.projections.iter().all(bf16)
    }

    /// The activations as pairs of bf16, made in `kept`.
    fn round_pairs<'k>(&self, isa: Isa, workers: &Workers, kept: &'k mut Vec<f32>) -> &'k [f32] {
        let len = self.x.len() / 2;
        if kept.len() < len {
            kept.resize(len, 0.0);
        }
        let depth = self.columns() / 2;
        let rows = self.x.chunks(TASK_ROWS * 2 * depth).zip(kept[..len].chunks_mut(TASK_ROWS * depth));
        let parts: Vec<_> = rows.map(Mutex::new).collect();
        workers.run(parts.len(), &|part| {
            let (x, pairs) = &mut *parts[part].lock().unwrap_or_else(PoisonError::into_inner);
            isa.run(RoundPairs { x, pairs });
        });
        drop(parts);
        &kept[..len]
    }

    /// Multiplies all rows with weights that are stored laid out.
    pub(super) fn run_stored(&self, isa: Isa, workers: &Workers, units: &[Unit], out: SharedMut) {
        let (x, depth, pairs) = (self.x, self.columns(), false);
        let at_once = units_at_once(workers, depth);
        for units in units.chunk_by(|a, b| a.projection() == b.projection()) {
            let Storage::LaidOut(panels) = self.projections[units[0].projection()].matrix.storage else { continue };
            for (units, panels) in units.chunks(at_once).zip(panels.chunks(at_once * depth * WIDTH)) {
                self.times(isa, workers, units, LaidOut { x, panels, depth, pairs }, out);
            }
        }
    }

    /// Lays out the weights of some units after the other, and multiplies all rows with them.
    pub(super) fn run_laid_out(&self, isa: Isa, workers: &Workers, units: &[Unit], out: SharedMut) {
        let pairs = self.is_in_pairs(isa);
        let mut rounded = ROUNDED.take();
        let x = if pairs { self.round_pairs(isa, workers, &mut rounded) } else { self.x };
        let depth = if pairs { self.columns() / 2 } else { self.columns() };
        let at_once = units_at_once(workers, depth).min(units.len());
        let mut kept = PANELS.take();
        if kept.len() < at_once * depth * WIDTH {
            kept.resize(at_once * depth * WIDTH, 0.0);
        }
        for units in units.chunks(at_once) {
            self.lay_out(isa, workers, units, pairs, &mut kept);
            self.times(isa, workers, units, LaidOut { x, panels: &kept, depth, pairs }, out);
        }
        for (kept, slot) in [(kept, &PANELS), (rounded, &ROUNDED)] {
            if kept.capacity() * size_of::<f32>() <= KEPT_BYTES {
                slot.set(kept);
            }
        }
    }

    /// Lays out the weights of `units`, one after another.
    fn lay_out(&self, isa: Isa, workers: &Workers, units: &[Unit], pairs: bool, panels: &mut [f32]) {
        let depth = if pairs { self.columns() / 2 } else { self.columns() };
        let parts: Vec<_> = panels.chunks_exact_mut((depth * WIDTH).max(1)).zip(units).map(Mutex::new).collect();
        workers.run(parts.len(), &|part| {
            let (panel, unit) = &mut *parts[part].lock().unwrap_or_else(PoisonError::into_inner);
            isa.run(LayOut { product: self, unit, pairs, panel });
        });
    }

    /// Multiplies all rows with the weights of `units`.
    fn times(&self, isa: Isa, workers: &Workers, units: &[Unit], laid_out: LaidOut<'_>, out: SharedMut) {
        let blocks = self.rows().div_ceil(TASK_ROWS);
        // Many tasks a thread, so that they end together; where rows are few, columns are divided, too.
        let per_task = units.len().div_ceil((workers.count() * 16).div_ceil(blocks)).next_multiple_of(TOGETHER);
        let runs = units.len().div_ceil(per_task);
        workers.run(blocks * runs, &|task| {
            let rows = task / runs * TASK_ROWS..((task / runs + 1) * TASK_ROWS).min(self.rows());
            let first = task % runs * per_task;
            let units = &units[first..(first + per_task).min(units.len())];
            let panels = &laid_out.panels[first * laid_out.depth * WIDTH..];
            let laid_out = Some(LaidOut { panels, ..laid_out });
            isa.run(Units { product: self, quantized: &[], laid_out, units, expert: 0, rows, out });
        });
    }
}

/// Lays out the weights of a unit as one panel of `gemm.rs`.
struct LayOut<'a> {
    product: &'a MatMul<'a>,
    unit: &'a Unit,
    /// As pairs of bf16.
    pairs: bool,
    panel: &'a mut [f32],
}

impl Work for LayOut<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { product, unit, pairs, panel } = self;
        let columns = product.columns();
        let depth = if pairs { columns / 2 } else { columns };
        for (at, part) in unit.panels.iter().enumerate() {
            let panel = &mut panel[lanes_at::<S>(at * PANEL, depth)..];
            let (count, numbers) = match part {
                Some(part) => match &product.projections[part.projection].matrix.storage {
                    Storage::Dense(numbers) => (part.rows, numbers.slice(part.first * columns, part.rows * columns)),
                    Storage::Packed(_) | Storage::LaidOut(_) => unreachable!("only dense weights are laid out"),
                },
                None => (0, Floats::F32(&[])),
            };
            match numbers {
                Floats::F32(rows) => PackLanes { rows, stride: depth, count, depth, panel }.run(simd),
                Floats::F16(rows) => PackLanes { rows: as_f16(rows), stride: depth, count, depth, panel }.run(simd),
                Floats::Bf16(rows) if pairs => {
                    PackLanes { rows: as_pairs(rows), stride: depth, count, depth, panel }.run(simd);
                }
                Floats::Bf16(rows) => PackLanes { rows: as_bf16(rows), stride: depth, count, depth, panel }.run(simd),
            }
        }
    }
}

/// What `gemm.rs` multiplies.
#[derive(Clone, Copy)]
pub(super) struct LaidOut<'a> {
    /// All activations, `depth` a row.
    x: &'a [f32],
    /// The weights of units, one after another.
    panels: &'a [f32],
    /// Columns, or pairs of them.
    depth: usize,
    /// Whether activations and weights are pairs of bf16.
    pairs: bool,
}

impl Units<'_> {
    /// All of some units from `first` on, whose weights are laid out; returns how many. Sums begin with what is added.
    #[inline(always)]
    pub(super) fn compute_laid_out<S: Simd>(
        &self,
        simd: S,
        first: usize,
        laid_out: LaidOut<'_>,
        acc: &mut [f32],
    ) -> usize {
        let LaidOut { x, panels, depth, pairs } = laid_out;
        let units = &self.units[first..(first + TOGETHER).min(self.units.len())];
        let (rows, width, stride) = (self.rows.len(), self.product.width(), units.len() * WIDTH);
        let acc = &mut acc[..rows * stride];
        for (at, unit) in units.iter().enumerate() {
            let (biases, places) = (self.biases(simd, unit).unwrap_or([0f32; WIDTH]), self.places(unit));
            for (row, acc) in self.rows.clone().zip(acc.chunks_exact_mut(stride)) {
                let acc = &mut acc[at * WIDTH..][..WIDTH];
                acc.copy_from_slice(&biases);
                if let Finish::Add(residual) = self.product.finish {
                    self.add_residual(simd, residual, row * width, &places, acc);
                }
            }
        }
        let a = &x[self.rows.start * depth..self.rows.end * depth];
        let panels = &panels[first * depth * WIDTH..][..units.len() * depth * WIDTH];
        let count = units.len();
        TimesPanels { pairs, a, a_stride: depth, rows, depth, panels, count, begin: 0, acc, acc_stride: stride }
            .run(simd);
        for (at, unit) in units.iter().enumerate() {
            let places = self.places(unit);
            for (row, acc) in self.rows.clone().zip(acc.chunks_exact_mut(stride)) {
                let acc = &mut acc[at * WIDTH..][..WIDTH];
                self.activate(simd, acc);
                self.write(simd, row * width, &places, acc);
            }
        }
        count
    }
}
