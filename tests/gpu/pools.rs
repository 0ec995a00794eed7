//! Steps write to the pools in place, with two of them on their way.

use mlx_rs::Dtype;
use omlx::engine::StepPlan;
use omlx::error::{Error, Result};
use serde_json::json;

use crate::steps::{BLOCK_TOKENS, Loaded, Source, Way, run, small};

/// Blocks of the pools: 256 MiB of keys in each layer.
const BLOCKS: usize = 16_384;

pub fn written_in_place() -> Result<()> {
    let config = small("qwen3", 128, json!({}))?;
    let extra = |way: Way| -> Result<f64> {
        let mut loaded = Loaded::new(&Source::Random(&config), Dtype::Bfloat16, BLOCKS, way)?;
        let pool = loaded.pages.bytes() as f64 / 8.0;
        let table: Vec<u32> = (0..40).collect();
        // Sizes that the steps allocate anyway.
        let mut waiting = Vec::new();
        mlx_rs::memory::clear_cache()?;
        let before = mlx_rs::memory::active_memory()?;
        for step in 0..24 {
            let tokens: Vec<u32> = (0..if step % 6 == 0 { 100 } else { 1 }).collect();
            let plan = StepPlan { runs: vec![run(0, step * 40, &tokens, &table)], ..StepPlan::default() };
            let (hidden, _, unread) = loaded.step(&plan)?;
            mlx_rs::transforms::async_eval(std::iter::once(&hidden).chain(&unread))?;
            // Somebody who has the pools as they are makes MLX's operations copy them, however fast the steps are.
            let (keys, values) = loaded.pages.layer(0)?;
            waiting.push((hidden, keys.clone(), values.clone()));
            if waiting.len() > 2 {
                waiting.remove(0).0.eval()?;
            }
            if step == 12 {
                mlx_rs::memory::reset_peak_memory()?;
            }
        }
        waiting.iter().try_for_each(|(hidden, ..)| hidden.eval())?;
        Ok(mlx_rs::memory::peak_memory()?.saturating_sub(before) as f64 / pool)
    };
    assert_eq!(BLOCK_TOKENS, 32);
    let own = extra(Way::Kernels)?;
    let composed = extra(Way::Plain)?;
    println!("  extra memory at the peak: {own:.2} pools with the kernels, {composed:.2} with MLX's operations");
    if own > 0.5 {
        return Err(Error::internal(format!("{own} pools were copied")));
    }
    // Negative control: MLX's scatters copy a pool that somebody else has.
    if composed < 0.5 {
        return Err(Error::internal("copies of pools would not be seen"));
    }
    Ok(())
}
