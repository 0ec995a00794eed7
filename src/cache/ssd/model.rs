//! The tier as a model sees it: find, read and store spans, and pin prefixes.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::catalog::{Entry, GroupKey, Stuck, charge};
use super::codec;
use super::index::record_len;
use super::pins::Pin;
use super::segment::{
    Defect, Segment, SegmentName, clip, data_bytes, file_bytes, head_bytes, head_bytes_in, row_buffer,
};
use super::storage::Access;
use super::tier::{ColdTier, Room, now};
use super::{Codec, Record};
use crate::cache::prefix::chain_key;
use crate::cache::rows::{RowBuffer, RowLayout};
use crate::cache::spans::{Piece, Span, SpanId, root_key};
use crate::error::{Error, Result};

/// What a model is to the tier.
#[derive(Debug, Clone)]
pub struct ModelId {
    /// For statistics, quotas and clearing.
    pub name: String,
    /// All that its rows depend on: weights, options, tokenizer, precision, namespace.
    pub fingerprint: [u8; 32],
    /// Tokens of a block.
    pub block_tokens: usize,
    /// What a token stores, by cache group.
    pub layouts: Vec<Arc<RowLayout>>,
}

/// A part of a stored span that a sequence can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ColdPiece {
    /// Which part, and where it belongs.
    pub piece: Piece,
    /// Bytes to be read for it: the whole file.
    pub bytes: u64,
}

/// What became of a span to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is on disk now, in a file of so many bytes.
    Written(u64),
    /// It was there, or something longer that begins with it, or another thread is writing it.
    Present,
    /// The limits leave no room for it.
    NoRoom,
}

/// The tier for one model; cheap to clone, any thread.
#[derive(Debug, Clone)]
pub struct ColdModel {
    tier: Arc<ColdTier>,
    id: Arc<ModelId>,
    name: Arc<str>,
    new_tokens: Arc<AtomicU64>,
}

impl ColdModel {
    pub(super) fn new(tier: Arc<ColdTier>, id: ModelId) -> Result<Self> {
        if id.block_tokens == 0 || id.layouts.is_empty() || id.layouts.iter().any(|layout| layout.token_bytes() == 0) {
            return Err(Error::invalid_argument(format!("cold tier: model '{}' has no blocks or no rows", id.name)));
        }
        let name = Arc::from(clip(&id.name));
        let mut catalog = tier.catalog();
        let model = catalog.model(&name);
        let new_tokens = catalog.new_tokens(model);
        drop(catalog);
        Ok(Self { tier, id: Arc::new(id), name, new_tokens })
    }

    /// The tier.
    pub fn tier(&self) -> &Arc<ColdTier> {
        &self.tier
    }

    /// What follows the first `from` of `tokens` (whole blocks) without a gap. Looks into memory only.
    pub fn find(&self, group: usize, tokens: &[u32], from: usize) -> Vec<ColdPiece> {
        let (key, root) = (self.group_key(group), root_key(&self.id.fingerprint, group));
        let found = self.tier.catalog().find(&key, &root, tokens, from);
        found.into_iter().map(|(piece, bytes)| ColdPiece { piece, bytes }).collect()
    }

    /// The longest beginning of `tokens`, of more than `from` of them, whose state is there. Looks into memory only.
    pub fn find_state(&self, group: usize, tokens: &[u32], from: usize) -> Option<ColdPiece> {
        let root = root_key(&self.id.fingerprint, group);
        let (piece, bytes) = self.tier.catalog().find_state(&self.group_key(group), &root, tokens, from)?;
        Some(ColdPiece { piece, bytes })
    }

    /// Whether what is behind the first `at` of `tokens` (whole blocks) agrees with the rest of them, as far as both go;
    /// `None` if nothing is there.
    pub fn agrees_behind(&self, group: usize, tokens: &[u32], at: usize) -> Option<bool> {
        let key = self.group_key(group);
        self.tier.catalog().agrees_behind(&key, &root_key(&self.id.fingerprint, group), tokens, at)
    }

    /// So many tokens of the model were computed: for statistics.
    pub fn count_new(&self, tokens: u64) {
        self.new_tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Reads the rows of the whole span that `piece` is a part of. `tokens` are those that it was found with.
    ///
    /// `None` if the file is not exactly what it should be (then it is removed), or cannot be read.
    pub fn read(&self, group: usize, piece: &ColdPiece, tokens: &[u32]) -> Option<RowBuffer> {
        let layout = self.id.layouts.get(group)?;
        let entry = self.tier.catalog().get(piece.piece.span)?.clone();
        if piece.piece.position != entry.segment.span.start + piece.piece.skip {
            // Found by its key at another place than it names itself.
            self.tier.discard(piece.piece.span, &entry, &Defect::Other.into());
            return None;
        }
        if !self.serves(&entry, group, &piece.piece, tokens) {
            return None;
        }
        self.tier.catalog().begin_read(&entry);
        let outcome = read_rows(&self.tier, &entry, layout);
        self.tier.catalog().end_read(&entry, outcome.as_ref().map_or(0, |_| entry.bytes));
        match outcome {
            Ok(rows) => {
                let mut catalog = self.tier.catalog();
                catalog.touch(piece.piece.span, now());
                let stats = catalog.stats_of(&entry);
                stats.hit_tokens += piece.piece.tokens as u64;
                stats.read_bytes += entry.bytes;
                Some(rows)
            }
            Err(failure) => {
                self.tier.discard(piece.piece.span, &entry, &failure);
                None
            }
        }
    }

    /// Whether the entry is what `piece` of `tokens` asks for.
    fn serves(&self, entry: &Entry, group: usize, piece: &Piece, tokens: &[u32]) -> bool {
        let Segment { fingerprint, group: own, block_tokens, codec, span, .. } = &*entry.segment;
        let key = GroupKey { fingerprint: *fingerprint, group: *own, block_tokens: *block_tokens, codec: *codec };
        let useful = piece.skip.checked_add(piece.tokens).and_then(|end| span.tokens.get(..end));
        let wanted = piece.position.checked_add(piece.tokens).and_then(|end| tokens.get(..end));
        let (Some(useful), Some(wanted)) = (useful, wanted) else { return false };
        if key != self.group_key(group) {
            return false;
        }
        let (before, inside) = wanted.split_at(span.start);
        let root = root_key(&self.id.fingerprint, group);
        let parent = before.chunks(self.id.block_tokens).fold(root, |key, tokens| chain_key(&key, tokens));
        inside == useful && parent == span.parent
    }

    /// Stores the rows of a span, whose buffer has room for a header of [`head_bytes`]. `cost` is how many seconds it
    /// took to compute them. When it returns [`Stored::Written`], the span survives a loss of power.
    pub fn store(&self, group: usize, span: &Span, rows: RowBuffer, cost: f64) -> Result<Stored> {
        let segment = self.segment(group, span, &rows, cost)?;
        let (layout, tier) = (&self.id.layouts[group], &*self.tier);
        let end = segment.end();
        let name = SegmentName::new(&segment, &end);
        let bytes = file_bytes(layout, span.tokens.len(), segment.codec);
        let (model, use_now) = {
            let mut catalog = tier.catalog();
            if catalog.has(&self.group_key(group), &name, span) {
                return Ok(Stored::Present);
            }
            catalog.begin(name, span.parent);
            (catalog.model(&self.name), self.is_state(group) || catalog.continues(span))
        };
        let mut writing = Writing { tier, name, span, model, charged: 0, temporary: false };
        let failed = |error: io::Error| {
            tier.log("a segment cannot be written", &error);
            tier.error(&name.file(), &error)
        };
        match tier.reserve(model, bytes, record_len(&segment), use_now).map_err(failed)? {
            Room::Charged => writing.charged = charge(bytes),
            Room::None => {
                tier.catalog().stats_mut(model).refused += 1;
                return Ok(Stored::NoRoom);
            }
        }
        writing.temporary = true;
        match segment.codec {
            Codec::Exact => {
                let mut rows = rows;
                segment.finish(layout, rows.pages_mut());
                write_file(tier, name, rows.pages()).map_err(failed)?;
            }
            Codec::Bits8 => {
                let finite = || Error::invalid_argument(format!("cold tier: rows of '{}' are not finite", self.name));
                let mut file = codec::encode(&rows).ok_or_else(finite)?;
                drop(rows);
                segment.finish(layout, file.pages_mut());
                write_file(tier, name, file.pages()).map_err(failed)?;
            }
        }
        writing.written(Record { segment, end, bytes, last_use: now() });
        tier.commit_some();
        Ok(Stored::Written(bytes))
    }

    fn segment(&self, group: usize, span: &Span, rows: &RowBuffer, cost: f64) -> Result<Segment> {
        let layout = self.id.layouts.get(group);
        let tokens = span.tokens.len();
        let whole = tokens.is_multiple_of(self.id.block_tokens) || tokens < self.id.block_tokens;
        let fits = layout.is_some_and(|layout| rows.layout() == layout && rows.head() == head_bytes(layout));
        let begins = span.start.is_multiple_of(self.id.block_tokens) || self.is_state(group) && tokens == 1;
        if !fits || tokens == 0 || !whole || rows.tokens() != tokens || !begins {
            return Err(Error::invalid_argument(format!("cold tier: rows that are not those of '{}'", self.name)));
        }
        Ok(Segment {
            fingerprint: self.id.fingerprint,
            group,
            block_tokens: self.id.block_tokens,
            codec: self.codec(group),
            span: span.clone(),
            cost: if cost.is_finite() { cost.max(0.0) } else { 0.0 },
            model: Arc::clone(&self.name),
        })
    }

    /// Keeps the segments of a prefix, those there are and those to come, until [`Self::unpin`]; restarts included, unless
    /// the index is lost.
    pub fn pin(&self, tokens: &[u32]) -> Result<()> {
        self.tier.pin(self.pin_of(tokens))
    }

    /// Lets a pinned prefix go.
    pub fn unpin(&self, tokens: &[u32]) -> Result<()> {
        self.tier.unpin(&self.pin_of(tokens))
    }

    /// The pinned prefixes of the model.
    pub fn pins(&self) -> Vec<Arc<[u32]>> {
        let catalog = self.tier.catalog();
        let own = catalog.pins().iter().filter(|pin| pin.fingerprint == self.id.fingerprint);
        own.map(|pin| Arc::clone(&pin.tokens)).collect()
    }

    fn pin_of(&self, tokens: &[u32]) -> Pin {
        let ModelId { fingerprint, block_tokens, ref layouts, .. } = *self.id;
        Pin { fingerprint, block_tokens, groups: layouts.len(), tokens: tokens.into() }
    }

    fn group_key(&self, group: usize) -> GroupKey {
        let ModelId { fingerprint, block_tokens, .. } = *self.id;
        GroupKey { fingerprint, group, block_tokens, codec: self.codec(group) }
    }

    fn is_state(&self, group: usize) -> bool {
        self.id.layouts.get(group).is_some_and(|layout| layout.is_state())
    }

    /// States are always written as they are: whatever is wrong with one is wrong with all tokens behind it.
    fn codec(&self, group: usize) -> Codec {
        if self.is_state(group) { Codec::Exact } else { self.tier.codec() }
    }
}

/// Why rows could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadFailure {
    #[error(transparent)]
    Defect(#[from] Defect),
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn read_rows(tier: &ColdTier, entry: &Entry, layout: &Arc<RowLayout>) -> Result<RowBuffer, ReadFailure> {
    let (segment, tokens) = (&entry.segment, entry.segment.span.tokens.len());
    let file = tier.storage.open(&entry.name.file(), Access::Direct)?;
    if file.len()? != file_bytes(layout, tokens, segment.codec) {
        return Err(Defect::Length.into());
    }
    match segment.codec {
        Codec::Exact => {
            let mut rows = row_buffer(layout, tokens);
            file.read_at(0, rows.pages_mut())?;
            segment.verify(layout, rows.pages())?;
            Ok(rows)
        }
        Codec::Bits8 => {
            let bytes = head_bytes_in(layout, Codec::Bits8) + data_bytes(layout, tokens, Codec::Bits8).1;
            let mut pages = codec::PageBuffer::new(bytes);
            file.read_at(0, pages.pages_mut())?;
            segment.verify(layout, pages.pages())?;
            Ok(codec::decode(pages.pages(), layout, tokens))
        }
    }
}

/// Temporary file, its bytes durable, its name, the name durable.
fn write_file(tier: &ColdTier, name: SegmentName, pages: &[u8]) -> io::Result<()> {
    let (storage, temporary) = (&*tier.storage, name.temporary());
    let file = match storage.create(&temporary, Access::Direct) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            storage.create_folder(&name.folder())?;
            storage.sync_folder("segments")?;
            storage.create(&temporary, Access::Direct)?
        }
        file => file?,
    };
    file.write_at(0, pages)?;
    file.sync()?;
    drop(file);
    storage.rename(&temporary, &name.file())?;
    storage.sync_folder(&name.folder())
}

/// A segment on its way to the disk. Dropping it before it is written takes everything back.
struct Writing<'a> {
    tier: &'a ColdTier,
    name: SegmentName,
    span: &'a Span,
    model: usize,
    charged: u64,
    temporary: bool,
}

impl Writing<'_> {
    fn written(mut self, record: Record) {
        let mut catalog = self.tier.catalog();
        catalog.in_flight -= self.charged;
        self.charged = 0;
        self.temporary = false;
        let stats = catalog.stats_mut(self.model);
        stats.written_bytes += record.bytes;
        stats.written_tokens += record.segment.span.tokens.len() as u64;
        let (id, useless) = catalog.insert(self.name, record);
        catalog.pending.put.insert(id);
        let useless: Vec<Entry> = useless.into_iter().filter_map(|id| catalog.take(id)).collect();
        drop(catalog);
        useless.iter().for_each(|entry| self.tier.remove_file(entry));
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut stuck = Vec::new();
        if self.temporary {
            // Whichever of the two there is: a name that is not durable does not count as stored.
            let files = [self.name.temporary(), self.name.file()];
            stuck.extend(files.into_iter().filter(|file| !self.tier.removed(file)));
        }
        let mut catalog = self.tier.catalog();
        catalog.in_flight -= self.charged;
        catalog.end(&self.name, &self.span.parent);
        for file in stuck {
            let charge = std::mem::take(&mut self.charged);
            catalog.stick(Stuck { name: self.name, file, charge, model: self.model });
        }
        catalog.discharge(self.model, self.charged);
    }
}

impl ColdTier {
    /// Does what a failed read asks for.
    pub(super) fn discard(&self, id: SpanId, entry: &Entry, failure: &ReadFailure) {
        let mut catalog = self.catalog();
        let Some(known) = catalog.get(id) else {
            // Evicted while it was being read.
            return;
        };
        debug_assert_eq!(known.name, entry.name);
        if let ReadFailure::Io(error) = failure {
            let lost = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof);
            if !lost && error.raw_os_error() != Some(rustix::io::Errno::IO.raw_os_error()) {
                // Nothing is wrong with the file: too many open ones, no memory.
                drop(catalog);
                return self.log("a segment cannot be read", error);
            }
        }
        let Some(taken) = catalog.take(id) else { return };
        catalog.stats_of(&taken).damaged += 1;
        drop(catalog);
        tracing::warn!("cold tier {}: {} is removed: {failure}", self.storage.place(), taken.name.file());
        self.remove_file(&taken);
    }
}
