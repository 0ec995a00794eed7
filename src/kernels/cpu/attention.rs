//! Attention over paged keys and values: any mix of decoding rows and prompt chunks in one call.
//!
//! Online softmax (Milakov and Gimelshein 2018) in f32. A key's score is a dot product in the order of `dot.rs`; keys are
//! taken in chunks and chunks in splits that lie at fixed positions of the sequence, and the results of splits are merged
//! in their order. So a row's bits depend on its query and its keys alone: not on the other rows, on how the prompt was
//! cut, on where blocks lie, or on threads.

mod chunk;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use chunk::{AttendChunk, Chunk};

use super::floats::{Element, Floats, FloatsMut, SharedMut, as_bf16, as_f16};
use super::math;
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Keys whose scores are computed together.
const CHUNK: usize = 32;

/// Keys that one task attends to at most when there are more threads than heads; a multiple of `CHUNK`.
const SPLIT: usize = 512;

/// Query rows of a tile: tokens times the query heads that share a head of keys.
const ROWS: usize = 24;

/// A pool's rows `[blocks * block_tokens, kv_heads, width]`.
#[derive(Debug, Clone, Copy)]
pub struct PoolView<'a> {
    /// The elements.
    pub numbers: Floats<'a>,
    /// Width of a head.
    pub width: usize,
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

/// What a model's attention is like.
#[derive(Debug, Clone)]
pub struct AttentionKind {
    /// Heads of keys and values; divides the number of query heads.
    pub kv_heads: usize,
    /// Query heads.
    pub heads: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// Tokens a query sees, itself included.
    pub window: Option<usize>,
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
}

/// Rows that share their keys: some tokens of a segment and the query heads of one head of keys.
#[derive(Debug, Clone)]
struct Tile {
    segment: usize,
    /// Rows of the step.
    tokens: Range<usize>,
    kv_head: usize,
}

/// Softmax-weighted sums over some of the keys, for the rows of a tile.
#[derive(Debug, Clone, Default)]
struct Partial {
    /// Largest score; negative infinity if there was no key.
    max: Vec<f32>,
    /// Sum of `e^(score - max)`.
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
    /// `[rows, CHUNK]`, first scores and then weights.
    scores: Vec<f32>,
    split: Partial,
    total: Partial,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes rows `[T, heads, width]` into a pool: row `i` at place `slots[i]`, counted in tokens over all blocks.
pub fn append(pool: &mut FloatsMut<'_>, row: usize, rows: &[f32], slots: &[u32]) {
    assert_eq!(rows.len(), slots.len() * row, "one slot a row");
    let pool = SharedMut::new(pool);
    for (rows, &slot) in rows.chunks_exact(row.max(1)).zip(slots) {
        // SAFETY: the pool is borrowed, and nobody else writes; `write` checks the bounds.
        unsafe { pool.write(slot as usize * row, rows) };
    }
}

impl Attention<'_> {
    /// Computes the output `[T, heads, value width]`. Panics if sizes do not agree or a block does not exist.
    pub fn run(&self, isa: Isa, workers: &Workers, mut out: FloatsMut<'_>) {
        self.check(out.len());
        let out = SharedMut::new(&mut out);
        let tiles = self.tiles();
        if tiles.len() >= 4 * workers.count() || tiles.iter().all(|tile| self.splits(tile).len() <= 1) {
            workers.run(tiles.len(), &|task| {
                let tile = &tiles[task];
                isa.run(AttendTile { attention: self, tile, splits: self.splits(tile), keep: None, out });
            });
            return;
        }
        // Too few heads for the threads: splits are tasks of their own, merged afterwards in the same order.
        let tasks: Vec<(usize, usize)> =
            tiles.iter().enumerate().flat_map(|(i, tile)| self.splits(tile).map(move |split| (i, split))).collect();
        let partials: Vec<Mutex<Partial>> = tasks.iter().map(|_| Mutex::default()).collect();
        let locked = |at: usize| partials[at].lock().unwrap_or_else(PoisonError::into_inner);
        workers.run(tasks.len(), &|task| {
            let (tile, split) = tasks[task];
            let keep = Some(&mut *locked(task));
            isa.run(AttendTile { attention: self, tile: &tiles[tile], splits: split..split + 1, keep, out });
        });
        workers.run(tiles.len(), &|index| {
            let of_tile = tasks.iter().enumerate().filter(|(_, (tile, _))| *tile == index);
            let parts: Vec<Partial> = of_tile.map(|(task, _)| std::mem::take(&mut *locked(task))).collect();
            isa.run(MergeSplits { attention: self, tile: &tiles[index], parts: &parts, out });
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
        let slots = |pool: &PoolView<'_>| pool.numbers.len() / (kv_heads * pool.width).max(1);
        let blocks = slots(&self.keys).min(slots(&self.values)) / self.block_tokens.max(1);
        assert!(self.tables.iter().all(|&block| (block as usize) < blocks), "a block that does not exist");
        for segment in self.segments {
            let needed = (segment.start + segment.rows.len()).div_ceil(self.block_tokens.max(1));
            assert!(segment.table + needed <= self.tables.len(), "a segment's table is too short");
        }
    }

    fn tiles(&self) -> Vec<Tile> {
        let tokens_per_tile = (ROWS / self.group()).max(1);
        let mut tiles = Vec::new();
        for (segment, Segment { rows, .. }) in self.segments.iter().enumerate() {
            for first in rows.clone().step_by(tokens_per_tile) {
                let tokens = first..(first + tokens_per_tile).min(rows.end);
                for kv_head in 0..self.kind.kv_heads {
                    tiles.push(Tile { segment, tokens: tokens.clone(), kv_head });
                }
            }
        }
        // The longest first, so that threads end together.
        tiles.sort_by_key(|tile| std::cmp::Reverse(self.position(tile, tile.tokens.end)));
        tiles
    }

    /// Position in the sequence of a row of the step.
    fn position(&self, tile: &Tile, row: usize) -> usize {
        let segment = &self.segments[tile.segment];
        segment.start + row - segment.rows.start
    }

    /// The first key that a query at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        self.kind.window.map_or(0, |window| (position + 1).saturating_sub(window))
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
        self.sum.resize(rows, 0.0);
        self.values.clear();
        self.values.resize(rows * width, 0.0);
    }

    /// Adds the result of later keys for row `row`, whose values are `width` numbers.
    #[inline(always)]
    fn merge<S: Simd>(&mut self, simd: S, row: usize, (max, sum, values): (f32, f32, &[f32])) {
        // No key; but scores that are not numbers have no maximum either, and must not be lost.
        if max == f32::NEG_INFINITY && !sum.is_nan() {
            return;
        }
        let width = values.len();
        let larger = if max > self.max[row] { max } else { self.max[row] };
        let (old, new) = (exp(simd, self.max[row] - larger), exp(simd, max - larger));
        self.max[row] = larger;
        self.sum[row] = self.sum[row] * old + sum * new;
        let mine = &mut self.values[row * width..(row + 1) * width];
        let (old, new) = (simd.splat(old), simd.splat(new));
        let mut at = 0;
        while at < width {
            // SAFETY: widths are multiples of sixteen, and both slices have `width` numbers.
            unsafe {
                let scaled = simd.mul(simd.load(mine.as_ptr().add(at)), old);
                simd.store(mine.as_mut_ptr().add(at), simd.fma(simd.load(values.as_ptr().add(at)), new, scaled));
            }
            at += LANES;
        }
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
            (Floats::F32(keys), Floats::F32(values)) => self.attend(simd, keys, values, &mut scratch),
            (Floats::F16(keys), Floats::F16(values)) => {
                self.attend(simd, as_f16(keys), as_f16(values), &mut scratch);
            }
            (Floats::Bf16(keys), Floats::Bf16(values)) => {
                self.attend(simd, as_bf16(keys), as_bf16(values), &mut scratch);
            }
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
    fn attend<S: Simd, T: Element>(&self, simd: S, keys: &[T], values: &[T], scratch: &mut Scratch) {
        let (attention, tile) = (self.attention, self.tile);
        let rows = tile.tokens.len() * attention.group();
        let padded = attention.values.width.next_multiple_of(LANES);
        load_queries(attention, tile, &mut scratch.queries);
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
                    let keys_ahead = start + CHUNK..end.min(start + 2 * CHUNK);
                    let count = keys_ahead.len();
                    attention.slots(tile, keys_ahead, &mut next);
                    if rows <= S::DOT_ROWS {
                        // Rows of one head lie apart: the hardware does not foresee them.
                        prefetch(simd, attention, tile.kv_head, &next[..count], keys, attention.keys.width);
                        prefetch(simd, attention, tile.kv_head, &next[..count], values, attention.values.width);
                    }
                }
                let chunk = Chunk { attention, tile, rows, start, seen };
                simd.call(AttendChunk { chunk: &chunk, keys, values, slots: &slots, scratch: &mut *scratch });
                slots = next;
                start += CHUNK;
            }
            let Scratch { split, total, .. } = &mut *scratch;
            for row in 0..rows {
                let values = &split.values[row * padded..(row + 1) * padded];
                total.merge(simd, row, (split.max[row], split.sum[row], values));
            }
        }
    }
}

#[inline(always)]
fn prefetch<S: Simd, T: Element>(
    simd: S,
    attention: &Attention<'_>,
    head: usize,
    slots: &[usize],
    pool: &[T],
    width: usize,
) {
    for slot in slots {
        let row = pool.as_ptr().wrapping_add((slot * attention.kind.kv_heads + head) * width).cast::<u8>();
        let mut line = 0;
        while line < width * size_of::<T>() {
            simd.prefetch(row.wrapping_add(line));
            line += 64;
        }
    }
}

/// The queries of a tile's rows, padded with zeros to whole vectors.
fn load_queries(attention: &Attention<'_>, tile: &Tile, out: &mut Vec<f32>) {
    let (width, group) = (attention.keys.width, attention.group());
    let padded = width.next_multiple_of(LANES);
    out.clear();
    out.resize(tile.tokens.len() * group * padded, 0.0);
    for (token, out) in tile.tokens.clone().zip(out.chunks_exact_mut(group * padded)) {
        let first = (token * attention.kind.heads + tile.kv_head * group) * width;
        let queries = attention.queries[first..first + group * width].chunks_exact(width);
        for (query, out) in queries.zip(out.chunks_exact_mut(padded)) {
            out[..width].copy_from_slice(query);
        }
    }
}

/// Divides by the sums and writes the tile's rows.
#[inline(always)]
fn finish<S: Simd>(simd: S, attention: &Attention<'_>, tile: &Tile, total: &mut Partial, out: SharedMut) {
    let (group, width) = (attention.group(), attention.values.width);
    let padded = width.next_multiple_of(LANES);
    for row in 0..total.max.len() {
        let head = tile.kv_head * group + row % group;
        if let Some(sinks) = attention.sinks {
            // A key without a value.
            let max = total.max[row].max(sinks[head]);
            let old = exp(simd, total.max[row] - max);
            total.sum[row] = total.sum[row] * old + exp(simd, sinks[head] - max);
            total.values[row * padded..(row + 1) * padded].iter_mut().for_each(|value| *value *= old);
        }
        let sum = total.sum[row];
        let values = &mut total.values[row * padded..][..width];
        values.iter_mut().for_each(|value| *value /= sum);
        let at = ((tile.tokens.start + row / group) * attention.kind.heads + head) * width;
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
        let rows = self.tile.tokens.len() * self.attention.group();
        let mut total = Partial::default();
        total.reset(rows, padded);
        for part in self.parts {
            for row in 0..rows {
                total.merge(simd, row, (part.max[row], part.sum[row], &part.values[row * padded..(row + 1) * padded]));
            }
        }
        finish(simd, self.attention, self.tile, &mut total, self.out);
    }
}
