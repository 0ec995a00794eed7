//! Where models lie on disk.

use std::path::{Path, PathBuf};

use super::ModelEntry;
use super::files::Listing;
use super::hub_cache;
use crate::error::{Error, Result};

/// The folders that a pool looks for models in.
#[derive(Debug, Default)]
pub struct ModelFolders {
    /// A folder of model folders, or one model folder.
    pub models: Option<PathBuf>,
    /// A cache of the Hugging Face hub; empty is the standard one, which need not exist.
    pub hub_cache: Option<PathBuf>,
}

impl ModelFolders {
    /// What is there, usable or not. Of two with one id the first counts: the hub's cache comes last.
    pub fn scan(&self) -> Result<Vec<ModelEntry>> {
        let mut found = match &self.models {
            Some(folder) => scan(folder)?,
            None => Vec::new(),
        };
        if let Some(cache) = &self.hub_cache {
            found.extend(hub_cache::scan(cache)?);
        }
        Ok(found)
    }
}

/// The models in `folder`: itself if it holds a `config.json`, else its children and grandchildren that do; and what only
/// looks like one.
fn scan(folder: &Path) -> Result<Vec<ModelEntry>> {
    let top = Listing::read(folder)?;
    if top.has_config() {
        return Ok(vec![entry(name(folder), &top)]);
    }
    let mut found = Vec::new();
    for child in &top.folders {
        let Some(listing) = listed(child) else { continue };
        let org = name(child);
        if listing.has_config() {
            found.push(entry(org, &listing));
            continue;
        }
        let grandchildren = listing.folders.iter().filter_map(|grandchild| listed(grandchild));
        for grandchild in grandchildren.filter(|g| g.has_config() || g.has_weights()) {
            found.push(entry(org.join(name(&grandchild.folder)), &grandchild));
        }
        if listing.has_weights() {
            found.push(entry(org, &listing));
        }
    }
    if found.is_empty() && top.has_weights() {
        found.push(entry(name(folder), &top));
    }
    Ok(found)
}

fn listed(folder: &Path) -> Option<Listing> {
    Listing::read(folder).inspect_err(|error| tracing::warn!(%error, "a folder is left out")).ok()
}

fn entry(name: Name, listing: &Listing) -> ModelEntry {
    ModelEntry::from_listing(name.text, listing, name.problem)
}

/// A folder's name as an id.
pub struct Name {
    text: String,
    problem: Option<Error>,
}

impl Name {
    /// It, if it is exactly the folder's.
    pub fn utf8(self) -> Result<String> {
        match self.problem {
            None => Ok(self.text),
            Some(problem) => Err(Error::invalid_argument(problem.message())),
        }
    }

    fn join(&self, name: Name) -> Name {
        Name { text: format!("{}/{}", self.text, name.text), problem: self.problem.clone().or(name.problem) }
    }
}

/// The name of `folder` as it is written: links are not followed.
pub fn name(folder: &Path) -> Name {
    // "." and ".." have a name once they are resolved.
    let resolved = if folder.file_name().is_none() { folder.canonicalize().ok() } else { None };
    let name = resolved.as_deref().unwrap_or(folder).file_name().unwrap_or_default();
    let problem = match name.to_str() {
        Some(name) if !name.is_empty() => None,
        Some(_) => Some(Error::invalid_model(format!("{}: the folder has no name", folder.display()))),
        None => Some(Error::invalid_model(format!("{}: the folder's name is not UTF-8", folder.display()))),
    };
    Name { text: name.to_string_lossy().into_owned(), problem }
}
