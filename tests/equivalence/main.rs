//! Company changes nothing: an answer is the same whether a request is alone or joins and leaves batches, whether its
//! prompt is computed whole, in chunks or found in the cache, and whether it is preempted. In exact mode on the CPU, greedy
//! and sampled, on tiny models of every architecture and on the bundled one.
//!
//! A plain run plays some seeded schedules; `OMLX_SCHEDULES=500` plays so many.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mlx_rs::Dtype;
use omlx::engine::{EngineMetrics, Event, Request, RequestState};
use omlx::error::Status;
use omlx::kernels::Precision;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions, TierSet};
use serde_json::{Value, json};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

/// Tokens of an answer at most.
const MOST_TOKENS: usize = 24;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures/models").join(name)
}

/// Numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

fn exact() -> PoolOptions {
    PoolOptions {
        device: Some(Device::Cpu),
        dtype: Some(Dtype::Float32),
        precision: Precision::Exact,
        queue_length: Some(1000),
        ..PoolOptions::default()
    }
}

fn open(model: &Path, options: PoolOptions) -> EnginePool {
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(model, Some("model")).unwrap();
    pool
}

fn request(body: &Value) -> Request {
    Request::from_json(body.to_string().as_bytes(), false).unwrap()
}

/// Tokens of each answer, as many as came, and whether the request ended as cancelled. It is cancelled after `most` pieces of
/// text.
fn read(state: &RequestState, choices: usize, most: usize) -> (Vec<Vec<u32>>, bool) {
    let (mut answers, mut pieces) = (vec![Vec::new(); choices], 0);
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => {
                answers[delta.choice].extend(delta.tokens);
                pieces += 1;
                if pieces == most {
                    state.cancel();
                }
            }
            Event::Loading(..)
            | Event::Started(..)
            | Event::ChoiceDone(..)
            | Event::Embeddings(_)
            | Event::Scores(_) => {}
            Event::Done(done) => match done.error {
                None => return (answers, false),
                Some(error) if error.status() == Status::Cancelled => return (answers, true),
                Some(error) => panic!("{error}"),
            },
        }
    }
}

/// Tokens of each answer, or `None` if the request was cancelled.
fn answers(state: &RequestState, choices: usize) -> Option<Vec<Vec<u32>>> {
    let (answers, cancelled) = read(state, choices, usize::MAX);
    (!cancelled).then_some(answers)
}

/// Prompts that share beginnings, with all kinds of sampling.
fn bodies(random: &mut Random, vocab: usize, longest: usize, count: usize) -> Vec<Value> {
    let shared: Vec<Vec<usize>> = (0..3).map(|_| (0..longest / 2).map(|_| random.below(vocab)).collect()).collect();
    (0..count)
        .map(|_| {
            let mut prompt = shared[random.below(3)].clone();
            prompt.truncate(random.below(longest / 2 + 1));
            prompt.extend((0..1 + random.below(longest / 2)).map(|_| random.below(vocab)).collect::<Vec<_>>());
            let mut body = json!({ "prompt": prompt, "max_tokens": 1 + random.below(MOST_TOKENS), "ignore_eos": true });
            match random.below(5) {
                0 => body["temperature"] = json!(0.9),
                1 => {
                    body["temperature"] = json!(1.3);
                    body["top_p"] = json!(0.8);
                    body["repetition_penalty"] = json!(1.2);
                }
                2 => body["frequency_penalty"] = json!(0.7),
                _ => {}
            }
            body["seed"] = json!(random.below(1000));
            if random.below(6) == 0 {
                body["n"] = json!(3);
            }
            body
        })
        .collect()
}

fn choices(body: &Value) -> usize {
    body["n"].as_u64().unwrap_or(1) as usize
}

/// Each request by itself in a pool that caches nothing of the others: answers of `n` are separate requests.
fn alone(pool: &EnginePool, bodies: &[Value]) -> Vec<Vec<Vec<u32>>> {
    bodies
        .iter()
        .map(|body| {
            let one = |choice: usize| {
                let mut body = body.clone();
                body["seed"] = json!(body["seed"].as_u64().unwrap() + choice as u64);
                body.as_object_mut().unwrap().remove("n");
                let answer = answers(&pool.generate(request(&body)).unwrap(), 1).expect("nobody cancels");
                pool.cache_clear(None, TierSet::ALL).unwrap();
                answer.into_iter().next().unwrap()
            };
            (0..choices(body)).map(one).collect()
        })
        .collect()
}

/// Plays a schedule: requests join at random times, some are cancelled at once, some after a random number of events. Every
/// answer must be the expected one, or its beginning where the request was cancelled. Returns how many requests were
/// cancelled between the first token and the last.
fn play(pool: &EnginePool, bodies: &[Value], expected: &[Vec<Vec<u32>>], random: &mut Random) -> usize {
    let mut order: Vec<usize> = (0..bodies.len()).collect();
    (1..order.len()).rev().for_each(|i| order.swap(i, random.below(i + 1)));
    let cut = AtomicUsize::new(0);
    let check = |at: usize, state: &RequestState, most: usize| {
        let (found, cancelled) = read(state, choices(&bodies[at]), most);
        if cancelled {
            assert!(is_beginning(&found, &expected[at]), "{}: {found:?} of {:?}", bodies[at], expected[at]);
            let (some, all) = (found.iter().any(|tokens| !tokens.is_empty()), found == expected[at]);
            cut.fetch_add(usize::from(some && !all), Ordering::Relaxed);
        } else {
            assert_eq!(found, expected[at], "{}", bodies[at]);
        }
    };
    std::thread::scope(|scope| {
        let mut running: Vec<(usize, Arc<RequestState>)> = Vec::new();
        for &at in &order {
            if random.below(3) == 0 {
                std::thread::sleep(Duration::from_micros(random.below(3000) as u64));
            }
            let state = pool.generate(request(&bodies[at])).unwrap();
            match random.below(10) {
                0 => state.cancel(),
                1..4 => {
                    // Read as it comes: what waits unread becomes one event.
                    let (state, most) = (Arc::clone(&state), 1 + random.below(MOST_TOKENS / 2));
                    scope.spawn(move || check(at, &state, most));
                    continue;
                }
                _ => {}
            }
            running.push((at, state));
            if random.below(12) == 0 {
                pool.cache_clear(None, TierSet::ALL).unwrap();
            }
        }
        running.iter().for_each(|(at, state)| check(*at, state, usize::MAX));
    });
    cut.into_inner()
}

/// Whether each answer begins with what was found of it.
fn is_beginning(found: &[Vec<u32>], answers: &[Vec<u32>]) -> bool {
    found.len() == answers.len() && found.iter().zip(answers).all(|(found, answer)| answer.starts_with(found))
}

#[test]
fn a_wrong_beginning_is_noticed() {
    let answers = [vec![1, 2, 3], vec![4]];
    assert!(is_beginning(&[vec![1, 2], vec![]], &answers) && is_beginning(&answers, &answers));
    for wrong in [[vec![1, 3], vec![]], [vec![2], vec![4]], [vec![1, 2, 3, 4], vec![4]], [vec![], vec![1]]] {
        assert!(!is_beginning(&wrong, &answers), "{wrong:?}");
    }
}

fn schedules(plain: usize) -> usize {
    match std::env::var("OMLX_SCHEDULES") {
        Ok(count) => count.parse().unwrap(),
        Err(_) => plain,
    }
}

fn metrics(pool: &EnginePool) -> EngineMetrics {
    pool.metrics().into_iter().next().expect("a loaded model").1
}

/// The metrics when all requests have ended: their last events come a moment earlier.
fn metrics_at_rest(pool: &EnginePool) -> EngineMetrics {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let metrics = metrics(pool);
        let left = metrics.queued_requests + metrics.waiting_sequences + metrics.running_sequences;
        if left + metrics.blocks_used == 0 {
            return metrics;
        }
        assert!(std::time::Instant::now() < deadline, "something is left at idle: {metrics:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Options under which nothing stays the same but the answers.
fn settings(random: &mut Random, metrics: &EngineMetrics, longest: usize, keeps_states: bool) -> PoolOptions {
    let token_bytes = metrics.block_bytes / metrics.block_tokens;
    // Sometimes so little memory that sequences are preempted.
    let scarce = random.below(2) == 0;
    let block_tokens = if scarce { 8 } else { [8, 16, 32][random.below(3)] };
    // One of them at least, with its answer; a quarter of the memory may be for states.
    let least = (longest + MOST_TOKENS).div_ceil(block_tokens);
    let least = if keeps_states { (4 * least).div_ceil(3) } else { least };
    PoolOptions {
        prefill_chunk: Some(1 + random.below(40)),
        max_sequences: Some(if scarce { 8 } else { 1 + random.below(9) }),
        block_tokens: Some(block_tokens),
        cache_bytes: scarce.then(|| token_bytes * block_tokens * (least + random.below(least))),
        threads: Some(1 + random.below(3)),
        // Sometimes so short that prompts pass a few layers a step.
        target_latency: (random.below(2) == 0).then_some(Duration::from_nanos(1)),
        overlap: Some(random.below(2) == 0),
        ..exact()
    }
}

#[test]
fn company_changes_nothing_on_tiny_models() {
    let mut random = Random(7);
    let (mut preemptions, mut partial_steps, mut parallel_steps, mut cut) = (0, 0, 0, 0);
    // Of each kind of layer and of cache: full, windows, both, sinks and experts, chunks, latent, states, other layers' keys; and
    // with one part in each layer.
    let models = [
        "qwen3-4bit",
        "llama-f32",
        "mistral-sliding-window",
        "gemma3_text-f32",
        "gpt_oss-f32",
        "llama4-f32",
        "qwen3_moe-4bit",
        "deepseek_v3-f32",
        "qwen3_next-f32",
        "lfm2-f32",
        "gemma4_text-f32",
        "nemotron_h-f32",
    ];
    for _ in 0..schedules(18).div_ceil(models.len()) {
        for name in models {
            println!("{name}");
            let pool = open(&fixture(name), exact());
            let bodies = bodies(&mut random, 48, 100, 24);
            let expected = alone(&pool, &bodies);
            let keeps_states = ["qwen3_next-f32", "lfm2-f32", "nemotron_h-f32"].contains(&name);
            let company = open(&fixture(name), settings(&mut random, &metrics(&pool), 100, keeps_states));
            cut += play(&company, &bodies, &expected, &mut random);
            let metrics = metrics_at_rest(&company);
            preemptions += metrics.preemptions;
            println!("{name}: {} preempted, {} cached", metrics.preemptions, metrics.cached_tokens);
            partial_steps += metrics.partial_steps;
            parallel_steps += metrics.parallel_steps;
            company.close();
            pool.close();
        }
    }
    assert!(preemptions > 0, "nothing was preempted: this test sees less than it should");
    assert!(partial_steps > 0, "no prompt stopped between layers: this test sees less than it should");
    assert!(parallel_steps > 0, "nothing was computed at the same time: this test sees less than it should");
    assert!(cut > 0, "no answer was cancelled in its middle: this test sees less than it should");
}

#[test]
fn company_changes_nothing_on_the_bundled_model() {
    let mut random = Random(11);
    let model = root().join("models/tiny-chat");
    let pool = open(&model, exact());
    let bodies = bodies(&mut random, 4000, 300, 10);
    let expected = alone(&pool, &bodies);
    // As it was: in the cache of this pool, and in those of others.
    let mut cut = 0;
    for _ in 0..schedules(8).div_ceil(4) {
        cut += play(&pool, &bodies, &expected, &mut random);
    }
    let company = open(&model, settings(&mut random, &metrics(&pool), 300, false));
    cut += play(&company, &bodies, &expected, &mut random);
    assert!(cut > 0, "no answer was cancelled in its middle: this test sees less than it should");
    assert!(metrics_at_rest(&pool).cached_tokens > 0);
}

#[test]
fn a_shared_prompt_is_held_and_computed_once() {
    let pool = open(&root().join("models/tiny-chat"), PoolOptions { max_sequences: Some(16), ..exact() });
    pool.load("model").unwrap();
    let system: Vec<usize> = (0..2000).map(|i| 10 + i * 31 % 3900).collect();
    let states: Vec<_> = (0..16)
        .map(|own| {
            let prompt: Vec<usize> = system.iter().copied().chain([4000 + own, 5, 6]).collect();
            pool.generate(request(&json!({ "prompt": prompt, "max_tokens": 200, "ignore_eos": true }))).unwrap()
        })
        .collect();
    // All run, none has ended.
    for state in &states {
        assert!(matches!(state.next(PATIENCE), Ok(Event::Delta(_))));
    }
    // The numbers of a step come a moment after its tokens.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let mut now = metrics(&pool);
    while now.prompt_tokens < 2000 + 16 * 3 && std::time::Instant::now() < deadline {
        now = metrics(&pool);
    }
    let own = (3 + 200usize).div_ceil(now.block_tokens) + 1;
    let held = now.blocks_used * now.block_bytes;
    assert!(held <= (2000 / now.block_tokens + 16 * own) * now.block_bytes, "{held} bytes are held");
    assert_eq!((now.running_sequences, now.prompt_tokens), (16, 2000 + 16 * 3));
    states.iter().for_each(|state| state.cancel());
    states.iter().for_each(|state| assert!(answers(state, 1).is_none()));
}

/// Layers that see a window hold that and one block of each sequence, however long it becomes; the others hold all.
#[test]
fn windows_hold_their_window_and_one_block() {
    const SEQUENCES: usize = 4;
    // Layers that keep everything, of two of the same size.
    for (name, keep) in [("gemma3_text-f32", 1), ("mistral-sliding-window", 0)] {
        let options = PoolOptions { block_tokens: Some(8), max_sequences: Some(SEQUENCES), ..exact() };
        let pool = open(&fixture(name), PoolOptions { prefill_chunk: Some(16), ..options });
        let (prompt, answer) = (200, 250);
        let states: Vec<_> = (0..SEQUENCES)
            .map(|own| {
                let prompt: Vec<usize> = (0..prompt).map(|at| (7 * at + own) % 48).collect();
                pool.generate(request(&json!({ "prompt": prompt, "max_tokens": answer, "ignore_eos": true }))).unwrap()
            })
            .collect();
        // A step behind the last piece of the prompt, what that held is given back; numbers may be those of a step before.
        for state in &states {
            let mut tokens = 0;
            while tokens < 3 {
                if let Event::Delta(delta) = state.next(PATIENCE).expect("an event") {
                    tokens += delta.tokens.len();
                }
            }
        }
        let (mut seen, mut most) = (0, 0);
        loop {
            let now = metrics(&pool);
            if now.running_sequences < SEQUENCES {
                break;
            }
            let layer = now.block_bytes / 2;
            let tokens = (now.prompt_tokens + now.completion_tokens) as usize;
            // A token of each is on its way, and none of the blocks but the last ones is part full.
            let kept = keep * (tokens.div_ceil(8) + 2 * SEQUENCES);
            let windows = (2 - keep) * SEQUENCES * 2;
            assert!(now.used_bytes <= (kept + windows) * layer, "{now:?}");
            assert!(now.used_bytes >= keep * (tokens / 8 - SEQUENCES) * layer, "{now:?}");
            (seen, most) = (seen + 1, most.max(tokens));
        }
        assert!(seen > 20 && most > SEQUENCES * (prompt + answer / 2), "only {seen} looks, up to {most} tokens");
        states.iter().for_each(|state| assert!(answers(state, 1).is_some()));
        assert_eq!(metrics_at_rest(&pool).used_bytes, 0);
    }
}

#[test]
fn a_cached_prompt_answers_at_once_and_pins_hold() {
    let pool = open(&root().join("models/tiny-chat"), exact());
    let prompt: Vec<usize> = (0..2000).map(|i| 10 + i * 7 % 3900).collect();
    let body = json!({ "prompt": prompt, "max_tokens": 1, "ignore_eos": true });
    let cached = |body: &Value| {
        let state = pool.generate(request(body)).unwrap();
        loop {
            if let Event::Done(done) = state.next(PATIENCE).expect("an event") {
                return done.usage.cached_tokens;
            }
        }
    };
    assert_eq!(cached(&body), 0);
    let whole = metrics_at_rest(&pool).steps;
    assert_eq!(cached(&body), 1999);
    let hit = metrics_at_rest(&pool).steps - whole;
    assert!(whole > 2 && hit <= 2, "{whole} steps for the prompt, {hit} when it is cached");
    assert_eq!(pool.cache_pin(&request(&body)).unwrap(), 2000);
    assert_eq!(pool.cache_clear(None, TierSet::ALL).unwrap(), 0, "all that is cached is pinned");
    assert_eq!(cached(&body), 1999);
    pool.cache_unpin(&request(&body)).unwrap();
    assert_eq!(pool.cache_unpin(&request(&body)).map_err(|error| error.status()), Err(Status::NotFound));
    assert!(pool.cache_clear(None, TierSet::ALL).unwrap() > 0);
    assert_eq!(cached(&body), 0);
}

#[test]
fn a_full_queue_refuses_with_a_time() {
    let options = PoolOptions { max_sequences: Some(1), queue_length: Some(2), ..exact() };
    let pool = open(&root().join("models/tiny-chat"), options);
    pool.load("model").unwrap();
    let body = json!({ "prompt": [5, 6, 7], "max_tokens": 2000, "ignore_eos": true });
    let first = pool.generate(request(&body)).unwrap();
    assert!(matches!(first.next(PATIENCE), Ok(Event::Delta(_))));
    let waiting = [(); 2].map(|()| pool.generate(request(&body)).unwrap());
    let refused = pool.generate(request(&body)).unwrap_err();
    assert_eq!(refused.status(), Status::Busy);
    assert!(refused.after().is_some());
    [&first].into_iter().chain(&waiting).for_each(|state| state.cancel());
    [&first].into_iter().chain(&waiting).for_each(|state| assert!(answers(state, 1).is_none()));
    let after = pool.generate(request(&json!({ "prompt": [5], "max_tokens": 1 }))).unwrap();
    assert!(answers(&after, 1).is_some());
}
