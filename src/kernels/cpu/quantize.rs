//! Activations as signed bytes with a scale per group: what the fast integer product multiplies with.

use super::matrix::{Coding, Packed};
use super::simd::{LANES, Simd, Work};

/// More activations do not share a scale, unless a group of codes is wider and no multiple of this.
const WIDEST: usize = 64;

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
#[derive(Debug, Default)]
pub struct QuantizedRows {
    /// `[rows, columns]`, in the [`Order`] of the weights.
    pub bytes: Vec<i8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `scale * sum of the group's bytes`, `[rows, groups]`: what biases are multiplied with.
    pub sums: Vec<f32>,
}

/// Where one row goes.
pub struct RowParts<'a> {
    pub bytes: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub sums: &'a mut [f32],
}

/// Quantises one row `x`.
pub struct Quantize<'a> {
    pub x: &'a [f32],
    pub order: Order,
    pub out: RowParts<'a>,
}

impl Work for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Order { group, bits } = self.order;
        // A word has 4, 8 or 16 codes, so sixteen activations meet whole words.
        let per_word = 32 / bits;
        let mut lanes = [0; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            let (word, i) = (i / per_word, i % per_word);
            *lane = (word * per_word + self.order.code(i / 4, i % 4)) as u8;
        }
        for (index, x) in self.x.chunks_exact(group).enumerate() {
            let (scale, inverse) = scale_of(simd, x);
            let bytes = &mut self.out.bytes[index * group..(index + 1) * group];
            let mut sums = simd.splat_i(0);
            let inverse = simd.splat(inverse);
            for (x, bytes) in x.chunks_exact(LANES).zip(bytes.chunks_exact_mut(LANES)) {
                // What is not a number may be any integer here; `scale` knows of it.
                // SAFETY: chunks of 16.
                unsafe {
                    let rounded = simd.round(simd.mul(simd.load(x.as_ptr()), inverse));
                    simd.store_bytes(bytes.as_mut_ptr(), rounded, &lanes);
                    sums = simd.add_i(sums, rounded);
                }
            }
            let mut of_lanes = [0i32; LANES];
            // SAFETY: an array of 64 bytes.
            unsafe { simd.store_i(of_lanes.as_mut_ptr().cast(), sums) };
            let sum = of_lanes.iter().fold(0, |sum: i32, &x| sum.wrapping_add(x));
            self.out.scales[index] = scale;
            self.out.sums[index] = scale * sum as f32;
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
