//! Times an embedding model on the lines of a file, tokenising included:
//! `cargo run --release --example embed_bench -- FOLDER TEXTS [--rounds N] [--threads N] [--out FILE]`.
//!
//! Prints one line of JSON: texts, tokens, and the seconds of each round after one to warm up. `--out` writes the vectors as
//! little-endian f32.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use omlx::engine::{EncodeRequest, Event};
use omlx::error::{Error, Result};
use omlx::pool::{EnginePool, PoolOptions};

struct Arguments {
    folder: PathBuf,
    texts: PathBuf,
    rounds: usize,
    threads: Option<usize>,
    out: Option<PathBuf>,
}

fn arguments() -> Option<Arguments> {
    let mut given = std::env::args().skip(1);
    let (folder, texts) = (given.next()?.into(), given.next()?.into());
    let mut arguments = Arguments { folder, texts, rounds: 3, threads: None, out: None };
    while let Some(option) = given.next() {
        let value = given.next()?;
        match option.as_str() {
            "--rounds" => arguments.rounds = value.parse().ok()?,
            "--threads" => arguments.threads = Some(value.parse().ok()?),
            "--out" => arguments.out = Some(value.into()),
            _ => return None,
        }
    }
    Some(arguments)
}

/// Vectors of the request's texts, and their tokens.
fn embed(pool: &EnginePool, request: &EncodeRequest) -> Result<(Vec<f32>, usize)> {
    let state = pool.encode(request.clone())?;
    let mut vectors = Vec::new();
    loop {
        match state.next(None) {
            Ok(Event::Embeddings(given)) => vectors = given.values,
            Ok(Event::Done(done)) => return done.error.map_or(Ok((vectors, done.usage.prompt_tokens)), Err),
            Ok(_) => {}
            Err(status) => return Err(Error::new(status, "reading an event")),
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let pool = EnginePool::open(PoolOptions { threads: arguments.threads, ..PoolOptions::default() })?;
    pool.add_model(&arguments.folder, None)?;
    let all = std::fs::read_to_string(&arguments.texts).map_err(|e| Error::io(arguments.texts.display(), &e))?;
    let lines: Vec<&str> = all.lines().collect();
    let json = serde_json::json!({ "input": lines }).to_string();
    let request = EncodeRequest::embed_from_json(json.as_bytes(), false)?;
    let (mut seconds, mut tokens, mut vectors) = (Vec::new(), 0, Vec::new());
    for round in 0..=arguments.rounds {
        let start = Instant::now();
        (vectors, tokens) = embed(&pool, &request)?;
        if round > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    if let Some(path) = &arguments.out {
        let bytes: Vec<u8> = vectors.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(path, bytes).map_err(|e| Error::io(path.display(), &e))?;
    }
    let report = serde_json::json!({ "texts": lines.len(), "tokens": tokens, "seconds": seconds });
    let _ = writeln!(std::io::stdout(), "{report}");
    pool.close();
    Ok(())
}

fn main() -> std::process::ExitCode {
    let Some(arguments) = arguments() else {
        eprintln!("usage: embed_bench FOLDER TEXTS [--rounds N] [--threads N] [--out FILE]");
        return std::process::ExitCode::from(2);
    };
    match run(&arguments) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}
