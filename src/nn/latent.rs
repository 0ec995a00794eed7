//! Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2"): keys and values of all heads are projections of one narrow row
//! per token, the latent, which is all that is cached beside the part of the keys that turns.
//!
//! Computed in the absorbed form: what would make keys of the latent is applied to the queries instead, and what would make values
//! of it to the result. So every head attends to the latents themselves, as if they were one head of keys and of values.

use mlx_rs::{Array, ops};

use super::attention::{AttentionCore, CoreSpec};
use super::{Linear, RmsNorm, RopeSpec, Step};
use crate::error::{Error, Result};
use crate::kernels::{Backend, Operand};
use crate::mlx::{self, Matrix};
use crate::weights::Weights;

/// What an architecture declares about its latent attention.
#[derive(Debug, Clone)]
pub struct LatentSpec {
    /// Query heads.
    pub heads: usize,
    /// Width of the row that queries are projections of; without it they are projections of the hidden state.
    pub query_rank: Option<usize>,
    /// Width of the latent.
    pub rank: usize,
    /// Dimensions of a head of queries and keys that do not turn.
    pub plain: usize,
    /// Dimensions that turn; all heads have the same keys there.
    pub turning: usize,
    /// Width of a head of values.
    pub value: usize,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// Epsilon of the norms of both narrow rows.
    pub norm_eps: f32,
    /// What turns.
    pub rope: RopeSpec,
    /// Biases on the projections to the narrow rows and on the output.
    pub bias: bool,
}

impl LatentSpec {
    /// Numbers of a token's row of keys: what turns, and the latent.
    pub fn key_width(&self) -> usize {
        self.turning + self.rank
    }

    /// Numbers of a token's row of values: the latent.
    pub fn value_width(&self) -> usize {
        self.rank
    }

    /// Numbers of a row that are alive in the layer at the same time.
    pub fn row_numbers(&self) -> usize {
        let queries = self.heads * (self.plain + self.turning + 2 * self.key_width());
        queries + 2 * self.heads * self.rank + 4 * self.key_width()
    }
}

/// A latent attention layer with its projections.
#[derive(Debug)]
pub struct LatentAttention {
    spec: LatentSpec,
    /// To the narrow row of queries, and its norm.
    narrow: Option<(Linear, RmsNorm)>,
    query: Linear,
    /// To the latent and the keys that turn.
    input: Linear,
    norm: RmsNorm,
    /// Queries `[heads, rank, plain]` to what meets the latent.
    absorb: PerHead,
    /// Latents `[heads, value, rank]` to values.
    release: PerHead,
    output: Linear,
    core: AttentionCore,
}

impl LatentAttention {
    /// Takes `q_a_proj`, `q_a_layernorm` and `q_b_proj`, or `q_proj`, `kv_a_proj_with_mqa`, `kv_a_layernorm`, `embed_q` and
    /// `unembed_out`, or `kv_b_proj`, and `o_proj` under `path`; `layer` is its place in the cache.
    pub fn load(
        weights: &mut Weights,
        path: &str,
        hidden: usize,
        layer: usize,
        spec: &LatentSpec,
        context: usize,
    ) -> Result<Self> {
        let LatentSpec { heads, rank, plain, turning, value, norm_eps, bias, .. } = *spec;
        let name = |part: &str| format!("{path}.{part}");
        let queries = heads * (plain + turning);
        let (narrow, query) = match spec.query_rank {
            Some(width) => {
                let down = Linear::load(weights, &name("q_a_proj"), hidden, width, bias)?;
                let norm = RmsNorm::load(weights, &name("q_a_layernorm"), width, norm_eps)?;
                (Some((down, norm)), Linear::load(weights, &name("q_b_proj"), width, queries, false)?)
            }
            None => (None, Linear::load(weights, &name("q_proj"), hidden, queries, false)?),
        };
        let input = Linear::load(weights, &name("kv_a_proj_with_mqa"), hidden, rank + turning, bias)?;
        let norm = RmsNorm::load(weights, &name("kv_a_layernorm"), rank, norm_eps)?;
        let backend = weights.backend().clone();
        let joined = name("kv_b_proj");
        let [absorb, release] = if weights.contains(&format!("{joined}.weight")) {
            split_by_head(&weights.matrix(&joined, heads * (plain + value), rank)?, heads, plain)?
        } else {
            [
                weights.stack(&name("embed_q"), heads, rank, plain)?,
                weights.stack(&name("unembed_out"), heads, value, rank)?,
            ]
        };
        let [absorb, release] = [absorb, release].map(|matrix| PerHead { matrix, heads, backend: backend.clone() });
        let output = Linear::load(weights, &name("o_proj"), heads * value, hidden, bias)?;
        let core = CoreSpec {
            heads,
            kv_heads: 1,
            key_width: spec.key_width(),
            value_width: spec.value_width(),
            values_in_keys: true,
            scale: spec.scale,
            window: None,
            soft_cap: None,
            turned_first: false,
            value_norm: None,
        };
        let rope = spec.rope.build(turning, context)?;
        let core = AttentionCore::new(weights, layer, core, None, rope, None)?;
        Ok(Self { spec: spec.clone(), narrow, query, input, norm, absorb, release, output, core })
    }

    /// `attention(x)`, or `attention(norm(x))`, added to `residual` if there is one; all `[T, hidden]`. Appends the step's latents to
    /// the cache.
    pub fn forward(
        &self,
        x: &Array,
        norm: Option<&RmsNorm>,
        residual: Option<&Array>,
        step: &mut Step<'_>,
    ) -> Result<Array> {
        let LatentSpec { heads, rank, plain, turning, value, .. } = self.spec;
        let normed = norm.map(|norm| norm.forward(x)).transpose()?;
        let (x, tokens) = (normed.as_ref().unwrap_or(x), x.dim(0));
        let queries = match &self.narrow {
            Some((down, norm)) => self.query.forward(&norm.forward(&down.forward(x)?)?)?,
            None => self.query.forward(x)?,
        };
        let queries = queries.reshape(&[tokens, heads as i32, (plain + turning) as i32])?;
        let dims = |from: usize, to: usize| mlx::slice_axis(&queries, 2, from, to);
        // What turns comes first, as the cache has it.
        let meeting = self.absorb.forward(&dims(0, plain)?)?;
        let queries = ops::concatenate(&[&dims(plain, plain + turning)?, &meeting], 2)?;
        let queries = queries.reshape(&[tokens, (heads * (turning + rank)) as i32])?;
        let row = self.input.forward(x)?;
        let latent = self.norm.forward(&mlx::columns(&row, 0, rank)?)?;
        let keys = mlx::columns(&row, rank, rank + turning)?;
        let joined = ops::concatenate(&[&queries, &keys, &latent], 1)?;
        let attended = self.core.forward(&joined, step)?.reshape(&[tokens, heads as i32, rank as i32])?;
        let values = self.release.forward(&attended)?.reshape(&[tokens, (heads * value) as i32])?;
        self.output.forward_to(&values, residual)
    }
}

/// A matrix for each head: a stack `[heads, out, in]`.
#[derive(Debug)]
struct PerHead {
    matrix: Matrix,
    heads: usize,
    backend: Backend,
}

impl PerHead {
    /// `x [T, heads, in]` to `[T, heads, out]`.
    fn forward(&self, x: &Array) -> Result<Array> {
        let (tokens, heads) = (x.dim(0), self.heads as i32);
        // Rows of a head are neighbours, so that its matrix is read once.
        let x = x.transpose_axes(&[1, 0, 2])?;
        let y = match self.backend.kernels(&self.matrix) {
            Some(cpu) => {
                let x = x.reshape(&[heads * tokens, -1])?;
                let which = (0..heads as u32).flat_map(|head| std::iter::repeat_n(head, tokens as usize)).collect();
                let y =
                    cpu.stacked_linear(&x, which, self.heads, &Operand { matrix: (&self.matrix).into(), bias: None })?;
                y.reshape(&[heads, tokens, -1])?
            }
            None => {
                let ids: Vec<u32> = (0..heads as u32).collect();
                self.matrix.gather_matmul(&x, &Array::from_slice(&ids, &[heads]), true)?
            }
        };
        Ok(y.transpose_axes(&[1, 0, 2])?)
    }
}

/// The two stacks of a joined matrix `[heads * (plain + value), rank]`, unpacked: to the latent for queries, transposed, and from it
/// for values.
fn split_by_head(joined: &Matrix, heads: usize, plain: usize) -> Result<[Matrix; 2]> {
    let joined = match joined {
        Matrix::Dense(weight) => weight.clone(),
        Matrix::Quantized(weight) => weight.unpacked(weight.scales.dtype())?,
    };
    let per_head = joined.dim(0) / heads as i32;
    if per_head <= plain as i32 {
        return Err(Error::internal("a joined matrix without rows of values"));
    }
    let joined = joined.reshape(&[heads as i32, per_head, joined.dim(1)])?;
    let keys = mlx::slice_axis(&joined, 1, 0, plain)?.transpose_axes(&[0, 2, 1])?.contiguous()?;
    let values = mlx::slice_axis(&joined, 1, plain, per_head as usize)?.contiguous()?;
    let parts = [keys, values];
    mlx_rs::transforms::eval(&parts)?;
    Ok(parts.map(Matrix::Dense))
}
