//! LFM2, dense and with experts (Liquid AI 2025; `Lfm2ForCausalLM`, `Lfm2MoeForCausalLM`): gated short convolutions in most layers.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::{DenseConfig, check_sizes};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    DecoderSpec, ExpertsSpec, FeedForwardSpec, MixerSpec, NormOver, NormPlacement, Normalize, QkNorm, RecurrentSpec,
    RouterSpec, ShortConvSpec, Ties,
};

#[derive(Debug, Deserialize)]
struct LfmConfig {
    #[serde(rename = "conv_L_cache")]
    conv_taps: usize,
    conv_bias: bool,
    full_attn_idxs: Option<Vec<usize>>,
    layer_types: Option<Vec<String>>,
    block_multiple_of: Option<usize>,
    block_ffn_dim_multiplier: Option<f64>,
    block_auto_adjust_ff_dim: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct MixtureConfig {
    num_experts: usize,
    num_experts_per_tok: usize,
    moe_intermediate_size: usize,
    num_dense_layers: usize,
    norm_topk_prob: bool,
    use_expert_bias: bool,
    routed_scaling_factor: Option<f32>,
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let own: LfmConfig = config.parse()?;
    let mut spec = own.decoder(config, scope)?;
    for layer in &mut spec.layers {
        if let FeedForwardSpec::Gated(mlp) = &mut layer.feed_forward {
            mlp.inner = own.inner(mlp.inner)?;
            mlp.names = ["w1", "w3", "w2"];
        }
    }
    Ok(spec)
}

pub(super) fn declare_moe(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let (own, mixture): (LfmConfig, MixtureConfig) = (config.parse()?, config.parse()?);
    let mut spec = own.decoder(config, scope)?;
    let normalize = if mixture.norm_topk_prob { Normalize::SumPlus(1e-6) } else { Normalize::No };
    let scale = mixture.routed_scaling_factor.unwrap_or(1.0);
    let router = RouterSpec {
        correction: mixture.use_expert_bias.then_some("expert_bias"),
        normalize,
        ties: Ties::Last,
        ..RouterSpec::corrected_sigmoid(1, 1, None, scale)
    };
    let MixtureConfig { num_experts, num_experts_per_tok, moe_intermediate_size, num_dense_layers, .. } = mixture;
    let experts = ExpertsSpec::new(num_experts, num_experts_per_tok, moe_intermediate_size, router);
    for layer in spec.layers.iter_mut().skip(num_dense_layers) {
        layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
    }
    Ok(spec)
}

impl LfmConfig {
    /// The declaration with dense feed-forward layers.
    fn decoder(&self, config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
        let field = |name: &str| config.field(name).cloned();
        let eps = field("norm_eps").unwrap_or(json!(1e-5));
        let inner = field("block_ff_dim").or(field("intermediate_size"));
        let defaults =
            json!({ "rms_norm_eps": eps, "rope_theta": 1e6, "tie_word_embeddings": true, "intermediate_size": inner });
        let dense: DenseConfig = config.parse_over(defaults)?;
        let norm_eps = dense.rms_norm_eps;
        let is_full = |layer: usize| match (&self.full_attn_idxs, &self.layer_types) {
            (Some(full), _) => full.contains(&layer),
            (None, Some(types)) => types.get(layer).is_some_and(|kind| kind == "full_attention"),
            (None, None) => false,
        };
        if self.full_attn_idxs.is_none() && self.layer_types.is_none() {
            return Err(Error::invalid_model("config.json: \"layer_types\" is missing"));
        }
        let mut spec = DenseConfig { layer_types: None, ..dense }.decoder(scope, |_| None)?;
        spec.norms = NormPlacement::Before(["operator_norm", "ffn_norm"]);
        spec.final_norm = "embedding_norm";
        for attention in spec.attentions() {
            attention.output_name = "out_proj";
            let names = ["q_layernorm", "k_layernorm"];
            attention.qk_norm = Some(QkNorm { names: Some(names), ..QkNorm::rms(norm_eps, NormOver::Head) });
        }
        let hidden = spec.hidden;
        let recurrent = ShortConvSpec { hidden, taps: self.conv_taps, bias: self.conv_bias };
        let recurrent = MixerSpec::Recurrent(RecurrentSpec::ShortConv(recurrent));
        for (index, layer) in spec.layers.iter_mut().enumerate() {
            layer.feed_forward_path = "feed_forward";
            if !is_full(index) {
                (layer.mixer, layer.mixer_path) = (recurrent.clone(), "conv");
            }
        }
        Ok(spec)
    }

    /// Width inside of dense layers, of the one that the config has.
    fn inner(&self, declared: usize) -> Result<usize> {
        if !self.block_auto_adjust_ff_dim.unwrap_or(false) {
            return Ok(declared);
        }
        let mut inner = 2 * declared / 3;
        if let Some(factor) = self.block_ffn_dim_multiplier {
            inner = (factor * inner as f64) as usize;
        }
        let multiple = self.block_multiple_of.unwrap_or(1).max(1);
        let inner = inner.checked_next_multiple_of(multiple).unwrap_or(usize::MAX);
        check_sizes(&[("block_ff_dim", inner)])?;
        Ok(inner)
    }
}
