//! [`Storage`] on a real folder.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use super::storage::{Access, FolderLock, Listed, Storage, StorageFile};
use crate::cache::rows::PAGE;

/// Backup programs leave folders with this file alone (bford.info/cachedir).
const TAG: &str = "CACHEDIR.TAG";
const TAG_TEXT: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55\n\
    # This folder holds cached keys and values of language models, computed from conversations.\n\
    # It can be deleted while no program uses it.\n";
const LOCK: &str = "lock";

/// A folder of the file system, for its owner alone (mode 0700, files 0600) and kept out of backups.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder at `path`, created if it is not there.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let folder = Self { path };
        // On a disk that cannot be written the cache can still be read.
        if let Err(error) = folder.keep_private() {
            tracing::warn!("cold tier {}: cannot be kept private and out of backups: {error}", folder.place());
        }
        Ok(folder)
    }

    fn keep_private(&self) -> io::Result<()> {
        fs::set_permissions(&self.path, Permissions::from_mode(0o700))?;
        if !self.path(TAG).exists() {
            self.create(TAG, Access::Buffered)?.write_at(0, TAG_TEXT)?;
        }
        #[cfg(target_os = "macos")]
        {
            // What `tmutil addexclusion` writes: a binary property list of one string.
            let name = "com.apple.metadata:com_apple_backup_excludeItem";
            let value = b"bplist00_\x10\x11com.apple.backupd\x08\0\0\0\0\0\0\x01\x01\0\0\0\0\0\0\0\x01\
                \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x1c";
            rustix::fs::setxattr(&self.path, name, value, rustix::fs::XattrFlags::empty())?;
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.path.clone() } else { self.path.join(name) }
    }

    fn opened(&self, name: &str, access: Access, buffered: File) -> Box<dyn StorageFile> {
        let direct = match access {
            Access::Buffered => None,
            Access::Direct => open_direct(&self.path(name)),
        };
        Box::new(OpenFile { buffered, direct, direct_works: AtomicBool::new(true) })
    }
}

/// Opens a file for reading and writing, or for reading alone where it may not be written.
fn open_existing(path: &Path) -> io::Result<File> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            File::open(path).map_err(|_| error)
        }
        outcome => outcome,
    }
}

#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    open(true).or_else(|_| open(false)).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}

impl Storage for Folder {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn lock(&self) -> io::Result<Option<FolderLock>> {
        let path = self.path(LOCK);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = file.or_else(|_| open_existing(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn create(&self, name: &str, access: Access) -> io::Result<Box<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(self.path(name))?;
        Ok(self.opened(name, access, file))
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Box<dyn StorageFile>> {
        Ok(self.opened(name, access, open_existing(&self.path(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for entry in fs::read_dir(self.path(folder))? {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry.file_name().into_string() {
                listed.push(Listed { name, folder: entry.file_type()?.is_dir() });
            }
        }
        Ok(listed)
    }

    fn create_folder(&self, name: &str) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(self.path(name)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            outcome => outcome,
        }
    }

    fn sync_folder(&self, name: &str) -> io::Result<()> {
        File::open(self.path(name))?.sync_all()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(&self.path)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn total_bytes(&self) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(&self.path)?;
        Ok(disk.f_blocks.saturating_mul(disk.f_frsize))
    }
}

#[derive(Debug)]
struct OpenFile {
    buffered: File,
    /// The same file without the page cache, where the file system can.
    direct: Option<File>,
    direct_works: AtomicBool,
}

impl OpenFile {
    /// The file to move `bytes` at `place` with.
    fn direct_for(&self, place: u64, bytes: &[u8]) -> Option<&File> {
        let whole = |number: usize| number.is_multiple_of(PAGE);
        let whole = place.is_multiple_of(PAGE as u64) && whole(bytes.len()) && whole(bytes.as_ptr().addr());
        self.direct.as_ref().filter(|_| whole && self.direct_works.load(Ordering::Relaxed))
    }

    /// Whether a file system took the flag but not the operation; that must not fail because of it.
    fn refused(&self, error: &io::Error) -> bool {
        let refused = error.kind() == ErrorKind::InvalidInput;
        if refused {
            self.direct_works.store(false, Ordering::Relaxed);
        }
        refused
    }
}

impl StorageFile for OpenFile {
    fn read_at(&self, place: u64, out: &mut [u8]) -> io::Result<()> {
        if let Some(file) = self.direct_for(place, out) {
            match file.read_exact_at(out, place) {
                Err(error) if self.refused(&error) => {}
                outcome => return outcome,
            }
        }
        self.buffered.read_exact_at(out, place)
    }

    fn write_at(&self, place: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(file) = self.direct_for(place, bytes) {
            match file.write_all_at(bytes, place) {
                Err(error) if self.refused(&error) => {}
                outcome => return outcome,
            }
        }
        self.buffered.write_all_at(bytes, place)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.buffered.metadata()?.len())
    }

    fn modified(&self) -> io::Result<u64> {
        let modified = self.buffered.metadata()?.modified()?;
        Ok(modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64))
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.buffered.set_len(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.buffered.sync_all()
    }
}
