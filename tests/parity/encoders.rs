//! Encoders against transformers, in f32: tokens, hidden states, vectors and scores, by MLX's operations and by the CPU kernels;
//! each text by itself, and in batches of texts of all lengths.

use std::path::{Path, PathBuf};

use mlx_rs::Dtype;
use serde_json::{Value, json};

use omlx::config::{ModelConfig, read_json};
use omlx::error::{Result, Status};
use omlx::kernels::Backend;
use omlx::models::ModelKind;
use omlx::models::encoder::{self, EmbeddingModel, EmbeddingOptions, RerankModel};
use omlx::nn::PackedTexts;
use omlx::text::{TextInput, TextLimits, TextTokens, Tokenizer};
use omlx::weights::Weights;

use super::models::{Expected, backends, host, normalised_error, on_cpu};

/// Largest error over the largest reference value.
const TOLERANCE: f32 = 1e-5;

/// The same for a text in a batch against the text alone: sums in another order.
const BATCH_TOLERANCE: f32 = 2e-6;

pub(super) enum Loaded {
    Embedding(EmbeddingModel),
    Reranker(Box<RerankModel>),
}

impl Loaded {
    pub fn open(folder: &Path, config: &ModelConfig, backend: &Backend) -> Result<Self> {
        let weights = Weights::open(folder, config, Some(Dtype::Float32))?.computed_by(backend.clone());
        // What its own files do not say: some rerankers are saved as plain language models.
        let reranker = folder.file_name().is_some_and(|name| name == "qwen3-rerank-causal");
        Ok(match if reranker { ModelKind::Reranker } else { ModelKind::detect(folder, config) } {
            ModelKind::Embedding => Self::Embedding(EmbeddingModel::load(folder, config, weights)?),
            ModelKind::Reranker => Self::Reranker(Box::new(RerankModel::load(folder, config, weights)?)),
            kind => panic!("{} is taken for {kind:?}", folder.display()),
        })
    }

    fn max_tokens(&self) -> usize {
        match self {
            Self::Embedding(model) => model.shape().max_tokens,
            Self::Reranker(model) => model.shape().max_tokens,
        }
    }

    pub fn weight_bytes(&self) -> usize {
        match self {
            Self::Embedding(model) => model.weight_bytes(),
            Self::Reranker(model) => model.weight_bytes(),
        }
    }

    /// A vector or logits for each text.
    pub fn rows(&self, texts: &[TextTokens]) -> Vec<Vec<f32>> {
        match self {
            Self::Embedding(model) => model.encode(texts).unwrap(),
            Self::Reranker(model) => model.logits(texts).unwrap(),
        }
    }
}

pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders")
}

fn fixtures() -> Vec<PathBuf> {
    let mut folders: Vec<_> = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// The tokens of the fixture's inputs.
pub(super) fn tokens(folder: &Path, max_tokens: usize) -> Vec<TextTokens> {
    let tokenizer = Tokenizer::load(folder).unwrap().unwrap();
    let limits = TextLimits::load(folder, max_tokens).unwrap();
    let inputs = read_json(&folder.join("inputs.json")).unwrap();
    let encode = |input: &Value| {
        let input = match input {
            Value::String(text) => TextInput::One(text),
            pair => TextInput::Pair {
                instruction: pair.get(2).and_then(Value::as_str),
                query: pair[0].as_str().unwrap(),
                document: pair[1].as_str().unwrap(),
            },
        };
        limits.encode(&tokenizer, input).unwrap()
    };
    inputs.as_array().unwrap().iter().map(encode).collect()
}

/// Everything that the fixture in `folder` holds; returns the largest errors against the reference, and of the batch
/// against single texts.
fn check(folder: &Path, backend: &Backend) -> (f32, f32) {
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let expected = Expected::load(folder);
    let config = ModelConfig::load(folder).unwrap();
    let model = Loaded::open(folder, &config, backend).unwrap_or_else(|e| panic!("{name}: {e}"));
    let texts = tokens(folder, model.max_tokens());
    let mut worst = 0.0_f32;
    let mut compare = |what: &str, actual: &[f32], expected: &[f32]| {
        let error = normalised_error(actual, expected);
        assert!(error <= TOLERANCE, "{name}: {what} differ by {error}");
        worst = worst.max(error);
    };
    for (n, text) in texts.iter().enumerate() {
        assert_eq!(text.ids, expected.ints[&format!("ids.{n}")], "{name}: token ids of input {n}");
        assert_eq!(text.types, expected.ints[&format!("types.{n}")], "{name}: token types of input {n}");
    }
    assert!(texts.iter().any(|text| text.truncated) && !texts[0].truncated, "{name}: some inputs are too long");
    assert!(!expected.ints.contains_key(&format!("ids.{}", texts.len())), "{name}: an input is missing");

    if let Loaded::Embedding(model) = &model {
        let parts: Vec<_> = texts.iter().map(|text| (&text.ids[..], &text.types[..])).collect();
        let packed = PackedTexts::new(&parts);
        let hidden = host(&model.encoder().forward(&packed).unwrap());
        let width = model.shape().hidden;
        for (rows, text) in packed.segments().iter().zip(packed.order()) {
            let own = &hidden[rows.start * width..rows.end * width];
            compare(&format!("hidden states of input {text}"), own, &expected.floats[&format!("hidden.{text}")]);
        }
    }
    let key = match &model {
        Loaded::Embedding(_) => "embeddings",
        Loaded::Reranker(_) => "logits",
    };
    let batch = model.rows(&texts);
    compare(key, &batch.concat(), &expected.floats[key]);
    match &model {
        Loaded::Reranker(model) if model.labels() == 1 => {
            compare("scores", &model.score(&texts).unwrap(), &expected.floats["scores"]);
        }
        Loaded::Reranker(model) => assert_eq!(model.score(&texts).unwrap_err().status(), Status::Unsupported),
        Loaded::Embedding(_) => {}
    }
    let alone: Vec<f32> = texts.iter().flat_map(|text| model.rows(std::slice::from_ref(text)).remove(0)).collect();
    let apart = normalised_error(&batch.concat(), &alone);
    assert!(apart <= BATCH_TOLERANCE, "{name}: a batch differs from single texts by {apart}");
    (worst, apart)
}

#[test]
fn every_encoder_matches_its_reference() {
    let folders = fixtures();
    for architecture in encoder::supported_types() {
        assert!(folders.iter().any(|f| f.ends_with(architecture)), "there is no fixture {architecture}");
    }
    on_cpu(|| {
        for backend in backends() {
            let computed_by = if matches!(backend, Backend::Mlx) { "MLX" } else { "CPU" };
            for folder in &folders {
                let (worst, apart) = check(folder, &backend);
                let name = folder.file_name().unwrap().to_string_lossy();
                println!("{computed_by} {name}: {worst:.1e}, batch and single {apart:.1e}");
            }
        }
    });
}

/// What the fixture `name` gives when its config has `changes`.
fn changed(name: &str, changes: Value) -> Vec<f32> {
    let folder = root().join(name);
    let mut config = read_json(&folder.join("config.json")).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let config = ModelConfig::from_value(config).unwrap();
    let model = Loaded::open(&folder, &config, &Backend::Mlx).unwrap();
    let limits = ModelConfig::load(&folder).unwrap();
    let max_tokens = limits.integer("max_position_embeddings").unwrap();
    model.rows(&tokens(&folder, max_tokens)).concat()
}

#[test]
fn a_wrong_encoder_fails_the_comparison() {
    let rope = |theta: f32| json!({"rope_type": "default", "rope_theta": theta});
    let ropes = json!({"full_attention": rope(160_000.0), "sliding_attention": rope(160_000.0)});
    let cases = [
        ("bert", json!({"hidden_act": "gelu_new"}), "embeddings"),
        ("bert-bare", json!({"layer_norm_eps": 1e-2}), "embeddings"),
        ("xlm-roberta", json!({"pad_token_id": 0}), "embeddings"),
        ("modernbert", json!({"local_attention": 10}), "embeddings"),
        ("modernbert", json!({"rope_parameters": ropes}), "embeddings"),
        ("modernbert-rerank", json!({"classifier_pooling": "cls"}), "logits"),
        ("qwen3-embedding", json!({"rope_parameters": rope(1e6)}), "embeddings"),
        ("qwen3-rerank-causal", json!({"rms_norm_eps": 1e-2}), "logits"),
    ];
    on_cpu(|| {
        for (name, changes, key) in cases {
            let expected = Expected::load(&root().join(name));
            assert!(normalised_error(&changed(name, json!({})), &expected.floats[key]) <= TOLERANCE);
            let error = normalised_error(&changed(name, changes.clone()), &expected.floats[key]);
            assert!(error > 3.0 * TOLERANCE, "{name}: {changes} changes only {error}");
        }
    });
}

/// An embedding model of `name` and the tokens of its inputs.
fn embedding(name: &str) -> (EmbeddingModel, Vec<TextTokens>) {
    let folder = root().join(name);
    let config = ModelConfig::load(&folder).unwrap();
    let weights = Weights::open(&folder, &config, None).unwrap();
    let model = EmbeddingModel::load(&folder, &config, weights).unwrap();
    let texts = tokens(&folder, model.shape().max_tokens);
    (model, texts)
}

#[test]
fn requests_may_ask_for_fewer_dimensions() {
    on_cpu(|| {
        let (model, texts) = embedding("bert");
        let whole = model.encode(&texts).unwrap();
        let options = EmbeddingOptions { dimensions: Some(5), normalize: None };
        for (short, whole) in model.encode_with(&texts, options).unwrap().iter().zip(&whole) {
            let length = whole[..5].iter().map(|v| v * v).sum::<f32>().sqrt();
            let expected: Vec<f32> = whole[..5].iter().map(|v| v / length).collect();
            assert!(normalised_error(short, &expected) < 1e-6);
        }
        for dimensions in [0, model.dimensions() + 1] {
            let options = EmbeddingOptions { dimensions: Some(dimensions), normalize: None };
            assert_eq!(model.encode_with(&texts, options).unwrap_err().status(), Status::InvalidRequest);
        }
        let (bare, texts) = embedding("bert-bare");
        let length = |options| bare.encode_with(&texts, options).unwrap()[0].iter().map(|v| v * v).sum::<f32>().sqrt();
        let normalize = EmbeddingOptions { dimensions: None, normalize: Some(true) };
        assert!((length(normalize) - 1.0).abs() < 1e-6 && (length(EmbeddingOptions::default()) - 1.0).abs() > 1e-2);
    });
}

#[test]
fn tokens_that_the_model_does_not_have_are_refused() {
    on_cpu(|| {
        let (model, _) = embedding("bert");
        let shape = model.shape().clone();
        let text = |id: u32, kind: u32, length: usize| TextTokens {
            ids: vec![id; length],
            types: vec![kind; length],
            truncated: false,
        };
        let status = |text: TextTokens| model.encode(&[text]).unwrap_err().status();
        assert_eq!(status(text(shape.vocab as u32, 0, 3)), Status::InvalidRequest);
        assert_eq!(status(text(1, 2, 3)), Status::InvalidRequest);
        assert_eq!(status(text(1, 0, 0)), Status::InvalidRequest);
        assert_eq!(status(TextTokens { types: vec![0; 2], ..text(1, 0, 3) }), Status::InvalidRequest);
        assert_eq!(status(text(1, 0, shape.max_tokens + 1)), Status::ContextLength);
        assert_eq!(model.encode(&[text(1, 1, shape.max_tokens)]).unwrap().len(), 1);
        assert!(model.encode(&[]).unwrap().is_empty());
    });
}

#[test]
fn tensors_that_nobody_knows_are_refused() {
    on_cpu(|| {
        // The head of a cross-encoder is not what an embedding model leaves out.
        for (name, head) in [("xlm-roberta-rerank", "classifier"), ("qwen3-rerank-classification", "score")] {
            let folder = root().join(name);
            let config = ModelConfig::load(&folder).unwrap();
            let weights = Weights::open(&folder, &config, None).unwrap();
            let error = EmbeddingModel::load(&folder, &config, weights).err().unwrap();
            assert_eq!(error.status(), Status::InvalidModel);
            assert!(error.to_string().contains(head), "{error}");
        }
    });
}

#[test]
fn decoders_that_nobody_can_ask_are_refused() {
    on_cpu(|| {
        // A language model without a prompt for pairs, and one without the tokens of an answer.
        let source = root().join("qwen3-rerank-causal");
        let load = |kind: &str, keep: &[&str]| {
            let folder = tempfile::tempdir().unwrap();
            for name in keep {
                std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
            }
            let mut config = read_json(&source.join("config.json")).unwrap();
            config["model_type"] = kind.into();
            std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
            let config = ModelConfig::from_value(config).unwrap();
            let weights = Weights::open(folder.path(), &config, None).unwrap();
            RerankModel::load(folder.path(), &config, weights).map(|model| model.labels())
        };
        assert_eq!(load("qwen3", &["model.safetensors", "tokenizer.json"]).unwrap(), 1);
        let status = |kind, keep| load(kind, keep).unwrap_err().status();
        assert_eq!(status("llama", &["model.safetensors", "tokenizer.json"]), Status::Unsupported);
        assert_eq!(status("qwen3", &["model.safetensors"]), Status::Unsupported);
    });
}

/// What damage to the `config.json` of a fixture leads to.
fn damaged(name: &str, changes: Value) -> Status {
    let folder = root().join(name);
    let mut config = read_json(&folder.join("config.json")).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let config = ModelConfig::from_value(config).unwrap();
    Loaded::open(&folder, &config, &Backend::Mlx).err().unwrap().status()
}

#[test]
fn damaged_configs_are_errors() {
    let cases = [
        ("bert", json!({"hidden_size": 15}), Status::InvalidModel),
        ("bert", json!({"hidden_size": "x"}), Status::InvalidModel),
        ("bert", json!({"num_attention_heads": 0}), Status::InvalidModel),
        ("bert", json!({"num_hidden_layers": 4_000_000_000_u64}), Status::InvalidModel),
        ("bert", json!({"num_hidden_layers": 1}), Status::InvalidModel),
        ("bert", json!({"num_hidden_layers": 3}), Status::InvalidModel),
        ("bert", json!({"vocab_size": 7}), Status::InvalidModel),
        ("bert", json!({"max_position_embeddings": 0}), Status::InvalidModel),
        ("bert", json!({"hidden_act": "mish"}), Status::Unsupported),
        ("bert", json!({"position_embedding_type": "relative_key"}), Status::Unsupported),
        ("bert-rerank", json!({"id2label": {"0": "a", "1": "b"}}), Status::InvalidModel),
        ("roberta", json!({"pad_token_id": u64::MAX}), Status::InvalidModel),
        ("modernbert", json!({"layer_types": ["full_attention"]}), Status::InvalidModel),
        ("modernbert", json!({"local_attention": 0}), Status::InvalidModel),
        ("modernbert-rerank", json!({"classifier_pooling": "max"}), Status::Unsupported),
        ("qwen3-embedding", json!({"hidden_size": 18}), Status::InvalidModel),
        ("qwen3-embedding", json!({"num_hidden_layers": 1}), Status::InvalidModel),
        ("qwen3-embedding", json!({"is_causal": false}), Status::Unsupported),
        ("qwen3-embedding", json!({"max_position_embeddings": 0}), Status::InvalidModel),
        ("qwen3-rerank-classification", json!({"id2label": {"0": "a", "1": "b"}}), Status::InvalidModel),
        ("llama-rerank", json!({"vocab_size": 100}), Status::InvalidModel),
    ];
    on_cpu(|| {
        for (name, changes, expected) in cases {
            assert_eq!(damaged(name, changes.clone()), expected, "{name} with {changes}");
        }
    });
}

#[test]
fn half_precision_stays_near() {
    /// bfloat16 has 8 bits: a few of them are lost on the way through two to four layers of random weights.
    const NEAR: f32 = 0.1;
    on_cpu(|| {
        for name in ["bert", "roberta", "modernbert", "modernbert-rerank", "qwen3-embedding", "llama-rerank"] {
            let folder = root().join(name);
            let config = ModelConfig::load(&folder).unwrap();
            let expected = Expected::load(&folder);
            for (backend, dtype) in
                backends().into_iter().flat_map(|b| [(b.clone(), Dtype::Float16), (b, Dtype::Bfloat16)])
            {
                let weights = Weights::open(&folder, &config, Some(dtype)).unwrap().computed_by(backend);
                let texts = |most| tokens(&folder, most);
                let (rows, key) = match ModelKind::detect(&folder, &config) {
                    ModelKind::Reranker => {
                        let model = RerankModel::load(&folder, &config, weights).unwrap();
                        (model.logits(&texts(model.shape().max_tokens)).unwrap(), "logits")
                    }
                    _ => {
                        let model = EmbeddingModel::load(&folder, &config, weights).unwrap();
                        (model.encode(&texts(model.shape().max_tokens)).unwrap(), "embeddings")
                    }
                };
                let error = normalised_error(&rows.concat(), &expected.floats[key]);
                println!("{name} {dtype:?}: {error:.1e}");
                assert!(error < NEAR, "{name} in {dtype:?} differs by {error}");
            }
        }
    });
}
