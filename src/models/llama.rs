//! Llama 2 and 3.x, and the many models that share the type (Touvron et al. 2023; `LlamaForCausalLM`).

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::DecoderSpec;

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let config: DenseConfig = config.parse()?;
    config.decoder(scope, |_| None)
}
