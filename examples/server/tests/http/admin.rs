//! The admin interface.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{PATIENCE, Server};
use crate::hub;

#[test]
fn models_are_loaded_pinned_and_unloaded() {
    let server = Server::start(&[]);
    let model = || server.get("/admin/api/models").expect(200)["models"][0].clone();
    assert_eq!((&model()["id"], &model()["loaded"]), (&json!("tiny-chat"), &json!(false)));
    assert!(model().get("folder").is_none());
    server.post("/admin/api/models/load", &json!({"id": "tiny-chat"})).expect(200);
    assert_eq!(model()["loaded"], true);
    let pinned = server.post("/admin/api/models/pin", &json!({"id": "tiny-chat", "pinned": true})).expect(200);
    assert_eq!(pinned["settings"]["pinned"], true);
    assert_eq!(model()["settings"]["pinned"], true);
    let freed = server.post("/admin/api/models/unload", &json!({"id": "tiny-chat"})).expect(200);
    assert!(freed["freed_bytes"].as_u64().unwrap() > 1_000_000);
    assert_eq!(model()["loaded"], false);
    server.post("/admin/api/models/rescan", &json!({})).expect(200);
    assert_eq!(server.post("/admin/api/models/load", &json!({"id": "no"})).status, 404);
    assert_eq!(server.post("/admin/api/models/load", &json!({"id": 3})).status, 400);
    let wrong = json!({"id": "tiny-chat", "settings": {"colour": "red"}});
    assert_eq!(server.post("/admin/api/models/configure", &wrong).status, 400);
}

#[test]
fn caches_are_counted_and_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&["--cache-dir", folder.path().to_str().unwrap()]);
    let body = json!({"messages": [{"role": "user", "content": "What is 12 plus 30?"}], "temperature": 0});
    let cached = |server: &Server| {
        server.post("/v1/chat/completions", &body).expect(200)["usage"]["prompt_tokens_details"]["cached_tokens"]
            .clone()
    };
    assert_eq!(cached(&server), 0);
    assert_ne!(cached(&server), 0);
    assert!(server.get("/admin/api/cache").expect(200)["models"]["tiny-chat"].is_object());
    server.post("/admin/api/cache/flush", &json!({})).expect(200);
    let cold = server.post("/admin/api/cache/clear", &json!({"tiers": ["cold"]})).expect(200);
    assert!(cold["freed_bytes"].as_u64().unwrap() > 0);
    assert_ne!(cached(&server), 0, "the pools have it still");
    server.post("/admin/api/cache/clear", &json!({"model": "tiny-chat"})).expect(200);
    assert_eq!(cached(&server), 0);
    assert_eq!(server.post("/admin/api/cache/clear", &json!({"tiers": ["warm"]})).status, 400);
}

#[test]
fn limits_change_while_it_runs() {
    let server = Server::start(&[]);
    let change = |body: &str| server.call("PATCH", "/admin/api/settings", &[], body);
    let settings = change(r#"{"memory_limit": 3000000000}"#).expect(200);
    assert_eq!(settings["memory_limit"], 3_000_000_000_u64);
    assert_eq!(change(r#"{"memory_limit": -1}"#).status, 400);
    assert_eq!(change(r#"{"port": 1}"#).status, 400);
    let caches = change(r#"{"hot_bytes": 1048576}"#).expect(200);
    assert_eq!((&caches["hot_bytes"], &caches["cold_bytes"]), (&json!(1_048_576), &json!(null)));
    let status = server.get("/admin/api/status").expect(200);
    assert_eq!(status["pool"]["memory"]["limit"], 3_000_000_000_u64);
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn downloads_are_listed_and_cancelled() {
    let models = tempfile::tempdir().unwrap();
    // A folder of its own, in which a download leaves its lock.
    let mut command = crate::harness::command(&["--models", models.path().to_str().unwrap()]);
    // A hub that nobody listens at.
    command.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let server = Server::spawn(command);
    let started = server.post("/admin/api/downloads", &json!({"repo": "org/name"})).expect(200);
    let id = started["id"].as_str().unwrap();
    let list = server.get("/admin/api/downloads").expect(200);
    assert_eq!(list["downloads"][0]["id"], id);
    assert_eq!(server.call("DELETE", &format!("/admin/api/downloads/{id}"), &[], "").status, 200);
    assert_eq!(server.call("DELETE", "/admin/api/downloads/none", &[], "").status, 404);
}

#[test]
fn a_model_is_downloaded_and_answers() {
    // It takes a second or two.
    let (hub, models) = (hub::slow(Duration::from_millis(10)), tempfile::tempdir().unwrap());
    let mut command = crate::harness::command(&["--models", models.path().to_str().unwrap()]);
    command.env("HF_ENDPOINT", hub.endpoint()).env_remove("HF_HUB_OFFLINE");
    let server = Server::spawn(command);
    assert_eq!(server.get("/v1/models").expect(200)["data"], json!([]));
    server.post("/admin/api/downloads", &json!({"repo": hub::REPO})).expect(200);
    let (mut seen, deadline) = (vec![0], Instant::now() + PATIENCE);
    let all = loop {
        let download = server.get("/admin/api/downloads").expect(200)["downloads"][0].clone();
        seen.push(download["bytes_done"].as_u64().unwrap());
        match download["state"].as_str().unwrap() {
            "done" => break download["bytes_total"].as_u64().unwrap(),
            "listing" | "fetching" | "installing" => assert!(Instant::now() < deadline, "{download}"),
            _ => panic!("{download}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(seen.is_sorted() && seen.last() == Some(&all), "{seen:?} of {all}");
    assert!(seen.iter().any(|&bytes| 0 < bytes && bytes < all), "it came at once: {seen:?}");
    assert_eq!(server.get("/v1/models").expect(200)["data"][0]["id"], hub::REPO);
    let body =
        json!({"model": hub::REPO, "temperature": 0, "messages": [{"role": "user", "content": "What is 12 plus 30?"}]});
    let answer = server.post("/v1/chat/completions", &body).expect(200);
    assert_eq!(answer["model"], hub::REPO);
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().contains("42"), "{answer}");
}
