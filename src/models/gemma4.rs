//! The text part of Gemma 4 (Google 2026; `Gemma4ForCausalLM`): windows in most layers, wider heads in the others. Small models have
//! inputs of single layers and share keys among the last layers; large ones take keys for values, and some have experts.
//!
//! Where mlx-lm (0.32.2, `gemma4_text.py`) and transformers disagree on what a silent config means, it has to say it.

use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::Scope;
use super::dense::DenseConfig;
use super::gemma3::rope_of;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, AttentionSpec, CrossLayerSpec, DecoderSpec, DenseAndExpertsSpec, ExpertActivation, ExpertsSpec,
    FeedForwardSpec, LayerSpec, MixerSpec, NormOver, NormPlacement, PerLayerInputSpec, QkNorm, RopeSpec, RouterSpec,
};

/// Names of the norms around experts.
const EXPERT_NORMS: [&str; 3] =
    ["post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"];

#[derive(Debug, Deserialize)]
struct Gemma4Config {
    layer_types: Vec<String>,
    num_key_value_heads: usize,
    num_kv_shared_layers: usize,
    /// May be null, but not be missing.
    #[serde(deserialize_with = "stated")]
    final_logit_softcapping: Option<f32>,
    global_head_dim: Option<usize>,
    num_global_key_value_heads: Option<usize>,
    attention_k_eq_v: Option<bool>,
    use_double_wide_mlp: Option<bool>,
    hidden_size_per_layer_input: Option<usize>,
    vocab_size_per_layer_input: Option<usize>,
    enable_moe_block: Option<bool>,
    num_experts: Option<usize>,
    top_k_experts: Option<usize>,
    moe_intermediate_size: Option<usize>,
    use_bidirectional_attention: Option<Value>,
    per_layer_config: Option<Value>,
}

fn stated<'de, D: Deserializer<'de>>(value: D) -> std::result::Result<Option<f32>, D::Error> {
    Option::deserialize(value)
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({
        "head_dim": 256, "vocab_size": 262_144, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 512, "tie_word_embeddings": true, "max_position_embeddings": 131_072,
    }))?;
    let own: Gemma4Config = config.parse()?;
    own.check(&dense)?;
    let mut spec = dense.decoder(scope, |_| None)?;
    let wide = DenseConfig { head_dim: Some(own.global_head_dim()), ..dense.clone() };
    let wide = DenseConfig { num_key_value_heads: Some(own.global_heads()), ..wide }.decoder(scope, |_| None)?;
    for (layer, wide) in spec.layers.iter_mut().zip(wide.layers) {
        if let MixerSpec::Attention(AttentionSpec { window: None, .. }) = layer.mixer {
            *layer = wide;
        }
    }
    spec.norms = NormPlacement::Around;
    spec.embedding_scale = (spec.hidden as f32).sqrt();
    spec.logit_cap = own.final_logit_softcapping;
    spec.layer_scalar = true;
    spec.per_layer_input = own.per_layer_input(spec.vocab)?;
    for attention in spec.attentions() {
        let full = attention.window.is_none();
        let rope = rope(config, if full { "full_attention" } else { "sliding_attention" })?;
        attention.scale = 1.0;
        attention.rope = Some((rope, attention.head_dim));
        attention.qk_norm = Some(QkNorm::rms(dense.rms_norm_eps, NormOver::Head));
        attention.value_norm = Some(dense.rms_norm_eps);
        attention.keys_as_values = full && own.takes_keys_for_values();
    }
    own.feed_forward(&mut spec.layers, dense.rms_norm_eps)?;
    own.share(&mut spec.layers)?;
    Ok(spec)
}

impl Gemma4Config {
    fn check(&self, dense: &DenseConfig) -> Result<()> {
        let unsupported = |what: String| Err(Error::unsupported(format!("Gemma 4 with {what} is not supported")));
        match &self.use_bidirectional_attention {
            None => {}
            // Of pictures only.
            Some(Value::String(what)) if what == "vision" => {}
            Some(other) => return unsupported(format!("\"use_bidirectional_attention\" {other}")),
        }
        if self.per_layer_config.is_some() {
            return unsupported("\"per_layer_config\"".to_owned());
        }
        let activation = dense.hidden_activation.as_deref().map(Activation::named).transpose()?;
        if activation != Some(Activation::GeluTanh) {
            return unsupported(format!("\"hidden_activation\" {:?}", dense.hidden_activation));
        }
        if self.layer_types.last().is_none_or(|last| last != "full_attention") {
            // transformers makes it a full one, mlx-lm does not.
            return unsupported("a last layer that is not \"full_attention\"".to_owned());
        }
        if self.num_kv_shared_layers >= dense.num_hidden_layers {
            let shared = self.num_kv_shared_layers;
            return Err(Error::invalid_model(format!("config.json: all layers are among {shared} that share keys")));
        }
        Ok(())
    }

    fn takes_keys_for_values(&self) -> bool {
        self.attention_k_eq_v.unwrap_or(false)
    }

    /// Width of heads in full layers.
    fn global_head_dim(&self) -> usize {
        self.global_head_dim.unwrap_or(512)
    }

    /// Heads of keys there.
    fn global_heads(&self) -> usize {
        let own = self.num_global_key_value_heads.filter(|_| self.takes_keys_for_values());
        own.unwrap_or(self.num_key_value_heads)
    }

    fn per_layer_input(&self, tokens: usize) -> Result<Option<PerLayerInputSpec>> {
        let width = self.hidden_size_per_layer_input.unwrap_or(256);
        let vocab = self.vocab_size_per_layer_input.unwrap_or(262_144);
        if width > 0 && vocab < tokens {
            return Err(Error::unsupported(format!("inputs of layers for {vocab} of {tokens} tokens")));
        }
        Ok((width > 0).then_some(PerLayerInputSpec { vocab, width }))
    }

    /// Index of the first layer without keys of its own.
    fn first_shared(&self, layers: usize) -> usize {
        layers - self.num_kv_shared_layers
    }

    /// Widens the dense layers of those that share keys, and puts the experts beside them.
    fn feed_forward(&self, layers: &mut [LayerSpec], norm_eps: f32) -> Result<()> {
        let need = |value: Option<usize>, name: &str| value.ok_or_else(|| missing(name));
        let doubles = match self.use_double_wide_mlp {
            None if self.num_kv_shared_layers > 0 => return Err(missing("use_double_wide_mlp")),
            doubles => doubles.unwrap_or(false),
        };
        let router = RouterSpec {
            norm: Some(("router.scale", norm_eps)),
            expert_scales: Some("router.per_expert_scale"),
            ..RouterSpec::softmax_of_chosen("router.proj")
        };
        let experts = match self.enable_moe_block.unwrap_or(false) {
            true => Some(ExpertsSpec {
                activation: ExpertActivation::GeGlu,
                stacked: "experts.switch_glu",
                ..ExpertsSpec::new(
                    need(self.num_experts, "num_experts")?,
                    need(self.top_k_experts, "top_k_experts")?,
                    need(self.moe_intermediate_size, "moe_intermediate_size")?,
                    router,
                )
            }),
            false => None,
        };
        let first_shared = self.first_shared(layers.len());
        for (index, layer) in layers.iter_mut().enumerate() {
            let FeedForwardSpec::Gated(dense) = &mut layer.feed_forward else { continue };
            dense.inner *= if doubles && index >= first_shared { 2 } else { 1 };
            let Some(experts) = experts.clone() else { continue };
            let both = DenseAndExpertsSpec {
                dense: dense.clone(),
                dense_path: layer.feed_forward_path,
                experts,
                norms: EXPERT_NORMS,
                norm_eps,
            };
            (layer.feed_forward, layer.feed_forward_path) = (FeedForwardSpec::DenseAndExperts(both), "");
        }
        Ok(())
    }

    /// Lets the last layers read the keys of the last one of the same kind before them.
    fn share(&self, layers: &mut [LayerSpec]) -> Result<()> {
        let window = |layer: &LayerSpec| match &layer.mixer {
            MixerSpec::Attention(attention) => Some(attention.window),
            _ => None,
        };
        let first_shared = self.first_shared(layers.len());
        let (own, shared) = layers.split_at_mut(first_shared);
        for layer in shared {
            let source = own.iter().rposition(|other| window(other) == window(layer));
            let source = source.ok_or_else(|| {
                Error::invalid_model("config.json: a layer shares keys, and none of its kind has some")
            })?;
            if let MixerSpec::Attention(attention) = &layer.mixer {
                layer.mixer = MixerSpec::CrossLayer(CrossLayerSpec { source, attention: attention.clone() });
            }
        }
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::invalid_model(format!("config.json: {name:?} is missing"))
}

/// The rotation of a kind of layer.
fn rope(config: &ModelConfig, kind: &str) -> Result<RopeSpec> {
    let defaults = json!({
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    let all = config.field("rope_parameters").unwrap_or(&defaults);
    let own = all.get(kind).filter(|own| own.is_object()).ok_or_else(|| missing(&format!("rope_parameters.{kind}")))?;
    let part = own.get("partial_rotary_factor").and_then(Value::as_f64).unwrap_or(1.0);
    if part != 1.0 && own.get("rope_type").and_then(Value::as_str) != Some("proportional") {
        return Err(Error::unsupported(format!(
            "rope_parameters.{kind}: heads that turn in part, but not \"proportional\""
        )));
    }
    rope_of(all, kind)
}

#[cfg(test)]
mod tests;
