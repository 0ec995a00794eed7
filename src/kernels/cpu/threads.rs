//! The threads that kernels compute on: one set for the whole process, however many engines there are.
//!
//! A kernel runs on the thread that MLX gave it, helped by the set's. One kernel at a time has the helpers, so that two
//! engines never compete for the cores with more threads than there are. Helpers look for the next kernel for a short
//! while, because kernels of a step follow each other within microseconds, and then sleep.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a helper looks for more work before it sleeps.
const PATIENCE: Duration = Duration::from_micros(200);

/// Looks at helpers that finish, before their core may be needed for them.
const SPINS: u32 = 4096;

/// Looks between two readings of the clock.
const LOOKS: u32 = 64;

/// A share in the process's helper threads. When the last one is dropped, the threads end.
#[derive(Debug, Clone)]
pub struct Workers {
    count: usize,
    crew: Arc<Crew>,
}

#[derive(Debug)]
struct Crew {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many the system grants: known when it has refused one.
    limit: AtomicUsize,
    /// Held while a kernel has the helpers.
    turn: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    /// Counts the jobs; helpers watch it.
    generation: AtomicU64,
    state: Mutex<State>,
    wake: Condvar,
    /// The next task of the job.
    next: AtomicUsize,
    /// Helpers at work on the job.
    busy: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Debug)]
struct State {
    /// The job that helpers may still join.
    job: Option<Job>,
    sleeping: usize,
    ended: bool,
}

/// What a kernel wants done: `body(0)` to `body(tasks - 1)`, each once, in any order.
#[derive(Debug, Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    /// Helpers with a smaller index take part.
    helpers: usize,
}

// SAFETY: `run` returns only when no helper uses the body any more, and the body is `Sync`.
unsafe impl Send for Job {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// A share in the process's threads that computes on `count` of them, the caller's included; `None` takes the
    /// number of physical cores that the process may use.
    pub fn shared(count: Option<usize>) -> Self {
        static CREW: Mutex<Weak<Crew>> = Mutex::new(Weak::new());
        let mut current = lock(&CREW);
        let crew = current.upgrade().unwrap_or_else(|| Arc::new(Crew::new()));
        *current = Arc::downgrade(&crew);
        Self { count: count.unwrap_or_else(physical_cores).max(1), crew }
    }

    /// Threads that a kernel of this share computes on.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Calls `body` with every number below `tasks`, on this thread and the helpers; returns when all calls have.
    /// A panic in `body` goes on here, after the other tasks are done or given up. `body` must not call this itself.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.count == 1 {
            return (0..tasks).for_each(body);
        }
        let _turn = lock(&self.crew.turn);
        let helpers = self.crew.hire(self.count - 1);
        let shared = &*self.crew.shared;
        // SAFETY: only the lifetime changes; this function waits for the helpers before it returns.
        let body: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        shared.start(Job { body, tasks, helpers });
        shared.work(body, tasks);
        // Whoever has not come by now is not waited for.
        lock(&shared.state).job = None;
        let mut looks = 0u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            looks = looks.saturating_add(1);
            if looks < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Some(panic) = lock(&shared.panic).take() {
            resume_unwind(panic);
        }
    }
}

impl Crew {
    fn new() -> Self {
        let shared = Shared {
            generation: AtomicU64::new(0),
            state: Mutex::new(State { job: None, sleeping: 0, ended: false }),
            wake: Condvar::new(),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            panic: Mutex::new(None),
        };
        Self {
            shared: Arc::new(shared),
            threads: Mutex::default(),
            limit: AtomicUsize::new(usize::MAX),
            turn: Mutex::new(()),
        }
    }

    /// Helpers that are there, at most `wanted`, after starting those that are missing.
    fn hire(&self, wanted: usize) -> usize {
        let mut threads = lock(&self.threads);
        while threads.len() < wanted.min(self.limit.load(Ordering::Relaxed)) {
            let (shared, index) = (Arc::clone(&self.shared), threads.len());
            let spawned =
                std::thread::Builder::new().name(format!("omlx-cpu {index}")).spawn(move || shared.help(index));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    self.limit.store(threads.len(), Ordering::Relaxed);
                    tracing::warn!(%error, "kernels run on {} instead of {} threads", threads.len() + 1, wanted + 1);
                }
            }
        }
        threads.len().min(wanted)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.ended = true;
        self.shared.generation.fetch_add(1, Ordering::Release);
        drop(state);
        self.shared.wake.notify_all();
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Publishes a job; helpers may be at work when this returns.
    fn start(&self, job: Job) {
        let mut state = lock(&self.state);
        self.next.store(0, Ordering::Relaxed);
        state.job = Some(job);
        self.generation.fetch_add(1, Ordering::Release);
        if state.sleeping > 0 {
            self.wake.notify_all();
        }
    }

    /// Does tasks of the current job until none is left.
    fn work(&self, body: *const (dyn Fn(usize) + Sync), tasks: usize) {
        // SAFETY: the job's owner waits until `busy` says that this is over.
        let body = unsafe { &*body };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                body(task);
            }
        }));
        if let Err(panic) = outcome {
            // No further task is begun.
            self.next.store(tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        let mut seen = 0;
        while self.wait(&mut seen) {
            let state = lock(&self.state);
            let Some(job) = state.job.filter(|job| index < job.helpers) else { continue };
            // Counted before the lock is released: from here on the job's owner waits for this helper.
            self.busy.fetch_add(1, Ordering::Relaxed);
            drop(state);
            self.work(job.body, job.tasks);
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for another generation than `seen`; false when the crew is dismissed.
    fn wait(&self, seen: &mut u64) -> bool {
        let since = Instant::now();
        let mut looks = 0u32;
        while self.generation.load(Ordering::Acquire) == *seen {
            std::hint::spin_loop();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) && since.elapsed() > PATIENCE {
                let mut state = lock(&self.state);
                state.sleeping += 1;
                while self.generation.load(Ordering::Relaxed) == *seen {
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state.sleeping -= 1;
            }
        }
        *seen = self.generation.load(Ordering::Relaxed);
        !lock(&self.state).ended
    }
}

/// Physical cores that this process may use.
fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    distinct_cores().map_or(allowed, |cores| cores.clamp(1, allowed))
}

/// Cores as Linux counts them, of the processors that this process may run on: those that share a core name the same
/// set of siblings.
fn distinct_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let siblings = |cpu: usize| {
        std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).ok()
    };
    let cores: std::collections::BTreeSet<_> = cpu_list(allowed)?.into_iter().filter_map(siblings).collect();
    (!cores.is_empty()).then_some(cores.len())
}

/// The numbers of a list such as `0-3,8`.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}
