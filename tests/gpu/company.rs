//! Logits of sequences in company, by our kernels, against those of each sequence alone in one step by MLX's operations:
//! the tokens are given, so that small differences do not add up.

use std::path::Path;

use mlx_rs::Dtype;
use omlx::engine::StepPlan;
use omlx::error::{Error, Result};
use serde_json::json;

use crate::steps::{BLOCK_TOKENS, Loaded, Random, Source, Way, host, random_step, run, small};

/// The length of the difference over the length of the logits: in f16 of each row; in bf16, whose roundings are eight times
/// as large, of all rows of a sequence together.
const BOUND: f32 = 2e-2;

/// Schedules of each model and number format; `OMLX_SCHEDULES` is another number.
const SCHEDULES: usize = 6;

/// Of what a check plays.
#[derive(Debug, Clone, Copy)]
struct Size {
    schedules: usize,
    sequences: usize,
    /// Tokens of a sequence at most.
    longest: usize,
}

/// The same with MLX's operations on the CPU in f32: what a GPU falls back on, and how steps are packed for one.
pub fn changes_nothing_in_buckets() -> Result<()> {
    const BOUND: f32 = 1e-4;
    let heads = json!({
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256,
    });
    let size = Size { schedules: 4, sequences: 7, longest: 300 };
    for (name, config) in [("qwen3", small("qwen3", 16, heads.clone())?), ("llama", small("llama", 16, heads)?)] {
        let compare = |wrong| compare(&Source::Random(&config), Dtype::Float32, Way::Buckets, size, wrong);
        let (right, wrong) = (compare(false)?.row, compare(true)?.row);
        println!(
            "  {name}: off by {right:.1e} in a row, {wrong:.1e} with two blocks exchanged; {BOUND:.0e} is allowed"
        );
        if right.is_nan() || right > BOUND || wrong <= BOUND {
            return Err(Error::internal(format!("{name}: off by {right}, with wrong tables by {wrong}")));
        }
    }
    Ok(())
}

pub fn changes_nothing_in_half() -> Result<()> {
    changes_nothing(Dtype::Float16)
}

pub fn changes_nothing_in_bfloat() -> Result<()> {
    changes_nothing(Dtype::Bfloat16)
}

fn changes_nothing(dtype: Dtype) -> Result<()> {
    let schedules = std::env::var("OMLX_SCHEDULES").ok().and_then(|count| count.parse().ok()).unwrap_or(SCHEDULES);
    for (name, worst) in every_model(dtype, schedules, false)? {
        let Worst { row, sequence } = worst;
        println!(
            "  {name}, {dtype:?}: off by {row:.1e} in a row, {sequence:.1e} in a sequence; {BOUND:.0e} is allowed"
        );
        let counts = if dtype == Dtype::Bfloat16 { sequence } else { row };
        if counts.is_nan() || counts > BOUND {
            return Err(Error::internal(format!("{name}, {dtype:?}: logits are off by {counts}")));
        }
    }
    Ok(())
}

/// The negative control of the other check.
pub fn wrong_tables_are_noticed() -> Result<()> {
    let dtype = Dtype::Float16;
    for (name, worst) in every_model(dtype, 1, true)? {
        println!("  {name}, {dtype:?}: off by {:.1e} with two blocks exchanged", worst.sequence);
        if worst.sequence <= 2.0 * BOUND {
            return Err(Error::internal(format!("{name}: two blocks were exchanged, and nothing shows")));
        }
    }
    Ok(())
}

/// The largest differences so far; infinite where another token is the likeliest one although the margin is larger than
/// what is allowed.
#[derive(Clone, Copy, Default)]
struct Worst {
    row: f32,
    sequence: f32,
}

impl Worst {
    fn max(self, other: Self) -> Self {
        let max = |a: f32, b: f32| if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) };
        Self { row: max(self.row, other.row), sequence: max(self.sequence, other.sequence) }
    }
}

fn every_model(dtype: Dtype, schedules: usize, wrong: bool) -> Result<Vec<(&'static str, Worst)>> {
    let tiny_chat = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    let four_bits = json!({ "group_size": 64, "bits": 4 });
    let configs = [
        small("qwen3", 128, json!({ "quantization": four_bits }))?,
        small("llama", 64, json!({}))?,
        small("mistral", 64, json!({ "sliding_window": 100 }))?,
    ];
    let models = [
        ("tiny-chat", Source::Folder(&tiny_chat)),
        ("qwen3, 4 bits, heads of 128", Source::Random(&configs[0])),
        ("llama, heads of 64", Source::Random(&configs[1])),
        ("mistral, window of 100", Source::Random(&configs[2])),
    ];
    let size = Size { schedules, sequences: 12, longest: 700 };
    let worst = models.iter().map(|(name, source)| Ok((*name, compare(source, dtype, Way::Kernels, size, wrong)?)));
    worst.collect()
}

/// The worst differences over some schedules; with `wrong`, two blocks of a sequence are exchanged between steps.
fn compare(source: &Source<'_>, dtype: Dtype, way: Way, size: Size, wrong: bool) -> Result<Worst> {
    let Size { schedules, sequences, longest } = size;
    let mut random = Random(5);
    let width = longest.div_ceil(BLOCK_TOKENS);
    let mut alone = Loaded::new(source, dtype, width, Way::Plain)?;
    let mut company = Loaded::new(source, dtype, sequences * width + 1, way)?;
    let sequences: Vec<Vec<u32>> = (0..sequences)
        .map(|_| (0..40 + random.below(longest - 40)).map(|_| random.below(alone.vocab - 10) as u32).collect())
        .collect();
    let blocks: Vec<u32> = (0..width as u32).collect();
    let mut expected = Vec::new();
    for tokens in &sequences {
        let plan = StepPlan { runs: vec![run(0, 0, tokens, &blocks)], ..StepPlan::default() };
        let (hidden, ..) = alone.step(&plan)?;
        expected.push(host(&alone.model.logits(&hidden, None)?)?);
    }
    let mut worst = Worst::default();
    for _ in 0..schedules {
        worst = worst.max(play(&mut company, (&sequences, &expected), width, &mut random, wrong)?);
    }
    Ok(worst)
}

/// Computes all sequences in steps of random pieces, in random blocks.
fn play(
    company: &mut Loaded,
    (sequences, expected): (&[Vec<u32>], &[Vec<f32>]),
    width: usize,
    random: &mut Random,
    wrong: bool,
) -> Result<Worst> {
    let count = sequences.len();
    let mut blocks: Vec<u32> = (0..(count * width) as u32).collect();
    random.shuffle(&mut blocks);
    let mut tables: Vec<Vec<u32>> = blocks.chunks(width).map(<[u32]>::to_vec).collect();
    let mut computed = vec![0; count];
    // Squares of the differences and of the logits of each sequence, and the worst row.
    let mut squares = vec![(0f64, 0f64); count];
    let mut worst = 0f32;
    loop {
        let plan = random_step(random, sequences, &mut computed, &tables);
        if plan.runs.is_empty() {
            break;
        }
        let logits = company.logits(&plan)?;
        let places = plan.runs.iter().map(|run| (run.sequence as usize, run.start, run.tokens()));
        let positions = places.flat_map(|(at, start, tokens)| (start..start + tokens).map(move |p| (at, p)));
        for ((at, position), found) in positions.zip(logits.chunks(company.vocab)) {
            let row = &expected[at][position * company.vocab..][..company.vocab];
            let (difference, size) = squares_of(found, row);
            let error = if other_token(found, row) { f32::INFINITY } else { (difference / size).sqrt() as f32 };
            worst = if error.is_nan() { f32::NAN } else { worst.max(error) };
            squares[at] = (squares[at].0 + difference, squares[at].1 + size);
        }
        if wrong {
            let table = &mut tables[random.below(count)];
            table.swap(0, 1);
        }
        if worst.is_nan() {
            break;
        }
    }
    let sequences = squares.iter().map(|(difference, size)| (difference / size).sqrt() as f32);
    let of_sequence = sequences.fold(0f32, |most, error| if error.is_nan() { f32::NAN } else { most.max(error) });
    Ok(Worst { row: worst, sequence: if worst.is_infinite() { worst } else { of_sequence } })
}

/// Squared lengths of the difference and of the expected row.
fn squares_of(found: &[f32], expected: &[f32]) -> (f64, f64) {
    let square = |row: &mut dyn Iterator<Item = f32>| row.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
    (square(&mut found.iter().zip(expected).map(|(a, b)| a - b)), square(&mut expected.iter().copied()))
}

/// Whether another token is the likeliest one although the margin is larger than what is allowed.
fn other_token(found: &[f32], expected: &[f32]) -> bool {
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(token, _)| token);
    let (mine, theirs) = (best(found), best(expected));
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    expected[theirs] - expected[mine] > BOUND * largest
}
