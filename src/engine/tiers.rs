//! Rows of a model outside its pools: where those go that leave the pools, and where those are that a request needs.
//!
//! Pools, then the hot tier (the host's RAM, where pools lie in another memory), then the cold tier (files).

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::worth::{MoveRate, Offer, worth_until};
use crate::cache::hot::{Evicted, HotModel, HotTier};
use crate::cache::manager::Found;
use crate::cache::prefix::chain_key;
use crate::cache::rows::{RowBuffer, RowLayout};
use crate::cache::spans::{Piece, Span, SpanId, root_key};
use crate::cache::ssd::{ColdModel, ColdPiece, ColdReader, ColdTier, ColdWriter, ModelId, row_buffer};
use crate::cache::{BlockManager, GroupKind, Save};
use crate::error::Result;
use crate::sync::lock;

/// Tokens of a span: enough that reading one is mostly transfer, few enough that a change in the middle costs little.
pub const SPAN_TOKENS: usize = 256;

/// Bytes per second of the cold tier before anything has been read: a slow SSD.
const ASSUMED_RATE: f64 = 0.5e9;

/// Seconds that a file costs besides its bytes.
const FILE_SECONDS: f64 = 0.5e-3;

/// How often a shorter match is looked for where windows are missing at the end of one.
const LOOKS: usize = 16;

/// How often somebody who waits for the writer looks again.
pub const CROWDED: Duration = Duration::from_millis(2);

/// Rows that a tier handed over; nobody writes to them any more.
pub type Rows = Arc<RowBuffer>;

/// The tiers of all models of a pool. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tiers {
    /// Rows in the host's memory.
    pub hot: Arc<HotTier>,
    /// Rows in files.
    pub cold: Option<Cold>,
    /// Rows go to the cold tier as soon as they are computed, not only when they leave the tiers above.
    pub write_through: bool,
    /// Rows come from the tiers even where it were faster to compute them.
    pub always_restore: bool,
    /// Keeps users of one folder apart: part of what models are known by.
    pub namespace: Vec<u8>,
}

/// The cold tier with its threads.
#[derive(Debug, Clone)]
pub struct Cold {
    /// The files.
    pub tier: Arc<ColdTier>,
    /// Writes behind the engines' backs.
    pub writer: Arc<ColdWriter>,
    /// Reads ahead of them.
    pub reader: Arc<ColdReader>,
    /// Bytes that may wait to be written.
    write_bytes: usize,
    /// Every model that was used, for rows of it that leave the hot tier later.
    models: Arc<Mutex<HashMap<[u8; 32], ColdModel>>>,
}

/// A model's part of the tiers.
#[derive(Debug)]
pub struct ModelTiers {
    tiers: Tiers,
    hot: HotModel,
    cold: Option<ColdModel>,
    groups: Vec<TierGroup>,
}

/// A cache group of a model in the tiers.
#[derive(Debug, Clone)]
pub struct TierGroup {
    /// Which rows sequences need; `None` of states, of which it is the newest.
    pub kind: Option<GroupKind>,
    /// What a token stores.
    pub layout: Arc<RowLayout>,
}

/// Rows that a request needs and a tier has.
#[derive(Debug)]
pub struct Fetch {
    /// Cache group of the rows.
    pub group: usize,
    /// Position of the first token in the sequence: a multiple of the block size, but for states.
    pub position: usize,
    /// Tokens of the span before that.
    pub skip: usize,
    /// How many tokens.
    pub tokens: usize,
    /// Bytes that they take in memory until they are in a pool.
    pub bytes: usize,
    /// It is a state: the row of the last token that it stands for.
    pub is_state: bool,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Hot(SpanId, Rows),
    Cold(ColdPiece),
}

/// Where the rows of a prompt are: tokens counted from the beginning, each by the first tier that has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Whereabouts {
    /// Tokens whose rows could be anywhere: all but the last, which is computed in any case.
    pub tokens: usize,
    /// In the pools.
    pub pool: usize,
    /// In the hot tier.
    pub hot: usize,
    /// In the cold tier.
    pub cold: usize,
    /// To be computed.
    pub missing: usize,
    /// Why the match went no further.
    pub stopped_by: Stop,
    /// Seconds until the rows of other tiers would be in the pools, by the rates of earlier ones.
    pub restore_seconds: f64,
    /// Seconds until the missing ones would be computed, by the rate of earlier prompts; 0 before there was one.
    pub compute_seconds: f64,
}

/// Why a match of a prompt with what is cached went no further.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// Everything is cached.
    #[default]
    Complete,
    /// Other tokens are cached in its place.
    OtherTokens,
    /// Nothing is cached behind it.
    NotCached,
    /// Other tiers are not known yet: the model's files are being read.
    NotIdentified,
}

/// What the pools have of the beginning of a prompt.
#[derive(Debug, Clone)]
pub struct Has {
    /// Tokens that a sequence goes on behind.
    pub tokens: usize,
    /// Tokens whose rows are there: more than that where only the state is missing.
    pub rows: usize,
    /// Tokens that states stand for which are there, whatever there is of rows.
    pub states: Vec<usize>,
}

impl Has {
    /// Of `tokens`.
    pub fn of(blocks: &mut BlockManager, tokens: &[u32]) -> Self {
        let Found { tokens: reached, rows, .. } = blocks.look(tokens);
        Self { tokens: reached, rows: rows.max(reached), states: blocks.state_lengths(tokens) }
    }
}

/// What is known of a prompt without the tiers.
#[derive(Debug, Clone)]
pub struct InPools {
    /// What the pools have of it.
    pub has: Has,
    /// They have other tokens in the place of the next ones.
    pub others: bool,
    /// Seconds to compute a token, if that is known.
    pub token_seconds: Option<f64>,
}

impl Whereabouts {
    /// Of `tokens` the pools have some, and nobody else has more.
    pub fn in_pools(tokens: usize, pools: &InPools) -> Self {
        let mut found = Self { tokens, pool: pools.has.tokens, ..Self::default() };
        found.end(pools, pools.others);
        found
    }

    /// Nobody has more; `others`: but other tokens in their place.
    fn end(&mut self, pools: &InPools, others: bool) {
        self.missing = self.tokens - self.pool - self.hot - self.cold;
        self.compute_seconds = pools.token_seconds.unwrap_or_default() * self.missing as f64;
        self.stopped_by = match self.missing {
            0 => Stop::Complete,
            _ if others => Stop::OtherTokens,
            _ => Stop::NotCached,
        };
    }
}

impl Tiers {
    /// Whether rows that leave the pools go anywhere.
    pub fn exist(&self) -> bool {
        self.cold.is_some() || self.hot.limit() > 0
    }

    /// Whether they have, or had, anything of a model of this name.
    pub fn know(&self, model: &str) -> bool {
        self.hot.knows(model) || self.cold.as_ref().is_some_and(|cold| cold.tier.knows(model))
    }

    /// The part of a model with this fingerprint and these cache groups.
    pub fn model(
        &self,
        name: &str,
        fingerprint: [u8; 32],
        block_tokens: usize,
        groups: Vec<TierGroup>,
    ) -> Result<ModelTiers> {
        let layouts = groups.iter().map(|group| Arc::clone(&group.layout)).collect();
        let id = ModelId { name: name.to_owned(), fingerprint, block_tokens, layouts };
        let cold = self.cold.as_ref().map(|cold| cold.model(id)).transpose()?;
        let hot = HotModel { name: name.into(), fingerprint, block_tokens };
        Ok(ModelTiers { tiers: self.clone(), hot, cold, groups })
    }

    /// Keeps rows of the last of `tokens`, a whole span that came from the cold tier, in the hot one, if there is one:
    /// they may have to leave the pools again.
    fn keep_hot(&self, model: &HotModel, group: usize, tokens: &[u32], rows: &Rows) {
        if self.hot.limit() > 0 {
            let span = span_of(model, group, tokens, tokens.len() - rows.tokens());
            let cost = FILE_SECONDS + rows.bytes() as f64 / ASSUMED_RATE;
            self.write_evicted(self.hot.put(model, group, span, Arc::clone(rows), cost, false));
        }
    }

    /// Empties the hot tier, unless `all` only as far as what is nowhere else can be written.
    pub fn release_hot(&self, all: bool) {
        let cold = self.cold.as_ref().filter(|_| !all);
        let room = cold.map_or(usize::MAX, |cold| cold.write_bytes.saturating_sub(cold.writer.pending_bytes()));
        self.write_evicted(self.hot.release(room as u64));
    }

    /// Writes what had to leave the hot tier, of whatever model; whether nothing was lost.
    pub fn write_evicted(&self, evicted: Vec<Evicted>) -> bool {
        let mut kept = true;
        for Evicted { model, group, span, rows, cost, dirty } in evicted {
            let Some(cold) = self.cold.as_ref().filter(|_| dirty) else { continue };
            let of = lock(&cold.models).get(&model.fingerprint).cloned();
            // Somebody may still be copying from it.
            let rows = Arc::try_unwrap(rows).unwrap_or_else(|shared| shared.copy());
            kept &= of.is_some_and(|of| cold.writer.submit(of, group, span, rows, cost).is_ok());
        }
        kept
    }
}

impl Cold {
    /// The tier with threads that write and read; at most `write_bytes` wait to be written.
    pub fn new(tier: Arc<ColdTier>, write_bytes: usize, readers: usize) -> Result<Self> {
        let writer = Arc::new(ColdWriter::new(write_bytes)?);
        let reader = Arc::new(ColdReader::new(readers)?);
        Ok(Self { tier, writer, reader, write_bytes, models: Arc::default() })
    }

    /// Bytes that may wait to be written.
    pub fn write_bytes(&self) -> usize {
        self.write_bytes
    }

    /// Whether half of the room is left for what has to be written at once.
    fn has_room(&self) -> bool {
        self.writer.pending_bytes() < self.write_bytes / 2
    }

    fn model(&self, id: ModelId) -> Result<ColdModel> {
        let fingerprint = id.fingerprint;
        let model = self.tier.model(id)?;
        lock(&self.models).insert(fingerprint, model.clone());
        Ok(model)
    }
}

impl ModelTiers {
    /// Whether rows are saved as soon as they are computed.
    pub fn write_through(&self) -> bool {
        self.tiers.write_through
    }

    /// Whether a span could be saved without waiting for the disk.
    pub fn has_room(&self) -> bool {
        self.tiers.cold.as_ref().is_none_or(Cold::has_room)
    }

    /// Memory for the rows of a save.
    pub fn buffer(&self, save: &Save) -> RowBuffer {
        row_buffer(&self.groups[save.group].layout, save.tokens.len() - save.start)
    }

    /// Takes rows over, whose computation took `cost` seconds: to the hot tier, or to be written in the background. What
    /// there is no room for is lost; whether nothing was.
    pub fn save(&self, save: Save, rows: RowBuffer, cost: f64) -> bool {
        let span = span_of(&self.hot, save.group, &save.tokens, save.start);
        let cold = self.tiers.cold.as_ref().zip(self.cold.as_ref());
        let write = |span, rows| {
            cold.is_some_and(|(cold, model)| cold.writer.submit(model.clone(), save.group, span, rows, cost).is_ok())
        };
        if self.tiers.hot.limit() == 0 {
            return write(span, rows);
        }
        let written = self.tiers.write_through && write(span.clone(), rows.copy());
        let evicted = self.tiers.hot.put(&self.hot, save.group, span, Arc::new(rows), cost, !written);
        self.tiers.write_evicted(evicted)
    }

    /// Hands what the hot tier alone has of this model to the writer, as far as that has room; whether nothing is left.
    pub fn write_dirty(&self) -> bool {
        let Some(cold) = &self.tiers.cold else { return true };
        for span in self.tiers.hot.dirty(Some(&self.hot)) {
            if !cold.has_room() {
                return false;
            }
            let written = self.tiers.hot.stored(span).is_none_or(|dirty| self.tiers.write_evicted(vec![dirty]));
            if !written {
                return false;
            }
            self.tiers.hot.mark_clean(span);
        }
        true
    }

    /// Writes everything that the hot tier alone has of this model, and waits until all that was given to the writer is
    /// written, `time` at most; whether nothing is left.
    pub fn flush(&self, time: Duration) -> bool {
        let Some(cold) = &self.tiers.cold else { return false };
        let deadline = Instant::now() + time;
        while !self.write_dirty() && Instant::now() < deadline {
            std::thread::sleep(CROWDED);
        }
        cold.writer.flush(deadline.saturating_duration_since(Instant::now())) && self.write_dirty()
    }

    /// Keeps a prefix in the cold tier, or no longer.
    pub fn pin(&self, tokens: &[u32], pin: bool) {
        let Some(cold) = &self.cold else { return };
        if let Err(error) = if pin { cold.pin(tokens) } else { cold.unpin(tokens) } {
            tracing::warn!(model = &*self.hot.name, %error, "a pin is forgotten when the process ends");
        }
    }

    /// Prefixes that are pinned in the cold tier.
    pub fn pins(&self) -> Vec<Arc<[u32]>> {
        self.cold.as_ref().map(ColdModel::pins).unwrap_or_default()
    }

    /// What other tiers have of `tokens`, of which the pools have the beginning, and what is faster to get than to compute, at
    /// `token_seconds` a token if that is known.
    pub fn find(&self, tokens: &[u32], has: &Has, token_seconds: Option<f64>, moving: MoveRate) -> Vec<Fetch> {
        let mut fetches = self.reachable(tokens, has);
        let Some(token_seconds) = token_seconds.filter(|_| !self.tiers.always_restore) else { return fetches };
        let (reading, from) = (self.reading_rate(), has.tokens);
        let end = fetches.iter().map(Fetch::end).max().unwrap_or(from);
        // Rows of windows and states are brought for the end, however much is brought before it.
        let mut windows = Offer { position: from, seconds: 0.0 };
        let mut offers = Vec::with_capacity(fetches.len() + 1);
        for fetch in &fetches {
            let seconds = self.seconds(fetch, reading, moving);
            match self.groups[fetch.group].kind {
                Some(GroupKind::Full) => offers.push(Offer { position: fetch.position, seconds }),
                Some(GroupKind::Window(_)) | None => windows.seconds += seconds,
            }
        }
        offers.sort_by_key(|offer| offer.position);
        offers.insert(0, windows);
        let best = worth_until(&offers, from, end, token_seconds);
        if best == end {
            return fetches;
        }
        if self.groups.iter().any(|group| group.kind != Some(GroupKind::Full)) {
            return self.reachable(&tokens[..best], has);
        }
        cut(&mut fetches, best);
        fetches
    }

    /// What the tiers have of `tokens` behind what the pools have, up to the last token at which both together have all rows that
    /// a sequence needs: of each group without a gap, in the order of the groups, the state last.
    fn reachable(&self, tokens: &[u32], has: &Has) -> Vec<Fetch> {
        let (block_tokens, rows) = (self.hot.block_tokens, self.groups.iter().filter_map(|group| group.kind));
        let from = has.rows / block_tokens * block_tokens;
        let first = |kind: GroupKind, end| (kind.first_block(end, block_tokens) * block_tokens).max(from);
        let mut end = tokens.len();
        for _ in 0..LOOKS {
            let own = has.states.iter().copied().filter(|state| (has.tokens + 1..=end).contains(state)).max();
            let from_tiers = |group| self.find_state(group, &tokens[..end], own.unwrap_or(has.tokens));
            let states = self.state_group();
            let state = states.and_then(from_tiers);
            match state.as_ref().map(Fetch::end).or(own) {
                Some(reached) => end = reached,
                None if states.is_some() => break,
                None => {}
            }
            let (mut fetches, mut reached) = (Vec::new(), end);
            for (at, kind) in rows.clone().enumerate().filter(|_| end > has.rows) {
                let mut own = self.find_in(at, &tokens[..end], first(kind, end));
                reached = reached.min(own.last().map_or(first(kind, end), Fetch::end));
                fetches.append(&mut own);
            }
            if reached <= has.tokens {
                break;
            }
            // A shorter one may need earlier rows of windows, and another state.
            let serves = match states {
                Some(_) => reached == end,
                None => rows.clone().all(|kind| first(kind, reached) == first(kind, end)),
            };
            if serves {
                cut(&mut fetches, reached);
                fetches.extend(state);
                return fetches;
            }
            end = reached;
        }
        Vec::new()
    }

    /// The group of states, if sequences have some.
    fn state_group(&self) -> Option<usize> {
        (0..self.groups.len()).find(|&group| self.is_state(group))
    }

    /// The longest beginning of `tokens`, of more than `from` of them, whose state a tier has.
    fn find_state(&self, group: usize, tokens: &[u32], from: usize) -> Option<Fetch> {
        let hot = self.tiers.hot.find_state(&self.hot, group, tokens, from);
        let hot = hot.and_then(|piece| self.hot_fetch(group, piece));
        let before = hot.as_ref().map_or(from, Fetch::end);
        let cold = self.cold.as_ref().and_then(|cold| cold.find_state(group, tokens, before));
        cold.map(|found| self.cold_fetch(group, found)).or(hot)
    }

    /// What the tiers have of a group, without a gap.
    fn find_in(&self, group: usize, tokens: &[u32], from: usize) -> Vec<Fetch> {
        let mut fetches: Vec<Fetch> = Vec::new();
        let mut at = from;
        loop {
            let end = |found: &[Fetch]| found.last().map_or(at, Fetch::end);
            let whole = |found: &[Fetch]| end(found) / self.hot.block_tokens * self.hot.block_tokens;
            // A block of which one tier has the beginning may be whole in the other.
            let hot = self.find_hot(group, tokens, at);
            let mut next = if whole(&hot) > at {
                hot
            } else {
                let cold = self.find_cold(group, tokens, at);
                if end(&cold) > end(&hot) { cold } else { hot }
            };
            let reached = whole(&next);
            if reached <= at {
                fetches.append(&mut next);
                return fetches;
            }
            cut(&mut next, reached);
            fetches.append(&mut next);
            at = reached;
        }
    }

    fn find_hot(&self, group: usize, tokens: &[u32], from: usize) -> Vec<Fetch> {
        let found = self.tiers.hot.find(&self.hot, group, tokens, from);
        found.into_iter().map_while(|piece| self.hot_fetch(group, piece)).collect()
    }

    fn hot_fetch(&self, group: usize, piece: Piece) -> Option<Fetch> {
        let source = Source::Hot(piece.span, self.tiers.hot.get(piece.span)?);
        let Piece { position, skip, tokens, .. } = piece;
        Some(Fetch { group, position, skip, tokens, bytes: 0, is_state: self.is_state(group), source })
    }

    fn find_cold(&self, group: usize, tokens: &[u32], from: usize) -> Vec<Fetch> {
        let found = self.cold.iter().flat_map(|cold| cold.find(group, tokens, from));
        found.map(|found| self.cold_fetch(group, found)).collect()
    }

    fn cold_fetch(&self, group: usize, found: ColdPiece) -> Fetch {
        let Piece { position, skip, tokens, .. } = found.piece;
        let (bytes, is_state) = (found.bytes as usize, self.is_state(group));
        Fetch { group, position, skip, tokens, bytes, is_state, source: Source::Cold(found) }
    }

    fn is_state(&self, group: usize) -> bool {
        self.groups[group].kind.is_none()
    }

    /// How long a fetch takes. Files are read while those before them are moved into the pools.
    fn seconds(&self, fetch: &Fetch, reading: f64, moving: MoveRate) -> f64 {
        let moved = moving.seconds(fetch.tokens * self.groups[fetch.group].layout.token_bytes());
        match &fetch.source {
            Source::Hot(..) => moved,
            Source::Cold(_) => moved.max(FILE_SECONDS + fetch.bytes as f64 / reading),
        }
    }

    /// Bytes per second of the cold tier.
    fn reading_rate(&self) -> f64 {
        self.tiers.cold.as_ref().map_or(ASSUMED_RATE, |cold| cold.tier.read_rate(ASSUMED_RATE))
    }

    /// Gets rows and hands them to `done`, on another thread or at once; `None` if they are not there any more.
    pub fn fetch(&self, fetch: &Fetch, tokens: &Arc<[u32]>, done: Box<dyn FnOnce(Option<Rows>) + Send>) {
        match (&fetch.source, &self.tiers.cold, &self.cold) {
            (Source::Hot(span, rows), _, _) => {
                self.tiers.hot.used(*span, fetch.tokens);
                done(Some(Arc::clone(rows)));
            }
            (Source::Cold(piece), Some(cold), Some(model)) => {
                let (tiers, of, group) = (self.tiers.clone(), self.hot.clone(), fetch.group);
                let (all, used, end) = (Arc::clone(tokens), fetch.skip + fetch.tokens, fetch.position + fetch.tokens);
                let read = move |rows: Option<RowBuffer>| {
                    let rows = rows.map(Arc::new);
                    // Which tokens follow in a span of which only the beginning is of use is not known here.
                    let whole = rows.iter().filter(|rows| rows.tokens() == used);
                    whole.for_each(|rows| tiers.keep_hot(&of, group, &all[..end], rows));
                    done(rows);
                };
                cold.reader.read(model.clone(), fetch.group, *piece, Arc::clone(tokens), Box::new(read));
            }
            (Source::Cold(_), _, _) => done(None),
        }
    }

    /// Where the rows of `tokens` are that the pools have not.
    pub fn whereabouts(&self, tokens: &[u32], pools: &InPools, moving: MoveRate) -> Whereabouts {
        let (block_tokens, pool) = (self.hot.block_tokens, pools.has.tokens);
        let mut found = Whereabouts { tokens: tokens.len(), pool, ..Whereabouts::default() };
        let (mut reached, reading) = (pool, self.reading_rate());
        for fetch in self.reachable(tokens, &pools.has) {
            // The pools may have the end of a prompt, too.
            let new = fetch.end().saturating_sub(reached);
            if new > 0 || fetch.group > 0 {
                found.restore_seconds += self.seconds(&fetch, reading, moving);
            }
            // Rows of the other groups are of the same tokens, or of fewer; a state may be all that is missing.
            let counts = fetch.group == 0 || fetch.is_state;
            let new = if counts { new } else { 0 };
            reached += new;
            match fetch.source {
                Source::Hot(..) => found.hot += new,
                Source::Cold(_) => found.cold += new,
            }
        }
        let at = reached / block_tokens * block_tokens;
        let cold = self.cold.as_ref().and_then(|cold| cold.agrees_behind(0, tokens, at));
        let there = [self.tiers.hot.agrees_behind(&self.hot, 0, tokens, at), cold];
        let others = there.contains(&Some(false)) || pools.others && reached == pool;
        found.end(pools, others && !there.contains(&Some(true)));
        found
    }

    /// So many tokens of the model were computed.
    pub fn count_new(&self, tokens: u64) {
        self.cold.iter().for_each(|cold| cold.count_new(tokens));
    }
}

impl Fetch {
    /// Tokens of the sequence up to its end.
    pub fn end(&self) -> usize {
        self.position + self.tokens
    }
}

/// Leaves of fetches what is before the token `end` of the sequence.
fn cut(fetches: &mut Vec<Fetch>, end: usize) {
    fetches.iter_mut().for_each(|fetch| fetch.tokens = fetch.tokens.min(end.saturating_sub(fetch.position)));
    fetches.retain(|fetch| fetch.tokens > 0);
}

/// The span of `tokens` behind the first `start` of them.
fn span_of(model: &HotModel, group: usize, tokens: &[u32], start: usize) -> Span {
    let root = root_key(&model.fingerprint, group);
    let before = tokens[..start].chunks(model.block_tokens);
    let parent = before.fold(root, |key, tokens| chain_key(&key, tokens));
    Span { parent, start, tokens: tokens[start..].into() }
}
