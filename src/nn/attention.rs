//! Multi-head attention with grouped key and value heads over the blocks of sequences.

mod core;

use mlx_rs::{Array, Dtype};

pub(super) use core::{AttentionCore, CoreSpec};

use super::linear::Joined;
use super::{Linear, Norm, NormKind, RmsNorm, Rope, RopeSpec, Step};
use crate::error::{Error, Result};
use crate::kernels::{Backend, Window};
use crate::mlx;
use crate::weights::Weights;

/// What an architecture declares about its attention.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// What checkpoints call that one.
    pub output_name: &'static str,
    /// Whether queries, keys and values are one matrix, `qkv_proj`.
    pub fused: bool,
    /// Whether `q_proj` also gives, behind each head's queries, gates whose sigmoid multiplies what the head gives (Qwen3-Next).
    pub gated: bool,
    /// Whether values are what the projection of keys gives, before it is normalised and turned (Gemma 4).
    pub keys_as_values: bool,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Epsilon of a norm without weights of each head of values (Gemma 4).
    pub value_norm: Option<f32>,
    /// Where queries depend on their position; norms of heads come after it, and would undo it.
    pub position_scale: Option<PositionScale>,
    /// What turns, and how many dimensions of each head; without it a token does not know its position.
    pub rope: Option<(RopeSpec, usize)>,
    /// What a query sees; `None` is all up to itself.
    pub window: Option<Window>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// A score for each query head that attends to nothing (`sinks`; Xiao et al. 2023, as gpt-oss has them).
    pub sinks: bool,
}

/// RMS norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm {
    /// Epsilon.
    pub eps: f32,
    /// Plain or centred.
    pub kind: NormKind,
    /// What is normalised together.
    pub over: NormOver,
    /// What checkpoints call those of queries and of keys; `None` if they have no weights.
    pub names: Option<[&'static str; 2]>,
}

impl QkNorm {
    /// RMS norms over `over`, `q_norm` and `k_norm`.
    pub fn rms(eps: f32, over: NormOver) -> Self {
        Self { eps, kind: NormKind::Rms, over, names: Some(["q_norm", "k_norm"]) }
    }
}

/// Queries grow with their position: times `1 + beta * ln(1 + floor((position + offset) / original))`, so that long contexts are
/// attended to as sharply as short ones (Llama 4's attention temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionScale {
    /// How fast.
    pub beta: f32,
    /// Tokens of a level.
    pub original: usize,
    /// Added to positions, which count from zero.
    pub offset: usize,
}

impl PositionScale {
    /// Factors `[T, 1]` of tokens at `positions [T]`, in the type of `like`.
    fn factors(&self, positions: &Array, like: &Array) -> Result<Array> {
        let at = positions.as_dtype(Dtype::Float32)?.add(Array::from_f32(self.offset as f32))?;
        let level = mlx_rs::ops::floor(at.divide(Array::from_f32(self.original as f32))?)?;
        let factors = mlx_rs::ops::log1p(&level)?.multiply(Array::from_f32(self.beta))?.add(Array::from_f32(1.0))?;
        Ok(factors.as_dtype(like.dtype())?.expand_dims(1)?)
    }
}

/// What a norm of queries or keys is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormOver {
    /// Every head by itself, before it turns.
    Head,
    /// Every head by itself, after it has turned.
    TurnedHead,
    /// All heads of a token (`q_norm.weight [heads * head_dim]`), before they turn.
    Token,
}

/// An attention layer with its projections.
#[derive(Debug)]
pub struct Attention {
    spec: AttentionSpec,
    /// Queries, keys and values.
    input: Joined,
    output: Linear,
    /// Of all heads of queries and of keys.
    token_norms: Option<[RmsNorm; 2]>,
    core: AttentionCore,
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj` or `qkv_proj`, `o_proj` (norms and sinks) under `path`; `layer` is its place in the cache,
    /// and `context` the tokens that are served.
    pub fn load(
        weights: &mut Weights,
        path: &str,
        hidden: usize,
        layer: usize,
        spec: &AttentionSpec,
        context: usize,
    ) -> Result<Self> {
        let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let norms = match spec.qk_norm {
            Some(norm) => {
                let width = |all: usize| if norm.over == NormOver::Token { all } else { spec.head_dim };
                let mut load = |which: usize, width| -> Result<RmsNorm> {
                    let Some(names) = norm.names else { return RmsNorm::plain(weights, width, norm.eps) };
                    let path = format!("{path}.{}", names[which]);
                    match Norm::load(weights, &path, width, norm.kind, norm.eps)? {
                        Norm::Rms(norm) => Ok(norm),
                        Norm::Layer(_) => Err(Error::internal("layer norms of heads")),
                    }
                };
                Some([load(0, width(queries))?, load(1, width(keys))?])
            }
            None => None,
        };
        let mut project = |name, width| Linear::load(weights, &format!("{path}.{name}"), hidden, width, spec.qkv_bias);
        if spec.keys_as_values && (spec.fused || spec.gated) {
            return Err(Error::internal("values that are keys, of a joined or gated projection"));
        }
        let input = if spec.fused {
            vec![project("qkv_proj", queries + 2 * keys)?]
        } else if spec.gated {
            let both = project("q_proj", 2 * queries)?;
            let apart = |gate: usize| (0..spec.heads).flat_map(move |head| span(2 * head + gate, spec.head_dim));
            let [query, gate] =
                [both.reordered(&apart(0).collect::<Vec<_>>())?, both.reordered(&apart(1).collect::<Vec<_>>())?];
            vec![query, project("k_proj", keys)?, project("v_proj", keys)?, gate]
        } else if spec.keys_as_values {
            // Computed twice: little beside the queries, and what follows is the same for all.
            let key = project("k_proj", keys)?;
            vec![project("q_proj", queries)?, key.clone(), key]
        } else {
            vec![project("q_proj", queries)?, project("k_proj", keys)?, project("v_proj", keys)?]
        };
        let output = Linear::load(weights, &format!("{path}.{}", spec.output_name), queries, hidden, spec.output_bias)?;
        let sinks = spec.sinks.then(|| load_sinks(weights, path, spec.heads)).transpose()?;
        let rope = match &spec.rope {
            Some((rope, dims)) => rope.build(*dims, context)?,
            None => Rope::none(),
        };
        let over = spec.qk_norm.map_or(NormOver::Head, |norm| norm.over);
        let (token_norms, head_norms) = if over == NormOver::Token { (norms, None) } else { (None, norms) };
        let core = CoreSpec {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            key_width: spec.head_dim,
            value_width: spec.head_dim,
            values_in_keys: false,
            scale: spec.scale,
            window: spec.window,
            soft_cap: spec.soft_cap,
            turned_first: over == NormOver::TurnedHead,
            value_norm: spec.value_norm,
        };
        let core = AttentionCore::new(weights, layer, core, head_norms, rope, sinks)?;
        Ok(Self { spec: spec.clone(), input: Joined::new(input)?, output, token_norms, core })
    }

    /// `attention(x)`, or `attention(norm(x))`, added to `residual` if there is one; all `[T, hidden]`. Appends the step's keys and
    /// values to the cache.
    pub fn forward(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        residual: Option<&Array>,
        step: &mut Step<'_>,
    ) -> Result<Array> {
        let mut joined = self.input.forward(x, norm)?;
        if let Some(norms) = &self.token_norms {
            joined = self.normalise_tokens(&joined, norms)?;
        }
        if let Some(scale) = &self.spec.position_scale {
            // Before the queries turn, which changes nothing: every head turns as it is, only longer.
            let queries = self.spec.heads * self.spec.head_dim;
            let scaled = mlx::columns(&joined, 0, queries)?.multiply(scale.factors(step.positions, &joined)?)?;
            let others = mlx::columns(&joined, queries, joined.dim(1) as usize)?;
            joined = mlx_rs::ops::concatenate(&[&scaled, &others], 1)?;
        }
        if !self.spec.gated {
            return self.output.forward_to(&self.core.forward(&joined, step)?, residual);
        }
        let heads = (self.spec.heads + 2 * self.spec.kv_heads) * self.spec.head_dim;
        let gates = mlx_rs::ops::sigmoid(mlx::columns(&joined, heads, joined.dim(1) as usize)?)?;
        let attended = self.core.forward(&mlx::columns(&joined, 0, heads)?, step)?;
        self.output.forward_to(&attended.multiply(gates)?, residual)
    }

    /// Queries and keys of `joined [T, columns]`, all heads of a token together; values as they are.
    fn normalise_tokens(&self, joined: &Array, [query, key]: &[RmsNorm; 2]) -> Result<Array> {
        let queries = self.spec.heads * self.spec.head_dim;
        let keys = queries + self.spec.kv_heads * self.spec.head_dim;
        let part = |from, to| mlx::columns(joined, from, to);
        let parts = [query.forward(&part(0, queries)?)?, key.forward(&part(queries, keys)?)?];
        let values = part(keys, joined.dim(1) as usize)?;
        Ok(mlx_rs::ops::concatenate(&[&parts[0], &parts[1], &values], 1)?)
    }
}

/// The `index`th run of `width` outputs.
fn span(index: usize, width: usize) -> impl Iterator<Item = i32> {
    (index * width..(index + 1) * width).map(|output| output as i32)
}

/// `{path}.sinks [heads]`.
fn load_sinks(weights: &mut Weights, path: &str, heads: usize) -> Result<Array> {
    let sinks = weights.tensor(&format!("{path}.sinks"), &[heads])?;
    if !matches!(weights.backend(), Backend::Cpu(_)) {
        return Ok(sinks);
    }
    let sinks = sinks.as_dtype(Dtype::Float32)?;
    sinks.eval()?;
    Ok(sinks)
}
