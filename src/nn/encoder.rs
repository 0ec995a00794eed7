//! The encoder-only transformer: what differs between architectures is an [`EncoderSpec`].

use mlx_rs::{Array, Dtype};

use super::{Bidirectional, BidirectionalSpec, Embedding, InputPaths, LayerNorm, Mlp, MlpSpec, PackedTexts};
use crate::error::Result;
use crate::weights::Weights;

/// Where the norms of a layer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlace {
    /// After each sum: `norm(x + f(x))` (Vaswani et al. 2017).
    After,
    /// Before each sublayer, `x + f(norm(x))`, and once after the last layer. The first attention takes the embeddings, which
    /// are normalised already.
    Before,
}

/// Names of the tensors, without the prefix of the whole encoder.
#[derive(Debug, Clone, Copy)]
pub struct EncoderPaths {
    /// Table of tokens.
    pub words: &'static str,
    /// Table of positions, if they are learned.
    pub positions: &'static str,
    /// Table of token types, if there are any.
    pub token_types: &'static str,
    /// Norm of the sum of the embeddings.
    pub embedding_norm: &'static str,
    /// The layers; a number follows.
    pub layers: &'static str,
    /// Queries, keys and values.
    pub attention_input: InputPaths,
    /// What follows attention.
    pub attention_output: &'static str,
    /// Norm before or after attention.
    pub attention_norm: &'static str,
    /// First projection of the feed-forward layer.
    pub mlp_input: &'static str,
    /// Its second one.
    pub mlp_output: &'static str,
    /// Norm before or after it.
    pub mlp_norm: &'static str,
    /// Norm after the last layer, if norms come before.
    pub final_norm: &'static str,
}

/// An encoder as its architecture declares it.
#[derive(Debug, Clone)]
pub struct EncoderSpec {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Rows of the table of positions, and the one that is a text's first; `None` where nothing is learned.
    pub positions: Option<(usize, usize)>,
    /// Kinds of tokens; 0 if there is no such table.
    pub token_types: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Whether norms have a bias.
    pub norm_bias: bool,
    /// Where they are.
    pub norm_place: NormPlace,
    /// The layers, first to last.
    pub layers: Vec<EncoderLayer>,
    /// Names of the tensors.
    pub paths: EncoderPaths,
    /// What precedes the names.
    pub prefix: &'static str,
}

/// One encoder layer.
#[derive(Debug, Clone)]
pub struct EncoderLayer {
    /// Its attention.
    pub attention: BidirectionalSpec,
    /// Its feed-forward layer.
    pub mlp: MlpSpec,
}

#[derive(Debug)]
struct Layer {
    attention: Bidirectional,
    /// `None` is no norm.
    attention_norm: Option<LayerNorm>,
    mlp: Mlp,
    mlp_norm: LayerNorm,
}

/// A loaded encoder.
#[derive(Debug)]
pub struct EncoderStack {
    words: Embedding,
    /// With the row of a text's first token.
    positions: Option<(Embedding, usize)>,
    token_types: Option<Embedding>,
    embedding_norm: LayerNorm,
    layers: Vec<Layer>,
    norm_place: NormPlace,
    final_norm: Option<LayerNorm>,
}

impl EncoderStack {
    /// Takes all weights that `spec` describes.
    pub fn load(weights: &mut Weights, spec: &EncoderSpec) -> Result<Self> {
        let EncoderSpec { hidden, norm_eps, norm_bias, paths, prefix, .. } = *spec;
        let norm = |weights: &mut Weights, path: String| LayerNorm::load(weights, &path, hidden, norm_eps, norm_bias);
        let table = |weights: &mut Weights, name: &str, rows| {
            Embedding::load(weights, &format!("{prefix}{name}"), rows, hidden)
        };
        let words = table(weights, paths.words, spec.vocab)?;
        let positions = match spec.positions {
            Some((rows, first)) => Some((table(weights, paths.positions, rows)?, first)),
            None => None,
        };
        let token_types =
            (spec.token_types > 0).then(|| table(weights, paths.token_types, spec.token_types)).transpose()?;
        let embedding_norm = norm(weights, format!("{prefix}{}", paths.embedding_norm))?;
        let before = spec.norm_place == NormPlace::Before;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (index, layer) in spec.layers.iter().enumerate() {
            let path = format!("{prefix}{}.{index}", paths.layers);
            let named = |name: &str| format!("{path}.{name}");
            let attention_paths = (paths.attention_input, paths.attention_output);
            let normed = !(before && index == 0);
            let mut layer = Layer {
                attention: Bidirectional::load(weights, &path, attention_paths, hidden, &layer.attention)?,
                attention_norm: normed.then(|| norm(weights, named(paths.attention_norm))).transpose()?,
                mlp: Mlp::load(weights, &named(paths.mlp_input), &named(paths.mlp_output), hidden, &layer.mlp)?,
                mlp_norm: norm(weights, named(paths.mlp_norm))?,
            };
            // A batch of texts has many rows.
            layer.attention.lay_out()?;
            layer.mlp.lay_out()?;
            layers.push(layer);
        }
        let final_norm = before.then(|| norm(weights, format!("{prefix}{}", paths.final_norm))).transpose()?;
        Ok(Self { words, positions, token_types, embedding_norm, layers, norm_place: spec.norm_place, final_norm })
    }

    /// Hidden states `[T, hidden]` of all tokens.
    pub fn forward(&self, texts: &PackedTexts) -> Result<Array> {
        let mut x = self.words.forward(&texts.tokens)?;
        if let Some((table, first)) = &self.positions {
            let rows = texts.positions.add(Array::from_int(*first as i32))?.as_dtype(Dtype::Uint32)?;
            x = x.add(table.forward(&rows)?)?;
        }
        if let Some(table) = &self.token_types {
            x = x.add(table.forward(&texts.token_types)?)?;
        }
        x = self.embedding_norm.forward(&x)?;
        for layer in &self.layers {
            x = match self.norm_place {
                NormPlace::After => layer.forward_after(&x, texts)?,
                NormPlace::Before => layer.forward_before(&x, texts)?,
            };
        }
        match &self.final_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

impl Layer {
    fn attention_norm(&self, x: Array) -> Result<Array> {
        match &self.attention_norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    fn forward_after(&self, x: &Array, texts: &PackedTexts) -> Result<Array> {
        let x = self.attention_norm(self.attention.forward_onto(x, x, texts)?)?;
        self.mlp_norm.forward(&self.mlp.forward(&x, None, Some(&x))?)
    }

    fn forward_before(&self, x: &Array, texts: &PackedTexts) -> Result<Array> {
        let x = self.attention.forward_onto(&self.attention_norm(x.clone())?, x, texts)?;
        self.mlp.forward(&self.mlp_norm.forward(&x)?, None, Some(&x))
    }
}
