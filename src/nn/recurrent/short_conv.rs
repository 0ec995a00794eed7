//! Gated short convolutions as in LFM2; the formulas and names are those of mlx-lm's `lfm2.py`.

use std::sync::Arc;

use mlx_rs::Array;

use super::compose::{self, ConvolutionForm};
use super::{Convolution, Inner, RecurrentLayer, StateIndex, StateLayout, StatePools, kept_type};
use crate::error::{Error, Result};
use crate::kernels::Backend;
use crate::nn::Linear;
use crate::nn::linear::Joined;
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

impl ShortConvSpec {
    /// That there is a row before the last one.
    pub(super) fn check(&self) -> Result<()> {
        match self.taps {
            0 | 1 => Err(Error::invalid_model(format!("a convolution of {} rows", self.taps))),
            _ => Ok(()),
        }
    }

    /// Takes `in_proj`, `conv` and `out_proj` under `path`.
    pub(super) fn load(&self, weights: &mut Weights, path: &str) -> Result<RecurrentLayer> {
        let Self { hidden, taps, bias } = *self;
        let input = Linear::load(weights, &format!("{path}.in_proj"), hidden, 3 * hidden, bias)?;
        let convolution = Convolution::load(weights, &format!("{path}.conv"), hidden, taps, bias)?;
        let output = Linear::load(weights, &format!("{path}.out_proj"), hidden, hidden, bias)?;
        let layout = StateLayout { arrays: vec![(vec![taps - 1, hidden], kept_type(weights))] };
        let inner = GatedConvolution { convolution, backend: weights.backend().clone(), layout };
        Ok(RecurrentLayer { input: Joined::new(vec![input])?, inner: Inner::Convolution(inner), output })
    }
}

/// What lies between the projections.
#[derive(Debug)]
pub(super) struct GatedConvolution {
    convolution: Convolution,
    pub backend: Backend,
    pub layout: StateLayout,
}

impl GatedConvolution {
    /// `joined [T, 3 * hidden]` to `[T, hidden]`; advances the states.
    pub fn forward(&self, joined: &Array, pools: &mut StatePools, index: &mut StateIndex) -> Result<Array> {
        let taps = self.convolution.taps();
        if let Backend::Cpu(cpu) = &self.backend {
            return cpu.short_convolution(joined, taps, pools.array(0)?, Arc::clone(index.placement()));
        }
        let parts = compose::convolve(joined, taps, ConvolutionForm::Gated, pools, index)?;
        Ok(index.join(parts, joined.dim(0) as usize)?.as_dtype(joined.dtype())?)
    }
}
