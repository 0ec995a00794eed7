//! Models of random weights in Qwen3's form, in 4 bits, with the bundled model's tokenizer and template: for measurements, and for
//! tests that need a longer context than the bundled model has.

use std::fs::{File, copy, read_to_string, write};
use std::io::{BufWriter, Result, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

/// What such a model is made of.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub hidden: usize,
    pub layers: usize,
    pub mlp: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub context: usize,
}

const BITS: usize = 4;
/// Weights that share a scale.
const GROUP: usize = 64;

/// Writes the model's folder; `bundled` is the one whose texts it has.
pub fn write_model(folder: &Path, shape: &Shape, bundled: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    write(folder.join("config.json"), config(shape).to_string())?;
    write(folder.join("tokenizer.json"), tokenizer(&bundled.join("tokenizer.json"), shape.vocab)?)?;
    for file in ["tokenizer_config.json", "chat_template.jinja"] {
        copy(bundled.join(file), folder.join(file))?;
    }
    write_weights(&folder.join("model.safetensors"), shape)
}

fn config(shape: &Shape) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.context, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": true, "eos_token_id": 2,
        "quantization": {"group_size": GROUP, "bits": BITS},
    })
}

/// The tokenizer in `file` with words added: of random weights all tokens are drawn, and a token without text is no event.
fn tokenizer(file: &Path, words: usize) -> Result<String> {
    let mut tokenizer: Value = serde_json::from_str(&read_to_string(file)?)?;
    let vocab = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
    for id in vocab.len()..words {
        let letters: String = (0..4).map(|place| char::from(b'a' + (id / 26_usize.pow(place) % 26) as u8)).collect();
        // The capital keeps it apart from the words that are there.
        vocab.insert(format!("\u{120}Z{letters}"), id.into());
    }
    assert_eq!(vocab.len(), words, "two words are the same");
    Ok(tokenizer.to_string())
}

fn matrices(shape: &Shape) -> Vec<(String, [usize; 2])> {
    let &Shape { hidden, mlp, vocab, .. } = shape;
    let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut all = vec![("model.embed_tokens".to_owned(), [vocab, hidden])];
    for layer in 0..shape.layers {
        for (name, size) in [
            ("self_attn.q_proj", [queries, hidden]),
            ("self_attn.k_proj", [keys, hidden]),
            ("self_attn.v_proj", [keys, hidden]),
            ("self_attn.o_proj", [hidden, queries]),
            ("mlp.gate_proj", [mlp, hidden]),
            ("mlp.up_proj", [mlp, hidden]),
            ("mlp.down_proj", [hidden, mlp]),
        ] {
            all.push((format!("model.layers.{layer}.{name}"), size));
        }
    }
    all
}

fn norms(shape: &Shape) -> Vec<(String, usize)> {
    let mut all = vec![("model.norm".to_owned(), shape.hidden)];
    for layer in 0..shape.layers {
        for (name, width) in [
            ("input_layernorm", shape.hidden),
            ("post_attention_layernorm", shape.hidden),
            ("self_attn.q_norm", shape.head_dim),
            ("self_attn.k_norm", shape.head_dim),
        ] {
            all.push((format!("model.layers.{layer}.{name}"), width));
        }
    }
    all
}

/// What a tensor is filled with.
#[derive(Clone, Copy)]
enum Fill {
    /// Random words: packed weights.
    Words,
    /// A number of bf16, all over.
    Number(f32),
}

/// One safetensors file.
fn write_weights(file: &Path, shape: &Shape) -> Result<()> {
    // Weights spread evenly around zero, about as wide as real ones.
    let scale = 0.06 / 15.0;
    let mut tensors = Vec::new();
    for (name, [rows, columns]) in matrices(shape) {
        tensors.push((format!("{name}.weight"), "U32", vec![rows, columns * BITS / 32], Fill::Words));
        let groups = vec![rows, columns / GROUP];
        tensors.push((format!("{name}.scales"), "BF16", groups.clone(), Fill::Number(scale)));
        tensors.push((format!("{name}.biases"), "BF16", groups, Fill::Number(scale * -7.5)));
    }
    tensors.extend(
        norms(shape)
            .into_iter()
            .map(|(name, width)| (format!("{name}.weight"), "BF16", vec![width], Fill::Number(1.0))),
    );
    let (mut header, mut at) = (Map::new(), 0);
    for (name, dtype, shape, fill) in &tensors {
        let bytes = shape.iter().product::<usize>() * fill.width();
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]}));
        at += bytes;
    }
    let header = Value::Object(header).to_string();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 1_u64;
    for (_, _, shape, fill) in &tensors {
        for _ in 0..shape.iter().product() {
            match fill {
                Fill::Words => out.write_all(&next(&mut state).to_le_bytes())?,
                Fill::Number(number) => out.write_all(&((number.to_bits() >> 16) as u16).to_le_bytes())?,
            }
        }
    }
    out.flush()
}

impl Fill {
    fn width(self) -> usize {
        match self {
            Self::Words => 4,
            Self::Number(_) => 2,
        }
    }
}

/// xorshift64*: a word.
fn next(state: &mut u64) -> u32 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
}
