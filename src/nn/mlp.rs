//! Feed-forward layers.

use mlx_rs::Array;

use super::linear::Joined;
use super::{Activation, Linear, RmsNorm};
use crate::error::Result;
use crate::mlx;
use crate::weights::Weights;

/// What an architecture declares about a gated feed-forward layer.
#[derive(Debug, Clone)]
pub struct GatedSpec {
    /// Width inside.
    pub inner: usize,
    /// Biases of all projections.
    pub bias: bool,
    /// Of the gate.
    pub activation: Activation,
    /// Whether gate and up are one matrix, `gate_up_proj`.
    pub fused: bool,
    /// What checkpoints call gate, up and down.
    pub names: [&'static str; 3],
}

impl GatedSpec {
    /// The usual names.
    pub const NAMES: [&'static str; 3] = ["gate_proj", "up_proj", "down_proj"];
}

/// `down(activation(gate(x)) * up(x))` (Shazeer 2020, "GLU Variants Improve Transformer").
#[derive(Debug)]
pub struct GatedMlp {
    gate_up: Joined,
    down: Linear,
    activation: Activation,
}

impl GatedMlp {
    /// Takes gate and up, or `gate_up_proj`, and down under `path`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, spec: &GatedSpec) -> Result<Self> {
        let GatedSpec { inner, bias, activation, fused, names: [gate, up, down] } = *spec;
        let mut project = |name: &str, width| Linear::load(weights, &format!("{path}.{name}"), hidden, width, bias);
        let gate_up = if fused {
            let both = project("gate_up_proj", 2 * inner)?;
            vec![both.outputs(0, inner)?, both.outputs(inner, 2 * inner)?]
        } else {
            vec![project(gate, inner)?, project(up, inner)?]
        };
        Ok(Self {
            gate_up: Joined::new(gate_up)?,
            down: Linear::load(weights, &format!("{path}.{down}"), inner, hidden, bias)?,
            activation,
        })
    }

    /// `mlp(x)`, or `mlp(norm(x))`, added to `residual` if there is one; all `[T, hidden]`.
    pub fn forward(&self, x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>) -> Result<Array> {
        self.down.forward_to(&self.gate_up.forward_gated(x, norm, self.activation)?, residual)
    }
}

/// The feed-forward layer of an encoder: `output(activation(input(x)))`, or, gated, the activation of the first half of what
/// `input` gives times the second half.
#[derive(Debug)]
pub struct Mlp {
    input: Linear,
    output: Linear,
    activation: Activation,
    /// Width of the gate, if there is one.
    gate: Option<usize>,
}

/// What an architecture declares about its feed-forward layer.
#[derive(Debug, Clone)]
pub struct MlpSpec {
    /// Width inside.
    pub inner: usize,
    /// Biases of both projections.
    pub bias: bool,
    /// Between them.
    pub activation: Activation,
    /// Whether the input projection gives a gate too, after what is gated.
    pub gated: bool,
}

impl Mlp {
    /// Takes the projections at the paths `input` and `output`.
    pub fn load(weights: &mut Weights, input: &str, output: &str, hidden: usize, spec: &MlpSpec) -> Result<Self> {
        let MlpSpec { inner, bias, activation, gated } = *spec;
        let width = if gated { 2 * inner } else { inner };
        Ok(Self {
            input: Linear::load(weights, input, hidden, width, bias)?,
            output: Linear::load(weights, output, inner, hidden, bias)?,
            activation,
            gate: gated.then_some(inner),
        })
    }

    /// `residual + mlp(x)`, all `[T, hidden]`.
    pub fn forward_onto(&self, x: &Array, residual: &Array) -> Result<Array> {
        let inner = match self.gate {
            None => self.input.forward_activated(x, self.activation)?,
            Some(width) => {
                let both = self.input.forward(x)?;
                let part = |from, to| mlx::columns(&both, from, to);
                self.activation.forward(&part(0, width)?)?.multiply(part(width, 2 * width)?)?
            }
        };
        self.output.forward_onto(&inner, residual)
    }
}
