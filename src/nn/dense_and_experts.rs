//! A dense feed-forward layer and a mixture of experts side by side, each between norms of its own (Gemma 4).

use mlx_rs::Array;

use super::{Experts, ExpertsSpec, GatedMlp, GatedSpec, RmsNorm};
use crate::error::Result;
use crate::weights::Weights;

/// What an architecture declares about the two. Names are parts of paths, below that of the layer.
#[derive(Debug, Clone)]
pub struct DenseAndExpertsSpec {
    /// The dense one.
    pub dense: GatedSpec,
    /// Where it is.
    pub dense_path: &'static str,
    /// The experts, whose router reads the rows as they were before any norm.
    pub experts: ExpertsSpec,
    /// Norms behind the dense one, before the experts and behind them.
    pub norms: [&'static str; 3],
    /// Their epsilon.
    pub norm_eps: f32,
}

impl DenseAndExpertsSpec {
    /// Numbers of a row of width `hidden` that are alive in the layer at the same time.
    pub fn row_numbers(&self, hidden: usize) -> usize {
        3 * self.dense.inner + self.experts.row_numbers(hidden) + 2 * hidden
    }
}

/// A loaded pair.
#[derive(Debug)]
pub struct DenseAndExperts {
    dense: GatedMlp,
    experts: Experts,
    behind_dense: RmsNorm,
    before_experts: RmsNorm,
    behind_experts: RmsNorm,
}

impl DenseAndExperts {
    /// Takes both and the norms between, under `path`, for rows of width `hidden`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, spec: &DenseAndExpertsSpec) -> Result<Self> {
        let mut norm = |name: &str| RmsNorm::load(weights, &format!("{path}.{name}"), hidden, spec.norm_eps);
        let [behind_dense, before_experts, behind_experts] = spec.norms;
        let (behind_dense, before_experts, behind_experts) =
            (norm(behind_dense)?, norm(before_experts)?, norm(behind_experts)?);
        let dense = GatedMlp::load(weights, &format!("{path}.{}", spec.dense_path), hidden, &spec.dense)?;
        let experts = Experts::load(weights, path, hidden, &spec.experts)?;
        Ok(Self { dense, experts, behind_dense, before_experts, behind_experts })
    }

    /// The sum of what both give of `x`, added to `residual` if there is one; all `[T, hidden]`. `norm` is the dense one's.
    pub fn forward(&self, x: &Array, norm: Option<&RmsNorm>, residual: Option<&Array>) -> Result<Array> {
        let dense = self.behind_dense.forward(&self.dense.forward(x, norm, None)?)?;
        let experts = self.experts.forward_routed(x, Some(&self.before_experts), Some(x), None)?;
        let both = dense.add(self.behind_experts.forward(&experts)?)?;
        match residual {
            Some(residual) => Ok(residual.add(both)?),
            None => Ok(both),
        }
    }
}
