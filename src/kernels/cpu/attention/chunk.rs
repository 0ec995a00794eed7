//! The inner part of attention: a chunk of keys against the rows of a tile.

use std::ops::Range;

use super::super::dot::{load_tail, sum_all};
use super::super::floats::{Element, SharedSlice, widen};
use super::super::math;
use super::super::simd::{LANES, Simd, Work};
use super::{Attention, CHUNK, FEW_ROWS, Partial, PoolView, Scratch, Tile, exp};

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
pub(super) trait HeadRows: Copy {
    type Element: Element;
    fn width(&self) -> usize;
    fn row(&self, key: usize) -> &[Self::Element];
    /// Bytes of an element where the rows are fetched from.
    const FETCHED: usize;
    /// The row of `key`, and the one to fetch meanwhile.
    fn ahead(&self, key: usize) -> Ahead<Self::Element>;
    /// The same rows; for those of `keys` another is to be fetched, for the others not.
    fn fetching(self, keys: Range<usize>) -> Self;
}

/// Where a row is, and the one that is to be fetched while it is computed with: itself, if there is none.
pub(super) struct Ahead<T> {
    row: *const T,
    next: *const u8,
}

impl<T> Clone for Ahead<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ahead<T> {}

impl<T> Default for Ahead<T> {
    fn default() -> Self {
        Self { row: std::ptr::null(), next: std::ptr::null() }
    }
}

/// Rows in a pool: those of key `i` begin at `offset + slots[i] * stride`.
#[derive(Clone, Copy)]
pub(super) struct Pooled<'a, T> {
    pub numbers: SharedSlice<'a, T>,
    pub width: usize,
    pub stride: usize,
    pub offset: usize,
    pub slots: &'a [usize; CHUNK],
    /// Those of the rows to fetch meanwhile.
    pub next: &'a [usize; CHUNK],
    /// Keys, from the first to before the second, for which one is to be fetched.
    pub fetch: (usize, usize),
}

impl<T> Pooled<'_, T> {
    /// The row to fetch while `key` is computed with.
    #[inline(always)]
    pub fn fetched(&self, key: usize) -> Option<*const u8> {
        let at = self.offset + self.next[key] * self.stride;
        (self.fetch.0..self.fetch.1).contains(&key).then(|| self.numbers.address(at).cast())
    }
}

/// Rows that were widened, one after another, and where they come from.
#[derive(Clone, Copy)]
struct Widened<'a, T> {
    numbers: &'a [f32],
    pooled: Pooled<'a, T>,
}

impl<T: Element> HeadRows for Pooled<'_, T> {
    type Element = T;
    const FETCHED: usize = size_of::<T>();

    #[inline(always)]
    fn width(&self) -> usize {
        self.width
    }

    #[inline(always)]
    fn row(&self, key: usize) -> &[T] {
        let at = self.offset + self.slots[key] * self.stride;
        self.numbers.row(at, self.width)
    }

    #[inline(always)]
    fn ahead(&self, key: usize) -> Ahead<T> {
        let row = self.row(key).as_ptr();
        Ahead { row, next: self.fetched(key).unwrap_or(row.cast()) }
    }

    #[inline(always)]
    fn fetching(self, keys: Range<usize>) -> Self {
        Self { fetch: (keys.start, keys.end), ..self }
    }
}

impl<T: Element> HeadRows for Widened<'_, T> {
    type Element = f32;
    const FETCHED: usize = size_of::<T>();

    #[inline(always)]
    fn width(&self) -> usize {
        self.pooled.width
    }

    #[inline(always)]
    fn row(&self, key: usize) -> &[f32] {
        &self.numbers[key * self.pooled.width..(key + 1) * self.pooled.width]
    }

    #[inline(always)]
    fn ahead(&self, key: usize) -> Ahead<f32> {
        let row = self.row(key).as_ptr();
        Ahead { row, next: self.pooled.fetched(key).unwrap_or(row.cast()) }
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
    pub keys: SharedSlice<'a, T>,
    pub values: SharedSlice<'a, T>,
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
        let key_padded = attention.keys.width.next_multiple_of(LANES);
        let stride = attention.kind.kv_heads;
        let pooled = |numbers, view: &PoolView<'_>, head, next| Pooled {
            numbers,
            width: view.width,
            stride: stride * view.row,
            offset: head * view.row + view.first,
            slots,
            next,
            fetch: (0, 0),
        };
        let (key_view, value_view) = (&attention.keys, &attention.values);
        let heads = || tile.kv_heads.clone().enumerate();
        if rows > FEW_ROWS {
            // Many rows: keys and values are widened once for all of them.
            for (i, head) in heads() {
                let key_rows = pooled(self.keys, key_view, head, next);
                let value_rows = pooled(self.values, value_view, head, next);
                let mut sums = split.of_head(i, rows);
                simd.call(Widen { rows: key_rows, seen: chunk.seen.clone(), out: keys });
                simd.call(Widen { rows: value_rows, seen: chunk.seen.clone(), out: values });
                let keys = Widened { numbers: keys, pooled: key_rows };
                let values = Widened { numbers: values, pooled: value_rows };
                chunk.score(simd, &queries[i * rows * key_padded..], keys, fours(&chunk.seen), scores);
                chunk.weigh(simd, scores, &mut sums);
                chunk.add_values(simd, scores, values, chunk.seen.clone(), &mut sums);
            }
            return;
        }
        // Few rows: memory is the limit. It is read as it lies, all heads of a few keys after those of the keys before. A
        // head's rows alone are a power of two apart, and would drive each other out of the first cache.
        let ahead: [usize; CHUNK] = std::array::from_fn(|key| match key + STRIP {
            within if within < CHUNK => slots[within],
            beyond => next[beyond - CHUNK],
        });
        for strip in strips(&fours(&chunk.seen)) {
            for (i, head) in heads() {
                let keys = pooled(self.keys, key_view, head, &ahead);
                let scores = &mut scores[i * rows * CHUNK..];
                chunk.score(simd, &queries[i * rows * key_padded..], keys, strip.clone(), scores);
            }
        }
        for (i, _) in heads() {
            chunk.weigh(simd, &mut scores[i * rows * CHUNK..], &mut split.of_head(i, rows));
        }
        for strip in strips(&chunk.seen) {
            for (i, head) in heads() {
                let values = pooled(self.values, value_view, head, &ahead);
                let scores = &scores[i * rows * CHUNK..];
                chunk.add_values(simd, scores, values, strip.clone(), &mut split.of_head(i, rows));
            }
        }
    }
}

/// Keys of all heads that are read together.
const STRIP: usize = 2 * FOUR;

/// The parts of `keys` that lie in each run of `STRIP`.
fn strips(keys: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *keys;
    (start / STRIP..end.div_ceil(STRIP)).map(move |at| start.max(at * STRIP)..end.min((at + 1) * STRIP))
}

/// The part of a [`Partial`](super::Partial) that belongs to one head of keys.
pub(super) struct Sums<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    pub values: &'a mut [f32],
}

impl Partial {
    /// The part of a tile's head `i`, each of which has `rows`.
    #[inline(always)]
    pub(super) fn of_head(&mut self, i: usize, rows: usize) -> Sums<'_> {
        let padded = self.values.len() / self.max.len().max(1);
        Sums {
            max: &mut self.max[i * rows..(i + 1) * rows],
            sum: &mut self.sum[i * rows * LANES..(i + 1) * rows * LANES],
            values: &mut self.values[i * rows * padded..(i + 1) * rows * padded],
        }
    }
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

    /// `step` rows' share of what is to be fetched while `keys` are computed with: a burst of requests would wait for itself.
    fn share(&self, row: usize, step: usize, keys: &Range<usize>) -> Range<usize> {
        let at = |row: usize| keys.start + row * keys.len() / self.rows();
        at(row)..at(row + step)
    }

    /// Dot products of all rows with some of the keys, in whole fours.
    #[inline(always)]
    fn score<S: Simd, R: HeadRows>(&self, simd: S, queries: &[f32], keys: R, seen: Range<usize>, scores: &mut [f32]) {
        let padded = keys.width().next_multiple_of(LANES);
        let mut row = 0;
        while row < self.rows() {
            let queries = &queries[row * padded..];
            let scores = &mut scores[row * CHUNK..];
            let step = self.step::<S>(row);
            let keys = keys.fetching(self.share(row, step, &seen));
            let seen = seen.clone();
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
    pub(super) fn weigh<S: Simd>(&self, simd: S, scores: &mut [f32], sums: &mut Sums<'_>) {
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

    /// Adds the values of some of the seen keys, weighted.
    #[inline(always)]
    fn add_values<S: Simd, R: HeadRows>(
        &self,
        simd: S,
        weights: &[f32],
        values: R,
        seen: Range<usize>,
        sums: &mut Sums<'_>,
    ) {
        let padded = values.width().next_multiple_of(LANES);
        let mut row = 0;
        while row < self.rows() {
            let weights = &weights[row * CHUNK..];
            let sums = &mut sums.values[row * padded..];
            let step = self.step::<S>(row);
            let values = values.fetching(self.share(row, step, &seen));
            let seen = seen.clone();
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
        let mut key = seen.start;
        while key < seen.end {
            for key in key..key + FOUR {
                let next = keys.ahead(key).next;
                let mut at = 0;
                while at < keys.width() * R::FETCHED {
                    simd.prefetch(next.wrapping_add(at));
                    at += 64;
                }
            }
            let four = [keys.row(key), keys.row(key + 1), keys.row(key + 2), keys.row(key + 3)];
            if S::DOT_COLUMNS >= FOUR {
                dots::<S, R::Element, M, FOUR>(simd, four, queries, &mut scores[key..]);
            } else {
                dots::<S, R::Element, M, 2>(simd, [four[0], four[1]], queries, &mut scores[key..]);
                dots::<S, R::Element, M, 2>(simd, [four[2], four[3]], queries, &mut scores[key + 2..]);
            }
            key += FOUR;
        }
    }
}

/// Dot products of `M` queries with `N` keys, into the first ones of every `CHUNK` scores.
#[inline(always)]
fn dots<S: Simd, T: Element, const M: usize, const N: usize>(
    simd: S,
    keys: [&[T]; N],
    queries: &[f32],
    scores: &mut [f32],
) {
    let width = keys[0].len();
    let padded = width.next_multiple_of(LANES);
    let queries = &queries[..M * padded];
    assert!(keys.iter().all(|key| key.len() == width));
    let mut sums = [[simd.splat(0.0); N]; M];
    let mut key = [simd.splat(0.0); N];
    let whole = width / LANES * LANES;
    let mut at = 0;
    while at < whole {
        for n in 0..N {
            // SAFETY: sixteen elements from `at` on.
            key[n] = unsafe { T::load(simd, keys[n].as_ptr().add(at)) };
        }
        for m in 0..M {
            // SAFETY: `M` rows of `padded` numbers.
            let query = unsafe { simd.load(queries.as_ptr().add(m * padded + at)) };
            for n in 0..N {
                sums[m][n] = simd.fma(key[n], query, sums[m][n]);
            }
        }
        at += LANES;
    }
    if whole < width {
        for n in 0..N {
            key[n] = load_tail(simd, &keys[n][whole..]);
        }
        for m in 0..M {
            // SAFETY: as above.
            let query = unsafe { simd.load(queries.as_ptr().add(m * padded + whole)) };
            for n in 0..N {
                sums[m][n] = simd.fma(key[n], query, sums[m][n]);
            }
        }
    }
    let scores = &mut scores[..(M - 1) * CHUNK + N];
    for m in 0..M {
        sum_all(simd, &sums[m], &mut scores[m * CHUNK..m * CHUNK + N]);
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
        let mut rows = [Ahead::default(); CHUNK];
        for key in self.seen.clone() {
            rows[key] = self.values.ahead(key);
        }
        let mut at = 0;
        while at < width {
            let left = width - at;
            at += match left / LANES {
                4.. if S::DOT_ROWS >= 6 => self.columns::<S, 4>(simd, at, &rows),
                2.. if S::DOT_ROWS >= 2 => self.columns::<S, 2>(simd, at, &rows),
                1.. => self.columns::<S, 1>(simd, at, &rows),
                0 => self.last_columns(simd, at),
            };
        }
    }
}

impl<R: HeadRows, const M: usize> AddValues<'_, R, M> {
    /// `V` vectors from column `at` on; returns their columns. `rows` has those of the seen keys.
    #[inline(always)]
    fn columns<S: Simd, const V: usize>(&mut self, simd: S, at: usize, rows: &[Ahead<R::Element>; CHUNK]) -> usize {
        let width = self.values.width();
        let padded = width.next_multiple_of(LANES);
        let sums = &mut self.sums[..M * padded];
        let weights = &self.weights[..(M - 1) * CHUNK + self.seen.end];
        let lines = (V * LANES * R::FETCHED).div_ceil(64);
        assert!(at + V * LANES <= width && self.seen.end <= CHUNK);
        let mut acc = [[simd.splat(0.0); V]; M];
        // SAFETY: `V` vectors from `at` on are inside each of the `M` rows of sums and inside each row of values.
        unsafe {
            for m in 0..M {
                for v in 0..V {
                    acc[m][v] = simd.load(sums.as_ptr().add(m * padded + at + v * LANES));
                }
            }
            let mut key = self.seen.start;
            while key < self.seen.end {
                let Ahead { row, next } = *rows.get_unchecked(key);
                for line in 0..lines {
                    simd.prefetch(next.wrapping_add(at * R::FETCHED + 64 * line));
                }
                let mut values = [simd.splat(0.0); V];
                for v in 0..V {
                    values[v] = R::Element::load(simd, row.add(at + v * LANES));
                }
                for m in 0..M {
                    let weight = simd.splat(*weights.get_unchecked(m * CHUNK + key));
                    for v in 0..V {
                        acc[m][v] = simd.fma(weight, values[v], acc[m][v]);
                    }
                }
                key += 1;
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
