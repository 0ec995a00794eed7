//! Embedding models: texts to vectors.

use std::path::Path;

use mlx_rs::ops::concatenate;

use super::pooling::normalize;
use super::{Encoder, EncoderShape, Loaded, Pipeline, Pooling, is_causal, load, pack, rows_in_order};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::mlx;
use crate::text::TextTokens;
use crate::weights::Weights;

/// A loaded embedding model. Owned by one thread, as all MLX arrays are.
pub struct EmbeddingModel {
    encoder: Box<dyn Encoder>,
    pipeline: Pipeline,
    weight_bytes: usize,
}

/// What a request may change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EmbeddingOptions {
    /// The first dimensions only (Kusupati et al. 2022, "Matryoshka"); normalised again if vectors are.
    pub dimensions: Option<usize>,
    /// Whether vectors have length 1; otherwise as the model declares.
    pub normalize: Option<bool>,
}

impl EmbeddingModel {
    /// The model in `folder`: its encoder from `weights`, what follows from the files of sentence-transformers.
    pub fn load(folder: &Path, config: &ModelConfig, weights: Weights) -> Result<Self> {
        let pooling = if is_causal(config) { Pooling::LastToken } else { Pooling::Mean };
        let pipeline = Pipeline::load(folder, Pipeline { poolings: vec![pooling], normalize: false })?;
        let Loaded { encoder, weight_bytes, .. } = load(config, None, weights)?;
        Ok(Self { encoder, pipeline, weight_bytes })
    }

    /// The encoder by itself.
    pub fn encoder(&self) -> &dyn Encoder {
        &*self.encoder
    }

    /// What its encoder takes and gives.
    pub fn shape(&self) -> &EncoderShape {
        self.encoder.shape()
    }

    /// Length of its vectors.
    pub fn dimensions(&self) -> usize {
        self.encoder.shape().hidden * self.pipeline.poolings.len()
    }

    /// What follows the encoder.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Bytes of its tensors on the device.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// The vector of each text, all computed as one batch: whoever calls it bounds the tokens, and with them the memory.
    ///
    /// `ContextLength` if a text is too long, `InvalidRequest` if one is empty or has tokens that the model does not.
    pub fn encode(&self, texts: &[TextTokens]) -> Result<Vec<Vec<f32>>> {
        self.encode_with(texts, EmbeddingOptions::default())
    }

    /// [`encode`](Self::encode) with options; `InvalidRequest` if there are not as many dimensions.
    pub fn encode_with(&self, texts: &[TextTokens], options: EmbeddingOptions) -> Result<Vec<Vec<f32>>> {
        let dimensions = options.dimensions.unwrap_or(self.dimensions());
        if dimensions == 0 || dimensions > self.dimensions() {
            let most = self.dimensions();
            return Err(Error::invalid_request(format!("\"dimensions\" must be between 1 and {most}")));
        }
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let packed = pack(texts, self.encoder.shape())?;
        let hidden = self.encoder.forward(&packed)?;
        let pooled = self.pipeline.poolings.iter().map(|pooling| pooling.forward(&hidden, &packed));
        let mut vectors = concatenate(&pooled.collect::<Result<Vec<_>>>()?, 1)?;
        if dimensions < self.dimensions() {
            vectors = mlx::columns(&vectors, 0, dimensions)?;
        }
        if options.normalize.unwrap_or(self.pipeline.normalize) {
            vectors = normalize(&vectors)?;
        }
        rows_in_order(&vectors, &packed)
    }
}
