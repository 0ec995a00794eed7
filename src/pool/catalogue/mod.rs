//! The models a pool knows: found in folders or added one by one.

mod entry;
mod files;
mod folders;
mod hub_cache;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use entry::ModelEntry;
pub use folders::ModelFolders;

use super::settings::{KindSetting, ModelSettings, SettingsFile};
use crate::error::{Error, Result};
use crate::models::ModelKind;

/// Models by id, in the order of their ids.
#[derive(Debug, Default)]
pub struct Catalogue {
    models: BTreeMap<String, Listed>,
    /// What models are settled to be used for, known ones and others.
    kinds: BTreeMap<String, ModelKind>,
}

#[derive(Debug)]
struct Listed {
    entry: ModelEntry,
    /// By the host or a download, not by looking into folders.
    added: bool,
}

impl ModelSettings {
    /// What the model is settled to be used for.
    pub(super) fn model_kind(&self) -> Option<ModelKind> {
        self.kind.map(|kind| match kind {
            KindSetting::Llm => ModelKind::Llm,
            KindSetting::Embedding => ModelKind::Embedding,
            KindSetting::Reranker => ModelKind::Reranker,
        })
    }
}

impl Catalogue {
    /// An empty one that uses models as `settings` say.
    pub(super) fn new(settings: &SettingsFile) -> Self {
        let kinds = settings.models().filter_map(|(id, settings)| Some((id.to_owned(), settings.model_kind()?)));
        Self { models: BTreeMap::new(), kinds: kinds.collect() }
    }

    /// Takes over what a scan found: new models come in, those of earlier scans that are gone go out, and so do the `gone`
    /// of those that were added. The `loaded` ones stay as they are.
    pub(super) fn update(&mut self, found: Vec<ModelEntry>, gone: &[String], loaded: impl Fn(&str) -> bool) {
        let mut by_id = BTreeMap::new();
        for entry in found {
            by_id.entry(entry.id.clone()).or_insert(entry);
        }
        self.models
            .retain(|id, listed| loaded(id) || if listed.added { !gone.contains(id) } else { by_id.contains_key(id) });
        for (id, entry) in by_id {
            let added = match self.models.get(&id) {
                Some(_) if loaded(&id) => continue,
                Some(old) if old.added && old.entry.folder != entry.folder => continue,
                old => old.is_some_and(|old| old.added),
            };
            self.insert(entry, added);
        }
    }

    /// Ids and folders of the models that were added.
    pub(super) fn added(&self) -> Vec<(String, PathBuf)> {
        let added = self.models.iter().filter(|(_, listed)| listed.added);
        added.filter_map(|(id, listed)| Some((id.clone(), listed.entry.folder.clone()?))).collect()
    }

    /// Adds a model, in the place of another one with its id.
    pub(super) fn put(&mut self, entry: ModelEntry) {
        self.insert(entry, true);
    }

    fn insert(&mut self, entry: ModelEntry, added: bool) {
        let entry = match self.kinds.get(&entry.id) {
            Some(&kind) => entry.settled(Some(kind)),
            None => entry,
        };
        self.models.insert(entry.id.clone(), Listed { entry, added });
    }

    /// Adds a usable model under an id that is not in use; returns the id.
    pub fn add(&mut self, entry: ModelEntry) -> Result<String> {
        let id = entry.id.clone();
        if id.is_empty() {
            return Err(Error::invalid_argument("a model id must not be empty"));
        }
        let entry = entry.settled(self.kinds.get(&id).copied());
        if let Some(problem) = entry.problem {
            return Err(problem);
        }
        if self.models.contains_key(&id) {
            return Err(Error::invalid_argument(format!("there is a model {id:?} already")));
        }
        self.insert(entry, true);
        Ok(id)
    }

    /// Settles what a model is used for, `None` for what it was made for; whether that is something else than before.
    pub(super) fn settle(&mut self, id: &str, kind: Option<ModelKind>) -> bool {
        match kind {
            Some(kind) => self.kinds.insert(id.to_owned(), kind),
            None => self.kinds.remove(id),
        };
        let Some(listed) = self.models.get_mut(id) else { return false };
        let before = listed.entry.kind;
        listed.entry = listed.entry.clone().settled(kind);
        listed.entry.kind != before
    }

    /// All models.
    pub fn entries(&self) -> impl Iterator<Item = &ModelEntry> {
        self.models.values().map(|listed| &listed.entry)
    }

    /// The model named `id`.
    pub fn find(&self, id: &str) -> Result<&ModelEntry> {
        self.models.get(id).map(|listed| &listed.entry).ok_or_else(|| {
            let known: Vec<_> = self.models.keys().take(20).map(String::as_str).collect();
            Error::not_found(format!("no model {id:?}; known models: {}", known.join(", ")))
        })
    }

    /// The model for requests that name none: the only usable one of this kind, or else the only usable one.
    pub fn only(&self, kind: ModelKind) -> Result<&ModelEntry> {
        let usable = || self.entries().filter(|entry| entry.problem.is_none());
        let mut of_kind = usable().filter(|entry| entry.kind == Some(kind));
        if let (Some(only), None) = (of_kind.next(), of_kind.next()) {
            return Ok(only);
        }
        let mut usable = usable();
        match (usable.next(), usable.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => {
                let mut problems = self.entries().filter_map(|entry| entry.problem.clone());
                match (problems.next(), problems.next()) {
                    (Some(only), None) => Err(only),
                    _ => Err(Error::not_found("the pool has no usable model")),
                }
            }
            (Some(_), Some(_)) => {
                Err(Error::invalid_request("\"model\" is missing, and the pool has more than one model"))
            }
        }
    }
}
