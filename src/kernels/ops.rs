//! The CPU kernels as operations on MLX arrays. Results are lazy, as MLX's own are.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use mlx_rs::{Array, Dtype};

use super::cpu::attention::{Attention, AttentionKind, PoolView, Segment, append};
use super::cpu::elementwise::{RmsNorm, Rotary, take_rows};
use super::cpu::floats::{Floats, FloatsMut, Rows, SharedMut};
use super::cpu::matmul::{Finish, MatMul, Precision, Projection};
use super::cpu::matrix::{Coding, Matrix as Packing, Packed, Scales, Storage};
use super::cpu::sample::{Draw, sample};
use super::cpu::{Isa, threads::Workers};
use super::gpu::Gpu;
use super::laid_out::Weight;
use super::node::{CpuKernel, Input, Output, node, writing_node};
use super::scratch::Scratch;
use crate::error::{Error, Result};
use crate::mlx::{Matrix, QuantMode, populate, prefer_huge_pages};
use crate::sync::lock;

/// Who computes a model's layers.
#[derive(Debug, Clone)]
pub enum Backend {
    /// MLX's own operations, in the model's number format.
    Mlx,
    /// The same on a GPU, with kernels of ours where a check at load finds that they work.
    Gpu(Gpu),
    /// The CPU kernels: weights as they are stored, activations in f32.
    Cpu(Cpu),
}

impl Backend {
    /// The kernels, if they compute with this matrix: MLX does otherwise.
    pub fn kernels<'a>(&self, matrix: impl Into<Weight<'a>>) -> Option<&Cpu> {
        let mxfp8 = |matrix: &Matrix| matches!(matrix, Matrix::Quantized(q) if q.format.mode == QuantMode::Mxfp8);
        let foreign = matches!(matrix.into(), Weight::Stored(matrix) if mxfp8(matrix));
        match self {
            Backend::Cpu(cpu) if !foreign => Some(cpu),
            _ => None,
        }
    }

    /// Names everything about it that numbers depend on.
    pub fn numerics(&self) -> String {
        match self {
            Backend::Mlx => "mlx".to_owned(),
            Backend::Gpu(_) => "gpu".to_owned(),
            Backend::Cpu(cpu) => format!("cpu {:?} {:?}", cpu.isa, cpu.precision),
        }
    }

    /// The GPU's part.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Backend::Gpu(gpu) => Some(gpu),
            Backend::Mlx | Backend::Cpu(_) => None,
        }
    }
}

/// The CPU kernels with the threads they run on. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cpu {
    pub(super) isa: Isa,
    pub(super) workers: Workers,
    pub(super) precision: Precision,
}

/// A projection of [`Cpu::linear`].
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// The weights.
    pub matrix: Weight<'a>,
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
    /// The Gaussian error linear unit of the only one: `[T, rows]`.
    Gelu,
    /// The square of the positive part of the only one: `[T, rows]`.
    SquaredRelu,
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

/// The weight `[width]` of an RMS norm, and what is added to the mean of squares.
pub type NormOf<'a> = (&'a Array, f32);

/// Where the values of a layer are.
#[derive(Debug, Clone, Copy)]
pub enum ValuePool<'a> {
    /// In a pool of their own, `[blocks, block_tokens, kv_heads, width]`.
    Own(&'a Array),
    /// They are the last columns of keys, so many of each head.
    InKeys(usize),
}

/// What a step attends with, and the pools of the layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a> {
    /// Heads of queries, keys and values side by side, as they come from their projections: `[T, columns]`.
    pub joined: &'a Array,
    /// Whether there are keys and values; without them nothing is written, and the pools are those of a layer that has.
    pub appends: bool,
    /// Of each head of queries.
    pub query_norm: Option<NormOf<'a>>,
    /// Of each head of keys.
    pub key_norm: Option<NormOf<'a>>,
    /// Divides each head of values by the root of its mean square and this.
    pub value_norm: Option<f32>,
    /// Whether heads are normalised after their rotation instead of before.
    pub turned_first: bool,
    /// Turns queries and keys.
    pub rotation: &'a Rotation,
    /// A score of each query head that attends to nothing, `[heads]` f32.
    pub sinks: Option<&'a Array>,
    /// `[blocks, block_tokens, kv_heads, width]`, evaluated; written in place.
    pub key_pool: &'a Array,
    /// The same for values, whose width may differ.
    pub value_pool: ValuePool<'a>,
}

/// Where the rows of a step belong.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// Blocks whose rows are copied before anything is written: from and to.
    pub copies: Vec<(u32, u32)>,
    /// Blocks of all sequences.
    pub tables: Vec<u32>,
    /// Place in the pools of every row, counted in tokens over all blocks.
    pub slots: Vec<u32>,
    /// Runs of rows of one sequence, in the rows' order.
    pub segments: Vec<Segment>,
    /// Rows that belong to nobody, in order; the CPU kernels know none.
    pub spare: Vec<Range<usize>>,
    /// Rows at the front, spare ones included, that GPU kernels attend to one by one.
    pub singles: usize,
}

impl Placement {
    /// Place of every row in its sequence.
    fn positions(&self) -> impl Iterator<Item = usize> {
        self.segments.iter().flat_map(|segment| segment.start..segment.start + segment.rows.len())
    }
}

impl Cpu {
    /// Kernels on `threads` threads (`None`: the physical cores), with the best instruction set of this processor.
    pub fn new(threads: Option<usize>, precision: Precision) -> Self {
        Self { isa: Isa::best(), workers: Workers::shared(threads), precision }
    }

    /// Products of `x [T, columns]`, normalised before if there is a norm, with the transposes of one or more
    /// matrices: f32.
    pub fn linear(
        &self,
        x: &Array,
        norm: Option<NormOf<'_>>,
        operands: &[Operand<'_>],
        join: Join<'_>,
    ) -> Result<Array> {
        let mut inputs = vec![x];
        let norm = norm.map(|norm| NormLayout::new(norm, &mut inputs));
        let layouts =
            operands.iter().map(|operand| MatrixLayout::new(operand, &mut inputs)).collect::<Result<Vec<_>>>()?;
        let width = match join {
            Join::Concat => layouts.iter().map(|layout| layout.rows).sum(),
            Join::Add(_) | Join::SwiGlu | Join::Gelu | Join::SquaredRelu => {
                layouts.first().map_or(0, |layout| layout.rows)
            }
        };
        let finish = match join {
            Join::Concat => Ending::Concat,
            Join::Add(residual) => {
                inputs.push(residual);
                Ending::Add
            }
            Join::SwiGlu => Ending::SwiGlu,
            Join::Gelu => Ending::Gelu,
            Join::SquaredRelu => Ending::SquaredRelu,
        };
        let rows = x.dim(0);
        node(Linear { cpu: self.clone(), norm, layouts, finish }, &inputs, &[rows, width as i32], Dtype::Float32)
    }

    /// RMS norm of the rows of `x [T, width]` with `weight [width]`: f32.
    pub fn rms_norm(&self, x: &Array, weight: &Array, eps: f32) -> Result<Array> {
        let shape = x.shape().to_vec();
        node(Norm { cpu: self.clone(), eps }, &[x, weight], &shape, Dtype::Float32)
    }

    /// Rows `ids` (u32) of a table: `[ids, columns]` f32.
    pub fn take_rows(&self, table: &Matrix, ids: &Array) -> Result<Array> {
        let mut inputs = vec![ids];
        let layout = MatrixLayout::new(&Operand { matrix: table.into(), bias: None }, &mut inputs)?;
        let shape = [ids.dim(0), layout.columns as i32];
        node(TakeRows { cpu: self.clone(), layout }, &inputs, &shape, Dtype::Float32)
    }

    /// Draws a token for each row of `logits [rows, vocab]`, f32 and one run of memory, as `draws` say: `[rows, 1]` u32.
    pub fn sample(&self, logits: &Array, draws: Vec<Draw>) -> Result<Array> {
        let shape = [logits.dim(0), 1];
        node(DrawTokens { cpu: self.clone(), draws }, &[logits], &shape, Dtype::Uint32)
    }

    pub(super) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// A copy of `array` with another number of rows: those behind the ones that there were have any content. Memory
    /// that is not written to is not occupied, and more than one thread copies.
    pub fn resize_rows(&self, array: &Array, rows: usize) -> Result<Array> {
        let mut shape = array.shape().to_vec();
        let first = shape.first_mut().ok_or_else(|| Error::internal("a single number has no rows"))?;
        *first = i32::try_from(rows).map_err(|_| Error::internal("an array of more than 2^31 rows"))?;
        node(ResizeRows { cpu: self.clone() }, &[array], &shape, array.dtype())
    }

    /// Normalises and turns a step's heads, writes its keys and values, if it has some, to the pools, in place, and attends:
    /// `[T, heads * value width]` f32.
    pub fn attention(&self, heads: Heads<'_>, kind: &AttentionKind, placement: Arc<Placement>) -> Result<Array> {
        let Heads { joined, appends, query_norm, key_norm, value_norm, turned_first, rotation, sinks, .. } = heads;
        let (key_pool, value_pool) = (heads.key_pool, heads.value_pool);
        let value_width = match value_pool {
            ValuePool::Own(pool) => pool.dim(3) as usize,
            ValuePool::InKeys(width) => width,
        };
        let shape = [joined.dim(0), (kind.heads * value_width) as i32];
        let mut inputs = vec![joined];
        let query_norm = query_norm.map(|norm| NormLayout::new(norm, &mut inputs));
        let key_norm = key_norm.map(|norm| NormLayout::new(norm, &mut inputs));
        let sinks = sinks.map(|sinks| {
            inputs.push(sinks);
            inputs.len() - 1
        });
        inputs.push(key_pool);
        let mut written = 1;
        if let ValuePool::Own(pool) = value_pool {
            inputs.push(pool);
            written = 2;
        }
        let (cpu, kind, rotation) = (self.clone(), kind.clone(), rotation.clone());
        let norms = (query_norm, key_norm, value_norm);
        let kernel = Attend { cpu, kind, placement, appends, value_width, norms, turned_first, rotation, sinks };
        writing_node(kernel, &inputs, written, &shape, Dtype::Float32)
    }
}

/// A norm whose weight is input `at` of a node.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormLayout {
    at: usize,
    eps: f32,
}

impl NormLayout {
    pub fn new<'a>((weight, eps): NormOf<'a>, inputs: &mut Vec<&'a Array>) -> Self {
        inputs.push(weight);
        Self { at: inputs.len() - 1, eps }
    }

    pub fn read<'a>(&self, inputs: &[Input<'a>]) -> Result<RmsNorm<'a>> {
        Ok(RmsNorm { weight: inputs[self.at].floats()?, eps: self.eps })
    }
}

/// A matrix, or a stack of them `[stacked, rows, columns]`, whose arrays are inputs of a node, from `first` on.
#[derive(Debug)]
pub(super) struct MatrixLayout {
    pub rows: usize,
    pub columns: usize,
    first: usize,
    /// Group size and coding of a packed one.
    packed: Option<(usize, Coding, QuantMode)>,
    laid_out: bool,
    bias: bool,
}

impl MatrixLayout {
    pub fn new<'a>(operand: &Operand<'a>, inputs: &mut Vec<&'a Array>) -> Result<Self> {
        let first = inputs.len();
        let last_two = |array: &Array| match array.shape() {
            [.., rows, columns] => Ok((*rows as usize, *columns as usize)),
            _ => Err(Error::internal("a matrix of less than two dimensions")),
        };
        let (rows, columns, packed) = match operand.matrix {
            Weight::LaidOut(laid_out) => {
                inputs.push(&laid_out.panels);
                (laid_out.rows, laid_out.columns, None)
            }
            Weight::Stored(Matrix::Dense(weight)) => {
                inputs.push(weight);
                let (rows, columns) = last_two(weight)?;
                (rows, columns, None)
            }
            Weight::Stored(Matrix::Quantized(matrix)) => {
                inputs.extend([&matrix.weight, &matrix.scales]);
                inputs.extend(matrix.biases.as_ref());
                let coding = match matrix.format.mode {
                    QuantMode::Affine => Coding::Affine(matrix.format.bits),
                    QuantMode::Mxfp4 | QuantMode::Nvfp4 => Coding::Fp4,
                    QuantMode::Mxfp8 => return Err(Error::internal("there is no CPU kernel for mxfp8")),
                };
                let (rows, words) = last_two(&matrix.weight)?;
                let format = (matrix.format.group_size, coding, matrix.format.mode);
                (rows, words * 32 / matrix.format.bits, Some(format))
            }
        };
        inputs.extend(operand.bias);
        let laid_out = matches!(operand.matrix, Weight::LaidOut(_));
        Ok(Self { rows, columns, first, packed, laid_out, bias: operand.bias.is_some() })
    }

    pub fn read<'a>(&self, inputs: &[Input<'a>]) -> Result<Projection<'a>> {
        let inputs = &inputs[self.first..];
        let (storage, used) = match self.packed {
            None => match inputs[0].floats()? {
                Floats::F32(panels) if self.laid_out => (Storage::LaidOut(panels), 1),
                numbers => (Storage::Dense(numbers), 1),
            },
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

/// The last output that is left, a pool.
fn pool(outputs: &mut Vec<Output<'_>>) -> Result<SharedMut> {
    outputs.pop().ok_or_else(|| Error::internal("a kernel without output"))?.shared()
}

/// The last output that is left.
pub(super) fn last<'a>(outputs: &mut Vec<Output<'a>>) -> Result<FloatsMut<'a>> {
    outputs.pop().ok_or_else(|| Error::internal("a kernel without output"))?.into_floats()
}

#[derive(Debug, Clone, Copy)]
enum Ending {
    Concat,
    Add,
    SwiGlu,
    Gelu,
    SquaredRelu,
}

struct Linear {
    cpu: Cpu,
    norm: Option<NormLayout>,
    layouts: Vec<MatrixLayout>,
    finish: Ending,
}

impl CpuKernel for Linear {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let given = inputs[0].to_f32()?;
        let mut normed = None;
        if let Some(norm) = &self.norm {
            let normed = normed.insert(Scratch::new(given.len()));
            norm.read(inputs)?.run(self.cpu.isa, &self.cpu.workers, &given, FloatsMut::F32(normed));
        }
        let x = normed.as_deref().unwrap_or(&given);
        let projections = self.layouts.iter().map(|layout| layout.read(inputs)).collect::<Result<Vec<_>>>()?;
        let residual = match (self.finish, inputs.last()) {
            (Ending::Add, Some(residual)) => residual.to_f32()?,
            _ => Default::default(),
        };
        let finish = match self.finish {
            Ending::Concat => Finish::Concat,
            Ending::Add => Finish::Add(&residual),
            Ending::SwiGlu => Finish::SwiGlu,
            Ending::Gelu => Finish::Gelu,
            Ending::SquaredRelu => Finish::SquaredRelu,
        };
        let precision = self.cpu.precision;
        let product = MatMul { x, projections: &projections, experts: None, stacked: 1, finish, precision };
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

struct DrawTokens {
    cpu: Cpu,
    draws: Vec<Draw>,
}

impl CpuKernel for DrawTokens {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let tokens = outputs.pop().ok_or_else(|| Error::internal("a kernel without output"))?.into_words()?;
        let (logits, vocab) = (inputs[0].to_f32()?, inputs[0].shape()[1] as usize);
        sample(self.cpu.isa, &self.cpu.workers, &logits, vocab, &self.draws, tokens);
        Ok(())
    }
}

struct ResizeRows {
    cpu: Cpu,
}

impl CpuKernel for ResizeRows {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let workers = &self.cpu.workers;
        match (inputs[0].floats()?, last(&mut outputs)?) {
            (Floats::F32(from), FloatsMut::F32(to)) => copy(workers, from, to),
            (Floats::F16(from), FloatsMut::F16(to)) | (Floats::Bf16(from), FloatsMut::Bf16(to)) => {
                copy(workers, from, to);
            }
            _ => return Err(Error::internal("a copy of another type")),
        }
        Ok(())
    }
}

/// Copies what both have, in pieces that threads share, and makes the system give the rest of `to` out: otherwise all layers
/// would wait for fresh pages in the one step that first uses them.
fn copy<T: Copy + Send + Sync>(workers: &Workers, from: &[T], to: &mut [T]) {
    const PIECE: usize = 1 << 20;
    prefer_huge_pages(to);
    let rest = std::iter::repeat(&from[..0]);
    let pieces: Vec<_> = to.chunks_mut(PIECE).zip(from.chunks(PIECE).chain(rest)).map(Mutex::new).collect();
    workers.run(pieces.len(), &|piece| {
        let (to, from) = &mut *lock(&pieces[piece]);
        let len = to.len().min(from.len());
        to[..len].copy_from_slice(&from[..len]);
        populate(&mut to[len..]);
    });
}

struct Attend {
    cpu: Cpu,
    kind: AttentionKind,
    placement: Arc<Placement>,
    appends: bool,
    value_width: usize,
    /// Of queries and keys, and the epsilon of that of values.
    norms: (Option<NormLayout>, Option<NormLayout>, Option<f32>),
    turned_first: bool,
    rotation: Rotation,
    /// Which input they are.
    sinks: Option<usize>,
}

impl Attend {
    /// Heads, normalised and turned.
    fn rotate(
        &self,
        rows: Rows<'_>,
        width: usize,
        norm: Option<NormLayout>,
        inputs: &[Input<'_>],
        positions: &[usize],
    ) -> Result<Scratch> {
        let Rotation { dims, ref frequencies, traditional, magnitude } = self.rotation;
        let norm = norm.map(|norm| norm.read(inputs)).transpose()?;
        let turned_first = self.turned_first;
        let rotary = Rotary { width, dims, frequencies, traditional, magnitude, norm, turned_first };
        let mut turned = Scratch::new(positions.len() * rows.width);
        rotary.run(self.cpu.isa, &self.cpu.workers, rows, positions, FloatsMut::F32(&mut turned));
        Ok(turned)
    }

    /// Copies whole blocks of a pool over others.
    ///
    /// # Safety
    /// Nobody else uses them.
    unsafe fn copy_blocks(&self, pool: SharedMut, shape: &[i32]) -> Result<()> {
        let block: usize = shape[1..].iter().map(|&n| n as usize).product();
        for &(from, to) in &self.placement.copies {
            if from.max(to) >= shape[0] as u32 {
                return Err(Error::internal("a copy of a block that does not exist"));
            }
            // SAFETY: the caller's promise.
            unsafe { pool.copy_within(from as usize * block, to as usize * block, block) };
        }
        Ok(())
    }

    /// Heads of `width` numbers over their roots of mean squares, each by itself.
    fn normalise(&self, rows: Rows<'_>, width: usize, eps: f32, positions: &[usize]) -> Scratch {
        let ones = vec![1f32; width];
        let norm = Some(RmsNorm { weight: Floats::F32(&ones), eps });
        let rotary =
            Rotary { width, dims: 0, frequencies: &[], traditional: false, magnitude: 1.0, norm, turned_first: false };
        let mut normed = Scratch::new(positions.len() * rows.width);
        rotary.run(self.cpu.isa, &self.cpu.workers, rows, positions, FloatsMut::F32(&mut normed));
        normed
    }
}

impl CpuKernel for Attend {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let (key_shape, value_shape) = (outputs[1].shape(), outputs.get(2).map(|pool| pool.shape()));
        // The other side of a step may use them at the same time.
        let value_pool = value_shape.map(|_| pool(&mut outputs)).transpose()?;
        let key_pool = pool(&mut outputs)?;
        let (key_width, value_width) = (key_shape[3] as usize, self.value_width);
        let joined = inputs[0].to_f32()?;
        let stride = inputs[0].shape()[1] as usize;
        let (query_columns, key_columns) = (self.kind.heads * key_width, self.kind.kv_heads * key_width);
        let columns =
            |first: usize, width: usize| Rows { numbers: joined.get(first..).unwrap_or_default(), width, stride };
        let positions: Vec<usize> = self.placement.positions().collect();
        let (query_norm, key_norm, value_norm) = self.norms;
        let queries = self.rotate(columns(0, query_columns), key_width, query_norm, inputs, &positions)?;
        if self.appends {
            let keys = columns(query_columns, key_columns);
            let keys = self.rotate(keys, key_width, key_norm, inputs, &positions)?;
            // SAFETY: nobody else uses the places of this side's rows, and where blocks are copied there is one side.
            unsafe {
                self.copy_blocks(key_pool, key_shape)?;
                append(key_pool, Rows::packed(&keys, key_columns), &self.placement.slots);
            }
        }
        if let (true, Some(pool), Some(shape)) = (self.appends, value_pool, value_shape) {
            let value_columns = self.kind.kv_heads * value_width;
            let values = columns(query_columns + key_columns, value_columns);
            let normed = value_norm.map(|eps| self.normalise(values, value_width, eps, &positions));
            let values = normed.as_ref().map_or(values, |normed| Rows::packed(normed, value_columns));
            // SAFETY: as above.
            unsafe {
                self.copy_blocks(pool, shape)?;
                append(pool, values, &self.placement.slots);
            }
        }
        let sinks = self.sinks.map(|at| inputs[at].to_f32()).transpose()?;
        // SAFETY: alive while this runs; rows that the other side writes are in nobody else's tables.
        let (keys, values) = unsafe { (key_pool.read(), value_pool.map(|pool| pool.read())) };
        let attention = Attention {
            kind: &self.kind,
            queries: &queries,
            keys: PoolView::new(keys, key_width),
            values: match values {
                Some(values) => PoolView::new(values, value_width),
                None => PoolView::last_columns(keys, key_width, value_width),
            },
            block_tokens: key_shape[1] as usize,
            tables: &self.placement.tables,
            segments: &self.placement.segments,
            sinks: sinks.as_deref(),
            precision: self.cpu.precision,
        };
        attention.run(self.cpu.isa, &self.cpu.workers, last(&mut outputs)?);
        Ok(())
    }
}
