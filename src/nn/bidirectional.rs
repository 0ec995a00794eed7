//! Multi-head attention in which every token of a text sees every other one, or those near it.

use std::ops::Range;

use mlx_rs::Array;
use mlx_rs::ops::concatenate;

use super::linear::Joined;
use super::{Linear, PackedTexts, Rope, RopeSpec, Run};
use crate::error::Result;
use crate::kernels::{Backend, Columns, TextAttentionKind};
use crate::mlx;
use crate::weights::Weights;

/// What an architecture declares about the attention of an encoder layer.
#[derive(Debug, Clone)]
pub struct BidirectionalSpec {
    /// Heads of queries, keys and values.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on all projections.
    pub bias: bool,
    /// Tokens that a query sees on each side of its own; `None` is all.
    pub window: Option<usize>,
    /// Rotary embedding, and the tokens that texts have at most.
    pub rope: Option<(RopeSpec, usize)>,
}

/// Where the tensors of an attention layer are, under the layer's path.
#[derive(Debug, Clone, Copy)]
pub enum InputPaths {
    /// Queries, keys and values apart.
    Apart([&'static str; 3]),
    /// One matrix with the rows of queries, keys and values in this order.
    Fused(&'static str),
}

/// An attention layer with its projections.
#[derive(Debug)]
pub struct Bidirectional {
    spec: BidirectionalSpec,
    input: Joined,
    output: Linear,
    rope: Option<Rope>,
    backend: Backend,
    /// Products of queries and keys that are in memory at once.
    scores_at_once: usize,
}

/// 64 MiB in f32: where MLX has no fused kernel, it keeps all of them.
const SCORES: usize = 1 << 24;

/// Bytes of them.
pub const ATTENTION_BYTES: usize = SCORES * size_of::<f32>();

/// Least queries of a long text that are computed together.
const LEAST_QUERIES: usize = 16;

impl Bidirectional {
    /// Takes the projections under `path`.
    pub fn load(
        weights: &mut Weights,
        path: &str,
        (input, output): (InputPaths, &str),
        hidden: usize,
        spec: &BidirectionalSpec,
    ) -> Result<Self> {
        let width = spec.heads * spec.head_dim;
        let mut linear = |name: &str, width| Linear::load(weights, &format!("{path}.{name}"), hidden, width, spec.bias);
        let input = match input {
            InputPaths::Apart(names) => names.into_iter().map(|name| linear(name, width)).collect::<Result<_>>()?,
            InputPaths::Fused(name) => vec![linear(name, 3 * width)?],
        };
        let output = Linear::load(weights, &format!("{path}.{output}"), width, hidden, spec.bias)?;
        let backend = weights.backend().clone();
        let rope = spec.rope.as_ref().map(|(rope, context)| rope.build(spec.head_dim, *context)).transpose()?;
        Ok(Self { spec: spec.clone(), input: Joined::new(input)?, output, rope, backend, scores_at_once: SCORES })
    }

    /// See [`Linear::lay_out`].
    pub(super) fn lay_out(&mut self) -> Result<()> {
        self.input.lay_out()?;
        self.output.lay_out()
    }

    /// `residual + attention(x)`, all `[T, hidden]`.
    pub fn forward_onto(&self, x: &Array, residual: &Array, texts: &PackedTexts) -> Result<Array> {
        let BidirectionalSpec { heads, head_dim, window, .. } = self.spec;
        let joined = self.input.project(x)?;
        let all = joined.reshape(&[x.dim(0), 3 * heads as i32, head_dim as i32])?;
        let part = |index: usize| mlx::heads(&all, index * heads, (index + 1) * heads);
        let rotated = |index: usize| match &self.rope {
            Some(rope) => rope.forward(&part(index)?, &texts.positions),
            None => part(index),
        };
        if let Backend::Cpu(cpu) = &self.backend {
            let kind = TextAttentionKind { heads, width: head_dim, scale: (head_dim as f32).powf(-0.5), window };
            let columns = |index: usize| Columns { array: &joined, first: index * heads * head_dim };
            let attended = match &self.rope {
                None => cpu.attend_texts([columns(0), columns(1), columns(2)], kind, texts.segments())?,
                Some(_) => {
                    let turned = [rotated(0)?, rotated(1)?];
                    let [q, k] = turned.each_ref().map(|array| Columns { array, first: 0 });
                    cpu.attend_texts([q, k, columns(2)], kind, texts.segments())?
                }
            };
            return self.output.forward_onto(&attended, residual);
        }
        let inputs = [rotated(0)?, rotated(1)?, part(2)?];
        let mut attended = Vec::new();
        for run in texts.runs() {
            self.attend_run(&inputs, run, &mut attended)?;
        }
        let attended = match &attended[..] {
            [one] => one.clone(),
            parts => concatenate(parts, 0)?,
        };
        self.output.forward_onto(&attended, residual)
    }

    /// Attention of texts of one length: pushes `[rows, heads * head_dim]`, in order.
    fn attend_run(&self, inputs: &[Array; 3], run: &Run, attended: &mut Vec<Array>) -> Result<()> {
        let scores = self.spec.heads * run.length * run.length;
        if scores > self.scores_at_once {
            for text in 0..run.count {
                self.attend_long(inputs, run.rows.start + text * run.length, run.length, attended)?;
            }
            return Ok(());
        }
        let mask = self.mask(0..run.length, 0..run.length);
        let together = (self.scores_at_once / scores).max(1);
        for first in (0..run.count).step_by(together) {
            let texts = first..(first + together).min(run.count);
            let rows = run.rows.start + texts.start * run.length..run.rows.start + texts.end * run.length;
            attended.push(self.attend(inputs, rows.clone(), rows, texts.len(), mask.as_ref())?);
        }
        Ok(())
    }

    /// Attention of a long text, `length` rows from `start` on, some queries at a time.
    fn attend_long(&self, inputs: &[Array; 3], start: usize, length: usize, attended: &mut Vec<Array>) -> Result<()> {
        let queries_at_once = match self.spec.window {
            Some(window) => (2 * window).max(LEAST_QUERIES),
            None => (self.scores_at_once / (self.spec.heads * length)).max(LEAST_QUERIES),
        };
        for first in (0..length).step_by(queries_at_once) {
            let queries = first..(first + queries_at_once).min(length);
            let keys = match self.spec.window {
                Some(window) => queries.start.saturating_sub(window)..(queries.end + window).min(length),
                None => 0..length,
            };
            let mask = self.mask(queries.clone(), keys.clone());
            let at = |rows: Range<usize>| start + rows.start..start + rows.end;
            attended.push(self.attend(inputs, at(queries), at(keys), 1, mask.as_ref())?);
        }
        Ok(())
    }

    /// Which keys each query sees, `[queries, keys]`; `None` if that is all.
    fn mask(&self, queries: Range<usize>, keys: Range<usize>) -> Option<Array> {
        let window = self.spec.window?;
        let sees = |query: usize, key: usize| query.abs_diff(key) <= window;
        let farthest = queries.end.saturating_sub(keys.start + 1).max(keys.end.saturating_sub(queries.start + 1));
        if farthest <= window {
            return None;
        }
        let shape = [queries.len() as i32, keys.len() as i32];
        let seen: Vec<bool> = queries.flat_map(|query| keys.clone().map(move |key| sees(query, key))).collect();
        Some(Array::from_slice(&seen, &shape))
    }

    /// Attention of the rows `queries` over the rows `keys` in `count` texts, all of them with as many rows each:
    /// `[queries, heads * head_dim]`.
    fn attend(
        &self,
        [q, k, v]: &[Array; 3],
        queries: Range<usize>,
        keys: Range<usize>,
        count: usize,
        mask: Option<&Array>,
    ) -> Result<Array> {
        let BidirectionalSpec { heads, head_dim, .. } = self.spec;
        let (heads, head_dim) = (heads as i32, head_dim as i32);
        let stacked = |array: &Array, rows: &Range<usize>| -> Result<Array> {
            let shape = [count as i32, (rows.len() / count) as i32, heads, head_dim];
            Ok(mlx::rows(array, rows.start, rows.end)?.reshape(&shape)?.transpose_axes(&[0, 2, 1, 3])?)
        };
        let (q, k, v) = (stacked(q, &queries)?, stacked(k, &keys)?, stacked(v, &keys)?);
        let scale = (head_dim as f32).powf(-0.5);
        let attended = match mask {
            Some(mask) => mlx_rs::fast::scaled_dot_product_attention(q, k, v, scale, mask, None)?,
            None => mlx_rs::fast::scaled_dot_product_attention(q, k, v, scale, None, None)?,
        };
        Ok(attended.transpose_axes(&[0, 2, 1, 3])?.reshape(&[queries.len() as i32, heads * head_dim])?)
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::Dtype;
    use serde_json::json;

    use super::*;
    use crate::config::ModelConfig;
    use crate::kernels::{Cpu, Precision};
    use crate::mlx::{Device, init, on_device};

    const HIDDEN: usize = 8;

    fn layer(window: Option<usize>, backend: Backend) -> Result<Bidirectional> {
        let config = ModelConfig::from_value(json!({"model_type": "bert"}))?;
        let mut weights = Weights::random(&config, Some(Dtype::Float32)).computed_by(backend);
        let spec = BidirectionalSpec { heads: 2, head_dim: 4, bias: true, window, rope: None };
        Bidirectional::load(&mut weights, "layer", (InputPaths::Fused("qkv"), "output"), HIDDEN, &spec)
    }

    fn attended(layer: &Bidirectional, x: &Array, texts: &PackedTexts) -> Result<Vec<f32>> {
        let nothing = x.multiply(Array::from_f32(0.0))?;
        let y = layer.forward_onto(x, &nothing, texts)?.contiguous()?;
        y.eval()?;
        Ok(y.as_slice::<f32>().to_vec())
    }

    #[test]
    fn long_texts_in_pieces_are_the_same() {
        init().unwrap();
        on_device(Device::Cpu, || {
            let zeros = [0u32; 100];
            let texts: Vec<_> = [100, 7, 40, 7, 100].iter().map(|&n| (&zeros[..n], &zeros[..n])).collect();
            let texts = PackedTexts::new(&texts);
            let key = mlx_rs::random::key(7)?;
            let x = mlx_rs::random::uniform::<_, f32>(-30.0, 30.0, &[254, HIDDEN as i32], &key)?;
            let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let unlimited = attended(&layer(None, Backend::Mlx)?, &x, &texts)?;
            for window in [None, Some(3), Some(20)] {
                let whole = attended(&layer(window, Backend::Mlx)?, &x, &texts)?;
                for backend in [Backend::Mlx, Backend::Cpu(Cpu::new(Some(2), Precision::Exact))] {
                    let mut layer = layer(window, backend)?;
                    assert!(far(&attended(&layer, &x, &texts)?, &whole) < 1e-5);
                    // Two of the short texts, none of the others.
                    layer.scores_at_once = 200;
                    assert!(far(&attended(&layer, &x, &texts)?, &whole) < 1e-5);
                }
                assert_eq!(far(&unlimited, &whole) > 1e-2, window.is_some(), "windows {window:?} make a difference");
            }
            Ok(())
        })
        .unwrap();
    }
}
