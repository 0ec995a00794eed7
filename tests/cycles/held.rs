//! What this process holds.

use std::fs;

/// Memory of this process in bytes, and its threads.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    pub bytes: i64,
    pub threads: usize,
}

pub fn held() -> Held {
    // What was freed but kept by the allocator is no leak.
    // SAFETY: no precondition.
    unsafe { libc::malloc_trim(0) };
    let pages = fs::read_to_string("/proc/self/statm").expect("/proc is mounted");
    let pages: i64 = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("the resident pages");
    // SAFETY: no precondition.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Held { bytes: pages * page, threads: fs::read_dir("/proc/self/task").expect("/proc").count() }
}
