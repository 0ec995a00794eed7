//! EXAONE 4 (`Exaone4ForCausalLM`): norms behind both parts of a layer, and positions in the layers that have windows alone.

use serde_json::Value;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, NormOver, NormPlacement, QkNorm};

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse()?;
    // A letter for each layer, repeated: local or global. Without it all are global and know positions.
    let pattern = config.field("sliding_window_pattern").and_then(Value::as_str).unwrap_or_default().as_bytes();
    if pattern.iter().any(|kind| !b"LG".contains(kind)) {
        return Err(Error::unsupported("\"sliding_window_pattern\" has other letters than L and G"));
    }
    let is_local = |layer: usize| !pattern.is_empty() && pattern[layer % pattern.len()] == b'L';
    let mut spec = dense.decoder(scope, |layer| dense.sliding_window.filter(|_| is_local(layer)))?;
    spec.norms = NormPlacement::After;
    for attention in spec.attentions() {
        attention.qk_norm = Some(QkNorm::rms(dense.rms_norm_eps, NormOver::Head));
        if !pattern.is_empty() && attention.window.is_none() {
            attention.rope = None;
        }
    }
    Ok(spec)
}
