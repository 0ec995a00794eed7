//! Opening: the index and the folder brought together.

use std::io;
use std::sync::Arc;

use super::Record;
use super::catalog::Catalog;
use super::index::Contents;
use super::segment::{Defect, Head, Segment, SegmentName, tokens_of};
use super::storage::{Access, Storage};
use super::tier::now;
use crate::cache::rows::PAGE;
use crate::cache::spans::{Span, root_key};

/// Fills the catalog with what is in the files, in the order of their names: as the index has it, or as its header says.
/// Files that are neither are removed.
pub fn fill(storage: &dyn Storage, catalog: &mut Catalog, files: Vec<SegmentName>, contents: Contents) {
    for pin in contents.pins {
        catalog.pin(pin);
    }
    catalog.pending.pins = false;
    catalog.hashes.extend(contents.hashes);
    // Both are in the order of the names.
    let mut known = contents.records.into_iter().peekable();
    let mut records = Vec::with_capacity(files.len());
    for name in files {
        while let Some((missing, _)) = known.next_if(|(other, _)| *other < name) {
            catalog.pending.drop.insert(missing);
        }
        match known.next_if(|(other, _)| *other == name) {
            Some((_, record)) => records.push((name, record, false)),
            None => records.extend(adopt(storage, name).map(|record| (name, record, true))),
        }
    }
    catalog.pending.drop.extend(known.map(|(missing, _)| missing));
    let useless = catalog.fill(records.into_iter());
    for entry in useless.into_iter().filter_map(|id| catalog.take(id)).collect::<Vec<_>>() {
        let removed = storage.remove(&entry.name.file()).is_ok();
        catalog.gone(&entry, removed);
    }
}

/// The names of all segments, in order. Removes what was never finished.
pub fn files(storage: &dyn Storage) -> io::Result<Vec<SegmentName>> {
    match storage.create_folder("segments") {
        // On a disk that cannot be written the cache can still be read.
        Err(error) if storage.list("segments").is_err() => return Err(error),
        _ => {}
    }
    let mut names = Vec::new();
    for folder in storage.list("segments")?.into_iter().filter(|listed| listed.folder) {
        let folder = format!("segments/{}", folder.name);
        for file in storage.list(&folder)? {
            let path = format!("{folder}/{}", file.name);
            match SegmentName::parse(&file.name).filter(|name| name.file() == path) {
                Some(name) => names.push(name),
                None if file.name.ends_with(".tmp") || file.name.ends_with(".safetensors") => remove(storage, &path),
                // None of ours.
                None => {}
            }
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn remove(storage: &dyn Storage, file: &str) {
    if let Err(error) = storage.remove(file) {
        tracing::warn!("cold tier {}: {file} cannot be removed: {error}", storage.place());
    }
}

/// Reads from a file what the index does not know. `None` if it is no segment; then it is removed.
fn adopt(storage: &dyn Storage, name: SegmentName) -> Option<Record> {
    let file = name.file();
    match read_head(storage, &file) {
        Ok(Ok(record)) if SegmentName::new(&record.segment, &record.end) == name && begins(&record.segment) => {
            return Some(record);
        }
        Ok(outcome) => {
            let defect = outcome.err().unwrap_or(Defect::Other);
            tracing::warn!("cold tier {}: {file} is removed: {defect}", storage.place());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => tracing::warn!("cold tier {}: {file} is removed: {error}", storage.place()),
    }
    remove(storage, &file);
    None
}

/// Whether the beginning of a span is where its key says.
fn begins(segment: &Segment) -> bool {
    (segment.span.start == 0) == (segment.span.parent == root_key(&segment.fingerprint, segment.group))
}

fn read_head(storage: &dyn Storage, file: &str) -> io::Result<Result<Record, Defect>> {
    let file = storage.open(file, Access::Buffered)?;
    let length = file.len()?;
    if length < PAGE as u64 {
        return Ok(Err(Defect::Length));
    }
    let mut head = vec![0; PAGE];
    file.read_at(0, &mut head)?;
    let mut first = [0; 8];
    first.copy_from_slice(&head[..8]);
    let bytes = match Head::length(first) {
        Ok(bytes) if bytes as u64 <= length => bytes,
        Ok(_) => return Ok(Err(Defect::Length)),
        Err(defect) => return Ok(Err(defect)),
    };
    if bytes > PAGE {
        head.resize(bytes, 0);
        file.read_at(PAGE as u64, &mut head[PAGE..])?;
    }
    head.truncate(bytes);
    let Head { segment, tokens: place, bytes } = match Head::parse(&head) {
        Ok(head) => head,
        Err(defect) => return Ok(Err(defect)),
    };
    if bytes != length {
        return Ok(Err(Defect::Length));
    }
    let mut tokens = vec![0; (place.end - place.start) as usize];
    file.read_at(place.start, &mut tokens)?;
    let tokens: Arc<[u32]> = tokens_of(&tokens).into();
    let span = Span { tokens, ..segment.span };
    // A file that came back after it was evicted must not look like a new one.
    let last_use = file.modified()?.min(now());
    let segment = Segment { span, ..segment };
    Ok(Ok(Record { end: segment.end(), segment, bytes, last_use }))
}
