//! Runs planned steps on MLX: forward pass, sampling, asynchronous evaluation. Owned by the worker thread.

use std::collections::HashMap;
use std::sync::Arc;

use mlx_rs::Array;
use mlx_rs::ops::concatenate;

use super::scheduler::{Run, StepInput, StepPlan};
use super::sequence::{SampledToken, SequenceId};
use crate::cache::{Pages, copy_places, place};
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::{self, Backend, Placement, Segment};
use crate::models::Model;
use crate::nn::{Gathers, Step};
use crate::sampling::{Drawn, Sampler, SamplingParams, sample};

/// A loaded model, its pools and the device state of its sequences.
pub struct Runner {
    /// The model's id.
    id: String,
    model: Box<dyn Model>,
    vocab: usize,
    backend: Backend,
    pages: Pages,
    samplers: HashMap<SequenceId, Sampler>,
    /// What the last step sampled, `[rows]`, and whose rows they are: input of a step planned before it is read.
    newest: Option<(Array, Vec<SequenceId>)>,
}

/// A step on its way through the device.
pub struct Launched {
    /// Rows of decoding sequences, and of prompts.
    pub decoding: usize,
    /// See `decoding`.
    pub prompt_tokens: usize,
    result: StepResult,
    /// Whose tokens are sampled, and how many likeliest ones they asked for.
    sampled: Vec<(SequenceId, usize)>,
}

enum StepResult {
    /// Tokens of the sequences that sample.
    Tokens(Drawn),
    /// Of prompt chunks only: an array that is computed when they are.
    Chunks(Array),
}

impl Runner {
    /// Takes the loaded model `id` with `vocab` tokens, who computes its layers, and its pools.
    pub fn new(id: String, model: Box<dyn Model>, vocab: usize, backend: Backend, pages: Pages) -> Self {
        Self { id, model, vocab, backend, pages, samplers: HashMap::new(), newest: None }
    }

    /// The pools.
    pub fn pages(&mut self) -> &mut Pages {
        &mut self.pages
    }

    /// Makes the sampling state of a sequence.
    pub fn add(&mut self, id: SequenceId, prompt: &[u32], sampling: &SamplingParams) {
        self.samplers.insert(id, Sampler::new(sampling.clone(), prompt, self.vocab));
    }

    /// Forgets a sequence; a step of it that is still running keeps what it needs.
    pub fn remove(&mut self, id: SequenceId) {
        self.samplers.remove(&id);
    }

    /// Builds the step's graph and starts its evaluation; returns without waiting for it.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<Launched> {
        let tokens = self.tokens(&plan.runs)?;
        let positions: Vec<i32> =
            plan.runs.iter().flat_map(|run| run.start as i32..(run.start + run.tokens()) as i32).collect();
        let positions = Array::from_slice(&positions, &[positions.len() as i32]);
        let mut placement = placement(plan, self.pages.block_tokens());
        if fault::happens("runner.table", &self.id) {
            placement.tables.reverse();
        }
        let placement = Arc::new(placement);
        let mut gathers = Gathers::new(&placement, self.pages.block_tokens());
        let mut step = Step {
            tokens: &tokens,
            positions: &positions,
            pages: &mut self.pages,
            placement: &placement,
            gathers: &mut gathers,
            written: None,
            trace: None,
        };
        let hidden = self.model.hidden(&mut step)?;
        let written = step.written.take();
        let (decoding, prompt_tokens) = (plan.runs.len() - plan.prompt_runs, plan.prompt_tokens);
        let wanted = sampling_rows(&plan.runs);
        if wanted.is_empty() {
            // Only keys and values are wanted: what is behind them in the last layer need not be computed.
            let marker = written.unwrap_or(hidden);
            mlx_rs::transforms::async_eval([&marker])?;
            let result = StepResult::Chunks(marker);
            return Ok(Launched { decoding, prompt_tokens, result, sampled: Vec::new() });
        }
        let rows: Vec<i32> = wanted.iter().map(|&(_, row)| row).collect();
        let all = rows.len() == tokens.dim(0) as usize;
        let rows = (!all).then(|| Array::from_slice(&rows, &[rows.len() as i32]));
        let logits = fault::in_graph("kernel", &self.id, self.model.logits(&hidden, rows.as_ref())?)?;
        let ids: Vec<SequenceId> = wanted.into_iter().map(|(id, _)| id).collect();
        let (drawn, sampled) = self.sample(&logits, &ids)?;
        let logprobs = drawn.logprobs.iter();
        let logprobs = logprobs.flat_map(|l| std::iter::once(&l.drawn).chain(l.top.iter().flat_map(|(i, v)| [i, v])));
        mlx_rs::transforms::async_eval(std::iter::once(&drawn.tokens).chain(logprobs))?;
        self.newest = Some((drawn.tokens.clone(), ids));
        Ok(Launched { decoding, prompt_tokens, result: StepResult::Tokens(drawn), sampled })
    }

    /// Token ids of all rows: known ones from the host, the others from the step before.
    fn tokens(&self, runs: &[Run]) -> Result<Array> {
        let mut known: Vec<u32> = Vec::new();
        let unread = self.newest.as_ref().map_or(&[][..], |(_, ids)| ids);
        let mut places: Vec<i32> = Vec::new();
        for run in runs {
            match &run.input {
                StepInput::Known(ids) => {
                    let first = unread.len() + known.len();
                    places.extend(first as i32..(first + ids.len()) as i32);
                    known.extend(ids);
                }
                StepInput::Unread => {
                    let place = unread.iter().position(|&id| id == run.sequence);
                    places.push(place.ok_or_else(|| Error::internal("no unread token"))? as i32);
                }
            }
        }
        let host = Array::from_slice(&known, &[known.len() as i32]);
        match &self.newest {
            Some((newest, _)) if known.len() < places.len() => {
                if places.iter().copied().eq(0..newest.dim(0)) {
                    return Ok(newest.clone());
                }
                let all = if known.is_empty() { newest.clone() } else { concatenate(&[newest, &host], 0)? };
                Ok(all.take_axis(Array::from_slice(&places, &[places.len() as i32]), 0)?)
            }
            _ => Ok(host),
        }
    }

    fn sample(&mut self, logits: &Array, ids: &[SequenceId]) -> Result<(Drawn, Vec<(SequenceId, usize)>)> {
        let mut samplers = Vec::with_capacity(ids.len());
        for id in ids {
            let missing = || Error::internal(format!("sequence {id} has no state"));
            samplers.push(self.samplers.remove(id).ok_or_else(missing)?);
        }
        let mut rows: Vec<&mut Sampler> = samplers.iter_mut().collect();
        let drawn = sample(&self.backend, logits, &mut rows);
        let tops = samplers.iter().map(|sampler| sampler.params().top_logprobs.unwrap_or(0));
        let sampled = ids.iter().copied().zip(tops).collect();
        self.samplers.extend(ids.iter().copied().zip(samplers));
        Ok((drawn?, sampled))
    }
}

/// Sequence and row of the step for everyone that samples.
fn sampling_rows(runs: &[Run]) -> Vec<(SequenceId, i32)> {
    let mut end = 0;
    let mut rows = Vec::new();
    for run in runs {
        end += run.tokens() as i32;
        if run.samples {
            rows.push((run.sequence, end - 1));
        }
    }
    rows
}

/// Where a step's rows belong in the arrays.
fn placement(plan: &StepPlan, block_tokens: usize) -> Placement {
    let (mut tables, mut slots, mut segments) = (Vec::new(), Vec::new(), Vec::new());
    let mut row = 0;
    for run in &plan.runs {
        let table = tables.len();
        tables.extend(run.tables[0].iter().map(|block| block.map_or(0, place)));
        let end = run.start + run.tokens();
        let slot =
            |position| tables[table + position / block_tokens] * block_tokens as u32 + (position % block_tokens) as u32;
        slots.extend((run.start..end).map(slot));
        segments.push(Segment { rows: row..row + run.tokens(), start: run.start, table });
        row += run.tokens();
    }
    Placement { copies: copy_places(&plan.copies), tables, slots, segments }
}

impl Launched {
    /// Waits for the step and reads its tokens; none for prompt chunks, which sampled nothing. Waiting for chunks too
    /// keeps at most two steps on the device, so that a cancel does not wait for a whole prompt.
    pub fn read(self) -> Result<Vec<(SequenceId, SampledToken)>> {
        let read = match &self.result {
            StepResult::Tokens(drawn) => self.read_tokens(drawn),
            StepResult::Chunks(marker) => marker.eval().map(|()| Vec::new()).map_err(Error::from),
        };
        // Numbers that came from a failed kernel must not pass for tokens.
        kernels::check().and(read)
    }

    fn read_tokens(&self, drawn: &Drawn) -> Result<Vec<(SequenceId, SampledToken)>> {
        let tokens = host::<u32>(&drawn.tokens)?;
        let (mut own, mut top) = (Vec::new(), None);
        if let Some(report) = &drawn.logprobs {
            own = host::<f32>(&report.drawn)?;
            if let Some((ids, values)) = &report.top {
                top = Some((host::<u32>(ids)?, host::<f32>(values)?, ids.dim(1) as usize));
            }
        }
        let logprob = |row: usize, wanted: usize| {
            let own = own.get(row).copied()?;
            let mut best: Vec<(u32, f32)> = top
                .iter()
                .flat_map(|(ids, values, width)| {
                    let range = row * width..(row + 1) * width;
                    ids[range.clone()].iter().copied().zip(values[range].iter().copied())
                })
                .collect();
            best.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            best.truncate(wanted);
            Some((own, best))
        };
        let rows = self.sampled.iter().zip(tokens).enumerate();
        Ok(rows
            .map(|(row, (&(id, wanted), token))| (id, SampledToken { token, logprob: logprob(row, wanted) }))
            .collect())
    }
}

/// All values of `array`, waiting for it. It must be one run of memory: a copy made here would be a new graph node
/// behind the step that was launched meanwhile.
fn host<T: mlx_rs::ArrayElement + Copy>(array: &Array) -> Result<Vec<T>> {
    Ok(array.try_as_slice::<T>().map_err(|e| Error::backend(format!("reading a result: {e}")))?.to_vec())
}
