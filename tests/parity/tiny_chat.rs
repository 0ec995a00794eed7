//! The bundled model through the whole library, against mlx-lm in f32: same prompt tokens, same answer.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mlx_rs::Dtype;
use omlx::engine::{DeltaKind, Event, FinishReason, Request, RequestState};
use omlx::kernels::Precision;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use serde_json::{Value, json};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The answer's text, with its one call, if it has one, as the model wrote it.
fn answer(state: &Arc<RequestState>) -> (String, Vec<u32>, FinishReason) {
    let (mut text, mut tokens) = (String::new(), Vec::new());
    let mut calls = 0;
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => {
                if let DeltaKind::ToolCall(call) = &delta.kind
                    && call.index == calls
                {
                    text += &format!("<tool_call>\n{{\"name\": \"{}\", \"arguments\": ", call.name);
                    calls += 1;
                }
                text.push_str(&delta.text);
                tokens.extend(delta.tokens);
            }
            Event::Loading(..)
            | Event::Started(..)
            | Event::ChoiceDone(..)
            | Event::Embeddings(_)
            | Event::Scores(_) => {}
            Event::Done(done) => {
                assert_eq!(done.error, None);
                assert_eq!(calls, usize::from(done.reason == FinishReason::ToolCalls));
                return (text + ["", "}\n</tool_call>"][calls], tokens, done.reason);
            }
        }
    }
}

#[test]
fn ten_prompts_give_the_reference_answers() {
    let bytes = std::fs::read(root().join("tests/fixtures/tiny-chat.json")).unwrap();
    let fixture: Value = serde_json::from_slice(&bytes).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 10);
    let models_dir = Some(root().join("models"));
    let (device, dtype, precision) = (Some(Device::Cpu), Some(Dtype::Float32), Precision::Exact);
    let pool = EnginePool::open(PoolOptions { models_dir, device, dtype, precision, ..Default::default() }).unwrap();
    for case in cases {
        let mut object = json!({
            "messages": case["messages"],
            "max_tokens": fixture["max_tokens"],
            "temperature": 0,
            "chat_template_kwargs": { "enable_thinking": fixture["enable_thinking"] },
        });
        if case.get("tools").is_some_and(|tools| !tools.is_null()) {
            object["tools"] = case["tools"].clone();
        }
        let request = Request::from_json(object.to_string().as_bytes(), false).unwrap();
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
        let prompt = pool.render(&request).unwrap();
        assert_eq!(pool.tokenize(None, &prompt, false).unwrap(), ids("prompt_ids"), "{}", case["name"]);
        let (text, tokens, reason) = answer(&pool.generate(request).unwrap());
        let mut expected = ids("greedy_ids");
        if matches!(reason, FinishReason::Stop | FinishReason::ToolCalls) {
            // The reference lists the end token; here it is not part of the answer.
            expected.pop();
        }
        assert_eq!(tokens, expected, "{}: {text:?}", case["name"]);
        assert_eq!(text.trim_end(), case["text"].as_str().unwrap().trim_end(), "{}", case["name"]);
    }
}
