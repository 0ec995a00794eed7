//! Rows that come back from files or from the host's memory give the same answers as rows that are computed: over restarts,
//! unloads, evictions and damage, token for token, in exact mode on the CPU.
//!
//! A plain run takes some seeded prompts; `OMLX_RESTARTS=100` takes so many rounds of them.

mod evictions;
mod folders;
mod hosts;
mod states;
mod windows;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use folders::{Random, copy_tree, cut, fixture, flip, len, root, segments};
use mlx_rs::Dtype;
use omlx::engine::{Event, Request, Usage};
use omlx::error::Status;
use omlx::kernels::Precision;
use omlx::mlx::Device;
use omlx::pool::{Codec, EnginePool, PoolOptions, TierOptions, TierSet};
use serde_json::{Value, json};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

/// A model that has nothing to do for so long writes by itself.
const IDLE: Duration = Duration::from_secs(5);

/// The disk is shared with others.
const FLUSH: Duration = Duration::from_secs(60);

fn exact() -> PoolOptions {
    PoolOptions {
        device: Some(Device::Cpu),
        dtype: Some(Dtype::Float32),
        precision: Precision::Exact,
        ..PoolOptions::default()
    }
}

/// With files in `folder`, which are read even where computing were faster.
fn tiered(folder: &Path) -> PoolOptions {
    let tiers = TierOptions {
        folder: Some(folder.to_owned()),
        cold_bytes: Some(2 << 30),
        always_restore: true,
        ..TierOptions::default()
    };
    PoolOptions { tiers, ..exact() }
}

fn open(model: &Path, options: PoolOptions) -> EnginePool {
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(model, Some("model")).unwrap();
    pool
}

fn request(body: &Value) -> Request {
    Request::from_json(body.to_string().as_bytes(), false).unwrap()
}

/// Tokens and text of an answer, and what it took.
fn answer(pool: &EnginePool, body: &Value) -> (Vec<u32>, String, Usage) {
    let state = pool.generate(request(body)).unwrap();
    let (mut tokens, mut text) = (Vec::new(), String::new());
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => {
                tokens.extend(delta.tokens);
                text += &delta.text;
            }
            Event::Loading(..)
            | Event::Started(..)
            | Event::ChoiceDone(..)
            | Event::Embeddings(_)
            | Event::Scores(_) => {}
            Event::Done(done) => match done.error {
                None => return (tokens, text, done.usage),
                Some(error) => panic!("{error}"),
            },
        }
    }
}

/// Waits for something that another thread does.
fn comes_true(mut condition: impl FnMut() -> bool) -> bool {
    (0..12_000).any(|_| {
        let there = condition();
        if !there {
            std::thread::sleep(Duration::from_millis(5));
        }
        there
    })
}

/// Waits until the model's files are known, so that what follows does not depend on how fast they are read.
fn identified(pool: &EnginePool) {
    identified_as(pool, "model");
}

fn identified_as(pool: &EnginePool, id: &str) {
    pool.load(id).unwrap();
    let known = || find(pool, &json!({ "model": id, "prompt": [1, 2] }))["stopped_by"] != "not_identified";
    assert!(comes_true(known), "the files of {id} are never identified");
}

/// Where the tokens of a prompt are cached.
fn find(pool: &EnginePool, body: &Value) -> Value {
    serde_json::from_str(&pool.cache_find(&request(body)).unwrap()).unwrap()
}

fn stats(pool: &EnginePool) -> Value {
    serde_json::from_str(&pool.cache_stats(None).unwrap()).unwrap()
}

/// Prompts of which some share their beginnings, with greedy and sampled answers.
fn bodies(random: &mut Random, vocab: usize, longest: usize, count: usize) -> Vec<Value> {
    let shared: Vec<usize> = (0..longest / 2).map(|_| random.below(vocab)).collect();
    let body = |_| {
        let mut prompt = shared[..random.below(shared.len() + 1)].to_vec();
        prompt.extend((0..1 + random.below(longest / 2)).map(|_| random.below(vocab)).collect::<Vec<_>>());
        let mut body = json!({ "prompt": prompt, "max_tokens": 1 + random.below(12), "ignore_eos": true });
        body["seed"] = json!(random.below(1000));
        if random.below(3) == 0 {
            body["temperature"] = json!(1.1);
        }
        body
    };
    (0..count).map(body).collect()
}

fn prompt_tokens(body: &Value) -> usize {
    body["prompt"].as_array().unwrap().len()
}

#[test]
fn a_restart_changes_no_answer() {
    let rounds = std::env::var("OMLX_RESTARTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let models = [
        (fixture("llama-f32"), 80, 120),
        (fixture("gemma3_text-f32"), 48, 120),
        (fixture("mistral-sliding-window"), 80, 120),
        (fixture("qwen3-4bit"), 80, 200),
        (fixture("deepseek_v3-f32"), 48, 120),
        (fixture("qwen3_next-f32"), 48, 120),
        (fixture("lfm2-f32"), 48, 200),
        (root().join("models/tiny-chat"), 4096, 700),
    ];
    for round in 0..rounds {
        for (at, (model, vocab, longest)) in models.iter().enumerate() {
            let mut random = Random(1 + 100 * round + at as u64);
            let folder = tempfile::tempdir().unwrap();
            let bodies = bodies(&mut random, *vocab, *longest, 8);
            let alone = open(model, exact());
            let expected: Vec<_> =
                bodies.iter().map(|body| (answer(&alone, body).0, alone.cache_clear(None, TierSet::ALL)).0).collect();
            drop(alone);
            let block_tokens = [8, 16, 32][random.below(3)];
            let write_through = random.below(2) == 0;
            let options = || {
                let mut options = PoolOptions { block_tokens: Some(block_tokens), ..tiered(folder.path()) };
                options.tiers.write_through = write_through;
                options.overlap = Some(write_through);
                options
            };
            let pool = open(model, options());
            identified(&pool);
            let first: Vec<_> = bodies.iter().map(|body| answer(&pool, body).0).collect();
            assert_eq!(first, expected, "{} of round {round}", model.display());
            pool.close();
            drop(pool);
            let pool = open(model, options());
            identified(&pool);
            for (body, expected) in bodies.iter().zip(&expected) {
                let (tokens, _, usage) = answer(&pool, body);
                assert_eq!(tokens, *expected, "{} of round {round}", model.display());
                assert_eq!(usage.cached_tokens, prompt_tokens(body) - 1, "all but the last token come back");
            }
            let stats = stats(&pool);
            assert!(
                stats["cold"]["hit_tokens"].as_u64() > Some(0) && stats["prompt_tokens"] == bodies.len(),
                "{stats}"
            );
            pool.close();
        }
    }
}

/// Everything that rows depend on, changed one by one: a miss, and the answers of the changed model.
#[test]
fn what_is_not_the_same_model_is_a_miss() {
    let body = json!({ "prompt": (1..150).collect::<Vec<_>>(), "max_tokens": 8, "ignore_eos": true, "temperature": 0 });
    let folder = tempfile::tempdir().unwrap();
    let model = copy_tree(&root().join("models/tiny-chat"));
    let path = model.path();
    let cached = |options: PoolOptions| {
        let pool = open(path, options);
        identified(&pool);
        let (tokens, _, usage) = answer(&pool, &body);
        pool.close();
        (tokens, usage.cached_tokens)
    };
    let options = || tiered(folder.path());
    let (expected, none) = cached(options());
    assert_eq!(none, 0);
    assert_eq!(cached(options()), (expected.clone(), 148), "the same model");

    assert_eq!(cached(PoolOptions { precision: Precision::Fast, ..options() }).1, 0, "another precision");
    assert_eq!(cached(PoolOptions { dtype: Some(Dtype::Bfloat16), ..options() }).1, 0, "another number format");
    assert_eq!(cached(PoolOptions { block_tokens: Some(16), ..options() }).1, 0, "another block size");
    assert_eq!(cached(PoolOptions { context: Some(200), ..options() }).1, 0, "another context");
    let mut other = options();
    other.tiers.namespace = b"somebody else".to_vec();
    assert_eq!(cached(other).1, 0, "another user");

    let tokenizer = path.join("tokenizer.json");
    let text = fs::read(&tokenizer).unwrap();
    fs::write(&tokenizer, [text.as_slice(), b"\n"].concat()).unwrap();
    assert_eq!(cached(options()).1, 0, "another tokenizer");
    fs::write(&tokenizer, text).unwrap();
    assert_eq!(cached(options()), (expected.clone(), 148), "the tokenizer of before");

    // One bit of the last tensor.
    let weights = path.join("model.safetensors");
    let last = fs::metadata(&weights).unwrap().len() - 3;
    flip(&weights, last, 1);
    assert_eq!(cached(options()).1, 0, "another weight");
    flip(&weights, last, 1);
    assert_eq!(cached(options()), (expected, 148), "the weight of before");
}

/// Other weights in the same folder under the same name: a miss, and the answers of the new ones.
#[test]
fn a_model_that_was_quantised_anew_is_a_miss() {
    let body = json!({ "prompt": (1..70).collect::<Vec<_>>(), "max_tokens": 8, "ignore_eos": true, "temperature": 0 });
    let (cache, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = place.path().join("model");
    let cached = |name: &str| {
        let copy = copy_tree(&fixture(name));
        let _ = fs::remove_dir_all(&path);
        fs::rename(copy.path(), &path).unwrap();
        let alone = answer(&open(&path, exact()), &body).0;
        let pool = open(&path, tiered(cache.path()));
        identified(&pool);
        let (tokens, _, usage) = answer(&pool, &body);
        assert_eq!(tokens, alone, "{name}");
        pool.close();
        usage.cached_tokens
    };
    let found = ["qwen3-4bit", "qwen3-8bit", "qwen3-4bit", "qwen3-8bit"].map(cached);
    assert_eq!(found, [0, 0, 68, 68], "each has its own rows");
}

/// Damage of every kind to every file: fewer cached tokens, and the same answers.
#[test]
fn damage_is_a_miss() {
    damage_to_files_of("qwen3-4bit");
    damage_to_files_of("qwen3_next-f32");
}

fn damage_to_files_of(model: &str) {
    let model = fixture(model);
    let mut random = Random(5);
    let bodies = bodies(&mut random, 48, 400, 3);
    let alone = open(&model, exact());
    let expected: Vec<_> = bodies.iter().map(|body| answer(&alone, body).0).collect();
    drop(alone);
    type Damage = fn(&[PathBuf], &mut Random);
    let damages: [(&str, Damage); 5] = [
        ("a flipped bit", |files, random| {
            files.iter().for_each(|file| flip(file, random.below(len(file) as usize) as u64, 1 << random.below(8)));
        }),
        ("shorter files", |files, random| {
            files.iter().for_each(|file| cut(file, len(file) * random.below(100) as u64 / 100));
        }),
        ("no files", |files, _| files.iter().for_each(|file| fs::remove_file(file).unwrap())),
        ("zeros", |files, _| files.iter().for_each(|file| fs::write(file, vec![0; len(file) as usize]).unwrap())),
        ("each other's content", |files, _| {
            let contents: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
            files.iter().zip(contents.iter().cycle().skip(1)).for_each(|(file, other)| fs::write(file, other).unwrap());
        }),
    ];
    for (what, damage) in damages {
        let folder = tempfile::tempdir().unwrap();
        let pool = open(&model, tiered(folder.path()));
        identified(&pool);
        bodies.iter().for_each(|body| drop(answer(&pool, body)));
        pool.close();
        drop(pool);
        let files = segments(folder.path());
        assert!(files.len() > 2, "{what}: {files:?}");
        damage(&files, &mut random);
        let pool = open(&model, tiered(folder.path()));
        identified(&pool);
        for (body, expected) in bodies.iter().zip(&expected) {
            assert_eq!(&answer(&pool, body).0, expected, "{what}");
        }
        let hits = stats(&pool)["cold"]["hit_tokens"].as_u64().unwrap_or(0);
        // A bit of what fills the end of a file belongs to nothing.
        assert!(what == "a flipped bit" || hits == 0, "{what}: {hits} tokens were believed");
        pool.close();
    }
}

/// A folder that disappears, or cannot be written, costs nothing but the cache.
#[test]
fn a_folder_may_disappear() {
    let model = fixture("qwen3-4bit");
    let folder = tempfile::tempdir().unwrap();
    let (pool, alone) = (open(&model, tiered(folder.path())), open(&model, exact()));
    identified(&pool);
    let mut random = Random(9);
    for (at, body) in bodies(&mut random, 80, 200, 6).iter().enumerate() {
        if at == 2 {
            fs::remove_dir_all(folder.path()).unwrap();
        }
        assert_eq!(answer(&pool, body).0, answer(&alone, body).0);
        if at == 3 || at == 4 {
            pool.cache_clear(None, TierSet { pools: true, hot: false, cold: false }).unwrap();
        }
    }
    // Rows that a pause before this may not have tried to write already.
    answer(&pool, &bodies(&mut random, 80, 200, 1)[0]);
    assert!(pool.cache_flush(None, FLUSH).is_err(), "nobody is told that the folder is gone");
}

#[test]
fn one_pool_at_a_time_uses_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let first = EnginePool::open(tiered(folder.path())).unwrap();
    let refused = EnginePool::open(tiered(folder.path())).unwrap_err();
    assert_eq!(refused.status(), Status::Busy);
    assert!(refused.message().contains(&folder.path().display().to_string()), "{refused}");
    drop(first);
    drop(EnginePool::open(tiered(folder.path())).unwrap());
}

/// What a model computed is there again after it was unloaded, and after the process ended without a word.
#[test]
fn unloading_loses_nothing_and_a_crash_only_what_was_not_flushed() {
    let model = fixture("qwen3-4bit");
    let folder = tempfile::tempdir().unwrap();
    let body = json!({ "prompt": (0..200).map(|n| n % 79).collect::<Vec<_>>(), "max_tokens": 5, "ignore_eos": true });
    let pool = open(&model, tiered(folder.path()));
    identified(&pool);
    let expected = answer(&pool, &body).0;
    pool.unload("model", false).unwrap();
    identified(&pool);
    let (tokens, _, usage) = answer(&pool, &body);
    assert_eq!((tokens, usage.cached_tokens), (expected.clone(), 199));
    // What the disk has at this moment is what a crash leaves.
    let other = json!({ "prompt": (0..200).map(|n| (3 * n + 1) % 79).collect::<Vec<_>>(), "max_tokens": 5, "ignore_eos": true });
    answer(&pool, &other);
    pool.cache_flush(None, FLUSH).unwrap();
    let late = json!({ "prompt": (0..200).map(|n| (5 * n + 2) % 79).collect::<Vec<_>>(), "max_tokens": 5, "ignore_eos": true });
    let after = answer(&pool, &late).0;
    let answered = Instant::now();
    let crashed = copy_tree(folder.path());
    let at_once = answered.elapsed() < IDLE;
    let revived = open(&model, tiered(crashed.path()));
    identified(&revived);
    assert_eq!(answer(&revived, &body).0, expected);
    assert_eq!(answer(&revived, &other).2.cached_tokens, 199);
    let (tokens, _, usage) = answer(&revived, &late);
    assert_eq!(tokens, after);
    assert!(usage.cached_tokens == 0 || !at_once, "nobody has flushed this one: {usage:?}");
}

/// The bundled model answers from facts that only a restored prefix has.
#[test]
fn the_bundled_model_remembers_what_was_restored() {
    let cases = fs::read_to_string(root().join("tests/fixtures/evaluation/recall-1500.jsonl")).unwrap();
    let cases: Vec<Value> = cases.lines().take(3).map(|line| serde_json::from_str(line).unwrap()).collect();
    let folder = tempfile::tempdir().unwrap();
    let model = root().join("models/tiny-chat");
    let body =
        |case: &Value, tokens: usize| json!({ "prompt": case["prompt"], "max_tokens": tokens, "temperature": 0 });
    let pool = open(&model, tiered(folder.path()));
    identified(&pool);
    cases.iter().for_each(|case| drop(answer(&pool, &body(case, 1))));
    pool.close();
    drop(pool);
    let pool = open(&model, tiered(folder.path()));
    identified(&pool);
    for case in &cases {
        let (_, text, usage) = answer(&pool, &body(case, 60));
        assert!(usage.prompt_tokens > 1000 && usage.cached_tokens == usage.prompt_tokens - 1, "{usage:?}");
        assert_eq!(text.trim(), case["expected"].as_str().unwrap().trim());
    }
    assert_eq!(stats(&pool)["prompt_tokens"], 3, "everything else was restored");
}

/// Each turn of a conversation computes its own new tokens, over restarts too, and hardly more is written than they need.
#[test]
fn a_conversation_computes_and_writes_its_new_tokens_only() {
    const TURNS: usize = 50;
    let model = root().join("models/tiny-chat");
    let folder = tempfile::tempdir().unwrap();
    let mut pool = open(&model, tiered(folder.path()));
    identified(&pool);
    let mut messages = vec![json!({ "role": "system", "content": "The code of the red box is 4821." })];
    let (mut known, mut written, mut new_tokens, mut token_bytes) = (0, 0, 0, 0);
    for turn in 0..TURNS {
        if turn % 10 == 9 {
            written += stats(&pool)["cold"]["written_bytes"].as_u64().unwrap();
            pool.close();
            drop(pool);
            pool = open(&model, tiered(folder.path()));
            identified(&pool);
        }
        messages.push(json!({ "role": "user", "content": format!("Tell me a short story about fox number {turn}.") }));
        let body = json!({ "messages": messages, "max_tokens": 60, "temperature": 0 });
        let (tokens, text, usage) = answer(&pool, &body);
        // What the last turn's answer ended with was sampled and not computed.
        assert!(usage.cached_tokens + 1 >= known, "turn {turn}: {} of {known} tokens", usage.cached_tokens);
        new_tokens += usage.prompt_tokens + tokens.len() - known.min(usage.prompt_tokens);
        known = usage.prompt_tokens + tokens.len();
        messages.push(json!({ "role": "assistant", "content": text }));
        // As after a pause.
        pool.cache_flush(None, FLUSH).unwrap();
        let stats = stats(&pool);
        token_bytes = stats["block_bytes"].as_u64().unwrap() / stats["block_tokens"].as_u64().unwrap();
    }
    written += stats(&pool)["cold"]["written_bytes"].as_u64().unwrap();
    let most = new_tokens as f64 * token_bytes as f64 * 1.3;
    assert!((written as f64) < most, "{written} bytes for {new_tokens} tokens of {token_bytes}");
}

/// A template that drops the thinking of earlier turns: the next turn computes what follows the last common message, also
/// after a restart.
#[test]
fn a_template_that_drops_thinking_costs_the_last_turn_only() {
    const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
        {% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}\
        <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}";
    let changed = copy_tree(&root().join("models/tiny-chat"));
    fs::write(changed.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let model = changed.path();
    let folder = tempfile::tempdir().unwrap();
    let facts = "The code of the red box is 4821. Tom has a cat called Luna. ".repeat(12);
    let mut messages =
        vec![json!({ "role": "system", "content": facts }), json!({ "role": "user", "content": "Who is Luna?" })];
    let body =
        |messages: &[Value]| json!({ "messages": messages, "max_tokens": 30, "temperature": 0, "ignore_eos": true });
    let pool = open(model, tiered(folder.path()));
    identified(&pool);
    let (_, text, _) = answer(&pool, &body(&messages));
    let common = pool.render(&request(&body(&messages))).unwrap();
    let common = common.strip_suffix("<think>").unwrap();
    let common = pool.tokenize(None, common, false).unwrap().len();
    pool.close();
    drop(pool);
    let pool = open(model, tiered(folder.path()));
    identified(&pool);
    messages.push(json!({ "role": "assistant", "content": format!("<think>{text}</think> A cat.") }));
    messages.push(json!({ "role": "user", "content": "Of whom?" }));
    let next = body(&messages);
    assert!(!pool.render(&request(&next)).unwrap().contains(&text), "the template keeps what it should drop");
    let (_, _, usage) = answer(&pool, &next);
    assert!(common > 200 && usage.cached_tokens >= common, "{usage:?}, {common} tokens in common");
}

/// 8 bits a number: half the bytes, and a model that still remembers.
#[test]
fn eight_bits_a_number_are_enough_to_remember() {
    let cases = fs::read_to_string(root().join("tests/fixtures/evaluation/recall-1500.jsonl")).unwrap();
    let cases: Vec<Value> = cases.lines().take(3).map(|line| serde_json::from_str(line).unwrap()).collect();
    let model = root().join("models/tiny-chat");
    let body = |case: &Value| json!({ "prompt": case["prompt"], "max_tokens": 60, "temperature": 0 });
    let mut bytes = Vec::new();
    for codec in [Codec::Exact, Codec::Bits8] {
        let folder = tempfile::tempdir().unwrap();
        let options = || {
            let mut options = PoolOptions { dtype: None, ..tiered(folder.path()) };
            options.tiers.codec = codec;
            options
        };
        let pool = open(&model, options());
        identified(&pool);
        cases.iter().for_each(|case| drop(answer(&pool, &body(case))));
        pool.cache_flush(None, FLUSH).unwrap();
        bytes.push(stats(&pool)["cold"]["bytes"].as_u64().unwrap() as f64);
        pool.close();
        drop(pool);
        let pool = open(&model, options());
        identified(&pool);
        for case in &cases {
            let (_, text, usage) = answer(&pool, &body(case));
            assert_eq!(usage.cached_tokens, usage.prompt_tokens - 1, "{codec:?}");
            assert_eq!(text.trim(), case["expected"].as_str().unwrap().trim(), "{codec:?}");
        }
    }
    assert!(bytes[1] < 0.6 * bytes[0], "{bytes:?}");
}
