//! Hunyuan, dense (`HunYuanDenseV1ForCausalLM`): queries and keys are normalised after they have turned.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{DecoderSpec, NormOver, QkNorm, RopeSpec};

#[derive(Debug, Deserialize)]
struct HunyuanConfig {
    use_qk_norm: Option<bool>,
    rope_scaling: Option<Stretch>,
}

#[derive(Debug, Deserialize)]
struct Stretch {
    alpha: Option<f32>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, HunyuanConfig) = (config.parse()?, config.parse()?);
    let mut spec = dense.decoder(scope, |_| None)?;
    // The base grows with `alpha` ("NTK-aware"), whatever length is served.
    let width = dense.head_dim() as f32;
    let alpha = own.rope_scaling.and_then(|scaling| scaling.alpha).unwrap_or(1.0);
    let rope = RopeSpec::plain(dense.rope.theta() * alpha.powf(width / (width - 2.0)));
    for attention in spec.attentions() {
        attention.rope = Some((rope.clone(), attention.head_dim));
        let norm = QkNorm::rms(dense.rms_norm_eps, NormOver::TurnedHead);
        let normed = own.use_qk_norm.unwrap_or(true);
        attention.qk_norm = normed.then_some(QkNorm { names: Some(["query_layernorm", "key_layernorm"]), ..norm });
    }
    Ok(spec)
}
