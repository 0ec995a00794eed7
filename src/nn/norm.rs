//! Normalisation.

use mlx_rs::Array;

use crate::error::Result;
use crate::weights::Weights;

/// Root-mean-square norm over the last axis (Zhang and Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm {
    weight: Array,
    eps: f32,
}

impl RmsNorm {
    /// Takes `{path}.weight [size]`.
    pub fn load(weights: &mut Weights, path: &str, size: usize, eps: f32) -> Result<Self> {
        Ok(Self { weight: weights.tensor(&format!("{path}.weight"), &[size])?, eps })
    }

    /// `x [.., size]`, same shape out.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        Ok(mlx_rs::fast::rms_norm(x, Some(&self.weight), self.eps)?)
    }
}
