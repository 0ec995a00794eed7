//! Attention over paged keys and values against f64, and what else is promised of it.

use proptest::prelude::*;

use crate::cpu::Isa;
use crate::cpu::attention::{Attention, AttentionKind, PoolView, Segment, Window, append};
use crate::cpu::floats::{FloatsMut, Rows, SharedMut};
use crate::cpu::matmul::Precision;
use crate::guard::{EDGES, Edge, Guarded};
use crate::numbers::{Numbers, Placed, TYPES, Type, bits, cases, rounded};
use crate::reference::{Expected, Random, first_miss};
use crate::threads::workers;

/// A sequence: tokens whose keys are there already, and tokens that attend.
#[derive(Debug, Clone, Copy)]
struct Length {
    cached: usize,
    new: usize,
}

/// A step to make.
#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    kind: AttentionKind,
    /// Widths of keys and of values.
    widths: [usize; 2],
    stored: Type,
    lengths: Vec<Length>,
    sinks: bool,
}

/// Of both kinds.
fn windows(tokens: std::ops::Range<usize>) -> impl Strategy<Value = Option<Window>> {
    let kind = |(tokens, chunked)| if chunked { Window::Chunked(tokens) } else { Window::Sliding(tokens) };
    (tokens, any::<bool>()).prop_map(move |window| Some(kind(window)))
}

/// The first key that a query at `position` sees.
fn first_seen(window: Option<Window>, position: usize) -> usize {
    match window {
        None => 0,
        Some(Window::Sliding(tokens)) => (position + 1).saturating_sub(tokens),
        Some(Window::Chunked(tokens)) => position - position % tokens,
    }
}

/// Decoding rows and prompt chunks in one step, with few heads and any of the options: wide heads and short sequences,
/// or narrow heads and sequences of several splits.
fn plans() -> impl Strategy<Value = Plan> {
    let known = prop::sample::select(&[64usize, 80, 96, 128, 192, 256][..]);
    let length = |cached: std::ops::Range<usize>, new: std::ops::Range<usize>| {
        (cached, new).prop_map(|(cached, new)| Length { cached, new })
    };
    let lengths = prop_oneof![2 => length(0..40, 1..2), 2 => length(0..40, 2..40), 1 => length(40..130, 1..8)];
    let short = (known, prop::collection::vec(lengths, 1..=4));
    let lengths = prop_oneof![2 => length(480..530, 1..40), 1 => length(1000..1100, 1..30)];
    let long = (1usize..50, prop::collection::vec(lengths, 1..=2));
    let window = prop_oneof![3 => Just(None), 1 => windows(1..40), 1 => windows(40..700)];
    let heads = prop_oneof![4 => (1usize..=3, 1usize..=4), 1 => (1usize..=2, 5usize..=9), 1 => (Just(1), 24usize..=26)];
    let options = (window, prop::option::weighted(0.3, 5f32..60.0), any::<bool>());
    let shape = (heads, prop::option::weighted(0.2, 1usize..140), prop::sample::select(&TYPES[..]));
    (any::<u64>(), shape, prop_oneof![2 => short, 1 => long], options).prop_map(
        |(seed, ((kv_heads, group), other, stored), (width, mut lengths), (window, soft_cap, sinks))| {
            let heads = kv_heads * group;
            // Keeps a case below a few milliseconds.
            let most = 300_000 / lengths.len();
            for length in &mut lengths {
                length.new = length.new.min((most / (length.cached * heads * width + 1)).max(1));
            }
            let scale = (width as f32).sqrt().recip();
            let kind = AttentionKind { kv_heads, heads, scale, window, soft_cap };
            Plan { seed, kind, widths: [width, other.unwrap_or(width)], stored, lengths, sinks }
        },
    )
}

/// Queries, keys and values of some sequences.
#[derive(Debug, Clone)]
struct Sequences {
    kind: AttentionKind,
    widths: [usize; 2],
    /// Per sequence: how many of its tokens do not attend.
    cached: Vec<usize>,
    /// Per sequence `[new, heads, key width]`.
    queries: Vec<Vec<f32>>,
    /// Per sequence keys and values `[cached + new, kv_heads, width]`.
    pools: Vec<[Numbers; 2]>,
    sinks: Option<Vec<f32>>,
    /// Values are read from the last columns of keys; their own pool is not shown.
    values_in_keys: bool,
}

impl Plan {
    fn build(&self) -> Sequences {
        let mut random = Random(self.seed);
        let AttentionKind { kv_heads, heads, .. } = self.kind;
        let queries = self.lengths.iter().map(|l| random.normals(l.new * heads * self.widths[0])).collect();
        let mut pool = |tokens: usize, width: usize| {
            let numbers: Vec<f64> = (0..tokens * kv_heads * width).map(|_| random.rough()).collect();
            Numbers::new(self.stored, numbers)
        };
        let pools = self.lengths.iter().map(|l| self.widths.map(|width| pool(l.cached + l.new, width))).collect();
        let sinks = self.sinks.then(|| random.normals(heads));
        let cached = self.lengths.iter().map(|length| length.cached).collect();
        Sequences { kind: self.kind.clone(), widths: self.widths, cached, queries, pools, sinks, values_in_keys: false }
    }
}

/// Tokens of a sequence to attend with, as a piece of a step.
#[derive(Debug, Clone)]
struct Piece {
    sequence: usize,
    /// Counted from the first token that attends.
    tokens: std::ops::Range<usize>,
}

/// Where the keys and values of a step lie, and how it is computed.
#[derive(Debug, Clone, Copy)]
struct How {
    isa: Isa,
    precision: Precision,
    threads: usize,
    block_tokens: usize,
    /// Decides where blocks lie and the order of pieces.
    seed: u64,
    edge: Edge,
}

impl Sequences {
    fn new_tokens(&self, sequence: usize) -> usize {
        self.queries[sequence].len() / (self.kind.heads * self.widths[0])
    }

    /// Every sequence in one piece.
    fn whole(&self) -> Vec<Piece> {
        (0..self.queries.len()).map(|sequence| Piece { sequence, tokens: 0..self.new_tokens(sequence) }).collect()
    }

    /// What a kernel makes of the pieces, one after another. All that is not part of a sequence is not a number: a read
    /// of it would show, and a row that no piece has must stay so.
    fn run(&self, pieces: &[Piece], how: How, out: Type) -> Numbers {
        let (&AttentionKind { kv_heads, heads, .. }, block) = (&self.kind, how.block_tokens);
        let mut random = Random(how.seed);
        // Keys up to the last token of the piece exist, in blocks that only it has.
        let lengths: Vec<usize> = pieces.iter().map(|piece| self.cached[piece.sequence] + piece.tokens.end).collect();
        let blocks: usize = lengths.iter().map(|length| length.div_ceil(block)).sum();
        let places = random.permutation(blocks + random.clone().below(3));
        let mut stored = [0, 1].map(|which| {
            let nothing = std::iter::repeat_n(f64::NAN, places.len() * block * kv_heads * self.widths[which]);
            self.pools[0][which].like(nothing)
        });
        let (mut tables, mut segments) = (Vec::new(), Vec::new());
        let mut row = random.below(2);
        let mut queries = vec![f32::NAN; row * heads * self.widths[0]];
        let first_row = row;
        for (piece, &length) in pieces.iter().zip(&lengths) {
            let table = tables.len();
            tables.extend(places[table..table + length.div_ceil(block)].iter().map(|&place| place as u32));
            for (stored, (pool, width)) in stored.iter_mut().zip(self.pools[piece.sequence].iter().zip(self.widths)) {
                for token in 0..length {
                    let slot = tables[table + token / block] as usize * block + token % block;
                    stored.copy(slot * kv_heads * width, pool, token * kv_heads * width, kv_heads * width);
                }
            }
            let width = heads * self.widths[0];
            queries.extend(&self.queries[piece.sequence][piece.tokens.start * width..piece.tokens.end * width]);
            let start = self.cached[piece.sequence] + piece.tokens.start;
            segments.push(Segment { rows: row..row + piece.tokens.len(), start, table });
            row += piece.tokens.len();
        }
        let order = random.permutation(segments.len());
        let segments: Vec<Segment> = order.into_iter().map(|i| segments[i].clone()).collect();
        let [keys, values] = stored.map(|stored| stored.place(how.edge));
        let (queries, tables) = (Guarded::new(&queries, how.edge), Guarded::new(&tables, how.edge));
        let sinks = self.sinks.as_ref().map(|sinks| Guarded::new(sinks, how.edge));
        let attention = Attention {
            kind: &self.kind,
            queries: &queries,
            keys: PoolView::new(keys.floats(), self.widths[0]),
            values: match self.values_in_keys {
                true => PoolView::last_columns(keys.floats(), self.widths[0], self.widths[1]),
                false => PoolView::new(values.floats(), self.widths[1]),
            },
            block_tokens: block,
            tables: &tables,
            segments: &segments,
            sinks: sinks.as_deref(),
            precision: how.precision,
        };
        let width = heads * self.widths[1];
        let mut placed = Placed::output(out, row * width, how.edge);
        attention.run(how.isa, &workers(how.threads), placed.floats_mut());
        let numbers = placed.numbers();
        assert!((0..first_row * width).all(|at| numbers.get(at).is_nan()), "a row of no piece was written");
        numbers.skip(first_row * width)
    }

    fn run_f32(&self, pieces: &[Piece], how: How) -> Vec<f32> {
        let Numbers::F32(out) = self.run(pieces, how, Type::F32) else { unreachable!("asked for f32") };
        out
    }

    /// All rows in f64; `rounded` if queries and weights may be rounded to bf16.
    fn reference(&self, rounded: bool) -> Vec<Expected> {
        let mut out = Vec::new();
        for sequence in 0..self.queries.len() {
            for token in 0..self.new_tokens(sequence) {
                for head in 0..self.kind.heads {
                    self.head(sequence, token, head, rounded, &mut out);
                }
            }
        }
        out
    }

    /// One head of one token. A kernel may miss a score by `1e-6 * sqrt(width)` times the sum of the magnitudes it
    /// adds, and by what `e^x` of rounded numbers makes of it; a sum of `n` weighted values by `2e-6 * sqrt(n)` times
    /// the sum of their magnitudes. What is rounded to bf16 moves by at most a 512th.
    fn head(&self, sequence: usize, token: usize, head: usize, rounded: bool, out: &mut Vec<Expected>) {
        let rounding = if rounded { 1.0 / 512.0 } else { 0.0 };
        let AttentionKind { kv_heads, heads, scale, window, soft_cap } = self.kind;
        let [key_width, value_width] = self.widths;
        let [keys, values] = &self.pools[sequence];
        let query = &self.queries[sequence][(token * heads + head) * key_width..][..key_width];
        let position = self.cached[sequence] + token;
        let first = first_seen(window, position);
        let offset = |key: usize, width: usize| (key * kv_heads + head / (heads / kv_heads)) * width;
        let (mut scores, mut uncertain) = (Vec::new(), 0f64);
        for key in first..=position {
            let products = query.iter().enumerate().map(|(i, q)| f64::from(*q) * keys.get(offset(key, key_width) + i));
            let (dot, size) = products.fold((0.0, 0.0), |(dot, size), x| (dot + x, size + x.abs()));
            let mut score = dot * f64::from(scale);
            let mut error = (1e-6 * (key_width as f64).sqrt() + rounding) * size * f64::from(scale);
            if let Some(cap) = soft_cap.map(f64::from) {
                score = cap * (score / cap).tanh();
                error += 4e-7 * cap;
            }
            uncertain = uncertain.max(error + 2e-7 * score.abs());
            scores.push(score);
        }
        let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
        let max = scores.iter().copied().chain(sink).fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
        let relative = (2.0 * (uncertain + 2e-7 * max.abs() + 5e-7)).exp_m1() + 2e-6 * (scores.len() as f64).sqrt();
        let relative = relative + rounding;
        for column in 0..value_width {
            let parts = weights.iter().enumerate();
            let parts = parts.map(|(i, weight)| weight / sum * values.get(offset(first + i, value_width) + column));
            let (value, size) = parts.fold((0.0, 0.0), |(value, size), x| (value + x, size + x.abs()));
            out.push(Expected { value, bound: relative * size + 1e-35 });
        }
    }
}

/// How the first computation of a plan is done.
fn how(isa: Isa, plan: &Plan) -> How {
    let threads = 1 + plan.seed as usize % 3;
    let block_tokens = [1, 4, 16, 32, 7][plan.seed as usize % 5];
    How { isa, precision: Precision::Exact, threads, block_tokens, seed: plan.seed, edge: Edge::End }
}

proptest! {
    #![proptest_config(cases(60))]

    /// With every instruction set and at both edges of buffers.
    #[test]
    fn attention_is_within_the_bound(plan in plans()) {
        let sequences = plan.build();
        let (expected, width) = (sequences.reference(false), plan.kind.heads * plan.widths[1]);
        for isa in Isa::available() {
            let how = how(isa, &plan);
            let found = EDGES.map(|edge| sequences.run_f32(&sequences.whole(), How { edge, ..how }));
            if let Err(miss) = first_miss(&found[0], &expected, width) {
                return Err(TestCaseError::fail(format!("{isa:?}: {miss}")));
            }
            prop_assert_eq!(bits(&found[0]), bits(&found[1]), "{:?}: depends on where buffers lie", isa);
            let kind = TYPES[1 + plan.seed as usize % 2];
            prop_assert_eq!(sequences.run(&sequences.whole(), how, kind), rounded(kind, &found[0]), "{:?}", isa);
        }
    }

    /// Bit for bit, in either precision.
    #[test]
    fn values_within_keys_are_as_those_in_a_pool(plan in plans()) {
        let mut own = plan.build();
        let [key_width, value_width] = plan.widths;
        if value_width > key_width {
            return Ok(());
        }
        for [keys, values] in &mut own.pools {
            for at in 0..values.len() {
                let (row, column) = (at / value_width, at % value_width);
                values.set(at, keys.get(row * key_width + key_width - value_width + column));
            }
        }
        let within = Sequences { values_in_keys: true, ..own.clone() };
        for isa in Isa::available() {
            for precision in [Precision::Exact, Precision::Fast] {
                let how = How { precision, ..how(isa, &plan) };
                let [own, within] = [&own, &within].map(|sequences| sequences.run_f32(&sequences.whole(), how));
                prop_assert_eq!(bits(&own), bits(&within), "{:?}", isa);
            }
        }
    }

    /// Fast precision rounds where the processor multiplies bf16 and keys and values are that; elsewhere it is the exact one.
    #[test]
    fn fast_attention_is_within_the_bound(plan in plans()) {
        let sequences = plan.build();
        let (expected, width) = (sequences.reference(true), plan.kind.heads * plan.widths[1]);
        for isa in Isa::available() {
            let exact = how(isa, &plan);
            let fast = How { precision: Precision::Fast, ..exact };
            let found = EDGES.map(|edge| sequences.run_f32(&sequences.whole(), How { edge, ..fast }));
            prop_assert_eq!(bits(&found[0]), bits(&found[1]), "{:?}: depends on where buffers lie", isa);
            if let Err(miss) = first_miss(&found[0], &expected, width) {
                return Err(TestCaseError::fail(format!("{isa:?}: {miss}")));
            }
            if !isa.has_dot_bf16() || plan.stored != Type::Bf16 {
                prop_assert_eq!(bits(&found[0]), bits(&sequences.run_f32(&sequences.whole(), exact)), "{:?}", isa);
            }
        }
    }

    /// A row's bits depend neither on the other rows of the step, nor on how prompts are cut, nor on where blocks lie
    /// and how large they are, nor on the number of threads.
    #[test]
    fn rows_depend_on_their_sequence_alone(plan in plans(), cut in any::<u64>()) {
        let sequences = plan.build();
        let width = plan.kind.heads * plan.widths[1];
        let mut random = Random(cut);
        for isa in Isa::available() {
            let whole = sequences.run_f32(&sequences.whole(), how(isa, &plan));
            let mut before = 0;
            for sequence in 0..sequences.queries.len() {
                let new = sequences.new_tokens(sequence);
                let mut done = 0;
                while done < new {
                    let tokens = done..done + 1 + random.below(new - done);
                    // Some rows alone, some together with another sequence.
                    let mut pieces = vec![Piece { sequence, tokens: tokens.clone() }];
                    if random.below(3) == 0 {
                        pieces.push(Piece { sequence: random.below(sequences.queries.len()), tokens: 0..1 });
                    }
                    let (threads, block_tokens) = (1 + random.below(3), 1 + random.below(40));
                    let how = How { isa, precision: Precision::Exact, threads, block_tokens, seed: random.bits(), edge: Edge::End };
                    let some = sequences.run_f32(&pieces, how);
                    let rows = (before + tokens.start) * width..(before + tokens.end) * width;
                    let len = rows.len();
                    let (whole, some) = (bits(&whole[rows]), bits(&some[..len]));
                    prop_assert_eq!(whole, some, "{:?}: tokens {:?} of {}", isa, tokens, sequence);
                    done = tokens.end;
                }
                before += new;
            }
        }
    }

    /// What is not a number in a query, a key or a value is seen in the rows that attend to it, and infinities are not
    /// lost; other sequences are not touched. Rows of the same sequence that do not attend to it may be.
    #[test]
    fn infinities_reach_the_outputs(plan in plans(), what in 0usize..3, value in 0usize..3, seed in any::<u64>()) {
        let sequences = plan.build();
        let &AttentionKind { kv_heads, heads, window, .. } = &plan.kind;
        let [key_width, value_width] = plan.widths;
        let mut random = Random(seed);
        let ill = random.below(sequences.queries.len());
        let (cached, new) = (sequences.cached[ill], sequences.new_tokens(ill));
        let mut poisoned = sequences.clone();
        let value = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][value];
        // An infinite key may have the score of a key that is never looked at; only not-a-numbers cannot be missed.
        let value = if what == 1 || plan.kind.soft_cap.is_some() && what == 0 { f64::NAN } else { value };
        let token = if what == 0 { random.below(new) } else { random.below(cached + new) };
        let head = random.below(if what == 0 { heads } else { kv_heads });
        let column = random.below(plan.widths[what / 2]);
        match what {
            0 => poisoned.queries[ill][(token * heads + head) * key_width + column] = value as f32,
            1 => poisoned.pools[ill][0].set((token * kv_heads + head) * key_width + column, value),
            _ => poisoned.pools[ill][1].set((token * kv_heads + head) * value_width + column, value),
        }
        // Whether an output must show it.
        let shows = |row: usize, of_head: usize, of_column: usize| {
            let position = cached + row;
            let sees = (first_seen(window, position)..=position).contains(&token);
            match what {
                0 => row == token && of_head == head,
                1 => sees && of_head / (heads / kv_heads) == head,
                _ => sees && of_head / (heads / kv_heads) == head && of_column == column,
            }
        };
        for isa in Isa::available() {
            let how = how(isa, &plan);
            let well = sequences.run_f32(&sequences.whole(), how);
            let found = poisoned.run_f32(&sequences.whole(), how);
            let mut rows = well.chunks_exact(heads * value_width).zip(found.chunks_exact(heads * value_width));
            for sequence in 0..sequences.queries.len() {
                for (row, (well, found)) in rows.by_ref().take(sequences.new_tokens(sequence)).enumerate() {
                    if sequence != ill {
                        prop_assert_eq!(bits(well), bits(found), "{:?}: another sequence", isa);
                        continue;
                    }
                    for (at, found) in found.iter().enumerate() {
                        let lost = shows(row, at / value_width, at % value_width) && found.is_finite();
                        prop_assert!(!lost, "{isa:?}: row {row} head {} column {}", at / value_width, at % value_width);
                    }
                }
            }
        }
    }

    /// Rows go where their slots say, rounded, and nowhere else.
    #[test]
    fn append_writes_slots(
        stored in prop::sample::select(&TYPES[..]),
        (width, slots, count) in (1usize..70, 1usize..40, 0usize..40),
        seed in any::<u64>(),
    ) {
        let mut random = Random(seed);
        let count = count.min(slots);
        let places: Vec<u32> = random.permutation(slots)[..count].iter().map(|&slot| slot as u32).collect();
        let (rows, before) = (random.normals(count * width), random.normals(slots * width));
        let mut expected = before.clone();
        for (row, &slot) in rows.chunks_exact(width).zip(&places) {
            expected[slot as usize * width..][..width].copy_from_slice(row);
        }
        for edge in EDGES {
            let mut pool = rounded(stored, &before).place(edge);
            let (rows, places) = (Guarded::new(&rows, edge), Guarded::new(&places, edge));
            // SAFETY: the pool is this test's alone.
            unsafe { append(SharedMut::new(&mut pool.floats_mut()), Rows::packed(&rows, width), &places) };
            prop_assert_eq!(pool.numbers(), rounded(stored, &expected));
        }
    }
}

/// A plan with nothing special.
fn plain() -> Plan {
    let kind = AttentionKind { kv_heads: 2, heads: 4, scale: 0.125, window: Some(Window::Sliding(20)), soft_cap: None };
    let lengths = vec![Length { cached: 30, new: 3 }, Length { cached: 0, new: 5 }];
    Plan { seed: 5, kind, widths: [64, 64], stored: Type::Bf16, lengths, sinks: true }
}

/// Many rows over bf16 are rounded where the processor multiplies that, by less than a hundredth of the output's norm; few
/// rows are not.
#[test]
fn only_many_rows_are_rounded() {
    for (new, many) in [(4, false), (40, true)] {
        let kind = AttentionKind { kv_heads: 2, heads: 4, scale: 0.125, window: None, soft_cap: None };
        let (lengths, stored) = (vec![Length { cached: 100, new }], Type::Bf16);
        let plan = Plan { seed: 3, kind, widths: [64, 64], stored, lengths, sinks: false };
        let sequences = plan.build();
        for isa in Isa::available() {
            let run = |precision| sequences.run_f32(&sequences.whole(), How { precision, ..how(isa, &plan) });
            let (exact, fast) = (run(Precision::Exact), run(Precision::Fast));
            assert_eq!(bits(&exact) != bits(&fast), many && isa.has_dot_bf16(), "{isa:?} {new} tokens");
            let norm =
                |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let miss = norm(&mut exact.iter().zip(&fast).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
            assert!(miss <= 1e-2, "{isa:?} {new} tokens: off by {miss} of the norm");
        }
    }
}

/// The bounds notice a key too many, a key too few, a wrong sink, head, scale or cap; bits notice another order.
#[test]
fn bounds_notice_small_errors() {
    let plan = plain();
    let right = plan.build();
    let expected = right.reference(false);
    let change = |change: &dyn Fn(&mut Sequences)| {
        let mut wrong = right.clone();
        change(&mut wrong);
        wrong
    };
    let wrongs = [
        ("a key too many", change(&|s| s.kind.window = Some(Window::Sliding(21)))),
        ("a key too few", change(&|s| s.kind.window = Some(Window::Sliding(19)))),
        ("a chunk", change(&|s| s.kind.window = Some(Window::Chunked(20)))),
        ("another scale", change(&|s| s.kind.scale = 0.1251)),
        ("a cap", change(&|s| s.kind.soft_cap = Some(20.0))),
        ("no sinks", change(&|s| s.sinks = None)),
        ("other heads", change(&|s| s.kind.kv_heads = 1)),
        (
            "rounded queries",
            change(&|s| s.queries.iter_mut().flatten().for_each(|x| *x = half::bf16::from_f32(*x).to_f32())),
        ),
    ];
    for isa in Isa::available() {
        let is_admitted = |sequences: &Sequences| {
            let found = sequences.run_f32(&sequences.whole(), how(isa, &plan));
            first_miss(&found, &expected, 4 * 64).is_ok()
        };
        assert!(is_admitted(&right), "{isa:?}");
        for (what, wrong) in &wrongs {
            assert!(!is_admitted(wrong), "{isa:?}: {what}");
        }
        // Keys in the opposite order, all of them seen: the same attention, other bits.
        let mut there = right.clone();
        there.kind.window = None;
        let one = Piece { sequence: 0, tokens: 2..3 };
        let mut back = there.clone();
        for (pool, width) in back.pools[0].iter_mut().zip([2 * 64; 2]) {
            let forward = pool.clone();
            (0..33).for_each(|token| pool.copy(token * width, &forward, (32 - token) * width, width));
        }
        let run = |sequences: &Sequences| sequences.run_f32(std::slice::from_ref(&one), how(isa, &plan));
        let (there, back) = (run(&there), run(&back));
        assert_ne!(bits(&there), bits(&back), "{isa:?}");
        assert!(there.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-5), "{isa:?}");
    }
}

/// With keys that are all the same, the values' mean comes out; with one key, its value.
#[test]
fn equal_scores_give_means() {
    let kind = AttentionKind { kv_heads: 1, heads: 1, scale: 1.0, window: None, soft_cap: None };
    let lengths = vec![Length { cached: 3, new: 1 }, Length { cached: 0, new: 1 }];
    let mut sequences = Plan { seed: 1, kind, widths: [8, 3], stored: Type::F32, lengths, sinks: false }.build();
    for (i, values) in sequences.pools.iter_mut().enumerate() {
        let tokens = values[1].len() / 3;
        values[0] = Numbers::F32(vec![0.25; tokens * 8]);
        values[1] = Numbers::F32((0..tokens * 3).map(|at| (at / 3 * (i + 1) + 5) as f32).collect());
    }
    for isa in Isa::available() {
        let how = How { isa, precision: Precision::Exact, threads: 2, block_tokens: 2, seed: 1, edge: Edge::End };
        assert_eq!(sequences.run_f32(&sequences.whole(), how), [6.5, 6.5, 6.5, 5.0, 5.0, 5.0], "{isa:?}");
    }
}

/// Scores far apart neither overflow nor vanish into not-a-numbers.
#[test]
fn large_scores_choose_one_key() {
    let kind = AttentionKind { kv_heads: 1, heads: 2, scale: 1.0, window: None, soft_cap: None };
    let lengths = vec![Length { cached: 1200, new: 2 }];
    for sinks in [false, true] {
        let lengths = lengths.clone();
        let mut sequences =
            Plan { seed: 2, kind: kind.clone(), widths: [64, 64], stored: Type::F32, lengths, sinks }.build();
        sequences.queries[0].iter_mut().for_each(|x| *x *= 1000.0);
        let Numbers::F32(values) = sequences.pools[0][1].clone() else { unreachable!("made as f32") };
        for isa in Isa::available() {
            for threads in [1, 3] {
                let how = How { isa, precision: Precision::Exact, threads, block_tokens: 16, seed: 2, edge: Edge::End };
                for row in sequences.run_f32(&sequences.whole(), how).chunks_exact(64) {
                    let found = values.chunks_exact(64).any(|value| bits(value) == bits(row));
                    assert!(found, "{isa:?} {threads} threads: not one of the values");
                }
            }
        }
    }
}

/// A step with an error of its caller's panics before it writes anything.
#[test]
fn sizes_that_do_not_agree_are_refused() {
    let kind = AttentionKind { kv_heads: 1, heads: 2, scale: 1.0, window: None, soft_cap: None };
    let odd = AttentionKind { kv_heads: 3, heads: 4, ..kind.clone() };
    // Two blocks of two tokens of four numbers.
    let (queries, pool, sinks) = ([1f32; 16], [1f32; 16], [0f32; 3]);
    let segments = [Segment { rows: 0..2, start: 1, table: 0 }];
    let (late, far) = ([Segment { table: 1, ..segments[0].clone() }], [Segment { start: 3, ..segments[0].clone() }]);
    let view = |len: usize| PoolView::new(crate::cpu::floats::Floats::F32(&pool[..len]), 4);
    let good = || Attention {
        kind: &kind,
        queries: &queries,
        keys: view(16),
        values: view(16),
        block_tokens: 2,
        tables: &[1, 0],
        segments: &segments,
        sinks: None,
        precision: Precision::Exact,
    };
    let bad = [
        ("heads that cannot share", Attention { kind: &odd, ..good() }),
        ("queries", Attention { queries: &queries[..15], ..good() }),
        ("keys", Attention { keys: view(8), ..good() }),
        ("values", Attention { values: view(15), ..good() }),
        ("an unknown block", Attention { tables: &[0, 2], ..good() }),
        ("a short table", Attention { tables: &[0], ..good() }),
        ("a table that starts late", Attention { segments: &late, ..good() }),
        ("a sequence beyond its table", Attention { segments: &far, ..good() }),
        ("sinks", Attention { sinks: Some(&sinks), ..good() }),
    ];
    for isa in Isa::available() {
        let run = |attention: &Attention<'_>, len: usize| {
            let mut out = vec![7f32; len];
            let floats = crate::cpu::floats::FloatsMut::F32(&mut out);
            let run = std::panic::AssertUnwindSafe(|| attention.run(isa, &workers(1), floats));
            (std::panic::catch_unwind(run).is_ok(), out)
        };
        assert_eq!(run(&good(), 16), (true, vec![1.0; 16]), "{isa:?}");
        assert_eq!(run(&good(), 15), (false, vec![7.0; 15]), "{isa:?}: a short output");
        for (what, attention) in &bad {
            assert_eq!(run(attention, 16), (false, vec![7.0; 16]), "{isa:?}: {what}");
        }
    }
    let mut pool = [0f32; 8];
    let mut refuse = |rows: &[f32], slots: &[u32]| {
        let pool = &mut pool;
        // SAFETY: the pool is this test's alone.
        let append = || unsafe { append(SharedMut::new(&mut FloatsMut::F32(pool)), Rows::packed(rows, 4), slots) };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(append)).is_err()
    };
    assert!(refuse(&[1.0; 4], &[2]) && refuse(&[1.0; 4], &[0, 1]) && refuse(&[1.0; 5], &[0]));
    assert_eq!(pool, [0.0; 8], "a refused row was written");
}
