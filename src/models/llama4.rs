//! Llama 4 (Meta 2025; `Llama4ForConditionalGeneration`), and the small models that share its name without having experts
//! (MobileLLM-R1; `Llama4ForCausalLM`): chunks in the layers that know positions, and neither in every fourth.

use serde::Deserialize;
use serde_json::json;

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, DecoderSpec, ExpertsSpec, FeedForwardSpec, NormOver, PositionScale, QkNorm, RouterSpec, SharedSpec,
    Window,
};

/// Epsilon of the norms of queries and keys in those with experts, whatever the others have (`llama4.py`).
const HEAD_NORM_EPS: f32 = 1e-6;

#[derive(Debug, Deserialize)]
struct Llama4Config {
    /// Of layers without experts.
    intermediate_size_mlp: usize,
    num_local_experts: usize,
    num_experts_per_tok: usize,
    interleave_moe_layer_step: usize,
    moe_layers: Option<Vec<usize>>,
    /// For each layer whether positions turn it, in spite of the name.
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: usize,
    attention_chunk_size: Option<usize>,
    use_qk_norm: bool,
    attn_temperature_tuning: Switch,
    floor_scale: usize,
    attn_scale: f32,
}

/// What some configs write as a number.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "\"attn_temperature_tuning\" is neither a boolean nor a number")]
enum Switch {
    Bool(bool),
    Number(u32),
}

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    // mlx-lm has a file for each kind; a config that is silent means what transformers assumes, but small models have no more
    // than they say.
    let large = scope.wrapped || config.integer("num_local_experts").is_some_and(|experts| experts > 0);
    let mut defaults = json!({
        "vocab_size": 202_048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "no_rope_layer_interval": 4, "use_qk_norm": true, "floor_scale": 8192,
        "attn_scale": 0.1, "num_local_experts": 0, "attn_temperature_tuning": false, "rope_theta": 5e5,
    });
    if large {
        defaults["num_local_experts"] = json!(16);
        defaults["attn_temperature_tuning"] = json!(true);
        defaults["attention_chunk_size"] = json!(8192);
    }
    let mut dense: DenseConfig = config.parse_over(defaults.clone())?;
    let own: Llama4Config = config.parse_over(defaults)?;
    let inner = std::mem::replace(&mut dense.intermediate_size, own.intermediate_size_mlp);
    let kinds = dense.layer_types.take();
    let mut spec = dense.decoder(scope, |_| None)?;
    let turning = own.turning(spec.layers.len())?;
    let chunked = own.chunked(&turning, kinds.as_deref())?;
    let norm = if large {
        QkNorm::rms(HEAD_NORM_EPS, NormOver::TurnedHead)
    } else {
        QkNorm::rms(dense.rms_norm_eps, NormOver::Head)
    };
    let growth = own.growth()?;
    if !large && own.use_qk_norm && growth.is_some() && turning.contains(&false) {
        return Err(Error::unsupported("\"attn_temperature_tuning\" of queries that are normalised is not supported"));
    }
    for (layer, attention) in spec.attentions().enumerate() {
        let turns = turning[layer];
        attention.rope = turns.then(|| (dense.rope.clone().traditional(), attention.head_dim));
        attention.window = own.attention_chunk_size.filter(|_| chunked[layer]).map(Window::Chunked);
        // The small ones normalise layers that do not know positions, too (`llama4_text.py`).
        let normed = own.use_qk_norm && (turns || !large);
        attention.qk_norm = normed.then_some(QkNorm { names: None, ..norm });
        attention.position_scale = growth.filter(|_| !turns);
    }
    let experts = own.experts(inner);
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        layer.feed_forward_path = "feed_forward";
        let Some(experts) = experts.as_ref().filter(|_| own.is_mixture(index)) else { continue };
        if let FeedForwardSpec::Gated(mlp) = &layer.feed_forward
            && mlp.activation != Activation::Silu
        {
            return Err(Error::unsupported("experts with another \"hidden_act\" than \"silu\" are not supported"));
        }
        layer.feed_forward = FeedForwardSpec::Experts(experts.clone());
    }
    Ok(spec)
}

impl Llama4Config {
    /// Which of `layers` layers know positions.
    fn turning(&self, layers: usize) -> Result<Vec<bool>> {
        let wrong = |what: &str| Error::invalid_model(format!("config.json: {what}"));
        match self.no_rope_layers.as_deref() {
            Some(given @ [_, ..]) if given.len() < layers => {
                Err(wrong("\"no_rope_layers\" has fewer entries than there are layers"))
            }
            Some(given @ [_, ..]) => Ok(given[..layers].iter().map(|&turns| turns != 0).collect()),
            _ if self.no_rope_layer_interval == 0 => Err(wrong("\"no_rope_layer_interval\" is 0")),
            _ => Ok((1..=layers).map(|layer| !layer.is_multiple_of(self.no_rope_layer_interval)).collect()),
        }
    }

    /// Which layers see their chunk alone: those that know positions, unless the config says otherwise.
    fn chunked(&self, turning: &[bool], kinds: Option<&[String]>) -> Result<Vec<bool>> {
        let wrong = |what: &str| Error::invalid_model(format!("config.json: {what}"));
        if self.attention_chunk_size == Some(0) {
            return Err(wrong("\"attention_chunk_size\" is 0"));
        }
        let Some(kinds) = kinds else { return Ok(turning.to_vec()) };
        if kinds.len() < turning.len() {
            return Err(wrong("\"layer_types\" has fewer entries than there are layers"));
        }
        let chunked = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(false),
            "chunked_attention" if self.attention_chunk_size.is_some() => Ok(true),
            "chunked_attention" => Err(wrong("a chunked layer needs \"attention_chunk_size\"")),
            other => Err(Error::unsupported(format!("layer type {other:?} is not supported"))),
        };
        kinds[..turning.len()].iter().map(chunked).collect()
    }

    /// How queries grow in layers that do not know positions.
    fn growth(&self) -> Result<Option<PositionScale>> {
        match (&self.attn_temperature_tuning, self.floor_scale) {
            (Switch::Bool(false) | Switch::Number(0), _) => Ok(None),
            (_, 0) => Err(Error::invalid_model("config.json: \"floor_scale\" is 0")),
            (_, original) => Ok(Some(PositionScale { beta: self.attn_scale, original, offset: 1 })),
        }
    }

    /// Those of width `inner`, if there are any.
    fn experts(&self, inner: usize) -> Option<ExpertsSpec> {
        let Self { num_local_experts, num_experts_per_tok, .. } = *self;
        let router = RouterSpec::sigmoid_of_chosen("router");
        let shared = SharedSpec::new("shared_expert", inner);
        (num_local_experts > 0).then(|| ExpertsSpec {
            weighs_input: true,
            shared: Some(shared),
            stacked: "experts",
            transposed: true,
            ..ExpertsSpec::new(num_local_experts, num_experts_per_tok, inner, router)
        })
    }

    /// Whether `layer` has experts, if the model does.
    fn is_mixture(&self, layer: usize) -> bool {
        let step = self.interleave_moe_layer_step;
        match &self.moe_layers {
            Some(layers) => layers.contains(&layer),
            None => step > 0 && (layer + 1).is_multiple_of(step),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::error::Status;
    use crate::nn::AttentionSpec;

    fn declared(config: Value) -> Result<DecoderSpec> {
        let config = ModelConfig::from_value(config)?;
        declare(&config, &Scope::whole(&config, 64))
    }

    /// A config with `changes`, wrapped as Llama 4's are.
    fn wrapped(changes: Value) -> Result<DecoderSpec> {
        let mut text = json!({ "model_type": "llama4_text", "num_hidden_layers": 4, "num_local_experts": 4 });
        text.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        declared(json!({ "model_type": "llama4", "text_config": text }))
    }

    /// One of a small model.
    fn small(changes: Value) -> Result<DecoderSpec> {
        let mut text = json!({ "model_type": "llama4_text", "num_hidden_layers": 4 });
        text.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        declared(text)
    }

    fn of_attentions<T>(mut spec: DecoderSpec, part: impl Fn(&AttentionSpec) -> T) -> Vec<T> {
        spec.attentions().map(|attention| part(attention)).collect()
    }

    fn mixtures(spec: &DecoderSpec) -> Vec<bool> {
        spec.layers.iter().map(|layer| matches!(layer.feed_forward, FeedForwardSpec::Experts(_))).collect()
    }

    #[test]
    fn every_fourth_layer_is_another() {
        let spec = wrapped(json!({ "attention_chunk_size": 8, "no_rope_layers": [] })).unwrap();
        let chunk = Some(Window::Chunked(8));
        assert_eq!(of_attentions(spec.clone(), |layer| layer.window), [chunk, chunk, chunk, None]);
        let most = [true, true, true, false];
        assert_eq!(of_attentions(spec.clone(), |layer| layer.rope.is_some()), most);
        assert_eq!(of_attentions(spec.clone(), |layer| layer.qk_norm.is_some()), most);
        assert_eq!(of_attentions(spec, |layer| layer.position_scale.is_none()), most);
        let turned = wrapped(json!({ "no_rope_layers": [1, 0, 0, 1, 0] })).unwrap();
        assert_eq!(of_attentions(turned, |layer| layer.rope.is_some()), [true, false, false, true]);
        let kinds = ["full_attention", "chunked_attention", "full_attention", "full_attention"];
        let spec = wrapped(json!({ "layer_types": kinds })).unwrap();
        assert_eq!(of_attentions(spec, |layer| layer.window), [None, Some(Window::Chunked(8192)), None, None]);
    }

    #[test]
    fn silence_means_what_transformers_assumes() {
        let spec = declared(json!({ "model_type": "llama4", "text_config": {} })).unwrap();
        assert_eq!((spec.layers.len(), spec.hidden, spec.max_positions), (48, 5120, Some(131_072)));
        assert!(mixtures(&spec).iter().all(|&mixture| mixture));
        let theta = |layer: &AttentionSpec| layer.rope.as_ref().map_or(0.0, |(rope, _)| rope.theta());
        assert_eq!(of_attentions(spec.clone(), theta)[0], 5e5);
        let rope = small(json!({ "rope_parameters": { "rope_theta": 8e6, "rope_type": "default" } })).unwrap();
        assert_eq!(of_attentions(rope, theta)[0], 8e6);
        let windows = of_attentions(spec, |layer| layer.window);
        assert_eq!(windows.iter().filter(|&&window| window == Some(Window::Chunked(8192))).count(), 36);
    }

    #[test]
    fn layers_with_experts_are_counted_or_listed() {
        assert_eq!(mixtures(&wrapped(json!({ "interleave_moe_layer_step": 2 })).unwrap()), [false, true, false, true]);
        assert_eq!(mixtures(&wrapped(json!({ "moe_layers": [0, 3] })).unwrap()), [true, false, false, true]);
        assert_eq!(mixtures(&wrapped(json!({ "moe_layers": [] })).unwrap()), [false; 4]);
        assert_eq!(mixtures(&small(json!({ "interleave_moe_layer_step": 1 })).unwrap()), [false; 4]);
    }

    #[test]
    fn small_models_have_what_they_say() {
        let spec = small(json!({ "no_rope_layers": [1, 0, 1, 1] })).unwrap();
        assert_eq!(of_attentions(spec.clone(), |layer| layer.qk_norm.is_some()), [true; 4]);
        assert_eq!(of_attentions(spec.clone(), |layer| layer.window), [None; 4]);
        assert_eq!(of_attentions(spec, |layer| layer.position_scale), [None; 4]);
        let spec = small(json!({ "attention_chunk_size": 512, "use_qk_norm": false, "attn_temperature_tuning": 4 }));
        let spec = spec.unwrap();
        assert_eq!(of_attentions(spec.clone(), |layer| layer.window.is_some()), [true, true, true, false]);
        assert_eq!(of_attentions(spec, |layer| layer.position_scale.is_some()), [false, false, false, true]);
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        wrapped(json!({})).unwrap();
        small(json!({})).unwrap();
        let kinds = |kind: &str| json!({ "layer_types": [kind, kind, kind, kind] });
        wrapped(kinds("chunked_attention")).unwrap();
        for (spec, status, word) in [
            (wrapped(kinds("sliding_attention")), Status::Unsupported, "sliding_attention"),
            (wrapped(json!({ "layer_types": ["full_attention"] })), Status::InvalidModel, "layer_types"),
            (small(kinds("chunked_attention")), Status::InvalidModel, "attention_chunk_size"),
            (wrapped(json!({ "attention_chunk_size": 0 })), Status::InvalidModel, "attention_chunk_size"),
            (wrapped(json!({ "no_rope_layers": [1, 0] })), Status::InvalidModel, "no_rope_layers"),
            (wrapped(json!({ "no_rope_layer_interval": 0 })), Status::InvalidModel, "no_rope_layer_interval"),
            (wrapped(json!({ "floor_scale": 0 })), Status::InvalidModel, "floor_scale"),
            (wrapped(json!({ "attn_temperature_tuning": "on" })), Status::InvalidModel, "attn_temperature_tuning"),
            (wrapped(json!({ "hidden_act": "gelu" })), Status::Unsupported, "hidden_act"),
            (small(json!({ "attn_temperature_tuning": true })), Status::Unsupported, "attn_temperature_tuning"),
        ] {
            let error = spec.expect_err(word);
            assert!(error.status() == status && error.message().contains(word), "{error}");
        }
        // The same settings, where they mean nothing that is missing.
        wrapped(json!({ "floor_scale": 0, "attn_temperature_tuning": false })).unwrap();
        wrapped(json!({ "hidden_act": "gelu", "moe_layers": [] })).unwrap();
        small(json!({ "attn_temperature_tuning": true, "no_rope_layers": [1, 1, 1, 1] })).unwrap();
    }
}
