//! Cross-encoders: pairs of texts to scores.

use std::path::Path;

use serde_json::Value;

use super::{ClassificationHead, Encoder, EncoderShape, load, pack, rows_in_order};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::text::TextTokens;
use crate::weights::Weights;

/// A loaded cross-encoder. Owned by one thread, as all MLX arrays are.
pub struct RerankModel {
    encoder: Box<dyn Encoder>,
    head: ClassificationHead,
    labels: usize,
    sigmoid: bool,
    weight_bytes: usize,
}

impl RerankModel {
    /// The model that `config` declares, from `weights`.
    pub fn load(_folder: &Path, config: &ModelConfig, weights: Weights) -> Result<Self> {
        let labels = labels(config);
        let sigmoid = sigmoid(config)?.unwrap_or(labels == 1);
        let (encoder, head, weight_bytes) = load(config, Some(labels), weights)?;
        let head = head.ok_or_else(|| Error::internal("a cross-encoder was loaded without its head"))?;
        Ok(Self { encoder, head, labels, sigmoid, weight_bytes })
    }

    /// What its encoder takes and gives.
    pub fn shape(&self) -> &EncoderShape {
        self.encoder.shape()
    }

    /// Logits per text.
    pub fn labels(&self) -> usize {
        self.labels
    }

    /// Bytes of its tensors on the device.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    /// What the head gives for each text, all computed as one batch: whoever calls it bounds the tokens.
    ///
    /// `ContextLength` if a text is too long, `InvalidRequest` if one is empty or has tokens that the model does not.
    pub fn logits(&self, texts: &[TextTokens]) -> Result<Vec<Vec<f32>>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let packed = pack(texts, self.encoder.shape())?;
        let hidden = self.encoder.forward(&packed)?;
        rows_in_order(&self.head.forward(&hidden, &packed)?, &packed)
    }

    /// Scores as the `CrossEncoder` of sentence-transformers gives them: the logit's sigmoid, unless the config declares
    /// another activation. Errors as [`logits`](Self::logits), and `Unsupported` if the model has several labels.
    pub fn score(&self, texts: &[TextTokens]) -> Result<Vec<f32>> {
        if self.labels != 1 {
            return Err(Error::unsupported(format!("a model with {} labels does not give one score", self.labels)));
        }
        let logits = self.logits(texts)?.into_iter().flatten();
        Ok(logits.map(|logit| if self.sigmoid { 1.0 / (1.0 + (-logit).exp()) } else { logit }).collect())
    }
}

/// The number of labels as transformers finds it, with its default of two.
fn labels(config: &ModelConfig) -> usize {
    let named = config.raw().get("id2label").and_then(Value::as_object).map(|names| names.len());
    named.or_else(|| config.integer("num_labels")).filter(|&n| n > 0).unwrap_or(2)
}

/// Whether scores pass a sigmoid, where the config says so: in the spellings of sentence-transformers 4 and before.
fn sigmoid(config: &ModelConfig) -> Result<Option<bool>> {
    let raw = config.raw();
    let new = raw.get("sentence_transformers").and_then(|own| own.get("activation_fn"));
    let Some(name) = new.or_else(|| raw.get("sbert_ce_default_activation_function")).and_then(Value::as_str) else {
        return Ok(None);
    };
    match name.rsplit('.').next() {
        Some("Sigmoid") => Ok(Some(true)),
        Some("Identity") => Ok(Some(false)),
        _ => Err(Error::unsupported(format!("the activation {name:?} of a cross-encoder is not supported"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_config_decides_about_labels_and_sigmoid() {
        let config = |mut value: Value| {
            value["model_type"] = json!("bert");
            ModelConfig::from_value(value).unwrap()
        };
        assert_eq!(labels(&config(json!({"id2label": {"0": "LABEL_0"}}))), 1);
        assert_eq!(labels(&config(json!({"num_labels": 3}))), 3);
        assert_eq!(labels(&config(json!({}))), 2);
        let new = |name: &str| config(json!({"sentence_transformers": {"activation_fn": name}}));
        assert_eq!(sigmoid(&new("torch.nn.modules.linear.Identity")).unwrap(), Some(false));
        assert_eq!(sigmoid(&new("torch.nn.modules.activation.Sigmoid")).unwrap(), Some(true));
        let old = config(json!({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}));
        assert_eq!(sigmoid(&old).unwrap(), Some(false));
        assert_eq!(sigmoid(&config(json!({}))).unwrap(), None);
        assert!(sigmoid(&new("torch.nn.Softplus")).is_err());
    }
}
