//! Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): biases on the query, key and value projections.

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::DecoderSpec;

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let config: DenseConfig = config.parse()?;
    let mut spec = config.decoder(scope, |layer| config.qwen_window(layer))?;
    for attention in spec.attentions() {
        (attention.qkv_bias, attention.output_bias) = (true, false);
    }
    Ok(spec)
}
