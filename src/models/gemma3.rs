//! The text part of Gemma 3 (Gemma Team 2025; `Gemma3ForCausalLM`): windows in most layers, whose positions turn faster.

use half::bf16;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, NormKind, NormOver, NormPlacement, QkNorm, RopeSpec};

#[derive(Debug, Deserialize)]
struct Gemma3Config {
    query_pre_attn_scalar: f32,
    rope_local_base_freq: f32,
    sliding_window_pattern: Option<usize>,
    /// How transformers writes it.
    _sliding_window_pattern: Option<usize>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let defaults = json!({
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "max_position_embeddings": 131_072,
    });
    let dense: DenseConfig = config.parse_over(defaults.clone())?;
    let own: Gemma3Config = config.parse_over(defaults)?;
    let pattern = own.sliding_window_pattern.or(own._sliding_window_pattern).unwrap_or(6);
    if pattern == 0 {
        return Err(Error::invalid_model("config.json: \"sliding_window_pattern\" is 0"));
    }
    let is_full = |layer: usize| (layer + 1).is_multiple_of(pattern);
    let mut spec = dense.decoder(scope, |layer| dense.sliding_window.filter(|_| !is_full(layer)))?;
    spec.norm = NormKind::RmsCentred;
    spec.norms = NormPlacement::Around;
    // The models were trained with the factor in bf16.
    spec.embedding_scale = bf16::from_f32((spec.hidden as f32).sqrt()).to_f32();
    spec.logit_cap = own.final_logit_softcapping;
    let [local, global] = match config.field("rope_parameters") {
        // A rotation for each kind of layer, as transformers 5 writes it.
        Some(parameters) if parameters.get("full_attention").is_some() => {
            [rope_of(parameters, "sliding_attention")?, rope_of(parameters, "full_attention")?]
        }
        _ => [RopeSpec::plain(own.rope_local_base_freq), dense.rope.clone()],
    };
    for attention in spec.attentions() {
        attention.scale = own.query_pre_attn_scalar.powf(-0.5);
        attention.soft_cap = own.attn_logit_softcapping;
        let kind = NormKind::RmsCentred;
        attention.qk_norm = Some(QkNorm { kind, ..QkNorm::rms(dense.rms_norm_eps, NormOver::Head) });
        let rope = if attention.window.is_some() { &local } else { &global };
        attention.rope = Some((rope.clone(), attention.head_dim));
    }
    Ok(spec)
}

/// The rotation of one kind of layer, where `rope_parameters` has one for each.
pub(super) fn rope_of(parameters: &Value, kind: &str) -> Result<RopeSpec> {
    RopeSpec::deserialize(json!({ "rope_parameters": parameters.get(kind) }))
        .map_err(|e| Error::invalid_model(format!("config.json: rope_parameters.{kind}: {e}")))
}
