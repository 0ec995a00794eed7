//! The text part of Qwen3.5 (`Qwen3_5ForConditionalGeneration`), dense and with experts: Qwen3-Next's layers with input projections
//! of their own.

use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use super::qwen3_next::HybridConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, DeltaProjections, FeedForwardSpec};

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    // Mixtures have no width of dense layers.
    let defaults = json!({ "intermediate_size": 1, "tie_word_embeddings": false, "partial_rotary_factor": 0.25 });
    let dense: DenseConfig = config.parse_over(defaults)?;
    let own: HybridConfig = config.parse()?;
    let nested = config.field("rope_parameters").and_then(|rope| rope.get("partial_rotary_factor"));
    let factor = nested.and_then(serde_json::Value::as_f64).map(|factor| factor as f32);
    let dense = DenseConfig { partial_rotary_factor: factor.or(dense.partial_rotary_factor), ..dense };
    let mut spec = own.decoder(dense, scope, DeltaProjections::Separate)?;
    // MLX's tools put the model into one that sees, always, and add one to the norms.
    spec.is_centred = Some(|weights| !weights.contains("language_model.model.embed_tokens.weight"));
    spec.predicts_ahead = true;
    if let Some(experts) = own.experts(true)? {
        spec.layers.iter_mut().for_each(|layer| layer.feed_forward = FeedForwardSpec::Experts(experts.clone()));
    }
    Ok(spec)
}
