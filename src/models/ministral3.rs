//! Ministral 3 (`Ministral3ForCausalLM`): Mistral whose queries grow with their position.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, PositionScale};

#[derive(Debug, Deserialize)]
struct MinistralConfig {
    rope_parameters: Growth,
}

#[derive(Debug, Deserialize)]
struct Growth {
    llama_4_scaling_beta: Option<f32>,
    original_max_position_embeddings: Option<usize>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({ "tie_word_embeddings": true }))?;
    let growth = config.parse::<MinistralConfig>()?.rope_parameters;
    let mut spec = dense.decoder(scope, |_| None)?;
    if let (Some(beta), Some(original @ 1..)) = (growth.llama_4_scaling_beta, growth.original_max_position_embeddings) {
        let scale = PositionScale { beta, original, offset: 0 };
        spec.attentions().for_each(|attention| attention.position_scale = Some(scale));
    }
    Ok(spec)
}
