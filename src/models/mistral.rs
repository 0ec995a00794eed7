//! Mistral 7B and its successors (Jiang et al. 2023; `MistralForCausalLM`): Llama with a window in every layer,
//! where the config has one.

use super::dense::DenseConfig;
use super::{Model, Scope};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::Decoder;
use crate::weights::Weights;

pub(super) fn load(config: &ModelConfig, scope: &Scope, weights: &mut Weights) -> Result<Box<dyn Model>> {
    let config: DenseConfig = config.parse()?;
    let spec = config.decoder(scope, weights, |_| config.sliding_window)?;
    Ok(Box::new(Decoder::load(weights, &spec)?))
}
