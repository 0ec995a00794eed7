//! OpenAI's endpoints.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{PATIENCE, RUNNING, Server, root};

fn sum_question(stream: bool) -> Value {
    json!({
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": "What is 12 plus 30?"}],
        "temperature": 0,
        "max_tokens": 40,
        "stream": stream,
    })
}

/// The text that a stream of chunks adds up to.
fn streamed_text(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

#[test]
fn chat_answers_whole_and_in_pieces() {
    let server = Server::start(&[]);
    let whole = server.post("/v1/chat/completions", &sum_question(false)).expect(200);
    let message = &whole["choices"][0]["message"];
    assert!(message["content"].as_str().unwrap().contains("42"), "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "tiny-chat");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let usage = &whole["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap())
    );

    let mut question = sum_question(true);
    question["stream_options"] = json!({"include_usage": true});
    let reply = server.post("/v1/chat/completions", &question);
    assert!(reply.header("content-type").unwrap().starts_with("text/event-stream"));
    assert_eq!(reply.events().last().unwrap().1, "[DONE]");
    let chunks = reply.data();
    assert_eq!(streamed_text(&chunks), message["content"].as_str().unwrap());
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let finished = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string());
    assert_eq!(finished.count(), 1);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], usage["completion_tokens"]);
    // The second time the prompt is cached, but for its last token.
    let cached = last["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached, usage["prompt_tokens"].as_u64().unwrap() - 1);
    let without = server.post("/v1/chat/completions", &sum_question(true)).data();
    assert!(without.iter().all(|chunk| chunk.get("usage").is_none()));
}

#[test]
fn options_of_a_chat_are_respected() {
    let server = Server::start(&[]);
    let story = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Tell me a short story about a fox."}],
            "max_tokens": 24, "temperature": 1.0});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body).expect(200)
    };
    let text =
        |answer: &Value, index: usize| answer["choices"][index]["message"]["content"].as_str().unwrap().to_owned();

    let (one, same, other) = (story(json!({"seed": 7})), story(json!({"seed": 7})), story(json!({"seed": 8})));
    assert_eq!(text(&one, 0), text(&same, 0));
    assert_ne!(text(&one, 0), text(&other, 0));
    assert_eq!(one["choices"][0]["finish_reason"], "length");

    let two = story(json!({"n": 2, "seed": 7}));
    assert_eq!(two["choices"].as_array().unwrap().len(), 2);
    assert_eq!(two["choices"][1]["index"], 1);
    assert_ne!(text(&two, 0), text(&two, 1));

    let cut = story(json!({"stop": ["fox"], "temperature": 0}));
    assert!(!text(&cut, 0).contains("fox"));
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");

    let told = story(json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 4}));
    let tokens = told["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 4);
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(token["logprob"].as_f64().unwrap() <= top[0]["logprob"].as_f64().unwrap());
    }
}

#[test]
fn several_answers_are_streamed_side_by_side() {
    let server = Server::start(&[]);
    let mut question = sum_question(true);
    question["n"] = json!(3);
    let chunks = server.post("/v1/chat/completions", &question).data();
    for index in 0..3 {
        let own: Vec<&Value> =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert_eq!(own.iter().filter(|choice| choice["finish_reason"].is_string()).count(), 1);
    }
}

#[test]
fn completions_continue_texts() {
    let server = Server::start(&[]);
    let body = |stream: bool| {
        json!({"model": "tiny-chat", "prompt": ["Once upon a time", "The code of the red box is"], "max_tokens": 6,
            "temperature": 0, "stream": stream, "stream_options": {"include_usage": true}})
    };
    let whole = server.post("/v1/completions", &body(false)).expect(200);
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    let chunks = server.post("/v1/completions", &body(true)).data();
    for (index, choice) in choices.iter().enumerate() {
        let own = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        let text: String = own.filter_map(|choice| choice["text"].as_str()).collect();
        assert_eq!(text, choice["text"].as_str().unwrap());
    }
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 12);
    let told = json!({"prompt": "Once upon a time", "max_tokens": 6, "logprobs": 2});
    let told = server.post("/v1/completions", &told).expect(200)["choices"][0]["logprobs"].clone();
    for part in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(told[part].as_array().unwrap().len(), 6, "{part}");
    }
    assert_eq!(told["text_offset"][1], told["tokens"][0].as_str().unwrap().len());
    let refused = server.post("/v1/completions", &json!({"prompt": "a", "suffix": "b"})).expect(400);
    assert!(refused["error"]["message"].as_str().unwrap().contains("suffix"));
}

#[test]
fn responses_answer_whole_and_in_events() {
    let server = Server::start(&[]);
    let body = |stream: bool| json!({"model": "tiny-chat", "input": "What is 12 plus 30?", "temperature": 0, "stream": stream});
    let whole = server.post("/v1/responses", &body(false)).expect(200);
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("completed")));
    let text = whole["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(text.contains("42"), "{whole}");
    let events = server.post("/v1/responses", &body(true)).events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names[..4],
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    );
    let end = ["response.output_text.done", "response.content_part.done", "response.output_item.done"];
    assert_eq!(names[names.len() - 4..names.len() - 1], end);
    assert_eq!(names.last(), Some(&"response.completed"));
    let data: Vec<Value> = events.iter().map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
    for (index, event) in data.iter().enumerate() {
        assert_eq!(event["sequence_number"], index);
    }
    let streamed: String = data
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(streamed, text);
    assert_eq!(data.last().unwrap()["response"]["output"][0]["content"][0]["text"], text);
    let cut = json!({"input": "Tell me a story.", "max_output_tokens": 3});
    let cut = server.post("/v1/responses", &cut).expect(200);
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
}

#[test]
fn models_are_listed_and_unknown_ones_are_the_default() {
    let server = Server::start(&[]);
    let list = server.get("/v1/models").expect(200);
    assert_eq!(list["data"][0]["id"], "tiny-chat");
    assert_eq!(server.get("/v1/models/tiny-chat").expect(200)["object"], "model");
    let missing = server.get("/v1/models/gpt-4o").expect(404);
    assert_eq!(missing["error"]["code"], "model_not_found");
    let mut question = sum_question(false);
    question["model"] = json!("gpt-4o");
    let answer = server.post("/v1/chat/completions", &question).expect(200);
    assert_eq!(answer["model"], "tiny-chat");
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().contains("42"));
}

#[test]
fn one_of_several_models_is_the_default() {
    let models = tempfile::tempdir().unwrap();
    for name in ["one", "two"] {
        let folder = models.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        for file in std::fs::read_dir(root().join("models/tiny-chat")).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
    let folder = models.path().to_str().unwrap();
    let ask = |server: &Server, model: Option<&str>| {
        let mut question = sum_question(false);
        question["model"] = model.into();
        server.post("/v1/chat/completions", &question)
    };
    let server = Server::start(&["--models", folder]);
    assert_eq!(ask(&server, Some("gpt-4o")).expect(404)["error"]["code"], "model_not_found");
    assert_eq!(ask(&server, None).status, 400, "there are two");
    let server = Server::start(&["--models", folder, "--default-model", "two"]);
    for (named, used) in [(Some("gpt-4o"), "two"), (None, "two"), (Some("one"), "one")] {
        assert_eq!(ask(&server, named).expect(200)["model"], used, "{named:?}");
    }
}

/// Both APIs' clients come again by themselves when they are told when.
#[test]
fn who_comes_when_too_many_wait_is_told_when_to_come_again() {
    let server = Server::start(&["--max-sequences", "1", "--queue-length", "1"]);
    let mut question = sum_question(true);
    (question["max_tokens"], question["ignore_eos"]) = (json!(6000), json!(true));
    let ask = || {
        let mut connection = server.connect();
        connection.send("POST", "/v1/chat/completions", &[], &question.to_string());
        connection
    };
    let until = |metric: &str| {
        let deadline = Instant::now() + PATIENCE;
        while server.metric(metric) < 1.0 {
            assert!(Instant::now() < deadline, "no {metric}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    // Before the model is loaded there is nothing to be measured.
    server.post("/v1/chat/completions", &sum_question(false)).expect(200);
    let _running = ask();
    until(RUNNING);
    let _waiting = ask();
    until("omlx_queued_requests");
    for path in ["/v1/chat/completions", "/v1/messages"] {
        let reply = server.post(path, &question);
        let error = reply.expect(429);
        assert_eq!(error["error"]["type"], "rate_limit_error", "{path}");
        assert_eq!(error["type"], if path == "/v1/messages" { json!("error") } else { Value::Null });
        assert!(reply.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1, "{path}");
    }
}

#[test]
fn ignored_keys_are_logged_once() {
    let server = Server::start(&[]);
    let mut question = sum_question(false);
    question["store"] = json!(false);
    question["metadata"] = json!({"user": "a"});
    for _ in 0..2 {
        server.post("/v1/chat/completions", &question).expect(200);
    }
    let lines = server.lines();
    for key in ["store", "metadata"] {
        let needle = format!("key=\"{key}\"");
        assert_eq!(lines.iter().filter(|line| line.contains(&needle)).count(), 1, "{lines:?}");
    }
}

#[test]
fn errors_are_openais_objects() {
    let server = Server::start(&[]);
    let long = "word ".repeat(20_000);
    for (path, body, status, word) in [
        ("/v1/chat/completions", json!({"messages": "x"}), 400, "messages"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}], "temperature": -1}),
            400,
            "temperature",
        ),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "stream": 1}), 400, "stream"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": long}]}), 400, "token"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": long}], "stream": true}),
            400,
            "token",
        ),
        ("/v1/responses", json!({"input": 3}), 400, "input"),
        ("/v1/completions", json!({"prompt": {}}), 400, "prompt"),
        ("/v1/embeddings", json!({"input": "x", "model": "tiny-chat"}), 400, "vectors"),
        ("/v1/nothing", json!({}), 404, "/v1/nothing"),
    ] {
        let error = server.post(path, &body).expect(status);
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "{path}: {message}");
        assert_eq!(error["error"]["type"], "invalid_request_error");
    }
    let wrong_method = server.get("/v1/chat/completions");
    assert_eq!(wrong_method.status, 405);
    assert_eq!(wrong_method.header("allow"), Some("POST"));
    let text = server.call("POST", "/v1/chat/completions", &[("Content-Type", "text/plain")], "{}");
    assert_eq!(text.status, 415);
    let parts = json!([{"type": "image_url", "image_url": {"url": "data:,"}}]);
    let picture = json!({"messages": [{"role": "user", "content": parts}]});
    assert_eq!(server.post("/v1/chat/completions", &picture).expect(400)["error"]["code"], "unsupported");
}
