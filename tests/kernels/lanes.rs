//! Every method of every instruction set that this processor has, the portable one included, against its definition
//! lane by lane.

mod memory;

use std::array::from_fn;

use proptest::array::uniform16;
use proptest::num::f32::ANY;
use proptest::prelude::*;

use crate::cpu::simd::{FOLD, Isa, LANES, Simd, Work};

/// A method's name and its result. Where it is one number, all lanes have it.
type Floats = Vec<(&'static str, [f32; LANES])>;
type Integers = Vec<(&'static str, [i32; LANES])>;

/// Bytes of sixteen lanes.
const BYTES: usize = 4 * LANES;

#[inline(always)]
fn floats<S: Simd>(simd: S, a: S::F) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    // SAFETY: an array of sixteen.
    unsafe { simd.store(out.as_mut_ptr(), a) };
    out
}

#[inline(always)]
fn integers<S: Simd>(simd: S, a: S::I) -> [i32; LANES] {
    let mut out = [0; LANES];
    // SAFETY: an array of 64 bytes.
    unsafe { simd.store_i(out.as_mut_ptr().cast(), a) };
    out
}

#[inline(always)]
fn load_i<S: Simd>(simd: S, a: &[i32; LANES]) -> S::I {
    // SAFETY: an array of 64 bytes.
    unsafe { simd.load_i(a.as_ptr().cast()) }
}

/// Equal bits, or both not a number.
#[track_caller]
fn check_floats(isa: Isa, found: &Floats, expected: &Floats) {
    assert_eq!(found.len(), expected.len());
    for ((name, found), (expected_name, expected)) in found.iter().zip(expected) {
        assert_eq!(name, expected_name);
        for lane in 0..LANES {
            let (found, expected) = (found[lane], expected[lane]);
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{isa:?}: lane {lane} of {name} is {found:e}, not {expected:e}");
        }
    }
}

/// The operations on numbers.
#[derive(Clone, Copy)]
struct OnFloats {
    a: [f32; LANES],
    b: [f32; LANES],
    c: [f32; LANES],
}

impl Work for OnFloats {
    type Output = Floats;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Floats {
        // SAFETY: arrays of sixteen.
        let (a, b, c) = unsafe { (simd.load(self.a.as_ptr()), simd.load(self.b.as_ptr()), simd.load(self.c.as_ptr())) };
        let [first, second, third, fourth] = simd.sum4([a, b, c, simd.splat(self.a[1])]);
        vec![
            ("load, store", floats(simd, a)),
            ("splat", floats(simd, simd.splat(self.a[0]))),
            ("add", floats(simd, simd.add(a, b))),
            ("sub", floats(simd, simd.sub(a, b))),
            ("mul", floats(simd, simd.mul(a, b))),
            ("div", floats(simd, simd.div(a, b))),
            ("max", floats(simd, simd.max(a, b))),
            ("max of equals", floats(simd, simd.max(a, a))),
            ("fma", floats(simd, simd.fma(a, b, c))),
            ("bits, float_of_bits", floats(simd, simd.float_of_bits(simd.bits(a)))),
            ("sum", [simd.sum(a); LANES]),
            ("sum4, first", [first; LANES]),
            ("sum4, second", [second; LANES]),
            ("sum4, third", [third; LANES]),
            ("sum4, fourth", [fourth; LANES]),
        ]
    }
}

impl OnFloats {
    fn expected(&self, isa: Isa) -> Floats {
        let Self { a, b, c } = self;
        vec![
            ("load, store", *a),
            ("splat", [a[0]; LANES]),
            ("add", from_fn(|i| a[i] + b[i])),
            ("sub", from_fn(|i| a[i] - b[i])),
            ("mul", from_fn(|i| a[i] * b[i])),
            ("div", from_fn(|i| a[i] / b[i])),
            ("max", from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })),
            ("max of equals", *a),
            ("fma", from_fn(|i| if isa == Isa::SCALAR { a[i] * b[i] + c[i] } else { a[i].mul_add(b[i], c[i]) })),
            ("bits, float_of_bits", *a),
            ("sum", [sum(a); LANES]),
            ("sum4, first", [sum(a); LANES]),
            ("sum4, second", [sum(b); LANES]),
            ("sum4, third", [sum(c); LANES]),
            ("sum4, fourth", [sum(&[a[1]; LANES]); LANES]),
        ]
    }
}

/// Halves onto halves, until one is left.
fn sum(a: &[f32]) -> f32 {
    if let [last] = a {
        return *last;
    }
    let (low, high) = a.split_at(a.len() / 2);
    sum(&low.iter().zip(high).map(|(low, high)| low + high).collect::<Vec<_>>())
}

/// Pairs of bf16, added to f32.
struct DotBf16 {
    acc: [f32; LANES],
    a: [[u16; 2]; LANES],
    b: [[u16; 2]; LANES],
}

impl Work for DotBf16 {
    type Output = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        // SAFETY: arrays of sixteen and of 64 bytes.
        unsafe {
            let acc = simd.load(self.acc.as_ptr());
            floats(simd, simd.dot_bf16(acc, simd.load_i(self.a.as_ptr().cast()), simd.load_i(self.b.as_ptr().cast())))
        }
    }
}

/// The largest lane, and the lanes as integers.
struct Reduce([f32; LANES]);

impl Work for Reduce {
    type Output = (f32, [i32; LANES]);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        // SAFETY: an array of sixteen.
        let a = unsafe { simd.load(self.0.as_ptr()) };
        (simd.max_lane(a), integers(simd, simd.round(a)))
    }
}

/// The operations on integers, and conversions of them.
#[derive(Clone, Copy)]
struct OnIntegers {
    a: [i32; LANES],
    b: [i32; LANES],
    c: [i32; LANES],
    table: [u8; 16],
}

impl Work for OnIntegers {
    type Output = (Integers, Floats);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let (a, b, c) = (load_i(simd, &self.a), load_i(simd, &self.b), load_i(simd, &self.c));
        let codes = simd.and(a, simd.splat_i(0x0f0f_0f0f));
        let low = simd.and(b, simd.splat_i(0x7f7f_7f7f));
        let x = rows_of(&self.c);
        let pair = simd.dot_row_pair([simd.splat_i(0); 2], [a, b], x);
        let [first, second] = simd.unpair(simd.dot_row_pair(pair, [b, b], x));
        let whole = vec![
            ("load_i, store_i", integers(simd, a)),
            ("splat_i", integers(simd, simd.splat_i(self.a[0]))),
            ("add_i", integers(simd, simd.add_i(a, b))),
            ("and", integers(simd, simd.and(a, b))),
            ("shl by 0", integers(simd, simd.shl::<0>(a))),
            ("shl by 16", integers(simd, simd.shl::<16>(a))),
            ("shl by 31", integers(simd, simd.shl::<31>(a))),
            ("shr by 0", integers(simd, simd.shr::<0>(a))),
            ("shr by 1", integers(simd, simd.shr::<1>(a))),
            ("shr by 4", integers(simd, simd.shr::<4>(a))),
            ("shr by 31", integers(simd, simd.shr::<31>(a))),
            ("lookup", integers(simd, simd.lookup(codes, &self.table))),
            ("dot_u7", integers(simd, simd.dot_u7(a, low, c))),
            ("dot_u8", integers(simd, simd.dot_u8(a, b, c))),
            ("dot_row_pair, first", integers(simd, first)),
            ("dot_row_pair, second", integers(simd, second)),
            ("dot_u4", folded(simd, simd.and(b, simd.splat_i(0x0f0f_0f0f)), c)),
            ("dot_u4 of the most", folded(simd, simd.splat_i(0x0f0f_0f0f), simd.splat_i(0x8080_8080u32 as i32))),
        ];
        let converted = vec![
            ("float_of_int", floats(simd, simd.float_of_int(a))),
            ("float_of_f16", floats(simd, simd.float_of_f16(a))),
        ];
        (whole, converted)
    }
}

impl OnIntegers {
    fn expected(&self) -> (Integers, Floats) {
        let Self { a, b, c, table } = self;
        let entry = |code: u8| table[usize::from(code & 15)];
        let pair = |i: usize, x: &[i32]| dot(dot(dot(dot(0, a[i], x[0]), b[i], x[1]), b[i], x[0]), b[i], x[1]);
        let whole = vec![
            ("load_i, store_i", *a),
            ("splat_i", [a[0]; LANES]),
            ("add_i", from_fn(|i| a[i].wrapping_add(b[i]))),
            ("and", from_fn(|i| a[i] & b[i])),
            ("shl by 0", *a),
            ("shl by 16", from_fn(|i| a[i] << 16)),
            ("shl by 31", from_fn(|i| a[i] << 31)),
            ("shr by 0", *a),
            ("shr by 1", from_fn(|i| (a[i] as u32 >> 1) as i32)),
            ("shr by 4", from_fn(|i| (a[i] as u32 >> 4) as i32)),
            ("shr by 31", from_fn(|i| (a[i] as u32 >> 31) as i32)),
            ("lookup", from_fn(|i| i32::from_ne_bytes(a[i].to_ne_bytes().map(entry)))),
            ("dot_u7", from_fn(|i| dot(a[i], b[i] & 0x7f7f_7f7f, c[i]))),
            ("dot_u8", from_fn(|i| dot(a[i], b[i], c[i]))),
            ("dot_row_pair, first", from_fn(|i| pair(i, &c[..2]))),
            ("dot_row_pair, second", from_fn(|i| pair(i, &c[2..4]))),
            ("dot_u4", from_fn(|i| FOLD as i32 * dot(0, b[i] & 0x0f0f_0f0f, c[i]))),
            ("dot_u4 of the most", [FOLD as i32 * 4 * 15 * -128; LANES]),
        ];
        let converted =
            vec![("float_of_int", a.map(|a| a as f32)), ("float_of_f16", a.map(|a| f16_value((a & 0xffff) as u16)))];
        (whole, converted)
    }
}

/// Two rows of eight bytes.
fn rows_of(words: &[i32; LANES]) -> [u64; 2] {
    let row = |first: i32, second: i32| u64::from(first as u32) | u64::from(second as u32) << 32;
    [row(words[0], words[1]), row(words[2], words[3])]
}

/// As many products as an accumulator takes.
#[inline(always)]
fn folded<S: Simd>(simd: S, w: S::I, x: S::I) -> [i32; LANES] {
    let mut acc = simd.splat_i(0);
    for _ in 0..FOLD {
        acc = simd.dot_u4(acc, w, x);
    }
    integers(simd, simd.fold(acc))
}

fn dot(acc: i32, w: i32, x: i32) -> i32 {
    let products = w.to_ne_bytes().into_iter().zip(x.to_ne_bytes()).map(|(w, x)| i32::from(w) * i32::from(x as i8));
    acc.wrapping_add(products.sum())
}

/// The value of an f16 by its definition.
fn f16_value(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
    };
    (if bits >> 15 == 1 { -magnitude } else { magnitude }) as f32
}

fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn check_integers(isa: Isa, input: OnIntegers) {
    let (found, found_converted) = isa.run(input);
    let (expected, expected_converted) = input.expected();
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected, "{isa:?}");
    }
    assert_eq!(found.len(), expected.len());
    check_floats(isa, &found_converted, &expected_converted);
}

/// Any numbers, and often those that operations treat specially.
fn any_floats() -> impl Strategy<Value = [f32; LANES]> {
    const SPECIAL: [f32; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-45,
    ];
    uniform16(prop_oneof![ANY, -1e3f32..1e3, proptest::sample::select(SPECIAL.as_slice())])
}

proptest! {
    #[test]
    fn operations_on_floats(a in any_floats(), b in any_floats(), c in any_floats()) {
        for isa in Isa::available() {
            let input = OnFloats { a, b, c };
            check_floats(isa, &isa.run(input), &input.expected(isa));
        }
    }

    /// Of numbers whose products are normal; another order of the sum is another rounding.
    #[test]
    fn pairs_of_bf16(
        acc in uniform16(-1e3f32..1e3),
        (a, b) in (uniform16([-1e3f32..1e3, -1e3f32..1e3]), uniform16([-1e3f32..1e3, -1e3f32..1e3])),
    ) {
        let halves = |pairs: [[f32; 2]; LANES]| pairs.map(|pair| pair.map(|x| half::bf16::from_f32(x).to_bits()));
        let (a, b) = (halves(a), halves(b));
        let number = |bits: u16| f64::from(half::bf16::from_bits(bits).to_f32());
        for isa in Isa::available() {
            let found = isa.run(DotBf16 { acc, a, b });
            for lane in 0..LANES {
                let parts = [0, 1].map(|half| number(a[lane][half]) * number(b[lane][half]));
                let (sum, size) = (parts[0] + parts[1], parts[0].abs() + parts[1].abs());
                let miss = (f64::from(found[lane]) - f64::from(acc[lane]) - sum).abs();
                let bound = (f64::from(acc[lane]).abs() + size) / f64::from(1 << 22) + 1e-37;
                prop_assert!(miss <= bound, "{isa:?}: lane {lane} is off by {miss}");
            }
        }
    }

    #[test]
    fn the_largest_lane(a in any_floats()) {
        let a = a.map(|a| if a.is_nan() { -1.0 } else { a });
        let largest = a.into_iter().fold(f32::NEG_INFINITY, f32::max);
        for isa in Isa::available() {
            prop_assert_eq!(isa.run(Reduce(a)).0, largest, "{:?}", isa);
        }
    }

    #[test]
    fn rounding(a in any_floats(), halves in uniform16(-40_000i32..40_000), large in uniform16(-2_147_483_520f32..2_147_483_520.0)) {
        // Where the result is not an i32 it may be anything, but there must be one.
        for isa in Isa::available() {
            let found = isa.run(Reduce(a)).1;
            for lane in (0..LANES).filter(|&lane| a[lane].abs() < 2_147_483_648.0) {
                prop_assert_eq!(found[lane], a[lane].round_ties_even() as i32, "{:?}: {:e}", isa, a[lane]);
            }
            for a in [halves.map(|halves| halves as f32 / 2.0), large] {
                prop_assert_eq!(isa.run(Reduce(a)).1, a.map(|a| a.round_ties_even() as i32), "{:?}: {:?}", isa, a);
            }
        }
    }

    #[test]
    fn operations_on_integers(
        a in uniform16(any::<i32>()),
        b in uniform16(any::<i32>()),
        c in uniform16(any::<i32>()),
        table in any::<[u8; 16]>(),
    ) {
        for isa in Isa::available() {
            check_integers(isa, OnIntegers { a, b, c, table });
        }
    }
}

/// All pairs of bytes, at every place of a lane; full sums of the largest products.
#[test]
fn dot_products_of_all_bytes() {
    let word = |bytes: [u8; 4]| i32::from_ne_bytes(bytes);
    for isa in Isa::available() {
        for w in 0..=255u8 {
            for first in 0..=255u8 {
                let x = from_fn(|lane| word(from_fn(|byte| first.wrapping_add((4 * lane + byte) as u8))));
                check_integers(isa, OnIntegers { a: [0; LANES], b: [word([w; 4]); LANES], c: x, table: [0; 16] });
            }
            let mixed = [word([w, !w, 255, 0]), word([255, 0, w, !w])];
            for x in [-128i8, 127, -1] {
                let x = [word([x as u8; 4]); LANES];
                let b = from_fn(|lane| mixed[lane % 2]);
                check_integers(isa, OnIntegers { a: [i32::MAX; LANES], b, c: x, table: [0; 16] });
            }
        }
    }
}

/// Accumulators of pairs, as they are.
struct Pairs([i32; LANES], [u64; 2]);

impl Work for Pairs {
    type Output = (bool, [[i32; LANES]; 2]);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let [a, b] = simd.dot_row_pair([simd.splat_i(0); 2], [load_i(simd, &self.0), simd.splat_i(0)], self.1);
        (simd.has_row_pairs(), [integers(simd, a), integers(simd, b)])
    }
}

/// The matrix extension alone leaves sums in an order of its own: where the processor has it, it was taken.
#[test]
fn pairs_are_taken_where_the_processor_has_them() {
    let w = from_fn(|lane| lane as i32 + 1);
    for isa in Isa::available() {
        let i8mm = format!("{isa:?}") == "NeonI8mm";
        // Two lanes of each four times two rows.
        let lanes = |first| from_fn(|at| w[at / 4 * 4 + first + at % 4 / 2] * (1 + at as i32 % 2));
        let expected = if i8mm { [lanes(0), lanes(2)] } else { [w, w.map(|w| 2 * w)] };
        assert_eq!(isa.run(Pairs(w, [1, 2])), (i8mm, expected), "{isa:?}");
    }
}

/// The not-a-number's side decides, and nothing but `b` comes of equal operands.
#[test]
fn max_takes_the_second_operand_unless_the_first_is_greater() {
    let pairs = [
        (f32::NAN, 1.0, 1.0),
        (1.0, f32::NAN, f32::NAN),
        (f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY),
        (f32::INFINITY, f32::NAN, f32::NAN),
        (0.0, -0.0, -0.0),
        (-0.0, 0.0, 0.0),
        (2.0, 1.0, 2.0),
        (1.0, 2.0, 2.0),
    ];
    for isa in Isa::available() {
        let input = OnFloats { a: from_fn(|i| pairs[i % 8].0), b: from_fn(|i| pairs[i % 8].1), c: [0.0; LANES] };
        let found = isa.run(input).into_iter().find(|(name, _)| *name == "max").into_iter().collect();
        check_floats(isa, &found, &vec![("max", from_fn(|i| pairs[i % 8].2))]);
    }
}

/// What the processor has, and where `OMLX_EXPECTED_ISAS` names it, that: an emulator must not leave out a set unseen.
#[test]
fn instruction_sets() {
    let found = Isa::available();
    assert_eq!((found[0], found.last()), (Isa::SCALAR, Some(&Isa::best())));
    if let Ok(expected) = std::env::var("OMLX_EXPECTED_ISAS") {
        assert_eq!(format!("{found:?}"), expected);
    }
}
