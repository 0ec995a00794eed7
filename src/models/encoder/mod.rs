//! Encoder-only architectures: one file each, one line each in [`ARCHITECTURES`]; embeddings and relevance scores from them, and
//! from the decoders of [`models`](crate::models).

mod answers;
mod bert;
mod causal;
mod embedding;
mod head;
mod modernbert;
mod pipeline;
mod pooling;
mod rerank;
mod roberta;

use causal::CausalEncoder;
use mlx_rs::Array;
use serde_json::Value;

pub use answers::AnswerTokens;
use bert::MAX_SIZE;
pub use causal::LastTokenHead;
pub use embedding::{EmbeddingModel, EmbeddingOptions};
pub use head::{ClassificationHead, Head};
pub use pipeline::Pipeline;
pub use pooling::Pooling;
pub use rerank::RerankModel;

use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::mlx::{self, Device};
use crate::nn::{ATTENTION_BYTES, EncoderStack, PackedTexts};
use crate::text::TextTokens;
use crate::weights::Weights;

/// A loaded encoder. Owned by one thread, as all MLX arrays are.
pub trait Encoder {
    /// What it takes and gives.
    fn shape(&self) -> &EncoderShape;

    /// Hidden states `[T, hidden]` of all tokens, after the last norm.
    fn forward(&self, texts: &PackedTexts) -> Result<Array>;
}

/// What an encoder takes and gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderShape {
    /// Width of the hidden states.
    pub hidden: usize,
    /// Number of token ids.
    pub vocab: usize,
    /// Number of token types; 0 or 1 where they make no difference.
    pub token_types: usize,
    /// Tokens that a text has at most, special ones included.
    pub max_tokens: usize,
}

struct StackedEncoder {
    stack: EncoderStack,
    shape: EncoderShape,
}

impl Encoder for StackedEncoder {
    fn shape(&self) -> &EncoderShape {
        &self.shape
    }

    fn forward(&self, texts: &PackedTexts) -> Result<Array> {
        self.stack.forward(texts)
    }
}

/// One supported `model_type`.
struct Architecture {
    model_type: &'static str,
    /// What precedes the encoder's tensor names in models with a head; the bare encoder is saved without.
    prefix: &'static str,
    /// Takes the encoder's tensors, whose names have this prefix.
    encoder: fn(&ModelConfig, &'static str, &mut Weights) -> Result<Box<dyn Encoder>>,
    /// Takes the tensors of the head with this many labels.
    head: fn(&ModelConfig, &'static str, usize, &mut Weights) -> Result<ClassificationHead>,
    /// Rows of the table of positions that no token has.
    spare_positions: fn(&ModelConfig) -> usize,
    /// A tensor of this kind that is left over after that belongs to a head that is not used.
    unused: &'static [&'static str],
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "bert",
        prefix: "bert.",
        encoder: bert::encoder,
        head: bert::head,
        spare_positions: |_| 0,
        unused: &["pooler.", "cls.", "embeddings.position_ids"],
    },
    Architecture {
        model_type: "modernbert",
        prefix: "model.",
        encoder: modernbert::encoder,
        head: modernbert::head,
        spare_positions: |_| 0,
        unused: &["head.", "decoder."],
    },
    Architecture {
        model_type: "roberta",
        prefix: "roberta.",
        encoder: roberta::encoder,
        head: roberta::head,
        spare_positions: roberta::first_position,
        unused: &["pooler.", "lm_head.", "embeddings.position_ids"],
    },
    Architecture {
        model_type: "xlm-roberta",
        prefix: "roberta.",
        encoder: roberta::encoder,
        head: roberta::head,
        spare_positions: roberta::first_position,
        unused: &["pooler.", "lm_head.", "embeddings.position_ids"],
    },
];

/// The supported values of `model_type`.
pub fn supported_types() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|a| a.model_type)
}

/// Whether `config` names a known encoder.
pub fn is_supported(config: &ModelConfig) -> bool {
    supported_types().any(|known| known == config.model_type())
}

fn find(config: &ModelConfig) -> Result<&'static Architecture> {
    let wanted = config.model_type();
    ARCHITECTURES.iter().find(|a| a.model_type == wanted).ok_or_else(|| {
        let known: Vec<_> = supported_types().chain(super::supported_types()).collect();
        Error::unsupported(format!("unknown encoder type {wanted:?}; known types: {}", known.join(", ")))
    })
}

/// Whether `config` names a decoder, which is an encoder without its output head.
pub fn is_causal(config: &ModelConfig) -> bool {
    !is_supported(config) && super::check_supported(config).is_ok()
}

/// Whether the model was saved with a classification head.
pub(super) fn is_classifier(config: &ModelConfig) -> bool {
    let architectures = config.raw().get("architectures").and_then(Value::as_array);
    let mut architectures = architectures.into_iter().flatten().filter_map(Value::as_str);
    architectures.any(|name| name.ends_with("ForSequenceClassification"))
}

/// Tokens that a text has at most, special ones included, by the config.
pub fn max_tokens(config: &ModelConfig) -> Result<usize> {
    if is_causal(config) {
        return super::context_length(config, None);
    }
    let spare = (find(config)?.spare_positions)(config);
    let most = super::context_length(config, None)?.checked_sub(spare).filter(|&most| most > 0);
    most.ok_or_else(|| Error::invalid_model("config.json: \"max_position_embeddings\" is too small"))
}

/// What batches of an encoder take besides its weights; measured on the CPU, on the safe side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    /// Bytes however small the batch: what the CPU kernels lay out; on a GPU products of queries and keys, where MLX keeps them.
    pub fixed: usize,
    /// Bytes for each token: hidden states, projections, and the wide layer before and after its activation.
    pub per_token: usize,
    /// Bytes of the widest array for each token.
    pub widest: usize,
    /// Tokens of the longest text.
    pub max_tokens: usize,
}

impl BatchPlan {
    /// Of the encoder that `config` names, on `device`.
    pub fn new(config: &ModelConfig, device: Device) -> Result<Self> {
        let max_tokens = max_tokens(config)?;
        if is_causal(config) {
            return causal::batch_plan(config, max_tokens);
        }
        let number = |key: &str| {
            let number = config.integer(key).filter(|&n| n < MAX_SIZE);
            number.ok_or_else(|| Error::invalid_model(format!("config.json: \"{key}\" is missing or too large")))
        };
        let (hidden, inner) = (number("hidden_size")?, number("intermediate_size")?);
        let widest = 4 * inner.max(3 * hidden);
        let fixed = match device {
            Device::Cpu => 16 << 20,
            Device::Gpu => 4 * ATTENTION_BYTES,
        };
        Ok(Self { fixed, per_token: 4 * (16 * hidden + 6 * inner), widest, max_tokens })
    }

    /// Tokens of a batch that pay. On the CPU 256 are enough for the kernels, and arrays that are not large
    /// are not returned to the system after every operation; on a GPU an operation has its price, however small.
    pub fn batch(&self, device: Device) -> usize {
        match device {
            Device::Cpu => (mlx::LARGE_BLOCK / 8 * 7 / self.widest.max(1)).clamp(256, 2048),
            Device::Gpu => 8192,
        }
    }

    /// Bytes of a batch of `tokens` tokens.
    pub fn bytes(&self, tokens: usize) -> usize {
        self.fixed + self.per_token * tokens
    }
}

/// Where the logits of a cross-encoder come from.
#[derive(Debug, Clone, Copy)]
enum HeadKind {
    /// A classification head of so many labels.
    Labels(usize),
    /// The output head of a language model.
    Answers(AnswerTokens),
}

struct Loaded {
    encoder: Box<dyn Encoder>,
    /// If one was wanted.
    head: Option<Head>,
    /// Bytes of both on the device.
    weight_bytes: usize,
}

/// The encoder that `config` names, with a head if there is to be one. Every tensor must be used, but for those of other heads.
fn load(config: &ModelConfig, head: Option<HeadKind>, mut weights: Weights) -> Result<Loaded> {
    if is_causal(config) {
        return load_causal(config, head, weights);
    }
    let architecture = find(config)?;
    let prefix = match architecture.prefix {
        prefix if weights.any(|name| name.starts_with(prefix)) => prefix,
        _ => "",
    };
    let encoder = (architecture.encoder)(config, prefix, &mut weights)?;
    let head = match head {
        None => None,
        Some(HeadKind::Labels(labels)) => Some((architecture.head)(config, prefix, labels, &mut weights)?),
        Some(HeadKind::Answers(_)) => return Err(Error::internal("an encoder does not answer")),
    };
    weights.discard(|name| {
        let bare = name.strip_prefix(prefix).unwrap_or(name);
        architecture.unused.iter().any(|unused| bare.starts_with(unused))
    });
    let weight_bytes = weights.bytes();
    weights.finish()?;
    Ok(Loaded { encoder, head: head.map(|head| Head::Classification(Box::new(head))), weight_bytes })
}

/// The same of a decoder.
fn load_causal(config: &ModelConfig, head: Option<HeadKind>, mut weights: Weights) -> Result<Loaded> {
    let encoder = CausalEncoder::load(config, &mut weights)?;
    let weight_bytes = weights.bytes();
    let head = match head {
        None => None,
        Some(HeadKind::Labels(labels)) => {
            Some(LastTokenHead::classification(encoder.shape().hidden, labels, &mut weights)?)
        }
        Some(HeadKind::Answers(answers)) => Some(LastTokenHead::answers(&encoder, config, answers, &mut weights)?),
    };
    weights.discard(|name| name.starts_with("lm_head."));
    weights.finish()?;
    let weight_bytes = weight_bytes + head.as_ref().map_or(0, LastTokenHead::bytes);
    Ok(Loaded { encoder: Box::new(encoder), head: head.map(Head::LastToken), weight_bytes })
}

/// Packs `texts` after checking what the encoder would not: MLX reads any row it is told to.
fn pack(texts: &[TextTokens], shape: &EncoderShape) -> Result<PackedTexts> {
    let longest = texts.iter().map(|text| text.ids.len()).max().unwrap_or(0);
    let zeros = vec![0; longest];
    let parts = texts.iter().map(|text| {
        let TextTokens { ids, types, .. } = text;
        if ids.is_empty() || ids.len() != types.len() {
            return Err(Error::invalid_request("a text has no tokens, or not as many token types"));
        }
        if ids.len() > shape.max_tokens {
            let (length, most) = (ids.len(), shape.max_tokens);
            let message = format!("a text has {length} tokens, the model takes {most}");
            return Err(Error::new(Status::ContextLength, message));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= shape.vocab) {
            return Err(Error::invalid_request(format!("token {id} is outside of the vocabulary")));
        }
        if shape.token_types < 2 {
            return Ok((&ids[..], &zeros[..ids.len()]));
        }
        match types.iter().find(|&&kind| kind as usize >= shape.token_types) {
            Some(kind) => Err(Error::invalid_request(format!("the model has no token type {kind}"))),
            None => Ok((&ids[..], &types[..])),
        }
    });
    Ok(PackedTexts::new(&parts.collect::<Result<Vec<_>>>()?))
}

/// The rows of `array [texts, width]`, f32, in the order that the texts were given in.
fn rows_in_order(array: &Array, texts: &PackedTexts) -> Result<Vec<Vec<f32>>> {
    let array = array.contiguous()?;
    mlx::limit_ahead();
    array.eval()?;
    let width = array.dim(1) as usize;
    let values = array.try_as_slice::<f32>().map_err(|e| Error::internal(format!("results are not f32: {e}")))?;
    let mut rows = vec![Vec::new(); texts.order().len()];
    for (row, &text) in values.chunks_exact(width).zip(texts.order()) {
        rows[text] = row.to_vec();
    }
    Ok(rows)
}
