//! Qwen3-Next (`Qwen3NextForCausalLM`): three layers of GatedDeltaNet for each of gated attention, with experts.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    DecoderSpec, DeltaNetSpec, DeltaProjections, ExpertsSpec, FeedForwardSpec, MixerSpec, NormOver, QkNorm,
    RecurrentSpec, RouterSpec, SharedSpec,
};

/// The fields that Qwen3-Next and Qwen3.5 share.
#[derive(Debug, Deserialize)]
pub(super) struct HybridConfig {
    linear_num_value_heads: usize,
    linear_num_key_heads: usize,
    linear_key_head_dim: usize,
    linear_value_head_dim: usize,
    linear_conv_kernel_dim: usize,
    full_attention_interval: Option<usize>,
    num_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    moe_intermediate_size: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<usize>,
    /// Layers without experts.
    mlp_only_layers: Option<Vec<usize>>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, HybridConfig) = (config.parse()?, config.parse()?);
    let mut spec = own.decoder(dense, scope, DeltaProjections::Interleaved)?;
    // Authors keep experts apart; MLX's tools stack them, and add one to the norms.
    spec.is_centred = Some(|weights| weights.any(|name| name.contains(".experts.0.")));
    spec.predicts_ahead = true;
    let step = own.decoder_sparse_step.unwrap_or(1).max(1);
    let experts = own.experts(false)?;
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let dense = own.mlp_only_layers.as_ref().is_some_and(|layers| layers.contains(&index));
        if let Some(experts) = experts.as_ref().filter(|_| !dense && (index + 1).is_multiple_of(step)) {
            layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}

impl HybridConfig {
    /// The declaration with dense feed-forward layers.
    pub fn decoder(&self, mut dense: DenseConfig, scope: &Scope, projections: DeltaProjections) -> Result<DecoderSpec> {
        let interval = self.full_attention_interval.unwrap_or(4);
        if interval == 0 {
            return Err(Error::invalid_model("config.json: \"full_attention_interval\" is 0"));
        }
        // The interval says the same.
        dense.layer_types = None;
        let mut spec = dense.decoder(scope, |_| None)?;
        let dims = dense.rope.dims(dense.head_dim(), dense.partial_rotary_factor);
        for attention in spec.attentions() {
            attention.gated = true;
            attention.qk_norm = Some(QkNorm::rms(dense.rms_norm_eps, NormOver::Head));
            attention.rope = Some((dense.rope.clone(), dims));
        }
        let recurrent = RecurrentSpec::DeltaNet(DeltaNetSpec {
            hidden: dense.hidden_size,
            key_heads: self.linear_num_key_heads,
            value_heads: self.linear_num_value_heads,
            key_width: self.linear_key_head_dim,
            value_width: self.linear_value_head_dim,
            taps: self.linear_conv_kernel_dim,
            norm_eps: dense.rms_norm_eps,
            projections,
        });
        for (index, layer) in spec.layers.iter_mut().enumerate() {
            if !(index + 1).is_multiple_of(interval) {
                (layer.mixer, layer.mixer_path) = (MixerSpec::Recurrent(recurrent.clone()), "linear_attn");
            }
        }
        Ok(spec)
    }

    /// Its experts, if it has some; `normalize` is what a silent config means.
    pub fn experts(&self, normalize: bool) -> Result<Option<ExpertsSpec>> {
        let Some(count) = self.num_experts.filter(|&count| count > 0) else { return Ok(None) };
        let need = |value: Option<usize>, name: &str| {
            value.ok_or_else(|| Error::invalid_model(format!("config.json: {name:?} is missing")))
        };
        let router = RouterSpec::softmax(self.norm_topk_prob.unwrap_or(normalize));
        let shared = need(self.shared_expert_intermediate_size, "shared_expert_intermediate_size")?;
        let shared = (shared > 0)
            .then_some(SharedSpec { gate: Some("shared_expert_gate"), ..SharedSpec::new("shared_expert", shared) });
        let per_token = need(self.num_experts_per_tok, "num_experts_per_tok")?;
        let inner = need(self.moe_intermediate_size, "moe_intermediate_size")?;
        Ok(Some(ExpertsSpec { shared, ..ExpertsSpec::new(count, per_token, inner, router) }))
    }
}
