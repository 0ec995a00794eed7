//! How many requests may wait at an engine, and when to come again if too many do. Pure.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, Status};
use crate::sync::lock;

/// Weight of a new interval.
const NEW: f64 = 0.2;

/// What a host is told while nothing is known.
const GUESS: Duration = Duration::from_secs(1);

/// The requests that wait: accepted, and not yet running.
#[derive(Debug)]
pub struct Queue {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    last_left: Option<Instant>,
    /// Seconds between two requests that leave a queue in which others wait.
    interval: Option<f64>,
}

/// A place in the queue; dropped when the request runs or ends.
#[derive(Debug)]
pub struct QueueTicket(Arc<Queue>);

impl Queue {
    /// At most `limit` requests wait.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// A place for a request; `Busy` with the time after which to try again if there is none.
    pub fn enter(self: &Arc<Self>) -> Result<QueueTicket> {
        let mut state = lock(&self.state);
        if state.waiting >= self.limit {
            let after = state.interval.map_or(GUESS, Duration::from_secs_f64).max(Duration::from_millis(1));
            let what =
                format!("{} requests are waiting already; try again in {:.1} s", self.limit, after.as_secs_f64());
            return Err(Error::new(Status::Busy, what).retry_after(after));
        }
        state.waiting += 1;
        Ok(QueueTicket(Arc::clone(self)))
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        lock(&self.state).waiting
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        let now = Instant::now();
        if let Some(last) = state.last_left.replace(now).filter(|_| state.waiting > 1) {
            let new = now.saturating_duration_since(last).as_secs_f64();
            state.interval = Some(state.interval.map_or(new, |old| old + NEW * (new - old)));
        }
        state.waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_again() {
        let queue = Queue::new(2);
        let (first, second) = (queue.enter().unwrap(), queue.enter().unwrap());
        let refused = queue.enter().unwrap_err();
        assert_eq!((refused.status(), refused.after()), (Status::Busy, Some(GUESS)));
        drop(first);
        let third = queue.enter().unwrap();
        std::thread::sleep(Duration::from_millis(30));
        drop(second);
        let fourth = queue.enter().unwrap();
        let after = queue.enter().unwrap_err().after().unwrap();
        assert!(after >= Duration::from_millis(30) && after < Duration::from_secs(10), "{after:?}");
        drop((third, fourth));
        assert_eq!(queue.waiting(), 0);
    }
}
