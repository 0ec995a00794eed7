//! Normalisation.

use mlx_rs::{Array, Dtype};

use crate::error::Result;
use crate::kernels::{Backend, NormOf};
use crate::weights::Weights;

/// Root-mean-square norm over the last axis (Zhang and Sennrich 2019).
#[derive(Debug, Clone)]
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

    /// The same, for checkpoints that store how far the weight is from one.
    pub fn load_centred(weights: &mut Weights, path: &str, size: usize, eps: f32) -> Result<Self> {
        let mut norm = Self::load(weights, path, size, eps)?;
        let weight = norm.weight.as_dtype(Dtype::Float32)?.add(Array::from_f32(1.0))?;
        // The CPU kernels compute in f32 and take any weight; MLX would widen its result to the weight's type.
        norm.weight = match &norm.backend {
            Backend::Cpu(_) => weight,
            Backend::Mlx | Backend::Gpu(_) => weight.as_dtype(norm.weight.dtype())?,
        };
        norm.weight.eval()?;
        Ok(norm)
    }

    /// Without a weight, computed by whoever computes with `weights`.
    pub fn plain(weights: &Weights, size: usize, eps: f32) -> Result<Self> {
        let weight = mlx_rs::ops::ones_dtype(&[size as i32], weights.float_type())?;
        weight.eval()?;
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

/// Which norm an architecture has where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// [`RmsNorm`].
    Rms,
    /// [`RmsNorm`] whose stored weights are how far they are from one (Gemma).
    RmsCentred,
    /// [`LayerNorm`] without a bias (Cohere).
    Layer,
}

/// A norm of any kind.
#[derive(Debug)]
pub enum Norm {
    /// By the root of the mean square.
    Rms(RmsNorm),
    /// By mean and variance.
    Layer(LayerNorm),
}

impl Norm {
    /// Takes `{path}.weight [size]`.
    pub fn load(weights: &mut Weights, path: &str, size: usize, kind: NormKind, eps: f32) -> Result<Self> {
        Ok(match kind {
            NormKind::Rms => Self::Rms(RmsNorm::load(weights, path, size, eps)?),
            NormKind::RmsCentred => Self::Rms(RmsNorm::load_centred(weights, path, size, eps)?),
            NormKind::Layer => Self::Layer(LayerNorm::load(weights, path, size, eps, false)?),
        })
    }

    /// `x [.., size]`, same shape out.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}
