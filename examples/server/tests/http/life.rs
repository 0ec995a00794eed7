//! How requests and the server end.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::Server;

fn long_story(stream: bool) -> String {
    json!({"messages": [{"role": "user", "content": "Tell me a long story about a fox."}], "max_tokens": 6000,
        "ignore_eos": true, "stream": stream})
    .to_string()
}

fn tokens(server: &Server) -> f64 {
    server.metric("omlx_completion_tokens_total")
}

#[test]
fn a_client_that_leaves_ends_its_request() {
    let server = Server::start(&[]);
    for stream in [true, false] {
        let mut connection = server.connect();
        connection.send("POST", "/v1/chat/completions", &[], &long_story(stream));
        if stream {
            assert_eq!(connection.head().status, 200);
            assert!(connection.chunk().is_some());
        }
        // Metrics come a moment after the first piece.
        while server.metric(crate::harness::RUNNING) == 0.0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        connection.hang_up();
        // The server has seen that before it answers this; then come the step that is computed, and one behind it.
        let before = server.metric("omlx_steps_total");
        server.wait_idle();
        let steps = server.metric("omlx_steps_total") - before;
        assert!(steps <= 3.0, "{steps} steps after it had left");
        let after = tokens(&server);
        assert!(after < 5000.0, "it went on to the end");
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(tokens(&server), after);
    }
    assert_eq!(server.metric("omlx_http_abandoned_total"), 1.0);
}

/// `OMLX_DISCONNECTS` sets how many.
#[test]
fn clients_that_leave_at_any_moment_leave_nothing_behind() {
    let count: u64 = std::env::var("OMLX_DISCONNECTS").map_or(60, |count| count.parse().unwrap());
    let server = Server::start(&["--queue-length", "4096"]);
    let paths = ["/v1/chat/completions", "/v1/messages", "/v1/responses"];
    let body = |path: &str| match path {
        "/v1/responses" => json!({"input": "Tell me a story.", "stream": true}).to_string(),
        _ => long_story(true),
    };
    // The first answers load what stays.
    server.post(paths[0], &json!({"messages": [{"role": "user", "content": "Hi"}]})).expect(200);
    let descriptors = server.descriptors();
    for index in 0..count {
        let path = paths[(index % 3) as usize];
        let mut connection = server.connect();
        connection.send("POST", path, &[], &body(path));
        std::thread::sleep(Duration::from_micros(index * 7919 % 40_000));
        connection.hang_up();
    }
    server.wait_idle();
    wait_for_descriptors(&server, descriptors);
    assert_eq!(server.metric("omlx_blocks_used"), 0.0);
}

/// 64 answers run, and 200 more streams wait behind them.
#[test]
fn many_streams_hold_beside_many_that_are_silent() {
    let server = Server::start(&["--max-sequences", "64", "--queue-length", "256", "--keep-alive", "1"]);
    server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Hi"}]})).expect(200);
    let descriptors = server.descriptors();
    let open = || {
        let mut connection = server.connect();
        connection.send("POST", "/v1/chat/completions", &[], &long_story(true));
        connection
    };
    let mut running: Vec<_> = (0..64).map(|_| open()).collect();
    while server.metric(crate::harness::RUNNING) < 64.0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut silent: Vec<_> = (0..200).map(|_| open()).collect();
    for connection in &mut silent {
        assert_eq!(connection.head().status, 200);
        assert_eq!(connection.chunk().unwrap(), b": keep-alive\n\n");
    }
    for connection in &mut running {
        assert_eq!(connection.head().status, 200);
        let mut text = String::new();
        while text.matches("\"content\":").count() < 20 {
            text += &String::from_utf8(connection.chunk().expect("it goes on")).unwrap();
        }
    }
    running.into_iter().chain(silent).for_each(crate::harness::Connection::hang_up);
    server.wait_idle();
    wait_for_descriptors(&server, descriptors);
    assert_eq!(server.metric("omlx_blocks_used"), 0.0);
}

/// Its sequence stays among the running ones, and no step is computed: that is no model that hangs.
#[test]
fn a_client_that_does_not_read_leaves_the_server_ready() {
    let server = Server::start(&[]);
    let mut body: Value = serde_json::from_str(&long_story(true)).unwrap();
    // Long chunks: the sockets between hold a few megabytes.
    for (key, value) in [("n", json!(8)), ("logprobs", json!(true)), ("top_logprobs", json!(20))] {
        body[key] = value;
    }
    let mut connection = server.connect();
    connection.send("POST", "/v1/chat/completions", &[], &body.to_string());
    assert_eq!(connection.head().status, 200);
    let deadline = Instant::now() + crate::harness::PATIENCE;
    // The first reading is like no other.
    let mut steps = f64::NAN;
    loop {
        let before = std::mem::replace(&mut steps, server.metric("omlx_steps_total"));
        if steps == before {
            break;
        }
        assert!(Instant::now() < deadline, "it was never paused");
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(server.metric(crate::harness::RUNNING) > 0.0, "it ended");
    assert_eq!(server.metric("omlx_step_age_seconds"), 0.0);
    assert_eq!(server.get("/health").expect(200)["ready"], true);
    connection.hang_up();
    server.wait_idle();
}

/// Waits until there are no more than there were, but for one of a connection that is being closed.
fn wait_for_descriptors(server: &Server, before: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.descriptors() > before + 1 {
        assert!(Instant::now() < deadline, "{} descriptors, {before} before", server.descriptors());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_silent_stream_says_that_it_lives() {
    // One answer at a time: the second stream waits, and has nothing to say.
    let server = Server::start(&["--max-sequences", "1", "--keep-alive", "1"]);
    let mut first = server.connect();
    first.send("POST", "/v1/chat/completions", &[], &long_story(true));
    assert_eq!(first.head().status, 200);
    assert!(first.chunk().is_some());
    let mut second = server.connect();
    second.send("POST", "/v1/chat/completions", &[], &long_story(true));
    assert_eq!(second.head().status, 200);
    let chunk = second.chunk().unwrap();
    assert_eq!(String::from_utf8(chunk).unwrap(), ": keep-alive\n\n");
}

/// The prompts behind the first one wait for it: three seconds for all of them, not for each.
#[test]
fn a_stream_of_many_prompts_begins_soon() {
    let server = Server::start(&["--max-sequences", "1"]);
    let prompts = |last: &str| {
        let mut prompts = vec!["Once upon a time"; 11];
        prompts.push(last);
        json!({"prompt": prompts, "max_tokens": 6000, "ignore_eos": true, "stream": true}).to_string()
    };
    let mut connection = server.connect();
    let began = Instant::now();
    connection.send("POST", "/v1/completions", &[], &prompts("The"));
    assert_eq!(connection.head().status, 200);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    connection.hang_up();
    // What fails meanwhile is no stream.
    let long = "word ".repeat(20_000);
    let error = server.call("POST", "/v1/completions", &[], &prompts(&long)).expect(400);
    assert_eq!(error["error"]["code"], "context_length_exceeded");
}

#[test]
fn a_signal_lets_running_requests_end() {
    let mut server = Server::start(&[]);
    let body = json!({"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 300,
        "ignore_eos": true, "stream": true});
    let mut connection = server.connect();
    connection.send("POST", "/v1/chat/completions", &[], &body.to_string());
    assert_eq!(connection.head().status, 200);
    let mut text = String::from_utf8(connection.chunk().unwrap()).unwrap();
    server.terminate();
    server.line("draining");
    assert!(std::net::TcpStream::connect(&server.address).is_err(), "it still takes connections");
    while let Some(chunk) = connection.chunk() {
        text += &String::from_utf8(chunk).unwrap();
    }
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let finish = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter_map(|data| {
        let chunk: Value = serde_json::from_str(data).ok()?;
        chunk["choices"][0]["finish_reason"].as_str().map(str::to_owned)
    });
    assert_eq!(finish.collect::<Vec<_>>(), ["length"]);
    assert!(server.wait().success());
}

#[test]
fn a_drain_has_an_end() {
    let mut server = Server::start(&["--drain", "1"]);
    let mut connection = server.connect();
    connection.send("POST", "/v1/chat/completions", &[], &long_story(true));
    assert_eq!(connection.head().status, 200);
    let began = Instant::now();
    server.terminate();
    assert!(server.wait().success());
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_conversation_goes_on_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--cache-dir", folder.path().to_str().unwrap()];
    let mut messages = vec![json!({"role": "system", "content": "The code of the red box is 4821.\n".repeat(40)})];
    let mut before = 0;
    for turn in 0..6 {
        // A new server for every second turn.
        let mut server = Server::start(&arguments);
        for _ in 0..2 {
            messages.push(json!({"role": "user", "content": "What is the code of the red box?"}));
            let body = json!({"messages": messages, "temperature": 0, "max_tokens": 30});
            let answer = server.post("/v1/chat/completions", &body).expect(200);
            let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
            assert!(text.contains("4821"), "{text}");
            let usage = &answer["usage"];
            let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
            assert!(cached >= before, "turn {turn}: {cached} of the {before} tokens of the turn before are cached");
            before = usage["prompt_tokens"].as_u64().unwrap();
            messages.push(json!({"role": "assistant", "content": text}));
        }
        server.terminate();
        assert!(server.wait().success());
    }
}
