//! Gemma 4 as its authors publish it, inside of a model that also sees: other names, experts in joined tensors, and projections of
//! keys in layers that do not use them.

use std::collections::BTreeMap;
use std::path::Path;

use omlx::config::ModelConfig;
use omlx::error::Status;
use omlx::models::encoder::EmbeddingModel;
use omlx::weights::Weights;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::models::{backends, check, on_cpu};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// Tensors of mlx-lm's checkpoint in the authors' layout.
fn published(tensors: Tensors, shared: &[usize]) -> Tensors {
    let mut renamed = Tensors::new();
    for (name, (shape, data)) in &tensors {
        let name = name.replace("model.", "model.language_model.");
        let (name, tensor) = match name.strip_suffix(".switch_glu.gate_proj.weight") {
            Some(experts) => {
                let up = &tensors[&format!("{}.switch_glu.up_proj.weight", experts.replace(".language_model", ""))].1;
                let size = data.len() / shape[0];
                let halves = data.chunks(size).zip(up.chunks(size)).flat_map(|(gate, up)| [gate, up].concat());
                (format!("{experts}.gate_up_proj"), (vec![shape[0], 2 * shape[1], shape[2]], halves.collect()))
            }
            None if name.ends_with(".switch_glu.up_proj.weight") => continue,
            None => (name.replace(".switch_glu.down_proj.weight", ".down_proj"), (shape.clone(), data.clone())),
        };
        renamed.insert(name, tensor);
    }
    let number = 1f32.to_le_bytes().to_vec();
    for name in ["model.vision_tower.patch.weight", "model.embed_audio.weight"] {
        renamed.insert(name.to_owned(), (vec![1], number.clone()));
    }
    for layer in shared {
        for part in ["k_proj", "v_proj", "k_norm"] {
            let name = format!("model.language_model.layers.{layer}.self_attn.{part}.weight");
            renamed.insert(name, (vec![1], number.clone()));
        }
    }
    renamed
}

fn write(folder: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let view = |(shape, data): &(Vec<usize>, Vec<u8>)| (shape.clone(), data.clone());
    let owned: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), view(tensor))).collect();
    let views =
        owned.iter().map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn published_checkpoints_are_those_of_mlx_lm() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    on_cpu(|| {
        for (name, shared) in [("gemma4_text-f32", &[2, 3][..]), ("gemma4_text-moe-f32", &[])] {
            let fixture = root.join(name);
            let bytes = std::fs::read(fixture.join("model.safetensors")).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensors =
                tensors.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec())));
            let text = std::fs::read_to_string(fixture.join("config.json")).unwrap();
            let text: Value = serde_json::from_str(&text).unwrap();
            let config = json!({"model_type": "gemma4", "text_config": text, "vision_config": {}});
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &config, &published(tensors.collect(), shared));
            std::fs::copy(fixture.join("expected.safetensors"), folder.path().join("expected.safetensors")).unwrap();
            for backend in backends() {
                check(folder.path(), &backend);
            }
        }
    });
}

#[test]
fn layers_that_read_others_make_no_encoder() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    on_cpu(|| {
        for backend in backends() {
            let load = |name: &str| {
                let folder = root.join(name);
                let config = ModelConfig::load(&folder)?;
                let weights = Weights::open(&folder, &config, Some(mlx_rs::Dtype::Float32))?;
                EmbeddingModel::load(&folder, &config, weights.computed_by(backend.clone()))
            };
            let error = load("gemma4_text-f32").err().expect("an encoder");
            assert!(error.status() == Status::Unsupported && error.to_string().contains("as encoders"), "{error}");
            // The large models have neither shared keys nor inputs of layers.
            load("gemma4_text-moe-f32").unwrap();
        }
    });
}
