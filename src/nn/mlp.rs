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
    /// What checkpoints call gate, up and down.
    pub names: [&'static str; 3],
    /// What they call the one matrix of gate and up, and down beside it, where they have these instead.
    pub joined: Option<[&'static str; 2]>,
}

impl GatedSpec {
    /// The usual names.
    pub const NAMES: [&'static str; 3] = ["gate_proj", "up_proj", "down_proj"];
}

/// Gate and up, and down, between rows of width `hidden` and `inner` under `path`: [`GatedSpec`] has the rest.
pub(super) fn load_gated(
    weights: &mut Weights,
    path: &str,
    (hidden, inner): (usize, usize),
    bias: bool,
    [gate, up, down]: [&str; 3],
    joined: Option<[&str; 2]>,
) -> Result<([Linear; 2], Linear)> {
    let joined = joined.filter(|[both, _]| weights.contains(&format!("{path}.{both}.weight")));
    let mut load = |name, input, output| Linear::load(weights, &format!("{path}.{name}"), input, output, bias);
    if let Some([both, down]) = joined {
        let both = load(both, hidden, 2 * inner)?;
        let inputs = [both.outputs(0, inner)?, both.outputs(inner, 2 * inner)?];
        return Ok((inputs, load(down, inner, hidden)?));
    }
    let inputs = [load(gate, hidden, inner)?, load(up, hidden, inner)?];
    Ok((inputs, load(down, inner, hidden)?))
}

/// `down(activation(gate(x)) * up(x))` (Shazeer 2020, "GLU Variants Improve Transformer").
#[derive(Debug)]
pub struct GatedMlp {
    gate_up: Joined,
    down: Linear,
    activation: Activation,
}

impl GatedMlp {
    /// Takes gate, up and down under `path`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, spec: &GatedSpec) -> Result<Self> {
        let GatedSpec { inner, bias, activation, names, joined } = *spec;
        let (gate_up, down) = load_gated(weights, path, (hidden, inner), bias, names, joined)?;
        Ok(Self { gate_up: Joined::new(gate_up.into())?, down, activation })
    }

    /// `mlp(x)`, or `mlp(norm(x))`, added to `residual` if there is one; all `[T, hidden]`.
    pub fn forward(&self, x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>) -> Result<Array> {
        self.down.forward_to(&self.gate_up.forward_gated(x, norm, self.activation)?, residual)
    }
}

/// A feed-forward layer of two matrices: `output(activation(input(x)))`, or, gated, the activation of the first half of what
/// `input` gives times the second half.
#[derive(Debug)]
pub struct Mlp {
    input: Linear,
    output: Linear,
    activation: Activation,
    /// Width of the gate, if there is one.
    gate: Option<usize>,
}

/// What an architecture declares about such a layer.
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

    /// See [`Linear::lay_out`].
    pub(super) fn lay_out(&mut self) -> Result<()> {
        self.input.lay_out()?;
        self.output.lay_out()
    }

    /// `mlp(x)`, or `mlp(norm(x))`, added to `residual` if there is one; all `[T, hidden]`.
    pub fn forward(&self, x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>) -> Result<Array> {
        let inner = match self.gate {
            None => self.input.forward_activated(x, norm, self.activation)?,
            Some(width) => {
                let normed = norm.map(|norm| norm.forward(x)).transpose()?;
                let both = self.input.forward(normed.as_ref().unwrap_or(x))?;
                let part = |from, to| mlx::columns(&both, from, to);
                self.activation.forward(&part(0, width)?)?.multiply(part(width, 2 * width)?)?
            }
        };
        self.output.forward_to(&inner, residual)
    }
}
