//! Products of packed weights with few rows of activations: codes go from words to products without a detour through memory.

use super::super::matmul::{PAIR, PANEL};
use super::super::matrix::{Coding, FP4_TABLE};
use super::super::quantize::row_step;
use super::super::simd::{FOLD, Simd, WORDS, Work};
use super::{BLOCK, Integer, Line, load_block};

/// Words after which a group may end: 32 codes of 8 bits, or of 4 bits in half a block.
const PART: usize = WORDS / 2;

impl Integer<'_> {
    /// Whether the rows are few enough, and the format fits.
    pub(super) fn is_direct<S: Simd>(&self, simd: S) -> bool {
        let known = matches!(self.packed().coding, Coding::Affine(4 | 8) | Coding::Fp4);
        known && self.group().is_multiple_of(BLOCK) && (1..=simd.direct_rows()).contains(&self.x_rows.len())
    }

    /// The products with the rows of panel `panel`, whose scales are `[group][scale, bias]`, into `acc`, a row every
    /// `PAIR * PANEL` numbers.
    #[inline(always)]
    pub(super) fn direct<S: Simd>(&self, simd: S, panel: usize, scales: &[Line], acc: &mut [f32]) {
        match self.packed().coding {
            Coding::Affine(8) => self.direct_by::<S, 8, false>(simd, panel, scales, acc),
            Coding::Fp4 => self.direct_by::<S, 4, true>(simd, panel, scales, acc),
            _ => self.direct_by::<S, 4, false>(simd, panel, scales, acc),
        }
    }

    /// The same for codes of one kind.
    #[inline(always)]
    fn direct_by<S: Simd, const BITS: usize, const FP4: bool>(
        &self,
        simd: S,
        panel: usize,
        scales: &[Line],
        acc: &mut [f32],
    ) {
        let mut row = 0;
        while row < self.x_rows.len() {
            let acc = &mut acc[row * PAIR * PANEL..];
            // Tiles that the instruction set has registers for; the others are compiled away.
            row += match self.x_rows.len() - row {
                5.. if S::DIRECT_ROWS >= 8 => simd.call(Direct::<8, BITS, FP4> { of: self, panel, row, scales, acc }),
                3.. if S::DIRECT_ROWS >= 4 => simd.call(Direct::<4, BITS, FP4> { of: self, panel, row, scales, acc }),
                2.. if S::DIRECT_ROWS >= 2 => simd.call(Direct::<2, BITS, FP4> { of: self, panel, row, scales, acc }),
                _ => simd.call(Direct::<1, BITS, FP4> { of: self, panel, row, scales, acc }),
            };
        }
    }
}

/// `M` rows of activations from `row` on, or the fewer that there are, with the rows of one panel; returns how many.
struct Direct<'a, const M: usize, const BITS: usize, const FP4: bool> {
    of: &'a Integer<'a>,
    panel: usize,
    row: usize,
    scales: &'a [Line],
    acc: &'a mut [f32],
}

impl<const M: usize, const BITS: usize, const FP4: bool> Work for Direct<'_, M, BITS, FP4> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let Self { of, panel, row, scales, acc } = self;
        let (columns, groups) = (of.columns, of.groups());
        let (x, together) = of.x.rows::<S>(&of.x_rows, row, columns, groups);
        let (x_row, x_step) = (row_step::<S>(columns), if S::ROWS_TOGETHER == 1 { 4 } else { x.step });
        let rows = M.min(together);
        let row_bytes = columns * BITS / 8;
        let of_panel = of.panel_rows(panel);
        let codes = &of.panels[panel].packed.codes[of_panel.start * row_bytes..of_panel.end * row_bytes];
        let next = of.next_codes(panel, 0);
        // Of a tile of more rows than there are, the others are computed from whatever follows, and not written.
        assert!(M == 1 || S::ROWS_TOGETHER > 1);
        assert!(x.bytes.len() >= (M - 1) * x_row + (columns / 4 - 1) * x_step + 4);
        assert!(x.factors() > (M - 1) * x.factor_row + (groups - 1) * x.factor_step);
        assert!(rows > 0 && acc.len() >= (rows - 1) * PAIR * PANEL + PANEL && scales.len() == 2 * groups);
        let words_per_group = of.group() * BITS / 32;
        assert!(words_per_group.is_multiple_of(PART) && (columns * BITS).is_multiple_of(32 * PART));
        let mask = simd.splat_i(((1i32 << BITS) - 1).wrapping_mul(0x0101_0101));
        // Several rows are chains enough to hide what a sum takes; fewer have two each.
        let odd = usize::from(M < 4);
        // Codes below 16 are added up in accumulators of their own, a group of them at a time.
        let small = S::FOLDS && BITS == 4 && !FP4;
        assert!(!small || words_per_group * (2 - odd) <= FOLD);
        let mut totals = [simd.splat(0.0); M];
        let mut sums = [[simd.splat_i(0); 2]; M];
        let (mut group, mut left, mut at, mut next_x) = (0, words_per_group, 0, x.bytes.as_ptr());
        while at < row_bytes {
            // As much of the next panel as is read here: the hardware does not foresee sixteen streams.
            if row == 0 {
                for line in 0..PANEL * BLOCK / 64 {
                    simd.prefetch(next.wrapping_add(PANEL * at + 64 * line));
                }
            }
            let words = load_block(simd, codes, row_bytes, at..row_bytes);
            for part in 0..2 {
                if part == 1 && row_bytes - at < BLOCK {
                    break;
                }
                // SAFETY: a word stands for `32 / BITS` activations of each row, and these words are in the row. Lines and
                // groups are as many as asserted above.
                unsafe {
                    for w in part * PART..(part + 1) * PART {
                        let word = words[w];
                        let fours = next_x;
                        next_x = next_x.wrapping_add(x_step * (8 / BITS));
                        if BITS == 8 {
                            for m in 0..M {
                                let four = simd.splat_i(fours.add(m * x_row).cast::<i32>().read_unaligned());
                                let chain = w % 2 * odd;
                                sums[m][chain] = simd.dot_u8(sums[m][chain], word, four);
                            }
                            continue;
                        }
                        let (mut low, mut high) = (simd.and(word, mask), simd.and(simd.shr::<4>(word), mask));
                        if FP4 {
                            (low, high) = (simd.lookup(low, &FP4_TABLE), simd.lookup(high, &FP4_TABLE));
                        }
                        for m in 0..M {
                            let four = simd.splat_i(fours.add(m * x_row).cast::<i32>().read_unaligned());
                            let sum = sums[m][0];
                            sums[m][0] = if small { simd.dot_u4(sum, low, four) } else { simd.dot_u7(sum, low, four) };
                        }
                        for m in 0..M {
                            let four = fours.add(x_step + m * x_row).cast::<i32>();
                            let four = simd.splat_i(four.read_unaligned());
                            let sum = sums[m][odd];
                            sums[m][odd] =
                                if small { simd.dot_u4(sum, high, four) } else { simd.dot_u7(sum, high, four) };
                        }
                    }
                    left -= PART;
                    if left == 0 {
                        let line = scales.as_ptr().add(2 * group);
                        let (scale, bias) = (simd.load(line.cast()), simd.load(line.add(1).cast()));
                        for m in 0..M {
                            let [mut even, mut other] = sums[m];
                            if small {
                                (even, other) = (simd.fold(even), simd.fold(other));
                            }
                            let sum = if odd == 1 { simd.add_i(even, other) } else { even };
                            let scaled = simd.mul(simd.float_of_int(sum), scale);
                            let at = m * x.factor_row + group * x.factor_step;
                            totals[m] = simd.fma(bias, simd.splat(*x.sums.get_unchecked(at)), totals[m]);
                            totals[m] = simd.fma(scaled, simd.splat(*x.scales.get_unchecked(at)), totals[m]);
                            sums[m] = [simd.splat_i(0); 2];
                        }
                        (group, left) = (group + 1, words_per_group);
                    }
                }
            }
            at += BLOCK;
        }
        for m in 0..M {
            if m < rows {
                // SAFETY: sixteen sums, as asserted above.
                unsafe { simd.store(acc.as_mut_ptr().add(m * PAIR * PANEL), totals[m]) };
            }
        }
        rows
    }
}
