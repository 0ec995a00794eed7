//! Llama 2 and 3.x, and the many models that share the type (Touvron et al. 2023; `LlamaForCausalLM`).

use super::Model;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::Decoder;
use crate::weights::Weights;

pub(super) fn load(config: &ModelConfig, context: usize, weights: &mut Weights) -> Result<Box<dyn Model>> {
    let config: DenseConfig = config.parse()?;
    let spec = config.decoder(context, weights, |_| None)?;
    Ok(Box::new(Decoder::load(weights, &spec)?))
}
