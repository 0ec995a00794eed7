//! Models with random weights, for timing.

use omlx::config::ModelConfig;
use omlx::error::{Error, Result};
use serde_json::json;

/// Qwen3 shapes: name, hidden, layers, mlp, query heads, key/value heads, tied head.
const SHAPES: [(&str, usize, usize, usize, usize, usize, bool); 5] = [
    ("qwen3-tiny", 256, 8, 768, 4, 2, true),
    ("qwen3-0.6b", 1024, 28, 3072, 16, 8, true),
    ("qwen3-1.7b", 2048, 28, 6144, 16, 8, true),
    ("qwen3-4b", 2560, 36, 9728, 32, 8, true),
    ("qwen3-8b", 4096, 36, 12288, 32, 8, false),
];

/// Eight of the 48 layers of Qwen3-30B-A3B: each has 128 experts, of which a token passes eight.
const MIXTURE: &str = "qwen3-30b-a3b-8layers";

/// The configuration of `qwen3-0.6b-4bit` and the like; `bf16` for dense weights.
pub fn random_config(name: &str) -> Result<ModelConfig> {
    let known = || {
        let shapes: Vec<_> = SHAPES.iter().map(|shape| shape.0).chain([MIXTURE]).collect();
        Error::invalid_argument(format!("{name:?} is none of {} with -4bit, -8bit or -bf16", shapes.join(", ")))
    };
    let (shape, format) = name.rsplit_once('-').ok_or_else(known)?;
    let mixture = (MIXTURE, 2048, 8, 6144, 32, 4, false);
    let known_shape = SHAPES.iter().chain([&mixture]).find(|known| known.0 == shape);
    let &(_, hidden, layers, mlp, heads, kv_heads, tied) = known_shape.ok_or_else(known)?;
    let mut config = json!({
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": if shape == "qwen3-tiny" { 64 } else { 128 },
        "vocab_size": if shape == "qwen3-tiny" { 4096 } else { 151_936 },
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40_960, "tie_word_embeddings": tied,
    });
    if shape == MIXTURE {
        config["model_type"] = json!("qwen3_moe");
        for (key, value) in [("num_experts", 128), ("num_experts_per_tok", 8), ("moe_intermediate_size", 768)] {
            config[key] = json!(value);
        }
        config["norm_topk_prob"] = json!(true);
    }
    match format {
        "4bit" => config["quantization"] = json!({ "group_size": 64, "bits": 4 }),
        "8bit" => config["quantization"] = json!({ "group_size": 64, "bits": 8 }),
        "bf16" => {}
        _ => return Err(known()),
    }
    ModelConfig::from_value(config)
}
