//! The experts of a mixture: every row of activations through the few matrices that it has chosen.
//!
//! Rows are sorted by expert, so that each matrix is read once however many rows have chosen it, and not at all if none has.
//! A token's results are added in the order of its experts' numbers; in exact precision its bits depend on no other token.

use std::ops::Range;

use super::floats::{FloatsMut, SharedMut};
use super::matmul::{Finish, MatMul, Precision, Projection};
use super::routing::Chosen;
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Rows that are computed at once, if no expert has more: what bounds the memory of a long prompt.
const ROWS_AT_ONCE: usize = 1024;

/// Columns of a task that copies or adds rows.
const COLUMNS: usize = 256;

/// Numbers that are worth more than one thread.
const MANY: usize = 32 * 1024;

/// Experts as stacks of matrices.
#[derive(Debug, Clone, Copy)]
pub struct Experts<'a> {
    /// How many there are.
    pub count: usize,
    /// From the input to the inner width: gate and up, or one.
    pub inputs: &'a [Projection<'a>],
    /// What becomes of their products: neither concatenated nor added.
    pub finish: Finish<'a>,
    /// From the inner width to that of the output.
    pub output: Projection<'a>,
    /// Whether a token's weights multiply what experts take instead of what they give.
    pub weighs_input: bool,
    /// How products with packed weights are computed.
    pub precision: Precision,
}

/// A token and one of its experts: the place in [`Chosen`].
type Entry = u32;

/// Buffers of the rows that are computed at once.
struct Buffers {
    experts: Vec<u32>,
    x: Vec<f32>,
    inner: Vec<f32>,
    y: Vec<f32>,
}

impl Experts<'_> {
    /// Adds to `out [T, output rows]`, for each of its experts, what the expert gives of the token's row of
    /// `x [T, columns]`, weighted. Panics if the sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, x: &[f32], chosen: &Chosen, out: &mut [f32]) {
        let (columns, width) = (self.inputs[0].matrix.columns, self.output.matrix.rows);
        let per_token = chosen.per_token.max(1);
        let tokens = chosen.experts.len() / per_token;
        assert_eq!(chosen.experts.len(), chosen.weights.len(), "a weight for each expert");
        assert_eq!((x.len(), out.len()), (tokens * columns, tokens * width), "rows of {tokens} tokens");
        assert!(chosen.experts.iter().all(|&expert| (expert as usize) < self.count), "an expert that does not exist");
        let order = sorted(&chosen.experts, self.count);
        let blocks = blocks(&order, &chosen.experts);
        let most = blocks.iter().map(Range::len).max().unwrap_or(0);
        let inner = self.output.matrix.columns;
        let mut buffers = Buffers {
            experts: Vec::with_capacity(most),
            x: vec![0.0; most * columns],
            inner: vec![0.0; most * inner],
            y: vec![0.0; most * width],
        };
        for block in blocks {
            self.run_block(isa, workers, x, chosen, &order[block], &mut buffers, out);
        }
    }

    /// The same for some of the entries, which are sorted by expert.
    #[allow(clippy::too_many_arguments)]
    fn run_block(
        &self,
        isa: Isa,
        workers: &Workers,
        x: &[f32],
        chosen: &Chosen,
        entries: &[Entry],
        buffers: &mut Buffers,
        out: &mut [f32],
    ) {
        let (columns, width) = (self.inputs[0].matrix.columns, self.output.matrix.rows);
        let (stacked, precision, rows) = (self.count, self.precision, entries.len());
        let Buffers { experts, x: gathered, inner, y } = buffers;
        experts.clear();
        experts.extend(entries.iter().map(|&entry| chosen.experts[entry as usize]));
        let (gathered, inner) = (&mut gathered[..rows * columns], &mut inner[..rows * self.output.matrix.columns]);
        let y = &mut y[..rows * width];
        let moves = Moves { entries, chosen, weighs: self.weighs_input, width: columns };
        moves.run(isa, workers, Direction::Gather { from: x }, SharedMut::new(&mut FloatsMut::F32(gathered)));
        let experts = Some(&experts[..]);
        let product =
            MatMul { x: gathered, projections: self.inputs, experts, stacked, finish: self.finish, precision };
        product.run(isa, workers, FloatsMut::F32(inner));
        let projections = &[self.output];
        let product = MatMul { x: inner, projections, experts, stacked, finish: Finish::Concat, precision };
        product.run(isa, workers, FloatsMut::F32(y));
        let moves = Moves { entries, chosen, weighs: !self.weighs_input, width };
        moves.run(isa, workers, Direction::Add { from: y }, SharedMut::new(&mut FloatsMut::F32(out)));
    }
}

/// All entries in the order of their experts; those of one expert in the order of tokens.
fn sorted(experts: &[u32], count: usize) -> Vec<Entry> {
    let mut next = vec![0usize; count + 1];
    for &expert in experts {
        next[expert as usize + 1] += 1;
    }
    for expert in 0..count {
        next[expert + 1] += next[expert];
    }
    let mut order = vec![0; experts.len()];
    for (entry, &expert) in experts.iter().enumerate() {
        order[next[expert as usize]] = entry as Entry;
        next[expert as usize] += 1;
    }
    order
}

/// Neighbours in `order` that are computed at once: whole experts, as many as [`ROWS_AT_ONCE`] allow.
fn blocks(order: &[Entry], experts: &[u32]) -> Vec<Range<usize>> {
    let mut blocks: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    for run in order.chunk_by(|&a, &b| experts[a as usize] == experts[b as usize]) {
        let rows = start..start + run.len();
        start = rows.end;
        match blocks.last_mut() {
            Some(block) if rows.end - block.start <= ROWS_AT_ONCE => block.end = rows.end,
            _ => blocks.push(rows),
        }
    }
    blocks
}

/// Rows of tokens to rows of entries, or back.
#[derive(Clone, Copy)]
struct Moves<'a> {
    entries: &'a [Entry],
    chosen: &'a Chosen,
    /// Whether they are multiplied with the entries' weights on the way.
    weighs: bool,
    width: usize,
}

#[derive(Clone, Copy)]
enum Direction<'a> {
    /// The rows `from [T, width]` of the entries' tokens.
    Gather { from: &'a [f32] },
    /// Adds the rows `from [entries, width]` to those of their tokens.
    Add { from: &'a [f32] },
}

impl Moves<'_> {
    /// Columns are divided among threads: each adds in the order of the entries.
    fn run(self, isa: Isa, workers: &Workers, direction: Direction<'_>, to: SharedMut) {
        let many = self.entries.len() * self.width >= MANY;
        let columns = if many { COLUMNS } else { self.width.max(1) };
        workers.run(self.width.div_ceil(columns), &|task| {
            let columns = task * columns..((task + 1) * columns).min(self.width);
            isa.run(MoveColumns { moves: self, direction, columns, to });
        });
    }
}

struct MoveColumns<'a> {
    moves: Moves<'a>,
    direction: Direction<'a>,
    columns: Range<usize>,
    to: SharedMut,
}

impl Work for MoveColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { moves: Moves { entries, chosen, weighs, width }, direction, columns, to } = self;
        let len = columns.len();
        for row in 0..entries.len() {
            let entry = entries[row] as usize;
            let token = entry / chosen.per_token;
            let weight = if weighs { chosen.weights[entry] } else { 1.0 };
            let (from, source, target) = match direction {
                Direction::Gather { from } => (from, token, row),
                Direction::Add { from } => (from, row, token),
            };
            let from = &from[source * width + columns.start..][..len];
            let target = target * width + columns.start;
            // SAFETY: these columns are this task's.
            let to = unsafe { to.floats_mut(target, len) };
            match direction {
                Direction::Gather { .. } if !weighs => to.copy_from_slice(from),
                Direction::Gather { .. } => scale(simd, from, weight, to),
                Direction::Add { .. } => add_scaled(simd, from, weight, to),
            }
        }
    }
}

#[inline(always)]
fn scale<S: Simd>(simd: S, from: &[f32], weight: f32, to: &mut [f32]) {
    let whole = from.len() / LANES * LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: sixteen numbers from `at` on are inside both, which are of the same length.
        unsafe {
            let x = simd.load(from.as_ptr().add(at));
            simd.store(to.as_mut_ptr().add(at), simd.mul(x, simd.splat(weight)));
        }
        at += LANES;
    }
    for at in whole..from.len() {
        to[at] = from[at] * weight;
    }
}

/// Product and sum are rounded by themselves, wherever a column is in its task.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, from: &[f32], weight: f32, to: &mut [f32]) {
    let whole = from.len() / LANES * LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: sixteen numbers from `at` on are inside both, which are of the same length.
        unsafe {
            let x = simd.mul(simd.load(from.as_ptr().add(at)), simd.splat(weight));
            simd.store(to.as_mut_ptr().add(at), simd.add(simd.load(to.as_ptr().add(at)), x));
        }
        at += LANES;
    }
    for at in whole..from.len() {
        to[at] += from[at] * weight;
    }
}
