//! Layers with a state instead of keys and values: GatedDeltaNet, Mamba-2 and gated short convolutions.
//!
//! A layer takes a step's rows, whose runs belong to sequences with a slot each, and advances the states in these. On the
//! CPU what lies between its projections is one node of ours; elsewhere it is composed of MLX's operations.

mod compose;
mod delta_net;
mod mamba2;
mod short_conv;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

pub use delta_net::{DeltaNetSpec, DeltaProjections};
pub use mamba2::Mamba2Spec;
pub use short_conv::ShortConvSpec;
pub use state::{StateIndex, StateLayout, StatePools};

use compose::{ChunksFrom, ConvolutionForm};
use short_conv::GatedConvolution;

use crate::error::{Error, Result};
use crate::kernels::{Backend, Recurrence, RecurrentKind, RecurrentWeights, Taps};
use crate::nn::linear::Joined;
use crate::nn::{Linear, RmsNorm};
use crate::weights::Weights;

/// Upper bound of any size: keeps the products of two of them far from overflow.
const MAX_SIZE: usize = 1 << 24;

/// Upper bound of the numbers that a layer keeps of a sequence, and of those of a row: some hundred times what models have, and far from
/// overflow where plans multiply by layers and sequences.
const MAX_NUMBERS: usize = 1 << 28;

/// What an architecture declares about a layer with a state.
#[derive(Debug, Clone)]
pub enum RecurrentSpec {
    /// By the gated delta rule.
    DeltaNet(DeltaNetSpec),
    /// A state space.
    Mamba2(Mamba2Spec),
    /// The last rows alone.
    ShortConv(ShortConvSpec),
}

impl RecurrentSpec {
    /// That its sizes fit together and are within bounds, which everything else assumes.
    pub fn check(&self) -> Result<()> {
        let sizes: &[(&str, usize)] = match self {
            Self::DeltaNet(spec) => &[
                ("key_heads", spec.key_heads),
                ("value_heads", spec.value_heads),
                ("key_width", spec.key_width),
                ("value_width", spec.value_width),
                ("taps", spec.taps),
            ],
            Self::Mamba2(spec) => &[
                ("heads", spec.heads),
                ("head_width", spec.head_width),
                ("state_width", spec.state_width),
                ("groups", spec.groups),
                ("taps", spec.taps),
                ("norm_groups", spec.norm_groups),
            ],
            Self::ShortConv(spec) => &[("hidden", spec.hidden), ("taps", spec.taps)],
        };
        if let Some((name, size)) = sizes.iter().find(|&&(_, n)| n == 0 || n > MAX_SIZE) {
            return Err(Error::invalid_model(format!("config.json: {name:?} of a layer with a state is {size}")));
        }
        match self {
            Self::DeltaNet(spec) => spec.check()?,
            Self::Mamba2(spec) => spec.check()?,
            Self::ShortConv(spec) => spec.check()?,
        }
        let (kept, row) = (self.kept_numbers(), self.row_numbers());
        if kept > MAX_NUMBERS || row > MAX_NUMBERS {
            return Err(Error::invalid_model(format!(
                "config.json: a layer with a state of {kept} numbers, and rows of {row}"
            )));
        }
        Ok(())
    }

    /// Numbers that it keeps of a sequence; the largest there is instead of larger ones.
    fn kept_numbers(&self) -> usize {
        let recurrence =
            |kind: RecurrentKind| (kind.taps, kind.channels(), kind.value_columns().saturating_mul(kind.key_width));
        let (taps, channels, state) = match self {
            Self::DeltaNet(spec) => recurrence(spec.kind()),
            Self::Mamba2(spec) => recurrence(spec.kind()),
            Self::ShortConv(spec) => (spec.taps, spec.hidden, 0),
        };
        taps.saturating_sub(1).saturating_mul(channels).saturating_add(state)
    }

    /// Bytes that it keeps of a sequence, at most.
    pub fn state_bytes(&self) -> usize {
        size_of::<f32>() * self.kept_numbers()
    }

    /// Numbers of a row that are alive in the layer at the same time: what comes from the projections, and what is made of it.
    pub fn row_numbers(&self) -> usize {
        match self {
            Self::DeltaNet(spec) => 2 * spec.kind().columns().total,
            Self::Mamba2(spec) => 2 * spec.kind().columns().total,
            Self::ShortConv(spec) => 5 * spec.hidden,
        }
    }

    /// Takes the layer's tensors under `path`.
    pub fn load(&self, weights: &mut Weights, path: &str) -> Result<RecurrentLayer> {
        self.check()?;
        match self {
            Self::DeltaNet(spec) => spec.load(weights, path),
            Self::Mamba2(spec) => spec.load(weights, path),
            Self::ShortConv(spec) => spec.load(weights, path),
        }
    }
}

/// A loaded layer with a state.
#[derive(Debug)]
pub struct RecurrentLayer {
    input: Joined,
    inner: Inner,
    output: Linear,
}

/// What lies between the projections.
#[derive(Debug)]
enum Inner {
    Recurrent(Box<Recurrent>),
    Convolution(GatedConvolution),
}

impl RecurrentLayer {
    /// What it keeps of a sequence.
    pub fn state_layout(&self) -> &StateLayout {
        match &self.inner {
            Inner::Recurrent(inner) => &inner.layout,
            Inner::Convolution(inner) => &inner.layout,
        }
    }

    /// `layer(x)`, or `layer(norm(x))`, added to `residual` if there is one; all `[T, hidden]`. Advances the states.
    pub fn forward(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        residual: Option<&Array>,
        (pools, index): (&mut StatePools, &mut StateIndex),
    ) -> Result<Array> {
        let joined = self.input.forward(x, norm)?;
        let y = match &self.inner {
            Inner::Recurrent(inner) => inner.forward(&joined, pools, index)?,
            Inner::Convolution(inner) => inner.forward(&joined, pools, index)?,
        };
        self.output.forward_to(&y, residual)
    }
}

/// A depthwise convolution along sequences.
#[derive(Debug)]
struct Convolution {
    /// `[taps, channels]` f32.
    weight: Array,
    /// `[channels]` f32.
    bias: Option<Array>,
}

impl Convolution {
    /// Takes `{path}.weight`, which mlx-lm stores as `[channels, taps, 1]` and Hugging Face as `[channels, 1, taps]`, and
    /// `{path}.bias [channels]`.
    fn load(weights: &mut Weights, path: &str, channels: usize, taps: usize, bias: bool) -> Result<Self> {
        let name = format!("{path}.weight");
        let weight = match weights.tensor(&name, &[channels, taps, 1]) {
            Ok(weight) => weight,
            Err(error) => weights.tensor(&name, &[channels, 1, taps]).map_err(|_| error)?,
        };
        let weight = weight.as_dtype(Dtype::Float32)?.reshape(&[channels as i32, taps as i32])?;
        let bias = bias.then(|| weights.tensor(&format!("{path}.bias"), &[channels])).transpose()?;
        let bias = bias.map(|bias| wide(&bias)).transpose()?;
        Ok(Self { weight: wide(&weight.transpose()?)?, bias })
    }

    fn taps(&self) -> Taps<'_> {
        Taps { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

/// In f32 and row-major order, evaluated.
fn wide(x: &Array) -> Result<Array> {
    let x = x.as_dtype(Dtype::Float32)?.contiguous()?;
    x.eval()?;
    Ok(x)
}

/// The type in which the inputs of a convolution are kept: that of activations.
fn kept_type(weights: &Weights) -> Dtype {
    match weights.backend() {
        Backend::Cpu(_) => Dtype::Float32,
        Backend::Mlx | Backend::Gpu(_) => weights.float_type(),
    }
}

/// What lies between the projections of a layer with a recurrence.
#[derive(Debug)]
struct Recurrent {
    kind: RecurrentKind,
    convolution: Convolution,
    step_bias: Array,
    rates: Array,
    skip: Option<Array>,
    norm: Array,
    backend: Backend,
    chunks: ChunksFrom,
    layout: StateLayout,
}

impl Recurrent {
    /// Takes `conv1d`, `dt_bias`, `A_log`, `norm` and, of a state space, `D` under `path`.
    fn load(weights: &mut Weights, path: &str, kind: RecurrentKind, convolution_bias: bool) -> Result<Self> {
        let (channels, columns) = (kind.channels(), kind.value_columns());
        let convolution = Convolution::load(weights, &format!("{path}.conv1d"), channels, kind.taps, convolution_bias)?;
        let mut per_head = |name: &str| weights.tensor(&format!("{path}.{name}"), &[kind.heads]);
        let step_bias = wide(&per_head("dt_bias")?)?;
        let rates = wide(&per_head("A_log")?.as_dtype(Dtype::Float32)?.exp()?.negative()?)?;
        let state_space = kind.recurrence != Recurrence::Delta;
        let skip = state_space.then(|| wide(&per_head("D")?)).transpose()?;
        // One norm for all heads of the delta rule.
        let width = if state_space { columns } else { kind.norm_group };
        let norm = wide(&weights.tensor(&format!("{path}.norm.weight"), &[width])?)?;
        let layout = StateLayout {
            arrays: vec![
                (vec![kind.taps - 1, channels], kept_type(weights)),
                (vec![kind.heads, kind.key_width, kind.value_width], Dtype::Float32),
            ],
        };
        let backend = weights.backend().clone();
        let chunks = chunks_from(&backend);
        Ok(Self { kind, convolution, step_bias, rates, skip, norm, backend, chunks, layout })
    }

    /// `joined [T, columns]` to `[T, value columns]`, in the type of `joined` or f32; advances the states.
    fn forward(&self, joined: &Array, pools: &mut StatePools, index: &mut StateIndex) -> Result<Array> {
        let weights = RecurrentWeights {
            taps: self.convolution.taps(),
            step_bias: &self.step_bias,
            rates: &self.rates,
            skip: self.skip.as_ref(),
            norm: &self.norm,
        };
        if let Backend::Cpu(cpu) = &self.backend {
            let arrays = [pools.array(0)?, pools.array(1)?];
            return cpu.recurrent(joined, weights, &self.kind, arrays, Arc::clone(index.placement()));
        }
        let first = self.kind.columns().convolved;
        let convolved = crate::mlx::columns(joined, first, first + self.kind.channels())?;
        let convolved = compose::convolve(&convolved, weights.taps, ConvolutionForm::Silu, pools, index)?;
        let out = compose::recur(joined, &convolved, &weights, &self.kind, self.chunks, (pools, index))?;
        Ok(out.as_dtype(joined.dtype())?)
    }
}

/// Every operation has a price on a GPU, so few rows pass in a chunk already; elsewhere one after another is the plainest.
fn chunks_from(backend: &Backend) -> ChunksFrom {
    ChunksFrom(if backend.gpu().is_some() { 8 } else { 256 })
}
