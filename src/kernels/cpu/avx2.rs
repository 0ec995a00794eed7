//! AVX2 with FMA and F16C: two registers are sixteen lanes.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::simd::{Simd, WORDS, Work};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

/// # Safety
/// The processor must have the features.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
pub unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run(Avx2(()))
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// The same register operation on both halves.
macro_rules! both {
    (|$($half:ident),*| $body:expr) => {
        // SAFETY: operations on registers; a value of `Avx2` exists only where the processor has them.
        unsafe { [both!(@ 0 [$($half)*] $body), both!(@ 1 [$($half)*] $body)] }
    };
    (@ $index:literal [$($half:ident)*] $body:expr) => {{
        $(let $half = $half[$index];)*
        $body
    }};
}

impl Avx2 {
    #[inline(always)]
    fn dot_bytes(self, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: as in `both`. No pair can exceed 2 * 127 * 128, which i16 holds.
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)) }
    }

    /// Eight rows of eight words, transposed.
    #[inline(always)]
    unsafe fn transpose(self, p: *const u8, stride: usize) -> [__m256i; 8] {
        // SAFETY: the caller's promise: 32 readable bytes at each row.
        unsafe {
            let [a, b, c, d] = quarter(p, stride);
            let [e, f, g, h] = quarter(p.add(16), stride);
            [a, b, c, d, e, f, g, h]
        }
    }
}

/// Half of rows r and r + 4 side by side, so that the last step of the transposition leaves the rows in order.
///
/// # Safety
/// AVX2, and 16 readable bytes at both rows.
#[inline(always)]
unsafe fn pair(p: *const u8, stride: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_castsi128_si256(_mm_loadu_si128(p.cast()));
        _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(p.add(4 * stride).cast()))
    }
}

/// Four words of eight rows, transposed.
///
/// # Safety
/// AVX2, and 16 readable bytes at eight rows.
#[inline(always)]
unsafe fn quarter(p: *const u8, stride: usize) -> [__m256i; 4] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (pair(p, stride), pair(p.add(stride), stride));
        let (c, d) = (pair(p.add(2 * stride), stride), pair(p.add(3 * stride), stride));
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab_low, cd_low),
            _mm256_unpackhi_epi64(ab_low, cd_low),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}

impl Simd for Avx2 {
    const FOLDS: bool = true;
    const INT_ROWS: usize = 3;
    const DIRECT_ROWS: usize = 1;
    const DOT_ROWS: usize = 2;
    const DOT_COLUMNS: usize = 2;
    // Twelve of the sixteen registers are sums, two are columns: eight loads for twelve multiplications.
    const GEMM_ROWS: usize = 6;
    const GEMM_VECTORS: usize = 1;
    type F = F;
    type I = I;

    #[inline(always)]
    fn call<W: Work>(self, work: W) -> W::Output {
        // `inline(never)` does not reach LLVM for functions with target features: an address it cannot see does.
        // SAFETY: a value of `Avx2` exists only where the processor has the features.
        unsafe { black_box(run::<W> as unsafe fn(W) -> W::Output)(work) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F {
        // SAFETY: as in `both`.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        both!(|a, b| _mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        both!(|a, b| _mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both!(|a, b| _mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        both!(|a, b| _mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        both!(|a, b| _mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        both!(|a, b, c| _mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn sum(self, [a, b]: F) -> f32 {
        // SAFETY: as in `both`.
        unsafe {
            let eight = _mm256_add_ps(a, b);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn any_above(self, a: F, b: F) -> bool {
        // SAFETY: as in `both`.
        unsafe {
            let above = [_mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])];
            _mm256_movemask_ps(_mm256_or_ps(above[0], above[1])) != 0
        }
    }
    #[inline(always)]
    fn max_lane(self, [a, b]: F) -> f32 {
        // SAFETY: as in `both`.
        unsafe {
            let eight = _mm256_max_ps(a, b);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn round(self, a: F) -> I {
        both!(|a| _mm256_cvtps_epi32(a))
    }
    #[inline(always)]
    fn float_of_int(self, a: I) -> F {
        both!(|a| _mm256_cvtepi32_ps(a))
    }
    #[inline(always)]
    fn bits(self, a: F) -> I {
        both!(|a| _mm256_castps_si256(a))
    }
    #[inline(always)]
    fn float_of_bits(self, a: I) -> F {
        both!(|a| _mm256_castsi256_ps(a))
    }
    #[inline(always)]
    fn float_of_f16(self, a: I) -> F {
        both!(|a| {
            // Packing saturates to u16; within 128-bit lanes, hence the permutation.
            let low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
            let packed = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(low, low));
            _mm256_cvtph_ps(_mm256_castsi256_si128(packed))
        })
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        // SAFETY: as in `both`.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        both!(|a, b| _mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        both!(|a, b| _mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, a: I) -> I {
        both!(|a| _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, a: I) -> I {
        both!(|a| _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn lookup(self, bytes: I, table: &[u8; 16]) -> I {
        // SAFETY: as in `both`; the table has 16 bytes.
        let table = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())) };
        both!(|bytes| _mm256_shuffle_epi8(table, bytes))
    }
    #[inline(always)]
    fn dot_u7(self, acc: I, w: I, x: I) -> I {
        both!(|acc, w, x| _mm256_add_epi32(acc, self.dot_bytes(w, x)))
    }
    #[inline(always)]
    fn dot_u8(self, acc: I, w: I, x: I) -> I {
        // Products of bytes would saturate: even and odd bytes are widened to 16 bits instead.
        both!(|acc, w, x| {
            let even = _mm256_madd_epi16(
                _mm256_and_si256(w, _mm256_set1_epi16(0xff)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(w), _mm256_srai_epi16::<8>(x));
            _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
        })
    }
    #[inline(always)]
    fn dot_u4(self, acc: I, w: I, x: I) -> I {
        // Sums of pairs stay 16 bits wide: half of the multiplications.
        both!(|acc, w, x| _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)))
    }
    #[inline(always)]
    fn fold(self, acc: I) -> I {
        both!(|acc| _mm256_madd_epi16(acc, _mm256_set1_epi16(1)))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: the caller's promise.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F {
        // SAFETY: the caller's promise.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        // SAFETY: the caller's promise.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, [a, b]: F) {
        // SAFETY: the caller's promise.
        unsafe {
            _mm256_storeu_ps(p, a);
            _mm256_storeu_ps(p.add(8), b);
        }
    }
    #[inline(always)]
    unsafe fn load_i(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store_i(self, p: *mut u8, [a, b]: I) {
        // SAFETY: the caller's promise.
        unsafe {
            _mm256_storeu_si256(p.cast(), a);
            _mm256_storeu_si256(p.add(32).cast(), b);
        }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        unsafe {
            [_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> I {
        // SAFETY: the caller's promise.
        unsafe {
            let bytes = _mm_loadl_epi64(p.cast());
            let mask = _mm_set1_epi8(15);
            let (low, high) = (_mm_and_si128(bytes, mask), _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask));
            let codes = _mm_unpacklo_epi8(low, high);
            [_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(codes))]
        }
    }
    #[inline(always)]
    unsafe fn load_words(self, p: *const u8, stride: usize) -> [I; WORDS] {
        // SAFETY: the caller's promise.
        let (upper, lower) = unsafe { (self.transpose(p, stride), self.transpose(p.add(8 * stride), stride)) };
        let mut words = [[upper[0]; 2]; WORDS];
        for (word, out) in words.iter_mut().enumerate() {
            *out = [upper[word], lower[word]];
        }
        words
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
