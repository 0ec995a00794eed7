//! Models some of whose layers see a window: what of them comes back from other tiers, and what does not have to.

use std::fs;
use std::path::{Path, PathBuf};

use omlx::pool::{PoolOptions, TierSet};
use serde_json::{Value, json};

use crate::folders::{Random, fixture, segments};
use crate::{FLUSH, answer, exact, find, identified, open, stats, tiered};

const PROMPT: usize = 300;

fn prompt(seed: u64) -> Value {
    let mut random = Random(seed);
    let prompt: Vec<usize> = (0..PROMPT).map(|_| random.below(48)).collect();
    json!({ "prompt": prompt, "max_tokens": 12, "ignore_eos": true, "temperature": 0 })
}

/// Cache group and number of tokens before it, of a segment file.
fn place(file: &Path) -> (usize, usize) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let number = |key: &str| header["__metadata__"][key].as_str().unwrap().parse().unwrap();
    (number("group"), number("start"))
}

/// Of a window group the last rows are enough: without its earlier files everything is found all the same, and without the
/// last one a shorter beginning, or nothing.
#[test]
fn windows_need_their_last_rows_only() {
    let body = prompt(41);
    for (name, window) in [("gemma3_text-f32", 1), ("mistral-sliding-window", 0)] {
        let model = &fixture(name);
        let expected = answer(&open(model, exact()), &body).0;
        let folder = tempfile::tempdir().unwrap();
        let options = || PoolOptions { block_tokens: Some(8), ..tiered(folder.path()) };
        let cached = || {
            let pool = open(model, options());
            identified(&pool);
            let found = find(&pool, &body)["cold"].as_u64().unwrap() as usize;
            let (tokens, _, usage) = answer(&pool, &body);
            assert_eq!(tokens, expected);
            pool.cache_flush(None, FLUSH).unwrap();
            pool.close();
            // That a file is gone shows when it is read.
            assert!(usage.cached_tokens <= found);
            usage.cached_tokens
        };
        assert_eq!(cached(), 0);
        let files = segments(folder.path());
        assert_eq!(cached(), PROMPT - 1);
        let of_window = |file: &&PathBuf| place(file).0 == window;
        let early: Vec<_> = files.iter().filter(of_window).filter(|file| place(file).1 == 0).collect();
        assert_eq!(early.len(), 1, "256 tokens are in a file");
        early.into_iter().for_each(|file| fs::remove_file(file).unwrap());
        assert_eq!(cached(), PROMPT - 1, "the beginning of a window's rows is missed");
        let late = segments(folder.path());
        late.iter().filter(of_window).filter(|file| place(file).1 > 0).for_each(|file| fs::remove_file(file).unwrap());
        assert!(cached() < 8, "without the window there is nothing to go on from");
    }
}

/// Small pools: windows are evicted and come back, while their sequences compete for blocks.
#[test]
fn evicted_windows_come_back() {
    // Tokens that the cache has room for, and those that come from files at least: of windows a few of each prompt.
    for (name, room, hits) in [("gemma3_text-f32", 480, PROMPT), ("mistral-sliding-window", 112, 0)] {
        let model = &fixture(name);
        let bodies: Vec<Value> = (50..56).map(prompt).collect();
        let alone = open(model, exact());
        let expected: Vec<_> =
            bodies.iter().map(|body| (answer(&alone, body).0, alone.cache_clear(None, TierSet::ALL)).0).collect();
        let token_bytes = alone.metrics()[0].1.block_bytes / alone.metrics()[0].1.block_tokens;
        drop(alone);
        let folder = tempfile::tempdir().unwrap();
        let options = PoolOptions {
            block_tokens: Some(8),
            prefill_chunk: Some(32),
            cache_bytes: Some(token_bytes * room),
            max_sequences: Some(2),
            ..tiered(folder.path())
        };
        let pool = open(model, options);
        identified(&pool);
        for round in 0..3 {
            std::thread::scope(|scope| {
                let pool = &pool;
                let ask = |body| scope.spawn(move || answer(pool, body));
                let answers: Vec<_> = bodies.iter().map(ask).collect();
                for (answer, expected) in answers.into_iter().zip(&expected) {
                    assert_eq!(answer.join().unwrap().0, *expected, "round {round}");
                }
            });
            pool.cache_flush(None, FLUSH).unwrap();
        }
        let stats = stats(&pool);
        assert!(stats["cold"]["hit_tokens"].as_u64() > Some(hits as u64), "{stats}");
        pool.close();
    }
}
