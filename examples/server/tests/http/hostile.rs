//! Requests that nobody means well with: typed answers, and no memory that grows.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Connection, Server};

const CHAT: &str = "/v1/chat/completions";

/// What a server may have more than before, of far more bytes that it was sent.
const FLAT: u64 = 48 << 20;

#[test]
fn what_is_too_large_is_refused_unread() {
    let server = Server::start(&["--max-body-mb", "1"]);
    let before = server.peak_memory();
    // A client that goes on whatever it is told, up to 1 GiB.
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let go_on = |connection: &mut Connection| {
        let _ = (0..0x4000).all(|_| connection.write(chunk.as_bytes()));
        server.peak_memory()
    };
    let mut connection = server.connect();
    connection.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    connection.write(b"Content-Length: 1073741824\r\n\r\n{\"messages\": [");
    let began = Instant::now();
    assert_eq!(connection.reply().status, 413);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(go_on(&mut connection) < before + FLAT);

    // The same without saying so: chunks until the server has had enough.
    let mut connection = server.connect();
    connection.write(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    connection.write(b"Transfer-Encoding: chunked\r\n\r\n");
    for _ in 0..20 {
        connection.write(chunk.as_bytes());
    }
    let error = connection.reply().expect(413);
    assert_eq!(error["error"]["type"], "request_too_large");
    assert!(go_on(&mut connection) < before + FLAT);
}

/// A body that is read and then refused is not kept.
#[test]
fn what_is_refused_is_not_kept() {
    let server = Server::start(&[]);
    let large = format!("{{\"messages\": \"{}\"}}", "x".repeat(8 << 20));
    let send = || assert_eq!(server.call("POST", CHAT, &[], &large).status, 400);
    (0..4).for_each(|_| send());
    let settled = server.memory();
    (0..20).for_each(|_| send());
    let grown = server.memory().saturating_sub(settled);
    assert!(grown < FLAT, "{grown} bytes more after 160 MiB");
}

#[test]
fn heads_have_a_limit() {
    let server = Server::start(&[]);
    let large = "x".repeat(200_000);
    assert_eq!(server.call("GET", "/health", &[("X-Large", &large)], "").status, 431);
    let names: Vec<String> = (0..300).map(|index| format!("X-Header-{index}")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
    assert_eq!(server.call("GET", "/health", &many, "").status, 431);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn deep_json_is_an_error() {
    let server = Server::start(&[]);
    let paths = [(CHAT, "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")];
    let round = || {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let deep = format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
            for (path, key) in paths {
                for body in [deep.clone(), format!("{{\"{key}\": [{{\"role\": \"user\", \"content\": {deep}}}]}}")] {
                    let error = server.call("POST", path, &[], &body).expect(400);
                    check_error(path, &error);
                    assert!(error["error"]["message"].as_str().unwrap().contains("recursion limit"), "{path}");
                }
            }
        }
    };
    round();
    let settled = server.memory();
    (0..200).for_each(|_| round());
    let grown = server.memory().saturating_sub(settled);
    assert!(grown < FLAT, "{grown} bytes more after 96 MB");
}

#[test]
fn slow_clients_are_cut_off() {
    let server = Server::start(&["--timeout", "1"]);
    // A head that drips: it would take half a minute.
    let began = Instant::now();
    let mut head = server.connect();
    for byte in b"GET /health HTTP/1.1\r\nX-Slow: aaaaa".iter() {
        head.write(&[*byte]);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(matches!(head.reply().status, 0 | 408));
    assert!(began.elapsed() < Duration::from_secs(20));
    // A body that stops.
    let mut body = server.connect();
    body.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    body.write(b"Content-Length: 100\r\n\r\n{");
    assert_eq!(body.reply().status, 408);
    // Many that say nothing leave room for others, and go.
    let idle: Vec<_> = (0..100).map(|_| server.connect()).collect();
    assert_eq!(server.get("/health").status, 200);
    for mut connection in idle {
        assert_eq!(connection.head().status, 0);
    }
}

#[test]
fn no_name_is_a_path() {
    let server = Server::start(&[]);
    let names = ["../../etc/passwd", "/etc/passwd", "..", ".", "tiny-chat/../../..", "a\0b", "C:\\x", "%2e%2e/x", "~"];
    for name in names {
        for path in ["load", "unload", "pin", "configure"] {
            let body = json!({"id": name, "pinned": true, "settings": {}});
            let reply = server.post(&format!("/admin/api/models/{path}"), &body);
            assert!(matches!(reply.status, 400 | 404), "{path} {name:?}: {}", reply.body);
        }
        for body in [
            json!({"repo": name}),
            json!({"repo": "org/name", "folder": name}),
            json!({"repo": "org/name", "endpoint": name}),
        ] {
            assert_eq!(server.post("/admin/api/downloads", &body).status, 400, "{body}");
        }
        let mut question = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
        question["model"] = json!(name);
        assert_eq!(server.post(CHAT, &question).status, 200, "an unknown name is the default model");
    }
    for path in ["/../../etc/passwd", "/v1/models/../../../etc/passwd", "/%2e%2e/etc/passwd", "/v1/models/%2e%2e%2fetc"]
    {
        let reply = server.get(path);
        assert!(matches!(reply.status, 400 | 404) && !reply.body.contains("root:"), "{path}: {}", reply.body);
    }
    let cache = server.get("/admin/api/cache?model=../../etc/passwd");
    assert_eq!(cache.status, 404);
}

/// Numbers of a seed (the "splitmix64" generator).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((value ^ (value >> 31)) % limit as u64) as usize
    }

    fn pick<'a>(&mut self, items: &[&'a str]) -> &'a str {
        items[self.below(items.len())]
    }
}

/// A body: something like a request, then damaged, behind as many blanks as are asked for.
fn fuzzed(random: &mut Random, blanks: usize) -> Vec<u8> {
    const KEYS: &[&str] = &[
        "messages",
        "model",
        "stream",
        "n",
        "stop",
        "tools",
        "tool_choice",
        "logprobs",
        "max_tokens",
        "temperature",
        "prompt",
        "input",
        "system",
        "thinking",
        "documents",
        "query",
        "seed",
        "logit_bias",
        "response_format",
        "id",
        "settings",
        "tiers",
        "repo",
        "instructions",
        "text",
        "reasoning",
        "stream_options",
        "priority",
        "store",
    ];
    const VALUES: &[&str] = &[
        "null",
        "true",
        "-1",
        "1e999",
        "18446744073709551616",
        "\"\"",
        "\"\\ud800\"",
        "\"x\"",
        "[]",
        "{}",
        "[[]]",
        "[{\"role\":\"user\",\"content\":\"hi\"}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"}]}]",
        "{\"type\":\"x\"}",
        "[null]",
        "0.5",
        "\"tiny-chat\"",
        "[1,2,3]",
        "{\"include_usage\":1}",
        "1",
        "[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]",
        "\"\\u0000\"",
        "[\"pools\"]",
        "3",
    ];
    let mut text = String::from("{\"max_tokens\":1,");
    for _ in 0..random.below(6) {
        text += &format!("\"{}\":{},", random.pick(KEYS), random.pick(VALUES));
    }
    text += "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}";
    let mut bytes = text.into_bytes();
    for _ in 0..random.below(3) {
        let place = random.below(bytes.len());
        match random.below(4) {
            0 => bytes[place] = random.below(256) as u8,
            1 => drop(bytes.remove(place)),
            2 => bytes.truncate(place.max(1)),
            _ => bytes.insert(place, b"{}[]\",:\\0"[random.below(9)]),
        }
    }
    [vec![b' '; blanks], bytes].concat()
}

/// Errors are objects as the API of the path has them.
fn check_error(path: &str, body: &Value) {
    let word = |value: &Value| value.as_str().is_some_and(|word| !word.is_empty());
    let error = &body["error"];
    assert!(word(&error["type"]) && word(&error["message"]), "{path}: {body}");
    if path.starts_with("/v1/messages") {
        assert_eq!(body["type"], "error", "{path}: {body}");
    } else {
        let code = error.get("code").unwrap_or_else(|| panic!("{path}: {body}"));
        assert!(code.is_null() || word(code), "{path}: {body}");
    }
}

/// `OMLX_FUZZ` sets how many.
#[test]
fn fuzzed_bodies_are_answered() {
    let count: usize = std::env::var("OMLX_FUZZ").map_or(1500, |count| count.parse().unwrap());
    let server = Server::start(&[]);
    let paths = [
        CHAT,
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/rerank",
        "/admin/api/models/pin",
        "/admin/api/models/configure",
        "/admin/api/cache/clear",
        "/admin/api/downloads",
        "/admin/api/settings",
    ];
    // Together four times what the server may have more.
    let blanks = 4 * FLAT as usize / count;
    let mut random = Random(20_240_607);
    let mut connection = server.connect();
    let mut settled = 0;
    for index in 0..count {
        let (path, body) = (random.pick(&paths), fuzzed(&mut random, blanks));
        let method = if path.ends_with("settings") { "PATCH" } else { "POST" };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection.write(&[head.as_bytes(), &body].concat());
        let reply = connection.reply();
        let text = String::from_utf8_lossy(&body[blanks..]);
        assert!((200..500).contains(&reply.status), "{path} {text}: {} {}", reply.status, reply.body);
        if reply.status >= 400 {
            check_error(path, &reply.json());
        }
        if reply.header("connection") == Some("close") {
            connection = server.connect();
        }
        if index == count / 10 {
            settled = server.memory();
        }
    }
    server.wait_idle();
    let grown = server.memory().saturating_sub(settled);
    assert!(grown < FLAT, "{grown} bytes more than after a tenth of the requests");
}
