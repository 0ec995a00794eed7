//! Gemma 2 (Gemma Team 2024; `Gemma2ForCausalLM`): norms around both parts of a layer, capped scores and logits, windows in
//! every other layer.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, NormKind, NormPlacement};

#[derive(Debug, Deserialize)]
struct Gemma2Config {
    query_pre_attn_scalar: f32,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let defaults = json!({
        "head_dim": 256, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 4096, "tie_word_embeddings": true, "max_position_embeddings": 8192,
    });
    let dense: DenseConfig = config.parse_over(defaults.clone())?;
    let own: Gemma2Config = config.parse_over(defaults)?;
    let even = |layer: usize| dense.sliding_window.filter(|_| layer.is_multiple_of(2));
    let mut spec = dense.decoder(scope, even)?;
    spec.norm = NormKind::RmsCentred;
    spec.norms = NormPlacement::Around;
    spec.embedding_scale = (spec.hidden as f32).sqrt();
    spec.logit_cap = own.final_logit_softcapping;
    for attention in spec.attentions() {
        attention.scale = own.query_pre_attn_scalar.powf(-0.5);
        attention.soft_cap = own.attn_logit_softcapping;
    }
    Ok(spec)
}
