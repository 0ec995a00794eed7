//! Anthropic's endpoints.

use serde_json::{Value, json};

use crate::harness::Server;

fn question(stream: bool) -> Value {
    json!({
        "model": "claude-sonnet",
        "max_tokens": 40,
        "temperature": 0,
        "system": [{"type": "text", "text": "You are a calculator.", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is 12 plus 30?"}]}],
        "metadata": {"user_id": "someone"},
        "stream": stream,
    })
}

#[test]
fn messages_are_answered_whole_and_in_events() {
    let server = Server::start(&[]);
    let whole = server.post("/v1/messages", &question(false)).expect(200);
    assert_eq!((&whole["type"], &whole["role"]), (&json!("message"), &json!("assistant")));
    let text = whole["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("42"), "{whole}");
    assert_eq!(whole["stop_reason"], "end_turn");

    let events = server.post("/v1/messages", &question(true)).events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..3], ["message_start", "ping", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let data: Vec<Value> = events.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
    for ((name, _), event) in events.iter().zip(&data) {
        assert_eq!(event["type"], name.as_str());
    }
    let streamed: String = data.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(streamed, text);
    let usage = &data[data.len() - 2]["usage"];
    let told = &data[0]["message"]["usage"];
    for key in ["input_tokens", "cache_read_input_tokens"] {
        assert_eq!(told[key], usage[key], "{key} is told at the beginning");
    }
    assert_eq!((&whole["model"], &data[0]["message"]["model"]), (&json!("tiny-chat"), &json!("tiny-chat")));
    let first = &whole["usage"];
    let total =
        |usage: &Value| usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(total(usage), total(first));
    assert_eq!(usage["input_tokens"], 1, "all but the last token comes from the cache");
    assert_eq!(usage["output_tokens"], first["output_tokens"]);
}

#[test]
fn the_stop_sequence_that_ended_a_message_is_told() {
    let server = Server::start(&[]);
    let ask = |stream: bool, stops: Value| {
        let mut body = question(stream);
        body["stop_sequences"] = stops;
        server.post("/v1/messages", &body)
    };
    let whole = ask(false, json!(["never", "42"])).expect(200);
    assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!("stop_sequence"), &json!("42")));
    let data = ask(true, json!(["never", "42"])).data();
    let delta = &data[data.len() - 2]["delta"];
    assert_eq!((&delta["stop_reason"], &delta["stop_sequence"]), (&json!("stop_sequence"), &json!("42")));
    let other = ask(false, json!(["never"])).expect(200);
    assert_eq!((&other["stop_reason"], &other["stop_sequence"]), (&json!("end_turn"), &Value::Null));
}

#[test]
fn tokens_are_counted_as_they_are_computed() {
    let server = Server::start(&[]);
    let mut body = question(false);
    let usage = server.post("/v1/messages", &body).expect(200)["usage"].clone();
    body.as_object_mut().unwrap().remove("max_tokens");
    let counted = server.post("/v1/messages/count_tokens", &body).expect(200);
    assert_eq!(counted["input_tokens"], usage["input_tokens"]);
}

#[test]
fn a_billing_block_does_not_spoil_the_prefix() {
    let server = Server::start(&[]);
    let ask = |salt: &str| {
        let mut body = question(false);
        let billing = format!("x-anthropic-billing-header: cc_version=2.0.{salt}; cch={salt};");
        body["system"] =
            json!([{"type": "text", "text": billing}, {"type": "text", "text": "Be careful. ".repeat(40)}]);
        server.post("/v1/messages", &body).expect(200)["usage"].clone()
    };
    ask("1a2b3");
    assert_eq!(ask("4c5d6")["input_tokens"], 1);
}

#[test]
fn ignored_keys_are_logged_once_also_inside() {
    let server = Server::start(&[]);
    let cached = json!({"type": "ephemeral"});
    let mut body = question(false);
    body["messages"] = json!([
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": cached}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {}, "caller": {"type": "direct"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
            "content": [{"type": "text", "text": "rain", "note": 1}]}]}]);
    body["tools"] = json!([{"name": "weather", "input_schema": {"type": "object"}, "cache_control": cached}]);
    for _ in 0..2 {
        server.post("/v1/messages", &body).expect(200);
    }
    let lines = server.lines();
    let ignored: Vec<&String> = lines.iter().filter(|line| line.contains("ignored")).collect();
    for (place, key) in [
        ("messages", "metadata"),
        ("messages system[]", "cache_control"),
        ("messages content[]", "cache_control"),
        ("messages content[]", "caller"),
        ("messages content[]", "note"),
        ("messages tools[]", "cache_control"),
    ] {
        let needle = format!("route=\"{place}\" key=\"{key}\"");
        assert_eq!(ignored.iter().filter(|line| line.contains(&needle)).count(), 1, "{needle}: {ignored:?}");
    }
    assert_eq!(ignored.len(), 6, "what means something is ignored: {ignored:?}");
}

#[test]
fn errors_are_anthropics_objects() {
    let server = Server::start(&[]);
    let mut body = question(false);
    body.as_object_mut().unwrap().remove("max_tokens");
    let error = server.post("/v1/messages", &body).expect(400);
    assert_eq!(error["type"], "error");
    assert_eq!(error["error"]["type"], "invalid_request_error");
    assert!(error["error"]["message"].as_str().unwrap().contains("max_tokens"));
    let mut body = question(true);
    body["messages"] = json!([{"role": "user", "content": [{"type": "image", "source": {}}]}]);
    assert_eq!(server.post("/v1/messages", &body).expect(400)["type"], "error");
    let reply = server.post("/v1/messages", &body);
    assert!(reply.header("request-id").unwrap().starts_with("req_"));
}
