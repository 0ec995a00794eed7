//! The thread that owns a model's arrays: plan, run, commit.

mod exchange;
mod growth;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select};

use super::identity::ModelIdentity;
use super::memory::EngineMemory;
use super::metrics::EngineMetrics;
use super::restore::{Restores, Then, read_ahead};
use super::runner::{Launched, Runner};
use super::scheduler::{Limits, Scheduler, StepPlan};
use super::sequence::{Prepared, Sequence, SequenceId};
use super::states::States;
use super::threads::end_before_exit;
use super::tiers::{CROWDED, ModelTiers, Rows, SPAN_TOKENS, Whereabouts};
use super::turns::{Seat, Turn};
use super::{EngineOptions, LoadedInfo, ModelSource, Phase, Shared, run_to_the_end};
use crate::cache::share::{Users, shares};
use crate::cache::snapshots::Snapshots;
use crate::cache::{BlockCounts, BlockManager, Pages};
use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::fault;
use crate::kernels::{self, PANIC_MARK};
use crate::ledger::{Account, Uses};
use crate::models;
use crate::panics;
use crate::sync::lock;
use crate::text::TextModel;
use crate::weights::{Planned, Weights};
use exchange::Saving;
use growth::Growth;

/// What other threads ask of the worker.
#[derive(Debug)]
pub enum Command {
    /// Run a request.
    Admit(Box<Prepared>, Option<Arc<TextModel>>),
    /// A request was cancelled, or its reader caught up.
    Wake,
    /// Something about the cache.
    Cache(CacheCommand),
    /// What stands for the model in other tiers is known, or will not be.
    Identified(Result<([u8; 32], ModelIdentity)>),
    /// Rows that a restore asked for: which restore, which of its fetches, and the rows if they came.
    Fetched(u64, usize, Option<Rows>),
    /// End all requests and return.
    Stop,
}

/// What hosts ask of an engine's cache; answers go to the senders.
#[derive(Debug)]
pub enum CacheCommand {
    /// Forget everything in the pools that no sequence uses and no pin holds: how many bytes became free.
    Clear(Sender<usize>),
    /// Keep what is cached of the beginning of these tokens: for how many tokens.
    Pin(Vec<u32>, Sender<usize>),
    /// End the pin of these tokens: whether there was one.
    Unpin(Vec<u32>, Sender<bool>),
    /// Hand everything that is in the pools alone to the other tiers: whether nothing was lost.
    Save(Sender<bool>),
    /// Bring what other tiers have of these tokens: how many tokens are in the pools then.
    Prefetch(Vec<u32>, Sender<usize>),
    /// Where the rows of these tokens are.
    Find(Vec<u32>, Sender<Whereabouts>),
    /// Give back the memory that no sequence uses: how many bytes. What it held goes to the other tiers.
    Release(Sender<u64>),
}

/// An idle engine gives memory back after this time.
const IDLE: Duration = Duration::from_secs(5);

/// Bytes of an engine that are no arrays: graphs, threads, and what the C library holds back.
const OVERHEAD: usize = 8 << 20;

/// Tokens of an answer for which the cache has memory from the beginning.
const FIRST_ANSWER: usize = 256;

/// One part in so many of the cache is for snapshots of states, where a model has states.
const SNAPSHOT_PART: usize = 4;

/// Snapshots at most: they are looked through one by one.
const MOST_SNAPSHOTS: usize = 256;

/// Requests wait this long at most for the files of a loaded model to be identified, where other tiers may have their rows.
const IDENTIFYING: Duration = Duration::from_secs(5);

/// How often an engine looks at sequences that could not go on.
const PAUSED: Duration = Duration::from_millis(20);

/// Loads the model, serves requests until told to stop, and returns all memory to the system.
///
/// `myself` leads to `inbox`.
pub fn main(options: &EngineOptions, inbox: &Receiver<Command>, myself: &Sender<Command>, shared: &Shared) {
    run_to_the_end(options, shared, |account| {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let identity = options.tiers.exist().then(|| ModelIdentity::new(options));
            // Closed when the weights are there, or will not be.
            let (loading, loaded) = crossbeam_channel::bounded::<()>(0);
            if let Some(identity) = identity {
                let ended = &ended;
                let identify = move || {
                    // Asked before anything is read: hashes that are remembered are there before the model is. Two that
                    // read the same files would share the disk; the second one finds them in memory.
                    let interrupted = || {
                        let _ = loaded.recv();
                        ended.load(Ordering::Relaxed) || shared.failure.get().is_some()
                    };
                    let identified = panics::catch(|| {
                        let identity = identity?;
                        fault::pause("identity.slow", &options.id);
                        fault::point("identity.fails", &options.id);
                        identity.fingerprint(&options.tiers, &interrupted).map(|fingerprint| (fingerprint, identity))
                    });
                    let _ = myself.send(Command::Identified(identified.and_then(|identified| identified)));
                };
                let thread = std::thread::Builder::new().name(format!("omlx-hash {}", options.id));
                thread.spawn_scoped(scope, identify).map_err(|e| Error::io("starting an engine thread", &e))?;
            }
            let served =
                crate::mlx::on_device(options.device, || serve(options, inbox, myself, shared, account, loading));
            ended.store(true, Ordering::Relaxed);
            served
        })
    });
    // Requests that nobody will read any more end here, through their sinks.
    while inbox.try_recv().is_ok() {}
}

fn serve(
    options: &EngineOptions,
    inbox: &Receiver<Command>,
    myself: &Sender<Command>,
    shared: &Shared,
    account: &Account,
    loading: Sender<()>,
) -> Result<()> {
    let started = Instant::now();
    let Loaded { mut runner, weight_bytes, memory, read_ahead } = load(options, shared, account)?;
    drop(loading);
    let info = LoadedInfo { weight_bytes, load_seconds: started.elapsed().as_secs_f64() };
    end_before_exit();
    let (layers, beside) = (runner.stops(), runner.computes_beside());
    let snapshots = snapshots(options, runner.states());
    let state_bytes = snapshots.as_ref().map_or(0, |(_, bytes)| *bytes);
    let pages = runner.pages();
    let block_bytes: Vec<usize> = (0..pages.layout().groups.len()).map(|group| pages.block_bytes(group)).collect();
    let groups: Vec<_> = pages.layout().groups.iter().copied().zip(block_bytes.iter().copied()).collect();
    let (sequences, chunk) = (options.max_sequences, options.prefill_chunk);
    let users = Users { sequences, chunk, block_tokens: pages.block_tokens() };
    let limits = Limits {
        sequences: options.max_sequences,
        prefill_chunk: options.prefill_chunk,
        layers,
        beside,
        target_latency: options.target_latency,
        blocks: shares(options.cache_bytes - state_bytes, &groups, users),
    };
    let most_blocks = limits.blocks.clone();
    // The fingerprint of the model takes the place of this key when blocks leave the process.
    let blocks = BlockManager::new(pages.block_tokens(), &pages.layout().groups, [0; 32]);
    let blocks = match snapshots {
        Some((snapshots, _)) => blocks.with_snapshots(snapshots),
        None => blocks,
    };
    let metrics = EngineMetrics {
        block_tokens: pages.block_tokens(),
        block_bytes: block_bytes.iter().sum(),
        blocks_limit: most_blocks.iter().sum(),
        weight_bytes,
        workspace_bytes: memory.workspace() as usize,
        ..EngineMetrics::default()
    };
    let mut worker = Worker {
        most_blocks,
        block_bytes,
        yields: false,
        memory,
        options,
        shared,
        myself,
        seat: options.turns.seat(),
        runner,
        scheduler: Scheduler::new(limits, blocks),
        tiers: None,
        unidentified: options.tiers.exist(),
        // Where no tier knows its name there is nothing to wait for.
        identifying: options.tiers.know(&options.id).then(|| Instant::now() + IDENTIFYING),
        restores: Restores::new(read_ahead),
        saving: Saving::default(),
        metrics,
        told_tokens: 0,
        in_flight: None,
        stepping: false,
        committed: started,
        growth: Growth::default(),
        next_id: 0,
    };
    // Whoever asks a loaded engine learns the size of its blocks.
    worker.publish();
    shared.ready(info);
    let outcome = panics::catch(|| worker.run(inbox)).and_then(|outcome| outcome);
    worker.end_restores();
    if outcome.is_ok() {
        worker.scheduler.end_all(&shared.reason());
        worker.scheduler.tell_ends();
        worker.save_at_the_end();
    }
    let defect = outcome.err().map(|error| error.context(format!("engine {}", options.id)));
    if let Some(error) = &defect {
        // Poisoned: no new request may reach this engine once its running ones hear of it.
        shared.set(Phase::Ended(error.clone()));
    }
    worker.scheduler.fail_all(&shared.reason());
    worker.scheduler.tell_ends();
    defect.map_or(Ok(()), Err)
}

/// The slots of a model with states, and the part of the cache's bytes that its snapshots may take.
fn snapshots(options: &EngineOptions, states: &States) -> Option<(Snapshots, usize)> {
    if states.is_empty() {
        return None;
    }
    let bytes = options.cache_bytes / SNAPSHOT_PART;
    let more = (bytes / states.slot_bytes().max(1)).min(MOST_SNAPSHOTS);
    Some((Snapshots::new(options.max_sequences, states.slots() + more), more * states.slot_bytes()))
}

/// A model that is there, and the memory that was taken for it.
struct Loaded<'a> {
    runner: Runner,
    weight_bytes: usize,
    memory: EngineMemory<'a>,
    /// Bytes that may be on their way from other tiers.
    read_ahead: u64,
}

fn load<'a>(options: &EngineOptions, shared: &Shared, account: &'a Account) -> Result<Loaded<'a>> {
    let (config, weights) = match &options.source {
        ModelSource::Folder(folder) => {
            let config = ModelConfig::load(folder)?;
            models::check_supported(&config)?;
            let weights = Weights::open(folder, &config, options.dtype)?;
            (config, weights)
        }
        ModelSource::Random(config) => (config.clone(), Weights::random(config, options.dtype)),
    };
    let context = models::context_length(&config, options.context)?;
    // Waiting for room may take a while, and an unload or close must not wait for it.
    let failure = Arc::clone(&shared.failure);
    let interrupted = || failure.get().cloned();
    let (memory, read_ahead) = begin(options, account, &config, context, &weights.planned(), interrupted)
        .map_err(|error| error.context(format!("model {:?}", options.id)))?;
    let planned = weights.planned().bytes;
    let weights = weights.computed_by(options.backend.clone()).watched_by(shared.watch(planned));
    let loaded = models::load(&config, context, weights)?;
    // Of what was put together, the parts.
    crate::mlx::return_free_memory();
    memory.loaded(loaded.weight_bytes as u64);
    let pages = Pages::new(options.backend.clone(), loaded.model.kv_layout(), options.block_tokens)?;
    let slots = Snapshots::reserve(options.max_sequences);
    let states = States::new(&options.backend, &loaded.model.state_layouts(), slots)?;
    let vocab = models::vocab_size(&config)?;
    let (id, backend) = (options.id.clone(), options.backend.clone());
    let runner = Runner::new(id, loaded.model, vocab, backend, pages, states, !options.overlap);
    Ok(Loaded { runner, weight_bytes: loaded.weight_bytes, memory, read_ahead })
}

/// Takes the memory for the weights, for steps, for rows on their way to and from other tiers, and for the cache of one
/// step's prompt and its answer. Also returns how much may be read ahead of other tiers.
fn begin<'a>(
    options: &EngineOptions,
    account: &'a Account,
    config: &ModelConfig,
    context: usize,
    weights: &Planned,
    interrupted: impl Fn() -> Option<Error>,
) -> Result<(EngineMemory<'a>, u64)> {
    let plan = models::plan(config)?;
    let rows = options.prefill_chunk.min(context) + options.max_sequences;
    // Some numbers are converted as they are read.
    let steps = plan.workspace(rows, options.max_sequences).max(weights.largest) + OVERHEAD;
    let float = if weights.float_bytes > 0 { weights.float_bytes } else { size_of::<f32>() };
    let tokens = (options.prefill_chunk + FIRST_ANSWER).min(context);
    let cache = float * plan.sequence_numbers(tokens, options.prefill_chunk, options.block_tokens);
    let cache = cache.min(options.cache_bytes);
    let span = (plan.token_numbers() * float * SPAN_TOKENS).max(plan.state_bytes) as u64;
    let counts = !options.device.has_own_memory();
    let read_ahead = read_ahead(span, counts.then(|| options.ledger.status().limit));
    // With the span that is being saved.
    let on_their_way = if counts && options.tiers.exist() { read_ahead + span } else { 0 };
    let states = (plan.state_bytes * Snapshots::reserve(options.max_sequences)) as u64;
    let workspace = steps as u64 + states + on_their_way;
    let uses = Uses { weights: weights.bytes as u64, workspace, cache: cache as u64, ..Uses::default() };
    let memory = EngineMemory::begin(account, uses, interrupted)?;
    // What others gave back in the ledger is to be free in the system, too.
    crate::mlx::return_free_memory();
    Ok((memory, read_ahead))
}

struct Worker<'a> {
    options: &'a EngineOptions,
    shared: &'a Shared,
    myself: &'a Sender<Command>,
    seat: Seat,
    runner: Runner,
    scheduler: Scheduler,
    memory: EngineMemory<'a>,
    /// Blocks of each group that there may be if there is memory for them.
    most_blocks: Vec<usize>,
    /// Bytes of a block of each group.
    block_bytes: Vec<usize>,
    /// All that is there is to be given back.
    yields: bool,
    /// Rows outside the pools, once the model is identified.
    tiers: Option<ModelTiers>,
    /// It will be, or nobody knows yet.
    unidentified: bool,
    /// Until when requests wait for that.
    identifying: Option<Instant>,
    restores: Restores,
    saving: Saving,
    metrics: EngineMetrics,
    /// Computed tokens that the tiers have been told of.
    told_tokens: u64,
    /// The step before the one that is being planned, and when it was launched.
    in_flight: Option<(Launched, Instant)>,
    /// The last turn had a step, so someone may wait for the next one.
    stepping: bool,
    /// When the last step was read.
    committed: Instant,
    growth: Growth,
    next_id: SequenceId,
}

impl Worker<'_> {
    /// The engine loop: each turn plans and launches step n, then reads and commits step n-1, or n where steps do not overlap.
    ///
    /// Returns when told to stop; errors only for defects, after which the engine must not go on.
    fn run(&mut self, inbox: &Receiver<Command>) -> Result<()> {
        loop {
            if !self.pause(inbox)? {
                return Ok(());
            }
            while let Ok(command) = inbox.try_recv() {
                if !self.handle(command)? {
                    return Ok(());
                }
            }
            let began = Instant::now();
            self.restore()?;
            if self.scheduler.piece_ends() {
                self.settle()?;
            }
            for gone in self.scheduler.reap_cancelled() {
                self.runner.remove(gone);
            }
            self.resize()?;
            self.grow_states()?;
            if std::mem::take(&mut self.yields) {
                self.settle()?;
                self.scheduler.preempt_all();
                self.give_back()?;
            }
            // What grows while nothing runs grows to its end first: between steps it would delay tokens.
            if !self.stepping && self.runner.pages().is_resizing() {
                self.publish();
                continue;
            }
            let launched = self.launch()?;
            self.stepping = launched.is_some();
            // Others compute when this step has been read.
            let (launched, turn) = launched.unzip();
            let waited = turn.as_ref().map_or(Duration::ZERO, |turn| turn.waited);
            let launched = launched.map(|launched| (launched, began + waited));
            let ending = if self.options.overlap { std::mem::replace(&mut self.in_flight, launched) } else { launched };
            let idle = self.in_flight.is_none() && ending.is_none();
            if let Some((step, launched)) = ending {
                self.commit(step, launched)?;
            }
            if turn.as_ref().is_some_and(|turn| turn.shared) && self.runner.is_beside() {
                self.settle()?;
            }
            drop(turn);
            if self.in_flight.is_none() {
                *lock(&self.shared.computing) = None;
            }
            self.publish();
            self.save_ahead(idle);
            // With more blocks there may be something to do.
            if idle && !self.resize()? && !self.wait(inbox)? {
                return Ok(());
            }
        }
    }

    /// Leaves time to prompts beside the steps until the next step is due; false when told to stop.
    fn pause(&mut self, inbox: &Receiver<Command>) -> Result<bool> {
        let until = self.committed + self.scheduler.pause();
        while self.feed()? {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            select! {
                recv(inbox) -> command => {
                    let Ok(command) = command else { return Ok(false) };
                    if !self.handle(command)? {
                        return Ok(false);
                    }
                }
                recv(self.runner.progress()) -> _ => {}
                default(left) => break,
            }
        }
        Ok(true)
    }

    /// Has prompts beside the steps go on; whether there are any.
    fn feed(&mut self) -> Result<bool> {
        if let Err(error) = self.runner.feed() {
            self.fail(error)?;
        }
        self.note_stop();
        Ok(self.runner.is_beside())
    }

    /// Tells the scheduler how far prompts beside the steps have come, if they have stopped.
    fn note_stop(&mut self) {
        if let Some(layer) = self.runner.stopped() {
            self.scheduler.passed(layer);
        }
    }

    /// Waits for a command; false when it is the last one.
    fn wait(&mut self, inbox: &Receiver<Command>) -> Result<bool> {
        let waits = !self.scheduler.is_idle() || !self.restores.is_empty() || self.saving.all;
        let time = if self.saving.all { CROWDED } else { PAUSED };
        let command = match inbox.recv_timeout(if waits { time } else { IDLE }) {
            // A reader that is behind nudges when it has caught up; but nobody should have to rely on a nudge.
            Err(RecvTimeoutError::Timeout) if waits => return Ok(true),
            Err(RecvTimeoutError::Timeout) if self.tiers.is_some() && self.scheduler.blocks().unsaved() > 0 => {
                self.saving.all = true;
                return Ok(true);
            }
            Err(RecvTimeoutError::Timeout) => {
                self.shrink()?;
                self.publish();
                inbox.recv().ok()
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Ok(command) => Some(command),
        };
        command.map_or(Ok(false), |command| self.handle(command))
    }

    /// Whether to go on; errors only for defects.
    fn handle(&mut self, command: Command) -> Result<bool> {
        match command {
            Command::Admit(prepared, text) => {
                let choices = prepared.choices as SequenceId;
                let sequences = Sequence::of_request(self.next_id, *prepared, text, Instant::now());
                sequences.iter().for_each(|new| self.runner.add(new.id(), new.prompt(), new.sampling()));
                self.next_id += choices;
                let prompt: Arc<[u32]> = sequences.first().map_or(Arc::default(), |first| first.prompt().into());
                self.bring(prompt, Then::Run(sequences))?;
            }
            Command::Wake => {}
            Command::Cache(command) => {
                self.handle_cache(command)?;
                self.publish();
            }
            Command::Identified(fingerprint) => self.identified(fingerprint)?,
            Command::Fetched(restore, fetch, rows) => self.restores.arrived(restore, fetch, rows),
            Command::Stop => return Ok(false),
        }
        Ok(true)
    }

    fn launch(&mut self) -> Result<Option<(Launched, Turn)>> {
        let mut ended = Vec::new();
        let started = Instant::now();
        let mut plan = self.scheduler.plan(started, &mut ended);
        if self.runner.is_beside() && (plan.runs.is_empty() || !plan.copies.is_empty()) {
            // Nobody waits for a token, or the step copies what others may be writing.
            if !self.settle()? {
                return Ok(None);
            }
            if plan.runs.is_empty() {
                plan = self.scheduler.plan(started, &mut ended);
            }
        }
        self.metrics.host_seconds += started.elapsed().as_secs_f64();
        ended.into_iter().for_each(|id| self.runner.remove(id));
        if !self.save_evicted()? || plan.runs.is_empty() {
            return Ok(None);
        }
        let turn = self.seat.take();
        lock(&self.shared.computing).get_or_insert_with(Instant::now);
        fault::point("worker.step", &self.options.id);
        fault::pause("worker.slow", &self.options.id);
        match self.launch_plan(&plan) {
            Ok(None) => Ok(None),
            Ok(Some(launched)) => {
                self.metrics.build_seconds += launched.build.as_secs_f64();
                self.metrics.encode_seconds += launched.encode.as_secs_f64();
                Ok(Some((launched, turn)))
            }
            Err(error) => self.fail(error).map(|()| None),
        }
    }

    /// Launches a step; `None` if the one before it failed. Where sequences are guided, the device computes what this step draws
    /// from while the tokens of the step before are read, on which the masks depend.
    fn launch_plan(&mut self, plan: &StepPlan) -> Result<Option<Launched>> {
        let step = self.runner.describe(plan)?;
        if !self.scheduler.guides(plan) {
            return self.runner.launch(step, None).map(Some);
        }
        step.begin()?;
        let mut ended = Vec::new();
        if self.scheduler.waits_for_masks(plan)
            && let Some((before, launched)) = self.in_flight.take()
        {
            match self.read(before, launched)? {
                Some(all) => ended = all,
                None => {
                    step.abandon();
                    let _ = kernels::check();
                    return Ok(None);
                }
            }
        }
        let mut mask = |id| self.scheduler.mask(id);
        let launched = self.runner.launch(step, Some(&mut mask));
        // This step has rows of theirs.
        ended.into_iter().for_each(|id| self.runner.remove(id));
        launched.map(Some)
    }

    fn commit(&mut self, step: Launched, launched: Instant) -> Result<()> {
        let ended = self.read(step, launched)?.unwrap_or_default();
        ended.into_iter().for_each(|id| self.runner.remove(id));
        Ok(())
    }

    /// Reads a step and passes its tokens on; returns the sequences that have ended with it, or `None` if it failed, and all
    /// have.
    fn read(&mut self, step: Launched, launched: Instant) -> Result<Option<Vec<SequenceId>>> {
        let (decodes, work, parallel) = (step.decodes, step.work, step.parallel);
        let waiting = Instant::now();
        let tokens = match self.runner.read(step) {
            Ok(tokens) => tokens,
            Err(error) => return self.fail(error).map(|()| None),
        };
        self.note_stop();
        let now = Instant::now();
        // Of the step behind it, if there is one.
        *lock(&self.shared.computing) = Some(now);
        // It began when it was launched, or when the step before it had ended; the pools grew behind it.
        let time = now - launched.max(self.committed);
        let seconds = time.saturating_sub(self.growth.turn).as_secs_f64();
        self.committed = now;
        match parallel {
            true => self.scheduler.observe_beside(seconds),
            false => self.scheduler.observe(seconds, decodes, work),
        }
        self.metrics.steps += 1;
        self.metrics.parallel_steps += u64::from(parallel);
        self.metrics.wait_seconds += (now - waiting).as_secs_f64();
        self.metrics.step_seconds += seconds;
        let ended = tokens.into_iter().filter_map(|(id, sampled)| self.scheduler.commit(id, sampled, now)).collect();
        self.scheduler.tell_tokens();
        self.metrics.host_seconds += now.elapsed().as_secs_f64();
        Ok(Some(ended))
    }

    /// Ends the running sequences: what a failed step has written may be anything. A defect is passed on.
    fn fail(&mut self, error: Error) -> Result<()> {
        tracing::error!(model = self.options.id, %error, "a step failed");
        // What the step behind it and its kernels note is part of this failure, not of the next step's.
        if let Some((step, _)) = self.in_flight.take() {
            let _ = self.runner.read(step);
        }
        let _ = self.runner.stop_beside();
        self.runner.stopped();
        let _ = kernels::check();
        if error.status() == Status::Internal || error.message().contains(PANIC_MARK) {
            return Err(Error::internal(error.message()));
        }
        for ended in self.scheduler.fail_running(&error) {
            self.runner.remove(ended);
        }
        Ok(())
    }

    /// Lets others see how things stand, and hosts hear which answers have ended.
    fn publish(&mut self) {
        let blocks = self.scheduler.blocks();
        let counts: Vec<BlockCounts> = (0..blocks.groups()).map(|group| blocks.counts(group)).collect();
        self.metrics.count(self.scheduler.counters(), &counts, &self.block_bytes);
        self.metrics.cache_entries = self.scheduler.blocks().entries();
        self.metrics.cache_bytes = self.cache_bytes();
        self.metrics.queued_requests = self.shared.queue.waiting();
        *lock(&self.shared.metrics) = self.metrics;
        if let Some(tiers) = &self.tiers {
            let computed = self.metrics.prompt_tokens + self.metrics.completion_tokens;
            tiers.count_new(computed - std::mem::replace(&mut self.told_tokens, computed));
        }
        self.scheduler.tell_ends();
    }
}
