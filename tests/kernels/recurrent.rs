//! Scans, convolutions along a sequence and gated norms against f64; bits that must not depend on cuts, company, threads
//! or place.

use proptest::prelude::*;

use crate::cpu::Isa;
use crate::cpu::convolution::{Convolution, GatedNorm};
use crate::cpu::floats::Rows;
use crate::cpu::scan::{Rule, Scan, StateRun};
use crate::guard::{EDGES, Edge, Guarded};
use crate::numbers::{bits, cases};
use crate::reference::{Expected, Random, first_miss};
use crate::threads::workers;

/// What a scan is like.
#[derive(Debug, Clone, Copy)]
struct Shape {
    heads: usize,
    groups: usize,
    key_width: usize,
    value_width: usize,
    taps: usize,
    delta: bool,
}

/// Sequences with their rows, each in a slot of its own.
#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    shape: Shape,
    /// Rows of each, and whether it begins with them.
    sequences: Vec<(usize, bool)>,
    threads: usize,
}

fn plans() -> impl Strategy<Value = Plan> {
    let widths = || prop_oneof![1 => 1usize..40, 1 => prop::sample::select(&[16usize, 32, 48, 64, 80, 128][..])];
    let shape = (1usize..=3, 1usize..=3, widths(), widths(), 2usize..=5, any::<bool>());
    let shape = shape.prop_map(|(groups, share, key_width, value_width, taps, delta)| {
        let heads = groups * share;
        Shape { heads, groups, key_width, value_width, taps, delta }
    });
    let rows = prop_oneof![3 => Just(1usize), 3 => 1usize..12, 1 => 30usize..80];
    let sequences = prop::collection::vec((rows, any::<bool>()), 1..5);
    (any::<u64>(), shape, sequences, 1usize..=3).prop_map(|(seed, shape, sequences, threads)| Plan {
        seed,
        shape,
        sequences,
        threads,
    })
}

/// Slots that no sequence has, in front.
const UNUSED: usize = 2;

/// Rows that belong to no run, between two sequences.
const BETWEEN: usize = 1;

impl Plan {
    fn rows(&self) -> usize {
        self.sequences.iter().map(|(rows, _)| rows + BETWEEN).sum()
    }

    fn slots(&self) -> usize {
        UNUSED + self.sequences.len()
    }

    /// A run of all rows of each sequence; slots in another order than rows.
    fn runs(&self) -> Vec<StateRun> {
        let mut first = 0;
        let run = |(at, &(rows, begins)): (usize, &(usize, bool))| {
            let run = StateRun { rows: first..first + rows, slot: (self.slots() - 1 - at) as u32, begins };
            first += rows + BETWEEN;
            run
        };
        self.sequences.iter().enumerate().map(run).collect()
    }
}

/// The runs of several steps, so that the pieces of a run follow each other.
fn cut(random: &mut Random, runs: &[StateRun]) -> Vec<Vec<StateRun>> {
    let mut left = runs.to_vec();
    let mut steps = Vec::new();
    while !left.is_empty() {
        let mut step = Vec::new();
        for run in &mut left {
            if random.below(3) > 0 {
                let end = run.rows.start + 1 + random.below(run.rows.len());
                step.push(StateRun { rows: run.rows.start..end, ..run.clone() });
                (run.rows.start, run.begins) = (end, false);
            }
        }
        left.retain(|run| !run.rows.is_empty());
        steps.push(step);
    }
    steps
}

/// What a kernel takes besides its state: columns of rows as they come from a projection, and numbers of each head or
/// channel.
trait Kernel {
    /// Numbers of a slot and of an output row.
    fn sizes(&self) -> (usize, usize);
    fn run(&self, isa: Isa, threads: usize, edge: Edge, runs: &[StateRun], states: &mut [f32], out: &mut [f32]);
    /// A run's output and the state behind it.
    fn reference(&self, run: &StateRun, state: &[f32]) -> (Vec<Expected>, Vec<Expected>);
}

/// Columns of `joined`, as rows.
fn columns(joined: &[f32], stride: usize, first: usize, width: usize) -> Rows<'_> {
    Rows { numbers: &joined[first..], width, stride }
}

struct ScanCase {
    shape: Shape,
    /// Values, keys, queries, steps and gates side by side, and a column of not-a-numbers.
    joined: Vec<f32>,
    bias: Vec<f32>,
    rates: Vec<f32>,
    skip: Vec<f32>,
}

const LIMITS: (f32, f32) = (0.05, 1.5);
const EPS: f32 = 1e-6;

impl ScanCase {
    fn new(plan: &Plan) -> Self {
        let (shape, mut random) = (plan.shape, Random(plan.seed));
        let stride = Self::stride(shape);
        let mut joined = random.normals(plan.rows() * stride);
        joined.iter_mut().skip(stride - 1).step_by(stride).for_each(|x| *x = f32::NAN);
        let rates = (0..shape.heads).map(|_| -(0.05 + 2.0 * random.uniform()) as f32).collect();
        let (bias, skip) = (random.normals(shape.heads), random.normals(shape.heads));
        Self { shape, joined, bias, rates, skip }
    }

    fn stride(shape: Shape) -> usize {
        let Shape { heads, groups, key_width, value_width, .. } = shape;
        heads * value_width + 2 * groups * key_width + 2 * heads + 1
    }

    /// Where values, keys, queries, steps and gates begin.
    fn places(&self) -> [usize; 5] {
        let Shape { heads, groups, key_width, value_width, .. } = self.shape;
        let keys = heads * value_width;
        let queries = keys + groups * key_width;
        let steps = queries + groups * key_width;
        [0, keys, queries, steps, steps + heads]
    }
}

impl Kernel for ScanCase {
    fn sizes(&self) -> (usize, usize) {
        let Shape { heads, key_width, value_width, .. } = self.shape;
        (heads * key_width * value_width, heads * value_width)
    }

    fn run(&self, isa: Isa, threads: usize, edge: Edge, runs: &[StateRun], states: &mut [f32], out: &mut [f32]) {
        let Shape { heads, groups, key_width, value_width, delta, .. } = self.shape;
        let stride = Self::stride(self.shape);
        let joined = Guarded::new(&self.joined, edge);
        let [bias, rates, skip] = [&self.bias, &self.rates, &self.skip].map(|x| Guarded::new(x, edge));
        let [values, keys, queries, steps, gates] = self.places();
        let gate = columns(&joined, stride, gates, heads);
        let rule =
            if delta { Rule::Delta { gate, eps: EPS } } else { Rule::StateSpace { limits: LIMITS, skip: &skip } };
        let scan = Scan {
            heads,
            groups,
            key_width,
            value_width,
            queries: columns(&joined, stride, queries, groups * key_width),
            keys: columns(&joined, stride, keys, groups * key_width),
            values: columns(&joined, stride, values, heads * value_width),
            steps: columns(&joined, stride, steps, heads),
            bias: &bias,
            rates: &rates,
            rule,
            runs,
        };
        scan.run(isa, &workers(threads), states, out);
    }

    fn reference(&self, run: &StateRun, state: &[f32]) -> (Vec<Expected>, Vec<Expected>) {
        let Shape { heads, groups, key_width, value_width, delta, .. } = self.shape;
        let (size, stride) = (key_width * value_width, Self::stride(self.shape));
        let mut out = vec![Expected { value: 0.0, bound: 0.0 }; run.rows.len() * heads * value_width];
        let mut states = Vec::new();
        for head in 0..heads {
            let mut s: Vec<f64> = state[head * size..(head + 1) * size].iter().map(|&x| f64::from(x)).collect();
            if run.begins {
                s.fill(0.0);
            }
            // How large the sums of magnitudes are.
            let mut m: Vec<f64> = s.iter().map(|x| x.abs()).collect();
            for (at, row) in run.rows.clone().enumerate() {
                let row = &self.joined[row * stride..(row + 1) * stride];
                let [values, keys, queries, steps, gates] = self.places();
                let of = |first: usize, width: usize| -> Vec<f64> {
                    row[first..first + width].iter().map(|&x| f64::from(x)).collect()
                };
                let group = head / (heads / groups) * key_width;
                let (mut q, mut k) = (of(queries + group, key_width), of(keys + group, key_width));
                let v = of(values + head * value_width, value_width);
                let step = (f64::from(row[steps + head]) + f64::from(self.bias[head])).exp().ln_1p();
                let step = if delta { step } else { step.clamp(LIMITS.0.into(), LIMITS.1.into()) };
                let (decay, gate) = ((f64::from(self.rates[head]) * step).exp(), f64::from(row[gates + head]));
                if delta {
                    let unit = |x: &mut [f64], scale: f64| {
                        let length = (x.iter().map(|x| x * x).sum::<f64>() + f64::from(EPS)).sqrt();
                        x.iter_mut().for_each(|x| *x *= scale / length);
                    };
                    unit(&mut q, (key_width as f64).powf(-0.5));
                    unit(&mut k, 1.0);
                }
                for column in 0..value_width {
                    let known: f64 = (0..key_width).map(|i| k[i] * decay * s[i * value_width + column]).sum();
                    let size: f64 = (0..key_width).map(|i| k[i].abs() * m[i * value_width + column]).sum();
                    let (added, most) = if delta {
                        let gate = 1.0 / (1.0 + (-gate).exp());
                        (gate * (v[column] - known), gate * (v[column].abs() + size))
                    } else {
                        (step * v[column], step * v[column].abs())
                    };
                    let skip = if delta { 0.0 } else { f64::from(self.skip[head]) * v[column] };
                    let (mut value, mut bound) = (skip, skip.abs());
                    for i in 0..key_width {
                        let cell = i * value_width + column;
                        s[cell] = decay * s[cell] + k[i] * added;
                        m[cell] = decay * m[cell] + k[i].abs() * most;
                        value += q[i] * s[cell];
                        bound += q[i].abs() * m[cell];
                    }
                    let bound = 2e-6 * bound + 1e-9;
                    out[(at * heads + head) * value_width + column] = Expected { value, bound };
                }
            }
            states.extend(s.iter().zip(m).map(|(&value, size)| Expected { value, bound: 2e-6 * size + 1e-9 }));
        }
        (out, states)
    }
}

struct ConvolutionCase {
    shape: Shape,
    channels: usize,
    /// Inputs and both gates side by side.
    joined: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    gated: bool,
}

impl ConvolutionCase {
    fn new(plan: &Plan) -> Self {
        let mut random = Random(plan.seed ^ 1);
        // From less than a vector to more than a block, and some with many.
        let most = if random.below(8) == 0 { 3000 } else { 150 };
        let channels = 1 + random.below(most);
        let joined = random.normals(plan.rows() * 3 * channels);
        let weight = random.normals(plan.shape.taps * channels);
        let bias = (random.below(2) == 0).then(|| random.normals(channels));
        Self { shape: plan.shape, channels, joined, weight, bias, gated: random.below(2) == 0 }
    }
}

impl Kernel for ConvolutionCase {
    fn sizes(&self) -> (usize, usize) {
        ((self.shape.taps - 1) * self.channels, self.channels)
    }

    fn run(&self, isa: Isa, threads: usize, edge: Edge, runs: &[StateRun], states: &mut [f32], out: &mut [f32]) {
        let (joined, weight) = (Guarded::new(&self.joined, edge), Guarded::new(&self.weight, edge));
        let bias = self.bias.as_ref().map(|bias| Guarded::new(bias, edge));
        let part = |index: usize| columns(&joined, 3 * self.channels, index * self.channels, self.channels);
        let convolution = Convolution {
            channels: self.channels,
            weight: &weight,
            bias: bias.as_deref(),
            input: part(1),
            input_gate: self.gated.then(|| part(0)),
            output_gate: self.gated.then(|| part(2)),
            silu: !self.gated,
            runs,
        };
        convolution.run(isa, &workers(threads), states, out);
    }

    fn reference(&self, run: &StateRun, state: &[f32]) -> (Vec<Expected>, Vec<Expected>) {
        let (channels, kept) = (self.channels, self.shape.taps - 1);
        let old = |x: &f32| Expected { value: if run.begins { 0.0 } else { f64::from(*x) }, bound: 0.0 };
        let mut inputs: Vec<Expected> = state.iter().map(old).collect();
        let part =
            |row: usize, index: usize, channel: usize| f64::from(self.joined[(3 * row + index) * channels + channel]);
        let mut out = Vec::new();
        for (at, row) in run.rows.clone().enumerate() {
            for channel in 0..channels {
                let gate = if self.gated { part(row, 0, channel) } else { 1.0 };
                let value = part(row, 1, channel) * gate;
                inputs.push(Expected { value, bound: 1e-7 * value.abs() });
            }
            for channel in 0..channels {
                let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[channel]));
                let (mut value, mut size) = (bias, bias.abs());
                for tap in 0..=kept {
                    let weight = f64::from(self.weight[tap * channels + channel]);
                    let term = weight * inputs[(at + tap) * channels + channel].value;
                    (value, size) = (value + term, size + term.abs());
                }
                if self.gated {
                    let gate = part(row, 2, channel);
                    (value, size) = (value * gate, size * gate.abs());
                } else {
                    value /= 1.0 + (-value).exp();
                }
                out.push(Expected { value, bound: 1e-6 * size + 1e-9 });
            }
        }
        (out, inputs.split_off(inputs.len() - kept * channels))
    }
}

/// States with numbers in the slots that continue, and not-a-numbers where nobody may look.
fn initial(plan: &Plan, size: usize) -> Vec<f32> {
    let mut states = vec![f32::NAN; plan.slots() * size];
    let mut random = Random(plan.seed ^ 2);
    for run in plan.runs().iter().filter(|run| !run.begins) {
        states[run.slot as usize * size..][..size].copy_from_slice(&random.normals(size));
    }
    states
}

/// Output and states after some steps.
fn play<K: Kernel>(
    kernel: &K,
    plan: &Plan,
    steps: &[Vec<StateRun>],
    (isa, threads, edge): (Isa, usize, Edge),
) -> (Vec<f32>, Vec<f32>) {
    let (size, width) = kernel.sizes();
    let mut states = Guarded::new(&initial(plan, size), edge);
    let mut out = Guarded::new(&vec![f32::NAN; plan.rows() * width], edge);
    for step in steps {
        kernel.run(isa, threads, edge, step, &mut states, &mut out);
    }
    (out.to_vec(), states.to_vec())
}

fn same(found: &(Vec<f32>, Vec<f32>), expected: &(Vec<f32>, Vec<f32>)) -> bool {
    bits(&found.0) == bits(&expected.0) && bits(&found.1) == bits(&expected.1)
}

/// Whole runs are right, and everything else gives the same bits.
fn check<K: Kernel>(kernel: &K, plan: &Plan) -> Result<(), TestCaseError> {
    let (size, width) = kernel.sizes();
    let (runs, before) = (plan.runs(), initial(plan, size));
    for isa in Isa::available() {
        let whole = play(kernel, plan, std::slice::from_ref(&runs), (isa, 1, Edge::End));
        let mut untouched = (before.clone(), vec![true; plan.rows()]);
        for run in &runs {
            let (rows, slot) = (run.rows.clone(), run.slot as usize * size..(run.slot as usize + 1) * size);
            let (out, state) = kernel.reference(run, &before[slot.clone()]);
            let found = [&whole.0[rows.start * width..rows.end * width], &whole.1[slot.clone()]];
            for (found, expected, what) in [(found[0], out, "output"), (found[1], state, "state")] {
                first_miss(found, &expected, width)
                    .map_err(|miss| TestCaseError::fail(format!("{isa:?}, {what} of {run:?}: {miss}")))?;
            }
            untouched.0[slot.clone()].copy_from_slice(&whole.1[slot]);
            untouched.1[rows].fill(false);
        }
        prop_assert_eq!(bits(&whole.1), bits(&untouched.0), "{:?}: other slots", isa);
        let rows = whole.0.chunks_exact(width).zip(&untouched.1);
        prop_assert!(rows.filter(|(_, none)| **none).all(|(row, _)| row.iter().all(|x| x.is_nan())), "other rows");

        let again = play(kernel, plan, std::slice::from_ref(&runs), (isa, plan.threads, Edge::Begin));
        prop_assert!(same(&again, &whole), "{:?}: threads or place", isa);
        let alone: Vec<_> = runs.iter().rev().map(|run| vec![run.clone()]).collect();
        prop_assert!(same(&play(kernel, plan, &alone, (isa, 3, Edge::End)), &whole), "{:?}: alone", isa);
        let pieces = cut(&mut Random(plan.seed ^ 3), &runs);
        let found = play(kernel, plan, &pieces, (isa, plan.threads, Edge::End));
        prop_assert!(same(&found, &whole), "{:?}: cut into {:?}", isa, pieces);
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn scans_are_right_however_they_are_cut(plan in plans()) {
        check(&ScanCase::new(&plan), &plan)?;
    }

    #[test]
    fn convolutions_are_right_however_they_are_cut(plan in plans()) {
        check(&ConvolutionCase::new(&plan), &plan)?;
    }

    #[test]
    fn gated_norms_are_right(
        seed in any::<u64>(),
        (rows, groups, group) in (0usize..20, 1usize..5, 1usize..150),
        (gate_first, shared) in any::<(bool, bool)>(),
    ) {
        let mut random = Random(seed);
        let columns = groups * group;
        let (x, gates) = (random.normals(rows * columns), random.normals(rows * (columns + 3)));
        let weight = random.normals(if shared { group } else { columns });
        let silu = |x: f32| f64::from(x) / (1.0 + (-f64::from(x)).exp());
        let mut expected = Vec::new();
        for at in (0..rows * columns).step_by(group) {
            let gate = |i: usize| silu(gates[(at + i) / columns * (columns + 3) + (at + i) % columns]);
            let one = |i: usize| f64::from(x[at + i]) * if gate_first { gate(i) } else { 1.0 };
            let mean = (0..group).map(|i| one(i) * one(i)).sum::<f64>() / group as f64;
            for i in 0..group {
                let weight = f64::from(weight[(at + i) % columns % weight.len()]);
                let value = one(i) / (mean + f64::from(EPS)).sqrt() * weight * if gate_first { 1.0 } else { gate(i) };
                expected.push(Expected { value, bound: 2e-6 * value.abs() * (group as f64).sqrt() + 1e-12 });
            }
        }
        for isa in Isa::available() {
            for edge in EDGES {
                let (mut out, weight) = (Guarded::new(&x, edge), Guarded::new(&weight, edge));
                let gates = Guarded::new(&gates[..gates.len().saturating_sub(3)], edge);
                let rows = Rows { numbers: &gates, width: columns, stride: columns + 3 };
                GatedNorm { group, weight: &weight, eps: EPS, gate_first }.run(isa, &workers(2), &mut out, rows);
                first_miss(&out, &expected, columns).map_err(|miss| TestCaseError::fail(format!("{isa:?}: {miss}")))?;
            }
        }
    }
}

/// What the comparisons above must notice: a state that is lost or another sequence's, and rows in another order.
#[test]
fn other_states_give_other_numbers() {
    for delta in [true, false] {
        let shape = Shape { heads: 4, groups: 2, key_width: 24, value_width: 40, taps: 4, delta };
        let plan = Plan { seed: 7, shape, sequences: vec![(9, true), (1, false), (5, false)], threads: 1 };
        let runs = plan.runs();
        let (scan, convolution) = (ScanCase::new(&plan), ConvolutionCase::new(&plan));
        for isa in Isa::available() {
            let place = (isa, 1, Edge::End);
            let changed = |change: &dyn Fn(&mut Vec<StateRun>)| {
                let mut other = runs.clone();
                change(&mut other);
                let steps = [vec![runs.clone()], vec![other]];
                let [right, wrong] = steps.each_ref().map(|steps| play(&scan, &plan, steps, place));
                assert!(!same(&right, &wrong), "{isa:?}: a scan");
                let [right, wrong] = steps.each_ref().map(|steps| play(&convolution, &plan, steps, place));
                assert!(!same(&right, &wrong), "{isa:?}: a convolution");
            };
            changed(&|runs| runs[1].begins = true);
            changed(&|runs| (runs[1].slot, runs[2].slot) = (runs[2].slot, runs[1].slot));
            changed(&|runs| runs[0].rows.end -= 1);
            // A piece that begins anew instead of going on.
            let pieces = |begins: bool| {
                let (first, second) = (StateRun { rows: 0..5, ..runs[0].clone() }, runs[0].clone());
                vec![vec![first], vec![StateRun { rows: 5..9, begins, ..second }]]
            };
            let [right, wrong] = [false, true].map(|begins| play(&scan, &plan, &pieces(begins), place));
            assert!(!same(&right, &wrong), "{isa:?}: a scan that begins anew");
            let [right, wrong] = [false, true].map(|begins| play(&convolution, &plan, &pieces(begins), place));
            assert!(!same(&right, &wrong), "{isa:?}: a convolution that begins anew");
        }
    }
}

#[test]
fn two_runs_with_one_state_are_refused() {
    let shape = Shape { heads: 1, groups: 1, key_width: 2, value_width: 2, taps: 2, delta: true };
    let plan = Plan { seed: 1, shape, sequences: vec![(1, true), (1, true)], threads: 1 };
    let mut runs = plan.runs();
    runs[0].slot = runs[1].slot;
    let (scan, convolution) = (ScanCase::new(&plan), ConvolutionCase::new(&plan));
    let place = (Isa::SCALAR, 1, Edge::End);
    let refused = |play: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(play)).is_err();
    assert!(refused(&|| drop(play(&scan, &plan, std::slice::from_ref(&runs), place))));
    assert!(refused(&|| drop(play(&convolution, &plan, std::slice::from_ref(&runs), place))));
}
