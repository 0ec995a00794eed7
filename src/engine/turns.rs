//! Who computes next where engines share the same cores. Pure.
//!
//! A step of one engine and a batch of another that run at the same time take each other's cores kernel by kernel, and whoever
//! has the longer kernels gets more of them. So they take turns, in the order in which they ask.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// So long after its last turn an engine still counts as one that others should leave time for.
const RECENT: Duration = Duration::from_millis(200);

/// The turns of all engines of a pool.
#[derive(Debug)]
pub struct Turns {
    /// Engines compute at the same time, because the device sees to it.
    free: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The next number to be given out, and the one whose turn it is.
    next: u64,
    serving: u64,
    owners: u64,
    /// When which owner last gave back a turn.
    last: Vec<(u64, Instant)>,
}

/// An engine's place among those that take turns.
#[derive(Debug)]
pub struct Seat {
    turns: Arc<Turns>,
    owner: u64,
}

/// The time in which an engine may compute; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Arc<Turns>,
    owner: u64,
    /// Whether other engines want to compute, too.
    pub shared: bool,
    /// How long it took to get it.
    pub waited: Duration,
}

impl Turns {
    /// For engines that share cores, or `free` ones that need not wait for each other.
    pub fn new(free: bool) -> Arc<Self> {
        Arc::new(Self { free, state: Mutex::default(), changed: Condvar::new() })
    }

    /// A place for an engine.
    pub fn seat(self: &Arc<Self>) -> Seat {
        let mut state = lock(&self.state);
        state.owners += 1;
        Seat { turns: Arc::clone(self), owner: state.owners }
    }
}

impl Seat {
    /// Waits until those who came before have given back their turns.
    pub fn take(&self) -> Turn {
        let asked = Instant::now();
        let Turns { free, state, changed } = &*self.turns;
        let mut state = lock(state);
        if !free {
            let number = state.next;
            state.next += 1;
            while state.serving != number {
                state = changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
        }
        let now = Instant::now();
        state.last.retain(|(_, last)| now.saturating_duration_since(*last) < RECENT);
        let waits = !free && state.next > state.serving + 1;
        let shared = waits || state.last.iter().any(|(owner, _)| *owner != self.owner);
        Turn { turns: Arc::clone(&self.turns), owner: self.owner, shared, waited: now - asked }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Self { turns, owner, .. } = self;
        let mut state = lock(&turns.state);
        state.last.retain(|(other, _)| other != owner);
        state.last.push((*owner, Instant::now()));
        if !turns.free {
            state.serving += 1;
            turns.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_go_round() {
        let turns = Turns::new(false);
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let seats: Vec<Seat> = (0..3).map(|_| turns.seat()).collect();
            let first = seats[0].take();
            for (name, seat) in seats.into_iter().enumerate().skip(1) {
                let (order, before) = (&order, lock(&turns.state).next);
                let turns = &turns;
                scope.spawn(move || {
                    for _ in 0..5 {
                        let turn = seat.take();
                        assert!(turn.shared, "the other one waits");
                        lock(order).push(name);
                        std::thread::sleep(Duration::from_millis(10));
                    }
                });
                while lock(&turns.state).next == before {
                    std::thread::yield_now();
                }
            }
            drop(first);
        });
        let order = order.into_inner().unwrap();
        assert_eq!(order[..8], [1, 2, 1, 2, 1, 2, 1, 2], "nobody had two turns while the other one waited");
    }

    #[test]
    fn an_engine_alone_has_the_cores_for_itself() {
        let turns = Turns::new(false);
        let (mine, other) = (turns.seat(), turns.seat());
        assert!(!mine.take().shared && !mine.take().shared);
        drop(other.take());
        assert!(mine.take().shared, "the other one has just had its turn");
        std::thread::sleep(RECENT);
        drop(mine.take());
        assert!(!mine.take().shared, "that was a while ago");
    }

    #[test]
    fn free_engines_do_not_wait() {
        let turns = Turns::new(true);
        let (mine, other) = (turns.seat(), turns.seat());
        let (one, two) = (mine.take(), other.take());
        assert!(!one.shared && !two.shared);
    }
}
