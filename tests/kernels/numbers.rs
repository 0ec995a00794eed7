//! Stored numbers as the tests make them, and conversions between stored types.

use half::{bf16, f16};
use proptest::prelude::*;

use crate::cpu::floats::{Floats, FloatsMut, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::cpu::matrix::{e4m3_to_f32, e8m0_to_f32};
use crate::guard::{Edge, Guarded};
use crate::reference::{e4m3, e8m0};

/// Types that numbers are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    F32,
    F16,
    Bf16,
}

/// All of them.
pub const TYPES: [Type; 3] = [Type::F32, Type::F16, Type::Bf16];

/// Numbers in one of the types.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

impl Numbers {
    /// `values`, rounded.
    pub fn new(kind: Type, values: impl IntoIterator<Item = f64>) -> Self {
        let values = values.into_iter();
        match kind {
            Type::F32 => Numbers::F32(values.map(|x| x as f32).collect()),
            Type::F16 => Numbers::F16(values.map(|x| f16::from_f64(x).to_bits()).collect()),
            Type::Bf16 => Numbers::Bf16(values.map(|x| bf16::from_f64(x).to_bits()).collect()),
        }
    }

    pub fn len(&self) -> usize {
        match self {
            Numbers::F32(x) => x.len(),
            Numbers::F16(x) | Numbers::Bf16(x) => x.len(),
        }
    }

    pub fn get(&self, at: usize) -> f64 {
        match self {
            Numbers::F32(x) => f64::from(x[at]),
            Numbers::F16(x) => f16::from_bits(x[at]).to_f64(),
            Numbers::Bf16(x) => bf16::from_bits(x[at]).to_f64(),
        }
    }

    pub fn set(&mut self, at: usize, value: f64) {
        match self {
            Numbers::F32(x) => x[at] = value as f32,
            Numbers::F16(x) => x[at] = f16::from_f64(value).to_bits(),
            Numbers::Bf16(x) => x[at] = bf16::from_f64(value).to_bits(),
        }
    }

    /// `values`, rounded to the same type.
    pub fn like(&self, values: impl IntoIterator<Item = f64>) -> Self {
        let kind = match self {
            Numbers::F32(_) => Type::F32,
            Numbers::F16(_) => Type::F16,
            Numbers::Bf16(_) => Type::Bf16,
        };
        Self::new(kind, values)
    }

    /// Copies `len` numbers of `from`, which has the same type, from `source` on to `at`.
    pub fn copy(&mut self, at: usize, from: &Numbers, source: usize, len: usize) {
        match (self, from) {
            (Numbers::F32(to), Numbers::F32(from)) => to[at..at + len].copy_from_slice(&from[source..source + len]),
            (Numbers::F16(to), Numbers::F16(from)) | (Numbers::Bf16(to), Numbers::Bf16(from)) => {
                to[at..at + len].copy_from_slice(&from[source..source + len]);
            }
            _ => panic!("different types"),
        }
    }

    /// Without the first `count`.
    pub fn skip(mut self, count: usize) -> Self {
        match &mut self {
            Numbers::F32(x) => drop(x.drain(..count)),
            Numbers::F16(x) | Numbers::Bf16(x) => drop(x.drain(..count)),
        }
        self
    }

    /// A copy at the edge of a protected page.
    pub fn place(&self, edge: Edge) -> Placed {
        match self {
            Numbers::F32(x) => Placed::F32(Guarded::new(x, edge)),
            Numbers::F16(x) => Placed::F16(Guarded::new(x, edge)),
            Numbers::Bf16(x) => Placed::Bf16(Guarded::new(x, edge)),
        }
    }
}

/// Numbers at the edge of a protected page.
pub enum Placed {
    F32(Guarded<f32>),
    F16(Guarded<u16>),
    Bf16(Guarded<u16>),
}

impl Placed {
    /// Room for outputs, filled with not-a-numbers.
    pub fn output(kind: Type, len: usize, edge: Edge) -> Self {
        Numbers::new(kind, std::iter::repeat_n(f64::NAN, len)).place(edge)
    }

    pub fn floats(&self) -> Floats<'_> {
        match self {
            Placed::F32(x) => Floats::F32(x),
            Placed::F16(x) => Floats::F16(x),
            Placed::Bf16(x) => Floats::Bf16(x),
        }
    }

    pub fn floats_mut(&mut self) -> FloatsMut<'_> {
        match self {
            Placed::F32(x) => FloatsMut::F32(x),
            Placed::F16(x) => FloatsMut::F16(x),
            Placed::Bf16(x) => FloatsMut::Bf16(x),
        }
    }

    /// A copy of what is there.
    pub fn numbers(&self) -> Numbers {
        match self {
            Placed::F32(x) => Numbers::F32(x.to_vec()),
            Placed::F16(x) => Numbers::F16(x.to_vec()),
            Placed::Bf16(x) => Numbers::Bf16(x.to_vec()),
        }
    }
}

/// `numbers` rounded to a type.
pub fn rounded(kind: Type, numbers: &[f32]) -> Numbers {
    match kind {
        Type::F32 => Numbers::F32(numbers.to_vec()),
        Type::F16 => Numbers::F16(numbers.iter().map(|&x| f16::from_f32(x).to_bits()).collect()),
        Type::Bf16 => Numbers::Bf16(numbers.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()),
    }
}

/// The bits of f32 numbers, which tell zeros and not-a-numbers apart.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// As many cases as `PROPTEST_CASES` says, or `few`.
pub fn cases(few: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { few };
    ProptestConfig { cases, failure_persistence: None, ..default }
}

#[test]
fn all_16_bit_numbers_widen_exactly() {
    for bits in 0..=u16::MAX {
        let (wide, expected) = (bf16_to_f32(bits), bf16::from_bits(bits).to_f32());
        assert!(wide == expected || wide.is_nan() && expected.is_nan(), "bf16 {bits:#06x}");
        let (wide, expected) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
        assert!(wide == expected || wide.is_nan() && expected.is_nan(), "f16 {bits:#06x}");
    }
}

#[test]
fn all_scales_of_8_bits_widen_exactly() {
    for byte in 0..=u8::MAX {
        let (wide, expected) = (f64::from(e4m3_to_f32(byte)), e4m3(byte));
        assert!(wide == expected || wide.is_nan() && expected.is_nan(), "e4m3 {byte:#04x}: {wide}");
    }
    // The last code is not a number.
    for byte in 0..u8::MAX {
        assert_eq!(f64::from(e8m0_to_f32(byte)), e8m0(byte), "e8m0 {byte:#04x}");
    }
}

/// The stored number nearest to `x`, the one with even bits of two, by trying all: what narrowing must give.
fn nearest(x: f32, candidates: [u16; 2], wide: impl Fn(u16) -> f64) -> u16 {
    let far = candidates.map(|bits| (wide(bits) - f64::from(x)).abs());
    match far[0].total_cmp(&far[1]) {
        std::cmp::Ordering::Less => candidates[0],
        std::cmp::Ordering::Greater => candidates[1],
        std::cmp::Ordering::Equal => candidates[usize::from(candidates[0] % 2 == 1)],
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn narrowing_rounds_to_nearest_even(bits in any::<u32>(), tie in any::<u16>()) {
        // Any number, and one that lies between two bf16.
        for x in [f32::from_bits(bits), f32::from_bits(u32::from(tie) << 16 | 0x8000)] {
            let (narrow, half) = (f32_to_bf16(x), f32_to_f16(x));
            if x.is_nan() {
                prop_assert!(bf16::from_bits(narrow).is_nan() && f16::from_bits(half).is_nan());
                continue;
            }
            let below = (x.to_bits() >> 16) as u16;
            if below & 0x7fff < 0x7f7f {
                prop_assert_eq!(narrow, nearest(x, [below, below + 1], |b| f64::from(bf16_to_f32(b))));
            }
            prop_assert_eq!(narrow, bf16::from_f32(x).to_bits());
            prop_assert_eq!(half, f16::from_f32(x).to_bits());
        }
    }
}
