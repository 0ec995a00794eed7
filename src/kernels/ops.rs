//! The CPU kernels as operations on MLX arrays. Results are lazy, as MLX's own are.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::cpu::attention::{Attention, AttentionKind, PoolView, Segment, append};
use super::cpu::elementwise::{RmsNorm, Rotary, take_rows};
use super::cpu::floats::{Floats, FloatsMut};
use super::cpu::matmul::{Finish, MatMul, Precision, Projection};
use super::cpu::matrix::{Coding, Matrix as Packing, Packed, Scales, Storage};
use super::cpu::{Isa, threads::Workers};
use super::node::{CpuKernel, Input, Output, node, writing_node};
use crate::error::{Error, Result};
use crate::mlx::{Matrix, QuantMode};

/// Who computes a model's layers.
#[derive(Debug, Clone)]
pub enum Backend {
    /// MLX's own operations, in the model's number format.
    Mlx,
    /// The CPU kernels: weights as they are stored, activations in f32.
    Cpu(Cpu),
}

impl Backend {
    /// The kernels, if they compute with this matrix: MLX does otherwise.
    pub fn kernels(&self, matrix: &Matrix) -> Option<&Cpu> {
        let foreign = matches!(matrix, Matrix::Quantized(matrix) if matrix.format.mode == QuantMode::Mxfp8);
        match self {
            Backend::Cpu(cpu) if !foreign => Some(cpu),
            _ => None,
        }
    }
}

/// The CPU kernels with the threads they run on. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cpu {
    isa: Isa,
    workers: Workers,
    precision: Precision,
}

/// A projection of [`Cpu::linear`].
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// The weights.
    pub matrix: &'a Matrix,
    /// `[rows]`.
    pub bias: Option<&'a Array>,
}

/// How the outputs of [`Cpu::linear`] are put together.
#[derive(Debug, Clone, Copy)]
pub enum Join<'a> {
    /// Side by side: `[T, sum of rows]`.
    Concat,
    /// The only one, added to `[T, rows]`.
    Add(&'a Array),
    /// `silu(first) * second`: `[T, rows]`.
    SwiGlu,
}

/// The rotation of [`Cpu::rotate`].
#[derive(Debug, Clone)]
pub struct Rotation {
    /// Dimensions that turn: the first ones of each head.
    pub dims: usize,
    /// Angle per position of each pair, `[dims / 2]`.
    pub frequencies: Arc<[f32]>,
    /// Pairs are neighbours instead of halves.
    pub traditional: bool,
    /// Multiplies the dimensions that turn.
    pub magnitude: f32,
}

/// Queries, keys and values of a step, and the pools of their layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// `[T, heads, width]`.
    pub queries: &'a Array,
    /// `[T, kv_heads, width]`.
    pub keys: &'a Array,
    /// `[T, kv_heads, width]`.
    pub values: &'a Array,
    /// `[blocks, block_tokens, kv_heads, width]`, evaluated; written in place.
    pub key_pool: &'a Array,
    /// The same for values, whose width may differ.
    pub value_pool: &'a Array,
}

/// Where the rows of a step belong.
#[derive(Debug)]
pub struct Placement {
    /// Block ids of all sequences.
    pub tables: Vec<u32>,
    /// Place in the pools of every row, counted in tokens over all blocks.
    pub slots: Vec<u32>,
    /// Runs of rows of one sequence.
    pub segments: Vec<Segment>,
}

impl Cpu {
    /// Kernels on `threads` threads (`None`: the physical cores), with the best instruction set of this processor.
    pub fn new(threads: Option<usize>, precision: Precision) -> Self {
        Self { isa: Isa::best(), workers: Workers::shared(threads), precision }
    }

    /// Products of `x [T, columns]` with the transposes of one or more matrices: f32.
    pub fn linear(&self, x: &Array, operands: &[Operand<'_>], join: Join<'_>) -> Result<Array> {
        let mut inputs = vec![x];
        let layouts =
            operands.iter().map(|operand| MatrixLayout::new(operand, &mut inputs)).collect::<Result<Vec<_>>>()?;
        let width = match join {
            Join::Concat => layouts.iter().map(|layout| layout.rows).sum(),
            Join::Add(_) | Join::SwiGlu => layouts.first().map_or(0, |layout| layout.rows),
        };
        let finish = match join {
            Join::Concat => Ending::Concat,
            Join::Add(residual) => {
                inputs.push(residual);
                Ending::Add
            }
            Join::SwiGlu => Ending::SwiGlu,
        };
        let rows = x.dim(0);
        node(Linear { cpu: self.clone(), layouts, finish }, &inputs, &[rows, width as i32], Dtype::Float32)
    }

    /// RMS norm of the rows of `x [T, width]` with `weight [width]`: f32.
    pub fn rms_norm(&self, x: &Array, weight: &Array, eps: f32) -> Result<Array> {
        let shape = x.shape().to_vec();
        node(Norm { cpu: self.clone(), eps }, &[x, weight], &shape, Dtype::Float32)
    }

    /// Heads `x [T, heads, width]`, each normalised if `norm` has a weight and an epsilon, then turned by the angles of
    /// `positions [T]` (i32): f32.
    pub fn rotate(
        &self,
        x: &Array,
        rotation: &Rotation,
        norm: Option<(&Array, f32)>,
        positions: &Array,
    ) -> Result<Array> {
        let shape = x.shape().to_vec();
        let mut inputs = vec![x, positions];
        inputs.extend(norm.map(|(weight, _)| weight));
        let kernel = Rotate { cpu: self.clone(), rotation: rotation.clone(), eps: norm.map(|(_, eps)| eps) };
        node(kernel, &inputs, &shape, Dtype::Float32)
    }

    /// Rows `ids` (u32) of a table: `[ids, columns]` f32.
    pub fn take_rows(&self, table: &Matrix, ids: &Array) -> Result<Array> {
        let mut inputs = vec![ids];
        let layout = MatrixLayout::new(&Operand { matrix: table, bias: None }, &mut inputs)?;
        let shape = [ids.dim(0), layout.columns as i32];
        node(TakeRows { cpu: self.clone(), layout }, &inputs, &shape, Dtype::Float32)
    }

    /// Writes a step's keys and values to the pools, in place, and attends: `[T, heads, value width]` f32.
    pub fn attention(&self, heads: Heads<'_>, kind: &AttentionKind, placement: Arc<Placement>) -> Result<Array> {
        let Heads { queries, keys, values, key_pool, value_pool } = heads;
        let shape = [queries.dim(0), queries.dim(1), values.dim(2)];
        let kernel = Attend { cpu: self.clone(), kind: kind.clone(), placement };
        writing_node(kernel, &[queries, keys, values, key_pool, value_pool], 2, &shape, Dtype::Float32)
    }
}

/// A matrix whose arrays are inputs of a node, from `first` on.
#[derive(Debug)]
struct MatrixLayout {
    rows: usize,
    columns: usize,
    first: usize,
    /// Group size and coding of a packed one.
    packed: Option<(usize, Coding, QuantMode)>,
    bias: bool,
}

impl MatrixLayout {
    fn new<'a>(operand: &Operand<'a>, inputs: &mut Vec<&'a Array>) -> Result<Self> {
        let first = inputs.len();
        let (rows, columns, packed) = match operand.matrix {
            Matrix::Dense(weight) => {
                inputs.push(weight);
                (weight.dim(0) as usize, weight.dim(1) as usize, None)
            }
            Matrix::Quantized(matrix) => {
                inputs.extend([&matrix.weight, &matrix.scales]);
                inputs.extend(matrix.biases.as_ref());
                let coding = match matrix.format.mode {
                    QuantMode::Affine => Coding::Affine(matrix.format.bits),
                    QuantMode::Mxfp4 | QuantMode::Nvfp4 => Coding::Fp4,
                    QuantMode::Mxfp8 => return Err(Error::internal("there is no CPU kernel for mxfp8")),
                };
                let columns = matrix.weight.dim(1) as usize * 32 / matrix.format.bits;
                let format = (matrix.format.group_size, coding, matrix.format.mode);
                (matrix.weight.dim(0) as usize, columns, Some(format))
            }
        };
        inputs.extend(operand.bias);
        Ok(Self { rows, columns, first, packed, bias: operand.bias.is_some() })
    }

    fn read<'a>(&self, inputs: &[Input<'a>]) -> Result<Projection<'a>> {
        let inputs = &inputs[self.first..];
        let (storage, used) = match self.packed {
            None => (Storage::Dense(inputs[0].floats()?), 1),
            Some((group, coding, mode)) => {
                let (scales, used) = match mode {
                    QuantMode::Affine => (Scales::Affine(inputs[1].floats()?, inputs[2].floats()?), 3),
                    QuantMode::Nvfp4 => (Scales::E4m3(inputs[1].bytes()?), 2),
                    QuantMode::Mxfp4 | QuantMode::Mxfp8 => (Scales::E8m0(inputs[1].bytes()?), 2),
                };
                (Storage::Packed(Packed { codes: inputs[0].bytes()?, scales, coding, group }), used)
            }
        };
        let bias = if self.bias { Some(inputs[used].floats()?) } else { None };
        Ok(Projection { matrix: Packing { rows: self.rows, columns: self.columns, storage }, bias })
    }
}

/// The last output that is left.
fn last<'a>(outputs: &mut Vec<Output<'a>>) -> Result<FloatsMut<'a>> {
    outputs.pop().ok_or_else(|| Error::internal("a kernel without output"))?.into_floats()
}

#[derive(Debug, Clone, Copy)]
enum Ending {
    Concat,
    Add,
    SwiGlu,
}

struct Linear {
    cpu: Cpu,
    layouts: Vec<MatrixLayout>,
    finish: Ending,
}

impl CpuKernel for Linear {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let x = inputs[0].to_f32()?;
        let projections = self.layouts.iter().map(|layout| layout.read(inputs)).collect::<Result<Vec<_>>>()?;
        let residual = match (self.finish, inputs.last()) {
            (Ending::Add, Some(residual)) => residual.to_f32()?,
            _ => Default::default(),
        };
        let finish = match self.finish {
            Ending::Concat => Finish::Concat,
            Ending::Add => Finish::Add(&residual),
            Ending::SwiGlu => Finish::SwiGlu,
        };
        let precision = self.cpu.precision;
        let product = MatMul { x: &x, projections: &projections, experts: None, stacked: 1, finish, precision };
        product.run(self.cpu.isa, &self.cpu.workers, last(&mut outputs)?);
        Ok(())
    }
}

struct Norm {
    cpu: Cpu,
    eps: f32,
}

impl CpuKernel for Norm {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let norm = RmsNorm { weight: inputs[1].floats()?, eps: self.eps };
        norm.run(self.cpu.isa, &self.cpu.workers, &inputs[0].to_f32()?, last(&mut outputs)?);
        Ok(())
    }
}

struct Rotate {
    cpu: Cpu,
    rotation: Rotation,
    eps: Option<f32>,
}

impl CpuKernel for Rotate {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let Rotation { dims, frequencies, traditional, magnitude } = &self.rotation;
        let norm = match self.eps {
            Some(eps) => Some(RmsNorm { weight: inputs[2].floats()?, eps }),
            None => None,
        };
        let (heads, width) = (inputs[0].shape()[1] as usize, inputs[0].shape()[2] as usize);
        let (dims, traditional, magnitude) = (*dims, *traditional, *magnitude);
        let rotary = Rotary { width, dims, frequencies, traditional, magnitude, norm };
        let (x, positions) = (inputs[0].to_f32()?, inputs[1].integers()?);
        rotary.run(self.cpu.isa, &self.cpu.workers, &x, heads, positions, last(&mut outputs)?);
        Ok(())
    }
}

struct TakeRows {
    cpu: Cpu,
    layout: MatrixLayout,
}

impl CpuKernel for TakeRows {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let table = self.layout.read(inputs)?.matrix;
        take_rows(self.cpu.isa, &self.cpu.workers, &table, inputs[0].words()?, last(&mut outputs)?);
        Ok(())
    }
}

struct Attend {
    cpu: Cpu,
    kind: AttentionKind,
    placement: Arc<Placement>,
}

impl CpuKernel for Attend {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let (queries, keys, values) = (inputs[0].to_f32()?, inputs[1].to_f32()?, inputs[2].to_f32()?);
        let (key_shape, value_shape) = (outputs[1].shape(), outputs[2].shape());
        let (mut value_pool, mut key_pool) = (last(&mut outputs)?, last(&mut outputs)?);
        let row = |shape: &[i32]| (shape[2] * shape[3]) as usize;
        append(&mut key_pool, row(key_shape), &keys, &self.placement.slots);
        append(&mut value_pool, row(value_shape), &values, &self.placement.slots);
        let attention = Attention {
            kind: &self.kind,
            queries: &queries,
            keys: PoolView { numbers: view(&key_pool), width: key_shape[3] as usize },
            values: PoolView { numbers: view(&value_pool), width: value_shape[3] as usize },
            block_tokens: key_shape[1] as usize,
            tables: &self.placement.tables,
            segments: &self.placement.segments,
            sinks: None,
        };
        attention.run(self.cpu.isa, &self.cpu.workers, last(&mut outputs)?);
        Ok(())
    }
}

fn view<'a>(floats: &'a FloatsMut<'_>) -> Floats<'a> {
    match floats {
        FloatsMut::F32(x) => Floats::F32(x),
        FloatsMut::F16(x) => Floats::F16(x),
        FloatsMut::Bf16(x) => Floats::Bf16(x),
    }
}
