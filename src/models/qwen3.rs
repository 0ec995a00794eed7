//! Qwen3, dense (`Qwen3ForCausalLM`): an RMS norm on every query and key head.

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, NormOver, QkNorm};

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let config: DenseConfig = config.parse()?;
    let mut spec = config.decoder(scope, |layer| config.qwen_window(layer))?;
    for attention in spec.attentions() {
        attention.qk_norm = Some(QkNorm::rms(config.rms_norm_eps, NormOver::Head));
    }
    Ok(spec)
}
