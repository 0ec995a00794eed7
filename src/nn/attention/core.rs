//! Attention between projections: norms and rotations of heads, the cache, scores and weights.

use std::sync::Arc;

use mlx_rs::Array;

use crate::error::Result;
use crate::kernels::gpu::{PagedAttention, PagedSpec};
use crate::kernels::{self, AttentionKind, Backend, Cpu, ValuePool, Window};
use crate::nn::gather::Scores;
use crate::nn::heads::Heads;
use crate::nn::{RmsNorm, Rope, Step, check_paged};
use crate::weights::Weights;

/// What heads are like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::nn) struct CoreSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head of queries and keys.
    pub key_width: usize,
    /// Width of a head of values.
    pub value_width: usize,
    /// Whether values are the last columns of keys, once these have turned: then there are none of them in `joined`, nor in the
    /// cache.
    pub values_in_keys: bool,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// What a query sees; `None` is all up to itself.
    pub window: Option<Window>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Whether heads are normalised after they have turned.
    pub turned_first: bool,
    /// Each head of values is divided by the root of its mean square and this.
    pub value_norm: Option<f32>,
}

/// A layer's attention without its projections.
#[derive(Debug)]
pub(in crate::nn) struct AttentionCore {
    spec: CoreSpec,
    /// Of each head of queries and of keys.
    norms: Option<[RmsNorm; 2]>,
    /// The three parts of what the projections give.
    heads: Heads,
    rope: Rope,
    /// `[heads]`, f32 for the CPU kernels.
    sinks: Option<Array>,
    layer: usize,
    backend: Backend,
    /// The GPU's kernels, if they work for this layer.
    paged: Option<PagedAttention>,
}

impl AttentionCore {
    /// For the place `layer` in the cache, computed by whoever computes with `weights`.
    pub fn new(
        weights: &Weights,
        layer: usize,
        spec: CoreSpec,
        norms: Option<[RmsNorm; 2]>,
        rope: Rope,
        sinks: Option<Array>,
    ) -> Result<Self> {
        let (backend, dtype) = (weights.backend().clone(), weights.float_type());
        let CoreSpec { heads, kv_heads, key_width, value_width, scale, window, soft_cap, .. } = spec;
        let plain = soft_cap.is_none() && sinks.is_none() && key_width == value_width && !spec.values_in_keys;
        let paged = backend.gpu().filter(|_| plain).and_then(|gpu| {
            let block_tokens = gpu.block_tokens;
            check_paged(&PagedSpec { heads, kv_heads, head_dim: key_width, block_tokens, scale, window, dtype })
        });
        let heads = Heads::new(&spec, norms.as_ref(), &rope, &backend, dtype)?;
        Ok(Self { spec, norms, heads, rope, sinks, layer, backend, paged })
    }

    /// Of queries, keys and values side by side, `joined [T, columns]`: `[T, heads * value_width]`. Appends the step's keys and
    /// values to the cache.
    pub fn forward(&self, joined: &Array, step: &mut Step<'_>) -> Result<Array> {
        let attended = match &self.backend {
            Backend::Mlx | Backend::Gpu(_) => self.attend(joined, step)?,
            Backend::Cpu(cpu) => self.attend_in_blocks(cpu, joined, true, step)?,
        };
        step.written = Some(attended.clone());
        Ok(attended)
    }

    /// Of queries alone, `queries [T, heads * key_width]`, over rows that another layer has appended, in this step too:
    /// `[T, heads * value_width]`. Nothing is written.
    pub fn forward_over(&self, queries: &Array, step: &mut Step<'_>) -> Result<Array> {
        let attended = match &self.backend {
            Backend::Mlx | Backend::Gpu(_) => self.attend_over(queries, step)?,
            Backend::Cpu(cpu) => self.attend_in_blocks(cpu, queries, false, step)?,
        };
        step.written = Some(attended.clone());
        Ok(attended)
    }

    /// With MLX's operations.
    fn attend_over(&self, queries: &Array, step: &mut Step<'_>) -> Result<Array> {
        let CoreSpec { heads, value_width, .. } = self.spec;
        let (tokens, group) = (queries.dim(0), step.pages.group(self.layer));
        let queries = self.heads.queries(queries, &self.rope, step.positions)?;
        let attended = match &self.paged {
            Some(kernels) => {
                let queries = queries.as_dtype(kernels.spec().dtype)?;
                let mut pool = step.pages.pool(self.layer)?;
                step.groups[group].paged.attend(kernels, &mut pool, &queries, None)?.0
            }
            None => step.groups[group].gathers.attend(&queries, step.pages.layer(self.layer)?, &self.scores())?,
        };
        Ok(attended.reshape(&[tokens, (heads * value_width) as i32])?)
    }

    fn scores(&self) -> Scores<'_> {
        let CoreSpec { scale, window, soft_cap, value_width, values_in_keys, .. } = self.spec;
        let values_in_keys = values_in_keys.then_some(value_width);
        Scores { scale, window, soft_cap, sinks: self.sinks.as_ref(), values_in_keys }
    }

    /// With MLX's operations.
    fn attend(&self, joined: &Array, step: &mut Step<'_>) -> Result<Array> {
        let CoreSpec { heads, value_width, .. } = self.spec;
        let (tokens, group) = (joined.dim(0), step.pages.group(self.layer));
        let [queries, keys, values] = self.heads.split(joined, &self.rope, step.positions)?;
        let attended = match &self.paged {
            Some(kernels) => {
                let dtype = kernels.spec().dtype;
                let (queries, keys) = (queries.as_dtype(dtype)?, keys.as_dtype(dtype)?);
                let values = values.as_dtype(dtype)?;
                let mut pool = step.pages.pool(self.layer)?;
                let rows = Some((&keys, &values));
                let (attended, unread) = step.groups[group].paged.attend(kernels, &mut pool, &queries, rows)?;
                step.unread.extend(unread);
                attended
            }
            None => {
                let gathers = &mut step.groups[group].gathers;
                let pools = step.pages.append(self.layer, gathers.writes(), &keys, &values)?;
                gathers.attend(&queries, pools, &self.scores())?
            }
        };
        Ok(attended.reshape(&[tokens, (heads * value_width) as i32])?)
    }

    /// With the CPU kernels, over blocks; `joined` has keys and values if it `appends`.
    fn attend_in_blocks(&self, cpu: &Cpu, joined: &Array, appends: bool, step: &Step<'_>) -> Result<Array> {
        let CoreSpec { heads, kv_heads, scale, window, soft_cap, turned_first, value_norm, .. } = self.spec;
        let placement = Arc::clone(&step.groups[step.pages.group(self.layer)].placement);
        let (key_pool, value_pool) = step.pages.layer(self.layer)?;
        let value_pool = match self.spec {
            CoreSpec { values_in_keys: true, value_width, .. } => ValuePool::InKeys(value_width),
            _ => ValuePool::Own(value_pool),
        };
        let kind = AttentionKind { kv_heads, heads, scale, window, soft_cap };
        let heads = kernels::Heads {
            joined,
            appends,
            query_norm: self.norms.as_ref().map(|[query, _]| query.parts()),
            key_norm: self.norms.as_ref().map(|[_, key]| key.parts()),
            value_norm,
            turned_first,
            rotation: self.rope.rotation(),
            sinks: self.sinks.as_ref(),
            key_pool,
            value_pool,
        };
        cpu.attention(heads, &kind, placement)
    }
}
