//! Rows that leave the GPU's memory for files or the host's memory and come back: answers are those on rows that stayed.

use mlx_rs::Dtype;
use omlx::config::ModelConfig;
use omlx::error::{Error, Result};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions, TierOptions};
use serde_json::{Value, json};

use crate::engine::{answer_with_usage, metrics, request};
use crate::steps::{Random, small};

const PROMPTS: usize = 8;

/// Of the answers on rows that stayed: those tokens, and how many prompts there are.
struct Stayed {
    config: ModelConfig,
    bodies: Vec<Value>,
    answers: Vec<Vec<u32>>,
    block_bytes: usize,
}

pub fn restored_rows_are_those_that_left() -> Result<()> {
    let folder = tempfile::tempdir().map_err(|error| Error::io("a temporary folder", &error))?;
    let files = || TierOptions {
        folder: Some(folder.path().to_owned()),
        cold_bytes: Some(4 << 30),
        always_restore: true,
        ..TierOptions::default()
    };
    let stayed = compute(files())?;
    let pool = open(&stayed.config, PoolOptions { tiers: files(), ..PoolOptions::default() })?;
    let restored = ask_all(&pool, &stayed)?;
    pool.close();
    // A second prompt evicts what the first had.
    let hot = TierOptions { hot_bytes: Some(1 << 30), always_restore: true, ..TierOptions::default() };
    let few = Some(stayed.block_bytes * 40);
    let pool = open(&stayed.config, PoolOptions { tiers: hot, cache_bytes: few, ..PoolOptions::default() })?;
    ask(&pool, &stayed.bodies)?;
    let from_host = ask_all(&pool, &stayed)?;
    pool.close();
    // Negative control: without tiers hardly anything of them comes back.
    let none = TierOptions { hot_bytes: Some(0), ..TierOptions::default() };
    let pool = open(&stayed.config, PoolOptions { tiers: none, cache_bytes: few, ..PoolOptions::default() })?;
    ask(&pool, &stayed.bodies)?;
    let lost = ask(&pool, &stayed.bodies)?.iter().map(|(_, cached)| cached).sum::<usize>();
    let known: usize = stayed.bodies.iter().map(|body| tokens(body) - 1).sum();
    println!("  of {known} tokens {restored} came from files, {from_host} from the host, {lost} without either");
    if restored < known || from_host < known || lost > known / 4 {
        return Err(Error::internal(format!("of {known} tokens {restored}, {from_host} and {lost} came back")));
    }
    Ok(())
}

/// Computes prompts, and then what follows them on the rows in the pools.
fn compute(tiers: TierOptions) -> Result<Stayed> {
    let config = small("llama", 64, json!({}))?;
    let mut random = Random(31);
    let bodies: Vec<Value> = (0..PROMPTS)
        .map(|_| {
            let prompt: Vec<usize> = (0..100 + random.below(800)).map(|_| random.below(2000)).collect();
            json!({ "model": "model", "prompt": prompt, "max_tokens": 12, "ignore_eos": true })
        })
        .collect();
    let pool = open(&config, PoolOptions { tiers, ..PoolOptions::default() })?;
    ask(&pool, &bodies)?;
    let again = ask(&pool, &bodies)?;
    let block_bytes = metrics(&pool)?.block_bytes;
    pool.close();
    let computed = again.iter().zip(&bodies).filter(|((_, cached), body)| cached + 1 < tokens(body)).count();
    let answers: Vec<_> = again.into_iter().map(|(tokens, _)| tokens).collect();
    let same = answers.iter().skip(1).filter(|other| **other == answers[0]).count();
    if computed > 0 || same > PROMPTS / 2 {
        return Err(Error::internal(format!("{computed} prompts were computed again, {same} answers are the same")));
    }
    Ok(Stayed { config, bodies, answers, block_bytes })
}

/// Asks for all answers, which must be those on rows that stayed; returns how many tokens of prompts were not computed.
fn ask_all(pool: &EnginePool, stayed: &Stayed) -> Result<usize> {
    let mut cached = 0;
    for (at, (tokens, of_prompt)) in ask(pool, &stayed.bodies)?.into_iter().enumerate() {
        if tokens != stayed.answers[at] {
            return Err(Error::internal(format!("answer {at}: {tokens:?}, not {:?}", stayed.answers[at])));
        }
        cached += of_prompt;
    }
    Ok(cached)
}

/// Tokens of each answer, one after another, and how many of its prompt were not computed.
fn ask(pool: &EnginePool, bodies: &[Value]) -> Result<Vec<(Vec<u32>, usize)>> {
    let one = |body: &Value| {
        let (tokens, usage) =
            answer_with_usage(&pool.generate(request(body)?)?)?.ok_or_else(|| Error::internal("nobody cancels"))?;
        Ok((tokens, usage.cached_tokens))
    };
    bodies.iter().map(one).collect()
}

fn tokens(body: &Value) -> usize {
    body["prompt"].as_array().map_or(0, Vec::len)
}

fn open(config: &ModelConfig, options: PoolOptions) -> Result<EnginePool> {
    let device = if omlx::mlx::gpu_available() { Device::Gpu } else { Device::Cpu };
    let pool = EnginePool::open(PoolOptions { device: Some(device), dtype: Some(Dtype::Float32), ..options })?;
    pool.add_random_model("model", config.clone())?;
    pool.load("model")?;
    // Requests before the model is identified do without tiers.
    let prompt = request(&json!({ "model": "model", "prompt": [1, 2] }))?;
    for _ in 0..2000 {
        if !pool.cache_find(&prompt)?.contains("not_identified") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(pool)
}
