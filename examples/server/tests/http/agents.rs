//! Sessions as coding agents have them: a long system prompt, tools, a history that grows with each turn. What a turn before
//! has computed comes from the cache, also after a restart.

use serde_json::{Value, json};

use crate::harness::{Server, root};
use model::{Shape, write_model};

#[path = "../../benches/tax/model.rs"]
mod model;

const TURNS: usize = 10;
/// The server is another one from this turn on.
const RESTART: usize = 5;
/// Tokens of a system prompt at least.
const SYSTEM_TOKENS: u64 = 12_000;

/// Of an answer: a model of random weights fills a call with all the white space that it may have.
const MAX_TOKENS: usize = 800;

/// What it says is of no matter: grammars see to its calls.
const SHAPE: Shape =
    Shape { hidden: 128, layers: 2, mlp: 256, heads: 2, kv_heads: 1, head_dim: 64, vocab: 4096, context: 32_768 };

fn system_prompt(whose: &str) -> String {
    let rule = |number: usize| {
        format!("{number}. As {whose} you read a file before you change it, and run the tests after.\n")
    };
    (0..440).map(rule).collect()
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"path": {"enum": ["a.rs", "b.rs"]}}, "required": ["path"],
        "additionalProperties": false})
}

/// A turn's tokens: those of the prompt, and those of them that were cached.
#[derive(Debug, Clone, Copy)]
struct Tokens {
    prompt: u64,
    cached: u64,
}

/// Runs a session: `turn` asks once, keeps the answer in the history, and returns what it took.
fn session(mut turn: impl FnMut(&Server, usize) -> Tokens) {
    let folder = tempfile::tempdir().unwrap();
    let (models, cache) = (folder.path().join("models"), folder.path().join("cache"));
    write_model(&models.join("long"), &SHAPE, &root().join("models/tiny-chat")).unwrap();
    let arguments = ["--models", models.to_str().unwrap(), "--cache-dir", cache.to_str().unwrap()];
    let start = || Server::start(&arguments);
    let (mut server, mut before) = (start(), 0);
    for number in 0..TURNS {
        if number == RESTART {
            server.terminate();
            assert!(server.wait().success());
            server = start();
        }
        let Tokens { prompt, cached } = turn(&server, number);
        assert!(prompt >= SYSTEM_TOKENS && prompt > before, "turn {number}: {prompt} tokens after {before}");
        match number {
            0 => assert_eq!(cached, 0),
            // The last token of a prompt may be another one where text follows it.
            _ => assert!(cached + 1 >= before, "turn {number}: {cached} cached of {before} tokens of the turn before"),
        }
        before = prompt;
    }
}

/// As Claude Code does it: `/v1/messages`, streamed, with a block that changes in each call at the head of the system prompt.
#[test]
fn a_session_with_messages_computes_only_what_is_new() {
    let mut messages = vec![json!({"role": "user", "content": "Mend the parser."})];
    session(|server, number| {
        let billing = format!("x-anthropic-billing-header: cc_version=2.1.{number}; cch={number:05x};");
        let system = json!([{"type": "text", "text": billing},
            {"type": "text", "text": system_prompt("Claude"), "cache_control": {"type": "ephemeral"}}]);
        // Every other turn calls a tool, whose result comes with the next one.
        let choice = if number % 2 == 0 {
            json!({"type": "any", "disable_parallel_tool_use": true})
        } else {
            json!({"type": "auto"})
        };
        let body = json!({"model": "claude-sonnet-4-5", "max_tokens": MAX_TOKENS, "temperature": 0, "stream": true, "system": system,
            "messages": messages, "tool_choice": choice, "metadata": {"user_id": "someone"},
            "tools": [{"name": "read", "description": "Reads a file.", "input_schema": schema()}]});
        let data = server.post("/v1/messages", &body).data();
        let of = |kind: &str| data.iter().find(|event| event["type"] == kind).unwrap_or_else(|| panic!("no {kind}"));
        let usage = &of("message_start")["message"]["usage"];
        assert_eq!(usage["input_tokens"], of("message_delta")["usage"]["input_tokens"], "told from the beginning");
        let call = data.iter().map(|event| &event["content_block"]).find(|block| block["type"] == "tool_use");
        assert!(call.is_some() || number % 2 == 1, "turn {number} had to call");
        let pieces = |key: &str| data.iter().filter_map(|event| event["delta"][key].as_str()).collect::<String>();
        if let Some(call) = call {
            let input: Value = serde_json::from_str(&pieces("partial_json")).unwrap();
            let call = json!({"type": "tool_use", "id": call["id"], "name": call["name"], "input": input});
            let result =
                json!({"type": "tool_result", "tool_use_id": call["id"], "content": "fn parse() {}\n".repeat(20)});
            messages.push(json!({"role": "assistant", "content": [call]}));
            messages.push(json!({"role": "user", "content": [result]}));
        } else {
            messages.push(json!({"role": "assistant", "content": pieces("text")}));
            messages.push(json!({"role": "user", "content": "Go on."}));
        }
        let (new, cached) =
            (usage["input_tokens"].as_u64().unwrap(), usage["cache_read_input_tokens"].as_u64().unwrap());
        Tokens { prompt: new + cached, cached }
    });
}

/// As Codex does it: `/v1/responses`, streamed, with the whole input in each call.
#[test]
fn a_session_with_responses_computes_only_what_is_new() {
    let mut input = vec![json!({"type": "message", "role": "user",
        "content": [{"type": "input_text", "text": "Mend the parser."}]})];
    session(|server, number| {
        let choice = if number % 2 == 0 { "required" } else { "auto" };
        let body = json!({"model": "gpt-5-codex", "instructions": system_prompt("Codex"), "input": input, "stream": true,
            "store": false, "max_output_tokens": MAX_TOKENS, "temperature": 0, "tool_choice": choice, "include": [],
            "prompt_cache_key": "session", "reasoning": {"effort": "none"}, "parallel_tool_calls": false,
            "tools": [{"type": "function", "name": "shell", "strict": true, "parameters": schema()}]});
        let data = server.post("/v1/responses", &body).data();
        let last = data.last().unwrap();
        let response = &last["response"];
        assert!(["completed", "incomplete"].contains(&response["status"].as_str().unwrap()), "{last}");
        let output = response["output"].as_array().unwrap();
        let call = output.iter().find(|item| item["type"] == "function_call");
        assert!(call.is_some() || number % 2 == 1, "turn {number} had to call");
        input.extend(output.iter().cloned());
        input.push(match call {
            Some(call) => json!({"type": "function_call_output", "call_id": call["call_id"],
                "output": "fn parse() {}\n".repeat(20)}),
            None => json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go on."}]}),
        });
        let usage = &response["usage"];
        let cached = usage["input_tokens_details"]["cached_tokens"].as_u64().unwrap();
        Tokens { prompt: usage["input_tokens"].as_u64().unwrap(), cached }
    });
}
