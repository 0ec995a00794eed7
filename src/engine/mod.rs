//! One engine per loaded model: a thread that prepares requests (template, tokens) and a thread that owns MLX.
//!
//! ```text
//! submit ─▶ intake: render, tokenise, resolve defaults ─▶ worker: plan / run / commit ─▶ events
//! ```
//!
//! Handles hold channels only; arrays never leave the worker.

mod activity;
mod answer;
mod answer_form;
mod encode;
mod events;
mod identity;
mod intake;
mod marks;
mod memory;
mod metrics;
mod pace;
mod queue;
mod request;
mod response_format;
mod restore;
mod runner;
mod scheduler;
mod sequence;
mod shape;
mod states;
mod threads;
mod tiers;
mod turns;
mod worker;
mod worth;

#[cfg(test)]
mod tests;

pub use encode::{EncodeRequest, EncodeTask, TextOrTokens};
pub use events::{
    Delta, DeltaKind, Done, Embeddings, Event, EventSink, FinishReason, RequestState, Scores, TokenLogprob,
    ToolCallPart, Usage, Wake,
};
pub use intake::{EngineText, LazyText};
pub use metrics::EngineMetrics;
pub use request::{ChatInput, Input, Priority, Request, ToolChoice};
pub use runner::Packed;
pub use scheduler::{Run, StepInput, StepPlan};
pub use shape::Shape;
pub use tiers::{Cold, Stop, Tiers, Whereabouts};
pub use turns::Turns;
pub use worker::CacheCommand;

use activity::Activity;
use intake::Message;
use queue::Queue;
use threads::Threads;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use mlx_rs::Dtype;

use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::kernels::Backend;
use crate::ledger::{Account, Ledger};
use crate::mlx::Device;
use crate::models::ModelKind;
use crate::panics;
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
    /// What it is for.
    pub kind: ModelKind,
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
    /// Who computes next.
    pub turns: Arc<Turns>,
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
    /// Of the model.
    id: Arc<str>,
    phase: Mutex<Phase>,
    changed: Condvar,
    failure: Failure,
    queue: Arc<Queue>,
    activity: Arc<Activity>,
    loading: Arc<Loading>,
    /// Bytes that were given back at the end.
    freed: AtomicU64,
    /// As the worker left them after its last step.
    metrics: Mutex<EngineMetrics>,
    /// When the step began that is to end next; `None` while nothing is computed.
    computing: Mutex<Option<Instant>>,
}

/// How far the weights are read.
#[derive(Debug, Default)]
struct Loading {
    state: Mutex<LoadingState>,
}

#[derive(Debug, Default)]
struct LoadingState {
    /// Bytes that are there, and that there will be.
    bytes: (u64, u64),
    /// Requests that want to be told.
    told: Vec<Weak<RequestState>>,
    last: Option<Instant>,
}

/// Requests hear of the progress of a load no more often than this.
const TELL: Duration = Duration::from_millis(50);

impl Loading {
    fn bytes(&self) -> (u64, u64) {
        lock(&self.state).bytes
    }

    /// Tells `request` of the progress from now on.
    fn tell(&self, request: &Arc<RequestState>) {
        let (there, all) = {
            let mut state = lock(&self.state);
            state.told.push(Arc::downgrade(request));
            state.bytes
        };
        request.loading(there, all);
    }

    fn reached(&self, there: u64, all: u64) {
        let told: Vec<_> = {
            let mut state = lock(&self.state);
            state.bytes = (there, all);
            let now = Instant::now();
            if state.last.is_some_and(|last| now.saturating_duration_since(last) < TELL) {
                return;
            }
            state.last = Some(now);
            state.told.iter().filter_map(Weak::upgrade).collect()
        };
        // Unlocked: a host that is woken may submit another request.
        told.iter().for_each(|request| request.loading(there, all));
    }

    /// Everything is there, and nobody needs to be told any more.
    fn complete(&self) {
        let (told, all) = {
            let mut state = lock(&self.state);
            state.bytes.0 = state.bytes.1;
            (std::mem::take(&mut state.told), state.bytes.1)
        };
        told.iter().filter_map(Weak::upgrade).for_each(|request| request.loading(all, all));
    }
}

impl Shared {
    /// The model is loaded.
    fn ready(&self, info: LoadedInfo) {
        tracing::info!(model = &*self.id, weight_bytes = info.weight_bytes, seconds = info.load_seconds, "loaded");
        self.activity.touch();
        self.loading.complete();
        self.set(Phase::Ready(info));
    }

    /// A function that notes how many of `all` bytes of weights are there, and says whether reading is to stop: a large model
    /// takes a while, and an unload or close must not wait for the rest of it.
    fn watch(&self, all: usize) -> impl Fn(usize) -> Option<Error> + 'static {
        let (loading, failure) = (Arc::clone(&self.loading), Arc::clone(&self.failure));
        move |there| {
            loading.reached(there as u64, all as u64);
            failure.get().cloned()
        }
    }

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

/// What an encoder says to questions about its cache.
pub fn no_cache() -> Error {
    Error::unsupported("the model has no KV cache: it encodes texts")
}

/// Runs `serve` on the thread of an engine with the engine's account, and makes known how it ended.
fn run_to_the_end(options: &EngineOptions, shared: &Shared, serve: impl FnOnce(&Account) -> Result<()>) {
    // Given back when no array is left.
    let account = options.ledger.open(&options.id);
    let outcome = panics::catch(|| crate::mlx::init().and_then(|()| serve(&account)));
    let error = match outcome {
        Ok(Ok(())) => stopped(),
        Ok(Err(error)) => error,
        Err(panic) => panic.context(format!("engine {}", options.id)),
    };
    tracing::debug!(model = options.id, reason = %error, "engine ended");
    shared.freed.store(account.uses().sum(), Ordering::Relaxed);
    drop(account);
    shared.set(Phase::Ended(error));
}

/// How work reaches the threads of an engine.
#[derive(Debug)]
enum Ports {
    /// Of a language model.
    Generation { intake: Sender<Message<Request>>, worker: Sender<worker::Command> },
    /// Of an encoder.
    Encoding { intake: Sender<Message<EncodeRequest>> },
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(body).map_err(|e| Error::io("starting an engine thread", &e))
}

/// A handle to a running engine. Dropping it asks the engine to stop; [`Engine::join`] waits for that.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    threads: Arc<Threads>,
    ports: Ports,
}

impl Engine {
    /// Starts the engine's threads; the model loads on them, and requests may be submitted at once.
    pub fn start(options: EngineOptions) -> Result<Self> {
        let shared = Arc::new(Shared {
            id: options.id.as_str().into(),
            phase: Mutex::new(Phase::Loading),
            changed: Condvar::new(),
            failure: Arc::new(OnceLock::new()),
            queue: Queue::new(options.queue_length),
            activity: Activity::new(),
            loading: Arc::default(),
            freed: AtomicU64::new(0),
            metrics: Mutex::default(),
            computing: Mutex::default(),
        });
        match options.kind {
            ModelKind::Embedding | ModelKind::Reranker => Self::start_encoding(options, shared),
            ModelKind::Llm | ModelKind::Vision => Self::start_generation(options, shared),
        }
    }

    fn start_generation(options: EngineOptions, shared: Arc<Shared>) -> Result<Self> {
        let (intake, intake_inbox) = crossbeam_channel::unbounded();
        let (worker, worker_inbox) = crossbeam_channel::unbounded();
        let ports = Ports::Generation { intake: intake.clone(), worker: worker.clone() };
        let (names, end) = (options.id.clone(), worker.clone());
        let worker_thread = {
            let (options, shared, worker) = (options.clone(), Arc::clone(&shared), worker.clone());
            spawn(format!("omlx-run {names}"), move || worker::main(&options, &worker_inbox, &worker, &shared))?
        };
        let intake_thread = {
            let shared = Arc::clone(&shared);
            spawn(format!("omlx-text {names}"), move || {
                intake::main(&intake_inbox, &shared, |request, ticket, sink| {
                    intake::admit(&options, &worker, &shared, request, ticket, sink);
                });
            })
        };
        let stop = move || {
            let _ = intake.send(Message::Stop);
            let _ = end.send(worker::Command::Stop);
        };
        Self::started(shared, ports, worker_thread, intake_thread, stop)
    }

    fn start_encoding(options: EngineOptions, shared: Arc<Shared>) -> Result<Self> {
        let (intake, intake_inbox) = crossbeam_channel::unbounded();
        let (worker, worker_inbox) = crossbeam_channel::unbounded();
        let ports = Ports::Encoding { intake: intake.clone() };
        let (names, end) = (options.id.clone(), worker.clone());
        let worker_thread = {
            let (options, shared) = (options.clone(), Arc::clone(&shared));
            spawn(format!("omlx-run {names}"), move || encode::worker::main(&options, &worker_inbox, &shared))?
        };
        let intake_thread = {
            let shared = Arc::clone(&shared);
            spawn(format!("omlx-text {names}"), move || {
                intake::main(&intake_inbox, &shared, |request, ticket, sink| {
                    encode::worker::submit(&options, &worker, &shared, request, ticket, sink);
                });
            })
        };
        let stop = move || {
            let _ = intake.send(Message::Stop);
            let _ = end.send(encode::worker::Command::Stop);
        };
        Self::started(shared, ports, worker_thread, intake_thread, stop)
    }

    /// An engine whose worker runs; without its intake it is ended again.
    fn started(
        shared: Arc<Shared>,
        ports: Ports,
        worker: JoinHandle<()>,
        intake: Result<JoinHandle<()>>,
        stop: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        let intake = match intake {
            Ok(thread) => thread,
            Err(error) => {
                stop();
                return Err(error);
            }
        };
        let threads = Threads::new(Box::new(stop), Arc::clone(&shared), vec![intake, worker]);
        Ok(Self { shared, threads, ports })
    }

    /// Accepts a request and returns at once; everything else that happens to it is told through its events. `Busy` if
    /// too many requests wait, `Unsupported` if the model does not generate text.
    pub fn submit(&self, request: Request) -> Result<Arc<RequestState>> {
        match &self.ports {
            Ports::Generation { intake, .. } => {
                let tells = request.tells_loading;
                self.accept(intake, request, tells)
            }
            Ports::Encoding { .. } => Err(Error::unsupported("the model does not generate text: it encodes it")),
        }
    }

    /// The same for texts to be encoded.
    pub fn encode(&self, request: EncodeRequest) -> Result<Arc<RequestState>> {
        match &self.ports {
            Ports::Encoding { intake } => {
                let tells = request.tells_loading;
                self.accept(intake, request, tells)
            }
            Ports::Generation { .. } => {
                Err(Error::unsupported("the model generates text: it gives no vectors and no scores"))
            }
        }
    }

    fn accept<R>(&self, intake: &Sender<Message<R>>, request: R, tells_loading: bool) -> Result<Arc<RequestState>> {
        let ticket = self.shared.queue.enter()?;
        let (state, sink) = RequestState::new(
            Arc::clone(&self.shared.id),
            Arc::clone(&self.shared.failure),
            self.shared.activity.enter(),
        );
        if tells_loading && self.loaded().is_none() {
            self.shared.loading.tell(&state);
        }
        if let Err(rejected) = intake.send(Message::Submit(Box::new(request), ticket, sink)) {
            rejected.into_inner().fail(self.shared.reason());
        }
        Ok(state)
    }

    /// What the engine tells about itself.
    pub fn metrics(&self) -> EngineMetrics {
        let computing = *lock(&self.shared.computing);
        let step_age_seconds = computing.map_or(0.0, |began| began.elapsed().as_secs_f64());
        EngineMetrics { step_age_seconds, ..*lock(&self.shared.metrics) }
    }

    /// Whether it caches keys and values: not those of encoders.
    pub fn has_cache(&self) -> bool {
        matches!(self.ports, Ports::Generation { .. })
    }

    /// Asks something of the cache; blocks until the step that is being planned is launched.
    pub fn cache<T>(&self, command: impl FnOnce(Sender<T>) -> CacheCommand) -> Result<T> {
        let Ports::Generation { worker, .. } = &self.ports else { return Err(no_cache()) };
        self.wait_ready()?;
        self.shared.activity.touch();
        let (answer, answered) = crossbeam_channel::bounded(1);
        let gone = || self.shared.reason();
        worker.send(worker::Command::Cache(command(answer))).map_err(|_| gone())?;
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
        self.shared.loading.bytes()
    }

    /// Asks the engine to give back the memory that no request uses; returns at once.
    pub fn release_memory(&self) {
        if let Ports::Generation { worker, .. } = &self.ports {
            let (answer, _) = crossbeam_channel::bounded(1);
            // An engine that has ended has given back everything.
            let _ = worker.send(worker::Command::Cache(CacheCommand::Release(answer)));
        }
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
