//! Runs planned steps on MLX: forward pass, sampling, asynchronous evaluation. Owned by the worker thread.

use std::collections::HashMap;

use mlx_rs::Array;

use super::scheduler::{StepInput, StepPlan};
use super::sequence::{SampledToken, SequenceId};
use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels;
use crate::models::Model;
use crate::nn::Step;
use crate::sampling::{Drawn, Sampler, SamplingParams, sample};

/// A loaded model and the device state of its sequences.
pub struct Runner {
    /// The model's id.
    id: String,
    model: Box<dyn Model>,
    vocab: usize,
    sequences: HashMap<SequenceId, State>,
}

struct State {
    cache: SequenceCache,
    sampler: Sampler,
    /// The token that the last step sampled, `[1]`; input of a step planned before it is read.
    newest: Option<Array>,
}

/// A step on its way through the device.
pub struct Launched {
    /// Whose step.
    pub sequence: SequenceId,
    result: StepResult,
    top_logprobs: usize,
}

enum StepResult {
    /// The token of a step that samples.
    Token(Drawn),
    /// Of a prompt chunk: an array that is computed when the chunk is.
    Chunk(Array),
}

impl Runner {
    /// Takes the loaded model `id` with `vocab` tokens.
    pub fn new(id: String, model: Box<dyn Model>, vocab: usize) -> Self {
        Self { id, model, vocab, sequences: HashMap::new() }
    }

    /// Makes room for a sequence.
    pub fn add(&mut self, id: SequenceId, prompt: &[u32], sampling: &SamplingParams) {
        let cache = SequenceCache::new(self.model.kv_layout());
        let sampler = Sampler::new(sampling.clone(), prompt, self.vocab);
        self.sequences.insert(id, State { cache, sampler, newest: None });
    }

    /// Frees a sequence; a step of it that is still running keeps what it needs.
    pub fn remove(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Builds the step's graph and starts its evaluation; returns without waiting for it.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<Launched> {
        let state = self
            .sequences
            .get_mut(&plan.sequence)
            .ok_or_else(|| Error::internal(format!("sequence {} has no state", plan.sequence)))?;
        if state.cache.len() != plan.start {
            let have = state.cache.len();
            return Err(Error::internal(format!("a step at {} on a cache of {have} tokens", plan.start)));
        }
        let tokens = match &plan.input {
            StepInput::Known(ids) => Array::from_slice(ids, &[ids.len() as i32]),
            StepInput::Unread => state.newest.take().ok_or_else(|| Error::internal("no unread token"))?,
        };
        let count = tokens.dim(0);
        let positions: Vec<i32> = (0..count).map(|i| plan.start as i32 + i).collect();
        let positions = Array::from_slice(&positions, &[count]);
        let mut step = Step { tokens: &tokens, positions: &positions, cache: &mut state.cache, trace: None };
        let hidden = self.model.hidden(&mut step)?;
        if !plan.samples {
            // A prompt chunk: only its keys and values are wanted.
            let marker = state.cache.marker()?;
            mlx_rs::transforms::async_eval(state.cache.arrays().chain([&marker]))?;
            return Ok(Launched { sequence: plan.sequence, result: StepResult::Chunk(marker), top_logprobs: 0 });
        }
        let logits = fault::in_graph("kernel", &self.id, self.model.logits(&hidden, 1)?)?;
        let drawn = sample(&logits, &mut [&mut state.sampler])?;
        let logprobs = drawn.logprobs.iter();
        let logprobs = logprobs.flat_map(|l| std::iter::once(&l.drawn).chain(l.top.iter().flat_map(|(i, v)| [i, v])));
        mlx_rs::transforms::async_eval(std::iter::once(&drawn.tokens).chain(logprobs))?;
        state.newest = Some(drawn.tokens.clone());
        let top_logprobs = state.sampler.params().top_logprobs.unwrap_or(0);
        Ok(Launched { sequence: plan.sequence, result: StepResult::Token(drawn), top_logprobs })
    }
}

impl Launched {
    /// Waits for the step and reads its token; `None` for a prompt chunk, which sampled nothing. Waiting for chunks too
    /// keeps at most two steps on the device, so that a cancel does not wait for a whole prompt.
    pub fn read(self) -> Result<Option<SampledToken>> {
        let read = match &self.result {
            StepResult::Token(drawn) => self.read_token(drawn).map(Some),
            StepResult::Chunk(marker) => marker.eval().map(|()| None).map_err(Error::from),
        };
        // Numbers that came from a failed kernel must not pass for a token.
        kernels::check().and(read)
    }

    fn read_token(&self, drawn: &Drawn) -> Result<SampledToken> {
        let token = first::<u32>(&drawn.tokens)?;
        let logprob = match &drawn.logprobs {
            None => None,
            Some(report) => {
                let mut top = match &report.top {
                    None => Vec::new(),
                    Some((ids, values)) => {
                        let ids = host::<u32>(ids)?;
                        ids.into_iter().zip(host::<f32>(values)?).collect()
                    }
                };
                top.sort_by(|a: &(u32, f32), b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                top.truncate(self.top_logprobs);
                Some((first::<f32>(&report.drawn)?, top))
            }
        };
        Ok(SampledToken { token, logprob })
    }
}

/// All values of `array`, waiting for it. It must be one run of memory: a copy made here would be a new graph node
/// behind the step that was launched meanwhile.
fn host<T: mlx_rs::ArrayElement + Copy>(array: &Array) -> Result<Vec<T>> {
    Ok(array.try_as_slice::<T>().map_err(|e| Error::backend(format!("reading a result: {e}")))?.to_vec())
}

fn first<T: mlx_rs::ArrayElement + Copy>(array: &Array) -> Result<T> {
    host::<T>(array)?.first().copied().ok_or_else(|| Error::internal("an empty result"))
}
