//! The OpenAPI document and the page.

use serde_json::{Value, json};

use crate::harness::Server;

#[test]
fn the_document_has_every_route_and_no_other() {
    let server = Server::start(&[]);
    let document: Value = server.get("/openapi.json").expect(200);
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    for (path, operations) in document["paths"].as_object().unwrap() {
        let concrete = path.replace("{id}", "nothing");
        for method in operations.as_object().unwrap().keys() {
            let body = if matches!(method.as_str(), "get" | "delete") { "" } else { "{" };
            let status = server.call(&method.to_uppercase(), &concrete, &[], body).status;
            assert_ne!(status, 405, "{method} {path}");
            // A thing that is not there is; a path is not.
            let unrouted = status == 404 && !path.contains("{id}");
            assert!(!unrouted, "{method} {path} is documented, but not there");
        }
    }
    // What the source routes is documented.
    let sources = [include_str!("../../src/routes/mod.rs"), include_str!("../../src/routes/admin/mod.rs")];
    for (source, prefix) in sources.iter().zip(["", "/admin/api"]) {
        for route in source.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            let path = format!("{prefix}{}", route.replace("{*id}", "{id}"));
            assert!(document["paths"].get(&path).is_some(), "{path} is not in the document");
        }
    }
}

/// The largest value that the document allows is taken, the next one is not.
#[test]
fn its_bounds_are_those_of_the_requests() {
    let server = Server::start(&[]);
    let document: Value = server.get("/openapi.json").expect(200);
    let schema = |name: &str| document["components"]["schemas"][name]["properties"].clone();
    let (chat, completion, message) = (schema("ChatRequest"), schema("CompletionRequest"), schema("MessagesRequest"));
    let texts = |count: u64| json!((0..count).map(|index| format!("\u{1}{index}")).collect::<Vec<_>>());
    let tokens = |count: u64| json!((0..count).collect::<Vec<_>>());
    let ask = |path: &str, key: &str, value: Value| {
        let mut body = json!({"max_tokens": 1});
        match path {
            "/v1/completions" => body["prompt"] = "a".into(),
            _ => body["messages"] = json!([{"role": "user", "content": "a"}]),
        }
        if key == "top_logprobs" {
            body["logprobs"] = true.into();
        }
        body[key] = value;
        server.post(path, &body).status
    };
    type Make<'a> = &'a dyn Fn(u64) -> Value;
    let counts: [(&str, &str, &Value, Make<'_>); 8] = [
        ("/v1/chat/completions", "n", &chat["n"]["maximum"], &Value::from),
        ("/v1/chat/completions", "top_logprobs", &chat["top_logprobs"]["maximum"], &Value::from),
        ("/v1/chat/completions", "temperature", &chat["temperature"]["maximum"], &Value::from),
        ("/v1/chat/completions", "stop", &chat["stop"]["anyOf"][1]["maxItems"], &texts),
        ("/v1/chat/completions", "stop_token_ids", &chat["stop_token_ids"]["maxItems"], &tokens),
        ("/v1/completions", "prompt", &completion["prompt"]["anyOf"][2]["maxItems"], &texts),
        ("/v1/completions", "logprobs", &completion["logprobs"]["maximum"], &Value::from),
        ("/v1/messages", "stop_sequences", &message["stop_sequences"]["maxItems"], &texts),
    ];
    for (path, key, bound, of) in counts {
        let bound = bound.as_u64().unwrap_or_else(|| panic!("{key} has no bound"));
        assert_eq!(ask(path, key, of(bound)), 200, "{path} {key} {bound}");
        assert_eq!(ask(path, key, of(bound + 1)), 400, "{path} {key} {bound} and one more");
    }
    // What no bound is given for has none below the model's context.
    for (path, schema) in
        [("/v1/chat/completions", &chat), ("/v1/completions", &completion), ("/v1/messages", &message)]
    {
        assert!(schema["max_tokens"].get("maximum").is_none(), "{path}");
        assert_eq!(ask(path, "max_tokens", json!(100)), 200);
    }
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let server = Server::start(&[]);
    let reply = server.get("/");
    assert_eq!(reply.status, 200);
    assert!(reply.header("content-security-policy").unwrap().contains("default-src 'none'"));
    for foreign in ["http://", "https://", "src=\"/", "@import", "<link"] {
        assert!(!reply.body.contains(foreign), "the page mentions {foreign}");
    }
    for word in ["<script>", "prefers-color-scheme", "viewport"] {
        assert!(reply.body.contains(word), "the page has no {word}");
    }
}
