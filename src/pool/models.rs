//! Which models a pool has, and what is settled about them.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::{EnginePool, ModelEntry, ModelSettings, State, closed};
use crate::config::ModelConfig;
use crate::engine::LoadedInfo;
use crate::error::{Error, Result};
use crate::sync::lock;

/// A model of a pool.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// What its folder tells.
    pub entry: ModelEntry,
    /// Another name for it in requests.
    pub alias: Option<String>,
    /// What is known of it once it is loaded.
    pub loaded: Option<LoadedInfo>,
}

impl EnginePool {
    /// Adds the model in `folder` under `id`, by default the folder's name; returns the id.
    pub fn add_model(&self, folder: &Path, id: Option<&str>) -> Result<String> {
        // Read before locking: a slow disk must not hold up `generate`.
        let entry = ModelEntry::from_folder(folder, id)?;
        lock(&self.shared.state).catalogue.add(entry)
    }

    /// Adds a model with random weights of `config`, for benchmarks.
    pub fn add_random_model(&self, id: &str, config: ModelConfig) -> Result<()> {
        lock(&self.shared.state).catalogue.add(ModelEntry::random(id, config)).map(|_| ())
    }

    /// All models with what is known of them.
    pub fn models(&self) -> Vec<ModelInfo> {
        let state = lock(&self.shared.state);
        let loaded = |id: &str| state.engines.get(id)?.engine.as_ref()?.loaded();
        let info = |entry: &ModelEntry| ModelInfo {
            alias: state.settings.get(&entry.id).alias,
            loaded: loaded(&entry.id),
            entry: entry.clone(),
        };
        state.catalogue.entries().map(info).collect()
    }

    /// Looks into the pool's folders again: models that are new or have changed come in, those that are gone go out. Those
    /// that are loaded stay as they are. If a folder cannot be read, nothing changes. Blocks while the folders are read.
    pub fn rescan(&self) -> Result<()> {
        let folders = lock(&self.folders);
        // Read before locking, as above.
        let added = {
            let state = lock(&self.shared.state);
            if state.closed {
                return Err(closed());
            }
            state.catalogue.added()
        };
        let gone: Vec<_> = added.into_iter().filter(|(_, folder)| !folder.is_dir()).map(|(id, _)| id).collect();
        let found = folders.scan()?;
        let mut state = lock(&self.shared.state);
        let State { catalogue, engines, .. } = &mut *state;
        // The text side was read from what was there before.
        engines.retain(|_, slot| slot.engine.is_some());
        catalogue.update(found, &gone, |id| engines.contains_key(id));
        Ok(())
    }

    /// Changes what is settled about a model, by a JSON object (RFC 7396): see [`ModelSettings`]. It holds from the next
    /// request on, and is in the settings file when this returns.
    pub fn configure(&self, id: &str, patch: &Value) -> Result<()> {
        let mut state = lock(&self.shared.state);
        let id = self.resolve_id(&state, Some(id))?;
        let settings = state.settings.get(&id).patched(patch)?;
        let defaults = Arc::new(settings.request()?);
        if let Some(alias) = settings.alias.as_deref().filter(|&alias| state.catalogue.find(alias).is_ok()) {
            return Err(Error::invalid_argument(format!("{alias:?} is the id of a model")));
        }
        let kind = settings.model_kind();
        let preloads = settings.preload && !state.settings.get(&id).preload;
        state.settings.set(&id, settings)?;
        if state.catalogue.settle(&id, kind) {
            // What runs ends the requests it has; later ones go to an engine of the other kind.
            let engine = state.engines.remove(&id).and_then(|slot| slot.engine);
            state.draining.extend(engine);
        } else if let Some(slot) = state.engines.get_mut(&id) {
            slot.defaults = defaults;
        }
        if preloads {
            self.load_ahead(&mut state, &id);
        }
        // A shorter time may be up.
        let _ = self.wake.try_send(());
        Ok(())
    }

    /// What is settled about a model.
    pub fn settings(&self, id: &str) -> Result<ModelSettings> {
        let state = lock(&self.shared.state);
        let id = self.resolve_id(&state, Some(id))?;
        Ok(state.settings.get(&id))
    }
}
