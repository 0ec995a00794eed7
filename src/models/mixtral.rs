//! Mixtral (Jiang et al. 2024; `MixtralForCausalLM`): Mistral with experts.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, ExpertsSpec, FeedForwardSpec, RouterSpec, Ties};

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    num_local_experts: usize,
    num_experts_per_tok: usize,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({ "rope_theta": 1e6 }))?;
    let own: MixtureConfig = config.parse()?;
    let mut spec = dense.decoder(scope, |_| dense.sliding_window)?;
    let router = RouterSpec { ties: Ties::First, ..RouterSpec::softmax_of_chosen("gate") };
    let experts = ExpertsSpec::new(own.num_local_experts, own.num_experts_per_tok, dense.intermediate_size, router);
    for layer in &mut spec.layers {
        layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        layer.feed_forward_path = "block_sparse_moe";
    }
    Ok(spec)
}
