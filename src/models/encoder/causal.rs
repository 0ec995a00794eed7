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
            // Here layers of one shape share a pool, and batches are planned without what travels beside hidden states.
            return Err(Error::unsupported(
                "decoders that share keys between layers or have inputs of layers are not supported as encoders",
            ));
        }
        let model = Decoder::load(weights, &spec)?;
        let shape = EncoderShape { hidden: spec.hidden, vocab: spec.vocab, token_types: 0, max_tokens: context };
        Ok(Self { model, whole, shape })
    }

    /// The rows of the output head that belong to `ids [n]`, times the factor of logits: `[n, hidden]`, f32. Nothing else of a head
    /// of its own is kept.
    fn head_rows(&self, config: &ModelConfig, ids: &Array, weights: &mut Weights) -> Result<Array> {
        let EncoderShape { hidden, vocab, .. } = self.shape;
        let DecoderSpec { head, logit_scale, logit_cap, .. } = models::declare(config, &Scope::whole(config, 1))?;
        if logit_cap.is_some() {
            // The difference of two capped logits is no product with one vector.
            return Err(Error::unsupported("rerankers that answer with capped logits are not supported"));
        }
        let rows = match head.decided(weights) {
            OutputHead::Tied => self.model.table_rows(ids)?,
            _ => Embedding::load(weights, "lm_head", vocab, hidden)?.forward(ids)?,
        };
        Ok(rows.as_dtype(Dtype::Float32)?.multiply(Array::from_f32(logit_scale))?)
    }
}

impl Encoder for CausalEncoder {
    fn shape(&self) -> &EncoderShape {
        &self.shape
    }

    fn forward(&self, texts: &PackedTexts) -> Result<Array> {
        let x = self.model.embed(&texts.tokens)?;
        let layers = (self.model.kv_layout(), self.model.depth());
        let hidden = self.whole.forward(texts, layers, x, |x, layers, step| self.model.pass(x, layers, step))?;
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
        let rows = encoder.head_rows(config, &ids(&wanted), weights)?;
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
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use safetensors::SafeTensors;
    use serde_json::json;

    use super::*;
    use crate::cache::Pages;
    use crate::config::read_json;
    use crate::error::Status;
    use crate::kernels::{Backend, Cpu, Placement, Precision, Segment};
    use crate::mlx::Device;
    use crate::nn::Step;

    fn decoder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
    }

    fn backends() -> [Backend; 2] {
        [Backend::Mlx, Backend::Cpu(Cpu::new(Some(2), Precision::Exact))]
    }

    fn host(array: &Array) -> Vec<f32> {
        array.contiguous().unwrap().as_slice::<f32>().to_vec()
    }

    fn alone(text: &[u32]) -> PackedTexts {
        let zeros = vec![0; text.len()];
        PackedTexts::new(&[(text, &zeros)])
    }

    /// Prompt and logits of its last token, as mlx-lm has them.
    fn reference(folder: &Path) -> (Vec<u32>, Vec<f32>) {
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> {
            file.tensor(name).unwrap().data().chunks_exact(4).map(|word| word.try_into().unwrap()).collect()
        };
        let prompt: Vec<u32> = words("prompt").into_iter().map(u32::from_le_bytes).collect();
        let logits: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
        let last = logits[logits.len() / prompt.len() * (prompt.len() - 1)..].to_vec();
        (prompt, last)
    }

    /// What the reranker in `folder` gives for `prompt`.
    fn answer(folder: &Path, prompt: &[u32], answers: AnswerTokens, backend: &Backend) -> Result<Array> {
        let config = ModelConfig::load(folder)?;
        let mut weights = Weights::open(folder, &config, Some(Dtype::Float32))?.computed_by(backend.clone());
        let encoder = CausalEncoder::load(&config, &mut weights)?;
        let head = LastTokenHead::answers(&encoder, &config, answers, &mut weights)?;
        let packed = alone(prompt);
        head.forward(&encoder.forward(&packed)?, &packed)
    }

    /// Embeddings are multiplied in Granite and Gemma 3, logits in Granite and Command; Llama has a head of its own.
    #[test]
    fn answers_are_differences_of_the_language_models_logits() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            for backend in backends() {
                for name in ["granite-f32", "gemma3_text-f32", "cohere2-f32", "qwen3-f32", "llama-f32"] {
                    let (prompt, logits) = reference(&decoder(name));
                    let largest = logits.iter().fold(0.0, |largest: f32, logit| largest.max(logit.abs()));
                    for (no, expected) in [(Some(31), logits[7] - logits[31]), (None, logits[7])] {
                        let given = answer(&decoder(name), &prompt, AnswerTokens { yes: 7, no }, &backend)?;
                        let error = (host(&given)[0] - expected).abs() / largest;
                        assert!(error < 1e-4, "{name} by {backend:?} against {no:?}: {error}");
                    }
                }
                let answers = AnswerTokens { yes: 7, no: Some(31) };
                let capped = answer(&decoder("gemma2-f32"), &[1, 2, 3], answers, &backend).unwrap_err();
                assert!(capped.status() == Status::Unsupported && capped.message().contains("capped"), "{capped}");
            }
            Ok(())
        });
        outcome.unwrap();
    }

    /// `[T, hidden]` of one text, in one step as a language model takes it.
    fn in_a_step(model: &Decoder, text: &[u32]) -> Result<Array> {
        let mut pages = Pages::new(Backend::Mlx, model.kv_layout(), 32)?;
        pages.resize(&vec![1; pages.capacities().len()]);
        pages.resize_all()?;
        let places: Vec<i32> = (0..text.len() as i32).collect();
        let positions = mlx::indices(&places)?;
        let segments = vec![Segment { rows: 0..text.len(), start: 0, table: 0 }];
        let slots = places.iter().map(|&at| 32 + at as u32).collect();
        let placement = Arc::new(Placement { tables: vec![1], slots, segments, ..Placement::default() });
        let placements = vec![placement; pages.capacities().len()];
        let mut step = Step::new(&positions, &mut pages, &placements);
        model.final_norm(&model.pass(model.embed(&ids(text))?, 0..model.depth(), &mut step)?)
    }

    #[test]
    fn layers_without_rows_are_passed_too() {
        let mut config = read_json(&decoder("nemotron_h-f32").join("config.json")).unwrap();
        let changes = json!({ "hybrid_override_pattern": "-*E*-", "num_hidden_layers": 5 });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let config = ModelConfig::from_value(config).unwrap();
        let text: Vec<u32> = (0..20).map(|at| (at * at) % 48).collect();
        let packed = alone(&text);
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let mut weights = Weights::random(&config, Some(Dtype::Float32));
            let mut encoder = CausalEncoder::load(&config, &mut weights)?;
            assert_eq!((encoder.model.depth(), encoder.model.kv_layout().layers.len()), (5, 2));
            let expected = host(&in_a_step(&encoder.model, &text)?);
            for most in [PASS_ROWS, 5] {
                encoder.whole = WholeTexts::new(&weights, most);
                let found = host(&encoder.forward(&packed)?);
                let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(found.len() == expected.len() && worst < 1e-5, "{most} rows: {worst}");
            }
            Ok(())
        });
        outcome.unwrap();
    }

    #[test]
    fn rows_that_take_turns_are_what_they_are_together() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/qwen3-embedding");
        let config = ModelConfig::load(&folder).unwrap();
        let texts: Vec<Vec<u32>> = [1, 40, 9, 1, 70, 33]
            .iter()
            .map(|&length| (0..length).map(|at| (at * at + length) % 256).collect())
            .collect();
        let zeros = vec![0; 70];
        let parts: Vec<_> = texts.iter().map(|ids| (&ids[..], &zeros[..ids.len()])).collect();
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            for backend in backends() {
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
