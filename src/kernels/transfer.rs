//! Bytes between pools and the host's memory.

use std::sync::Mutex;

use mlx_rs::Array;

use super::ops::Cpu;
use crate::error::{Error, Result};
use crate::sync::lock;

/// Bytes of an array, from an offset on, as many as the slice has.
pub type Part<'a, S> = (&'a Array, usize, S);

/// The memory of an evaluated array whose elements lie in a row; and how many bytes it has.
///
/// The memory is MLX's: it stays while the array does, and nobody may write to what is read from it.
fn memory(array: &Array) -> Result<(*mut u8, usize)> {
    array.eval()?;
    // SAFETY: an evaluated array.
    let start = unsafe { mlx_sys::mlx_array_data_uint8(array.as_ptr()) };
    if start.is_null() && array.nbytes() > 0 {
        return Err(Error::backend("an array without memory"));
    }
    Ok((start.cast_mut(), array.nbytes()))
}

/// Where `len` bytes of an array begin.
fn part(array: &Array, offset: usize, len: usize) -> Result<*mut u8> {
    let (start, all) = memory(array)?;
    match offset.checked_add(len) {
        Some(end) if end <= all => Ok(start.wrapping_add(offset)),
        _ => Err(Error::internal(format!("{len} bytes from {offset} on of an array of {all}"))),
    }
}

/// Copies all bytes of `array`, which is contiguous, to `to`; waits for it.
pub fn read_array(array: &Array, to: &mut [u8]) -> Result<()> {
    let from = part(array, 0, to.len())?;
    // SAFETY: as many bytes as `to` has, which is another allocation, were found to be there.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    Ok(())
}

/// A place in an array that one thread at a time uses.
struct Place(*mut u8);

// SAFETY: whoever makes one sees to it that the memory stays and that nobody else writes to it.
unsafe impl Send for Place {}

impl Cpu {
    /// Copies parts of evaluated pools to slices, on all threads. No step that writes to these parts may be on its way.
    pub fn read_parts(&self, parts: Vec<Part<'_, &mut [u8]>>) -> Result<()> {
        let places = parts.into_iter().map(|(array, offset, to)| {
            let from = part(array, offset, to.len())?;
            Ok(Mutex::new((Place(from), to)))
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        self.each(&places, |(from, to)| {
            // SAFETY: `part` found the bytes to be there, the array is borrowed, and `to` is another allocation.
            unsafe { std::ptr::copy_nonoverlapping(from.0, to.as_mut_ptr(), to.len()) };
        });
        Ok(())
    }

    /// Copies slices to parts of evaluated pools, in place and behind MLX's back, on all threads. The parts do not overlap,
    /// and no step that uses them may be on its way.
    pub fn write_parts(&self, parts: Vec<Part<'_, &[u8]>>) -> Result<()> {
        let places = parts.into_iter().map(|(array, offset, from)| {
            let to = part(array, offset, from.len())?;
            Ok(Mutex::new((Place(to), from)))
        });
        let places = places.collect::<Result<Vec<_>>>()?;
        self.each(&places, |(to, from)| {
            // SAFETY: `part` found the bytes to be there, the array is borrowed, and nothing else uses them by contract.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.0, from.len()) };
        });
        Ok(())
    }

    fn each<T: Send>(&self, items: &[Mutex<T>], body: impl Fn(&mut T) + Sync) {
        self.workers().run(items.len(), &|at| body(&mut lock(&items[at])));
    }
}
