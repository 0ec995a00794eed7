//! The thread that owns a model's arrays: plan, run, commit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::metrics::EngineMetrics;
use super::runner::{Launched, Runner};
use super::scheduler::{Limits, Scheduler};
use super::sequence::{Prepared, Sequence, SequenceId};
use super::threads::end_before_exit;
use super::{EngineOptions, LoadedInfo, ModelSource, Phase, Shared};
use crate::cache::{BlockManager, Pages};
use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::fault;
use crate::kernels::{self, PANIC_MARK};
use crate::models;
use crate::panics;
use crate::sync::lock;
use crate::text::TextModel;
use crate::weights::Weights;

/// What other threads ask of the worker.
#[derive(Debug)]
pub enum Command {
    /// Run a request.
    Admit(Box<Prepared>, Option<Arc<TextModel>>),
    /// A request was cancelled, or its reader caught up.
    Wake,
    /// Something about the cache; the answer goes to the sender.
    Cache(CacheCommand, Sender<usize>),
    /// End all requests and return.
    Stop,
}

/// What hosts ask of an engine's cache.
#[derive(Debug)]
pub enum CacheCommand {
    /// Forget everything that no sequence uses and no pin holds: how many blocks became free.
    Clear,
    /// Keep what is cached of the beginning of these tokens: for how many tokens.
    Pin(Vec<u32>),
    /// End the pin of these tokens: 1, or 0 if there was none.
    Unpin(Vec<u32>),
}

/// An idle engine gives memory back after this time.
const IDLE: Duration = Duration::from_secs(5);

/// How often an engine looks at sequences that could not go on.
const PAUSED: Duration = Duration::from_millis(20);

/// Loads the model, serves requests until told to stop, and returns all memory to the system.
pub fn main(options: &EngineOptions, inbox: &Receiver<Command>, shared: &Shared) {
    let outcome = panics::catch(|| {
        crate::mlx::init()?;
        crate::mlx::on_device(options.device, || serve(options, inbox, shared))
    });
    let error = match outcome {
        Ok(Ok(())) => super::stopped(),
        Ok(Err(error)) => error,
        Err(panic) => panic.context(format!("engine {}", options.id)),
    };
    tracing::debug!(model = options.id, reason = %error, "engine ended");
    shared.set(Phase::Ended(error));
    // Requests that nobody will read any more end here, through their sinks.
    while inbox.try_recv().is_ok() {}
}

fn serve(options: &EngineOptions, inbox: &Receiver<Command>, shared: &Shared) -> Result<()> {
    let started = Instant::now();
    let (mut runner, weight_bytes) = load(options, shared)?;
    let info = LoadedInfo { weight_bytes, load_seconds: started.elapsed().as_secs_f64() };
    tracing::info!(
        model = options.id,
        device = options.device.name(),
        weight_bytes,
        seconds = info.load_seconds,
        "loaded"
    );
    end_before_exit();
    shared.set(Phase::Ready(info));
    let pages = runner.pages();
    let limits = Limits {
        sequences: options.max_sequences,
        prefill_chunk: options.prefill_chunk,
        target_latency: options.target_latency,
        blocks: (options.cache_bytes / pages.block_bytes().max(1)).max(1),
    };
    // The fingerprint of the model takes the place of this key when blocks leave the process.
    let blocks = BlockManager::new(pages.block_tokens(), &pages.layout().groups, [0; 32]);
    let metrics = EngineMetrics {
        block_tokens: pages.block_tokens(),
        block_bytes: pages.block_bytes(),
        blocks_limit: limits.blocks,
        weight_bytes,
        ..EngineMetrics::default()
    };
    let scheduler = Scheduler::new(limits, blocks);
    let id = options.id.clone();
    let mut worker = Worker { id, shared, runner, scheduler, metrics, in_flight: None, committed: started, next_id: 0 };
    let outcome = panics::catch(|| worker.run(inbox)).and_then(|outcome| outcome);
    let defect = outcome.err().map(|error| error.context(format!("engine {}", options.id)));
    if let Some(error) = &defect {
        // Poisoned: no new request may reach this engine once its running ones hear of it.
        shared.set(Phase::Ended(error.clone()));
    }
    worker.scheduler.fail_all(&shared.reason());
    defect.map_or(Ok(()), Err)
}

fn load(options: &EngineOptions, shared: &Shared) -> Result<(Runner, usize)> {
    let (config, weights) = match &options.source {
        ModelSource::Folder(folder) => {
            let config = ModelConfig::load(folder)?;
            models::check_supported(&config)?;
            let weights = Weights::open(folder, &config, options.dtype)?;
            (config, weights)
        }
        ModelSource::Random(config) => (config.clone(), Weights::random(config, options.dtype)),
    };
    // Reading a large model takes a while; an unload or close must not wait for the rest of it.
    let failure = Arc::clone(&shared.failure);
    let weights = weights.computed_by(options.backend.clone()).interrupted_by(move || failure.get().cloned());
    let context = models::context_length(&config, options.context)?;
    let loaded = models::load(&config, context, weights)?;
    let pages = Pages::new(options.backend.clone(), loaded.model.kv_layout(), options.block_tokens)?;
    let runner =
        Runner::new(options.id.clone(), loaded.model, models::vocab_size(&config)?, options.backend.clone(), pages);
    Ok((runner, loaded.weight_bytes))
}

struct Worker<'a> {
    id: String,
    shared: &'a Shared,
    runner: Runner,
    scheduler: Scheduler,
    metrics: EngineMetrics,
    /// The step before the one that is being planned, and when it was launched.
    in_flight: Option<(Launched, Instant)>,
    /// When the last step was read.
    committed: Instant,
    next_id: SequenceId,
}

impl Worker<'_> {
    /// The engine loop: each turn plans and launches step n, then reads and commits step n-1.
    ///
    /// Returns when told to stop; errors only for defects, after which the engine must not go on.
    fn run(&mut self, inbox: &Receiver<Command>) -> Result<()> {
        loop {
            while let Ok(command) = inbox.try_recv() {
                if !self.handle(command) {
                    return Ok(());
                }
            }
            let turn = Instant::now();
            for gone in self.scheduler.reap_cancelled() {
                self.runner.remove(gone);
            }
            self.resize()?;
            let launched = self.launch()?;
            let before = std::mem::replace(&mut self.in_flight, launched.map(|launched| (launched, turn)));
            let idle = self.in_flight.is_none() && before.is_none();
            if let Some((step, launched)) = before {
                self.commit(step, launched)?;
            }
            self.publish();
            // With more blocks there may be something to do.
            if idle && !self.resize()? && !self.wait(inbox)? {
                return Ok(());
            }
        }
    }

    /// Waits for a command; false when it is the last one.
    fn wait(&mut self, inbox: &Receiver<Command>) -> Result<bool> {
        let waits = !self.scheduler.is_idle();
        let command = match inbox.recv_timeout(if waits { PAUSED } else { IDLE }) {
            // A reader that is behind nudges when it has caught up; but nobody should have to rely on a nudge.
            Err(RecvTimeoutError::Timeout) if waits => return Ok(true),
            Err(RecvTimeoutError::Timeout) => {
                self.shrink()?;
                self.publish();
                inbox.recv().ok()
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Ok(command) => Some(command),
        };
        Ok(command.is_some_and(|command| self.handle(command)))
    }

    /// Whether to go on.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Admit(prepared, text) => {
                let choices = prepared.choices as SequenceId;
                for sequence in Sequence::of_request(self.next_id, *prepared, text, Instant::now()) {
                    self.runner.add(sequence.id(), sequence.prompt(), sequence.sampling());
                    self.scheduler.admit(sequence);
                }
                self.next_id += choices;
                true
            }
            Command::Wake => true,
            Command::Cache(command, answer) => {
                let blocks = self.scheduler.blocks();
                let done = match command {
                    CacheCommand::Clear => blocks.clear(),
                    CacheCommand::Pin(tokens) => {
                        // What the steps on their way write is there for any later one.
                        blocks.next_step();
                        blocks.pin(&tokens)
                    }
                    CacheCommand::Unpin(tokens) => usize::from(blocks.unpin(&tokens)),
                };
                self.publish();
                // Whoever asked may have gone.
                let _ = answer.send(done);
                true
            }
            Command::Stop => false,
        }
    }

    /// Makes the pools as large as the scheduler wants them, one layer a turn while steps are running; whether they grew.
    fn resize(&mut self) -> Result<bool> {
        let wanted = self.scheduler.wanted_blocks();
        let pages = self.runner.pages();
        if !pages.is_resizing() && wanted > pages.capacity() {
            pages.resize(wanted);
        }
        let outcome = loop {
            match pages.resize_layer() {
                Ok(true) if self.in_flight.is_none() => {}
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let capacity = pages.capacity();
        if let Err(error) = outcome {
            tracing::warn!(model = self.id, %error, blocks = capacity, "the KV cache cannot grow");
            pages.resize(capacity);
            self.scheduler.limit_blocks(capacity);
            let _ = kernels::check();
        }
        let grown = capacity > self.scheduler.blocks().capacity(0);
        self.scheduler.blocks().grow(capacity);
        Ok(grown)
    }

    /// Gives back blocks behind the last one that holds something.
    fn shrink(&mut self) -> Result<()> {
        let blocks = self.scheduler.blocks();
        let least = blocks.least_capacity();
        let pages = self.runner.pages();
        // Not for a few blocks.
        if least < pages.capacity() * 3 / 4 {
            blocks.shrink(least);
            pages.resize(least);
            while pages.resize_layer()? {}
            mlx_rs::memory::clear_cache()?;
        }
        Ok(())
    }

    fn launch(&mut self) -> Result<Option<Launched>> {
        let mut ended = Vec::new();
        let started = Instant::now();
        let plan = self.scheduler.plan(started, &mut ended);
        self.metrics.host_seconds += started.elapsed().as_secs_f64();
        ended.into_iter().for_each(|id| self.runner.remove(id));
        if plan.runs.is_empty() {
            return Ok(None);
        }
        fault::point("worker.step", &self.id);
        match self.runner.launch(&plan) {
            Ok(launched) => {
                self.metrics.build_seconds += launched.build.as_secs_f64();
                self.metrics.encode_seconds += launched.encode.as_secs_f64();
                Ok(Some(launched))
            }
            Err(error) => self.fail(error).map(|()| None),
        }
    }

    fn commit(&mut self, step: Launched, launched: Instant) -> Result<()> {
        let (decodes, prompt_tokens) = (step.decoding > 0, step.prompt_tokens);
        let waiting = Instant::now();
        let tokens = match step.read() {
            Ok(tokens) => tokens,
            Err(error) => return self.fail(error),
        };
        let now = Instant::now();
        // It began when it was launched, or when the step before it had ended.
        let seconds = (now - launched.max(self.committed)).as_secs_f64();
        self.committed = now;
        self.scheduler.observe(seconds, decodes, prompt_tokens);
        self.metrics.steps += 1;
        self.metrics.wait_seconds += (now - waiting).as_secs_f64();
        self.metrics.step_seconds += seconds;
        for (id, sampled) in tokens {
            if let Some(ended) = self.scheduler.commit(id, sampled, now) {
                self.runner.remove(ended);
            }
        }
        self.metrics.host_seconds += now.elapsed().as_secs_f64();
        Ok(())
    }

    /// Ends the running sequences: what a failed step has written may be anything. A defect is passed on.
    fn fail(&mut self, error: Error) -> Result<()> {
        tracing::error!(model = self.id, %error, "a step failed");
        // What the step behind it and its kernels note is part of this failure, not of the next step's.
        if let Some((step, _)) = self.in_flight.take() {
            let _ = step.read();
        }
        let _ = kernels::check();
        if error.status() == Status::Internal || error.message().contains(PANIC_MARK) {
            return Err(Error::internal(error.message()));
        }
        for ended in self.scheduler.fail_running(&error) {
            self.runner.remove(ended);
        }
        Ok(())
    }

    fn publish(&mut self) {
        let counts = self.scheduler.blocks().counts(0);
        self.metrics.count(self.scheduler.counters(), counts);
        self.metrics.cache_entries = self.scheduler.blocks().entries();
        self.metrics.cache_bytes = self.runner.pages().bytes();
        self.metrics.queued_requests = self.shared.queue.waiting();
        *lock(&self.shared.metrics) = self.metrics;
    }
}
