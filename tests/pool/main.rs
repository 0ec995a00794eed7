//! Several models in one pool, under one limit of memory.

mod folders;
mod footprint;
mod shared;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use folders::{Random, VOCAB, model};
use omlx::engine::{Event, Request, RequestState};
use omlx::error::{Error, Status};
use omlx::kernels::Precision;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, Machine, MemoryLimit, PoolOptions, Pressure, Reading, TierOptions, TierSet};
use serde_json::{Value, json};

const MB: u64 = 1_000_000;
const MIB: u64 = 1 << 20;

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

fn options(limit: u64) -> PoolOptions {
    PoolOptions {
        device: Some(Device::Cpu),
        precision: Precision::Exact,
        threads: Some(2),
        memory: MemoryLimit::Bytes(limit),
        ..PoolOptions::default()
    }
}

fn open(folder: &Path, options: PoolOptions) -> EnginePool {
    EnginePool::open(PoolOptions { models_dir: Some(folder.to_owned()), ..options }).unwrap()
}

fn request(body: &Value) -> Request {
    Request::from_json(body.to_string().as_bytes(), false).unwrap()
}

fn body(model: &str, random: &mut Random) -> Value {
    let prompt: Vec<usize> = (0..1 + random.below(60)).map(|_| random.below(VOCAB)).collect();
    json!({ "model": model, "prompt": prompt, "max_tokens": 1 + random.below(12), "ignore_eos": true })
}

/// Tokens of an answer, or why there is none.
fn read(state: &RequestState) -> Result<Vec<u32>, Error> {
    let mut tokens = Vec::new();
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => tokens.extend(delta.tokens),
            Event::Loading(..)
            | Event::Started(..)
            | Event::ChoiceDone(..)
            | Event::Embeddings(_)
            | Event::Scores(_) => {}
            Event::Done(done) => return done.error.map_or(Ok(tokens), Err),
        }
    }
}

fn answer(pool: &EnginePool, body: &Value) -> Result<Vec<u32>, Error> {
    pool.generate(request(body)).and_then(|state| read(&state))
}

/// "loading", "loaded", "failed", or nothing.
fn state(pool: &EnginePool, model: &str) -> String {
    pool.status()["models"][model]["state"].as_str().unwrap_or_default().to_owned()
}

/// Waits until `what` holds.
fn until(what: impl Fn() -> bool) {
    let started = Instant::now();
    while !what() {
        assert!(started.elapsed() < Duration::from_secs(30), "it never holds");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes of all models.
fn used(pool: &EnginePool) -> u64 {
    let memory = pool.status()["memory"].clone();
    memory["used"].as_u64().unwrap() - buffers(&memory)
}

/// Bytes that belong to none.
fn buffers(memory: &Value) -> u64 {
    memory["owners"]["buffers"]["workspace"].as_u64().unwrap()
}

/// Bytes that there ever were of all models.
fn peak(pool: &EnginePool) -> u64 {
    let memory = pool.status()["memory"].clone();
    memory["peak"].as_u64().unwrap() - buffers(&memory)
}

/// A limit with room for `bytes` of models.
fn room_for(bytes: u64) -> PoolOptions {
    options(bytes + 8 * MIB)
}

#[test]
fn a_model_that_does_not_fit_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 2, 1);
    let pool = open(folder.path(), options(40 * MB));
    let body = json!({ "model": "a", "prompt": [1, 2, 3], "max_tokens": 2 });
    let error = answer(&pool, &body).unwrap_err();
    assert_eq!(error.status(), Status::OutOfMemory);
    for part in ["\"a\"", "weights 58", "of 40 MB"] {
        assert!(error.message().contains(part), "{error}");
    }
    assert_eq!(used(&pool), 0);
    // It fits when there is more.
    pool.set_memory_limit(MemoryLimit::Bytes(200 * MB)).unwrap();
    assert_eq!(answer(&pool, &body).unwrap().len(), 2);
    let info = pool.load("a").unwrap();
    assert_eq!(pool.status()["memory"]["owners"]["a"]["weights"], info.weight_bytes);
    let held = used(&pool);
    assert_eq!(pool.unload("a", false).unwrap(), held);
    assert_eq!((used(&pool), pool.unload("a", false).unwrap()), (0, 0));
}

#[test]
fn the_least_recently_used_model_makes_room_and_pinned_ones_stay() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, name) in ["a", "b", "c"].into_iter().enumerate() {
        model(folder.path(), name, 2, seed as u64);
    }
    let one = {
        let pool = open(folder.path(), options(1000 * MB));
        pool.load("a").unwrap();
        used(&pool)
    };
    let pool = open(folder.path(), room_for(one * 5 / 2));
    let ask = |model: &str| answer(&pool, &json!({ "model": model, "prompt": [1, 2, 3], "max_tokens": 2 }));
    let loaded = || ["a", "b", "c"].into_iter().filter(|model| state(&pool, model) == "loaded").collect::<String>();
    ask("a").unwrap();
    ask("b").unwrap();
    assert_eq!(loaded(), "ab");
    ask("c").unwrap();
    assert_eq!(loaded(), "bc", "a was used before b");
    ask("b").unwrap();
    ask("a").unwrap();
    assert_eq!(loaded(), "ab", "c was used before b");
    pool.configure("b", &json!({ "pinned": true })).unwrap();
    ask("a").unwrap();
    ask("c").unwrap();
    assert_eq!(loaded(), "bc", "b was used before a, but is pinned");
    pool.configure("c", &json!({ "pinned": true })).unwrap();
    let error = ask("a").unwrap_err();
    assert_eq!(error.status(), Status::OutOfMemory);
    assert!(error.message().contains("no other model can be unloaded"), "{error}");
    pool.configure("c", &json!({ "pinned": null })).unwrap();
    ask("a").unwrap();
    assert_eq!(loaded(), "ab");
    assert!(peak(&pool) <= one * 5 / 2);
}

#[test]
fn a_model_in_use_ends_its_answers_before_it_makes_room() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 2, 1);
    model(folder.path(), "b", 2, 2);
    let long = json!({ "model": "a", "prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": true });
    let (one, expected) = {
        let pool = open(folder.path(), options(1000 * MB));
        let tokens = answer(&pool, &long).unwrap();
        (used(&pool), tokens)
    };
    let pool = open(folder.path(), room_for(one * 3 / 2));
    let first = pool.generate(request(&long)).unwrap();
    // The model is at work when the other one is asked for.
    let Ok(Event::Delta(begun)) = first.next(PATIENCE) else { panic!("no beginning") };
    let other = pool.generate(request(&json!({ "model": "b", "prompt": [1, 2, 3], "max_tokens": 2 }))).unwrap();
    // And this comes after it.
    let second = pool.generate(request(&long)).unwrap();
    let rest = read(&first).unwrap();
    assert_eq!([begun.tokens, rest].concat(), expected);
    assert_eq!(read(&other).unwrap().len(), 2);
    assert_eq!(read(&second).unwrap(), expected);
    assert!(peak(&pool) <= one * 3 / 2);
    // By hand, too.
    let third = pool.generate(request(&long)).unwrap();
    let freed = pool.unload("a", true).unwrap();
    assert!(freed > 20 * MB, "{freed}: {}", pool.status());
    assert_eq!(read(&third).unwrap(), expected);
    let fourth = pool.generate(request(&long)).unwrap();
    pool.unload("a", false).unwrap();
    assert_eq!(read(&fourth).unwrap_err().status(), Status::Cancelled);
}

#[test]
fn a_model_leaves_when_its_time_is_up() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    model(folder.path(), "b", 1, 2);
    let ttl = Some(Duration::from_millis(200));
    let pool = open(folder.path(), PoolOptions { ttl, ..options(1000 * MB) });
    pool.configure("b", &json!({ "ttl_seconds": -1 })).unwrap();
    let long = json!({ "model": "a", "prompt": [1], "max_tokens": 100, "ignore_eos": true });
    let started = Instant::now();
    assert_eq!(answer(&pool, &long).unwrap().len(), 100, "however long it takes");
    let took = started.elapsed();
    pool.load("b").unwrap();
    until(|| state(&pool, "a").is_empty());
    assert!(took > Duration::from_millis(200), "{took:?} say nothing");
    assert_eq!(state(&pool, "b"), "loaded");
    pool.configure("b", &json!({ "ttl_seconds": 0.1 })).unwrap();
    until(|| state(&pool, "b").is_empty());
}

#[test]
fn a_model_that_fails_leaves_the_others_alone() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "good", 1, 1);
    let bad = model(folder.path(), "bad", 1, 2).join("model.safetensors");
    let whole = std::fs::read(&bad).unwrap();
    let pool = open(folder.path(), options(1000 * MB));
    let good = json!({ "model": "good", "prompt": [1], "max_tokens": 60, "ignore_eos": true });
    let expected = answer(&pool, &good).unwrap();
    let beside = pool.generate(request(&good)).unwrap();
    std::fs::write(&bad, &whole[..whole.len() - 100]).unwrap();
    let request_of_bad = json!({ "model": "bad", "prompt": [1], "max_tokens": 2 });
    assert_eq!(answer(&pool, &request_of_bad).unwrap_err().status(), Status::InvalidModel);
    assert!(pool.status()["memory"]["owners"].get("bad").is_none_or(|own| own["weights"] == 0));
    assert_eq!(read(&beside).unwrap(), expected);
    std::fs::write(&bad, &whole).unwrap();
    assert_eq!(answer(&pool, &request_of_bad).unwrap().len(), 2);
}

#[test]
fn caches_share_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 2, 1);
    model(folder.path(), "b", 2, 2);
    let mut random = Random(5);
    let prompts: Vec<Value> = (0..6)
        .map(|at| {
            let prompt: Vec<usize> = (0..600).map(|_| random.below(VOCAB)).collect();
            let model = if at % 2 == 0 { "a" } else { "b" };
            json!({ "model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": true })
        })
        .collect();
    let ask = |pool: &EnginePool| -> Vec<Vec<u32>> {
        let states: Vec<_> = prompts.iter().map(|body| pool.generate(request(body)).unwrap()).collect();
        states.iter().map(|state| read(state).unwrap()).collect()
    };
    let (expected, both, cache) = {
        let pool = open(folder.path(), options(1000 * MB));
        let answers = ask(&pool);
        let cache = |model: &str| pool.status()["memory"]["owners"][model]["cache"].as_u64().unwrap();
        (answers, used(&pool), cache("a") + cache("b"))
    };
    // Room for both models, and for half of what their caches would take.
    let limit = both - cache / 2;
    let pool = open(folder.path(), room_for(limit));
    assert_eq!(ask(&pool), expected);
    let peak = peak(&pool);
    assert!(peak <= limit && peak > limit - cache / 2, "{peak} of {limit} bytes");
    // Of 2 KiB for each token and layer, too little for anyone's prompt, though enough to begin.
    let tight = open(folder.path(), room_for((both - cache) / 2 + 2 * 1024 * 500));
    let error = answer(&tight, &prompts[0]).unwrap_err();
    assert_eq!(error.status(), Status::OutOfMemory);
    assert!(error.message().contains("601 tokens"), "{error}");
}

#[test]
fn settings_hold_at_once_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    let file = folder.path().join("settings.json");
    let options = || PoolOptions { settings_file: Some(file.clone()), ..options(1000 * MB) };
    let pool = open(folder.path(), options());
    let body = json!({ "model": "chat", "prompt": [1, 2], "ignore_eos": true });
    assert_eq!(pool.generate(request(&body)).unwrap_err().status(), Status::NotFound);
    pool.configure("a", &json!({ "alias": "chat", "preload": true, "defaults": { "max_tokens": 3 } })).unwrap();
    assert_eq!(answer(&pool, &body).unwrap().len(), 3);
    let mut more = body.clone();
    more["max_tokens"] = json!(5);
    assert_eq!(answer(&pool, &more).unwrap().len(), 5, "the request has the last word");
    pool.configure("chat", &json!({ "context_length": 6 })).unwrap();
    assert_eq!(answer(&pool, &more).unwrap().len(), 4);
    more["prompt"] = json!([1, 2, 3, 4, 5, 6]);
    assert_eq!(answer(&pool, &more).unwrap_err().status(), Status::ContextLength);
    assert_eq!(pool.configure("a", &json!({ "alias": "a" })).unwrap_err().status(), Status::InvalidArgument);
    pool.close();
    drop(pool);
    let pool = open(folder.path(), options());
    until(|| state(&pool, "a") == "loaded");
    assert_eq!(answer(&pool, &body).unwrap().len(), 3);
    let settings = pool.settings("chat").unwrap();
    assert_eq!((settings.context_length, settings.alias.as_deref()), (Some(6), Some("chat")));
}

#[test]
fn loading_tells_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 8, 1);
    let pool = open(folder.path(), options(1000 * MB));
    let waiting: Vec<_> = (0..5)
        .map(|_| pool.generate(request(&json!({ "model": "a", "prompt": [1], "max_tokens": 1 }))).unwrap())
        .collect();
    let status = pool.status()["models"]["a"].clone();
    assert_eq!((status["state"].as_str(), status["requests"].as_u64()), (Some("loading"), Some(5)), "{status}");
    for state in &waiting {
        assert_eq!(read(state).unwrap().len(), 1);
    }
    let status = pool.status()["models"]["a"].clone();
    assert_eq!((status["state"].as_str(), status["requests"].as_u64()), (Some("loaded"), Some(0)));
    assert!(status["loaded_bytes"].as_u64().unwrap() * 10 > status["weight_bytes"].as_u64().unwrap() * 9);
}

#[test]
fn requests_hear_how_far_their_model_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 4, 1);
    let pool = open(folder.path(), options(1000 * MB));
    let events = |tells: bool| {
        let mut request = request(&json!({ "model": "a", "prompt": [1], "max_tokens": 2, "ignore_eos": true }));
        request.tells_loading = tells;
        let state = pool.generate(request).unwrap();
        let (mut loading, mut tokens) = (Vec::new(), 0);
        loop {
            match state.next(PATIENCE).expect("an event") {
                Event::Loading(there, all) => {
                    assert_eq!(tokens, 0, "a token came before the model was there");
                    loading.push((there, all));
                }
                Event::Delta(delta) => tokens += delta.tokens.len(),
                Event::Done(done) => {
                    assert_eq!((done.error, tokens), (None, 2));
                    return loading;
                }
                other => panic!("{other:?}"),
            }
        }
    };
    let loading = events(true);
    let all = pool.status()["models"]["a"]["weight_bytes"].as_u64().unwrap();
    assert_eq!(loading.last(), Some(&(all, all)), "{loading:?}");
    assert!(loading.is_sorted() && loading.iter().all(|&(there, all)| there <= all), "{loading:?}");
    assert!(events(true).is_empty(), "it is loaded");
    pool.unload("a", false).unwrap();
    assert!(events(false).is_empty(), "nobody asked");
}

#[test]
fn a_model_that_is_to_be_preloaded_loads_at_once() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    model(folder.path(), "b", 1, 2);
    let pool = open(folder.path(), options(1000 * MB));
    pool.configure("b", &json!({ "pinned": true })).unwrap();
    pool.configure("a", &json!({ "preload": true })).unwrap();
    until(|| state(&pool, "a") == "loaded");
    assert_eq!(state(&pool, "b"), "", "nobody asked for it");
    // What is settled already is not done again.
    pool.unload("a", false).unwrap();
    pool.configure("a", &json!({ "preload": true, "pinned": true })).unwrap();
    assert_eq!(state(&pool, "a"), "");
}

#[test]
fn an_idle_model_gives_back_what_holds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    model(folder.path(), "b", 1, 2);
    let pool = open(folder.path(), options(1000 * MB));
    let prompt: Vec<usize> = (0..1500).map(|n| n * 7 % VOCAB).collect();
    let ask = |model: &str| {
        answer(&pool, &json!({ "model": model, "prompt": prompt, "max_tokens": 1, "ignore_eos": true })).unwrap()
    };
    let cache = |model: &str| {
        let metrics = pool.metrics().into_iter().find(|(id, _)| id == model).unwrap().1;
        let account = pool.status()["memory"]["owners"][model]["cache"].as_u64().unwrap();
        (metrics.cache_bytes as u64, account, metrics.cached_tokens)
    };
    let expected = ["a", "b"].map(ask);
    let before = cache("a");
    pool.cache_clear(Some("a"), TierSet::ALL).unwrap();
    assert_eq!(cache("a").0, before.0, "not while it may have work the next moment");
    until(|| cache("a").0 < before.0 / 4);
    let now = cache("a");
    assert!(now.1 < before.1 && now.1 >= now.0, "{before:?} {now:?}");
    // What holds something stays: 512 numbers of 16 bits for each token.
    std::thread::sleep(Duration::from_secs(1));
    assert!(cache("b").0 >= 1500 * 1024);
    assert_eq!(["a", "b"].map(ask), expected);
    assert_eq!((cache("a").2, cache("b").2), (0, 1499));
}

#[test]
fn rows_on_their_way_to_and_from_files_are_in_the_account() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 2, 1);
    let limit = 640 * MIB;
    let owners = |cache: Option<&Path>| {
        let tiers = TierOptions { folder: cache.map(Path::to_owned), ..TierOptions::default() };
        let pool = open(folder.path(), PoolOptions { tiers, ..options(limit) });
        pool.load("a").unwrap();
        pool.status()["memory"]["owners"].clone()
    };
    let cache = tempfile::tempdir().unwrap();
    let (without, with) = (owners(None), owners(Some(cache.path())));
    assert_eq!(
        (&without["tiers"]["hot"], &with["tiers"]["hot"]),
        (&json!(0), &json!(10 * MIB)),
        "what is to be written"
    );
    // A token has 512 numbers of 16 bits in each layer. Read ahead, and the span that is being saved.
    let span = 256 * 2 * 1024;
    let workspace = |owners: &Value| owners["a"]["workspace"].as_u64().unwrap();
    assert_eq!(workspace(&with) - workspace(&without), 10 * MIB + span);
}

/// A machine that says what the test wants.
struct Told(Arc<Mutex<Reading>>);

impl Machine for Told {
    fn read(&mut self) -> Reading {
        *self.0.lock().unwrap()
    }
}

#[test]
fn the_pool_gives_way_when_the_system_needs_memory() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    model(folder.path(), "b", 1, 2);
    let total = 100_000 * MB;
    let reading = Arc::new(Mutex::new(Reading { total, available: total, ..Reading::default() }));
    let options = PoolOptions { models_dir: Some(folder.path().to_owned()), memory: MemoryLimit::Auto, ..options(0) };
    let pool = EnginePool::open_on(options, Box::new(Told(Arc::clone(&reading)))).unwrap();
    let limit = || pool.status()["memory"]["limit"].as_u64().unwrap();
    assert_eq!(limit(), total - (8 << 30));
    let prompt: Vec<usize> = (0..900).map(|n| n % VOCAB).collect();
    answer(&pool, &json!({ "model": "a", "prompt": prompt, "max_tokens": 1 })).unwrap();
    answer(&pool, &json!({ "model": "b", "prompt": [1], "max_tokens": 1 })).unwrap();
    pool.configure("b", &json!({ "pinned": true })).unwrap();
    let cache = || pool.metrics().iter().find(|(id, _)| id == "a").map_or(0, |(_, metrics)| metrics.cache_bytes);
    let before = cache();
    // Others take most of what there is.
    reading.lock().unwrap().available = 30_000 * MB;
    until(|| limit() < 32_000 * MB);
    assert_eq!((cache(), state(&pool, "a").as_str()), (before, "loaded"), "nobody is short yet");
    reading.lock().unwrap().pressure = Pressure::Some;
    until(|| cache() < before / 2);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(state(&pool, "a"), "loaded", "that was enough");
    reading.lock().unwrap().pressure = Pressure::Much;
    until(|| state(&pool, "a").is_empty());
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(state(&pool, "b"), "loaded", "it is pinned");
}

/// Rows in the host's memory go before any model does, also when none is loaded; those that files have come back from there.
#[test]
fn the_hot_tier_gives_way_when_the_system_needs_memory() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model(folder.path(), "a", 1, 1);
    let total = 100_000 * MB;
    let reading = Arc::new(Mutex::new(Reading { total, available: total, ..Reading::default() }));
    let tiers = TierOptions {
        folder: Some(cache.path().to_owned()),
        hot_bytes: Some(64 * MIB),
        always_restore: true,
        ..TierOptions::default()
    };
    let options = PoolOptions { models_dir: Some(folder.path().to_owned()), tiers, ..options(1000 * MB) };
    let pool = EnginePool::open_on(options, Box::new(Told(Arc::clone(&reading)))).unwrap();
    let body = json!({ "model": "a", "prompt": (0..900).map(|n| n % VOCAB).collect::<Vec<_>>(), "max_tokens": 1 });
    let find = || serde_json::from_str::<Value>(&pool.cache_find(&request(&body)).unwrap()).unwrap();
    let hot = || serde_json::from_str::<Value>(&pool.metrics_json()).unwrap()["pool"]["hot_bytes"].as_u64().unwrap();
    answer(&pool, &body).unwrap();
    until(|| find()["stopped_by"] != "not_identified");
    pool.unload("a", false).unwrap();
    let held = hot();
    assert!(held > 0, "what the pools had is in the hot tier");
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(hot(), held, "nobody is short");
    reading.lock().unwrap().pressure = Pressure::Some;
    until(|| hot() == 0);
    pool.load("a").unwrap();
    until(|| find()["stopped_by"] != "not_identified");
    assert_eq!(find()["cold"], 899);
}

#[test]
fn metrics_have_the_memory() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    let pool = open(folder.path(), options(500 * MB));
    pool.load("a").unwrap();
    let metrics: Value = serde_json::from_str(&pool.metrics_json()).unwrap();
    assert_eq!(metrics["pool"]["memory_limit_bytes"], 500 * MB);
    assert_eq!(metrics["pool"]["memory_used_bytes"], pool.status()["memory"]["used"]);
    assert!(metrics["models"]["a"]["weight_bytes"].as_u64().unwrap() > 20 * MB);
    assert!(pool.metrics_prometheus().contains("\nomlx_pool_memory_limit_bytes 500000000\n"));
}
