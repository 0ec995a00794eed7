//! What a host has settled about models: kept in one file, which is replaced as a whole. Pure.
//!
//! ```json
//! { "version": 1, "models": { "org/name": { "alias": "chat", "pinned": true, "defaults": { "temperature": 0.7 } } } }
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::engine::Request;
use crate::error::{Error, Result, Status};

/// Of the file.
const VERSION: u64 = 1;

/// Seconds that a model may stay without requests at most: far from where times overflow.
const MAX_TTL: f64 = 1e9;

/// What a model is used for, whatever its files say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KindSetting {
    /// It continues texts.
    Llm,
    /// It gives vectors of texts.
    Embedding,
    /// It gives scores of pairs of texts.
    Reranker,
}

/// What is settled about one model; `Default` is nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// Another name for it in requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// It is unloaded when the host says so, and not before.
    #[serde(skip_serializing_if = "is_false")]
    pub pinned: bool,
    /// It is loaded when this is set, and when a pool with these settings opens.
    #[serde(skip_serializing_if = "is_false")]
    pub preload: bool,
    /// Seconds that it stays without requests; below 0: until its memory is needed; else as the pool's options say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<f64>,
    /// Tokens of a prompt and its answer at most, where that is less than the model can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<usize>,
    /// What it is used for, where its files tell something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<KindSetting>,
    /// For requests that do not say, written as in a request: "temperature", "max_tokens", "chat_template_kwargs", …
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub defaults: Map<String, Value>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// How long a model stays without requests: `None` is until its memory is needed.
pub type Ttl = Option<Duration>;

impl ModelSettings {
    /// The settings that `json` describes, checked.
    pub fn from_json(json: Value) -> Result<Self> {
        let settings: Self =
            serde_json::from_value(json).map_err(|e| Error::invalid_argument(format!("settings: {e}")))?;
        if settings.ttl_seconds.is_some_and(|seconds| seconds > MAX_TTL) {
            return Err(Error::invalid_argument("\"ttl_seconds\" is too large"));
        }
        if settings.context_length == Some(0) {
            return Err(Error::invalid_argument("\"context_length\" is 0"));
        }
        if settings.alias.as_ref().is_some_and(String::is_empty) {
            return Err(Error::invalid_argument("\"alias\" is empty"));
        }
        settings.request()?;
        Ok(settings)
    }

    /// The same with the changes of `patch`, a JSON object: a key with null goes back to its default (RFC 7396).
    pub fn patched(&self, patch: &Value) -> Result<Self> {
        if !patch.is_object() {
            return Err(Error::invalid_argument("settings are a JSON object"));
        }
        let mut json = self.to_json()?;
        merge(&mut json, patch);
        Self::from_json(json)
    }

    /// What differs from the defaults, as a JSON object.
    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|e| Error::internal(format!("settings: {e}")))
    }

    /// The defaults, as a request that says nothing else.
    pub fn request(&self) -> Result<Request> {
        Request::defaults(&self.defaults).map_err(|e| Error::invalid_argument(e.message()).context("\"defaults\""))
    }

    /// How long the model stays without requests, `default` if nothing is settled.
    pub fn ttl(&self, default: Ttl) -> Ttl {
        match self.ttl_seconds {
            None => default,
            Some(seconds) if seconds < 0.0 => None,
            Some(seconds) => Some(Duration::from_secs_f64(seconds)),
        }
    }
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let Some(object) = target.as_object_mut() else { return };
    for (key, change) in changes {
        match change {
            Value::Null => drop(object.remove(key)),
            change => merge(object.entry(key.clone()).or_insert(Value::Null), change),
        }
    }
}

/// The settings of all models, and the file that keeps them.
#[derive(Debug, Default)]
pub struct SettingsFile {
    path: Option<PathBuf>,
    models: BTreeMap<String, ModelSettings>,
    /// Entries that this version does not understand: they are kept as they are.
    foreign: BTreeMap<String, Value>,
}

impl SettingsFile {
    /// Reads `path`, which need not exist yet; without one, settings last as long as the pool.
    pub fn open(path: Option<PathBuf>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self::default()) };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { path: Some(path), ..Self::default() });
            }
            Err(error) => return Err(Error::io(path.display(), &error)),
        };
        let damaged = |what: &str| Error::new(Status::Io, format!("{}: {what}", path.display()));
        let file: Value = serde_json::from_slice(&bytes).map_err(|e| damaged(&format!("not a settings file: {e}")))?;
        if file["version"] != VERSION {
            return Err(damaged(&format!("settings of version {}; this library knows {VERSION}", file["version"])));
        }
        let entries = file["models"].as_object().ok_or_else(|| damaged("\"models\" is not an object"))?;
        let mut settings = Self { path: Some(path.clone()), ..Self::default() };
        for (id, entry) in entries {
            match ModelSettings::from_json(entry.clone()) {
                Ok(model) => drop(settings.models.insert(id.clone(), model)),
                Err(error) => {
                    tracing::warn!(model = id, %error, "settings that are not understood");
                    settings.foreign.insert(id.clone(), entry.clone());
                }
            }
        }
        Ok(settings)
    }

    /// What is settled about model `id`.
    pub fn get(&self, id: &str) -> ModelSettings {
        self.models.get(id).cloned().unwrap_or_default()
    }

    /// All models about which something is settled.
    pub fn models(&self) -> impl Iterator<Item = (&str, &ModelSettings)> {
        self.models.iter().map(|(id, settings)| (id.as_str(), settings))
    }

    /// The model that `alias` stands for.
    pub fn aliased(&self, alias: &str) -> Option<&str> {
        self.models().find(|(_, settings)| settings.alias.as_deref() == Some(alias)).map(|(id, _)| id)
    }

    /// Settles something about model `id`. The file has it when this returns; if it cannot be written, nothing changes.
    pub fn set(&mut self, id: &str, settings: ModelSettings) -> Result<()> {
        if let Some(other) =
            settings.alias.as_deref().and_then(|alias| self.aliased(alias)).filter(|&other| other != id)
        {
            return Err(Error::invalid_argument(format!("{:?} stands for model {other:?} already", settings.alias)));
        }
        let mut models = self.models.clone();
        if settings == ModelSettings::default() {
            models.remove(id);
        } else {
            models.insert(id.to_owned(), settings);
        }
        if let Some(path) = &self.path {
            let mut entries = self.foreign.clone();
            entries.remove(id);
            for (id, model) in &models {
                entries.insert(id.clone(), model.to_json()?);
            }
            let text = format!("{:#}\n", json!({ "version": VERSION, "models": entries }));
            replace(path, text.as_bytes()).map_err(|error| Error::io(path.display(), &error))?;
        }
        self.foreign.remove(id);
        self.models = models;
        Ok(())
    }
}

/// Puts `bytes` into the place of `path` at once: whoever reads finds the old file or the new one.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = folder.join(name);
    let mut file = File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The new name has to last, too.
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/settings.json");
        let open = || SettingsFile::open(Some(path.clone()));
        let mut file = open().unwrap();
        assert_eq!(file.get("a"), ModelSettings::default());
        let patch = json!({ "alias": "chat", "pinned": true, "ttl_seconds": 60, "defaults": { "temperature": 0.5 } });
        let settings = file.get("a").patched(&patch).unwrap();
        file.set("a", settings.clone()).unwrap();
        let mut file = open().unwrap();
        assert_eq!((file.get("a"), file.aliased("chat")), (settings.clone(), Some("a")));
        let again = settings.patched(&json!({ "alias": null, "defaults": { "top_p": 0.9 } })).unwrap();
        assert_eq!((again.alias.as_ref(), again.pinned), (None, true));
        assert_eq!(Value::Object(again.defaults.clone()), json!({ "temperature": 0.5, "top_p": 0.9 }));
        // Two models of one name.
        assert!(file.set("b", settings).is_err());
        file.set("a", ModelSettings::default()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&fs::read(&path).unwrap()).unwrap()["models"], json!({}));
    }

    #[test]
    fn a_kind_is_written_as_it_is_read() {
        let settle = |kind: Value| ModelSettings::default().patched(&json!({ "kind": kind }));
        for (name, kind) in
            [("llm", KindSetting::Llm), ("embedding", KindSetting::Embedding), ("reranker", KindSetting::Reranker)]
        {
            let settings = settle(json!(name)).unwrap();
            assert_eq!((settings.kind, settings.to_json().unwrap()), (Some(kind), json!({ "kind": name })));
        }
        assert_eq!(settle(Value::Null).unwrap(), ModelSettings::default());
        for bad in [json!("vision"), json!("LLM"), json!(1)] {
            assert_eq!(settle(bad).unwrap_err().status(), Status::InvalidArgument);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let settings = ModelSettings::default();
        for bad in [
            json!(3),
            json!({ "pined": true }),
            json!({ "ttl_seconds": 1e300 }),
            json!({ "context_length": 0 }),
            json!({ "alias": "" }),
            json!({ "defaults": { "temperature": -1 } }),
            json!({ "defaults": { "messages": [] } }),
        ] {
            let error = settings.patched(&bad).unwrap_err();
            assert_eq!(error.status(), Status::InvalidArgument, "{bad}");
        }
        assert_eq!(settings.patched(&json!({ "ttl_seconds": -1 })).unwrap().ttl(Some(Duration::ZERO)), None);
        assert_eq!(settings.ttl(Some(Duration::ZERO)), Some(Duration::ZERO));
    }

    #[test]
    fn files_of_others_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.json");
        let open = || SettingsFile::open(Some(path.clone()));
        for bad in ["", "[]", "{\"version\": 2, \"models\": {}}", "{\"version\": 1}"] {
            fs::write(&path, bad).unwrap();
            assert_eq!(open().unwrap_err().status(), Status::Io, "{bad}");
        }
        // An entry of a later version survives changes of others.
        let later = json!({ "version": 1, "models": { "a": { "pinned": true }, "b": { "mood": "good" } } });
        fs::write(&path, later.to_string()).unwrap();
        let mut file = open().unwrap();
        file.set("a", ModelSettings::default()).unwrap();
        let left: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(left["models"], json!({ "b": { "mood": "good" } }));
        // What cannot be written does not happen.
        fs::create_dir(folder.path().join("settings.json.new")).unwrap();
        let pinned = ModelSettings { pinned: true, ..ModelSettings::default() };
        assert!(file.set("a", pinned).is_err());
        assert!(!file.get("a").pinned);
    }
}
