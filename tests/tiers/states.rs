//! Models whose layers keep states: what of a conversation is computed again, in one process and over restarts.

use std::fs;
use std::path::Path;
use std::time::Duration;

use omlx::engine::Usage;
use omlx::pool::{EnginePool, PoolOptions, TierSet};
use safetensors::tensor::{SafeTensors, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::folders::{Random, fixture, root};
use crate::{FLUSH, answer, exact, find, identified, open, request, stats, tiered};

const TURNS: usize = 10;

/// Of each kind: a delta rule with attention and experts, short convolutions.
const MODELS: [&str; 2] = ["qwen3_next-f32", "lfm2-f32"];

fn body(prompt: &[u32]) -> Value {
    json!({ "prompt": prompt, "max_tokens": 9, "ignore_eos": true, "temperature": 0 })
}

fn message(random: &mut Random) -> Vec<u32> {
    (0..5 + random.below(30)).map(|_| random.below(48) as u32).collect()
}

/// Plays a conversation with a pool for each turn that `next` gives; the answers are those of a pool that has cached nothing.
fn converse(model: &str, mut next: impl FnMut(Option<EnginePool>) -> EnginePool) {
    let alone = open(&fixture(model), exact());
    let (mut random, mut prompt, mut known, mut pool) = (Random(3), Vec::new(), 0, None);
    for turn in 0..TURNS {
        prompt.extend(message(&mut random));
        let last = pool.take();
        let pool = pool.insert(next(last));
        let (tokens, _, usage) = answer(pool, &body(&prompt));
        assert_eq!(tokens, answer(&alone, &body(&prompt)).0, "{model}, turn {turn}");
        alone.cache_clear(None, TierSet::ALL).unwrap();
        // All but the message and the last token of the answer before, which nobody has computed.
        assert_eq!(usage.cached_tokens, known, "{model}, turn {turn}");
        prompt.extend(&tokens);
        known = prompt.len() - 1;
    }
}

#[test]
fn a_turn_computes_its_own_tokens_only() {
    for model in MODELS {
        for block_tokens in [8, 32] {
            let options = || PoolOptions { block_tokens: Some(block_tokens), ..exact() };
            converse(model, |pool| pool.unwrap_or_else(|| open(&fixture(model), options())));
        }
    }
}

#[test]
fn a_turn_computes_its_own_tokens_only_after_a_restart() {
    for model in MODELS {
        let folder = tempfile::tempdir().unwrap();
        converse(model, |pool| {
            pool.iter().for_each(EnginePool::close);
            drop(pool);
            let pool = open(&fixture(model), PoolOptions { block_tokens: Some(8), ..tiered(folder.path()) });
            identified(&pool);
            pool
        });
    }
}

/// More conversations than there are slots: their states go to files, and the rows stay where they are.
#[test]
fn states_that_had_to_go_come_back_to_rows_that_stayed() {
    let model = MODELS[0];
    let folder = tempfile::tempdir().unwrap();
    let options = PoolOptions { tiers: tiered(folder.path()).tiers, ..short_of_states() };
    let (alone, pool) = (open(&fixture(model), exact()), open(&fixture(model), options));
    identified(&pool);
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| (0..30).map(|at| (at * 7 + seed) % 48).collect()).collect();
    for prompt in &prompts {
        answer(&pool, &body(prompt));
    }
    pool.cache_flush(None, FLUSH).unwrap();
    let found = find(&pool, &body(&prompts[0]));
    assert_eq!((&found["cold"], &found["missing"]), (&json!(29), &json!(0)), "{found}");
    let read = stats(&pool)["cold"]["read_bytes"].as_u64().unwrap();
    for prompt in &prompts {
        let (tokens, _, usage) = answer(&pool, &body(prompt));
        assert_eq!((tokens, usage.cached_tokens), (answer(&alone, &body(prompt)).0, 29));
        alone.cache_clear(None, TierSet::ALL).unwrap();
    }
    assert!(stats(&pool)["cold"]["read_bytes"].as_u64() > Some(read));
}

/// A pool with room for the rows of everything and for one state beside those that sequences need.
fn short_of_states() -> PoolOptions {
    PoolOptions { block_tokens: Some(8), max_sequences: Some(1), cache_bytes: Some(64 << 10), ..exact() }
}

#[test]
fn a_pinned_prompt_keeps_its_state() {
    let pool = open(&fixture(MODELS[0]), short_of_states());
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| (0..30).map(|at| (at * 7 + seed) % 48).collect()).collect();
    let cached = |prompt: &[u32]| answer(&pool, &body(prompt)).2.cached_tokens;
    prompts.iter().for_each(|prompt| assert_eq!(cached(prompt), 0));
    assert_eq!(cached(&prompts[0]), 0, "the states of the others have taken its place");
    assert_eq!(pool.cache_pin(&request(&body(&prompts[0]))).unwrap(), 29);
    prompts[1..].iter().for_each(|prompt| _ = cached(prompt));
    assert_eq!(cached(&prompts[0]), 29);
    // There is one slot for pins.
    cached(&prompts[1]);
    assert_eq!(pool.cache_pin(&request(&body(&prompts[1]))).unwrap(), 0, "a pin that holds nothing");
    pool.cache_unpin(&request(&body(&prompts[0]))).unwrap();
    prompts[1..].iter().for_each(|prompt| _ = cached(prompt));
    assert_eq!(cached(&prompts[0]), 0);
}

/// More rows than there are blocks: they go to files, and the states, which are small, stay where they are.
#[test]
fn rows_that_had_to_go_come_back_to_states_that_stayed() {
    let model = MODELS[1];
    let folder = tempfile::tempdir().unwrap();
    let options = PoolOptions { cache_bytes: Some(160 << 10), ..tiered(folder.path()) };
    let options = PoolOptions { block_tokens: Some(8), max_sequences: Some(1), ..options };
    let (alone, pool) = (open(&fixture(model), exact()), open(&fixture(model), options));
    identified(&pool);
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| (0..250).map(|at| (at * 7 + seed) % 48).collect()).collect();
    let expected: Vec<_> = prompts.iter().map(|prompt| answer(&alone, &body(prompt)).0).collect();
    for (prompt, expected) in prompts.iter().zip(&expected) {
        assert_eq!(answer(&pool, &body(prompt)).0, *expected);
    }
    // Whoever asks keeps the engine from being idle, which would write the states, too.
    let first = || find(&pool, &body(&prompts[0]));
    let comes_back = (0..400).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        first()["missing"] == 0
    });
    assert!(comes_back && first()["pool"] == 0 && first()["cold"] == 249, "{}", first());
    let (tokens, _, usage) = answer(&pool, &body(&prompts[0]));
    assert_eq!((tokens, usage.cached_tokens), (expected[0].clone(), 249));
}

/// The bundled model's tokenizer and template around a hybrid with random weights: its answers are noise, its prompts are not.
fn chat_model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (hybrid, chat) = (fixture(MODELS[0]), root().join("models/tiny-chat"));
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(chat.join(name), folder.path().join(name)).unwrap();
    }
    let bytes = fs::read(hybrid.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let vocab = 4096;
    let widened = tensors.tensors().into_iter().map(|(name, tensor)| {
        let is_table = name.contains("embed_tokens") || name.contains("lm_head");
        let rows = if is_table { vocab } else { tensor.shape()[0] };
        let row = tensor.data().len() / tensor.shape()[0];
        let data: Vec<u8> = tensor.data().iter().copied().cycle().take(rows * row).collect();
        let shape = [&[rows], &tensor.shape()[1..]].concat();
        (name, tensor.dtype(), shape, data)
    });
    let widened: Vec<_> = widened.collect();
    let views = widened
        .iter()
        .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let config = fs::read(hybrid.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["vocab_size"] = json!(vocab);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn chat(pool: &EnginePool, messages: &[Value]) -> (String, Usage) {
    let body = json!({ "messages": messages, "max_tokens": 8, "ignore_eos": true, "temperature": 0 });
    let (_, text, usage) = answer(pool, &body);
    (text, usage)
}

/// The answer that the next prompt has is another one than was given, as where a template leaves out the thinking: what is there
/// up to the last common message, and what asks for the answer, is found all the same.
fn changed_answers(model: &Path, mut next: impl FnMut(Option<EnginePool>) -> EnginePool) {
    let (mut messages, mut pool, mut before) = (Vec::new(), None, 0);
    for turn in 0..TURNS {
        messages.push(json!({ "role": "user", "content": format!("Question {turn}: what is a hybrid?") }));
        let last = pool.take();
        let pool = pool.insert(next(last));
        let (text, usage) = chat(pool, &messages);
        let alone = open(model, exact());
        assert_eq!(text, chat(&alone, &messages).0, "turn {turn}");
        // A prompt ends with the few tokens that ask for the answer.
        let asking = 6;
        let least = if turn == 0 { 0 } else { before - asking };
        assert!((least..=before).contains(&usage.cached_tokens), "turn {turn}: {usage:?} behind {before}");
        before = usage.prompt_tokens;
        messages.push(json!({ "role": "assistant", "content": "Something else." }));
    }
}

#[test]
fn what_follows_the_last_common_message_is_all_that_is_computed() {
    let model = chat_model();
    changed_answers(model.path(), |pool| pool.unwrap_or_else(|| open(model.path(), exact())));
}

#[test]
fn what_follows_the_last_common_message_is_all_that_is_computed_after_a_restart() {
    let (model, folder) = (chat_model(), tempfile::tempdir().unwrap());
    changed_answers(model.path(), |pool| {
        pool.iter().for_each(EnginePool::close);
        drop(pool);
        let pool = open(model.path(), tiered(folder.path()));
        identified(&pool);
        pool
    });
}
