//! A disk in memory that can fail or stop at any single operation, and then forget what was not made durable.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use crate::cache::ssd::storage::{Access, FolderLock, Listed, Storage, StorageFile};
use crate::cache::ssd::tier::now;
use crate::sync::lock;

/// A small generator of random numbers (xorshift64*), seeded.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

/// What goes wrong, and when. Operations count from 0.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plan {
    /// This operation fails with this error of the system, and so do all later ones if it says so.
    pub fail: Option<(u64, i32, bool)>,
    /// From this operation on nothing happens any more.
    pub stop: Option<u64>,
    /// What is made durable is not: a disk that lies, for negative controls.
    pub lies: bool,
}

/// A disk; clones are the same one.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Mutex<Image>>);

#[derive(Debug, Clone, Default)]
struct Image {
    files: BTreeMap<u64, File>,
    next: u64,
    names: BTreeMap<String, u64>,
    folders: BTreeSet<String>,
    durable_names: BTreeMap<String, u64>,
    durable_folders: BTreeSet<String>,
    /// Changes of names since their folders were made durable, in order.
    changes: Vec<(String, Change)>,
    plan: Plan,
    operations: u64,
    locked: bool,
    read_only: bool,
    capacity: u64,
    peak: u64,
}

#[derive(Debug, Clone, Default)]
struct File {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    modified: u64,
    writes: Vec<Write>,
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(u64, Vec<u8>),
    Length(u64),
}

#[derive(Debug, Clone)]
enum Change {
    Folder(String),
    Create(String, u64),
    Rename(String, String, u64),
    Remove(String),
}

fn folder_of(name: &str) -> String {
    name.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_owned())
}

fn apply(bytes: &mut Vec<u8>, write: &Write) {
    match write {
        Write::Length(length) => bytes.resize(*length as usize, 0),
        Write::Bytes(place, new) => {
            let end = *place as usize + new.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*place as usize..end].copy_from_slice(new);
        }
    }
}

fn change(names: &mut BTreeMap<String, u64>, folders: &mut BTreeSet<String>, change: &Change) {
    match change {
        Change::Folder(name) => drop(folders.insert(name.clone())),
        Change::Create(name, file) => drop(names.insert(name.clone(), *file)),
        Change::Rename(from, to, file) => {
            names.remove(from);
            names.insert(to.clone(), *file);
        }
        Change::Remove(name) => drop(names.remove(name)),
    }
}

impl Image {
    fn step(&mut self) -> io::Result<()> {
        let at = self.operations;
        self.operations += 1;
        if self.plan.stop.is_some_and(|stop| at >= stop) {
            return Err(io::Error::other("the machine has stopped"));
        }
        match self.plan.fail {
            Some((first, error, forever)) if at == first || (forever && at > first) => {
                Err(io::Error::from_raw_os_error(error))
            }
            _ => Ok(()),
        }
    }

    /// A step that changes something.
    fn change_step(&mut self) -> io::Result<()> {
        self.step()?;
        if self.read_only { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    fn used(&self) -> u64 {
        let files = self.names.values().collect::<BTreeSet<_>>();
        files.into_iter().map(|file| (self.files[file].bytes.len() as u64).next_multiple_of(4096)).sum()
    }

    fn note(&mut self, folder: String, made: Change) {
        change(&mut self.names, &mut self.folders, &made);
        self.changes.push((folder, made));
        self.peak = self.peak.max(self.used());
    }

    fn find(&self, name: &str) -> io::Result<u64> {
        self.names.get(name).copied().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn write(&mut self, id: u64, write: Write) {
        let file = self.files.get_mut(&id).expect("files stay");
        apply(&mut file.bytes, &write);
        file.modified = now();
        file.writes.push(write);
        self.peak = self.peak.max(self.used());
    }
}

impl Disk {
    pub fn new() -> Self {
        let folders = BTreeSet::from([String::new()]);
        let durable_folders = folders.clone();
        Self(Arc::new(Mutex::new(Image { folders, durable_folders, capacity: 1 << 40, ..Image::default() })))
    }

    /// The same files on a disk of their own.
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(Image { locked: false, ..lock(&self.0).clone() })))
    }

    /// What another machine finds on it after a stop: of what was not made durable a random part, torn anywhere.
    pub fn after_stop(&self, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let image = lock(&self.0);
        let (mut names, mut folders) = (image.durable_names.clone(), image.durable_folders.clone());
        // Everything, nothing, or any part of it.
        let mode = random.below(4);
        let keep = |random: &mut Random| match mode {
            0 => true,
            1 => false,
            _ => random.coin(),
        };
        for (_, made) in &image.changes {
            if keep(&mut random) {
                change(&mut names, &mut folders, made);
            }
        }
        names.retain(|name, _| folders.contains(&folder_of(name)));
        let mut files = BTreeMap::new();
        for &id in names.values() {
            let file = &image.files[&id];
            let mut bytes = file.durable.clone();
            for write in &file.writes {
                match write {
                    Write::Length(_) if keep(&mut random) => apply(&mut bytes, write),
                    Write::Length(_) => {}
                    Write::Bytes(place, new) => {
                        for (at, sector) in new.chunks(512).enumerate() {
                            if keep(&mut random) {
                                apply(&mut bytes, &Write::Bytes(place + 512 * at as u64, sector.to_vec()));
                            }
                        }
                    }
                }
            }
            let durable = bytes.clone();
            files.insert(id, File { bytes, durable, modified: file.modified, writes: Vec::new() });
        }
        let (next, capacity) = (image.next, image.capacity);
        let (durable_names, durable_folders) = (names.clone(), folders.clone());
        let after = Image { files, next, names, folders, durable_names, durable_folders, capacity, ..Image::default() };
        Self(Arc::new(Mutex::new(after)))
    }

    pub fn plan(&self, plan: Plan) {
        let mut image = lock(&self.0);
        image.plan = plan;
        image.operations = 0;
    }

    /// Operations since the last plan.
    pub fn operations(&self) -> u64 {
        lock(&self.0).operations
    }

    /// Bytes of all files, in blocks of 4 KiB; and the most there have been since the last call.
    pub fn used(&self) -> (u64, u64) {
        let mut image = lock(&self.0);
        let used = image.used();
        (used, std::mem::replace(&mut image.peak, used).max(used))
    }

    pub fn set_capacity(&self, bytes: u64) {
        lock(&self.0).capacity = bytes;
    }

    pub fn set_read_only(&self, read_only: bool) {
        lock(&self.0).read_only = read_only;
    }

    pub fn names(&self) -> Vec<String> {
        lock(&self.0).names.keys().cloned().collect()
    }

    /// Changes the bytes of a file behind everyone's back.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut image = lock(&self.0);
        let id = image.names[name];
        let file = image.files.get_mut(&id).expect("files stay");
        change(&mut file.bytes);
        file.durable = file.bytes.clone();
        file.writes.clear();
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let image = lock(&self.0);
        image.files[&image.names[name]].bytes.clone()
    }

    /// Removes all files whose names begin so, as somebody else would.
    pub fn delete(&self, prefix: &str) {
        let mut image = lock(&self.0);
        image.names.retain(|name, _| !name.starts_with(prefix));
        image.durable_names.retain(|name, _| !name.starts_with(prefix));
        image.folders.retain(|name| name.is_empty() || !name.starts_with(prefix));
        image.durable_folders.retain(|name| name.is_empty() || !name.starts_with(prefix));
    }
}

struct Unlock(Disk);

impl Drop for Unlock {
    fn drop(&mut self) {
        lock(&self.0.0).locked = false;
    }
}

impl Storage for Disk {
    fn place(&self) -> String {
        "test disk".to_owned()
    }

    fn lock(&self) -> io::Result<Option<FolderLock>> {
        let mut image = lock(&self.0);
        image.step()?;
        if image.locked {
            return Ok(None);
        }
        image.locked = true;
        Ok(Some(Box::new(Unlock(self.clone()))))
    }

    fn create(&self, name: &str, _: Access) -> io::Result<Box<dyn StorageFile>> {
        let mut image = lock(&self.0);
        image.change_step()?;
        if !image.folders.contains(&folder_of(name)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let id = match image.names.get(name) {
            Some(&id) => {
                image.write(id, Write::Length(0));
                id
            }
            None => {
                let id = image.next;
                image.next += 1;
                image.files.insert(id, File::default());
                image.note(folder_of(name), Change::Create(name.to_owned(), id));
                id
            }
        };
        Ok(Box::new(Open { disk: self.clone(), id }))
    }

    fn open(&self, name: &str, _: Access) -> io::Result<Box<dyn StorageFile>> {
        let mut image = lock(&self.0);
        image.step()?;
        Ok(Box::new(Open { disk: self.clone(), id: image.find(name)? }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut image = lock(&self.0);
        image.change_step()?;
        let id = image.find(from)?;
        image.note(folder_of(to), Change::Rename(from.to_owned(), to.to_owned(), id));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut image = lock(&self.0);
        image.change_step()?;
        image.find(name)?;
        image.note(folder_of(name), Change::Remove(name.to_owned()));
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Listed>> {
        let mut image = lock(&self.0);
        image.step()?;
        if !image.folders.contains(folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = |name: &&String| !name.is_empty() && folder_of(name) == folder;
        let listed = |name: &String, folder| Listed {
            name: name.rsplit('/').next().expect("there is always a last part").to_owned(),
            folder,
        };
        let files = image.names.keys().filter(inside).map(|name| listed(name, false));
        Ok(files.chain(image.folders.iter().filter(inside).map(|name| listed(name, true))).collect())
    }

    fn create_folder(&self, name: &str) -> io::Result<()> {
        let mut image = lock(&self.0);
        image.change_step()?;
        if !image.folders.contains(&folder_of(name)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !image.folders.contains(name) {
            image.note(folder_of(name), Change::Folder(name.to_owned()));
        }
        Ok(())
    }

    fn sync_folder(&self, name: &str) -> io::Result<()> {
        let mut image = lock(&self.0);
        image.step()?;
        if !image.folders.contains(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if image.plan.lies {
            return Ok(());
        }
        let (done, left) = std::mem::take(&mut image.changes).into_iter().partition(|(folder, _)| folder == name);
        image.changes = left;
        let done: Vec<(String, Change)> = done;
        let Image { durable_names, durable_folders, .. } = &mut *image;
        done.iter().for_each(|(_, made)| change(durable_names, durable_folders, made));
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let mut image = lock(&self.0);
        image.step()?;
        Ok(image.capacity.saturating_sub(image.used()))
    }

    fn total_bytes(&self) -> io::Result<u64> {
        let mut image = lock(&self.0);
        image.step()?;
        Ok(image.capacity)
    }
}

#[derive(Debug)]
struct Open {
    disk: Disk,
    id: u64,
}

impl Open {
    fn change(&self, write: Write) -> io::Result<()> {
        let mut image = lock(&self.disk.0);
        if let Err(error) = image.change_step() {
            // A write that fails may have written something.
            if let (None, false, Write::Bytes(place, bytes)) = (image.plan.stop, image.read_only, &write) {
                let half = Write::Bytes(*place, bytes[..bytes.len() / 2].to_vec());
                image.write(self.id, half);
            }
            return Err(error);
        }
        let end = match &write {
            Write::Bytes(place, bytes) => place + bytes.len() as u64,
            Write::Length(length) => *length,
        };
        let grown = end.saturating_sub(image.files[&self.id].bytes.len() as u64);
        if image.used() + grown > image.capacity {
            return Err(io::ErrorKind::StorageFull.into());
        }
        image.write(self.id, write);
        Ok(())
    }
}

impl StorageFile for Open {
    fn read_at(&self, place: u64, out: &mut [u8]) -> io::Result<()> {
        let mut image = lock(&self.disk.0);
        image.step()?;
        let bytes = image.files[&self.id].bytes.get(place as usize..place as usize + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, place: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(Write::Bytes(place, bytes.to_vec()))
    }

    fn len(&self) -> io::Result<u64> {
        let mut image = lock(&self.disk.0);
        image.step()?;
        Ok(image.files[&self.id].bytes.len() as u64)
    }

    fn modified(&self) -> io::Result<u64> {
        let mut image = lock(&self.disk.0);
        image.step()?;
        Ok(image.files[&self.id].modified)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change(Write::Length(bytes))
    }

    fn sync(&self) -> io::Result<()> {
        let mut image = lock(&self.disk.0);
        image.step()?;
        if !image.plan.lies {
            let file = image.files.get_mut(&self.id).expect("files stay");
            file.durable = file.bytes.clone();
            file.writes.clear();
        }
        Ok(())
    }
}
