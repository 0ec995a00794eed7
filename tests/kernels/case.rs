//! Products of any shape: how they are drawn, computed by kernels and computed in f64.

use proptest::prelude::*;

use crate::cpu::Isa;
use crate::cpu::matmul::{Finish, MatMul, Precision, Projection};
use crate::guard::{Edge, Guarded};
use crate::numbers::{Numbers, Placed, TYPES, Type};
use crate::reference::{Expected, Format, PlacedWeights, Random, Weights, quantised};
use crate::threads::workers;

/// A product below the smallest f32 is lost.
const LOST: f64 = 1.5e-45;

/// What becomes of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Concat,
    Add,
    SwiGlu,
    GeGlu,
    ClampedSwiGlu,
    Gelu,
    SquaredRelu,
}

impl Ending {
    /// Whether one projection gates another.
    fn is_gated(self) -> bool {
        matches!(self, Ending::SwiGlu | Ending::GeGlu | Ending::ClampedSwiGlu)
    }
}

/// Of the gate that is clamped: its steepness, and a limit that most numbers do not reach.
const ALPHA: f32 = 1.702;
const LIMIT: f32 = 1.5;

/// How rows find their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// One matrix.
    None,
    /// In the order of experts, so that all rows of one are neighbours.
    Sorted,
    /// At random; experts come again after others, and some have no row.
    Unsorted,
}

/// A projection to make: its format, its rows, and the type of its bias.
pub type Part = (Format, usize, Option<Type>);

/// A product to make.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub m: usize,
    pub columns: usize,
    pub parts: Vec<Part>,
    pub ending: Ending,
    pub stacked: usize,
    pub routing: Routing,
    pub threads: usize,
}

/// Every format.
pub fn formats() -> impl Strategy<Value = Format> {
    let types = || prop::sample::select(&TYPES[..]);
    let bits = prop::sample::select(&[2usize, 3, 4, 5, 6, 8][..]);
    let groups = prop::sample::select(&[32usize, 64, 128][..]);
    prop_oneof![
        2 => types().prop_map(Format::Dense),
        6 => (bits, groups, types()).prop_map(|(bits, group, scales)| Format::Affine { bits, group, scales }),
        1 => Just(Format::Mxfp4),
        1 => Just(Format::Nvfp4),
    ]
}

/// Products of some of the formats, from none to 100 rows of activations and up to 150 outputs each, with up to three
/// projections, biases and experts.
pub fn plans(formats: impl Strategy<Value = Format>) -> impl Strategy<Value = Plan> {
    let rows = prop_oneof![6 => 1usize..70, 1 => 70usize..150, 1 => Just(16usize), 1 => Just(64usize)];
    let bias = prop::option::weighted(0.3, prop::sample::select(&TYPES[..]));
    let parts = prop::collection::vec((formats, rows, bias), 1..=3);
    let m = prop_oneof![4 => 1usize..6, 4 => 6usize..=40, 1 => 41usize..=100, 1 => Just(0usize)];
    let dense_columns = prop_oneof![3 => 1usize..100, 1 => (1usize..20).prop_map(|n| n * 16), 1 => 100usize..700];
    // From a few groups to more than a block of sixteen scales and a chunk of 512 columns.
    let groups = prop_oneof![4 => 1usize..6, 1 => 14usize..=20, 1 => 31usize..=34];
    let ending = prop_oneof![
        3 => Just(Ending::Concat), 1 => Just(Ending::Add), 1 => Just(Ending::Gelu), 1 => Just(Ending::SquaredRelu),
        1 => prop::sample::select(&[Ending::SwiGlu, Ending::GeGlu, Ending::ClampedSwiGlu][..]),
        1 => Just(Ending::SwiGlu),
    ];
    let routing = prop_oneof![4 => Just(Routing::None), 1 => Just(Routing::Sorted), 2 => Just(Routing::Unsorted)];
    let sizes = (m, dense_columns, groups);
    (any::<u64>(), sizes, parts, ending, (routing, 1usize..=5), 1usize..=3).prop_map(
        |(seed, (m, dense, groups), mut parts, ending, (routing, stacked), threads)| {
            match ending {
                Ending::Concat => {}
                Ending::Add | Ending::Gelu | Ending::SquaredRelu => parts.truncate(1),
                Ending::SwiGlu | Ending::GeGlu | Ending::ClampedSwiGlu => {
                    // Formats may differ, shapes may not.
                    let (first, second) = (parts[0], parts[parts.len() - 1]);
                    parts = vec![first, (second.0, first.1, second.2)];
                }
            }
            let group = parts.iter().map(|(format, ..)| format.group()).max().unwrap_or(1);
            let columns = if group == 1 { dense } else { groups * group };
            let stacked = if routing == Routing::None { 1 } else { stacked };
            // Keeps a case below a few milliseconds, with a whole pair of panels at least.
            let most = (150_000 / columns / stacked / parts.len()).max(33);
            parts.iter_mut().for_each(|(_, rows, _)| *rows = (*rows).min(most));
            let outputs: usize = parts.iter().map(|(_, rows, _)| rows).sum();
            let m = m.min((400_000 / (outputs * columns)).max(1));
            Plan { seed, m, columns, parts, ending, stacked, routing, threads }
        },
    )
}

/// The weights of a product.
pub struct Model {
    projections: Vec<(Weights, Option<Numbers>)>,
    stacked: usize,
    ending: Ending,
}

/// What belongs to rows of activations.
#[derive(Clone)]
pub struct Inputs {
    pub x: Vec<f32>,
    experts: Option<Vec<u32>>,
    residual: Option<Vec<f32>>,
}

impl Plan {
    /// With weights made by `weights` ([`Weights::random`] or [`Weights::normal`]) and normal activations.
    pub fn build(&self, weights: fn(&mut Random, Format, [usize; 3]) -> Weights) -> (Model, Inputs) {
        let mut random = Random(self.seed);
        let mut projections = Vec::new();
        for &(format, rows, bias) in &self.parts {
            let weights = weights(&mut random, format, [self.stacked, rows, self.columns]);
            let bias = bias.map(|kind| Numbers::new(kind, (0..self.stacked * rows).map(|_| random.normal())));
            projections.push((weights, bias));
        }
        let model = Model { projections, stacked: self.stacked, ending: self.ending };
        let x = random.normals(self.m * self.columns);
        let mut experts: Vec<u32> = (0..self.m).map(|_| random.below(self.stacked) as u32).collect();
        if self.routing == Routing::Sorted {
            experts.sort_unstable();
        }
        let residual = (self.ending == Ending::Add).then(|| random.normals(self.m * model.width()));
        let experts = (self.routing != Routing::None).then_some(experts);
        (model, Inputs { x, experts, residual })
    }
}

impl Inputs {
    /// With activations rounded to bf16, and zeros for subnormal ones.
    fn rounded(&self) -> Inputs {
        let rounded = |x: f32| half::bf16::from_f32(if x.is_subnormal() { 0.0 } else { x }).to_f32();
        Inputs { x: self.x.iter().map(|&x| rounded(x)).collect(), ..self.clone() }
    }

    /// Some of the rows, in the order given.
    pub fn select(&self, model: &Model, rows: &[usize]) -> Inputs {
        fn pick<T: Copy>(all: &[T], width: usize, rows: &[usize]) -> Vec<T> {
            rows.iter().flat_map(|&row| &all[row * width..(row + 1) * width]).copied().collect()
        }
        Inputs {
            x: pick(&self.x, model.columns(), rows),
            experts: self.experts.as_ref().map(|experts| pick(experts, 1, rows)),
            residual: self.residual.as_ref().map(|residual| pick(residual, model.width(), rows)),
        }
    }
}

impl Model {
    pub fn columns(&self) -> usize {
        self.projections[0].0.columns
    }

    /// Columns of the output.
    pub fn width(&self) -> usize {
        match self.ending {
            Ending::Concat => self.projections.iter().map(|(weights, _)| weights.rows).sum(),
            _ => self.projections[0].0.rows,
        }
    }

    /// With columns in another order; only of dense weights.
    pub fn reordered(&self, columns: &[usize]) -> Model {
        let projections = self.projections.iter().map(|(weights, bias)| (weights.reordered(columns), bias.clone()));
        Model { projections: projections.collect(), ..*self }
    }

    pub fn place(&self, edge: Edge) -> PlacedModel<'_> {
        let place = |(weights, bias): &(Weights, Option<Numbers>)| {
            (weights.place(edge), bias.as_ref().map(|bias| bias.place(edge)))
        };
        PlacedModel { model: self, edge, projections: self.projections.iter().map(place).collect() }
    }

    /// Whether products with these rows multiply pairs of bf16, on instruction sets that can.
    fn is_in_pairs(&self, inputs: &Inputs, precision: Precision) -> bool {
        let bf16 = |weights: &Weights| weights.format == Format::Dense(Type::Bf16);
        inputs.x.len() >= 64 * self.columns()
            && inputs.experts.is_none()
            && precision == Precision::Fast
            && self.columns().is_multiple_of(2)
            && self.projections.iter().all(|(weights, _)| bf16(weights))
    }

    /// The reference of such products, if these are: subnormal numbers may be lost.
    pub fn reference_in_pairs(&self, inputs: &Inputs, precision: Precision) -> Option<Vec<Expected>> {
        let lost = 4.0 * self.columns() as f64 * f64::from(f32::MIN_POSITIVE);
        let more = |e: Expected| Expected { bound: e.bound + lost, ..e };
        let reference = || self.reference(&inputs.rounded(), precision).into_iter().map(more).collect();
        self.is_in_pairs(inputs, precision).then(reference)
    }

    /// In f64, `[M, width]`. A kernel may miss by `1e-6 * sqrt(K)` times the sum of the magnitudes it adds: of
    /// products, and of the bias and the residual, which count as further columns.
    pub fn reference(&self, inputs: &Inputs, precision: Precision) -> Vec<Expected> {
        let columns = self.columns();
        let mut out = Vec::with_capacity(inputs.x.len() / columns * self.width());
        for (row, x) in inputs.x.chunks_exact(columns).enumerate() {
            let expert = inputs.experts.as_ref().map_or(0, |experts| experts[row] as usize);
            let mut sums = self.projections.iter().map(|projection| sums(projection, expert, x, precision));
            match self.ending {
                Ending::Concat => out.extend(sums.flatten()),
                Ending::Add => {
                    let residual = inputs.residual.iter().flat_map(|all| &all[row * self.width()..]);
                    let plus = |(sum, r): (Expected, &f32)| {
                        let r = f64::from(*r);
                        let bound = sum.bound + 1e-6 * r.abs() + 1e-7 * (sum.value + r).abs();
                        Expected { value: sum.value + r, bound }
                    };
                    out.extend(sums.next().into_iter().flatten().zip(residual).map(plus));
                }
                Ending::Gelu => out.extend(sums.flatten().map(gelu)),
                Ending::SquaredRelu => out.extend(sums.flatten().map(squared_relu)),
                ending => {
                    assert!(ending.is_gated());
                    let gated = match ending {
                        Ending::GeGlu => geglu,
                        Ending::ClampedSwiGlu => clamped_swiglu,
                        _ => swiglu,
                    };
                    let (gate, up) = (sums.next().unwrap_or_default(), sums.next().unwrap_or_default());
                    out.extend(gate.into_iter().zip(up).map(|(gate, up)| gated(gate, up)));
                }
            }
        }
        out
    }
}

/// `silu(gate) * up`. The slope of silu is below 1.1; its own error is below 1e-6 of its value.
fn swiglu(gate: Expected, up: Expected) -> Expected {
    let silu = gate.value / (1.0 + (-gate.value).exp());
    let of_gate = 1.1 * gate.bound + 1e-6 * silu.abs() + 1e-36;
    let value = silu * up.value;
    Expected { value, bound: of_gate * (up.value.abs() + up.bound) + silu.abs() * up.bound + 1e-6 * value.abs() + LOST }
}

/// `gelu(gate) * up` with the approximation by `tanh`. Its slope is below 1.13, its own error below 1e-6 of `|gate|`.
fn geglu(gate: Expected, up: Expected) -> Expected {
    let x = gate.value;
    let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    let gelu = x / 2.0 * (1.0 + y.tanh());
    let of_gate = 1.13 * gate.bound + 1e-6 * x.abs();
    let value = gelu * up.value;
    Expected { value, bound: of_gate * (up.value.abs() + up.bound) + gelu.abs() * up.bound + 1e-6 * value.abs() + LOST }
}

/// `(up + 1) * gate * sigmoid(ALPHA * gate)`, both clamped to LIMIT, the gate from above only. The slope of the gate is below 1.1.
fn clamped_swiglu(gate: Expected, up: Expected) -> Expected {
    let (alpha, limit) = (f64::from(ALPHA), f64::from(LIMIT));
    let (g, u) = (gate.value.min(limit), up.value.clamp(-limit, limit) + 1.0);
    let swish = g / (1.0 + (-alpha * g).exp());
    let of_gate = 1.1 * gate.bound + 1e-6 * swish.abs() + 1e-36;
    let value = swish * u;
    let of_up = up.bound + 1e-7;
    Expected { value, bound: of_gate * (u.abs() + of_up) + swish.abs() * of_up + 1e-6 * value.abs() + LOST }
}

/// `max(x, 0)^2`.
fn squared_relu(x: Expected) -> Expected {
    let positive = x.value.max(0.0);
    let value = positive * positive;
    Expected { value, bound: 2.0 * positive * x.bound + x.bound * x.bound + 1e-6 * value + LOST }
}

/// `x / 2 (1 + erf(x / sqrt(2)))`. Its slope is below 1.13, its own error below 4e-7 of `|x|`.
fn gelu(x: Expected) -> Expected {
    let value = x.value / 2.0 * (1.0 + erf(x.value / std::f64::consts::SQRT_2));
    Expected { value, bound: 1.13 * x.bound + 4e-7 * x.value.abs() + LOST }
}

/// By Simpson's rule; beyond 6 it is 1 in any precision used here.
fn erf(x: f64) -> f64 {
    const STEPS: usize = 600;
    let end = x.abs().min(6.0);
    let at = |step: usize| (-(end * step as f64 / STEPS as f64).powi(2)).exp();
    let inner: f64 = (1..STEPS).map(|step| if step % 2 == 1 { 4.0 * at(step) } else { 2.0 * at(step) }).sum();
    let integral = end / STEPS as f64 / 3.0 * (at(0) + inner + at(STEPS));
    x.signum() * std::f64::consts::FRAC_2_SQRT_PI * integral
}

/// One projection of one row, with its bias.
fn sums((weights, bias): &(Weights, Option<Numbers>), expert: usize, x: &[f32], precision: Precision) -> Vec<Expected> {
    let columns = weights.columns;
    let fast = weights.format.is_packed() && precision == Precision::Fast;
    // Activations share a scale over 64 columns at most.
    let group = weights.format.group().min(64);
    let x: Vec<f64> = if fast { quantised(x, group) } else { x.iter().map(|&x| f64::from(x)).collect() };
    let one = |row: usize| {
        let at = (expert * weights.rows + row) * columns;
        let (values, parts) = (&weights.values[at..at + columns], &weights.parts[at..at + columns]);
        let bias = bias.as_ref().map_or(0.0, |bias| bias.get(expert * weights.rows + row));
        let value = x.iter().zip(values).map(|(x, w)| x * w).sum::<f64>() + bias;
        // The fast product adds codes and biases of groups separately.
        let magnitudes = if fast { parts } else { values };
        let size = x.iter().zip(magnitudes).map(|(x, w)| (x * w).abs()).sum::<f64>() + bias.abs();
        let lost = columns as f64 * LOST;
        Expected { value, bound: 1e-6 * (columns as f64).sqrt() * size + lost }
    };
    (0..weights.rows).map(one).collect()
}

/// A model at the edges of protected pages.
pub struct PlacedModel<'m> {
    model: &'m Model,
    edge: Edge,
    projections: Vec<(PlacedWeights, Option<Placed>)>,
}

/// How a product is computed.
#[derive(Debug, Clone, Copy)]
pub struct How {
    pub isa: Isa,
    pub precision: Precision,
    pub threads: usize,
}

impl PlacedModel<'_> {
    /// The product by a kernel, with all its buffers at the edges of protected pages.
    pub fn run(&self, inputs: &Inputs, how: How, kind: Type) -> Numbers {
        let projections: Vec<Projection<'_>> = self
            .projections
            .iter()
            .map(|(weights, bias)| Projection { matrix: weights.matrix(), bias: bias.as_ref().map(Placed::floats) })
            .collect();
        let x = Guarded::new(&inputs.x, self.edge);
        let experts = inputs.experts.as_ref().map(|experts| Guarded::new(experts, self.edge));
        let residual = Guarded::new(inputs.residual.as_deref().unwrap_or_default(), self.edge);
        let product = MatMul {
            x: &x,
            projections: &projections,
            experts: experts.as_deref(),
            stacked: self.model.stacked,
            finish: match self.model.ending {
                Ending::Concat => Finish::Concat,
                Ending::Add => Finish::Add(&residual),
                Ending::SwiGlu => Finish::SwiGlu,
                Ending::GeGlu => Finish::GeGlu,
                Ending::ClampedSwiGlu => Finish::ClampedSwiGlu { alpha: ALPHA, limit: LIMIT },
                Ending::Gelu => Finish::Gelu,
                Ending::SquaredRelu => Finish::SquaredRelu,
            },
            precision: how.precision,
        };
        let rows = inputs.x.len() / self.model.columns();
        assert_eq!((product.rows(), product.width()), (rows, self.model.width()));
        let mut out = Placed::output(kind, rows * self.model.width(), self.edge);
        product.run(how.isa, &workers(how.threads), out.floats_mut());
        out.numbers()
    }

    /// The same as f32.
    pub fn run_f32(&self, inputs: &Inputs, how: How) -> Vec<f32> {
        let Numbers::F32(out) = self.run(inputs, how, Type::F32) else { unreachable!("asked for f32") };
        out
    }
}
