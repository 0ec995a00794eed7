//! Thousands of steps of random shapes in one process: MLX's caches of graphs and attention plans must hold them. They
//! fail after twice as many misses as they have places.

use std::time::Instant;

use mlx_rs::{Array, Dtype};
use omlx::engine::StepPlan;
use omlx::error::Result;
use omlx::kernels::{Backend, Gpu};
use omlx::sampling::{Sampler, SamplingParams, sample};
use serde_json::json;

use crate::steps::{self, BLOCK_TOKENS, Loaded, Random, Source, Way, small};

const STEPS: usize = 5000;

/// Blocks of a sequence at most.
const LONGEST: usize = 4096 / BLOCK_TOKENS;

/// A step counts as slow from so many times the median on.
const SLOW: f64 = 5.0;

pub fn run() -> Result<()> {
    let mut random = Random(17);
    let config = small("qwen3", 128, json!({ "quantization": { "group_size": 64, "bits": 4 } }))?;
    let mut loaded = Loaded::new(&Source::Random(&config), Dtype::Bfloat16, 8192, Way::Kernels)?;
    let backend = Backend::Gpu(Gpu::new(BLOCK_TOKENS));
    let mut times = Vec::with_capacity(STEPS);
    let mut shapes = std::collections::BTreeSet::new();
    for step in 0..STEPS {
        let plan = plan(&mut random, loaded.vocab);
        shapes.insert(plan.runs.iter().map(|run| (run.start, run.tokens())).collect::<Vec<_>>());
        let started = Instant::now();
        let (hidden, firsts, unread) = loaded.step(&plan)?;
        let rows: Vec<i32> =
            plan.runs.iter().zip(&firsts).map(|(run, first)| (first + run.tokens() - 1) as i32).collect();
        let logits = loaded.model.logits(&hidden, Some(&Array::from_slice(&rows, &[rows.len() as i32])))?;
        let mut samplers: Vec<Sampler> = (0..rows.len())
            .map(|row| {
                let params =
                    SamplingParams { temperature: 0.8, seed: (step + row) as u64, ..SamplingParams::default() };
                Sampler::new(params, &[1, 2, 3], loaded.vocab)
            })
            .collect();
        let drawn = sample(&backend, &logits, &mut samplers.iter_mut().collect::<Vec<_>>())?;
        mlx_rs::transforms::eval(std::iter::once(&drawn.tokens).chain(&unread))?;
        times.push(started.elapsed().as_secs_f64());
    }
    let late = &times[STEPS * 4 / 5..];
    let mut sorted = late.to_vec();
    sorted.sort_by(f64::total_cmp);
    let slow = late.iter().filter(|&&time| time > SLOW * sorted[sorted.len() / 2]).count();
    println!(
        "  {} different compositions in {STEPS} steps, {:.0} s; of the last {} steps {slow} took more than {SLOW} times \
         their median of {:.1} ms",
        shapes.len(),
        times.iter().sum::<f64>(),
        late.len(),
        sorted[sorted.len() / 2] * 1e3
    );
    Ok(())
}

/// Up to 32 decoding sequences and up to 6 pieces of prompts, anywhere in sequences whose blocks hold anything.
fn plan(random: &mut Random, vocab: usize) -> StepPlan {
    let (decoding, pieces) = match random.below(4) {
        0 => (1 + random.below(32), 0),
        1 => (0, 1 + random.below(3)),
        2 => (random.below(9), 1 + random.below(2)),
        _ => (random.below(33), 1 + random.below(6)),
    };
    let mut runs = Vec::new();
    let mut budget = 2048;
    for at in 0..decoding + pieces {
        let most = if at < decoding { 1 } else { 1 + random.below(budget.min(1500)) };
        let fresh = at >= decoding && random.below(2) == 0;
        let start = if fresh { 0 } else { random.below(LONGEST * BLOCK_TOKENS - most) };
        budget -= if at < decoding { 0 } else { most - 1 };
        let tokens: Vec<u32> = (0..most).map(|_| random.below(vocab - 10) as u32).collect();
        // No two sequences share a block.
        let table: Vec<u32> = (0..LONGEST as u32).map(|block| block + (at * LONGEST) as u32).collect();
        runs.push(run_of(at, start, &tokens, &table));
    }
    StepPlan { runs, ..StepPlan::default() }
}

fn run_of(at: usize, start: usize, tokens: &[u32], table: &[u32]) -> omlx::engine::Run {
    let needed = (start + tokens.len()).div_ceil(BLOCK_TOKENS);
    steps::run(at as u64, start, tokens, &table[..needed])
}
