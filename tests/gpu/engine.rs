//! Whole answers of the engine: requests that join and leave, share prompts, are cut into pieces and give their blocks up
//! get the tokens that each gets alone. In f32, where a difference of rounding hardly ever decides.

use std::sync::Arc;
use std::time::Duration;

use mlx_rs::Dtype;
use omlx::config::ModelConfig;
use omlx::engine::{Event, Request, RequestState, Usage};
use omlx::error::{Error, Result, Status};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions, TierSet};
use serde_json::{Value, json};

use crate::steps::{Random, small};

const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

const REQUESTS: usize = 40;

/// Of all answers, those that rounding may have decided.
const OTHERWISE: f64 = 0.02;

pub fn answers_are_those_alone() -> Result<()> {
    let config = small("llama", 64, json!({}))?;
    let mut random = Random(23);
    let bodies = bodies(&mut random);
    let pool = open(&config, PoolOptions::default())?;
    let mut expected = Vec::new();
    for body in &bodies {
        expected.push(answer(&pool.generate(request(body)?)?)?.ok_or_else(|| Error::internal("nobody cancels"))?);
        pool.cache_clear(None, TierSet::ALL)?;
    }
    let block_bytes = metrics(&pool)?.block_bytes;
    pool.close();
    let (mut compared, mut other, mut preemptions) = (0, 0, 0);
    for round in 0..4 {
        let company = open(
            &config,
            PoolOptions {
                prefill_chunk: Some([2048, 64, 300, 33][round]),
                max_sequences: Some([32, 8, 3, 16][round]),
                // Too little for all of them at once.
                cache_bytes: (round > 1).then_some(block_bytes * 40),
                queue_length: Some(1000),
                ..PoolOptions::default()
            },
        )?;
        let mut running = Vec::new();
        for (at, body) in bodies.iter().enumerate() {
            let state = company.generate(request(body)?)?;
            if random.below(10) == 0 {
                state.cancel();
            }
            running.push((at, state));
            if random.below(4) == 0 {
                std::thread::sleep(Duration::from_millis(random.below(20) as u64));
            }
        }
        for (at, state) in running {
            if let Some(found) = answer(&state)? {
                compared += 1;
                other += usize::from(found != expected[at]);
            }
        }
        preemptions += metrics(&company)?.preemptions;
        company.close();
    }
    println!("  {other} of {compared} answers have other tokens; {preemptions} preemptions");
    if compared < REQUESTS || other as f64 > OTHERWISE * compared as f64 || preemptions == 0 {
        return Err(Error::internal(format!("{other} of {compared} answers differ, {preemptions} preemptions")));
    }
    // Negative control: answers to different prompts do differ.
    let repeated = expected.iter().skip(1).filter(|other| **other == expected[0]).count();
    if repeated > REQUESTS / 2 { Err(Error::internal("all answers are the same")) } else { Ok(()) }
}

fn open(config: &ModelConfig, options: PoolOptions) -> Result<EnginePool> {
    let options = PoolOptions { device: Some(Device::Gpu), dtype: Some(Dtype::Float32), ..options };
    let pool = EnginePool::open(options)?;
    pool.add_random_model("model", config.clone())?;
    Ok(pool)
}

/// Prompts of all lengths, some with the same beginning; greedy and sampled.
fn bodies(random: &mut Random) -> Vec<Value> {
    let shared: Vec<usize> = (0..400).map(|_| random.below(2000)).collect();
    (0..REQUESTS)
        .map(|at| {
            let mut prompt = shared[..if at % 2 == 0 { random.below(400) } else { 0 }].to_vec();
            prompt.extend((0..1 + random.below([5, 60, 700][at % 3])).map(|_| random.below(2000)));
            json!({
                "model": "model", "prompt": prompt, "max_tokens": 1 + random.below(150), "ignore_eos": true,
                "temperature": if at % 3 == 0 { 0.8 } else { 0.0 }, "seed": at,
            })
        })
        .collect()
}

pub fn request(body: &Value) -> Result<Request> {
    Request::from_json(body.to_string().as_bytes(), false)
}

/// The tokens, or nothing if the request was cancelled.
fn answer(state: &Arc<RequestState>) -> Result<Option<Vec<u32>>> {
    Ok(answer_with_usage(state)?.map(|(tokens, _)| tokens))
}

/// The tokens and what they took, or nothing if the request was cancelled.
pub fn answer_with_usage(state: &Arc<RequestState>) -> Result<Option<(Vec<u32>, Usage)>> {
    let mut tokens = Vec::new();
    loop {
        match state.next(PATIENCE) {
            Ok(Event::Delta(delta)) => tokens.extend(delta.tokens),
            Ok(
                Event::Loading(..)
                | Event::Started(..)
                | Event::ChoiceDone(..)
                | Event::Embeddings(_)
                | Event::Scores(_),
            ) => {}
            Ok(Event::Done(done)) => {
                return match done.error {
                    None => Ok(Some((tokens, done.usage))),
                    Some(error) if error.status() == Status::Cancelled => Ok(None),
                    Some(error) => Err(error),
                };
            }
            Err(_) => return Err(Error::internal("no event came")),
        }
    }
}

pub fn metrics(pool: &EnginePool) -> Result<omlx::engine::EngineMetrics> {
    pool.metrics().into_iter().next().map(|(_, metrics)| metrics).ok_or_else(|| Error::internal("no model is loaded"))
}
