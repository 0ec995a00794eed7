//! Engines over tiny models with token prompts: what comes out, and what happens when something breaks.

mod growing;
mod restoring;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::activity::Activity;
use super::events::ChoiceSink;
use super::*;
use crate::kernels::{Cpu, Precision};
use crate::pool::{EnginePool, PoolOptions, TierOptions, TierSet};

/// Long enough for anything here on a busy machine; a test that waits longer has hung.
const PATIENCE: Duration = Duration::from_secs(60);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// A pool with one tiny model under an id that no other test uses, so that armed faults hit this test only.
fn pool(id: &str) -> EnginePool {
    let pool =
        EnginePool::open(PoolOptions { device: Some(Device::Cpu), overlap: Some(true), ..Default::default() }).unwrap();
    pool.add_model(&fixture("qwen3-f32"), Some(id)).unwrap();
    pool
}

fn request(json: &str) -> Request {
    Request::from_json(json.as_bytes(), false).unwrap()
}

fn generate(pool: &EnginePool, id: &str, max_tokens: usize) -> Arc<RequestState> {
    pool.generate(request(&format!(r#"{{"model":"{id}","prompt":[1,2,3,4,5],"max_tokens":{max_tokens}}}"#))).unwrap()
}

/// All tokens and the done event; fails if there is not exactly one at the end.
fn finish(state: &RequestState) -> (Vec<u32>, Done) {
    let mut tokens = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        match state.next(Some(deadline - Instant::now())).expect("an event") {
            Event::Delta(delta) => tokens.extend(delta.tokens),
            Event::Done(done) => {
                assert_eq!(
                    state.next(Some(Duration::ZERO)),
                    Err(Status::Closed),
                    "something came after the done event"
                );
                return (tokens, done);
            }
            _ => {}
        }
    }
}

#[test]
fn the_pipelined_engine_gives_the_reference_tokens() {
    let pool =
        EnginePool::open(PoolOptions { device: Some(Device::Cpu), overlap: Some(true), ..Default::default() }).unwrap();
    for name in ["qwen3-4bit", "llama-f32", "mistral-sliding-window"] {
        pool.add_model(&fixture(name), None).unwrap();
        let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ids = |tensor: &str| -> Vec<u32> {
            let words = tensors.tensor(tensor).unwrap().data().chunks_exact(4);
            words.map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let (prompt, expected) = (ids("prompt"), ids("greedy"));
        let json = format!(r#"{{"model":"{name}","prompt":{prompt:?},"max_tokens":{}}}"#, expected.len());
        let (tokens, done) = finish(&pool.generate(request(&json)).unwrap());
        assert_eq!(tokens, expected, "{name}");
        assert_eq!((done.reason, done.usage.prompt_tokens), (FinishReason::Length, prompt.len()));
    }
}

#[test]
fn prompts_in_chunks_give_the_same_tokens() {
    let whole = finish(&generate(&pool("whole"), "whole", 12)).0;
    let options = PoolOptions { device: Some(Device::Cpu), prefill_chunk: Some(2), ..Default::default() };
    let chunked = EnginePool::open(options).unwrap();
    chunked.add_model(&fixture("qwen3-f32"), Some("chunked")).unwrap();
    assert_eq!(finish(&generate(&chunked, "chunked", 12)).0, whole);
}

/// A decoding step in which `fault` happens changes an answer of `model`, and nothing else does.
fn fault_changes_the_answer(model: &str, id: &'static str, fault: &'static str) {
    let options = PoolOptions { device: Some(Device::Cpu), block_tokens: Some(8), ..Default::default() };
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&fixture(model), Some(id)).unwrap();
    let prompt: Vec<usize> = (0..40).map(|i| i * 11 % 48).collect();
    let ask = || {
        let json = format!(r#"{{"prompt":{prompt:?},"max_tokens":12,"ignore_eos":true}}"#);
        let answer = finish(&pool.generate(request(&json)).unwrap()).0;
        pool.cache_clear(None, TierSet::ALL).unwrap();
        answer
    };
    let right = ask();
    assert_eq!(ask(), right);
    crate::fault::arm(fault, id, 2);
    assert_ne!(ask(), right, "tests of equal answers see nothing");
}

#[test]
fn blocks_in_the_wrong_order_change_the_answer() {
    fault_changes_the_answer("qwen3-f32", "wrong-table", "runner.table");
}

#[test]
fn a_window_that_is_one_block_off_changes_the_answer() {
    fault_changes_the_answer("gemma3_text-f32", "wrong-window", "runner.window");
}

#[test]
fn a_state_of_another_sequence_changes_the_answer() {
    fault_changes_the_answer("qwen3_next-f32", "wrong-state", "runner.state");
    fault_changes_the_answer("lfm2-f32", "wrong-convolution", "runner.state");
}

/// A `fault` while an answer's prompt comes from files changes the answer of `model`, and nothing else does.
fn fault_in_what_is_restored(model: &str, id: &'static str, fault: &'static str) {
    let folder = tempfile::tempdir().unwrap();
    let tiers = TierOptions { folder: Some(folder.path().to_owned()), always_restore: true, ..TierOptions::default() };
    let options = PoolOptions { device: Some(Device::Cpu), block_tokens: Some(8), tiers, ..Default::default() };
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&fixture(model), Some(id)).unwrap();
    let prompt: Vec<usize> = (0..41).map(|i| i * 11 % 48).collect();
    let json = format!(r#"{{"prompt":{prompt:?},"max_tokens":12,"ignore_eos":true}}"#);
    let ask = || {
        pool.cache_clear(None, TierSet { pools: true, hot: false, cold: false }).unwrap();
        finish(&pool.generate(request(&json)).unwrap())
    };
    let right = finish(&pool.generate(request(&json)).unwrap()).0;
    pool.cache_flush(None, PATIENCE).unwrap();
    let (restored, done) = ask();
    assert_eq!((restored, done.usage.cached_tokens), (right.clone(), 40));
    crate::fault::arm(fault, id, 0);
    assert_ne!(ask().0, right, "tests of equal answers see nothing");
}

#[test]
fn wrong_restored_rows_change_the_answer() {
    fault_in_what_is_restored("qwen3-f32", "wrong-rows", "restore.rows");
}

#[test]
fn a_wrong_restored_state_changes_the_answer() {
    fault_in_what_is_restored("qwen3_next-f32", "wrong-restored-state", "restore.state");
    fault_in_what_is_restored("lfm2-f32", "wrong-restored-convolution", "restore.state");
}

/// A fault at `point` ends one request with `Internal`; the other model and later requests are untouched.
fn survives(point: &'static str, id: &str) {
    let pool = pool(id);
    let bystander = format!("{id}-bystander");
    pool.add_model(&fixture("llama-f32"), Some(&bystander)).unwrap();
    let healthy = finish(&generate(&pool, id, 8)).0;
    let alone = finish(&generate(&pool, &bystander, 30)).0;
    crate::fault::arm(point, id, 3);
    let (hit, beside) = (generate(&pool, id, 400), generate(&pool, &bystander, 30));
    let (tokens, done) = finish(&hit);
    let error = done.error.expect("the request failed");
    assert_eq!((done.reason, error.status()), (FinishReason::Error, Status::Internal), "{error}");
    assert!(error.message().contains(&format!("injected at {point}")), "{error}");
    assert!(tokens.len() < 10, "the fault came late: {} tokens", tokens.len());
    let (tokens, done) = finish(&beside);
    assert_eq!((tokens, done.reason), (alone, FinishReason::Length), "the other engine was hit");
    assert_eq!(finish(&generate(&pool, id, 8)).0, healthy, "the model does not come back");
}

#[test]
fn a_panic_in_the_worker_ends_the_request_only() {
    survives("worker.step", "panic-worker");
}

#[test]
fn a_panic_in_a_batch_of_texts_ends_its_requests_only() {
    let pool = pool("panic-batch-bystander");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/bert");
    pool.add_model(&folder, Some("panic-batch")).unwrap();
    let embed = |text: &str| {
        let json = format!(r#"{{"model":"panic-batch","input":"{text}"}}"#);
        let state = pool.encode(EncodeRequest::embed_from_json(json.as_bytes(), false).unwrap()).unwrap();
        let mut result = None;
        loop {
            match state.next(Some(PATIENCE)).expect("an event") {
                Event::Done(done) => return (result, done),
                event => result = Some(event),
            }
        }
    };
    let (healthy, _) = embed("a text");
    assert!(matches!(healthy, Some(Event::Embeddings(_))));
    let alone = finish(&generate(&pool, "panic-batch-bystander", 30)).0;
    crate::fault::arm("encoder.batch", "panic-batch", 0);
    let beside = generate(&pool, "panic-batch-bystander", 30);
    let (nothing, done) = embed("a text");
    let error = done.error.expect("the request failed");
    assert_eq!((nothing, error.status()), (None, Status::Internal), "{error}");
    assert!(error.message().contains("injected at encoder.batch"), "{error}");
    let (tokens, done) = finish(&beside);
    assert_eq!((tokens, done.reason), (alone, FinishReason::Length), "the other engine was hit");
    assert_eq!(embed("a text").0, healthy, "the model does not come back");
}

#[test]
fn a_panic_in_a_kernel_ends_the_request_only() {
    survives("kernel", "panic-kernel");
}

/// How often to try: how much of a prompt a step takes depends on how long the steps before it took.
const TRIES: usize = 30;

/// A long prompt beside a running answer, in small pieces, of which some are computed at the same time as the answer.
fn parallel(id: &str, threads: usize) -> (EnginePool, Arc<RequestState>, Arc<RequestState>) {
    let target_latency = Some(Duration::from_nanos(1));
    let options =
        PoolOptions { device: Some(Device::Cpu), threads: Some(threads), target_latency, ..Default::default() };
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&fixture("qwen3-f32"), Some(id)).unwrap();
    let answer = generate(&pool, id, 2000);
    assert!(matches!(answer.next(Some(PATIENCE)), Ok(Event::Delta(_))));
    let prompt: Vec<usize> = (0..400).map(|at| 1 + at % 50).collect();
    let json = format!(r#"{{"model":"{id}","prompt":{prompt:?},"max_tokens":4}}"#);
    let prompt = pool.generate(request(&json)).unwrap();
    (pool, answer, prompt)
}

#[test]
fn a_prompt_is_computed_while_an_answer_is() {
    let tokens: Vec<_> = [1, 2, 4]
        .map(|threads| {
            let tries = if threads > 1 { TRIES } else { 1 };
            let mut tokens = Vec::new();
            let steps = (0..tries).find_map(|_| {
                let (pool, answer, prompt) = parallel("parallel", threads);
                let (all, done) = finish(&prompt);
                assert_eq!(done.reason, FinishReason::Length, "{:?}", done.error);
                answer.cancel();
                tokens = all;
                Some(pool.metrics()[0].1.parallel_steps).filter(|&steps| steps > 0)
            });
            assert_eq!(steps.is_some(), threads > 1, "{steps:?} steps on {threads} threads");
            tokens
        })
        .into();
    assert!(tokens.iter().all(|other| *other == tokens[0]), "{tokens:?}");
}

#[test]
fn a_panic_beside_an_answer_ends_the_requests_only() {
    let id = "panic-beside";
    crate::fault::arm("beside", id, 3);
    let failed = (0..TRIES).find_map(|_| {
        let (pool, answer, prompt) = parallel(id, 2);
        let error = finish(&prompt).1.error;
        if error.is_none() {
            answer.cancel();
        }
        Some((pool, answer, error?))
    });
    let (pool, answer, error) = failed.expect("the fault came");
    assert!(error.message().contains("injected at beside"), "{error}");
    assert_eq!(finish(&answer).1.error.map(|error| error.status()), Some(Status::Internal));
    assert_eq!(finish(&generate(&pool, id, 8)).0.len(), 8, "the model does not come back");
}

#[test]
fn a_panic_while_preparing_ends_the_request_only() {
    let pool = pool("panic-intake");
    crate::fault::arm("intake.prepare", "panic-intake", 0);
    let (_, done) = finish(&generate(&pool, "panic-intake", 4));
    assert_eq!(done.error.map(|e| e.status()), Some(Status::Internal));
    assert_eq!(finish(&generate(&pool, "panic-intake", 4)).1.reason, FinishReason::Length);
}

#[test]
fn a_cancelled_request_ends_as_cancelled() {
    let pool = pool("cancel");
    let (first, second) = (generate(&pool, "cancel", 500), generate(&pool, "cancel", 500));
    // The second waits behind the first and is cancelled there.
    second.cancel();
    assert_eq!(finish(&second).1.reason, FinishReason::Cancelled);
    assert!(matches!(first.next(Some(PATIENCE)), Ok(Event::Delta(_))));
    first.cancel();
    let (_, done) = finish(&first);
    assert_eq!((done.reason, done.error.map(|e| e.status())), (FinishReason::Cancelled, Some(Status::Cancelled)));
}

#[test]
fn a_cancel_takes_effect_within_one_step() {
    for overlap in [false, true] {
        let steps = |cancels: bool| {
            let options = PoolOptions { device: Some(Device::Cpu), overlap: Some(overlap), ..Default::default() };
            let pool = EnginePool::open(options).unwrap();
            pool.add_model(&fixture("qwen3-f32"), Some("cancel-steps")).unwrap();
            let state = generate(&pool, "cancel-steps", 30);
            // Called by the engine itself, between two steps: nobody is late.
            let request = Arc::downgrade(&state);
            let cancel = move || request.upgrade().iter().filter(|_| cancels).for_each(|state| state.cancel());
            state.set_wake(Some(Box::new(cancel)));
            let (tokens, done) = finish(&state);
            (pool.metrics()[0].1.steps, tokens.len(), done.reason)
        };
        // The prompt's step gives the first token; where steps overlap, the one behind it is on its way by then.
        assert_eq!(steps(true), (1 + u64::from(overlap), 1, FinishReason::Cancelled));
        assert_eq!(steps(false).1, 30, "there was something to cancel");
    }
}

#[test]
fn every_close_waits_until_the_engines_are_gone() {
    let pool = Arc::new(pool("close"));
    let running = generate(&pool, "close", 500);
    assert!(matches!(running.next(Some(PATIENCE)), Ok(Event::Delta(_))));
    let threads = || {
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.contains("close")).filter(|name| name.starts_with("omlx-")).count()
    };
    if cfg!(target_os = "linux") {
        assert_eq!(threads(), 2, "the engine's threads");
    }
    let closers: Vec<_> = (0..4)
        .map(|_| {
            let pool = Arc::clone(&pool);
            std::thread::spawn(move || pool.close())
        })
        .collect();
    for closer in closers {
        closer.join().unwrap();
        assert_eq!(threads(), 0, "a close returned before the engine was gone");
    }
}

#[test]
fn a_cancel_does_not_wait_for_a_long_prompt() {
    let models_dir = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("models"));
    let pool = EnginePool::open(PoolOptions { models_dir, device: Some(Device::Cpu), ..Default::default() }).unwrap();
    pool.load("tiny-chat").unwrap();
    // Some ten seconds of work where MLX's own kernels compute.
    let prompt: Vec<u32> = (0..4000).map(|i| 10 + i % 4000).collect();
    let state = pool.generate(request(&format!(r#"{{"prompt":{prompt:?}}}"#))).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let cancelled = Instant::now();
    state.cancel();
    let (tokens, done) = finish(&state);
    assert_eq!((tokens.len(), done.reason), (0, FinishReason::Cancelled));
    assert!(cancelled.elapsed() < Duration::from_secs(2), "the cancel took {:?}", cancelled.elapsed());
}

#[test]
fn unloading_and_closing_end_running_requests() {
    let pool = pool("unload");
    let running = generate(&pool, "unload", 500);
    assert!(matches!(running.next(Some(PATIENCE)), Ok(Event::Delta(_))));
    pool.unload("unload", false).unwrap();
    assert_eq!(finish(&running).1.reason, FinishReason::Cancelled);
    let again = generate(&pool, "unload", 500);
    pool.close();
    assert_eq!(finish(&again).1.error.map(|e| e.status()), Some(Status::Closed));
    let refused = pool.generate(request(r#"{"model":"unload","prompt":[1]}"#)).unwrap_err();
    assert_eq!(refused.status(), Status::Closed);
}

#[test]
fn prompts_that_do_not_fit_are_refused_with_numbers() {
    let pool = pool("context");
    let prompt: Vec<u32> = (0..512).map(|i| i % 80).collect();
    let (_, done) = finish(&pool.generate(request(&format!(r#"{{"prompt":{prompt:?}}}"#))).unwrap());
    let error = done.error.unwrap();
    assert_eq!(error.status(), Status::ContextLength);
    assert!(error.message().contains("512"), "{error}");
    // One token less leaves room for exactly one.
    let (tokens, done) = finish(&pool.generate(request(&format!(r#"{{"prompt":{:?}}}"#, &prompt[1..]))).unwrap());
    assert_eq!((tokens.len(), done.reason), (1, FinishReason::Length));
    let (_, done) = finish(&pool.generate(request(r#"{"prompt":[80]}"#)).unwrap());
    assert_eq!(done.error.map(|e| e.status()), Some(Status::InvalidRequest), "a token outside the vocabulary");
}

#[test]
fn stop_tokens_end_the_answer_and_are_not_part_of_it() {
    let pool = pool("stop");
    let free = finish(&generate(&pool, "stop", 12)).0;
    let at = free.iter().position(|t| *t != free[0]).expect("two different tokens");
    let json = format!(r#"{{"prompt":[1,2,3,4,5],"max_tokens":12,"stop_token_ids":[{}]}}"#, free[at]);
    let (tokens, done) = finish(&pool.generate(request(&json)).unwrap());
    assert_eq!((tokens.as_slice(), done.reason), (&free[..at], FinishReason::Stop));
    assert_eq!(done.usage.completion_tokens, at + 1);
}

#[test]
fn logprobs_come_with_every_token() {
    let pool = pool("logprobs");
    let json = r#"{"prompt":[1,2,3],"max_tokens":3,"logprobs":true,"top_logprobs":4}"#;
    let state = pool.generate(request(json)).unwrap();
    let mut seen = 0;
    while let Ok(Event::Delta(delta)) = state.next(Some(PATIENCE)) {
        assert_eq!(delta.logprobs.len(), delta.tokens.len());
        for (token, logprob) in delta.tokens.iter().zip(&delta.logprobs) {
            seen += 1;
            assert_eq!((logprob.token, logprob.top.len()), (*token, 4));
            // Greedy: the drawn token is the likeliest.
            assert_eq!((logprob.top[0].token, logprob.top[0].logprob), (*token, logprob.logprob));
            assert!(logprob.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob) && logprob.logprob <= 0.0);
        }
    }
    assert_eq!(seen, 3);
}

#[test]
fn a_reader_that_sleeps_pauses_its_sequence_and_loses_nothing() {
    // Rotary embeddings reach any position: a longer context needs no other weights.
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture("qwen3-f32").join(file), folder.path().join(file)).unwrap();
    }
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let longer = config.replace(r#""max_position_embeddings": 512"#, r#""max_position_embeddings": 4096"#);
    assert_ne!(config, longer);
    std::fs::write(folder.path().join("config.json"), longer).unwrap();
    let pool = EnginePool::open(PoolOptions { device: Some(Device::Cpu), ..Default::default() }).unwrap();
    pool.add_model(folder.path(), Some("pause")).unwrap();
    let state = generate(&pool, "pause", 1500);
    let deadline = Instant::now() + PATIENCE;
    while !state.is_full() {
        assert!(Instant::now() < deadline, "the queue never filled");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Paused: the engine is idle, and what waits does not grow any more.
    std::thread::sleep(Duration::from_millis(300));
    let metrics = pool.metrics()[0].1;
    assert_eq!((metrics.running_sequences, metrics.step_age_seconds), (1, 0.0));
    let Ok(Event::Delta(first)) = state.next(Some(Duration::ZERO)) else { panic!("nothing is waiting") };
    assert!(first.tokens.len() < 1100, "{} tokens piled up", first.tokens.len());
    let (rest, done) = finish(&state);
    assert_eq!((first.tokens.len() + rest.len(), done.reason), (1500, FinishReason::Length));
}

#[test]
fn a_step_that_does_not_end_grows_old() {
    let pool = pool("stuck");
    let age = || pool.metrics().first().map_or(0.0, |(_, metrics)| metrics.step_age_seconds);
    let state = generate(&pool, "stuck", 100);
    let (release, released) = crossbeam_channel::bounded::<()>(0);
    // The first token's reader holds up the thread that would read the step behind it.
    state.set_wake(Some(Box::new(move || {
        if std::thread::current().name().is_some_and(|name| name.starts_with("omlx-run")) {
            let _ = released.recv();
        }
    })));
    let deadline = Instant::now() + PATIENCE;
    while age() < 0.2 {
        assert!(Instant::now() < deadline, "it is {} seconds old", age());
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(release);
    assert_eq!(finish(&state).1.reason, FinishReason::Length);
    while age() > 0.0 {
        assert!(Instant::now() < deadline, "it is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_step_or_batch_that_hangs_from_its_launch_grows_old() {
    let pool = pool("slow-step");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/encoders/bert");
    pool.add_model(&folder, Some("slow-batch")).unwrap();
    let texts = EncodeRequest::embed_from_json(br#"{"model":"slow-batch","input":"a text"}"#, false).unwrap();
    for (point, id) in [("worker.slow", "slow-step"), ("encoder.slow", "slow-batch")] {
        let age = || {
            let all = pool.metrics();
            all.iter().find(|(known, _)| known == id).map_or(0.0, |(_, metrics)| metrics.step_age_seconds)
        };
        pool.load(id).unwrap();
        crate::fault::arm(point, id, 0);
        let state = if id == "slow-step" { generate(&pool, id, 1) } else { pool.encode(texts.clone()).unwrap() };
        let deadline = Instant::now() + PATIENCE;
        while age() < 0.2 {
            assert!(Instant::now() < deadline, "{id} is {} seconds old", age());
            std::thread::sleep(Duration::from_millis(10));
        }
        while !matches!(state.next(Some(PATIENCE)), Ok(Event::Done(_))) {}
        while age() > 0.0 {
            assert!(Instant::now() < deadline, "{id} is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn unread_pieces_merge_with_the_last_of_their_kind_only() {
    let (state, sink) = RequestState::new("m".into(), Failure::default(), Activity::new().enter());
    let call = |index| DeltaKind::ToolCall(ToolCallPart { index, id: format!("id{index}"), name: "f".into() });
    let pieces = [
        (0, DeltaKind::Reasoning, "a"),
        (0, DeltaKind::Reasoning, "b"),
        (0, DeltaKind::Text, "c"),
        (1, DeltaKind::Text, "x"),
        (0, call(0), "d"),
        (1, DeltaKind::Text, "y"),
        (0, call(0), "e"),
        (0, call(1), "f"),
        (0, DeltaKind::Text, "g"),
    ];
    for (choice, kind, text) in pieces {
        sink.delta(Delta { choice, kind, text: text.into(), tokens: vec![7], ..Delta::default() });
    }
    drop(sink);
    let mut seen = Vec::new();
    while let Ok(Event::Delta(delta)) = state.next(None) {
        seen.push((delta.choice, delta.kind, delta.text, delta.tokens.len()));
    }
    let expected = [
        (0, DeltaKind::Reasoning, "ab", 2),
        (0, DeltaKind::Text, "c", 1),
        (1, DeltaKind::Text, "xy", 2),
        (0, call(0), "de", 2),
        (0, call(1), "f", 1),
        (0, DeltaKind::Text, "g", 1),
    ];
    assert_eq!(seen, expected.map(|(choice, kind, text, tokens)| (choice, kind, text.to_owned(), tokens)));
}

#[test]
fn a_lost_sink_still_ends_its_request() {
    let (state, sink) = RequestState::new("m".into(), Failure::default(), Activity::new().enter());
    drop(sink);
    assert_eq!(finish(&state).1.error.map(|e| e.status()), Some(Status::Internal));
    let (state, sink) = RequestState::new("m".into(), Failure::default(), Activity::new().enter());
    sink.done(Done { reason: FinishReason::Stop, stop: None, error: None, usage: Usage::default() });
    assert_eq!(finish(&state).1.reason, FinishReason::Stop);
}

#[test]
fn the_wake_function_is_called_for_new_and_for_waiting_events() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let calls = Arc::new(AtomicUsize::new(0));
    let wake = |calls: &Arc<AtomicUsize>| -> Option<Wake> {
        let calls = Arc::clone(calls);
        Some(Box::new(move || {
            calls.fetch_add(1, Ordering::SeqCst);
        }))
    };
    let (state, sink) = RequestState::new("m".into(), Failure::default(), Activity::new().enter());
    state.set_wake(wake(&calls));
    sink.delta(Delta { text: "a".into(), ..Delta::default() });
    sink.delta(Delta { text: "b".into(), ..Delta::default() });
    assert_eq!(calls.load(Ordering::SeqCst), 1, "one call for the first unread event");
    state.set_wake(wake(&calls));
    assert_eq!(calls.load(Ordering::SeqCst), 2, "an event was waiting");
    let Ok(Event::Delta(merged)) = state.next(None) else { panic!("no text") };
    assert_eq!(merged.text, "ab");
    drop(sink);
    assert_eq!(calls.load(Ordering::SeqCst), 3, "the done event");
}

/// Tokens of a step are told of when all of them are there: a thread with many requests is woken once.
#[test]
fn pieces_of_a_step_are_told_of_together() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let calls = Arc::new(AtomicUsize::new(0));
    let (state, sink) = RequestState::new("m".into(), Failure::default(), Activity::new().enter());
    let counter = Arc::clone(&calls);
    state.set_wake(Some(Box::new(move || _ = counter.fetch_add(1, Ordering::SeqCst))));
    let sink = ChoiceSink::of(sink, 1).remove(0);
    let piece = |text: &str| sink.delta(Delta { text: text.into(), ..Delta::default() });
    let told = |state: &RequestState| {
        state.tell();
        calls.load(Ordering::SeqCst)
    };
    piece("a");
    piece("b");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    assert_eq!((told(&state), told(&state)), (1, 1));
    let Ok(Event::Delta(merged)) = state.next(None) else { panic!("no text") };
    assert_eq!(merged.text, "ab");
    // Who has looked already need not be told.
    piece("c");
    assert!(matches!(state.next(None), Ok(Event::Delta(_))));
    assert_eq!(told(&state), 1);
    piece("d");
    sink.finish(Ok(FinishReason::Stop), None, Usage::default());
    assert_eq!(calls.load(Ordering::SeqCst), 2, "the end tells of everything");
    assert!(matches!((state.next(None), state.next(None)), (Ok(Event::Delta(_)), Ok(Event::Done(_)))));
}
