//! Quantised encoders against their dequantised twins: random checkpoints in the shape of the fixtures, but wide enough for groups.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::json;

use omlx::config::{ModelConfig, read_json};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::encoders::{Loaded, root, tokens};
use super::models::{backends, normalised_error, on_cpu};

/// Largest error over the largest value of the twin.
const TOLERANCE: f32 = 1e-5;

/// Weights that share a scale and a bias.
const GROUP: usize = 32;

/// A dimension of a fixture, widened: hidden states (of queries, keys and values), the feed-forward layer (of both of its
/// inputs), a head of a decoder.
fn widened(dim: usize) -> usize {
    match dim {
        16 => 64,
        48 => 192,
        24 => 96,
        8 => 32,
        other => other,
    }
}

struct Random(u64);

impl Random {
    /// Between -1 and 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Adds the matrix `name` of `[rows, columns]` in MLX's affine format to `packed`, and what it stands for to `twin`.
fn add_matrix(packed: &mut Tensors, twin: &mut Tensors, name: &str, shape: &[usize], bits: usize, random: &mut Random) {
    let scale = 1.5 / ((1 << bits) - 1) as f32 * (64.0 / shape[1] as f32).sqrt() * 0.3;
    let (mut codes, mut scales, mut biases, mut values) = (vec![], vec![], vec![], vec![]);
    for _ in 0..shape[0] * shape[1] / GROUP {
        let scale = scale * (1.0 + 0.3 * random.next());
        let bias = -scale * ((1 << bits) - 1) as f32 / 2.0;
        for _ in 0..GROUP {
            let code = (((random.next() + 1.0) / 2.0 * (1 << bits) as f32) as u32).min((1 << bits) - 1);
            codes.push(code);
            values.push(code as f32 * scale + bias);
        }
        scales.push(scale);
        biases.push(bias);
    }
    let word = |codes: &[u32]| codes.iter().rev().fold(0, |word, code| word << bits | code);
    let words: Vec<u8> = codes.chunks(32 / bits).flat_map(|codes| word(codes).to_le_bytes()).collect();
    let (rows, columns, path) = (shape[0], shape[1], name.strip_suffix(".weight").unwrap());
    packed.insert(name.to_owned(), (Dtype::U32, vec![rows, columns * bits / 32], words));
    packed.insert(format!("{path}.scales"), (Dtype::F32, vec![rows, columns / GROUP], floats(&scales)));
    packed.insert(format!("{path}.biases"), (Dtype::F32, vec![rows, columns / GROUP], floats(&biases)));
    twin.insert(name.to_owned(), (Dtype::F32, shape.to_vec(), floats(&values)));
}

fn write(folder: &Path, tensors: &Tensors) {
    let views: HashMap<_, _> = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()))
        .collect();
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

/// Writes wide checkpoints like the fixture `name`: quantised, and dequantised.
fn checkpoints(name: &str, bits: usize, folders: [&Path; 2]) {
    let source = root().join(name);
    let file = std::fs::read(source.join("model.safetensors")).unwrap();
    let fixture = SafeTensors::deserialize(&file).unwrap();
    let (mut packed, mut twin, mut random) = (Tensors::new(), Tensors::new(), Random(bits as u64));
    let mut tensors: Vec<_> = fixture.tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    for (tensor, view) in tensors {
        let shape: Vec<usize> = view.shape().iter().map(|&dim| widened(dim)).collect();
        if shape.len() == 2 {
            add_matrix(&mut packed, &mut twin, &tensor, &shape, bits, &mut random);
            continue;
        }
        let around = if tensor.contains("orm") && tensor.ends_with("weight") { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| around + 0.2 * random.next()).collect();
        packed.insert(tensor.clone(), (Dtype::F32, shape.clone(), floats(&values)));
        twin.insert(tensor, (Dtype::F32, shape, floats(&values)));
    }
    let mut config = read_json(&source.join("config.json")).unwrap();
    config["hidden_size"] = 64.into();
    config["intermediate_size"] = 96.into();
    if config.get("head_dim").is_some() {
        config["head_dim"] = 32.into();
    }
    for (folder, tensors) in folders.iter().zip([&packed, &twin]) {
        for entry in std::fs::read_dir(&source).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        for module in ["1_Pooling", "1_LogitScore"].into_iter().filter(|module| source.join(module).is_dir()) {
            std::fs::create_dir_all(folder.join(module)).unwrap();
            std::fs::copy(source.join(module).join("config.json"), folder.join(module).join("config.json")).unwrap();
        }
        write(folder, tensors);
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        config["quantization"] = json!(null);
    }
    config["quantization"] = json!({"group_size": GROUP, "bits": bits});
    std::fs::write(folders[0].join("config.json"), config.to_string()).unwrap();
}

#[test]
fn quantised_encoders_are_their_dequantised_twins() {
    on_cpu(|| {
        for name in
            ["bert", "bert-rerank", "modernbert-rerank", "qwen3-embedding", "qwen3-rerank-causal", "llama-rerank"]
        {
            let mut others: Vec<Vec<f32>> = Vec::new();
            for bits in [4, 8] {
                let (base, twins) = (tempfile::tempdir().unwrap(), ["packed", "twin"]);
                // The name of the folder tells the test what the fixture is.
                let [packed, twin] = twins.map(|twin| base.path().join(twin).join(name));
                for folder in [&packed, &twin] {
                    std::fs::create_dir_all(folder).unwrap();
                }
                checkpoints(name, bits, [&packed, &twin]);
                for backend in backends() {
                    let compute = |folder: &Path| {
                        let config = ModelConfig::load(folder).unwrap();
                        let model = Loaded::open(folder, &config, &backend).unwrap_or_else(|e| panic!("{name}: {e}"));
                        let texts = tokens(folder, config.integer("max_position_embeddings").unwrap());
                        (model.rows(&texts).concat(), model.weight_bytes())
                    };
                    let ((rows, bytes), (expected, unpacked)) = (compute(&packed), compute(&twin));
                    assert!(2 * bytes < unpacked, "{name}: {bytes} bytes, and {unpacked} of the twin");
                    let error = normalised_error(&rows, &expected);
                    println!("{name} {bits} bits: {error:.1e}");
                    assert!(error <= TOLERANCE, "{name} with {bits} bits differs from its twin by {error}");
                    others.push(expected);
                }
            }
            // Negative control: other weights give other results.
            assert!(normalised_error(&others[0], &others[2]) > 1e-2, "{name}: the weights make no difference");
        }
    });
}
