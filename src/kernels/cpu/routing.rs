//! How the tokens of a mixture of experts choose: from a router's logits to experts and their weights.
//!
//! In f32, a token by itself: what it chooses does not depend on other tokens.

use std::cmp::Ordering;
use std::sync::{Mutex, PoisonError};

use super::threads::Workers;

/// What experts are chosen by, and what their weights are before they are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// By the softmax of all logits, which are the weights.
    Softmax,
    /// By the sigmoid of each logit, which are the weights.
    Sigmoid,
    /// By the logits; weights are the softmax of those that were chosen.
    SoftmaxOfChosen,
    /// By the logits; weights are the sigmoid of those that were chosen.
    SigmoidOfChosen,
}

/// How the weights of a token's experts are normalised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Normalize {
    /// They are not.
    No,
    /// Divided by their sum plus this.
    SumPlus(f32),
    /// Divided by their sum, or by this if it is less.
    SumAtLeast(f32),
}

/// Experts in groups of neighbours, the best of which are kept before experts are chosen (DeepSeek-AI 2024,
/// "DeepSeek-V2"). What the others are chosen by counts as 0, which is not always less than what is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// How many; a divisor of the number of experts.
    pub count: usize,
    /// How many are kept.
    pub kept: usize,
    /// What makes a group good.
    pub by: GroupScore,
}

/// What groups are chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Their best expert.
    Best,
    /// The sum of their two best ones.
    TwoBest,
}

/// Which of two experts is chosen that are equally good. (Groups: the last one is kept.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// The one with the smaller number.
    First,
    /// The one with the larger number.
    Last,
}

/// The rule of a router.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// Experts that there are.
    pub experts: usize,
    /// Experts that a token chooses: at least one, at most all.
    pub per_token: usize,
    /// By what it does.
    pub scores: Scores,
    /// Groups that it chooses before.
    pub groups: Option<Groups>,
    /// What becomes of the weights.
    pub normalize: Normalize,
    /// Multiplies the weights at last.
    pub scale: f32,
    /// Equals.
    pub ties: Ties,
}

/// What tokens have chosen: `per_token` entries for each, the best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// Experts `[T, per_token]`.
    pub experts: Vec<u32>,
    /// Their weights, in the same order.
    pub weights: Vec<f32>,
    /// Entries of a token.
    pub per_token: usize,
}

/// Tokens of a task: one is a few microseconds of work.
const TOKENS_PER_TASK: usize = 32;

impl Routing {
    /// Of `logits [T, experts]`. `correction [experts]` is added to what experts are chosen by, and not to their weights;
    /// `expert_scales [experts]` multiply the weights. Panics if the sizes do not agree.
    pub fn run(
        &self,
        workers: &Workers,
        logits: &[f32],
        correction: Option<&[f32]>,
        expert_scales: Option<&[f32]>,
    ) -> Chosen {
        self.check(logits.len(), [correction, expert_scales]);
        let Self { experts, per_token, .. } = *self;
        let tokens = logits.len() / experts;
        let mut chosen =
            Chosen { experts: vec![0; tokens * per_token], weights: vec![0.0; tokens * per_token], per_token };
        let size = TOKENS_PER_TASK * per_token;
        let parts = chosen.experts.chunks_mut(size).zip(chosen.weights.chunks_mut(size));
        let tasks: Vec<_> = parts.zip(logits.chunks(TOKENS_PER_TASK * experts)).map(Mutex::new).collect();
        workers.run(tasks.len(), &|task| {
            let ((ids, weights), logits) = &mut *tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
            let mut scratch = Scratch::default();
            let rows = ids.chunks_exact_mut(per_token).zip(weights.chunks_exact_mut(per_token));
            for ((ids, weights), logits) in rows.zip(logits.chunks_exact(experts)) {
                self.choose(logits, correction, &mut scratch, ids);
                self.weigh(&scratch.values, expert_scales, ids, weights);
            }
        });
        drop(tasks);
        chosen
    }

    fn check(&self, logits: usize, per_expert: [Option<&[f32]>; 2]) {
        let Self { experts, per_token, groups, .. } = *self;
        assert!(experts > 0 && logits.is_multiple_of(experts), "logits of {experts} experts");
        assert!((1..=experts).contains(&per_token), "{per_token} of {experts} experts");
        assert!(per_expert.iter().flatten().all(|numbers| numbers.len() == experts), "a number for each expert");
        if let Some(Groups { count, kept, .. }) = groups {
            assert!(count > 0 && experts.is_multiple_of(count), "{count} groups of {experts} experts");
            assert!((1..=count).contains(&kept), "{kept} of {count} groups");
        }
    }

    /// The best experts of a token, in order, and in `scratch.values` what weights are made of.
    fn choose(&self, logits: &[f32], correction: Option<&[f32]>, scratch: &mut Scratch, ids: &mut [u32]) {
        let Scratch { values, keys, order } = scratch;
        values.clear();
        match self.scores {
            Scores::Softmax => softmax(logits.iter().copied(), values),
            Scores::Sigmoid => values.extend(logits.iter().map(|&x| sigmoid(x))),
            Scores::SoftmaxOfChosen | Scores::SigmoidOfChosen => values.extend_from_slice(logits),
        }
        keys.clear();
        keys.extend_from_slice(values);
        for (key, correction) in keys.iter_mut().zip(correction.unwrap_or_default()) {
            *key += correction;
        }
        if let Some(groups) = self.groups {
            groups.drop_others(keys, order);
        }
        order.clear();
        order.extend(0..keys.len() as u32);
        // Any numbers have an order, also those that are none: an expert that does not exist would be read past the end.
        let better = |a: &u32, b: &u32| match keys[*b as usize].total_cmp(&keys[*a as usize]) {
            Ordering::Equal if self.ties == Ties::Last => b.cmp(a),
            Ordering::Equal => a.cmp(b),
            other => other,
        };
        if ids.len() < order.len() {
            order.select_nth_unstable_by(ids.len() - 1, better);
        }
        ids.copy_from_slice(&order[..ids.len()]);
        ids.sort_unstable_by(better);
    }

    /// The weights of the experts that were chosen.
    fn weigh(&self, values: &[f32], expert_scales: Option<&[f32]>, ids: &[u32], weights: &mut [f32]) {
        let of = |id: &u32| values[*id as usize];
        match self.scores {
            Scores::Softmax | Scores::Sigmoid => {
                for (weight, id) in weights.iter_mut().zip(ids) {
                    *weight = of(id);
                }
            }
            Scores::SigmoidOfChosen => {
                for (weight, id) in weights.iter_mut().zip(ids) {
                    *weight = sigmoid(of(id));
                }
            }
            Scores::SoftmaxOfChosen => {
                let mut all = Vec::with_capacity(ids.len());
                softmax(ids.iter().map(of), &mut all);
                weights.copy_from_slice(&all);
            }
        }
        let sum: f32 = weights.iter().sum();
        let divisor = match self.normalize {
            Normalize::No => 1.0,
            Normalize::SumPlus(more) => sum + more,
            Normalize::SumAtLeast(least) => sum.max(least),
        };
        for (weight, id) in weights.iter_mut().zip(ids) {
            *weight = *weight / divisor * self.scale * expert_scales.map_or(1.0, |scales| scales[*id as usize]);
        }
    }
}

/// Memory for one token after another.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    keys: Vec<f32>,
    order: Vec<u32>,
}

impl Groups {
    /// Makes the keys of the groups that are not kept 0.
    fn drop_others(&self, keys: &mut [f32], order: &mut Vec<u32>) {
        let size = keys.len() / self.count;
        let scores: Vec<f32> = keys.chunks_exact(size).map(|group| self.score(group)).collect();
        order.clear();
        order.extend(0..self.count as u32);
        order.sort_by(|&a, &b| scores[a as usize].total_cmp(&scores[b as usize]));
        for &group in &order[..self.count - self.kept] {
            keys[group as usize * size..(group as usize + 1) * size].fill(0.0);
        }
    }

    fn score(&self, group: &[f32]) -> f32 {
        let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &key in group {
            if key > best {
                (best, second) = (key, best);
            } else if key > second {
                second = key;
            }
        }
        match self.by {
            GroupScore::TwoBest if group.len() > 1 => best + second,
            GroupScore::Best | GroupScore::TwoBest => best,
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Of all `x`, appended to `out`.
fn softmax(x: impl Iterator<Item = f32> + Clone, out: &mut Vec<f32>) {
    let largest = x.clone().fold(f32::NEG_INFINITY, f32::max);
    let first = out.len();
    out.extend(x.map(|x| (x - largest).exp()));
    let sum: f32 = out[first..].iter().sum();
    out[first..].iter_mut().for_each(|x| *x /= sum);
}
