//! MiniMax-M2 (`MiniMaxM2ForCausalLM`): many small experts, queries and keys normalised over all heads.

use serde::Deserialize;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{DecoderSpec, ExpertsSpec, FeedForwardSpec, NormOver, QkNorm, RouterSpec};

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    num_local_experts: usize,
    num_experts_per_tok: usize,
    rotary_dim: usize,
    use_qk_norm: Option<bool>,
    scoring_func: Option<String>,
    /// 1 for softmax attention; MiniMax-Text-01, of the same name, has layers of another kind.
    attn_type_list: Option<Vec<u8>>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (dense, own): (DenseConfig, MixtureConfig) = (config.parse()?, config.parse()?);
    if own.attn_type_list.is_some_and(|types| types.iter().any(|&kind| kind != 1)) {
        return Err(Error::unsupported("layers of linear attention (\"attn_type_list\") are not supported"));
    }
    if own.scoring_func.is_some_and(|scores| scores != "sigmoid") {
        return Err(Error::unsupported("another \"scoring_func\" than \"sigmoid\""));
    }
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.predicts_ahead = true;
    let router = RouterSpec {
        correction: Some("e_score_correction_bias"),
        ..RouterSpec::corrected_sigmoid(1, 1, Some(1e-20), 1.0)
    };
    let experts = ExpertsSpec::new(own.num_local_experts, own.num_experts_per_tok, dense.intermediate_size, router);
    for attention in spec.attentions() {
        attention.rope = Some((dense.rope.clone(), own.rotary_dim));
        let normed = own.use_qk_norm.unwrap_or(true);
        attention.qk_norm = normed.then_some(QkNorm::rms(dense.rms_norm_eps, NormOver::Token));
    }
    for layer in &mut spec.layers {
        layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
        layer.feed_forward_path = "block_sparse_moe";
    }
    Ok(spec)
}
