//! The portable instruction set: arrays, for processors without anything better and as the plainest statement of what
//! every operation means.

use super::floats::{bf16_to_f32, f16_to_f32};
use super::simd::{LANES, Simd, WORDS, Work};

/// Plain Rust.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

/// Runs `work` in plain Rust.
#[inline(never)]
pub fn run<W: Work>(work: W) -> W::Output {
    work.run(Scalar)
}

type F = [f32; LANES];
type I = [i32; LANES];

#[inline(always)]
fn map<A: Copy, B: Copy + Default>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for (out, a) in out.iter_mut().zip(a) {
        *out = f(a);
    }
    out
}

#[inline(always)]
fn zip<A: Copy + Default>(a: [A; LANES], b: [A; LANES], f: impl Fn(A, A) -> A) -> [A; LANES] {
    let mut out = a;
    for (out, b) in out.iter_mut().zip(b) {
        *out = f(*out, b);
    }
    out
}

impl Simd for Scalar {
    const INT_ROWS: usize = 1;
    const DIRECT_ROWS: usize = 1;
    const DOT_ROWS: usize = 1;
    const DOT_COLUMNS: usize = 4;
    const GEMM_ROWS: usize = 1;
    type F = F;
    type I = I;

    #[inline(always)]
    fn call<W: Work>(self, work: W) -> W::Output {
        run(work)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        // A fused operation without the instruction is a slow library call.
        zip(zip(a, b, |a, b| a * b), c, |ab, c| ab + c)
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    fn any_above(self, a: F, b: F) -> bool {
        a.into_iter().zip(b).any(|(a, b)| a > b)
    }
    #[inline(always)]
    fn max_lane(self, a: F) -> f32 {
        a.into_iter().fold(a[0], |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    fn round(self, a: F) -> I {
        map(a, |x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn float_of_int(self, a: I) -> F {
        map(a, |x| x as f32)
    }
    #[inline(always)]
    fn bits(self, a: F) -> I {
        map(a, |x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn float_of_bits(self, a: I) -> F {
        map(a, |x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    fn float_of_f16(self, a: I) -> F {
        map(a, |x| f16_to_f32(x as u16))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        [x; LANES]
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: I) -> I {
        map(a, |x| x << N)
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: I) -> I {
        map(a, |x| ((x as u32) >> N) as i32)
    }
    #[inline(always)]
    fn lookup(self, bytes: I, table: &[u8; 16]) -> I {
        map(bytes, |x| i32::from_le_bytes(x.to_le_bytes().map(|b| table[usize::from(b & 15)])))
    }
    #[inline(always)]
    fn dot_u7(self, acc: I, w: I, x: I) -> I {
        self.dot_u8(acc, w, x)
    }
    #[inline(always)]
    fn dot_u8(self, acc: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let (w, x) = (w[i].to_le_bytes(), x[i].to_le_bytes());
            let dot: i32 = (0..4).map(|b| i32::from(w[b]) * i32::from(x[b] as i8)).sum();
            acc[i].wrapping_add(dot)
        })
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| unsafe { p.add(i).read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| bf16_to_f32(unsafe { p.add(i).read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| f16_to_f32(unsafe { p.add(i).read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: F) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<F>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, a: I) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<I>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| i32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| i32::from((unsafe { *p.add(i / 2) } >> (4 * (i % 2))) & 15))
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8, stride: usize) -> [I; WORDS] {
        std::array::from_fn(|word| {
            // SAFETY: the caller's promise.
            std::array::from_fn(|row| unsafe { p.add(row * stride).cast::<i32>().add(word).read_unaligned() })
        })
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
