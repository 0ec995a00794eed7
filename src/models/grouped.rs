//! Experts in groups, chosen by corrected sigmoids, as DeepSeek V3 and the GLMs after it have them.

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::nn::{ExpertsSpec, RouterSpec, SharedSpec};

/// The fields that their configs share.
#[derive(Debug, Deserialize)]
pub(super) struct GroupedConfig {
    n_routed_experts: Option<usize>,
    n_shared_experts: Option<usize>,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    n_group: usize,
    topk_group: usize,
    norm_topk_prob: bool,
    routed_scaling_factor: f32,
    scoring_func: Option<String>,
    topk_method: Option<String>,
}

impl GroupedConfig {
    /// The experts of a layer, if the model has some; `weight_eps` is added to the sum that their weights are divided by.
    pub fn experts(&self, weight_eps: f32) -> Result<Option<ExpertsSpec>> {
        let other = |value: &Option<String>, known: &str| value.as_ref().is_some_and(|value| value != known);
        if other(&self.scoring_func, "sigmoid") || other(&self.topk_method, "noaux_tc") {
            return Err(Error::unsupported(
                "another \"scoring_func\" or \"topk_method\" than \"sigmoid\" and \"noaux_tc\"",
            ));
        }
        let Some(count) = self.n_routed_experts.filter(|&count| count > 0) else { return Ok(None) };
        // A single weight is not divided by itself.
        let normalize = (self.norm_topk_prob && self.num_experts_per_tok > 1).then_some(weight_eps);
        let scale = self.routed_scaling_factor;
        let router = RouterSpec::corrected_sigmoid(self.n_group, self.topk_group, normalize, scale);
        let inner = self.moe_intermediate_size;
        let shared = self.n_shared_experts.filter(|&count| count > 0);
        let shared = shared.map(|count| SharedSpec::new("shared_experts", count * inner));
        Ok(Some(ExpertsSpec { shared, ..ExpertsSpec::new(count, self.num_experts_per_tok, inner, router) }))
    }
}
