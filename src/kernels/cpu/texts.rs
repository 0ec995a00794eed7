//! Attention within texts: every token sees all tokens of its text, or those near it.
//!
//! One text and one head are one task, or some of the queries of a long text: keys and values are laid out as panels
//! (`gemm.rs`), and a few queries at a time get their scores, a softmax, and their sums. So no matrix of scores is kept, and
//! a text's bits do not depend on the others.

use std::cell::RefCell;
use std::ops::Range;

use super::floats::{FloatsMut, Rows, SharedMut};
use super::gemm::{PackLanes, TimesPanels, WIDTH, lanes_at, row_step};
use super::math;
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Queries whose scores are computed together.
const QUERIES: usize = 12;

/// Queries of a task at least: laying out keys and values costs as much as some of them.
const TASK_QUERIES: usize = 512;

/// Numbers that a thread keeps for its next task.
const KEPT: usize = 1 << 20;

/// Queries, keys and values of texts, and what their attention is like.
#[derive(Debug)]
pub struct TextAttention<'a> {
    /// Heads of queries, of keys and of values: `[T, heads * width]` each.
    pub inputs: [Rows<'a>; 3],
    /// Number of heads.
    pub heads: usize,
    /// Multiplies scores; above 0.
    pub scale: f32,
    /// How far a token sees to either side.
    pub window: Option<usize>,
    /// Rows of each text, in order.
    pub texts: &'a [Range<usize>],
}

#[derive(Debug)]
struct Task {
    rows: Range<usize>,
    /// Among the rows.
    queries: Range<usize>,
    head: usize,
}

#[derive(Debug, Default)]
struct Scratch {
    /// `[key panels, head width, WIDTH]`.
    keys: Vec<f32>,
    /// `[panels of dimensions, keys, WIDTH]`.
    values: Vec<f32>,
    /// `[QUERIES, keys rounded up to panels]`: scores, then weights.
    scores: Vec<f32>,
    /// `[QUERIES, head width rounded up to panels]`.
    acc: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl TextAttention<'_> {
    fn head_width(&self) -> usize {
        self.inputs[0].width / self.heads.max(1)
    }

    /// Computes the output `[T, heads * width]`; rows of no text are not written. Panics if sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, mut out: FloatsMut<'_>) {
        let (width, rows) = (self.inputs[0].width, self.texts.iter().map(|text| text.end).max().unwrap_or(0));
        assert!(self.heads > 0 && width.is_multiple_of(self.heads), "{} heads in {width}", self.heads);
        for input in &self.inputs {
            let needed = rows.checked_sub(1).map_or(0, |last| last * input.stride + width);
            assert!(input.width == width && input.stride >= width && input.numbers.len() >= needed, "rows of heads");
        }
        assert!(out.len() >= rows * width, "size of the output");
        let apart = self.texts.windows(2).all(|two| two[0].end <= two[1].start);
        assert!(apart && self.texts.iter().all(|text| text.start <= text.end), "texts that share rows");
        let out = SharedMut::new(&mut out);
        let mut tasks = Vec::new();
        for text in self.texts {
            let per_task = text.len().div_ceil((text.len() / TASK_QUERIES).max(1)).max(1);
            for head in 0..self.heads {
                let queries = (0..text.len()).step_by(per_task).map(|first| first..(first + per_task).min(text.len()));
                tasks.extend(queries.map(|queries| Task { rows: text.clone(), queries, head }));
            }
        }
        workers.run(tasks.len(), &|task| isa.run(AttendText { attention: self, task: &tasks[task], out }));
    }
}

struct AttendText<'a> {
    attention: &'a TextAttention<'a>,
    task: &'a Task,
    out: SharedMut,
}

impl AttendText<'_> {
    /// Keys that some of the queries see.
    #[inline(always)]
    fn seen(&self, first: usize, end: usize) -> (usize, usize) {
        let length = self.task.rows.len();
        match self.attention.window {
            Some(window) => (first.saturating_sub(window), (end + window).min(length)),
            None => (0, length),
        }
    }

    /// Lays out the keys and values that the task needs, from key `first` on.
    #[inline(always)]
    fn lay_out<S: Simd>(&self, simd: S, scratch: &mut Scratch, first: usize, end: usize) {
        let (width, head) = (self.attention.head_width(), self.task.head);
        let (count, [_, keys, values]) = (end - first, &self.attention.inputs);
        let panels = count.div_ceil(WIDTH);
        grow(&mut scratch.keys, panels * width * WIDTH);
        let mut at = 0;
        while at < panels * WIDTH {
            let lanes = count.saturating_sub(at).min(LANES);
            let row = self.task.rows.start + first + at.min(count - 1);
            let panel = &mut scratch.keys[at / WIDTH * width * WIDTH + lanes_at::<S>(at % WIDTH, width)..];
            let rows = &keys.numbers[row * keys.stride + head * width..];
            simd.call(PackLanes { rows, stride: keys.stride, count: lanes, depth: width, panel });
            at += LANES;
        }
        let panels = width.div_ceil(WIDTH);
        grow(&mut scratch.values, panels * count * WIDTH);
        for panel in 0..panels {
            let (from, used) = (panel * WIDTH, WIDTH.min(width - panel * WIDTH));
            let panel = &mut scratch.values[panel * count * WIDTH..(panel + 1) * count * WIDTH];
            let mut lane = 0;
            while lane < WIDTH {
                let at = lanes_at::<S>(lane, count);
                let used = used.saturating_sub(lane).min(LANES);
                for key in 0..count {
                    let row =
                        &values.numbers[(self.task.rows.start + first + key) * values.stride + head * width + from..];
                    let to = &mut panel[at + key * row_step::<S>()..][..LANES];
                    if used == LANES {
                        to.copy_from_slice(&row[lane..lane + LANES]);
                    } else {
                        to[..used].copy_from_slice(&row[lane.min(row.len())..][..used]);
                        to[used..].fill(0.0);
                    }
                }
                lane += LANES;
            }
        }
    }
}

/// Makes room for `len` numbers, whatever they are.
fn grow(numbers: &mut Vec<f32>, len: usize) {
    if numbers.len() < len {
        numbers.resize(len, 0.0);
    }
}

impl Work for AttendText<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { attention, task, out } = self;
        let (width, total) = (attention.head_width(), attention.inputs[0].width);
        let (begin, end) = self.seen(task.queries.start, task.queries.end);
        // Taken, not borrowed in a closure: a closure would be compiled without the instruction set.
        let mut scratch = SCRATCH.take();
        self.lay_out(simd, &mut scratch, begin, end);
        let count = end - begin;
        let rounded = width.next_multiple_of(WIDTH);
        grow(&mut scratch.acc, QUERIES * rounded);
        grow(&mut scratch.scores, QUERIES * count.next_multiple_of(WIDTH));
        let Scratch { keys, values, scores, acc } = &mut scratch;
        let mut first = task.queries.start;
        while first < task.queries.end {
            let rows = QUERIES.min(task.queries.end - first);
            let queries = &attention.inputs[0];
            let a = &queries.numbers[(task.rows.start + first) * queries.stride + task.head * width..];
            let (low, high) = self.seen(first, first + rows);
            // Whole panels of keys.
            let (low, high) = ((low - begin) / WIDTH, (high - begin).div_ceil(WIDTH));
            let stride = (high - low) * WIDTH;
            scores[..rows * stride].fill(0.0);
            simd.call(TimesPanels {
                pairs: false,
                a,
                a_stride: queries.stride,
                rows,
                depth: width,
                panels: &keys[low * width * WIDTH..high * width * WIDTH],
                count: high - low,
                begin: 0,
                acc: &mut scores[..],
                acc_stride: stride,
            });
            let mut sums = [0f32; QUERIES];
            for row in 0..rows {
                let (from, to) = self.seen(first + row, first + row + 1);
                let from = from - begin - low * WIDTH;
                let to = to - begin - low * WIDTH;
                let scores = &mut scores[row * stride..(row + 1) * stride];
                scores[..from].fill(f32::NEG_INFINITY);
                scores[to..].fill(f32::NEG_INFINITY);
                sums[row] = softmax(simd, scores, attention.scale);
            }
            // Behind the last key there are no values to read.
            let depth = stride.min(count - low * WIDTH);
            acc[..rows * rounded].fill(0.0);
            simd.call(TimesPanels {
                pairs: false,
                a: &scores[..],
                a_stride: stride,
                rows,
                depth,
                panels: &values[..count * rounded],
                count: rounded / WIDTH,
                begin: low * WIDTH,
                acc: &mut acc[..],
                acc_stride: rounded,
            });
            for row in 0..rows {
                let line = &mut acc[row * rounded..(row + 1) * rounded];
                scale(simd, line, 1.0 / sums[row]);
                let at = (task.rows.start + first + row) * total + task.head * width;
                // SAFETY: these numbers of this row are this task's.
                unsafe { out.write(at, &line[..width]) };
            }
            first += rows;
        }
        if scratch.keys.capacity() + scratch.values.capacity() <= KEPT {
            SCRATCH.set(scratch);
        }
    }
}

/// Multiplies numbers, of which there are whole vectors.
#[inline(always)]
fn scale<S: Simd>(simd: S, numbers: &mut [f32], factor: f32) {
    let factor = simd.splat(factor);
    let mut at = 0;
    while at < numbers.len() {
        // SAFETY: whole vectors.
        unsafe {
            let product = simd.mul(simd.load(numbers.as_ptr().add(at)), factor);
            simd.store(numbers.as_mut_ptr().add(at), product);
        }
        at += LANES;
    }
}

/// `e^(scale * (score - largest))` in place of the scores, of which there are whole vectors and one at least is finite; returns
/// their sum.
#[inline(always)]
fn softmax<S: Simd>(simd: S, scores: &mut [f32], scale: f32) -> f32 {
    let scale = simd.splat(scale);
    let mut largest = simd.splat(f32::NEG_INFINITY);
    let mut at = 0;
    while at < scores.len() {
        // SAFETY: whole vectors.
        largest = simd.max(unsafe { simd.load(scores.as_ptr().add(at)) }, largest);
        at += LANES;
    }
    let largest = simd.splat(simd.max_lane(largest));
    let mut sum = simd.splat(0.0);
    let mut at = 0;
    while at < scores.len() {
        // SAFETY: whole vectors.
        unsafe {
            let apart = simd.sub(simd.load(scores.as_ptr().add(at)), largest);
            let power = math::exp(simd, simd.mul(apart, scale));
            simd.store(scores.as_mut_ptr().add(at), power);
            sum = simd.add(sum, power);
        }
        at += LANES;
    }
    simd.sum(sum)
}
