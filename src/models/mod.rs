//! Model architectures: one file each, one line each in [`ARCHITECTURES`].

mod cohere2;
mod deepseek_v3;
mod dense;
pub mod encoder;
mod ernie;
mod exaone4;
mod gemma2;
mod gemma3;
mod gemma4;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granite;
mod granite_hybrid;
mod grouped;
mod hunyuan;
mod kind;
mod lfm2;
mod llama;
mod llama4;
mod minimax;
mod ministral3;
mod mistral;
mod mixtral;
mod nemotron_h;
mod null;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_5;
mod qwen3_moe;
mod qwen3_next;
mod seed_oss;
mod smollm3;
#[cfg(test)]
mod tests;

use std::ops::Range;

use mlx_rs::{Array, Dtype};

pub use kind::ModelKind;

use crate::cache::{GroupKind, KvLayout};
use crate::config::ModelConfig;
use crate::error::{Error, Result, Status};
use crate::nn::{Decoder, DecoderSpec, LayerSpec, MixerSpec, StateLayout, Step};
use crate::weights::Weights;

/// A loaded language model. Owned by one thread, as all MLX arrays are.
pub trait Model {
    /// The token that it always draws, if it computes nothing: then nothing but its layout is asked of it.
    fn constant(&self) -> Option<u32> {
        None
    }

    /// Keys and values that a token of a sequence stores.
    fn kv_layout(&self) -> &KvLayout;

    /// What a sequence keeps in each layer with a state, in their order.
    fn state_layouts(&self) -> Vec<StateLayout> {
        Vec::new()
    }

    /// Its layers.
    fn depth(&self) -> usize {
        self.kv_layout().layers.len()
    }

    /// What the first layer takes of `tokens [T]` (u32): hidden states `[T, hidden]`, and whatever else the layers of some models
    /// need of them in columns behind.
    fn embed(&self, tokens: &Array) -> Result<Array>;

    /// Runs some of the layers over the step's `T` tokens: from the hidden states `x [T, hidden]` before the first of them to
    /// those behind the last, with the columns behind them that [`embed`](Self::embed) gives but behind the last layer of all.
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

    fn state_layouts(&self) -> Vec<StateLayout> {
        Decoder::state_layouts(self)
    }

    fn depth(&self) -> usize {
        Decoder::depth(self)
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
    /// Whether its checkpoint has other parts, too.
    wrapped: bool,
}

impl Scope {
    /// All of the model that `config` describes.
    fn whole(config: &ModelConfig, context: usize) -> Self {
        Self { context, head: true, wrapped: config.is_wrapped() }
    }
}

/// One supported `model_type`.
struct Architecture {
    model_type: &'static str,
    /// Which models have it, for people.
    models: &'static str,
    /// The model that a config describes; what is missing in it, or is not supported, is an error.
    declare: fn(&ModelConfig, &Scope) -> Result<DecoderSpec>,
}

#[rustfmt::skip] // One a line, however long.
const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "cohere2", models: "Command R7B, Command A", declare: cohere2::declare },
    Architecture { model_type: "deepseek_v3", models: "DeepSeek V3, R1, Kimi K2 (`kimi_k2`)", declare: deepseek_v3::declare },
    Architecture { model_type: "ernie4_5", models: "ERNIE 4.5, dense", declare: ernie::declare },
    Architecture { model_type: "exaone4", models: "EXAONE 4", declare: exaone4::declare },
    Architecture { model_type: "gemma2", models: "Gemma 2", declare: gemma2::declare },
    Architecture { model_type: "gemma3_text", models: "Gemma 3, and the text part of those that see", declare: gemma3::declare },
    Architecture { model_type: "gemma4_text", models: "Gemma 4, and the text part of those that see and hear", declare: gemma4::declare },
    Architecture { model_type: "glm4_moe", models: "GLM-4.5, GLM-4.6", declare: glm4_moe::declare },
    Architecture { model_type: "glm4_moe_lite", models: "GLM-4.7-Flash", declare: glm4_moe_lite::declare },
    Architecture { model_type: "gpt_oss", models: "gpt-oss 20B and 120B, as published or in MLX format", declare: gpt_oss::declare },
    Architecture { model_type: "granite", models: "Granite 3 and 4, dense", declare: granite::declare },
    Architecture { model_type: "granitemoehybrid", models: "Granite 4: hybrids, mixtures, and dense ones of this type", declare: granite_hybrid::declare },
    Architecture { model_type: "hunyuan_v1_dense", models: "Hunyuan, dense", declare: hunyuan::declare },
    Architecture { model_type: "lfm2", models: "LFM2", declare: lfm2::declare },
    Architecture { model_type: "lfm2_moe", models: "LFM2, mixtures", declare: lfm2::declare_moe },
    Architecture { model_type: "llama", models: "Llama 2 and 3.x and their kin; RoPE scaling `linear`, `llama3`, `yarn`, `longrope`", declare: llama::declare },
    Architecture { model_type: "llama4_text", models: "Llama 4 Scout and Maverick, in `llama4`; MobileLLM-R1", declare: llama4::declare },
    Architecture { model_type: "minimax", models: "MiniMax-M2 (also `minimax_m2`)", declare: minimax::declare },
    Architecture { model_type: "ministral3", models: "Ministral 3, in `mistral3`", declare: ministral3::declare },
    Architecture { model_type: "mistral", models: "Mistral, with its sliding window where the config has one; also in `mistral3`", declare: mistral::declare },
    Architecture { model_type: "mixtral", models: "Mixtral", declare: mixtral::declare },
    Architecture { model_type: "nemotron_h", models: "Nemotron-H, Nemotron Nano 2, Nemotron 3", declare: nemotron_h::declare },
    Architecture { model_type: "olmo3", models: "OLMo 3", declare: olmo3::declare },
    Architecture { model_type: "phi3", models: "Phi-3, Phi-4", declare: phi3::declare },
    Architecture { model_type: "qwen2", models: "Qwen2, Qwen2.5", declare: qwen2::declare },
    Architecture { model_type: "qwen2_moe", models: "Qwen1.5-MoE, Qwen2-57B-A14B", declare: qwen2_moe::declare },
    Architecture { model_type: "qwen3", models: "Qwen3, dense", declare: qwen3::declare },
    Architecture { model_type: "qwen3_5", models: "Qwen3.5, dense; the text part", declare: qwen3_5::declare },
    Architecture { model_type: "qwen3_5_moe", models: "Qwen3.5, mixtures; the text part", declare: qwen3_5::declare },
    Architecture { model_type: "qwen3_moe", models: "Qwen3 30B-A3B, 235B-A22B, Qwen3-Coder", declare: qwen3_moe::declare },
    Architecture { model_type: "qwen3_next", models: "Qwen3-Next", declare: qwen3_next::declare },
    Architecture { model_type: "seed_oss", models: "Seed-OSS", declare: seed_oss::declare },
    Architecture { model_type: "smollm3", models: "SmolLM3", declare: smollm3::declare },
];

/// Other names of some types.
const ALIASES: &[(&str, &str)] = &[
    ("kimi_k2", "deepseek_v3"),
    ("minimax_m2", "minimax"),
    ("qwen3_5_moe_text", "qwen3_5_moe"),
    ("qwen3_5_text", "qwen3_5"),
];

/// The registered type that `config` means.
fn type_of(config: &ModelConfig) -> &str {
    let own = config.model_type();
    ALIASES.iter().find(|(alias, _)| *alias == own).map_or(own, |(_, registered)| registered)
}

/// Whether `config` names a known architecture.
fn is_known(config: &ModelConfig) -> bool {
    supported_types().any(|known| known == type_of(config))
}

/// The supported values of `model_type`.
pub fn supported_types() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|a| a.model_type)
}

/// The supported values of `model_type`, and which models have them.
pub fn supported_models() -> impl Iterator<Item = (&'static str, &'static str)> {
    ARCHITECTURES.iter().map(|a| (a.model_type, a.models))
}

/// What `config` describes.
fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let wanted = type_of(config);
    let found = ARCHITECTURES.iter().find(|a| a.model_type == wanted).ok_or_else(|| {
        let known: Vec<_> = supported_types().collect();
        Error::unsupported(format!("unknown model type {wanted:?}; known types: {}", known.join(", ")))
    })?;
    let spec = (found.declare)(config, scope)?;
    for layer in &spec.layers {
        if let MixerSpec::Recurrent(state) = &layer.mixer {
            state.check()?;
        }
    }
    if spec.kv_layout(Dtype::Float32).layers.is_empty() {
        return Err(Error::unsupported("models without attention layers are not supported"));
    }
    Ok(spec)
}

/// Whether this build has what `config` describes; the error says what it lacks, or lists the known architectures. A config that is
/// damaged is an error when it is loaded.
pub fn check_supported(config: &ModelConfig) -> Result<()> {
    if null::is_named(config) {
        return Ok(());
    }
    match declare(config, &Scope::whole(config, 1)) {
        Err(error) if error.status() == Status::Unsupported => Err(error),
        _ => Ok(()),
    }
}

/// The context of a model: what its config declares, or `limit` if that is smaller.
pub fn context_length(config: &ModelConfig, limit: Option<usize>) -> Result<usize> {
    let assumed = || declare(config, &Scope::whole(config, 1)).ok().and_then(|spec| spec.max_positions);
    let own = config.field("max_position_embeddings").map(|_| config.integer("max_position_embeddings"));
    let declared = own
        .unwrap_or_else(assumed)
        .filter(|&n| n > 0)
        .ok_or_else(|| Error::invalid_model("config.json: \"max_position_embeddings\" is missing"))?;
    Ok(limit.map_or(declared, |limit| limit.min(declared)))
}

/// Number of token ids, from the config.
pub fn vocab_size(config: &ModelConfig) -> Result<usize> {
    let assumed = || declare(config, &Scope::whole(config, 1)).ok().map(|spec| spec.vocab);
    let own = config.field("vocab_size").map(|_| config.integer("vocab_size"));
    own.unwrap_or_else(assumed)
        .filter(|&n| n > 0)
        .ok_or_else(|| Error::invalid_model("config.json: \"vocab_size\" is missing"))
}

/// What an engine takes besides the weights, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Of keys and values of each cache group, for each token.
    pub cached_numbers: Vec<(GroupKind, usize)>,
    /// Bytes of states, for each sequence.
    pub state_bytes: usize,
    /// Of activations, for each row of a step.
    pub row_numbers: usize,
    /// Logits of a row that is sampled.
    pub vocab: usize,
}

impl Plan {
    fn of(spec: &DecoderSpec) -> Self {
        let widest = |layer: &LayerSpec| layer.mixer.row_numbers() + layer.feed_forward.row_numbers(spec.hidden);
        let layout = spec.kv_layout(Dtype::Float32);
        let numbers = (0..layout.groups.len()).map(|group| layout.group_token_numbers(group));
        Self {
            cached_numbers: layout.groups.iter().copied().zip(numbers).collect(),
            state_bytes: spec.state_bytes(),
            // The residual stream before and behind, queries, keys and values, what attention gives, and the feed-forward
            // layer's inner rows: what is alive at the same time in one layer, and what the next one's graph holds.
            row_numbers: 2
                * (4 * spec.hidden + spec.carried_numbers() + spec.layers.iter().map(widest).max().unwrap_or(0)),
            vocab: spec.vocab,
        }
    }

    /// Keys and values of a token in all groups.
    pub fn token_numbers(&self) -> usize {
        self.cached_numbers.iter().map(|(_, numbers)| numbers).sum()
    }

    /// Keys and values of a sequence of `tokens` tokens, in blocks of `block_tokens`, if a step computes at most `chunk` of them.
    pub fn sequence_numbers(&self, tokens: usize, chunk: usize, block_tokens: usize) -> usize {
        let held = |kind: GroupKind| (kind.most_blocks(tokens, chunk, block_tokens) * block_tokens).min(tokens);
        self.cached_numbers.iter().map(|&(kind, numbers)| held(kind) * numbers).sum()
    }

    /// Bytes that a step of `rows` rows needs, `sampled` of which are sampled; from experience, on the safe side.
    pub fn workspace(&self, rows: usize, sampled: usize) -> usize {
        4 * (rows * self.row_numbers + 4 * sampled * self.vocab)
    }
}

/// What an engine of the model that `config` names will take, known before its weights are read.
pub fn plan(config: &ModelConfig) -> Result<Plan> {
    let spec = match null::is_named(config) {
        true => null::declare(config)?,
        false => declare(config, &Scope::whole(config, 1))?,
    };
    Ok(Plan::of(&spec))
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
    let model: Box<dyn Model> = match null::is_named(config) {
        true => Box::new(null::load(config)?),
        false => Box::new(Decoder::load(&mut weights, &declare(config, &Scope::whole(config, context))?)?),
    };
    let weight_bytes = weights.bytes();
    weights.finish()?;
    Ok(Loaded { model, weight_bytes })
}
