//! Activations, composed by hand: those of mlx-rs use MLX's `compile`, which starts a compiler on the CPU.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use mlx_rs::{Array, Dtype, ops};

use crate::error::{Error, Result};

/// A function of single numbers between two linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * Phi(x)` with the exact normal distribution (Hendrycks and Gimpel 2016).
    Gelu,
    /// The same paper's approximation by `tanh`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `max(x, 0)^2` (So et al. 2021, "Primer").
    SquaredRelu,
    /// Hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// The activation of this name in a `config.json`.
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Self::GeluTanh,
            "relu" => Self::Relu,
            "relu2" => Self::SquaredRelu,
            "silu" | "swish" => Self::Silu,
            "tanh" => Self::Tanh,
            other => return Err(Error::unsupported(format!("activation {other:?} is not supported"))),
        })
    }

    /// Of every element; computed in f32, in the type of `x` out.
    pub fn forward(self, x: &Array) -> Result<Array> {
        let dtype = x.dtype();
        let x = &x.as_dtype(Dtype::Float32)?;
        // `x / 2 * (1 + s)`, with `s` in -1..1.
        let half = |s: Array| -> Result<Array> {
            Ok(x.multiply(Array::from_f32(0.5))?.multiply(s.add(Array::from_f32(1.0))?)?)
        };
        let y = match self {
            Self::Gelu => half(ops::erf(x.multiply(Array::from_f32(FRAC_1_SQRT_2))?)?)?,
            Self::GeluTanh => {
                let cube = x.multiply(x)?.multiply(x)?.multiply(Array::from_f32(0.044_715))?;
                half(ops::tanh(x.add(cube)?.multiply(Array::from_f32(FRAC_2_PI.sqrt()))?)?)?
            }
            Self::Relu => ops::maximum(x, Array::from_f32(0.0))?,
            Self::Silu => x.multiply(ops::sigmoid(x)?)?,
            Self::SquaredRelu => ops::maximum(x, Array::from_f32(0.0))?.square()?,
            Self::Tanh => ops::tanh(x)?,
        };
        Ok(y.as_dtype(dtype)?)
    }
}
