//! Runs planned steps on MLX: forward pass, sampling, asynchronous evaluation. Owned by the worker thread.

mod beside;

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use mlx_rs::Array;
use mlx_rs::ops::concatenate;

use super::pace::Work;
use super::scheduler::{Run, StepInput, StepPlan};
use super::sequence::{SampledToken, SequenceId};
use super::shape::Shape;
use super::states::States;
use crate::cache::rows::RowBuffer;
use crate::cache::snapshots::SlotCopy;
use crate::cache::{BlockCopy, Pages, Save, copy_places, place};
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::{self, Backend, Placement, Segment, Side, StatePlacement, after};
use crate::mlx;
use crate::models::Model;
use crate::nn::Step;
use crate::sampling::{Drawn, Sampler, SamplingParams, sample};
use crate::text::grammar::TokenMask;
use beside::Beside;

/// A loaded model, its pools and the device state of its sequences.
pub struct Runner {
    /// The model's id.
    id: String,
    model: Box<dyn Model>,
    vocab: usize,
    backend: Backend,
    pages: Pages,
    states: States,
    samplers: HashMap<SequenceId, Sampler>,
    /// What the last step sampled, `[rows]`, and whose rows they are: input of a step planned before it is read.
    newest: Option<(Array, Vec<SequenceId>)>,
    /// Prompt tokens that have not passed all layers.
    piece: Option<Held>,
    /// Whether a prompt may be computed beside steps of answers.
    parallel: bool,
    /// The piece that is.
    beside: Option<Beside>,
    /// Where it is computed, once one was.
    side: Option<Rc<Side>>,
    /// The layer behind which it has stopped, if nobody has been told.
    stopped: Option<usize>,
    /// Told when a layer of the piece has ended, and when a step beside it has.
    progress: (Sender<()>, Receiver<()>),
}

/// The tokens that a sequence may draw; `None` if all.
pub type Masks<'a> = &'a mut dyn FnMut(SequenceId) -> Option<TokenMask>;

/// Hidden states between two layers.
struct Held {
    /// `[T, hidden]`.
    rows: Array,
    /// Whose rows they are, and how many each has.
    runs: Vec<(SequenceId, usize)>,
}

/// A step on its way through the device.
pub struct Launched {
    /// Whether sequences decode in it.
    pub decodes: bool,
    /// What it computes of prompts.
    pub work: Work,
    /// How long the host described the step, and how long MLX encoded it.
    pub build: Duration,
    /// See `build`.
    pub encode: Duration,
    result: StepResult,
    /// Whose tokens are sampled, and how many likeliest ones they asked for.
    sampled: Vec<(SequenceId, usize)>,
    /// Whether a piece of a prompt is computed beside it.
    pub parallel: bool,
    /// Set when it has ended, if somebody has to feed that meanwhile.
    ended: Option<Arc<AtomicBool>>,
}

/// A step whose graph is described as far as what its tokens are drawn from.
pub struct Described {
    /// How long that took.
    build: Duration,
    decodes: bool,
    work: Work,
    outputs: Vec<Array>,
    draws: Draws,
    /// See [`Launched`].
    parallel: bool,
}

/// What a described step draws from.
enum Draws {
    /// `[rows, vocab]`, and whose rows they are.
    Logits(Array, Vec<SequenceId>),
    /// Nothing; an array that is computed when its prompt chunks are.
    Nothing(Array),
    /// The model computes nothing.
    Known(Vec<(SequenceId, SampledToken)>),
}

/// What the layers leave beside hidden states.
#[derive(Default)]
struct Pass {
    /// Computed after the newest writes to the pools that attention has read.
    written: Option<Array>,
    /// To be evaluated with the step: nothing that it samples from needs them.
    outputs: Vec<Array>,
}

enum StepResult {
    /// Tokens of the sequences that sample.
    Tokens(Drawn),
    /// Of prompt chunks only: an array that is computed when they are.
    Chunks(Array),
    /// Of a model that computes nothing.
    Known(Vec<(SequenceId, SampledToken)>),
}

impl Runner {
    /// Takes the loaded model `id` with `vocab` tokens, who computes its layers, its pools and its states. Where no step is
    /// launched before the one before it is read, prompts may be computed in `parallel` with answers.
    pub fn new(
        id: String,
        model: Box<dyn Model>,
        vocab: usize,
        backend: Backend,
        pages: Pages,
        states: States,
        parallel: bool,
    ) -> Self {
        Self {
            id,
            model,
            vocab,
            backend,
            pages,
            states,
            samplers: HashMap::new(),
            newest: None,
            piece: None,
            parallel,
            beside: None,
            side: None,
            stopped: None,
            progress: unbounded(),
        }
    }

    /// What sequences have besides rows in blocks.
    pub fn states(&mut self) -> &mut States {
        &mut self.states
    }

    /// The model's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pools.
    pub fn pages(&mut self) -> &mut Pages {
        &mut self.pages
    }

    /// Copies what is to be saved. No step that writes it may be on its way.
    pub fn read_rows(&mut self, save: &Save, to: &mut RowBuffer) -> Result<()> {
        match save.blocks[..] {
            [slot] if to.layout().is_state() => self.states.read(slot, to),
            _ => self.pages.read_rows(&save.blocks, to),
        }
    }

    /// Layers behind any of which prompt tokens may wait for the next step. A GPU caches what it makes for every shape of a
    /// step, and has its best shapes anyway.
    pub fn stops(&self) -> usize {
        match self.backend {
            Backend::Cpu(_) => self.model.depth(),
            Backend::Mlx | Backend::Gpu(_) => 1,
        }
    }

    /// Makes the sampling state of a sequence.
    pub fn add(&mut self, id: SequenceId, prompt: &[u32], sampling: &SamplingParams) {
        self.samplers.insert(id, Sampler::new(sampling.clone(), prompt, self.vocab));
    }

    /// Forgets a sequence; a step of it that is still running keeps what it needs.
    pub fn remove(&mut self, id: SequenceId) {
        self.samplers.remove(&id);
    }

    /// Describes a step up to what its tokens are drawn from.
    pub fn describe(&mut self, plan: &StepPlan) -> Result<Described> {
        let started = Instant::now();
        let answers = plan.runs.len() - plan.prompt_runs;
        let (decodes, work) = (answers > 0, plan.work);
        if let Some(token) = self.model.constant() {
            let draws = Draws::Known(self.certain(plan, token));
            let (build, outputs) = (started.elapsed(), Vec::new());
            return Ok(Described { build, decodes, work, outputs, draws, parallel: false });
        }
        if plan.beside {
            self.begin_beside(&plan.runs[answers..], plan.layers.clone())?;
        }
        let (mut pass, sharing) = (Pass::default(), self.share());
        let parallel = sharing.is_some();
        let (hidden, shape) = match &sharing {
            Some(_) => self.forward_alone(&plan.runs[..answers], &mut pass)?,
            None => self.forward(plan, answers, &mut pass)?,
        };
        let wanted = sampling_rows(&plan.runs, &shape);
        let draws = if wanted.is_empty() {
            // Only keys and values are wanted: what is behind them in the last layer need not be computed.
            Draws::Nothing(pass.written.unwrap_or(hidden))
        } else {
            let rows: Vec<i32> = wanted.iter().map(|&(_, row)| row).collect();
            let all = rows.len() == shape.rows;
            let rows = if all { None } else { Some(mlx::indices(&rows)?) };
            let logits = fault::in_graph("kernel", &self.id, self.model.logits(&hidden, rows.as_ref())?)?;
            if let Some(sharing) = sharing {
                pass.outputs.push(after(&logits, move || sharing.end())?);
            }
            Draws::Logits(logits, wanted.into_iter().map(|(id, _)| id).collect())
        };
        let (build, outputs) = (started.elapsed(), pass.outputs);
        Ok(Described { build, decodes, work, outputs, draws, parallel })
    }

    /// Adds what draws the tokens and starts the evaluation; returns without waiting for it. `masks` tells which tokens a
    /// sequence may draw; `None` if all of them may draw all.
    pub fn launch(&mut self, step: Described, masks: Option<Masks>) -> Result<Launched> {
        let Described { build: described, decodes, work, mut outputs, draws, parallel } = step;
        let started = Instant::now();
        let without_tokens = |build, encode, result| {
            let (sampled, ended) = (Vec::new(), None);
            Launched { decodes, work, build, encode, result, sampled, parallel, ended }
        };
        let (logits, ids) = match draws {
            Draws::Logits(logits, ids) => (logits, ids),
            Draws::Nothing(marker) => {
                let (build, encode) = evaluate(started, std::iter::once(&marker).chain(&outputs))?;
                return Ok(without_tokens(described + build, encode, StepResult::Chunks(marker)));
            }
            Draws::Known(tokens) => {
                return Ok(without_tokens(Duration::ZERO, Duration::ZERO, StepResult::Known(tokens)));
            }
        };
        if let Some(masks) = masks {
            self.restrict(&ids, masks);
        }
        let (drawn, sampled) = self.sample(&logits, &ids)?;
        let ended = self.is_beside().then(Arc::<AtomicBool>::default);
        if let Some(ended) = &ended {
            let (ended, told) = (Arc::clone(ended), self.progress.0.clone());
            outputs.push(after(&drawn.tokens, move || {
                ended.store(true, Ordering::Release);
                // The receiver has gone only when nobody waits any more.
                let _ = told.send(());
            })?);
        }
        let logprobs = drawn.logprobs.iter();
        let logprobs = logprobs.flat_map(|l| std::iter::once(&l.drawn).chain(l.top.iter().flat_map(|(i, v)| [i, v])));
        let all = std::iter::once(&drawn.tokens).chain(logprobs).chain(&outputs);
        let (build, encode) = evaluate(started, all)?;
        self.newest = Some((drawn.tokens.clone(), ids));
        let (build, result) = (described + build, StepResult::Tokens(drawn));
        Ok(Launched { decodes, work, build, encode, result, sampled, parallel, ended })
    }

    /// Waits for a step and reads its tokens; none for prompt chunks, which sampled nothing. Waiting for chunks too
    /// keeps at most two steps on the device, so that a cancel does not wait for a whole prompt. The piece beside it goes on.
    pub fn read(&mut self, step: Launched) -> Result<Vec<(SequenceId, SampledToken)>> {
        let fed = step.ended.as_ref().map_or(Ok(()), |ended| self.feed_until(ended));
        let read = step.tokens();
        // Numbers that came from a failed kernel must not pass for tokens.
        kernels::check().and(fed).and(read)
    }

    /// The tokens of a model that computes nothing.
    fn certain(&self, plan: &StepPlan, token: u32) -> Vec<(SequenceId, SampledToken)> {
        let asked = |id| self.samplers.get(&id).and_then(|sampler| sampler.params().top_logprobs);
        let drawn = |id| SampledToken {
            token,
            logprob: asked(id).map(|likeliest| (0.0, [(token, 0.0)].into_iter().take(likeliest).collect())),
        };
        plan.runs.iter().filter(|run| run.samples).map(|run| (run.sequence, drawn(run.sequence))).collect()
    }

    /// Takes the first `answers` runs through all layers and the others through those that the plan says: hidden states of
    /// whoever is behind the last layer, and which rows those are. Where both are, their rows are together.
    fn forward(&mut self, plan: &StepPlan, answers: usize, pass: &mut Pass) -> Result<(Array, Shape)> {
        let depth = self.model.depth();
        let layers = if plan.layers.len() == self.stops() { 0..depth } else { plan.layers.clone() };
        // By themselves, and together: the copies are made in every layer, by whoever is there.
        let by_itself = layers != (0..depth) && answers > 0;
        let copies = (&plan.copies[..], &plan.slot_copies[..]);
        let alone = by_itself.then(|| self.pack(&plan.runs[..answers], copies)).transpose()?;
        let together = self.pack(&plan.runs, copies)?;
        let mut x = if layers.start == 0 {
            self.model.embed(&self.tokens(&plan.runs, &together.packed.shape)?)?
        } else {
            let piece = self.held_rows(&plan.runs[answers..])?;
            match &alone {
                Some(alone) => {
                    let x = self.model.embed(&self.tokens(&plan.runs[..answers], &alone.packed.shape)?)?;
                    concatenate(&[self.pass(x, 0..layers.start, alone, pass)?, piece], 0)?
                }
                None => piece,
            }
        };
        x = self.pass(x, layers.clone(), &together, pass)?;
        let Some(alone) = alone.filter(|_| layers.end < depth) else { return Ok((x, together.packed.shape)) };
        let runs = plan.runs[answers..].iter().map(|run| (run.sequence, run.tokens())).collect();
        let rows = mlx::rows(&x, alone.packed.shape.rows, together.packed.shape.rows)?;
        pass.outputs.push(rows.clone());
        self.piece = Some(Held { rows, runs });
        x = self.pass(mlx::rows(&x, 0, alone.packed.shape.rows)?, layers.end..depth, &alone, pass)?;
        Ok((x, alone.packed.shape))
    }

    /// Hidden states of the piece that is on its way, of whose runs these are.
    fn held_rows(&mut self, runs: &[Run]) -> Result<Array> {
        self.piece.take().ok_or_else(|| Error::internal("no piece of a prompt"))?.rows_of(runs)
    }

    fn pack(&mut self, runs: &[Run], copies: (&[BlockCopy], &[SlotCopy])) -> Result<Placed> {
        let mut packed = Packed::new(runs, copies.0, self.pages.block_tokens(), self.backend.gpu().is_some());
        if fault::happens("runner.table", &self.id) {
            packed.placements.iter_mut().for_each(|placement| Arc::make_mut(placement).tables.reverse());
        }
        if fault::happens("runner.window", &self.id) {
            packed.placements.iter_mut().skip(1).for_each(|placement| Arc::make_mut(placement).tables.rotate_right(1));
        }
        let mut states = self.states.place(runs, copies.1, &packed.shape)?;
        if fault::happens("runner.state", &self.id) {
            let slots = self.states.slots() as u32;
            Arc::make_mut(&mut states).runs.iter_mut().for_each(|run| run.slot = (run.slot + 1) % slots);
        }
        Ok(Placed { positions: packed.positions()?, packed, states })
    }

    /// Runs `layers` over hidden states of the rows `placed`.
    fn pass(&mut self, x: Array, layers: Range<usize>, placed: &Placed, pass: &mut Pass) -> Result<Array> {
        let step = Step::new(&placed.positions, &mut self.pages, &placed.packed.placements);
        let mut step = step.with_states(self.states.pools(), &placed.states);
        let x = self.model.pass(x, layers, &mut step)?;
        pass.written = step.written.take();
        pass.outputs.append(&mut step.unread);
        Ok(x)
    }

    /// Token ids of all rows: known ones from the host, the others from the step before; of spare ones any.
    fn tokens(&self, runs: &[Run], shape: &Shape) -> Result<Array> {
        let unread = self.newest.as_ref().map_or(&[][..], |(_, ids)| ids);
        // Known ids row by row; and where each row's id is among those of the step before and then the known ones.
        let mut known = vec![0; shape.rows];
        let mut places: Vec<i32> = (unread.len() as i32..(unread.len() + shape.rows) as i32).collect();
        let mut all_known = true;
        for (run, &first) in runs.iter().zip(&shape.first) {
            match &run.input {
                StepInput::Known(ids) => known[first..first + ids.len()].copy_from_slice(ids),
                StepInput::Unread => {
                    let place = unread.iter().position(|&id| id == run.sequence);
                    places[first] = place.ok_or_else(|| Error::internal("no unread token"))? as i32;
                    all_known = false;
                }
            }
        }
        let host = |known: &[u32]| Array::from_slice(known, &[known.len() as i32]);
        match &self.newest {
            Some((newest, _)) if !all_known => {
                if places.iter().copied().eq(0..newest.dim(0)) {
                    return Ok(newest.clone());
                }
                // Decoding only: spare rows take anybody's.
                if runs.iter().all(|run| run.input == StepInput::Unread) {
                    shape.spare.iter().cloned().flatten().for_each(|row| places[row] = 0);
                    return Ok(newest.take_axis(mlx::indices(&places)?, 0)?);
                }
                let all = concatenate(&[newest, &host(&known)], 0)?;
                Ok(all.take_axis(mlx::indices(&places)?, 0)?)
            }
            _ => Ok(host(&known)),
        }
    }

    fn restrict(&mut self, ids: &[SequenceId], masks: Masks) {
        for id in ids {
            if let (Some(mask), Some(sampler)) = (masks(*id), self.samplers.get_mut(id)) {
                sampler.restrict(mask.words());
            }
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

impl Held {
    /// The rows of `runs`, all of which are among them.
    fn rows_of(self, runs: &[Run]) -> Result<Array> {
        if runs.iter().map(|run| (run.sequence, run.tokens())).eq(self.runs.iter().copied()) {
            return Ok(self.rows);
        }
        // The others have ended, or begin again later.
        let mut rows = Vec::new();
        for run in runs {
            let mut first = 0;
            let found = self.runs.iter().find(|&&(id, tokens)| {
                let found = (id, tokens) == (run.sequence, run.tokens());
                first += if found { 0 } else { tokens };
                found
            });
            let (_, tokens) = found.ok_or_else(|| Error::internal("a run whose beginning is lost"))?;
            rows.extend((first..first + tokens).map(|row| row as i32));
        }
        Ok(self.rows.take_axis(mlx::indices(&rows)?, 0)?)
    }
}

/// Starts the evaluation of a step described since `started`: how long that took, and this.
fn evaluate<'a>(started: Instant, arrays: impl Iterator<Item = &'a Array>) -> Result<(Duration, Duration)> {
    let build = started.elapsed();
    start(arrays)?;
    Ok((build, started.elapsed() - build))
}

/// Has arrays computed, and does not wait for them.
fn start<'a>(arrays: impl Iterator<Item = &'a Array>) -> Result<()> {
    mlx::limit_ahead();
    Ok(mlx_rs::transforms::async_eval(arrays)?)
}

/// Sequence and row of the step for everyone that samples.
fn sampling_rows(runs: &[Run], shape: &Shape) -> Vec<(SequenceId, i32)> {
    let samples = runs.iter().zip(&shape.first).filter(|(run, _)| run.samples);
    samples.map(|(run, first)| (run.sequence, (first + run.tokens() - 1) as i32)).collect()
}

/// Rows, and where all that belongs to them is.
struct Placed {
    packed: Packed,
    positions: Array,
    states: Arc<StatePlacement>,
}

/// A plan's rows, and where they belong in the arrays.
pub struct Packed {
    /// Which rows each run has.
    pub shape: Shape,
    /// Where they belong in each cache group.
    pub placements: Vec<Arc<Placement>>,
}

impl Packed {
    /// The rows of `runs`, and what is copied before, on blocks of `block_tokens`; in buckets for a GPU.
    pub fn new(runs: &[Run], copies: &[BlockCopy], block_tokens: usize, in_buckets: bool) -> Self {
        let shape = if in_buckets {
            Shape::in_buckets(&runs.iter().map(|run| (run.start, run.tokens())).collect::<Vec<_>>())
        } else {
            Shape::exact(runs.iter().map(Run::tokens))
        };
        let groups = runs.first().map_or(0, |run| run.tables.len());
        let placements = (0..groups).map(|group| Arc::new(placement(runs, &shape, copies, block_tokens, group)));
        Self { placements: placements.collect(), shape }
    }

    /// Place of every row in its sequence, `[T]` i32; of spare ones 0.
    pub fn positions(&self) -> Result<Array> {
        let mut positions = vec![0; self.shape.rows];
        for Segment { rows, start, .. } in self.placements.iter().take(1).flat_map(|placement| &placement.segments) {
            positions[rows.clone()].iter_mut().enumerate().for_each(|(at, to)| *to = (start + at) as i32);
        }
        mlx::indices(&positions)
    }
}

/// Where the rows of `runs` belong in a cache group.
fn placement(runs: &[Run], shape: &Shape, copies: &[BlockCopy], block_tokens: usize, group: usize) -> Placement {
    // Rows that belong to nobody go to the spare block, and it takes the place of blocks behind a window.
    let mut slots: Vec<u32> = (0..shape.rows).map(|row| (row % block_tokens) as u32).collect();
    let (mut tables, mut segments) = (Vec::new(), Vec::new());
    for (run, &row) in runs.iter().zip(&shape.first) {
        let table = tables.len();
        tables.extend(run.tables[group].iter().map(|block| block.map_or(0, place)));
        for (at, slot) in slots[row..row + run.tokens()].iter_mut().enumerate() {
            let position = run.start + at;
            *slot = tables[table + position / block_tokens] * block_tokens as u32 + (position % block_tokens) as u32;
        }
        segments.push(Segment { rows: row..row + run.tokens(), start: run.start, table });
    }
    segments.sort_by_key(|segment: &Segment| segment.rows.start);
    let (copies, spare, singles) = (copy_places(copies, group), shape.spare.clone(), shape.singles);
    Placement { copies, tables, slots, segments, spare, singles }
}

impl Described {
    /// Starts the evaluation of what tokens are drawn from: the device computes it while the host makes the masks.
    pub fn begin(&self) -> Result<()> {
        match &self.draws {
            Draws::Logits(logits, _) => start(std::iter::once(logits).chain(&self.outputs)),
            Draws::Nothing(_) | Draws::Known(_) => Ok(()),
        }
    }

    /// Waits for what was begun of a step that will not be launched; a failure is not looked at.
    pub fn abandon(self) {
        if let Draws::Logits(logits, _) = &self.draws {
            let _ = logits.eval();
        }
    }
}

impl Launched {
    /// Waits until it is computed; whether its kernels failed is not looked at.
    pub fn wait(&self) -> Result<()> {
        match &self.result {
            StepResult::Tokens(Drawn { tokens: result, .. }) | StepResult::Chunks(result) => Ok(result.eval()?),
            StepResult::Known(_) => Ok(()),
        }
    }

    fn tokens(&self) -> Result<Vec<(SequenceId, SampledToken)>> {
        self.wait()?;
        match &self.result {
            StepResult::Tokens(drawn) => self.read_tokens(drawn),
            StepResult::Chunks(_) => Ok(Vec::new()),
            StepResult::Known(tokens) => Ok(tokens.clone()),
        }
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
