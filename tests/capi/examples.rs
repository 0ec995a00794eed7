//! The C examples compile without a warning and do what they say.

use serde_json::Value;

use crate::cc;
use crate::host::Pool;

const QUESTION: &str = "Tell me a short story about a fox.";

/// The example compiled to `program`: tests run at the same time and must not write the same file.
fn example(name: &str, program: &str) -> std::path::PathBuf {
    let source = cc::root().join(format!("examples/c/{name}.c"));
    cc::compile(&source, program, &["-std=c99"])
}

#[test]
fn chat_answers_like_the_reference() {
    let chat = example("chat", "chat");
    let outcome = cc::run_ok(&chat, &["-m", "models", "-t", "0", QUESTION]);
    let messages = serde_json::json!([{ "role": "user", "content": QUESTION }]);
    let request = serde_json::json!({ "messages": messages, "temperature": 0 });
    assert_eq!(outcome.stdout.trim_end_matches('\n'), Pool::open().answer(&request.to_string()));
    assert!(!outcome.stdout.trim().is_empty());
    assert!(outcome.stderr.contains("[17 prompt tokens, "), "{}", outcome.stderr);
    if omlx::mlx::gpu_available() {
        // The reference computed in f32, on a CPU.
        return;
    }
    // In exact mode the first 32 tokens are those of the reference implementation.
    let outcome = cc::run_ok(&chat, &["-m", "models", "-t", "0", "-p", "exact", QUESTION]);
    let fixture = std::fs::read(cc::root().join("tests/fixtures/tiny-chat.json")).expect("the fixture");
    let fixture: Value = serde_json::from_slice(&fixture).expect("JSON");
    let cases = fixture["cases"].as_array().expect("cases");
    let case = cases.iter().find(|case| case["messages"] == messages).expect("the fixture has this question");
    let expected = case["text"].as_str().expect("text");
    assert!(!expected.is_empty() && outcome.stdout.starts_with(expected), "{:?} is not {expected:?}", outcome.stdout);
}

#[test]
fn chat_reports_what_went_wrong() {
    let chat = example("chat", "chat-errors");
    for (args, message) in [
        (&["-m", "no/such/folder", QUESTION][..], "OMLX_E_NOT_FOUND: no/such/folder"),
        (&["-t", "-1", QUESTION], "OMLX_E_INVALID_REQUEST: \"temperature\""),
        (&["-t", "0"], "usage: "),
        (&[], "usage: "),
    ] {
        let outcome = cc::run(&chat, args);
        assert!(!outcome.success && outcome.stderr.contains(message), "{args:?}: {}", outcome.stderr);
        assert_eq!(outcome.stdout, "");
    }
}

#[test]
fn bench_prints_json_lines() {
    let bench = example("bench", "bench");
    let outcome = cc::run_ok(&bench, &["models/tiny-chat", "-p", "24", "-n", "6"]);
    let lines: Vec<Value> = outcome.stdout.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
    let names: Vec<_> = lines.iter().map(|line| line["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["prefill24", "decode"]);
    for line in &lines {
        assert_eq!((&line["engine"], &line["batch"]), (&Value::from("omlx"), &Value::from(1)));
        assert!(matches!(line["device"].as_str(), Some("cpu" | "gpu")), "{line}");
        assert!(line["tok_s"].as_f64().is_some_and(|rate| rate > 0.0), "{line}");
    }
    let outcome = cc::run(&bench, &["no/such/model"]);
    assert!(!outcome.success && outcome.stderr.contains("no/such/model"), "{}", outcome.stderr);
}
