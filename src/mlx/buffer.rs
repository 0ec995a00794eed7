//! Memory of the host's that becomes arrays.
//!
//! Metal takes pages of the host's over. MLX's allocator for CPUs takes over nothing and would copy them, page faults included:
//! there the memory is its own from the beginning. CUDA copies what it gets to memory that it manages.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::{checked, gpu_available, item_size};
use crate::error::{Error, Result, Status};

/// Memory for one array, which is filled before MLX gets it. Its pages go back to the system when it, or the array that it
/// became, is dropped, also while its neighbours stay.
#[derive(Debug)]
pub struct HostBuffer {
    pointer: NonNull<u8>,
    len: usize,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    /// Pages of a mapping, of so many bytes.
    Pages(usize),
    /// A part of memory of MLX's.
    Part(Arc<Allocation>),
}

/// Memory of MLX's allocator.
#[derive(Debug)]
struct Allocation {
    handle: *mut c_void,
    bytes: NonNull<u8>,
    size: usize,
}

unsafe extern "C" {
    /// `size` bytes of MLX's allocator, of any content, whose address is written to `bytes`. NULL if there are none.
    fn omlx_memory_new(size: usize, bytes: *mut *mut u8) -> *mut c_void;

    /// Gives them back.
    fn omlx_memory_free(memory: *mut c_void);

    /// An array of what is `offset` bytes behind the beginning of `memory`, which must last until `drop` is called with
    /// `owner`: when the last user of the array's data is gone, or at once if the result is NULL.
    fn omlx_memory_array(
        memory: *mut c_void,
        offset: usize,
        shape: *const i32,
        ndim: usize,
        dtype: mlx_sys::mlx_dtype,
        owner: *mut c_void,
        drop: extern "C" fn(*mut c_void),
    ) -> *mut c_void;
}

/// Page size of Apple's GPUs; a multiple of Linux's.
const PAGE: usize = 16 * 1024;

/// Parts of MLX's memory begin at a line of the processor's caches.
const LINE: usize = 64;

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

/// Makes the system give out the whole pages of `fresh` now instead of when they are first used. Refused without harm.
pub fn populate<T>(fresh: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        let start = fresh.as_mut_ptr().cast::<u8>();
        let skipped = start.align_offset(PAGE);
        let len = size_of_val(fresh).saturating_sub(skipped) / PAGE * PAGE;
        if len > 0 {
            // SAFETY: whole pages inside of the slice; what they hold stays.
            unsafe { libc::madvise(start.wrapping_add(skipped).cast(), len, libc::MADV_POPULATE_WRITE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = fresh;
}

impl HostBuffer {
    /// `len` bytes, of any content.
    pub fn new(len: usize) -> Result<Self> {
        Self::several(&[len])?.pop().ok_or_else(|| Error::internal("a buffer was asked for"))
    }

    /// Buffers of so many bytes each, at least one, side by side: together they are large enough for huge pages.
    pub fn several(lens: &[usize]) -> Result<Vec<Self>> {
        let buffers = if gpu_available() { Self::mapped(lens) } else { Self::allocated(lens) };
        buffers.ok_or_else(|| Error::new(Status::OutOfMemory, format!("cannot allocate {lens:?} bytes for tensors")))
    }

    /// Of a mapping, each with whole pages of its own, so that a GPU that shares memory can use them without a copy.
    fn mapped(lens: &[usize]) -> Option<Vec<Self>> {
        let sizes = rounded(lens, PAGE)?;
        let all = sum(&sizes)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, of nothing that exists already.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), all, access, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let mut pointer = NonNull::new(start.cast::<u8>())?;
        // SAFETY: fresh memory of this size.
        prefer_huge_pages(unsafe { std::slice::from_raw_parts(pointer.as_ptr().cast::<MaybeUninit<u8>>(), all) });
        let mut buffers = Vec::with_capacity(lens.len());
        for (&len, size) in lens.iter().zip(sizes) {
            buffers.push(Self { pointer, len, memory: Memory::Pages(size) });
            // SAFETY: the sizes add up to the mapping's.
            pointer = unsafe { pointer.add(size) };
        }
        Some(buffers)
    }

    /// Of memory of MLX's.
    fn allocated(lens: &[usize]) -> Option<Vec<Self>> {
        let sizes = rounded(lens, LINE)?;
        // The memory itself may begin anywhere.
        let memory = Arc::new(Allocation::new(sum(&sizes)?.checked_add(LINE)?)?);
        // SAFETY: inside the memory, by the line that was added.
        let mut pointer = unsafe { memory.bytes.add(memory.bytes.align_offset(LINE)) };
        let mut buffers = Vec::with_capacity(lens.len());
        for (&len, size) in lens.iter().zip(sizes) {
            buffers.push(Self { pointer, len, memory: Memory::Part(Arc::clone(&memory)) });
            // SAFETY: the sizes and the line add up to the memory's.
            pointer = unsafe { pointer.add(size) };
        }
        Some(buffers)
    }

    /// The bytes: anything, at first.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes that came from the system or from code that the compiler does not see, so that they have some
        // value; uniquely borrowed through `self`.
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
        let pointer = self.pointer;
        let part = match &self.memory {
            Memory::Pages(_) => None,
            // SAFETY: both are of the same memory.
            Memory::Part(memory) => Some((memory.handle, unsafe { pointer.offset_from_unsigned(memory.bytes) })),
        };
        let owner = Box::into_raw(Box::new(self)).cast();
        // SAFETY: the bytes stay valid until `drop_host_buffer` runs, once, when MLX lets go of the data.
        unsafe {
            let (ndim, dtype) = (shape.len(), dtype.into());
            let raw = match part {
                Some((memory, offset)) => {
                    let drop = drop_host_buffer;
                    let ctx = omlx_memory_array(memory, offset, shape.as_ptr(), ndim, dtype, owner, drop);
                    mlx_sys::mlx_array { ctx }
                }
                None => {
                    let (data, drop) = (pointer.as_ptr().cast(), Some(drop_host_buffer as _));
                    mlx_sys::mlx_array_new_data_managed_payload(data, shape.as_ptr(), ndim as i32, dtype, owner, drop)
                }
            };
            if raw.ctx.is_null() {
                return Err(checked(1).err().unwrap_or_else(|| Error::backend("MLX refused a host buffer")));
            }
            Ok(Array::from_ptr(raw))
        }
    }

    /// Gives the system the whole pages of a part that nobody uses any more, while other parts stay.
    fn give_pages_back(&self, memory: &Allocation) {
        #[cfg(target_os = "linux")]
        {
            let skipped = self.pointer.align_offset(PAGE);
            let len = self.len.saturating_sub(skipped) / PAGE * PAGE;
            if len == 0 {
                return;
            }
            // SAFETY: whole pages of this part, whose content nobody reads again.
            unsafe {
                let start = self.pointer.as_ptr().wrapping_add(skipped).cast();
                libc::madvise(start, len, libc::MADV_DONTNEED);
                if memory.size >= WORTH_HUGE_PAGES {
                    // Or the system would sooner or later fill the hole with a huge page.
                    libc::madvise(start, len, libc::MADV_NOHUGEPAGE);
                }
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = memory;
    }
}

/// Each of `lens` as a multiple of `unit`, at least one.
fn rounded(lens: &[usize], unit: usize) -> Option<Vec<usize>> {
    lens.iter().map(|len| len.max(&1).checked_next_multiple_of(unit)).collect()
}

fn sum(sizes: &[usize]) -> Option<usize> {
    sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size))
}

extern "C" fn drop_host_buffer(owner: *mut c_void) {
    // SAFETY: the pointer came from `Box::into_raw` in `into_array` and is passed here exactly once.
    drop(unsafe { Box::from_raw(owner.cast::<HostBuffer>()) });
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        match &self.memory {
            // SAFETY: whole pages that were mapped in `mapped`, and nobody refers to them any more.
            Memory::Pages(size) => unsafe {
                libc::munmap(self.pointer.as_ptr().cast(), *size);
            },
            Memory::Part(memory) if Arc::strong_count(memory) > 1 => self.give_pages_back(memory),
            Memory::Part(_) => {}
        }
    }
}

// SAFETY: plain bytes with one owner, and a handle that any thread may use.
unsafe impl Send for HostBuffer {}

// SAFETY: nothing in it changes, any thread may give the memory back, and each part of the bytes has one owner.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    fn new(size: usize) -> Option<Self> {
        let mut bytes = std::ptr::null_mut();
        // SAFETY: the address is written to a variable that outlives the call.
        let handle = unsafe { omlx_memory_new(size, &mut bytes) };
        let memory = Self { handle, bytes: NonNull::new(bytes).filter(|_| !handle.is_null())?, size };
        // SAFETY: fresh memory of this size.
        prefer_huge_pages(unsafe { std::slice::from_raw_parts(memory.bytes.as_ptr().cast::<MaybeUninit<u8>>(), size) });
        Some(memory)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and its last part is gone.
        unsafe { omlx_memory_free(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Make = fn(&[usize]) -> Option<Vec<HostBuffer>>;

    const BOTH: [Make; 2] = [HostBuffer::mapped, HostBuffer::allocated];

    fn filled(mut buffer: HostBuffer, seed: usize) -> HostBuffer {
        buffer.as_mut_slice().iter_mut().enumerate().for_each(|(at, byte)| *byte = (at * 31 + at / 251 + seed) as u8);
        buffer
    }

    fn is_filled(array: &Array, seed: usize) -> bool {
        array.as_slice::<u8>().iter().enumerate().all(|(at, &byte)| byte == (at * 31 + at / 251 + seed) as u8)
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pages_are_there_before_they_are_used() {
        const LEN: usize = 8 << 20;
        let mut buffer = HostBuffer::mapped(&[LEN]).unwrap().pop().unwrap();
        let fresh = buffer.as_mut_slice();
        assert_eq!(resident(fresh.as_ptr(), LEN), 0);
        populate(fresh);
        assert_eq!(resident(fresh.as_ptr(), LEN), LEN);
        assert!(fresh.iter().all(|&byte| byte == 0));
        fresh.fill(7);
        populate(fresh);
        assert!(fresh.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn arrays_have_what_was_written_whatever_becomes_of_the_others() {
        crate::mlx::init().unwrap();
        let lens = [5, 3 << 20, 1, 70_000, 9 << 20];
        for make in BOTH {
            let buffers = make(&lens).unwrap().into_iter().enumerate().map(|(at, buffer)| filled(buffer, at));
            let arrays = buffers.zip(lens).map(|(buffer, len)| buffer.into_array(&[1, len as i32], Dtype::Uint8));
            let mut arrays: Vec<_> = arrays.map(|array| array.map(Some).unwrap()).collect();
            for gone in [1, 4, 0] {
                arrays[gone] = None;
                let right = |(at, array): (usize, &Option<Array>)| array.as_ref().is_none_or(|a| is_filled(a, at));
                assert!(arrays.iter().enumerate().all(right), "without {gone}");
            }
            // Views and results, too.
            let kept = arrays[3].take().unwrap();
            let part = crate::mlx::rows(&kept.reshape(&[70_000]).unwrap(), 251, 70_000).unwrap();
            drop((kept, arrays));
            let sum = part.as_dtype(Dtype::Float32).unwrap().subtract(Array::from_f32(1.0)).unwrap();
            assert_eq!(sum.as_slice::<f32>()[1], f32::from((252u32 * 31 + 1 + 3) as u8) - 1.0);
        }
    }

    #[test]
    fn empty_tensors_and_other_types() {
        crate::mlx::init().unwrap();
        for make in BOTH {
            let mut buffers = make(&[0, 8]).unwrap();
            buffers[1].as_mut_slice().copy_from_slice(&[0, 0, 128, 63, 0, 0, 0, 192]);
            let floats = buffers.pop().unwrap().into_array(&[2], Dtype::Float32).unwrap();
            let nothing = buffers.pop().unwrap().into_array(&[4, 0], Dtype::Uint32).unwrap();
            assert_eq!((floats.as_slice::<f32>(), nothing.shape()), (&[1.0, -2.0][..], &[4, 0][..]));
            let wrong = make(&[8]).unwrap().pop().unwrap().into_array(&[3], Dtype::Float32);
            assert_eq!(wrong.unwrap_err().status(), Status::Internal);
        }
    }

    #[test]
    fn what_the_system_refuses_counts_for_nothing() {
        crate::mlx::init().unwrap();
        for make in BOTH {
            assert!(make(&[usize::MAX, 1]).is_none() && make(&[1 << 60]).is_none());
            assert!(crate::mlx::used_memory() < 1 << 59);
        }
    }

    /// Where MLX has no GPU: what is read is what MLX computes with.
    #[test]
    fn memory_of_mlxs_is_not_copied() {
        crate::mlx::init().unwrap();
        let copied = |make: Make| {
            let buffer = make(&[1, 1 << 20]).unwrap().pop().unwrap();
            let before = buffer.pointer.as_ptr().cast_const();
            buffer.into_array(&[1 << 18], Dtype::Uint32).unwrap().as_slice::<u32>().as_ptr().cast() != before
        };
        assert!(!copied(HostBuffer::allocated));
        // Or the comparison would say nothing.
        assert!(gpu_available() || copied(HostBuffer::mapped));
    }

    #[test]
    fn memory_is_freed_with_its_last_part() {
        crate::mlx::init().unwrap();
        let mut buffers = HostBuffer::allocated(&[100, 200]).unwrap();
        let Memory::Part(memory) = &buffers[0].memory else { panic!("no memory of MLX's") };
        let memory = Arc::downgrade(memory);
        let array = buffers.pop().unwrap().into_array(&[100], Dtype::Float16).unwrap();
        let view = array.reshape(&[10, 10]).unwrap();
        view.eval().unwrap();
        drop((array, buffers));
        assert_eq!(memory.strong_count(), 1, "the view still needs it");
        drop(view);
        assert_eq!(memory.strong_count(), 0);
    }

    /// Bytes of a buffer that lie in memory.
    #[cfg(target_os = "linux")]
    fn resident(start: *const u8, len: usize) -> usize {
        // SAFETY: a number in, a number out.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let from = start.wrapping_sub(start as usize % page);
        let mut pages = vec![0u8; (start as usize % page + len).div_ceil(page)];
        // SAFETY: `pages` has a byte for each page of the range.
        let code = unsafe { libc::mincore(from.cast_mut().cast(), pages.len() * page, pages.as_mut_ptr()) };
        assert_eq!(code, 0, "the range is not mapped");
        pages.iter().filter(|&&there| there & 1 == 1).count() * page
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_part_gives_its_pages_back_while_others_stay() {
        crate::mlx::init().unwrap();
        const LEN: usize = 6 << 20;
        let buffers = HostBuffer::allocated(&[LEN, LEN, LEN]).unwrap().into_iter();
        let buffers = buffers.enumerate().map(|(at, buffer)| filled(buffer, at));
        let places: Vec<_> = buffers.map(|buffer| (buffer.pointer.as_ptr().cast_const(), buffer)).collect();
        let starts: Vec<_> = places.iter().map(|place| place.0).collect();
        let array = |(_, buffer): (_, HostBuffer)| buffer.into_array(&[LEN as i32], Dtype::Uint8).unwrap();
        let mut arrays: Vec<_> = places.into_iter().map(array).collect();
        assert!(starts.iter().all(|&start| resident(start, LEN) >= LEN));
        drop(arrays.remove(1));
        assert!(resident(starts[1], LEN) <= 4 * PAGE, "{}", resident(starts[1], LEN));
        assert!(is_filled(&arrays[0], 0) && is_filled(&arrays[1], 2));
    }
}
