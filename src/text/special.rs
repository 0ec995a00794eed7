//! The named special tokens of a model, as `tokenizer_config.json` writes them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;

/// The names every tokenizer may define; transformers passes them to templates.
const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens by name (`bos_token`, `eos_token`, ...), as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    entries: Vec<(String, String)>,
}

impl SpecialTokens {
    /// From the parsed `tokenizer_config.json` and, where that lists no `added_tokens_decoder`, the older
    /// `special_tokens_map.json` of `folder`, which then takes precedence (transformers' `from_pretrained`).
    pub(super) fn load(folder: &Path, config: &Value) -> Result<Self> {
        let mut tokens = Self::default();
        tokens.add_all(config.as_object());
        if config.get("added_tokens_decoder").is_none() {
            let legacy: Option<Value> = super::read_json(folder, "special_tokens_map.json")?;
            tokens.add_all(legacy.as_ref().and_then(Value::as_object));
        }
        Ok(tokens)
    }

    /// The text of the token with this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(key, _)| *key == name).map(|(_, text)| text)
    }

    /// All names with their text.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// Takes the standard names, any other `*_token` and the entries of an `extra_special_tokens` object.
    fn add_all(&mut self, map: Option<&Map<String, Value>>) {
        let Some(map) = map else { return };
        for (name, value) in map {
            if STANDARD.contains(&name.as_str()) || name.ends_with("_token") {
                self.set(name, value);
            }
        }
        if let Some(extra) = map.get("extra_special_tokens").and_then(Value::as_object) {
            extra.iter().for_each(|(name, value)| self.set(name, value));
        }
    }

    /// A token is a string or an `AddedToken` object with its text in `content`; anything else (null, flags) is none.
    fn set(&mut self, name: &str, value: &Value) {
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
        let Some(text) = text else { return };
        match self.entries.iter_mut().find(|(key, _)| key == name) {
            Some(entry) => entry.1 = text.to_owned(),
            None => self.entries.push((name.to_owned(), text.to_owned())),
        }
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(iter: I) -> Self {
        Self { entries: iter.into_iter().map(|(k, v)| (k.into(), v.into())).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_and_custom_names() {
        let config = serde_json::json!({
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": false},
            "eos_token": "</s>", "pad_token": null, "add_bos_token": true, "image_token": "<img>",
            "extra_special_tokens": {"audio": "<aud>"}, "model_max_length": 8
        });
        let tokens = SpecialTokens::load(Path::new("no such folder"), &config).unwrap();
        let all: Vec<_> = tokens.iter().collect();
        let expected = [("bos_token", "<s>"), ("eos_token", "</s>"), ("image_token", "<img>"), ("audio", "<aud>")];
        assert_eq!(all, expected);
        assert_eq!(tokens.get("pad_token"), None);
    }
}
