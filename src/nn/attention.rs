//! Multi-head attention with grouped key and value heads over the blocks of sequences.

use std::sync::Arc;

use mlx_rs::Array;

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

    /// With MLX's operations: `[T, hidden]` to `[T, heads * head_dim]`.
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
        let pools = step.pages.append(self.layer, step.gathers.writes(), &keys, &values)?;
        let attended = step.gathers.attend(&queries, pools, self.scale(), self.spec.window)?;
        step.written = Some(attended.clone());
        Ok(attended.reshape(&[tokens, (heads * head_dim) as i32])?)
    }

    /// With the CPU kernels, over blocks: `[T, hidden]`, before the norm, to `[T, heads * head_dim]`.
    fn attend_in_blocks(&self, cpu: &Cpu, x: &Array, norm: &RmsNorm, step: &mut Step<'_>) -> Result<Array> {
        let AttentionSpec { heads, kv_heads, window, .. } = self.spec;
        let joined = Linear::forward_joined(&[&self.query, &self.key, &self.value], x, norm)?;
        let (key_pool, value_pool) = step.pages.layer(self.layer)?;
        let kind = AttentionKind { kv_heads, heads, scale: self.scale(), window, soft_cap: None };
        let heads = Heads {
            joined: &joined,
            query_norm: self.query_norm.as_ref().map(RmsNorm::parts),
            key_norm: self.key_norm.as_ref().map(RmsNorm::parts),
            rotation: self.rope.rotation(),
            key_pool,
            value_pool,
        };
        let attended = cpu.attention(heads, &kind, Arc::clone(step.placement))?;
        step.written = Some(attended.clone());
        Ok(attended)
    }
}
