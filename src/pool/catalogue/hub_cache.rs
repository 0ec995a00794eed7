//! The cache that the tools of the Hugging Face hub share.
//!
//! ```text
//! models--org--name/refs/main              the commit that the branch stood at
//! models--org--name/snapshots/COMMIT/FILE  a link into ../../blobs, made when the file was there as a whole
//! ```
//!
//! See <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>.

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::ModelEntry;
use super::files::{Listing, read_start};
use super::folders::name;
use crate::error::{Error, Result};
use crate::hub;

/// Longest content of a ref that is looked at; a commit has 40 digits.
const REF_BYTES: u64 = 256;

/// The models in the cache at `folder`, usable or not; empty is the standard one, which need not exist.
pub fn scan(folder: &Path) -> Result<Vec<ModelEntry>> {
    let folder = if folder.as_os_str().is_empty() {
        match hub::standard_cache().filter(|standard| standard.is_dir()) {
            Some(standard) => standard,
            None => return Ok(Vec::new()),
        }
    } else {
        folder.to_owned()
    };
    let models = Listing::read(&folder)?.folders;
    Ok(models.iter().filter_map(|model| model_in(model)).collect())
}

/// The model of a folder of the cache; `None` if it is for something else.
fn model_in(folder: &Path) -> Option<ModelEntry> {
    let file_name = folder.file_name()?.to_string_lossy();
    let repo = file_name.strip_prefix("models--")?;
    let id = repo.replacen("--", "/", 1);
    let listed = name(folder).utf8().and_then(|_| {
        if id.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(Error::invalid_model(format!("{}: not the name of a repository", folder.display())));
        }
        Listing::read(&snapshot(folder)?)
    });
    Some(match listed {
        Ok(listing) => ModelEntry::from_listing(id, &listing, None),
        Err(error) => ModelEntry::rejected(id, folder, error),
    })
}

/// The snapshot that the main branch means, else the newest one.
fn snapshot(model: &Path) -> Result<PathBuf> {
    let snapshots = model.join("snapshots");
    let main = read_start(&model.join("refs/main"), REF_BYTES).unwrap_or_default();
    let main = String::from_utf8_lossy(&main);
    let main = Path::new(main.trim());
    // A name, not a way: a ref must not lead out of the folder, and neither must a link in the place of a snapshot.
    let is_name = matches!(main.components().collect::<Vec<_>>()[..], [Component::Normal(only)] if only == main);
    if is_name && fs::symlink_metadata(snapshots.join(main)).is_ok_and(|meta| meta.is_dir()) {
        return Ok(snapshots.join(main));
    }
    let items = fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let folders = items.filter_map(|item| {
        let meta = item.metadata().ok().filter(fs::Metadata::is_dir)?;
        Some((meta.modified().ok()?, item.path()))
    });
    let newest = folders.max().map(|(_, path)| path);
    newest.ok_or_else(|| Error::not_found(format!("{}: no snapshot is there", model.display())))
}
