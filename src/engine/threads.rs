//! The threads of engines: how they are stopped, waited for, and never left behind when the process exits.
//!
//! A host may call `exit` at any time. The C++ runtime then destroys MLX's static objects, under the feet of any thread
//! that still computes. So every engine is listed here while its threads live, and an exit hook ends them first.

use std::sync::{Arc, Mutex, Once};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Shared;
use crate::error::{Error, Status};
use crate::mlx;
use crate::panics;
use crate::sync::lock;

/// All engines whose threads may be alive.
static LIVE: Mutex<Vec<Arc<Threads>>> = Mutex::new(Vec::new());

/// An exit waits this long for the steps that are running: a crash is bad, a process that does not end is worse.
const EXIT_PATIENCE: Duration = Duration::from_secs(10);

/// Tells the threads of an engine to end.
pub(super) type Stop = Box<dyn Fn() + Send + Sync>;

/// The two threads of an engine.
pub(super) struct Threads {
    stop: Stop,
    shared: Arc<Shared>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("gone", &self.are_gone()).finish_non_exhaustive()
    }
}

impl Threads {
    /// Takes charge of running threads.
    pub fn new(stop: Stop, shared: Arc<Shared>, handles: Vec<JoinHandle<()>>) -> Arc<Self> {
        let threads = Arc::new(Self { stop, shared, handles: Mutex::new(handles) });
        let mut live = lock(&LIVE);
        live.retain(|other| !other.are_gone());
        live.push(Arc::clone(&threads));
        threads
    }

    /// Whether they have ended.
    pub fn are_gone(&self) -> bool {
        // Whoever holds the lock is waiting for them.
        self.handles.try_lock().is_ok_and(|handles| handles.iter().all(JoinHandle::is_finished))
    }

    /// Asks them to end their requests with `reason` and return; returns at once. The first reason counts.
    pub fn stop(&self, reason: Error) {
        let _ = self.shared.failure.set(reason);
        (self.stop)();
    }

    /// Waits until they are gone; they must have been told to stop.
    pub fn join(&self) {
        // Held while waiting: whoever else joins waits as well.
        for handle in lock(&self.handles).drain(..) {
            // A panic was caught and reported inside the thread.
            let _ = handle.join();
        }
        lock(&LIVE).retain(|other| !std::ptr::eq(Arc::as_ptr(other), self));
    }
}

/// Makes a process exit wait for all engines. Exit hooks run in reverse order, so this is to be called once MLX has made
/// its static objects: after a model has been loaded.
pub(super) fn end_before_exit() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| mlx::at_exit(end_all));
}

extern "C" fn end_all() {
    // A panic may not leave an exit hook.
    let _ = panics::catch(|| {
        let live = std::mem::take(&mut *lock(&LIVE));
        for threads in &live {
            threads.stop(Error::new(Status::Closed, "the process exits"));
        }
        let deadline = Instant::now() + EXIT_PATIENCE;
        while live.iter().any(|threads| !threads.are_gone()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let (gone, left): (Vec<_>, Vec<_>) = live.iter().partition(|threads| threads.are_gone());
        gone.into_iter().for_each(|threads| threads.join());
        if left.is_empty() {
            mlx::end_streams();
        }
    });
}
