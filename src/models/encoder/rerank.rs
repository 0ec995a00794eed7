//! Cross-encoders: pairs of texts to scores.

use std::path::Path;

use serde_json::Value;

use super::pipeline::optional;
use super::{
    AnswerTokens, Encoder, EncoderShape, Head, HeadKind, Loaded, is_causal, is_classifier, load, pack, rows_in_order,
};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::text::{PairFormat, TextTokens};
use crate::weights::Weights;

/// A loaded cross-encoder. Owned by one thread, as all MLX arrays are.
pub struct RerankModel {
    encoder: Box<dyn Encoder>,
    head: Head,
    labels: usize,
    sigmoid: bool,
    weight_bytes: usize,
}

impl RerankModel {
    /// The model in `folder`, from `weights`. A language model without a head for it is asked for its answer: yes or no.
    pub fn load(folder: &Path, config: &ModelConfig, weights: Weights) -> Result<Self> {
        let kind = head_kind(folder, config)?;
        let labels = match kind {
            HeadKind::Labels(labels) => labels,
            HeadKind::Answers(_) => 1,
        };
        let sigmoid = sigmoid(folder, config)?.unwrap_or(labels == 1);
        let Loaded { encoder, head, weight_bytes } = load(config, Some(kind), weights)?;
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

fn head_kind(folder: &Path, config: &ModelConfig) -> Result<HeadKind> {
    if !is_causal(config) || is_classifier(config) {
        return Ok(HeadKind::Labels(labels(config)));
    }
    if PairFormat::load(folder)?.is_none() {
        let kind = config.model_type();
        return Err(Error::unsupported(format!(
            "how a language model of type {kind:?} is asked for relevance is not known"
        )));
    }
    Ok(HeadKind::Answers(AnswerTokens::load(folder)?))
}

/// The number of labels as transformers finds it, with its default of two.
fn labels(config: &ModelConfig) -> usize {
    let named = config.raw().get("id2label").and_then(Value::as_object).map(|names| names.len());
    named.or_else(|| config.integer("num_labels")).filter(|&n| n > 0).unwrap_or(2)
}

/// Whether scores pass a sigmoid, where the files say so: in the spellings of sentence-transformers 5, 4, and before.
fn sigmoid(folder: &Path, config: &ModelConfig) -> Result<Option<bool>> {
    let raw = config.raw();
    let newest = optional(&folder.join("config_sentence_transformers.json"))?;
    let newest = newest.as_ref().and_then(|own| own.get("activation_fn"));
    let new = raw.get("sentence_transformers").and_then(|own| own.get("activation_fn"));
    let name = newest.or(new).or_else(|| raw.get("sbert_ce_default_activation_function"));
    let Some(name) = name.and_then(Value::as_str) else { return Ok(None) };
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
        let folder = tempfile::tempdir().unwrap();
        let sigmoid = |config: &ModelConfig| sigmoid(folder.path(), config);
        let new = |name: &str| config(json!({"sentence_transformers": {"activation_fn": name}}));
        assert_eq!(sigmoid(&new("torch.nn.modules.linear.Identity")).unwrap(), Some(false));
        assert_eq!(sigmoid(&new("torch.nn.modules.activation.Sigmoid")).unwrap(), Some(true));
        let old = config(json!({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}));
        assert_eq!(sigmoid(&old).unwrap(), Some(false));
        assert_eq!(sigmoid(&config(json!({}))).unwrap(), None);
        assert!(sigmoid(&new("torch.nn.Softplus")).is_err());
        let newest = json!({"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"});
        std::fs::write(folder.path().join("config_sentence_transformers.json"), newest.to_string()).unwrap();
        assert_eq!(sigmoid(&new("torch.nn.modules.activation.Sigmoid")).unwrap(), Some(false));
    }
}
