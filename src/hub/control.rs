//! What the threads of a download share: how far it is, and whether it shall stop.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, Status};
use crate::panics;
use crate::sync::lock;

/// What a download is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Asking the hub which files there are.
    Listing,
    /// Fetching and checking files.
    Fetching,
    /// Writing through and moving into place.
    Installing,
    /// The model is there.
    Done,
    /// It ended with an error.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl State {
    /// Whether nothing more will happen.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// How far a download is. Rates are the host's to compute, from the growth of `bytes_done`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub state: State,
    /// Bytes that are there, those of `bytes_kept` included. Falls when a file has to be fetched anew.
    pub bytes_done: u64,
    /// Bytes of all files; 0 until they are listed.
    pub bytes_total: u64,
    /// Bytes that an earlier attempt or version had left.
    pub bytes_kept: u64,
    /// Files that are complete and checked.
    pub files_done: u64,
    /// All files; 0 until they are listed.
    pub files_total: u64,
    /// Requests that were repeated after a failure.
    pub retries: u64,
}

/// Receives the progress of a download; `false` cancels it.
pub type OnProgress = Box<dyn FnMut(Progress) -> bool + Send>;

/// Shortest time between two calls for bytes alone.
const PAUSE: Duration = Duration::from_millis(100);

/// Counters and the wish to stop, of one download.
pub struct Control {
    stop: Mutex<Stop>,
    stopped: Condvar,
    state: Mutex<State>,
    watch: Mutex<Option<Arc<Mutex<Watch>>>>,
    pub bytes_done: AtomicU64,
    pub bytes_total: AtomicU64,
    pub bytes_kept: AtomicU64,
    pub files_done: AtomicU64,
    pub files_total: AtomicU64,
    pub retries: AtomicU64,
}

struct Watch {
    function: OnProgress,
    told: Instant,
    over: bool,
}

#[derive(Default)]
struct Stop {
    reason: Option<Error>,
    /// Ends connections that are being read.
    hooks: Vec<Box<dyn FnOnce() + Send>>,
}

impl Control {
    pub fn new() -> Self {
        let zero = AtomicU64::default;
        Self {
            stop: Mutex::default(),
            stopped: Condvar::new(),
            state: Mutex::new(State::Listing),
            watch: Mutex::default(),
            bytes_done: zero(),
            bytes_total: zero(),
            bytes_kept: zero(),
            files_done: zero(),
            files_total: zero(),
            retries: zero(),
        }
    }

    /// Ends the download; the first reason stays.
    pub fn stop(&self, reason: Error) {
        let mut stop = lock(&self.stop);
        stop.reason.get_or_insert(reason);
        let hooks = std::mem::take(&mut stop.hooks);
        self.stopped.notify_all();
        drop(stop);
        for hook in hooks {
            hook();
        }
    }

    /// Ends the download for the host.
    pub fn cancel(&self) {
        self.stop(Error::new(Status::Cancelled, "the download was cancelled"));
    }

    /// Has `hook` called when the download stops; at once if it has.
    pub fn on_stop(&self, hook: impl FnOnce() + Send + 'static) {
        let mut stop = lock(&self.stop);
        if stop.reason.is_none() {
            return stop.hooks.push(Box::new(hook));
        }
        drop(stop);
        hook();
    }

    /// The reason to stop, if there is one.
    pub fn check(&self) -> Result<()> {
        lock(&self.stop).reason.clone().map_or(Ok(()), Err)
    }

    /// Waits, or ends early with the reason to stop.
    pub fn sleep(&self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        let mut stop = lock(&self.stop);
        loop {
            if let Some(reason) = &stop.reason {
                return Err(reason.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            stop = self.stopped.wait_timeout(stop, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// Runs `body`, which may hang (a name server, a host that does not answer), on a thread of its own, and does not
    /// wait for it longer than the download lasts. `body` must change nothing outside itself.
    pub fn apart<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name("omlx-connect".into())
            .spawn(move || drop(sender.send(panics::catch(body))))
            .map_err(|e| Error::io("starting a thread", &e))?;
        loop {
            self.check()?;
            match receiver.recv_timeout(Duration::from_millis(50)) {
                Ok(outcome) => return outcome,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Error::internal("a connecting thread is gone"));
                }
            }
        }
    }

    /// Sets the state, of which [`tell`](Self::tell) tells.
    pub fn enter(&self, state: State) {
        *lock(&self.state) = state;
    }

    /// Counts bytes that have arrived.
    pub fn received(&self, bytes: u64) {
        add(&self.bytes_done, bytes);
        self.tell_after(PAUSE);
    }

    /// Has `function` called at once, on this thread, with every new state, and while bytes come. One call at a time, the
    /// last one when the download is over; then, or when another takes its place, it is dropped.
    pub fn watch(&self, function: Option<OnProgress>) {
        let new = |function| Arc::new(Mutex::new(Watch { function, told: Instant::now(), over: false }));
        let new = function.map(new);
        // Locked before another thread finds it: what waits for a call may hold what the host's function needs.
        let inner = new.as_ref().map(|watch| lock(watch));
        let old = std::mem::replace(&mut *lock(&self.watch), new.clone());
        if let Some((watch, inner)) = new.as_ref().zip(inner) {
            self.call(watch, inner);
        }
        // With all locks released: the host may call us when it is dropped.
        drop(old);
    }

    /// Calls the function, if there is one.
    pub fn tell(&self) {
        self.tell_after(Duration::ZERO);
    }

    /// Calls the function unless that happened less than `pause` ago.
    fn tell_after(&self, pause: Duration) {
        let Some(watch) = lock(&self.watch).clone() else { return };
        let inner = lock(&watch);
        if !inner.over && inner.told.elapsed() >= pause {
            self.call(&watch, inner);
        }
    }

    /// Calls the function of `watch`. Its lock keeps other calls of it away; no function that hosts call waits for that.
    fn call(&self, watch: &Arc<Mutex<Watch>>, mut inner: MutexGuard<'_, Watch>) {
        // Read with the lock held: nobody hears of what came earlier after what came later.
        let progress = self.progress();
        (inner.told, inner.over) = (Instant::now(), progress.state.is_over());
        // A panic must not keep those waiting who wait for the end.
        let go_on = panics::catch(|| (inner.function)(progress)).unwrap_or(false);
        drop(inner);
        if progress.state.is_over() {
            let last = lock(&self.watch).take_if(|current| Arc::ptr_eq(current, watch));
            drop(last);
        } else if !go_on {
            self.cancel();
        }
    }

    /// How far the download is.
    pub fn progress(&self) -> Progress {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Progress {
            state: *lock(&self.state),
            // Two connections may have fetched the same block, where a server changed its mind about ranges.
            bytes_done: get(&self.bytes_done).min(get(&self.bytes_total)),
            bytes_total: get(&self.bytes_total),
            bytes_kept: get(&self.bytes_kept),
            files_done: get(&self.files_done),
            files_total: get(&self.files_total),
            retries: get(&self.retries),
        }
    }
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Takes from a counter what was added to it before.
pub fn take(counter: &AtomicU64, n: u64) {
    let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(old.saturating_sub(n)));
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// When it is dropped, another thread has something to tell.
    struct TellsElsewhere(Arc<Control>);

    impl Drop for TellsElsewhere {
        fn drop(&mut self) {
            let control = Arc::clone(&self.0);
            thread::spawn(move || control.tell()).join().expect("it tells");
        }
    }

    /// Else who sets it would wait for a call on another thread, which may need a lock that the first one holds.
    #[test]
    fn the_first_call_is_made_by_who_sets_the_function() {
        let control = Arc::new(Control::new());
        let before = TellsElsewhere(Arc::clone(&control));
        control.watch(Some(Box::new(move |_| Arc::strong_count(&before.0) > 0)));
        let (sender, told) = mpsc::channel();
        control.watch(Some(Box::new(move |_| sender.send(thread::current().id()).is_ok())));
        let (here, first, second) = (thread::current().id(), told.try_recv(), told.try_recv());
        assert_eq!(first, Ok(here));
        assert!(second.is_ok_and(|second| second != here));
    }
}
