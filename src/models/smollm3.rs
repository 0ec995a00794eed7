//! SmolLM3 (`SmolLM3ForCausalLM`): Llama, of which some layers do not know positions (Yang et al. 2025, "RoPE to NoPE").

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::DecoderSpec;

#[derive(Debug, Deserialize)]
struct SmolConfig {
    no_rope_layer_interval: usize,
    /// For each layer whether positions turn it, in spite of the name.
    no_rope_layers: Option<Vec<u8>>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let defaults = json!({ "tie_word_embeddings": true, "no_rope_layer_interval": 4 });
    let dense: DenseConfig = config.parse_over(defaults.clone())?;
    let own: SmolConfig = config.parse_over(defaults)?;
    let mut spec = dense.decoder(scope, |_| dense.sliding_window.filter(|_| dense.use_sliding_window == Some(true)))?;
    if own.no_rope_layers.as_ref().is_some_and(|layers| layers.len() != spec.layers.len()) {
        return Err(Error::invalid_model(
            "config.json: \"no_rope_layers\" has not as many entries as there are layers",
        ));
    }
    for (index, attention) in spec.attentions().enumerate() {
        let turns = match &own.no_rope_layers {
            Some(layers) => layers[index] != 0,
            None => own.no_rope_layer_interval == 0 || !(index + 1).is_multiple_of(own.no_rope_layer_interval),
        };
        attention.rope = attention.rope.take().filter(|_| turns);
    }
    Ok(spec)
}
