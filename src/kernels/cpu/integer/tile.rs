//! The inner part of the integer product: unpacked panels against rows of activations.

use std::ops::Range;

use super::super::matmul::{PAIR, PANEL};
use super::super::matrix::Coding;
use super::super::simd::{FOLD, Simd, Work};
use super::{Integer, Line};

/// Unpacked codes are below 16, below 128, or any bytes.
const LOW: u8 = 0;
const MIDDLE: u8 = 1;
const FULL: u8 = 2;

/// Unpacked panels, to be multiplied with all rows of activations.
pub(super) struct Tile<'a, const N: usize> {
    /// `[panel][group of the chunk][four codes]`.
    pub codes: &'a [Line],
    /// `[panel][group of the row][scale, bias]`.
    pub scales: &'a [Line],
    /// The groups that are unpacked.
    pub groups: Range<usize>,
    pub of: &'a Integer<'a>,
    /// What to fetch of each panel meanwhile: while codes are unpacked there is no time for it.
    pub next: [*const u8; N],
}

impl<const N: usize> Tile<'_, N> {
    #[inline(always)]
    pub fn all_rows<S: Simd>(&self, simd: S, acc: &mut [f32]) {
        match self.of.packed().coding {
            Coding::Affine(2..=4) if (self.of.group() / 4).is_multiple_of(FOLD) => {
                self.all_rows_by::<S, LOW>(simd, acc)
            }
            Coding::Affine(8) => self.all_rows_by::<S, FULL>(simd, acc),
            _ => self.all_rows_by::<S, MIDDLE>(simd, acc),
        }
    }

    /// The same for codes of a range.
    #[inline(always)]
    fn all_rows_by<S: Simd, const CODES: u8>(&self, simd: S, acc: &mut [f32]) {
        let rows = self.of.x_rows.len();
        let mut row = 0;
        while row < rows {
            let left = rows - row;
            // Register tiles that the instruction set has room for; the others are compiled away.
            row += match left {
                12.. if S::INT_ROWS >= 12 => simd.call(TileRows::<12, N, CODES> { tile: self, row, acc }),
                8.. if S::INT_ROWS >= 8 => simd.call(TileRows::<8, N, CODES> { tile: self, row, acc }),
                4.. if S::INT_ROWS >= 4 => simd.call(TileRows::<4, N, CODES> { tile: self, row, acc }),
                2.. if S::INT_ROWS >= 2 => simd.call(TileRows::<2, N, CODES> { tile: self, row, acc }),
                _ => simd.call(TileRows::<1, N, CODES> { tile: self, row, acc }),
            };
        }
    }

    /// `M` rows of activations from `row` on; returns `M`.
    #[inline(always)]
    fn rows<S: Simd, const M: usize, const CODES: u8>(&self, simd: S, row: usize, acc: &mut [f32]) -> usize {
        let Integer { columns, x, x_rows, .. } = self.of;
        let (columns, packed) = (*columns, self.of.packed());
        let group = self.of.group();
        let (steps, all_groups) = (group / 4, columns / group);
        let x_row = x_rows.start + row;
        let bytes = &x.bytes[x_row * columns..(x_row + M) * columns];
        let x_scales = &x.scales[x_row * all_groups..(x_row + M) * all_groups];
        let x_sums = &x.sums[x_row * all_groups..(x_row + M) * all_groups];
        let panel_len = self.groups.len() * steps;
        assert!(self.codes.len() >= N * panel_len && self.scales.len() >= N * all_groups * 2);
        assert!(acc.len() >= (row + M - 1) * PAIR * PANEL + N * PANEL && self.groups.end <= all_groups);
        assert!(CODES != LOW || steps.is_multiple_of(FOLD));
        // Bytes that sixteen rows have for a step. The first rows fetch for all.
        let fetched = if row == 0 { PANEL * 4 * packed.coding.bits() / 8 } else { 0 };
        for (index, group_at) in self.groups.clone().enumerate() {
            let mut sums = [[simd.splat_i(0); N]; M];
            // SAFETY: all offsets are inside the slices whose sizes are asserted above: `M` rows of `columns` bytes,
            // `N` panels of `panel_len` lines.
            unsafe {
                let codes = self.codes.as_ptr().add(index * steps);
                let x = bytes.as_ptr().add(group_at * group);
                // Without codes below 16 there is nothing to fold.
                let part = if CODES == LOW { FOLD } else { steps };
                for first in (0..steps).step_by(part) {
                    let mut part_sums = if CODES == LOW { [[simd.splat_i(0); N]; M] } else { sums };
                    for step in first..first + part {
                        let mut w = [simd.splat_i(0); N];
                        for (n, w) in w.iter_mut().enumerate() {
                            simd.prefetch(self.next[n].wrapping_add((index * steps + step) * fetched));
                            *w = simd.load_i(codes.add(n * panel_len + step).cast::<u8>());
                        }
                        for m in 0..M {
                            let four = simd.splat_i(x.add(m * columns + 4 * step).cast::<i32>().read_unaligned());
                            for n in 0..N {
                                part_sums[m][n] = match CODES {
                                    LOW => simd.dot_u4(part_sums[m][n], w[n], four),
                                    MIDDLE => simd.dot_u7(part_sums[m][n], w[n], four),
                                    _ => simd.dot_u8(part_sums[m][n], w[n], four),
                                };
                            }
                        }
                    }
                    for m in 0..M {
                        for n in 0..N {
                            let sum = part_sums[m][n];
                            sums[m][n] = if CODES == LOW { simd.add_i(sums[m][n], simd.fold(sum)) } else { sum };
                        }
                    }
                }
                for n in 0..N {
                    let scales = self.scales.as_ptr().add((n * all_groups + group_at) * 2);
                    let (scale, bias) = (simd.load(scales.cast()), simd.load(scales.add(1).cast()));
                    for m in 0..M {
                        let at = m * all_groups + group_at;
                        let target = acc.as_mut_ptr().add((row + m) * PAIR * PANEL + n * PANEL);
                        let scaled = simd.mul(simd.float_of_int(sums[m][n]), scale);
                        let sum = simd.fma(bias, simd.splat(*x_sums.get_unchecked(at)), simd.load(target));
                        simd.store(target, simd.fma(scaled, simd.splat(*x_scales.get_unchecked(at)), sum));
                    }
                }
            }
        }
        M
    }
}

/// See [`Tile::rows`].
struct TileRows<'a, const M: usize, const N: usize, const CODES: u8> {
    tile: &'a Tile<'a, N>,
    row: usize,
    acc: &'a mut [f32],
}

impl<const M: usize, const N: usize, const CODES: u8> Work for TileRows<'_, M, N, CODES> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        self.tile.rows::<S, M, CODES>(simd, self.row, self.acc)
    }
}
