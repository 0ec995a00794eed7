//! Weight matrices as checkpoints store them, read in place.

use super::floats::Floats;
use super::matmul::laid_out_len;
use super::simd::LANES;

/// A matrix `[rows, columns]`, or several of the same shape one after another (experts).
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// Output features of one matrix.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// Its elements, row-major.
    pub storage: Storage<'a>,
}

/// The forms a weight matrix is stored in.
#[derive(Debug, Clone, Copy)]
pub enum Storage<'a> {
    /// Numbers.
    Dense(Floats<'a>),
    /// MLX's packed form.
    Packed(Packed<'a>),
    /// A single matrix as products read it: [`lay_out`](super::matmul::lay_out).
    LaidOut(&'a [f32]),
}

/// Weights as integer codes with a scale, and for the affine format a bias, per group along the columns:
/// `w = scale * code + bias`. A row's codes are one little-endian string of bits.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Codes, `columns * bits / 8` bytes a row.
    pub codes: &'a [u8],
    /// `columns / group` a row.
    pub scales: Scales<'a>,
    /// What codes mean.
    pub coding: Coding,
    /// Codes that share a scale: a multiple of 16.
    pub group: usize,
}

/// Scales of the groups.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// Scales and biases.
    Affine(Floats<'a>, Floats<'a>),
    /// Powers of two, as biased exponents (E8M0).
    E8m0(&'a [u8]),
    /// Small floats (E4M3).
    E4m3(&'a [u8]),
}

/// How codes stand for numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Unsigned integers of 2, 3, 4, 5, 6 or 8 bits.
    Affine(usize),
    /// E2M1 floats of 4 bits.
    Fp4,
}

/// Twice the values of E2M1 floats, plus [`FP4_OFFSET`]: integers from 0 to 24.
pub const FP4_TABLE: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// What makes the doubled values of E2M1 floats unsigned.
pub const FP4_OFFSET: f32 = 12.0;

impl Coding {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Coding::Affine(bits) => bits,
            Coding::Fp4 => 4,
        }
    }
}

impl Matrix<'_> {
    /// Panics unless the storage holds `count` whole matrices: a defect of the caller.
    pub fn check(&self, count: usize) {
        let rows = self.rows * count;
        match &self.storage {
            Storage::Dense(numbers) => assert_eq!(numbers.len(), rows * self.columns, "size of a dense matrix"),
            Storage::LaidOut(panels) => {
                assert_eq!(
                    (panels.len(), count),
                    (laid_out_len(self.rows, self.columns), 1),
                    "size of what is laid out"
                );
            }
            Storage::Packed(packed) => {
                let bits = packed.coding.bits();
                assert!(matches!(bits, 2 | 3 | 4 | 5 | 6 | 8), "codes of {bits} bits");
                assert!(packed.group > 0 && packed.group.is_multiple_of(LANES), "groups of {}", packed.group);
                assert!(self.columns.is_multiple_of(packed.group), "{} columns in groups", self.columns);
                assert!((self.columns * bits).is_multiple_of(32), "rows of whole words");
                assert_eq!(packed.codes.len(), rows * self.columns * bits / 8, "size of a packed matrix");
                let groups = rows * self.columns / packed.group;
                match &packed.scales {
                    Scales::Affine(scales, biases) => {
                        assert_eq!((scales.len(), biases.len()), (groups, groups), "scales and biases");
                    }
                    Scales::E8m0(scales) | Scales::E4m3(scales) => assert_eq!(scales.len(), groups, "scales"),
                }
            }
        }
    }
}

impl Packed<'_> {
    /// Scale and bias of group `at`, counted over all rows.
    #[inline(always)]
    pub fn scale_and_bias(&self, at: usize) -> (f32, f32) {
        let scale = match &self.scales {
            Scales::Affine(scales, biases) => return (scales.get(at), biases.get(at)),
            Scales::E8m0(scales) => e8m0_to_f32(scales[at]),
            Scales::E4m3(scales) => e4m3_to_f32(scales[at]),
        };
        // The codes stand for doubled and shifted values.
        (0.5 * scale, -0.5 * FP4_OFFSET * scale)
    }

    /// Unpacks `out.len()` codes from code `first` of the row on, whose bytes are `row`.
    #[inline(always)]
    pub fn codes(&self, row: &[u8], first: usize, out: &mut [u8]) {
        let bits = self.coding.bits();
        let mask = (1u16 << bits) - 1;
        for (i, out) in out.iter_mut().enumerate() {
            let at = (first + i) * bits;
            let (byte, shift) = (at / 8, at % 8);
            // A code may reach into the next byte, which is then a byte of the row.
            let next = if shift + bits > 8 { u16::from(row[byte + 1]) } else { 0 };
            *out = (((u16::from(row[byte]) | (next << 8)) >> shift) & mask) as u8;
        }
        if self.coding == Coding::Fp4 {
            out.iter_mut().for_each(|code| *code = FP4_TABLE[usize::from(*code)]);
        }
    }
}

/// `2^(e - 127)`; 255 is not a number.
#[inline(always)]
pub fn e8m0_to_f32(e: u8) -> f32 {
    match e {
        // A subnormal f32.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(e) << 23),
    }
}

/// Sign, four bits of exponent with bias 7, three of fraction; no infinities.
#[inline(always)]
pub fn e4m3_to_f32(x: u8) -> f32 {
    let fraction = f32::from(x & 7) / 8.0;
    let exponent = i32::from((x >> 3) & 15);
    let magnitude = match (exponent, x & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * (1.0 / 64.0),
        _ => (1.0 + fraction) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if x & 0x80 == 0 { magnitude } else { -magnitude }
}
