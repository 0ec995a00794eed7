//! What has to leave small pools, a small hot tier, or the memory as a whole comes back from where it went.

use omlx::pool::{EnginePool, MemoryLimit, PoolOptions, TierOptions, TierSet};
use serde_json::{Value, json};

use crate::folders::{Random, fixture};
use crate::{FLUSH, answer, comes_true, exact, identified, identified_as, open, prompt_tokens, stats, tiered};

/// Tokens of a prompt, and those of them that can come from a cache.
const PROMPT: usize = 220;
const CACHED: usize = PROMPT - 1;

const MODEL: &str = "qwen3-4bit";

/// Prompts that share nothing.
fn prompts(seed: u64, count: usize, answer_tokens: usize) -> Vec<Value> {
    let mut random = Random(seed);
    (0..count)
        .map(|_| (0..PROMPT).map(|_| random.below(80)).collect::<Vec<_>>())
        .map(|prompt| json!({ "prompt": prompt, "max_tokens": answer_tokens, "ignore_eos": true }))
        .collect()
}

/// The answers that a model gives which has nothing else to do, and the bytes of a block.
fn alone(bodies: &[Value]) -> (Vec<Vec<u32>>, usize) {
    let alone = open(&fixture(MODEL), exact());
    let answers = bodies.iter().map(|body| answer(&alone, body).0).collect();
    (answers, alone.metrics()[0].1.block_bytes)
}

/// Asks one after the other; how many tokens of each prompt were cached. The answers must be `expected`.
fn ask(pool: &EnginePool, bodies: &[Value], expected: &[Vec<u32>], order: &[usize]) -> Vec<usize> {
    let ask = |&at: &usize| {
        let (tokens, _, usage) = answer(pool, &bodies[at]);
        assert_eq!(tokens, expected[at], "prompt {at}");
        usage.cached_tokens
    };
    order.iter().map(ask).collect()
}

/// The hot tier, forced on a machine that would not have one: what leaves small pools comes back from there.
#[test]
fn the_hot_tier_brings_back_what_left_the_pools() {
    let bodies = prompts(3, 4, 6);
    let (expected, block) = alone(&bodies);
    let tiers = TierOptions { hot_bytes: Some(64 << 20), always_restore: true, ..TierOptions::default() };
    // Room for one prompt, not for two.
    let pool = open(&fixture(MODEL), PoolOptions { tiers, cache_bytes: Some(block * 9), ..exact() });
    identified(&pool);
    for round in 0..3 {
        let cached = ask(&pool, &bodies, &expected, &[0, 1, 2, 3]);
        assert!(round == 0 || cached == [CACHED; 4], "round {round}: {cached:?}");
    }
    let stats = stats(&pool);
    assert!(stats["hot"]["hit_tokens"].as_u64() >= Some(8 * 192), "{stats}");
    assert!(pool.cache_clear(Some("model"), TierSet { pools: false, hot: true, cold: false }).unwrap() > 0);
    assert_eq!(answer(&pool, &bodies[0]).2.cached_tokens, 0, "the hot tier was cleared");
}

/// What small pools had to give up comes back from files, while other requests are running.
#[test]
fn rows_that_were_evicted_come_back_from_files() {
    const COUNT: usize = 6;
    let bodies = prompts(11, COUNT, 20);
    let (expected, block) = alone(&bodies);
    // Room for two of them.
    let options = |folder| PoolOptions { cache_bytes: Some(block * 16), max_sequences: Some(2), ..tiered(folder) };
    let folder = tempfile::tempdir().unwrap();
    let pool = open(&fixture(MODEL), options(folder.path()));
    identified(&pool);
    // Requests that had to compute again what others took from them between finding and running: a few where the machine is
    // slow. Most must not, or nothing came back.
    let mut robbed = 0;
    for round in 0..3 {
        std::thread::scope(|scope| {
            let ask = |at: usize| {
                let (pool, bodies) = (&pool, &bodies);
                scope.spawn(move || answer(pool, &bodies[at]))
            };
            let answers: Vec<_> = (0..COUNT).map(ask).collect();
            for (answer, expected) in answers.into_iter().zip(&expected) {
                let (tokens, _, usage) = answer.join().unwrap();
                assert_eq!(&tokens, expected);
                robbed += usize::from(round > 0 && usage.cached_tokens < CACHED);
            }
        });
        // From here on everything is in files, however slow the disk is: also what a request finds in the pools and
        // others evict before its turn comes.
        pool.cache_flush(None, FLUSH).unwrap();
    }
    let stats = stats(&pool);
    // Two of six may be in the pools still.
    let hits = stats["cold"]["hit_tokens"].as_u64().unwrap_or(0) as usize;
    assert!(robbed <= COUNT / 3, "{robbed} of {} requests were not restored: {stats}", 2 * COUNT);
    assert!(hits >= (2 * (COUNT - 2) - robbed) * CACHED, "{robbed}: {stats}");
    // The last step is still being counted when its answer is here.
    assert!(comes_true(|| self::stats(&pool)["blocks_used"] == 0), "{stats}");
}

/// An answer that nobody reads pauses, but not at the cost of those who wait for its place, also if their rows are in files.
#[test]
fn who_waits_with_rows_in_files_does_not_wait_for_a_slow_reader() {
    let folder = tempfile::tempdir().unwrap();
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
    let pool = open(&model, PoolOptions { max_sequences: Some(1), ..tiered(folder.path()) });
    identified(&pool);
    let mut body = prompts(29, 1, 4).remove(0);
    body["temperature"] = json!(0);
    let expected = answer(&pool, &body).0;
    pool.cache_flush(None, FLUSH).unwrap();
    pool.cache_clear(None, TierSet { pools: true, hot: false, cold: false }).unwrap();
    // More tokens than a reader may be behind.
    let long = json!({ "prompt": [5, 6, 7], "max_tokens": 1500, "ignore_eos": true, "temperature": 0 });
    let unread = pool.generate(crate::request(&long)).unwrap();
    assert!(comes_true(|| pool.metrics()[0].1.completion_tokens >= 1024), "it never gets so far");
    let (tokens, _, usage) = answer(&pool, &body);
    assert_eq!((tokens, usage.cached_tokens), (expected, CACHED));
    unread.cancel();
}

/// Pools for one prompt, a hot tier for a few, and files for all: what leaves one is found in the next, after an unload and
/// a restart too, with and without the hot tier.
#[test]
fn rows_pass_through_all_tiers() {
    const COUNT: usize = 6;
    const ORDER: [usize; 12] = [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5];
    let bodies = prompts(17, COUNT, 6);
    let (expected, block) = alone(&bodies);
    let folder = tempfile::tempdir().unwrap();
    let options = |hot: usize| {
        let mut options = PoolOptions { cache_bytes: Some(block * 9), ..tiered(folder.path()) };
        options.tiers.hot_bytes = Some(hot as u64);
        options
    };
    // Rows of a prompt take up to twice their bytes, since spans are whole pages.
    let hot = 2 * 7 * block * 2;
    let pool = open(&fixture(MODEL), options(hot));
    identified(&pool);
    for round in 0..3 {
        let cached = ask(&pool, &bodies, &expected, &ORDER);
        // What was dirty when it left the hot tier is nowhere else than in files.
        assert!(round == 0 || cached == [CACHED; ORDER.len()], "round {round}: {cached:?}");
        pool.cache_flush(None, FLUSH).unwrap();
    }
    let used = stats(&pool);
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    assert!(number(&used["hot"]["bytes"]) <= hot as u64, "{used}");
    assert!(number(&used["hot"]["hit_tokens"]) > 0 && number(&used["cold"]["hit_tokens"]) > 0, "{used}");
    assert_eq!(used["cold"]["refused"], 0);

    pool.unload("model", false).unwrap();
    identified(&pool);
    assert_eq!(ask(&pool, &bodies, &expected, &[0, 1, 2, 3, 4, 5]), [CACHED; COUNT], "after an unload");
    pool.close();
    drop(pool);
    for hot in [hot, 0] {
        let pool = open(&fixture(MODEL), options(hot));
        identified(&pool);
        assert_eq!(ask(&pool, &bodies, &expected, &[0, 1, 2, 3, 4, 5]), [CACHED; COUNT], "after a restart");
        pool.close();
    }
}

/// A memory limit that holds one model: the rows of a model that made room for another come back with it.
#[test]
fn a_model_that_made_room_for_another_finds_its_rows_again() {
    // So much work space that the freed arrays of other tests hardly count.
    const SEQUENCES: Option<usize> = Some(20_000);
    let bodies = prompts(23, 2, 4);
    let of = |body: &Value, model: &str| {
        let mut body = body.clone();
        body["model"] = json!(model);
        body
    };
    let open = |options: PoolOptions| {
        let pool = EnginePool::open(options).unwrap();
        pool.add_model(&fixture(MODEL), Some("first")).unwrap();
        pool.add_model(&fixture("llama-f32"), Some("second")).unwrap();
        pool
    };
    let (expected, one, more) = {
        let pool = open(PoolOptions { cache_bytes: Some(1 << 20), max_sequences: SEQUENCES, ..exact() });
        let expected: Vec<_> = bodies.iter().map(|body| answer(&pool, &of(body, "first")).0).collect();
        answer(&pool, &of(&bodies[0], "second"));
        let owners = pool.status()["memory"]["owners"].clone();
        let sum = |id: &str, parts: &[&str]| parts.iter().map(|part| owners[id][part].as_u64().unwrap()).sum::<u64>();
        let all = |id| sum(id, &["weights", "workspace", "cache"]);
        let least = |id| sum(id, &["weights", "workspace"]);
        (expected, all("first").max(all("second")), least("first").min(least("second")) / 2)
    };
    for hot in [0, 4 << 20] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = PoolOptions { cache_bytes: Some(1 << 20), max_sequences: SEQUENCES, ..tiered(folder.path()) };
        options.memory = MemoryLimit::Bytes(one + more + hot);
        options.tiers.hot_bytes = Some(hot);
        let pool = open(options);
        let loaded = || pool.status()["models"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        identified_as(&pool, "first");
        let cached = |bodies: &[Value]| {
            let ask = |(body, expected): (&Value, &Vec<u32>)| {
                let (tokens, _, usage) = answer(&pool, &of(body, "first"));
                assert_eq!(&tokens, expected, "{hot} bytes of a hot tier");
                usage.cached_tokens
            };
            bodies.iter().zip(&expected).map(ask).collect::<Vec<_>>()
        };
        assert_eq!(cached(&bodies), [0, 0]);
        assert_eq!(cached(&bodies), [prompt_tokens(&bodies[0]) - 1; 2]);
        for _ in 0..2 {
            answer(&pool, &of(&bodies[0], "second"));
            assert_eq!(loaded(), ["second"], "both fit: {}", pool.status());
            identified_as(&pool, "first");
            assert_eq!(loaded(), ["first"]);
            assert_eq!(cached(&bodies), [prompt_tokens(&bodies[0]) - 1; 2], "{hot} bytes of a hot tier");
        }
        pool.close();
    }
}
