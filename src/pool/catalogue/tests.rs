//! What is listed of folders, and why some of it is no model.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::error::Status;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn llama() -> Value {
    json!({ "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512 })
}

fn write(path: &Path, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// A folder with a config and a weight file whose content nobody should want to see.
fn model(folder: &Path, config: &Value) {
    write(&folder.join("config.json"), &config.to_string());
    write(&folder.join("model.safetensors"), "not opened");
}

fn models_in(folder: &Path) -> ModelFolders {
    ModelFolders { models: Some(folder.to_owned()), hub_cache: None }
}

fn catalogue(folders: &ModelFolders) -> Catalogue {
    let mut catalogue = Catalogue::default();
    catalogue.update(folders.scan().unwrap(), &[], |_| false);
    catalogue
}

fn ids(catalogue: &Catalogue) -> Vec<&str> {
    catalogue.entries().map(|entry| entry.id.as_str()).collect()
}

#[track_caller]
fn rejected(catalogue: &Catalogue, id: &str, status: Status, words: &[&str]) {
    let problem = catalogue.find(id).unwrap().problem.as_ref().expect("nothing is wrong with it");
    assert_eq!(problem.status(), status, "{problem}");
    for word in words {
        assert!(problem.message().contains(word), "{word:?} is not in {problem}");
    }
}

#[test]
fn folders_are_found_flat_and_by_organisation() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    model(&at("flat"), &llama());
    model(&at("org/one"), &llama());
    model(&at("org/two"), &llama());
    model(&at("org/deep/er"), &llama());
    model(&at(".hidden"), &llama());
    write(&at("notes/readme.txt"), "nothing");
    write(&at("stray.txt"), "nothing");
    std::os::unix::fs::symlink(at("flat"), at("linked")).unwrap();
    let found = catalogue(&models_in(folder.path()));
    assert_eq!(ids(&found), ["flat", "linked", "org/one", "org/two"]);
    for entry in found.entries() {
        assert_eq!((entry.problem.as_ref(), entry.context_length), (None, Some(512)));
        assert_eq!((entry.kind, entry.file_bytes), (Some(ModelKind::Llm), 10));
    }
    let one = catalogue(&models_in(&at("org/one")));
    assert_eq!(ids(&one), ["one"]);
    assert_eq!(one.only(ModelKind::Llm).unwrap().id, "one");
    assert_eq!(models_in(&at("nowhere")).scan().unwrap_err().status(), Status::NotFound);
}

#[test]
fn what_is_no_usable_model_is_listed_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    model(&at("good"), &llama());
    model(&at("damaged"), &llama());
    write(&at("damaged/config.json"), "{\"model_type\": ");
    write(&at("no-weights/config.json"), &llama().to_string());
    write(&at("gguf/config.json"), &llama().to_string());
    write(&at("gguf/model-q4.gguf"), "x");
    write(&at("torch/config.json"), &llama().to_string());
    write(&at("torch/pytorch_model.bin"), "x");
    write(&at("bare-gguf/model.GGUF"), "x");
    write(&at("org/bare/model.safetensors"), "x");
    model(&at("unknown"), &json!({ "model_type": "gpt9", "max_position_embeddings": 8 }));
    model(&at("awq"), &json!({ "model_type": "llama", "quantization_config": { "quant_method": "awq" } }));
    write(&at("sharded/config.json"), &llama().to_string());
    let map =
        json!({ "weight_map": { "a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors" } });
    write(&at("sharded/model.safetensors.index.json"), &map.to_string());
    write(&at("sharded/model-1.safetensors"), "x");
    write(&at("outside/config.json"), &llama().to_string());
    let map = json!({ "weight_map": { "a": "../good/model.safetensors" } });
    write(&at("outside/model.safetensors.index.json"), &map.to_string());
    write(&at("dangling/config.json"), &llama().to_string());
    std::os::unix::fs::symlink("nowhere", at("dangling/model.safetensors")).unwrap();

    let found = catalogue(&models_in(folder.path()));
    assert_eq!(found.entries().count(), 12);
    rejected(&found, "damaged", Status::InvalidModel, &["config.json"]);
    rejected(&found, "no-weights", Status::NotFound, &["model.safetensors"]);
    rejected(&found, "gguf", Status::Unsupported, &["only GGUF weights"]);
    rejected(&found, "torch", Status::Unsupported, &["only PyTorch weights"]);
    rejected(&found, "bare-gguf", Status::Unsupported, &["only GGUF weights"]);
    rejected(&found, "org/bare", Status::NotFound, &["config.json"]);
    rejected(&found, "unknown", Status::Unsupported, &["gpt9", "llama"]);
    rejected(&found, "awq", Status::Unsupported, &["awq"]);
    rejected(&found, "sharded", Status::NotFound, &["model-2.safetensors and 1 more of 3"]);
    rejected(&found, "outside", Status::InvalidModel, &["not a file name"]);
    rejected(&found, "dangling", Status::NotFound, &["model.safetensors is a link"]);
    assert_eq!(found.only(ModelKind::Llm).unwrap().id, "good", "the only one that can be used");
    assert_eq!(found.find("unknown").unwrap().model_type.as_deref(), Some("gpt9"));

    write(&at("sharded/model-2.safetensors"), "x");
    write(&at("sharded/model-3.safetensors"), "x");
    assert_eq!(catalogue(&models_in(folder.path())).find("sharded").unwrap().problem, None);
    // A folder that is all there is says itself what is wrong with it.
    let alone = catalogue(&models_in(&at("bare-gguf")));
    assert_eq!(alone.only(ModelKind::Llm).unwrap_err().status(), Status::Unsupported);
    assert_eq!(catalogue(&models_in(&at("torch"))).only(ModelKind::Llm).unwrap_err().status(), Status::Unsupported);
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(catalogue(&models_in(empty.path())).only(ModelKind::Llm).unwrap_err().status(), Status::NotFound);
}

/// macOS has no such names.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_not_utf8_are_listed_as_far_as_they_can_be_read() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let folder = tempfile::tempdir().unwrap();
    let strange = folder.path().join(OsStr::from_bytes(b"a\xffb"));
    model(&strange, &llama());
    model(&strange.join("org"), &llama());
    model(&folder.path().join(OsStr::from_bytes(b"o\xff")).join("m"), &llama());
    let found = catalogue(&models_in(folder.path()));
    assert_eq!(ids(&found), ["a\u{fffd}b", "o\u{fffd}/m"]);
    rejected(&found, "a\u{fffd}b", Status::InvalidModel, &["not UTF-8"]);
    rejected(&found, "o\u{fffd}/m", Status::InvalidModel, &["not UTF-8"]);
    let error = ModelEntry::from_folder(&strange, None).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert_eq!(ModelEntry::from_folder(&strange, Some("named")).unwrap().problem, None);
}

#[test]
fn kinds_are_detected_and_can_be_settled() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let bert = json!({ "model_type": "bert", "max_position_embeddings": 128 });
    model(&at("encoder"), &bert);
    model(&at("decoder"), &llama());
    model(&at("embedding-decoder"), &llama());
    write(&at("embedding-decoder/modules.json"), "[]");
    let vision = json!({ "model_type": "llama", "vision_config": {}, "max_position_embeddings": 64 });
    model(&at("vision"), &vision);
    write(&at("no-weights/config.json"), &llama().to_string());
    let mut found = catalogue(&models_in(folder.path()));
    let state = |found: &Catalogue, id: &str| {
        let entry = found.find(id).unwrap();
        (entry.kind, entry.context_length, entry.problem.is_none())
    };
    let (llm, embedding, reranker) = (ModelKind::Llm, ModelKind::Embedding, ModelKind::Reranker);
    assert_eq!(state(&found, "encoder"), (Some(embedding), Some(128), true));
    assert_eq!(state(&found, "decoder"), (Some(llm), Some(512), true));
    assert_eq!(state(&found, "embedding-decoder"), (Some(embedding), Some(512), true));
    assert_eq!(state(&found, "vision"), (Some(ModelKind::Vision), None, false));
    rejected(&found, "vision", Status::Unsupported, &["unsupported: vision"]);
    assert!(found.find("vision").unwrap().problem.as_ref().unwrap().message().starts_with("unsupported: vision"));
    assert_eq!(found.find("vision").unwrap().source().unwrap_err().status(), Status::Unsupported);

    assert!(found.settle("decoder", Some(reranker)) && found.settle("encoder", Some(llm)));
    assert!(found.settle("vision", Some(llm)) && found.settle("no-weights", Some(embedding)));
    assert!(!found.settle("decoder", Some(reranker)), "it was that already");
    assert_eq!(state(&found, "decoder"), (Some(reranker), Some(512), true));
    assert_eq!(state(&found, "encoder"), (Some(llm), None, false));
    rejected(&found, "encoder", Status::Unsupported, &["bert", "llama"]);
    assert_eq!(state(&found, "vision"), (Some(llm), Some(64), true));
    assert_eq!(state(&found, "no-weights"), (Some(embedding), Some(512), false));
    // A scan does not forget it, and what it was made for comes back.
    found.update(models_in(folder.path()).scan().unwrap(), &[], |_| false);
    assert_eq!(state(&found, "decoder"), (Some(reranker), Some(512), true));
    assert!(found.settle("encoder", None));
    assert_eq!(state(&found, "encoder"), (Some(embedding), Some(128), true));
    rejected(&found, "no-weights", Status::NotFound, &["model.safetensors"]);

    let mut random = ModelEntry::random("r", crate::config::ModelConfig::from_value(llama()).unwrap());
    assert!(random.problem.is_none());
    random = random.settled(Some(embedding));
    assert_eq!(random.problem.unwrap().status(), Status::Unsupported);
}

#[test]
fn licences_and_formats_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut config = llama();
    config["quantization"] = json!({ "bits": 4, "group_size": 32 });
    model(&at("a"), &config);
    write(&at("a/README.md"), "---\nlanguage: en\nlicense: apache-2.0\n---\n# A\n");
    write(&at("a/License.TXT"), "text");
    model(&at("b"), &llama());
    fs::create_dir(at("b/LICENSES")).unwrap();
    write(&at("b/copying"), "text");
    model(&at("c"), &llama());
    fs::create_dir(at("c/README.md")).unwrap();
    let found = catalogue(&models_in(folder.path()));
    let told = |id: &str| {
        let entry = found.find(id).unwrap();
        (entry.license.as_deref(), entry.license_file.clone())
    };
    assert_eq!(told("a"), (Some("apache-2.0"), Some(at("a/License.TXT"))));
    assert_eq!(told("b"), (None, Some(at("b/copying"))));
    assert_eq!(told("c"), (None, None));
    let format = found.find("a").unwrap().quantization.unwrap();
    assert_eq!((format.bits, format.group_size, format.mode.name()), (4, 32, "affine"));
    assert_eq!(found.find("b").unwrap().quantization, None);
}

/// A folder of the hub's cache with one snapshot; its files are links to blobs.
fn cached(cache: &Path, repo: &str, commit: &str, files: &[(&str, &str)]) {
    let model = cache.join(repo);
    for (at, (name, content)) in files.iter().enumerate() {
        let blob = format!("{commit}-{at}");
        write(&model.join("blobs").join(&blob), content);
        let link = model.join("snapshots").join(commit).join(name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{blob}"), link).unwrap();
    }
}

fn hub(cache: &TempDir, models: Option<&Path>) -> Catalogue {
    let hub_cache = Some(cache.path().to_owned());
    catalogue(&ModelFolders { models: models.map(Path::to_owned), hub_cache })
}

#[test]
fn the_hubs_cache_is_read() {
    let cache = tempfile::tempdir().unwrap();
    let at = |name: &str| cache.path().join(name);
    let config = llama().to_string();
    let whole = [("config.json", config.as_str()), ("model.safetensors", "twelve bytes")];
    let newer = "f".repeat(40);
    cached(cache.path(), "models--org--name", COMMIT, &whole);
    cached(cache.path(), "models--org--name", &newer, &whole[..1]);
    write(&at("models--org--name/refs/main"), &format!("{COMMIT}\n"));
    cached(cache.path(), "models--gpt2", &newer, &whole);
    cached(cache.path(), "datasets--org--data", COMMIT, &whole);
    write(&at("version.txt"), "1");
    let found = hub(&cache, None);
    assert_eq!(ids(&found), ["gpt2", "org/name"]);
    let entry = found.find("org/name").unwrap();
    assert_eq!((entry.problem.as_ref(), entry.file_bytes), (None, 12));
    assert_eq!(entry.folder, Some(at("models--org--name/snapshots").join(COMMIT)));
    // Without a ref the newest counts.
    fs::remove_file(at("models--org--name/refs/main")).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(1000);
    fs::File::open(at("models--org--name/snapshots").join(COMMIT)).unwrap().set_modified(long_ago).unwrap();
    rejected(&hub(&cache, None), "org/name", Status::NotFound, &["model.safetensors", &newer]);
    let later = SystemTime::now() + Duration::from_secs(1000);
    fs::File::open(at("models--org--name/snapshots").join(COMMIT)).unwrap().set_modified(later).unwrap();
    assert_eq!(hub(&cache, None).find("org/name").unwrap().problem, None);
    // The pool's own folder comes first.
    let models = tempfile::tempdir().unwrap();
    model(&models.path().join("org/name"), &llama());
    let both = hub(&cache, Some(models.path()));
    assert_eq!(ids(&both), ["gpt2", "org/name"]);
    assert_eq!(both.find("org/name").unwrap().folder, Some(models.path().join("org/name")));
    let missing = ModelFolders { models: None, hub_cache: Some(at("nowhere")) };
    assert_eq!(missing.scan().unwrap_err().status(), Status::NotFound);
}

#[test]
fn incomplete_snapshots_are_listed_with_the_reason() {
    let cache = tempfile::tempdir().unwrap();
    let at = |name: &str| cache.path().join(name);
    let config = llama().to_string();
    let index = json!({ "weight_map": { "a": "model-1.safetensors", "b": "model-2.safetensors" } }).to_string();
    let files =
        [("config.json", config.as_str()), ("model.safetensors.index.json", &index), ("model-1.safetensors", "x")];
    cached(cache.path(), "models--a--shard", COMMIT, &files);
    cached(cache.path(), "models--a--dangling", COMMIT, &[("config.json", &config), ("model.safetensors", "x")]);
    fs::remove_file(at("models--a--dangling/blobs").join(format!("{COMMIT}-1"))).unwrap();
    cached(cache.path(), "models--a--config", COMMIT, &[("config.json", &config), ("model.safetensors", "x")]);
    fs::remove_file(at("models--a--config/blobs").join(format!("{COMMIT}-0"))).unwrap();
    cached(cache.path(), "models--a--tokenizer", COMMIT, &[("tokenizer.json", "{}")]);
    fs::create_dir_all(at("models--a--nothing/blobs")).unwrap();
    let found = hub(&cache, None);
    assert_eq!(found.entries().count(), 5);
    rejected(&found, "a/shard", Status::NotFound, &["model-2.safetensors of 2"]);
    rejected(&found, "a/dangling", Status::NotFound, &["model.safetensors is a link"]);
    rejected(&found, "a/config", Status::NotFound, &["config.json"]);
    rejected(&found, "a/tokenizer", Status::NotFound, &["config.json"]);
    rejected(&found, "a/nothing", Status::NotFound, &["no snapshot"]);
}

#[test]
fn names_in_the_hubs_cache_lead_nowhere_else() {
    let cache = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    model(outside.path(), &llama());
    let outside = outside.path().to_str().unwrap();
    let refs =
        [outside.to_owned(), format!("../../../..{outside}"), "..".into(), ".".into(), String::new(), "a\0b".into()];
    for (at, main) in refs.iter().enumerate() {
        let model = cache.path().join(format!("models--bad--{at}"));
        fs::create_dir_all(model.join("snapshots")).unwrap();
        write(&model.join("refs/main"), main);
    }
    // Nor does a link in the place of a snapshot, named by a ref or not.
    for (name, main) in [("linked", COMMIT), ("unnamed", "other")] {
        let model = cache.path().join(format!("models--bad--{name}"));
        fs::create_dir_all(model.join("snapshots")).unwrap();
        std::os::unix::fs::symlink(outside, model.join("snapshots").join(COMMIT)).unwrap();
        write(&model.join("refs/main"), main);
    }
    for name in ["models--..--up", "models--a--..", "models--"] {
        model(&cache.path().join(name).join("snapshots").join(COMMIT), &llama());
    }
    let found = hub(&cache, None);
    assert_eq!(found.entries().count(), refs.len() + 5);
    for entry in found.entries() {
        let problem = entry.problem.as_ref().unwrap_or_else(|| panic!("{} can be used", entry.id));
        let expected = if entry.id.starts_with("bad/") { "no snapshot" } else { "not the name of a repository" };
        assert!(problem.message().contains(expected), "{}: {problem}", entry.id);
    }
}

#[test]
fn a_second_scan_finds_what_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let elsewhere = tempfile::tempdir().unwrap();
    for name in ["stays", "goes", "loaded"] {
        model(&at(name), &llama());
    }
    model(&elsewhere.path().join("x"), &llama());
    let mut found = catalogue(&models_in(folder.path()));
    let add =
        |found: &mut Catalogue, id| found.add(ModelEntry::from_folder(&elsewhere.path().join("x"), Some(id)).unwrap());
    add(&mut found, "added").unwrap();
    add(&mut found, "new").unwrap();
    assert_eq!(add(&mut found, "stays").unwrap_err().status(), Status::InvalidArgument);
    fs::remove_dir_all(at("goes")).unwrap();
    fs::remove_dir_all(at("loaded")).unwrap();
    fs::remove_file(at("stays/model.safetensors")).unwrap();
    model(&at("new"), &llama());
    model(&at("newer"), &llama());
    let scan = || models_in(folder.path()).scan().unwrap();
    found.update(scan(), &[], |id| id == "loaded");
    assert_eq!(ids(&found), ["added", "loaded", "new", "newer", "stays"]);
    rejected(&found, "stays", Status::NotFound, &["model.safetensors"]);
    assert_eq!(found.find("new").unwrap().folder, Some(elsewhere.path().join("x")), "it had the name first");
    found.update(scan(), &["added".into(), "new".into()], |_| false);
    assert_eq!(ids(&found), ["new", "newer", "stays"]);
    assert_eq!(found.find("new").unwrap().folder, Some(at("new")));
}

#[test]
fn a_thousand_folders_are_listed_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let index = json!({ "weight_map": { "a": "model-1.safetensors", "b": "model-2.safetensors" } }).to_string();
    for at in 0..1000 {
        let path = folder.path().join(format!("org{}/model{at}", at % 10));
        write(&path.join("config.json"), &llama().to_string());
        write(&path.join("model.safetensors.index.json"), &index);
        write(&path.join("README.md"), "---\nlicense: mit\n---\n");
        // As long as real ones, and nothing that could be parsed.
        for name in ["model-1.safetensors", "model-2.safetensors"] {
            fs::File::create(path.join(name)).unwrap().set_len(4 << 30).unwrap();
        }
    }
    let started = Instant::now();
    let found = catalogue(&models_in(folder.path()));
    let took = started.elapsed();
    assert_eq!(found.entries().filter(|entry| entry.problem.is_none() && entry.file_bytes == 8 << 30).count(), 1000);
    assert!(took < Duration::from_secs(2), "{took:?}");
}
