//! Products in f32, in an order that does not depend on the number of rows: dense weights, and packed ones in exact mode.
//!
//! Every output is its own dot product: lane `l` adds the products of columns `l`, `l + 16`, ... one after another, and
//! the lanes are added in the order of [`Simd::sum`]. Tiles only decide which outputs are computed together.

use std::cell::RefCell;

use super::floats::{Element, Floats, as_bf16, as_f16};
use super::matmul::{PAIR, PANEL};
use super::matrix::{Coding, Packed};
use super::simd::{LANES, Simd, Work};

thread_local! {
    /// Unpacked weights of a unit.
    static UNPACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Rows `first..first + rows` of a dense matrix times all rows of `x [M, columns]`, into `acc`, a row every
/// `PAIR * PANEL` numbers.
#[inline(always)]
pub fn dense<S: Simd>(
    simd: S,
    numbers: &Floats<'_>,
    columns: usize,
    first: usize,
    rows: usize,
    x: &[f32],
    acc: &mut [f32],
) {
    match numbers.slice(first * columns, rows * columns) {
        Floats::F32(w) => tiles(simd, w, columns, x, acc),
        Floats::F16(w) => tiles(simd, as_f16(w), columns, x, acc),
        Floats::Bf16(w) => tiles(simd, as_bf16(w), columns, x, acc),
    }
}

/// The same for a packed matrix, whose rows are unpacked to f32 before.
#[inline(always)]
pub fn packed<S: Simd>(
    simd: S,
    packed: &Packed<'_>,
    columns: usize,
    first: usize,
    rows: usize,
    x: &[f32],
    acc: &mut [f32],
) {
    // Taken, not borrowed in a closure: a closure would be compiled without the instruction set.
    let mut kept = UNPACKED.take();
    if kept.len() < rows * columns {
        kept.resize(rows * columns, 0.0);
    }
    let unpacked = &mut kept[..rows * columns];
    for row in 0..rows {
        simd.call(UnpackRow { packed, row: first + row, out: &mut unpacked[row * columns..(row + 1) * columns] });
    }
    tiles(simd, unpacked, columns, x, acc);
    UNPACKED.set(kept);
}

/// The weights of one row, `scale * code + bias`, rounded once where the processor has a fused operation.
pub struct UnpackRow<'a> {
    pub packed: &'a Packed<'a>,
    pub row: usize,
    pub out: &'a mut [f32],
}

impl Work for UnpackRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { packed, row, out } = self;
        let bits = packed.coding.bits();
        let row_bytes = out.len() * bits / 8;
        let codes = &packed.codes[row * row_bytes..(row + 1) * row_bytes];
        let groups = out.len() / packed.group;
        for group in 0..groups {
            let (scale, bias) = packed.scale_and_bias(row * groups + group);
            let (scale, bias) = (simd.splat(scale), simd.splat(bias));
            let mut first = group * packed.group;
            while first < (group + 1) * packed.group {
                let bytes = &codes[first * bits / 8..(first + LANES) * bits / 8];
                let out = &mut out[first..first + LANES];
                // SAFETY: sixteen codes are `2 * bits` bytes; `out` and the array have room for sixteen.
                unsafe {
                    let codes = match packed.coding {
                        Coding::Affine(4) => simd.load_u4(bytes.as_ptr()),
                        Coding::Affine(8) => simd.load_u8(bytes.as_ptr()),
                        _ => {
                            let mut unpacked = [0u8; LANES];
                            packed.codes(codes, first, &mut unpacked);
                            simd.load_u8(unpacked.as_ptr())
                        }
                    };
                    simd.store(out.as_mut_ptr(), simd.fma(simd.float_of_int(codes), scale, bias));
                }
                first += LANES;
            }
        }
    }
}

#[inline(always)]
fn tiles<S: Simd, T: Element>(simd: S, w: &[T], columns: usize, x: &[f32], acc: &mut [f32]) {
    let (rows, m) = (w.len() / columns.max(1), x.len() / columns.max(1));
    assert!(rows <= PAIR * PANEL && acc.len() >= m.saturating_sub(1) * PAIR * PANEL + rows);
    let mut row = 0;
    while row < m {
        let left = m - row;
        let mut column = 0;
        let mut done = 1;
        while column < rows {
            let (w, x) = (&w[column * columns..], &x[row * columns..]);
            let acc = &mut acc[row * PAIR * PANEL + column..];
            let several = rows - column >= S::DOT_COLUMNS;
            // Register tiles that the instruction set has room for; the others are compiled away.
            done = match (left, several) {
                (6.., true) if S::DOT_ROWS >= 6 => simd.call(Tile::<T, 6, 4> { w, x, columns, acc }),
                (6.., false) if S::DOT_ROWS >= 6 => simd.call(Tile::<T, 6, 1> { w, x, columns, acc }),
                (2.., true) if S::DOT_ROWS >= 2 && S::DOT_COLUMNS < 4 => {
                    simd.call(Tile::<T, 2, 2> { w, x, columns, acc })
                }
                (2.., true) if S::DOT_ROWS >= 2 => simd.call(Tile::<T, 2, 4> { w, x, columns, acc }),
                (2.., false) if S::DOT_ROWS >= 2 => simd.call(Tile::<T, 2, 1> { w, x, columns, acc }),
                (_, true) if S::DOT_COLUMNS < 4 => simd.call(Tile::<T, 1, 2> { w, x, columns, acc }),
                (_, true) => simd.call(Tile::<T, 1, 4> { w, x, columns, acc }),
                (_, false) => simd.call(Tile::<T, 1, 1> { w, x, columns, acc }),
            };
            column += if several { S::DOT_COLUMNS } else { 1 };
        }
        row += done;
    }
}

/// `M` rows of activations with `N` weight rows, from the first of `x` and `w` on; returns `M`.
struct Tile<'a, T, const M: usize, const N: usize> {
    w: &'a [T],
    x: &'a [f32],
    columns: usize,
    acc: &'a mut [f32],
}

impl<T: Element, const M: usize, const N: usize> Work for Tile<'_, T, M, N> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let columns = self.columns;
        let (w, x) = (&self.w[..N * columns], &self.x[..M * columns]);
        let mut sums = [[simd.splat(0.0); N]; M];
        let whole = columns / LANES * LANES;
        let mut weights = [simd.splat(0.0); N];
        let mut at = 0;
        while at < whole {
            // SAFETY: `at + 16 <= columns`, and the slices have `N` and `M` rows of them.
            unsafe {
                for n in 0..N {
                    weights[n] = T::load(simd, w.as_ptr().add(n * columns + at));
                }
                for m in 0..M {
                    let x = simd.load(x.as_ptr().add(m * columns + at));
                    for n in 0..N {
                        sums[m][n] = simd.fma(weights[n], x, sums[m][n]);
                    }
                }
            }
            at += LANES;
        }
        if whole < columns {
            for n in 0..N {
                weights[n] = load_tail(simd, &w[n * columns + whole..(n + 1) * columns]);
            }
            for m in 0..M {
                let x = load_tail(simd, &x[m * columns + whole..(m + 1) * columns]);
                for n in 0..N {
                    sums[m][n] = simd.fma(weights[n], x, sums[m][n]);
                }
            }
        }
        for m in 0..M {
            sum_all(simd, &sums[m], &mut self.acc[m * PAIR * PANEL..][..N]);
        }
        M
    }
}

/// The lanes of each vector added up, with the same bits however many vectors there are.
#[inline(always)]
pub fn sum_all<S: Simd, const N: usize>(simd: S, vectors: &[S::F; N], sums: &mut [f32]) {
    assert_eq!(sums.len(), N);
    if N == 4 {
        sums.copy_from_slice(&simd.sum4([vectors[0], vectors[1 % N], vectors[2 % N], vectors[3 % N]]));
    } else {
        for n in 0..N {
            sums[n] = simd.sum(vectors[n]);
        }
    }
}

/// Fewer than sixteen elements, and zeros.
#[inline(always)]
pub fn load_tail<S: Simd, T: Element>(simd: S, x: &[T]) -> S::F {
    let mut padded = [0f32; LANES];
    for (padded, x) in padded.iter_mut().zip(x) {
        *padded = x.to_f32();
    }
    // SAFETY: an array of sixteen.
    unsafe { simd.load(padded.as_ptr()) }
}
