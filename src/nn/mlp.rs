//! Feed-forward layers.

use mlx_rs::Array;

use super::linear::Joined;
use super::{Linear, RmsNorm};
use crate::error::Result;
use crate::weights::Weights;

/// `down(silu(gate(x)) * up(x))` (Shazeer 2020, "GLU Variants Improve Transformer").
#[derive(Debug)]
pub struct SwiGlu {
    gate_up: Joined,
    down: Linear,
}

impl SwiGlu {
    /// Takes `gate_proj`, `up_proj` and `down_proj` under `path`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, inner: usize, bias: bool) -> Result<Self> {
        let gate = Linear::load(weights, &format!("{path}.gate_proj"), hidden, inner, bias)?;
        let up = Linear::load(weights, &format!("{path}.up_proj"), hidden, inner, bias)?;
        Ok(Self {
            gate_up: Joined::new(vec![gate, up])?,
            down: Linear::load(weights, &format!("{path}.down_proj"), inner, hidden, bias)?,
        })
    }

    /// `x + mlp(norm(x))`, all `[T, hidden]`.
    pub fn forward_onto(&self, x: &Array, norm: &RmsNorm) -> Result<Array> {
        self.down.forward_onto(&self.gate_up.forward_gated(x, norm)?, x)
    }
}
