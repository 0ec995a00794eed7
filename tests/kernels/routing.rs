//! What tokens choose, against the rules of routers in f64.

use proptest::prelude::*;

use crate::cpu::routing::{Chosen, GroupScore, Groups, Normalize, Routing, Scores, Ties};
use crate::numbers::cases;
use crate::reference::Random;
use crate::threads::workers;

const SCORES: [Scores; 4] = [Scores::Softmax, Scores::Sigmoid, Scores::SoftmaxOfChosen, Scores::SigmoidOfChosen];

const NORMALIZE: [Normalize; 4] =
    [Normalize::No, Normalize::SumPlus(0.0), Normalize::SumPlus(0.25), Normalize::SumAtLeast(0.9)];

fn rules() -> impl Strategy<Value = Routing> {
    let scores = (prop::sample::select(&SCORES[..]), prop::sample::select(&NORMALIZE[..]));
    let groups = prop::option::of((1usize..=4, any::<bool>()));
    ((1usize..=8, 1usize..=12), 1usize..=8, scores, groups, any::<bool>(), 0.5f32..3.0).prop_map(
        |((count, size), per_token, (scores, normalize), groups, last, scale)| {
            let experts = count * size;
            let by = |two| if two { GroupScore::TwoBest } else { GroupScore::Best };
            let groups = groups.map(|(kept, two)| Groups { count, kept: kept.min(count), by: by(two) });
            let ties = if last { Ties::Last } else { Ties::First };
            Routing { experts, per_token: per_token.min(experts), scores, groups, normalize, scale, ties }
        },
    )
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(x));
    let powers: Vec<f64> = x.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

/// The experts of one token and their weights, the best first.
fn reference(rule: &Routing, logits: &[f64], correction: &[f64], expert_scales: &[f64]) -> Vec<(u32, f64)> {
    let values = match rule.scores {
        Scores::Softmax => softmax(logits),
        Scores::Sigmoid => logits.iter().map(|&x| sigmoid(x)).collect(),
        Scores::SoftmaxOfChosen | Scores::SigmoidOfChosen => logits.to_vec(),
    };
    let mut keys: Vec<f64> = values.iter().zip(correction).map(|(value, correction)| value + correction).collect();
    if let Some(Groups { count, kept, by }) = rule.groups {
        let size = keys.len() / count;
        let score = |group: &[f64]| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let taken = if by == GroupScore::TwoBest { 2 } else { 1 };
            sorted.iter().take(taken).sum::<f64>()
        };
        let mut order: Vec<(f64, usize)> = keys.chunks(size).map(score).zip(0..).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        for &(_, group) in &order[kept..] {
            keys[group * size..(group + 1) * size].fill(0.0);
        }
    }
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by(|&a, &b| {
        let equal = if rule.ties == Ties::Last { b.cmp(&a) } else { a.cmp(&b) };
        keys[b].total_cmp(&keys[a]).then(equal)
    });
    order.truncate(rule.per_token);
    let chosen: Vec<f64> = order.iter().map(|&expert| values[expert]).collect();
    let weights = match rule.scores {
        Scores::Softmax | Scores::Sigmoid => chosen,
        Scores::SoftmaxOfChosen => softmax(&chosen),
        Scores::SigmoidOfChosen => chosen.into_iter().map(sigmoid).collect(),
    };
    let sum: f64 = weights.iter().sum();
    let divisor = match rule.normalize {
        Normalize::No => 1.0,
        Normalize::SumPlus(more) => sum + f64::from(more),
        Normalize::SumAtLeast(least) => sum.max(f64::from(least)),
    };
    let scaled = |(&expert, weight): (&usize, f64)| {
        (expert as u32, weight / divisor * f64::from(rule.scale) * expert_scales[expert])
    };
    order.iter().zip(weights).map(scaled).collect()
}

/// Multiples of 1/16 between -4 and 4, each once: far enough apart that f32 and f64 choose the same, also after a sigmoid.
fn distinct(random: &mut Random, len: usize) -> Vec<f64> {
    random.permutation(128).into_iter().take(len).map(|i| i as f64 / 16.0 - 4.0).collect()
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn experts_and_weights_are_those_of_the_rule(
        rule in rules(), tokens in 0usize..70, seed in any::<u64>(), corrected in any::<bool>(), threads in 1usize..4,
    ) {
        let mut random = Random(seed);
        let logits: Vec<f64> = (0..tokens).flat_map(|_| distinct(&mut random, rule.experts)).collect();
        let mut numbers = |size: f64| -> Vec<f64> {
            (0..rule.experts).map(|_| if corrected { f64::from((random.normal() * size) as f32) } else { 0.0 }).collect()
        };
        let (correction, scales) = (numbers(0.3), numbers(1.0).into_iter().map(|x| f64::from((1.0 + x) as f32)).collect::<Vec<_>>());
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let (narrow_correction, narrow_scales) = (narrow(&correction), narrow(&scales));
        let numbers = |numbers| corrected.then_some(numbers);
        let found = rule.run(&workers(threads), &narrow(&logits), numbers(&narrow_correction[..]), numbers(&narrow_scales[..]));
        prop_assert_eq!(found.experts.len(), tokens * rule.per_token);
        for (token, logits) in logits.chunks(rule.experts).enumerate() {
            let expected = reference(&rule, logits, &correction, &scales);
            let at = token * rule.per_token..(token + 1) * rule.per_token;
            let ids: Vec<u32> = expected.iter().map(|&(id, _)| id).collect();
            prop_assert_eq!(&found.experts[at.clone()], &ids[..], "token {}", token);
            for (found, (_, expected)) in found.weights[at].iter().zip(expected) {
                prop_assert!((f64::from(*found) - expected).abs() <= 3e-6 * (1.0 + expected.abs()), "{} is not {}", found, expected);
            }
        }
    }
}

fn rule(experts: usize, per_token: usize, scores: Scores, ties: Ties) -> Routing {
    Routing { experts, per_token, scores, groups: None, normalize: Normalize::No, scale: 1.0, ties }
}

#[test]
fn of_equals_the_first_or_the_last_is_chosen() {
    let logits = [1.0, 3.0, 3.0, 0.0, 3.0, 1.0];
    let chosen = |ties| rule(6, 2, Scores::Softmax, ties).run(&workers(1), &logits, None, None).experts;
    assert_eq!(chosen(Ties::First), [1, 2]);
    assert_eq!(chosen(Ties::Last), [4, 2]);
}

/// What groups that are not kept are chosen by counts as 0, as DeepSeek's own code has it.
#[test]
fn a_dropped_group_is_better_than_what_is_negative() {
    let groups = Some(Groups { count: 2, kept: 1, by: GroupScore::TwoBest });
    let rule = Routing { groups, ..rule(4, 2, Scores::Sigmoid, Ties::First) };
    let Chosen { experts, weights, .. } =
        rule.run(&workers(1), &[2.0, 2.0, 1.0, 1.0], Some(&[-0.5, -2.0, -3.0, -3.0]), None);
    assert_eq!(experts, [0, 2]);
    assert!((weights[1] - 0.731_058_6).abs() < 1e-6, "the weight is without the correction: {weights:?}");
}

#[test]
fn what_is_not_a_number_chooses_experts_that_exist() {
    for scores in SCORES {
        for logits in [[f32::NAN; 5], [f32::INFINITY; 5], [f32::NEG_INFINITY, f32::NAN, 1.0, -f32::NAN, f32::INFINITY]]
        {
            let mut chosen = rule(5, 3, scores, Ties::Last).run(&workers(1), &logits, None, None).experts;
            chosen.sort_unstable();
            chosen.dedup();
            assert!(chosen.len() == 3 && chosen[2] < 5, "{scores:?} {logits:?}: {chosen:?}");
        }
    }
}
