//! Mamba-2 (Dao and Gu 2024, "Transformers are SSMs") as in Nemotron-H and Granite 4; the formulas and names are those of
//! mlx-lm's `nemotron_h.py`, `granitemoehybrid.py` and `ssm.py`.

use super::{Inner, Recurrent, RecurrentLayer};
use crate::error::{Error, Result};
use crate::kernels::{Recurrence, RecurrentKind};
use crate::nn::Linear;
use crate::nn::linear::Joined;
use crate::weights::Weights;

/// What an architecture declares about a Mamba-2 layer.
#[derive(Debug, Clone)]
pub struct Mamba2Spec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads (`mamba_num_heads`, `mamba_n_heads`).
    pub heads: usize,
    /// Width of a head (`mamba_head_dim`, `mamba_d_head`).
    pub head_width: usize,
    /// Rows of a head's state (`ssm_state_size`, `mamba_d_state`).
    pub state_width: usize,
    /// Groups of heads that share `B` and `C` (`n_groups`).
    pub groups: usize,
    /// Rows that the convolution sees (`conv_kernel`, `mamba_d_conv`).
    pub taps: usize,
    /// Least and largest step size (`time_step_limit`).
    pub step_limits: (f32, f32),
    /// Biases of both projections.
    pub projection_bias: bool,
    /// Bias of the convolution.
    pub convolution_bias: bool,
    /// Groups of columns with a norm of their own: `n_groups` in Nemotron-H, 1 in Granite.
    pub norm_groups: usize,
    /// Epsilon of that norm.
    pub norm_eps: f32,
}

impl Mamba2Spec {
    /// Takes `in_proj`, `conv1d`, `dt_bias`, `A_log`, `D`, `norm` and `out_proj` under `path`.
    pub(super) fn load(&self, weights: &mut Weights, path: &str) -> Result<RecurrentLayer> {
        let kind = self.kind();
        let mut project = |name: &str, input, output| {
            Linear::load(weights, &format!("{path}.{name}"), input, output, self.projection_bias)
        };
        let input = Joined::new(vec![project("in_proj", self.hidden, kind.columns().total)?])?;
        let output = project("out_proj", kind.value_columns(), self.hidden)?;
        let recurrent = Recurrent::load(weights, path, kind, self.convolution_bias)?;
        Ok(RecurrentLayer { input, inner: Inner::Recurrent(Box::new(recurrent)), output })
    }

    /// Of sizes within bounds, that they fit together.
    pub(super) fn check(&self) -> Result<()> {
        let Self { heads, groups, norm_groups, taps, .. } = *self;
        let divides = |groups: usize, all: usize| groups > 0 && all.is_multiple_of(groups);
        if !divides(groups, heads) || !divides(norm_groups, heads * self.head_width) || taps < 2 {
            return Err(Error::invalid_model(format!(
                "a Mamba-2 layer of {heads} heads in {groups} groups, with {norm_groups} norms and a convolution of {taps}"
            )));
        }
        Ok(())
    }

    /// Its sizes.
    pub(super) fn kind(&self) -> RecurrentKind {
        let Self { heads, groups, norm_groups, taps, .. } = *self;
        let columns = heads * self.head_width;
        RecurrentKind {
            recurrence: Recurrence::StateSpace { limits: self.step_limits },
            heads,
            groups,
            key_width: self.state_width,
            value_width: self.head_width,
            taps,
            norm_group: columns / norm_groups.max(1),
            norm_eps: self.norm_eps,
        }
    }
}
