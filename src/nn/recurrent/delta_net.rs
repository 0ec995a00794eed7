//! GatedDeltaNet (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule") as in
//! Qwen3-Next and Qwen3.5; the formulas and names are those of mlx-lm's `qwen3_next.py`, `qwen3_5.py` and `gated_delta.py`.

use super::{Inner, Recurrent, RecurrentLayer};
use crate::error::{Error, Result};
use crate::kernels::{Recurrence, RecurrentKind};
use crate::nn::Linear;
use crate::nn::linear::Joined;
use crate::weights::Weights;

/// How the input projections are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaProjections {
    /// `in_proj_qkvz` and `in_proj_ba`, of each key head its own parts side by side (Qwen3-Next).
    Interleaved,
    /// `in_proj_qkv`, `in_proj_z`, `in_proj_b` and `in_proj_a` (Qwen3.5).
    Separate,
}

/// What an architecture declares about a GatedDeltaNet.
#[derive(Debug, Clone)]
pub struct DeltaNetSpec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads of queries and keys (`linear_num_key_heads`); divides those of values.
    pub key_heads: usize,
    /// Heads of values (`linear_num_value_heads`).
    pub value_heads: usize,
    /// Width of a query and a key (`linear_key_head_dim`).
    pub key_width: usize,
    /// Width of a value (`linear_value_head_dim`).
    pub value_width: usize,
    /// Rows that the convolution sees (`linear_conv_kernel_dim`).
    pub taps: usize,
    /// Epsilon of the norm behind the recurrence.
    pub norm_eps: f32,
    /// How the input projections are stored.
    pub projections: DeltaProjections,
}

impl DeltaNetSpec {
    /// Takes the projections, `conv1d`, `dt_bias`, `A_log`, `norm` and `out_proj` under `path`.
    pub(super) fn load(&self, weights: &mut Weights, path: &str) -> Result<RecurrentLayer> {
        let kind = self.kind();
        let (keys, values, heads) = (kind.key_columns(), kind.value_columns(), kind.heads);
        let mut project =
            |name: &str, width| Linear::load(weights, &format!("{path}.{name}"), self.hidden, width, false);
        let input = match self.projections {
            DeltaProjections::Separate => vec![
                project("in_proj_qkv", 2 * keys + values)?,
                project("in_proj_z", values)?,
                project("in_proj_b", heads)?,
                project("in_proj_a", heads)?,
            ],
            DeltaProjections::Interleaved => {
                let share = heads / kind.groups;
                let wide = share * kind.value_width;
                let qkvz = project("in_proj_qkvz", 2 * keys + 2 * values)?;
                let qkvz = qkvz.reordered(&apart(kind.groups, &[kind.key_width, kind.key_width, wide, wide]))?;
                let ba = project("in_proj_ba", 2 * heads)?.reordered(&apart(kind.groups, &[share, share]))?;
                vec![qkvz, ba]
            }
        };
        let recurrent = Recurrent::load(weights, path, kind, false)?;
        let output = Linear::load(weights, &format!("{path}.out_proj"), values, self.hidden, false)?;
        Ok(RecurrentLayer { input: Joined::new(input)?, inner: Inner::Recurrent(Box::new(recurrent)), output })
    }

    /// Of sizes within bounds, that they fit together.
    pub(super) fn check(&self) -> Result<()> {
        let Self { key_heads, value_heads, taps, .. } = *self;
        if key_heads == 0 || !value_heads.is_multiple_of(key_heads) || taps < 2 {
            return Err(Error::invalid_model(format!(
                "a GatedDeltaNet with {value_heads} heads of values, {key_heads} of keys and a convolution of {taps}"
            )));
        }
        Ok(())
    }

    /// Its sizes.
    pub(super) fn kind(&self) -> RecurrentKind {
        let Self { key_heads, value_heads, taps, .. } = *self;
        RecurrentKind {
            recurrence: Recurrence::Delta,
            heads: value_heads,
            groups: key_heads,
            key_width: self.key_width,
            value_width: self.value_width,
            taps,
            norm_group: self.value_width,
            norm_eps: self.norm_eps,
        }
    }
}

/// Outputs that are stored group after group, `parts` of each side by side, as an order in which parts follow each other.
fn apart(groups: usize, parts: &[usize]) -> Vec<i32> {
    let group: usize = parts.iter().sum();
    let mut order = Vec::with_capacity(groups * group);
    let mut first = 0;
    for part in parts {
        for at in 0..groups {
            order.extend((at * group + first..at * group + first + part).map(|output| output as i32));
        }
        first += part;
    }
    order
}
