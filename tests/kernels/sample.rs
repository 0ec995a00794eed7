//! Drawn tokens against a sort, a softmax and Gumbel noise in f64.

use proptest::prelude::*;

use crate::cpu::Isa;
use crate::cpu::sample::{Draw, sample};
use crate::guard::{EDGES, Edge, Guarded};
use crate::numbers::cases;
use crate::reference::Random;
use crate::threads::workers;

/// Everything stays.
const ALL: Draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, drawn: 0 };

/// A mass that a kernel may miss by rounding.
const MASS: f64 = 3e-6;

/// Tokens that a kernel draws with everything at the edge of protected pages.
fn tokens(isa: Isa, logits: &[f32], rows: &[Draw], edge: Edge, threads: usize) -> Vec<u32> {
    let vocab = logits.len().checked_div(rows.len()).unwrap_or(7);
    let (logits, rows) = (Guarded::new(logits, edge), Guarded::new(rows, edge));
    let mut tokens = Guarded::new(&vec![u32::MAX; rows.len()], edge);
    sample(isa, &workers(threads), &logits, vocab, &rows, &mut tokens);
    tokens.to_vec()
}

/// One token, by the best instruction set.
fn token(logits: &[f32], draw: &Draw) -> u32 {
    let mut tokens = [u32::MAX];
    sample(Isa::best(), &workers(1), logits, logits.len(), std::slice::from_ref(draw), &mut tokens);
    tokens[0]
}

/// Threefry-2x32 with 20 rounds (Salmon et al. 2011), as the paper has it: a key word is added before every four rounds.
fn threefry(key: u64, counter: u64) -> [u32; 2] {
    let [k, x] = [key, counter].map(|x| [x as u32, (x >> 32) as u32]);
    let schedule = [k[0], k[1], 0x1bd1_1bda ^ k[0] ^ k[1]];
    let turns = [13, 15, 26, 6, 17, 29, 16, 24];
    let injected = |[a, b]: [u32; 2], s: usize| {
        [a.wrapping_add(schedule[s % 3]), b.wrapping_add(schedule[(s + 1) % 3]).wrapping_add(s as u32)]
    };
    let state = (0..20).fold(x, |state, round| {
        let [a, b] = if round % 4 == 0 { injected(state, round / 4) } else { state };
        let sum = a.wrapping_add(b);
        [sum, b.rotate_left(turns[round % 8]) ^ sum]
    });
    injected(state, 5)
}

/// The published answers.
#[test]
fn the_reference_generator_is_threefry() {
    assert_eq!(threefry(0, 0), [0x6b20_0159, 0x99ba_4efe]);
    assert_eq!(threefry(u64::MAX, u64::MAX), [0x1cb9_96fc, 0xbb00_2be7]);
    assert_eq!(threefry(0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a88), [0xc492_3a9c, 0x483d_f7a0]);
}

/// Gumbel noise of a token: tokens `64 b + i` and `64 b + 32 + i` have the words of counter `32 b + i`.
fn noise(draw: &Draw, id: usize) -> f64 {
    let [low, high] = threefry(draw.seed, draw.drawn).map(u64::from);
    let (block, place) = (id / 64, id % 64);
    let word = threefry(high << 32 | low, (block * 32 + place % 32) as u64)[place / 32];
    -(-((f64::from(word) + 0.5) / 2f64.powi(32)).ln()).ln()
}

/// A token and what is known of it.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: usize,
    /// Tempered logit minus the largest.
    value: f64,
    /// Its share of the mass of what top-k left.
    mass: f64,
    /// Stays for certain; what does not may stay, so close is it to a limit.
    certain: bool,
}

/// What the filters leave, the most likely first.
fn candidates(logits: &[f32], draw: &Draw) -> Vec<Candidate> {
    let certain = |id: usize| vec![Candidate { id, value: 0.0, mass: 1.0, certain: true }];
    let inverse = 1.0 / draw.temperature;
    let mut order: Vec<usize> = (0..logits.len()).filter(|&id| logits[id] > f32::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("numbers"));
    let Some(&first) = order.first() else {
        return certain(logits.iter().position(|x| !x.is_nan()).unwrap_or(0));
    };
    if draw.temperature < 1e-5 || !(logits[first] * inverse).is_finite() {
        return certain(first);
    }
    // Zeros are equal.
    let value = |id: usize| f64::from(logits[id] * inverse) + 0.0;
    order.retain(|&id| value(id) > f64::NEG_INFINITY);
    // Tempering may make equal what was not.
    order.sort_by(|&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
    let (best, least) = (value(order[0]), f64::from(draw.min_p).ln());
    if draw.top_k > 0 {
        order.truncate(draw.top_k as usize);
    }
    let total: f64 = order.iter().map(|&id| (value(id) - best).exp()).sum();
    let slack = 1e-6 * (1.0 + best.abs() + if least.is_finite() { least.abs() } else { 0.0 });
    let share = if draw.top_p < 1.0 { f64::from(draw.top_p) } else { f64::INFINITY };
    let (mut left, mut before) = (Vec::new(), 0.0);
    for (rank, &id) in order.iter().enumerate() {
        let mass = (value(id) - best).exp() / total;
        let above = if value(id) == best { f64::INFINITY } else { value(id) - best - least };
        if (rank > 0 && before >= share + MASS) || above < -slack {
            break;
        }
        let certain = (rank == 0 || before < share - MASS) && above > slack;
        left.push(Candidate { id, value: value(id) - best, mass, certain });
        before += mass;
    }
    left
}

/// Whether `token` is what the draw gives, up to rounding.
fn check(logits: &[f32], draw: &Draw, token: u32) -> Result<(), String> {
    check_among(&candidates(logits, draw), draw, token)
}

fn check_among(candidates: &[Candidate], draw: &Draw, token: u32) -> Result<(), String> {
    let sum = |candidate: &Candidate| candidate.value + noise(draw, candidate.id);
    let Some(chosen) = candidates.iter().find(|candidate| candidate.id == token as usize) else {
        return Err(format!("token {token} does not stay ({} do)", candidates.len()));
    };
    let certain = candidates.iter().filter(|candidate| candidate.certain);
    let best = certain.max_by(|a, b| sum(a).total_cmp(&sum(b))).ok_or("nothing stays")?;
    if sum(chosen) < sum(best) - 1e-9 {
        return Err(format!("{chosen:?} has {} and {best:?} has {}", sum(chosen), sum(best)));
    }
    Ok(())
}

/// Rows of logits, and how they are drawn from.
#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    seed: u64,
    shape: Shape,
    rows: Vec<Draw>,
}

/// What logits are like.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// Normal, times this.
    Normal(f32),
    /// As of a model that is sure: a few far above the others, rounded to bf16.
    Peaked,
    /// Whole numbers, few different ones.
    Ties(usize),
    /// Some infinite, some not numbers.
    Ill,
    /// Any bits.
    Any,
}

impl Case {
    fn logits(&self) -> Vec<f32> {
        let mut random = Random(self.seed);
        let mut one = |_| match self.shape {
            Shape::Normal(size) => random.normal() as f32 * size,
            Shape::Peaked => {
                let x = 3.0 * random.normal() + if random.below(20) == 0 { 12.0 } else { 0.0 };
                half::bf16::from_f64(x).to_f32()
            }
            // Zeros of both signs.
            Shape::Ties(values) => (random.below(values) as f32 - 2.0) * if random.below(2) == 0 { 1.0 } else { -1.0 },
            Shape::Ill => match random.below(40) {
                0..=9 => f32::NAN,
                10 if random.below(200) == 0 => f32::INFINITY,
                11..=16 => f32::NEG_INFINITY,
                _ => random.normal() as f32 * 4.0,
            },
            Shape::Any => f32::from_bits(random.bits() as u32),
        };
        (0..self.vocab * self.rows.len()).map(&mut one).collect()
    }
}

fn draws() -> impl Strategy<Value = Draw> {
    let temperature = prop_oneof![
        1 => Just(0f32),
        2 => Just(1f32),
        6 => 0.05f32..3.0,
        1 => prop::sample::select(&[1e-5f32, 9.9e-6, 1e-3, 100.0, 1e30, f32::INFINITY][..]),
    ];
    let top_k = prop_oneof![3 => Just(0u32), 1 => Just(1u32), 3 => 2u32..60, 2 => 60u32..5000, 1 => Just(u32::MAX)];
    let top_p =
        prop_oneof![3 => Just(1f32), 4 => 0.01f32..1.0, 1 => prop::sample::select(&[0f32, 1e-9, 0.999_999][..])];
    let min_p = prop_oneof![3 => Just(0f32), 4 => 0.0001f32..0.5, 1 => prop::sample::select(&[1f32, 1e-40, 0.9][..])];
    (temperature, top_k, top_p, min_p, any::<u64>(), prop_oneof![0u64..100, any::<u64>()]).prop_map(
        |(temperature, top_k, top_p, min_p, seed, drawn)| Draw { temperature, top_k, top_p, min_p, seed, drawn },
    )
}

fn shapes() -> impl Strategy<Value = Shape> {
    prop_oneof![
        3 => prop::sample::select(&[0.001f32, 0.1, 1.0, 3.0, 10.0, 1e4, 1e30, 1e-40][..]).prop_map(Shape::Normal),
        2 => Just(Shape::Peaked),
        2 => (1usize..12).prop_map(Shape::Ties),
        2 => Just(Shape::Ill),
        1 => Just(Shape::Any),
    ]
}

fn arbitrary() -> impl Strategy<Value = Case> {
    let vocab = prop_oneof![2 => 1usize..200, 3 => 200usize..5000];
    (vocab, any::<u64>(), shapes(), prop::collection::vec(draws(), 0..6)).prop_map(|(vocab, seed, shape, rows)| Case {
        vocab,
        seed,
        shape,
        rows,
    })
}

/// That all instruction sets draw the same tokens, at both edges, and that these are right.
fn right_everywhere(logits: &[f32], rows: &[Draw], threads: usize) -> Result<Vec<u32>, TestCaseError> {
    let drawn = tokens(Isa::SCALAR, logits, rows, Edge::End, threads);
    for isa in Isa::available() {
        for edge in EDGES {
            prop_assert_eq!(&tokens(isa, logits, rows, edge, threads), &drawn, "{:?} {:?}", isa, edge);
        }
    }
    let vocab = logits.len() / rows.len().max(1);
    for ((logits, draw), &token) in logits.chunks_exact(vocab.max(1)).zip(rows).zip(&drawn) {
        check(logits, draw, token).map_err(|miss| TestCaseError::fail(format!("{draw:?}: {miss}")))?;
    }
    Ok(drawn)
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn tokens_are_those_of_the_reference(case in arbitrary(), threads in 1usize..=3) {
        right_everywhere(&case.logits(), &case.rows, threads)?;
    }

    /// A row's token depends neither on the other rows nor on its place.
    #[test]
    fn rows_do_not_depend_on_each_other(case in arbitrary(), threads in 2usize..=3, order in any::<u64>()) {
        let (logits, vocab) = (case.logits(), case.vocab);
        let row = |row: usize| &logits[row * vocab..(row + 1) * vocab];
        for isa in Isa::available() {
            let together = tokens(isa, &logits, &case.rows, Edge::End, threads);
            for (i, draw) in case.rows.iter().enumerate() {
                let alone = tokens(isa, row(i), std::slice::from_ref(draw), Edge::Begin, 1);
                prop_assert_eq!(alone[0], together[i], "{:?}: row {}", isa, i);
            }
            let order = Random(order).permutation(case.rows.len());
            let moved: Vec<f32> = order.iter().flat_map(|&i| row(i)).copied().collect();
            let draws: Vec<Draw> = order.iter().map(|&i| case.rows[i]).collect();
            let expected: Vec<u32> = order.iter().map(|&i| together[i]).collect();
            prop_assert_eq!(tokens(isa, &moved, &draws, Edge::End, threads), expected, "{:?}", isa);
        }
    }
}

proptest! {
    #![proptest_config(cases(6))]

    #[test]
    fn tokens_of_a_large_vocabulary_are_those_of_the_reference(
        (draws, shape) in (prop::collection::vec(draws(), 2), shapes()),
        (seed, threads, top_k) in (any::<u64>(), 1usize..=3, 2000u32..100_000),
    ) {
        let limits = Draw { top_k, top_p: 0.9, ..draws[0] };
        let rows = vec![draws[0], draws[1], limits, Draw { top_p: 0.95, seed, ..ALL }];
        let case = Case { vocab: 152_003, seed, shape, rows };
        right_everywhere(&case.logits(), &case.rows, threads)?;
    }
}

/// The tokens of many draws: seeds from 0 on and the first draws of each.
fn many(logits: &[f32], draw: &Draw, seeds: u64, draws: u64) -> Vec<u32> {
    let rows: Vec<Draw> = (0..seeds)
        .flat_map(|seed| (0..draws).map(move |drawn| (seed, drawn)))
        .map(|(seed, drawn)| Draw { seed, drawn, ..*draw })
        .collect();
    let logits = logits.repeat(rows.len());
    let mut tokens = vec![0; rows.len()];
    sample(Isa::best(), &workers(2), &logits, logits.len() / rows.len(), &rows, &mut tokens);
    tokens
}

/// The different tokens that are drawn, in order.
fn support(logits: &[f32], draw: &Draw) -> Vec<u32> {
    let mut tokens = many(logits, draw, 40, 50);
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn filters_keep_what_they_should() {
    let equal = [0.5f32; 10];
    assert_eq!(support(&equal, &ALL), (0..10).collect::<Vec<_>>());
    assert_eq!(support(&equal, &Draw { top_k: 3, ..ALL }), [0, 1, 2], "equals by id");
    assert_eq!(support(&equal, &Draw { top_p: 0.35, ..ALL }), [0, 1, 2, 3], "less than 0.35 before");
    assert_eq!(support(&equal, &Draw { top_p: 0.0, ..ALL }), [0], "the first always");
    assert_eq!(support(&equal, &Draw { min_p: 1.0, ..ALL }).len(), 10, "as likely as the best");
    // Of two tokens one has a half; of four, two have.
    assert_eq!(support(&[1.0; 4], &Draw { top_k: 2, top_p: 0.5, ..ALL }), [0], "measured on what top-k left");
    assert_eq!(support(&[1.0; 4], &Draw { top_p: 0.5, ..ALL }), [0, 1]);
    // Of six equals top-k keeps four, of which three have less than 0.7 before them.
    let six = [-9.0, 2.0, 2.0, 2.0, -9.0, 2.0, 2.0, 2.0];
    assert_eq!(support(&six, &Draw { top_k: 4, top_p: 0.7, ..ALL }), [1, 2, 3]);
    let steps = [0.0, 3.0, 1.0, 2.0];
    assert_eq!(support(&steps, &Draw { min_p: 0.3, ..ALL }), [1, 3], "e^-1 = 0.37, e^-2 = 0.14");
    assert_eq!(support(&steps, &Draw { min_p: 0.3, temperature: 2.0, ..ALL }), [1, 2, 3], "after the temperature");
    assert_eq!(support(&steps, &Draw { min_p: 0.3, top_k: 1, ..ALL }), [1]);
    // Masses of 0.64, 0.24, 0.09 and 0.03; top-p is measured before min-p takes any.
    assert_eq!(support(&steps, &Draw { top_p: 0.9, min_p: 0.05, ..ALL }), [1, 2, 3]);
    assert_eq!(support(&steps, &Draw { top_p: 0.86, min_p: 0.01, ..ALL }), [1, 3]);
    let zeros = [-0.0f32, 0.0, -0.0, 0.0, -1.0];
    assert_eq!(support(&zeros, &Draw { top_k: 3, ..ALL }), [0, 1, 2], "zeros are equal");
    assert_eq!(support(&zeros, &Draw { top_k: 3, top_p: 0.5, ..ALL }), [0, 1]);
    assert_eq!(support(&zeros, &Draw { top_k: 4, top_p: 0.99, ..ALL }), [0, 1, 2, 3]);
}

/// All tokens that stay are drawn some time, and no other.
#[test]
fn exactly_the_tokens_that_stay_are_drawn() {
    let logits: Vec<f32> = Random(5).normals(300).iter().map(|x| x * 0.5).collect();
    let filters = [
        Draw { top_k: 37, ..ALL },
        Draw { top_p: 0.2, ..ALL },
        Draw { min_p: 0.4, ..ALL },
        Draw { temperature: 2.0, top_k: 50, top_p: 0.8, min_p: 0.4, ..ALL },
    ];
    for draw in filters {
        let candidates = candidates(&logits, &draw);
        assert!(candidates.iter().all(|candidate| candidate.certain), "{draw:?} is close to a limit");
        let mut kept: Vec<u32> = candidates.iter().map(|candidate| candidate.id as u32).collect();
        kept.sort_unstable();
        assert!((10..100).contains(&kept.len()), "{draw:?} keeps {}", kept.len());
        assert_eq!(support(&logits, &draw), kept, "{draw:?}");
    }
}

/// Many tokens far below the best have a part in the mass.
#[test]
fn unlikely_tokens_count_together() {
    let mut logits = vec![0f32; 150_000];
    for (best, top_p) in [(11.0, 0.6), (13.0, 0.9)] {
        logits[70_000] = best;
        let draw = Draw { top_p, ..ALL };
        let candidates = candidates(&logits, &draw);
        assert!((60_000..120_000).contains(&candidates.len()), "{}", candidates.len());
        let tokens: Vec<u32> = (0..40).map(|seed| token(&logits, &Draw { seed, ..draw })).collect();
        for (seed, &token) in (0..).zip(&tokens) {
            assert_eq!(check_among(&candidates, &Draw { seed, ..draw }, token), Ok(()));
        }
        assert!(tokens.iter().filter(|&&token| token != 70_000).count() > 3);
    }
}

/// Limits are where they should be to 2e-6.
#[test]
fn limits_are_exact() {
    for share in [0.9f32, 0.72, 0.5, 0.3, 0.11, 0.05] {
        let slack = 2e-6;
        let logits = [f64::from(share).ln() + slack, 0.0, f64::from(share).ln() - slack].map(|x| x as f32);
        assert_eq!(support(&logits, &Draw { min_p: share, ..ALL }), [0, 1], "min-p {share}");
        // Masses of `share` and the rest: the second stays if it is not wholly within top-p.
        let rest = (1.0 / f64::from(share) - 1.0).ln() as f32;
        let (most, order) = if rest > 0.0 { (1.0 - share, [1, 0]) } else { (share, [0, 1]) };
        assert_eq!(support(&[0.0, rest], &Draw { top_p: most - 2e-6, ..ALL }), order[..1], "top-p {most}");
        assert_eq!(support(&[0.0, rest], &Draw { top_p: most + 2e-6, ..ALL }), [0, 1], "top-p {most}");
    }
}

#[test]
fn ill_logits_give_tokens_in_range() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let filters = [
        ALL,
        Draw { temperature: 0.0, ..ALL },
        Draw { temperature: nan, ..ALL },
        Draw { temperature: -1.0, ..ALL },
        Draw { temperature: inf, ..ALL },
        Draw { top_k: 2, top_p: 0.5, min_p: 0.1, ..ALL },
        Draw { top_p: nan, min_p: nan, ..ALL },
        Draw { top_p: -1.0, min_p: 2.0, ..ALL },
    ];
    for draw in filters {
        for seed in 0..50 {
            let draw = Draw { seed, ..draw };
            assert_eq!(token(&[nan], &draw), 0);
            assert_eq!(token(&[nan; 100], &draw), 0);
            assert_eq!(token(&[-inf; 100], &draw), 0);
            assert_eq!(token(&[nan, -inf, nan, 2.0, nan], &draw), 3);
            assert_eq!(token(&[1.0, nan, inf, -inf, inf], &draw), 2, "{draw:?}");
            let mut sparse = vec![-inf; 1000];
            (sparse[700], sparse[999]) = (1.0, 1.0);
            assert!([700, 999].contains(&token(&sparse, &draw)), "{draw:?}");
        }
    }
}

#[test]
fn without_temperature_the_first_of_the_largest_is_chosen() {
    for isa in Isa::available() {
        for vocab in [1usize, 15, 16, 64, 65, 1000, 152_064] {
            let mut random = Random(vocab as u64);
            let mut logits: Vec<f32> = (0..vocab).map(|_| random.below(1000) as f32).collect();
            let most = logits.iter().copied().fold(0.0, f32::max);
            let first = logits.iter().position(|&x| x == most).expect("there is one");
            let greedy = Draw { temperature: 0.0, top_k: 5, top_p: 0.5, min_p: 0.5, seed: 1, drawn: 2 };
            assert_eq!(tokens(isa, &logits, &[greedy], Edge::End, 1), [first as u32], "{isa:?}");
            *logits.last_mut().expect("not empty") = 2000.0;
            assert_eq!(tokens(isa, &logits, &[greedy], Edge::End, 1), [vocab as u32 - 1], "{isa:?}");
        }
    }
}

/// Pearson's statistic over its degrees of freedom, in standard deviations above its mean. Cells with few expected are
/// put together.
fn excess(counts: &[usize], expected: &[f64]) -> f64 {
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by(|&a, &b| expected[a].total_cmp(&expected[b]));
    let (mut statistic, mut cells) = (0.0, 0.0f64);
    let (mut found, mut wanted) = (0.0, 0.0);
    for (i, &cell) in order.iter().enumerate() {
        found += counts[cell] as f64;
        wanted += expected[cell];
        if wanted >= 10.0 || i + 1 == order.len() {
            statistic += (found - wanted) * (found - wanted) / wanted;
            cells += 1.0;
            (found, wanted) = (0.0, 0.0);
        }
    }
    let freedom = cells - 1.0;
    (statistic - freedom) / (2.0 * freedom).sqrt()
}

fn histogram(tokens: &[u32], vocab: usize) -> Vec<usize> {
    let mut counts = vec![0; vocab];
    tokens.iter().for_each(|&token| counts[token as usize] += 1);
    counts
}

/// What `draws` draws should give.
fn expected(logits: &[f32], draw: &Draw, draws: usize) -> Vec<f64> {
    let kept = candidates(logits, draw);
    let total: f64 = kept.iter().map(|candidate| candidate.mass).sum();
    let mut expected = vec![0.0; logits.len()];
    for candidate in kept {
        assert!(candidate.certain);
        expected[candidate.id] = candidate.mass / total * draws as f64;
    }
    expected
}

/// Draws are distributed as they should, over seeds and over the draws of a seed; other distributions are noticed.
#[test]
fn tokens_are_drawn_with_their_probabilities() {
    let logits = Random(11).normals(150);
    let filters = [
        ALL,
        Draw { temperature: 0.6, ..ALL },
        Draw { temperature: 1.2, top_k: 40, ..ALL },
        Draw { top_p: 0.7, ..ALL },
        Draw { temperature: 1.5, top_k: 100, top_p: 0.9, min_p: 0.05, ..ALL },
    ];
    for draw in filters {
        for (seeds, draws) in [(40_000, 1), (1, 40_000), (200, 200)] {
            let counts = histogram(&many(&logits, &draw, seeds, draws), logits.len());
            let admits = |draw: &Draw| {
                let expected = expected(&logits, draw, 40_000);
                let impossible = counts.iter().zip(&expected).any(|(&count, &expected)| count > 0 && expected == 0.0);
                !impossible && excess(&counts, &expected) < 4.5
            };
            assert!(admits(&draw), "{draw:?}, {seeds} seeds");
            let other = Draw { temperature: draw.temperature * 1.2, ..draw };
            assert!(!admits(&other), "{draw:?}, {seeds} seeds: a higher temperature is not noticed");
        }
    }
}

/// Tokens of neighbouring draws and of neighbouring seeds have nothing to do with each other.
#[test]
fn draws_are_independent() {
    let logits = [0.0f32; 7];
    let pairs = |first: &[u32], second: &[u32]| {
        let pairs: Vec<u32> = first.iter().zip(second).map(|(a, b)| a * 7 + b).collect();
        excess(&histogram(&pairs, 49), &[first.len() as f64 / 49.0; 49])
    };
    let (by_seed, by_draw) = (many(&logits, &ALL, 20_001, 1), many(&logits, &ALL, 1, 20_001));
    for tokens in [&by_seed, &by_draw] {
        let apart = pairs(&tokens[1..], &tokens[..20_000]);
        assert!(apart < 4.5, "{apart}");
        assert!(pairs(tokens, tokens) > 1000.0, "what depends is noticed");
    }
    assert!(pairs(&by_seed, &by_draw) < 4.5);
}

/// A seed gives the same tokens on all processors, and from version to version.
#[test]
fn seeds_keep_their_tokens() {
    let mut random = Random(1);
    let logits: Vec<f32> = (0..1000).map(|_| 2.0 * random.rough() as f32).collect();
    let filters = [
        ALL,
        Draw { temperature: 0.7, ..ALL },
        Draw { top_k: 20, ..ALL },
        Draw { top_p: 0.8, ..ALL },
        Draw { temperature: 1.3, top_k: 100, top_p: 0.9, min_p: 0.1, ..ALL },
    ];
    let expected = [
        [923, 949, 959, 676, 534, 858],
        [828, 845, 959, 676, 534, 858],
        [828, 845, 696, 676, 206, 982],
        [923, 949, 959, 676, 534, 858],
        [923, 628, 959, 676, 813, 858],
    ];
    for isa in Isa::available() {
        for (draw, expected) in filters.iter().zip(&expected) {
            let rows: Vec<Draw> = (0..6).map(|i| Draw { seed: i % 2, drawn: i / 2, ..*draw }).collect();
            assert_eq!(tokens(isa, &logits.repeat(6), &rows, Edge::End, 1), expected, "{isa:?} {draw:?}");
        }
    }
}

/// The reference refuses what is drawn with slightly other parameters.
#[test]
fn the_reference_notices_small_errors() {
    let case = Case { vocab: 2000, seed: 3, shape: Shape::Normal(1.0), rows: vec![ALL] };
    let logits = case.logits();
    let right = Draw { temperature: 0.9, top_k: 60, top_p: 0.9, ..ALL };
    let nucleus = Draw { top_p: 0.5, ..ALL };
    let likely = Draw { min_p: 0.2, ..ALL };
    let pairs = [
        ("temperature", right, Draw { temperature: 0.91, ..right }),
        ("top-k", Draw { top_p: 1.0, ..right }, Draw { top_k: 61, top_p: 1.0, ..right }),
        ("top-k before top-p", right, Draw { top_k: 0, ..right }),
        ("top-p", nucleus, Draw { top_p: 0.505, ..nucleus }),
        ("min-p", likely, Draw { min_p: 0.19, ..likely }),
        ("seed", right, Draw { seed: 1 << 40, ..right }),
        ("draws before", right, Draw { drawn: 1 << 40, ..right }),
    ];
    let misses = |right: &Draw, wrong: &Draw| {
        let one = |i: u64| {
            let drawn = token(&logits, &Draw { seed: wrong.seed + i, ..*wrong });
            check(&logits, &Draw { seed: right.seed + i, ..*right }, drawn).is_err()
        };
        (0..400).filter(|&i| one(i)).count()
    };
    for (what, right, wrong) in &pairs {
        assert_eq!(misses(right, right), 0, "{what}");
        assert!(misses(right, wrong) > 0, "{what}");
    }
}

/// Sizes that do not agree panic before anything is written.
#[test]
fn sizes_that_do_not_agree_are_refused() {
    let logits = [1f32; 12];
    let refused = |logits: &[f32], vocab: usize, rows: usize, len: usize| {
        let mut tokens = vec![77; len];
        let rows = vec![ALL; rows];
        let run = || sample(Isa::best(), &workers(2), logits, vocab, &rows, &mut tokens);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        assert!(outcome.is_ok() || tokens.iter().all(|&token| token == 77), "written before it was refused");
        outcome.is_err()
    };
    assert!(!refused(&logits, 4, 3, 3) && !refused(&logits, 12, 1, 1) && !refused(&[], 5, 0, 0));
    assert!(refused(&logits, 4, 3, 2) && refused(&logits, 4, 3, 4), "tokens");
    assert!(refused(&logits[..11], 4, 3, 3) && refused(&logits, 4, 2, 2) && refused(&logits, 5, 3, 3), "logits");
    assert!(refused(&[], 0, 0, 0) && refused(&[], 0, 3, 3) && refused(&[], (1 << 23) + 1, 0, 0), "vocabulary");
    assert!(refused(&logits, usize::MAX, 2, 2));
}
