use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use super::*;
use crate::error::Status;

/// A folder of its own under the system's temporary folder, removed at the end.
pub(super) struct TempFolder(PathBuf);

impl TempFolder {
    pub(super) fn new(files: &[(&str, &str)]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("omlx-text-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Self(std::env::temp_dir().join(name));
        for (file, content) in files {
            let path = folder.0.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        std::fs::create_dir_all(&folder.0).unwrap();
        folder
    }

    pub(super) fn load(&self) -> Result<TextModel> {
        TextModel::load(&self.0)
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// The bundled model's folder.
pub(super) fn tiny_chat() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat")
}

fn render(model: &TextModel) -> Result<String> {
    model.templates().render(&ChatInput::new(&json!([{"role": "user", "content": "hi"}])))
}

#[test]
fn the_bundled_model() {
    let model = TextModel::load(&tiny_chat()).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    assert_eq!(model.eos_token_id(), tokenizer.token_id("<|im_end|>"));
    assert_eq!(model.bos_token_id(), None);
    let prompt = render(&model).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    let ids = tokenizer.encode(&prompt, false).unwrap();
    assert_eq!(ids[0], tokenizer.token_id("<|im_start|>").unwrap());
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), prompt);
}

#[test]
fn a_folder_without_text_files_takes_token_ids_only() {
    let model = TempFolder::new(&[]).load().unwrap();
    assert_eq!(model.tokenizer().unwrap_err().status(), Status::Unsupported);
    assert_eq!(render(&model).unwrap_err().status(), Status::Template);
    assert_eq!(model.eos_token_id(), None);
}

#[test]
fn damaged_files_are_named() {
    let damaged = [
        ("tokenizer.json", "{\"model\":"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer_config.json", "{\"eos_token\": \"<e\"\""),
        ("tokenizer_config.json", "{\"chat_template\": 7}"),
        ("tokenizer_config.json", "{\"chat_template\": [{\"name\": \"default\"}]}"),
        ("special_tokens_map.json", "nul"),
        ("chat_template.json", "\u{0}"),
    ];
    for (file, content) in damaged {
        let error = TempFolder::new(&[(file, content)]).load().unwrap_err();
        assert_eq!(error.status(), Status::InvalidModel, "{file} {content}");
        assert!(error.message().contains(file), "{}", error.message());
    }
}

#[test]
fn a_template_file_that_is_not_utf8_is_named() {
    let folder = TempFolder::new(&[]);
    std::fs::write(folder.0.join("chat_template.jinja"), b"\xff").unwrap();
    let error = folder.load().unwrap_err();
    assert_eq!(error.status(), Status::InvalidModel);
    assert!(error.message().contains("chat_template.jinja"));
}

#[test]
fn where_templates_come_from() {
    let config = r#"{"chat_template": "config {{ eos_token }}", "eos_token": {"content": "</s>"}}"#;
    let list = r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}"#;
    let legacy = ("chat_template.json", r#"{"chat_template": "legacy"}"#);
    let file = ("chat_template.jinja", "file");
    let text = |files: &[(&str, &str)]| render(&TempFolder::new(files).load().unwrap()).unwrap();
    assert_eq!(text(&[("tokenizer_config.json", config), legacy]), "config </s>");
    assert_eq!(text(&[("tokenizer_config.json", config), file, legacy]), "file");
    assert_eq!(text(&[legacy]), "legacy");
    assert_eq!(text(&[("tokenizer_config.json", list)]), "d");
    assert_eq!(text(&[("tokenizer_config.json", "{}"), ("special_tokens_map.json", "{}"), file]), "file");

    let named =
        TempFolder::new(&[file, ("additional_chat_templates/rag.jinja", "rag"), ("tokenizer_config.json", list)]);
    let model = named.load().unwrap();
    assert_eq!(model.templates().names().collect::<Vec<_>>(), ["default", "rag"]);
    assert_eq!(render(&model).unwrap(), "file");
}

#[test]
fn the_older_special_tokens_file_wins_unless_the_config_lists_added_tokens() {
    let map = ("special_tokens_map.json", r#"{"eos_token": {"content": "<old>", "lstrip": false}}"#);
    let plain = ("tokenizer_config.json", r#"{"eos_token": "<new>"}"#);
    let listed = ("tokenizer_config.json", r#"{"eos_token": "<new>", "added_tokens_decoder": {}}"#);
    let eos =
        |config| TempFolder::new(&[config, map]).load().unwrap().special_tokens().get("eos_token").unwrap().to_owned();
    assert_eq!(eos(plain), "<old>");
    assert_eq!(eos(listed), "<new>");
}
