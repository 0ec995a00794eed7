//! Floating-point elements as tensors store them, and conversions.

use std::marker::PhantomData;

use super::simd::{LANES, Simd};

/// Numbers of a tensor, in the type it is stored in.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// IEEE half precision, as bits.
    F16(&'a [u16]),
    /// The upper half of an f32, as bits.
    Bf16(&'a [u16]),
}

/// Numbers to be written, in the type they are stored in; rounded to nearest, ties to even.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// 32 bits.
    F32(&'a mut [f32]),
    /// IEEE half precision, as bits.
    F16(&'a mut [u16]),
    /// The upper half of an f32, as bits.
    Bf16(&'a mut [u16]),
}

/// An element type that kernels are compiled for.
pub trait Element: Copy + Send + Sync + 'static {
    /// # Safety
    /// 16 readable elements.
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::F;
    /// Exactly.
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

/// Bits of an f16.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct F16(pub u16);

/// Bits of a bf16.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { simd.load(p) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise; the same representation.
        unsafe { simd.load_f16(p.cast()) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16_to_f32(self.0)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        F16(f32_to_f16(x))
    }
}

impl Element for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::F {
        // SAFETY: the caller's promise; the same representation.
        unsafe { simd.load_bf16(p.cast()) }
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16_to_f32(self.0)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Bf16(f32_to_bf16(x))
    }
}

/// Exactly.
#[inline(always)]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to nearest, ties to even; not-a-numbers stay quiet ones.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// Exactly.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// Rounds to nearest, ties to even.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    half::f16::from_f32(x).to_bits()
}

impl<'a> Floats<'a> {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Floats::F32(x) => x.len(),
            Floats::F16(x) | Floats::Bf16(x) => x.len(),
        }
    }

    /// Elements `start..start + len`.
    #[inline(always)]
    pub fn slice(&self, start: usize, len: usize) -> Floats<'a> {
        match self {
            Floats::F32(x) => Floats::F32(&x[start..start + len]),
            Floats::F16(x) => Floats::F16(&x[start..start + len]),
            Floats::Bf16(x) => Floats::Bf16(&x[start..start + len]),
        }
    }

    /// One element.
    #[inline(always)]
    pub fn get(&self, at: usize) -> f32 {
        match self {
            Floats::F32(x) => x[at],
            Floats::F16(x) => f16_to_f32(x[at]),
            Floats::Bf16(x) => bf16_to_f32(x[at]),
        }
    }

    /// All elements as f32 into `out`, of the same length.
    #[inline(always)]
    pub fn widen<S: Simd>(&self, simd: S, out: &mut [f32]) {
        assert_eq!(self.len(), out.len());
        match self {
            Floats::F32(x) => out.copy_from_slice(x),
            Floats::F16(x) => widen(simd, as_f16(x), out),
            Floats::Bf16(x) => widen(simd, as_bf16(x), out),
        }
    }
}

/// The same memory, typed.
#[inline(always)]
pub fn as_f16(bits: &[u16]) -> &[F16] {
    // SAFETY: `F16` is a transparent wrapper of `u16`.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
}

/// The same memory, typed.
#[inline(always)]
pub fn as_bf16(bits: &[u16]) -> &[Bf16] {
    // SAFETY: `Bf16` is a transparent wrapper of `u16`.
    unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
}

/// Elements as f32, into as many.
#[inline(always)]
pub fn widen<S: Simd, T: Element>(simd: S, x: &[T], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let whole = x.len() / LANES * LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: 16 elements from `at` are inside both slices.
        unsafe { simd.store(out.as_mut_ptr().add(at), T::load(simd, x.as_ptr().add(at))) };
        at += LANES;
    }
    for at in whole..x.len() {
        out[at] = x[at].to_f32();
    }
}

impl FloatsMut<'_> {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            FloatsMut::F32(x) => x.len(),
            FloatsMut::F16(x) | FloatsMut::Bf16(x) => x.len(),
        }
    }
}

/// Numbers of which others may write some while the rest is read.
#[derive(Debug)]
pub struct SharedSlice<'a, T> {
    data: *const T,
    len: usize,
    lives: PhantomData<&'a [T]>,
}

impl<T> Clone for SharedSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedSlice<'_, T> {}

// SAFETY: it is read only where nobody writes, which the contract of `SharedMut::read` demands.
unsafe impl<T: Sync> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Numbers that nobody writes.
    pub fn new(numbers: &'a [T]) -> Self {
        Self { data: numbers.as_ptr(), len: numbers.len(), lives: PhantomData }
    }

    /// Elements `at..at + len`.
    #[inline(always)]
    pub fn row(&self, at: usize, len: usize) -> &'a [T] {
        let room = self.len.checked_sub(len);
        assert!(room.is_some_and(|room| at <= room), "a kernel reads past its input");
        // SAFETY: in bounds; nobody writes there, by contract.
        unsafe { std::slice::from_raw_parts(self.data.add(at), len) }
    }

    /// Where element `at` is, if there is one.
    #[inline(always)]
    pub fn address(&self, at: usize) -> *const T {
        self.data.wrapping_add(at)
    }
}

/// The same as [`Floats`], of which others may write some.
#[derive(Debug, Clone, Copy)]
pub enum SharedFloats<'a> {
    /// 32 bits.
    F32(SharedSlice<'a, f32>),
    /// IEEE half precision.
    F16(SharedSlice<'a, F16>),
    /// The upper half of an f32.
    Bf16(SharedSlice<'a, Bf16>),
}

impl SharedFloats<'_> {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len,
            Self::F16(x) => x.len,
            Self::Bf16(x) => x.len,
        }
    }
}

impl<'a> From<Floats<'a>> for SharedFloats<'a> {
    fn from(floats: Floats<'a>) -> Self {
        match floats {
            Floats::F32(x) => Self::F32(SharedSlice::new(x)),
            Floats::F16(x) => Self::F16(SharedSlice::new(as_f16(x))),
            Floats::Bf16(x) => Self::Bf16(SharedSlice::new(as_bf16(x))),
        }
    }
}

/// Memory that several threads write at different places.
#[derive(Debug, Clone, Copy)]
pub struct SharedMut {
    kind: Float,
    data: *mut u8,
    len: usize,
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

// SAFETY: writers keep to different places, which `write`'s contract demands.
unsafe impl Send for SharedMut {}
// SAFETY: as above.
unsafe impl Sync for SharedMut {}

impl SharedMut {
    /// Borrows `floats` for as long as the kernel runs.
    pub fn new(floats: &mut FloatsMut<'_>) -> Self {
        let len = floats.len();
        match floats {
            FloatsMut::F32(x) => Self { kind: Float::F32, data: x.as_mut_ptr().cast(), len },
            FloatsMut::F16(x) => Self { kind: Float::F16, data: x.as_mut_ptr().cast(), len },
            FloatsMut::Bf16(x) => Self { kind: Float::Bf16, data: x.as_mut_ptr().cast(), len },
        }
    }

    /// `len` elements from `data` on.
    ///
    /// # Safety
    /// They are there for as long as this is used.
    pub unsafe fn from_raw(float: Float, data: *mut u8, len: usize) -> Self {
        Self { kind: float, data, len }
    }

    /// All elements, to be read.
    ///
    /// # Safety
    /// The memory stays for `'a`, and nobody writes what is read meanwhile.
    pub unsafe fn read<'a>(&self) -> SharedFloats<'a> {
        let len = self.len;
        match self.kind {
            Float::F32 => SharedFloats::F32(SharedSlice { data: self.data.cast(), len, lives: PhantomData }),
            Float::F16 => SharedFloats::F16(SharedSlice { data: self.data.cast(), len, lives: PhantomData }),
            Float::Bf16 => SharedFloats::Bf16(SharedSlice { data: self.data.cast(), len, lives: PhantomData }),
        }
    }

    /// Copies `len` elements from `from` on to `to`.
    ///
    /// # Safety
    /// As for [`write`](Self::write), and nobody writes what is copied.
    pub unsafe fn copy_within(&self, from: usize, to: usize, len: usize) {
        let room = self.len.checked_sub(len);
        assert!(room.is_some_and(|room| from <= room && to <= room), "a kernel copies what is not there");
        let item = if matches!(self.kind, Float::F32) { size_of::<f32>() } else { size_of::<u16>() };
        // SAFETY: in bounds; exclusive by contract.
        unsafe { std::ptr::copy(self.data.add(from * item), self.data.add(to * item), len * item) };
    }

    /// Elements `at..at + len` of f32 memory.
    ///
    /// # Safety
    /// As for [`write`](Self::write), for as long as they are used.
    #[inline(always)]
    pub unsafe fn floats_mut<'a>(&self, at: usize, len: usize) -> &'a mut [f32] {
        let room = self.len.checked_sub(len);
        assert!(matches!(self.kind, Float::F32) && room.is_some_and(|room| at <= room), "f32 inside of an output");
        // SAFETY: in bounds; exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.cast::<f32>().add(at), len) }
    }

    /// Writes sixteen values from element `at` on.
    ///
    /// # Safety
    /// As for [`write`](Self::write).
    #[inline(always)]
    pub unsafe fn write_lanes<S: Simd>(&self, simd: S, at: usize, values: S::F) {
        // SAFETY: in bounds where it is stored at once; exclusive by contract.
        unsafe {
            if matches!(self.kind, Float::F32) {
                let room = self.len.checked_sub(LANES);
                assert!(room.is_some_and(|room| at <= room), "a kernel writes past its output");
                simd.store(self.data.cast::<f32>().add(at), values);
            } else {
                let mut numbers = [0f32; LANES];
                simd.store(numbers.as_mut_ptr(), values);
                self.write(at, &numbers);
            }
        }
    }

    /// Writes `values` from element `at` on.
    ///
    /// # Safety
    /// The memory is still borrowed, and no other thread touches these elements meanwhile.
    #[inline(always)]
    pub unsafe fn write(&self, at: usize, values: &[f32]) {
        let room = self.len.checked_sub(values.len());
        assert!(room.is_some_and(|room| at <= room), "a kernel writes past its output");
        // SAFETY: in bounds; exclusive by contract.
        unsafe {
            match self.kind {
                Float::F32 => {
                    std::ptr::copy_nonoverlapping(values.as_ptr(), self.data.cast::<f32>().add(at), values.len());
                }
                Float::F16 => {
                    let to = self.data.cast::<u16>().add(at);
                    for (i, &x) in values.iter().enumerate() {
                        to.add(i).write(f32_to_f16(x));
                    }
                }
                Float::Bf16 => {
                    let to = self.data.cast::<u16>().add(at);
                    for (i, &x) in values.iter().enumerate() {
                        to.add(i).write(f32_to_bf16(x));
                    }
                }
            }
        }
    }
}

/// Rows of numbers at equal distances, such as some columns of a larger array.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// From the first number of the first row on.
    pub numbers: &'a [f32],
    /// Numbers of a row.
    pub width: usize,
    /// From the beginning of one row to that of the next.
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows one after another.
    pub fn packed(numbers: &'a [f32], width: usize) -> Self {
        Self { numbers, width, stride: width }
    }

    /// Row `index`.
    pub fn row(&self, index: usize) -> &'a [f32] {
        &self.numbers[index * self.stride..][..self.width]
    }

    /// Panics if there are not exactly `rows`.
    pub fn check(&self, rows: usize) {
        let needed = rows.checked_sub(1).map_or(0, |last| last * self.stride + self.width);
        let exact = self.stride > self.width || self.numbers.len() == needed;
        assert!(exact && self.numbers.len() >= needed && self.stride >= self.width, "{rows} rows of {}", self.width);
    }
}
