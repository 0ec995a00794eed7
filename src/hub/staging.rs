//! Where a model is put together, and how it gets to its place in one piece.
//!
//! `MODELS/ORG/.NAME.omlx-download/` lies beside `MODELS/ORG/NAME`, on the same file system and hidden, so that no
//! catalogue takes it for a model:
//!
//! - `lock`: held while a download runs, by any process.
//! - `files/`: the model's folder to be. `journals/`: how much of each file is there.
//! - `old/`: the version that is being replaced, where a file system cannot exchange two folders.
//!
//! A finished folder holds a hidden file that says what was downloaded.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with, statvfs};
use serde::{Deserialize, Serialize};

use super::api::RemoteFile;
use super::request::DownloadRequest;
use crate::error::{Error, Result, Status};

/// Attempts to create and lock a staging folder.
const ROUNDS: usize = 16;

/// The hidden file of a finished folder.
pub const MARKER: &str = ".omlx-download.json";

/// What was downloaded into a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    pub repo: String,
    pub commit: String,
    /// What was asked for: `files`, `patterns`, or neither.
    pub files: Option<Vec<String>>,
    pub patterns: Option<Vec<String>>,
    /// What is there.
    pub content: Vec<RemoteFile>,
}

impl Marker {
    /// Reads the marker of a model's folder; `None` if there is none, or none of this repository.
    pub fn read(folder: &Path, repo: &str) -> Option<Self> {
        let text = fs::read(folder.join(MARKER)).ok()?;
        serde_json::from_slice(&text).ok().filter(|marker: &Self| marker.repo == repo)
    }

    /// Whether `folder`, which has this marker, has what `request` wants of this commit.
    pub fn satisfies(&self, request: &DownloadRequest, folder: &Path) -> bool {
        let same = self.files == request.files && self.patterns == request.patterns;
        let listed = |path: &String| self.content.iter().any(|file| file.path == *path);
        let covered = request.files.as_ref().is_some_and(|files| files.iter().all(listed));
        (same || covered) && self.content.iter().all(|file| is_there(folder, file))
    }
}

/// Whether `folder` has a file of the right length.
pub fn is_there(folder: &Path, file: &RemoteFile) -> bool {
    fs::metadata(folder.join(&file.path)).is_ok_and(|meta| meta.is_file() && meta.len() == file.size)
}

/// The staging folder of a model, locked.
pub struct Staging {
    models: PathBuf,
    root: PathBuf,
    target: PathBuf,
    _lock: File,
}

fn at<T>(path: &Path, outcome: std::io::Result<T>) -> Result<T> {
    outcome.map_err(|e| Error::io(path.display(), &e))
}

impl Staging {
    /// Creates and locks it. `Busy` if another download has it.
    pub fn open(models: &Path, request: &DownloadRequest) -> Result<Self> {
        let (org, name) = request.names();
        let parent = org.map_or_else(|| models.to_owned(), |org| models.join(org));
        let root = parent.join(format!(".{name}.omlx-download"));
        let target = parent.join(name);
        let path = root.join("lock");
        // A few rounds: another download that ends removes the folders while this one makes them.
        for _ in 0..ROUNDS {
            let created = fs::create_dir_all(&root)
                .and_then(|()| OpenOptions::new().write(true).create(true).truncate(false).open(&path));
            let lock = match created {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                lock => at(&path, lock)?,
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let what = format!("{}: another download of this model is running", request.repo);
                    return Err(Error::new(Status::Busy, what));
                }
                Err(TryLockError::Error(e)) => return at(&path, Err(e)),
            }
            // A lock on a file that is gone keeps nobody away.
            let (own, current) = (at(&path, lock.metadata())?, fs::metadata(&path));
            if !current.is_ok_and(|current| (current.dev(), current.ino()) == (own.dev(), own.ino())) {
                continue;
            }
            let staging = Self { models: models.to_owned(), root, target, _lock: lock };
            staging.recover()?;
            return Ok(staging);
        }
        Err(Error::new(Status::Io, format!("{}: cannot be created and locked", root.display())))
    }

    /// A crash between the two halves of a replacement left no model: the old one goes back.
    fn recover(&self) -> Result<()> {
        let old = self.root.join("old");
        if old.exists() && !self.target.exists() {
            at(&old, fs::rename(&old, &self.target))?;
        }
        remove_all(&old)
    }

    /// Where the model will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where its files are put together.
    pub fn files(&self) -> PathBuf {
        self.root.join("files")
    }

    /// Where it is noted how far they are.
    pub fn journals(&self) -> PathBuf {
        self.root.join("journals")
    }

    /// Bytes that this user can still write here.
    pub fn free_bytes(&self) -> Result<u64> {
        let stat = statvfs(&self.root).map_err(|e| Error::io(self.root.display(), &e.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Removes what an attempt for other files left in `files`.
    pub fn prune(&self, wanted: &[RemoteFile]) -> Result<()> {
        let files = self.files();
        at(&files, fs::create_dir_all(&files))?;
        let keep = |path: &Path| wanted.iter().any(|file| Path::new(&file.path) == path);
        let (found, folders) = walk(&files)?;
        for path in found {
            if !path.strip_prefix(&files).is_ok_and(keep) {
                at(&path, fs::remove_file(&path))?;
            }
        }
        // From the inside out; only empty ones go.
        for folder in folders[1..].iter().rev() {
            let _ = fs::remove_dir(folder);
        }
        Ok(())
    }

    /// Takes a file over from the version that is installed: a link, no copy, where the file system can.
    pub fn link(&self, path: &str) -> Result<()> {
        let (from, to) = (self.target.join(path), self.files().join(path));
        let parent = to.parent().unwrap_or(&to);
        at(parent, fs::create_dir_all(parent))?;
        if to.exists() {
            at(&to, fs::remove_file(&to))?;
        }
        fs::hard_link(&from, &to).or_else(|_| at(&to, fs::copy(&from, &to).and_then(|_| File::open(&to)?.sync_all())))
    }

    /// Puts the files, all complete and checked, into the model's place at once, an older version out of it, and removes
    /// the staging folder.
    pub fn install(self, marker: &Marker) -> Result<()> {
        self.publish(marker)?;
        if let Err(error) = remove_all(&self.root) {
            tracing::warn!(%error, "a download's folder could not be removed");
        }
        Ok(())
    }

    fn publish(&self, marker: &Marker) -> Result<()> {
        let files = self.files();
        let path = files.join(MARKER);
        let text = serde_json::to_vec_pretty(marker).map_err(|e| Error::internal(format!("marker: {e}")))?;
        at(&path, fs::write(&path, text).and_then(|()| File::open(&path)?.sync_all()))?;
        for folder in walk(&files)?.1 {
            sync_folder(&folder)?;
        }
        // Before the exchange: from then on `files` is the old version, which journals of the new one must not vouch for.
        remove_all(&self.journals())?;
        sync_folder(&self.root)?;
        self.exchange(&files)?;
        sync_folder(self.target.parent().unwrap_or(&self.target))
    }

    fn exchange(&self, files: &Path) -> Result<()> {
        if fs::symlink_metadata(&self.target).is_err() {
            return at(&self.target, fs::rename(files, &self.target));
        }
        if renameat_with(CWD, files, CWD, &self.target, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
        let old = self.root.join("old");
        at(&self.target, fs::rename(&self.target, &old))?;
        at(&self.target, fs::rename(files, &self.target))
    }
}

impl Drop for Staging {
    /// Removes the staging folder unless it holds something to go on with.
    fn drop(&mut self) {
        // Without a journal files are as good as none; so are those of an old version, after a crash.
        if walk(&self.journals()).is_ok_and(|(journals, _)| !journals.is_empty()) {
            return;
        }
        let _ = remove_all(&self.root);
        // The organisation's folder, if there is nothing else in it.
        if let Some(parent) = self.root.parent().filter(|parent| *parent != self.models) {
            let _ = fs::remove_dir(parent);
        }
    }
}

fn remove_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path.display(), &e)),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    at(path, File::open(path).and_then(|folder| folder.sync_all()))
}

/// All files and all folders in `folder`, itself included. Links are files.
fn walk(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    let mut next = 0;
    while next < folders.len() {
        for entry in at(&folders[next], fs::read_dir(&folders[next]))? {
            let entry = at(&folders[next], entry)?;
            let is_folder = at(&folders[next], entry.file_type())?.is_dir();
            if is_folder { folders.push(entry.path()) } else { files.push(entry.path()) }
        }
        next += 1;
    }
    Ok((files, folders))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_version_left_by_a_crash_does_not_pass_for_the_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let request = DownloadRequest::new("org/model").unwrap();
        let install = |content: &str| {
            let staging = Staging::open(folder.path(), &request).unwrap();
            for path in [staging.files(), staging.journals()] {
                fs::create_dir_all(&path).unwrap();
                fs::write(path.join("file"), content).unwrap();
            }
            let repo = request.repo.clone();
            let marker = Marker { repo, commit: content.into(), files: None, patterns: None, content: Vec::new() };
            // The crash comes before anything is removed.
            staging.publish(&marker).unwrap();
            staging
        };
        drop(install("one"));
        let staging = install("two");
        assert_eq!(fs::read(staging.target().join("file")).unwrap(), b"two");
        assert_eq!(Marker::read(staging.target(), "org/model").unwrap().commit, "two");
        assert_eq!(fs::read(staging.files().join("file")).unwrap(), b"one");
        assert!(!staging.journals().exists());
        staging.prune(&[]).unwrap();
        assert!(walk(&staging.files()).unwrap().0.is_empty());
        fs::write(staging.files().join("file"), b"one").unwrap();
        let root = staging.root.clone();
        drop(staging);
        assert!(!root.exists(), "the old version takes no room");
    }

    #[test]
    fn a_folder_is_locked_while_it_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let request = DownloadRequest::new("org/model").unwrap();
        let open = || Staging::open(folder.path(), &request);
        let first = open().unwrap();
        assert_eq!(open().err().map(|error| error.status()), Some(Status::Busy));
        fs::remove_dir_all(&first.root).unwrap();
        // The lock was on a file that is gone.
        let second = open().unwrap();
        assert_eq!(open().err().map(|error| error.status()), Some(Status::Busy));
        fs::create_dir(second.journals()).unwrap();
        fs::write(second.journals().join("part"), "").unwrap();
        drop((first, second));
        let third = open().unwrap();
        fs::remove_file(third.journals().join("part")).unwrap();
        drop(third);
        assert!(!folder.path().join("org").exists(), "nothing to go on with");
    }
}
