//! The engine pool: which models there are, which are loaded, and where a request goes.

mod cache;
mod catalogue;
mod cgroup;
mod download;
mod keeper;
mod memory;
mod metrics;
mod models;
mod policy;
mod settings;
mod status;
mod tiers;

pub use crate::cache::ssd::Codec;
pub use catalogue::{Catalogue, ModelEntry};
pub use memory::{Machine, MemoryLimit, Reading, ThisMachine};
pub use models::ModelInfo;
pub use policy::Pressure;
pub use settings::{KindSetting, ModelSettings};
pub use tiers::{TierLimits, TierOptions, TierSet};

use catalogue::ModelFolders;
use settings::SettingsFile;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mlx_rs::Dtype;

use crate::engine::{
    EncodeRequest, EncodeTask, Engine, EngineMetrics, EngineOptions, LazyText, LoadedInfo, ModelSource, Request,
    RequestState, Tiers, Turns,
};
use crate::error::{Error, Result, Status};
use crate::kernels::{Backend, Cpu, Gpu, Precision};
use crate::ledger::{Account, Ledger, Part};
use crate::mlx::{self, Device};
use crate::models::ModelKind;
use crate::sync::lock;

/// Options of a pool; `Default` is what a host gets that sets nothing.
#[derive(Debug, Clone, Default)]
pub struct PoolOptions {
    /// Folder of model folders (flat or `org/model`), or one model folder; `None` opens an empty pool.
    pub models_dir: Option<PathBuf>,
    /// Model of requests that name none; `None` takes the only usable one.
    pub default_model: Option<String>,
    /// Where to compute; `None` takes the GPU if there is one.
    pub device: Option<Device>,
    /// Type of weights, keys and values; `None` is the checkpoint's own. Activations have the same on a GPU, and are
    /// f32 on the CPU.
    pub dtype: Option<Dtype>,
    /// Threads that the CPU kernels of all engines share; `None` is the number of physical cores.
    pub threads: Option<usize>,
    /// How products with quantised weights are computed on the CPU.
    pub precision: Precision,
    /// Upper limit of every model's context in tokens.
    pub context: Option<usize>,
    /// Prompt tokens in one forward pass; `None` is [`default_prefill_chunk`].
    pub prefill_chunk: Option<usize>,
    /// Tokens of a block of the KV cache, a power of two from 8 to 256; `None` is [`DEFAULT_BLOCK_TOKENS`].
    pub block_tokens: Option<usize>,
    /// Bytes that the KV cache of each model may take; `None` is an eighth of the machine's memory.
    pub cache_bytes: Option<usize>,
    /// Sequences of a model that run at the same time; `None` is [`DEFAULT_SEQUENCES`].
    pub max_sequences: Option<usize>,
    /// Requests that may wait for a model; `None` is [`DEFAULT_QUEUE`].
    pub queue_length: Option<usize>,
    /// What a step should take while answers are running; `None` is [`DEFAULT_LATENCY`].
    pub target_latency: Option<Duration>,
    /// Whether a step is launched before the tokens of the one before it have been read; `None` does so on a GPU. On the CPU
    /// MLX takes over the nodes of a step only about as fast as it computes them: tokens would come late, and nothing sooner.
    pub overlap: Option<bool>,
    /// Do not set the environment variables that MLX reads, nor how the C library takes memory from the system.
    pub keep_environment: bool,
    /// What is cached outside the pools.
    pub tiers: TierOptions,
    /// Memory that all models may take together.
    pub memory: MemoryLimit,
    /// How long a model stays without requests; `None`: until its memory is needed.
    pub ttl: Option<Duration>,
    /// File that keeps what is settled about models; `None` forgets it when the pool closes.
    pub settings_file: Option<PathBuf>,
    /// A cache of the Hugging Face hub whose models are in the pool, too; empty is the standard one, which need not exist.
    pub hub_cache: Option<PathBuf>,
}

/// Prompt tokens in one forward pass by default: enough that weights are read and unpacked for many rows at once. On
/// the CPU not more, since a cancel, an unload and an exit wait for the passes that are on their way.
pub fn default_prefill_chunk(device: Device) -> usize {
    match device {
        Device::Cpu => 128,
        Device::Gpu => 2048,
    }
}

/// Tokens of a block of the KV cache by default.
pub const DEFAULT_BLOCK_TOKENS: usize = 32;

/// Sequences of a model that run at the same time by default.
pub const DEFAULT_SEQUENCES: usize = 8;

/// Requests that may wait for a model by default.
pub const DEFAULT_QUEUE: usize = 64;

/// What a step should take by default while answers are running: at 20 tokens a second text flows.
pub const DEFAULT_LATENCY: Duration = Duration::from_millis(50);

/// More threads than any machine has cores.
const MAX_THREADS: usize = 1024;

/// Several models in one process. All methods may be called from any thread.
#[derive(Debug)]
pub struct EnginePool {
    device: Device,
    dtype: Option<Dtype>,
    backend: Backend,
    context: Option<usize>,
    prefill_chunk: usize,
    block_tokens: usize,
    cache_bytes: usize,
    max_sequences: usize,
    queue_length: usize,
    target_latency: Duration,
    overlap: bool,
    tiers: Tiers,
    turns: Arc<Turns>,
    default_model: Option<String>,
    downloads: download::Downloads,
    /// Looked into by one thread at a time.
    folders: Mutex<ModelFolders>,
    /// What the hot tier, and rows that wait to be written, may take of the ledger, where they lie in the same memory.
    hot: Account,
    shared: Arc<Shared>,
    /// The keeper ends when it is gone.
    wake: keeper::Wake,
}

/// What the pool shares with its keeper, and with downloads, which hold it weakly.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ledger: Arc<Ledger>,
    device: Device,
    /// Freed arrays that MLX keeps for the next step.
    buffers: Account,
    limit: Mutex<MemoryLimit>,
    ttl: Option<Duration>,
    /// Until the pool closes: whoever held them longer would keep their folder locked.
    tiers: Mutex<Option<Tiers>>,
    /// The last one.
    reading: Mutex<Reading>,
    footprint_at_open: u64,
}

#[derive(Debug)]
struct State {
    catalogue: Catalogue,
    settings: SettingsFile,
    engines: HashMap<String, Slot>,
    /// Engines that end their last requests, while later ones go to their successors.
    draining: Vec<Arc<Engine>>,
    /// Engines that were told to stop, or failed, and may still be running down.
    retiring: Vec<Arc<Engine>>,
    closed: bool,
}

/// A model in use: its text side, and its engine while that lives.
#[derive(Debug)]
struct Slot {
    text: Arc<LazyText>,
    engine: Option<Arc<Engine>>,
    /// When its cache was last asked to give memory back.
    shrunk: Option<Instant>,
    /// What is settled for its requests.
    defaults: Arc<Request>,
}

/// A usable model of the catalogue.
struct Known {
    id: String,
    source: ModelSource,
    kind: ModelKind,
}

impl EnginePool {
    /// Checks MLX and lists the models; loads nothing.
    pub fn open(options: PoolOptions) -> Result<Self> {
        Self::open_on(options, Box::new(ThisMachine::default()))
    }

    /// The same on a machine whose memory stands as `machine` says: for tests.
    pub fn open_on(options: PoolOptions, mut machine: Box<dyn Machine>) -> Result<Self> {
        mlx::init()?;
        if !options.keep_environment {
            mlx::set_environment();
            mlx::map_large_blocks();
        }
        let device = match options.device {
            Some(Device::Gpu) if !mlx::gpu_available() => {
                return Err(Error::unsupported("a GPU was asked for, but the loaded MLX has none"));
            }
            Some(device) => device,
            None if mlx::gpu_available() => Device::Gpu,
            None => Device::Cpu,
        };
        if let Some(threads) = options.threads.filter(|&threads| threads == 0 || threads > MAX_THREADS) {
            return Err(Error::invalid_argument(format!("{threads} threads; 1 to {MAX_THREADS} are possible")));
        }
        if let Some(tokens) = options.block_tokens.filter(|n| !n.is_power_of_two() || !(8..=256).contains(n)) {
            let what = format!("blocks of {tokens} tokens; a power of two from 8 to 256 is possible");
            return Err(Error::invalid_argument(what));
        }
        if options.max_sequences == Some(0) || options.queue_length == Some(0) {
            return Err(Error::invalid_argument("at least one sequence must run, and one request wait"));
        }
        let settings = SettingsFile::open(options.settings_file)?;
        let folders = ModelFolders { models: options.models_dir.clone(), hub_cache: options.hub_cache };
        let mut catalogue = Catalogue::new(&settings);
        catalogue.update(folders.scan()?, &[], |_| false);
        let block_tokens = options.block_tokens.unwrap_or(DEFAULT_BLOCK_TOKENS);
        let reading = machine.read();
        let limit = keeper::first_limit(options.memory, device, &reading)?;
        let ledger = Ledger::new(limit);
        let (wake, woken) = crossbeam_channel::bounded(1);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                catalogue,
                settings,
                engines: HashMap::new(),
                draining: Vec::new(),
                retiring: Vec::new(),
                closed: false,
            }),
            ledger: Arc::clone(&ledger),
            device,
            buffers: ledger.open_for_good("buffers"),
            limit: Mutex::new(options.memory),
            ttl: options.ttl,
            tiers: Mutex::default(),
            reading: Mutex::new(reading),
            footprint_at_open: reading.footprint,
        });
        let waker = wake.clone();
        // Full: it is about to look anyway.
        ledger.on_shortage(move || {
            let _ = waker.try_send(());
        });
        let tiers = options.tiers.open(device, reading.total, limit)?;
        *lock(&shared.tiers) = Some(tiers.clone());
        let hot = ledger.open_for_good("tiers");
        if !device.has_own_memory() {
            hot.set(Part::Hot, tiers::host_bytes(&tiers));
        }
        let pool = Self {
            hot,
            device,
            dtype: options.dtype,
            backend: match device {
                Device::Cpu => Backend::Cpu(Cpu::new(options.threads, options.precision)),
                Device::Gpu => Backend::Gpu(Gpu::new(block_tokens)),
            },
            context: options.context,
            prefill_chunk: options.prefill_chunk.unwrap_or_else(|| default_prefill_chunk(device)),
            block_tokens,
            cache_bytes: options.cache_bytes.unwrap_or_else(|| mlx::physical_memory() / 8),
            max_sequences: options.max_sequences.unwrap_or(DEFAULT_SEQUENCES),
            queue_length: options.queue_length.unwrap_or(DEFAULT_QUEUE),
            target_latency: options.target_latency.unwrap_or(DEFAULT_LATENCY),
            overlap: options.overlap.unwrap_or(device == Device::Gpu),
            tiers,
            // A GPU divides its time by itself.
            turns: Turns::new(device == Device::Gpu),
            default_model: options.default_model,
            downloads: download::Downloads::new(options.models_dir),
            folders: Mutex::new(folders),
            shared,
            wake,
        };
        keeper::set_limit(&pool.shared, limit);
        keeper::start(&pool.shared, woken, machine)?;
        pool.preload();
        Ok(pool)
    }

    /// Begins to load what the settings say.
    fn preload(&self) {
        let mut state = lock(&self.shared.state);
        let preloaded = state.settings.models().filter(|(_, settings)| settings.preload);
        let wanted: Vec<String> = preloaded.map(|(id, _)| id.to_owned()).collect();
        wanted.iter().for_each(|id| self.load_ahead(&mut state, id));
    }

    fn load_ahead(&self, state: &mut State, id: &str) {
        if let Err(error) = self.engine_of(state, Some(id)) {
            tracing::warn!(model = id, %error, "not loaded ahead");
        }
    }

    /// Where this pool computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Accepts a request and returns at once; loading, rendering and tokenising happen on the engine's threads.
    ///
    /// Errors only for what can be told at once: an unknown model, a closed pool.
    pub fn generate(&self, request: Request) -> Result<Arc<RequestState>> {
        let mut state = lock(&self.shared.state);
        let (id, engine) = self.engine_of(&mut state, request.model.as_deref())?;
        let settings = state.settings.get(&id);
        let defaults = state.engines.get(&id).map(|slot| Arc::clone(&slot.defaults));
        let mut request = match defaults {
            Some(defaults) => request.or(&defaults),
            None => request,
        };
        request.context_limit = settings.context_length;
        // While nobody can take the engine for an idle one.
        engine.submit(request)
    }

    /// Accepts texts for an embedding model or a reranker, likewise. Its events are one result and the end.
    pub fn encode(&self, mut request: EncodeRequest) -> Result<Arc<RequestState>> {
        let mut state = lock(&self.shared.state);
        let kind = match request.task {
            EncodeTask::Embed { .. } => ModelKind::Embedding,
            EncodeTask::Rerank { .. } => ModelKind::Reranker,
        };
        let id = self.meant(&state, request.model.as_deref(), kind)?;
        let (id, engine) = self.engine_of(&mut state, Some(&id))?;
        request.context_limit = state.settings.get(&id).context_length;
        engine.encode(request)
    }

    /// Loads a model and blocks until it is ready.
    pub fn load(&self, id: &str) -> Result<LoadedInfo> {
        self.engine(Some(id))?.wait_ready()
    }

    /// Unloads a model and blocks until its memory is returned; returns how many bytes that were. Its requests end as
    /// cancelled, or are waited for with `drain`. Not loaded is not an error.
    pub fn unload(&self, id: &str, drain: bool) -> Result<u64> {
        let mut state = lock(&self.shared.state);
        let id = self.resolve_id(&state, Some(id))?;
        let engine = state.engines.get_mut(&id).and_then(|slot| slot.engine.take());
        let Some(engine) = engine else { return Ok(0) };
        if drain {
            state.draining.push(Arc::clone(&engine));
            let _ = self.wake.try_send(());
        } else {
            engine.stop(Error::new(Status::Cancelled, format!("model {id:?} was unloaded")));
            state.retiring.push(Arc::clone(&engine));
        }
        drop(state);
        let freed = engine.join_stopped();
        lock(&self.shared.state).retiring.retain(|other| !Arc::ptr_eq(other, &engine));
        Ok(freed)
    }

    /// Changes the memory that all models may take; what is beyond it goes as soon as it can.
    pub fn set_memory_limit(&self, limit: MemoryLimit) -> Result<()> {
        limit.check()?;
        *lock(&self.shared.limit) = limit;
        let (reading, used) = (*lock(&self.shared.reading), self.shared.ledger.status().used);
        keeper::set_limit(&self.shared, limit.bytes(self.device, &reading, used));
        Ok(())
    }

    /// Token ids of `text`; blocks while the tokenizer is read for the first time.
    pub fn tokenize(&self, model: Option<&str>, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.text(model)?.get()?.tokenizer()?.encode(text, add_special_tokens)
    }

    /// Text of `ids`, special tokens included; blocks like [`tokenize`](Self::tokenize).
    pub fn detokenize(&self, model: Option<&str>, ids: &[u32]) -> Result<String> {
        self.text(model)?.get()?.tokenizer()?.decode(ids, false)
    }

    /// The prompt that the model's chat template makes of a request; blocks like [`tokenize`](Self::tokenize).
    pub fn render(&self, request: &Request) -> Result<String> {
        let crate::engine::Input::Chat(chat) = &request.input else {
            return Err(Error::invalid_request("only a request with \"messages\" has a template to render"));
        };
        self.text(request.model.as_deref())?.get()?.render(chat)
    }

    /// What the loaded models tell about themselves, by id.
    pub fn metrics(&self) -> Vec<(String, EngineMetrics)> {
        let state = lock(&self.shared.state);
        let loaded = state.engines.iter().filter_map(|(id, slot)| Some((id, slot.engine.as_ref()?)));
        let loaded = loaded.filter(|(_, engine)| engine.loaded().is_some());
        let mut metrics: Vec<_> = loaded.map(|(id, engine)| (id.clone(), engine.metrics())).collect();
        metrics.sort_by(|a, b| a.0.cmp(&b.0));
        metrics
    }

    /// The metrics, those of the tiers and those of the pool as a JSON object.
    pub fn metrics_json(&self) -> String {
        self.numbers().json()
    }

    /// The same in Prometheus's text format.
    pub fn metrics_prometheus(&self) -> String {
        self.numbers().prometheus()
    }

    /// Ends all requests and refuses new ones; returns the engines that run down, without waiting for them.
    fn begin_close(&self) -> Vec<Arc<Engine>> {
        lock(&self.shared.tiers).take();
        let mut state = lock(&self.shared.state);
        state.closed = true;
        self.downloads.cancel();
        let engines: Vec<_> = state.engines.drain().filter_map(|(_, slot)| slot.engine).collect();
        let draining = std::mem::take(&mut state.draining);
        state.retiring.extend(engines.into_iter().chain(draining));
        for engine in &state.retiring {
            engine.stop(closed());
        }
        state.retiring.clone()
    }

    /// Ends all requests and downloads, and blocks until every engine is gone.
    pub fn close(&self) {
        for engine in self.begin_close() {
            engine.join();
        }
        self.downloads.wait();
    }

    /// The running engine of a model, started if need be; a failed one is replaced.
    fn engine(&self, id: Option<&str>) -> Result<Arc<Engine>> {
        Ok(self.engine_of(&mut lock(&self.shared.state), id)?.1)
    }

    fn engine_of(&self, state: &mut State, id: Option<&str>) -> Result<(String, Arc<Engine>)> {
        let Known { id, source, kind } = self.resolve(state, id)?;
        self.slot(state, &id, &source, kind)?;
        let State { engines, retiring, .. } = state;
        let slot = engines.get_mut(&id).ok_or_else(|| Error::internal("a model without a slot"))?;
        match slot.engine.take() {
            Some(engine) if engine.ended().is_none() => return Ok((id, Arc::clone(slot.engine.insert(engine)))),
            failed => {
                retiring.retain(|engine| !engine.is_gone());
                retiring.extend(failed);
            }
        }
        let engine = Arc::new(Engine::start(EngineOptions {
            id: id.clone(),
            source,
            kind,
            device: self.device,
            dtype: self.dtype,
            backend: self.backend.clone(),
            context: self.context,
            prefill_chunk: self.prefill_chunk,
            block_tokens: self.block_tokens,
            cache_bytes: self.cache_bytes,
            max_sequences: self.max_sequences,
            queue_length: self.queue_length,
            target_latency: self.target_latency,
            overlap: self.overlap,
            text: Arc::clone(&slot.text),
            tiers: self.tiers.clone(),
            ledger: Arc::clone(&self.shared.ledger),
            turns: Arc::clone(&self.turns),
        })?);
        slot.engine = Some(Arc::clone(&engine));
        // It watches what is loaded.
        let _ = self.wake.try_send(());
        Ok((id, engine))
    }

    fn text(&self, id: Option<&str>) -> Result<Arc<LazyText>> {
        let mut state = lock(&self.shared.state);
        let Known { id, source, kind } = self.resolve(&state, id)?;
        Ok(Arc::clone(&self.slot(&mut state, &id, &source, kind)?.text))
    }

    fn slot<'a>(&self, state: &'a mut State, id: &str, source: &ModelSource, kind: ModelKind) -> Result<&'a Slot> {
        let State { engines, settings, .. } = state;
        if !engines.contains_key(id) {
            let text = Arc::new(LazyText::new(source.clone(), kind, self.context));
            let defaults = Arc::new(settings.get(id).request()?);
            engines.insert(id.to_owned(), Slot { text, engine: None, shrunk: None, defaults });
        }
        engines.get(id).ok_or_else(|| Error::internal("a model without a slot"))
    }

    /// The model a request means, which must be usable.
    fn resolve(&self, state: &State, id: Option<&str>) -> Result<Known> {
        let id = self.resolve_id(state, id)?;
        let entry = state.catalogue.find(&id)?;
        Ok(Known { source: entry.source()?, kind: entry.kind.unwrap_or(ModelKind::Llm), id })
    }

    /// The id of the model that a request means by an id, an alias, or nothing.
    fn resolve_id(&self, state: &State, id: Option<&str>) -> Result<String> {
        self.meant(state, id, ModelKind::Llm)
    }

    /// The same for a request to a model of this kind; the default model counts where it is one.
    fn meant(&self, state: &State, id: Option<&str>, kind: ModelKind) -> Result<String> {
        if state.closed {
            return Err(closed());
        }
        let is_kind =
            |id: &&str| kind == ModelKind::Llm || state.catalogue.find(id).is_ok_and(|e| e.kind == Some(kind));
        let Some(id) = id.or(self.default_model.as_deref().filter(is_kind)) else {
            return Ok(state.catalogue.only(kind)?.id.clone());
        };
        match state.catalogue.find(id) {
            Ok(entry) => Ok(entry.id.clone()),
            Err(error) => state.settings.aliased(id).map(str::to_owned).ok_or(error),
        }
    }
}

impl Drop for EnginePool {
    fn drop(&mut self) {
        self.begin_close();
    }
}

fn closed() -> Error {
    Error::new(Status::Closed, "the pool is closed")
}
