//! GLM-4.5 and 4.6 (`Glm4MoeForCausalLM`; Zeng et al. 2025): experts behind dense layers, and heads that turn in part.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, ExpertsSpec, FeedForwardSpec, NormOver, QkNorm, RouterSpec, SharedSpec};

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    n_routed_experts: usize,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    n_shared_experts: Option<usize>,
    first_k_dense_replace: usize,
    n_group: usize,
    topk_group: usize,
    norm_topk_prob: bool,
    routed_scaling_factor: f32,
    use_qk_norm: Option<bool>,
    scoring_func: Option<String>,
    topk_method: Option<String>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, MixtureConfig) = (config.parse()?, config.parse()?);
    let other = |value: &Option<String>, known: &str| value.as_ref().is_some_and(|value| value != known);
    if other(&own.scoring_func, "sigmoid") || other(&own.topk_method, "noaux_tc") {
        return Err(Error::unsupported(
            "another \"scoring_func\" or \"topk_method\" than \"sigmoid\" and \"noaux_tc\"",
        ));
    }
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.predicts_ahead = true;
    // A single weight is not divided by itself.
    let normalize = (own.norm_topk_prob && own.num_experts_per_tok > 1).then_some(0.0);
    let router = RouterSpec::corrected_sigmoid(own.n_group, own.topk_group, normalize, own.routed_scaling_factor);
    let shared = own.n_shared_experts.filter(|&count| count > 0).map(|count| SharedSpec {
        path: "shared_experts",
        inner: count * own.moe_intermediate_size,
        bias: false,
        gate: None,
    });
    let experts = ExpertsSpec::new(own.n_routed_experts, own.num_experts_per_tok, own.moe_intermediate_size, router);
    let experts = ExpertsSpec { shared, ..experts };
    let dims = dense.rope.dims(dense.head_dim(), dense.partial_rotary_factor);
    for attention in spec.attentions() {
        attention.output_bias = false;
        attention.rope = Some((dense.rope.clone(), dims));
        attention.qk_norm = own.use_qk_norm.unwrap_or(false).then_some(QkNorm::rms(dense.rms_norm_eps, NormOver::Head));
    }
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if index >= own.first_k_dense_replace {
            layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}
