//! The threads that kernels compute on: one set for the whole process, however many engines there are.
//!
//! A kernel runs on the thread that MLX gave it, helped by the set's. One kernel at a time has the helpers, so that two
//! engines never compete for the cores with more threads than there are; but what is computed [`beside`] steps shares them with
//! those ([`Workers::share`]). Helpers look for the next kernel for a short while, because kernels of a step follow each other
//! within microseconds, and then sleep.

use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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

/// Kernels of a step and those that run [`beside`] it share the helpers until this ends.
#[derive(Debug)]
pub struct Sharing {
    crew: Arc<Crew>,
    ended: AtomicBool,
}

#[derive(Debug)]
struct Crew {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// How many the system grants: known when it has refused one.
    limit: AtomicUsize,
    /// Held while a kernel has the helpers, or its part of them: on the first side, and on the second.
    turns: [Mutex<()>; 2],
}

#[derive(Debug)]
struct Shared {
    /// Counts what helpers should look at; they watch it.
    generation: AtomicU64,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The jobs that helpers may still join, of either side.
    jobs: [Option<Job>; 2],
    /// How many sharings there are: hardly ever more than one.
    sharings: usize,
    sleeping: usize,
    ended: bool,
}

/// What a kernel wants done: `body(0)` to `body(tasks - 1)`, each once, in any order.
#[derive(Debug, Clone)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    progress: *const Progress,
    /// Which helpers may take part, and how many may once no other kernel runs beside this one.
    helpers: Range<usize>,
    all: usize,
}

/// How far a job is.
#[derive(Debug)]
struct Progress {
    tasks: usize,
    /// The next task.
    next: AtomicUsize,
    /// Helpers at work.
    busy: AtomicUsize,
    /// Changes when some of them are to leave.
    change: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `run` returns only when no helper uses the body and the progress any more, and both are `Sync`.
unsafe impl Send for Job {}

thread_local! {
    /// Whether what this thread describes or runs is on the second side.
    static BESIDE: Cell<bool> = const { Cell::new(false) };
}

/// Calls `body` for the second side, beside steps: kernels that it runs leave a part of the threads to others while a
/// [`Sharing`] lasts.
pub fn beside<T>(body: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            BESIDE.set(self.0);
        }
    }
    let _before = Before(BESIDE.replace(true));
    body()
}

/// Whether this is called by [`beside`].
pub fn is_beside() -> bool {
    BESIDE.get()
}

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

    /// Lets two kernels run at the same time, each on about half of the threads: what waits for memory leaves time to what
    /// multiplies. A kernel that is running beside steps keeps its half only; once the sharing ends, the other half joins the kernel
    /// that is running there then, and later ones have all.
    pub fn share(&self) -> Sharing {
        let mut state = lock(&self.crew.shared.state);
        state.sharings += 1;
        if let Some(job) = &mut state.jobs[1] {
            job.helpers = self.part(true, job.all);
            // SAFETY: while a job is in the state, its owner has not returned.
            unsafe { &*job.progress }.change.fetch_add(1, Ordering::Relaxed);
        }
        Sharing { crew: Arc::clone(&self.crew), ended: AtomicBool::new(false) }
    }

    /// Calls `body` with every number below `tasks`, on this thread and the helpers; returns when all calls have.
    /// A panic in `body` goes on here, after the other tasks are done or given up. `body` must not call this itself.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.count == 1 {
            return (0..tasks).for_each(body);
        }
        let shared = &*self.crew.shared;
        let second = is_beside();
        if !second && self.part(false, usize::MAX).is_empty() && lock(&shared.state).sharings > 0 {
            return (0..tasks).for_each(body);
        }
        let _turn = lock(&self.crew.turns[usize::from(second)]);
        let all = self.crew.hire(self.count - 1);
        let panic = Mutex::new(None);
        let none = || AtomicUsize::new(0);
        let progress = Progress { tasks, next: none(), busy: none(), change: none(), panic };
        // SAFETY: only the lifetime changes; this function waits for the helpers before it returns.
        let body: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        let mut job = Job { body, progress: &progress, helpers: 0..all, all };
        {
            let mut state = lock(&shared.state);
            if state.sharings > 0 {
                job.helpers = self.part(second, all);
            }
            let anyone = !job.helpers.is_empty();
            state.jobs[usize::from(second)] = Some(job);
            if anyone {
                shared.call(&state);
            }
        }
        progress.work(body, || true);
        // Whoever has not come by now is not waited for.
        lock(&shared.state).jobs[usize::from(second)] = None;
        let mut looks = 0u32;
        while progress.busy.load(Ordering::Acquire) > 0 {
            looks = looks.saturating_add(1);
            if looks < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Some(panic) = progress.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }

    /// Which of `all` helpers either side has while they share: with its caller the first has half of the threads, rounded up.
    fn part(&self, second: bool, all: usize) -> Range<usize> {
        let first = self.count.div_ceil(2) - 1;
        let part = if second { first..first.max(self.count.saturating_sub(2)) } else { 0..first };
        part.start.min(all)..part.end.min(all)
    }
}

impl Sharing {
    /// Ends it before its time: one of the sides has nothing more to do.
    pub fn end(&self) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        let shared = &*self.crew.shared;
        let mut state = lock(&shared.state);
        state.sharings -= 1;
        if state.sharings == 0
            && let Some(job) = &mut state.jobs[1]
        {
            job.helpers = 0..job.all;
            shared.call(&state);
        }
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        self.end();
    }
}

impl Crew {
    fn new() -> Self {
        let shared =
            Shared { generation: AtomicU64::new(0), state: Mutex::new(State::default()), wake: Condvar::new() };
        Self {
            shared: Arc::new(shared),
            threads: Mutex::default(),
            limit: AtomicUsize::new(usize::MAX),
            turns: Default::default(),
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

impl Progress {
    /// Does tasks of the job until none is left, or this thread no longer `stays`.
    fn work(&self, body: *const (dyn Fn(usize) + Sync), stays: impl Fn() -> bool) {
        // SAFETY: the job's owner waits until `busy` says that this is over.
        let body = unsafe { &*body };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while stays() {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= self.tasks {
                    break;
                }
                body(task);
            }
        }));
        if let Err(panic) = outcome {
            // No further task is begun.
            self.next.store(self.tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }
}

impl Shared {
    /// Has helpers look at the jobs of `state`, which the caller holds.
    fn call(&self, state: &State) {
        self.generation.fetch_add(1, Ordering::Release);
        if state.sleeping > 0 {
            self.wake.notify_all();
        }
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        let mut seen = 0;
        while self.wait(&mut seen) {
            while let Some((job, change)) = self.join(index) {
                // SAFETY: its owner waits for this helper, which it counts as busy.
                let progress = unsafe { &*job.progress };
                progress.work(job.body, || progress.change.load(Ordering::Relaxed) == change);
                progress.busy.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// A job with tasks left that the helper `index` may take part in, as long as `change` stays as it is: it counts as busy from
    /// here on.
    fn join(&self, index: usize) -> Option<(Job, usize)> {
        let state = lock(&self.state);
        state.jobs.iter().flatten().filter(|job| job.helpers.contains(&index)).find_map(|job| {
            // SAFETY: while a job is in the state, its owner has not returned.
            let progress = unsafe { &*job.progress };
            let left = progress.next.load(Ordering::Relaxed) < progress.tasks;
            // Counted before the lock is released: from here on the job's owner waits for this helper.
            left.then(|| progress.busy.fetch_add(1, Ordering::Relaxed))?;
            Some((job.clone(), progress.change.load(Ordering::Relaxed)))
        })
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
