//! The inner part of the integer product: unpacked panels against rows of activations.

use std::ops::Range;

use super::super::matmul::{PAIR, PANEL};
use super::super::matrix::Coding;
use super::super::quantize::{RowsOfBlock, row_step};
use super::super::simd::{FOLD, Simd, Work};
use super::{BLOCK, Integer, Line, VECTOR};

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
        let (rows, mut row) = (self.of.x_rows.len(), 0);
        if simd.has_row_pairs() {
            // Two pairs: their sums of one panel take 16 of 32 registers, and share the work of arranging codes.
            while rows - row >= 4 {
                row += simd.call(TilePairs::<2, N> { tile: self, row, acc });
            }
            if rows - row >= 2 {
                row += simd.call(TilePairs::<1, N> { tile: self, row, acc });
            }
        }
        match self.of.packed().coding {
            Coding::Affine(2..=4) if S::FOLDS && (self.of.group() / 4).is_multiple_of(FOLD) => {
                self.rows_from::<S, LOW>(simd, row, acc)
            }
            Coding::Affine(8) => self.rows_from::<S, FULL>(simd, row, acc),
            _ => self.rows_from::<S, MIDDLE>(simd, row, acc),
        }
    }

    /// All rows from `row` on, for codes of a range.
    #[inline(always)]
    fn rows_from<S: Simd, const CODES: u8>(&self, simd: S, mut row: usize, acc: &mut [f32]) {
        let rows = self.of.x_rows.len();
        while row < rows {
            let left = rows - row;
            // Register tiles that the instruction set has room for; the others are compiled away. Where rows lie together, a tile
            // may have more rows than there are.
            row += match left {
                9.. if S::INT_ROWS >= 12 => simd.call(TileRows::<12, N, CODES> { tile: self, row, acc }),
                5.. if S::INT_ROWS >= 12 => simd.call(TileRows::<8, N, CODES> { tile: self, row, acc }),
                3.. if S::INT_ROWS >= 12 => simd.call(TileRows::<4, N, CODES> { tile: self, row, acc }),
                2.. if S::INT_ROWS >= 2 => simd.call(TileRows::<2, N, CODES> { tile: self, row, acc }),
                _ => simd.call(TileRows::<1, N, CODES> { tile: self, row, acc }),
            };
        }
    }

    /// `M` rows of activations from `row` on; returns `M`. Rows that there are not are computed from whatever follows.
    #[inline(always)]
    fn rows<S: Simd, const M: usize, const CODES: u8>(&self, simd: S, row: usize, acc: &mut [f32]) -> usize {
        let (columns, group) = (self.of.columns, self.of.group());
        let (steps, all_groups) = (group / 4, columns / group);
        let (x, together) = self.of.x.rows::<S>(&self.of.x_rows, row, columns, all_groups);
        let (row_bytes, x_step) = (row_step::<S>(columns), if S::ROWS_TOGETHER == 1 { 4 } else { x.step });
        assert!(M <= together || S::ROWS_TOGETHER > 1);
        assert!(x.bytes.len() >= (M - 1) * row_bytes + (columns / 4 - 1) * x_step + 4);
        assert!(x.factors() > (M - 1) * x.factor_row + (all_groups - 1) * x.factor_step);
        let panel_len = self.groups.len() * steps;
        assert!(self.codes.len() >= N * panel_len && self.scales.len() >= N * all_groups * 2);
        assert!(acc.len() >= (row + M - 1) * PAIR * PANEL + N * PANEL && self.groups.end <= all_groups);
        // A group is a multiple of 16 columns.
        assert!(steps.is_multiple_of(if CODES == LOW { FOLD } else { 2 }));
        let fetched = self.fetched(row);
        for (index, group_at) in self.groups.clone().enumerate() {
            let mut sums = [[simd.splat_i(0); N]; M];
            // SAFETY: all offsets are inside the slices whose sizes are asserted above: `M` rows of `columns` bytes,
            // `N` panels of `panel_len` lines.
            unsafe {
                let codes = self.codes.as_ptr().add(index * steps);
                let bytes = x.bytes.as_ptr().add(group_at * steps * x_step);
                // Without codes below 16 there is nothing to fold.
                let part = if CODES == LOW { FOLD } else { steps };
                for first in (0..steps).step_by(part) {
                    let mut part_sums = if CODES == LOW { [[simd.splat_i(0); N]; M] } else { sums };
                    for two_steps in 0..part / 2 {
                        let two_steps = first + 2 * two_steps;
                        let next = self.next[0].wrapping_add((index * steps + two_steps) * fetched);
                        simd.prefetch(next);
                        if fetched > 32 {
                            simd.prefetch(next.wrapping_add(64));
                        }
                        for step in two_steps..two_steps + 2 {
                            let mut w = [simd.splat_i(0); N];
                            for (n, w) in w.iter_mut().enumerate() {
                                *w = simd.load_i(codes.add(n * panel_len + step).cast::<u8>());
                            }
                            for m in 0..M {
                                let four = bytes.add(m * row_bytes + step * x_step).cast::<i32>();
                                let four = simd.splat_i(four.read_unaligned());
                                for n in 0..N {
                                    part_sums[m][n] = match CODES {
                                        LOW => simd.dot_u4(part_sums[m][n], w[n], four),
                                        MIDDLE => simd.dot_u7(part_sums[m][n], w[n], four),
                                        _ => simd.dot_u8(part_sums[m][n], w[n], four),
                                    };
                                }
                            }
                        }
                    }
                    if CODES != LOW {
                        sums = part_sums;
                        continue;
                    }
                    for m in 0..M {
                        for n in 0..N {
                            sums[m][n] = simd.add_i(sums[m][n], simd.fold(part_sums[m][n]));
                        }
                    }
                }
                // The other panel's part of it.
                let (other, lines) =
                    (self.next[N - 1].wrapping_add(index * steps * fetched), steps * fetched / 128 * (N - 1));
                let mut line = 0;
                for n in 0..N {
                    let scales = self.scales.as_ptr().add((n * all_groups + group_at) * 2);
                    let scales = [simd.load(scales.cast()), simd.load(scales.add(1).cast())];
                    for m in 0..M {
                        if (n * M + m).is_multiple_of((N * M / 4).max(1)) && line < lines {
                            simd.prefetch(other.wrapping_add(line / 4 * PANEL * BLOCK + line % 4 * 64));
                            line += 1;
                        }
                        let target = acc.as_mut_ptr().add((row + m) * PAIR * PANEL + n * PANEL);
                        x.add_group(simd, (m, group_at), sums[m][n], scales, target);
                    }
                }
            }
        }
        M
    }

    /// `P` pairs of rows of activations from `row` on; returns `2 * P`. Of any codes: they are below 256.
    #[inline(always)]
    fn pairs<S: Simd, const P: usize>(&self, simd: S, row: usize, acc: &mut [f32]) -> usize {
        assert!(simd.has_row_pairs());
        let (columns, group) = (self.of.columns, self.of.group());
        let (steps, all_groups) = (group / 4, columns / group);
        // Such a set has rows by themselves.
        assert_eq!(S::ROWS_TOGETHER, 1);
        let (x, together) = self.of.x.rows::<S>(&self.of.x_rows, row, columns, all_groups);
        assert!(2 * P <= together);
        let panel_len = self.groups.len() * steps;
        assert!(self.codes.len() >= N * panel_len && self.scales.len() >= N * all_groups * 2);
        assert!(acc.len() >= (row + 2 * P - 1) * PAIR * PANEL + N * PANEL && self.groups.end <= all_groups);
        // A group is a multiple of 16 columns.
        assert!(steps.is_multiple_of(2));
        let fetched = self.fetched(row);
        for (index, group_at) in self.groups.clone().enumerate() {
            for n in 0..N {
                let mut sums = [[simd.splat_i(0); 2]; P];
                // SAFETY: all offsets are inside the slices whose sizes are asserted above: `2 * P` rows of `columns`
                // bytes, `N` panels of `panel_len` lines.
                unsafe {
                    let codes = self.codes.as_ptr().add(n * panel_len + index * steps);
                    let bytes = x.bytes.as_ptr().add(group_at * group);
                    for two_steps in 0..steps / 2 {
                        let step = 2 * two_steps;
                        let next = self.next[n].wrapping_add((index * steps + step) * fetched);
                        simd.prefetch(next);
                        simd.prefetch(next.wrapping_add(fetched));
                        let line = codes.add(step).cast::<u8>();
                        let w = [simd.load_i(line), simd.load_i(line.add(VECTOR))];
                        for p in 0..P {
                            let eight = bytes.add(2 * p * columns + 4 * step);
                            let of_next = eight.add(columns).cast::<u64>().read_unaligned();
                            sums[p] = simd.dot_row_pair(sums[p], w, [eight.cast::<u64>().read_unaligned(), of_next]);
                        }
                    }
                    let scales = self.scales.as_ptr().add((n * all_groups + group_at) * 2);
                    let scales = [simd.load(scales.cast()), simd.load(scales.add(1).cast())];
                    for p in 0..P {
                        let both = simd.unpair(sums[p]);
                        for half in 0..2 {
                            let m = 2 * p + half;
                            let target = acc.as_mut_ptr().add((row + m) * PAIR * PANEL + n * PANEL);
                            x.add_group(simd, (m, group_at), both[half], scales, target);
                        }
                    }
                }
            }
        }
        2 * P
    }

    /// Bytes that sixteen rows have for a step, which the tile at `row` prefetches: the first rows fetch for all.
    #[inline(always)]
    fn fetched(&self, row: usize) -> usize {
        if row == 0 { PANEL * 4 * self.of.packed().coding.bits() / 8 } else { 0 }
    }
}

impl RowsOfBlock<'_> {
    /// Adds to the products at `target` the integer sums of row `m` in group `group`, with the weights' scales and biases.
    ///
    /// # Safety
    /// There must be such a row and group, and sixteen numbers at `target`.
    #[inline(always)]
    unsafe fn add_group<S: Simd>(
        &self,
        simd: S,
        (m, group): (usize, usize),
        sums: S::I,
        [scale, bias]: [S::F; 2],
        target: *mut f32,
    ) {
        let at = m * self.factor_row + group * self.factor_step;
        let scaled = simd.mul(simd.float_of_int(sums), scale);
        // SAFETY: the caller's promise.
        unsafe {
            let sum = simd.fma(bias, simd.splat(*self.sums.get_unchecked(at)), simd.load(target));
            simd.store(target, simd.fma(scaled, simd.splat(*self.scales.get_unchecked(at)), sum));
        }
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

/// See [`Tile::pairs`].
struct TilePairs<'a, const P: usize, const N: usize> {
    tile: &'a Tile<'a, N>,
    row: usize,
    acc: &'a mut [f32],
}

impl<const P: usize, const N: usize> Work for TilePairs<'_, P, N> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        self.tile.pairs::<S, P>(simd, self.row, self.acc)
    }
}
