//! Whether anybody uses an engine, and when somebody last did. Pure.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::sync::lock;

/// How many requests an engine has that have not ended.
#[derive(Debug)]
pub struct Activity {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    requests: usize,
    last: Instant,
}

/// A request that has not ended; dropped when it does.
#[derive(Debug)]
pub struct InUse(Arc<Activity>);

impl Activity {
    /// Of an engine that begins now.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { requests: 0, last: Instant::now() }) })
    }

    /// A request has come.
    pub fn enter(self: &Arc<Self>) -> InUse {
        let mut state = lock(&self.state);
        state.requests += 1;
        state.last = Instant::now();
        InUse(Arc::clone(self))
    }

    /// Requests that have not ended, and when the last one came or ended.
    pub fn now(&self) -> (usize, Instant) {
        let state = lock(&self.state);
        (state.requests, state.last)
    }

    /// Somebody did something with the engine that is no request.
    pub fn touch(&self) {
        lock(&self.state).last = Instant::now();
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.requests -= 1;
        state.last = Instant::now();
    }
}
