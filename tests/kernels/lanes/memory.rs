//! What goes between lanes and memory: every load and store reads or writes what it may and no more.

use std::array::from_fn;

use proptest::array::uniform16;
use proptest::prelude::*;

use super::{
    BYTES, Floats, Integers, OnIntegers, bf16_value, check_floats, check_integers, f16_value, floats, integers, load_i,
};
use crate::cpu::simd::{Isa, LANES, Simd, WORDS, Work};
use crate::guard::{Edge, Guarded};

/// Where `len` bytes are tried, in how many, and at which edge: at both, and at an odd address.
fn places(len: usize) -> [(usize, Edge); 3] {
    [(len, Edge::Begin), (len, Edge::End), (len + 1, Edge::End)]
}

/// One of the loads, from memory that has as many bytes as it may read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    F32,
    Bf16,
    F16,
    Bytes,
    U8,
    U4,
    Words(usize),
}

impl Load {
    fn len(self) -> usize {
        match self {
            Load::F32 | Load::Bytes => BYTES,
            Load::Bf16 | Load::F16 => 2 * LANES,
            Load::U8 => LANES,
            Load::U4 => LANES / 2,
            Load::Words(stride) => (LANES - 1) * stride + 4 * WORDS,
        }
    }

    fn expected(self, bytes: &[u8]) -> (Integers, Floats) {
        let half = |i: usize| u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]);
        let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let one = |integers| (vec![("", integers)], vec![]);
        match self {
            Load::F32 => (vec![], vec![("", from_fn(|i| f32::from_bits(word(4 * i) as u32)))]),
            Load::Bf16 => (vec![], vec![("", from_fn(|i| bf16_value(half(i))))]),
            Load::F16 => (vec![], vec![("", from_fn(|i| f16_value(half(i))))]),
            Load::Bytes => one(from_fn(|i| word(4 * i))),
            Load::U8 => one(from_fn(|i| i32::from(bytes[i]))),
            Load::U4 => one(from_fn(|i| i32::from(bytes[i / 2] >> (4 * (i % 2)) & 15))),
            Load::Words(stride) => {
                ((0..WORDS).map(|w| ("", from_fn(|row| word(row * stride + 4 * w)))).collect(), vec![])
            }
        }
    }
}

struct RunLoad<'a>(Load, &'a [u8]);

impl Work for RunLoad<'_> {
    type Output = (Integers, Floats);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let RunLoad(load, bytes) = self;
        assert!(bytes.len() >= load.len());
        let p = bytes.as_ptr();
        // SAFETY: as many bytes as the load takes.
        unsafe {
            match load {
                Load::F32 => (vec![], vec![("", floats(simd, simd.load(p.cast())))]),
                Load::Bf16 => (vec![], vec![("", floats(simd, simd.load_bf16(p.cast())))]),
                Load::F16 => (vec![], vec![("", floats(simd, simd.load_f16(p.cast())))]),
                Load::Bytes => (vec![("", integers(simd, simd.load_i(p)))], vec![]),
                Load::U8 => (vec![("", integers(simd, simd.load_u8(p)))], vec![]),
                Load::U4 => (vec![("", integers(simd, simd.load_u4(p)))], vec![]),
                Load::Words(stride) => {
                    let mut rows = vec![];
                    for words in simd.load_words(p, stride) {
                        rows.push(("", integers(simd, words)));
                    }
                    (rows, vec![])
                }
            }
        }
    }
}

#[test]
fn loads_read_what_they_may_and_no_more() {
    let loads = [Load::F32, Load::Bf16, Load::F16, Load::Bytes, Load::U8, Load::U4];
    let strides = [0, 4, 32, 33, 36, 64, 100, 255].map(Load::Words);
    for load in loads.into_iter().chain(strides) {
        for (len, edge) in places(load.len()) {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 151 + (i >> 8) * 7 + 29) as u8).collect();
            let bytes = Guarded::new(&bytes, edge);
            let (expected, expected_floats) = load.expected(&bytes);
            for isa in Isa::available() {
                let (found, found_floats) = isa.run(RunLoad(load, &bytes));
                assert_eq!(found, expected, "{isa:?}: {load:?} of {len} bytes, {edge:?}");
                check_floats(isa, &found_floats, &expected_floats);
            }
        }
    }
}

/// All 16-bit numbers and all bytes.
#[test]
fn conversions_of_all_codes() {
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let bytes: Vec<u8> = (0..=u8::MAX).collect();
    for isa in Isa::available() {
        let check = |load: Load, codes: &[u8]| {
            for codes in codes.chunks_exact(load.len()) {
                let (found, expected) = (isa.run(RunLoad(load, codes)), load.expected(codes));
                assert_eq!(found.0, expected.0, "{isa:?}: {load:?}");
                check_floats(isa, &found.1, &expected.1);
            }
        };
        check(Load::F16, &halves);
        check(Load::Bf16, &halves);
        check(Load::U8, &bytes);
        check(Load::U4, &bytes);
        for first in (0..=u16::MAX).step_by(LANES) {
            // The upper half of a lane must not matter.
            let a = from_fn(|lane| (i32::from(first) + lane as i32) | ((i32::from(first) << 16) ^ 0x5a5a_0000));
            check_integers(isa, OnIntegers { a, b: [0; LANES], c: [0; LANES], table: from_fn(|i| 255 - i as u8) });
        }
    }
}

/// Stores sixteen numbers, as floats or as integers.
struct Store<'a> {
    bits: [i32; LANES],
    float: bool,
    to: &'a mut [u8],
}

impl Work for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        assert!(self.to.len() >= BYTES);
        let a = load_i(simd, &self.bits);
        // SAFETY: room for sixteen.
        unsafe {
            if self.float {
                simd.store(self.to.as_mut_ptr().cast(), simd.float_of_bits(a));
            } else {
                simd.store_i(self.to.as_mut_ptr(), a);
            }
        }
    }
}

#[test]
fn stores_write_sixteen_lanes_and_no_more() {
    let bits: [i32; LANES] = from_fn(|lane| 0x0102_0304 * (lane as i32 + 1));
    let expected = bits.map(i32::to_ne_bytes).concat();
    for isa in Isa::available() {
        for ((len, edge), float) in places(BYTES).into_iter().flat_map(|place| [(place, false), (place, true)]) {
            let mut memory = Guarded::new(&vec![7; len], edge);
            isa.run(Store { bits, float, to: &mut memory });
            assert!(memory[..BYTES] == expected && memory[BYTES..].iter().all(|&byte| byte == 7), "{isa:?}: {edge:?}");
        }
    }
}

/// Some lanes' lowest bytes, and numbers rounded to bf16.
struct Narrow<'a> {
    bits: [i32; LANES],
    lanes: [u8; LANES],
    to: &'a mut [i8],
    numbers: [[f32; LANES]; 2],
}

impl Work for Narrow<'_> {
    type Output = [i32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        assert!(self.to.len() >= LANES);
        // SAFETY: sixteen bytes, and arrays of sixteen.
        unsafe {
            simd.store_bytes(self.to.as_mut_ptr(), load_i(simd, &self.bits), &self.lanes);
            let [first, second] = [0, 1].map(|half| simd.load(self.numbers[half].as_ptr()));
            integers(simd, simd.round_bf16(first, second))
        }
    }
}

proptest! {
    #[test]
    fn narrower_numbers(
        bits in uniform16(any::<i32>()),
        lanes in uniform16(0u8..16),
        numbers in [uniform16(-1e30f32..1e30), uniform16(-1e-30f32..1e-30)],
    ) {
        // Subnormal numbers may become zeros.
        let numbers = numbers.map(|half| half.map(|x| if x.is_subnormal() { 0.0 } else { x }));
        let rounded = numbers.concat();
        let rounded: Vec<u8> = rounded.iter().flat_map(|&x| half::bf16::from_f32(x).to_ne_bytes()).collect();
        let bytes: Vec<i8> = lanes.iter().map(|&lane| bits[usize::from(lane)] as i8).collect();
        for isa in Isa::available() {
            for (len, edge) in places(LANES) {
                let mut memory = Guarded::new(&vec![7i8; len], edge);
                let found = isa.run(Narrow { bits, lanes, to: &mut memory, numbers });
                prop_assert!(memory[..LANES] == bytes && memory[LANES..].iter().all(|&byte| byte == 7), "{isa:?}");
                prop_assert_eq!(found.map(i32::to_ne_bytes).concat(), &rounded[..], "{:?}", isa);
            }
        }
    }
}

/// Prefetches, and returns from a function of its own.
struct Touch(*const u8);

impl Work for Touch {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        simd.prefetch(self.0);
        if self.0.is_null() { 7 } else { simd.call(Touch(std::ptr::null())) + 1 }
    }
}

#[test]
fn prefetches_of_any_address_do_nothing() {
    let memory = Guarded::new(&[0u8; 64], Edge::End);
    let past = memory.as_ptr_range().end;
    let addresses = [memory.as_ptr(), past, std::ptr::dangling(), std::ptr::without_provenance(usize::MAX)];
    for isa in Isa::available() {
        for p in addresses {
            assert_eq!(isa.run(Touch(p)), 8, "{isa:?}");
        }
    }
}
