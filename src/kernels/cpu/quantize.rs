//! Activations as signed bytes with a scale per group: what the fast integer product multiplies with.

use std::ops::Range;

use super::matrix::{Coding, Packed};
use super::simd::{LANES, Simd, Work};

/// More activations do not share a scale, unless a group of codes is wider and no multiple of this.
const WIDEST: usize = 64;

/// So many bytes, scales and sums behind the last block may be read: register tiles may have more rows than there are.
const SPARE: usize = 64;

/// How the codes of a packed matrix lie in 32-bit words, and so in which order activations meet them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// Activations that share a scale.
    pub group: usize,
    /// Bits of a code in a word: 2, 4 or 8. Codes of other widths are unpacked to bytes first.
    pub bits: usize,
}

impl Order {
    /// The order of a matrix.
    pub fn of(packed: &Packed<'_>) -> Self {
        let bits = match packed.coding {
            Coding::Affine(bits) if matches!(bits, 2 | 4 | 8) => bits,
            Coding::Affine(_) => 8,
            Coding::Fp4 => 4,
        };
        // With groups of 128 the error of a product reaches a hundredth.
        let group = if packed.group.is_multiple_of(WIDEST) { WIDEST } else { packed.group };
        Self { group, bits }
    }

    /// Which of the 32 / bits codes of a word is byte `byte` of its `step`-th four codes: masking a word that was
    /// shifted by `step * bits` leaves one code in each byte.
    #[inline(always)]
    fn code(self, step: usize, byte: usize) -> usize {
        byte * (8 / self.bits) + step
    }
}

/// Rows of activations as bytes: `x = scale * byte`.
///
/// Rows lie in blocks of up to [`Simd::ROWS_TOGETHER`], those of different experts in different blocks. In a block of `n` rows four
/// bytes of each row follow each other, then the next four of each: a tile of rows reads one run of memory.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    /// `[columns / 4, n, 4]` of a block, in the [`Order`] of the weights.
    pub bytes: Vec<i8>,
    /// `[groups, n]` of a block.
    pub scales: Vec<f32>,
    /// `scale * sum of the group's bytes`, `[groups, n]`: what biases are multiplied with.
    pub sums: Vec<f32>,
}

/// Where a block of rows goes.
pub struct BlockParts<'a> {
    pub bytes: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub sums: &'a mut [f32],
}

/// Some rows of one block, or rows that are blocks by themselves.
pub struct RowsOfBlock<'a> {
    /// From the first row's first byte on.
    pub bytes: &'a [i8],
    /// From its first scale on.
    pub scales: &'a [f32],
    pub sums: &'a [f32],
    /// Bytes from four bytes of a row to its next four.
    pub step: usize,
    /// Scales, and sums, from a row to the next one, and from a group to the next one.
    pub factor_row: usize,
    pub factor_step: usize,
}

/// Bytes from a row's first four bytes to those of the next row: known when the kernel is compiled, where rows lie together.
#[inline(always)]
pub fn row_step<S: Simd>(columns: usize) -> usize {
    if S::ROWS_TOGETHER == 1 { columns } else { 4 }
}

impl RowsOfBlock<'_> {
    /// Scales, and sums, from the first one on.
    #[inline(always)]
    pub fn factors(&self) -> usize {
        self.scales.len().min(self.sums.len())
    }
}

impl QuantizedRows {
    /// Makes room for `rows` rows.
    pub fn resize(&mut self, rows: usize, columns: usize, groups: usize) {
        self.bytes.resize(rows * columns + SPARE, 0);
        self.scales.resize(rows * groups + SPARE, 0.0);
        self.sums.resize(rows * groups + SPARE, 0.0);
    }

    /// Rows from `row` on of the expert's rows `of`, and how many there are up to the end of their block, or of all if rows are blocks
    /// by themselves. What lies behind them may be read like rows, too, for a register tile of the instruction set.
    #[inline(always)]
    pub fn rows<S: Simd>(
        &self,
        of: &Range<usize>,
        row: usize,
        columns: usize,
        groups: usize,
    ) -> (RowsOfBlock<'_>, usize) {
        let together = S::ROWS_TOGETHER;
        let first = of.start + row / together * together;
        let (inside, n) = (row % together, together.min(of.end - first));
        let (bytes, factors) = (first * columns + 4 * inside, first * groups + inside);
        let factor_row = if together == 1 { groups } else { 1 };
        let (bytes, scales, sums) = (&self.bytes[bytes..], &self.scales[factors..], &self.sums[factors..]);
        let rows = RowsOfBlock { bytes, scales, sums, step: 4 * n, factor_row, factor_step: n };
        (rows, if together == 1 { of.end - first } else { n - inside })
    }
}

/// Quantises a block of rows `x`.
pub struct Quantize<'a> {
    pub x: &'a [f32],
    pub columns: usize,
    pub order: Order,
    pub out: BlockParts<'a>,
}

impl Work for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { x, columns, order: Order { group, bits }, out } = self;
        // A word has 4, 8 or 16 codes, so sixteen activations meet whole words.
        let per_word = 32 / bits;
        let mut lanes = [0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            let (word, i) = (i / per_word, i % per_word);
            *lane = (word * per_word + self.order.code(i / 4, i % 4)) as u8;
        }
        let n = x.len() / columns;
        assert!(out.bytes.len() == x.len() && columns.is_multiple_of(group) && group.is_multiple_of(LANES));
        for row in 0..n {
            for (index, x) in x[row * columns..(row + 1) * columns].chunks_exact(group).enumerate() {
                let (scale, inverse) = scale_of(simd, x);
                let mut sums = simd.splat_i(0);
                let inverse = simd.splat(inverse);
                for (part, x) in x.chunks_exact(LANES).enumerate() {
                    let at = index * group + part * LANES;
                    // What is not a number may be any integer here; `scale` knows of it.
                    // SAFETY: chunks of 16; a block has `n` times sixteen bytes for sixteen columns of its rows.
                    unsafe {
                        let rounded = simd.round(simd.mul(simd.load(x.as_ptr()), inverse));
                        let target = out.bytes.as_mut_ptr().add(at * n);
                        if n == 1 {
                            simd.store_bytes(target, rounded, &lanes);
                        } else {
                            let mut bytes = [0i8; LANES];
                            simd.store_bytes(bytes.as_mut_ptr(), rounded, &lanes);
                            for four in 0..LANES / 4 {
                                let from = bytes.as_ptr().add(4 * four).cast::<[i8; 4]>();
                                target.add((four * n + row) * 4).cast::<[i8; 4]>().write(*from);
                            }
                        }
                        sums = simd.add_i(sums, rounded);
                    }
                }
                let mut of_lanes = [0i32; LANES];
                // SAFETY: an array of 64 bytes.
                unsafe { simd.store_i(of_lanes.as_mut_ptr().cast(), sums) };
                let sum = of_lanes.iter().fold(0, |sum: i32, &x| sum.wrapping_add(x));
                out.scales[index * n + row] = scale;
                out.sums[index * n + row] = scale * sum as f32;
            }
        }
    }
}

/// The scale that maps the largest magnitude to 127, and its inverse. Not finite if an element is not.
#[inline(always)]
fn scale_of<S: Simd>(simd: S, x: &[f32]) -> (f32, f32) {
    let magnitude = simd.splat_i(0x7fff_ffff);
    let (mut largest, mut poison) = (simd.splat(0.0), simd.splat(0.0));
    for x in x.chunks_exact(LANES) {
        // SAFETY: a chunk of 16.
        let x = unsafe { simd.load(x.as_ptr()) };
        largest = simd.max(largest, simd.float_of_bits(simd.and(simd.bits(x), magnitude)));
        poison = simd.fma(x, simd.splat(0.0), poison);
    }
    let largest = simd.max_lane(largest);
    // Comparisons lose a not-a-number, a sum of products with zero keeps it.
    let scale = largest / 127.0 + simd.sum(poison);
    // Too small a scale has no inverse; such activations count as zero.
    let inverse = 1.0 / scale;
    if inverse.is_finite() { (scale, inverse) } else { (if scale.is_finite() { 0.0 } else { scale }, 0.0) }
}
