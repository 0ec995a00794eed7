//! Multi-head attention with grouped key and value heads over the blocks of sequences.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::gather::Scores;
use super::heads::Heads;
use super::linear::Joined;
use super::{Linear, Norm, NormKind, RmsNorm, Rope, RopeSpec, Step, check_paged};
use crate::error::{Error, Result};
use crate::kernels::gpu::{PagedAttention, PagedSpec};
use crate::kernels::{self, AttentionKind, Backend, Cpu};
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
    /// Whether queries, keys and values are one matrix, `qkv_proj`.
    pub fused: bool,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Where queries depend on their position.
    pub position_scale: Option<PositionScale>,
    /// What turns, and how many dimensions of each head; without it a token does not know its position.
    pub rope: Option<(RopeSpec, usize)>,
    /// Tokens a query sees, itself included; `None` is all.
    pub window: Option<usize>,
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
    /// What checkpoints call those of queries and of keys.
    pub names: [&'static str; 2],
}

impl QkNorm {
    /// RMS norms over `over`, `q_norm` and `k_norm`.
    pub fn rms(eps: f32, over: NormOver) -> Self {
        Self { eps, kind: NormKind::Rms, over, names: ["q_norm", "k_norm"] }
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
    /// Of queries and keys.
    norms: Option<[RmsNorm; 2]>,
    /// The three parts of what `input` gives.
    heads: Heads,
    rope: Rope,
    /// `[heads]`, f32 for the CPU kernels.
    sinks: Option<Array>,
    layer: usize,
    backend: Backend,
    /// The GPU's kernels, if they work for this layer.
    paged: Option<PagedAttention>,
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
        let queries = spec.heads * spec.head_dim;
        let keys = spec.kv_heads * spec.head_dim;
        let norms = match spec.qk_norm {
            Some(norm) => {
                let width = |all: usize| if norm.over == NormOver::Token { all } else { spec.head_dim };
                let mut load = |name: &str, width| -> Result<RmsNorm> {
                    let path = format!("{path}.{name}");
                    match Norm::load(weights, &path, width, norm.kind, norm.eps)? {
                        Norm::Rms(norm) => Ok(norm),
                        Norm::Layer(_) => Err(Error::internal("layer norms of heads")),
                    }
                };
                let [query, key] = norm.names;
                Some([load(query, width(queries))?, load(key, width(keys))?])
            }
            None => None,
        };
        let mut project = |name, width| Linear::load(weights, &format!("{path}.{name}"), hidden, width, spec.qkv_bias);
        let input = if spec.fused {
            vec![project("qkv_proj", queries + 2 * keys)?]
        } else {
            vec![project("q_proj", queries)?, project("k_proj", keys)?, project("v_proj", keys)?]
        };
        let output = Linear::load(weights, &format!("{path}.o_proj"), queries, hidden, spec.output_bias)?;
        let backend = weights.backend().clone();
        let sinks = spec.sinks.then(|| load_sinks(weights, path, spec.heads)).transpose()?;
        let rope = match &spec.rope {
            Some((rope, dims)) => rope.build(*dims, context)?,
            None => Rope::none(),
        };
        let plain = spec.soft_cap.is_none() && sinks.is_none();
        let paged = backend.gpu().filter(|_| plain).and_then(|gpu| {
            check_paged(&PagedSpec {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                block_tokens: gpu.block_tokens,
                scale: spec.scale,
                window: spec.window,
                dtype: weights.float_type(),
            })
        });
        let heads = Heads::new(spec, norms.as_ref(), &rope, &backend, weights.float_type())?;
        Ok(Self {
            spec: spec.clone(),
            input: Joined::new(input)?,
            output,
            norms,
            heads,
            rope,
            sinks,
            layer,
            backend,
            paged,
        })
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
        if let (Some(norms), NormOver::Token) = (&self.norms, self.norm_over()) {
            joined = self.normalise_tokens(&joined, norms)?;
        }
        if let Some(scale) = &self.spec.position_scale {
            // Before the queries turn, which changes nothing: every head turns as it is, only longer.
            let queries = self.spec.heads * self.spec.head_dim;
            let scaled = mlx::columns(&joined, 0, queries)?.multiply(scale.factors(step.positions, &joined)?)?;
            let others = mlx::columns(&joined, queries, joined.dim(1) as usize)?;
            joined = mlx_rs::ops::concatenate(&[&scaled, &others], 1)?;
        }
        let attended = match &self.backend {
            Backend::Mlx | Backend::Gpu(_) => self.attend(&joined, step)?,
            Backend::Cpu(cpu) => self.attend_in_blocks(cpu, &joined, step)?,
        };
        step.written = Some(attended.clone());
        self.output.forward_to(&attended, residual)
    }

    fn norm_over(&self) -> NormOver {
        self.spec.qk_norm.map_or(NormOver::Head, |norm| norm.over)
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

    /// With MLX's operations: `joined [T, columns]` to `[T, heads * head_dim]`.
    fn attend(&self, joined: &Array, step: &mut Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, head_dim, scale, window, soft_cap, .. } = self.spec;
        let (tokens, group) = (joined.dim(0), step.pages.group(self.layer));
        let [queries, keys, values] = self.heads.split(joined, &self.rope, step.positions)?;
        let attended = match &self.paged {
            Some(kernels) => {
                let dtype = kernels.spec().dtype;
                let (queries, keys) = (queries.as_dtype(dtype)?, keys.as_dtype(dtype)?);
                let values = values.as_dtype(dtype)?;
                let mut pool = step.pages.pool(self.layer)?;
                let (attended, unread) =
                    step.groups[group].paged.attend(kernels, &mut pool, &queries, (&keys, &values))?;
                step.unread.extend(unread);
                attended
            }
            None => {
                let gathers = &mut step.groups[group].gathers;
                let pools = step.pages.append(self.layer, gathers.writes(), &keys, &values)?;
                let scores = Scores { scale, window, soft_cap, sinks: self.sinks.as_ref() };
                gathers.attend(&queries, pools, &scores)?
            }
        };
        Ok(attended.reshape(&[tokens, (heads * head_dim) as i32])?)
    }

    /// With the CPU kernels, over blocks: `joined [T, columns]` to `[T, heads * head_dim]`.
    fn attend_in_blocks(&self, cpu: &Cpu, joined: &Array, step: &Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, kv_heads, scale, window, soft_cap, .. } = self.spec;
        let placement = Arc::clone(&step.groups[step.pages.group(self.layer)].placement);
        let (key_pool, value_pool) = step.pages.layer(self.layer)?;
        let kind = AttentionKind { kv_heads, heads, scale, window, soft_cap };
        let norms = self.norms.as_ref().filter(|_| self.norm_over() != NormOver::Token);
        let heads = kernels::Heads {
            joined,
            query_norm: norms.map(|[query, _]| query.parts()),
            key_norm: norms.map(|[_, key]| key.parts()),
            turned_first: self.norm_over() == NormOver::TurnedHead,
            rotation: self.rope.rotation(),
            sinks: self.sinks.as_ref(),
            key_pool,
            value_pool,
        };
        cpu.attention(heads, &kind, placement)
    }
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
