//! OLMo 3 (`Olmo3ForCausalLM`): norms behind both parts of a layer, queries and keys normalised over all heads, and windows.

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, NormOver, NormPlacement, QkNorm};

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse()?;
    let is_full = |layer: usize| (layer + 1).is_multiple_of(4);
    let mut spec = dense.decoder(scope, |layer| dense.sliding_window.filter(|_| !is_full(layer)))?;
    spec.norms = NormPlacement::After;
    for attention in spec.attentions() {
        attention.qk_norm = Some(QkNorm::rms(dense.rms_norm_eps, NormOver::Token));
        if attention.window.is_some() {
            // Long contexts are for the other layers.
            attention.rope = Some((dense.rope.unscaled(), attention.head_dim));
        }
    }
    Ok(spec)
}
