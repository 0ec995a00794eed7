//! `omlx_generate` returns at once, whatever the model is doing.

use std::time::Duration;

use crate::cc;
use crate::host::Pool;

/// Bar for requests of a few hundred bytes.
const SMALL: Duration = Duration::from_micros(200);
/// Bar for requests of 1 MB.
const LARGE: Duration = Duration::from_millis(5);
/// Calls per case at least, and at most where the machine is too busy to measure.
const CALLS: [usize; 2] = [21, 200];

/// The fastest call: what else the machine does can only add to the times, and a call that waits for the model would
/// take longer every time.
fn best(bar: Duration, mut call: impl FnMut() -> Duration) -> Duration {
    let mut best = Duration::MAX;
    for count in 1..=CALLS[1] {
        best = best.min(call());
        if count >= CALLS[0] && best < bar {
            break;
        }
    }
    best
}

fn chat(messages: usize, bytes: usize) -> String {
    let message = |i: usize| {
        let role = if i.is_multiple_of(2) { "user" } else { "assistant" };
        serde_json::json!({ "role": role, "content": "the fox said \"no\"\n".repeat(bytes / 20) })
    };
    let messages: Vec<_> = (0..messages).map(message).collect();
    serde_json::json!({ "messages": messages, "max_tokens": 1 }).to_string()
}

/// Requests with their bars.
fn requests() -> Vec<(&'static str, String, Duration)> {
    let ids = (0..200_000).map(|i| (1000 + i % 3000).to_string()).collect::<Vec<_>>().join(",");
    let requests = vec![
        ("a small chat", chat(3, 100), SMALL),
        ("one message of 1 MB", chat(1, 950_000), LARGE),
        ("1 MB in 1000 messages", chat(999, 920), LARGE),
        ("1 MB of token ids", format!(r#"{{"prompt":[{ids}]}}"#), LARGE),
    ];
    for (name, json, bar) in &requests {
        let size = if *bar == SMALL { 100..1000 } else { 950_000..1_100_000 };
        assert!(size.contains(&json.len()), "{name} has {} bytes", json.len());
    }
    requests
}

#[test]
fn generate_returns_at_once() {
    let _quiet = cc::quiet();
    let pool = Pool::open();
    pool.load();
    for (name, json, bar) in requests() {
        // Each request is over before the next is measured.
        let time = best(bar, || pool.start(&json).1);
        println!("{name}: {time:?}");
        assert!(time < bar, "{name}: omlx_generate took {time:?}, the bar is {bar:?}");
    }
}

#[test]
fn generate_returns_at_once_while_the_model_loads() {
    let _quiet = cc::quiet();
    let pool = Pool::open();
    for (name, json, bar) in requests() {
        let time = best(bar, || {
            pool.unload();
            // The first starts the engine, the second finds it loading.
            let (first, starting) = pool.start(&json);
            first.cancel();
            let (_second, loading) = pool.start(&json);
            starting.max(loading)
        });
        println!("{name}, while loading: {time:?}");
        assert!(time < bar, "{name}: omlx_generate took {time:?} while loading, the bar is {bar:?}");
    }
}

/// From the call to the first token in the callback, where the model costs nothing; in microseconds.
const FIRST_CALLBACK: f64 = 200.0;

#[test]
fn the_first_callback_comes_at_once() {
    let source = cc::root().join("tests/capi/c/first_callback.c");
    let program = cc::compile(&source, "first-callback", &["-std=c99", "-O2"]);
    let quiet = cc::quiet();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let outcome = cc::run_alone(&quiet, &program, &["tests/fixtures/null/omlx-null", "5"]);
        assert!(outcome.success, "{}", outcome.stderr);
        best = best.min(outcome.stdout.trim().parse().expect("a number"));
        if best < FIRST_CALLBACK {
            break;
        }
    }
    println!("from omlx_generate to the first callback: {best} us");
    assert!(best < FIRST_CALLBACK, "{best} us, the bar is {FIRST_CALLBACK}");
}
