//! Short causal convolutions along a sequence, each channel by itself, and the gated norm behind a scan.
//!
//! A sequence keeps the inputs of its last `taps - 1` rows. Taps are added in their order, oldest first, so that a row's
//! bits do not depend on whether earlier rows come from the step or from what was kept.

use super::dot::load_tail;
use super::floats::Rows;
use super::math;
use super::scan::{Memory, StateRun, check_runs};
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// Channels that are computed together.
const CHANNELS: usize = 4 * LANES;

/// Rows that are computed together.
const ROWS: usize = 64;

/// Numbers that are worth a task of their own.
const NUMBERS_PER_TASK: usize = 16 * 1024;

/// A convolution of the rows of a step: `out[t] = sum_j weight[j] x[t - taps + 1 + j] + bias` in each channel.
#[derive(Debug, Clone, Copy)]
pub struct Convolution<'a> {
    /// Channels of input and output.
    pub channels: usize,
    /// `[taps, channels]`.
    pub weight: &'a [f32],
    /// `[channels]`.
    pub bias: Option<&'a [f32]>,
    /// `[T, channels]`.
    pub input: Rows<'a>,
    /// `[T, channels]`: multiplies the input.
    pub input_gate: Option<Rows<'a>>,
    /// `[T, channels]`: multiplies the output.
    pub output_gate: Option<Rows<'a>>,
    /// Whether sums `x` become `x / (1 + e^-x)`.
    pub silu: bool,
    /// The rows to compute; those of no run are not written.
    pub runs: &'a [StateRun],
}

impl Convolution<'_> {
    fn taps(&self) -> usize {
        self.weight.len() / self.channels
    }

    /// Advances `states [slots, taps - 1, channels]` and writes `out [T, channels]`. Panics if the sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, states: &mut [f32], out: &mut [f32]) {
        let channels = self.channels;
        if channels == 0 || out.is_empty() {
            return;
        }
        assert!(self.weight.len().is_multiple_of(channels) && self.taps() > 1, "at least two taps of {channels}");
        assert!(out.len().is_multiple_of(channels), "size of the output");
        let (rows, state) = (out.len() / channels, (self.taps() - 1) * channels);
        assert!(states.len().is_multiple_of(state), "size of the states");
        for given in [Some(self.input), self.input_gate, self.output_gate].iter().flatten() {
            assert_eq!(given.width, channels, "width of an input");
            given.check(rows);
        }
        assert!(self.bias.is_none_or(|bias| bias.len() == channels), "size of the bias");
        check_runs(self.runs, rows, states.len() / state);
        let longest = self.runs.iter().map(|run| run.rows.len()).max().unwrap_or(0);
        let per_task = (NUMBERS_PER_TASK / (longest + self.taps())).next_multiple_of(CHANNELS);
        let parts = channels.div_ceil(per_task);
        let (states, out) = (Memory(states.as_mut_ptr()), Memory(out.as_mut_ptr()));
        workers.run(self.runs.len() * parts, &|task| {
            let (run, part) = (&self.runs[task / parts], task % parts);
            let last = ((part + 1) * per_task).min(channels);
            isa.run(Convolve { of: self, run, first: part * per_task, last, states, out });
        });
    }
}

/// The rows of a run, in some channels.
struct Convolve<'a> {
    of: &'a Convolution<'a>,
    run: &'a StateRun,
    first: usize,
    last: usize,
    states: Memory,
    out: Memory,
}

impl Work for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { of, run, first, last, states, out } = self;
        let kept = of.taps() - 1;
        // SAFETY: a slot that exists; see `Memory`.
        let states = unsafe { states.0.add(run.slot as usize * kept * of.channels) };
        let mut window = vec![0f32; (kept + run.rows.len().min(ROWS)) * CHANNELS];
        let mut weight = vec![0f32; (of.taps() + 1) * CHANNELS];
        let mut channel = first;
        while channel < last {
            let count = (last - channel).min(CHANNELS);
            // SAFETY: channels that exist; see `Memory`.
            let (state, out) = unsafe { (states.add(channel), out.0.add(channel)) };
            simd.call(Channels { of, run, channel, count, state, out, window: &mut window, weight: &mut weight });
            channel += count;
        }
    }
}

/// The rows of a run, in up to [`CHANNELS`] channels from `channel` on.
struct Channels<'a> {
    of: &'a Convolution<'a>,
    run: &'a StateRun,
    channel: usize,
    count: usize,
    /// What is kept, and the output: from the channel on.
    state: *mut f32,
    out: *mut f32,
    /// Inputs of some rows behind those that are kept: rows of `CHANNELS`.
    window: &'a mut [f32],
    /// Taps and then the bias, the same way.
    weight: &'a mut [f32],
}

impl Work for Channels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { of, run, channel, count, state, out, window, weight } = self;
        let (taps, kept) = (of.taps(), of.taps() - 1);
        let row = of.channels;
        for tap in 0..taps {
            weight[tap * CHANNELS..][..count].copy_from_slice(&of.weight[tap * row + channel..][..count]);
        }
        match of.bias {
            Some(bias) => weight[taps * CHANNELS..][..count].copy_from_slice(&bias[channel..channel + count]),
            None => weight[taps * CHANNELS..].fill(0.0),
        }
        for at in 0..kept {
            let to = &mut window[at * CHANNELS..][..count];
            if run.begins {
                to.fill(0.0);
            } else {
                // SAFETY: `count` channels of a row that is kept.
                to.copy_from_slice(unsafe { std::slice::from_raw_parts(state.add(at * row), count) });
            }
        }
        let mut first = run.rows.start;
        while first < run.rows.end {
            let rows = (run.rows.end - first).min(ROWS);
            for at in 0..rows {
                let to = &mut window[(kept + at) * CHANNELS..][..count];
                to.copy_from_slice(&of.input.row(first + at)[channel..channel + count]);
                if let Some(gate) = of.input_gate {
                    let gate = &gate.row(first + at)[channel..channel + count];
                    for i in 0..count {
                        to[i] *= gate[i];
                    }
                }
            }
            for at in 0..rows {
                let gate = of.output_gate.as_ref().map(|gate| &gate.row(first + at)[channel..channel + count]);
                // SAFETY: `count` channels of a row of the output.
                let out = unsafe { std::slice::from_raw_parts_mut(out.add((first + at) * row), count) };
                convolve_row(simd, of.silu, &window[at * CHANNELS..], weight, gate, out);
            }
            window.copy_within(rows * CHANNELS..(rows + kept) * CHANNELS, 0);
            first += rows;
        }
        for at in 0..kept {
            let from = &window[at * CHANNELS..][..count];
            // SAFETY: `count` channels of a row that is kept.
            unsafe { std::slice::from_raw_parts_mut(state.add(at * row), count) }.copy_from_slice(from);
        }
    }
}

/// One row of up to [`CHANNELS`] channels from its window and the taps.
#[inline(always)]
fn convolve_row<S: Simd>(simd: S, silu: bool, window: &[f32], weight: &[f32], gate: Option<&[f32]>, out: &mut [f32]) {
    let taps = weight.len() / CHANNELS - 1;
    assert!(window.len() >= taps * CHANNELS, "a window of all taps");
    let mut at = 0;
    while at < out.len() {
        // SAFETY: rows of `CHANNELS` numbers, of which sixteen begin at `at`.
        let mut sum = unsafe { simd.load(weight.as_ptr().add(taps * CHANNELS + at)) };
        for tap in 0..taps {
            // SAFETY: as above.
            unsafe {
                let x = simd.load(window.as_ptr().add(tap * CHANNELS + at));
                sum = simd.fma(simd.load(weight.as_ptr().add(tap * CHANNELS + at)), x, sum);
            }
        }
        if silu {
            sum = math::silu(simd, sum);
        }
        let count = (out.len() - at).min(LANES);
        if let Some(gate) = gate {
            sum = simd.mul(load_some(simd, &gate[at..at + count]), sum);
        }
        store_some(simd, sum, &mut out[at..at + count]);
        at += LANES;
    }
}

/// Up to sixteen numbers, and zeros.
#[inline(always)]
fn load_some<S: Simd>(simd: S, x: &[f32]) -> S::F {
    if x.len() < LANES {
        return load_tail(simd, x);
    }
    // SAFETY: sixteen numbers.
    unsafe { simd.load(x.as_ptr()) }
}

/// The first lanes, as many as there is room for.
#[inline(always)]
fn store_some<S: Simd>(simd: S, x: S::F, out: &mut [f32]) {
    if out.len() >= LANES {
        // SAFETY: sixteen numbers.
        return unsafe { simd.store(out.as_mut_ptr(), x) };
    }
    let mut numbers = [0f32; LANES];
    // SAFETY: an array of sixteen.
    unsafe { simd.store(numbers.as_mut_ptr(), x) };
    out.copy_from_slice(&numbers[..out.len()]);
}

/// RMS norm of groups of columns together with a gate `z`, of which `z / (1 + e^-z)` multiplies.
#[derive(Debug, Clone, Copy)]
pub struct GatedNorm<'a> {
    /// Columns that are normalised together.
    pub group: usize,
    /// `[columns]`, or `[group]` for all of them.
    pub weight: &'a [f32],
    /// Added to means of squares.
    pub eps: f32,
    /// Whether the gate multiplies before the norm (Mamba-2) instead of behind it (GatedDeltaNet).
    pub gate_first: bool,
}

impl GatedNorm<'_> {
    /// Rows of `x [T, columns]` in place, with the gates `[T, columns]`. Panics if the sizes do not agree.
    pub fn run(&self, isa: Isa, workers: &Workers, x: &mut [f32], gates: Rows<'_>) {
        let columns = gates.width;
        if columns == 0 || x.is_empty() {
            return;
        }
        assert!(x.len().is_multiple_of(columns), "rows of {columns}");
        assert!(self.group > 0 && columns.is_multiple_of(self.group), "{columns} columns in groups of {}", self.group);
        assert!([self.group, columns].contains(&self.weight.len()), "size of a weight");
        gates.check(x.len() / columns);
        let per_task = (NUMBERS_PER_TASK / columns).max(1);
        let (rows, x) = (x.len() / columns, Memory(x.as_mut_ptr()));
        workers.run(rows.div_ceil(per_task), &|task| {
            let rows = task * per_task..((task + 1) * per_task).min(rows);
            isa.run(GateRows { of: self, rows, x, gates });
        });
    }
}

struct GateRows<'a> {
    of: &'a GatedNorm<'a>,
    rows: std::ops::Range<usize>,
    x: Memory,
    gates: Rows<'a>,
}

impl Work for GateRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { of, rows, x, gates } = self;
        let (group, columns) = (of.group, gates.width);
        for row in rows.start..rows.end {
            let all = gates.row(row);
            let mut first = 0;
            while first < columns {
                // SAFETY: some columns of a row of this task's.
                let x = unsafe { std::slice::from_raw_parts_mut(x.0.add(row * columns + first), group) };
                let weight = if of.weight.len() == group { of.weight } else { &of.weight[first..first + group] };
                of.columns(simd, x, &all[first..first + group], weight);
                first += group;
            }
        }
    }
}

impl GatedNorm<'_> {
    #[inline(always)]
    fn columns<S: Simd>(&self, simd: S, x: &mut [f32], gate: &[f32], weight: &[f32]) {
        let (mut squares, mut at) = (simd.splat(0.0), 0);
        while at < x.len() {
            let end = (at + LANES).min(x.len());
            let mut number = load_some(simd, &x[at..end]);
            if self.gate_first {
                number = simd.mul(number, math::silu(simd, load_some(simd, &gate[at..end])));
                store_some(simd, number, &mut x[at..end]);
            }
            squares = simd.fma(number, number, squares);
            at = end;
        }
        let scale = simd.splat(1.0 / (simd.sum(squares) / x.len() as f32 + self.eps).sqrt());
        at = 0;
        while at < x.len() {
            let end = (at + LANES).min(x.len());
            let normed = simd.mul(load_some(simd, &x[at..end]), scale);
            let mut number = simd.mul(normed, load_some(simd, &weight[at..end]));
            if !self.gate_first {
                number = simd.mul(number, math::silu(simd, load_some(simd, &gate[at..end])));
            }
            store_some(simd, number, &mut x[at..end]);
            at = end;
        }
    }
}
