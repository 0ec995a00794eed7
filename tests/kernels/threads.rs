//! The worker threads: every task once, panics come back, threads end with the last share.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::cpu::threads::{Workers, beside};
use crate::numbers::cases;

/// Held for reading by everyone who has a share, for writing by who needs to have the only ones.
static SHARES: RwLock<()> = RwLock::new(());

/// A share of some test.
pub struct Share {
    workers: Workers,
    // Dropped after the share.
    _guard: RwLockReadGuard<'static, ()>,
}

impl Deref for Share {
    type Target = Workers;

    fn deref(&self) -> &Workers {
        &self.workers
    }
}

/// A share that computes on `count` threads.
pub fn workers(count: usize) -> Share {
    let guard = SHARES.read().unwrap_or_else(PoisonError::into_inner);
    Share { workers: Workers::shared(Some(count)), _guard: guard }
}

/// Runs `tasks` tasks that count themselves; how often each was done.
fn count(workers: &Workers, tasks: usize) -> Vec<usize> {
    let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    workers.run(tasks, &|task| {
        done[task].fetch_add(1, Ordering::Relaxed);
    });
    done.into_iter().map(AtomicUsize::into_inner).collect()
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn every_task_runs_once(
        threads in 1usize..=8,
        sizes in prop::collection::vec(prop_oneof![8 => 0usize..200, 1 => Just(20_000)], 1..8),
    ) {
        let workers = workers(threads);
        prop_assert_eq!(workers.count(), threads);
        for tasks in sizes {
            prop_assert_eq!(count(&workers, tasks), vec![1; tasks]);
        }
    }

    /// The caller gets the panic of a task, no task runs twice, and what follows is computed as before.
    #[test]
    fn panics_come_back(
        (threads, tasks) in (1usize..=4, 1usize..60),
        which in any::<prop::sample::Index>(),
        two in any::<bool>(),
    ) {
        let workers = workers(threads);
        let bad = which.index(tasks);
        let done: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            workers.run(tasks, &|task| {
                done[task].fetch_add(1, Ordering::Relaxed);
                if task == bad || two && task == bad / 2 {
                    // Without the message that the hook would print.
                    std::panic::resume_unwind(Box::new(task));
                }
            });
        }));
        let panic = outcome.expect_err("a panic").downcast::<usize>();
        prop_assert!(panic.is_ok_and(|task| *task == bad || two && *task == bad / 2));
        prop_assert!(done.iter().all(|done| done.load(Ordering::Relaxed) <= 1));
        prop_assert_eq!(count(&workers, 50), vec![1; 50]);
    }
}

#[test]
fn several_threads_share_the_helpers() {
    let workers = workers(3);
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let workers = workers.clone();
            scope.spawn(move || {
                for round in 0..300 {
                    let tasks = (caller * 7 + round) % 23;
                    assert_eq!(count(&workers, tasks), vec![1; tasks], "caller {caller} round {round}");
                }
            });
        }
    });
}

/// Tasks run on the helpers too: two that wait for each other end only if both run at once.
#[test]
fn tasks_run_at_the_same_time() {
    let workers = workers(2);
    let barrier = std::sync::Barrier::new(2);
    workers.run(2, &|_| {
        barrier.wait();
    });
}

/// While they share, a kernel of each side runs; when that ends, helpers join the one that is still running.
#[test]
fn two_sides_share_the_threads() {
    // Others need all of their threads meanwhile.
    let _alone = SHARES.write().unwrap_or_else(PoisonError::into_inner);
    for threads in [2, 3, 4, 7] {
        let workers = Workers::shared(Some(threads));
        let sharing = workers.share();
        // Whoever takes part in either job, and whether all have joined the second.
        let (first, second) = (Mutex::new(BTreeSet::new()), Mutex::new(BTreeSet::new()));
        let note = |who: &Mutex<BTreeSet<String>>| {
            who.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("{:?}", std::thread::current().id()))
        };
        let half = threads.div_ceil(2);
        let (begun, joined) = (Barrier::new(2), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                beside(|| {
                    workers.run(10_000, &|task| {
                        note(&second);
                        if task == 0 {
                            begun.wait();
                            // The first side computes meanwhile, then it ends, and all come here.
                            let since = Instant::now();
                            while second.lock().unwrap_or_else(PoisonError::into_inner).len() < threads {
                                assert!(since.elapsed().as_secs() < 10, "nobody joined");
                                std::thread::yield_now();
                            }
                            joined.store(true, Ordering::Relaxed);
                        } else if !joined.load(Ordering::Relaxed) {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    });
                });
            });
            begun.wait();
            workers.run(200, &|_| {
                note(&first);
                std::thread::sleep(Duration::from_micros(100));
            });
            let taken = second.lock().unwrap_or_else(PoisonError::into_inner).len();
            assert!(taken <= (threads - half).max(1), "{taken} of {threads} threads on the second side");
            sharing.end();
        });
        let first = first.into_inner().unwrap_or_else(PoisonError::into_inner);
        let second = second.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert!(first.len() <= half, "{} of {threads} threads on the first side", first.len());
        assert_eq!(second.len(), threads);
    }
}

/// What runs beside steps with all threads leaves the first side its half as soon as a step begins.
#[test]
fn helpers_leave_when_a_sharing_begins() {
    let _alone = SHARES.write().unwrap_or_else(PoisonError::into_inner);
    for threads in [2, 3, 4, 7] {
        let workers = Workers::shared(Some(threads));
        let (all, later) = (Mutex::new(BTreeSet::new()), Mutex::new(BTreeSet::new()));
        // The sharing, and when it has begun.
        let sharing = Mutex::new(None);
        beside(|| {
            workers.run(1000, &|_| {
                let me = format!("{:?}", std::thread::current().id());
                let mut sharing = sharing.lock().unwrap_or_else(PoisonError::into_inner);
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                all.insert(me.clone());
                match &*sharing {
                    None if all.len() == threads => *sharing = Some((workers.share(), Instant::now())),
                    // Tasks that had begun by then end.
                    Some((_, since)) if since.elapsed().as_millis() > 50 => {
                        later.lock().unwrap_or_else(PoisonError::into_inner).insert(me);
                    }
                    _ => {}
                }
                drop((sharing, all));
                std::thread::sleep(Duration::from_millis(1));
            });
        });
        let later = later.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert!(sharing.into_inner().unwrap_or_else(PoisonError::into_inner).is_some(), "{threads} threads never met");
        assert!((1..=(threads / 2).max(1)).contains(&later.len()), "{} of {threads} threads stay", later.len());
    }
}

/// Jobs of two sides that begin and end to share at any moment: every task once, on both.
#[test]
fn sides_come_and_go() {
    let _alone = SHARES.write().unwrap_or_else(PoisonError::into_inner);
    let workers = Workers::shared(Some(4));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let sharing = workers.share();
                std::thread::sleep(Duration::from_micros(50));
                sharing.end();
            }
        });
        let sides = [false, true].map(|second| {
            let workers = &workers;
            scope.spawn(move || {
                for round in 0..2000 {
                    let tasks = round % 37;
                    let counted = if second { beside(|| count(workers, tasks)) } else { count(workers, tasks) };
                    assert_eq!(counted, vec![1; tasks], "round {round}");
                }
            })
        });
        let ended = sides.map(|side| side.join());
        done.store(true, Ordering::Relaxed);
        assert!(ended.iter().all(Result::is_ok));
    });
}

/// What tasks wrote is seen by the caller, whatever sleeps between the jobs.
#[test]
fn results_are_seen_after_pauses() {
    let workers = workers(3);
    for round in 0..40u64 {
        let out: Vec<std::cell::UnsafeCell<u64>> = (0..64).map(std::cell::UnsafeCell::new).collect();
        struct Cells<'a>(&'a [std::cell::UnsafeCell<u64>]);
        // SAFETY: every task writes its own cell.
        unsafe impl Sync for Cells<'_> {}
        let cells = &Cells(&out);
        workers.run(64, &|task| {
            let Cells(cells) = cells;
            // SAFETY: this task's own cell.
            unsafe { *cells[task].get() += round };
        });
        let expected: Vec<u64> = (0..64).map(|i| i + round).collect();
        assert_eq!(out.into_iter().map(std::cell::UnsafeCell::into_inner).collect::<Vec<_>>(), expected);
        // From none to longer than helpers look for work.
        std::thread::sleep(std::time::Duration::from_micros(20 * round));
    }
}

/// Names of this process's threads that belong to the kernels.
#[cfg(target_os = "linux")]
fn helpers() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let names = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.map(|name| name.trim_end().to_owned()).filter(|name| name.starts_with("omlx-cpu")).collect()
}

/// Waits until there are `count` of them: the list may still have a thread that has just been joined.
#[cfg(target_os = "linux")]
fn assert_helpers(count: usize, when: &str) {
    let since = std::time::Instant::now();
    while helpers().len() != count {
        assert!(since.elapsed().as_secs() < 5, "{when}: {:?} instead of {count}", helpers());
        std::thread::yield_now();
    }
}

#[test]
#[cfg(target_os = "linux")]
fn threads_end_with_the_last_share() {
    let _alone = SHARES.write().unwrap_or_else(PoisonError::into_inner);
    for round in 0..20 {
        assert_helpers(0, "before");
        let first = Workers::shared(Some(3));
        assert_helpers(0, "threads start with the first job");
        assert_eq!(count(&first, 10), vec![1; 10]);
        assert_helpers(2, "the caller computes too");
        let second = Workers::shared(Some(4));
        assert_eq!(count(&second, 10), vec![1; 10]);
        assert_helpers(3, "shares use the same threads");
        drop((first, second.clone()));
        assert_helpers(3, "a share is left");
        assert_eq!(count(&second, 10), vec![1; 10]);
        if round % 2 == 1 {
            // Asleep or not, they end.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        drop(second);
    }
    assert_helpers(0, "after");
}

#[test]
fn a_share_has_at_least_one_thread() {
    assert_eq!(workers(0).count(), 1);
    let _guard = SHARES.read().unwrap_or_else(PoisonError::into_inner);
    let all = Workers::shared(None).count();
    assert!(all >= 1 && all <= std::thread::available_parallelism().map_or(1, usize::from), "{all} threads");
}
