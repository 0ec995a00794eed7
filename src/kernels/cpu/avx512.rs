//! AVX-512 with VNNI: one register is sixteen lanes.

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;

use super::simd::{LANES, Simd, WORDS, Work, dot_bf16_in_f32, round_bf16_one_by_one};

/// Proof that the processor has AVX-512 F, BW, DQ, VL and VNNI, and BF16 if it says so.
#[derive(Debug, Clone, Copy)]
pub struct Avx512 {
    bf16: bool,
}

/// # Safety
/// The processor must have the features, and with `bf16` AVX-512 BF16, too: two instructions, not worth compiling everything
/// again.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
pub unsafe fn run<W: Work>(work: W, bf16: bool) -> W::Output {
    work.run(Avx512 { bf16 })
}

/// An instruction of AVX-512 BF16, in assembly: its intrinsic is inlined only into functions that have the feature.
///
/// # Safety
/// The processor must have it.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn dot_bf16(mut acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: an operation on registers.
    unsafe {
        asm!(
            "vdpbf16ps {acc}, {a}, {b}",
            acc = inout(zmm_reg) acc,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

/// Another one.
///
/// # Safety
/// The processor must have it.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn round_bf16(first: __m512, second: __m512) -> __m512i {
    let out: __m512i;
    // SAFETY: an operation on registers.
    unsafe {
        asm!(
            "vcvtne2ps2bf16 {out}, {second}, {first}",
            out = lateout(zmm_reg) out,
            first = in(zmm_reg) first,
            second = in(zmm_reg) second,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

/// Register operations: a value of [`Avx512`] exists only where the processor has them.
macro_rules! op {
    ($($body:tt)*) => {
        // SAFETY: see the macro.
        unsafe { $($body)* }
    };
}

impl Simd for Avx512 {
    const INT_ROWS: usize = 12;
    const ROWS_TOGETHER: usize = 24;
    const DIRECT_ROWS: usize = 8;
    const DOT_ROWS: usize = 6;
    const DOT_COLUMNS: usize = 4;
    const GEMM_ROWS: usize = 12;
    const GEMM_WIDE: bool = true;
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    fn direct_rows(self) -> usize {
        // Processors with fast BF16 are AMD's: there eight rows gained a fifth by it (Zen 4, before rows lay together). Intel's lose a
        // tenth from four rows on (Emerald Rapids): their loads of one number for all lanes are fewer than their products.
        if self.bf16 { 3 * Self::DIRECT_ROWS } else { 2 }
    }

    #[inline(always)]
    fn call<W: Work>(self, work: W) -> W::Output {
        // `inline(never)` does not reach LLVM for functions with target features: an address it cannot see does.
        // SAFETY: a value of `Avx512` exists only where the processor has the features.
        unsafe { black_box(run::<W> as unsafe fn(W, bool) -> W::Output)(work, self.bf16) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        op! {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn any_above(self, a: __m512, b: __m512) -> bool {
        op!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0)
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        op!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        op! {
            // Halves onto halves twice, four sums at a time, then a 4 x 4 transpose: the order of `sum`.
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(c, d), _mm512_shuffle_f32x4::<0b11_10_11_10>(c, d));
            let four = _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd));
            let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
            let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
            let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one));
            let mut out = [0f32; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512i {
        op!(_mm512_cvtps_epi32(a))
    }
    #[inline(always)]
    fn float_of_int(self, a: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn bits(self, a: __m512) -> __m512i {
        op!(_mm512_castps_si512(a))
    }
    #[inline(always)]
    fn float_of_bits(self, a: __m512i) -> __m512 {
        op!(_mm512_castsi512_ps(a))
    }
    #[inline(always)]
    fn float_of_f16(self, a: __m512i) -> __m512 {
        op!(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        op!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: __m512i) -> __m512i {
        op!(_mm512_srli_epi32::<N>(a))
    }
    #[inline(always)]
    fn lookup(self, bytes: __m512i, table: &[u8; 16]) -> __m512i {
        op! {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, bytes)
        }
    }
    #[inline(always)]
    fn dot_u7(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        op!(_mm512_dpbusd_epi32(acc, w, x))
    }
    #[inline(always)]
    fn dot_u8(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        op!(_mm512_dpbusd_epi32(acc, w, x))
    }
    #[inline(always)]
    fn dot_bf16(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        if !self.bf16 {
            return dot_bf16_in_f32(self, acc, a, b);
        }
        op!(dot_bf16(acc, a, b))
    }
    #[inline(always)]
    fn round_bf16(self, first: __m512, second: __m512) -> __m512i {
        if !self.bf16 {
            return round_bf16_one_by_one(self, first, second);
        }
        op!(round_bf16(first, second))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller's promise.
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(p, a) }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, a: __m512i) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, a: __m512i, lanes: &[u8; LANES]) {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(a), _mm_loadu_si128(lanes.as_ptr().cast()));
            _mm_storeu_si128(p.cast(), bytes);
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = _mm_loadl_epi64(p.cast());
            let mask = _mm_set1_epi8(15);
            let (low, high) = (_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask));
            _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high))
        }
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8, stride: usize) -> [__m512i; WORDS] {
        // SAFETY: the caller's promise: 32 bytes at each of 16 rows; the rest works on registers.
        unsafe {
            let [a, b, c, d] = half(p, stride);
            let [e, f, g, h] = half(p.add(8 * stride), stride);
            [
                _mm512_shuffle_i32x4::<0b10_00_10_00>(a, e),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(b, f),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(c, g),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(d, h),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(a, e),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(b, f),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(c, g),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(d, h),
            ]
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
}

/// Rows r and r + 4 side by side, so that the last step of the transposition leaves the rows in order.
///
/// # Safety
/// AVX-512, and 32 readable bytes at both rows.
#[inline(always)]
unsafe fn pair(p: *const u8, stride: usize) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_castsi256_si512(_mm256_loadu_si256(p.cast()));
        _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(p.add(4 * stride).cast()))
    }
}

/// Eight rows: words 0 and 4, 1 and 5, 2 and 6, 3 and 7 of four rows each.
///
/// # Safety
/// AVX-512, and 32 readable bytes at eight rows.
#[inline(always)]
unsafe fn half(p: *const u8, stride: usize) -> [__m512i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (pair(p, stride), pair(p.add(stride), stride));
        let (c, d) = (pair(p.add(2 * stride), stride), pair(p.add(3 * stride), stride));
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}
