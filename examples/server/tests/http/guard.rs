//! Who may call, from where, and under which name.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::harness::{Server, command};

const KEY: &str = "a-secret-key-of-the-tests";

fn with_key(arguments: &[&str]) -> Server {
    let mut command = command(arguments);
    command.env("OMLX_SERVER_API_KEY", KEY);
    Server::spawn(command)
}

#[test]
fn keys_open_the_door_and_are_in_no_log() {
    let server = with_key(&["--log-level", "debug"]);
    let bearer = format!("Bearer {KEY}");
    let status = |path: &str, headers: &[(&str, &str)]| server.call("GET", path, headers, "").status;
    for path in ["/v1/models", "/admin/api/status", "/metrics", "/v1/nothing"] {
        assert_eq!(status(path, &[]), 401, "{path}");
        assert_eq!(status(path, &[("Authorization", "Bearer a-secret-key-of-the-test")]), 401);
        assert_eq!(status(path, &[("Authorization", "Bearer ")]), 401);
        assert_ne!(status(path, &[("Authorization", &bearer)]), 401);
        assert_ne!(status(path, &[("x-api-key", KEY)]), 401);
    }
    for path in ["/", "/health", "/health/live", "/openapi.json"] {
        assert_eq!(status(path, &[]), 200, "{path}");
    }
    let error = server.post("/v1/chat/completions", &json!({})).expect(401);
    assert_eq!(error["error"]["code"], "invalid_api_key");
    assert_eq!(server.post("/v1/messages", &json!({})).expect(401)["error"]["type"], "authentication_error");
    let lines = server.lines();
    assert!(lines.iter().any(|line| line.contains("/v1/models")));
    assert!(lines.iter().all(|line| !line.contains("secret")), "{lines:?}");
}

#[test]
fn only_known_names_reach_the_server() {
    let server = Server::start(&["--allowed-hosts", "box.local"]);
    let status = |host: &str| server.call("GET", "/v1/models", &[("Host", host)], "").status;
    for host in ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "192.168.0.7", "BOX.local:8000"] {
        assert_eq!(status(host), 200, "{host}");
    }
    for host in ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "box"] {
        assert_eq!(status(host), 421, "{host}");
    }
    let mut connection = server.connect();
    connection.write(b"GET http://evil.example/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    assert_eq!(connection.reply().status, 421);
}

#[test]
fn other_web_pages_may_not_call() {
    let server = Server::start(&["--cors-origins", "https://friend.example"]);
    let call = |method: &str, origin: &str| server.call(method, "/v1/models", &[("Origin", origin)], "");
    let own = format!("http://{}", server.address);
    assert_eq!(call("GET", &own).status, 200);
    assert_eq!(call("GET", &own).header("access-control-allow-origin"), None);
    for origin in ["https://evil.example", "null", "https://friend.example.evil", "http://friend.example"] {
        assert_eq!(call("GET", origin).status, 403, "{origin}");
        assert_eq!(call("OPTIONS", origin).status, 403, "{origin}");
    }
    let friend = call("OPTIONS", "https://friend.example");
    assert_eq!(friend.status, 204);
    assert_eq!(friend.header("access-control-allow-origin"), Some("https://friend.example"));
    assert_eq!(call("GET", "https://friend.example").status, 200);
}

#[test]
fn without_a_key_it_does_not_listen_elsewhere() {
    let output = command(&["--host", "0.0.0.0"]).stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("--api-key-file"), "{message}");
    let allowed = Server::start(&["--host", "0.0.0.0", "--allow-no-key"]);
    assert!(allowed.address.starts_with("0.0.0.0:"));
    let keyed = with_key(&["--host", "0.0.0.0"]);
    assert_eq!(keyed.get("/v1/models").status, 401);
}

#[test]
fn requests_keep_plain_ids() {
    let server = Server::start(&[]);
    let id = |given: &str| {
        let reply = server.call("GET", "/health", &[("X-Request-Id", given)], "");
        reply.header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(id("trace-42"), "trace-42");
    assert!(id("a b\"c").starts_with("req_"));
    assert_ne!(id(""), id(""));
    server.line("id=\"trace-42\"");
}

#[test]
fn the_help_and_wrong_arguments() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_omlx-server")).args(arguments).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (ok, text) = run(&["--help"]);
    assert!(ok && text.contains("--api-key-file"));
    for (arguments, word) in [
        (&["fly"][..], "fly"),
        (&["serve", "--fly", "1"], "--fly"),
        (&["serve", "--port", "x"], "--port"),
        (&["serve", "--device", "abacus"], "abacus"),
        (&["serve", "--api-key-file", "/nowhere"], "/nowhere"),
        (&["pull"], "repository"),
    ] {
        let (ok, text) = run(arguments);
        assert!(!ok && text.contains(word), "{arguments:?}: {text}");
    }
}
