//! Advanced SIMD with the dot product extension: four registers are sixteen lanes.
//!
//! The intrinsics for `sdot`, `usmmla`, `fcvtl` and `prfm` are not stable in Rust, so these are assembly.

use std::arch::aarch64::*;
use std::arch::asm;
use std::hint::black_box;

use super::simd::{Simd, WORDS, Work, dot_each};

/// Proof that the processor has Advanced SIMD with the dot product and half-precision extensions.
#[derive(Debug, Clone, Copy)]
pub struct Neon {
    /// Proof of the integer matrix extension (I8MM), too. Not a type of its own: all kernels would be compiled for it.
    i8mm: bool,
}

/// # Safety
/// The processor must have the features, and I8MM if `i8mm`.
#[target_feature(enable = "neon,dotprod,fp16")]
#[inline(never)]
pub unsafe fn run<W: Work>(work: W, i8mm: bool) -> W::Output {
    work.run(Neon { i8mm })
}

type F = [float32x4_t; 4];
type I = [int32x4_t; 4];

/// The same register operation on all four quarters.
macro_rules! each {
    (|$($quarter:ident),*| $body:expr) => {
        // SAFETY: operations on registers; a value of `Neon` exists only where the processor has them.
        unsafe {
            [
                each!(@ 0 [$($quarter)*] $body),
                each!(@ 1 [$($quarter)*] $body),
                each!(@ 2 [$($quarter)*] $body),
                each!(@ 3 [$($quarter)*] $body),
            ]
        }
    };
    (@ $index:literal [$($quarter:ident)*] $body:expr) => {{
        $(let $quarter = $quarter[$index];)*
        $body
    }};
}

impl Neon {
    /// The first two steps of `sum`: halves onto halves.
    #[inline(always)]
    fn add_quarters(self, [a, b, c, d]: F) -> float32x4_t {
        // SAFETY: as in `each`.
        unsafe { vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d)) }
    }

    /// Eight f16 to f32.
    #[inline(always)]
    fn widen_f16(self, a: uint16x8_t) -> [float32x4_t; 2] {
        let (low, high): (float32x4_t, float32x4_t);
        // SAFETY: as in `each`.
        unsafe {
            asm!(
                "fcvtl {low:v}.4s, {a:v}.4h",
                "fcvtl2 {high:v}.4s, {a:v}.8h",
                low = out(vreg) low,
                high = lateout(vreg) high,
                a = in(vreg) a,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        [low, high]
    }

    /// Sixteen unsigned bytes to i32.
    #[inline(always)]
    fn widen_u8(self, a: uint8x16_t) -> I {
        // SAFETY: as in `each`.
        unsafe {
            let (low, high) = (vmovl_u8(vget_low_u8(a)), vmovl_high_u8(a));
            [
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                vreinterpretq_s32_u32(vmovl_high_u16(low)),
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                vreinterpretq_s32_u32(vmovl_high_u16(high)),
            ]
        }
    }

    /// Four words of sixteen rows, transposed.
    ///
    /// # Safety
    /// 16 readable bytes at each of the sixteen rows.
    #[inline(always)]
    unsafe fn panel(self, p: *const u8, stride: usize) -> [I; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (self.transpose(p, stride), self.transpose(p.add(4 * stride), stride));
            let (c, d) = (self.transpose(p.add(8 * stride), stride), self.transpose(p.add(12 * stride), stride));
            [[a[0], b[0], c[0], d[0]], [a[1], b[1], c[1], d[1]], [a[2], b[2], c[2], d[2]], [a[3], b[3], c[3], d[3]]]
        }
    }

    /// Four words of four rows, transposed.
    ///
    /// # Safety
    /// 16 readable bytes at each of the four rows.
    #[inline(always)]
    unsafe fn transpose(self, p: *const u8, stride: usize) -> [int32x4_t; 4] {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (load_words(p), load_words(p.add(stride)));
            let (c, d) = (load_words(p.add(2 * stride)), load_words(p.add(3 * stride)));
            let (ab_even, ab_odd) = (pairs(vtrn1q_s32(a, b)), pairs(vtrn2q_s32(a, b)));
            let (cd_even, cd_odd) = (pairs(vtrn1q_s32(c, d)), pairs(vtrn2q_s32(c, d)));
            [
                vreinterpretq_s32_s64(vzip1q_s64(ab_even, cd_even)),
                vreinterpretq_s32_s64(vzip1q_s64(ab_odd, cd_odd)),
                vreinterpretq_s32_s64(vzip2q_s64(ab_even, cd_even)),
                vreinterpretq_s32_s64(vzip2q_s64(ab_odd, cd_odd)),
            ]
        }
    }
}

/// Adds to each lane the dot product of four signed bytes with four signed bytes.
///
/// # Safety
/// The dot product extension.
#[inline(always)]
unsafe fn dot_signed(mut acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: an operation on registers.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// The products of two rows of eight unsigned bytes with two rows of eight signed bytes, added to
/// `[a[0] b[0], a[0] b[1], a[1] b[0], a[1] b[1]]`.
///
/// # Safety
/// The integer matrix extension.
#[inline(always)]
unsafe fn dot_matrix(mut acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
    // SAFETY: an operation on registers. The directive lets this block alone use the extension.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "usmmla {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// Four words from any address.
///
/// # Safety
/// 16 readable bytes.
#[inline(always)]
unsafe fn load_words(p: *const u8) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_s32_u8(vld1q_u8(p)) }
}

/// Pairs of words, to be moved together.
///
/// # Safety
/// Advanced SIMD.
#[inline(always)]
unsafe fn pairs(a: int32x4_t) -> int64x2_t {
    // SAFETY: an operation on registers.
    unsafe { vreinterpretq_s64_s32(a) }
}

/// The sums of lanes 0 and 2 and of 1 and 3, of `a` and then of `b`.
///
/// # Safety
/// Advanced SIMD.
#[inline(always)]
unsafe fn add_halves(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    // SAFETY: operations on registers.
    unsafe {
        let (a, b) = (vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b));
        vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b)))
    }
}

impl Simd for Neon {
    // Of 32 registers, two rows of two panels take 16 for sums and 8 for codes.
    const INT_ROWS: usize = 2;
    const DIRECT_ROWS: usize = 1;
    // Four sums of sixteen lanes take 16.
    const DOT_ROWS: usize = 1;
    const DOT_COLUMNS: usize = 4;
    const GEMM_ROWS: usize = 2;
    type F = F;
    type I = I;

    #[inline(always)]
    fn call<W: Work>(self, work: W) -> W::Output {
        // `inline(never)` does not reach LLVM for functions with target features: an address it cannot see does.
        // SAFETY: a value of `Neon` exists only where the processor has the features.
        unsafe { black_box(run::<W> as unsafe fn(W, bool) -> W::Output)(work, self.i8mm) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: as in `each`.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        each!(|a, b| vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        each!(|a, b| vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        each!(|a, b| vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        each!(|a, b| vdivq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        // `fmax` would return a not-a-number, `fmaxnm` the other operand.
        each!(|a, b| vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        each!(|a, b, c| vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        let four = self.add_quarters(a);
        // SAFETY: as in `each`.
        unsafe { vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four))) }
    }
    #[inline(always)]
    fn any_above(self, a: F, b: F) -> bool {
        // SAFETY: as in `each`.
        unsafe {
            let above = |n: usize| vcgtq_f32(a[n], b[n]);
            vmaxvq_u32(vorrq_u32(vorrq_u32(above(0), above(1)), vorrq_u32(above(2), above(3)))) != 0
        }
    }
    #[inline(always)]
    fn max_lane(self, [a, b, c, d]: F) -> f32 {
        // SAFETY: as in `each`.
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a, c), vmaxnmq_f32(b, d))) }
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [F; 4]) -> [f32; 4] {
        let (a, b) = (self.add_quarters(a), self.add_quarters(b));
        let (c, d) = (self.add_quarters(c), self.add_quarters(d));
        let mut out = [0f32; 4];
        // SAFETY: as in `each`; an array of four. A pairwise addition makes the last step of four sums.
        unsafe { vst1q_f32(out.as_mut_ptr(), vpaddq_f32(add_halves(a, b), add_halves(c, d))) }
        out
    }
    #[inline(always)]
    fn round(self, a: F) -> I {
        each!(|a| vcvtnq_s32_f32(a))
    }
    #[inline(always)]
    fn float_of_int(self, a: I) -> F {
        each!(|a| vcvtq_f32_s32(a))
    }
    #[inline(always)]
    fn bits(self, a: F) -> I {
        each!(|a| vreinterpretq_s32_f32(a))
    }
    #[inline(always)]
    fn float_of_bits(self, a: I) -> F {
        each!(|a| vreinterpretq_f32_s32(a))
    }
    #[inline(always)]
    fn float_of_f16(self, a: I) -> F {
        let [a, b, c, d] = each!(|a| vreinterpretq_u16_s32(a));
        // SAFETY: as in `each`. Even halves are the lower ones.
        let (ab, cd) = unsafe { (vuzp1q_u16(a, b), vuzp1q_u16(c, d)) };
        let ([a, b], [c, d]) = (self.widen_f16(ab), self.widen_f16(cd));
        [a, b, c, d]
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        // SAFETY: as in `each`.
        unsafe { [vdupq_n_s32(x); 4] }
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        each!(|a, b| vaddq_s32(a, b))
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        each!(|a, b| vandq_s32(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: I) -> I {
        each!(|a| vshlq_s32(a, vdupq_n_s32(N as i32)))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: I) -> I {
        // A negative count shifts to the right.
        each!(|a| vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-(N as i32)))))
    }
    #[inline(always)]
    fn lookup(self, bytes: I, table: &[u8; 16]) -> I {
        // SAFETY: as in `each`; the table has 16 bytes.
        let table = unsafe { vld1q_u8(table.as_ptr()) };
        each!(|bytes| vreinterpretq_s32_u8(vqtbl1q_u8(table, vreinterpretq_u8_s32(bytes))))
    }
    #[inline(always)]
    fn dot_u7(self, acc: I, w: I, x: I) -> I {
        each!(|acc, w, x| dot_signed(acc, w, x))
    }
    #[inline(always)]
    fn dot_u8(self, acc: I, w: I, x: I) -> I {
        // With its upper bit flipped a byte is the signed number w - 128. What that leaves out, 128 times the sum of
        // `x`, is computed as twice 64 times: 128 is not a signed byte.
        each!(|acc, w, x| {
            let half = dot_signed(vdupq_n_s32(0), vreinterpretq_s32_s8(vdupq_n_s8(64)), x);
            let flipped = veorq_s32(w, vreinterpretq_s32_u8(vdupq_n_u8(128)));
            dot_signed(vaddq_s32(acc, vshlq_n_s32::<1>(half)), flipped, x)
        })
    }
    #[inline(always)]
    fn has_row_pairs(self) -> bool {
        self.i8mm
    }
    #[inline(always)]
    fn dot_row_pair(self, [even, odd]: [I; 2], [first, second]: [I; 2], x: [u64; 2]) -> [I; 2] {
        if !self.i8mm {
            return dot_each(self, [even, odd], [first, second], x);
        }
        // SAFETY: as in `each`; from here on the processor is known to have I8MM.
        let x = unsafe { vreinterpretq_s32_u64(vcombine_u64(vcreate_u64(x[0]), vcreate_u64(x[1]))) };
        // Words of two lanes side by side are their eight bytes: lanes 0 and 1 of a quarter go to `even`, 2 and 3 to `odd`.
        [
            each!(|even, first, second| dot_matrix(even, vzip1q_s32(first, second), x)),
            each!(|odd, first, second| dot_matrix(odd, vzip2q_s32(first, second), x)),
        ]
    }
    #[inline(always)]
    fn unpair(self, [even, odd]: [I; 2]) -> [I; 2] {
        if !self.i8mm {
            return [even, odd];
        }
        [each!(|even, odd| vuzp1q_s32(even, odd)), each!(|even, odd| vuzp2q_s32(even, odd))]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: the caller's promise.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F {
        // SAFETY: the caller's promise.
        unsafe {
            let (low, high, zero) = (vld1q_u16(p), vld1q_u16(p.add(8)), vdupq_n_u16(0));
            // A bf16 is the upper half of an f32.
            [
                vreinterpretq_f32_u16(vzip1q_u16(zero, low)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, low)),
                vreinterpretq_f32_u16(vzip1q_u16(zero, high)),
                vreinterpretq_f32_u16(vzip2q_u16(zero, high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        // SAFETY: the caller's promise.
        let (low, high) = unsafe { (vld1q_u16(p), vld1q_u16(p.add(8))) };
        let ([a, b], [c, d]) = (self.widen_f16(low), self.widen_f16(high));
        [a, b, c, d]
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, [a, b, c, d]: F) {
        // SAFETY: the caller's promise.
        unsafe {
            vst1q_f32(p, a);
            vst1q_f32(p.add(4), b);
            vst1q_f32(p.add(8), c);
            vst1q_f32(p.add(12), d);
        }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        unsafe { [load_words(p), load_words(p.add(16)), load_words(p.add(32)), load_words(p.add(48))] }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, a: I) {
        let [a, b, c, d] = each!(|a| vreinterpretq_u8_s32(a));
        // SAFETY: the caller's promise.
        unsafe {
            vst1q_u8(p, a);
            vst1q_u8(p.add(16), b);
            vst1q_u8(p.add(32), c);
            vst1q_u8(p.add(48), d);
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        self.widen_u8(unsafe { vld1q_u8(p) })
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        let codes = unsafe {
            let bytes = vld1_u8(p);
            let (low, high) = (vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8::<4>(bytes));
            vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high))
        };
        self.widen_u8(codes)
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8, stride: usize) -> [I; WORDS] {
        // SAFETY: the caller's promise: 32 readable bytes at each row.
        let ([a, b, c, d], [e, f, g, h]) = unsafe { (self.panel(p, stride), self.panel(p.add(16), stride)) };
        [a, b, c, d, e, f, g, h]
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // Into the second cache: the first has no room for what is asked for ahead.
        // SAFETY: a prefetch of any address is harmless.
        unsafe { asm!("prfm pldl2keep, [{p}]", p = in(reg) p.addr(), options(nomem, nostack, preserves_flags)) }
    }
}
