//! The thread that owns an encoder's arrays: take a batch, compute it, hand out what is complete.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, TryRecvError};

use super::jobs::{Computed, Job, Jobs, Place};
use super::output::{self, Output};
use super::request::EncodeRequest;
use crate::config::ModelConfig;
use crate::engine::events::{Done, Event, EventSink, FinishReason, Usage};
use crate::engine::memory::EngineMemory;
use crate::engine::metrics::EngineMetrics;
use crate::engine::queue::QueueTicket;
use crate::engine::threads::end_before_exit;
use crate::engine::turns::Seat;
use crate::engine::{EngineOptions, LoadedInfo, ModelSource, Phase, Shared, run_to_the_end};
use crate::error::{Error, Result, Status};
use crate::fault;
use crate::kernels::{self, PANIC_MARK};
use crate::ledger::{Account, Uses};
use crate::models::ModelKind;
use crate::models::encoder::{BatchPlan, EmbeddingModel, EmbeddingOptions, RerankModel};
use crate::panics;
use crate::sync::lock;
use crate::text::TextTokens;
use crate::weights::Weights;

/// Tokens of a batch at least, however slow the machine.
const LEAST_TOKENS: usize = 32;

/// Weight of a new measurement of the rate.
const NEW: f64 = 0.3;

/// Bytes of an engine that are no arrays.
const OVERHEAD: usize = 4 << 20;

/// What other threads ask of the worker.
#[derive(Debug)]
pub enum Command {
    /// Compute the texts of a request.
    Admit(Box<Job>),
    /// End all requests and return.
    Stop,
}

/// Makes tokens of a request's texts and passes them to the worker.
pub fn submit(
    options: &EngineOptions,
    worker: &Sender<Command>,
    shared: &Shared,
    request: EncodeRequest,
    ticket: QueueTicket,
    sink: EventSink,
) {
    fault::point("intake.prepare", &options.id);
    let prepared = options.text.get().and_then(|text| text.encoder(&request)?.prepare(&request.task));
    let (texts, output) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return sink.fail(error),
    };
    let job = Job { texts, output, priority: request.priority, ticket: Some(ticket), sink };
    if let Err(Command::Admit(job)) = worker.send(Command::Admit(Box::new(job))).map_err(SendError::into_inner) {
        job.sink.fail(shared.reason());
    }
}

/// Loads the model, serves requests until told to stop, and returns all memory to the system.
pub fn main(options: &EngineOptions, inbox: &Receiver<Command>, shared: &Shared) {
    run_to_the_end(options, shared, |account| {
        crate::mlx::on_device(options.device, || serve(options, inbox, shared, account))
    });
    // Requests that nobody will read any more end here, through their sinks.
    while inbox.try_recv().is_ok() {}
}

fn serve(options: &EngineOptions, inbox: &Receiver<Command>, shared: &Shared, account: &Account) -> Result<()> {
    let started = Instant::now();
    let (model, batch_tokens, memory) = load(options, shared, account)?;
    let info = LoadedInfo { weight_bytes: model.weight_bytes(), load_seconds: started.elapsed().as_secs_f64() };
    end_before_exit();
    let metrics = EngineMetrics {
        weight_bytes: info.weight_bytes,
        workspace_bytes: memory.workspace() as usize,
        ..EngineMetrics::default()
    };
    let mut worker = Worker {
        options,
        shared,
        model,
        batch_tokens,
        jobs: Jobs::default(),
        seat: options.turns.seat(),
        rate: None,
        metrics,
    };
    worker.publish();
    shared.ready(info);
    let outcome = panics::catch(|| worker.run(inbox)).and_then(|outcome| outcome);
    let defect = outcome.err().map(|error| error.context(format!("engine {}", options.id)));
    if let Some(error) = &defect {
        // Poisoned: no new request may reach this engine once its running ones hear of it.
        shared.set(Phase::Ended(error.clone()));
    }
    worker.jobs.fail_all(&shared.reason());
    defect.map_or(Ok(()), Err)
}

fn load<'a>(
    options: &EngineOptions,
    shared: &Shared,
    account: &'a Account,
) -> Result<(Model, usize, EngineMemory<'a>)> {
    let ModelSource::Folder(folder) = &options.source else {
        return Err(Error::unsupported("encoders with random weights are not supported"));
    };
    let config = ModelConfig::load(folder)?;
    let weights = Weights::open(folder, &config, options.dtype)?;
    let planned = weights.planned();
    let plan = BatchPlan::new(&config, options.device)?;
    let batch_tokens = plan.batch(options.device);
    // One text may be longer.
    let workspace = plan.bytes(batch_tokens.max(plan.max_tokens)).max(planned.largest) + OVERHEAD;
    let uses = Uses { weights: planned.bytes as u64, workspace: workspace as u64, ..Uses::default() };
    let failure = Arc::clone(&shared.failure);
    let memory = EngineMemory::begin(account, uses, || failure.get().cloned())
        .map_err(|error| error.context(format!("model {:?}", options.id)))?;
    // What others gave back in the ledger is to be free in the system, too.
    crate::mlx::return_free_memory();
    let weights = weights.computed_by(options.backend.clone()).watched_by(shared.watch(planned.bytes));
    let model = match options.kind {
        ModelKind::Reranker => Model::Reranker(Box::new(RerankModel::load(folder, &config, weights)?)),
        _ => Model::Embedding(Box::new(EmbeddingModel::load(folder, &config, weights)?)),
    };
    crate::mlx::return_free_memory();
    memory.loaded(model.weight_bytes() as u64);
    Ok((model, batch_tokens, memory))
}

enum Model {
    Embedding(Box<EmbeddingModel>),
    Reranker(Box<RerankModel>),
}

impl Model {
    fn weight_bytes(&self) -> usize {
        match self {
            Self::Embedding(model) => model.weight_bytes(),
            Self::Reranker(model) => model.weight_bytes(),
        }
    }

    /// What a request asks for that this model cannot give.
    fn check(&self, output: &Output) -> Result<()> {
        match (self, output) {
            (Self::Embedding(model), Output::Embeddings { dimensions, .. }) => match *dimensions {
                Some(wanted) if wanted > model.dimensions() => {
                    let most = model.dimensions();
                    Err(Error::invalid_request(format!("\"dimensions\" must be between 1 and {most}")))
                }
                _ => Ok(()),
            },
            (Self::Reranker(_), Output::Scores { .. }) => Ok(()),
            (Self::Embedding(_), Output::Scores { .. }) => {
                Err(Error::unsupported("an embedding model gives vectors, not scores"))
            }
            (Self::Reranker(_), Output::Embeddings { .. }) => {
                Err(Error::unsupported("a reranker gives scores, not vectors"))
            }
        }
    }

    /// One row for each text, as they come from the model.
    fn compute(&self, texts: &[TextTokens]) -> Result<Vec<Vec<f32>>> {
        match self {
            Self::Embedding(model) => {
                // Requests in one batch may want different things: their vectors are cut and normalised one by one.
                model.encode_with(texts, EmbeddingOptions { dimensions: None, normalize: Some(false) })
            }
            Self::Reranker(model) => Ok(model.score(texts)?.into_iter().map(|score| vec![score]).collect()),
        }
    }

    fn result(&self, output: &Output, rows: Vec<Vec<f32>>, truncated: usize) -> Result<Event> {
        match (self, *output) {
            (Self::Embedding(model), Output::Embeddings { dimensions, normalize, base64 }) => {
                let dimensions = dimensions.unwrap_or(model.dimensions());
                let normalize = normalize.unwrap_or(model.pipeline().normalize);
                let mut vectors = output::embeddings(rows, dimensions, normalize, base64)?;
                vectors.truncated = truncated;
                Ok(Event::Embeddings(vectors))
            }
            (_, Output::Scores { top }) => {
                let mut scores = output::scores(rows, top.unwrap_or(usize::MAX));
                scores.truncated = truncated;
                Ok(Event::Scores(scores))
            }
            (Self::Reranker(_), Output::Embeddings { .. }) => Err(Error::internal("vectors of a reranker")),
        }
    }
}

struct Worker<'a> {
    options: &'a EngineOptions,
    shared: &'a Shared,
    model: Model,
    /// Tokens of a batch at most.
    batch_tokens: usize,
    jobs: Jobs,
    seat: Seat,
    /// Tokens a second, once measured.
    rate: Option<f64>,
    metrics: EngineMetrics,
}

impl Worker<'_> {
    /// Returns when told to stop; errors only for defects, after which the engine must not go on.
    fn run(&mut self, inbox: &Receiver<Command>) -> Result<()> {
        loop {
            loop {
                let command = if self.jobs.is_empty() {
                    inbox.recv().map_err(|_| TryRecvError::Disconnected)
                } else {
                    inbox.try_recv()
                };
                match command {
                    Ok(Command::Admit(job)) => self.admit(*job),
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(()),
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.jobs.reap_cancelled();
            self.step()?;
            self.publish();
        }
    }

    fn admit(&mut self, job: Job) {
        match self.model.check(&job.output) {
            Ok(()) => self.jobs.add(job),
            Err(error) => job.sink.fail(error),
        }
        self.publish();
    }

    /// Computes the next batch, if any text waits.
    fn step(&mut self) -> Result<()> {
        let turn = self.seat.take();
        let batch =
            self.jobs.next_batch(budget(self.batch_tokens, self.rate, turn.shared, self.options.target_latency));
        let texts: Vec<TextTokens> = batch.iter().filter_map(|&place| self.jobs.text(place).cloned()).collect();
        if texts.is_empty() {
            return Ok(());
        }
        fault::point("encoder.batch", &self.options.id);
        let started = Instant::now();
        *lock(&self.shared.computing) = Some(started);
        fault::pause("encoder.slow", &self.options.id);
        let rows = self.model.compute(&texts).and_then(|rows| kernels::check().map(|()| rows));
        let (seconds, tokens) =
            (started.elapsed().as_secs_f64(), texts.iter().map(|text| text.ids.len()).sum::<usize>());
        *lock(&self.shared.computing) = None;
        drop(turn);
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return self.fail(&batch, error),
        };
        let measured = tokens as f64 / seconds.max(1e-6);
        self.rate = Some(self.rate.map_or(measured, |old| old + NEW * (measured - old)));
        self.metrics.steps += 1;
        self.metrics.step_seconds += seconds;
        self.metrics.texts += texts.len() as u64;
        self.metrics.prompt_tokens += tokens as u64;
        let complete = self.jobs.commit(&batch, rows);
        // Whoever reads the end finds it counted.
        self.publish();
        complete.into_iter().for_each(|computed| self.finish(computed));
        Ok(())
    }

    fn fail(&mut self, batch: &[Place], error: Error) -> Result<()> {
        tracing::error!(model = self.options.id, %error, "a batch failed");
        let _ = kernels::check();
        if error.status() == Status::Internal || error.message().contains(PANIC_MARK) {
            return Err(Error::internal(error.message()));
        }
        self.jobs.fail(batch, &error);
        Ok(())
    }

    fn finish(&self, computed: Computed) {
        let Computed { job, rows } = computed;
        let seconds = job.sink.state().accepted().elapsed().as_secs_f64();
        let tokens = job.texts.iter().map(|text| text.ids.len()).sum();
        let usage = Usage { prompt_tokens: tokens, seconds_to_first_token: seconds, ..Usage::default() };
        let truncated = job.texts.iter().filter(|text| text.truncated).count();
        match self.model.result(&job.output, rows, truncated) {
            Ok(event) => {
                job.sink.send(event);
                job.sink.done(Done { reason: FinishReason::Stop, stop: None, error: None, usage });
            }
            Err(error) => job.sink.fail_with(error, usage),
        }
    }

    fn publish(&mut self) {
        self.metrics.queued_requests = self.shared.queue.waiting();
        self.metrics.running_sequences = self.jobs.len();
        *lock(&self.shared.metrics) = self.metrics;
    }
}

/// Tokens of the next batch: `most`, or as many as can be computed in `latency` where others wait for the cores.
fn budget(most: usize, rate: Option<f64>, shared: bool, latency: Duration) -> usize {
    match (shared, rate) {
        (false, _) => most,
        (true, None) => LEAST_TOKENS,
        (true, Some(rate)) => ((rate * latency.as_secs_f64()) as usize).clamp(LEAST_TOKENS, most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of a batch where nobody else waits.
    const MOST: usize = 4096;

    #[test]
    fn batches_are_short_where_others_wait() {
        let latency = Duration::from_millis(50);
        assert_eq!(budget(MOST, None, false, latency), MOST);
        assert_eq!(budget(MOST, None, true, latency), LEAST_TOKENS);
        assert_eq!(budget(MOST, Some(10_000.0), true, latency), 500);
        assert_eq!(budget(MOST, Some(10.0), true, latency), LEAST_TOKENS);
        assert_eq!(budget(MOST, Some(1e9), true, latency), MOST);
        assert_eq!(budget(MOST, Some(10.0), false, latency), MOST);
    }
}
