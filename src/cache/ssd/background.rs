//! Threads that keep the disk away from those who compute: one that writes, a few that read.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::model::{ColdModel, ColdPiece, Stored};
use crate::cache::rows::RowBuffer;
use crate::cache::spans::Span;
use crate::error::{Error, Result};
use crate::sync::lock;

/// Bytes of rows that wait to be written at most, if nothing else is asked for.
pub const DEFAULT_WRITE_BYTES: usize = 256 << 20;

/// Writes spans on a thread of its own. Dropping it writes what is queued.
#[derive(Debug)]
pub struct ColdWriter {
    queue: Arc<Queue<Write>>,
    limit: usize,
    losses: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Write {
    model: ColdModel,
    group: usize,
    span: Span,
    rows: RowBuffer,
    cost: f64,
}

/// Jobs in order, and how much of them is not done.
#[derive(Debug)]
struct Queue<T> {
    state: Mutex<State<T>>,
    /// A job came, or there will be none any more.
    more: Condvar,
    /// A job is done.
    done: Condvar,
}

#[derive(Debug)]
struct State<T> {
    jobs: VecDeque<T>,
    /// Of jobs that wait or are under way.
    bytes: usize,
    count: usize,
    closed: bool,
}

impl<T> Queue<T> {
    fn new() -> Arc<Self> {
        let state = State { jobs: VecDeque::new(), bytes: 0, count: 0, closed: false };
        Arc::new(Self { state: Mutex::new(state), more: Condvar::new(), done: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        lock(&self.state)
    }

    fn push(&self, mut state: MutexGuard<'_, State<T>>, job: T, bytes: usize) {
        state.jobs.push_back(job);
        state.bytes += bytes;
        state.count += 1;
        self.more.notify_one();
    }

    /// The next job; `None` when the queue is closed and empty.
    fn next(&self) -> Option<T> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.more.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Whether nothing waits behind the job that is under way.
    fn is_last(&self) -> bool {
        self.state().jobs.is_empty()
    }

    fn finish(&self, bytes: usize) {
        let mut state = self.state();
        state.bytes -= bytes;
        state.count -= 1;
        drop(state);
        self.done.notify_all();
    }

    fn close(&self) {
        self.state().closed = true;
        self.more.notify_all();
    }
}

impl ColdWriter {
    /// Starts the thread; at most `limit` bytes of rows wait for it.
    pub fn new(limit: usize) -> Result<Self> {
        let queue = Queue::new();
        let (work, losses) = (Arc::clone(&queue), Arc::new(AtomicU64::new(0)));
        let lost = Arc::clone(&losses);
        let thread = spawn("omlx-cold", move || {
            while let Some(Write { model, group, span, rows, cost }) = work.next() {
                let (bytes, mut kept) = (rows.bytes(), false);
                guarded(|| {
                    // The tier has logged a failure, and a cache may lose.
                    kept = matches!(model.store(group, &span, rows, cost), Ok(Stored::Written(_) | Stored::Present));
                    if work.is_last() {
                        model.tier().commit_or_warn();
                    }
                });
                lost.fetch_add(u64::from(!kept), Ordering::Relaxed);
                work.finish(bytes);
            }
        })?;
        Ok(Self { queue, limit, losses, thread: Some(thread) })
    }

    /// Queues a span, see [`ColdModel::store`]. Gives it back if too much waits already; never blocks.
    #[allow(clippy::result_large_err, reason = "the rows go back to where they came from")]
    pub fn submit(
        &self,
        model: ColdModel,
        group: usize,
        span: Span,
        rows: RowBuffer,
        cost: f64,
    ) -> Result<(), (Span, RowBuffer)> {
        let state = self.queue.state();
        let bytes = rows.bytes();
        // Anything is accepted by an idle writer: otherwise large spans would never be written.
        if state.count > 0 && state.bytes.saturating_add(bytes) > self.limit {
            return Err((span, rows));
        }
        self.queue.push(state, Write { model, group, span, rows, cost }, bytes);
        Ok(())
    }

    /// Waits until all that was submitted is written, or `timeout` has passed. Returns whether all is.
    pub fn flush(&self, timeout: Duration) -> bool {
        let until = Instant::now().checked_add(timeout);
        let mut state = self.queue.state();
        while state.count > 0 {
            let left = until.map_or(Duration::from_secs(3600), |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            let waited = self.queue.done.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        true
    }

    /// Spans that could not be written so far, for want of room or because of the disk.
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// Bytes of rows that wait or are being written.
    pub fn pending_bytes(&self) -> usize {
        self.queue.state().bytes
    }
}

impl Drop for ColdWriter {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Receives what was read.
pub type ReadDone = Box<dyn FnOnce(Option<RowBuffer>) + Send>;

/// Reads spans on a few threads. Dropping it reads what is queued.
#[derive(Debug)]
pub struct ColdReader {
    queue: Arc<Queue<Read>>,
    threads: Vec<JoinHandle<()>>,
}

struct Read {
    model: ColdModel,
    group: usize,
    piece: ColdPiece,
    tokens: Arc<[u32]>,
    done: ReadDone,
}

impl std::fmt::Debug for Read {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Read").field("group", &self.group).field("piece", &self.piece).finish_non_exhaustive()
    }
}

impl ColdReader {
    /// Starts `threads` threads: enough to keep the disk busy while others check what was read.
    pub fn new(threads: usize) -> Result<Self> {
        let mut reader = Self { queue: Queue::new(), threads: Vec::new() };
        for _ in 0..threads.max(1) {
            let work = Arc::clone(&reader.queue);
            reader.threads.push(spawn("omlx-read", move || {
                while let Some(Read { model, group, piece, tokens, done }) = work.next() {
                    guarded(|| done(model.read(group, &piece, &tokens)));
                    work.finish(0);
                }
            })?);
        }
        Ok(reader)
    }

    /// Reads a piece, see [`ColdModel::read`], and hands the outcome to `done` on a thread of the reader.
    pub fn read(&self, model: ColdModel, group: usize, piece: ColdPiece, tokens: Arc<[u32]>, done: ReadDone) {
        self.queue.push(self.queue.state(), Read { model, group, piece, tokens, done }, 0);
    }
}

impl Drop for ColdReader {
    fn drop(&mut self) {
        self.queue.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    thread.map_err(|error| Error::io(format_args!("starting thread '{name}'"), &error))
}

/// Keeps a thread alive: a panic was reported where it happened.
fn guarded(work: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(work));
}
