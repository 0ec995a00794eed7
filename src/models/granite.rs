//! Granite 3 and 4, dense (`GraniteForCausalLM`): Llama with four factors.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::DecoderSpec;

/// The factors of all Granites.
#[derive(Debug, Deserialize)]
pub(super) struct Factors {
    embedding_multiplier: f32,
    attention_multiplier: f32,
    residual_multiplier: f32,
    logits_scaling: f32,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({ "tie_word_embeddings": true }))?;
    let mut spec = dense.decoder(scope, |_| None)?;
    config.parse::<Factors>()?.apply(&mut spec)?;
    Ok(spec)
}

impl Factors {
    pub fn apply(&self, spec: &mut DecoderSpec) -> Result<()> {
        if self.logits_scaling == 0.0 {
            return Err(Error::invalid_model("config.json: \"logits_scaling\" is 0"));
        }
        spec.embedding_scale = self.embedding_multiplier;
        spec.residual_scale = self.residual_multiplier;
        spec.logit_scale = 1.0 / self.logits_scaling;
        spec.attentions().for_each(|attention| attention.scale = self.attention_multiplier);
        Ok(())
    }
}
