//! `POST /v1/chat/completions`: OpenAI's chat, streamed or not.

use axum::extract::{Extension, State};
use axum::response::Response;
use omlx_client::{Event, FinishReason, Request, TokenLogprob};
use serde_json::{Map, Value, json};

use crate::app::{App, Shared, unix_time};
use crate::http::answer::{Answer, Choice, Events};
use crate::http::body::{JsonObject, json_response};
use crate::http::error::ApiError;
use crate::http::guard::RequestId;
use crate::http::openai::{finish_word, reasoning_effort, streaming, usage_json};
use crate::http::sse::{self, Out};

/// Keys that mean something here or in the library.
pub(super) const KNOWN: &[&str] = &[
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "model",
    "n",
    "parallel_tool_calls",
    "presence_penalty",
    "priority",
    "reasoning_effort",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "thinking_budget",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
];

/// The handler.
pub async fn handle(
    State(app): State<Shared>,
    Extension(request_id): Extension<RequestId>,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let (request, head, streams) = body.with(&app, begin).await?;
    if streams {
        let events = Events::begin(request).await?;
        return Ok(sse::respond(&app, &request_id.0, |out| stream(events, head, out)));
    }
    let answer = Answer::collect(request).await?;
    Ok(json_response(&head.whole(answer)))
}

/// Starts the request, and says whether its answer is streamed.
fn begin(app: &App, mut body: Map<String, Value>) -> Result<(Request, Head, bool), ApiError> {
    app.note_ignored("chat/completions", &body, KNOWN);
    if !body.get("messages").is_some_and(Value::is_array) {
        return Err(ApiError::bad_request("\"messages\" must be an array"));
    }
    let (streams, usage) = streaming(&mut body)?;
    let with_logprobs = body.get("logprobs").and_then(Value::as_bool).unwrap_or(false);
    prepare(&mut body);
    let request = app.generate(body)?;
    let head = Head { id: app.id("chatcmpl-"), created: unix_time(), model: request.model(), usage, with_logprobs };
    Ok((request, head, streams))
}

/// Words of the API that the library has other names for.
fn prepare(body: &mut Map<String, Value>) {
    if let Some(effort) = body.remove("reasoning_effort").filter(|effort| !effort.is_null()) {
        reasoning_effort(body, effort);
    }
    let messages = body.get_mut("messages").and_then(Value::as_array_mut);
    for message in messages.into_iter().flatten().filter_map(Value::as_object_mut) {
        if message.get("role").is_some_and(|role| role == "developer") {
            message.insert("role".to_owned(), "system".into());
        }
    }
}

/// What all chunks of an answer have in common.
struct Head {
    id: String,
    created: u64,
    model: String,
    usage: bool,
    with_logprobs: bool,
}

impl Head {
    fn whole(&self, answer: Answer) -> Value {
        let choices = answer.choices.iter().enumerate().map(|(index, choice)| self.choice(index, choice));
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices.collect::<Vec<_>>(),
            "usage": usage_json(&answer.usage),
        })
    }

    fn choice(&self, index: usize, choice: &Choice) -> Value {
        let called = !choice.calls.is_empty();
        let content = if called && choice.text.is_empty() { Value::Null } else { choice.text.as_str().into() };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !choice.reasoning.is_empty() {
            message["reasoning_content"] = choice.reasoning.as_str().into();
        }
        if called {
            let calls = choice.calls.iter().map(|call| {
                let function = json!({"name": call.name, "arguments": call.arguments});
                json!({"id": call.id, "type": "function", "function": function})
            });
            message["tool_calls"] = calls.collect();
        }
        let logprobs = if self.with_logprobs { logprobs_json(&choice.logprobs) } else { Value::Null };
        json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_word(choice.finish),
        })
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn delta(&self, choice: usize, delta: Value, logprobs: Value, finish: Option<FinishReason>) -> Value {
        let finish = finish.map(finish_word);
        self.chunk(json!([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]))
    }
}

/// What stands around the text of a chunk, written once: there is a chunk for each token.
struct Frame {
    before: String,
    after: &'static str,
}

impl Frame {
    fn new(head: &Head) -> Self {
        let mut before = head.chunk(Value::Null).to_string();
        let choices = before.find("\"choices\":null").unwrap_or(before.len());
        before.truncate(choices);
        before.push_str("\"choices\":[{\"index\":");
        let after = if head.usage { "],\"usage\":null}" } else { "]}" };
        Self { before, after }
    }

    fn write(&self, out: &Out, choice: usize, key: &str, text: &str) {
        let (before, after) = (&self.before, self.after);
        let rest = "},\"logprobs\":null,\"finish_reason\":null}";
        out.around(
            text,
            format_args!("data: {before}{choice},\"delta\":{{\"{key}\":"),
            format_args!("{rest}{after}\n\n"),
        );
    }
}

/// Which of the answers and calls of a stream have begun or ended.
#[derive(Default)]
struct Progress {
    begun: Vec<usize>,
    ended: usize,
    calls: Vec<(usize, usize)>,
}

async fn stream(mut events: Events, head: Head, out: Out) {
    let (mut progress, frame) = (Progress::default(), Frame::new(&head));
    while let Some(event) = events.next().await {
        match event {
            Event::Text(piece) if piece.text.is_empty() && piece.logprobs.is_empty() => {}
            Event::Text(piece) if head.with_logprobs => {
                progress.begin(&head, &out, piece.choice);
                let logprobs = logprobs_json(&piece.logprobs);
                out.data(&head.delta(piece.choice, json!({"content": piece.text}), logprobs, None));
            }
            Event::Text(piece) => {
                progress.begin(&head, &out, piece.choice);
                frame.write(&out, piece.choice, "content", &piece.text);
            }
            Event::Reasoning(piece) if piece.text.is_empty() => {}
            Event::Reasoning(piece) => {
                progress.begin(&head, &out, piece.choice);
                frame.write(&out, piece.choice, "reasoning_content", &piece.text);
            }
            Event::ToolCall(call) => {
                progress.begin(&head, &out, call.piece.choice);
                let delta = progress.call_delta(&call);
                out.data(&head.delta(call.piece.choice, delta, Value::Null, None));
            }
            Event::ChoiceDone(choice, reason, _) => progress.end(&head, &out, choice, reason),
            Event::Done(done) => {
                if let Some(error) = done.error {
                    out.data(&ApiError::from(error).to_json(false));
                    break;
                }
                if progress.ended == 0 {
                    progress.end(&head, &out, 0, done.reason);
                }
                if head.usage {
                    let mut chunk = head.chunk(json!([]));
                    chunk["usage"] = usage_json(&done.usage);
                    out.data(&chunk);
                }
                out.done();
            }
            _ => {}
        }
    }
}

impl Progress {
    /// The first chunk of an answer says whose it is.
    fn begin(&mut self, head: &Head, out: &Out, choice: usize) {
        if !self.begun.contains(&choice) {
            self.begun.push(choice);
            out.data(&head.delta(choice, json!({"role": "assistant", "content": ""}), Value::Null, None));
        }
    }

    fn end(&mut self, head: &Head, out: &Out, choice: usize, reason: FinishReason) {
        self.begin(head, out, choice);
        self.ended += 1;
        out.data(&head.delta(choice, json!({}), Value::Null, Some(reason)));
    }

    /// Id and name come with a call's first chunk only.
    fn call_delta(&mut self, call: &omlx_client::ToolCall) -> Value {
        let key = (call.piece.choice, call.index);
        let arguments = json!({"arguments": call.piece.text});
        if self.calls.contains(&key) {
            return json!({"tool_calls": [{"index": call.index, "function": arguments}]});
        }
        self.calls.push(key);
        let function = json!({"name": call.name, "arguments": call.piece.text});
        json!({"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]})
    }
}

fn logprobs_json(tokens: &[TokenLogprob]) -> Value {
    let one = |token: &TokenLogprob| json!({"token": String::from_utf8_lossy(&token.bytes), "logprob": token.logprob, "bytes": token.bytes});
    let all = tokens.iter().map(|token| {
        let mut object = one(token);
        object["top_logprobs"] = token.top.iter().map(one).collect();
        object
    });
    json!({"content": all.collect::<Vec<_>>(), "refusal": null})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effort_reaches_templates_unless_they_are_told_otherwise() {
        let told = |body: Value| {
            let Value::Object(mut body) = body else { unreachable!() };
            prepare(&mut body);
            assert!(!body.contains_key("reasoning_effort"), "the library does not know it");
            body.remove("chat_template_kwargs")
        };
        let high = json!({"enable_thinking": true, "reasoning_effort": "high"});
        assert_eq!(told(json!({"reasoning_effort": "high"})), Some(high.clone()));
        assert_eq!(told(json!({"reasoning_effort": "high", "chat_template_kwargs": null})), Some(high));
        let none = json!({"enable_thinking": false, "reasoning_effort": "none"});
        assert_eq!(told(json!({"reasoning_effort": "none"})), Some(none));
        let own = json!({"reasoning_effort": "low", "enable_thinking": false});
        assert_eq!(told(json!({"reasoning_effort": "high", "chat_template_kwargs": own.clone()})), Some(own));
        assert_eq!(told(json!({"reasoning_effort": null})), None);
    }

    #[test]
    fn a_framed_chunk_is_the_chunk() {
        for usage in [false, true] {
            // Names that would be found first, were they not escaped.
            let model = "\"choices\":null".to_owned();
            let head = Head { id: "chatcmpl-1".to_owned(), created: 5, model, usage, with_logprobs: false };
            let (framed, built) = (Out::default(), Out::default());
            for (choice, text) in [(0, "a"), (3, "\"\n\u{1f600}\u{0}")] {
                Frame::new(&head).write(&framed, choice, "content", text);
                built.data(&head.delta(choice, json!({"content": text}), Value::Null, None));
            }
            assert_eq!(framed.take(), built.take());
        }
    }
}
