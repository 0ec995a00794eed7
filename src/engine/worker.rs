//! The thread that owns a model's arrays: plan, run, commit.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::runner::{Launched, Runner};
use super::scheduler::Scheduler;
use super::sequence::{Prepared, Sequence, SequenceId};
use super::threads::end_before_exit;
use super::{EngineOptions, LoadedInfo, ModelSource, Phase, Shared};
use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::fault;
use crate::kernels::{self, PANIC_MARK};
use crate::models;
use crate::panics;
use crate::text::TextModel;
use crate::weights::Weights;

/// What other threads ask of the worker.
#[derive(Debug)]
pub enum Command {
    /// Run a request.
    Admit(Box<Prepared>, Option<Arc<TextModel>>),
    /// A request was cancelled, or its reader caught up.
    Wake,
    /// End all requests and return.
    Stop,
}

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
    let (runner, weight_bytes) = load(options, shared)?;
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
    let scheduler = Scheduler::new(options.prefill_chunk);
    let mut worker = Worker { id: options.id.clone(), runner, scheduler, in_flight: None, next_id: 0 };
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
    Ok((Runner::new(options.id.clone(), loaded.model, models::vocab_size(&config)?), loaded.weight_bytes))
}

struct Worker {
    id: String,
    runner: Runner,
    scheduler: Scheduler,
    /// The step before the one that is being planned.
    in_flight: Option<Launched>,
    next_id: SequenceId,
}

impl Worker {
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
            if let Some(gone) = self.scheduler.reap_cancelled() {
                self.runner.remove(gone);
            }
            if let Some(started) = self.scheduler.start() {
                self.runner.add(started.id(), started.prompt(), started.sampling());
            }
            let launched = self.launch()?;
            let before = self.in_flight.take();
            let idle = launched.is_none() && before.is_none();
            self.in_flight = launched;
            if let Some(step) = before {
                self.commit(step)?;
            }
            if idle {
                let Ok(command) = inbox.recv() else { return Ok(()) };
                if !self.handle(command) {
                    return Ok(());
                }
            }
        }
    }

    /// Whether to go on.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Admit(prepared, text) => {
                let id = self.next_id;
                self.next_id += 1;
                self.scheduler.admit(Sequence::new(id, *prepared, text));
                true
            }
            Command::Wake => true,
            Command::Stop => false,
        }
    }

    fn launch(&mut self) -> Result<Option<Launched>> {
        let Some(plan) = self.scheduler.plan() else { return Ok(None) };
        fault::point("worker.step", &self.id);
        match self.runner.launch(&plan) {
            Ok(launched) => Ok(Some(launched)),
            Err(error) => self.fail(plan.sequence, error).map(|()| None),
        }
    }

    fn commit(&mut self, step: Launched) -> Result<()> {
        let id = step.sequence;
        match step.read() {
            Ok(None) => Ok(()),
            Ok(Some(sampled)) => {
                if let Some(ended) = self.scheduler.commit(id, sampled, Instant::now()) {
                    self.runner.remove(ended);
                }
                Ok(())
            }
            Err(error) => self.fail(id, error),
        }
    }

    /// Ends the sequence whose step failed. A defect is passed on: it may have left any state behind.
    fn fail(&mut self, id: SequenceId, error: Error) -> Result<()> {
        tracing::error!(model = self.id, %error, "a step failed");
        // What a kernel noted is part of this failure, not of the next step's.
        let _ = kernels::check();
        if error.status() == Status::Internal || error.message().contains(PANIC_MARK) {
            return Err(Error::internal(error.message()));
        }
        if let Some(ended) = self.scheduler.fail(id, error) {
            self.runner.remove(ended);
        }
        Ok(())
    }
}
