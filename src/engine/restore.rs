//! Brings rows that other tiers have into the pools before their sequences are scheduled.
//!
//! The scheduler knows nothing of it: rows that have arrived are cached blocks, and it finds them as it finds all others.
//! A restore that fails, or that is given up, leaves its sequences with fewer cached tokens and nothing else. Rows get
//! blocks only when their sequence can begin at once: cached earlier, they would be evicted by those before it. While
//! there are restores, requests that need none queue behind them, so that nobody is overtaken for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::request::Priority;
use super::runner::Runner;
use super::scheduler::Scheduler;
use super::sequence::Sequence;
use super::tiers::{Fetch, Has, ModelTiers, Rows};
use super::worker::Command;
use super::worth::MoveRate;
use crate::cache::rows::RowBuffer;
use crate::cache::{BlockId, BlockManager, Table};
use crate::error::Result;
use crate::fault;

/// Bytes that may be on their way from other tiers, or wait for a place in the pools, at most.
const READ_AHEAD: u64 = 256 << 20;

/// And this part of the limit of memory, where that counts them.
const SHARE_OF_LIMIT: u64 = 64;

/// Restores whose tokens agree so far are taken to bring the same rows.
const BEGINNING: usize = 32;

/// What happens once the rows are there.
#[derive(Debug)]
pub enum Then {
    /// These sequences, which begin with the tokens, are scheduled.
    Run(Vec<Sequence>),
    /// Whoever asked is told how many tokens are in the pools.
    Tell(Sender<usize>),
    /// They are pinned.
    Pin,
}

/// Tokens whose rows are being brought.
#[derive(Debug)]
struct Restore {
    id: u64,
    tokens: Arc<[u32]>,
    /// Tokens that the pools had: whole blocks.
    from: usize,
    fetches: Vec<Fetch>,
    /// Rows that have arrived, and why there are none, fetch by fetch.
    rows: Vec<Arrival>,
    then: Then,
    /// Blocks for all the rows.
    table: Option<Table>,
}

#[derive(Debug)]
enum Arrival {
    NotAsked,
    OnItsWay,
    Here(Rows),
    InPlace,
    Missing,
}

/// Bytes that an engine may read ahead, of whose rows a span takes `span` bytes: one span at least. `limit` is that of the
/// memory that counts them, if one does.
pub fn read_ahead(span: u64, limit: Option<u64>) -> u64 {
    limit.map_or(READ_AHEAD, |limit| READ_AHEAD.min(limit / SHARE_OF_LIMIT)).max(span)
}

/// Tokens in whole blocks whose rows the pools have, before the end of what is brought: where only a state is, they have the end,
/// too.
pub fn whole_blocks(has: &Has, fetches: &[Fetch], block_tokens: usize) -> usize {
    let end = fetches.iter().map(Fetch::end).max().unwrap_or(has.rows);
    has.rows.min(end) / block_tokens * block_tokens
}

/// All restores of an engine, first come, first served.
#[derive(Debug)]
pub struct Restores {
    queue: VecDeque<Restore>,
    next: u64,
    /// Bytes that `ahead` may become, but for a single fetch that is larger.
    most: usize,
    /// Bytes that are on their way or have arrived.
    ahead: usize,
    /// How fast rows get from the host's memory into the pools.
    moving: MoveRate,
}

/// A restore that has ended: its tokens, what is to happen now, and how many of the tokens are in the pools.
pub type Restored = (Arc<[u32]>, Then, usize);

/// What the first restore waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: it can go on.
    Nothing,
    /// Rows, or there is no restore.
    Rows,
    /// So many blocks of each group, which the pools have to grow by, or which others will give back.
    Blocks(Vec<usize>),
}

impl Restores {
    /// None yet; `most` bytes may be on their way.
    pub fn new(most: u64) -> Self {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        Self { queue: VecDeque::new(), next: 0, most, ahead: 0, moving: MoveRate::default() }
    }

    /// Begins to bring `fetches` of `tokens`, of which the pools have the first `from` (whole blocks).
    pub fn begin(&mut self, tokens: Arc<[u32]>, from: usize, fetches: Vec<Fetch>, then: Then) {
        let rows = fetches.iter().map(|_| Arrival::NotAsked).collect();
        let restore = Restore { id: self.next, tokens, from, fetches, rows, then, table: None };
        self.next += 1;
        // Behind those of its class, and behind one that has blocks.
        let later = |other: &Restore| other.table.is_none() && other.priority() > restore.priority();
        let at = self.queue.iter().position(later).unwrap_or(self.queue.len());
        self.queue.insert(at, restore);
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether sequences wait for what is brought.
    pub fn have_sequences(&self) -> bool {
        self.queue.iter().any(|restore| matches!(restore.then, Then::Run(_)))
    }

    /// How fast rows have got from the host's memory into the pools.
    pub fn moving(&self) -> MoveRate {
        self.moving
    }

    /// Rows have arrived, or will not.
    pub fn arrived(&mut self, id: u64, fetch: usize, rows: Option<Rows>) {
        let Some(restore) = self.queue.iter_mut().find(|restore| restore.id == id) else { return };
        if !matches!(restore.rows[fetch], Arrival::OnItsWay) {
            return;
        }
        if rows.is_none() {
            self.ahead -= restore.fetches[fetch].bytes;
        }
        restore.rows[fetch] = rows.map_or(Arrival::Missing, Arrival::Here);
    }

    /// Asks for rows, as far ahead as there is memory for. Of restores with the same beginning only the first one asks:
    /// the others find in the pools what it brings.
    pub fn ask(&mut self, tiers: &ModelTiers, scheduler: &mut Scheduler, inbox: &Sender<Command>) {
        if let Some(first) = self.queue.front_mut().filter(|first| first.table.is_none()) {
            let (mut has, mut cached) = first.cached(scheduler);
            if cached < first.from {
                first.give_up(&mut self.ahead);
                let (limit, seconds) = (first.limit(), scheduler.seconds_per_token(first.tokens.len()));
                let fetches = tiers.find(&first.tokens[..limit], &has, seconds, self.moving);
                let from = whole_blocks(&has, &fetches, scheduler.blocks().block_tokens());
                // What is on its way is for another one.
                first.begin_again(self.next, from, fetches);
                self.next += 1;
                (has, cached) = first.cached(scheduler);
            }
            first.skip_cached(&has, cached, &mut self.ahead);
        }
        let mut beginnings: Vec<Arc<[u32]>> = Vec::new();
        for (place, restore) in self.queue.iter_mut().enumerate() {
            let begins = |other: &Arc<[u32]>| {
                restore.tokens[..restore.tokens.len().min(BEGINNING)].starts_with(&other[..other.len().min(BEGINNING)])
            };
            if beginnings.iter().any(begins) {
                continue;
            }
            beginnings.push(Arc::clone(&restore.tokens));
            for at in 0..restore.fetches.len() {
                let fetch = &restore.fetches[at];
                if !matches!(restore.rows[at], Arrival::NotAsked) {
                    continue;
                }
                // Those behind may have taken all of the memory before the first one came: it must get on all the same.
                let asked = |rows: &Arrival| matches!(rows, Arrival::OnItsWay | Arrival::Here(_));
                let stuck = place == 0 && !restore.rows.iter().any(asked);
                if self.ahead + fetch.bytes > self.most && !stuck {
                    return;
                }
                self.ahead += fetch.bytes;
                restore.rows[at] = Arrival::OnItsWay;
                let (id, inbox) = (restore.id, inbox.clone());
                let done = move |rows| drop(inbox.send(Command::Fetched(id, at, rows)));
                tiers.fetch(fetch, &restore.tokens, Box::new(done));
            }
        }
    }

    /// What the first restore waits for. Only the first one gets blocks, so that two never wait for each other's.
    pub fn waits_for(&self, scheduler: &mut Scheduler) -> Wait {
        match self.queue.front() {
            None => Wait::Rows,
            Some(first) if first.is_abandoned() => Wait::Nothing,
            Some(first) if !first.may_begin(scheduler) => Wait::Rows,
            Some(first) if first.is_over() => Wait::Nothing,
            Some(first) => match first.table.is_none().then(|| first.missing_blocks(scheduler)).flatten() {
                Some(missing) => Wait::Blocks(missing),
                None if first.table.is_none() || first.next_here().is_some() => Wait::Nothing,
                None => Wait::Rows,
            },
        }
    }

    /// Ends restores whose sequences were all cancelled, but for one that has blocks: [`place`](Self::place) ends that.
    pub fn take_cancelled(&mut self, scheduler: &mut Scheduler) -> Vec<Restored> {
        let mut cancelled = Vec::new();
        while let Some(at) = self.queue.iter().position(|restore| restore.table.is_none() && restore.is_abandoned()) {
            if let Some(mut restore) = self.queue.remove(at) {
                restore.give_up(&mut self.ahead);
                cancelled.push(restore.finish(scheduler));
            }
        }
        cancelled
    }

    /// Gives blocks to the first restore. What is evicted for them is to be saved before [`place`](Self::place).
    pub fn make_room(&mut self, scheduler: &mut Scheduler) {
        let Some(first) = self.queue.front_mut().filter(|first| first.table.is_none()) else { return };
        if first.is_abandoned() || !first.take_blocks(scheduler) {
            first.give_up(&mut self.ahead);
        }
    }

    /// Moves rows of the first restore that have arrived into its blocks, `most` fetches at most. No step may be on its
    /// way. Returns the restore if that was all.
    pub fn place(&mut self, runner: &mut Runner, scheduler: &mut Scheduler, most: usize) -> Result<Option<Restored>> {
        let Some(first) = self.queue.front_mut() else { return Ok(None) };
        if first.is_abandoned() {
            first.give_up(&mut self.ahead);
        }
        for _ in 0..most {
            let Some(at) = first.next_here() else { break };
            self.ahead -= first.fetches[at].bytes;
            let begun = Instant::now();
            let bytes = first.place(at, runner)?;
            self.moving.observe(bytes, begun.elapsed().as_secs_f64());
        }
        if !first.is_over() {
            return Ok(None);
        }
        Ok(self.queue.pop_front().map(|first| first.finish(scheduler)))
    }

    /// All restores, none of which has asked for rows yet, in their order.
    pub fn take_all(&mut self) -> Vec<(Arc<[u32]>, Then)> {
        std::mem::take(&mut self.queue).into_iter().map(|restore| (restore.tokens, restore.then)).collect()
    }

    /// Ends all restores as they are.
    pub fn end(&mut self, scheduler: &mut Scheduler) -> Vec<Restored> {
        self.ahead = 0;
        std::mem::take(&mut self.queue).into_iter().map(|restore| restore.finish(scheduler)).collect()
    }
}

impl Restore {
    /// The tokens that will be in the pools if everything arrives.
    fn end(&self) -> usize {
        self.fetches.iter().map(|fetch| fetch.position + fetch.tokens).max().unwrap_or(self.from)
    }

    fn is_abandoned(&self) -> bool {
        match &self.then {
            Then::Run(sequences) => sequences.iter().all(Sequence::is_cancelled),
            Then::Tell(_) | Then::Pin => false,
        }
    }

    /// Whom it goes before.
    fn priority(&self) -> Priority {
        match &self.then {
            Then::Run(sequences) => sequences.first().map_or(Priority::Normal, |first| first.priority),
            Then::Tell(_) | Then::Pin => Priority::Normal,
        }
    }

    /// Whether its sequences would begin at once.
    fn may_begin(&self, scheduler: &Scheduler) -> bool {
        !matches!(self.then, Then::Run(_)) || self.table.is_some() || scheduler.has_place()
    }

    /// Blocks of a group that it needs, those for the tokens that no tier has included.
    fn needed(&self, scheduler: &mut Scheduler, group: usize) -> usize {
        let (from, tokens) = (self.from, self.tokens.len() + 1);
        let most = scheduler.most_blocks(group, tokens);
        let blocks = scheduler.blocks();
        let block_tokens = blocks.block_tokens();
        // The rows themselves, before any of them is given back.
        let first = blocks.kind(group).first_block(self.end(), block_tokens).max(from / block_tokens);
        let restored = self.end().div_ceil(block_tokens) - first;
        match &self.then {
            Then::Run(_) => (tokens.div_ceil(block_tokens) - from / block_tokens).min(most).max(restored),
            Then::Tell(_) | Then::Pin => restored,
        }
    }

    /// Blocks of each group, if it has to wait for some.
    fn missing_blocks(&self, scheduler: &mut Scheduler) -> Option<Vec<usize>> {
        let (groups, counters) = (scheduler.blocks().groups(), scheduler.counters());
        let (others, owed) = (counters.running + counters.waiting > 0, scheduler.owed_blocks());
        let needed: Vec<usize> = (0..groups).map(|group| self.needed(scheduler, group)).collect();
        // What the pools have of it is not to be taken for the rest of it.
        let blocks = scheduler.blocks();
        let mut table = blocks.table();
        blocks.find_rows(&mut table, &self.tokens, self.from);
        let available: Vec<usize> = (0..groups).map(|group| blocks.available(group)).collect();
        blocks.release(table);
        let waits = |group: usize| {
            let (limit, blocks) = (scheduler.blocks_limit(group), scheduler.blocks());
            // Rather more blocks than the loss of cached ones.
            let grows = blocks.counts(group).free < needed[group] && blocks.capacity(group) < limit;
            grows || others && available[group] < needed[group] + owed[group]
        };
        (0..groups).any(waits).then_some(needed)
    }

    /// Tokens whose rows can be of use: the last one is computed in any case.
    fn limit(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    /// What the pools have now, and the whole blocks of it.
    fn cached(&self, scheduler: &mut Scheduler) -> (Has, usize) {
        let blocks = scheduler.blocks();
        let has = Has::of(blocks, &self.tokens[..self.end()]);
        let whole = whole_blocks(&has, &self.fetches, blocks.block_tokens());
        (has, whole)
    }

    /// Rows that the pools had were evicted meanwhile: `fetches` are behind those that are left.
    fn begin_again(&mut self, id: u64, from: usize, fetches: Vec<Fetch>) {
        self.id = id;
        self.from = from;
        self.rows = fetches.iter().map(|_| Arrival::NotAsked).collect();
        self.fetches = fetches;
    }

    /// Another may have brought some of the rows meanwhile.
    fn skip_cached(&mut self, has: &Has, cached: usize, ahead: &mut usize) {
        self.from = self.from.max(cached);
        for (fetch, rows) in self.fetches.iter_mut().zip(&mut self.rows) {
            let there = if fetch.is_state { has.tokens } else { self.from };
            let skip = there.saturating_sub(fetch.position).min(fetch.tokens);
            fetch.position += skip;
            fetch.skip += skip;
            fetch.tokens -= skip;
            if fetch.tokens == 0 {
                if matches!(rows, Arrival::OnItsWay | Arrival::Here(_)) {
                    *ahead -= fetch.bytes;
                }
                *rows = Arrival::InPlace;
            }
        }
    }

    /// Takes blocks for all rows; false if there are not enough, or if what the pools had is no longer there.
    fn take_blocks(&mut self, scheduler: &mut Scheduler) -> bool {
        let (end, blocks) = (self.end(), scheduler.blocks());
        let mut table = blocks.table();
        // Restored rows begin at a block: nothing is copied. Where only a state comes, the pools have all rows.
        let brings_rows = self.fetches.iter().any(|fetch| !fetch.is_state);
        let had = if brings_rows { self.from } else { end };
        let rows = blocks.find_rows(&mut table, &self.tokens, had) == had
            && (!brings_rows || blocks.extend_with_restored(&mut table, self.from, end).is_ok());
        // One that the slots had when it was looked for may be gone: then nothing is kept in its name.
        let comes = |(fetch, rows): (&Fetch, &Arrival)| fetch.is_state && !matches!(rows, Arrival::InPlace);
        let brings_state = self.fetches.iter().zip(&self.rows).any(comes);
        let taken = rows && (!brings_state || blocks.receive_state(&mut table, end).is_some());
        if taken {
            self.table = Some(table);
        } else {
            blocks.release(table);
        }
        taken
    }

    fn next_here(&self) -> Option<usize> {
        self.rows.iter().position(|rows| matches!(rows, Arrival::Here(_)))
    }

    /// Moves the rows of a fetch to their blocks; how many bytes that were.
    fn place(&mut self, at: usize, runner: &mut Runner) -> Result<usize> {
        let Arrival::Here(rows) = std::mem::replace(&mut self.rows[at], Arrival::InPlace) else { return Ok(0) };
        let (Some(table), fetch) = (&self.table, &self.fetches[at]) else { return Ok(0) };
        if fetch.is_state {
            if let Some(slot) = table.state() {
                runner.states().write(slot, &rows)?;
                if fault::happens("restore.state", runner.id()) {
                    runner.states().write(slot, &RowBuffer::new(Arc::clone(rows.layout()), 1, 0))?;
                }
            }
            return Ok(rows.layout().token_bytes());
        }
        let block_tokens = runner.pages().block_tokens();
        let first = fetch.position / block_tokens;
        let blocks = table.blocks(fetch.group).skip(first).take(fetch.tokens.div_ceil(block_tokens));
        let blocks: Vec<BlockId> = blocks.flatten().collect();
        runner.pages().write_rows(&blocks, &rows, fetch.skip..fetch.skip + fetch.tokens)?;
        if fault::happens("restore.rows", runner.id()) {
            runner.pages().write_rows(&blocks[1..2], &rows, fetch.skip..fetch.skip + block_tokens)?;
        }
        Ok(fetch.tokens * rows.layout().token_bytes())
    }

    /// Waits for nothing any more.
    fn give_up(&mut self, ahead: &mut usize) {
        for (rows, fetch) in self.rows.iter_mut().zip(&self.fetches) {
            if matches!(rows, Arrival::OnItsWay | Arrival::Here(_)) {
                *ahead = ahead.saturating_sub(fetch.bytes);
            }
            if !matches!(rows, Arrival::InPlace) {
                *rows = Arrival::Missing;
            }
        }
    }

    /// Whether nothing more will come.
    fn is_over(&self) -> bool {
        self.rows.iter().all(|rows| matches!(rows, Arrival::InPlace | Arrival::Missing))
    }

    /// Tokens whose rows are there now, as far as a sequence needs them that goes on behind them.
    fn reached(&self, blocks: &BlockManager) -> usize {
        let block_tokens = blocks.block_tokens();
        if self.fetches.iter().all(|fetch| fetch.is_state) {
            return self.end();
        }
        let own = |group| self.fetches.iter().zip(&self.rows).filter(move |(fetch, _)| fetch.group == group);
        let there = |group| {
            let there = own(group).take_while(|(_, rows)| matches!(rows, Arrival::InPlace));
            there.last().map_or(self.from, |(fetch, _)| fetch.position + fetch.tokens)
        };
        let groups = 0..blocks.groups();
        let reached = groups.clone().map(there).min().unwrap_or(self.from);
        // The rows of a window were brought for the end only.
        let serves = |group| {
            let first = own(group).map(|(fetch, _)| fetch.position).min().unwrap_or(self.from);
            first <= self.from || first <= blocks.kind(group).first_block(reached, block_tokens) * block_tokens
        };
        if groups.clone().all(serves) { reached } else { self.from }
    }

    /// Puts what has come into the index.
    fn finish(mut self, scheduler: &mut Scheduler) -> (Arc<[u32]>, Then, usize) {
        let blocks = scheduler.blocks();
        let (mut reached, mut brings_state) = (self.from, false);
        if let Some(mut table) = self.table.take() {
            reached = self.reached(blocks);
            let tokens = &self.tokens[..reached];
            if reached > self.from {
                blocks.index_tail(&mut table, tokens, reached);
            }
            for group in 0..blocks.groups() {
                let own = self.fetches.iter().filter(|fetch| fetch.group == group);
                let first = own.map(|fetch| fetch.position).min().unwrap_or(reached);
                blocks.set_saved(group, tokens, first);
            }
            let there = |(fetch, rows): (&Fetch, &Arrival)| {
                fetch.is_state && fetch.end() == reached && matches!(rows, Arrival::InPlace)
            };
            brings_state = table.state().is_some() && self.fetches.iter().zip(&self.rows).any(there);
            if brings_state {
                blocks.keep_restored_state(&table, tokens);
            }
            blocks.release(table);
        }
        // Rows alone serve nobody where sequences have states.
        if blocks.has_states() && !brings_state {
            reached = blocks.peek(&self.tokens);
        }
        (self.tokens, self.then, reached)
    }
}
