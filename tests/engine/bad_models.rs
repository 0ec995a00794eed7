//! Damaged and strange model folders: each is a typed error that names the thing, and the pool goes on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use omlx::engine::{Event, Request};
use omlx::error::{Error, Status};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// A copy of a fixture, to be damaged.
fn copy_of(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn pool() -> EnginePool {
    EnginePool::open(PoolOptions { device: Some(Device::Cpu), ..Default::default() }).unwrap()
}

/// Adds and loads `folder`; the error of whichever fails. Afterwards the pool must still serve a sound model.
fn load(folder: &Path) -> Result<(), Error> {
    let pool = pool();
    let outcome = pool.add_model(folder, Some("bad")).and_then(|_| pool.load("bad").map(|_| ()));
    pool.add_model(&fixture("llama-f32"), Some("sound")).unwrap();
    let request = Request::from_json(br#"{"model":"sound","prompt":[1,2],"max_tokens":1}"#, false).unwrap();
    assert!(matches!(pool.generate(request).unwrap().next(None), Ok(Event::Delta(_))), "the pool is broken");
    outcome
}

#[track_caller]
fn refused(folder: &Path, status: Status, words: &[&str]) {
    let error = load(folder).expect_err("the model was accepted");
    assert_eq!(error.status(), status, "{error}");
    for word in words {
        assert!(error.message().contains(word), "{word:?} is not in {error:?}");
    }
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

/// Changes the tensors of a single-file model; without its index, which would notice first.
fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Tensors)) {
    let _ = fs::remove_file(folder.join("model.safetensors.index.json"));
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut tensors: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    edit(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn an_untouched_copy_loads() {
    load(copy_of("qwen3-4bit").path()).unwrap();
    let rewritten = copy_of("qwen3-4bit");
    edit_tensors(rewritten.path(), |_| {});
    edit_config(rewritten.path(), |_| {});
    load(rewritten.path()).unwrap();
}

#[test]
fn missing_folders_and_files() {
    refused(Path::new("no/such/folder"), Status::NotFound, &["no/such/folder"]);
    let folder = copy_of("llama-f32");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    refused(folder.path(), Status::NotFound, &["model.safetensors"]);
    let folder = copy_of("llama-f32");
    fs::remove_file(folder.path().join("config.json")).unwrap();
    refused(folder.path(), Status::NotFound, &["config.json"]);
}

#[test]
fn strange_configs() {
    let cases: &[(&str, Value, Status, &[&str])] = &[
        ("model_type", json!("gpt9"), Status::Unsupported, &["gpt9", "llama", "mistral", "qwen2", "qwen3"]),
        ("model_type", json!(7), Status::InvalidModel, &["model_type"]),
        ("hidden_size", json!("wide"), Status::InvalidModel, &["llama"]),
        ("hidden_size", json!(0), Status::InvalidModel, &["hidden_size"]),
        ("num_attention_heads", json!(0), Status::InvalidModel, &["num_attention_heads"]),
        ("num_key_value_heads", json!(3), Status::InvalidModel, &["heads"]),
        ("num_hidden_layers", json!(1u64 << 40), Status::InvalidModel, &["num_hidden_layers"]),
        ("num_hidden_layers", json!(7), Status::InvalidModel, &["model.layers.2", "missing"]),
        ("num_hidden_layers", json!(1), Status::InvalidModel, &["model.layers.1"]),
        ("hidden_act", json!("mish"), Status::Unsupported, &["mish"]),
        ("rope_scaling", json!({"rope_type": "spiral"}), Status::Unsupported, &["spiral"]),
        ("rope_scaling", json!({"rope_type": "yarn"}), Status::InvalidModel, &["factor"]),
        ("sliding_window", json!(0), Status::InvalidModel, &["sliding_window"]),
        ("max_position_embeddings", Value::Null, Status::InvalidModel, &["max_position_embeddings"]),
        ("quantization_config", json!({"quant_method": "awq", "bits": 4}), Status::Unsupported, &["awq"]),
        ("eos_token_id", json!("two"), Status::InvalidModel, &["eos_token_id"]),
    ];
    for (key, value, status, words) in cases {
        let folder = copy_of("llama-f32");
        edit_config(folder.path(), |config| config[*key] = value.clone());
        if *key == "eos_token_id" {
            // Read with the first request, not with the weights.
            let pool = pool();
            pool.add_model(folder.path(), Some("bad")).unwrap();
            let request = Request::from_json(br#"{"prompt":[1],"max_tokens":1}"#, false).unwrap();
            let Ok(Event::Done(done)) = pool.generate(request).unwrap().next(None) else { panic!("no end") };
            let error = done.error.unwrap();
            assert!(error.status() == *status && error.message().contains(words[0]), "{error}");
            continue;
        }
        refused(folder.path(), *status, words);
    }
    let folder = copy_of("llama-f32");
    fs::write(folder.path().join("config.json"), b"{\"model_type\": \"llama\", ").unwrap();
    refused(folder.path(), Status::InvalidModel, &["config.json"]);
}

#[test]
fn damaged_weight_files() {
    let whole = fs::read(fixture("llama-f32").join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let with = |bytes: &[u8]| {
        let folder = copy_of("llama-f32");
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        folder
    };
    for cut in [0, 4, 8, header / 2, header, header + 1, whole.len() - 1] {
        refused(with(&whole[..cut]).path(), Status::InvalidModel, &["model.safetensors"]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    refused(with(&longer).path(), Status::InvalidModel, &["model.safetensors"]);
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(with(&huge).path(), Status::InvalidModel, &["header"]);
    let mut garbled = whole.clone();
    garbled[8] = b'?';
    refused(with(&garbled).path(), Status::InvalidModel, &["header"]);
    // Every byte of the header in turn, as a flipped bit would have it: an error or the same model, never a crash.
    for at in (8..header).step_by(17) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x04;
        let folder = with(&flipped);
        let pool = pool();
        if let Ok(id) = pool.add_model(folder.path(), Some("flipped")) {
            let _ = pool.load(&id);
        }
    }
}

#[test]
fn missing_unread_and_mis_shaped_tensors_are_named() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let folder = copy_of("llama-f32");
    edit_tensors(folder.path(), |t| drop(t.remove(name)));
    refused(folder.path(), Status::InvalidModel, &[name, "missing"]);

    let folder = copy_of("llama-f32");
    edit_tensors(folder.path(), |t| drop(t.insert("model.extra.weight".into(), (Dtype::F32, vec![1], vec![0; 4]))));
    refused(folder.path(), Status::InvalidModel, &["model.extra.weight"]);

    let folder = copy_of("llama-f32");
    edit_tensors(folder.path(), |t| t.get_mut(name).unwrap().1.reverse());
    refused(folder.path(), Status::InvalidModel, &[name, "shape"]);

    let folder = copy_of("llama-f32");
    edit_tensors(folder.path(), |t| t.get_mut(name).unwrap().0 = Dtype::I32);
    refused(folder.path(), Status::InvalidModel, &[name, "I32"]);

    let scales = "model.layers.0.self_attn.q_proj.scales";
    let folder = copy_of("qwen3-4bit");
    edit_tensors(folder.path(), |t| drop(t.remove(scales)));
    refused(folder.path(), Status::InvalidModel, &["model.layers.0.self_attn.q_proj.weight"]);

    let biases = "model.layers.0.self_attn.q_proj.biases";
    let folder = copy_of("qwen3-4bit");
    edit_tensors(folder.path(), |t| drop(t.remove(biases)));
    refused(folder.path(), Status::InvalidModel, &[biases, "missing"]);

    let folder = copy_of("qwen3-4bit");
    edit_config(folder.path(), |config| {
        config.as_object_mut().unwrap().retain(|key, _| !key.starts_with("quantization"));
    });
    refused(folder.path(), Status::InvalidModel, &["quantised"]);

    let folder = copy_of("qwen3-4bit");
    edit_config(folder.path(), |config| config["quantization"]["bits"] = json!(8));
    refused(folder.path(), Status::InvalidModel, &["shape"]);
}

#[test]
fn broken_indexes() {
    let index = "model.safetensors.index.json";
    let edit = |change: &dyn Fn(&mut Value)| {
        let folder = copy_of("qwen3-4bit-sharded");
        let path = folder.path().join(index);
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
        folder
    };
    load(edit(&|_| {}).path()).unwrap();
    refused(edit(&|v| v["weight_map"] = json!(3)).path(), Status::InvalidModel, &["weight_map"]);
    let outside = edit(&|v| v["weight_map"]["model.norm.weight"] = json!("../outside.safetensors"));
    refused(outside.path(), Status::InvalidModel, &["outside.safetensors"]);
    let absent = edit(&|v| v["weight_map"]["model.norm.weight"] = json!("absent.safetensors"));
    refused(absent.path(), Status::NotFound, &["absent.safetensors"]);
    let extra = edit(&|v| {
        let first = v["weight_map"]["model.norm.weight"].clone();
        v["weight_map"]["model.phantom.weight"] = first;
    });
    refused(extra.path(), Status::InvalidModel, &["model.phantom.weight"]);
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_is_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&root).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let added = json!({
        "id": 1_500_000_000, "content": "<far>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false,
    });
    tokenizer["model"]["vocab"]["<far>"] = json!(1_500_000_000);
    tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    fs::write(&path, tokenizer.to_string()).unwrap();
    let pool = pool();
    pool.add_model(folder.path(), Some("bad")).unwrap();
    let outcome = |prompt: &str| {
        let json = json!({ "messages": [{ "role": "user", "content": prompt }], "max_tokens": 1 }).to_string();
        pool.generate(Request::from_json(json.as_bytes(), false).unwrap()).unwrap().next(None)
    };
    let Ok(Event::Done(done)) = outcome("a <far> token") else { panic!("the id was accepted") };
    let error = done.error.unwrap();
    assert!(error.status() == Status::InvalidModel && error.message().contains("1500000000"), "{error}");
    assert!(matches!(outcome("near tokens"), Ok(Event::Delta(_))));
}

#[test]
fn a_damaged_tokenizer_is_named_by_the_request() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    for (file, text) in
        [("tokenizer.json", "{\"version\":"), ("generation_config.json", "[1,"), ("tokenizer_config.json", "7x")]
    {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(&root).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        fs::write(folder.path().join(file), text).unwrap();
        let pool = pool();
        pool.add_model(folder.path(), Some("bad")).unwrap();
        let request = Request::from_json(br#"{"messages":[{"role":"user","content":"hi"}]}"#, false).unwrap();
        let Ok(Event::Done(done)) = pool.generate(request).unwrap().next(None) else { panic!("no end") };
        let error = done.error.unwrap();
        assert!(error.status() == Status::InvalidModel && error.message().contains(file), "{error}");
    }
}
