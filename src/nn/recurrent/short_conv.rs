//! Gated short convolutions as in LFM2; the formulas and names are those of mlx-lm's `lfm2.py`.

use std::sync::Arc;

use mlx_rs::Array;

use super::compose::{self, ConvolutionForm};
use super::{Convolution, StateIndex, StateLayout, StatePools, kept_type};
use crate::error::{Error, Result};
use crate::kernels::Backend;
use crate::nn::linear::Joined;
use crate::nn::{Linear, RmsNorm};
use crate::weights::Weights;

/// What an architecture declares about a gated short convolution.
#[derive(Debug, Clone)]
pub struct ShortConvSpec {
    /// Width of the residual stream, and channels.
    pub hidden: usize,
    /// Rows that the convolution sees (`conv_L_cache`).
    pub taps: usize,
    /// Biases of the convolution and of both projections (`conv_bias`).
    pub bias: bool,
}

/// A gated short convolution with its projections.
#[derive(Debug)]
pub struct ShortConv {
    input: Joined,
    convolution: Convolution,
    output: Linear,
    pub(super) backend: Backend,
    layout: StateLayout,
}

impl ShortConv {
    /// Takes `in_proj`, `conv` and `out_proj` under `path`.
    pub fn load(weights: &mut Weights, path: &str, spec: &ShortConvSpec) -> Result<Self> {
        let ShortConvSpec { hidden, taps, bias } = *spec;
        if taps < 2 {
            return Err(Error::invalid_model(format!("a convolution of {taps} rows")));
        }
        let input = Linear::load(weights, &format!("{path}.in_proj"), hidden, 3 * hidden, bias)?;
        let convolution = Convolution::load(weights, &format!("{path}.conv"), hidden, taps, bias)?;
        let output = Linear::load(weights, &format!("{path}.out_proj"), hidden, hidden, bias)?;
        let layout = StateLayout { arrays: vec![(vec![taps - 1, hidden], kept_type(weights))] };
        let backend = weights.backend().clone();
        Ok(Self { input: Joined::new(vec![input])?, convolution, output, backend, layout })
    }

    /// What it keeps of a sequence.
    pub fn state_layout(&self) -> &StateLayout {
        &self.layout
    }

    /// What the layer gives for `x [T, hidden]`, normalised before if there is a norm, added to `residual` if there is one:
    /// the same shape. Advances the states.
    pub fn forward(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        residual: Option<&Array>,
        (pools, index): (&mut StatePools, &mut StateIndex),
    ) -> Result<Array> {
        let inner = self.convolve(&self.input.forward(x, norm)?, pools, index)?;
        self.output.forward_to(&inner, residual)
    }

    fn convolve(&self, joined: &Array, pools: &mut StatePools, index: &mut StateIndex) -> Result<Array> {
        let taps = self.convolution.taps();
        if let Backend::Cpu(cpu) = &self.backend {
            return cpu.short_convolution(joined, taps, pools.array(0)?, Arc::clone(index.placement()));
        }
        let parts = compose::convolve(joined, taps, ConvolutionForm::Gated, pools, index)?;
        Ok(index.join(parts, joined.dim(0) as usize)?.as_dtype(joined.dtype())?)
    }
}
