//! The index on disk: a redb database with a record for each segment, the last uses, the pinned prefixes and the
//! remembered hashes. It only saves reading the headers of all files when the tier opens: nothing in it is believed further
//! than a file confirms, and whatever goes wrong with it, it is thrown away and written again from memory.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use super::pins::Pin;
use super::segment::{Segment, SegmentName, tokens_of};
use super::storage::{Access, StorageFile};
use super::{Codec, Record, SharedStorage};
use crate::cache::prefix::BlockKey;
use crate::cache::spans::Span;

/// The file.
pub const FILE: &str = "index.redb";
/// The file while it is written again from memory.
pub const TEMPORARY: &str = "index.tmp";
/// Written in front of every value; values of another version are not read.
const VERSION: u8 = 1;
/// Memory that the database may keep pages in.
const CACHE: usize = 8 << 20;
/// Records of one transaction when the whole index is written again: it bounds how much the file grows at once.
const BATCH: usize = 2000;

const SEGMENTS: TableDefinition<&[u8; 16], &[u8]> = TableDefinition::new("segments");
const USES: TableDefinition<&[u8; 16], u64> = TableDefinition::new("uses");
const PINS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("pins");
const HASHES: TableDefinition<&[u8], &[u8; 32]> = TableDefinition::new("hashes");

/// Why the index could not be read or written.
pub type IndexError = Box<dyn std::error::Error + Send + Sync>;

/// Everything in the index.
#[derive(Debug, Default)]
pub struct Contents {
    /// Segments in the order of their names; their use is the last one that was noted.
    pub records: Vec<(SegmentName, Record)>,
    /// Pinned prefixes.
    pub pins: Vec<Pin>,
    /// Remembered hashes.
    pub hashes: Vec<(Vec<u8>, [u8; 32])>,
}

/// What to change in one transaction.
#[derive(Debug, Default)]
pub struct Changes {
    /// Segments to forget.
    pub drop: Vec<SegmentName>,
    /// Segments to note, with their last use.
    pub put: Vec<(SegmentName, Vec<u8>, u64)>,
    /// Later uses.
    pub uses: Vec<(SegmentName, u64)>,
    /// All pinned prefixes, if they have changed.
    pub pins: Option<Vec<Pin>>,
    /// Hashes to remember.
    pub hashes: Vec<(Vec<u8>, [u8; 32])>,
}

impl Changes {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        let Self { drop, put, uses, pins, hashes } = self;
        drop.is_empty() && put.is_empty() && uses.is_empty() && pins.is_none() && hashes.is_empty()
    }
}

/// How long the file is, and how long it may become; shared with the ledger of the tier.
#[derive(Debug, Default)]
pub struct IndexSpace {
    /// Bytes of the file.
    pub length: AtomicU64,
    /// Bytes of the file that it is about to replace.
    pub old: AtomicU64,
    /// Bytes that both may have.
    pub allowed: AtomicU64,
}

impl IndexSpace {
    /// Bytes of both files.
    pub fn total(&self) -> u64 {
        self.length.load(Ordering::SeqCst) + self.old.load(Ordering::SeqCst)
    }
}

/// The index, open or given up until it is written again.
#[derive(Debug)]
pub struct Index {
    storage: SharedStorage,
    space: Arc<IndexSpace>,
    database: Option<Database>,
}

impl Index {
    /// Opens the index and reads all of it. An index that cannot be read is an empty one to be written again.
    pub fn open(storage: SharedStorage, space: Arc<IndexSpace>) -> (Self, Option<Contents>) {
        let mut index = Self { storage, space, database: None };
        let mut open = || -> Result<Option<Contents>, IndexError> {
            match index.storage.remove(TEMPORARY) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            let file = match index.storage.open(FILE, Access::Buffered) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file?,
            };
            let (database, contents) = guarded(|| {
                let database = index.database(file)?;
                let contents = read(&database)?;
                Ok((database, contents))
            })?;
            index.database = Some(database);
            Ok(Some(contents))
        };
        let contents = open().unwrap_or_else(|error| {
            tracing::warn!("cold tier {}: the index cannot be read: {error}", index.storage.place());
            None
        });
        (index, contents)
    }

    fn database(&self, file: Box<dyn StorageFile>) -> Result<Database, IndexError> {
        self.space.length.store(file.len()?, Ordering::SeqCst);
        let file = IndexFile { file, space: Arc::clone(&self.space) };
        // The check reads the whole file, and finds whatever redb would otherwise stumble over later.
        let mut builder = Database::builder();
        let builder = builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
        Ok(builder.create_with_backend(file)?)
    }

    /// Whether changes can be written to it.
    pub fn works(&self) -> bool {
        self.database.is_some()
    }

    /// Makes the changes, all or none, durable. After an error the index is given up until [`Self::rewrite`].
    pub fn commit(&mut self, changes: &Changes) -> Result<(), IndexError> {
        let Some(database) = self.database.take() else { return Err("it is not open".into()) };
        let outcome = guarded(|| write(&database, changes));
        match outcome {
            Ok(()) => self.database = Some(database),
            Err(_) => close(database),
        }
        outcome
    }

    /// Writes a new index in place of what is there, which stays until the new one is whole.
    pub fn rewrite(&mut self, all: Changes) -> Result<(), IndexError> {
        if let Some(database) = self.database.take() {
            close(database);
        }
        let old = self.space.length.swap(0, Ordering::SeqCst);
        self.space.old.store(old, Ordering::SeqCst);
        let outcome = self.write_new(all);
        if outcome.is_err() {
            if let Some(database) = self.database.take() {
                close(database);
            }
            // Otherwise it is removed when the tier opens again.
            let _ = self.storage.remove(TEMPORARY);
            self.space.length.store(old, Ordering::SeqCst);
        }
        self.space.old.store(0, Ordering::SeqCst);
        outcome
    }

    fn write_new(&mut self, mut all: Changes) -> Result<(), IndexError> {
        let file = self.storage.create(TEMPORARY, Access::Buffered)?;
        self.database = Some(guarded(|| self.database(file))?);
        let mut put = std::mem::take(&mut all.put).into_iter();
        self.commit(&all)?;
        loop {
            let put: Vec<_> = put.by_ref().take(BATCH).collect();
            if put.is_empty() {
                break;
            }
            self.commit(&Changes { put, ..Changes::default() })?;
        }
        self.storage.rename(TEMPORARY, FILE)?;
        Ok(self.storage.sync_folder("")?)
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        if let Some(database) = self.database.take() {
            close(database);
        }
    }
}

/// Closes a database, whose last words to a failing disk may fail too.
fn close(database: Database) {
    let _ = guarded(|| {
        drop(database);
        Ok(())
    });
}

/// Runs code of redb: it panics on some damaged files, which must not reach further than the index.
fn guarded<T>(work: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("the database panicked".into()))
}

fn write(database: &Database, changes: &Changes) -> Result<(), IndexError> {
    let transaction = database.begin_write()?;
    {
        let mut segments = transaction.open_table(SEGMENTS)?;
        let mut uses = transaction.open_table(USES)?;
        for name in &changes.drop {
            segments.remove(&name.0)?;
            uses.remove(&name.0)?;
        }
        for (name, record, used) in &changes.put {
            segments.insert(&name.0, record.as_slice())?;
            uses.insert(&name.0, used)?;
        }
        for (name, used) in &changes.uses {
            uses.insert(&name.0, used)?;
        }
        if let Some(pins) = &changes.pins {
            let mut table = transaction.open_table(PINS)?;
            table.retain(|_, _| false)?;
            for pin in pins {
                let value = pin_bytes(pin);
                table.insert(blake3::hash(&value).as_bytes().as_slice(), value.as_slice())?;
            }
        }
        let mut hashes = transaction.open_table(HASHES)?;
        for (key, hash) in &changes.hashes {
            hashes.insert(key.as_slice(), hash)?;
        }
    }
    Ok(transaction.commit()?)
}

fn read(database: &Database) -> Result<Contents, IndexError> {
    let transaction = database.begin_read()?;
    let mut contents = Contents::default();
    // A new index has no tables.
    let Ok(segments) = transaction.open_table(SEGMENTS) else { return Ok(contents) };
    let mut uses = transaction.open_table(USES)?.range::<&[u8; 16]>(..)?.peekable();
    for entry in segments.range::<&[u8; 16]>(..)? {
        let (name, value) = entry?;
        let name = *name.value();
        let Some(mut record) = parse_record(value.value()) else { continue };
        // Both tables are in the order of the names.
        while let Some(used) = uses.next_if(|used| used.as_ref().is_ok_and(|(key, _)| *key.value() <= name)) {
            let (key, used) = used?;
            if *key.value() == name {
                record.last_use = used.value();
            }
        }
        contents.records.push((SegmentName(name), record));
    }
    if let Ok(pins) = transaction.open_table(PINS) {
        for entry in pins.iter()? {
            contents.pins.extend(parse_pin(entry?.1.value()));
        }
    }
    for entry in transaction.open_table(HASHES)?.iter()? {
        let (key, hash) = entry?;
        contents.hashes.push((key.value().to_vec(), *hash.value()));
    }
    Ok(contents)
}

/// Puts version and checksum in front of a value.
fn seal(body: &[u8]) -> Vec<u8> {
    let mut value = vec![VERSION];
    value.extend_from_slice(&blake3::hash(body).as_bytes()[..8]);
    value.extend_from_slice(body);
    value
}

/// The value behind version and checksum, if both are right.
fn unseal(value: &[u8]) -> Option<Fields<'_>> {
    let (front, body) = value.split_at_checked(9)?;
    (front[0] == VERSION && front[1..] == blake3::hash(body).as_bytes()[..8]).then_some(Fields(body))
}

/// The fields of a value, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn number(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self) -> Option<usize> {
        self.number()?.try_into().ok()
    }

    fn tokens(&mut self) -> Option<Arc<[u32]>> {
        let count = self.count()?.checked_mul(4)?;
        Some(tokens_of(self.bytes(count)?).into())
    }
}

fn push_tokens(body: &mut Vec<u8>, tokens: &[u32]) {
    body.extend_from_slice(&(tokens.len() as u64).to_le_bytes());
    tokens.iter().for_each(|token| body.extend_from_slice(&token.to_le_bytes()));
}

/// Bytes of the value of a segment, and of its name in both tables, its last use and their places in pages.
pub fn record_len(segment: &Segment) -> u64 {
    (9 + 3 * 32 + 1 + 7 * 8 + segment.model.len() + 4 * segment.span.tokens.len() + 2 * 16 + 8 + 16) as u64
}

/// The value of a segment whose tokens end with the key `end`.
pub fn record_bytes(segment: &Segment, end: &BlockKey, bytes: u64) -> Vec<u8> {
    let mut body = Vec::with_capacity(160 + segment.model.len() + 4 * segment.span.tokens.len());
    body.extend_from_slice(&segment.fingerprint);
    body.extend_from_slice(&segment.span.parent);
    body.extend_from_slice(end);
    body.push(segment.codec as u8);
    for number in [segment.group, segment.block_tokens, segment.span.start, segment.model.len()] {
        body.extend_from_slice(&(number as u64).to_le_bytes());
    }
    body.extend_from_slice(segment.model.as_bytes());
    body.extend_from_slice(&bytes.to_le_bytes());
    body.extend_from_slice(&segment.cost.to_le_bytes());
    push_tokens(&mut body, &segment.span.tokens);
    seal(&body)
}

fn parse_record(value: &[u8]) -> Option<Record> {
    let mut fields = unseal(value)?;
    let (fingerprint, parent, end) = (fields.array()?, fields.array()?, fields.array()?);
    let codec = match fields.array::<1>()? {
        [0] => Codec::Exact,
        [1] => Codec::Bits8,
        _ => return None,
    };
    let (group, block_tokens, start, name) = (fields.count()?, fields.count()?, fields.count()?, fields.count()?);
    let model = std::str::from_utf8(fields.bytes(name)?).ok()?.into();
    let (bytes, cost) = (fields.number()?, f64::from_bits(fields.number()?));
    let span = Span { parent, start, tokens: fields.tokens()? };
    if block_tokens == 0 || span.tokens.is_empty() || !fields.0.is_empty() {
        return None;
    }
    let segment = Segment { fingerprint, group, block_tokens, codec, span, cost, model };
    Some(Record { segment, end, bytes, last_use: 0 })
}

fn pin_bytes(pin: &Pin) -> Vec<u8> {
    let mut body = pin.fingerprint.to_vec();
    body.extend_from_slice(&(pin.block_tokens as u64).to_le_bytes());
    body.extend_from_slice(&(pin.groups as u64).to_le_bytes());
    push_tokens(&mut body, &pin.tokens);
    seal(&body)
}

fn parse_pin(value: &[u8]) -> Option<Pin> {
    let mut fields = unseal(value)?;
    let (fingerprint, block_tokens, groups) = (fields.array()?, fields.count()?, fields.count()?);
    let tokens = fields.tokens()?;
    (block_tokens > 0 && fields.0.is_empty()).then_some(Pin { fingerprint, block_tokens, groups, tokens })
}

/// The file under redb.
#[derive(Debug)]
struct IndexFile {
    file: Box<dyn StorageFile>,
    space: Arc<IndexSpace>,
}

impl StorageBackend for IndexFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // The length counts before the file has it, and until it has it no more.
        let before = self.space.length.fetch_max(len, Ordering::SeqCst);
        if len > before && self.space.total() > self.space.allowed.load(Ordering::SeqCst) {
            self.space.length.store(before, Ordering::SeqCst);
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the limit of the cold tier leaves no room"));
        }
        self.file.set_len(len)?;
        self.space.length.store(len, Ordering::SeqCst);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, data)
    }
}
