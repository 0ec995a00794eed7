//! Multi-head attention with grouped key and value heads over the blocks of sequences.

use std::sync::Arc;

use mlx_rs::Array;

use super::heads::Heads;
use super::linear::Joined;
use super::{Linear, RmsNorm, Rope, Step, check_paged};
use crate::error::Result;
use crate::kernels::gpu::{PagedAttention, PagedSpec};
use crate::kernels::{self, AttentionKind, Backend, Cpu};
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
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the output projection.
    pub output_bias: bool,
    /// RMS norm on every query and key head (`q_norm`, `k_norm`), with this epsilon.
    pub qk_norm_eps: Option<f32>,
    /// Tokens a query sees, itself included; `None` is all.
    pub window: Option<usize>,
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
    layer: usize,
    backend: Backend,
    /// The GPU's kernels, if they work for this layer.
    paged: Option<PagedAttention>,
}

impl Attention {
    /// Takes `q_proj`, `k_proj`, `v_proj`, `o_proj` (and the norms) under `path`; `layer` is its place in the cache.
    pub fn load(
        weights: &mut Weights,
        path: &str,
        hidden: usize,
        layer: usize,
        spec: &AttentionSpec,
        rope: Rope,
    ) -> Result<Self> {
        let queries = spec.heads * spec.head_dim;
        let keys = spec.kv_heads * spec.head_dim;
        let norms = match spec.qk_norm_eps {
            Some(eps) => {
                let mut norm = |name| RmsNorm::load(weights, &format!("{path}.{name}"), spec.head_dim, eps);
                Some([norm("q_norm")?, norm("k_norm")?])
            }
            None => None,
        };
        let mut project = |name, width| Linear::load(weights, &format!("{path}.{name}"), hidden, width, spec.qkv_bias);
        let input = Joined::new(vec![project("q_proj", queries)?, project("k_proj", keys)?, project("v_proj", keys)?])?;
        let output = Linear::load(weights, &format!("{path}.o_proj"), queries, hidden, spec.output_bias)?;
        let backend = weights.backend().clone();
        let paged = backend.gpu().and_then(|gpu| {
            check_paged(&PagedSpec {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                block_tokens: gpu.block_tokens,
                scale: scale(spec),
                window: spec.window,
                dtype: weights.float_type(),
            })
        });
        let heads = Heads::new(spec, norms.as_ref(), &rope, &backend, weights.float_type())?;
        Ok(Self { spec: spec.clone(), input, output, norms, heads, rope, layer, backend, paged })
    }

    /// `x + attention(norm(x))`, all `[T, hidden]`; appends the step's keys and values to the cache.
    pub fn forward_onto(&self, x: &Array, norm: &RmsNorm, step: &mut Step<'_>) -> Result<Array> {
        let attended = match &self.backend {
            Backend::Mlx | Backend::Gpu(_) => self.attend(x, norm, step)?,
            Backend::Cpu(cpu) => self.attend_in_blocks(cpu, x, norm, step)?,
        };
        self.output.forward_onto(&attended, x)
    }

    /// With MLX's operations: `[T, hidden]`, before the norm, to `[T, heads * head_dim]`.
    fn attend(&self, x: &Array, norm: &RmsNorm, step: &mut Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, head_dim, .. } = self.spec;
        let tokens = x.dim(0);
        let [queries, keys, values] = self.heads.split(&self.input.forward(x, norm)?, &self.rope, step.positions)?;
        let attended = match &self.paged {
            Some(kernels) => {
                let dtype = kernels.spec().dtype;
                let (queries, keys) = (queries.as_dtype(dtype)?, keys.as_dtype(dtype)?);
                let values = values.as_dtype(dtype)?;
                let mut pool = step.pages.pool(self.layer)?;
                let (attended, unread) = step.paged.attend(kernels, &mut pool, &queries, (&keys, &values))?;
                step.unread.extend(unread);
                attended
            }
            None => {
                let pools = step.pages.append(self.layer, step.gathers.writes(), &keys, &values)?;
                step.gathers.attend(&queries, pools, scale(&self.spec), self.spec.window)?
            }
        };
        step.written = Some(attended.clone());
        Ok(attended.reshape(&[tokens, (heads * head_dim) as i32])?)
    }

    /// With the CPU kernels, over blocks: `[T, hidden]`, before the norm, to `[T, heads * head_dim]`.
    fn attend_in_blocks(&self, cpu: &Cpu, x: &Array, norm: &RmsNorm, step: &mut Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, kv_heads, window, .. } = self.spec;
        let joined = self.input.forward(x, norm)?;
        let (key_pool, value_pool) = step.pages.layer(self.layer)?;
        let kind = AttentionKind { kv_heads, heads, scale: scale(&self.spec), window, soft_cap: None };
        let heads = kernels::Heads {
            joined: &joined,
            query_norm: self.norms.as_ref().map(|[query, _]| query.parts()),
            key_norm: self.norms.as_ref().map(|[_, key]| key.parts()),
            rotation: self.rope.rotation(),
            key_pool,
            value_pool,
        };
        let attended = cpu.attention(heads, &kind, Arc::clone(&step.placement))?;
        step.written = Some(attended.clone());
        Ok(attended)
    }
}

/// Factor on the products of queries and keys.
fn scale(spec: &AttentionSpec) -> f32 {
    (spec.head_dim as f32).powf(-0.5)
}
