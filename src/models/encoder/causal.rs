//! Decoders as encoders: hidden states of whole texts, each token's of the text up to it (Zhang et al. 2025, "Qwen3 Embedding").

use mlx_rs::{Array, Dtype};
use serde_json::Value;

use super::{AnswerTokens, BatchPlan, Encoder, EncoderShape, Pooling};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::mlx;
use crate::models::{self, Scope};
use crate::nn::{Decoder, DecoderSpec, Embedding, OutputHead, PackedTexts, WholeTexts};
use crate::weights::Weights;

/// Rows that pass a layer together: enough for the kernels' best pace, few enough that long texts take little memory.
pub(super) const PASS_ROWS: usize = 2048;

/// What batches take besides the weights; from experience, on the safe side.
pub(super) fn batch_plan(config: &ModelConfig, max_tokens: usize) -> Result<BatchPlan> {
    let plan = models::plan(config)?;
    let spec = declare(config, max_tokens)?;
    // Hidden states before and behind a layer, and the pools that all layers share.
    let kept = 3 * spec.hidden + plan.token_numbers() / spec.layers.len().max(1);
    let fixed = (64 << 20) + 4 * PASS_ROWS.min(max_tokens) * plan.row_numbers;
    let inner = spec.layers.iter().map(|layer| layer.feed_forward.inner()).max().unwrap_or(0);
    Ok(BatchPlan { fixed, per_token: 8 * kept, widest: 8 * inner, max_tokens })
}

/// What `config` describes, without its output head.
fn declare(config: &ModelConfig, context: usize) -> Result<DecoderSpec> {
    models::declare(config, &Scope { head: false, ..Scope::whole(config, context) })
}

/// A decoder without its output head.
pub(super) struct CausalEncoder {
    model: Decoder,
    whole: WholeTexts,
    shape: EncoderShape,
}

impl CausalEncoder {
    /// Takes the tensors of the decoder that `config` names.
    pub fn load(config: &ModelConfig, weights: &mut Weights) -> Result<Self> {
        let flag = |key: &str| config.raw().get(key).and_then(Value::as_bool);
        if flag("is_causal") == Some(false) || flag("use_bidirectional_attention") == Some(true) {
            return Err(Error::unsupported("decoders whose tokens see those behind them are not supported"));
        }
        let context = models::context_length(config, None)?;
        let whole = WholeTexts::new(weights, PASS_ROWS);
        let spec = declare(config, context)?;
        if spec.state_bytes() > 0 {
            return Err(Error::unsupported("decoders with states are not supported as encoders"));
        }
        if spec.crosses_layers() || spec.per_layer_input.is_some() {
            // Here layers of one shape share a pool, and a row of the table alone is taken for one of the head.
            return Err(Error::unsupported(
                "decoders that share keys between layers or have inputs of layers are not supported as encoders",
            ));
        }
        let model = Decoder::load(weights, &spec)?;
        let shape = EncoderShape { hidden: spec.hidden, vocab: spec.vocab, token_types: 0, max_tokens: context };
        Ok(Self { model, whole, shape })
    }

    /// The rows of the output head that belong to `ids [n]`: `[n, hidden]`. Nothing else of a head of its own is kept.
    fn head_rows(&self, config: &ModelConfig, ids: &Array, weights: &mut Weights) -> Result<Array> {
        let EncoderShape { hidden, vocab, .. } = self.shape;
        let head = models::declare(config, &Scope::whole(config, 1))?.head;
        if head.decided(weights) == OutputHead::Tied {
            return self.model.embed(ids);
        }
        Embedding::load(weights, "lm_head", vocab, hidden)?.forward(ids)
    }
}

impl Encoder for CausalEncoder {
    fn shape(&self) -> &EncoderShape {
        &self.shape
    }

    fn forward(&self, texts: &PackedTexts) -> Result<Array> {
        let x = self.model.embed(&texts.tokens)?;
        let layout = self.model.kv_layout();
        let hidden = self.whole.forward(texts, layout, x, |x, layers, step| self.model.pass(x, layers, step))?;
        self.model.final_norm(&hidden)
    }
}

/// What makes logits of a text's last hidden state.
#[derive(Debug)]
pub struct LastTokenHead {
    /// `[hidden, labels]`, f32.
    weight: Array,
}

impl LastTokenHead {
    /// `hidden [T, width]` to logits `[texts, labels]`, f32, texts in the order of their rows.
    pub fn forward(&self, hidden: &Array, texts: &PackedTexts) -> Result<Array> {
        Ok(Pooling::LastToken.forward(hidden, texts)?.matmul(&self.weight)?)
    }

    /// Takes the head of `*ForSequenceClassification`: `score.weight [labels, hidden]`.
    pub(super) fn classification(hidden: usize, labels: usize, weights: &mut Weights) -> Result<Self> {
        let all: Vec<u32> = (0..labels as u32).collect();
        Self::of_rows(&Embedding::load(weights, "score", labels, hidden)?.forward(&ids(&all))?)
    }

    /// How much likelier one answer is than the other, from the logits of a language model: log-odds, so that their sigmoid is
    /// the softmax over the two. The logit itself where there is one answer only.
    pub(super) fn answers(
        encoder: &CausalEncoder,
        config: &ModelConfig,
        answers: AnswerTokens,
        weights: &mut Weights,
    ) -> Result<Self> {
        let AnswerTokens { yes, no } = answers;
        let wanted: Vec<u32> = std::iter::once(yes).chain(no).collect();
        if wanted.iter().any(|&id| id as usize >= encoder.shape.vocab) {
            return Err(Error::invalid_model("an answer of the reranker is no token of the model"));
        }
        let rows = encoder.head_rows(config, &ids(&wanted), weights)?.as_dtype(Dtype::Float32)?;
        let row = |at: usize| mlx::rows(&rows, at, at + 1);
        Self::of_rows(&if no.is_some() { row(0)?.subtract(row(1)?)? } else { row(0)? })
    }

    fn of_rows(rows: &Array) -> Result<Self> {
        let weight = rows.as_dtype(Dtype::Float32)?.transpose()?.contiguous()?;
        // So that the matrix it was taken from can go.
        weight.eval()?;
        Ok(Self { weight })
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> usize {
        self.weight.nbytes()
    }
}

fn ids(values: &[u32]) -> Array {
    Array::from_slice(values, &[values.len() as i32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Backend, Cpu, Precision};
    use crate::mlx::Device;

    #[test]
    fn rows_that_take_turns_are_what_they_are_together() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/qwen3-embedding");
        let config = ModelConfig::load(&folder).unwrap();
        let texts: Vec<Vec<u32>> = [1, 40, 9, 1, 70, 33]
            .iter()
            .map(|&length| (0..length).map(|at| (at * at + length) % 256).collect())
            .collect();
        let zeros = vec![0; 70];
        let parts: Vec<_> = texts.iter().map(|ids| (&ids[..], &zeros[..ids.len()])).collect();
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            for backend in [Backend::Mlx, Backend::Cpu(Cpu::new(Some(2), Precision::Exact))] {
                let hidden = |most: usize| -> Result<Vec<f32>> {
                    let mut weights = Weights::open(&folder, &config, None)?.computed_by(backend.clone());
                    let mut encoder = CausalEncoder::load(&config, &mut weights)?;
                    encoder.whole = WholeTexts::new(&weights, most);
                    let hidden = encoder.forward(&PackedTexts::new(&parts))?.contiguous()?;
                    Ok(hidden.as_slice::<f32>().to_vec())
                };
                let together = hidden(PASS_ROWS)?;
                for most in [5, 32, 64] {
                    let worst = hidden(most)?.iter().zip(&together).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-5, "{backend:?} with {most} rows: {worst}");
                }
            }
            Ok(())
        });
        outcome.unwrap();
    }
}
