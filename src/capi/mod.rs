//! The C ABI: one file per C noun; every function that can fail is a panic boundary, checked casts, the work, and a
//! status.
//!
//! `include/omlx.h` is generated from these files. Rules that hold for every function, stated there once:
//! pointers are NULL or valid, outputs are written only on success, nothing unwinds into the host.

#![allow(non_camel_case_types)]
#![allow(clippy::missing_safety_doc, reason = "one contract for all functions, at the top of the header")]

mod abi;
mod bundled;
mod cache;
mod callback;
mod download;
mod encode;
mod error;
mod event;
mod library;
mod log;
mod model;
mod pool;
mod request;
mod text;

pub use abi::*;
pub use cache::*;
pub use callback::{omlx_destroy_fn, omlx_event_fn, omlx_progress_fn, omlx_wake_fn};
pub use download::*;
pub use encode::*;
pub use error::*;
pub use event::*;
pub use library::*;
pub use log::*;
pub use model::*;
pub use pool::*;
pub use request::*;
pub use text::*;

use std::ffi::{CStr, c_char};
use std::sync::Arc;

use crate::error::{Error, Result, Status};
use crate::panics;

/// Runs `body`, turns errors and panics into a status, and writes the details to `error_out` if the host wants them.
fn boundary(error_out: *mut *mut omlx_error, body: impl FnOnce() -> Result<()>) -> Status {
    let outcome = panics::catch(body).and_then(|outcome| outcome);
    match outcome {
        Ok(()) => Status::Ok,
        Err(error) => {
            let status = error.status();
            if !error_out.is_null() {
                // SAFETY: not NULL, so it points to a pointer the host lets us write.
                unsafe { error_out.write(Box::into_raw(Box::new(omlx_error::new(error)))) };
            }
            status
        }
    }
}

/// The object behind a handle or struct pointer.
///
/// # Safety
/// `pointer` is NULL or valid for `'a`.
unsafe fn borrow<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    // SAFETY: passed on to the caller.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(name))
}

/// A pointer that an output will be written to.
fn output<T>(pointer: *mut T, name: &str) -> Result<*mut T> {
    if pointer.is_null() { Err(null(name)) } else { Ok(pointer) }
}

fn null(name: &str) -> Error {
    Error::invalid_argument(format!("{name} is NULL"))
}

/// `len` values of the host; NULL is an error.
///
/// # Safety
/// `data` is NULL or valid for `len` values and `'a`.
unsafe fn array<'a, T>(data: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    if data.is_null() {
        return Err(null(name));
    }
    if len > isize::MAX as usize / size_of::<T>() || !data.is_aligned() {
        return Err(Error::invalid_argument(format!("{name}: {len} values cannot be there")));
    }
    // SAFETY: not NULL, aligned and of a possible length; validity is the caller's.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// `len` bytes of the host.
///
/// # Safety
/// As for [`array`].
unsafe fn bytes<'a>(data: *const u8, len: usize, name: &str) -> Result<&'a [u8]> {
    // SAFETY: passed on to the caller.
    unsafe { array(data, len, name) }
}

/// `len` bytes of UTF-8.
///
/// # Safety
/// As for [`bytes`].
unsafe fn text<'a>(data: *const c_char, len: usize, name: &str) -> Result<&'a str> {
    // SAFETY: passed on to the caller.
    let bytes = unsafe { bytes(data.cast(), len, name) }?;
    std::str::from_utf8(bytes).map_err(|_| Error::invalid_argument(format!("{name} is not valid UTF-8")))
}

/// A NUL-terminated string; `None` for NULL.
///
/// # Safety
/// `pointer` is NULL or a NUL-terminated string that lives for `'a`.
unsafe fn optional_string<'a>(pointer: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL; the rest is the caller's.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|_| Error::invalid_argument(format!("{name} is not valid UTF-8")))
}

/// A NUL-terminated string that must be there.
///
/// # Safety
/// As for [`optional_string`].
unsafe fn string<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: passed on to the caller.
    unsafe { optional_string(pointer, name) }?.ok_or_else(|| null(name))
}

/// A struct that begins with its size and may only grow: what the host does not know of stays at its default.
///
/// # Safety
/// Implementors are `repr(C)`, begin with a `u32` size, and are valid for any content that hosts may write,
/// all zero bytes included.
unsafe trait SizedOptions: Copy + Default {
    /// Size of the first version that was published; smaller ones are mistakes. It stays when the struct grows, so it is
    /// the place of what came next, or a number: never `size_of::<Self>()`.
    const MIN_SIZE: usize;
}

/// Larger sizes are not a struct's: the host did not set the field.
const MAX_STRUCT_SIZE: usize = 64 << 10;

/// Copies the host's options; NULL means defaults. Bytes beyond what this library knows must be zero.
///
/// # Safety
/// `pointer` is NULL or points to a struct whose first field says how many bytes are valid.
unsafe fn options<T: SizedOptions>(pointer: *const T, name: &str) -> Result<T> {
    // SAFETY: passed on to the caller.
    let (known, newer) = unsafe { split_options(pointer, name) }?;
    newer.map(|()| known)
}

/// The part of the host's options that this library knows, and an error if they set more than that: for callers that
/// owe the host something, such as a call of its destroy function, even when they refuse the options.
///
/// # Safety
/// As for [`options`].
unsafe fn split_options<T: SizedOptions>(pointer: *const T, name: &str) -> Result<(T, Result<()>)> {
    let mut own = T::default();
    if pointer.is_null() {
        return Ok((own, Ok(())));
    }
    // SAFETY: the struct begins with its size.
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    if !(T::MIN_SIZE..=MAX_STRUCT_SIZE).contains(&size) {
        return Err(Error::invalid_argument(format!("{name}.struct_size is {size}; use the _INIT macro")));
    }
    let known = size_of::<T>();
    // SAFETY: `size` bytes are valid, the copied part is not longer, and `T` takes any such content.
    let bytes = unsafe {
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut own).cast::<u8>(), size.min(known));
        std::slice::from_raw_parts(pointer.cast::<u8>(), size)
    };
    let newer = match bytes.iter().skip(known).all(|&byte| byte == 0) {
        true => Ok(()),
        false => Err(Error::invalid_argument(format!("{name} sets options that this library does not know"))),
    };
    Ok((own, newer))
}

/// Fills a struct of the host, whose first field says how much of it there is, and which keeps that.
///
/// # Safety
/// `out` points to a struct that begins with its size and is valid for it.
unsafe fn write_sized<T: SizedOptions>(out: *mut T, mut value: T, name: &str) -> Result<()> {
    // SAFETY: the struct begins with its size.
    let size = unsafe { out.cast::<u32>().read() };
    if !(T::MIN_SIZE..=MAX_STRUCT_SIZE).contains(&(size as usize)) {
        return Err(Error::invalid_argument(format!("{name}.struct_size is {size}; use the _INIT macro")));
    }
    let (own, bytes) = ((&raw mut value).cast::<u8>(), size_of::<T>().min(size as usize));
    // SAFETY: both begin with their size, and have at least so many bytes.
    unsafe {
        own.cast::<u32>().write(size);
        std::ptr::copy_nonoverlapping(own, out.cast::<u8>(), bytes);
    }
    Ok(())
}

/// What C hosts expect of an empty array: NULL instead of Rust's dangling pointer.
fn array_pointer<T>(array: &[T]) -> *const T {
    if array.is_empty() { std::ptr::null() } else { array.as_ptr() }
}

/// Adds one reference to a handle; NULL is ignored.
///
/// # Safety
/// `pointer` is NULL or came from `Arc::into_raw` and is still referenced.
unsafe fn retain<T>(pointer: *const T) {
    if !pointer.is_null() {
        // SAFETY: passed on to the caller.
        unsafe { Arc::increment_strong_count(pointer) };
    }
}

/// Drops one reference of a handle; NULL is ignored. A panic while dropping is caught.
///
/// # Safety
/// As for [`retain`]; the reference must not be used again.
unsafe fn release<T>(pointer: *const T) {
    if !pointer.is_null() {
        // SAFETY: passed on to the caller.
        let handle = unsafe { Arc::from_raw(pointer) };
        let _ = panics::catch(|| drop(handle));
    }
}

/// Frees a handle with one owner; NULL is ignored.
///
/// # Safety
/// `pointer` is NULL or came from `Box::into_raw` and was not freed.
unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: passed on to the caller.
        let owned = unsafe { Box::from_raw(pointer) };
        let _ = panics::catch(|| drop(owned));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A struct that has grown by `later`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Grown {
        struct_size: u32,
        first: u32,
        later: u32,
    }

    impl Default for Grown {
        fn default() -> Self {
            Self { struct_size: size_of::<Self>() as u32, first: 0, later: 7 }
        }
    }

    // SAFETY: repr(C), the size comes first, and every other field is an integer.
    unsafe impl SizedOptions for Grown {
        const MIN_SIZE: usize = std::mem::offset_of!(Self, later);
    }

    #[test]
    fn structs_of_older_and_newer_hosts_are_read_as_far_as_they_go() {
        let read = |words: &[u32]| {
            // SAFETY: the struct begins with its size, which `words` has, or which is refused.
            let known = unsafe { options(words.as_ptr().cast::<Grown>(), "options") };
            known.map(|known| (known.first, known.later)).map_err(|error| error.status())
        };
        assert_eq!(read(&[8, 3]), Ok((3, 7)), "an older host");
        assert_eq!(read(&[12, 3, 4]), Ok((3, 4)));
        assert_eq!(read(&[16, 3, 4, 0]), Ok((3, 4)), "a newer host that sets nothing new");
        for wrong in [&[16, 3, 4, 1][..], &[4], &[0], &[u32::MAX]] {
            assert_eq!(read(wrong), Err(Status::InvalidArgument), "{wrong:?}");
        }
    }

    #[test]
    fn structs_of_older_and_newer_hosts_are_written_as_far_as_they_go() {
        let write = |size: u32| {
            let mut words = [size, 9, 9, 9];
            let value = Grown { first: 3, later: 4, ..Grown::default() };
            // SAFETY: the struct begins with its size, which `words` has, or which is refused.
            let outcome = unsafe { write_sized(words.as_mut_ptr().cast::<Grown>(), value, "out") };
            (outcome.map_err(|error| error.status()), words)
        };
        assert_eq!(write(8), (Ok(()), [8, 3, 9, 9]), "an older host");
        assert_eq!(write(12), (Ok(()), [12, 3, 4, 9]));
        assert_eq!(write(16), (Ok(()), [16, 3, 4, 9]), "a newer host");
        assert_eq!(write(4), (Err(Status::InvalidArgument), [4, 9, 9, 9]));
    }
}
