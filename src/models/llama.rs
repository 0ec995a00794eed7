//! Llama 2 and 3.x, and the many models that share the type (Touvron et al. 2023; `LlamaForCausalLM`).

use super::dense::DenseConfig;
use super::{Model, Scope};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::Decoder;
use crate::weights::Weights;

pub(super) fn load(config: &ModelConfig, scope: &Scope, weights: &mut Weights) -> Result<Box<dyn Model>> {
    let config: DenseConfig = config.parse()?;
    let spec = config.decoder(scope, weights, |_| None)?;
    Ok(Box::new(Decoder::load(weights, &spec)?))
}
