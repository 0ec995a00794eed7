//! Sixteen lanes, whatever the instruction set: kernels are written once against [`Simd`] and compiled for each.
//!
//! A value of an instruction set's type is the proof that the processor has it ([`Isa::run`] makes them), so operations
//! on registers are safe; loads and stores are not.
//!
//! Only the entry points that run [`Work`] are compiled with the instruction set's features. Whatever a work does must
//! be inlined into them: every method here and every function on the way is `#[inline(always)]`, and what is called
//! many times becomes a work of its own ([`Simd::call`]). Closures and iterator adaptors are not inlined reliably; where
//! time matters there are plain loops.

use super::floats::f32_to_bf16;

/// Lanes of a register of f32 or i32.
pub const LANES: usize = 16;

/// Rows of 32-bit words that [`Simd::load_words`] transposes, one per lane, and words of each.
pub const WORDS: usize = 8;

/// Vectors that an accumulator of [`Simd::dot_u4`] takes: pairs of products are at most 2 * 15 * 128, and i16 holds eight of
/// them.
pub const FOLD: usize = 8;

/// An instruction set. Floating-point operations round like IEEE 754's; `sum` adds in a fixed order.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Whether `dot_u4` is faster than `dot_u7`, and needs to be folded.
    const FOLDS: bool = false;
    /// Rows of activations in a register tile of the integer product; it has two panels of weights.
    const INT_ROWS: usize;
    /// Quantised rows that lie together in memory: a multiple of all tiles' rows, or 1.
    const ROWS_TOGETHER: usize = 1;
    /// Rows of activations in a tile that codes meet without a detour through memory.
    const DIRECT_ROWS: usize;
    /// Rows of activations in a register tile of the dot product.
    const DOT_ROWS: usize;
    /// Rows of weights in such a tile.
    const DOT_COLUMNS: usize;
    /// Rows of activations in a register tile of the product with panels.
    const GEMM_ROWS: usize;
    /// Vectors of columns in it, one or two.
    const GEMM_VECTORS: usize = 2;
    /// Whether there are registers for tiles of six rows with two panels of two vectors.
    const GEMM_WIDE: bool = false;
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32, or 64 bytes in groups of four.
    type I: Copy;

    /// Rows up to which codes go through such tiles, taken apart again for each.
    #[inline(always)]
    fn direct_rows(self) -> usize {
        Self::DIRECT_ROWS
    }

    /// Runs `work` as a function of its own.
    fn call<W: Work>(self, work: W) -> W::Output;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::F;
    /// Sum.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// Difference.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// Product.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// Quotient.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a` where it is greater, otherwise `b`: also where one of them is not a number.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once except on the portable set.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The sum of all lanes: halves are added to halves.
    fn sum(self, a: Self::F) -> f32;
    /// Whether a lane of `a` is greater than that of `b`.
    fn any_above(self, a: Self::F, b: Self::F) -> bool;
    /// The largest lane.
    fn max_lane(self, a: Self::F) -> f32;
    /// `[sum(a), sum(b), sum(c), sum(d)]`, each with the same bits as `sum`.
    #[inline(always)]
    fn sum4(self, a: [Self::F; 4]) -> [f32; 4] {
        [self.sum(a[0]), self.sum(a[1]), self.sum(a[2]), self.sum(a[3])]
    }
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::I;
    /// To floating point, rounded to nearest.
    fn float_of_int(self, a: Self::I) -> Self::F;
    /// The same bits as integers.
    fn bits(self, a: Self::F) -> Self::I;
    /// The same bits as floating-point numbers.
    fn float_of_bits(self, a: Self::I) -> Self::F;
    /// The f16 in the lower half of each lane.
    fn float_of_f16(self, a: Self::I) -> Self::F;

    /// `x` in every lane.
    fn splat_i(self, x: i32) -> Self::I;
    /// Sum, wrapping.
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise and.
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shifts towards the high bits.
    fn shl<const N: u32>(self, a: Self::I) -> Self::I;
    /// Shifts zeros in.
    fn shr<const N: u32>(self, a: Self::I) -> Self::I;
    /// Each byte, which must be below 16, replaced by that entry of the table.
    fn lookup(self, bytes: Self::I, table: &[u8; 16]) -> Self::I;
    /// Adds to each lane the dot product of its four unsigned bytes in `w`, all below 128, with the signed bytes of `x`.
    fn dot_u7(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// The same for all unsigned bytes.
    fn dot_u8(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// The same for bytes below 16, in an accumulator of the instruction set's own, which begins as zeros and takes
    /// [`FOLD`] vectors at most before it is folded.
    #[inline(always)]
    fn dot_u4(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        self.dot_u7(acc, w, x)
    }
    /// The lanes' sums in such an accumulator.
    #[inline(always)]
    fn fold(self, acc: Self::I) -> Self::I {
        acc
    }
    /// Adds to each lane the dot product of the two bf16 in it. Where there is an instruction for it ([`Isa::has_dot_bf16`]),
    /// it takes and makes zeros for subnormal numbers; elsewhere it is slower than numbers in f32.
    #[inline(always)]
    fn dot_bf16(self, acc: Self::F, a: Self::I, b: Self::I) -> Self::F {
        dot_bf16_in_f32(self, acc, a, b)
    }
    /// Whether this processor multiplies two rows of activations at once. Loops that come after an assertion of it are free
    /// of the branches in [`Simd::dot_row_pair`] and [`Simd::unpair`].
    #[inline(always)]
    fn has_row_pairs(self) -> bool {
        false
    }
    /// Adds to each lane the dot product of its eight unsigned bytes, four in each vector of `w`, with the eight signed
    /// bytes of both rows `x`, in accumulators of the instruction set's own, which begin as zeros.
    #[inline(always)]
    fn dot_row_pair(self, acc: [Self::I; 2], w: [Self::I; 2], x: [u64; 2]) -> [Self::I; 2] {
        dot_each(self, acc, w, x)
    }
    /// The lanes' sums of both rows in such accumulators.
    #[inline(always)]
    fn unpair(self, acc: [Self::I; 2]) -> [Self::I; 2] {
        acc
    }
    /// The lanes of both rounded to bf16, two a lane: in memory the first sixteen and then the second. An instruction makes
    /// zeros of subnormal numbers.
    #[inline(always)]
    fn round_bf16(self, first: Self::F, second: Self::F) -> Self::I {
        round_bf16_one_by_one(self, first, second)
    }

    /// Sixteen elements.
    ///
    /// # Safety
    /// 16 readable elements.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Sixteen elements.
    ///
    /// # Safety
    /// 16 readable elements.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    /// Sixteen elements.
    ///
    /// # Safety
    /// 16 readable elements.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// Sixteen elements.
    ///
    /// # Safety
    /// 16 writable elements.
    unsafe fn store(self, p: *mut f32, a: Self::F);
    /// 64 bytes.
    ///
    /// # Safety
    /// 64 readable bytes.
    unsafe fn load_i(self, p: *const u8) -> Self::I;
    /// 64 bytes.
    ///
    /// # Safety
    /// 64 writable bytes.
    unsafe fn store_i(self, p: *mut u8, a: Self::I);
    /// The lowest bytes of sixteen lanes, in any order: byte `i` is that of lane `lanes[i]`, which must be below 16.
    ///
    /// # Safety
    /// 16 writable bytes.
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8, a: Self::I, lanes: &[u8; LANES]) {
        let mut all = [0i32; LANES];
        // SAFETY: an array of 64 bytes; the caller's promise.
        unsafe {
            self.store_i(all.as_mut_ptr().cast(), a);
            for i in 0..LANES {
                p.add(i).write(all[usize::from(lanes[i]) % LANES] as i8);
            }
        }
    }
    /// 16 bytes, one a lane.
    ///
    /// # Safety
    /// 16 readable bytes.
    unsafe fn load_u8(self, p: *const u8) -> Self::I;
    /// 16 half bytes, the lower half of a byte first, one a lane.
    ///
    /// # Safety
    /// 8 readable bytes.
    unsafe fn load_u4(self, p: *const u8) -> Self::I;
    /// Sixteen rows of [`WORDS`] words, `stride` bytes apart: lane `r` of vector `w` is word `w` of row `r`.
    ///
    /// # Safety
    /// 32 readable bytes at each of the sixteen rows.
    unsafe fn load_words(self, p: *const u8, stride: usize) -> [Self::I; WORDS];
    /// Asks for the line of `p` to be brought near; any address is allowed.
    fn prefetch(self, p: *const u8);
}

/// [`Simd::dot_bf16`] without an instruction for it.
#[inline(always)]
pub fn dot_bf16_in_f32<S: Simd>(simd: S, acc: S::F, a: S::I, b: S::I) -> S::F {
    let high = simd.splat_i(0xffff_0000u32 as i32);
    let acc = simd.fma(simd.float_of_bits(simd.shl::<16>(a)), simd.float_of_bits(simd.shl::<16>(b)), acc);
    simd.fma(simd.float_of_bits(simd.and(a, high)), simd.float_of_bits(simd.and(b, high)), acc)
}

/// [`Simd::round_bf16`] without an instruction for it.
#[inline(always)]
pub fn round_bf16_one_by_one<S: Simd>(simd: S, first: S::F, second: S::F) -> S::I {
    let (mut numbers, mut halves) = ([0f32; 2 * LANES], [0u16; 2 * LANES]);
    // SAFETY: twice sixteen numbers, and 64 bytes.
    unsafe {
        simd.store(numbers.as_mut_ptr(), first);
        simd.store(numbers.as_mut_ptr().add(LANES), second);
        for at in 0..2 * LANES {
            halves[at] = f32_to_bf16(numbers[at]);
        }
        simd.load_i(halves.as_ptr().cast())
    }
}

/// What [`Simd::dot_row_pair`] computes, a row after the other and in lanes.
#[inline(always)]
pub fn dot_each<S: Simd>(simd: S, acc: [S::I; 2], w: [S::I; 2], x: [u64; 2]) -> [S::I; 2] {
    let mut sums = acc;
    for row in 0..2 {
        let (first, second) = (simd.splat_i(x[row] as i32), simd.splat_i((x[row] >> 32) as i32));
        sums[row] = simd.dot_u8(simd.dot_u8(sums[row], w[0], first), w[1], second);
    }
    sums
}

/// An instruction set that this processor has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(Kind);

impl std::fmt::Debug for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Portable code.
    Scalar,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with BF16, too.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// Advanced SIMD with the dot product and half precision extensions.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// The same code with the integer matrix extension (I8MM) for pairs of rows.
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
}

/// Work that is compiled for each instruction set.
pub trait Work {
    /// What it returns.
    type Output;
    /// Does it; must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Isa {
    /// Portable code, which every processor runs.
    pub const SCALAR: Isa = Isa(Kind::Scalar);

    /// All that this processor has, the portable one first and the best last.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut found = vec![Kind::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            use std::arch::x86_64::__cpuid;
            if has!("avx2") && has!("fma") && has!("f16c") {
                found.push(Kind::Avx2);
                let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
                if avx512 && has!("avx512vnni") {
                    // Intel's processors multiply bf16 at half the rate of f32 (Emerald Rapids: 39 instead of 79 G
                    // multiply-adds/s on a core), AMD's at twice the rate.
                    // SAFETY: every processor with AVX-512 has the instruction. (Newer compilers call it safe.)
                    #[allow(unused_unsafe)]
                    let amd = unsafe { __cpuid(0) }.ebx == u32::from_le_bytes(*b"Auth");
                    match (has!("avx512bf16"), amd) {
                        (false, _) => found.push(Kind::Avx512),
                        (true, false) => found.extend([Kind::Avx512Bf16, Kind::Avx512]),
                        (true, true) => found.extend([Kind::Avx512, Kind::Avx512Bf16]),
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected as has;
            if has!("neon") && has!("dotprod") && has!("fp16") {
                found.push(Kind::Neon);
                if has!("i8mm") {
                    found.push(Kind::NeonI8mm);
                }
            }
        }
        found.into_iter().map(Isa).collect()
    }

    /// The best that this processor has.
    pub fn best() -> Isa {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| *Isa::available().last().unwrap_or(&Isa::SCALAR))
    }

    /// Whether it has an instruction for [`Simd::dot_bf16`].
    pub fn has_dot_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Kind::Avx512Bf16;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// [`Simd::ROWS_TOGETHER`].
    pub fn rows_together(self) -> usize {
        struct RowsTogether;
        impl Work for RowsTogether {
            type Output = usize;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> usize {
                S::ROWS_TOGETHER
            }
        }
        self.run(RowsTogether)
    }

    /// Runs `work` as compiled for this instruction set.
    #[inline]
    pub fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            Kind::Scalar => super::scalar::run(work),
            // SAFETY: values are made in `available` alone, where the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { super::avx2::run(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { super::avx512::run(work, false) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => unsafe { super::avx512::run(work, true) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => unsafe { super::neon::run(work, false) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            Kind::NeonI8mm => unsafe { super::neon::run(work, true) },
        }
    }
}
