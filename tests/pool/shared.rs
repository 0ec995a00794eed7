//! Hundreds of requests over four models (two language models, one for embeddings, one for scores) under a limit that holds two, in a process of its own whose memory is read from
//! outside. `OMLX_POOL_REQUESTS` sets their number.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use omlx::engine::{EncodeRequest, Event};
use omlx::pool::EnginePool;
use serde_json::{Value, json};

use crate::folders::{Random, encoder, model};
use crate::{MB, MIB, PATIENCE, body, open, options, peak, read, request, room_for, used};

/// Tells the other process what to do.
const TASK: &str = "OMLX_TEST_POOL";

/// Requests without the environment variable.
const REQUESTS: usize = 60;

/// Requests at the same time.
const CONCURRENCY: usize = 12;

const MODELS: [(&str, usize); 4] = [("a", 3), ("embedder", 3), ("c", 3), ("reranker", 2)];

/// Bytes of a process that lie in memory.
fn resident(process: u32) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{process}/statm")).ok()?;
    Some(statm.split_whitespace().nth(1)?.parse::<u64>().ok()? * 4096)
}

/// The other process; by itself it does nothing.
#[test]
fn asks_many_models() {
    let Ok(task) = std::env::var(TASK) else { return };
    let task: Value = serde_json::from_str(&task).unwrap();
    let folder = Path::new(task["folder"].as_str().unwrap());
    let requests = task["requests"].as_u64().unwrap() as usize;
    let limit = task["limit"].as_u64().unwrap();
    let mut random = Random(11);
    let bodies: Vec<Value> = (0..24).map(|at| body_for(MODELS[at % MODELS.len()].0, &mut random)).collect();
    let say = |word: &str| std::fs::write(folder.join("said"), word).unwrap();
    let pool = open(folder, room_for(limit));
    // What MLX and the first answer take once and for all.
    ask(&pool, &bodies[0]).read();
    let freed = pool.unload("a", false).unwrap();
    assert!(freed > 40 * MB, "{freed}");
    std::thread::sleep(Duration::from_millis(300));
    say("base");
    std::thread::sleep(Duration::from_millis(500));
    say("alone");
    let expected: Vec<_> = bodies.iter().map(|body| ask(&pool, body).read()).collect();
    say("shared");
    ask_all(&pool, &bodies, &expected, requests, &mut random);
    let status = pool.status();
    assert!(peak(&pool) <= limit, "{status}");
    for (name, _) in MODELS {
        pool.unload(name, false).unwrap();
    }
    assert_eq!(used(&pool), 0);
    std::thread::sleep(Duration::from_millis(300));
    say("empty");
    std::thread::sleep(Duration::from_millis(500));
    say("end");
}

/// A request in the shape that its model takes.
fn body_for(model: &str, random: &mut Random) -> Value {
    let mut text =
        || (0..1 + random.below(40)).map(|_| ["river", "stone", "fox"][random.below(3)]).collect::<Vec<_>>().join(" ");
    match model {
        "embedder" => json!({ "model": model, "input": (0..3).map(|_| text()).collect::<Vec<_>>() }),
        "reranker" => {
            json!({ "model": model, "query": text(), "documents": (0..3).map(|_| text()).collect::<Vec<_>>() })
        }
        _ => body(model, random),
    }
}

/// What a request gave.
enum Given {
    Tokens(Vec<u32>),
    Numbers(Vec<f32>),
}

impl Given {
    /// The same tokens; or numbers that differ by the order of sums, which depends on what shares a batch.
    fn is(&self, other: &Given) -> bool {
        match (self, other) {
            (Given::Tokens(a), Given::Tokens(b)) => a == b,
            (Given::Numbers(a), Given::Numbers(b)) => {
                let most = b.iter().fold(0f32, |most, x| most.max(x.abs()));
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-4 * most)
            }
            _ => false,
        }
    }
}

struct Asked(std::sync::Arc<omlx::engine::RequestState>, bool);

fn ask(pool: &EnginePool, body: &Value) -> Asked {
    let json = body.to_string();
    let encode = |request| pool.encode(request).unwrap();
    match (body.get("input"), body.get("documents")) {
        (Some(_), _) => Asked(encode(EncodeRequest::embed_from_json(json.as_bytes(), false).unwrap()), true),
        (_, Some(_)) => Asked(encode(EncodeRequest::rerank_from_json(json.as_bytes(), false).unwrap()), true),
        _ => Asked(pool.generate(request(body)).unwrap(), false),
    }
}

impl Asked {
    fn read(&self) -> Given {
        if !self.1 {
            return Given::Tokens(read(&self.0).unwrap());
        }
        let mut numbers = Vec::new();
        loop {
            match self.0.next(PATIENCE).expect("an event") {
                Event::Embeddings(given) => numbers = given.values,
                Event::Scores(given) => numbers = given.values,
                Event::Done(done) => return done.error.map_or(Given::Numbers(numbers), |error| panic!("{error}")),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn ask_all(pool: &EnginePool, bodies: &[Value], expected: &[Given], requests: usize, random: &mut Random) {
    let mut running = std::collections::VecDeque::new();
    for _ in 0..requests {
        if running.len() == CONCURRENCY {
            finish(&mut running, expected);
        }
        let which = random.below(bodies.len());
        running.push_back((which, ask(pool, &bodies[which])));
    }
    while !running.is_empty() {
        finish(&mut running, expected);
    }
}

type Running = std::collections::VecDeque<(usize, Asked)>;

fn finish(running: &mut Running, expected: &[Given]) {
    let (which, asked) = running.pop_front().unwrap();
    assert!(asked.read().is(&expected[which]), "request {which}");
}

#[test]
fn many_models_share_a_limit_that_holds_two() {
    let requests = std::env::var("OMLX_POOL_REQUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(REQUESTS);
    let folder = tempfile::tempdir().unwrap();
    for (seed, (name, layers)) in MODELS.into_iter().enumerate() {
        match name {
            "embedder" | "reranker" => encoder(folder.path(), name, layers, seed as u64, name == "reranker"),
            _ => model(folder.path(), name, layers, seed as u64),
        };
    }
    let one = |name: &str| {
        let pool = open(folder.path(), options(10_000 * MB));
        pool.load(name).unwrap();
        used(&pool)
    };
    let limit = one("a") + one("c");
    let all: u64 = MODELS.iter().map(|(name, _)| one(name)).sum();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "shared::asks_many_models", "--nocapture"])
        .env(TASK, json!({ "folder": folder.path(), "requests": requests, "limit": limit }).to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let said = || std::fs::read_to_string(folder.path().join("said")).unwrap_or_default();
    let (mut base, mut most, mut empty, mut samples) = (0, 0, u64::MAX, 0);
    let ended = loop {
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        if let Some(bytes) = resident(child.id()).filter(|&bytes| bytes > 0) {
            match said().as_str() {
                "base" => base = base.max(bytes),
                "alone" | "shared" => {
                    most = most.max(bytes);
                    samples += 1;
                }
                "empty" => empty = empty.min(bytes),
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(ended.success(), "{ended}");
    println!("limit {limit}, base {base}, most {most}, empty {empty}; {samples} samples");
    assert!(samples > 50 && base > 0);
    // With what the pool keeps for all of them.
    let limit = limit + 8 * MIB;
    assert!(most - base <= limit, "{} bytes more than at the beginning; the limit is {limit}", most - base);
    // The memory of what is unloaded is really free.
    assert!(empty < base + limit / 10, "{empty} bytes are left, {base} were there at the beginning");
    // Negative control: all four at once would be seen.
    assert!(all > limit * 3 / 2);
}
