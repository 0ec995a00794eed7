//! Feed-forward layers.

use mlx_rs::Array;

use super::Linear;
use crate::error::Result;
use crate::weights::Weights;

/// `down(silu(gate(x)) * up(x))` (Shazeer 2020, "GLU Variants Improve Transformer").
#[derive(Debug)]
pub struct SwiGlu {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl SwiGlu {
    /// Takes `gate_proj`, `up_proj` and `down_proj` under `path`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, inner: usize, bias: bool) -> Result<Self> {
        Ok(Self {
            gate: Linear::load(weights, &format!("{path}.gate_proj"), hidden, inner, bias)?,
            up: Linear::load(weights, &format!("{path}.up_proj"), hidden, inner, bias)?,
            down: Linear::load(weights, &format!("{path}.down_proj"), inner, hidden, bias)?,
        })
    }

    /// `x [T, hidden]`, same shape out.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        let gate = self.gate.forward(x)?;
        // Composed by hand: the activations of mlx-rs use MLX's compile, which starts a compiler on the CPU.
        let gated = gate.multiply(mlx_rs::ops::sigmoid(&gate)?)?.multiply(self.up.forward(x)?)?;
        self.down.forward(&gated)
    }
}
