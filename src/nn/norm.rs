//! Normalisation.

use mlx_rs::Array;

use crate::error::Result;
use crate::kernels::{Backend, NormOf};
use crate::weights::Weights;

/// Root-mean-square norm over the last axis (Zhang and Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm {
    weight: Array,
    eps: f32,
    backend: Backend,
}

impl RmsNorm {
    /// Takes `{path}.weight [size]`.
    pub fn load(weights: &mut Weights, path: &str, size: usize, eps: f32) -> Result<Self> {
        let weight = weights.tensor(&format!("{path}.weight"), &[size])?;
        Ok(Self { weight, eps, backend: weights.backend().clone() })
    }

    /// `x [.., size]`, same shape out.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        match &self.backend {
            Backend::Mlx | Backend::Gpu(_) => Ok(mlx_rs::fast::rms_norm(x, Some(&self.weight), self.eps)?),
            Backend::Cpu(cpu) => cpu.rms_norm(x, &self.weight, self.eps),
        }
    }

    /// Weight and epsilon, for kernels that do more than the norm.
    pub(super) fn parts(&self) -> NormOf<'_> {
        (&self.weight, self.eps)
    }
}
