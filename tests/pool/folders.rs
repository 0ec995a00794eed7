//! Model folders with random weights, large enough to weigh something.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

/// Numbers from a seed (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

pub const VOCAB: usize = 4096;

/// Writes a Llama of `layers` layers, 13.4 million weights of 16 bits each, and 2.1 million more; returns its folder.
pub fn model(parent: &Path, name: &str, layers: usize, seed: u64) -> PathBuf {
    let (hidden, inner) = (512, 8192);
    let folder = parent.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut shapes =
        vec![("model.embed_tokens".to_owned(), vec![VOCAB, hidden]), ("model.norm".to_owned(), vec![hidden])];
    for layer in 0..layers {
        let path = |name: &str| format!("model.layers.{layer}.{name}");
        shapes.extend([
            (path("input_layernorm"), vec![hidden]),
            (path("post_attention_layernorm"), vec![hidden]),
            (path("self_attn.q_proj"), vec![hidden, hidden]),
            (path("self_attn.k_proj"), vec![hidden / 2, hidden]),
            (path("self_attn.v_proj"), vec![hidden / 2, hidden]),
            (path("self_attn.o_proj"), vec![hidden, hidden]),
            (path("mlp.gate_proj"), vec![inner, hidden]),
            (path("mlp.up_proj"), vec![inner, hidden]),
            (path("mlp.down_proj"), vec![hidden, inner]),
        ]);
    }
    let shapes = shapes.into_iter().map(|(name, shape)| (format!("{name}.weight"), shape)).collect();
    write_weights(&folder, shapes, seed);
    folder
}

/// Writes a BERT of `layers` layers, about 9.4 million weights of 16 bits each, with a head for scores or without; returns its
/// folder.
pub fn encoder(parent: &Path, name: &str, layers: usize, seed: u64, scores: bool) -> PathBuf {
    let (hidden, inner) = (512, 8192);
    let folder = parent.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let class = if scores { "BertForSequenceClassification" } else { "BertModel" };
    let config = json!({
        "architectures": [class], "model_type": "bert", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": VOCAB, "max_position_embeddings": 64,
        "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "id2label": { "0": "LABEL_0" },
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/bert/tokenizer.json");
    std::fs::copy(fixture, folder.join("tokenizer.json")).unwrap();
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let mut with_bias = |name: String, shape: Vec<usize>| {
        shapes.push((format!("{name}.bias"), vec![shape[0]]));
        shapes.push((format!("{name}.weight"), shape));
    };
    with_bias("embeddings.LayerNorm".to_owned(), vec![hidden]);
    for layer in 0..layers {
        let path = |name: &str| format!("encoder.layer.{layer}.{name}");
        for name in ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"] {
            with_bias(path(name), vec![hidden, hidden]);
        }
        with_bias(path("attention.output.LayerNorm"), vec![hidden]);
        with_bias(path("intermediate.dense"), vec![inner, hidden]);
        with_bias(path("output.dense"), vec![hidden, inner]);
        with_bias(path("output.LayerNorm"), vec![hidden]);
    }
    if scores {
        with_bias("pooler.dense".to_owned(), vec![hidden, hidden]);
    }
    let tables = [("word", VOCAB), ("position", 64), ("token_type", 2)];
    shapes.extend(tables.map(|(name, rows)| (format!("embeddings.{name}_embeddings.weight"), vec![rows, hidden])));
    let prefix = if scores { "bert." } else { "" };
    let mut shapes: Vec<_> = shapes.into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)).collect();
    if scores {
        shapes.extend([("classifier.weight".to_owned(), vec![1, hidden]), ("classifier.bias".to_owned(), vec![1])]);
    }
    write_weights(&folder, shapes, seed);
    folder
}

fn write_weights(folder: &Path, shapes: Vec<(String, Vec<usize>)>, seed: u64) {
    let mut random = Random(seed);
    let mut numbers = |count: usize| -> Vec<u8> {
        // Sixteen bits of a bfloat: any sign and fraction, about a thirty-second in size.
        (0..count).flat_map(|_| ((random.next() as u16 & 0x80ff) | 0x3d00).to_le_bytes()).collect()
    };
    let data: HashMap<String, (Vec<usize>, Vec<u8>)> =
        shapes.into_iter().map(|(name, shape)| (name, (shape.clone(), numbers(shape.iter().product())))).collect();
    let views =
        data.iter().map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}
