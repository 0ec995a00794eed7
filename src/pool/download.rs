//! Models that arrive from a hub while the pool is open.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::{EnginePool, State, closed};
use crate::error::{Error, Result};
use crate::hub::{Arrival, Download, DownloadRequest, Tuning};
use crate::sync::lock;

/// Where downloads go by default, and those that may be running.
#[derive(Debug)]
pub(super) struct Downloads {
    /// The pool's folder of models.
    folder: Option<PathBuf>,
    running: Mutex<Vec<Download>>,
}

impl Downloads {
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, running: Mutex::default() }
    }

    /// Cancels all of them.
    pub fn cancel(&self) {
        lock(&self.running).iter().for_each(Download::cancel);
    }

    /// Blocks until all of them are over.
    pub fn wait(&self) {
        let running = std::mem::take(&mut *lock(&self.running));
        for download in running {
            // The outcome is for its owner.
            let _ = download.wait(None);
        }
    }
}

impl EnginePool {
    /// Starts a download into the request's folder, or else the pool's folder of models, and returns at once. A model
    /// that has arrived is in the catalogue, under the repository's name, before its download is over. One that was
    /// loaded goes on as it was until it is unloaded.
    pub fn download(&self, request: DownloadRequest) -> Result<Download> {
        self.download_tuned(request, Tuning::default())
    }

    /// [`download`](Self::download) with other limits.
    pub fn download_tuned(&self, request: DownloadRequest, tuning: Tuning) -> Result<Download> {
        let folder = request.folder.clone().or_else(|| self.downloads.folder.clone());
        let folder = folder.ok_or_else(|| Error::invalid_request("\"folder\" is missing, and the pool has none"))?;
        if folder.join("config.json").is_file() {
            let what = format!("{} is a model, not a folder of models: \"folder\" is missing", folder.display());
            return Err(Error::invalid_request(what));
        }
        let shared = Arc::downgrade(&self.shared);
        // While the pool cannot be closed: what is started is cancelled by a close.
        let guard = lock(&self.shared.state);
        if guard.closed {
            return Err(closed());
        }
        let download = Download::start(request, &folder, tuning, move |arrival| {
            if let Some(shared) = shared.upgrade() {
                list(&shared.state, arrival);
            }
        })?;
        let mut running = lock(&self.downloads.running);
        running.retain(|download| !download.progress().state.is_over());
        running.push(download.clone());
        Ok(download)
    }
}

/// Adds what arrived to the catalogue, if it is a model; single files may be none.
fn list(state: &Mutex<State>, arrival: &Arrival) {
    if !arrival.folder.join("config.json").is_file() {
        return;
    }
    let entry = super::ModelEntry::listed(arrival.id.clone(), &arrival.folder);
    let mut state = lock(state);
    if !arrival.changed && state.catalogue.find(&arrival.id).is_ok() {
        return;
    }
    state.catalogue.put(entry);
    // The text side was read from what was there before.
    if state.engines.get(&arrival.id).is_some_and(|slot| slot.engine.is_none()) {
        state.engines.remove(&arrival.id);
    }
}
