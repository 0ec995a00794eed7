//! The same steps give the same bits, however often they are computed: nothing reads what another kernel is still writing.

use std::path::Path;

use mlx_rs::Dtype;
use omlx::engine::StepPlan;
use omlx::error::{Error, Result};
use serde_json::json;

use crate::steps::{BLOCK_TOKENS, Loaded, Random, Source, Way, random_step, small};

/// Sequences, and tokens of the longest one.
const SEQUENCES: usize = 12;
const LONGEST: usize = 700;
/// How often the steps are computed after the first time.
const ROUNDS: usize = 20;

pub fn steps_repeat_bit_for_bit() -> Result<()> {
    let four_bits = json!({ "quantization": { "group_size": 64, "bits": 4 } });
    let configs = [small("qwen3", 128, json!({}))?, small("qwen3", 128, four_bits)?];
    let tiny_chat = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    for (name, source) in [("qwen3", Source::Random(&configs[0])), ("tiny-chat", Source::Folder(&tiny_chat))] {
        for way in [Way::Kernels, Way::Buckets] {
            if let Some(step) = repeat(&source, way)?.first() {
                return Err(Error::internal(format!("{name}, {way:?}: {step}")));
            }
        }
    }
    // MLX's kernel for eight rows and more does not wait for its last copies (BENCHMARKS.md): told, not demanded.
    let steps = repeat(&Source::Random(&configs[1]), Way::Kernels)?;
    println!("  qwen3 of 4 bits: {} steps had other bits {steps:?}", steps.len());
    Ok(())
}

/// The steps that had other bits than the first time.
fn repeat(source: &Source<'_>, way: Way) -> Result<Vec<String>> {
    let width = LONGEST.div_ceil(BLOCK_TOKENS);
    let mut random = Random(5);
    let mut model = Loaded::new(source, Dtype::Float16, SEQUENCES * width + 1, way)?;
    let sequences: Vec<Vec<u32>> = (0..SEQUENCES)
        .map(|_| (0..40 + random.below(LONGEST - 40)).map(|_| random.below(model.vocab - 10) as u32).collect())
        .collect();
    let mut blocks: Vec<u32> = (0..(SEQUENCES * width) as u32).collect();
    random.shuffle(&mut blocks);
    let tables: Vec<Vec<u32>> = blocks.chunks(width).map(<[u32]>::to_vec).collect();
    let mut computed = vec![0; SEQUENCES];
    let steps = std::iter::repeat_with(|| random_step(&mut random, &sequences, &mut computed, &tables));
    let plans: Vec<StepPlan> = steps.take_while(|plan| !plan.runs.is_empty()).collect();
    let mut compute = |plan: &StepPlan| model.logits(plan);
    let expected = plans.iter().map(&mut compute).collect::<Result<Vec<_>>>()?;
    let mut others = Vec::new();
    for round in 1..=ROUNDS {
        for (plan, expected) in plans.iter().zip(&expected) {
            let found = compute(plan)?;
            if found.iter().zip(expected).any(|(a, b)| a.to_bits() != b.to_bits()) {
                let runs: Vec<(usize, usize)> = plan.runs.iter().map(|run| (run.start, run.tokens())).collect();
                others.push(format!("round {round}, beginnings and tokens of runs {runs:?}"));
            }
        }
    }
    Ok(others)
}
