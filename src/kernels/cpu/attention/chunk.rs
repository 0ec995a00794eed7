//! The inner part of attention: a chunk of keys against the rows of a tile.

use std::ops::Range;

use super::super::dot::load_tail;
use super::super::floats::{Element, widen};
use super::super::math;
use super::super::simd::{LANES, Simd, Work};
use super::{Attention, AttentionKind, CHUNK, Scratch, Tile, exp};

/// Some neighbouring keys, and a tile that attends to them.
pub(super) struct Chunk<'a> {
    pub attention: &'a Attention<'a>,
    pub tile: &'a Tile,
    /// Position of the chunk: a multiple of `CHUNK`.
    pub start: usize,
    /// Keys of the chunk that some row sees.
    pub seen: Range<usize>,
}

/// Rows of keys or values of one head: those of key `i` begin at `offset + slots[i] * stride`.
#[derive(Clone, Copy)]
struct HeadRows<'a, T> {
    numbers: &'a [T],
    width: usize,
    stride: usize,
    offset: usize,
    slots: &'a [usize; CHUNK],
    next: Option<&'a [usize; CHUNK]>,
}

impl<T> HeadRows<'_, T> {
    #[inline(always)]
    fn row(&self, key: usize) -> &[T] {
        let at = self.offset + self.slots[key] * self.stride;
        &self.numbers[at..at + self.width]
    }

    /// Fetches some of the elements of the row that takes the place of `key` in the next chunk.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, key: usize, columns: Range<usize>) {
        let Some(next) = self.next else { return };
        let at = self.offset + next[key] * self.stride;
        let row = self.numbers.as_ptr().wrapping_add(at).cast::<u8>();
        let mut at = columns.start * size_of::<T>();
        while at < columns.end * size_of::<T>() {
            simd.prefetch(row.wrapping_add(at));
            at += 64;
        }
    }
}

/// The identity: rows that were copied one after another.
const IN_ORDER: [usize; CHUNK] = {
    let mut slots = [0; CHUNK];
    let mut i = 0;
    while i < CHUNK {
        slots[i] = i;
        i += 1;
    }
    slots
};

/// Attends to a chunk, into the scratch's split.
pub(super) struct AttendChunk<'a, T> {
    pub chunk: &'a Chunk<'a>,
    pub keys: &'a [T],
    pub values: &'a [T],
    /// Index in the pools of the row of each seen key.
    pub slots: &'a [usize; CHUNK],
    /// The same of the next chunk; zeros where there is none.
    pub next: &'a [usize; CHUNK],
    pub scratch: &'a mut Scratch,
}

impl<T: Element> Work for AttendChunk<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { chunk, slots, next, scratch, .. } = self;
        let Scratch { queries, keys, values, scores, split, .. } = scratch;
        let (attention, tile) = (chunk.attention, chunk.tile);
        let rows = attention.rows_per_head(tile);
        let (key_width, value_width) = (attention.keys.width, attention.values.width);
        let (key_padded, value_padded) = (key_width.next_multiple_of(LANES), value_width.next_multiple_of(LANES));
        let stride = attention.kind.kv_heads;
        for (i, head) in tile.kv_heads.clone().enumerate() {
            let far = |numbers, width| HeadRows {
                numbers,
                width,
                stride: stride * width,
                offset: head * width,
                slots,
                next: Some(next),
            };
            let (key_rows, value_rows) = (far(self.keys, key_width), far(self.values, value_width));
            let queries = &queries[i * rows * key_padded..];
            let mut sums = Sums {
                max: &mut split.max[i * rows..(i + 1) * rows],
                sum: &mut split.sum[i * rows..(i + 1) * rows],
                values: &mut split.values[i * rows * value_padded..(i + 1) * rows * value_padded],
            };
            if rows > S::DOT_ROWS {
                // Many rows: widened once for all of them.
                simd.call(Widen { rows: key_rows, seen: chunk.seen.clone(), out: keys });
                simd.call(Widen { rows: value_rows, seen: chunk.seen.clone(), out: values });
                let near = |numbers, width| HeadRows {
                    numbers,
                    width,
                    stride: width,
                    offset: 0,
                    slots: &IN_ORDER,
                    next: None,
                };
                chunk.score(simd, queries, near(&**keys, key_width), scores);
                chunk.weigh(simd, scores, &mut sums);
                chunk.add_values(simd, scores, near(&**values, value_width), &mut sums);
            } else {
                chunk.score(simd, queries, key_rows, scores);
                chunk.weigh(simd, scores, &mut sums);
                chunk.add_values(simd, scores, value_rows, &mut sums);
            }
        }
    }
}

/// The part of a [`Partial`](super::Partial) that belongs to one head of keys.
struct Sums<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    values: &'a mut [f32],
}

/// Copies rows to f32, one after another.
struct Widen<'a, T> {
    rows: HeadRows<'a, T>,
    seen: Range<usize>,
    out: &'a mut Vec<f32>,
}

impl<T: Element> Work for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.rows.width;
        self.out.resize(CHUNK * width, 0.0);
        for key in self.seen {
            widen(simd, self.rows.row(key), &mut self.out[key * width..(key + 1) * width]);
        }
    }
}

impl Chunk<'_> {
    fn rows(&self) -> usize {
        self.attention.rows_per_head(self.tile)
    }

    /// Dot products of all rows with all seen keys.
    #[inline(always)]
    fn score<S: Simd, T: Element>(&self, simd: S, queries: &[f32], mut keys: HeadRows<'_, T>, scores: &mut [f32]) {
        let padded = keys.width.next_multiple_of(LANES);
        let mut row = 0;
        while row < self.rows() {
            let queries = &queries[row * padded..];
            let scores = &mut scores[row * CHUNK..];
            let seen = self.seen.clone();
            row += match self.rows() - row {
                6.. if S::DOT_ROWS >= 6 => simd.call(Scores::<T, 6> { keys, queries, scores, seen }),
                4.. if S::DOT_ROWS >= 4 => simd.call(Scores::<T, 4> { keys, queries, scores, seen }),
                2.. if S::DOT_ROWS >= 2 => simd.call(Scores::<T, 2> { keys, queries, scores, seen }),
                _ => simd.call(Scores::<T, 1> { keys, queries, scores, seen }),
            };
            // Once is enough.
            keys.next = None;
        }
    }

    /// Scores to weights, with the row's sums brought to a common largest score.
    #[inline(always)]
    fn weigh<S: Simd>(&self, simd: S, scores: &mut [f32], sums: &mut Sums<'_>) {
        let (attention, tile) = (self.attention, self.tile);
        let padded = sums.values.len() / self.rows().max(1);
        for row in 0..self.rows() {
            let scores = &mut scores[row * CHUNK..(row + 1) * CHUNK];
            let position = attention.position(tile, tile.tokens.start + row / attention.group());
            let first = attention.first_key(position).clamp(self.start, self.start + CHUNK) - self.start;
            let end = (position + 1).clamp(self.start, self.start + CHUNK) - self.start;
            if first >= end {
                scores.fill(0.0);
                continue;
            }
            scale_scores(simd, scores, attention.kind);
            scores[..first].fill(f32::NEG_INFINITY);
            scores[end..].fill(f32::NEG_INFINITY);
            weigh_row(simd, scores, row, padded, sums);
        }
    }

    /// Adds the values of the seen keys, weighted.
    #[inline(always)]
    fn add_values<S: Simd, T: Element>(
        &self,
        simd: S,
        weights: &[f32],
        mut values: HeadRows<'_, T>,
        sums: &mut Sums<'_>,
    ) {
        let padded = values.width.next_multiple_of(LANES);
        let mut row = 0;
        while row < self.rows() {
            let weights = &weights[row * CHUNK..];
            let sums = &mut sums.values[row * padded..];
            let seen = self.seen.clone();
            row += match self.rows() - row {
                6.. if S::DOT_ROWS >= 6 => simd.call(AddValues::<T, 6> { weights, values, seen, sums }),
                4.. if S::DOT_ROWS >= 4 => simd.call(AddValues::<T, 4> { weights, values, seen, sums }),
                2.. if S::DOT_ROWS >= 2 => simd.call(AddValues::<T, 2> { weights, values, seen, sums }),
                _ => simd.call(AddValues::<T, 1> { weights, values, seen, sums }),
            };
            values.next = None;
        }
    }
}

#[inline(always)]
fn scale_scores<S: Simd>(simd: S, scores: &mut [f32], kind: &AttentionKind) {
    assert_eq!(scores.len(), CHUNK);
    let mut at = 0;
    while at < CHUNK {
        // SAFETY: inside the chunk, which is a multiple of sixteen.
        unsafe {
            let mut score = simd.mul(simd.load(scores.as_ptr().add(at)), simd.splat(kind.scale));
            if let Some(cap) = kind.soft_cap {
                let capped = math::tanh(simd, simd.div(score, simd.splat(cap)));
                score = simd.mul(capped, simd.splat(cap));
            }
            simd.store(scores.as_mut_ptr().add(at), score);
        }
        at += LANES;
    }
}

/// A row's scores to weights; sum and values of the row so far follow a larger maximum.
#[inline(always)]
fn weigh_row<S: Simd>(simd: S, scores: &mut [f32], row: usize, padded: usize, sums: &mut Sums<'_>) {
    assert_eq!(scores.len(), CHUNK);
    let values = &mut sums.values[row * padded..(row + 1) * padded];
    let p = scores.as_mut_ptr();
    let mut largest = simd.splat(f32::NEG_INFINITY);
    let mut at = 0;
    while at < CHUNK {
        // SAFETY: inside the chunk, which is a multiple of sixteen.
        largest = simd.max(unsafe { simd.load(p.add(at)) }, largest);
        at += LANES;
    }
    let max = simd.max_lane(largest);
    let max = if max > sums.max[row] { max } else { sums.max[row] };
    let old = exp(simd, sums.max[row] - max);
    let mut sum = simd.splat(0.0);
    at = 0;
    while at < CHUNK {
        // SAFETY: as above.
        unsafe {
            let weight = math::exp(simd, simd.sub(simd.load(p.add(at)), simd.splat(max)));
            sum = simd.add(sum, weight);
            simd.store(p.add(at), weight);
        }
        at += LANES;
    }
    sums.max[row] = max;
    sums.sum[row] = sums.sum[row] * old + simd.sum(sum);
    if old != 1.0 {
        at = 0;
        while at < padded {
            // SAFETY: `padded` is a multiple of sixteen, and so many values are there.
            unsafe {
                let scaled = simd.mul(simd.load(values.as_ptr().add(at)), simd.splat(old));
                simd.store(values.as_mut_ptr().add(at), scaled);
            }
            at += LANES;
        }
    }
}

/// Scores of `M` rows with the seen keys; returns `M`.
struct Scores<'a, T, const M: usize> {
    keys: HeadRows<'a, T>,
    queries: &'a [f32],
    scores: &'a mut [f32],
    seen: Range<usize>,
}

impl<T: Element, const M: usize> Work for Scores<'_, T, M> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let Self { keys, queries, scores, seen } = self;
        let mut key = seen.start;
        while key < seen.end {
            // Of fewer than four the last is repeated.
            let last = seen.end - 1;
            let four =
                [keys.row(key), keys.row(last.min(key + 1)), keys.row(last.min(key + 2)), keys.row(last.min(key + 3))];
            for ahead in key..(key + 4).min(CHUNK) {
                keys.prefetch(simd, ahead, 0..keys.width);
            }
            let found = dot_four::<S, T, M>(simd, four, queries);
            let len = (seen.end - key).min(4);
            for m in 0..M {
                scores[m * CHUNK + key..][..len].copy_from_slice(&found[m][..len]);
            }
            key += 4;
        }
        M
    }
}

/// Dot products of `M` queries with four keys.
#[inline(always)]
fn dot_four<S: Simd, T: Element, const M: usize>(simd: S, keys: [&[T]; 4], queries: &[f32]) -> [[f32; 4]; M] {
    let width = keys[0].len();
    let padded = width.next_multiple_of(LANES);
    let queries = &queries[..M * padded];
    assert!(keys[1].len() == width && keys[2].len() == width && keys[3].len() == width);
    let mut sums = [[simd.splat(0.0); 4]; M];
    let mut at = 0;
    while at < width {
        let mut key = [simd.splat(0.0); 4];
        for n in 0..4 {
            key[n] = if at + LANES <= width {
                // SAFETY: sixteen elements from `at` on.
                unsafe { T::load(simd, keys[n].as_ptr().add(at)) }
            } else {
                load_tail(simd, &keys[n][at..])
            };
        }
        for m in 0..M {
            // SAFETY: `M` rows of `padded` numbers.
            let query = unsafe { simd.load(queries.as_ptr().add(m * padded + at)) };
            for n in 0..4 {
                sums[m][n] = simd.fma(key[n], query, sums[m][n]);
            }
        }
        at += LANES;
    }
    let mut found = [[0.0; 4]; M];
    for m in 0..M {
        found[m] = simd.sum4(sums[m]);
    }
    found
}

/// Adds weighted values to the sums of `M` rows; returns `M`.
struct AddValues<'a, T, const M: usize> {
    weights: &'a [f32],
    values: HeadRows<'a, T>,
    seen: Range<usize>,
    sums: &'a mut [f32],
}

impl<T: Element, const M: usize> Work for AddValues<'_, T, M> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> usize {
        let width = self.values.width;
        let mut at = 0;
        while at < width {
            let left = width - at;
            at += match left / LANES {
                4.. if S::DOT_ROWS >= 6 => self.columns::<S, 4>(simd, at),
                2.. if S::DOT_ROWS >= 2 => self.columns::<S, 2>(simd, at),
                1.. => self.columns::<S, 1>(simd, at),
                0 => self.last_columns(simd, at),
            };
        }
        M
    }
}

impl<T: Element, const M: usize> AddValues<'_, T, M> {
    /// `V` vectors from column `at` on; returns their columns.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, simd: S, at: usize) -> usize {
        let width = self.values.width;
        let padded = width.next_multiple_of(LANES);
        let sums = &mut self.sums[..M * padded];
        let weights = &self.weights[..(M - 1) * CHUNK + self.seen.end];
        assert!(at + V * LANES <= width);
        let mut acc = [[simd.splat(0.0); V]; M];
        // SAFETY: `V` vectors from `at` on are inside each of the `M` rows of sums and inside each row of values.
        unsafe {
            for m in 0..M {
                for v in 0..V {
                    acc[m][v] = simd.load(sums.as_ptr().add(m * padded + at + v * LANES));
                }
            }
            for key in self.seen.clone() {
                self.values.prefetch(simd, key, at..at + V * LANES);
                let row = self.values.row(key).as_ptr().add(at);
                let mut values = [simd.splat(0.0); V];
                for v in 0..V {
                    values[v] = T::load(simd, row.add(v * LANES));
                }
                for m in 0..M {
                    let weight = simd.splat(*weights.get_unchecked(m * CHUNK + key));
                    for v in 0..V {
                        acc[m][v] = simd.fma(weight, values[v], acc[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..V {
                    simd.store(sums.as_mut_ptr().add(m * padded + at + v * LANES), acc[m][v]);
                }
            }
        }
        V * LANES
    }

    /// Fewer than sixteen columns from `at` to the end; returns how many.
    #[inline(always)]
    fn last_columns<S: Simd>(&mut self, simd: S, at: usize) -> usize {
        let width = self.values.width;
        let padded = width.next_multiple_of(LANES);
        for m in 0..M {
            let sums = &mut self.sums[m * padded + at..][..LANES];
            // SAFETY: sixteen sums.
            unsafe {
                let mut acc = simd.load(sums.as_ptr());
                for key in self.seen.clone() {
                    let weight = simd.splat(self.weights[m * CHUNK + key]);
                    acc = simd.fma(weight, load_tail(simd, &self.values.row(key)[at..]), acc);
                }
                simd.store(sums.as_mut_ptr(), acc);
            }
        }
        width - at
    }
}
