//! Logits of sequences in company, by our kernels, against those of each sequence alone in one step by MLX's operations:
//! the tokens are given, so that small differences do not add up.

use std::path::Path;

use mlx_rs::Array;
use omlx::engine::StepPlan;
use omlx::error::{Error, Result};
use serde_json::json;

use crate::steps::{BLOCK_TOKENS, Loaded, Random, Source, host, run, small};

/// Of a row of logits: the length of the difference over the length of the row.
const BOUND: f32 = 2e-2;

const SCHEDULES: usize = 20;
const SEQUENCES: usize = 12;
const LONGEST: usize = 700;

pub fn changes_nothing() -> Result<()> {
    for (name, worst) in every_model(false)? {
        println!("  {name}: off by {worst:.1e} at most, {BOUND:.0e} is allowed");
        if worst.is_nan() || worst > BOUND {
            return Err(Error::internal(format!("{name}: logits are off by {worst}")));
        }
    }
    Ok(())
}

/// The negative control of the other check.
pub fn wrong_tables_are_noticed() -> Result<()> {
    for (name, worst) in every_model(true)? {
        println!("  {name}: off by {worst:.1e} with two blocks exchanged");
        if worst <= 2.0 * BOUND {
            return Err(Error::internal(format!("{name}: two blocks were exchanged, and nothing shows")));
        }
    }
    Ok(())
}

fn every_model(wrong: bool) -> Result<Vec<(String, f32)>> {
    let tiny_chat = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    let four_bits = json!({ "group_size": 64, "bits": 4 });
    let models = [
        ("qwen3, 4 bits, heads of 128", small("qwen3", 128, json!({ "quantization": four_bits }))?),
        ("llama, heads of 64", small("llama", 64, json!({}))?),
        ("mistral, window of 100", small("mistral", 64, json!({ "sliding_window": 100 }))?),
    ];
    let mut found = vec![("tiny-chat".to_owned(), compare(&Source::Folder(&tiny_chat), wrong)?)];
    for (name, config) in &models {
        found.push(((*name).to_owned(), compare(&Source::Random(config), wrong)?));
    }
    Ok(found)
}

/// The worst difference of a row of logits over some schedules.
fn compare(source: &Source<'_>, wrong: bool) -> Result<f32> {
    let mut random = Random(5);
    let width = LONGEST.div_ceil(BLOCK_TOKENS);
    let mut alone = Loaded::new(source, width, false)?;
    let mut company = Loaded::new(source, SEQUENCES * width + 1, true)?;
    let sequences: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| (0..40 + random.below(LONGEST - 40)).map(|_| random.below(alone.vocab - 10) as u32).collect())
        .collect();
    let blocks: Vec<u32> = (0..width as u32).collect();
    let mut expected = Vec::new();
    for tokens in &sequences {
        let plan = StepPlan { runs: vec![run(0, 0, tokens, &blocks)], ..StepPlan::default() };
        let (hidden, ..) = alone.step(&plan)?;
        expected.push(host(&alone.model.logits(&hidden, None)?)?);
    }
    let mut worst = 0f32;
    for _ in 0..if wrong { 1 } else { SCHEDULES } {
        let of_schedule = play(&mut company, &sequences, &expected, &mut random, wrong)?;
        worst = if of_schedule.is_nan() { f32::NAN } else { worst.max(of_schedule) };
    }
    Ok(worst)
}

/// Computes all sequences in steps of random pieces, in random blocks; a prefix of one is sometimes taken from another.
fn play(
    company: &mut Loaded,
    sequences: &[Vec<u32>],
    expected: &[Vec<f32>],
    random: &mut Random,
    wrong: bool,
) -> Result<f32> {
    let width = LONGEST.div_ceil(BLOCK_TOKENS);
    let mut blocks: Vec<u32> = (0..(SEQUENCES * width) as u32).collect();
    random.shuffle(&mut blocks);
    let mut tables: Vec<Vec<u32>> = blocks.chunks(width).map(<[u32]>::to_vec).collect();
    let mut computed = [0; SEQUENCES];
    let mut worst = 0f32;
    while (0..SEQUENCES).any(|at| computed[at] < sequences[at].len()) {
        let mut picked: Vec<usize> = (0..SEQUENCES).filter(|&at| computed[at] < sequences[at].len()).collect();
        random.shuffle(&mut picked);
        picked.truncate(1 + random.below(picked.len()));
        let mut runs = Vec::new();
        let kind = random.below(3);
        for &at in &picked {
            let left = sequences[at].len() - computed[at];
            // Steps of single tokens only, of pieces, and mixed ones.
            let tokens = match (kind, random.below(2)) {
                (0, _) | (1, 0) => 1,
                (1, _) => left.min(1 + random.below(30)),
                _ => left.min(1 + random.below(400)),
            };
            let (start, end) = (computed[at], computed[at] + tokens);
            runs.push((at, start, run(at as u64, start, &sequences[at][start..end], &tables[at])));
            computed[at] = end;
        }
        // As the scheduler does it: single tokens first.
        runs.sort_by_key(|(_, _, run)| run.tokens() > 1);
        let places: Vec<(usize, usize, usize)> =
            runs.iter().map(|(at, start, run)| (*at, *start, run.tokens())).collect();
        let plan = StepPlan { runs: runs.into_iter().map(|(_, _, run)| run).collect(), ..StepPlan::default() };
        let (hidden, firsts, unread) = company.step(&plan)?;
        mlx_rs::transforms::eval(&unread)?;
        let rows: Vec<i32> = places
            .iter()
            .zip(&firsts)
            .flat_map(|(&(_, _, tokens), &first)| first as i32..(first + tokens) as i32)
            .collect();
        let logits = company.model.logits(&hidden, Some(&Array::from_slice(&rows, &[rows.len() as i32])))?;
        let logits = host(&logits)?;
        let positions = places.iter().flat_map(|&(at, start, tokens)| (start..start + tokens).map(move |p| (at, p)));
        for ((at, position), found) in positions.zip(logits.chunks(company.vocab)) {
            let row = &expected[at][position * company.vocab..][..company.vocab];
            let error = compare_row(found, row);
            worst = if error.is_nan() { f32::NAN } else { worst.max(error) };
        }
        if wrong {
            let table = &mut tables[random.below(SEQUENCES)];
            table.swap(0, 1);
        }
        if worst.is_nan() {
            break;
        }
    }
    Ok(worst)
}

/// The difference of a row of logits; infinite if another token is the likeliest one although the margin is larger than
/// what is allowed.
fn compare_row(found: &[f32], expected: &[f32]) -> f32 {
    let length = |row: &mut dyn Iterator<Item = f32>| row.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let error = length(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / length(&mut expected.iter().copied());
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(token, _)| token);
    let (mine, theirs) = (best(found), best(expected));
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    if expected[theirs] - expected[mine] > BOUND * largest { f32::INFINITY } else { error as f32 }
}
