//! Mistral 7B and its successors (Jiang et al. 2023; `MistralForCausalLM`): Llama with a window in every layer,
//! where the config has one.

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::DecoderSpec;

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let config: DenseConfig = config.parse()?;
    config.decoder(scope, |_| config.sliding_window)
}
