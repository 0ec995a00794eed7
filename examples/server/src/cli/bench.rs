//! `omlx-server bench`

use std::time::Instant;

use omlx_client::{Event, Pool, Request, RequestOptions};
use serde_json::json;

use crate::app::open_pool;
use crate::options::Options;

/// Tokens of a prompt, and of an answer.
const PROMPT: usize = 512;
const ANSWER: usize = 128;

/// Measures the default model: one answer, then eight at once.
pub fn run(options: &Options) -> Result<(), String> {
    let pool = open_pool(options)?;
    measure(&pool, options, 1, 8)?;
    for batch in [1, 8] {
        let tokens = batch * ANSWER;
        let (first, seconds) = measure(&pool, options, batch, ANSWER)?;
        let rate = tokens as f64 / seconds;
        println!("batch {batch}: {PROMPT} prompt tokens each, first token after {first:.3} s, {rate:.1} tokens/s");
    }
    Ok(())
}

/// Seconds to the first token of all, and to the end.
fn measure(pool: &Pool, options: &Options, batch: usize, answer: usize) -> Result<(f64, f64), String> {
    let began = Instant::now();
    let mut requests = Vec::new();
    for index in 0..batch {
        // Different from the first token on, so that no cache helps.
        let salt = began.elapsed().subsec_nanos() as usize + index;
        let prompt: Vec<usize> = (0..PROMPT).map(|place| 5 + (salt + place * 37) % 200).collect();
        let mut body = json!({"prompt": prompt, "max_tokens": answer, "ignore_eos": true, "temperature": 0});
        if let Some(model) = options.given("default-model") {
            body["model"] = model.into();
        }
        let request = pool.generate(&body.to_string(), RequestOptions::default());
        requests.push(request.map_err(|error| error.to_string())?);
    }
    let mut first = None;
    for request in &mut requests {
        read(request, || first = first.or_else(|| Some(began.elapsed().as_secs_f64())))?;
    }
    Ok((first.unwrap_or_default(), began.elapsed().as_secs_f64()))
}

fn read(request: &mut Request, mut on_token: impl FnMut()) -> Result<(), String> {
    while let Some(event) = request.next_blocking(None).map_err(|error| error.to_string())? {
        match event {
            Event::Text(piece) if !piece.tokens.is_empty() => on_token(),
            Event::Done(done) => {
                if let Some(error) = done.error {
                    return Err(error.to_string());
                }
            }
            _ => {}
        }
    }
    Ok(())
}
