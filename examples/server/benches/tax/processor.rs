//! Time on a processor, as Linux counts it for each thread.

use std::fs::{read_dir, read_to_string};

/// What a process has used, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    /// By the threads of its connections.
    pub http: f64,
    /// By all threads.
    pub all: f64,
}

/// Of the process `id`. Zero where the system does not tell.
pub fn used(id: u32) -> Used {
    let mut used = Used::default();
    let tasks = read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    for task in tasks {
        let read = |file: &str| read_to_string(task.path().join(file)).unwrap_or_default();
        let nanoseconds: u64 = read("schedstat").split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let seconds = nanoseconds as f64 * 1e-9;
        used.all += seconds;
        // The main thread, and those on which it has long bodies read.
        if task.file_name().to_str() == Some(&id.to_string()) || read("comm").trim() == "omlx-http" {
            used.http += seconds;
        }
    }
    used
}

/// Seconds of this thread.
pub fn used_by_this_thread() -> f64 {
    let nanoseconds = read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    nanoseconds.split(' ').next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) as f64 * 1e-9
}

impl std::ops::Sub for Used {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { http: self.http - before.http, all: self.all - before.all }
    }
}
