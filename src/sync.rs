//! Locking without poisoning: a panic under one of our locks is reported where it happens, and what the locks guard
//! (queues, small state) is valid between any two statements.

use std::sync::{Mutex, MutexGuard};

/// Locks `mutex` whether or not another thread panicked while holding it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
