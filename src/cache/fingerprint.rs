//! What cached rows depend on, as one BLAKE3 key: files by their whole content, and everything else as bytes.
//!
//! Reading gigabytes of weights takes seconds, so that hashes of files are remembered: by device, inode, size and both
//! times. The time of the last change of the inode is among them because no call sets it: it is the clock's.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result, Status};

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// A file that was changed this shortly before it is read is not remembered (git calls it racy): a change while it is read
/// may carry the same time, as the clocks of file systems tick slowly.
const RECENT: Duration = Duration::from_secs(2);

/// How often a file that changes while it is read is read again.
const ATTEMPTS: usize = 3;

/// Everything that rows depend on.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Files, in a fixed order. Their names count, but not their folder.
    pub files: Vec<PathBuf>,
    /// Everything else, by name.
    pub parts: Vec<(&'static str, Vec<u8>)>,
}

/// Remembers hashes of files between processes.
pub trait HashMemory {
    /// The hash that was remembered.
    fn get(&self, key: &[u8]) -> Option<[u8; 32]>;

    /// Remembers a hash.
    fn set(&self, key: &[u8], hash: [u8; 32]);
}

/// The key of an identity. Two identities have the same one only if everything agrees.
///
/// Reads files that `memory` does not know, on this thread alone. `Cancelled` once `interrupted` is true.
pub fn fingerprint(identity: &Identity, memory: &dyn HashMemory, interrupted: &dyn Fn() -> bool) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    // Framed, so that no two identities become the same bytes.
    let mut add = |kind: u8, name: &[u8], content: &[u8]| {
        hasher.update(&[kind]);
        for bytes in [name, content] {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
    };
    for (name, bytes) in &identity.parts {
        add(0, name.as_bytes(), bytes);
    }
    for path in &identity.files {
        let name = path.file_name().ok_or_else(|| Error::internal("a file without a name"))?;
        add(1, name.as_encoded_bytes(), &file_hash(path, memory, interrupted)?);
    }
    Ok(*hasher.finalize().as_bytes())
}

/// What tells of each file whether it was changed since: its place, its size and both times.
pub fn stamps(files: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    let stamp = |path: &PathBuf| fs::metadata(path).map(|metadata| key(&metadata));
    files.iter().map(|path| stamp(path).map_err(|e| Error::io(path.display(), &e))).collect()
}

/// The hash of a file's content, remembered or computed.
fn file_hash(path: &Path, memory: &dyn HashMemory, interrupted: &dyn Fn() -> bool) -> Result<[u8; 32]> {
    let io = |error: std::io::Error| Error::io(path.display(), &error);
    for _ in 0..ATTEMPTS {
        // The time before reading: what is changed later, however long it takes, has a later time.
        let now = SystemTime::now();
        let before = fs::metadata(path).map_err(io)?;
        if !before.is_file() {
            // Opening a pipe would wait for its other end.
            return Err(Error::new(Status::Io, format!("{}: not a file", path.display())));
        }
        let before_key = key(&before);
        if let Some(hash) = memory.get(&before_key) {
            return Ok(hash);
        }
        // No more than it had: one that grows would have no end.
        let file = File::open(path).map_err(io)?.take(before.len());
        let hash = content_hash(file, interrupted).map_err(|error| error.context(path.display()))?;
        // By the path, which may lead to another file by now.
        if key(&fs::metadata(path).map_err(io)?) == before_key {
            if !is_recent(&before, now) {
                memory.set(&before_key, hash);
            }
            return Ok(hash);
        }
    }
    Err(Error::new(Status::Io, format!("{}: it changes while it is read", path.display())))
}

fn content_hash(mut file: impl Read, interrupted: &dyn Fn() -> bool) -> Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE];
    loop {
        if interrupted() {
            return Err(Error::new(Status::Cancelled, "nobody waits for its hash any more"));
        }
        match file.read(&mut piece) {
            Ok(0) => return Ok(*hasher.finalize().as_bytes()),
            Ok(count) => drop(hasher.update(&piece[..count])),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("reading", &error)),
        }
    }
}

/// What a file is remembered by.
fn key(metadata: &Metadata) -> Vec<u8> {
    let times = [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()];
    let place = [metadata.dev(), metadata.ino(), metadata.len()];
    place.into_iter().chain(times.map(|time| time as u64)).flat_map(u64::to_le_bytes).collect()
}

/// Whether a file was changed shortly before `now`. The time of modification does not matter: anybody can set it.
fn is_recent(metadata: &Metadata, now: SystemTime) -> bool {
    let changed = Duration::new(metadata.ctime().max(0) as u64, metadata.ctime_nsec() as u32);
    let age = SystemTime::UNIX_EPOCH.checked_add(changed).and_then(|changed| now.duration_since(changed).ok());
    // A time of the future is no time to rely on.
    age.is_none_or(|age| age <= RECENT)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;

    use super::*;

    #[derive(Default)]
    struct Memory {
        hashes: RefCell<HashMap<Vec<u8>, [u8; 32]>>,
        /// How often a file was found.
        known: Cell<usize>,
    }

    impl HashMemory for Memory {
        fn get(&self, key: &[u8]) -> Option<[u8; 32]> {
            let hash = self.hashes.borrow().get(key).copied();
            self.known.set(self.known.get() + usize::from(hash.is_some()));
            hash
        }

        fn set(&self, key: &[u8], hash: [u8; 32]) {
            self.hashes.borrow_mut().insert(key.to_vec(), hash);
        }
    }

    fn of(memory: &Memory, files: &[PathBuf], parts: &[(&'static str, &str)]) -> [u8; 32] {
        let parts = parts.iter().map(|&(name, bytes)| (name, bytes.as_bytes().to_vec())).collect();
        fingerprint(&Identity { files: files.to_vec(), parts }, memory, &|| false).unwrap()
    }

    #[test]
    fn everything_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str, bytes: &[u8]| fs::write(path(name), bytes).unwrap();
        write("a", &[7; 3_000_000]);
        write("b", b"second");
        let (memory, parts) = (Memory::default(), [("config", "{}"), ("dtype", "f32")]);
        let files = [path("a"), path("b")];
        let first = of(&memory, &files, &parts);
        assert_eq!(of(&memory, &files, &parts), first);
        let mut others = vec![
            of(&memory, &files, &[("config", "{}"), ("dtype", "bf16")]),
            of(&memory, &files, &[("config", "{}")]),
            of(&memory, &files, &[("config", "{}d"), ("type", "f32")]),
            of(&memory, &files, &[("dtype", "f32"), ("config", "{}")]),
            of(&memory, &files[..1], &parts),
        ];
        let mut weights = vec![7; 3_000_000];
        weights[2_999_999] ^= 1;
        write("a", &weights);
        others.push(of(&memory, &files, &parts));
        write("a", &[7; 3_000_000]);
        assert_eq!(of(&memory, &files, &parts), first, "the same content again");
        fs::rename(path("b"), path("c")).unwrap();
        others.push(of(&memory, &[path("a"), path("c")], &parts));
        write("a", b"second");
        write("b", &[7; 3_000_000]);
        others.push(of(&memory, &files, &parts));
        write("x", b"second");
        others.push(of(&memory, &[path("x"), path("b")], &parts));
        others.push(first);
        let count = others.len();
        others.sort_unstable();
        others.dedup();
        assert_eq!(others.len(), count, "two identities have the same key");
    }

    #[test]
    fn hashes_are_remembered_until_a_file_changes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = [file.path().to_owned()];
        fs::write(&path[0], b"weights").unwrap();
        let memory = Memory::default();
        let first = of(&memory, &path, &[]);
        assert!(memory.hashes.borrow().is_empty(), "a file that was just written may change within the same tick");
        std::thread::sleep(RECENT + Duration::from_millis(100));
        assert_eq!((of(&memory, &path, &[]), memory.known.get()), (first, 0));
        assert_eq!((of(&memory, &path, &[]), memory.known.get()), (first, 1));
        // Another content of the same length with the old time of modification.
        let time = fs::metadata(&path[0]).unwrap().modified().unwrap();
        fs::write(&path[0], b"Weights").unwrap();
        fs::File::options().write(true).open(&path[0]).unwrap().set_modified(time).unwrap();
        assert_eq!(fs::metadata(&path[0]).unwrap().modified().unwrap(), time);
        assert_ne!(of(&memory, &path, &[]), first);
        assert_eq!(memory.known.get(), 1);
    }

    #[test]
    fn reading_can_be_interrupted_and_can_fail() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![1; 5 * PIECE]).unwrap();
        let asked = Cell::new(0);
        let interrupted = || asked.replace(asked.get() + 1) == 2;
        let identity = Identity { files: vec![file.path().to_owned()], parts: Vec::new() };
        let error = fingerprint(&identity, &Memory::default(), &interrupted).unwrap_err();
        assert_eq!((error.status(), asked.get()), (Status::Cancelled, 3));
        let missing = Identity { files: vec![file.path().join("missing")], parts: Vec::new() };
        assert!(fingerprint(&missing, &Memory::default(), &|| false).unwrap_err().message().contains("missing"));
    }

    /// What happens when the content is read: `change` gets how often it was asked before.
    fn changed_by(path: &Path, memory: &Memory, change: impl Fn(usize)) -> Result<[u8; 32]> {
        let asked = Cell::new(0);
        let identity = Identity { files: vec![path.to_owned()], parts: Vec::new() };
        fingerprint(&identity, memory, &|| {
            change(asked.replace(asked.get() + 1));
            false
        })
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("weights"), folder.path().join("other"));
        let written = |change: &dyn Fn(usize)| {
            fs::write(&path, vec![1; 2 * PIECE]).unwrap();
            changed_by(&path, &Memory::default(), change)
        };
        let is_now = || of(&Memory::default(), std::slice::from_ref(&path), &[]);
        // Another length too, as the clock may not have gone on.
        let once = |asked| {
            if asked == 1 {
                fs::write(&path, vec![2; 2 * PIECE - 1]).unwrap();
            }
        };
        assert_eq!(written(&once).unwrap(), is_now());
        // Another file in its place.
        fs::write(&other, vec![3; 2 * PIECE]).unwrap();
        let replaced = |asked| {
            if asked == 1 {
                fs::rename(&other, &path).unwrap();
            }
        };
        assert_eq!(written(&replaced).unwrap(), is_now());
        // Every time.
        let always = |asked: usize| fs::write(&path, vec![0; PIECE - asked]).unwrap();
        let error = written(&always).unwrap_err();
        assert!(error.status() == Status::Io && error.message().contains("changes while"), "{error}");
        let removed = |asked| {
            if asked == 1 {
                fs::remove_file(&path).unwrap();
            }
        };
        assert_eq!(written(&removed).unwrap_err().status(), Status::NotFound);
    }

    #[test]
    fn how_long_reading_takes_does_not_make_a_file_old() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"weights").unwrap();
        let memory = Memory::default();
        let pause = RECENT + Duration::from_millis(100);
        let slow = |asked| {
            if asked == 0 {
                std::thread::sleep(pause);
            }
        };
        changed_by(file.path(), &memory, slow).unwrap();
        assert!(memory.hashes.borrow().is_empty(), "it was read in the moment of its change");
        changed_by(file.path(), &memory, |_| {}).unwrap();
        assert_eq!(memory.hashes.borrow().len(), 1, "by now it is old enough");
    }

    #[test]
    fn ages_are_not_those_of_whole_seconds() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = fs::metadata(file.path()).unwrap();
        let changed = Duration::new(metadata.ctime() as u64, metadata.ctime_nsec() as u32);
        let recent = |age: Duration| is_recent(&metadata, SystemTime::UNIX_EPOCH + changed + age);
        assert!(recent(Duration::ZERO) && recent(RECENT));
        assert!(!recent(RECENT + Duration::from_nanos(1)));
        assert!(is_recent(&metadata, SystemTime::UNIX_EPOCH), "changed in the future");
    }

    #[test]
    fn stamps_tell_changes() {
        let folder = tempfile::tempdir().unwrap();
        let files = [folder.path().join("a"), folder.path().join("b")];
        files.iter().for_each(|path| fs::write(path, b"weights").unwrap());
        let first = stamps(&files).unwrap();
        assert_eq!(stamps(&files).unwrap(), first);
        fs::write(&files[1], b"longer weights").unwrap();
        let second = stamps(&files).unwrap();
        assert!(second[0] == first[0] && second[1] != first[1]);
        fs::remove_file(&files[0]).unwrap();
        assert_eq!(stamps(&files).unwrap_err().status(), Status::NotFound);
    }

    #[test]
    fn only_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let error = changed_by(folder.path(), &Memory::default(), |_| {}).unwrap_err();
        assert!(error.message().contains("not a file"), "{error}");
    }
}
