//! Qwen3, dense (`Qwen3ForCausalLM`): an RMS norm on every query and key head.

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
        layer.attention.qk_norm_eps = Some(config.rms_norm_eps);
    }
    Ok(Box::new(Decoder::load(weights, &spec)?))
}
