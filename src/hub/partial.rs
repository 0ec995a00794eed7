//! A file that is being fetched, in blocks and by several connections, and what of it is there already.
//!
//! Beside the file lies its journal, a text: a first line that says of what content the file is to be, then the number
//! of each block that has been written, and `checked` when the whole file had the right checksum and is on the disk.
//! The journal is not synchronised with the data: after a loss of power blocks may be wrong that it lists, and the
//! checksum finds that. A journal of other content, or without its end, is as good as none.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::api::RemoteFile;
use super::checksum::Checksum;
use crate::error::{Error, Result};
use crate::sync::lock;

const CHECKED: &str = "checked";

/// A file in the staging folder.
pub struct Partial {
    path: PathBuf,
    journal_path: PathBuf,
    header: String,
    size: u64,
    block: u64,
    data: File,
    journal: Mutex<File>,
}

/// What an earlier attempt left of a file.
pub enum Found {
    /// All of it, checked.
    Checked,
    /// Some blocks; `true` for those that are there.
    Blocks(Vec<bool>),
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|e| Error::io(parent.display(), &e))
}

fn header(file: &RemoteFile, block: u64) -> String {
    format!("omlx 1 {} {} {block}", file.checksum, file.size)
}

/// Where the data and the journal of a file are.
fn paths(file: &RemoteFile, files: &Path, journals: &Path) -> (PathBuf, PathBuf) {
    (files.join(&file.path), journals.join(format!("{}.journal", file.path)))
}

/// What there is of a file, and how many bytes of its journal say so.
fn find(file: &RemoteFile, files: &Path, journals: &Path, block: u64) -> Option<(Found, usize)> {
    let (path, journal) = paths(file, files, journals);
    let usable = fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == file.size);
    // Without a checksum nobody could tell whether it is a part of the same content.
    if !usable || file.checksum == Checksum::Unknown {
        return None;
    }
    read_journal(&fs::read_to_string(journal).ok()?, &header(file, block), file.size.div_ceil(block) as usize)
}

impl Partial {
    /// Opens what there is of `file` in `files`, or begins it. `block` is the number of bytes that are noted as one.
    pub fn open(file: &RemoteFile, files: &Path, journals: &Path, block: u64) -> Result<(Self, Found)> {
        let (path, journal_path) = paths(file, files, journals);
        create_parent(&path)?;
        create_parent(&journal_path)?;
        let known = find(file, files, journals, block);
        if known.is_none() {
            // The data first: a journal must not outlive what it describes. Removed, since the file may be a link.
            for old in [&path, &journal_path] {
                match fs::remove_file(old) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(old.display(), &e)),
                    _ => {}
                }
            }
        }
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
            file.map_err(|e| Error::io(path.display(), &e))
        };
        let (data, journal) = (open(&path)?, open(&journal_path)?);
        let (header, size) = (header(file, block), file.size);
        let partial = Self { header, size, block, data, journal: Mutex::new(journal), path, journal_path };
        match known {
            Some((found, whole)) => {
                // What of a line came before a crash is another number.
                let cut = lock(&partial.journal).set_len(whole as u64);
                cut.map_err(|e| Error::io(partial.journal_path.display(), &e))?;
                Ok((partial, found))
            }
            None => {
                partial.begin()?;
                let blocks = partial.blocks();
                Ok((partial, Found::Blocks(vec![false; blocks])))
            }
        }
    }

    /// Marks a file that was put into `files` and has been checked.
    pub fn adopt(file: &RemoteFile, journals: &Path, block: u64) -> Result<()> {
        let (_, journal_path) = paths(file, journals, journals);
        create_parent(&journal_path)?;
        let text = format!("{}\n{CHECKED}\n", header(file, block));
        fs::write(&journal_path, text).map_err(|e| Error::io(journal_path.display(), &e))
    }

    /// Forgets what there is of `file`.
    pub fn forget(file: &RemoteFile, journals: &Path) -> Result<()> {
        let (_, journal) = paths(file, journals, journals);
        match fs::remove_file(&journal) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(journal.display(), &e)),
            _ => Ok(()),
        }
    }

    /// Bytes of `file` that are still to come.
    pub fn missing(file: &RemoteFile, files: &Path, journals: &Path, block: u64) -> u64 {
        match find(file, files, journals, block) {
            Some((Found::Checked, _)) => 0,
            Some((Found::Blocks(there), _)) => {
                let there = there.iter().filter(|there| **there).count() as u64;
                file.size.saturating_sub(there * block)
            }
            None => file.size,
        }
    }

    fn begin(&self) -> Result<()> {
        let fail = |e| Error::io(self.path.display(), &e);
        self.data.set_len(0).and_then(|()| self.data.set_len(self.size)).map_err(fail)?;
        let journal = lock(&self.journal);
        let text = format!("{}\n", self.header);
        let written = journal.set_len(0).and_then(|()| journal.write_all_at(text.as_bytes(), 0));
        written.map_err(|e| Error::io(self.journal_path.display(), &e))
    }

    fn note(&self, line: &str) -> Result<()> {
        let mut journal = lock(&self.journal);
        let end = std::io::Seek::seek(&mut *journal, std::io::SeekFrom::End(0));
        let written = end.and_then(|_| journal.write_all(format!("{line}\n").as_bytes()));
        written.map_err(|e| Error::io(self.journal_path.display(), &e))
    }

    /// Forgets all blocks.
    pub fn restart(&self) -> Result<()> {
        self.begin()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.size.div_ceil(self.block) as usize
    }

    /// The bytes of a block.
    pub fn range(&self, block: usize) -> Range<u64> {
        let start = block as u64 * self.block;
        start..(start + self.block).min(self.size)
    }

    /// Writes at a place of the file.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.data.write_all_at(bytes, at).map_err(|e| match e.kind() {
            std::io::ErrorKind::StorageFull => {
                Error::new(crate::error::Status::NoSpace, format!("{}: the disk is full", self.path.display()))
            }
            _ => Error::io(self.path.display(), &e),
        })
    }

    /// Notes that a whole block has been written.
    pub fn wrote(&self, block: usize) -> Result<()> {
        self.note(&block.to_string())
    }

    /// Whether the file's content is the right one. `interrupt` is asked now and then.
    pub fn fits(&self, checksum: &Checksum, interrupt: impl FnMut() -> Result<()>) -> Result<bool> {
        let mut content = File::open(&self.path).map_err(|e| Error::io(self.path.display(), &e))?;
        checksum.fits(&mut content, self.size, self.path.display(), interrupt)
    }

    /// Puts the file on the disk and notes that it has been checked.
    pub fn finish(&self) -> Result<()> {
        self.data.sync_all().map_err(|e| Error::io(self.path.display(), &e))?;
        self.note(CHECKED)
    }
}

/// What the whole lines of a journal list, and how many bytes those are; `None` if it is of something else.
fn read_journal(text: &str, header: &str, blocks: usize) -> Option<(Found, usize)> {
    let whole = text.rfind('\n')? + 1;
    let mut lines = text[..whole].lines();
    if lines.next()? != header {
        return None;
    }
    let mut found = vec![false; blocks];
    for line in lines {
        if line == CHECKED {
            return Some((Found::Checked, whole));
        }
        if let Some(block) = line.parse().ok().and_then(|n: usize| found.get_mut(n)) {
            *block = true;
        }
    }
    Some((Found::Blocks(found), whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(checksum: &str) -> RemoteFile {
        RemoteFile { path: "sub/w.bin".into(), size: 25, checksum: Checksum::Sha256(checksum.repeat(64)) }
    }

    #[test]
    fn what_was_written_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let (files, journals) = (folder.path().join("files"), folder.path().join("journals"));
        let open = |checksum: &str| Partial::open(&file(checksum), &files, &journals, 10).unwrap();
        let blocks = |found: Found| match found {
            Found::Checked => None,
            Found::Blocks(blocks) => Some(blocks),
        };
        let (partial, found) = open("a");
        assert_eq!(blocks(found), Some(vec![false; 3]));
        assert_eq!((partial.range(0), partial.range(2)), (0..10, 20..25));
        partial.write(20, b"vwxyz").unwrap();
        partial.wrote(2).unwrap();
        drop(partial);
        // A line that was not completed says nothing, and spoils nothing.
        let journal = journals.join("sub/w.bin.journal");
        let text = fs::read_to_string(&journal).unwrap();
        fs::write(&journal, format!("{text}1")).unwrap();
        let (partial, found) = open("a");
        assert_eq!(blocks(found), Some(vec![false, false, true]));
        partial.wrote(0).unwrap();
        drop(partial);
        assert_eq!(blocks(open("a").1), Some(vec![true, false, true]));
        let (partial, found) = open("b");
        assert_eq!(blocks(found), Some(vec![false; 3]), "other content");
        assert_eq!(fs::read(files.join("sub/w.bin")).unwrap(), [0; 25]);
        partial.finish().unwrap();
        assert!(matches!(open("b").1, Found::Checked));
        fs::write(files.join("sub/w.bin"), b"short").unwrap();
        assert_eq!(blocks(open("b").1), Some(vec![false; 3]), "other length");
    }

    #[test]
    fn links_are_not_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let (files, journals) = (folder.path().join("files"), folder.path().join("journals"));
        fs::create_dir_all(files.join("sub")).unwrap();
        let original = folder.path().join("original");
        fs::write(&original, [7; 25]).unwrap();
        fs::hard_link(&original, files.join("sub/w.bin")).unwrap();
        Partial::adopt(&file("a"), &journals, 10).unwrap();
        assert!(matches!(Partial::open(&file("a"), &files, &journals, 10).unwrap().1, Found::Checked));
        let (partial, _) = Partial::open(&file("b"), &files, &journals, 10).unwrap();
        partial.write(0, b"changed").unwrap();
        assert_eq!(fs::read(&original).unwrap(), [7; 25]);
    }
}
