//! Checkpoints of authors have layers that draw several tokens at once, which MLX's tools leave out.

use std::path::Path;

use omlx::config::ModelConfig;
use omlx::error::{Result, Status};
use omlx::models;
use omlx::weights::Weights;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use super::models::{backends, check, on_cpu};

/// The fixture `name` with the tensor `extra` in a file of its own.
fn with_tensor(name: &str, extra: &str) -> tempfile::TempDir {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name);
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "expected.safetensors"] {
        std::fs::copy(fixture.join(file), folder.path().join(file)).unwrap();
    }
    let number = 1f32.to_le_bytes();
    let view = TensorView::new(Dtype::F32, vec![1], &number).unwrap();
    safetensors::serialize_to_file([(extra, view)], None, &folder.path().join("extra.safetensors")).unwrap();
    let bytes = std::fs::read(fixture.join("model.safetensors")).unwrap();
    let own = SafeTensors::deserialize(&bytes).unwrap().names()[0].to_owned();
    let index = json!({ "weight_map": { own: "model.safetensors", extra: "extra.safetensors" } });
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder
}

fn load(folder: &Path) -> Result<()> {
    let config = ModelConfig::load(folder)?;
    models::load(&config, 64, Weights::open(folder, &config, None)?).map(drop)
}

#[test]
fn layers_that_draw_ahead_are_left_out() {
    // Experts apart are a sign of norms without one added, but not these.
    let ahead = ["mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight"];
    let inside = "language_model.model.layers.0.fc.weight";
    let cases = [
        ("qwen3_next-f32", &["mtpx.fc.weight", "model.layers.0.fc.weight"][..]),
        ("qwen3_next-4bit", &["model.mtp_fc.weight"]),
        // Behind a model that also sees, what is not the language model's is left out anyway.
        ("qwen3_5-f32", &[inside]),
        ("qwen3_5_moe-f32", &[inside]),
    ];
    on_cpu(|| {
        for (name, unknown) in cases {
            for backend in backends() {
                for extra in ahead {
                    check(with_tensor(name, extra).path(), &backend);
                }
            }
            for extra in unknown {
                let error = load(with_tensor(name, extra).path()).unwrap_err();
                assert!(error.status() == Status::InvalidModel && error.message().contains(extra), "{name}: {error}");
            }
        }
    });
}
