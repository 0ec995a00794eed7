//! Memory of the host's that becomes arrays.

use std::ffi::c_void;
use std::mem::MaybeUninit;

use mlx_rs::{Array, Dtype};

use super::{checked, item_size};
use crate::error::{Error, Result, Status};

/// A host buffer on a page boundary, so that a GPU that shares memory can use it without a copy. A mapping of its own: its
/// memory goes back to the system when it is dropped, not to an allocator that keeps it.
#[derive(Debug)]
pub struct HostBuffer {
    pointer: std::ptr::NonNull<u8>,
    /// Of its pages.
    size: usize,
    len: usize,
}

/// Page size of Apple's GPUs; a multiple of Linux's.
const PAGE: usize = 16 * 1024;

/// Size of buffers that get huge pages.
const WORTH_HUGE_PAGES: usize = 8 << 20;

/// Asks for huge pages where they are worth it, before the memory is touched: a tenth more bandwidth where the system
/// grants them, and far fewer page faults. Refused without harm.
pub fn prefer_huge_pages<T>(fresh: &[T]) {
    #[cfg(target_os = "linux")]
    if size_of_val(fresh) >= WORTH_HUGE_PAGES {
        let start = fresh.as_ptr().cast::<u8>();
        let skipped = start.align_offset(PAGE);
        let len = size_of_val(fresh) - skipped;
        // SAFETY: on a page boundary and inside the slice; the advice changes no content.
        unsafe { libc::madvise(start.wrapping_add(skipped).cast_mut().cast(), len, libc::MADV_HUGEPAGE) };
    }
}

impl HostBuffer {
    /// `len` zeroed bytes.
    pub fn new(len: usize) -> Result<Self> {
        Self::several(&[len])?.pop().ok_or_else(|| Error::internal("a buffer was asked for"))
    }

    /// Buffers of so many zeroed bytes each, at least one, side by side: together they are large enough for huge pages.
    pub fn several(lens: &[usize]) -> Result<Vec<Self>> {
        let too_large = || Error::new(Status::OutOfMemory, format!("cannot allocate {lens:?} bytes for tensors"));
        let whole = |len: &usize| len.max(&1).checked_next_multiple_of(PAGE);
        let sizes: Vec<usize> = lens.iter().map(whole).collect::<Option<_>>().ok_or_else(too_large)?;
        let all = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size)).ok_or_else(too_large)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, of nothing that exists already.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), all, access, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(too_large());
        }
        let mut pointer = std::ptr::NonNull::new(start.cast::<u8>()).ok_or_else(too_large)?;
        // SAFETY: fresh memory of this size, which the system fills with zeros.
        prefer_huge_pages(unsafe { std::slice::from_raw_parts(pointer.as_ptr().cast::<MaybeUninit<u8>>(), all) });
        let mut buffers = Vec::with_capacity(lens.len());
        for (&len, size) in lens.iter().zip(sizes) {
            // Whole pages of their own, which each of them gives back.
            buffers.push(Self { pointer, size, len });
            // SAFETY: the sizes add up to the mapping's.
            pointer = unsafe { pointer.add(size) };
        }
        Ok(buffers)
    }

    /// The bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes, uniquely borrowed through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }

    /// Hands the bytes to MLX as an array of `shape` and `dtype`; freed when the last user of the array is gone.
    ///
    /// Errors when the sizes do not agree.
    pub fn into_array(self, shape: &[i32], dtype: Dtype) -> Result<Array> {
        let elements: usize = shape.iter().map(|&n| n as usize).product();
        if elements * item_size(dtype) != self.len {
            return Err(Error::internal(format!("{} bytes do not make {shape:?} of {dtype:?}", self.len)));
        }
        let owner = Box::into_raw(Box::new(self));
        // SAFETY: the pointer stays valid until `drop_host_buffer` runs, once, when MLX lets go of the data.
        unsafe {
            let raw = mlx_sys::mlx_array_new_data_managed_payload(
                (*owner).pointer.as_ptr().cast(),
                shape.as_ptr(),
                shape.len() as i32,
                dtype.into(),
                owner.cast(),
                Some(drop_host_buffer),
            );
            if raw.ctx.is_null() {
                return Err(checked(1).err().unwrap_or_else(|| Error::backend("MLX refused a host buffer")));
            }
            Ok(Array::from_ptr(raw))
        }
    }
}

extern "C" fn drop_host_buffer(owner: *mut c_void) {
    // SAFETY: the pointer came from `Box::into_raw` in `into_array` and is passed here exactly once.
    drop(unsafe { Box::from_raw(owner.cast::<HostBuffer>()) });
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // SAFETY: whole pages that were mapped in `several`, and nobody refers to them any more.
        unsafe { libc::munmap(self.pointer.as_ptr().cast(), self.size) };
    }
}

// SAFETY: plain bytes with one owner.
unsafe impl Send for HostBuffer {}
