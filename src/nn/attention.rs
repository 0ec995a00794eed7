//! Multi-head attention with grouped key and value heads over a sequence's cache.

use mlx_rs::Array;
use mlx_rs::fast::{ScaledDotProductAttentionMask as Mask, scaled_dot_product_attention};

use super::{Linear, RmsNorm, Rope, Step};
use crate::error::Result;
use crate::kernels::{AttentionKind, Backend, Cpu, Heads};
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
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    rope: Rope,
    layer: usize,
    backend: Backend,
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
        let norm = |name: &str, weights: &mut Weights| {
            spec.qk_norm_eps
                .map(|eps| RmsNorm::load(weights, &format!("{path}.{name}"), spec.head_dim, eps))
                .transpose()
        };
        Ok(Self {
            query_norm: norm("q_norm", weights)?,
            key_norm: norm("k_norm", weights)?,
            query: Linear::load(weights, &format!("{path}.q_proj"), hidden, queries, spec.qkv_bias)?,
            key: Linear::load(weights, &format!("{path}.k_proj"), hidden, keys, spec.qkv_bias)?,
            value: Linear::load(weights, &format!("{path}.v_proj"), hidden, keys, spec.qkv_bias)?,
            output: Linear::load(weights, &format!("{path}.o_proj"), queries, hidden, spec.output_bias)?,
            spec: spec.clone(),
            rope,
            layer,
            backend: weights.backend().clone(),
        })
    }

    /// `x + attention(norm(x))`, all `[T, hidden]`; appends the step's keys and values to the cache.
    pub fn forward_onto(&self, x: &Array, norm: &RmsNorm, step: &mut Step<'_>) -> Result<Array> {
        let attended = match &self.backend {
            Backend::Mlx => self.attend(&norm.forward(x)?, step)?,
            Backend::Cpu(cpu) => self.attend_in_blocks(cpu, x, norm, step)?,
        };
        self.output.forward_onto(&attended, x)
    }

    fn scale(&self) -> f32 {
        (self.spec.head_dim as f32).powf(-0.5)
    }

    /// With MLX's operations, over contiguous rows: `[T, hidden]` to `[T, heads * head_dim]`.
    fn attend(&self, x: &Array, step: &mut Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let tokens = x.dim(0);
        let project = |layer: &Linear, heads: usize| -> Result<Array> {
            Ok(layer.forward(x)?.reshape(&[tokens, heads as i32, head_dim as i32])?)
        };
        let (queries, keys) = (project(&self.query, heads)?, project(&self.key, kv_heads)?);
        let values = project(&self.value, kv_heads)?;
        let norm = |y: Array, norm: &Option<RmsNorm>| match norm {
            Some(norm) => norm.forward(&y),
            None => Ok(y),
        };
        let queries = self.rope.forward(&norm(queries, &self.query_norm)?, step.positions)?;
        let keys = self.rope.forward(&norm(keys, &self.key_norm)?, step.positions)?;
        let (keys, values) = step.cache.append(self.layer, &keys, &values)?;
        // From token-major [n, heads, width] to MLX's [1, heads, n, width]; views, nothing is copied.
        let by_head = |y: &Array| y.transpose_axes(&[1, 0, 2])?.expand_dims(0);
        let length = keys.dim(0) as usize;
        let scale = self.scale();
        let (queries, keys, values) = (by_head(&queries)?, by_head(&keys)?, by_head(&values)?);
        let attended = match self.spec.window.filter(|&window| length > window) {
            Some(window) => {
                let mask = window_mask(tokens as usize, length, window)?;
                scaled_dot_product_attention(&queries, &keys, &values, scale, &mask, None)?
            }
            None if tokens > 1 => scaled_dot_product_attention(&queries, &keys, &values, scale, Mask::Causal, None)?,
            None => scaled_dot_product_attention(&queries, &keys, &values, scale, None, None)?,
        };
        let by_token = attended.squeeze_axes(&[0])?.transpose_axes(&[1, 0, 2])?;
        Ok(by_token.reshape(&[tokens, (heads * head_dim) as i32])?)
    }

    /// With the CPU kernels, over blocks: `[T, hidden]`, before the norm, to `[T, heads * head_dim]`.
    fn attend_in_blocks(&self, cpu: &Cpu, x: &Array, norm: &RmsNorm, step: &mut Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, kv_heads, window, .. } = self.spec;
        let joined = Linear::forward_joined(&[&self.query, &self.key, &self.value], x, norm)?;
        let tokens = x.dim(0) as usize;
        let placement = step.cache.placement(tokens);
        let (key_pool, value_pool) = step.cache.blocks(self.layer, tokens)?;
        let kind = AttentionKind { kv_heads, heads, scale: self.scale(), window, soft_cap: None };
        let heads = Heads {
            joined: &joined,
            query_norm: self.query_norm.as_ref().map(RmsNorm::parts),
            key_norm: self.key_norm.as_ref().map(RmsNorm::parts),
            rotation: self.rope.rotation(),
            key_pool,
            value_pool,
        };
        let attended = cpu.attention(heads, &kind, placement)?;
        step.cache.mark(attended.clone());
        Ok(attended)
    }
}

/// `[queries, length]` booleans: the last `queries` of `length` tokens each see themselves and what is less than
/// `window` tokens before them.
fn window_mask(queries: usize, length: usize, window: usize) -> Result<Array> {
    let first = length - queries;
    let own: Vec<i32> = (first..length).map(|i| i as i32).collect();
    let all: Vec<i32> = (0..length as i32).collect();
    let own = Array::from_slice(&own, &[queries as i32, 1]);
    let all = Array::from_slice(&all, &[1, length as i32]);
    let causal = all.le(&own)?;
    let near = own.subtract(&all)?.lt(Array::from_int(window as i32))?;
    Ok(causal.logical_and(near)?)
}
