//! Drawing a token from each row of logits: temperature, top-k, top-p, min-p, then the Gumbel-max trick.
//!
//! Nothing is sorted but the tokens around a cut. One pass finds the largest logit of each block; later passes skip the
//! blocks whose largest says that none of their tokens matters. All filters keep a prefix of the tokens in descending
//! order, equal ones by id, so together they are one [`Cut`], found with a histogram.
//!
//! A row's token has the same bits on every instruction set, with any number of threads and in any batch. Everything
//! that decides is a comparison, an integer, or made of single IEEE 754 operations that are the same everywhere:
//! * probabilities are integers, multiples of 2^-40 of the best token's, so that sums do not depend on their order;
//! * noise is made of 32 random bits per token id (Threefry-2x32 of 20 rounds, Salmon et al. 2011), keyed by seed and
//!   draw number, and logarithms of our own in f64.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};

use super::math;
use super::simd::{Isa, LANES, Simd, Work};
use super::threads::Workers;

/// How a row's token is chosen.
///
/// Tempered logits are logits times the reciprocal of the temperature, both rounded to f32. Not-a-numbers are never chosen while there is any number, and minus
/// infinity never while there is anything larger; a row without any number gives token 0. Where the largest tempered
/// logit is infinite, the first of the largest logits is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divides the logits. Below 1e-5 the first of the largest logits is chosen.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens, of equally likely ones those with lower ids; 0 keeps all.
    pub top_k: u32,
    /// Of what top-k left, keeps the tokens before which there is less than this share of the mass, and the first;
    /// 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Same seed, same draws.
    pub seed: u64,
    /// Tokens that this sequence has drawn before.
    pub drawn: u64,
}

/// Tokens of a block.
const BLOCK: usize = 64;

/// Of the histogram.
const BUCKETS: usize = 4096;

/// Below this temperature tempered logits could overflow, and the best token is as good as certain.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// The mass of a larger vocabulary might not fit 64 bits.
const MOST_TOKENS: usize = 1 << 23;

/// A tempered logit that is lower than the best by more than this has no mass: `e^-28.5 < 2^-41`.
const MASS_RANGE: f32 = 28.5;

/// Adding this to a number from 0 to 1 rounds it to a multiple of 2^-40.
const MASS_ROUNDING: f64 = 4096.0;

/// Draws one token per row of `logits [rows, vocab]` into `tokens [rows]`; a row is one thread's. Panics if the sizes
/// do not agree, or if the vocabulary is empty or has more than 2^23 tokens.
pub fn sample(isa: Isa, workers: &Workers, logits: &[f32], vocab: usize, rows: &[Draw], tokens: &mut [u32]) {
    assert!((1..=MOST_TOKENS).contains(&vocab), "a vocabulary of {vocab}");
    assert!(Some(logits.len()) == rows.len().checked_mul(vocab), "rows of {vocab} logits");
    assert_eq!(tokens.len(), rows.len(), "a token per row");
    let chosen: Vec<AtomicU32> = rows.iter().map(|_| AtomicU32::new(0)).collect();
    workers.run(rows.len(), &|row| {
        let choose = Choose { logits: &logits[row * vocab..(row + 1) * vocab], draw: &rows[row] };
        chosen[row].store(isa.run(choose), Ordering::Relaxed);
    });
    for (token, chosen) in tokens.iter_mut().zip(chosen) {
        *token = chosen.into_inner();
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Memory that a thread keeps from row to row.
#[derive(Default)]
struct Scratch {
    /// The largest of each block: first logits, then tempered; minus infinity up to a multiple of [`LANES`].
    largest: Vec<f32>,
    /// [`Scratch::largest`] in another order, then as shares of the best token's probability.
    shares: Vec<f32>,
    /// What each bucket weighs.
    buckets: Vec<u64>,
    /// Tokens of one bucket, see [`sort_key`].
    keys: Vec<u64>,
}

struct Choose<'a> {
    logits: &'a [f32],
    draw: &'a Draw,
}

impl Work for Choose<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u32 {
        // Taken, not borrowed in a closure: a closure would be compiled without the instruction set.
        let mut scratch = SCRATCH.take();
        let token = choose(simd, self.logits, self.draw, &mut scratch);
        SCRATCH.set(scratch);
        token
    }
}

#[inline(always)]
fn choose<S: Simd>(simd: S, logits: &[f32], draw: &Draw, scratch: &mut Scratch) -> u32 {
    let blocks = logits.len().div_ceil(BLOCK);
    let mut row =
        Row { simd, logits, tail: [f32::NEG_INFINITY; BLOCK], blocks, inverse: 1.0 / draw.temperature, best: 0.0 };
    let whole = logits.len() / BLOCK * BLOCK;
    row.tail[..logits.len() - whole].copy_from_slice(&logits[whole..]);
    let best = row.find_largest(&mut scratch.largest);
    row.best = best * row.inverse;
    // Also where the temperature is not a number.
    if !(draw.temperature >= LEAST_TEMPERATURE && row.best.is_finite()) {
        (row.inverse, row.best) = (1.0, best);
        return row.first(&scratch.largest);
    }
    for largest in &mut scratch.largest {
        // Infinity times zero is not a number.
        let tempered = *largest * row.inverse;
        *largest = if tempered.is_nan() { f32::NEG_INFINITY } else { tempered };
    }
    let first = row.first(&scratch.largest);
    let mut cut = Cut::ALL;
    if draw.top_k > 0 {
        row.narrow(scratch, Limit::Count(draw.top_k), &mut cut);
    }
    if draw.top_p < 1.0 {
        row.narrow(scratch, Limit::Share(draw.top_p), &mut cut);
    }
    if draw.min_p > 0.0 {
        let least = row.best + ln(f64::from(draw.min_p)) as f32;
        if least > cut.value {
            cut = Cut { value: least, ..Cut::ALL };
        }
    }
    row.race(scratch, Noise::new(draw), cut, first)
}

/// The tokens that stay: those with larger tempered logits, and of those with an equal one the first.
#[derive(Clone, Copy)]
struct Cut {
    value: f32,
    /// The last id that stays among equals.
    last: u32,
    /// How many equals do not stay.
    dropped: u64,
}

impl Cut {
    /// Everything but minus infinity.
    const ALL: Cut = Cut { value: f32::MIN, last: u32::MAX, dropped: 0 };

    #[inline(always)]
    fn keeps(&self, value: f32, id: u32) -> bool {
        value > self.value || value == self.value && id <= self.last
    }
}

/// What is counted up to the cut, and how far: tokens stay while less than that is before them.
#[derive(Clone, Copy)]
enum Limit {
    /// Tokens.
    Count(u32),
    /// The share of the mass.
    Share(f32),
}

impl Limit {
    /// The limit in units of weight, at least 1; `total` is the weight of all.
    fn units(self, total: u64) -> u64 {
        match self {
            Limit::Count(count) => u64::from(count),
            // What is no number, or negative, becomes 0.
            Limit::Share(share) => (f64::from(share) * total as f64).ceil() as u64,
        }
        .max(1)
    }
}

/// Tempered logits to buckets, in descending order: linear from the best on, the last takes the rest.
#[derive(Clone, Copy)]
struct Scale(f32);

impl Scale {
    /// Buckets as far down as `range`, if that is a distance at all.
    fn new(range: f32) -> Self {
        let range = if range > 0.0 && range <= f32::MAX { range } else { MASS_RANGE };
        Self((BUCKETS - 1) as f32 / range)
    }

    /// Values between which the whole bucket lies, with half a bucket to spare.
    fn bounds(self, best: f32, bucket: usize) -> [f32; 2] {
        let edge = |bucket: f64| (f64::from(best) - bucket / f64::from(self.0)) as f32;
        let low = if bucket < BUCKETS - 1 { edge(bucket as f64 + 1.0) } else { f32::MIN };
        [low, edge(bucket as f64 - 1.0)]
    }
}

/// A row of logits.
struct Row<'a, S> {
    simd: S,
    logits: &'a [f32],
    /// The last block where it is not whole, and minus infinities.
    tail: [f32; BLOCK],
    /// Number of blocks.
    blocks: usize,
    /// Multiplies the logits: the reciprocal of the temperature.
    inverse: f32,
    /// The largest tempered logit.
    best: f32,
}

impl<S: Simd> Row<'_, S> {
    #[inline(always)]
    fn block(&self, block: usize) -> &[f32; BLOCK] {
        self.logits[block * BLOCK..].first_chunk().unwrap_or(&self.tail)
    }

    /// Fills in the largest logit of each block, not-a-numbers left out, and returns the largest of all.
    #[inline(always)]
    fn find_largest(&self, largest: &mut Vec<f32>) -> f32 {
        let simd = self.simd;
        largest.clear();
        largest.resize(self.blocks.next_multiple_of(LANES), f32::NEG_INFINITY);
        let mut best = f32::NEG_INFINITY;
        for block in 0..self.blocks {
            let logits = self.block(block);
            let mut most = simd.splat(f32::NEG_INFINITY);
            for at in (0..BLOCK).step_by(LANES) {
                // SAFETY: 16 of a block's 64. `max` returns its second operand if one is not a number.
                most = simd.max(unsafe { simd.load(logits.as_ptr().add(at)) }, most);
            }
            let most = simd.max_lane(most);
            largest[block] = most;
            best = if most > best { most } else { best };
        }
        best
    }

    /// The first token with the largest tempered logit; 0 if there is none.
    #[inline(always)]
    fn first(&self, largest: &[f32]) -> u32 {
        for block in 0..self.blocks {
            if largest[block] == self.best {
                let logits = self.block(block);
                for i in 0..BLOCK.min(self.logits.len() - block * BLOCK) {
                    if logits[i] * self.inverse == self.best {
                        return (block * BLOCK + i) as u32;
                    }
                }
            }
        }
        0
    }

    /// Sixteen tempered logits of a block.
    #[inline(always)]
    fn tempered(&self, logits: &[f32; BLOCK], at: usize) -> S::F {
        debug_assert!(at + LANES <= BLOCK);
        let simd = self.simd;
        // SAFETY: 16 of a block's 64.
        let x = unsafe { simd.load(logits.as_ptr().add(at)) };
        simd.mul(x, simd.splat(self.inverse))
    }

    /// The buckets of sixteen tempered logits.
    #[inline(always)]
    fn bucket(&self, scale: Scale, value: S::F) -> S::I {
        let simd = self.simd;
        // `max` returns its second operand where something is not a number.
        let below = simd.mul(simd.sub(value, simd.splat(self.best)), simd.splat(scale.0));
        let below = simd.max(below, simd.splat(-((BUCKETS - 1) as f32)));
        simd.round(simd.sub(simd.splat(0.0), below))
    }

    /// The probabilities of sixteen tempered logits as shares of the best token's. No fused operations, which the
    /// portable set lacks.
    #[inline(always)]
    fn share(&self, value: S::F) -> S::F {
        let simd = self.simd;
        // e^x = 2^n 2^f with n an integer and |f| <= 1/2; 2^f is a series in f ln(2). e^-60 is nothing.
        let x = simd.max(simd.sub(value, simd.splat(self.best)), simd.splat(-60.0));
        let x = simd.mul(x, simd.splat(std::f32::consts::LOG2_E));
        let n = simd.round(x);
        let f = simd.sub(x, simd.float_of_int(n));
        let mut series = simd.splat(1.540_353_e-4);
        for coefficient in [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0] {
            series = simd.add(simd.mul(series, f), simd.splat(coefficient));
        }
        simd.mul(series, simd.float_of_bits(simd.shl::<23>(simd.add_i(n, simd.splat_i(127)))))
    }

    /// All bits set where a value is at least `least`, which is finite; none where it is not a number.
    #[inline(always)]
    fn at_least(&self, value: S::F, least: f32) -> S::I {
        let simd = self.simd;
        // A difference of different numbers is never 0, so its sign is right. `max` returns its second operand where
        // something is not a number.
        let value = simd.max(value, simd.splat(f32::NEG_INFINITY));
        let below = simd.shr::<31>(simd.bits(simd.sub(value, simd.splat(least))));
        simd.add_i(below, simd.splat_i(-1))
    }

    /// Moves the cut to the last token with less than the limit before it.
    #[inline(always)]
    fn narrow(&self, scratch: &mut Scratch, limit: Limit, cut: &mut Cut) {
        let (scale, least) = self.plan(scratch, limit, cut);
        match limit {
            Limit::Count(_) => self.weigh::<false>(scratch, scale, least),
            Limit::Share(_) => self.weigh::<true>(scratch, scale, least),
        }
        if cut.dropped > 0 && least == cut.value {
            let [bucket, weight] = self.bucket_and_weight(scale, limit, cut.value);
            scratch.buckets[bucket as usize] -= cut.dropped * weight;
        }
        let mut total = 0;
        for bucket in 0..BUCKETS {
            total += scratch.buckets[bucket];
        }
        let units = limit.units(total);
        if total < units {
            return;
        }
        let (mut before, mut bucket) = (0, 0);
        while before + scratch.buckets[bucket] < units {
            before += scratch.buckets[bucket];
            bucket += 1;
        }
        self.collect(scratch, scale, bucket, least, cut);
        let keys = &mut scratch.keys;
        keys.sort_unstable();
        let (mut weight, mut weighed) = (0, f32::NAN);
        let mut end = 0;
        while end < keys.len() && before < units {
            let value = value_of_key(keys[end]);
            if value != weighed {
                (weighed, weight) = (value, self.bucket_and_weight(scale, limit, value)[1]);
            }
            before += weight;
            end += 1;
        }
        // The bucket has at least the token that reaches the limit.
        let Some(&last) = keys[..end].last() else { return };
        let mut dropped = 0;
        while end < keys.len() && value_of_key(keys[end]) == weighed {
            dropped += 1;
            end += 1;
        }
        *cut = Cut { value: weighed, last: last as u32, dropped };
    }

    /// The scale of the histogram, and a value below which no token is looked at. Neither changes the outcome.
    #[inline(always)]
    fn plan(&self, scratch: &mut Scratch, limit: Limit, cut: &Cut) -> (Scale, f32) {
        let largest = &scratch.largest[..self.blocks];
        // About as far as the tokens reach: four times the mean distance of the blocks' largest.
        let (mut sum, mut count) = (0.0, 0.0);
        for block in 0..largest.len() {
            if largest[block] >= cut.value {
                sum += self.best - largest[block];
                count += 1.0;
            }
        }
        let range = 4.0 * sum / count;
        match limit {
            Limit::Count(tokens) if tokens as usize <= self.blocks => {
                // As many blocks have a token that is at least this.
                scratch.shares.clear();
                scratch.shares.extend_from_slice(largest);
                let place = (tokens as usize).saturating_sub(1);
                let (_, &mut least, _) = scratch.shares.select_nth_unstable_by(place, |a, b| b.total_cmp(a));
                let least = least.max(cut.value);
                (Scale::new(self.best - least), least)
            }
            Limit::Count(_) => (Scale::new(range), cut.value),
            Limit::Share(_) => (Scale::new(range.min(MASS_RANGE)), cut.value.max(self.best - MASS_RANGE)),
        }
    }

    /// Fills the histogram with the weights of the tokens that are at least `least`.
    #[inline(always)]
    fn weigh<const BY_MASS: bool>(&self, scratch: &mut Scratch, scale: Scale, least: f32) {
        let simd = self.simd;
        // Minus zero, so that no zero is less than it.
        let least = if least == 0.0 { -0.0 } else { least };
        let Scratch { largest, buckets: histogram, .. } = scratch;
        histogram.clear();
        histogram.resize(BUCKETS, 0);
        let Some(histogram) = histogram.first_chunk_mut::<BUCKETS>() else { return };
        let (mut buckets, mut shares, mut weights) = ([0i32; BLOCK], [0f32; BLOCK], [0u64; BLOCK]);
        for block in 0..self.blocks {
            if largest[block] < least {
                continue;
            }
            let logits = self.block(block);
            for at in (0..BLOCK).step_by(LANES) {
                let value = self.tempered(logits, at);
                let kept = self.at_least(value, least);
                let share = if BY_MASS { self.share(value) } else { simd.splat(1.0) };
                let share = simd.float_of_bits(simd.and(simd.bits(share), kept));
                // SAFETY: 16 of 64.
                unsafe {
                    simd.store(shares.as_mut_ptr().add(at), share);
                    simd.store_i(buckets.as_mut_ptr().add(at).cast(), self.bucket(scale, value));
                }
            }
            for i in 0..BLOCK {
                weights[i] = units(shares[i], BY_MASS);
            }
            for i in 0..BLOCK {
                histogram[buckets[i] as usize % BUCKETS] += weights[i];
            }
        }
    }

    /// The bucket and the weight of one tempered logit.
    #[inline(always)]
    fn bucket_and_weight(&self, scale: Scale, limit: Limit, value: f32) -> [u64; 2] {
        let simd = self.simd;
        let value = simd.splat(value);
        let (mut buckets, mut shares) = ([0i32; LANES], [1f32; LANES]);
        let by_mass = matches!(limit, Limit::Share(_));
        // SAFETY: arrays of sixteen.
        unsafe {
            simd.store_i(buckets.as_mut_ptr().cast(), self.bucket(scale, value));
            if by_mass {
                simd.store(shares.as_mut_ptr(), self.share(value));
            }
        }
        [buckets[0] as u64 % BUCKETS as u64, units(shares[0], by_mass)]
    }

    /// Collects the keys of a bucket's tokens that are at least `least` and that the cut keeps.
    #[inline(always)]
    fn collect(&self, scratch: &mut Scratch, scale: Scale, bucket: usize, least: f32, cut: &Cut) {
        let simd = self.simd;
        let Scratch { largest, keys, .. } = scratch;
        keys.clear();
        let [low, high] = scale.bounds(self.best, bucket);
        let low = low.max(least);
        let (floor, ceiling) = (simd.splat(low), simd.splat(high));
        let (mut buckets, mut values) = ([0i32; LANES], [0f32; LANES]);
        for block in 0..self.blocks {
            if largest[block] < low {
                continue;
            }
            let logits = self.block(block);
            for at in (0..BLOCK).step_by(LANES) {
                let value = self.tempered(logits, at);
                let inside = simd.sub(simd.splat(0.0), simd.max(simd.sub(floor, value), simd.sub(value, ceiling)));
                // Not-a-numbers are outside: `max` returns its second operand.
                if simd.max_lane(simd.max(inside, simd.splat(-1.0))) < 0.0 {
                    continue;
                }
                // SAFETY: arrays of sixteen.
                unsafe {
                    simd.store(values.as_mut_ptr(), value);
                    simd.store_i(buckets.as_mut_ptr().cast(), self.bucket(scale, value));
                }
                for i in 0..LANES {
                    let id = (block * BLOCK + at + i) as u32;
                    if buckets[i] as usize == bucket && values[i] >= least && cut.keeps(values[i], id) {
                        keys.push(sort_key(values[i], id));
                    }
                }
            }
        }
    }

    /// The token with the largest sum of tempered logit and noise among those that the cut keeps; `first` is the best
    /// without noise. Of equal sums that of `first` wins, then the lowest id's.
    #[inline(always)]
    fn race(&self, scratch: &mut Scratch, noise: Noise, cut: Cut, first: u32) -> u32 {
        let Scratch { largest, shares, .. } = scratch;
        self.fill_shares(largest, shares);
        let mut words = [0; BLOCK];
        noise.fill(first as usize / BLOCK, &mut words);
        let (mut winner, mut score) = (first, gumbel(words[first as usize % BLOCK]));
        let mut reach = reach_of(score);
        for block in 0..self.blocks {
            let limit = shares[block] * reach;
            // Not even the largest noise could lift a token of this block.
            if largest[block] < cut.value || limit < 0.5 {
                continue;
            }
            noise.fill(block, &mut words);
            let least = !((limit - 0.5) as u32);
            let mut most = 0;
            for i in 0..BLOCK {
                most = if words[i] > most { words[i] } else { most };
            }
            if most < least {
                continue;
            }
            let logits = self.block(block);
            for i in 0..BLOCK {
                let (id, value) = ((block * BLOCK + i) as u32, logits[i] * self.inverse);
                if words[i] < least || !cut.keeps(value, id) {
                    continue;
                }
                let sum = f64::from(value) - f64::from(self.best) + gumbel(words[i]);
                if sum > score {
                    (winner, score) = (id, sum);
                    reach = reach_of(score);
                }
            }
        }
        winner
    }

    /// The largest probability of each block, as a share of the best token's.
    #[inline(always)]
    fn fill_shares(&self, largest: &[f32], shares: &mut Vec<f32>) {
        let simd = self.simd;
        shares.clear();
        shares.resize(largest.len(), 0.0);
        for at in (0..largest.len() / LANES * LANES).step_by(LANES) {
            // SAFETY: 16 numbers from `at` on, in both.
            unsafe {
                let below = simd.sub(simd.load(largest.as_ptr().add(at)), simd.splat(self.best));
                simd.store(shares.as_mut_ptr().add(at), math::exp(simd, below));
            }
        }
    }
}

/// A token with share `p` of the best token's probability exceeds `score`, a sum of noise and distance from the best
/// token's tempered logit, only if its word is at least `2^32 - 1/2 - p * reach_of(score)`: that is
/// `-ln(u) < p e^-score` with `1 - u <= -ln(u)`. Rounding is far below the added 1e-4.
#[inline(always)]
fn reach_of(score: f64) -> f32 {
    ((-score).exp() * 4_294_967_296.0 * 1.0001) as f32
}

/// A share in multiples of 2^-40, or itself.
#[inline(always)]
fn units(share: f32, by_mass: bool) -> u64 {
    let rounding = if by_mass { MASS_ROUNDING } else { MASS_ROUNDING * (1u64 << 40) as f64 };
    (f64::from(share) + rounding).to_bits() - rounding.to_bits()
}

/// Sorts as larger values first, equal ones by id. Zeros are equal.
#[inline(always)]
fn sort_key(value: f32, id: u32) -> u64 {
    let bits = (value + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(id)
}

/// The value in a [`sort_key`].
#[inline(always)]
fn value_of_key(key: u64) -> f32 {
    let ascending = !((key >> 32) as u32);
    f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
}

/// The random words of one draw.
#[derive(Clone, Copy)]
struct Noise {
    key: [u32; 2],
}

impl Noise {
    /// The draw number, encrypted with the seed, is the key: no two draws of a seed share one.
    fn new(draw: &Draw) -> Self {
        Self { key: threefry(split(draw.seed), split(draw.drawn)) }
    }

    /// A word for each token of a block: two tokens, half a block apart, share a counter.
    #[inline(always)]
    fn fill(self, block: usize, words: &mut [u32; BLOCK]) {
        let counter = (block * (BLOCK / 2)) as u32;
        let (first, second) = words.split_at_mut(BLOCK / 2);
        for i in 0..BLOCK / 2 {
            [first[i], second[i]] = threefry(self.key, [counter + i as u32, 0]);
        }
    }
}

/// The lower word first.
fn split(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Threefry-2x32 with 20 rounds.
#[inline(always)]
fn threefry(key: [u32; 2], counter: [u32; 2]) -> [u32; 2] {
    const ROTATIONS: [[u32; 4]; 2] = [[13, 15, 26, 6], [17, 29, 16, 24]];
    let keys = [key[0], key[1], 0x1bd1_1bda ^ key[0] ^ key[1]];
    let (mut a, mut b) = (counter[0].wrapping_add(keys[0]), counter[1].wrapping_add(keys[1]));
    for group in 0..5 {
        for round in 0..4 {
            a = a.wrapping_add(b);
            b = b.rotate_left(ROTATIONS[group % 2][round]) ^ a;
        }
        a = a.wrapping_add(keys[(group + 1) % 3]);
        b = b.wrapping_add(keys[(group + 2) % 3]).wrapping_add(group as u32 + 1);
    }
    [a, b]
}

/// Standard Gumbel noise of a random word, from -3.2 to 22.9: `-ln(-ln(u))` with `u` in the middle of one of 2^32 equal
/// parts of the interval from 0 to 1.
#[inline(always)]
fn gumbel(word: u32) -> f64 {
    -ln(-ln((f64::from(word) + 0.5) / 4_294_967_296.0))
}

/// The natural logarithm of a positive normal number, to about 1e-15 relatively. It has the same bits everywhere, which
/// the standard library's does not promise.
fn ln(x: f64) -> f64 {
    // x = 2^n m with m from sqrt(1/2) to sqrt(2); ln(m) = 2 artanh((m - 1) / (m + 1)), a series.
    const SQRT_HALF: u64 = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    let n = x.to_bits().wrapping_sub(SQRT_HALF) as i64 >> 52;
    let m = f64::from_bits(x.to_bits().wrapping_sub((n << 52) as u64));
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut series = 0.0;
    let mut power = 21;
    while power >= 3 {
        series = (series + 1.0 / f64::from(power)) * square;
        power -= 2;
    }
    n as f64 * std::f64::consts::LN_2 + (2.0 * s + 2.0 * s * series)
}
