//! Answers of the bundled model under constraints: always valid, whatever else runs, and nobody else's answer changes.
//!
//! A plain run takes some seeded schemas; `OMLX_SCHEMAS=200` takes so many.

mod schemas;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mlx_rs::Dtype;
use omlx::engine::{DeltaKind, Done, Event, FinishReason, Request, RequestState};
use omlx::error::Status;
use omlx::kernels::Precision;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions, TierSet};
use serde_json::{Value, json};

use schemas::{Random, random_schema, violation};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(300));

fn exact() -> PoolOptions {
    PoolOptions {
        device: Some(Device::Cpu),
        dtype: Some(Dtype::Float32),
        precision: Precision::Exact,
        queue_length: Some(1000),
        ..PoolOptions::default()
    }
}

fn open(options: PoolOptions) -> EnginePool {
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat"), Some("model")).unwrap();
    pool
}

fn generate(pool: &EnginePool, body: &Value) -> Arc<RequestState> {
    pool.generate(Request::from_json(body.to_string().as_bytes(), false).unwrap()).unwrap()
}

/// The text of each answer, its tokens, how it ended, and how the request did.
fn finish(state: &RequestState, choices: usize) -> (Vec<Answer>, Done) {
    let mut answers = vec![Answer::default(); choices];
    loop {
        match state.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => {
                let answer = &mut answers[delta.choice];
                match delta.kind {
                    DeltaKind::Text => answer.text += &delta.text,
                    DeltaKind::Reasoning => answer.thinking += &delta.text,
                    DeltaKind::ToolCall(call) => {
                        answer.calls.resize(answer.calls.len().max(call.index + 1), Default::default());
                        answer.calls[call.index].0 = call.name;
                        answer.calls[call.index].1 += &delta.text;
                    }
                }
                answer.tokens.extend(delta.tokens);
            }
            Event::ChoiceDone(choice, reason, _) => answers[choice].reason = Some(reason),
            Event::Loading(..) | Event::Started(..) | Event::Embeddings(_) | Event::Scores(_) => {}
            Event::Done(done) => {
                if choices == 1 {
                    answers[0].reason = Some(done.reason);
                }
                return (answers, done);
            }
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Answer {
    text: String,
    thinking: String,
    /// Name and arguments.
    calls: Vec<(String, String)>,
    tokens: Vec<u32>,
    reason: Option<FinishReason>,
}

/// The answer to a request for one.
fn ask(pool: &EnginePool, body: &Value) -> Answer {
    let (mut answers, done) = finish(&generate(pool, body), 1);
    assert_eq!(done.error, None, "{body}");
    answers.remove(0)
}

fn chat(text: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": 3000, "temperature": 0 })
}

fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}

fn under_schema(schema: &Value) -> Value {
    json!({ "type": "json_schema", "json_schema": { "name": "answer", "strict": true, "schema": schema } })
}

/// Why `text` is not what `schema` asks for.
fn fault(schema: &Value, text: &str) -> Option<String> {
    match serde_json::from_str(text) {
        Ok(value) => violation(schema, schema, &value),
        Err(error) => Some(error.to_string()),
    }
}

fn count() -> u64 {
    std::env::var("OMLX_SCHEMAS").map_or(20, |count| count.parse().unwrap())
}

/// Requests for JSON of random schemas, greedy and not.
fn requests() -> Vec<(Value, Value)> {
    let facts = "Mia Novak is 34, lives in Oslo and likes the red box. Write it as JSON.";
    (0..count())
        .map(|seed| {
            let body = with(chat(facts), "temperature", json!([0.0, 0.7, 1.5][seed as usize / 2 % 3]));
            (random_schema(seed), with(body, "seed", json!(seed)))
        })
        .collect()
}

#[test]
fn every_random_schema_gives_valid_json() {
    for overlap in [false, true] {
        let pool = open(PoolOptions { overlap: Some(overlap), max_sequences: Some(8), ..exact() });
        let constrained = |(schema, body): (Value, Value)| {
            let state = generate(&pool, &with(body, "response_format", under_schema(&schema)));
            (schema, state)
        };
        let odd = |(_, body): &(Value, Value)| body["seed"].as_u64().unwrap() % 2 == 1;
        let running: Vec<_> =
            requests().into_iter().filter(|request| odd(request) == overlap).map(constrained).collect();
        for (schema, state) in running {
            let (answers, done) = finish(&state, 1);
            assert_eq!((done.error, done.reason), (None, FinishReason::Stop), "{schema}: {:?}", answers[0].text);
            assert_eq!(fault(&schema, &answers[0].text), None, "{schema}");
        }
    }
}

/// The model by itself does not write what the schemas ask for.
#[test]
fn without_the_constraint_the_json_is_not_valid() {
    let pool = open(exact());
    let running: Vec<_> = requests()
        .into_iter()
        .take(20)
        .map(|(schema, body)| (schema, generate(&pool, &with(body, "max_tokens", json!(100)))))
        .collect();
    let valid = running.iter().filter(|(schema, state)| fault(schema, &finish(state, 1).0[0].text).is_none()).count();
    assert!(valid <= running.len() / 4, "{valid} of {} answers are valid anyway", running.len());
}

#[test]
fn every_kind_of_constraint_holds() {
    let pool = open(exact());
    let formatted = |format: Value| ask(&pool, &with(chat("What is 12 plus 30?"), "response_format", format));
    let choice = formatted(json!({ "type": "choice", "choices": ["forty-one", "forty-two"] }));
    assert!(["forty-one", "forty-two"].contains(&&*choice.text), "{choice:?}");
    let regex = formatted(json!({ "type": "regex", "regex": "[A-Z]{3}-[0-9]{4}" }));
    assert!(regex.text.len() == 8 && regex.text.as_bytes()[3] == b'-', "{regex:?}");
    let grammar = json!({ "type": "grammar", "grammar": "start: \"(\" start \")\" | /[0-9]/" });
    let nested = formatted(grammar).text;
    assert_eq!(nested.matches('(').count(), nested.matches(')').count());
    assert!(nested.trim_matches(['(', ')']).parse::<u8>().is_ok(), "{nested}");
    let object =
        ask(&pool, &with(chat("Write {\"a\": 1} as JSON."), "response_format", json!({ "type": "json_object" })));
    assert!(serde_json::from_str::<Value>(&object.text).unwrap().is_object(), "{object:?}");
    for answer in [choice, regex, object] {
        assert_eq!(answer.reason, Some(FinishReason::Stop));
    }
    // Plain prompts, too, and where the end of text is not to end the answer.
    let plain = json!({ "prompt": "12 plus 30 is", "ignore_eos": true,
        "response_format": { "type": "choice", "choices": [" 42"] } });
    assert_eq!(ask(&pool, &plain).text, " 42");
    let cut = ask(&pool, &with(chat("Say it."), "response_format", under_schema(&random_schema(1))));
    let short = with(chat("Say it."), "response_format", under_schema(&random_schema(1)));
    let short = ask(&pool, &with(short, "max_tokens", json!(3)));
    assert_eq!((short.reason, &short.tokens[..]), (Some(FinishReason::Length), &cut.tokens[..3]));
}

#[test]
fn what_cannot_be_generated_fails_before_a_token() {
    let pool = open(exact());
    for (format, status) in [
        (under_schema(&json!({ "type": "strnig" })), Status::InvalidRequest),
        (under_schema(&json!({ "not": {} })), Status::Unsupported),
        (json!({ "type": "regex", "regex": "(" }), Status::InvalidRequest),
        (json!({ "type": "grammar", "grammar": "start: nothing" }), Status::InvalidRequest),
        (json!({ "type": "choice", "choices": [] }), Status::InvalidRequest),
    ] {
        let (answers, done) = finish(&generate(&pool, &with(chat("x"), "response_format", format.clone())), 1);
        assert_eq!(done.error.map(|error| error.status()), Some(status), "{format}");
        assert!(answers[0].tokens.is_empty());
    }
    // A model without a tokenizer has no texts to hold to anything.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama-f32");
    pool.add_model(&fixture, Some("silent")).unwrap();
    let body = json!({ "model": "silent", "prompt": [1, 2], "response_format": { "type": "json_object" } });
    let (_, done) = finish(&generate(&pool, &body), 1);
    assert_eq!(done.error.map(|error| error.status()), Some(Status::Unsupported));
}

#[test]
fn thinking_comes_first_and_ends_with_its_budget() {
    let pool = open(exact());
    let schema = json!({ "type": "object", "properties": { "sum": { "type": "integer", "maximum": 999 } },
        "required": ["sum"], "additionalProperties": false });
    let thinks = with(chat("What is 12 plus 30?"), "chat_template_kwargs", json!({ "enable_thinking": true }));
    let free = ask(&pool, &thinks);
    assert!(free.thinking.len() > 10, "{free:?}");

    let constrained = with(thinks.clone(), "response_format", under_schema(&schema));
    let answer = ask(&pool, &constrained);
    assert_eq!(answer.thinking, free.thinking, "the constraint changes the thinking");
    assert_eq!(fault(&schema, &answer.text), None, "{answer:?}");
    assert_eq!(answer.reason, Some(FinishReason::Stop));

    for body in [&thinks, &constrained] {
        for budget in [0, 1, 5] {
            let answer = ask(&pool, &with(body.clone(), "thinking_budget", json!(budget)));
            let end = answer.tokens.iter().position(|token| *token == 4).expect("the end of the thinking");
            assert_eq!(end, budget, "{:?}", answer.text);
            if body == &constrained {
                assert_eq!(fault(&schema, &answer.text), None);
            }
        }
        // A budget that is not spent changes nothing.
        let rich = ask(&pool, &with(body.clone(), "thinking_budget", json!(2000)));
        assert_eq!(rich, ask(&pool, body));
    }
    // Without thinking the answer is the JSON alone.
    let body = with(constrained, "chat_template_kwargs", json!({ "enable_thinking": false }));
    assert_eq!(fault(&schema, &ask(&pool, &body).text), None);
}

#[test]
fn a_tool_has_to_be_called_where_the_request_says_so() {
    let pool = open(exact());
    let tool = |name: &str, seed| {
        let function = json!({ "name": name, "parameters": random_schema(seed) });
        json!({ "type": "function", "function": function })
    };
    let body = with(chat("Hello, how are you?"), "tools", json!([tool("weather", 3), tool("add", 4)]));
    assert!(ask(&pool, &body).calls.is_empty(), "the model calls tools anyway: this test shows nothing");
    let named = json!({ "type": "function", "function": { "name": "add" } });
    for (choice, parallel) in [(json!("required"), true), (json!("required"), false), (named, false)] {
        for temperature in [0.0, 1.0] {
            let body = with(with(body.clone(), "tool_choice", choice.clone()), "parallel_tool_calls", json!(parallel));
            let answer = ask(&pool, &with(body, "temperature", json!(temperature)));
            assert_eq!(answer.reason, Some(FinishReason::ToolCalls), "{answer:?}");
            assert!(answer.text.trim().is_empty() && (parallel || answer.calls.len() == 1), "{answer:?}");
            for (name, arguments) in &answer.calls {
                assert!(name == "add" || choice == "required" && name == "weather", "{name}");
                let schema = random_schema(if name == "add" { 4 } else { 3 });
                assert_eq!(fault(&schema, arguments), None, "{arguments}");
            }
        }
    }
    let unknown = json!({ "type": "function", "function": { "name": "other" } });
    let (_, done) = finish(&generate(&pool, &with(body, "tool_choice", unknown)), 1);
    assert_eq!(done.error.map(|error| error.status()), Some(Status::InvalidRequest));
}

/// Requests with and without constraints, budgets and seeds, some for several answers.
fn mixed(count: usize) -> Vec<Value> {
    let mut random = Random::new(5);
    (0..count)
        .map(|at| {
            let text = format!("Mia has {} boxes. Tell me about them.", random.below(50));
            let mut body = with(chat(&text), "temperature", json!([0.0, 0.8, 1.2][random.below(3)]));
            body["seed"] = json!(random.below(1000));
            body["max_tokens"] = json!(10 + random.below(30));
            match at % 4 {
                0 => body["response_format"] = under_schema(&random_schema(at as u64)),
                1 => body["repetition_penalty"] = json!(1.2),
                2 => {
                    body["chat_template_kwargs"] = json!({ "enable_thinking": true });
                    body["thinking_budget"] = json!(random.below(6));
                }
                _ => {}
            }
            if random.below(3) == 0 {
                body["n"] = json!(2);
            }
            body
        })
        .collect()
}

/// Answers with constraints and without share steps: each is what it is alone, whether steps overlap, prompts come in pieces
/// or sequences are preempted.
#[test]
fn company_changes_no_answer() {
    let bodies = mixed(24);
    let choices = |body: &Value| body["n"].as_u64().unwrap_or(1) as usize;
    let one = open(PoolOptions { overlap: Some(false), ..exact() });
    let alone: Vec<Vec<Answer>> = bodies
        .iter()
        .map(|body| {
            let answers = (0..choices(body)).map(|choice| {
                let mut body = with(body.clone(), "seed", json!(body["seed"].as_u64().unwrap() + choice as u64));
                body.as_object_mut().unwrap().remove("n");
                one.cache_clear(None, TierSet::ALL).unwrap();
                ask(&one, &body)
            });
            answers.collect()
        })
        .collect();
    let metrics = one.metrics().into_iter().next().unwrap().1;
    let token_bytes = metrics.block_bytes / metrics.block_tokens;
    let mut preemptions = 0;
    for overlap in [false, true] {
        for scarce in [false, true] {
            let company = open(PoolOptions {
                overlap: Some(overlap),
                max_sequences: Some(8),
                block_tokens: Some(8),
                prefill_chunk: Some(13),
                cache_bytes: scarce.then_some(token_bytes * 8 * 20),
                ..exact()
            });
            let running: Vec<_> = bodies.iter().map(|body| generate(&company, body)).collect();
            for ((body, alone), state) in bodies.iter().zip(&alone).zip(running) {
                let (answers, done) = finish(&state, choices(body));
                assert_eq!(done.error, None);
                assert_eq!(&answers, alone, "{body}");
            }
            preemptions += company.metrics().into_iter().next().unwrap().1.preemptions;
        }
    }
    assert!(preemptions > 0, "nothing was preempted: this test sees less than it should");
}

/// Where steps overlap, the masks of one wait for the tokens of the step before, and nobody leaves a step out for that.
#[test]
fn an_answer_under_a_constraint_has_a_token_in_every_step() {
    const TOKENS: u64 = 120;
    let pool = open(PoolOptions { overlap: Some(true), ..exact() });
    let steps = || pool.metrics().into_iter().next().unwrap().1.steps;
    let long = with(with(chat("Tell me a story."), "ignore_eos", json!(true)), "max_tokens", json!(1500));
    let long = generate(&pool, &long);
    assert!(matches!(long.next(PATIENCE), Ok(Event::Delta(_))));
    let endless = json!({ "type": "regex", "regex": "[a-z ]{2000}" });
    let body = with(with(chat("Say it."), "response_format", endless), "max_tokens", json!(TOKENS));
    let before = steps();
    let (answers, done) = finish(&generate(&pool, &body), 1);
    let taken = steps() - before;
    assert_eq!((done.reason, answers[0].tokens.len() as u64), (FinishReason::Length, TOKENS));
    assert!(!matches!(long.next(Some(Duration::ZERO)), Ok(Event::Done(_))), "nobody was beside it");
    long.cancel();
    assert_eq!(finish(&long, 1).1.reason, FinishReason::Cancelled);
    assert!(taken < TOKENS * 3 / 2, "{taken} steps for {TOKENS} tokens");
}

#[test]
fn a_cancelled_answer_under_a_constraint_ends() {
    let pool = open(PoolOptions { overlap: Some(true), ..exact() });
    let endless = json!({ "type": "regex", "regex": "[a-z ]+" });
    let body = with(chat("Tell me a story."), "response_format", endless);
    let (first, second) = (generate(&pool, &body), generate(&pool, &chat("What is 1 plus 1?")));
    assert!(matches!(first.next(PATIENCE), Ok(Event::Delta(_) | Event::Loading(..))));
    first.cancel();
    assert_eq!(finish(&first, 1).1.reason, FinishReason::Cancelled);
    assert_eq!(finish(&second, 1).1.reason, FinishReason::Stop);
}
