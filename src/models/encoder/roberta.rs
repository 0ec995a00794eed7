//! RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): BERT with other positions and another head.

use super::bert::BertConfig;
use super::{ClassificationHead, Encoder, Pooling};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::{Activation, Linear};
use crate::weights::Weights;

/// What transformers assumes where a config has no `pad_token_id`.
const PAD: usize = 1;

/// Positions begin after the padding token's id.
pub(super) fn first_position(config: &ModelConfig) -> usize {
    config.integer("pad_token_id").unwrap_or(PAD).saturating_add(1)
}

pub(super) fn encoder(config: &ModelConfig, prefix: &'static str, weights: &mut Weights) -> Result<Box<dyn Encoder>> {
    config.parse::<BertConfig>()?.load(prefix, first_position(config), weights)
}

/// `RobertaForSequenceClassification` and `XLMRobertaForSequenceClassification`.
pub(super) fn head(
    config: &ModelConfig,
    _prefix: &'static str,
    labels: usize,
    weights: &mut Weights,
) -> Result<ClassificationHead> {
    let hidden = config.parse::<BertConfig>()?.hidden_size;
    Ok(ClassificationHead {
        pooling: Pooling::Cls,
        dense: Linear::load(weights, "classifier.dense", hidden, hidden, true)?,
        activation: Activation::Tanh,
        norm: None,
        classifier: Linear::load(weights, "classifier.out_proj", hidden, labels, true)?,
    })
}
