//! Scans and convolutions along sequences as operations on MLX arrays; states are written in place.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::cpu::convolution::{Convolution, GatedNorm};
use super::cpu::floats::{Floats, FloatsMut, Rows};
use super::cpu::scan::{Rule, Scan, StateRun};
use super::node::{CpuKernel, Input, Output, writing_node};
use super::ops::{Cpu, last};
use crate::error::{Error, Result};

/// Whose rows a step has and where their states lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StatePlacement {
    /// Slots that are copied whole before anything is written: from and to.
    pub copies: Vec<(u32, u32)>,
    /// Runs of rows of one sequence, in the rows' order. Rows of no run belong to nobody; the CPU kernels know none.
    pub runs: Vec<StateRun>,
}

/// A recurrence with its convolution: what a row has in which order, and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Recurrence {
    /// GatedDeltaNet (Yang, Kautz and Hatamizadeh 2024). A row has queries, keys, values, the output's gates, the gates of
    /// what is replaced, and the step sizes.
    Delta,
    /// Mamba-2 (Dao and Gu 2024). A row has the output's gates, values, keys (`B`), queries (`C`), and the step sizes.
    StateSpace {
        /// Least and largest step size.
        limits: (f32, f32),
    },
}

/// Sizes of a recurrent layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecurrentKind {
    /// What it computes.
    pub recurrence: Recurrence,
    /// Heads of values, each with a state.
    pub heads: usize,
    /// Heads of queries and keys; divides `heads`.
    pub groups: usize,
    /// Width of a query and a key.
    pub key_width: usize,
    /// Width of a value.
    pub value_width: usize,
    /// Rows that the convolution sees.
    pub taps: usize,
    /// Columns of the output that the norm takes together.
    pub norm_group: usize,
    /// Epsilon of that norm.
    pub norm_eps: f32,
}

/// Added to the sum of squares of a query or key of the delta rule.
pub const UNIT_EPS: f32 = 1e-6;

/// Where the parts of a row begin. Queries, keys and values are counted from the convolution's first column.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentColumns {
    /// What is convolved.
    pub convolved: usize,
    /// Queries, keys and values.
    pub queries: usize,
    /// See `queries`.
    pub keys: usize,
    /// See `queries`.
    pub values: usize,
    /// The output's gates.
    pub output_gates: usize,
    /// Step sizes.
    pub steps: usize,
    /// The gates of what is replaced; with the delta rule alone.
    pub gates: usize,
    /// All.
    pub total: usize,
}

impl RecurrentKind {
    /// Columns of all queries, or of all keys.
    pub fn key_columns(&self) -> usize {
        self.groups * self.key_width
    }

    /// Columns of all values, and of the output.
    pub fn value_columns(&self) -> usize {
        self.heads * self.value_width
    }

    /// Columns that are convolved: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.key_columns() + self.value_columns()
    }

    /// Where the parts of a row are.
    pub fn columns(&self) -> RecurrentColumns {
        let (keys, values, channels) = (self.key_columns(), self.value_columns(), self.channels());
        let total = channels + values + self.heads;
        match self.recurrence {
            Recurrence::Delta => RecurrentColumns {
                convolved: 0,
                queries: 0,
                keys,
                values: 2 * keys,
                output_gates: channels,
                gates: channels + values,
                steps: total,
                total: total + self.heads,
            },
            Recurrence::StateSpace { .. } => RecurrentColumns {
                convolved: values,
                values: 0,
                keys: values,
                queries: values + keys,
                output_gates: 0,
                steps: values + channels,
                gates: total,
                total,
            },
        }
    }
}

/// A depthwise convolution's numbers, f32.
#[derive(Debug, Clone, Copy)]
pub struct Taps<'a> {
    /// `[taps, channels]`, the oldest row's first.
    pub weight: &'a Array,
    /// `[channels]`.
    pub bias: Option<&'a Array>,
}

/// A recurrent layer's own numbers, f32.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentWeights<'a> {
    /// Of queries, keys and values.
    pub taps: Taps<'a>,
    /// `[heads]`: added to step sizes.
    pub step_bias: &'a Array,
    /// `[heads]`: below zero, by which states decay.
    pub rates: &'a Array,
    /// `[heads]`: values go by the state; of a state space alone.
    pub skip: Option<&'a Array>,
    /// `[value columns]`, or `[norm_group]` for all: of the norm behind the recurrence.
    pub norm: &'a Array,
}

impl Cpu {
    /// Convolves, advances the states and normalises: `joined [T, columns]` to `[T, heads * value_width]` f32. The pools
    /// `[slots, taps - 1, channels]` and `[slots, heads, key_width, value_width]`, f32 and evaluated, are written in place.
    pub fn recurrent(
        &self,
        joined: &Array,
        weights: RecurrentWeights<'_>,
        kind: &RecurrentKind,
        pools: [&Array; 2],
        placement: Arc<StatePlacement>,
    ) -> Result<Array> {
        let shape = [joined.dim(0), kind.value_columns() as i32];
        let mut inputs = vec![joined, weights.taps.weight, weights.step_bias, weights.rates, weights.norm];
        inputs.extend(weights.skip);
        let bias = weights.taps.bias.map(|bias| {
            inputs.push(bias);
            inputs.len() - 1
        });
        inputs.extend(pools);
        let kernel = Recur { cpu: self.clone(), kind: *kind, placement, bias };
        writing_node(kernel, &inputs, pools.len(), &shape, Dtype::Float32)
    }

    /// A gated convolution: of `joined [T, 3 * channels]`, `B`, `C` and `x` side by side, `C * convolution(B * x)`:
    /// `[T, channels]` f32. The pool `[slots, taps - 1, channels]`, f32 and evaluated, is written in place.
    pub fn short_convolution(
        &self,
        joined: &Array,
        taps: Taps<'_>,
        pool: &Array,
        placement: Arc<StatePlacement>,
    ) -> Result<Array> {
        let channels = taps.weight.dim(1);
        let inputs: Vec<&Array> = [joined, taps.weight].into_iter().chain(taps.bias).chain([pool]).collect();
        let kernel = ShortConvolution { cpu: self.clone(), placement, bias: taps.bias.is_some() };
        writing_node(kernel, &inputs, 1, &[joined.dim(0), channels], Dtype::Float32)
    }

    /// Copies whole slots of pools `[slots, ..]`, f32 and evaluated, in place; to be evaluated.
    pub fn copy_slots(&self, pools: &[&Array], placement: Arc<StatePlacement>) -> Result<Array> {
        writing_node(CopySlots { placement }, pools, pools.len(), &[1], Dtype::Float32)
    }
}

fn f32s<'a>(input: &Input<'a>) -> Result<&'a [f32]> {
    match input.floats()? {
        Floats::F32(x) => Ok(x),
        _ => Err(Error::internal("a recurrent kernel takes numbers in f32")),
    }
}

/// The last output that is left, as f32.
fn last_f32<'a>(outputs: &mut Vec<Output<'a>>) -> Result<&'a mut [f32]> {
    match last(outputs)? {
        FloatsMut::F32(x) => Ok(x),
        _ => Err(Error::internal("a recurrent kernel makes numbers in f32")),
    }
}

/// Copies whole slots; all are read before one is written.
fn copy_slots(pool: &mut [f32], slot: usize, copies: &[(u32, u32)]) -> Result<()> {
    let there = |at: u32| (at as usize + 1) * slot <= pool.len();
    if !copies.iter().all(|&(from, to)| there(from) && there(to)) {
        return Err(Error::internal("a copy of a slot that does not exist"));
    }
    let from = |at: u32| at as usize * slot..(at as usize + 1) * slot;
    let is_written = copies.iter().any(|&(source, _)| copies.iter().any(|&(_, to)| to == source));
    if is_written {
        let read: Vec<Vec<f32>> = copies.iter().map(|&(source, _)| pool[from(source)].to_vec()).collect();
        read.iter().zip(copies).for_each(|(read, &(_, to))| pool[from(to)].copy_from_slice(read));
    } else {
        copies.iter().for_each(|&(source, to)| pool.copy_within(from(source), to as usize * slot));
    }
    Ok(())
}

/// Columns of rows, from `first` on.
fn columns(joined: &[f32], stride: usize, first: usize, width: usize) -> Rows<'_> {
    Rows { numbers: joined.get(first..).unwrap_or_default(), width, stride }
}

struct Recur {
    cpu: Cpu,
    kind: RecurrentKind,
    placement: Arc<StatePlacement>,
    /// Which input is the convolution's bias.
    bias: Option<usize>,
}

impl CpuKernel for Recur {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let Self { kind, placement, .. } = self;
        let (isa, workers, runs) = (self.cpu.isa, self.cpu.workers(), &placement.runs[..]);
        let (states, kept, out) = (last_f32(&mut outputs)?, last_f32(&mut outputs)?, last_f32(&mut outputs)?);
        let joined = inputs[0].to_f32()?;
        let (rows, stride) = (inputs[0].shape()[0] as usize, inputs[0].shape()[1] as usize);
        let RecurrentKind { heads, groups, key_width, value_width, .. } = *kind;
        let (at, channels) = (kind.columns(), kind.channels());
        copy_slots(kept, (kind.taps - 1) * channels, &placement.copies)?;
        copy_slots(states, heads * key_width * value_width, &placement.copies)?;

        let mut convolved = vec![0f32; rows * channels];
        let convolution = Convolution {
            channels,
            weight: f32s(&inputs[1])?,
            bias: self.bias.map(|at| f32s(&inputs[at])).transpose()?,
            input: columns(&joined, stride, at.convolved, channels),
            input_gate: None,
            output_gate: None,
            silu: true,
            runs,
        };
        convolution.run(isa, workers, kept, &mut convolved);

        let rule = match kind.recurrence {
            Recurrence::Delta => Rule::Delta { gate: columns(&joined, stride, at.gates, heads), eps: UNIT_EPS },
            Recurrence::StateSpace { limits } => Rule::StateSpace { limits, skip: f32s(&inputs[5])? },
        };
        let scan = Scan {
            heads,
            groups,
            key_width,
            value_width,
            queries: columns(&convolved, channels, at.queries, kind.key_columns()),
            keys: columns(&convolved, channels, at.keys, kind.key_columns()),
            values: columns(&convolved, channels, at.values, kind.value_columns()),
            steps: columns(&joined, stride, at.steps, heads),
            bias: f32s(&inputs[2])?,
            rates: f32s(&inputs[3])?,
            rule,
            runs,
        };
        scan.run(isa, workers, states, out);

        let norm = GatedNorm {
            group: kind.norm_group,
            weight: f32s(&inputs[4])?,
            eps: kind.norm_eps,
            gate_first: kind.recurrence != Recurrence::Delta,
        };
        norm.run(isa, workers, out, columns(&joined, stride, at.output_gates, kind.value_columns()));
        Ok(())
    }
}

struct ShortConvolution {
    cpu: Cpu,
    placement: Arc<StatePlacement>,
    bias: bool,
}

impl CpuKernel for ShortConvolution {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let (kept, out) = (last_f32(&mut outputs)?, last_f32(&mut outputs)?);
        let (joined, stride) = (inputs[0].to_f32()?, inputs[0].shape()[1] as usize);
        let (taps, channels) = (inputs[1].shape()[0] as usize, inputs[1].shape()[1] as usize);
        copy_slots(kept, (taps - 1) * channels, &self.placement.copies)?;
        let part = |index: usize| columns(&joined, stride, index * channels, channels);
        let convolution = Convolution {
            channels,
            weight: f32s(&inputs[1])?,
            bias: self.bias.then(|| f32s(&inputs[2])).transpose()?,
            input: part(2),
            input_gate: Some(part(0)),
            output_gate: Some(part(1)),
            silu: false,
            runs: &self.placement.runs,
        };
        convolution.run(self.cpu.isa, self.cpu.workers(), kept, out);
        Ok(())
    }
}

struct CopySlots {
    placement: Arc<StatePlacement>,
}

impl CpuKernel for CopySlots {
    fn run(&self, _: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        while outputs.len() > 1 {
            let slot = outputs[outputs.len() - 1].shape()[1..].iter().map(|&n| n as usize).product();
            copy_slots(last_f32(&mut outputs)?, slot, &self.placement.copies)?;
        }
        last_f32(&mut outputs)?.fill(0.0);
        Ok(())
    }
}
