//! Reasoning and tool calls of the bundled model, through the whole library.

use std::path::Path;
use std::time::Duration;

use omlx::engine::{DeltaKind, Done, Event, FinishReason, Request, ToolCallPart};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use serde_json::{Value, json};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(120));

struct Answer {
    content: String,
    reasoning: String,
    calls: Vec<(ToolCallPart, String)>,
    tokens: usize,
    done: Done,
}

fn open() -> EnginePool {
    let models_dir = Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("models"));
    EnginePool::open(PoolOptions { models_dir, device: Some(Device::Cpu), ..Default::default() }).unwrap()
}

fn request(json: &Value) -> Request {
    Request::from_json(json.to_string().as_bytes(), false).unwrap()
}

fn ask(pool: &EnginePool, json: &Value) -> Answer {
    let state = pool.generate(request(json)).unwrap();
    let (mut content, mut reasoning, mut calls, mut tokens) = (String::new(), String::new(), Vec::new(), 0);
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => {
                tokens += delta.tokens.len();
                match delta.kind {
                    DeltaKind::Text => content += &delta.text,
                    DeltaKind::Reasoning => reasoning += &delta.text,
                    DeltaKind::ToolCall(call) if call.index == calls.len() => calls.push((call, delta.text)),
                    DeltaKind::ToolCall(call) => {
                        assert_eq!(calls[call.index].0, call);
                        calls[call.index].1 += &delta.text;
                    }
                }
            }
            Event::Done(done) => {
                assert_eq!(done.error, None);
                return Answer { content, reasoning, calls, tokens, done };
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn tools() -> Value {
    json!([{"type": "function", "function": {
        "name": "inventory",
        "description": "How many of an item are in stock.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    }}])
}

fn chat(messages: &Value) -> Value {
    json!({"messages": messages, "tools": tools(), "temperature": 0, "max_tokens": 100})
}

#[test]
fn a_tool_loop_call_result_answer() {
    let pool = open();
    let question = json!({"role": "user", "content": "Check the stock of beads."});
    let first = ask(&pool, &chat(&json!([question])));
    assert_eq!((first.content.as_str(), first.reasoning.as_str()), ("", ""));
    let [(call, arguments)] = &first.calls[..] else { panic!("{} calls", first.calls.len()) };
    assert_eq!((call.name.as_str(), arguments.as_str()), ("inventory", "{\"item\": \"beads\"}"));
    assert_eq!(first.done.reason, FinishReason::ToolCalls);
    // All tokens but the one that ends the turn are in the events.
    assert_eq!(first.tokens + 1, first.done.usage.completion_tokens);

    let called = json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}]});
    let result = json!({"role": "tool", "tool_call_id": call.id, "content": "{\"count\": 73}"});
    let second = ask(&pool, &chat(&json!([question, called, result])));
    assert!(second.content.contains("73") && second.calls.is_empty(), "{:?}", second.content);
    assert_eq!(second.done.reason, FinishReason::Stop);
    // The history is what the model has written, so that nothing of it is computed again.
    let written = first.done.usage.prompt_tokens + first.done.usage.completion_tokens;
    assert!(second.done.usage.cached_tokens + 1 >= written, "{:?} after {written} tokens", second.done.usage);
    pool.close();
}

#[test]
fn a_call_that_is_cut_off_is_no_call() {
    let pool = open();
    let mut json = chat(&json!([{"role": "user", "content": "Check the stock of beads."}]));
    let whole = ask(&pool, &json);
    json["max_tokens"] = json!(whole.tokens / 2);
    let cut = ask(&pool, &json);
    assert_eq!(cut.done.reason, FinishReason::Length);
    assert!(whole.calls[0].1.len() > cut.calls.first().map_or(0, |(_, arguments)| arguments.len()));
    pool.close();
}

#[test]
fn nothing_is_parsed_that_was_not_asked_for() {
    let pool = open();
    let question = json!([{"role": "user", "content": "Check the stock of beads."}]);
    // The same prompt as text: the answer is what the model writes.
    let prompt = pool.render(&request(&chat(&question))).unwrap();
    let raw = ask(&pool, &json!({"prompt": prompt, "temperature": 0, "max_tokens": 100}));
    assert_eq!(
        raw.content,
        "<tool_call>\n{\"name\": \"inventory\", \"arguments\": {\"item\": \"beads\"}}\n</tool_call>"
    );
    assert_eq!((raw.calls.len(), raw.done.reason), (0, FinishReason::Stop));
    let mut json = chat(&question);
    json["tool_choice"] = json!("none");
    assert!(!pool.render(&request(&json)).unwrap().contains("inventory"), "tools are in the prompt");
    assert!(ask(&pool, &json).calls.is_empty());
    pool.close();
}

/// As in OpenAI's API: where an answer has a form and there are tools, it is of that form or calls them.
#[test]
fn a_form_leaves_room_for_calls() {
    let pool = open();
    let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer",
        "minimum": 0, "maximum": 199}}, "required": ["name", "age"], "additionalProperties": false});
    let form = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema}});
    let in_form = |messages: Value| {
        let mut json = chat(&messages);
        json["response_format"] = form.clone();
        json
    };
    let question = json!({"role": "user", "content": "Check the stock of beads."});
    let called = ask(&pool, &in_form(json!([question])));
    assert_eq!((called.calls.len(), called.content.as_str()), (1, ""), "{}", called.content);
    assert_eq!((called.calls[0].0.name.as_str(), called.calls[0].1.as_str()), ("inventory", "{\"item\": \"beads\"}"));
    assert_eq!(called.done.reason, FinishReason::ToolCalls);

    let fact = json!({"role": "user", "content": "Extract name, age as JSON:\nName: Mia\nAge: 34"});
    let answered = ask(&pool, &in_form(json!([fact])));
    assert!(answered.calls.is_empty() && answered.done.reason == FinishReason::Stop);
    assert_eq!(serde_json::from_str::<Value>(&answered.content).unwrap(), json!({"name": "Mia", "age": 34}));
    // Told not to call, it answers in the form whatever it would do.
    let mut json = in_form(json!([question]));
    json["tool_choice"] = json!("none");
    let told = ask(&pool, &json);
    assert!(told.calls.is_empty() && serde_json::from_str::<Value>(&told.content).unwrap().get("age").is_some());
    pool.close();
}

#[test]
fn thinking_comes_apart_from_the_answer() {
    let pool = open();
    let mut json = json!({
        "messages": [{"role": "user", "content": "What is 0 x 9?"}],
        "temperature": 0, "max_tokens": 100, "chat_template_kwargs": {"enable_thinking": true},
    });
    let thought = ask(&pool, &json);
    assert_eq!((thought.reasoning.as_str(), thought.content.as_str()), ("0 times 9 is 0.", "0 x 9 = 0."));
    let usage = thought.done.usage;
    assert!(0 < usage.reasoning_tokens && usage.reasoning_tokens < usage.completion_tokens, "{usage:?}");
    json["chat_template_kwargs"]["enable_thinking"] = json!(false);
    let plain = ask(&pool, &json);
    assert_eq!((plain.reasoning.as_str(), plain.done.usage.reasoning_tokens), ("", 0));
    pool.close();
}
