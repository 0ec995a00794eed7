//! Many requests of all kinds at once, some of which are cancelled, leave nothing behind and lose no event. A test program
//! of its own: memory and threads are counted per process. `OMLX_SOAK` sets the number of requests.

#![cfg(target_os = "linux")]

#[path = "../cycles/held.rs"]
mod held;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use held::held;
use omlx::engine::{EngineMetrics, Event, Request, RequestState};
use omlx::error::Status;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use serde_json::{Value, json};

/// Requests without the environment variable.
const REQUESTS: usize = 160;
/// Requests at the same time: more than run and wait together, so that some are refused.
const CONCURRENCY: usize = 32;
/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));
/// What may remain, however many the requests.
const TOLERANCE: i64 = 8 << 20;

/// Numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % end as u64) as usize
    }
}

/// A conversation or a completion; its beginning may be that of others.
fn body(random: &mut Random) -> Value {
    const TOPICS: [&str; 4] = ["a fox", "the sea", "numbers", "an old clock"];
    let topic = TOPICS[random.below(4)];
    let long = "Once there was a story that many had heard. ".repeat(random.below(12));
    let mut body = match random.below(3) {
        0 => json!({ "prompt": format!("{long}Now about {topic}:") }),
        _ => json!({ "messages": [{ "role": "user", "content": format!("{long}Tell me about {topic}.") }] }),
    };
    body["max_tokens"] = json!(1 + random.below(24));
    body["seed"] = json!(random.below(1000));
    match random.below(4) {
        0 => body["temperature"] = json!(0),
        1 => body["top_p"] = json!(0.8),
        2 => body["logprobs"] = json!(true),
        _ => body["stop"] = json!(["e"]),
    }
    if random.below(6) == 0 {
        body["n"] = json!(1 + random.below(3));
    }
    body
}

/// Sends until there is room in the queue; how often there was none is added to `refused`.
fn send(pool: &EnginePool, body: &Value, refused: &AtomicUsize) -> Arc<RequestState> {
    loop {
        match pool.generate(Request::from_json(body.to_string().as_bytes(), false).unwrap()) {
            Ok(state) => return state,
            Err(error) if error.status() == Status::Busy => {
                refused.fetch_add(1, Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}: {body}"),
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    done: AtomicUsize,
    cancelled: AtomicUsize,
    refused: AtomicUsize,
}

/// One request to its end, with a cancellation at a random event for every third.
fn play(pool: &EnginePool, seed: u64, counts: &Counts) {
    let mut random = Random(seed);
    let body = body(&mut random);
    let cancel_at = if random.below(3) == 0 { random.below(6) } else { usize::MAX };
    let state = send(pool, &body, &counts.refused);
    for event in 0.. {
        if event == cancel_at {
            state.cancel();
        }
        match state.next(PATIENCE).unwrap_or_else(|status| panic!("{status:?} instead of an event: {body}")) {
            Event::Loading(..)
            | Event::Started(..)
            | Event::Delta(_)
            | Event::ChoiceDone(..)
            | Event::Embeddings(_)
            | Event::Scores(_) => {}
            Event::Done(done) => {
                counts.done.fetch_add(1, Relaxed);
                match done.error {
                    None => {}
                    Some(error) if error.status() == Status::Cancelled => {
                        assert!(cancel_at <= event, "nobody cancelled {body}");
                        counts.cancelled.fetch_add(1, Relaxed);
                    }
                    Some(error) => panic!("{error}: {body}"),
                }
                break;
            }
        }
    }
    assert_eq!(state.next(Some(Duration::ZERO)), Err(Status::Closed), "an event after the last one");
}

fn play_all(pool: &EnginePool, seeds: std::ops::Range<usize>) -> Counts {
    let (counts, next) = (Counts::default(), AtomicUsize::new(seeds.start));
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENCY {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    play(pool, seed as u64, &counts);
                }
            });
        }
    });
    counts
}

/// Waits for what only the last events precede.
fn at_rest(pool: &EnginePool) -> EngineMetrics {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let metrics = pool.metrics().first().expect("a loaded model").1;
        let left = metrics.queued_requests + metrics.waiting_sequences + metrics.running_sequences;
        if left + metrics.blocks_used == 0 {
            return metrics;
        }
        assert!(Instant::now() < deadline, "something is left at idle: {metrics:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn many_requests_leave_nothing_behind() {
    let count = std::env::var("OMLX_SOAK").map_or(REQUESTS, |n| n.parse().expect("OMLX_SOAK is a number"));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    let mut options = PoolOptions { device: Some(Device::Cpu), queue_length: Some(16), ..PoolOptions::default() };
    // Room for a few of the longest at once: the others take blocks of what is cached, and of each other.
    options.cache_bytes = Some(1 << 20);
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&model, Some("model")).unwrap();
    play_all(&pool, 0..CONCURRENCY * 2);
    let warm = at_rest(&pool);
    // The last of the threads that asked are still on their way out.
    std::thread::sleep(Duration::from_millis(200));
    let before = held();
    let counts = play_all(&pool, CONCURRENCY * 2..CONCURRENCY * 2 + count);
    let metrics = at_rest(&pool);
    std::thread::sleep(Duration::from_millis(200));
    let after = held();
    let grown = after.bytes - before.bytes;
    println!(
        "{count} requests: {counts:?}, {} preemptions, {grown} bytes more, {} of {} threads",
        metrics.preemptions, after.threads, before.threads
    );
    assert_eq!(counts.done.into_inner(), count, "done events");
    assert!(counts.cancelled.into_inner() > 0 && counts.refused.into_inner() > 0);
    assert!(metrics.cached_tokens > 0 && metrics.preemptions > 0, "{metrics:?}");
    // MLX starts a thread, which stays, when a prompt is first computed beside answers.
    let beside = |metrics: &EngineMetrics| usize::from(metrics.parallel_steps > 0);
    let expected = before.threads + beside(&metrics) - beside(&warm);
    assert_eq!(after.threads, expected, "threads of this process");
    assert!(grown < TOLERANCE, "{count} requests left {grown} bytes");
    assert!(metrics.blocks_used == 0 && metrics.blocks_cached + metrics.blocks_free <= metrics.blocks_limit);

    // The measures see what is left: a request that nobody reads holds blocks until it is cancelled.
    let held_up =
        send(&pool, &json!({ "prompt": "one", "max_tokens": 4000, "ignore_eos": true }), &AtomicUsize::new(0));
    held_up.next(PATIENCE).unwrap();
    // The numbers follow the first token.
    let holds = |_| {
        std::thread::sleep(Duration::from_millis(5));
        pool.metrics().iter().any(|(_, metrics)| metrics.blocks_used > 0)
    };
    assert!((0..200).any(holds), "a running request holds no block");
    held_up.cancel();
    at_rest(&pool);
}
