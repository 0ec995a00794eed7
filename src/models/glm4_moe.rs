//! GLM-4.5 and 4.6 (`Glm4MoeForCausalLM`; Zeng et al. 2025): experts behind dense layers, and heads that turn in part.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use super::grouped::GroupedConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, FeedForwardSpec, NormOver, QkNorm};

#[derive(Debug, Deserialize)]
struct GlmConfig {
    first_k_dense_replace: usize,
    use_qk_norm: Option<bool>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, GlmConfig) = (config.parse()?, config.parse()?);
    let experts = config.parse::<GroupedConfig>()?.experts(0.0)?;
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.predicts_ahead = true;
    let dims = dense.rope.dims(dense.head_dim(), dense.partial_rotary_factor);
    for attention in spec.attentions() {
        attention.output_bias = false;
        attention.rope = Some((dense.rope.clone(), dims));
        attention.qk_norm = own.use_qk_norm.unwrap_or(false).then_some(QkNorm::rms(dense.rms_norm_eps, NormOver::Head));
    }
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if let Some(experts) = experts.as_ref().filter(|_| index >= own.first_k_dense_replace) {
            layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        }
    }
    Ok(spec)
}
