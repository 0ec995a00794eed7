//! Model architectures: one file each, one line each in [`ARCHITECTURES`].

mod dense;
pub mod encoder;
mod kind;
mod llama;
mod mistral;
mod null;
mod qwen2;
mod qwen3;

use std::ops::Range;

use mlx_rs::Array;

pub use kind::ModelKind;

use crate::cache::KvLayout;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::nn::{Decoder, Step};
use crate::weights::Weights;

/// A loaded language model. Owned by one thread, as all MLX arrays are.
pub trait Model {
    /// The token that it always draws, if it computes nothing: then nothing but its layout is asked of it.
    fn constant(&self) -> Option<u32> {
        None
    }

    /// Keys and values that a token of a sequence stores.
    fn kv_layout(&self) -> &KvLayout;

    /// Its layers.
    fn depth(&self) -> usize {
        self.kv_layout().layers.len()
    }

    /// What the first layer takes of `tokens [T]` (u32): hidden states `[T, hidden]`.
    fn embed(&self, tokens: &Array) -> Result<Array>;

    /// Runs some of the layers over the step's `T` tokens: from the hidden states `x [T, hidden]` before the first of them to
    /// those behind the last.
    fn pass(&self, x: Array, layers: Range<usize>, step: &mut Step<'_>) -> Result<Array>;

    /// Runs all layers over the step's `tokens [T]` (u32): hidden states `[T, hidden]` before the final norm.
    fn hidden(&self, tokens: &Array, step: &mut Step<'_>) -> Result<Array> {
        self.pass(self.embed(tokens)?, 0..self.depth(), step)
    }

    /// `hidden [T, hidden]` behind the last layer to what heads take of it: the same shape.
    fn final_norm(&self, hidden: &Array) -> Result<Array>;

    /// Logits `[n, vocab]` of the rows `wanted [n]` (i32) of `hidden [T, hidden]`; of all of them without it.
    fn logits(&self, hidden: &Array, wanted: Option<&Array>) -> Result<Array>;
}

impl Model for Decoder {
    fn kv_layout(&self) -> &KvLayout {
        Decoder::kv_layout(self)
    }

    fn embed(&self, tokens: &Array) -> Result<Array> {
        Decoder::embed(self, tokens)
    }

    fn pass(&self, x: Array, layers: Range<usize>, step: &mut Step<'_>) -> Result<Array> {
        Decoder::pass(self, x, layers, step)
    }

    fn final_norm(&self, hidden: &Array) -> Result<Array> {
        Decoder::final_norm(self, hidden)
    }

    fn logits(&self, hidden: &Array, wanted: Option<&Array>) -> Result<Array> {
        Decoder::logits(self, hidden, wanted)
    }
}

/// What of a model is wanted.
struct Scope {
    /// Tokens of a sequence that the engine will serve.
    context: usize,
    /// Whether it is to give logits.
    head: bool,
}

/// One supported `model_type`.
struct Architecture {
    model_type: &'static str,
    /// Takes the model's tensors.
    load: fn(&ModelConfig, &Scope, &mut Weights) -> Result<Box<dyn Model>>,
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "llama", load: llama::load },
    Architecture { model_type: "mistral", load: mistral::load },
    Architecture { model_type: "qwen2", load: qwen2::load },
    Architecture { model_type: "qwen3", load: qwen3::load },
];

/// Not among the supported ones: it is no model, and has nothing to be compared with.
const NULL: Architecture = Architecture { model_type: "omlx_null", load: null::load };

/// The supported values of `model_type`.
pub fn supported_types() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|a| a.model_type)
}

fn find(config: &ModelConfig) -> Result<&'static Architecture> {
    let wanted = config.model_type();
    ARCHITECTURES.iter().chain([&NULL]).find(|a| a.model_type == wanted).ok_or_else(|| {
        let known: Vec<_> = supported_types().collect();
        Error::unsupported(format!("unknown model type {wanted:?}; known types: {}", known.join(", ")))
    })
}

/// Whether `config` names a known architecture; the error lists the known ones.
pub fn check_supported(config: &ModelConfig) -> Result<()> {
    find(config).map(|_| ())
}

/// The context of a model: what its config declares, or `limit` if that is smaller.
pub fn context_length(config: &ModelConfig, limit: Option<usize>) -> Result<usize> {
    let declared = config
        .integer("max_position_embeddings")
        .filter(|&n| n > 0)
        .ok_or_else(|| Error::invalid_model("config.json: \"max_position_embeddings\" is missing"))?;
    Ok(limit.map_or(declared, |limit| limit.min(declared)))
}

/// Number of token ids, from the config.
pub fn vocab_size(config: &ModelConfig) -> Result<usize> {
    config
        .integer("vocab_size")
        .filter(|&n| n > 0)
        .ok_or_else(|| Error::invalid_model("config.json: \"vocab_size\" is missing"))
}

/// What an engine takes besides the weights, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Of keys and values, for each token.
    pub cached_numbers: usize,
    /// Of activations, for each row of a step.
    pub row_numbers: usize,
    /// Logits of a row that is sampled.
    pub vocab: usize,
}

impl Plan {
    /// Bytes that a step of `rows` rows needs, `sampled` of which are sampled; from experience, on the safe side.
    pub fn workspace(&self, rows: usize, sampled: usize) -> usize {
        4 * (rows * self.row_numbers + 4 * sampled * self.vocab)
    }
}

/// What an engine of the model that `config` names will take, known before its weights are read.
pub fn plan(config: &ModelConfig) -> Result<Plan> {
    find(config)?;
    config.parse::<dense::DenseConfig>()?.plan()
}

/// A model and what its weights weigh.
pub struct Loaded {
    /// The model.
    pub model: Box<dyn Model>,
    /// Bytes of its tensors on the device.
    pub weight_bytes: usize,
}

/// Builds the model that `config` names from `weights`, every tensor of which must be used.
pub fn load(config: &ModelConfig, context: usize, mut weights: Weights) -> Result<Loaded> {
    let architecture = find(config)?;
    let model = (architecture.load)(config, &Scope { context, head: true }, &mut weights)?;
    let weight_bytes = weights.bytes();
    weights.finish()?;
    Ok(Loaded { model, weight_bytes })
}
