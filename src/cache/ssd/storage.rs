//! The door between the cold tier and the disk: everything it does to files goes through these two traits, so that tests
//! can stop, fail or lose any single operation.

use std::any::Any;
use std::fmt::Debug;
use std::io;

/// How the bytes of a file should travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Through the page cache of the operating system.
    Buffered,
    /// Past it where memory, place and length are whole pages and the file system can; through it otherwise.
    Direct,
}

/// One thing in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name, without the folder.
    pub name: String,
    /// Whether it is a folder.
    pub folder: bool,
}

/// Held while a process uses a folder; dropping it lets the next one in.
pub type FolderLock = Box<dyn Any + Send + Sync>;

/// A folder on a disk. Names are relative paths with `/`; the empty name is the folder itself.
pub trait Storage: Send + Sync + Debug {
    /// What people call it: a path.
    fn place(&self) -> String;

    /// Locks the folder for this holder alone; `None` if another one has it.
    fn lock(&self) -> io::Result<Option<FolderLock>>;

    /// Creates a file that only its owner can read, or empties it if it is there.
    fn create(&self, name: &str, access: Access) -> io::Result<Box<dyn StorageFile>>;

    /// Opens a file that must be there, for reading and writing.
    fn open(&self, name: &str, access: Access) -> io::Result<Box<dyn StorageFile>>;

    /// Renames a file, in one step and in place of any other of that name. Durable after [`Storage::sync_folder`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file. Durable after [`Storage::sync_folder`].
    fn remove(&self, name: &str) -> io::Result<()>;

    /// What lies in a folder, in no order.
    fn list(&self, folder: &str) -> io::Result<Vec<Listed>>;

    /// Creates a folder that only its owner can enter; nothing happens if it is there.
    fn create_folder(&self, name: &str) -> io::Result<()>;

    /// Makes the names in a folder durable.
    fn sync_folder(&self, name: &str) -> io::Result<()>;

    /// Bytes of the disk that this process may still use.
    fn free_bytes(&self) -> io::Result<u64>;

    /// Bytes of the whole disk.
    fn total_bytes(&self) -> io::Result<u64>;
}

/// An open file.
#[allow(clippy::len_without_is_empty)]
pub trait StorageFile: Send + Sync + Debug {
    /// Fills `out` from the bytes at `place`; fewer there are an error of kind `UnexpectedEof`.
    fn read_at(&self, place: u64, out: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `place`.
    fn write_at(&self, place: u64, bytes: &[u8]) -> io::Result<()>;

    /// Its length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// When its bytes were last changed: milliseconds since 1970.
    fn modified(&self) -> io::Result<u64>;

    /// Cuts it, or fills it up with zeros.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Makes its bytes and its length durable.
    fn sync(&self) -> io::Result<()>;
}
