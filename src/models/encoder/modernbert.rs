//! ModernBERT (Warner et al. 2024): rotary embeddings, gated feed-forward layers, and layers that see neighbours only.

use serde::Deserialize;
use serde_json::{Value, json};

use super::bert::{MAX_SIZE, check_sizes};
use super::{ClassificationHead, Encoder, EncoderShape, Pooling, StackedEncoder};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, BidirectionalSpec, EncoderLayer, EncoderPaths, EncoderSpec, EncoderStack, InputPaths, LayerNorm,
    Linear, MlpSpec, NormPlace, RopeSpec,
};
use crate::weights::Weights;

/// The fields of `config.json`; defaults are those of transformers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct ModernBertConfig {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_activation: String,
    norm_eps: f32,
    norm_bias: bool,
    attention_bias: bool,
    mlp_bias: bool,
    /// Tokens that a local layer sees, half of them on each side.
    local_attention: usize,
    layer_types: Option<Vec<String>>,
    global_attn_every_n_layers: usize,
    global_rope_theta: f32,
    local_rope_theta: f32,
    /// Where transformers 5 keeps both of the above, by type of layer.
    rope_parameters: Option<Value>,
    classifier_pooling: String,
    classifier_activation: String,
    classifier_bias: bool,
}

impl Default for ModernBertConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 22,
            num_attention_heads: 12,
            intermediate_size: 1152,
            vocab_size: 50_368,
            max_position_embeddings: 8192,
            hidden_activation: "gelu".to_owned(),
            norm_eps: 1e-5,
            norm_bias: false,
            attention_bias: false,
            mlp_bias: false,
            local_attention: 128,
            layer_types: None,
            global_attn_every_n_layers: 3,
            global_rope_theta: 160_000.0,
            local_rope_theta: 10_000.0,
            rope_parameters: None,
            classifier_pooling: "cls".to_owned(),
            classifier_activation: "gelu".to_owned(),
            classifier_bias: false,
        }
    }
}

const PATHS: EncoderPaths = EncoderPaths {
    words: "embeddings.tok_embeddings",
    positions: "",
    token_types: "",
    embedding_norm: "embeddings.norm",
    layers: "layers",
    attention_input: InputPaths::Fused("attn.Wqkv"),
    attention_output: "attn.Wo",
    attention_norm: "attn_norm",
    mlp_input: "mlp.Wi",
    mlp_output: "mlp.Wo",
    mlp_norm: "mlp_norm",
    final_norm: "final_norm",
};

impl ModernBertConfig {
    fn is_local(&self, layer: usize) -> Result<bool> {
        let Some(types) = &self.layer_types else {
            return Ok(!layer.is_multiple_of(self.global_attn_every_n_layers.max(1)));
        };
        match types.get(layer).map(String::as_str) {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            Some(other) => Err(Error::unsupported(format!("layer type {other:?} is not supported"))),
            None => Err(Error::invalid_model("config.json: \"layer_types\" has fewer entries than layers")),
        }
    }

    fn rope(&self, local: bool) -> Result<RopeSpec> {
        let (kind, theta) = match local {
            true => ("sliding_attention", self.local_rope_theta),
            false => ("full_attention", self.global_rope_theta),
        };
        let given = self.rope_parameters.as_ref().and_then(|all| all.get(kind)).filter(|given| !given.is_null());
        let mut spec = json!({"rope_parameters": given.cloned().unwrap_or_else(|| json!({}))});
        if spec["rope_parameters"].get("rope_theta").is_none() {
            spec["rope_theta"] = json!(theta);
        }
        RopeSpec::deserialize(&spec).map_err(|e| Error::invalid_model(format!("config.json: {kind}: {e}")))
    }

    fn layer(&self, index: usize) -> Result<EncoderLayer> {
        let local = self.is_local(index)?;
        Ok(EncoderLayer {
            attention: BidirectionalSpec {
                heads: self.num_attention_heads,
                head_dim: self.hidden_size / self.num_attention_heads,
                bias: self.attention_bias,
                window: local.then_some(self.local_attention / 2),
                rope: Some((self.rope(local)?, self.max_position_embeddings)),
            },
            mlp: MlpSpec {
                inner: self.intermediate_size,
                bias: self.mlp_bias,
                activation: Activation::named(&self.hidden_activation)?,
                gated: true,
            },
        })
    }
}

pub(super) fn encoder(config: &ModelConfig, prefix: &'static str, weights: &mut Weights) -> Result<Box<dyn Encoder>> {
    let config: ModernBertConfig = config.parse()?;
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let max_tokens = config.max_position_embeddings;
    let sizes = [hidden, config.intermediate_size, vocab, max_tokens, config.local_attention];
    check_sizes(&sizes, config.num_hidden_layers, hidden, config.num_attention_heads)?;
    if !(hidden / config.num_attention_heads).is_multiple_of(2) || hidden > MAX_SIZE / 3 {
        return Err(Error::invalid_model("config.json: heads must have an even width"));
    }
    let spec = EncoderSpec {
        hidden,
        vocab,
        positions: None,
        token_types: 0,
        norm_eps: config.norm_eps,
        norm_bias: config.norm_bias,
        norm_place: NormPlace::Before,
        layers: (0..config.num_hidden_layers).map(|index| config.layer(index)).collect::<Result<_>>()?,
        paths: PATHS,
        prefix,
    };
    let shape = EncoderShape { hidden, vocab, token_types: 0, max_tokens };
    Ok(Box::new(StackedEncoder { stack: EncoderStack::load(weights, &spec)?, shape }))
}

/// `ModernBertForSequenceClassification`.
pub(super) fn head(
    config: &ModelConfig,
    _prefix: &'static str,
    labels: usize,
    weights: &mut Weights,
) -> Result<ClassificationHead> {
    let config: ModernBertConfig = config.parse()?;
    let hidden = config.hidden_size;
    let pooling = match config.classifier_pooling.as_str() {
        "cls" => Pooling::Cls,
        "mean" => Pooling::Mean,
        other => return Err(Error::unsupported(format!("classifier_pooling {other:?} is not supported"))),
    };
    Ok(ClassificationHead {
        pooling,
        dense: Linear::load(weights, "head.dense", hidden, hidden, config.classifier_bias)?,
        activation: Activation::named(&config.classifier_activation)?,
        norm: Some(LayerNorm::load(weights, "head.norm", hidden, config.norm_eps, config.norm_bias)?),
        classifier: Linear::load(weights, "classifier", hidden, labels, true)?,
    })
}
