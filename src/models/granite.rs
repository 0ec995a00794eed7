//! Granite 3 and 4, dense (`GraniteForCausalLM`): Llama with four factors.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::DecoderSpec;

#[derive(Debug, Deserialize)]
struct GraniteConfig {
    embedding_multiplier: f32,
    attention_multiplier: f32,
    residual_multiplier: f32,
    logits_scaling: f32,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({ "tie_word_embeddings": true }))?;
    let own: GraniteConfig = config.parse()?;
    if own.logits_scaling == 0.0 {
        return Err(Error::invalid_model("config.json: \"logits_scaling\" is 0"));
    }
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.embedding_scale = own.embedding_multiplier;
    spec.residual_scale = own.residual_multiplier;
    spec.logit_scale = 1.0 / own.logits_scaling;
    spec.attentions().for_each(|attention| attention.scale = own.attention_multiplier);
    Ok(spec)
}
