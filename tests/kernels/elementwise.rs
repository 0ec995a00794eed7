//! Norms, rotary positions and rows of tables against f64.

use proptest::prelude::*;

use crate::case::formats;
use crate::cpu::Isa;
use crate::cpu::elementwise::{LayerNorm, RmsNorm, Rotary, take_rows};
use crate::cpu::floats::Rows;
use crate::guard::{EDGES, Edge, Guarded};
use crate::numbers::{Numbers, Placed, TYPES, Type, bits, cases, rounded};
use crate::reference::{Expected, Random, Weights, first_miss};
use crate::threads::workers;

/// Runs `kernel` into f32 at both edges, and into a 16-bit type; checks that only rounding differs.
fn outputs(kind: Type, run: impl Fn(Edge, Type) -> Numbers) -> Result<Vec<f32>, TestCaseError> {
    let [Numbers::F32(end), Numbers::F32(begin)] = EDGES.map(|edge| run(edge, Type::F32)) else {
        unreachable!("asked for f32")
    };
    prop_assert_eq!(bits(&end), bits(&begin), "depends on where buffers lie");
    for edge in EDGES {
        prop_assert_eq!(run(edge, kind), rounded(kind, &end), "rounding");
    }
    Ok(end)
}

fn within(isa: Isa, found: &[f32], expected: &[Expected], width: usize) -> Result<(), TestCaseError> {
    first_miss(found, expected, width).map_err(|miss| TestCaseError::fail(format!("{isa:?}: {miss}")))
}

/// The norm of a row in f64. All terms of the sum are positive, so a kernel's relative error is `1e-6 * sqrt(width)`.
fn normed(x: &[f64], weight: &Numbers, eps: f32) -> Vec<Expected> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    let one = |(i, x): (usize, &f64)| {
        let value = x * scale * weight.get(i);
        Expected { value, bound: 1e-6 * (x.abs() * scale * weight.get(i)).abs() * (weight.len() as f64).sqrt() + 1e-44 }
    };
    x.iter().enumerate().map(one).collect()
}

fn widened(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The norm of rows by a kernel.
fn norm(isa: Isa, x: &[f32], weight: &Numbers, eps: f32, (edge, kind): (Edge, Type), threads: usize) -> Numbers {
    let (x, weight) = (Guarded::new(x, edge), weight.place(edge));
    let mut out = Placed::output(kind, x.len(), edge);
    RmsNorm { weight: weight.floats(), eps }.run(isa, &workers(threads), &x, out.floats_mut());
    out.numbers()
}

/// A rotation to make.
#[derive(Debug, Clone)]
struct Turn {
    width: usize,
    pairs: usize,
    traditional: bool,
    magnitude: f32,
    frequencies: Vec<f32>,
    norm: Option<(Numbers, f32)>,
    /// Before the norm.
    turned_first: bool,
    heads: usize,
    positions: Vec<usize>,
    /// Numbers between the rows of the input.
    gap: usize,
}

fn turns() -> impl Strategy<Value = Turn> {
    let width = prop_oneof![2 => prop::sample::select(&[64usize, 80, 128, 256][..]), 1 => 1usize..70];
    let positions = prop::collection::vec(prop_oneof![0usize..100, 0usize..99_999], 0..12);
    let options =
        (any::<bool>(), prop_oneof![Just(1f32), 0.5f32..2.0], any::<bool>(), prop::sample::select(&TYPES[..]));
    let shape = (width, 0f64..=1.0, 1usize..6, 0usize..3);
    (any::<u64>(), shape, positions, options).prop_map(
        |(seed, (width, part, heads, gap), positions, (traditional, magnitude, normed, kind))| {
            let mut random = Random(seed);
            // All dimensions in half of the cases.
            let pairs = ((width / 2) as f64 * (part * 2.0).min(1.0)) as usize;
            let base = 10_000f64 * (1.0 + 100.0 * random.uniform());
            let frequencies = (0..pairs).map(|i| base.powf(-(i as f64) / pairs as f64) as f32).collect();
            let weight = Numbers::new(kind, (0..width).map(|_| 1.0 + 0.3 * random.normal()));
            let norm = normed.then_some((weight, 1e-6));
            let turned_first = seed % 3 == 0;
            Turn { width, pairs, traditional, magnitude, frequencies, norm, turned_first, heads, positions, gap }
        },
    )
}

impl Turn {
    /// Numbers of a token.
    fn row(&self) -> usize {
        self.heads * self.width
    }

    fn input(&self, random: &mut Random) -> Vec<f32> {
        random.normals(self.positions.len() * self.row())
    }

    fn run(&self, isa: Isa, x: &[f32], (edge, kind): (Edge, Type), threads: usize) -> Numbers {
        let weight = self.norm.as_ref().map(|(weight, _)| weight.place(edge));
        let norm = self.norm.as_ref().zip(weight.as_ref());
        let norm = norm.map(|((_, eps), weight)| RmsNorm { weight: weight.floats(), eps: *eps });
        let stride = self.row() + self.gap;
        let apart: Vec<f32> =
            x.chunks_exact(self.row()).flat_map(|row| row.iter().copied().chain(vec![f32::NAN; self.gap])).collect();
        let x = Guarded::new(&apart[..apart.len().saturating_sub(self.gap)], edge);
        let x = Rows { numbers: &x, width: self.row(), stride };
        let frequencies = Guarded::new(&self.frequencies, edge);
        let positions = Guarded::new(&self.positions, edge);
        let Turn { width, traditional, magnitude, heads, turned_first, .. } = *self;
        let dims = 2 * self.pairs;
        let rotary = Rotary { width, dims, frequencies: &frequencies, traditional, magnitude, norm, turned_first };
        let mut out = Placed::output(kind, self.positions.len() * heads * width, edge);
        rotary.run(isa, &workers(threads), x, &positions, out.floats_mut());
        out.numbers()
    }

    /// In f64, with the angles of f32: frequency times position, rounded. Sines may miss by 2e-6.
    fn reference(&self, x: &[f32]) -> Vec<Expected> {
        let mut out = Vec::new();
        for (token, &position) in x.chunks_exact(self.row()).zip(&self.positions) {
            for head in token.chunks_exact(self.width) {
                let mut row: Vec<Expected> =
                    head.iter().map(|&x| Expected { value: f64::from(x), bound: 0.0 }).collect();
                if self.turned_first {
                    self.turn(&mut row, position);
                    out.extend(self.normed(row));
                } else {
                    let mut row = self.normed(row);
                    self.turn(&mut row, position);
                    out.extend(row);
                }
            }
        }
        out
    }

    fn turn(&self, row: &mut [Expected], position: usize) {
        for pair in 0..self.pairs {
            let [i, j] = if self.traditional { [2 * pair, 2 * pair + 1] } else { [pair, pair + self.pairs] };
            let (sine, cosine) = f64::from(self.frequencies[pair] * position as f32).sin_cos();
            let (a, b, magnitude) = (row[i], row[j], f64::from(self.magnitude));
            let size = a.value.abs() + b.value.abs();
            let bound = (a.bound + b.bound + 2e-6 * size) * magnitude;
            row[i] = Expected { value: (a.value * cosine - b.value * sine) * magnitude, bound };
            row[j] = Expected { value: (a.value * sine + b.value * cosine) * magnitude, bound };
        }
    }

    /// What is off before stays off, and the mean with it.
    fn normed(&self, row: Vec<Expected>) -> Vec<Expected> {
        let Some((weight, eps)) = &self.norm else { return row };
        let values: Vec<f64> = row.iter().map(|x| x.value).collect();
        let squares = values.iter().map(|x| x * x).sum::<f64>() + f64::from(*eps) * values.len() as f64;
        let scale = (values.len() as f64 / squares).sqrt();
        let drift = row.iter().map(|x| x.value.abs() * x.bound).sum::<f64>() / squares;
        let finished = normed(&values, weight, *eps).into_iter().zip(&row).enumerate();
        finished
            .map(|(i, (out, x))| {
                let bound = out.bound + x.bound * scale * weight.get(i).abs() + out.value.abs() * drift;
                Expected { bound, ..out }
            })
            .collect()
    }
}

proptest! {
    #![proptest_config(cases(100))]

    #[test]
    fn norms_are_within_the_bound(
        (rows, width) in prop_oneof![
            4 => (0usize..12, 1usize..150),
            1 => (1usize..4, 150usize..3000),
            1 => (100usize..200, 300usize..400),
        ],
        kind in prop::sample::select(&TYPES[..]),
        size in prop::sample::select(&[1.0f32, 1e-30, 1e-10, 1e10, 1e15][..]),
        eps in prop::sample::select(&[0f32, 1e-6, 1e-5, 1.0][..]),
        (threads, seed) in (1usize..=3, any::<u64>()),
    ) {
        let mut random = Random(seed);
        let weight = Numbers::new(kind, (0..width).map(|_| 1.0 + random.normal()));
        let mut x = random.normals(rows * width);
        // Squares of small numbers are lost: they count for nothing beside an epsilon.
        let size = if eps == 0.0 { size.max(1e-10) } else { size };
        x.iter_mut().for_each(|x| *x *= size);
        let expected: Vec<Expected> = x.chunks_exact(width).flat_map(|x| normed(&widened(x), &weight, eps)).collect();
        for isa in Isa::available() {
            let run = |edge, kind| norm(isa, &x, &weight, eps, (edge, kind), threads);
            let found = outputs(TYPES[1 + seed as usize % 2], run)?;
            within(isa, &found, &expected, width)?;
            // Alone a row has the same bits.
            for _ in 0..rows.min(2) {
                let row = random.below(rows);
                let alone = norm(isa, &x[row * width..(row + 1) * width], &weight, eps, (Edge::End, Type::F32), 1);
                prop_assert_eq!(alone, Numbers::F32(found[row * width..(row + 1) * width].to_vec()), "{:?}", isa);
            }
        }
    }

    #[test]
    fn layer_norms_are_within_the_bound(
        (rows, width) in prop_oneof![4 => (0usize..12, 2usize..150), 1 => (1usize..4, 150usize..3000)],
        kind in prop::sample::select(&TYPES[..]),
        (biased, mean, eps) in (any::<bool>(), 0f32..10.0, prop::sample::select(&[1e-12f32, 1e-5, 1.0][..])),
        (threads, seed) in (1usize..=3, any::<u64>()),
    ) {
        let mut random = Random(seed);
        let mut numbers = |around: f64| Numbers::new(kind, (0..width).map(|_| around + random.normal()));
        let (weight, bias) = (numbers(1.0), numbers(0.0));
        let x: Vec<f32> = random.normals(rows * width).iter().map(|x| x + mean).collect();
        // The mean loses bits of numbers around it.
        let of_row = |x: &[f32]| -> Vec<Expected> {
            let x = widened(x);
            let mean = x.iter().sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (variance + f64::from(eps)).sqrt();
            let size = x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
            let one = |(i, x): (usize, &f64)| {
                let added = if biased { bias.get(i) } else { 0.0 };
                let value = (x - mean) * scale * weight.get(i) + added;
                let relative = 2e-6 * (width as f64).sqrt();
                let bound = relative * (size * scale * weight.get(i)).abs() * (1.0 + size * scale) + 1e-6 * value.abs();
                Expected { value, bound: bound + 1e-6 * added.abs() }
            };
            x.iter().enumerate().map(one).collect()
        };
        let expected: Vec<Expected> = x.chunks_exact(width).flat_map(of_row).collect();
        for isa in Isa::available() {
            let run = |edge, kind| {
                let (x, weight, bias) = (Guarded::new(&x, edge), weight.place(edge), bias.place(edge));
                let mut out = Placed::output(kind, x.len(), edge);
                let norm = LayerNorm { weight: weight.floats(), bias: biased.then(|| bias.floats()), eps };
                norm.run(isa, &workers(threads), &x, out.floats_mut());
                out.numbers()
            };
            let found = outputs(TYPES[1 + seed as usize % 2], run)?;
            within(isa, &found, &expected, width)?;
        }
    }

    #[test]
    fn rotations_are_within_the_bound(turn in turns(), threads in 1usize..=3, seed in any::<u64>()) {
        let mut random = Random(seed);
        let x = turn.input(&mut random);
        let (expected, width) = (turn.reference(&x), turn.row());
        for isa in Isa::available() {
            let found = outputs(TYPES[1 + seed as usize % 2], |edge, kind| turn.run(isa, &x, (edge, kind), threads))?;
            within(isa, &found, &expected, width)?;
            for token in 0..turn.positions.len().min(2) {
                let alone = Turn { positions: vec![turn.positions[token]], ..turn.clone() };
                let row = alone.run(isa, &x[token * width..(token + 1) * width], (Edge::End, Type::F32), 1);
                prop_assert_eq!(row, Numbers::F32(found[token * width..(token + 1) * width].to_vec()), "{:?}", isa);
            }
        }
    }

    /// A number that is not stored as such is rounded twice at most, by the portable set.
    #[test]
    fn rows_are_what_is_stored(
        (format, seed) in (formats(), any::<u64>()),
        (rows, groups, dense) in (1usize..40, 1usize..6, 1usize..300),
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
        threads in 1usize..=3,
    ) {
        let columns = if format.is_packed() { groups * format.group() } else { dense };
        let weights = Weights::random(&mut Random(seed), format, [1, rows, columns]);
        let ids: Vec<u32> = picks.iter().map(|pick| pick.index(rows) as u32).collect();
        let value = |at: usize| {
            let rounding = if format.is_packed() { 1.2e-7 } else { 0.0 };
            Expected { value: weights.values[at], bound: rounding * weights.parts[at] }
        };
        let row = |&id: &u32| (id as usize * columns..(id as usize + 1) * columns).map(value);
        let expected: Vec<Expected> = ids.iter().flat_map(row).collect();
        for isa in Isa::available() {
            let found = outputs(TYPES[1 + seed as usize % 2], |edge, kind| {
                let (weights, ids) = (weights.place(edge), Guarded::new(&ids, edge));
                let mut out = Placed::output(kind, ids.len() * columns, edge);
                take_rows(isa, &workers(threads), &weights.matrix(), &ids, out.floats_mut());
                out.numbers()
            })?;
            within(isa, &found, &expected, columns)?;
        }
    }

    /// Norms and rotations keep what is not finite in its row, and out of the others.
    #[test]
    fn infinities_reach_the_outputs(turn in turns(), seed in any::<u64>(), infinite in any::<bool>()) {
        let mut turn = turn;
        // At least one row.
        turn.positions.push(7);
        let mut random = Random(seed);
        let x = turn.input(&mut random);
        let (token, at) = (random.below(turn.positions.len()), random.below(turn.row()));
        let (head, column) = (at / turn.width, at % turn.width);
        let mut ill = x.clone();
        ill[token * turn.row() + at] = if infinite { f32::INFINITY } else { f32::NAN };
        for isa in Isa::available() {
            let run = |x: &[f32]| turn.run(isa, x, (Edge::End, Type::F32), 1);
            let (Numbers::F32(well), Numbers::F32(found)) = (run(&x), run(&ill)) else { unreachable!("asked for f32") };
            for (i, (well, found)) in well.chunks_exact(turn.width).zip(found.chunks_exact(turn.width)).enumerate() {
                if i != token * turn.heads + head {
                    prop_assert_eq!(bits(well), bits(found), "{:?}: another head", isa);
                } else if turn.norm.is_some() && !infinite {
                    prop_assert!(found.iter().all(|x| x.is_nan()), "{isa:?}: a norm of what is not a number");
                } else {
                    prop_assert!(!found[column].is_finite(), "{isa:?}: {}", found[column]);
                }
            }
        }
    }
}

/// The bounds notice a wrong epsilon, pairing, position and sign.
#[test]
fn bounds_notice_small_errors() {
    // Weights that differ, or else it would not matter what comes first.
    let weights: Vec<f64> = (0..64).map(|i| 1.0 + 0.01 * f64::from(i)).collect();
    let (weight, positions) = (Numbers::new(Type::F32, weights), vec![3, 50_000]);
    let frequencies = (0..32).map(|i| 10_000f32.powf(-(i as f32) / 32.0)).collect();
    let norm = Some((weight.clone(), 1e-6));
    let right = Turn {
        width: 64,
        pairs: 32,
        traditional: false,
        magnitude: 1.0,
        frequencies,
        norm,
        turned_first: false,
        heads: 2,
        positions,
        gap: 1,
    };
    let x = right.input(&mut Random(1));
    let change = |change: &dyn Fn(&mut Turn)| {
        let mut wrong = right.clone();
        change(&mut wrong);
        wrong
    };
    let wrongs = [
        ("neighbours as pairs", change(&|t| t.traditional = true)),
        ("the next position", change(&|t| t.positions[1] += 1)),
        ("the other direction", change(&|t| t.frequencies.iter_mut().for_each(|f| *f = -*f))),
        ("a frequency", change(&|t| t.frequencies[31] *= 1.01)),
        ("magnitude", change(&|t| t.magnitude = 1.0001)),
        ("no norm", change(&|t| t.norm = None)),
        ("the norm last", change(&|t| t.turned_first = true)),
        ("epsilon", change(&|t| t.norm = Some((weight.clone(), 1e-4)))),
    ];
    let expected = right.reference(&x);
    for isa in Isa::available() {
        let is_admitted = |turn: &Turn| {
            let Numbers::F32(found) = turn.run(isa, &x, (Edge::End, Type::F32), 1) else {
                unreachable!("asked for f32")
            };
            first_miss(&found, &expected, 128).is_ok()
        };
        assert!(is_admitted(&right), "{isa:?}");
        for (what, wrong) in &wrongs {
            assert!(!is_admitted(wrong), "{isa:?}: {what}");
        }
    }
}

/// Zeros have a norm, even without an epsilon beside them: they stay zeros.
#[test]
fn zeros_stay_zeros() {
    let weight = Numbers::new(Type::Bf16, vec![2.0; 40]);
    for isa in Isa::available() {
        for eps in [1e-5, 1e-12] {
            let found = norm(isa, &[0.0; 80], &weight, eps, (Edge::End, Type::F32), 2);
            assert_eq!(found, Numbers::F32(vec![0.0; 80]), "{isa:?}");
        }
    }
}

/// Sizes that do not agree panic before anything is written.
#[test]
fn sizes_that_do_not_agree_are_refused() {
    use crate::cpu::floats::{Floats, FloatsMut};
    use crate::cpu::matrix::{Matrix, Storage};

    let ones = [1f32; 64];
    let norm = RmsNorm { weight: Floats::F32(&ones[..4]), eps: 0.0 };
    let frequencies = &ones[..2];
    let (traditional, turned_first) = (false, false);
    let rotary = Rotary { width: 4, dims: 4, frequencies, traditional, magnitude: 1.0, norm: None, turned_first };
    let table = Matrix { rows: 3, columns: 4, storage: Storage::Dense(Floats::F32(&ones[..12])) };
    let (isa, workers) = (Isa::best(), workers(1));
    let refused = |len: usize, run: &dyn Fn(FloatsMut<'_>)| {
        let mut out = vec![7f32; len];
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(FloatsMut::F32(&mut out))));
        assert!(outcome.is_ok() || out.iter().all(|&x| x == 7.0), "written before it was refused");
        outcome.is_err()
    };
    let normed = |x: &[f32], len| refused(len, &|out| norm.run(isa, &workers, x, out));
    assert!(!normed(&ones[..8], 8) && normed(&ones[..8], 7) && normed(&ones[..7], 7));
    let rotated = |rotary: &Rotary<'_>, x: &[f32], len| {
        let rows = Rows::packed(x, 2 * rotary.width);
        refused(len, &|out| rotary.run(isa, &workers, rows, &[0, 1], out))
    };
    assert!(!rotated(&rotary, &ones[..16], 16));
    assert!(
        rotated(&rotary, &ones[..15], 16) && rotated(&rotary, &ones[..17], 16) && rotated(&rotary, &ones[..16], 15)
    );
    assert!(rotated(&Rotary { dims: 2, ..rotary }, &ones[..16], 16));
    assert!(rotated(&Rotary { width: 3, ..rotary }, &ones[..12], 12));
    let short = RmsNorm { weight: Floats::F32(&ones[..3]), eps: 0.0 };
    assert!(rotated(&Rotary { norm: Some(short), ..rotary }, &ones[..16], 16));
    let taken = |table: &Matrix<'_>, ids: &[u32], len| refused(len, &|out| take_rows(isa, &workers, table, ids, out));
    assert!(!taken(&table, &[2, 0], 8) && taken(&table, &[3, 0], 8) && taken(&table, &[2], 8));
    assert!(taken(&Matrix { rows: 4, ..table }, &[0], 4));
}
