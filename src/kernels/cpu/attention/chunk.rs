//! The inner part of attention: a chunk of keys against the rows of a tile.

use std::ops::Range;

use super::super::dot::load_tail;
use super::super::floats::{Element, widen};
use super::super::math;
use super::super::simd::{LANES, Simd, Work};
use super::{Attention, CHUNK, Scratch, Tile, exp};

/// Some neighbouring keys, and a tile that attends to them.
pub(super) struct Chunk<'a> {
    pub attention: &'a Attention<'a>,
    pub tile: &'a Tile,
    /// Position of the chunk: a multiple of `CHUNK`.
    pub start: usize,
    /// Keys of the chunk that some row sees.
    pub seen: Range<usize>,
}

/// Rows of keys or values of one head, in the order of a chunk's keys.
trait HeadRows: Copy {
    type Element: Element;
    fn width(&self) -> usize;
    fn row(&self, key: usize) -> &[Self::Element];
    /// Fetches some of the elements of the row that takes the place of `key` in the next chunk.
    fn prefetch<S: Simd>(&self, simd: S, key: usize, columns: Range<usize>);
    /// The same rows; of the next chunk's those in the places of `keys` are to be fetched, the others are not.
    fn fetching(self, keys: Range<usize>) -> Self;
}

/// Rows in a pool: those of key `i` begin at `offset + slots[i] * stride`.
#[derive(Clone, Copy)]
struct Pooled<'a, T> {
    numbers: &'a [T],
    width: usize,
    stride: usize,
    offset: usize,
    slots: &'a [usize; CHUNK],
    next: &'a [usize; CHUNK],
    /// Keys, from the first to before the second, in whose places rows of the next chunk are to be fetched.
    fetch: (usize, usize),
}

/// Rows that were widened, one after another, and where they come from.
#[derive(Clone, Copy)]
struct Widened<'a, T> {
    numbers: &'a [f32],
    pooled: Pooled<'a, T>,
}

impl<T: Element> HeadRows for Pooled<'_, T> {
    type Element = T;

    #[inline(always)]
    fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    fn row(&self, key: usize) -> &[T] {
        let at = self.offset + self.slots[key] * self.stride;
        &self.numbers[at..at + self.width]
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, key: usize, columns: Range<usize>) {
        if !(self.fetch.0..self.fetch.1).contains(&key) {
            return;
        }
        let at = self.offset + self.next[key] * self.stride;
        let row = self.numbers.as_ptr().wrapping_add(at).cast::<u8>();
        let mut at = columns.start * size_of::<T>();
        while at < columns.end * size_of::<T>() {
            simd.prefetch(row.wrapping_add(at));
            at += 64;
        }
    }

    #[inline(always)]
    fn fetching(self, keys: Range<usize>) -> Self {
        Self { fetch: (keys.start, keys.end), ..self }
    }
}

impl<T: Element> HeadRows for Widened<'_, T> {
    type Element = f32;

    #[inline(always)]
    fn width(&self) -> usize {
        self.pooled.width
    }

    #[inline(always)]
    fn row(&self, key: usize) -> &[f32] {
        &self.numbers[key * self.pooled.width..(key + 1) * self.pooled.width]
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, key: usize, columns: Range<usize>) {
        self.pooled.prefetch(simd, key, columns);
    }

    #[inline(always)]
    fn fetching(self, keys: Range<usize>) -> Self {
        Self { pooled: self.pooled.fetching(keys), ..self }
    }
}

/// Keys whose scores are computed at once.
const FOUR: usize = 4;

/// The seen keys and their neighbours, to whole fours; the scores of the neighbours are not used.
fn fours(seen: &Range<usize>) -> Range<usize> {
    seen.start / FOUR * FOUR..seen.end.next_multiple_of(FOUR)
}

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
            let pooled = |numbers, width| Pooled {
                numbers,
                width,
                stride: stride * width,
                offset: head * width,
                slots,
                next,
                fetch: (0, 0),
            };
            let (key_rows, value_rows) = (pooled(self.keys, key_width), pooled(self.values, value_width));
            let queries = &queries[i * rows * key_padded..];
            let mut sums = Sums {
                max: &mut split.max[i * rows..(i + 1) * rows],
                sum: &mut split.sum[i * rows * LANES..(i + 1) * rows * LANES],
                values: &mut split.values[i * rows * value_padded..(i + 1) * rows * value_padded],
            };
            if rows > 2 * FOUR {
                // Many rows: widened once for all of them.
                simd.call(Widen { rows: key_rows, seen: chunk.seen.clone(), out: keys });
                simd.call(Widen { rows: value_rows, seen: chunk.seen.clone(), out: values });
                let keys = Widened { numbers: keys, pooled: key_rows };
                let values = Widened { numbers: values, pooled: value_rows };
                chunk.score(simd, queries, keys, scores);
                chunk.weigh(simd, scores, &mut sums);
                chunk.add_values(simd, scores, values, &mut sums);
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
    rows: Pooled<'a, T>,
    seen: Range<usize>,
    out: &'a mut Vec<f32>,
}

impl<T: Element> Work for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.rows.width;
        self.out.resize(CHUNK * width, 0.0);
        for key in fours(&self.seen) {
            widen(simd, self.rows.row(key), &mut self.out[key * width..(key + 1) * width]);
        }
    }
}

impl Chunk<'_> {
    fn rows(&self) -> usize {
        self.attention.rows_per_head(self.tile)
    }

    /// How many rows are computed together from `row` on.
    #[inline(always)]
    fn step<S: Simd>(&self, row: usize) -> usize {
        match self.rows() - row {
            // Twice four is faster than six and two.
            6..=7 | 9.. if S::DOT_ROWS >= 6 => 6,
            4.. if S::DOT_ROWS >= 4 => 4,
            2.. if S::DOT_ROWS >= 2 => 2,
            _ => 1,
        }
    }

    /// `step` rows' share of what is to be fetched: a burst of requests would wait for itself.
    fn share(&self, row: usize, step: usize) -> Range<usize> {
        row * CHUNK / self.rows()..(row + step) * CHUNK / self.rows()
    }

    /// Dot products of all rows with all seen keys.
    #[inline(always)]
    fn score<S: Simd, R: HeadRows>(&self, simd: S, queries: &[f32], keys: R, scores: &mut [f32]) {
        let padded = keys.width().next_multiple_of(LANES);
        let mut row = 0;
        while row < self.rows() {
            let queries = &queries[row * padded..];
            let scores = &mut scores[row * CHUNK..];
            let seen = self.seen.clone();
            let step = self.step::<S>(row);
            let keys = keys.fetching(self.share(row, step));
            match step {
                6 => simd.call(Scores::<R, 6> { keys, queries, scores, seen }),
                4 => simd.call(Scores::<R, 4> { keys, queries, scores, seen }),
                2 => simd.call(Scores::<R, 2> { keys, queries, scores, seen }),
                _ => simd.call(Scores::<R, 1> { keys, queries, scores, seen }),
            }
            row += step;
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
            if let Some(cap) = attention.kind.soft_cap {
                cap_scores(simd, scores, cap);
            }
            if (first, end) != (0, CHUNK) {
                scores[..first].fill(f32::NEG_INFINITY);
                scores[end..].fill(f32::NEG_INFINITY);
            }
            weigh_row(simd, scores, row, padded, sums);
        }
    }

    /// Adds the values of the seen keys, weighted.
    #[inline(always)]
    fn add_values<S: Simd, R: HeadRows>(&self, simd: S, weights: &[f32], values: R, sums: &mut Sums<'_>) {
        let padded = values.width().next_multiple_of(LANES);
        let mut row = 0;
        while row < self.rows() {
            let weights = &weights[row * CHUNK..];
            let sums = &mut sums.values[row * padded..];
            let seen = self.seen.clone();
            let step = self.step::<S>(row);
            let values = values.fetching(self.share(row, step));
            match step {
                6 => simd.call(AddValues::<R, 6> { weights, values, seen, sums }),
                4 => simd.call(AddValues::<R, 4> { weights, values, seen, sums }),
                2 => simd.call(AddValues::<R, 2> { weights, values, seen, sums }),
                _ => simd.call(AddValues::<R, 1> { weights, values, seen, sums }),
            }
            row += step;
        }
    }
}

#[inline(always)]
fn cap_scores<S: Simd>(simd: S, scores: &mut [f32], cap: f32) {
    assert_eq!(scores.len(), CHUNK);
    let cap = simd.splat(cap);
    let mut at = 0;
    while at < CHUNK {
        // SAFETY: inside the chunk, which is a multiple of sixteen.
        unsafe {
            let capped = math::tanh(simd, simd.div(simd.load(scores.as_ptr().add(at)), cap));
            simd.store(scores.as_mut_ptr().add(at), simd.mul(capped, cap));
        }
        at += LANES;
    }
}

/// A row's scores to weights; sums and values of the row so far follow a larger maximum.
#[inline(always)]
fn weigh_row<S: Simd>(simd: S, scores: &mut [f32], row: usize, padded: usize, sums: &mut Sums<'_>) {
    assert_eq!(scores.len(), CHUNK);
    let values = &mut sums.values[row * padded..(row + 1) * padded];
    let sum = &mut sums.sum[row * LANES..(row + 1) * LANES];
    let p = scores.as_mut_ptr();
    let mut largest = simd.splat(f32::NEG_INFINITY);
    let mut at = 0;
    while at < CHUNK {
        // SAFETY: inside the chunk, which is a multiple of sixteen.
        largest = simd.max(unsafe { simd.load(p.add(at)) }, largest);
        at += LANES;
    }
    // Rare but for the first chunks.
    if simd.any_above(largest, simd.splat(sums.max[row])) {
        let max = simd.max_lane(largest);
        let old = simd.splat(exp(simd, sums.max[row] - max));
        sums.max[row] = max;
        scale(simd, sum, old);
        scale(simd, values, old);
    }
    let max = simd.splat(sums.max[row]);
    // SAFETY: a vector of sums.
    let mut total = unsafe { simd.load(sum.as_ptr()) };
    at = 0;
    while at < CHUNK {
        // SAFETY: as above.
        unsafe {
            let weight = math::exp(simd, simd.sub(simd.load(p.add(at)), max));
            total = simd.add(total, weight);
            simd.store(p.add(at), weight);
        }
        at += LANES;
    }
    // SAFETY: a vector of sums.
    unsafe { simd.store(sum.as_mut_ptr(), total) };
}

/// Multiplies whole vectors.
#[inline(always)]
fn scale<S: Simd>(simd: S, numbers: &mut [f32], factor: S::F) {
    let mut at = 0;
    while at + LANES <= numbers.len() {
        // SAFETY: sixteen numbers from `at` on.
        unsafe {
            let scaled = simd.mul(simd.load(numbers.as_ptr().add(at)), factor);
            simd.store(numbers.as_mut_ptr().add(at), scaled);
        }
        at += LANES;
    }
}

/// Scores of `M` rows with the seen keys.
struct Scores<'a, R, const M: usize> {
    keys: R,
    queries: &'a [f32],
    scores: &'a mut [f32],
    seen: Range<usize>,
}

impl<R: HeadRows, const M: usize> Work for Scores<'_, R, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { keys, queries, scores, seen } = self;
        let keys_in_fours = fours(&seen);
        let mut key = keys_in_fours.start;
        while key < keys_in_fours.end {
            for ahead in key..key + FOUR {
                keys.prefetch(simd, ahead, 0..keys.width());
            }
            let four = [keys.row(key), keys.row(key + 1), keys.row(key + 2), keys.row(key + 3)];
            dot_four::<S, R::Element, M>(simd, four, queries, &mut scores[key..]);
            key += FOUR;
        }
    }
}

/// Dot products of `M` queries with four keys, into the first four of every `CHUNK` scores.
#[inline(always)]
fn dot_four<S: Simd, T: Element, const M: usize>(simd: S, keys: [&[T]; FOUR], queries: &[f32], scores: &mut [f32]) {
    let width = keys[0].len();
    let padded = width.next_multiple_of(LANES);
    let queries = &queries[..M * padded];
    assert!(keys[1].len() == width && keys[2].len() == width && keys[3].len() == width);
    let mut sums = [[simd.splat(0.0); FOUR]; M];
    let mut at = 0;
    while at < width {
        let mut key = [simd.splat(0.0); FOUR];
        for n in 0..FOUR {
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
            for n in 0..FOUR {
                sums[m][n] = simd.fma(key[n], query, sums[m][n]);
            }
        }
        at += LANES;
    }
    let scores = &mut scores[..(M - 1) * CHUNK + FOUR];
    for m in 0..M {
        scores[m * CHUNK..m * CHUNK + FOUR].copy_from_slice(&simd.sum4(sums[m]));
    }
}

/// Adds weighted values to the sums of `M` rows.
struct AddValues<'a, R, const M: usize> {
    weights: &'a [f32],
    values: R,
    seen: Range<usize>,
    sums: &'a mut [f32],
}

impl<R: HeadRows, const M: usize> Work for AddValues<'_, R, M> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let width = self.values.width();
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
    }
}

impl<R: HeadRows, const M: usize> AddValues<'_, R, M> {
    /// `V` vectors from column `at` on; returns their columns.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, simd: S, at: usize) -> usize {
        let width = self.values.width();
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
                    values[v] = R::Element::load(simd, row.add(v * LANES));
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
        let width = self.values.width();
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
