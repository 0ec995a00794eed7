//! Qwen3, mixtures (`Qwen3MoeForCausalLM`; Yang et al. 2025): Qwen3 with experts in most layers.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, ExpertsSpec, FeedForwardSpec, NormOver, QkNorm, RouterSpec};

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    num_experts: usize,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<usize>,
    /// Layers without experts.
    mlp_only_layers: Option<Vec<usize>>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, MixtureConfig) = (config.parse()?, config.parse()?);
    let mut spec = dense.decoder(scope, |layer| dense.qwen_window(layer))?;
    let router = RouterSpec::softmax(own.norm_topk_prob.unwrap_or(false));
    let experts = ExpertsSpec::new(own.num_experts, own.num_experts_per_tok, own.moe_intermediate_size, router);
    let step = own.decoder_sparse_step.unwrap_or(1).max(1);
    for attention in spec.attentions() {
        attention.qk_norm = Some(QkNorm::rms(dense.rms_norm_eps, NormOver::Head));
    }
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let dense = own.mlp_only_layers.as_ref().is_some_and(|layers| layers.contains(&index));
        if !dense && own.num_experts > 0 && (index + 1).is_multiple_of(step) {
            layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}
