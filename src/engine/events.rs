//! Events of a request, from the engine's threads to the host: a queue per request that never blocks the producer.
//!
//! Text that the host has not fetched yet is merged into one event, so a slow reader costs memory for its text only.
//! When too much is waiting, the sequence pauses until the reader catches up.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::Failure;
use super::activity::InUse;
use crate::error::{Error, Status};
use crate::sync::lock;

/// Unread tokens at which a sequence pauses.
const PAUSE_TOKENS: usize = 1024;

/// Log-probability of a token and of the likeliest ones in its place, natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Its bytes as text; partial characters possible.
    pub bytes: Vec<u8>,
    /// The likeliest tokens, best first; empty unless asked for.
    pub top: Vec<TokenLogprob>,
}

/// What a piece of an answer is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeltaKind {
    /// Text for the user.
    #[default]
    Text,
    /// Text that the model thinks by.
    Reasoning,
    /// Arguments of a tool call, JSON text.
    ToolCall(ToolCallPart),
}

/// Which call a piece belongs to; the same in all pieces of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCallPart {
    /// Which call of the answer, from 0.
    pub index: usize,
    /// Names the call, for its result.
    pub id: String,
    /// Name of the tool.
    pub name: String,
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Delta {
    /// Which of several answers; 0 for the only one.
    pub choice: usize,
    /// What the text is.
    pub kind: DeltaKind,
    /// Whole characters; may be empty while a character, a stop string or a mark is incomplete.
    pub text: String,
    /// The tokens sampled since the last event.
    pub tokens: Vec<u32>,
    /// One per token, if the request asked for them.
    pub logprobs: Vec<TokenLogprob>,
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn, or a stop string or token came.
    Stop,
    /// The same, and the answer has at least one whole tool call.
    ToolCalls,
    /// `max_tokens` or the end of the context.
    Length,
    /// Cancelled by the host.
    Cancelled,
    /// The error in the event.
    Error,
}

/// Counts and times of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that were not computed because the cache had them.
    pub cached_tokens: usize,
    /// Tokens sampled, an end-of-turn token included.
    pub completion_tokens: usize,
    /// Those of them that were reasoning, its marks included.
    pub reasoning_tokens: usize,
    /// From acceptance to the first token; 0 if none came.
    pub seconds_to_first_token: f64,
    /// Rate after the first token; 0 with fewer than two tokens.
    pub tokens_per_second: f64,
}

/// The last event of every request.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Why it ended.
    pub reason: FinishReason,
    /// The stop string that ended it; of several answers, the last one.
    pub stop: Option<String>,
    /// Set exactly when `reason` is `Error` or `Cancelled`.
    pub error: Option<Error>,
    /// Counts and times.
    pub usage: Usage,
}

impl Done {
    /// The end of a request that failed, or was cancelled if the error says so.
    pub fn failed(error: Error, usage: Usage) -> Self {
        let reason = match error.status() {
            Status::Cancelled => FinishReason::Cancelled,
            _ => FinishReason::Error,
        };
        Self { reason, stop: None, error: Some(error), usage }
    }
}

/// Vectors of the texts of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Embeddings {
    /// Numbers of each vector.
    pub dimensions: usize,
    /// `[texts, dimensions]`, in the order of the request.
    pub values: Vec<f32>,
    /// The same as a JSON array of strings in base64, if the request asked for it.
    pub text: String,
    /// Texts that were cut because they were too long.
    pub truncated: usize,
}

/// Scores of the documents of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// One for each document, in the order of the request.
    pub values: Vec<f32>,
    /// The best documents, best first.
    pub order: Vec<u32>,
    /// Documents that were cut because they were too long.
    pub truncated: usize,
}

/// What a host sees of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The model is being loaded: bytes of weights that are there, and that there will be (0 until that is known). Only for
    /// requests that want to know.
    Loading(u64, u64),
    /// The prompt begins to be computed: its tokens, and those of them that a cache has. Only for requests that want to know.
    Started(usize, usize),
    /// What an embedding model computed.
    Embeddings(Embeddings),
    /// What a reranker computed.
    Scores(Scores),
    /// Text and tokens.
    Delta(Delta),
    /// The end of one of several answers, why, and by which stop string; not sent for the only one.
    ChoiceDone(usize, FinishReason, Option<String>),
    /// The end; nothing follows.
    Done(Done),
}

#[derive(Debug, Default)]
struct Queue {
    /// At most one word on loading, one start, one end for each answer, one result and one done. Unread deltas merge, so that each answer
    /// has one more only where text, reasoning and calls meet.
    events: VecDeque<Event>,
    unread_tokens: usize,
    /// The most bytes that were said to be loaded: threads may come out of order.
    loaded: u64,
    /// A done event was queued.
    ended: bool,
    /// The host has not been told of deltas that are there.
    untold: bool,
    /// Threads that wait for an event: without any, telling them would cost a call of the system for each token.
    readers: usize,
}

/// Called when an event becomes available to a queue that was empty.
pub type Wake = Box<dyn Fn() + Send + Sync>;

/// Tells the worker to look at its requests again.
pub(super) type Nudge = Box<dyn Fn() + Send>;

/// The two ends of a request: the host reads events and cancels, the engine writes through an [`EventSink`].
pub struct RequestState {
    model: Arc<str>,
    accepted: Instant,
    queue: Mutex<Queue>,
    available: Condvar,
    wake: Mutex<Option<Arc<Wake>>>,
    cancelled: AtomicBool,
    /// Set once a worker has the request: it must hear of a cancel and of new room in the queue.
    worker: Mutex<Option<Nudge>>,
}

impl std::fmt::Debug for RequestState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestState").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

impl RequestState {
    /// A new request to `model` and its only writer; `failure` is the engine's reason cell, and `in_use` ends with the request.
    pub fn new(model: Arc<str>, failure: Failure, in_use: InUse) -> (Arc<Self>, EventSink) {
        let state = Arc::new(Self {
            model,
            accepted: Instant::now(),
            queue: Mutex::default(),
            available: Condvar::new(),
            wake: Mutex::default(),
            cancelled: AtomicBool::new(false),
            worker: Mutex::default(),
        });
        (Arc::clone(&state), EventSink { state, failure, in_use: Some(in_use) })
    }

    /// Id of the model that answers.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// When the request was accepted.
    pub fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Asks the engine to end the request at its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.nudge_worker();
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// The next event, waiting up to `timeout` (`None`: for ever). `Err(Timeout)` when none came in time and
    /// `Err(Closed)` after the done event was read.
    pub fn next(&self, timeout: Option<Duration>) -> Result<Event, Status> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut queue = lock(&self.queue);
        loop {
            if let Some(event) = queue.events.pop_front() {
                queue.untold = false;
                let was_paused = queue.unread_tokens >= PAUSE_TOKENS;
                if let Event::Delta(delta) = &event {
                    queue.unread_tokens -= delta.tokens.len();
                }
                drop(queue);
                if was_paused {
                    self.nudge_worker();
                }
                return Ok(event);
            }
            if queue.ended {
                return Err(Status::Closed);
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(Status::Timeout);
            }
            queue.readers += 1;
            queue = match deadline {
                None => self.available.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner()),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.available.wait_timeout(queue, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0
                }
            };
            queue.readers -= 1;
        }
    }

    /// Sets the function that is called whenever an event becomes available; at once if one is waiting.
    ///
    /// It runs on an engine thread and must not block. `None` removes it.
    pub fn set_wake(&self, wake: Option<Wake>) {
        let wake = wake.map(Arc::new);
        let old = std::mem::replace(&mut *lock(&self.wake), wake.clone());
        // With the lock released: dropping it may run the host's destroy function.
        drop(old);
        let waiting = {
            let mut queue = lock(&self.queue);
            queue.untold &= wake.is_none();
            !queue.events.is_empty()
        };
        if let Some(wake) = wake.filter(|_| waiting) {
            wake();
        }
    }

    pub(super) fn attach_worker(&self, nudge: Nudge) {
        *lock(&self.worker) = Some(nudge);
    }

    /// Whether the reader is so far behind that the sequence should pause.
    pub(super) fn is_full(&self) -> bool {
        lock(&self.queue).unread_tokens >= PAUSE_TOKENS
    }

    /// Tells how far the model is loaded.
    pub(super) fn loading(&self, there: u64, all: u64) {
        self.push(Event::Loading(there, all));
    }

    fn nudge_worker(&self) {
        if let Some(nudge) = &*lock(&self.worker) {
            nudge();
        }
    }

    fn push(&self, event: Event) {
        self.enqueue(event);
        self.tell();
    }

    /// Adds an event of which the host will be told later.
    fn enqueue(&self, event: Event) {
        let mut queue = lock(&self.queue);
        queue.untold |= queue.events.is_empty();
        match event {
            Event::Delta(delta) => {
                queue.unread_tokens += delta.tokens.len();
                // What waits last of the same answer grows, if it is of one kind; the order between answers means nothing.
                let same = |event: &&mut Event| matches!(event, Event::Delta(last) if last.choice == delta.choice);
                match queue.events.iter_mut().rev().find(same) {
                    Some(Event::Delta(last)) if last.kind == delta.kind => {
                        last.text.push_str(&delta.text);
                        last.tokens.extend(delta.tokens);
                        last.logprobs.extend(delta.logprobs);
                    }
                    _ => queue.events.push_back(Event::Delta(delta)),
                }
            }
            Event::Loading(there, _) if queue.ended || there < queue.loaded => {}
            Event::Loading(there, _) => {
                queue.loaded = there;
                queue.events.retain(|event| !matches!(event, Event::Loading(..)));
                queue.events.push_back(event);
            }
            Event::Started(..) | Event::ChoiceDone(..) | Event::Embeddings(_) | Event::Scores(_) => {
                queue.events.push_back(event);
            }
            Event::Done(done) => {
                queue.ended = true;
                queue.events.push_back(Event::Done(done));
            }
        }
    }

    /// Tells the host of events that came to an empty queue, if they are still there.
    pub(super) fn tell(&self) {
        let (untold, readers) = {
            let mut queue = lock(&self.queue);
            (std::mem::take(&mut queue.untold) && !queue.events.is_empty(), queue.readers)
        };
        if readers > 0 {
            self.available.notify_all();
        }
        if untold {
            // Called without the lock held: it may be replaced from within.
            let wake = lock(&self.wake).clone();
            if let Some(wake) = wake {
                wake();
            }
        }
    }
}

/// The writing end of a request. There is one per request; it moves from thread to thread with the request, and
/// if it is lost on the way it still writes the done event: every accepted request ends exactly once.
#[derive(Debug)]
pub struct EventSink {
    state: Arc<RequestState>,
    failure: Failure,
    /// Gone when the request has ended.
    in_use: Option<InUse>,
}

impl EventSink {
    /// The request this sink belongs to.
    pub fn state(&self) -> &Arc<RequestState> {
        &self.state
    }

    /// Sends a piece of the answer.
    pub fn delta(&self, delta: Delta) {
        self.state.push(Event::Delta(delta));
    }

    /// Sends a result.
    pub fn send(&self, event: Event) {
        self.state.push(event);
    }

    /// Ends the request.
    pub fn done(mut self, done: Done) {
        self.end(done);
    }

    /// Ends the request with `error` and nothing counted.
    pub fn fail(self, error: Error) {
        self.fail_with(error, Usage::default());
    }

    /// Ends the request with `error`; a cancelled request ends as cancelled.
    pub fn fail_with(self, error: Error, usage: Usage) {
        self.done(Done::failed(error, usage));
    }

    fn end(&mut self, done: Done) {
        // Whoever reads the end finds the engine without the request.
        if self.in_use.take().is_some() {
            self.state.push(Event::Done(done));
            // The channel must not outlive the engine through a handle that the host keeps.
            *lock(&self.state.worker) = None;
        }
    }
}

impl Drop for EventSink {
    fn drop(&mut self) {
        let error = self.failure.get().cloned().unwrap_or_else(|| Error::internal("the engine lost the request"));
        self.end(Done::failed(error, Usage::default()));
    }
}

/// The writing ends of a request's answers: the last one to end, or the first to fail, ends the request.
#[derive(Debug)]
pub struct ChoiceSink {
    choice: usize,
    shared: Arc<Choices>,
}

#[derive(Debug)]
struct Choices {
    state: Arc<RequestState>,
    count: usize,
    open: Mutex<OpenChoices>,
}

#[derive(Debug)]
struct OpenChoices {
    /// Gone when the request has ended.
    sink: Option<EventSink>,
    left: usize,
    /// Of the answers that have ended.
    usage: Usage,
}

impl ChoiceSink {
    /// The ends of `count` answers.
    pub fn of(sink: EventSink, count: usize) -> Vec<Self> {
        let state = Arc::clone(sink.state());
        let open = Mutex::new(OpenChoices { sink: Some(sink), left: count, usage: Usage::default() });
        let shared = Arc::new(Choices { state, count, open });
        (0..count).map(|choice| Self { choice, shared: Arc::clone(&shared) }).collect()
    }

    /// The request.
    pub fn state(&self) -> &RequestState {
        &self.shared.state
    }

    /// Whether the request has ended although this answer has not: another one has failed.
    pub fn is_over(&self) -> bool {
        lock(&self.shared.open).sink.is_none()
    }

    /// Tells that the prompt begins.
    pub fn start(&self, prompt_tokens: usize, cached_tokens: usize) {
        if let Some(sink) = &lock(&self.shared.open).sink {
            sink.state.enqueue(Event::Started(prompt_tokens, cached_tokens));
        }
        // With the lock released: the host is called.
        self.shared.state.tell();
    }

    /// Sends a piece of the answer, of which the host is told with the next [`tell`](RequestState::tell) or event of another kind.
    pub fn delta(&self, delta: Delta) {
        if let Some(sink) = &lock(&self.shared.open).sink {
            sink.state.enqueue(Event::Delta(Delta { choice: self.choice, ..delta }));
        }
    }

    /// Ends the answer; `stop` is the stop string that did.
    pub fn finish(self, end: Result<FinishReason, Error>, stop: Option<String>, usage: Usage) {
        let mut open = lock(&self.shared.open);
        open.left -= 1;
        open.usage.add(&usage);
        let usage = open.usage;
        let last = open.left == 0;
        let done = match end {
            Err(error) => Done::failed(error, usage),
            Ok(reason) => {
                if let Some(sink) = open.sink.as_ref().filter(|_| self.shared.count > 1) {
                    sink.state.enqueue(Event::ChoiceDone(self.choice, reason, stop.clone()));
                }
                if !last {
                    // With the lock released: the host is called.
                    drop(open);
                    self.shared.state.tell();
                    return;
                }
                Done { reason, stop, error: None, usage }
            }
        };
        let sink = open.sink.take();
        drop(open);
        if let Some(sink) = sink {
            sink.done(done);
        }
    }
}

impl Usage {
    /// The usage of several answers to one prompt: their tokens add up, the prompt counts once.
    fn add(&mut self, other: &Usage) {
        let first = |a: f64, b: f64| {
            if a == 0.0 {
                b
            } else if b == 0.0 {
                a
            } else {
                a.min(b)
            }
        };
        self.prompt_tokens = other.prompt_tokens;
        // The first answer finds what other requests left; the others find the first.
        self.cached_tokens =
            if self.completion_tokens == 0 { other.cached_tokens } else { self.cached_tokens.min(other.cached_tokens) };
        self.completion_tokens += other.completion_tokens;
        self.reasoning_tokens += other.reasoning_tokens;
        self.seconds_to_first_token = first(self.seconds_to_first_token, other.seconds_to_first_token);
        self.tokens_per_second += other.tokens_per_second;
    }
}

#[cfg(test)]
mod tests {
    use super::super::activity::Activity;
    use super::*;

    #[test]
    fn a_wake_function_is_called_with_no_lock_held() {
        let (state, sink) = RequestState::new("m".into(), Failure::default(), Activity::new().enter());
        let [first, last] = <[_; 2]>::try_from(ChoiceSink::of(sink, 2)).expect("two answers");
        let (shared, free) = (Arc::clone(&first.shared), Arc::new(Mutex::new(Vec::new())));
        let seen = Arc::clone(&free);
        state.set_wake(Some(Box::new(move || lock(&seen).push(shared.open.try_lock().is_ok()))));
        let read_all = || while state.next(Some(Duration::ZERO)).is_ok() {};
        first.start(3, 0);
        read_all();
        first.finish(Ok(FinishReason::Stop), None, Usage::default());
        read_all();
        last.finish(Ok(FinishReason::Stop), None, Usage::default());
        assert_eq!(*lock(&free), [true; 3], "the start, one answer, and the end");
        // The function holds what leads back to it.
        state.set_wake(None);
    }
}
