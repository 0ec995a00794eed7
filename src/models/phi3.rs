//! Phi-3 and Phi-4 (Abdin et al. 2024; `Phi3ForCausalLM`): joined matrices, and heads that turn in part.

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, FeedForwardSpec};

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse()?;
    let mut spec = dense.decoder(scope, |_| dense.sliding_window)?;
    let dims = dense.rope.dims(dense.head_dim(), dense.partial_rotary_factor);
    for attention in spec.attentions() {
        attention.fused = true;
        attention.rope = Some((dense.rope.clone(), dims));
    }
    for layer in &mut spec.layers {
        if let FeedForwardSpec::Gated(mlp) = &mut layer.feed_forward {
            mlp.joined = Some(["gate_up_proj", "down_proj"]);
        }
    }
    Ok(spec)
}
