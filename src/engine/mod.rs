//! One engine per loaded model: a thread that prepares requests (template, tokens) and a thread that owns MLX.
//!
//! ```text
//! submit ─▶ intake: render, tokenise, resolve defaults ─▶ worker: plan / run / commit ─▶ events
//! ```
//!
//! Handles hold channels only; arrays never leave the worker.

mod activity;
mod events;
mod intake;
mod memory;
mod metrics;
mod pace;
mod queue;
mod request;
mod restore;
mod runner;
mod scheduler;
mod sequence;
mod shape;
mod threads;
mod tiers;
mod worker;

#[cfg(test)]
mod tests;

pub use events::{Delta, Done, Event, EventSink, FinishReason, RequestState, TokenLogprob, Usage, Wake};
pub use intake::{EngineText, LazyText};
pub use metrics::EngineMetrics;
pub use request::{ChatInput, Input, Priority, Request};
pub use runner::Packed;
pub use scheduler::{Run, StepInput, StepPlan};
pub use shape::Shape;
pub use tiers::{Cold, Stop, Tiers, Whereabouts};
pub use worker::CacheCommand;

use activity::Activity;
use queue::Queue;
use threads::Threads;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use mlx_rs::Dtype;

use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::kernels::Backend;
use crate::ledger::Ledger;
use crate::mlx::Device;
use crate::sync::lock;

/// Where a model comes from.
#[derive(Debug, Clone)]
pub enum ModelSource {
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// Random weights of this configuration, made in memory: for benchmarks.
    Random(ModelConfig),
}

/// Everything an engine needs to know before it starts; all choices made.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The model's id, for messages.
    pub id: String,
    /// Its files, or none.
    pub source: ModelSource,
    /// Where to compute.
    pub device: Device,
    /// Type of weights, keys and values (and on a GPU of activations); `None` keeps the checkpoint's.
    pub dtype: Option<Dtype>,
    /// Who computes the layers.
    pub backend: Backend,
    /// Upper limit of the context in tokens; `None` takes the model's.
    pub context: Option<usize>,
    /// Prompt tokens in one forward pass.
    pub prefill_chunk: usize,
    /// Tokens of a block of the KV cache.
    pub block_tokens: usize,
    /// Bytes that the KV cache may take.
    pub cache_bytes: usize,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
    /// Requests that may wait.
    pub queue_length: usize,
    /// What a step should take while answers are running.
    pub target_latency: Duration,
    /// Whether a step is launched before the tokens of the one before it have been read.
    pub overlap: bool,
    /// Tokenizer, templates and defaults.
    pub text: Arc<LazyText>,
    /// Where rows are outside the pools.
    pub tiers: Tiers,
    /// Where its memory is taken from.
    pub ledger: Arc<Ledger>,
}

/// Facts about a loaded model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LoadedInfo {
    /// Bytes of the weights.
    pub weight_bytes: usize,
    /// Seconds from start to ready.
    pub load_seconds: f64,
}

/// Why an engine no longer serves; set once, read by whoever has to end a request without a better reason.
pub type Failure = Arc<OnceLock<Error>>;

#[derive(Debug, Clone)]
enum Phase {
    Loading,
    Ready(LoadedInfo),
    Ended(Error),
}

/// State shared by an engine's handle and its threads.
#[derive(Debug)]
struct Shared {
    phase: Mutex<Phase>,
    changed: Condvar,
    failure: Failure,
    queue: Arc<Queue>,
    activity: Arc<Activity>,
    /// Bytes of weights that are there, and that there will be.
    loading: Arc<Mutex<(u64, u64)>>,
    /// Bytes that were given back at the end.
    freed: AtomicU64,
    /// As the worker left them after its last step.
    metrics: Mutex<EngineMetrics>,
}

impl Shared {
    fn set(&self, phase: Phase) {
        if let Phase::Ended(error) = &phase {
            // The first reason stays: later ones are its consequences.
            let _ = self.failure.set(error.clone());
        }
        *lock(&self.phase) = phase;
        self.changed.notify_all();
    }

    /// The reason this engine ended, or a general one.
    fn reason(&self) -> Error {
        self.failure.get().cloned().unwrap_or_else(stopped)
    }
}

fn stopped() -> Error {
    Error::new(Status::Closed, "the model was unloaded")
}

/// A handle to a running engine. Dropping it asks the engine to stop; [`Engine::join`] waits for that.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
}

impl Engine {
    /// Starts the engine's threads; the model loads on them, and requests may be submitted at once.
    pub fn start(options: EngineOptions) -> Result<Self> {
        let shared = Arc::new(Shared {
            phase: Mutex::new(Phase::Loading),
            changed: Condvar::new(),
            failure: Arc::new(OnceLock::new()),
            queue: Queue::new(options.queue_length),
            activity: Activity::new(),
            loading: Arc::default(),
            freed: AtomicU64::new(0),
            metrics: Mutex::default(),
        });
        let (intake, intake_inbox) = crossbeam_channel::unbounded();
        let (worker, worker_inbox) = crossbeam_channel::unbounded();
        let id = options.id.clone();
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name).spawn(body).map_err(|e| Error::io("starting an engine thread", &e))
        };
        let worker_thread = {
            let (options, shared, worker) = (options.clone(), Arc::clone(&shared), worker.clone());
            let body = move || worker::main(&options, &worker_inbox, &worker, &shared);
            spawn(format!("omlx-run {id}"), Box::new(body))?
        };
        let intake_thread = {
            let (worker, shared) = (worker.clone(), Arc::clone(&shared));
            spawn(format!("omlx-text {id}"), Box::new(move || intake::main(&options, &intake_inbox, &worker, &shared)))
        };
        let intake_thread = match intake_thread {
            Ok(thread) => thread,
            Err(error) => {
                let _ = worker.send(worker::Command::Stop);
                return Err(error);
            }
        };
        let threads = Threads::new(intake, worker, Arc::clone(&shared), vec![intake_thread, worker_thread]);
        Ok(Self { shared, threads })
    }

    /// Accepts a request and returns at once; everything else that happens to it is told through its events. `Busy` if
    /// too many requests wait.
    pub fn submit(&self, request: Request) -> Result<Arc<RequestState>> {
        let ticket = self.shared.queue.enter()?;
        let (state, sink) = RequestState::new(Arc::clone(&self.shared.failure), self.shared.activity.enter());
        if let Err(rejected) = self.threads.intake.send(intake::Message::Submit(Box::new(request), ticket, sink)) {
            rejected.into_inner().fail(self.shared.reason());
        }
        Ok(state)
    }

    /// What the engine tells about itself.
    pub fn metrics(&self) -> EngineMetrics {
        *lock(&self.shared.metrics)
    }

    /// Asks something of the cache; blocks until the step that is being planned is launched.
    pub fn cache<T>(&self, command: impl FnOnce(Sender<T>) -> CacheCommand) -> Result<T> {
        self.wait_ready()?;
        self.shared.activity.touch();
        let (answer, answered) = crossbeam_channel::bounded(1);
        let gone = || self.shared.reason();
        self.threads.worker.send(worker::Command::Cache(command(answer))).map_err(|_| gone())?;
        answered.recv().map_err(|_| gone())
    }

    /// The error this engine ended with, if it ended.
    pub fn ended(&self) -> Option<Error> {
        match &*lock(&self.shared.phase) {
            Phase::Ended(error) => Some(error.clone()),
            Phase::Loading | Phase::Ready(_) => None,
        }
    }

    /// Facts about the model once it is loaded.
    pub fn loaded(&self) -> Option<LoadedInfo> {
        match &*lock(&self.shared.phase) {
            Phase::Ready(info) => Some(*info),
            Phase::Loading | Phase::Ended(_) => None,
        }
    }

    /// Requests that have not ended, and when the last one came or ended.
    pub fn activity(&self) -> (usize, Instant) {
        self.shared.activity.now()
    }

    /// Bytes of weights that are there, and that there will be; both 0 until the files have been looked at.
    pub fn loading(&self) -> (u64, u64) {
        *lock(&self.shared.loading)
    }

    /// Asks the engine to give back the memory that no request uses; returns at once.
    pub fn release_memory(&self) {
        let (answer, _) = crossbeam_channel::bounded(1);
        // An engine that has ended has given back everything.
        let _ = self.threads.worker.send(worker::Command::Cache(CacheCommand::Release(answer)));
    }

    /// Blocks until the model is loaded, or returns why it could not be.
    pub fn wait_ready(&self) -> Result<LoadedInfo> {
        let mut phase = lock(&self.shared.phase);
        loop {
            match &*phase {
                Phase::Ready(info) => return Ok(*info),
                Phase::Ended(error) => return Err(error.clone()),
                Phase::Loading => {
                    phase = self.shared.changed.wait(phase).unwrap_or_else(|poisoned| poisoned.into_inner());
                }
            }
        }
    }

    /// Whether its threads have ended.
    pub fn is_gone(&self) -> bool {
        self.threads.are_gone()
    }

    /// Asks the engine to end its requests with `reason` and stop; returns at once.
    pub fn stop(&self, reason: Error) {
        self.threads.stop(reason);
    }

    /// Waits until the engine has been told to stop, by whomever, and its threads are gone; returns the bytes that it gave
    /// back.
    pub fn join_stopped(&self) -> u64 {
        let mut phase = lock(&self.shared.phase);
        while !matches!(*phase, Phase::Ended(_)) {
            phase = self.shared.changed.wait(phase).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        drop(phase);
        self.join();
        self.shared.freed.load(Ordering::Relaxed)
    }

    /// Waits until the threads of a stopped engine are gone and its memory is returned.
    pub fn join(&self) {
        self.threads.join();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop(stopped());
    }
}
