//! BERT (Devlin et al. 2019): `BertModel`, also of MiniLM, BGE and E5.

use serde::Deserialize;

use super::{ClassificationHead, Encoder, EncoderShape, Pooling, StackedEncoder};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{
    Activation, BidirectionalSpec, EncoderLayer, EncoderPaths, EncoderSpec, EncoderStack, InputPaths, Linear, MlpSpec,
    NormPlace,
};
use crate::weights::Weights;

/// The fields of `config.json`, shared with RoBERTa; defaults are those of transformers.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct BertConfig {
    pub hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    #[serde(default = "tiny")]
    layer_norm_eps: f32,
    #[serde(default = "gelu")]
    hidden_act: String,
    position_embedding_type: Option<String>,
    is_decoder: Option<bool>,
}

fn two() -> usize {
    2
}

fn tiny() -> f32 {
    1e-12
}

fn gelu() -> String {
    "gelu".to_owned()
}

const PATHS: EncoderPaths = EncoderPaths {
    words: "embeddings.word_embeddings",
    positions: "embeddings.position_embeddings",
    token_types: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    layers: "encoder.layer",
    attention_input: InputPaths::Apart(["attention.self.query", "attention.self.key", "attention.self.value"]),
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    mlp_input: "intermediate.dense",
    mlp_output: "output.dense",
    mlp_norm: "output.LayerNorm",
    final_norm: "",
};

impl BertConfig {
    /// The declaration of an encoder whose texts begin at row `first` of the table of positions.
    pub fn load(&self, prefix: &'static str, first: usize, weights: &mut Weights) -> Result<Box<dyn Encoder>> {
        if let Some(other) = self.position_embedding_type.as_deref().filter(|&kind| kind != "absolute") {
            return Err(Error::unsupported(format!("position embeddings of type {other:?} are not supported")));
        }
        if self.is_decoder == Some(true) {
            return Err(Error::unsupported("a BERT that is a decoder is not supported"));
        }
        let sizes = [self.hidden_size, self.intermediate_size, self.vocab_size];
        check_sizes(&sizes, self.num_hidden_layers, self.hidden_size, self.num_attention_heads)?;
        let max_tokens = self.max_position_embeddings.checked_sub(first).filter(|&n| n > 0 && n < MAX_SIZE);
        let max_tokens = max_tokens.ok_or_else(|| Error::invalid_model("config.json: \"max_position_embeddings\""))?;
        let layer = EncoderLayer {
            attention: BidirectionalSpec {
                heads: self.num_attention_heads,
                head_dim: self.hidden_size / self.num_attention_heads,
                bias: true,
                window: None,
                rope: None,
            },
            mlp: MlpSpec {
                inner: self.intermediate_size,
                bias: true,
                activation: Activation::named(&self.hidden_act)?,
                gated: false,
            },
        };
        let spec = EncoderSpec {
            hidden: self.hidden_size,
            vocab: self.vocab_size,
            positions: Some((self.max_position_embeddings, first)),
            token_types: self.type_vocab_size,
            norm_eps: self.layer_norm_eps,
            norm_bias: true,
            norm_place: NormPlace::After,
            layers: vec![layer; self.num_hidden_layers],
            paths: PATHS,
            prefix,
        };
        let shape = EncoderShape {
            hidden: self.hidden_size,
            vocab: self.vocab_size,
            token_types: self.type_vocab_size,
            max_tokens,
        };
        Ok(Box::new(StackedEncoder { stack: EncoderStack::load(weights, &spec)?, shape }))
    }
}

/// Upper bound of any size in a config: keeps the products of two of them far from overflow.
pub(super) const MAX_SIZE: usize = 1 << 24;

/// The same of the number of layers, each of which is declared before the first tensor is found missing.
const MAX_LAYERS: usize = 1 << 12;

/// Errors unless all `sizes` are possible and `heads` divide `hidden`.
pub(super) fn check_sizes(sizes: &[usize], layers: usize, hidden: usize, heads: usize) -> Result<()> {
    if layers == 0 || layers > MAX_LAYERS || sizes.iter().any(|&n| n == 0 || n > MAX_SIZE) {
        return Err(Error::invalid_model("config.json: a size of the model is 0 or impossibly large"));
    }
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(Error::invalid_model("config.json: \"hidden_size\" is not a multiple of the attention heads"));
    }
    Ok(())
}

pub(super) fn encoder(config: &ModelConfig, prefix: &'static str, weights: &mut Weights) -> Result<Box<dyn Encoder>> {
    config.parse::<BertConfig>()?.load(prefix, 0, weights)
}

/// `BertForSequenceClassification`: the pooler is part of the head.
pub(super) fn head(
    config: &ModelConfig,
    prefix: &'static str,
    labels: usize,
    weights: &mut Weights,
) -> Result<ClassificationHead> {
    let hidden = config.parse::<BertConfig>()?.hidden_size;
    Ok(ClassificationHead {
        pooling: Pooling::Cls,
        dense: Linear::load(weights, &format!("{prefix}pooler.dense"), hidden, hidden, true)?,
        activation: Activation::Tanh,
        norm: None,
        classifier: Linear::load(weights, "classifier", hidden, labels, true)?,
    })
}
