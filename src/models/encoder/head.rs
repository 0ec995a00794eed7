//! Heads of cross-encoders.

use mlx_rs::{Array, Dtype};

use super::{LastTokenHead, Pooling};
use crate::error::Result;
use crate::nn::{Activation, LayerNorm, Linear, PackedTexts};

/// What makes logits of hidden states.
#[derive(Debug)]
pub enum Head {
    /// Of an encoder.
    Classification(Box<ClassificationHead>),
    /// Of a decoder.
    LastToken(LastTokenHead),
}

impl Head {
    /// `hidden [T, width]` to logits `[texts, labels]`, f32, texts in the order of their rows.
    pub fn forward(&self, hidden: &Array, texts: &PackedTexts) -> Result<Array> {
        match self {
            Self::Classification(head) => head.forward(hidden, texts),
            Self::LastToken(head) => head.forward(hidden, texts),
        }
    }
}

/// `classifier(norm(activation(dense(pooled))))`, the norm if there is one.
#[derive(Debug)]
pub struct ClassificationHead {
    /// Which hidden states it takes.
    pub pooling: Pooling,
    /// `[hidden, hidden]`.
    pub dense: Linear,
    /// After it.
    pub activation: Activation,
    /// After that.
    pub norm: Option<LayerNorm>,
    /// `[labels, hidden]`.
    pub classifier: Linear,
}

impl ClassificationHead {
    /// `hidden [T, width]` to logits `[texts, labels]`, f32, texts in the order of their rows.
    pub fn forward(&self, hidden: &Array, texts: &PackedTexts) -> Result<Array> {
        let dtype = hidden.dtype();
        let pooled = self.pooling.forward(hidden, texts)?.as_dtype(dtype)?;
        let mut x = self.activation.forward(&self.dense.forward(&pooled)?)?;
        if let Some(norm) = &self.norm {
            x = norm.forward(&x)?;
        }
        Ok(self.classifier.forward(&x)?.as_dtype(Dtype::Float32)?)
    }
}
