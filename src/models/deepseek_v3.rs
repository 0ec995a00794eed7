//! DeepSeek V3 and what shares its shape (DeepSeek-AI 2024; `DeepseekV3ForCausalLM`): latent attention, and experts in groups.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Scope;
use super::dense::DenseConfig;
use super::grouped::GroupedConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, FeedForwardSpec, LatentSpec, MixerSpec, OutputHead};

#[derive(Debug, Deserialize)]
struct DeepseekConfig {
    q_lora_rank: Option<usize>,
    kv_lora_rank: usize,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
    v_head_dim: usize,
    rope_scaling: Option<Stretch>,
    moe_layer_freq: usize,
    first_k_dense_replace: usize,
}

#[derive(Debug, Deserialize)]
struct Stretch {
    factor: Option<f32>,
    mscale_all_dim: Option<f32>,
}

/// What the types that share this shape do not.
pub(super) struct Family {
    /// What a config means that is silent.
    pub defaults: Value,
    /// Epsilon of the norms of narrow rows; that of all others without it.
    pub narrow_eps: Option<f32>,
    /// Added to the sum that experts' weights are divided by.
    pub weight_eps: f32,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let defaults = json!({
        "rms_norm_eps": 1e-6, "n_group": 1, "topk_group": 1, "moe_layer_freq": 1, "first_k_dense_replace": 0,
        "norm_topk_prob": true, "routed_scaling_factor": 1.0,
    });
    declare_family(config, scope, Family { defaults, narrow_eps: Some(1e-6), weight_eps: 0.0 })
}

/// The declaration for a type of this shape.
pub(super) fn declare_family(config: &ModelConfig, scope: &Scope, family: Family) -> Result<DecoderSpec> {
    let Family { mut defaults, narrow_eps, weight_eps } = family;
    let own: DeepseekConfig = config.parse_over(defaults.clone())?;
    let experts = config.parse_over::<GroupedConfig>(defaults.clone())?.experts(weight_eps)?;
    // Heads have no width of their own here.
    defaults["head_dim"] = json!(own.qk_rope_head_dim);
    let dense: DenseConfig = config.parse_over(defaults)?;
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.predicts_ahead = true;
    if scope.head {
        spec.head = OutputHead::Own;
    }
    let mixer = MixerSpec::Latent(LatentSpec {
        heads: dense.num_attention_heads,
        query_rank: own.q_lora_rank,
        rank: own.kv_lora_rank,
        plain: own.qk_nope_head_dim,
        turning: own.qk_rope_head_dim,
        value: own.v_head_dim,
        scale: own.scale(),
        norm_eps: narrow_eps.unwrap_or(dense.rms_norm_eps),
        rope: dense.rope.clone().traditional(),
        bias: dense.attention_bias.unwrap_or(false),
    });
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        layer.mixer = mixer.clone();
        let sparse = index >= own.first_k_dense_replace && index.is_multiple_of(own.moe_layer_freq.max(1));
        if let Some(experts) = experts.as_ref().filter(|_| sparse) {
            layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}

impl DeepseekConfig {
    /// Factor on scores: where positions are stretched, scores are, too (YaRN's "mscale").
    fn scale(&self) -> f32 {
        let plain = ((self.qk_nope_head_dim + self.qk_rope_head_dim) as f32).powf(-0.5);
        let stretched = self.rope_scaling.as_ref().and_then(|scaling| scaling.factor.zip(scaling.mscale_all_dim));
        match stretched {
            Some((factor, mscale)) if factor > 1.0 && mscale != 0.0 => {
                plain * (0.1 * mscale * factor.ln() + 1.0).powi(2)
            }
            _ => plain,
        }
    }
}
