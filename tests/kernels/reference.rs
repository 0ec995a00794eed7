//! Weights as checkpoints store them together with the numbers they stand for, and products in f64.

use crate::cpu::floats::Floats;
use crate::cpu::matrix::{Coding, Matrix, Packed, Scales, Storage};
use crate::guard::{Edge, Guarded};
use crate::numbers::{Numbers, Placed, Type};

/// Random numbers (SplitMix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// From 0 to 1.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Of variance 1 (Box and Muller 1958).
    pub fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// Nearly normal, and quick: a sum of four uniform numbers.
    pub fn rough(&mut self) -> f64 {
        let bits = self.bits();
        let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
        (sum as f64 / 65_536.0 - 2.0) * 3f64.sqrt()
    }

    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal() as f32).collect()
    }

    /// Some order of the numbers below `len`.
    pub fn permutation(&mut self, len: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..len).collect();
        for i in (1..len).rev() {
            all.swap(i, self.below(i + 1));
        }
        all
    }
}

/// Forms of a weight matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Dense(Type),
    Affine {
        bits: usize,
        group: usize,
        scales: Type,
    },
    /// E2M1 in groups of 32 with powers of two as scales.
    Mxfp4,
    /// E2M1 in groups of 16 with E4M3 scales.
    Nvfp4,
}

impl Format {
    /// Columns are a multiple of this.
    pub fn group(self) -> usize {
        match self {
            Format::Dense(_) => 1,
            Format::Affine { group, .. } => group,
            Format::Mxfp4 => 32,
            Format::Nvfp4 => 16,
        }
    }

    pub fn is_packed(self) -> bool {
        !matches!(self, Format::Dense(_))
    }

    fn bits(self) -> usize {
        if let Format::Affine { bits, .. } = self { bits } else { 4 }
    }
}

/// Magnitudes of E2M1 floats.
const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

fn e2m1(code: u8) -> f64 {
    let magnitude = E2M1[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// An E4M3 float (Micikevicius et al. 2022).
pub fn e4m3(byte: u8) -> f64 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction * 2f64.powi(-9),
        _ => (8.0 + fraction) * 2f64.powi(exponent - 10),
    };
    if byte < 128 { magnitude } else { -magnitude }
}

/// An E8M0 float: a power of two.
pub fn e8m0(byte: u8) -> f64 {
    2f64.powi(i32::from(byte) - 127)
}

/// Codes of `bits` as one little-endian string of bits.
fn pack(codes: &[u8], bits: usize) -> Vec<u8> {
    let mut bytes = vec![0; (codes.len() * bits).div_ceil(8)];
    for (i, code) in codes.iter().enumerate() {
        for bit in 0..bits {
            let at = i * bits + bit;
            bytes[at / 8] |= (code >> bit & 1) << (at % 8);
        }
    }
    bytes
}

/// Matrices of one shape, as stored and as numbers.
#[derive(Debug, Clone)]
pub struct Weights {
    pub format: Format,
    /// Rows of one matrix.
    pub rows: usize,
    pub columns: usize,
    stored: Stored,
    /// `[stacked * rows, columns]`: what is stored, exactly.
    pub values: Vec<f64>,
    /// Of each value the magnitudes that the fast product adds to get it: `|scale * code| + |bias|`.
    pub parts: Vec<f64>,
}

#[derive(Debug, Clone)]
enum Stored {
    Dense(Numbers),
    Affine { codes: Vec<u8>, scales: Numbers, biases: Numbers },
    Fp4 { codes: Vec<u8>, scales: Vec<u8> },
}

impl Weights {
    /// Codes and scales at random: all codes occur, and zero is not always in the middle of them.
    pub fn random(random: &mut Random, format: Format, [stacked, rows, columns]: [usize; 3]) -> Self {
        let (count, size) = (stacked * rows * columns, 1.0 / (columns as f64).sqrt());
        let groups = count / format.group();
        let stored = match format {
            Format::Dense(kind) => Stored::Dense(Numbers::new(kind, (0..count).map(|_| random.rough() * size))),
            Format::Affine { bits, scales: kind, .. } => {
                let largest = ((1u32 << bits) - 1) as f64;
                let steps: Vec<f64> = (0..groups)
                    .map(|_| (0.5 + random.uniform()) * 3.0 * size / largest * [1.0, -1.0][random.below(8) / 7])
                    .collect();
                let middle = |step: &f64| -step * largest * (0.35 + 0.3 * random.uniform());
                let biases = Numbers::new(kind, steps.iter().map(middle).collect::<Vec<_>>());
                let codes = (0..count).map(|_| random.below(1 << bits) as u8).collect();
                Stored::Affine { codes, scales: Numbers::new(kind, steps), biases }
            }
            Format::Mxfp4 | Format::Nvfp4 => {
                let codes = (0..count).map(|_| random.below(16) as u8).collect();
                let mut scale = || match format {
                    // From 2^-12 to 1/4.
                    Format::Mxfp4 => 115 + random.below(11) as u8,
                    // Subnormal ones too, and a few negative ones.
                    _ => (1 + random.below(0x28) + 0x80 * (random.below(8) / 7)) as u8,
                };
                Stored::Fp4 { codes, scales: (0..groups).map(|_| scale()).collect() }
            }
        };
        Self::decode(format, rows, columns, stored)
    }

    /// The nearest that the format has to normally distributed weights.
    pub fn normal(random: &mut Random, format: Format, [stacked, rows, columns]: [usize; 3]) -> Self {
        let size = 1.0 / (columns as f64).sqrt();
        let weights: Vec<f64> = (0..stacked * rows * columns).map(|_| random.normal() * size).collect();
        let groups = weights.chunks_exact(format.group());
        let stored = match format {
            Format::Dense(kind) => Stored::Dense(Numbers::new(kind, weights)),
            Format::Affine { bits, scales: kind, .. } => {
                let largest = ((1u32 << bits) - 1) as f64;
                let ends = groups
                    .clone()
                    .map(|group| group.iter().fold((f64::MAX, f64::MIN), |(low, high), &w| (low.min(w), high.max(w))));
                let (lows, steps): (Vec<f64>, Vec<f64>) = ends.map(|(low, high)| (low, (high - low) / largest)).unzip();
                let (scales, biases) = (Numbers::new(kind, steps), Numbers::new(kind, lows));
                let code = |(i, w): (usize, &f64)| {
                    let group = i / format.group();
                    ((w - biases.get(group)) / scales.get(group)).round().clamp(0.0, largest) as u8
                };
                let codes = weights.iter().enumerate().map(code).collect();
                Stored::Affine { codes, scales, biases }
            }
            Format::Mxfp4 | Format::Nvfp4 => {
                let wanted = groups.map(|group| group.iter().fold(0f64, |most, w| most.max(w.abs())) / 6.0);
                let nearest = |wanted: f64| match format {
                    Format::Mxfp4 => (127.0 + wanted.log2().ceil()) as u8,
                    _ => (0..0x7f)
                        .min_by(|&a, &b| (e4m3(a) - wanted).abs().total_cmp(&(e4m3(b) - wanted).abs()))
                        .unwrap_or(0),
                };
                let scales: Vec<u8> = wanted.map(nearest).collect();
                let code = |(i, w): (usize, &f64)| {
                    let scale = scale_of(format, scales[i / format.group()]);
                    let far = |code: u8| (e2m1(code) * scale - w).abs();
                    (0..16).min_by(|&a, &b| far(a).total_cmp(&far(b))).unwrap_or(0)
                };
                Stored::Fp4 { codes: weights.iter().enumerate().map(code).collect(), scales }
            }
        };
        Self::decode(format, rows, columns, stored)
    }

    fn decode(format: Format, rows: usize, columns: usize, stored: Stored) -> Self {
        let (values, parts) = match &stored {
            Stored::Dense(numbers) => (0..numbers.len()).map(|i| (numbers.get(i), numbers.get(i).abs())).unzip(),
            Stored::Affine { codes, scales, biases } => {
                let decode = |(i, &code): (usize, &u8)| {
                    let group = i / format.group();
                    let (scaled, bias) = (scales.get(group) * f64::from(code), biases.get(group));
                    (scaled + bias, scaled.abs() + bias.abs())
                };
                codes.iter().enumerate().map(decode).unzip()
            }
            Stored::Fp4 { codes, scales } => {
                let decode = |(i, &code): (usize, &u8)| {
                    let scale = scale_of(format, scales[i / format.group()]);
                    // Codes are made unsigned by adding 6.
                    (scale * e2m1(code), scale.abs() * (e2m1(code) + 6.0 + 6.0))
                };
                codes.iter().enumerate().map(decode).unzip()
            }
        };
        Self { format, rows, columns, stored, values, parts }
    }

    /// The same weights with columns in another order. Panics if they are packed.
    pub fn reordered(&self, columns: &[usize]) -> Self {
        let (Stored::Dense(numbers), Format::Dense(kind)) = (&self.stored, self.format) else {
            panic!("packed weights")
        };
        let rows = 0..numbers.len() / self.columns;
        let values = rows.flat_map(|row| columns.iter().map(move |column| numbers.get(row * self.columns + column)));
        Self::decode(self.format, self.rows, self.columns, Stored::Dense(Numbers::new(kind, values)))
    }

    /// A copy of what is stored at the edges of protected pages.
    pub fn place(&self, edge: Edge) -> PlacedWeights {
        let (packed, scales) = match &self.stored {
            Stored::Dense(numbers) => (None, PlacedScales::Two(numbers.place(edge), None)),
            Stored::Affine { codes, scales, biases } => {
                (Some(codes), PlacedScales::Two(scales.place(edge), Some(biases.place(edge))))
            }
            Stored::Fp4 { codes, scales } => (Some(codes), PlacedScales::Bytes(Guarded::new(scales, edge))),
        };
        let codes = packed.map(|codes| Guarded::new(&pack(codes, self.format.bits()), edge));
        PlacedWeights { format: self.format, rows: self.rows, columns: self.columns, codes, scales }
    }
}

fn scale_of(format: Format, byte: u8) -> f64 {
    if format == Format::Mxfp4 { e8m0(byte) } else { e4m3(byte) }
}

/// Weights at the edges of protected pages.
pub struct PlacedWeights {
    format: Format,
    rows: usize,
    columns: usize,
    codes: Option<Guarded<u8>>,
    scales: PlacedScales,
}

enum PlacedScales {
    /// Dense numbers, or scales and biases.
    Two(Placed, Option<Placed>),
    Bytes(Guarded<u8>),
}

impl PlacedWeights {
    /// As kernels take it.
    pub fn matrix(&self) -> Matrix<'_> {
        let storage = match (&self.codes, &self.scales) {
            (None, PlacedScales::Two(numbers, _)) => Storage::Dense(numbers.floats()),
            (Some(codes), scales) => {
                let (scales, coding) = match scales {
                    PlacedScales::Two(scales, biases) => {
                        let biases = biases.as_ref().map_or(Floats::F32(&[]), Placed::floats);
                        (Scales::Affine(scales.floats(), biases), Coding::Affine(self.format.bits()))
                    }
                    PlacedScales::Bytes(bytes) if self.format == Format::Mxfp4 => (Scales::E8m0(bytes), Coding::Fp4),
                    PlacedScales::Bytes(bytes) => (Scales::E4m3(bytes), Coding::Fp4),
                };
                Storage::Packed(Packed { codes, scales, coding, group: self.format.group() })
            }
            (None, PlacedScales::Bytes(_)) => unreachable!("scales without codes"),
        };
        Matrix { rows: self.rows, columns: self.columns, storage }
    }
}

/// A number that a kernel may miss by `bound`.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    pub value: f64,
    pub bound: f64,
}

impl Expected {
    /// Whether a result is as expected.
    pub fn admits(&self, found: f32) -> bool {
        (f64::from(found) - self.value).abs() <= self.bound
    }
}

/// The first result that is not as expected, in words.
pub fn first_miss(found: &[f32], expected: &[Expected], width: usize) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{} results instead of {}", found.len(), expected.len()));
    }
    match found.iter().zip(expected).position(|(&found, expected)| !expected.admits(found)) {
        None => Ok(()),
        Some(at) => {
            let (found, Expected { value, bound }) = (f64::from(found[at]), expected[at]);
            let (row, column) = (at / width, at % width);
            let error = (found - value).abs();
            Err(format!("row {row} column {column}: {found:e}, expected {value:e}, error {error:e} > {bound:e}"))
        }
    }
}

/// Activations as the fast product rounds them: per group to the nearest of 255 multiples of a 127th of the largest
/// magnitude.
pub fn quantised(x: &[f32], group: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(group) {
        let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = 1.0 / scale;
        let rounded = |x: &f32| f64::from((x * inverse).round_ties_even()) * f64::from(scale);
        // What is too small for an inverse counts as zero.
        out.extend(x.iter().map(|x| if inverse.is_finite() { rounded(x) } else { 0.0 }));
    }
    out
}
