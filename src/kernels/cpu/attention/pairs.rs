//! A chunk of keys against many rows, in pairs of bf16: half the multiplications, where the processor multiplies those.
//! Queries and weights are rounded to bf16; scores, sums and everything else stay f32.

use super::super::floats::{Bf16, Element, SharedFloats};
use super::super::gemm::{Pair, RoundPairs, TimesPanels, WIDTH, lanes_at, row_step};
use super::super::matmul::Precision;
use super::super::simd::{Isa, LANES, Simd, WORDS, Work};
use super::chunk::{Chunk, HeadRows, Pooled};
use super::{Attention, CHUNK, PoolView, Scratch};

// A chunk is a panel of keys.
const _: () = assert!(CHUNK == WIDTH);

impl Attention<'_> {
    /// Whether tiles of many rows are computed in pairs.
    pub(super) fn is_in_pairs(&self, isa: Isa) -> bool {
        let bf16 = |numbers: &SharedFloats<'_>| matches!(numbers, SharedFloats::Bf16(_));
        self.precision == Precision::Fast
            && isa.has_dot_bf16()
            && bf16(&self.keys.numbers)
            && bf16(&self.values.numbers)
            && self.keys.width.is_multiple_of(LANES)
            && self.values.width.is_multiple_of(WIDTH)
    }
}

/// What is laid out for a chunk.
#[derive(Debug, Default)]
pub(super) struct Panels {
    /// Queries of a tile, `[rows, width / 2]`.
    pub queries: Vec<f32>,
    /// `[width / 2][key]`.
    keys: Vec<f32>,
    /// `[32 columns][two keys][column]`.
    values: Vec<f32>,
    /// `[rows, CHUNK / 2]`.
    weights: Vec<f32>,
}

impl Panels {
    /// Rounds the queries of a tile.
    #[inline(always)]
    pub fn round_queries<S: Simd>(&mut self, simd: S, queries: &[f32]) {
        self.queries.resize(queries.len() / 2, 0.0);
        simd.call(RoundPairs { x: queries, pairs: &mut self.queries });
    }
}

/// Attends to a chunk, into the scratch's split.
pub(super) struct AttendPairs<'a> {
    pub chunk: &'a Chunk<'a>,
    /// Index in the pools of the row of each seen key.
    pub slots: &'a [usize; CHUNK],
    /// The same of the next chunk; zeros where there is none.
    pub next: &'a [usize; CHUNK],
    pub scratch: &'a mut Scratch,
}

impl Work for AttendPairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { chunk, slots, next, scratch } = self;
        let Scratch { panels, scores, split, .. } = scratch;
        let (attention, tile) = (chunk.attention, chunk.tile);
        let (SharedFloats::Bf16(keys), SharedFloats::Bf16(values)) = (attention.keys.numbers, attention.values.numbers)
        else {
            unreachable!("only bf16 is multiplied in pairs")
        };
        let rows = attention.rows_per_head(tile);
        let (key_width, value_width) = (attention.keys.width, attention.values.width);
        let kv_heads = attention.kind.kv_heads;
        let (depth, halves) = (key_width / 2, CHUNK / 2);
        panels.keys.resize(depth * WIDTH, 0.0);
        panels.values.resize(value_width * halves, 0.0);
        panels.weights.resize(rows * halves, 0.0);
        for (i, head) in tile.kv_heads.clone().enumerate() {
            let pooled = |numbers, view: &PoolView<'_>| Pooled {
                numbers,
                width: view.width,
                stride: kv_heads * view.row,
                offset: head * view.row + view.first,
                slots,
                next,
                fetch: (0, CHUNK),
            };
            simd.call(LayOutKeys { rows: pooled(keys, &attention.keys), panel: &mut panels.keys });
            let (rows_of_values, seen) = (pooled(values, &attention.values), (chunk.seen.start, chunk.seen.end));
            simd.call(LayOutValues { rows: rows_of_values, seen, panels: &mut panels.values });

            let scores = &mut scores[..rows * CHUNK];
            scores.fill(0.0);
            simd.call(TimesPanels {
                pairs: true,
                a: &panels.queries[i * rows * depth..(i + 1) * rows * depth],
                a_stride: depth,
                rows,
                depth,
                panels: &panels.keys,
                count: 1,
                begin: 0,
                acc: &mut scores[..],
                acc_stride: CHUNK,
            });
            let mut sums = split.of_head(i, rows);
            chunk.weigh(simd, scores, &mut sums);
            simd.call(RoundPairs { x: scores, pairs: &mut panels.weights });
            simd.call(TimesPanels {
                pairs: true,
                a: &panels.weights,
                a_stride: halves,
                rows,
                depth: halves,
                panels: &panels.values,
                count: value_width / WIDTH,
                begin: 0,
                acc: &mut sums.values[..],
                acc_stride: value_width,
            });
        }
    }
}

/// Asks for the row that takes the place of `key` in the next chunk.
#[inline(always)]
fn fetch<S: Simd>(simd: S, rows: &Pooled<'_, Bf16>, key: usize) {
    if let Some(next) = rows.fetched(key) {
        let mut at = 0;
        while at < rows.width * size_of::<Bf16>() {
            simd.prefetch(next.wrapping_add(at));
            at += 64;
        }
    }
}

/// Pairs of columns as rows of a panel, keys as its lanes. Keys that no row sees may be anything.
struct LayOutKeys<'a> {
    rows: Pooled<'a, Bf16>,
    panel: &'a mut [f32],
}

impl Work for LayOutKeys<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows, panel } = self;
        let depth = rows.width / 2;
        assert!(panel.len() >= depth * WIDTH && rows.width.is_multiple_of(2 * WORDS));
        for first in (0..CHUNK).step_by(LANES) {
            let mut neighbours = true;
            for key in first + 1..first + LANES {
                neighbours &= rows.slots[key] == rows.slots[key - 1] + 1;
            }
            let mut square = [[Pair::default(); WORDS]; LANES];
            for pair in (0..depth).step_by(WORDS) {
                let words = if neighbours {
                    // The last row ends where it should, and so do those before it.
                    let (begin, _) = (rows.row(first), rows.row(first + LANES - 1));
                    // SAFETY: sixteen rows at equal distances, each with eight pairs from `pair` on.
                    unsafe { simd.load_words(begin.as_ptr().add(2 * pair).cast(), rows.stride * size_of::<Bf16>()) }
                } else {
                    for (key, line) in square.iter_mut().enumerate() {
                        let row = rows.row(first + key);
                        for (word, cell) in line.iter_mut().enumerate() {
                            *cell = Pair::of(row[2 * (pair + word)], row[2 * (pair + word) + 1]);
                        }
                    }
                    // SAFETY: sixteen rows of eight pairs.
                    unsafe { simd.load_words(square.as_ptr().cast(), size_of_val(&square[0])) }
                };
                for (word, &keys) in words.iter().enumerate() {
                    let place = lanes_at::<S>(first, depth) + (pair + word) * row_step::<S>();
                    // SAFETY: the panel has as many rows as there are pairs, each with room for all keys.
                    unsafe { simd.store(panel.as_mut_ptr().add(place), simd.float_of_bits(keys)) };
                }
            }
            for key in first..first + LANES {
                fetch(simd, &rows, key);
            }
        }
    }
}

/// Pairs of keys as rows of panels, columns as their lanes. Keys that no row sees are zeros.
struct LayOutValues<'a> {
    rows: Pooled<'a, Bf16>,
    /// Keys, from the first to before the second.
    seen: (usize, usize),
    panels: &'a mut [f32],
}

impl Work for LayOutValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows, seen, panels } = self;
        assert!(rows.width.is_multiple_of(WIDTH) && panels.len() >= rows.width * CHUNK / 2);
        for pair in 0..CHUNK / 2 {
            let is_seen = |key: usize| seen.0 <= key && key < seen.1;
            let (first, second) = (rows.row(2 * pair), rows.row(2 * pair + 1));
            let mut at = 0;
            while at < rows.width {
                let (mut low, mut high) = (simd.splat_i(0), simd.splat_i(0));
                // SAFETY: sixteen columns of both rows; of the panel of these columns the place of this pair.
                unsafe {
                    if is_seen(2 * pair) {
                        low = simd.shr::<16>(simd.bits(Bf16::load(simd, first.as_ptr().add(at))));
                    }
                    if is_seen(2 * pair + 1) {
                        high = simd.bits(Bf16::load(simd, second.as_ptr().add(at)));
                    }
                    let place =
                        at / WIDTH * WIDTH * CHUNK / 2 + lanes_at::<S>(at % WIDTH, CHUNK / 2) + pair * row_step::<S>();
                    simd.store(panels.as_mut_ptr().add(place), simd.float_of_bits(simd.add_i(low, high)));
                }
                at += LANES;
            }
            fetch(simd, &rows, 2 * pair);
            fetch(simd, &rows, 2 * pair + 1);
        }
    }
}
