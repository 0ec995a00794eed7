//! What hosts ask of the tiers: where a prompt is, to bring it, to keep it, to forget it, and what is there.

use std::fs;
use std::path::Path;

use omlx::error::Status;
use omlx::pool::{EnginePool, PoolOptions, TierLimits, TierSet};
use serde_json::{Value, json};

use crate::folders::{copy_tree, fixture, root, segments};
use crate::{FLUSH, answer, comes_true, find, identified, identified_as, open, request, stats, tiered};

const POOLS: TierSet = TierSet { pools: true, hot: false, cold: false };

/// A prompt of 200 tokens.
fn prompt() -> Vec<usize> {
    (0..200).map(|n| n % 79).collect()
}

fn body(prompt: &[usize]) -> Value {
    json!({ "prompt": prompt, "max_tokens": 1, "ignore_eos": true })
}

fn whereabouts(pool: &EnginePool, prompt: &[usize]) -> Value {
    find(pool, &json!({ "prompt": prompt }))
}

#[test]
fn hosts_find_fetch_pin_and_clear() {
    let model = fixture("qwen3-4bit");
    let folder = tempfile::tempdir().unwrap();
    let prompt = prompt();
    let body = body(&prompt);
    let pool = open(&model, tiered(folder.path()));
    identified(&pool);
    assert_eq!(whereabouts(&pool, &prompt)["stopped_by"], "not_cached");
    answer(&pool, &body);
    let found = whereabouts(&pool, &prompt);
    assert_eq!((&found["pool"], &found["missing"], &found["stopped_by"]), (&json!(199), &json!(0), &json!("complete")));
    assert_eq!(pool.cache_pin(&request(&body)).unwrap(), 200);
    pool.cache_flush(Some("model"), FLUSH).unwrap();
    let found = whereabouts(&pool, &prompt);
    assert_eq!((&found["pool"], &found["restore_seconds"]), (&json!(199), &json!(0.0)));
    answer(&pool, &body);
    assert_eq!(stats(&pool)["cold"]["read_bytes"], 0, "what the pools have is not read");
    pool.close();
    drop(pool);

    // The pin has brought the prompt back into the pools, and protects its files.
    let pool = open(&model, tiered(folder.path()));
    identified(&pool);
    assert!(comes_true(|| whereabouts(&pool, &prompt)["pool"] == 199), "{}", stats(&pool));
    pool.cache_clear(None, TierSet::ALL).unwrap();
    assert_eq!(whereabouts(&pool, &prompt)["pool"], 199, "a pinned prefix was cleared");
    pool.cache_unpin(&request(&body)).unwrap();
    pool.cache_clear(Some("model"), POOLS).unwrap();
    let found = whereabouts(&pool, &prompt);
    assert_eq!((&found["pool"], &found["cold"], &found["missing"]), (&json!(0), &json!(199), &json!(0)));
    assert!(found["restore_seconds"].as_f64() > Some(0.0), "{found}");
    assert_eq!(pool.cache_prefetch(&request(&body)).unwrap(), 199);
    assert_eq!(whereabouts(&pool, &prompt)["pool"], 199);
    assert!(pool.cache_clear(None, TierSet::ALL).unwrap() > 0);
    assert_eq!(whereabouts(&pool, &prompt)["missing"], 199);
    assert!(segments(folder.path()).is_empty(), "files are left");
    assert_eq!(pool.cache_unpin(&request(&body)).unwrap_err().status(), Status::NotFound);
    assert_eq!(pool.cache_clear(Some("nobody"), TierSet::ALL).unwrap_err().status(), Status::NotFound);
}

/// Why a match ends, whichever tier it ends in.
#[test]
fn a_match_says_why_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = prompt();
    let mut other = prompt.clone();
    other[100] = 79;
    let longer = [prompt.as_slice(), &[3; 40]].concat();
    let says = |pool: &EnginePool, prompt: &[usize], tier: &str, tokens: usize, stopped_by: &str| {
        let found = whereabouts(pool, prompt);
        assert_eq!((&found[tier], &found["stopped_by"]), (&json!(tokens), &json!(stopped_by)), "{found}");
    };
    for hot in [0, 64 << 20] {
        let mut options = tiered(folder.path());
        options.tiers.hot_bytes = Some(hot);
        let pool = open(&fixture("qwen3-4bit"), options);
        identified(&pool);
        answer(&pool, &body(&prompt));
        says(&pool, &prompt, "pool", 199, "complete");
        says(&pool, &prompt[..120], "pool", 119, "complete");
        says(&pool, &other, "pool", 100, "other_tokens");
        says(&pool, &longer, "pool", 200, "not_cached");
        pool.cache_flush(None, FLUSH).unwrap();
        pool.cache_clear(None, POOLS).unwrap();
        let tier = if hot > 0 { "hot" } else { "cold" };
        says(&pool, &prompt, tier, 199, "complete");
        says(&pool, &prompt[..120], tier, 119, "complete");
        says(&pool, &other, tier, 100, "other_tokens");
        says(&pool, &longer, tier, 200, "not_cached");
        // The pools have another way on from a place that other tiers pass.
        let mut early = prompt.clone();
        early[40] = 79;
        answer(&pool, &body(&early));
        says(&pool, &longer, tier, 160, "not_cached");
        says(&pool, &other, tier, 60, "other_tokens");
        pool.cache_clear(None, TierSet::ALL).unwrap();
        says(&pool, &prompt, tier, 0, "not_cached");
        pool.close();
    }
}

/// A pool over a folder with a copy of a model.
fn open_models(models: &Path, cache: &Path) -> EnginePool {
    let mut options = PoolOptions { models_dir: Some(models.to_owned()), ..tiered(cache) };
    options.tiers.hot_bytes = Some(64 << 20);
    EnginePool::open(options).unwrap()
}

/// By its alias, and by the name of a model that is no longer there: nothing that was said stays on the disk.
#[test]
fn clearing_reaches_every_name() {
    let (models, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let copy = copy_tree(&fixture("qwen3-4bit"));
    fs::rename(copy.path(), models.path().join("chat")).unwrap();
    let (body, others) = (body(&prompt()), body(&prompt()[1..]));
    let pool = open_models(models.path(), cache.path());
    pool.configure("chat", &json!({ "alias": "friend" })).unwrap();
    identified_as(&pool, "chat");
    let store = |body: &Value| {
        answer(&pool, body);
        pool.cache_flush(None, FLUSH).unwrap();
        assert!(!segments(cache.path()).is_empty());
    };
    store(&body);
    // What leaves the pools is in the hot tier as well.
    pool.cache_clear(None, POOLS).unwrap();
    let there = stats(&pool);
    assert!(there["hot"]["entries"].as_u64() > Some(0), "{there}");
    assert_eq!(pool.cache_clear(Some("nobody"), TierSet::ALL).unwrap_err().status(), Status::NotFound);
    assert!(pool.cache_clear(Some("friend"), TierSet::ALL).unwrap() > 0);
    let left = stats(&pool);
    assert_eq!((&left["hot"]["entries"], &left["cold"]["entries"]), (&json!(0), &json!(0)), "{left}");
    assert!(segments(cache.path()).is_empty(), "files are left");

    store(&body);
    store(&others);
    assert_eq!(pool.cache_pin(&request(&others)).unwrap(), 199);
    pool.close();
    drop(pool);
    fs::remove_dir_all(models.path().join("chat")).unwrap();
    let pool = open_models(models.path(), cache.path());
    assert_eq!(pool.cache_clear(Some("nobody"), TierSet::ALL).unwrap_err().status(), Status::NotFound);
    let left: Value = serde_json::from_str(&pool.cache_stats(Some("chat")).unwrap()).unwrap();
    assert!(left["cold"]["entries"].as_u64() > Some(0), "{left}");
    // Nobody could end its pins any more.
    assert!(pool.cache_clear(Some("chat"), TierSet::ALL).unwrap() > 0);
    assert!(segments(cache.path()).is_empty(), "files are left");
    pool.close();
}

/// What there is of models that are not loaded, and what the tiers did.
#[test]
fn statistics_tell_of_every_model_and_of_the_disk() {
    let (model, folder) = (fixture("qwen3-4bit"), tempfile::tempdir().unwrap());
    let body = body(&prompt());
    let number = |value: &Value| value.as_f64().unwrap_or(-1.0);
    let pool = open(&model, tiered(folder.path()));
    identified(&pool);
    answer(&pool, &body);
    pool.cache_flush(None, FLUSH).unwrap();
    let written = stats(&pool);
    let per_token = number(&written["block_bytes"]) / number(&written["block_tokens"]);
    let (new, bytes) = (number(&written["cold"]["new_tokens"]), number(&written["cold"]["written_bytes"]));
    assert_eq!(new, 201.0, "{written}");
    assert_eq!(number(&written["cold"]["written_bytes_per_new_token"]), bytes / new, "{written}");
    assert!(bytes / new >= per_token * 0.99, "{written}");
    pool.close();
    drop(pool);

    let pool = open(&model, tiered(folder.path()));
    let unloaded = stats(&pool);
    assert!(number(&unloaded["cold"]["bytes"]) > 0.0 && unloaded.get("steps").is_none(), "{unloaded}");
    let metrics: Value = serde_json::from_str(&pool.metrics_json()).unwrap();
    assert_eq!(metrics["pool"]["models_loaded"], 0);
    assert_eq!(metrics["models"]["model"]["cold_bytes"], unloaded["cold"]["bytes"], "{metrics}");
    assert!(pool.metrics_prometheus().contains("omlx_cold_bytes{model=\"model\"} "));
    identified(&pool);
    answer(&pool, &body);
    let read = stats(&pool);
    for tier in ["cold", "cold_total"] {
        assert!(number(&read[tier]["read_seconds"]) > 0.0 && number(&read[tier]["read_bytes"]) > 0.0, "{read}");
    }
    assert_eq!(pool.cache_stats(Some("nobody")).unwrap_err().status(), Status::NotFound);
    pool.close();
}

/// Limits that change while the pool is open: a quota of a model comes and goes.
#[test]
fn a_quota_can_be_lifted() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = tiered(folder.path());
    options.tiers.cold_bytes_per_model = Some(1);
    let pool = open(&root().join("tests/fixtures/models/qwen3-4bit"), options);
    identified(&pool);
    answer(&pool, &body(&prompt()));
    assert_eq!(pool.cache_flush(None, FLUSH).unwrap_err().status(), Status::Io, "nothing fits");
    pool.set_cache_limits(TierLimits { cold_per_model: Some(u64::MAX), ..TierLimits::default() }).unwrap();
    answer(&pool, &body(&prompt()[1..]));
    pool.cache_flush(None, FLUSH).unwrap();
    assert!(!segments(folder.path()).is_empty());
    pool.set_cache_limits(TierLimits { cold_per_model: Some(1), ..TierLimits::default() }).unwrap();
    assert!(segments(folder.path()).is_empty(), "the quota is not kept");
    pool.close();
}
