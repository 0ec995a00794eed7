//! gpt-oss (OpenAI 2025; `GptOssForCausalLM`): experts in mxfp4 with biases, sinks, and windows in every other layer.

use serde_json::{Value, json};

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, ExpertActivation, ExpertsSpec, FeedForwardSpec, OutputHead, RouterSpec};

/// Slope of the gate's sigmoid; no config has it.
const ALPHA: f32 = 1.702;

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({
        "sliding_window": 128, "rope_theta": 150_000.0, "rms_norm_eps": 1e-5, "head_dim": 64,
        "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    }))?;
    let limit = config.field("swiglu_limit").and_then(Value::as_f64).unwrap_or(7.0) as f32;
    let count =
        |key: &str| config.integer(key).ok_or_else(|| Error::invalid_model(format!("config.json: {key:?} is missing")));
    let router = RouterSpec { bias: true, ..RouterSpec::softmax_of_chosen("router") };
    let per_token = config.integer("experts_per_token").map_or_else(|| count("num_experts_per_tok"), Ok)?;
    let experts = ExpertsSpec {
        bias: true,
        activation: ExpertActivation::ClampedSwiGlu { alpha: ALPHA, limit },
        stacked: "experts",
        ..ExpertsSpec::new(count("num_local_experts")?, per_token, dense.intermediate_size, router)
    };
    let mut spec = dense.decoder(scope, |layer| dense.sliding_window.filter(|_| layer.is_multiple_of(2)))?;
    if scope.head {
        spec.head = OutputHead::Own;
    }
    for attention in spec.attentions() {
        (attention.qkv_bias, attention.output_bias, attention.sinks) = (true, true, true);
    }
    for layer in &mut spec.layers {
        layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
    }
    Ok(spec)
}
