//! ERNIE 4.5, dense (`Ernie4_5ForCausalLM`): Llama whose positions turn neighbouring dimensions.

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, FeedForwardSpec};

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse()?;
    let bias = config.field("use_bias").and_then(serde_json::Value::as_bool).unwrap_or(false);
    let mut spec = dense.decoder(scope, |_| None)?;
    for attention in spec.attentions() {
        (attention.qkv_bias, attention.output_bias) = (bias, bias);
        attention.rope = Some((dense.rope.clone().traditional(), attention.head_dim));
    }
    for layer in &mut spec.layers {
        if let FeedForwardSpec::Gated(mlp) = &mut layer.feed_forward {
            mlp.bias = bias;
        }
    }
    Ok(spec)
}
