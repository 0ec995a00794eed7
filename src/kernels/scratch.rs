//! Memory for what kernels compute on the way: kept by the thread for its next kernel, because the system clears every page that
//! it gives out anew.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Larger buffers are not kept: threads of MLX's never end, and neither would what they keep.
const KEPT_BYTES: usize = 4 << 20;

/// Buffers that a thread keeps: as many as a kernel uses at once (queries, keys and values of attention).
const KEPT: usize = 3;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers of any content.
#[derive(Debug)]
pub struct Scratch {
    numbers: Vec<f32>,
    len: usize,
}

impl Scratch {
    /// `len` numbers: the largest buffer that the thread keeps, made larger if need be.
    pub fn new(len: usize) -> Self {
        let mut numbers = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
        if numbers.len() < len {
            // What it holds need not be copied.
            numbers.clear();
            numbers.resize(len, 0.0);
        }
        Self { numbers, len }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        if numbers.capacity() * size_of::<f32>() > KEPT_BYTES {
            return;
        }
        // A thread that ends keeps nothing more.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(numbers);
                free.sort_by_key(Vec::len);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_by_one_at_a_time() {
        let (mut first, second) = (Scratch::new(1000), Scratch::new(10));
        assert_eq!((first.len(), second.len()), (1000, 10));
        assert_ne!(first.as_ptr(), second.as_ptr());
        first.fill(1.0);
        let place = first.as_ptr();
        drop((second, first));
        let again = Scratch::new(500);
        assert_eq!((again.as_ptr(), again.len()), (place, 500), "the larger one first");
        let larger = Scratch::new(2000);
        assert!(larger.len() == 2000 && larger.as_ptr() != place);
    }

    #[test]
    fn large_buffers_are_given_back() {
        drop(Scratch::new(KEPT_BYTES / size_of::<f32>() + 1));
        assert!(
            FREE.with_borrow(|free| free.iter().all(|numbers| numbers.capacity() * size_of::<f32>() <= KEPT_BYTES))
        );
        for _ in 0..3 {
            let all: Vec<_> = (0..2 * KEPT).map(|_| Scratch::new(1)).collect();
            drop(all);
            assert_eq!(FREE.with_borrow(Vec::len), KEPT);
        }
    }
}
