//! Row by row operations: norms, rotary positions, rows of an embedding table.

use super::dot::{UnpackRow, load_tail};
use super::floats::{Floats, FloatsMut, Rows, SharedMut};
use super::math;
use super::matrix::{Matrix, Storage};
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Numbers that are worth a task of their own.
const NUMBERS_PER_TASK: usize = 16 * 1024;

/// Calls `body` with every row, on several threads if there are many numbers.
fn for_rows(workers: &Workers, rows: usize, width: usize, body: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
    let per_task = (NUMBERS_PER_TASK / width.max(1)).max(1);
    workers.run(rows.div_ceil(per_task), &|task| body(task * per_task..((task + 1) * per_task).min(rows)));
}

/// Root-mean-square norm of rows (Zhang and Sennrich 2019): `x / sqrt(mean(x^2) + eps) * weight`.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[width]`.
    pub weight: Floats<'a>,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl RmsNorm<'_> {
    /// Rows of `x [T, width]` into `out`, of the same shape. Panics if the sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, x: &[f32], mut out: FloatsMut<'_>) {
        let width = self.weight.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(width.max(1)), "rows of {width}");
        let out = SharedMut::new(&mut out);
        for_rows(workers, x.len() / width.max(1), width, &|rows| {
            isa.run(NormRows { norm: self, x: &x[rows.start * width..rows.end * width], first: rows.start, out });
        });
    }

    /// Normalises one row in place.
    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, row: &mut [f32]) {
        let width = row.len();
        let whole = width / LANES * LANES;
        let mut squares = simd.splat(0.0);
        let mut at = 0;
        while at < whole {
            // SAFETY: sixteen numbers from `at` on.
            let x = unsafe { simd.load(row.as_ptr().add(at)) };
            squares = simd.fma(x, x, squares);
            at += LANES;
        }
        let tail = load_tail(simd, &row[whole..]);
        squares = simd.fma(tail, tail, squares);
        let scale = 1.0 / (simd.sum(squares) / width as f32 + self.eps).sqrt();
        match self.weight {
            Floats::F32(weight) => scale_row(row, scale, |i| weight[i]),
            Floats::F16(weight) => scale_row(row, scale, |i| super::floats::f16_to_f32(weight[i])),
            Floats::Bf16(weight) => scale_row(row, scale, |i| super::floats::bf16_to_f32(weight[i])),
        }
    }
}

#[inline(always)]
fn scale_row(row: &mut [f32], scale: f32, weight: impl Fn(usize) -> f32) {
    for (i, x) in row.iter_mut().enumerate() {
        *x = *x * scale * weight(i);
    }
}

struct NormRows<'a> {
    norm: &'a RmsNorm<'a>,
    x: &'a [f32],
    first: usize,
    out: SharedMut,
}

impl Work for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.norm.weight.len();
        let mut row = vec![0f32; width];
        for (i, x) in self.x.chunks_exact(width).enumerate() {
            row.copy_from_slice(x);
            self.norm.row(simd, &mut row);
            // SAFETY: this row is this task's.
            unsafe { self.out.write((self.first + i) * width, &row) };
        }
    }
}

/// Layer norm of rows (Ba et al. 2016): `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// `[width]`.
    pub weight: Floats<'a>,
    /// `[width]`.
    pub bias: Option<Floats<'a>>,
    /// Added to the variance.
    pub eps: f32,
}

impl LayerNorm<'_> {
    /// Rows of `x [T, width]` into `out`, of the same shape. Panics if the sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, x: &[f32], mut out: FloatsMut<'_>) {
        let width = self.weight.len();
        assert!(x.len() == out.len() && x.len().is_multiple_of(width.max(1)), "rows of {width}");
        assert!(self.bias.is_none_or(|bias| bias.len() == width), "size of a bias");
        let out = SharedMut::new(&mut out);
        for_rows(workers, x.len() / width.max(1), width, &|rows| {
            let x = &x[rows.start * width..rows.end * width];
            isa.run(LayerNormRows { norm: self, x, first: rows.start, out });
        });
    }
}

struct LayerNormRows<'a> {
    norm: &'a LayerNorm<'a>,
    x: &'a [f32],
    first: usize,
    out: SharedMut,
}

impl Work for LayerNormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { norm, x, first, out } = self;
        let width = norm.weight.len();
        let (mut weight, mut bias, mut row) = (vec![0f32; width], vec![0f32; width], vec![0f32; width]);
        norm.weight.widen(simd, &mut weight);
        if let Some(given) = &norm.bias {
            given.widen(simd, &mut bias);
        }
        let whole = width / LANES * LANES;
        for (i, x) in x.chunks_exact(width).enumerate() {
            let mut sum = load_tail(simd, &x[whole..]);
            let mut at = 0;
            while at < whole {
                // SAFETY: sixteen numbers from `at` on.
                sum = simd.add(sum, unsafe { simd.load(x.as_ptr().add(at)) });
                at += LANES;
            }
            let mean = simd.sum(sum) / width as f32;
            let means = simd.splat(mean);
            let mut squares = simd.splat(0.0);
            let mut at = 0;
            while at < whole {
                // SAFETY: sixteen numbers from `at` on.
                let apart = simd.sub(unsafe { simd.load(x.as_ptr().add(at)) }, means);
                squares = simd.fma(apart, apart, squares);
                at += LANES;
            }
            let mut variance = simd.sum(squares);
            for x in &x[whole..] {
                variance += (x - mean) * (x - mean);
            }
            let scale = 1.0 / (variance / width as f32 + norm.eps).sqrt();
            for j in 0..width {
                row[j] = (x[j] - mean) * scale * weight[j] + bias[j];
            }
            // SAFETY: this row is this task's.
            unsafe { out.write((first + i) * width, &row) };
        }
    }
}

/// Rotary positions (Su et al. 2021) for heads, before or after an optional norm of each head.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    /// Width of a head.
    pub width: usize,
    /// Dimensions that turn: the first ones, an even number.
    pub dims: usize,
    /// Angle per position of each pair, `[dims / 2]`.
    pub frequencies: &'a [f32],
    /// Pairs are neighbours instead of halves.
    pub traditional: bool,
    /// Multiplies the dimensions that turn.
    pub magnitude: f32,
    /// Of each head.
    pub norm: Option<RmsNorm<'a>>,
    /// Whether heads are normalised after their rotation instead of before.
    pub turned_first: bool,
}

impl Rotary<'_> {
    /// Heads of the rows `x` at `positions [T]` into `out [T, heads, width]`. Panics if sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, x: Rows<'_>, positions: &[usize], mut out: FloatsMut<'_>) {
        let (tokens, row) = (positions.len(), x.width);
        assert!(out.len() == tokens * row && row.is_multiple_of(self.width.max(1)), "size of the heads");
        x.check(tokens);
        assert!(self.dims <= self.width && self.frequencies.len() * 2 == self.dims, "pairs of dimensions");
        assert!(self.norm.is_none_or(|norm| norm.weight.len() == self.width), "a norm of heads");
        let out = SharedMut::new(&mut out);
        for_rows(workers, tokens, row, &|rows| {
            for token in rows {
                isa.run(RotateToken {
                    rotary: self,
                    x: x.row(token),
                    position: positions[token],
                    at: token * row,
                    out,
                });
            }
        });
    }
}

struct RotateToken<'a> {
    rotary: &'a Rotary<'a>,
    x: &'a [f32],
    position: usize,
    at: usize,
    out: SharedMut,
}

impl Work for RotateToken<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Rotary { width, dims, frequencies, traditional, magnitude, norm, turned_first } = *self.rotary;
        let (before, after) = if turned_first { (None, norm) } else { (norm, None) };
        let half = dims / 2;
        let padded = half.next_multiple_of(LANES);
        let (mut sines, mut cosines) = (vec![0f32; padded], vec![0f32; padded]);
        let mut at = 0;
        while at < padded {
            let frequency = load_tail(simd, &frequencies[at..half.min(at + LANES)]);
            let (sine, cosine) = math::sin_cos(simd, simd.mul(frequency, simd.splat(self.position as f32)));
            // SAFETY: whole vectors fit `padded` numbers.
            unsafe {
                simd.store(sines.as_mut_ptr().add(at), simd.mul(sine, simd.splat(magnitude)));
                simd.store(cosines.as_mut_ptr().add(at), simd.mul(cosine, simd.splat(magnitude)));
            }
            at += LANES;
        }
        let mut row = vec![0f32; width];
        for (head, x) in self.x.chunks_exact(width).enumerate() {
            row.copy_from_slice(x);
            if let Some(norm) = &before {
                norm.row(simd, &mut row);
            }
            if traditional {
                for i in 0..half {
                    let (a, b) = (row[2 * i], row[2 * i + 1]);
                    row[2 * i] = a * cosines[i] - b * sines[i];
                    row[2 * i + 1] = a * sines[i] + b * cosines[i];
                }
            } else {
                let (first, second) = row[..dims].split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cosines[i] - b * sines[i];
                    second[i] = a * sines[i] + b * cosines[i];
                }
            }
            if let Some(norm) = &after {
                norm.row(simd, &mut row);
            }
            // SAFETY: this token's place is this task's.
            unsafe { self.out.write(self.at + head * width, &row) };
        }
    }
}

/// Rows `ids` of a table as numbers, into `out [ids, columns]`. Panics if a row does not exist or sizes do not agree.
pub fn take_rows(isa: Isa, workers: &Workers, table: &Matrix<'_>, ids: &[u32], mut out: FloatsMut<'_>) {
    table.check(1);
    assert_eq!(out.len(), ids.len() * table.columns, "size of the output");
    assert!(ids.iter().all(|&id| (id as usize) < table.rows), "a row that does not exist");
    let out = SharedMut::new(&mut out);
    for_rows(workers, ids.len(), table.columns, &|rows| {
        isa.run(TakeRows { table, ids: &ids[rows.clone()], first: rows.start, out });
    });
}

struct TakeRows<'a> {
    table: &'a Matrix<'a>,
    ids: &'a [u32],
    first: usize,
    out: SharedMut,
}

impl Work for TakeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let columns = self.table.columns;
        let mut row = vec![0f32; columns];
        for (i, &id) in self.ids.iter().enumerate() {
            match &self.table.storage {
                Storage::Dense(numbers) => numbers.slice(id as usize * columns, columns).widen(simd, &mut row),
                Storage::Packed(packed) => simd.call(UnpackRow { packed, row: id as usize, out: &mut row }),
                Storage::LaidOut(_) => unreachable!("a table is not laid out"),
            }
            // SAFETY: this row is this task's.
            unsafe { self.out.write((self.first + i) * columns, &row) };
        }
    }
}
