//! What chooses the experts of a token.

use mlx_rs::{Array, Dtype, ops};

use super::Linear;
use crate::error::Result;
use crate::kernels::{GroupScore, Groups, Normalize, RouterOperands, Routing, Scores, Ties};
use crate::mlx;
use crate::weights::Weights;

/// What an architecture declares about its router. Names are parts of paths, below that of the layer.
///
/// Orders of operations, ties and epsilons are those of mlx-lm 0.32.2 (`models/`), whose files the constructors name.
#[derive(Debug, Clone)]
pub struct RouterSpec {
    /// The projection to logits.
    pub path: &'static str,
    /// Whether it has a bias.
    pub bias: bool,
    /// An RMS norm before it, whose weight is this tensor `[hidden]` divided by the root of its size, with this epsilon (Gemma 4).
    pub norm: Option<(&'static str, f32)>,
    /// A tensor `[experts]` that is added to what experts are chosen by, and not to their weights.
    pub correction: Option<&'static str>,
    /// A tensor `[experts]` that multiplies the weights of those that were chosen.
    pub expert_scales: Option<&'static str>,
    /// What experts are chosen by.
    pub scores: Scores,
    /// Groups that are chosen before experts.
    pub groups: Option<Groups>,
    /// How weights are normalised.
    pub normalize: Normalize,
    /// Multiplies the weights at last.
    pub scale: f32,
    /// Which of equals is chosen.
    pub ties: Ties,
}

impl RouterSpec {
    fn new(path: &'static str, scores: Scores, ties: Ties) -> Self {
        Self {
            path,
            bias: false,
            norm: None,
            correction: None,
            expert_scales: None,
            scores,
            groups: None,
            normalize: Normalize::No,
            scale: 1.0,
            ties,
        }
    }

    /// Softmax of all, then the best ones, whose weights add up to one if `normalize` (`qwen3_moe.py`, `qwen3_next.py`).
    pub fn softmax(normalize: bool) -> Self {
        let normalize = if normalize { Normalize::SumPlus(0.0) } else { Normalize::No };
        Self { normalize, ..Self::new("gate", Scores::Softmax, Ties::Last) }
    }

    /// The best ones, then their softmax, of the projection at `path` (`gpt_oss.py`, `granitemoehybrid.py`, `gemma4_text.py`; of equals
    /// `mixtral.py` takes the first).
    pub fn softmax_of_chosen(path: &'static str) -> Self {
        Self::new(path, Scores::SoftmaxOfChosen, Ties::Last)
    }

    /// Sigmoid of each with a correction of the choice, of groups if there are more than one. `normalize` is what is added to the
    /// sum of weights: 0 in `deepseek_v3.py` and `glm4_moe.py`, 1e-20 in `glm4_moe_lite.py` and `nemotron_h.py`, all of which do
    /// not normalise (`None`) where a token has one expert.
    pub fn corrected_sigmoid(groups: usize, kept_groups: usize, normalize: Option<f32>, scale: f32) -> Self {
        let by = GroupScore::TwoBest;
        Self {
            correction: Some("gate.e_score_correction_bias"),
            groups: (groups > 1).then_some(Groups { count: groups, kept: kept_groups, by }),
            normalize: normalize.map_or(Normalize::No, Normalize::SumPlus),
            scale,
            ..Self::new("gate", Scores::Sigmoid, Ties::First)
        }
    }

    /// The best ones, then the sigmoid of each (`llama4.py`).
    pub fn sigmoid_of_chosen(path: &'static str) -> Self {
        Self::new(path, Scores::SigmoidOfChosen, Ties::First)
    }
}

/// A loaded router.
#[derive(Debug)]
pub(super) struct Router {
    pub projection: Linear,
    norm: Option<(Array, f32)>,
    correction: Option<Array>,
    expert_scales: Option<Array>,
    routing: Routing,
}

impl Router {
    /// Takes what `spec` names under `path`, for the choice of `per_token` of `experts`.
    pub fn load(
        weights: &mut Weights,
        path: &str,
        hidden: usize,
        (experts, per_token): (usize, usize),
        spec: &RouterSpec,
    ) -> Result<Self> {
        let name = |part: &str| format!("{path}.{part}");
        let projection = Linear::load(weights, &name(spec.path), hidden, experts, spec.bias)?;
        let norm = match spec.norm {
            None => None,
            Some((part, eps)) => {
                let weight = weights.tensor(&name(part), &[hidden])?;
                let dtype = weight.dtype();
                let weight = weight.multiply(Array::from_f32((hidden as f32).powf(-0.5)))?.as_dtype(dtype)?;
                weight.eval()?;
                Some((weight, eps))
            }
        };
        let mut each = |part: Option<&str>| part.map(|part| weights.unconverted(&name(part), &[experts])).transpose();
        let (correction, expert_scales) = (each(spec.correction)?, each(spec.expert_scales)?);
        let RouterSpec { scores, groups, normalize, scale, ties, .. } = *spec;
        let routing = Routing { experts, per_token, scores, groups, normalize, scale, ties };
        Ok(Self { projection, norm, correction, expert_scales, routing })
    }

    /// For the CPU kernels.
    pub fn operands(&self) -> RouterOperands<'_> {
        RouterOperands {
            norm: self.norm.as_ref().map(|(weight, eps)| (weight, *eps)),
            projection: self.projection.operand(),
            correction: self.correction.as_ref(),
            expert_scales: self.expert_scales.as_ref(),
            routing: &self.routing,
        }
    }

    /// Experts a token has.
    pub fn per_token(&self) -> usize {
        self.routing.per_token
    }

    /// By MLX's operations: of `x [T, hidden]` the experts `[T, per_token]` (u32), in no particular order, and their weights in
    /// the same order, in f32.
    pub fn choose(&self, x: &Array) -> Result<(Array, Array)> {
        let Routing { per_token, scores, groups, normalize, scale, .. } = self.routing;
        let normed = match &self.norm {
            Some((weight, eps)) => Some(mlx_rs::fast::rms_norm(x, Some(weight), *eps)?),
            None => None,
        };
        let logits = self.projection.forward(normed.as_ref().unwrap_or(x))?.as_dtype(Dtype::Float32)?;
        let values = match scores {
            Scores::Softmax => ops::softmax_axis(&logits, -1, true)?,
            Scores::Sigmoid => ops::sigmoid(&logits)?,
            Scores::SoftmaxOfChosen | Scores::SigmoidOfChosen => logits,
        };
        let mut keys = values.clone();
        if let Some(correction) = &self.correction {
            keys = keys.add(correction.as_dtype(Dtype::Float32)?)?;
        }
        if let Some(groups) = groups.filter(|groups| groups.kept < groups.count) {
            keys = keep_groups(&keys, &groups)?;
        }
        let experts = self.best(&keys, per_token)?;
        let mut weights = values.take_along_axis(&experts, -1)?;
        match scores {
            Scores::Softmax | Scores::Sigmoid => {}
            Scores::SoftmaxOfChosen => weights = ops::softmax_axis(&weights, -1, true)?,
            Scores::SigmoidOfChosen => weights = ops::sigmoid(&weights)?,
        }
        let sum = |weights: &Array| weights.sum_axis(-1, true);
        match normalize {
            Normalize::No => {}
            Normalize::SumPlus(more) => weights = weights.divide(sum(&weights)?.add(Array::from_f32(more))?)?,
            Normalize::SumAtLeast(least) => {
                weights = weights.divide(ops::maximum(sum(&weights)?, Array::from_f32(least))?)?;
            }
        }
        if scale != 1.0 {
            weights = weights.multiply(Array::from_f32(scale))?;
        }
        if let Some(scales) = &self.expert_scales {
            weights = weights.multiply(scales.as_dtype(Dtype::Float32)?.take_axis(&experts, 0)?)?;
        }
        Ok((experts, weights))
    }

    /// The places of the `count` largest of each row. MLX's partition takes the smaller place for the smaller of two equals.
    fn best(&self, keys: &Array, count: usize) -> Result<Array> {
        let all = keys.dim(1) as usize;
        match self.routing.ties {
            Ties::Last => mlx::columns(&ops::argpartition_axis(keys, -(count as i32), -1)?, all - count, all),
            Ties::First => mlx::columns(&ops::argpartition_axis(keys.negative()?, count as i32 - 1, -1)?, 0, count),
        }
    }
}

/// `keys [T, experts]` with those of all but the best groups 0.
fn keep_groups(keys: &Array, groups: &Groups) -> Result<Array> {
    let (tokens, experts) = (keys.dim(0), keys.dim(1));
    let (count, size) = (groups.count as i32, experts / groups.count as i32);
    let grouped = keys.reshape(&[tokens, count, size])?;
    let scores = match groups.by {
        GroupScore::TwoBest if size > 1 => ops::indexing::topk_axis(&grouped, 2, -1)?.sum_axis(-1, false)?,
        GroupScore::Best | GroupScore::TwoBest => grouped.max_axis(-1, false)?,
    };
    let dropped = groups.count - groups.kept;
    let others = mlx::columns(&ops::argpartition_axis(&scores, dropped as i32 - 1, -1)?, 0, dropped)?;
    let kept = ops::ones::<f32>(&[tokens, count])?.put_along_axis(&others, Array::from_f32(0.0), -1)?;
    let kept = kept.reshape(&[tokens, count, 1])?.gt(Array::from_f32(0.0))?;
    Ok(ops::select(&kept, &grouped, Array::from_f32(0.0))?.reshape(&[tokens, experts])?)
}
