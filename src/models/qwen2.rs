//! Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): biases on the query, key and value projections.

use super::dense::DenseConfig;
use super::{Model, Scope};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::Decoder;
use crate::weights::Weights;

pub(super) fn load(config: &ModelConfig, scope: &Scope, weights: &mut Weights) -> Result<Box<dyn Model>> {
    let config: DenseConfig = config.parse()?;
    let mut spec = config.decoder(scope, weights, |layer| config.qwen_window(layer))?;
    for layer in &mut spec.layers {
        layer.attention.qkv_bias = true;
        layer.attention.output_bias = false;
    }
    Ok(Box::new(Decoder::load(weights, &spec)?))
}
