//! Seed-OSS (`SeedOssForCausalLM`): Llama with biases where its config says.

use serde_json::{Value, json};

use super::Scope;
use super::dense::DenseConfig;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::nn::DecoderSpec;

pub(super) fn declare(config: &ModelConfig, scope: &Scope) -> Result<DecoderSpec> {
    let dense: DenseConfig = config.parse_over(json!({ "tie_word_embeddings": true }))?;
    let bias = config.field("attention_out_bias").and_then(Value::as_bool).unwrap_or(false);
    let mut spec = dense.decoder(scope, |_| None)?;
    spec.attentions().for_each(|attention| attention.output_bias = bias);
    Ok(spec)
}
