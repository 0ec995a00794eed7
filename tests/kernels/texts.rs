//! Attention within texts against f64.

use std::ops::Range;

use proptest::prelude::*;

use crate::cpu::Isa;
use crate::cpu::floats::Rows;
use crate::cpu::texts::TextAttention;
use crate::guard::{EDGES, Edge, Guarded};
use crate::numbers::{Numbers, Placed, Type, bits, cases};
use crate::reference::Random;
use crate::threads::workers;

/// Texts to attend within.
#[derive(Debug, Clone)]
struct Case {
    lengths: Vec<usize>,
    heads: usize,
    width: usize,
    window: Option<usize>,
    /// Queries, keys and values side by side instead of apart.
    joined: bool,
    /// Times the scores.
    sharp: f32,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let lengths = prop_oneof![
        6 => prop::collection::vec(1usize..50, 1..6),
        1 => prop::collection::vec(60usize..140, 1..3),
        1 => Just(vec![1100]),
    ];
    let width = prop_oneof![2 => prop::sample::select(&[16usize, 32, 64, 80][..]), 1 => 1usize..40];
    let window = prop_oneof![2 => Just(None), 1 => (0usize..40).prop_map(Some)];
    let sharp = prop::sample::select(&[0.2f32, 1.0, 30.0][..]);
    (lengths, 1usize..4, width, window, any::<bool>(), sharp, any::<u64>()).prop_map(
        |(lengths, heads, width, window, joined, sharp, seed)| Case {
            lengths,
            heads,
            width,
            window,
            joined,
            sharp,
            seed,
        },
    )
}

impl Case {
    fn texts(&self) -> Vec<Range<usize>> {
        let mut start = 0;
        let text = |&length: &usize| {
            start += length;
            start - length..start
        };
        self.lengths.iter().map(text).collect()
    }

    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Queries, keys and values, `[rows, heads * width]` each.
    fn inputs(&self) -> [Vec<f32>; 3] {
        let mut random = Random(self.seed);
        [(); 3].map(|()| random.normals(self.rows() * self.heads * self.width))
    }

    fn run(&self, isa: Isa, inputs: &[Vec<f32>; 3], edge: Edge, threads: usize) -> Vec<f32> {
        let row = self.heads * self.width;
        let stride = if self.joined { 3 * row } else { row };
        let joined: Vec<f32> = (0..self.rows())
            .flat_map(|at| inputs.iter().flat_map(move |x| &x[at * row..(at + 1) * row]))
            .copied()
            .collect();
        let parts: Vec<Guarded<f32>> = match self.joined {
            true => vec![Guarded::new(&joined, edge)],
            false => inputs.iter().map(|x| Guarded::new(x, edge)).collect(),
        };
        let rows = |at: usize| match self.joined {
            true => Rows { numbers: &parts[0][at * row..], width: row, stride },
            false => Rows { numbers: &parts[at], width: row, stride },
        };
        let texts = self.texts();
        let attention = TextAttention {
            inputs: [rows(0), rows(1), rows(2)],
            heads: self.heads,
            scale: self.sharp / (self.width as f32).sqrt(),
            window: self.window,
            texts: &texts,
        };
        let mut out = Placed::output(Type::F32, self.rows() * row, edge);
        attention.run(isa, &workers(threads), out.floats_mut());
        let Numbers::F32(out) = out.numbers() else { unreachable!("asked for f32") };
        out
    }

    /// In f64; with the largest score, on which a weight's error depends.
    fn reference(&self, inputs: &[Vec<f32>; 3]) -> (Vec<f64>, f64) {
        let Case { heads, width, .. } = *self;
        let row = heads * width;
        let scale = f64::from(self.sharp / (width as f32).sqrt());
        let (mut out, mut largest) = (vec![0.0; self.rows() * row], 0f64);
        let at =
            |part: usize, token: usize, head: usize, i: usize| f64::from(inputs[part][token * row + head * width + i]);
        for text in self.texts() {
            for (query, head) in text.clone().flat_map(|query| (0..heads).map(move |head| (query, head))) {
                let sees = |key: &usize| self.window.is_none_or(|window| query.abs_diff(*key) <= window);
                let keys: Vec<usize> = text.clone().filter(sees).collect();
                let score =
                    |&key: &usize| (0..width).map(|i| at(0, query, head, i) * at(1, key, head, i)).sum::<f64>() * scale;
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                largest = scores.iter().fold(largest, |most, score| most.max(score.abs()));
                let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for i in 0..width {
                    let value =
                        keys.iter().zip(&weights).map(|(&key, weight)| weight * at(2, key, head, i)).sum::<f64>();
                    out[query * row + head * width + i] = value / sum;
                }
            }
        }
        (out, largest)
    }
}

/// The largest error over what is possible: of values of about 4, with weights that scores of this size spoil.
fn error(found: &[f32], (expected, largest): &(Vec<f64>, f64)) -> f64 {
    let worst = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
    worst / (4.0 * (1.0 + largest))
}

const BOUND: f64 = 4e-6;

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn attention_is_within_the_bound(case in case(), threads in 1usize..=3) {
        let inputs = case.inputs();
        let expected = case.reference(&inputs);
        for isa in Isa::available() {
            let [end, begin] = EDGES.map(|edge| case.run(isa, &inputs, edge, threads));
            prop_assert!(error(&end, &expected) <= BOUND, "{isa:?}: {}", error(&end, &expected));
            prop_assert_eq!(bits(&end), bits(&begin), "{:?}: depends on where buffers lie", isa);
            // A text alone has the same bits.
            let (first, row) = (case.lengths[0], case.heads * case.width);
            let alone = Case { lengths: vec![first], ..case.clone() };
            let inputs = inputs.each_ref().map(|x| x[..first * row].to_vec());
            prop_assert_eq!(bits(&alone.run(isa, &inputs, Edge::End, 1)), bits(&end[..first * row]), "{:?}: company", isa);
        }
    }
}

/// A wrong window, scale or text is further off than the bound.
#[test]
fn the_bound_notices_small_errors() {
    let right = Case { lengths: vec![20, 30], heads: 2, width: 16, window: Some(5), joined: true, sharp: 1.0, seed: 3 };
    let inputs = right.inputs();
    let expected = right.reference(&inputs);
    let off = |case: Case| error(&case.run(Isa::best(), &inputs, Edge::End, 1), &expected);
    assert!(off(right.clone()) <= BOUND);
    for wrong in [
        Case { window: Some(6), ..right.clone() },
        Case { sharp: 1.001, ..right.clone() },
        Case { lengths: vec![21, 29], ..right.clone() },
    ] {
        assert!(off(wrong.clone()) > BOUND, "{wrong:?}");
    }
}

#[test]
#[should_panic(expected = "texts that share rows")]
fn texts_do_not_overlap() {
    let rows = Rows { numbers: &[0.0; 8], width: 2, stride: 2 };
    let attention = TextAttention { inputs: [rows; 3], heads: 1, scale: 1.0, window: None, texts: &[0..3, 2..4] };
    let mut out = Placed::output(Type::F32, 8, Edge::End);
    attention.run(Isa::SCALAR, &workers(1), out.floats_mut());
}
