//! Recurrences with a matrix of state for each head: the gated delta rule and Mamba-2's state space.
//!
//! Both keep `S [keys, values]` for each head of each sequence and, token by token, let it decay, add an outer product and
//! read it with a query: `S = g S + k d^T`, `y = S^T q`. They differ in `d` ([`Rule`]). Everything is f32 and in a fixed
//! order: keys one after another, values in lanes. So a row's bits depend on its sequence's rows up to it alone, not on
//! how they were cut into steps, on company, or on threads.
//!
//! A task takes some columns of a head at a time, few enough to stay in the first cache with all their keys, through up to
//! [`BLOCK`] rows. Memory sees the state read once and written once for that, also where there is a single row.

use std::ops::Range;

use super::dot::load_tail;
use super::floats::Rows;
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Rows that pass a tile of the state before the next tile's turn.
const BLOCK: usize = 32;

/// Vectors of columns in a tile.
const WIDE: usize = 2;

/// Columns of a tile.
const TILE: usize = WIDE * LANES;

/// Rows of the state between a row that is read and the one that is asked for.
const AHEAD: usize = 12;

/// Consecutive tokens of one sequence, and where its state lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRun {
    /// Their rows among the step's.
    pub rows: Range<usize>,
    /// The sequence's slot; no other run of the step has it.
    pub slot: u32,
    /// The sequence begins here: from zeros, whatever the slot holds.
    pub begins: bool,
}

/// Panics unless the runs' rows are below `rows`, their slots below `slots`, and no two have the same slot.
pub(super) fn check_runs(runs: &[StateRun], rows: usize, slots: usize) {
    let mut taken: Vec<u32> = runs.iter().map(|run| run.slot).collect();
    taken.sort_unstable();
    assert!(taken.windows(2).all(|pair| pair[0] != pair[1]), "two runs with one state");
    assert!(taken.last().is_none_or(|&last| (last as usize) < slots), "a slot that does not exist");
    assert!(runs.iter().all(|run| run.rows.start < run.rows.end && run.rows.end <= rows), "rows that do not exist");
}

/// What is added to the state, and how much of it stays. `t` is a head's step size of a row before its bias, `A` the
/// head's rate, and `softplus(x) = ln(1 + e^x)`.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a> {
    /// The gated delta rule (Yang, Kautz and Hatamizadeh 2024): `g = e^(A softplus(t + bias))`, `d = b (v - g S^T k)`. Queries
    /// and keys are brought to length one, and queries divided by the root of their width.
    Delta {
        /// `[T, heads]`, before its sigmoid: `b`, how much of what the state says of `k` is replaced.
        gate: Rows<'a>,
        /// Added to sums of squares.
        eps: f32,
    },
    /// Mamba-2 (Dao and Gu 2024): `g = e^(A s)`, `d = s v` with `s = softplus(t + bias)` within limits.
    StateSpace {
        /// Least and largest `s`.
        limits: (f32, f32),
        /// `[heads]`: times `v`, added to the output.
        skip: &'a [f32],
    },
}

/// A scan over the rows of a step.
#[derive(Debug, Clone, Copy)]
pub struct Scan<'a> {
    /// Heads of values, each with a state.
    pub heads: usize,
    /// Heads of queries and keys; divides `heads`, and neighbours share.
    pub groups: usize,
    /// Width of a query and a key.
    pub key_width: usize,
    /// Width of a value.
    pub value_width: usize,
    /// `[T, groups * key_width]`; `C` of a state space.
    pub queries: Rows<'a>,
    /// `[T, groups * key_width]`; `B` of a state space.
    pub keys: Rows<'a>,
    /// `[T, heads * value_width]`.
    pub values: Rows<'a>,
    /// `[T, heads]`: step sizes before bias and softplus.
    pub steps: Rows<'a>,
    /// `[heads]`: added to step sizes.
    pub bias: &'a [f32],
    /// `[heads]`: below zero, by which states decay.
    pub rates: &'a [f32],
    /// What is added to the state.
    pub rule: Rule<'a>,
    /// The rows to compute; those of no run are not written.
    pub runs: &'a [StateRun],
}

impl Scan<'_> {
    /// Advances `states [slots, heads, key_width, value_width]` and writes `out [T, heads * value_width]`. Panics if the sizes
    /// do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, states: &mut [f32], out: &mut [f32]) {
        let Self { heads, groups, key_width, value_width, .. } = *self;
        let (row, state) = (heads * value_width, heads * key_width * value_width);
        if row == 0 || out.is_empty() {
            return;
        }
        assert!(groups > 0 && heads.is_multiple_of(groups) && key_width > 0, "{heads} heads in {groups} groups");
        assert!(out.len().is_multiple_of(row) && states.len().is_multiple_of(state), "size of output or states");
        let rows = out.len() / row;
        let widths = [groups * key_width, groups * key_width, row, heads];
        for (given, width) in [self.queries, self.keys, self.values, self.steps].iter().zip(widths) {
            assert_eq!(given.width, width, "width of an input");
            given.check(rows);
        }
        match self.rule {
            Rule::Delta { gate, .. } => {
                assert_eq!(gate.width, heads, "width of the gates");
                gate.check(rows);
            }
            Rule::StateSpace { skip, .. } => assert_eq!(skip.len(), heads, "number of skips"),
        }
        assert!(self.bias.len() == heads && self.rates.len() == heads, "a bias and a rate for each head");
        check_runs(self.runs, rows, states.len() / state);

        let (tiles, each) = (value_width.div_ceil(TILE), self.runs.len() * heads);
        // Few heads are cut for many threads.
        let parts = if each >= 2 * workers.count() { 1 } else { tiles };
        let (states, out) = (Memory(states.as_mut_ptr()), Memory(out.as_mut_ptr()));
        workers.run(each * parts, &|task| {
            let (head, part) = (task / parts, task % parts);
            let (run, head) = (&self.runs[head / heads], head % heads);
            let tiles = if parts == 1 { 0..tiles } else { part..part + 1 };
            isa.run(ScanHead { scan: self, run, head, tiles, states, out });
        });
    }

    /// How much stays of a head's state at a row, and how much is added to it.
    fn gates(&self, row: usize, head: usize) -> (f32, f32) {
        let step = softplus(self.steps.row(row)[head] + self.bias[head]);
        match self.rule {
            Rule::Delta { gate, .. } => {
                let gate = 1.0 / (1.0 + (-gate.row(row)[head]).exp());
                ((self.rates[head] * step).exp(), gate)
            }
            Rule::StateSpace { limits: (least, largest), .. } => {
                let step = step.max(least).min(largest);
                ((self.rates[head] * step).exp(), step)
            }
        }
    }
}

fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Memory that several threads use, each another part of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory(pub(super) *mut f32);

// SAFETY: each task has its own columns of a slot and of rows: no two runs have the same slot, and rows belong to one run.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// A line of the cache; its numbers are used by address.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code)]
struct Line([f32; LANES]);

/// Zeros that begin with a line.
fn lines(numbers: usize) -> Vec<Line> {
    vec![Line([0.0; LANES]); numbers.div_ceil(LANES)]
}

/// The rows of a run in some tiles of a head.
struct ScanHead<'a> {
    scan: &'a Scan<'a>,
    run: &'a StateRun,
    head: usize,
    tiles: Range<usize>,
    states: Memory,
    out: Memory,
}

/// Rows that pass a tile together.
struct Block<'a> {
    scan: &'a Scan<'a>,
    head: usize,
    /// Rows of the step.
    rows: Range<usize>,
    /// `[rows, key_width]`.
    queries: *const f32,
    keys: *const f32,
    /// How much stays and how much is added, for each row.
    gates: &'a [(f32, f32)],
    /// Whether the state is zero before.
    begins: bool,
    /// `[key_width, TILE]`.
    tile: *mut f32,
}

impl Work for ScanHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { scan, run, head, tiles, states, out } = self;
        let (keys, values) = (scan.key_width, scan.value_width);
        let most = run.rows.len().min(BLOCK);
        let mut rows = lines(2 * most * keys);
        let rows: *mut f32 = rows.as_mut_ptr().cast();
        let mut tile = lines(keys * TILE);
        let mut gates = [(0f32, 0f32); BLOCK];
        // SAFETY: a slot and a head that exist; see `Memory`.
        let state = unsafe { states.0.add((run.slot as usize * scan.heads + head) * keys * values) };
        let mut first = run.rows.start;
        while first < run.rows.end {
            let count = (run.rows.end - first).min(BLOCK);
            // SAFETY: room for the queries and then the keys of `most` rows.
            let (q, k) = unsafe { (rows, rows.add(most * keys)) };
            for at in 0..count {
                gates[at] = scan.gates(first + at, head);
                // SAFETY: as above.
                unsafe { prepare(simd, scan, first + at, head, q.add(at * keys), k.add(at * keys)) };
            }
            let block = Block {
                scan,
                head,
                rows: first..first + count,
                queries: q,
                keys: k,
                gates: &gates[..count],
                begins: run.begins && first == run.rows.start,
                tile: tile.as_mut_ptr().cast(),
            };
            for tile in tiles.start..tiles.end {
                let column = tile * TILE;
                let (block, columns) = (&block, (values - column).min(TILE));
                // SAFETY: columns that exist; see `Memory`.
                let (state, out) = unsafe { (state.add(column), out.0.add(head * values + column)) };
                if columns > LANES {
                    simd.call(Advance::<'_, WIDE> { block, column, columns, state, out });
                } else {
                    simd.call(Advance::<'_, 1> { block, column, columns, state, out });
                }
            }
            first += count;
        }
    }
}

/// Copies a row's query and key, with the delta rule as long as they have to be.
///
/// # Safety
/// `key_width` writable numbers at both.
#[inline(always)]
unsafe fn prepare<S: Simd>(simd: S, scan: &Scan<'_>, row: usize, head: usize, query: *mut f32, key: *mut f32) {
    let width = scan.key_width;
    let first = head / (scan.heads / scan.groups) * width;
    for (from, to, scale) in [(&scan.queries, query, (width as f32).powf(-0.5)), (&scan.keys, key, 1.0)] {
        let from = &from.row(row)[first..first + width];
        let scale = match scan.rule {
            Rule::Delta { eps, .. } => scale / (squares(simd, from) + eps).sqrt(),
            Rule::StateSpace { .. } => 1.0,
        };
        for i in 0..width {
            // SAFETY: the caller's promise.
            unsafe { to.add(i).write(from[i] * scale) };
        }
    }
}

/// The sum of squares.
#[inline(always)]
fn squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (mut sum, mut at) = (simd.splat(0.0), 0);
    while at + LANES <= x.len() {
        // SAFETY: sixteen numbers from `at` on.
        let x = unsafe { simd.load(x.as_ptr().add(at)) };
        sum = simd.fma(x, x, sum);
        at += LANES;
    }
    let tail = load_tail(simd, &x[at..]);
    simd.sum(simd.fma(tail, tail, sum))
}

/// A block's rows in some columns of a head's state, `W` vectors of which the last may have lanes to spare.
struct Advance<'a, const W: usize> {
    block: &'a Block<'a>,
    /// The first one among the head's.
    column: usize,
    columns: usize,
    /// The first one of the state's first row.
    state: *mut f32,
    /// The first one of the head in the output's first row.
    out: *mut f32,
}

/// Rows of `W` vectors, `stride` numbers apart.
#[derive(Clone, Copy)]
struct Place {
    data: *mut f32,
    stride: usize,
}

impl<const W: usize> Work for Advance<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { block, column, columns, state, out } = self;
        let Block { scan, head, .. } = *block;
        let (width, values) = (scan.key_width, scan.value_width);
        let tile = Place { data: block.tile, stride: W * LANES };
        let whole = columns == W * LANES;
        let outside = Place { data: state, stride: values };
        // SAFETY: the tile has room for `width` rows, the state for `width` rows of `columns`.
        unsafe {
            if block.begins {
                clear::<S, W>(simd, tile, width);
            } else if !whole {
                copy_columns(outside, tile, width, columns);
            }
        }
        let direct = whole && !block.begins;
        for at in 0..block.gates.len() {
            let (decay, strength) = block.gates[at];
            let row = block.rows.start + at;
            let value = &scan.values.row(row)[head * values + column..][..columns];
            let value = load_columns::<S, W>(simd, value);
            let mut from = if direct && at == 0 { outside } else { tile };
            let to = if whole && at + 1 == block.gates.len() { outside } else { tile };
            let (stays, strength) = (simd.splat(decay), simd.splat(strength));
            let mut added = [simd.splat(0.0); W];
            // SAFETY: `width` keys and queries; states as above, in whole vectors outside of the tile.
            let mut read = unsafe {
                let (query, key) = (block.queries.add(at * width), block.keys.add(at * width));
                match scan.rule {
                    Rule::Delta { .. } => {
                        let known = if direct && at == 0 {
                            recall::<S, W, true>(simd, key, width, from, tile)
                        } else {
                            recall::<S, W, false>(simd, key, width, from, tile)
                        };
                        from = tile;
                        for w in 0..W {
                            added[w] = simd.mul(strength, simd.sub(value[w], simd.mul(stays, known[w])));
                        }
                    }
                    Rule::StateSpace { .. } => {
                        for w in 0..W {
                            added[w] = simd.mul(strength, value[w]);
                        }
                    }
                }
                update::<S, W>(simd, (query, key), width, (stays, added), from, to)
            };
            if let Rule::StateSpace { skip, .. } = scan.rule {
                for w in 0..W {
                    read[w] = simd.fma(simd.splat(skip[head]), value[w], read[w]);
                }
            }
            // SAFETY: `columns` numbers of this row, which are this task's.
            unsafe { store_columns(simd, out.add(row * scan.heads * values), read, columns) };
        }
        if !whole {
            // SAFETY: as above.
            unsafe { copy_columns(tile, outside, width, columns) };
        }
    }
}

/// `S^T k`; with `KEEP` the state is copied to `tile` on the way.
///
/// # Safety
/// `width` keys, and as many rows of whole vectors at both places.
#[inline(always)]
unsafe fn recall<S: Simd, const W: usize, const KEEP: bool>(
    simd: S,
    key: *const f32,
    width: usize,
    from: Place,
    tile: Place,
) -> [S::F; W] {
    // Two sums, so that additions need not wait for each other.
    let mut sums = [[simd.splat(0.0); W]; 2];
    let mut i = 0;
    while i < width {
        let pair = (width - i).min(2);
        for j in 0..2 {
            if j < pair {
                // SAFETY: row `i + j` exists; an address that is prefetched may be any.
                unsafe {
                    let k = simd.splat(*key.add(i + j));
                    let row = from.data.add((i + j) * from.stride);
                    for w in 0..W {
                        if KEEP {
                            simd.prefetch(row.wrapping_add(AHEAD * from.stride + w * LANES).cast());
                        }
                        let state = simd.load(row.add(w * LANES));
                        if KEEP {
                            simd.store(tile.data.add((i + j) * tile.stride + w * LANES), state);
                        }
                        sums[j][w] = simd.fma(k, state, sums[j][w]);
                    }
                }
            }
        }
        i += 2;
    }
    let mut sum = sums[0];
    for w in 0..W {
        sum[w] = simd.add(sum[w], sums[1][w]);
    }
    sum
}

/// `S = g S + k d^T` from one place to another, which may be the same; returns `S^T q`.
///
/// # Safety
/// As for `recall`.
#[inline(always)]
unsafe fn update<S: Simd, const W: usize>(
    simd: S,
    (query, key): (*const f32, *const f32),
    width: usize,
    (stays, added): (S::F, [S::F; W]),
    from: Place,
    to: Place,
) -> [S::F; W] {
    let mut read = [simd.splat(0.0); W];
    let mut i = 0;
    while i < width {
        // SAFETY: row `i` exists.
        unsafe {
            let (q, k) = (simd.splat(*query.add(i)), simd.splat(*key.add(i)));
            for w in 0..W {
                let state = simd.load(from.data.add(i * from.stride + w * LANES));
                let state = simd.fma(k, added[w], simd.mul(stays, state));
                simd.store(to.data.add(i * to.stride + w * LANES), state);
                read[w] = simd.fma(q, state, read[w]);
            }
        }
        i += 1;
    }
    read
}

/// # Safety
/// `width` rows of whole vectors.
#[inline(always)]
unsafe fn clear<S: Simd, const W: usize>(simd: S, tile: Place, width: usize) {
    for i in 0..width {
        for w in 0..W {
            // SAFETY: the caller's promise.
            unsafe { simd.store(tile.data.add(i * tile.stride + w * LANES), simd.splat(0.0)) };
        }
    }
}

/// # Safety
/// `width` rows of `columns` numbers at both places, which are different ones.
#[inline(always)]
unsafe fn copy_columns(from: Place, to: Place, width: usize, columns: usize) {
    for i in 0..width {
        // SAFETY: the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(from.data.add(i * from.stride), to.data.add(i * to.stride), columns);
        }
    }
}

/// Numbers in whole vectors, with zeros behind the last.
#[inline(always)]
fn load_columns<S: Simd, const W: usize>(simd: S, x: &[f32]) -> [S::F; W] {
    let mut vectors = [simd.splat(0.0); W];
    for w in 0..W {
        let rest = &x[(w * LANES).min(x.len())..];
        vectors[w] = if rest.len() >= LANES {
            // SAFETY: sixteen numbers.
            unsafe { simd.load(rest.as_ptr()) }
        } else {
            load_tail(simd, rest)
        };
    }
    vectors
}

/// Writes the first `columns` lanes.
///
/// # Safety
/// As many writable numbers.
#[inline(always)]
unsafe fn store_columns<S: Simd, const W: usize>(simd: S, to: *mut f32, x: [S::F; W], columns: usize) {
    for w in 0..W {
        let count = columns.saturating_sub(w * LANES).min(LANES);
        let mut numbers = [0f32; LANES];
        // SAFETY: an array of sixteen; the caller's promise.
        unsafe {
            if count == LANES {
                simd.store(to.add(w * LANES), x[w]);
            } else {
                simd.store(numbers.as_mut_ptr(), x[w]);
                std::ptr::copy_nonoverlapping(numbers.as_ptr(), to.wrapping_add(w * LANES), count);
            }
        }
    }
}
