//! Command R7B and Command A (`Cohere2ForCausalLM`): attention beside the feed-forward layer, layer norms, and positions in
//! the layers that have windows alone.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, NormKind, NormPlacement};

#[derive(Debug, Deserialize)]
struct CohereConfig {
    logit_scale: f32,
    sliding_window_pattern: Option<usize>,
    /// How transformers writes it.
    _sliding_window_pattern: Option<usize>,
    use_qk_norm: Option<bool>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let eps = config.field("layer_norm_eps").cloned().unwrap_or(json!(1e-5));
    let defaults = json!({ "rms_norm_eps": eps, "sliding_window": 4096, "tie_word_embeddings": true });
    let dense: DenseConfig = config.parse_over(defaults)?;
    let own: CohereConfig = config.parse_over(json!({ "logit_scale": 0.0625 }))?;
    let pattern = own.sliding_window_pattern.or(own._sliding_window_pattern).unwrap_or(4);
    if own.use_qk_norm == Some(true) {
        return Err(Error::unsupported("norms of queries and keys are not supported for this architecture"));
    }
    if pattern == 0 {
        return Err(Error::invalid_model("config.json: \"sliding_window_pattern\" is 0"));
    }
    let is_full = |layer: usize| (layer + 1).is_multiple_of(pattern);
    let mut spec = dense.decoder(scope, |layer| dense.sliding_window.filter(|_| !is_full(layer)))?;
    spec.norm = NormKind::Layer;
    spec.norms = NormPlacement::Parallel;
    spec.logit_scale = own.logit_scale;
    for attention in spec.attentions() {
        let rope = (dense.rope.clone().traditional(), attention.head_dim);
        attention.rope = attention.window.map(|_| rope);
    }
    Ok(spec)
}
