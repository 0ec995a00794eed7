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

/// Layer norm over the last axis (Ba et al. 2016), with or without a bias.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Array,
    bias: Option<Array>,
    eps: f32,
    backend: Backend,
}

impl LayerNorm {
    /// Takes `{path}.weight [size]` and, with `bias`, `{path}.bias [size]`; the first BERTs call them `gamma` and `beta`.
    pub fn load(weights: &mut Weights, path: &str, size: usize, eps: f32, bias: bool) -> Result<Self> {
        let old = weights.contains(&format!("{path}.gamma"));
        let mut take =
            |name, old_name| weights.tensor(&format!("{path}.{}", if old { old_name } else { name }), &[size]);
        let (weight, bias) = (take("weight", "gamma")?, bias.then(|| take("bias", "beta")).transpose()?);
        Ok(Self { weight, bias, eps, backend: weights.backend().clone() })
    }

    /// `x [.., size]`, same shape out.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        match &self.backend {
            Backend::Mlx | Backend::Gpu(_) => {
                Ok(mlx_rs::fast::layer_norm(x, &self.weight, self.bias.as_ref(), self.eps)?)
            }
            Backend::Cpu(cpu) => cpu.layer_norm(x, &self.weight, self.bias.as_ref(), self.eps),
        }
    }
}
