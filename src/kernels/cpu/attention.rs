//! Attention over paged keys and values: any mix of decoding rows and prompt chunks in one call.
//!
//! Online softmax (Milakov and Gimelshein 2018) in f32. A key's score is a dot product in the order of `dot.rs`; keys are
//! taken in chunks and chunks in splits that lie at fixed positions of the sequence, and the results of splits are merged
//! in their order. So a row's bits depend on its query and its keys alone: not on the other rows, on how the prompt was
//! cut, on where blocks lie, or on threads; in fast precision also on whether many rows are computed together, where
//! the processor multiplies bf16.

mod chunk;
mod pairs;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use chunk::{AttendChunk, Chunk};
use pairs::{AttendPairs, Panels};

use super::floats::{Element, FloatsMut, Rows, SharedFloats, SharedMut, SharedSlice};
use super::math;
use super::matmul::Precision;
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Keys whose scores are computed together.
const CHUNK: usize = 32;

/// Keys that one task attends to at most when there are more threads than heads; a multiple of `CHUNK`.
const SPLIT: usize = 512;

/// Query rows of a tile at most, unless a single token has more that share a head of keys. A tile reads its keys and
/// values once, from memory in a long context: that should take less time than what is computed with them.
const ROWS: usize = 48;

/// The same where a tile takes several heads of keys.
const ROWS_OF_HEADS: usize = 24;

/// Rows up to which keys and values are read as they are.
const FEW_ROWS: usize = 8;

/// Tasks that a thread should have, so that all end together.
const TASKS_PER_THREAD: usize = 1;

/// A pool's rows `[blocks * block_tokens, kv_heads, row]`, or some columns of each.
#[derive(Debug, Clone, Copy)]
pub struct PoolView<'a> {
    /// The elements.
    numbers: SharedFloats<'a>,
    /// Width of a head.
    width: usize,
    /// Elements from one head to the next, and before the first column of one.
    row: usize,
    first: usize,
}

impl<'a> PoolView<'a> {
    /// Heads of `width` elements.
    pub fn new(numbers: impl Into<SharedFloats<'a>>, width: usize) -> Self {
        Self { numbers: numbers.into(), width, row: width, first: 0 }
    }

    /// The last `width` columns of heads of `row` elements.
    pub fn last_columns(numbers: impl Into<SharedFloats<'a>>, row: usize, width: usize) -> Self {
        Self { numbers: numbers.into(), width, row, first: row - width }
    }
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Their rows among the step's.
    pub rows: Range<usize>,
    /// Position of the first one in its sequence.
    pub start: usize,
    /// Where the sequence's block ids begin in the tables: block `i` holds positions from `i * block_tokens` on.
    pub table: usize,
}

/// Which of the tokens up to its own a query sees, where that is not all of them; at most this many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// The newest ones.
    Sliding(usize),
    /// Those of its own chunk: chunks begin at the multiples of their length (Llama 4).
    Chunked(usize),
}

impl Window {
    /// Tokens it has at most.
    pub fn tokens(self) -> usize {
        match self {
            Self::Sliding(tokens) | Self::Chunked(tokens) => tokens,
        }
    }

    /// The first position that a query at `position` sees. It never goes back while positions go on, and lies behind
    /// `position - tokens`.
    #[inline(always)]
    pub fn first(self, position: usize) -> usize {
        match self {
            Self::Sliding(tokens) => (position + 1).saturating_sub(tokens),
            Self::Chunked(tokens) => position / tokens * tokens,
        }
    }
}

/// What a model's attention is like.
#[derive(Debug, Clone)]
pub struct AttentionKind {
    /// Heads of keys and values; divides the number of query heads.
    pub kv_heads: usize,
    /// Query heads.
    pub heads: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// What a query sees; `None` is all up to itself.
    pub window: Option<Window>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
}

/// Queries to attend with.
#[derive(Debug)]
pub struct Attention<'a> {
    /// What it is like.
    pub kind: &'a AttentionKind,
    /// `[T, heads, key width]`.
    pub queries: &'a [f32],
    /// The pool of keys.
    pub keys: PoolView<'a>,
    /// The pool of values; their width may differ.
    pub values: PoolView<'a>,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Block ids of all sequences.
    pub tables: &'a [u32],
    /// The rows to compute; those of no segment are not written.
    pub segments: &'a [Segment],
    /// A score per query head that attends to nothing.
    pub sinks: Option<&'a [f32]>,
    /// Whether queries and weights may be rounded to bf16 where keys and values are.
    pub precision: Precision,
}

/// What is computed together: some tokens of a segment, for some heads of keys that lie side by side in memory.
///
/// Its rows are the queries of the first head of keys, token by token, then those of the next.
#[derive(Debug, Clone)]
struct Tile {
    segment: usize,
    /// Rows of the step.
    tokens: Range<usize>,
    kv_heads: Range<usize>,
}

/// A tile, or one split of it.
#[derive(Debug)]
struct Task {
    tile: usize,
    splits: Range<usize>,
    /// Where the result waits to be merged with those of the tile's other splits.
    part: Option<usize>,
}

/// Softmax-weighted sums over some of the keys, for the rows of a tile.
#[derive(Debug, Clone, Default)]
struct Partial {
    /// Largest score; negative infinity if there was no key.
    max: Vec<f32>,
    /// `[rows, LANES]`; the lanes of a row add up to its sum of `e^(score - max)`.
    sum: Vec<f32>,
    /// `[rows, value width rounded up to lanes]`, not divided by `sum`.
    values: Vec<f32>,
}

#[derive(Debug, Default)]
struct Scratch {
    /// `[rows, key width rounded up to lanes]`, zeros behind.
    queries: Vec<f32>,
    /// A chunk, widened to f32: only for many rows.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// `[rows of all heads, CHUNK]`, first scores and then weights.
    scores: Vec<f32>,
    panels: Panels,
    split: Partial,
    total: Partial,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes rows of `heads * width` numbers into a pool: row `i` at place `slots[i]`, counted in tokens over all blocks.
///
/// # Safety
/// The pool is there, and nobody else touches these places.
pub unsafe fn append(pool: SharedMut, rows: Rows<'_>, slots: &[u32]) {
    rows.check(slots.len());
    for (row, &slot) in slots.iter().enumerate() {
        // SAFETY: the caller's promise; `write` checks the bounds.
        unsafe { pool.write(slot as usize * rows.width, rows.row(row)) };
    }
}

impl Attention<'_> {
    /// Computes the output `[T, heads, value width]`. Panics if sizes do not agree or a block does not exist.
    pub fn run(&self, isa: Isa, workers: &Workers, mut out: FloatsMut<'_>) {
        self.check(out.len());
        let out = SharedMut::new(&mut out);
        let tiles = self.tiles(workers.count());
        let (tasks, parts) = self.tasks(&tiles, workers.count());
        let parts: Vec<Mutex<Partial>> = (0..parts).map(|_| Mutex::default()).collect();
        let part = |at: usize| parts[at].lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = self.is_in_pairs(isa);
        workers.run(tasks.len(), &|task| {
            let Task { tile, splits, part: kept } = &tasks[task];
            let mut guard = kept.map(part);
            let keep = guard.as_deref_mut();
            isa.run(AttendTile { attention: self, tile: &tiles[*tile], splits: splits.clone(), pairs, keep, out });
        });
        // The splits of a tile are neighbours among the tasks.
        let split: Vec<&[Task]> =
            tasks.chunk_by(|a, b| a.tile == b.tile).filter(|tasks| tasks[0].part.is_some()).collect();
        workers.run(split.len(), &|index| {
            let tile = &tiles[split[index][0].tile];
            let kept = split[index].iter().filter_map(|task| task.part);
            let parts: Vec<Partial> = kept.map(|at| std::mem::take(&mut *part(at))).collect();
            isa.run(MergeSplits { attention: self, tile, parts: &parts, out });
        });
    }

    fn group(&self) -> usize {
        self.kind.heads / self.kind.kv_heads
    }

    fn check(&self, out: usize) {
        let AttentionKind { heads, kv_heads, .. } = *self.kind;
        assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "{heads} query heads share {kv_heads}");
        let tokens = self.segments.iter().map(|segment| segment.rows.end).max().unwrap_or(0);
        assert!(self.queries.len() >= tokens * heads * self.keys.width, "size of the queries");
        assert!(out >= tokens * heads * self.values.width, "size of the output");
        assert!(self.sinks.is_none_or(|sinks| sinks.len() == heads), "one sink a head");
        let slots = |pool: &PoolView<'_>| pool.numbers.len() / (kv_heads * pool.row).max(1);
        let blocks = slots(&self.keys).min(slots(&self.values)) / self.block_tokens.max(1);
        assert!(self.tables.iter().all(|&block| (block as usize) < blocks), "a block that does not exist");
        for segment in self.segments {
            let needed = (segment.start + segment.rows.len()).div_ceil(self.block_tokens.max(1));
            assert!(segment.table + needed <= self.tables.len(), "a segment's table is too short");
        }
    }

    fn tiles(&self, threads: usize) -> Vec<Tile> {
        let (group, kv_heads) = (self.group(), self.kind.kv_heads);
        let tokens_per_tile = (ROWS / group).max(1);
        let cut = |segment: &Segment| segment.rows.clone().step_by(tokens_per_tile);
        // Heads of keys lie side by side: taken together, memory is read in longer runs. But there must be enough tasks.
        let tasks: usize = self.segments.iter().map(|segment| cut(segment).count()).sum();
        let splits: usize =
            self.segments.iter().map(|s| cut(s).count() * ((s.start + s.rows.len()) / SPLIT).max(1)).sum();
        let enough = kv_heads / (TASKS_PER_THREAD * threads).div_ceil(splits.max(1));
        let mut tiles = Vec::new();
        for (segment, Segment { rows, .. }) in self.segments.iter().enumerate() {
            for first in cut(&self.segments[segment]) {
                let tokens = first..(first + tokens_per_tile).min(rows.end);
                let most = enough.min(ROWS_OF_HEADS / (tokens.len() * group)).max(1);
                // The same number in each tile, and where there are few tiles, as many for each thread.
                let parts = kv_heads.div_ceil(most);
                let few = tasks < threads || (parts > 1 && tasks * parts < 4 * threads);
                let parts = if few { parts.next_multiple_of(threads) } else { parts };
                let heads = kv_heads.div_ceil(parts);
                for head in (0..kv_heads).step_by(heads) {
                    let kv_heads = head..(head + heads).min(kv_heads);
                    tiles.push(Tile { segment, tokens: tokens.clone(), kv_heads });
                }
            }
        }
        // The longest first, so that threads end together.
        tiles.sort_by_key(|tile| std::cmp::Reverse(self.work(tile)));
        tiles
    }

    /// Whole tiles, but splits of those that one thread would be left alone with; and how many of the latter.
    fn tasks(&self, tiles: &[Tile], threads: usize) -> (Vec<Task>, usize) {
        let total: usize = tiles.iter().map(|tile| self.work(tile)).sum();
        let (mut tasks, mut parts) = (Vec::new(), 0);
        for (index, tile) in tiles.iter().enumerate() {
            let splits = self.splits(tile);
            if splits.len() <= 1 || self.work(tile) * threads * TASKS_PER_THREAD <= total {
                tasks.push(Task { tile: index, splits, part: None });
                continue;
            }
            for split in splits {
                tasks.push(Task { tile: index, splits: split..split + 1, part: Some(parts) });
                parts += 1;
            }
        }
        (tasks, parts)
    }

    /// How long a tile takes, in a unit of its own: to read a key takes about as long as to compute with it for four rows.
    fn work(&self, tile: &Tile) -> usize {
        self.splits(tile).len() * tile.kv_heads.len() * (self.rows_per_head(tile) + 4)
    }

    /// Rows of a tile that share a head of keys.
    fn rows_per_head(&self, tile: &Tile) -> usize {
        tile.tokens.len() * self.group()
    }

    /// Row of the step, and query head, of a row of a tile.
    fn place(&self, tile: &Tile, row: usize) -> (usize, usize) {
        let (kv_head, row) = (row / self.rows_per_head(tile), row % self.rows_per_head(tile));
        (tile.tokens.start + row / self.group(), (tile.kv_heads.start + kv_head) * self.group() + row % self.group())
    }

    /// Position in the sequence of a row of the step.
    fn position(&self, tile: &Tile, row: usize) -> usize {
        let segment = &self.segments[tile.segment];
        segment.start + row - segment.rows.start
    }

    /// The first key that a query at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        self.kind.window.map_or(0, |window| window.first(position))
    }

    /// Splits with keys that a tile's rows see.
    fn splits(&self, tile: &Tile) -> Range<usize> {
        let first = self.first_key(self.position(tile, tile.tokens.start));
        first / SPLIT..self.position(tile, tile.tokens.end).div_ceil(SPLIT)
    }

    /// Indices in the pools of the rows of `keys`, into the places of `slots` from `keys.start % CHUNK` on.
    #[inline(always)]
    fn slots(&self, tile: &Tile, keys: Range<usize>, slots: &mut [usize; CHUNK]) {
        let table = &self.tables[self.segments[tile.segment].table..];
        let (mut block, mut offset) = (keys.start / self.block_tokens, keys.start % self.block_tokens);
        let first = keys.start % CHUNK;
        for slot in &mut slots[first..first + keys.len()] {
            *slot = table[block] as usize * self.block_tokens + offset;
            offset += 1;
            if offset == self.block_tokens {
                (block, offset) = (block + 1, 0);
            }
        }
    }
}

impl Partial {
    fn reset(&mut self, rows: usize, width: usize) {
        self.max.clear();
        self.max.resize(rows, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(rows * LANES, 0.0);
        self.values.clear();
        self.values.resize(rows * width, 0.0);
    }

    /// Adds the result of later keys.
    #[inline(always)]
    fn merge<S: Simd>(&mut self, simd: S, later: &Partial) {
        let width = self.values.len() / self.max.len().max(1);
        for row in 0..self.max.len() {
            let (max, sums) = (later.max[row], &later.sum[row * LANES..(row + 1) * LANES]);
            // No key; but scores that are not numbers have no maximum either, and must not be lost.
            // SAFETY: a vector of sums.
            if max == f32::NEG_INFINITY && !simd.sum(unsafe { simd.load(sums.as_ptr()) }).is_nan() {
                continue;
            }
            let larger = if max > self.max[row] { max } else { self.max[row] };
            let factors = [exp(simd, self.max[row] - larger), exp(simd, max - larger)];
            self.max[row] = larger;
            add_scaled(simd, factors, &mut self.sum[row * LANES..(row + 1) * LANES], sums);
            let values = row * width..(row + 1) * width;
            add_scaled(simd, factors, &mut self.values[values.clone()], &later.values[values]);
        }
    }
}

/// `a * factors[0] + b * factors[1]` of whole vectors, into `a`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, factors: [f32; 2], a: &mut [f32], b: &[f32]) {
    assert!(a.len() == b.len() && a.len().is_multiple_of(LANES));
    let [old, new] = [simd.splat(factors[0]), simd.splat(factors[1])];
    let mut at = 0;
    while at < a.len() {
        // SAFETY: both have whole vectors.
        unsafe {
            let scaled = simd.mul(simd.load(a.as_ptr().add(at)), old);
            simd.store(a.as_mut_ptr().add(at), simd.fma(simd.load(b.as_ptr().add(at)), new, scaled));
        }
        at += LANES;
    }
}

/// `e^x` of one number, as the lanes compute it.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: f32) -> f32 {
    simd.max_lane(math::exp(simd, simd.splat(x)))
}

/// Some splits of a tile; the result is finished, or kept to be merged with those of others.
struct AttendTile<'a> {
    attention: &'a Attention<'a>,
    tile: &'a Tile,
    splits: Range<usize>,
    /// Whether many rows are computed in pairs.
    pairs: bool,
    keep: Option<&'a mut Partial>,
    out: SharedMut,
}

impl Work for AttendTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Attention { keys, values, .. } = *self.attention;
        let mut scratch = SCRATCH.take();
        match (keys.numbers, values.numbers) {
            (SharedFloats::F32(keys), SharedFloats::F32(values)) => self.attend(simd, keys, values, &mut scratch),
            (SharedFloats::F16(keys), SharedFloats::F16(values)) => self.attend(simd, keys, values, &mut scratch),
            (SharedFloats::Bf16(keys), SharedFloats::Bf16(values)) => self.attend(simd, keys, values, &mut scratch),
            _ => panic!("keys and values of different types"),
        }
        match self.keep {
            Some(keep) => std::mem::swap(keep, &mut scratch.total),
            None => finish(simd, self.attention, self.tile, &mut scratch.total, self.out),
        }
        SCRATCH.set(scratch);
    }
}

impl AttendTile<'_> {
    #[inline(always)]
    fn attend<S: Simd, T: Element>(
        &self,
        simd: S,
        keys: SharedSlice<'_, T>,
        values: SharedSlice<'_, T>,
        scratch: &mut Scratch,
    ) {
        let (attention, tile) = (self.attention, self.tile);
        let rows = attention.rows_per_head(tile) * tile.kv_heads.len();
        let padded = attention.values.width.next_multiple_of(LANES);
        load_queries(attention, tile, &mut scratch.queries);
        let pairs = self.pairs && attention.rows_per_head(tile) > FEW_ROWS;
        if pairs {
            scratch.panels.round_queries(simd, &scratch.queries);
        }
        scratch.scores.resize(rows * CHUNK, 0.0);
        scratch.total.reset(rows, padded);
        for split in self.splits.clone() {
            scratch.split.reset(rows, padded);
            let first = attention.first_key(attention.position(tile, tile.tokens.start)).max(split * SPLIT);
            let end = attention.position(tile, tile.tokens.end).min((split + 1) * SPLIT);
            let mut start = first / CHUNK * CHUNK;
            let mut slots = [0; CHUNK];
            attention.slots(tile, first..end.min(start + CHUNK), &mut slots);
            while start < end {
                let seen = start.max(first) - start..end.min(start + CHUNK) - start;
                let mut next = [0; CHUNK];
                if start + CHUNK < end {
                    attention.slots(tile, start + CHUNK..end.min(start + 2 * CHUNK), &mut next);
                }
                let chunk = Chunk { attention, tile, start, seen };
                let (chunk, slots_of, next_of, scratch) = (&chunk, &slots, &next, &mut *scratch);
                if pairs {
                    simd.call(AttendPairs { chunk, slots: slots_of, next: next_of, scratch });
                } else {
                    simd.call(AttendChunk { chunk, keys, values, slots: slots_of, next: next_of, scratch });
                }
                slots = next;
                start += CHUNK;
            }
            let Scratch { split, total, .. } = &mut *scratch;
            total.merge(simd, split);
        }
    }
}

/// The scaled queries of a tile's rows, padded with zeros to whole vectors.
fn load_queries(attention: &Attention<'_>, tile: &Tile, out: &mut Vec<f32>) {
    let width = attention.keys.width;
    let padded = width.next_multiple_of(LANES);
    out.clear();
    out.resize(attention.rows_per_head(tile) * tile.kv_heads.len() * padded, 0.0);
    for (row, out) in out.chunks_exact_mut(padded).enumerate() {
        let (token, head) = attention.place(tile, row);
        let first = (token * attention.kind.heads + head) * width;
        for (out, query) in out.iter_mut().zip(&attention.queries[first..first + width]) {
            *out = query * attention.kind.scale;
        }
    }
}

/// Divides by the sums and writes the tile's rows.
#[inline(always)]
fn finish<S: Simd>(simd: S, attention: &Attention<'_>, tile: &Tile, total: &mut Partial, out: SharedMut) {
    let width = attention.values.width;
    let padded = width.next_multiple_of(LANES);
    for row in 0..total.max.len() {
        let (token, head) = attention.place(tile, row);
        // SAFETY: a vector of sums.
        let mut sum = simd.sum(unsafe { simd.load(total.sum[row * LANES..(row + 1) * LANES].as_ptr()) });
        if let Some(sinks) = attention.sinks {
            // A key without a value.
            let max = total.max[row].max(sinks[head]);
            let old = exp(simd, total.max[row] - max);
            sum = sum * old + exp(simd, sinks[head] - max);
            total.values[row * padded..(row + 1) * padded].iter_mut().for_each(|value| *value *= old);
        }
        let values = &mut total.values[row * padded..][..width];
        values.iter_mut().for_each(|value| *value /= sum);
        let at = (token * attention.kind.heads + head) * width;
        // SAFETY: every row and head belongs to one tile, and `run` waits for all tiles.
        unsafe { out.write(at, values) };
    }
}

/// Merges a tile's splits, which tasks of their own have computed.
struct MergeSplits<'a> {
    attention: &'a Attention<'a>,
    tile: &'a Tile,
    parts: &'a [Partial],
    out: SharedMut,
}

impl Work for MergeSplits<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let padded = self.attention.values.width.next_multiple_of(LANES);
        let rows = self.attention.rows_per_head(self.tile) * self.tile.kv_heads.len();
        let mut total = Partial::default();
        total.reset(rows, padded);
        for part in self.parts {
            total.merge(simd, part);
        }
        finish(simd, self.attention, self.tile, &mut total, self.out);
    }
}
