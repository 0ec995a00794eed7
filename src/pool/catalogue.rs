//! The models a pool knows: found in a folder or added one by one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::ModelConfig;
use crate::engine::ModelSource;
use crate::error::{Error, Result};
use crate::models::{self, ModelKind};

/// One model, usable or not.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    /// Name in requests: the folder's name, or `org/model`.
    pub id: String,
    /// Its folder; `None` for random weights.
    pub folder: Option<PathBuf>,
    /// Architecture, where the config could be read.
    pub model_type: Option<String>,
    /// Tokens of context, where known.
    pub context_length: Option<usize>,
    /// Bytes of its weight files.
    pub file_bytes: u64,
    /// Bits per weight of the default quantisation; `None` for dense weights.
    pub quantization_bits: Option<usize>,
    /// What it is for, where the config could be read.
    pub kind: Option<ModelKind>,
    /// Why it cannot be loaded, if that is already known.
    pub problem: Option<Error>,
    config: Option<ModelConfig>,
}

impl ModelEntry {
    /// Where its weights come from, or why it cannot be loaded.
    pub fn source(&self) -> Result<ModelSource> {
        match (&self.problem, &self.folder, &self.config) {
            (Some(problem), _, _) => Err(problem.clone()),
            (None, Some(folder), _) => Ok(ModelSource::Folder(folder.clone())),
            (None, None, Some(config)) => Ok(ModelSource::Random(config.clone())),
            (None, None, None) => Err(Error::internal("a model without folder and config")),
        }
    }

    /// The model in `folder`, named `id` or like its folder; its config must be readable and of a known type.
    pub fn from_folder(folder: &Path, id: Option<&str>) -> Result<Self> {
        let id = id.map_or_else(|| name(folder), |id| Ok(id.to_owned()))?;
        if !folder.is_dir() {
            return Err(Error::not_found(format!("{}: no such model folder", folder.display())));
        }
        Self::new(id, Some(folder.to_owned()), ModelConfig::load(folder)).usable()
    }

    /// The model in `folder`, usable or not.
    pub(super) fn listed(id: String, folder: PathBuf) -> Self {
        let config = ModelConfig::load(&folder);
        Self::new(id, Some(folder), config)
    }

    /// A model of random weights.
    pub fn random(id: &str, config: ModelConfig) -> Result<Self> {
        Self::new(id.to_owned(), None, Ok(config)).usable()
    }

    fn usable(self) -> Result<Self> {
        match &self.problem {
            Some(problem) => Err(problem.clone()),
            None => Ok(self),
        }
    }

    fn new(id: String, folder: Option<PathBuf>, config: Result<ModelConfig>) -> Self {
        let detect = |config: &ModelConfig| match &folder {
            Some(folder) => ModelKind::detect(folder, config),
            None => ModelKind::Llm,
        };
        let kind = config.as_ref().ok().map(detect);
        let checked = config.and_then(|config| {
            let context = match kind {
                Some(ModelKind::Embedding | ModelKind::Reranker) => models::encoder::max_tokens(&config)?,
                _ => {
                    models::check_supported(&config)?;
                    models::context_length(&config, None)?
                }
            };
            Ok((context, config))
        });
        let file_bytes = folder.as_deref().map_or(0, weight_bytes);
        let (known, problem) = match checked {
            Ok(known) => (Some(known), None),
            Err(problem) => (None, Some(problem)),
        };
        let config = known.as_ref().map(|(_, config)| config);
        Self {
            id,
            model_type: config.map(|c| c.model_type().to_owned()),
            context_length: known.as_ref().map(|(context, _)| *context),
            file_bytes,
            kind,
            quantization_bits: config.and_then(|c| c.quantization()).map(|q| q.default_format().bits),
            problem,
            // Kept only where there is no file to read it from again.
            config: known.map(|(_, config)| config).filter(|_| folder.is_none()),
            folder,
        }
    }
}

/// Bytes of the safetensors files in `folder`; 0 if it cannot be read.
fn weight_bytes(folder: &Path) -> u64 {
    let Ok(files) = std::fs::read_dir(folder) else { return 0 };
    let weights = files.flatten().filter(|file| file.path().extension().is_some_and(|e| e == "safetensors"));
    weights.filter_map(|file| std::fs::metadata(file.path()).ok()).map(|meta| meta.len()).sum()
}

/// Models by id, in the order of their ids.
#[derive(Debug, Default)]
pub struct Catalogue {
    entries: BTreeMap<String, ModelEntry>,
}

impl Catalogue {
    /// The models in `folder`: itself if it holds a `config.json`, else its children and grandchildren that do.
    pub fn scan(folder: &Path) -> Result<Self> {
        let mut catalogue = Self::default();
        if is_model(folder) {
            catalogue.add(ModelEntry::from_folder(folder, None)?)?;
            return Ok(catalogue);
        }
        for child in subfolders(folder)? {
            if is_model(&child) {
                catalogue.list(name(&child), child);
                continue;
            }
            let Ok(grandchildren) = subfolders(&child) else { continue };
            for grandchild in grandchildren.into_iter().filter(|g| is_model(g)) {
                let id = name(&child).and_then(|org| Ok(format!("{org}/{}", name(&grandchild)?)));
                catalogue.list(id, grandchild);
            }
        }
        Ok(catalogue)
    }

    /// Lists a folder that was found, usable or not; without a usable name it is left out.
    fn list(&mut self, id: Result<String>, folder: PathBuf) {
        match id {
            Ok(id) => self.put(ModelEntry::listed(id, folder)),
            Err(error) => tracing::warn!(%error, "a model folder is left out"),
        }
    }

    /// Adds a model, in the place of another one with its id.
    pub(super) fn put(&mut self, entry: ModelEntry) {
        self.entries.insert(entry.id.clone(), entry);
    }

    /// Adds a model under an id that is not in use; returns the id.
    pub fn add(&mut self, entry: ModelEntry) -> Result<String> {
        let id = entry.id.clone();
        if id.is_empty() {
            return Err(Error::invalid_argument("a model id must not be empty"));
        }
        if self.entries.contains_key(&id) {
            return Err(Error::invalid_argument(format!("there is a model {id:?} already")));
        }
        self.entries.insert(id.clone(), entry);
        Ok(id)
    }

    /// All models.
    pub fn entries(&self) -> impl Iterator<Item = &ModelEntry> {
        self.entries.values()
    }

    /// The model named `id`.
    pub fn find(&self, id: &str) -> Result<&ModelEntry> {
        self.entries.get(id).ok_or_else(|| {
            let known: Vec<_> = self.entries.keys().take(20).map(String::as_str).collect();
            Error::not_found(format!("no model {id:?}; known models: {}", known.join(", ")))
        })
    }

    /// The only usable model, for requests that name none.
    pub fn only(&self) -> Result<&ModelEntry> {
        let mut usable = self.entries.values().filter(|entry| entry.problem.is_none());
        match (usable.next(), usable.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => Err(Error::not_found("the pool has no usable model")),
            (Some(_), Some(_)) => {
                Err(Error::invalid_request("\"model\" is missing, and the pool has more than one model"))
            }
        }
    }
}

fn is_model(folder: &Path) -> bool {
    folder.join("config.json").is_file()
}

/// The folder's name in UTF-8, as it is written: links are not followed.
fn name(folder: &Path) -> Result<String> {
    let unusable = || Error::invalid_argument(format!("{}: not a usable folder name", folder.display()));
    match folder.file_name() {
        Some(name) => name.to_str().map(str::to_owned).ok_or_else(unusable),
        // "." and ".." have a name once they are resolved.
        None => {
            let resolved = folder.canonicalize().map_err(|e| Error::io(folder.display(), &e))?;
            resolved.file_name().and_then(|name| name.to_str()).map(str::to_owned).ok_or_else(unusable)
        }
    }
}

/// Folders in `folder`, hidden ones left out, in the order of their names.
fn subfolders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder.display(), &e))?;
    let hidden = |path: &Path| path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let mut folders: Vec<_> = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir() && !hidden(p)).collect();
    folders.sort();
    Ok(folders)
}
