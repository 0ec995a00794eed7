//! Engines of embedding models and rerankers: what requests get, alone and together, and beside a language model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use omlx::config::read_json;
use omlx::engine::{EncodeRequest, Event, FinishReason, Request, RequestState, Usage};
use omlx::error::{Error, Status};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use serde_json::{Value, json};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

/// Largest error over the largest reference value, as for the model by itself.
const TOLERANCE: f32 = 1e-5;

/// The same for a text in company against the text alone: sums in another order.
const COMPANY_TOLERANCE: f32 = 4e-6;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn pool(encoders: &[&str]) -> EnginePool {
    let pool = EnginePool::open(PoolOptions { device: Some(Device::Cpu), ..PoolOptions::default() }).unwrap();
    for name in encoders {
        pool.add_model(&fixtures().join("encoders").join(name), None).unwrap();
    }
    pool
}

fn embed(pool: &EnginePool, body: &Value) -> Result<Arc<RequestState>, Error> {
    pool.encode(EncodeRequest::embed_from_json(body.to_string().as_bytes(), false)?)
}

fn rerank(pool: &EnginePool, body: &Value) -> Result<Arc<RequestState>, Error> {
    pool.encode(EncodeRequest::rerank_from_json(body.to_string().as_bytes(), false)?)
}

/// The one result of a request and its usage, or why there is none.
fn read(state: &RequestState) -> Result<(Event, Usage), Error> {
    let mut result = None;
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Done(done) => {
                assert_eq!(state.next(PATIENCE), Err(Status::Closed), "something came after the end");
                if let Some(error) = done.error {
                    assert!(result.is_none(), "a result, and then {error}");
                    return Err(error);
                }
                assert_eq!(done.reason, FinishReason::Stop);
                return Ok((result.expect("an end without a result"), done.usage));
            }
            event => assert!(result.replace(event).is_none(), "two results"),
        }
    }
}

/// Vectors, their width, and the number of texts that were cut.
fn vectors(state: &RequestState) -> (Vec<f32>, usize, usize) {
    match read(state).unwrap().0 {
        Event::Embeddings(given) => (given.values, given.dimensions, given.truncated),
        other => panic!("no vectors: {other:?}"),
    }
}

fn tensors(folder: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = file.tensors().into_iter().filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F32);
    let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    floats.map(|(name, tensor)| (name, values(tensor.data()))).collect()
}

fn normalised_error(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let most = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    actual.iter().zip(expected).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs())) / most
}

fn texts(words: std::ops::Range<usize>, count: usize) -> Vec<String> {
    let span = words.len();
    let word = |n: usize| ["alpha", "beta", "gamma", "delta", "river", "stone"][n % 6];
    let text =
        |at: usize| (0..words.start + at * 7 % span).map(|n| word(at * 31 + n * n)).collect::<Vec<_>>().join(" ");
    (0..count).map(text).collect()
}

#[test]
fn vectors_are_those_of_the_reference() {
    for name in ["bert", "xlm-roberta", "modernbert", "qwen3-embedding"] {
        let folder = fixtures().join("encoders").join(name);
        let pool = pool(&[name]);
        let inputs = read_json(&folder.join("inputs.json")).unwrap();
        let count = inputs.as_array().unwrap().len();
        let (values, width, cut) = vectors(&embed(&pool, &json!({ "input": inputs })).unwrap());
        assert_eq!(values.len(), count * width);
        assert!(cut > 0 && cut < count, "{name}: {cut} texts were cut");
        let error = normalised_error(&values, &tensors(&folder)["embeddings"]);
        assert!(error <= TOLERANCE, "{name}: {error}");
        // A single text, of its tokens and of fewer dimensions.
        let first = inputs[0].as_str().unwrap();
        let alone = vectors(&embed(&pool, &json!({ "model": name, "input": first })).unwrap()).0;
        assert!(normalised_error(&alone, &values[..width]) <= COMPANY_TOLERANCE);
        let ids = pool.tokenize(None, first, true).unwrap();
        let of_ids = vectors(&embed(&pool, &json!({ "input": ids })).unwrap()).0;
        assert!(normalised_error(&of_ids, &alone) <= COMPANY_TOLERANCE);
        let short = json!({ "input": first, "dimensions": width / 2, "normalize": true, "encoding_format": "base64" });
        let Event::Embeddings(short) = read(&embed(&pool, &short).unwrap()).unwrap().0 else { panic!("no vectors") };
        let length = alone[..width / 2].iter().map(|x| x * x).sum::<f32>().sqrt();
        let expected: Vec<f32> = alone[..width / 2].iter().map(|x| x / length).collect();
        assert!(normalised_error(&short.values, &expected) <= COMPANY_TOLERANCE);
        let encoded: Vec<String> = serde_json::from_str(&short.text).unwrap();
        assert_eq!(encoded[0].len(), (width * 2).div_ceil(3) * 4);
    }
}

#[test]
fn scores_are_those_of_the_reference() {
    let encoders = ["bert-rerank", "xlm-roberta-rerank", "modernbert-rerank"];
    for name in encoders.into_iter().chain(["qwen3-rerank-causal", "qwen3-rerank-classification", "llama-rerank"]) {
        let folder = fixtures().join("encoders").join(name);
        let (pool, copy) = (pool(&[]), tempfile::tempdir().unwrap());
        if name == "qwen3-rerank-causal" {
            // Its own files do not say that it is one.
            for entry in std::fs::read_dir(&folder).unwrap().map(Result::unwrap) {
                std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
            }
            let kind = copy.path().join("config_sentence_transformers.json");
            std::fs::write(kind, r#"{"model_type": "CrossEncoder"}"#).unwrap();
            pool.add_model(copy.path(), Some(name)).unwrap();
        } else {
            pool.add_model(&folder, None).unwrap();
        }
        let inputs = read_json(&folder.join("inputs.json")).unwrap();
        let logits = &tensors(&folder)["logits"];
        for (pair, logit) in inputs.as_array().unwrap().iter().zip(logits) {
            // Twice in one request, beside another document: the better one comes first.
            let documents = json!([pair[1], { "text": "another one" }, pair[1]]);
            let mut body = json!({ "query": pair[0], "documents": documents, "top_n": 2 });
            if let Some(instruction) = pair.get(2) {
                body["instruction"] = instruction.clone();
            }
            let Event::Scores(given) = read(&rerank(&pool, &body).unwrap()).unwrap().0 else { panic!("no scores") };
            let expected = 1.0 / (1.0 + (-logit).exp());
            assert!((given.values[0] - expected).abs() <= TOLERANCE, "{name}: {} is not {expected}", given.values[0]);
            assert_eq!(given.order.len(), 2);
            let ranked: Vec<f32> = given.order.iter().map(|&n| given.values[n as usize]).collect();
            assert!(ranked[0] >= ranked[1] && given.values.iter().all(|&score| score <= ranked[0]));
        }
    }
}

#[test]
fn requests_in_company_get_what_they_get_alone() {
    let pool = pool(&["bert"]);
    let alone: Vec<_> = (0..24)
        .map(|n| {
            let body = json!({ "input": texts(1..40, 1 + n * 5 % 17) });
            let given = vectors(&embed(&pool, &body).unwrap());
            (body, given)
        })
        .collect();
    for round in 0..4 {
        let cancelled = embed(&pool, &json!({ "input": texts(20..60, 3000), "priority": "high" })).unwrap();
        let begun: Vec<_> = alone.iter().map(|(body, _)| embed(&pool, body).unwrap()).collect();
        cancelled.cancel();
        for (state, (_, (expected, width, cut))) in begun.iter().zip(&alone) {
            let (values, got_width, got_cut) = vectors(state);
            assert_eq!((got_width, got_cut), (*width, *cut));
            let error = normalised_error(&values, expected);
            assert!(error <= COMPANY_TOLERANCE, "round {round}: {error}");
        }
        assert_eq!(read(&cancelled).unwrap_err().status(), Status::Cancelled);
    }
}

#[test]
fn one_text_does_not_wait_for_thousands() {
    let pool = pool(&["bert"]);
    pool.load("bert").unwrap();
    let many = embed(&pool, &json!({ "input": texts(40..60, 8000) })).unwrap();
    let one = embed(&pool, &json!({ "input": "a text" })).unwrap();
    vectors(&one);
    assert_eq!(many.next(Some(Duration::ZERO)), Err(Status::Timeout), "the other request has ended");
    assert_eq!(vectors(&many).0.len() % 8000, 0);
}

#[test]
fn a_language_model_and_an_encoder_share_the_cores() {
    let pool = pool(&["bert"]);
    pool.add_model(&fixtures().join("models/qwen3-f32"), Some("llm")).unwrap();
    let generate = |tokens: usize| {
        let body = json!({ "model": "llm", "prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": true });
        pool.generate(Request::from_json(body.to_string().as_bytes(), false).unwrap()).unwrap()
    };
    let answer = |state: &RequestState| {
        let mut tokens = Vec::new();
        loop {
            match state.next(PATIENCE).expect("an event") {
                Event::Delta(delta) => tokens.extend(delta.tokens),
                Event::Done(done) => return done.error.map_or(tokens, |error| panic!("{error}")),
                other => panic!("{other:?}"),
            }
        }
    };
    pool.load("bert").unwrap();
    let expected = answer(&generate(40));
    // The answer ends before the many texts do, and a few texts before a long answer does.
    let many = embed(&pool, &json!({ "model": "bert", "input": texts(40..60, 12_000) })).unwrap();
    assert_eq!(answer(&generate(40)), expected);
    assert_eq!(many.next(Some(Duration::ZERO)), Err(Status::Timeout), "the answer waited for the texts");
    many.cancel();
    // Texts come through while answer follows answer.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(answer(&generate(40)), expected);
            }
        });
        let given = embed(&pool, &json!({ "model": "bert", "input": texts(5..20, 200) })).map(|state| read(&state));
        done.store(true, Ordering::Relaxed);
        assert!(matches!(given, Ok(Ok(_))));
    });
}

#[test]
fn what_a_model_cannot_do_is_an_error() {
    let pool = pool(&["bert", "bert-rerank"]);
    pool.add_model(&fixtures().join("models/qwen3-f32"), Some("llm")).unwrap();
    let status = |outcome: Result<Arc<RequestState>, Error>| match outcome.and_then(|state| read(&state)) {
        Ok(result) => panic!("{result:?}"),
        Err(error) => error.status(),
    };
    let embed = |body: Value| embed(&pool, &body);
    assert_eq!(status(embed(json!({ "model": "llm", "input": "a" }))), Status::Unsupported);
    assert_eq!(status(embed(json!({ "model": "bert-rerank", "input": "a" }))), Status::Unsupported);
    assert_eq!(
        status(rerank(&pool, &json!({ "model": "bert", "query": "a", "documents": ["b"] }))),
        Status::Unsupported
    );
    let chat = Request::from_json(br#"{"model":"bert","prompt":"a"}"#, false).unwrap();
    assert_eq!(pool.generate(chat).unwrap_err().status(), Status::Unsupported);
    assert_eq!(pool.cache_stats(Some("bert")).unwrap_err().status(), Status::Unsupported);
    assert_eq!(status(embed(json!({ "model": "bert", "input": "a", "dimensions": 100_000 }))), Status::InvalidRequest);
    let long = texts(3000..3001, 1);
    assert_eq!(status(embed(json!({ "model": "bert", "input": long, "truncate": false }))), Status::ContextLength);
    assert_eq!(status(embed(json!({ "model": "bert", "input": [1_000_000] }))), Status::InvalidRequest);
    assert_eq!(status(embed(json!({ "model": "nobody", "input": "a" }))), Status::NotFound);
    // After all that it still works.
    assert_eq!(vectors(&embed(json!({ "model": "bert", "input": "a" })).unwrap()).2, 0);
}

#[test]
fn requests_hear_how_far_the_model_is_loaded() {
    let pool = pool(&["bert"]);
    let mut request = EncodeRequest::embed_from_json(br#"{"input":"a"}"#, false).unwrap();
    request.tells_loading = true;
    let state = pool.encode(request.clone()).unwrap();
    let (mut last, mut told, mut total) = (0, 0, 0);
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Loading(there, all) => {
                assert!(there >= last && (there <= all), "{there} of {all} after {last}");
                (last, told, total) = (there, told + 1, all);
            }
            Event::Embeddings(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(told > 0 && last > 0 && last == total, "told {told} times, {last} bytes of {total} in the end");
    // It is loaded now.
    let state = pool.encode(request).unwrap();
    assert!(matches!(state.next(PATIENCE), Ok(Event::Embeddings(_))));
}

#[test]
fn a_full_queue_and_an_unload_end_requests_properly() {
    let options = PoolOptions { device: Some(Device::Cpu), queue_length: Some(3), ..PoolOptions::default() };
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&fixtures().join("encoders/bert"), None).unwrap();
    let mut begun = Vec::new();
    let deadline = Instant::now() + PATIENCE.unwrap();
    let refused = loop {
        match embed(&pool, &json!({ "input": texts(40..60, 6000) })) {
            Ok(state) => begun.push(state),
            Err(error) => break error,
        }
        assert!(Instant::now() < deadline, "nothing is ever refused");
    };
    assert_eq!(refused.status(), Status::Busy);
    assert!(refused.after().is_some() && begun.len() >= 3);
    pool.unload("bert", false).unwrap();
    for state in &begun {
        match read(state) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.status(), Status::Cancelled, "{error}"),
        }
    }
    assert!(begun.iter().all(|state| state.next(PATIENCE) == Err(Status::Closed)));
    vectors(&embed(&pool, &json!({ "input": "a" })).unwrap());
}
