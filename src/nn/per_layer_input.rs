//! Inputs of single layers (Gemma 3n and 4, "per-layer embeddings"): beside the residual stream each layer gets a narrow row of
//! its own for each token, from a second embedding table and from a projection of the first.
//!
//! The rows of all layers are made with the embeddings and travel behind the hidden states, `[T, hidden + layers * width]`: so whoever
//! takes tokens through a few layers at a time need not know of them.

use mlx_rs::{Array, ops};

use super::decoder::scaled;
use super::{Activation, Embedding, Linear, RmsNorm};
use crate::error::Result;
use crate::mlx;
use crate::weights::Weights;

/// What an architecture declares about inputs of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerLayerInputSpec {
    /// Entries of their table; every token must have one.
    pub vocab: usize,
    /// Numbers of a token for each layer.
    pub width: usize,
}

/// What makes the inputs of all layers.
#[derive(Debug)]
pub struct PerLayerInputs {
    hidden: usize,
    layers: usize,
    width: usize,
    table: Embedding,
    projection: Linear,
    norm: RmsNorm,
}

impl PerLayerInputs {
    /// Takes `embed_tokens_per_layer [vocab, layers * width]`, `per_layer_model_projection [layers * width, hidden]` and
    /// `per_layer_projection_norm [width]`, with `prefix` before their names.
    pub fn load(
        weights: &mut Weights,
        prefix: &str,
        (hidden, layers): (usize, usize),
        eps: f32,
        spec: PerLayerInputSpec,
    ) -> Result<Self> {
        let PerLayerInputSpec { vocab, width } = spec;
        let name = |part: &str| format!("{prefix}{part}");
        let columns = layers * width;
        let table = Embedding::load(weights, &name("embed_tokens_per_layer"), vocab, columns)?;
        let projection = Linear::load(weights, &name("per_layer_model_projection"), hidden, columns, false)?;
        let norm = RmsNorm::load(weights, &name("per_layer_projection_norm"), width, eps)?;
        Ok(Self { hidden, layers, width, table, projection, norm })
    }

    /// The embeddings `x [T, hidden]` of `tokens [T]` with the inputs of all layers behind: `[T, hidden + layers * width]`.
    pub fn join(&self, tokens: &Array, x: &Array) -> Result<Array> {
        let (layers, width) = (self.layers as i32, self.width as i32);
        let projected = scaled(self.projection.forward(x)?, (self.hidden as f32).powf(-0.5))?;
        let projected = self.norm.forward(&projected.reshape(&[-1, width])?)?.reshape(&[-1, layers * width])?;
        let looked_up = scaled(self.table.forward(tokens)?, (self.width as f32).sqrt())?;
        let inputs = scaled(projected.add(looked_up)?, 0.5f32.sqrt())?;
        Ok(ops::concatenate(&[x, &inputs.as_dtype(x.dtype())?], 1)?)
    }

    /// Hidden states `[T, hidden]` and inputs `[T, layers * width]` of what [`join`](Self::join) put together.
    pub fn part(&self, joined: &Array) -> Result<(Array, Array)> {
        let columns = self.hidden + self.layers * self.width;
        Ok((mlx::columns(joined, 0, self.hidden)?, mlx::columns(joined, self.hidden, columns)?))
    }

    /// Of all `inputs` those of `layer`: `[T, width]`.
    pub fn of_layer(&self, inputs: &Array, layer: usize) -> Result<Array> {
        mlx::columns(inputs, layer * self.width, (layer + 1) * self.width)
    }
}

/// What a layer does with its input, behind its feed-forward layer.
#[derive(Debug)]
pub struct LayerInput {
    gate: Linear,
    projection: Linear,
    norm: RmsNorm,
}

impl LayerInput {
    /// Takes `per_layer_input_gate [width, hidden]`, `per_layer_projection [hidden, width]` and `post_per_layer_input_norm [hidden]`
    /// under the layer's `path`.
    pub fn load(weights: &mut Weights, path: &str, hidden: usize, width: usize, eps: f32) -> Result<Self> {
        let name = |part: &str| format!("{path}.{part}");
        Ok(Self {
            gate: Linear::load(weights, &name("per_layer_input_gate"), hidden, width, false)?,
            projection: Linear::load(weights, &name("per_layer_projection"), width, hidden, false)?,
            norm: RmsNorm::load(weights, &name("post_per_layer_input_norm"), hidden, eps)?,
        })
    }

    /// `x + norm(projection(gelu(gate(x)) * input))`: `x [T, hidden]`, `input [T, width]`, the shape of `x`.
    pub fn forward(&self, x: &Array, input: &Array) -> Result<Array> {
        let gate = Activation::GeluTanh.forward(&self.gate.forward(x)?)?;
        let projected = self.projection.forward(&gate.multiply(input)?)?;
        Ok(x.add(self.norm.forward(&projected)?)?)
    }
}
