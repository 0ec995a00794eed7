//! Mixtures of experts against a loop over all tokens and experts in f64.

use proptest::prelude::*;

use crate::case::formats;
use crate::cpu::Isa;
use crate::cpu::experts::Experts;
use crate::cpu::matmul::{Finish, Precision, Projection};
use crate::cpu::routing::Chosen;
use crate::guard::{EDGES, Edge, Guarded};
use crate::numbers::{Numbers, Placed, Type, bits, cases};
use crate::reference::{Format, PlacedWeights, Random, Weights};
use crate::threads::workers;

/// A mixture to make.
#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    tokens: usize,
    experts: usize,
    per_token: usize,
    /// Of the stacks that rows pass first, and of the last one.
    formats: [Format; 2],
    hidden: usize,
    inner: usize,
    bias: bool,
    gated: bool,
    weighs_input: bool,
    threads: usize,
}

fn plans() -> impl Strategy<Value = Plan> {
    let shape = (1usize..=9, 1usize..=5, 1usize..4, 1usize..4);
    let tokens = prop_oneof![3 => 1usize..6, 2 => 6usize..60, 1 => Just(0usize)];
    let flags = (any::<bool>(), prop::bool::weighted(0.8), prop::bool::weighted(0.2), 1usize..=3);
    (any::<u64>(), tokens, shape, formats(), formats(), flags).prop_map(
        |(seed, tokens, (experts, per_token, columns, inner), first, last, (bias, gated, weighs_input, threads))| {
            // A packed format's groups; dense ones take anything.
            let size = |format: Format, n: usize| n * if format.is_packed() { format.group() } else { 37 };
            let (hidden, inner, per_token) = (size(first, columns), size(last, inner), per_token.min(experts));
            let formats = [first, last];
            Plan { seed, tokens, experts, per_token, formats, hidden, inner, bias, gated, weighs_input, threads }
        },
    )
}

/// Weights, with biases.
type Stack = (Weights, Option<Numbers>);

struct Mixture {
    inputs: Vec<Stack>,
    output: Stack,
    plan: Plan,
}

/// What belongs to tokens.
#[derive(Clone)]
struct Tokens {
    x: Vec<f32>,
    chosen: Chosen,
}

impl Plan {
    fn build(&self) -> (Mixture, Tokens) {
        let mut random = Random(self.seed);
        let Plan { tokens, experts, per_token, hidden, inner, .. } = *self;
        let mut stack = |format, rows: usize, columns| {
            let weights = Weights::normal(&mut random, format, [experts, rows, columns]);
            let bias = Numbers::new(Type::Bf16, (0..experts * rows).map(|_| random.normal()));
            (weights, self.bias.then_some(bias))
        };
        let inputs = (0..1 + usize::from(self.gated)).map(|_| stack(self.formats[0], inner, hidden)).collect();
        let output = stack(self.formats[1], hidden, inner);
        let x = random.normals(tokens * hidden);
        let ids = (0..tokens).flat_map(|_| random.permutation(experts).into_iter().take(per_token)).map(|e| e as u32);
        let ids: Vec<u32> = ids.collect();
        let weights = ids.iter().map(|_| (0.1 + random.uniform()) as f32).collect();
        (
            Mixture { inputs, output, plan: self.clone() },
            Tokens { x, chosen: Chosen { experts: ids, weights, per_token } },
        )
    }
}

impl Tokens {
    /// Some of the tokens, in the order given.
    fn select(&self, hidden: usize, tokens: &[usize]) -> Tokens {
        let per_token = self.chosen.per_token;
        fn pick<T: Copy>(all: &[T], width: usize, rows: &[usize]) -> Vec<T> {
            rows.iter().flat_map(|&row| &all[row * width..(row + 1) * width]).copied().collect()
        }
        let experts = pick(&self.chosen.experts, per_token, tokens);
        let weights = pick(&self.chosen.weights, per_token, tokens);
        Tokens { x: pick(&self.x, hidden, tokens), chosen: Chosen { experts, weights, per_token } }
    }
}

impl Mixture {
    /// The sum over the experts that each token has chosen, and `before`.
    fn reference(&self, tokens: &Tokens, before: &[f32]) -> Vec<f64> {
        let Plan { hidden, per_token, weighs_input, .. } = self.plan;
        let product = |(weights, bias): &Stack, expert: usize, x: &[f64]| -> Vec<f64> {
            let row = |row: usize| {
                let at = expert * weights.rows + row;
                let values = &weights.values[at * weights.columns..(at + 1) * weights.columns];
                values.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias.as_ref().map_or(0.0, |b| b.get(at))
            };
            (0..weights.rows).map(row).collect()
        };
        let mut out: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
        for (token, (x, out)) in tokens.x.chunks(hidden).zip(out.chunks_mut(hidden)).enumerate() {
            for slot in token * per_token..(token + 1) * per_token {
                let (expert, weight) = (tokens.chosen.experts[slot] as usize, f64::from(tokens.chosen.weights[slot]));
                let before = if weighs_input { weight } else { 1.0 };
                let x: Vec<f64> = x.iter().map(|&x| f64::from(x) * before).collect();
                let mut inner = self.inputs.iter().map(|stack| product(stack, expert, &x));
                let inner: Vec<f64> = match (inner.next(), inner.next()) {
                    (Some(gate), Some(up)) => gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect(),
                    (Some(up), None) => up.iter().map(|up| up.max(0.0).powi(2)).collect(),
                    _ => unreachable!("one or two stacks"),
                };
                let after = if weighs_input { 1.0 } else { weight };
                for (out, y) in out.iter_mut().zip(product(&self.output, expert, &inner)) {
                    *out += after * y;
                }
            }
        }
        out
    }

    fn run(
        &self,
        tokens: &Tokens,
        before: &[f32],
        isa: Isa,
        precision: Precision,
        threads: usize,
        edge: Edge,
    ) -> Vec<f32> {
        let place = |(weights, bias): &Stack| -> (PlacedWeights, Option<Placed>) {
            (weights.place(edge), bias.as_ref().map(|bias| bias.place(edge)))
        };
        let (inputs, output) = (self.inputs.iter().map(place).collect::<Vec<_>>(), place(&self.output));
        fn projection((weights, bias): &(PlacedWeights, Option<Placed>)) -> Projection<'_> {
            Projection { matrix: weights.matrix(), bias: bias.as_ref().map(Placed::floats) }
        }
        let experts = Experts {
            count: self.plan.experts,
            inputs: &inputs.iter().map(projection).collect::<Vec<_>>(),
            finish: if self.plan.gated { Finish::SwiGlu } else { Finish::SquaredRelu },
            output: projection(&output),
            weighs_input: self.plan.weighs_input,
            precision,
        };
        let x = Guarded::new(&tokens.x, edge);
        let mut out = Guarded::new(before, edge);
        experts.run(isa, &workers(threads), &x, &tokens.chosen, &mut out);
        out.to_vec()
    }
}

/// How far off the rows are, against the size of all that are expected.
fn difference(found: &[f32], expected: &[f64]) -> f64 {
    let size: f64 = expected.iter().map(|x| x * x).sum();
    let error: f64 = found.iter().zip(expected).map(|(&found, expected)| (f64::from(found) - expected).powi(2)).sum();
    if error == 0.0 { 0.0 } else { (error / size).sqrt() }
}

/// What a precision may miss: of activations that are rounded to 8 bits per group, twice.
fn bound(precision: Precision) -> f64 {
    if precision == Precision::Exact { 2e-6 } else { 3e-2 }
}

proptest! {
    #![proptest_config(cases(60))]

    #[test]
    fn tokens_get_the_weighted_sum_of_their_experts(plan in plans()) {
        let (mixture, tokens) = plan.build();
        let before = Random(!plan.seed).normals(tokens.x.len());
        let expected = mixture.reference(&tokens, &before);
        for isa in Isa::available() {
            for precision in [Precision::Exact, Precision::Fast] {
                let [end, begin] = EDGES.map(|edge| mixture.run(&tokens, &before, isa, precision, plan.threads, edge));
                let error = difference(&end, &expected);
                prop_assert!(error <= bound(precision), "{:?} {:?}: off by {:e}", isa, precision, error);
                prop_assert_eq!(bits(&end), bits(&begin), "{:?}: depends on where buffers lie", isa);
            }
        }
    }

    /// A token's bits depend neither on other tokens, nor on their order, nor on the number of threads.
    #[test]
    fn exact_tokens_do_not_depend_on_others(plan in plans(), cut in any::<u64>()) {
        let (mixture, tokens) = plan.build();
        let mut random = Random(cut);
        for isa in Isa::available() {
            let run = |tokens: &Tokens, threads| {
                mixture.run(tokens, &vec![0.0; tokens.x.len()], isa, Precision::Exact, threads, Edge::End)
            };
            let whole = run(&tokens, plan.threads);
            let order = random.permutation(plan.tokens);
            let mut rest = &order[..];
            while !rest.is_empty() {
                let (some, others) = rest.split_at(1 + random.below(rest.len().min(20)));
                rest = others;
                let apart = run(&tokens.select(plan.hidden, some), 1 + random.below(3));
                for (&token, apart) in some.iter().zip(apart.chunks_exact(plan.hidden)) {
                    let whole = &whole[token * plan.hidden..(token + 1) * plan.hidden];
                    prop_assert_eq!(bits(whole), bits(apart), "{:?}: token {}", isa, token);
                }
            }
        }
    }
}

/// A mixture whose parts are all there.
fn one(tokens: usize) -> Plan {
    let formats = [Format::Affine { bits: 4, group: 64, scales: Type::Bf16 }, Format::Mxfp4];
    Plan {
        seed: 11,
        tokens,
        experts: 7,
        per_token: 3,
        formats,
        hidden: 128,
        inner: 64,
        bias: true,
        gated: true,
        weighs_input: false,
        threads: 2,
    }
}

/// More rows than are computed at once, and rows that several threads move.
#[test]
fn many_tokens_are_computed_in_blocks() {
    let plan = Plan { tokens: 900, ..one(0) };
    let (mixture, tokens) = plan.build();
    let before = vec![0.0; tokens.x.len()];
    let run = |tokens: &Tokens, precision, threads| {
        mixture.run(tokens, &before[..tokens.x.len()], Isa::best(), precision, threads, Edge::End)
    };
    let expected = mixture.reference(&tokens, &before);
    let exact = run(&tokens, Precision::Exact, 2);
    assert!(difference(&exact, &expected) <= bound(Precision::Exact));
    assert!(difference(&run(&tokens, Precision::Fast, 2), &expected) <= bound(Precision::Fast));
    let last = tokens.select(plan.hidden, &[899]);
    assert_eq!(bits(&exact[899 * plan.hidden..]), bits(&run(&last, Precision::Exact, 1)));
}

/// The bounds tell what is wrong: in either precision each of these is noticed.
#[test]
fn what_is_wrong_is_noticed() {
    let plan = one(5);
    let (mixture, tokens) = plan.build();
    let before = vec![0.0; tokens.x.len()];
    type Change = fn(&mut Mixture, &mut Tokens);
    let wrong: [(&str, Change); 5] = [
        ("another expert", |_, tokens| tokens.chosen.experts.swap(0, 3)),
        ("weights in another order", |_, tokens| tokens.chosen.weights.swap(0, 1)),
        ("no bias of the first stacks", |mixture, _| mixture.inputs.iter_mut().for_each(|stack| stack.1 = None)),
        ("no bias of the last stack", |mixture, _| mixture.output.1 = None),
        ("weights on the other side", |mixture, _| mixture.plan.weighs_input = true),
    ];
    for precision in [Precision::Exact, Precision::Fast] {
        let run =
            |mixture: &Mixture, tokens: &Tokens| mixture.run(tokens, &before, Isa::best(), precision, 2, Edge::End);
        let expected = mixture.reference(&tokens, &before);
        assert!(difference(&run(&mixture, &tokens), &expected) <= bound(precision));
        for (what, change) in wrong {
            let ((mut mixture, _), mut tokens) = (plan.build(), tokens.clone());
            change(&mut mixture, &mut tokens);
            let error = difference(&run(&mixture, &tokens), &expected);
            assert!(error > 2.0 * bound(precision), "{precision:?}: {what} is off by only {error:e}");
        }
    }
}
