//! Qwen1.5 and Qwen2, mixtures (`Qwen2MoeForCausalLM`): Qwen2 with experts, beside one that all tokens pass.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, ExpertsSpec, FeedForwardSpec, RouterSpec, SharedSpec, Ties};

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    num_experts: usize,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    shared_expert_intermediate_size: usize,
    norm_topk_prob: Option<bool>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, MixtureConfig) = (config.parse()?, config.parse()?);
    let mut spec = dense.decoder(scope, |layer| dense.qwen_window(layer))?;
    let router = RouterSpec { ties: Ties::First, ..RouterSpec::softmax(own.norm_topk_prob.unwrap_or(false)) };
    let shared = SharedSpec {
        gate: Some("shared_expert_gate"),
        ..SharedSpec::new("shared_expert", own.shared_expert_intermediate_size)
    };
    let experts = ExpertsSpec::new(own.num_experts, own.num_experts_per_tok, own.moe_intermediate_size, router);
    for attention in spec.attentions() {
        (attention.qkv_bias, attention.output_bias) = (true, false);
    }
    for layer in &mut spec.layers {
        layer.feed_forward = FeedForwardSpec::Experts(ExpertsSpec { shared: Some(shared.clone()), ..experts.clone() });
    }
    Ok(spec)
}
