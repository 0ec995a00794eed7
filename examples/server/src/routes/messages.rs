//! `POST /v1/messages`: Anthropic's chat, streamed or not.

use axum::extract::{Extension, State};
use axum::response::Response;
use omlx_client::{Event, FinishReason, Request, ToolCall, Usage};
use serde_json::{Map, Value, json};

use crate::app::{App, Shared};
use crate::http::answer::{Answer, Events};
use crate::http::anthropic;
use crate::http::body::{JsonObject, flag, json_response};
use crate::http::error::ApiError;
use crate::http::guard::RequestId;
use crate::http::sse::{self, Out};

/// The handler.
pub async fn handle(
    State(app): State<Shared>,
    Extension(request_id): Extension<RequestId>,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let (request, streams) = body.with(&app, begin).await?;
    let head = Head { id: app.id("msg_"), model: request.model() };
    if streams {
        let events = Events::begin(request).await?;
        return Ok(sse::respond(&app, &request_id.0, |out| stream(events, head, out)));
    }
    let answer = Answer::collect(request).await?;
    Ok(json_response(&head.whole(answer)))
}

/// Starts the request, and says whether its answer is streamed.
fn begin(app: &App, body: Map<String, Value>) -> Result<(Request, bool), ApiError> {
    anthropic::note_ignored(app, "messages", &body);
    if !body.get("max_tokens").is_some_and(Value::is_u64) {
        return Err(ApiError::bad_request("\"max_tokens\" must be a number of tokens"));
    }
    let streams = flag(&body, "stream")?;
    Ok((app.generate(anthropic::to_chat(&body)?)?, streams))
}

struct Head {
    id: String,
    model: String,
}

impl Head {
    fn whole(&self, answer: Answer) -> Value {
        let mut content = Vec::new();
        let choice = answer.choices.into_iter().next().unwrap_or_default();
        if !choice.reasoning.is_empty() {
            content.push(json!({"type": "thinking", "thinking": choice.reasoning, "signature": ""}));
        }
        if !choice.text.is_empty() {
            content.push(json!({"type": "text", "text": choice.text, "citations": null}));
        }
        for call in choice.calls {
            content.push(match serde_json::from_str::<Map<String, Value>>(&call.arguments) {
                Ok(input) => json!({"type": "tool_use", "id": call.id, "name": call.name, "input": input}),
                // Cut off: no client could carry it out, but its words are a part of the answer.
                Err(_) => {
                    json!({"type": "text", "text": format!("{} {}", call.name, call.arguments), "citations": null})
                }
            });
        }
        let mut message = self.message(usage_json(&answer.usage));
        message.insert("content".to_owned(), content.into());
        message.extend(end(choice.finish, choice.stop));
        Value::Object(message)
    }

    fn message(&self, usage: Value) -> Map<String, Value> {
        let keys = [
            ("id", Value::from(self.id.as_str())),
            ("type", "message".into()),
            ("role", "assistant".into()),
            ("model", self.model.as_str().into()),
            ("content", json!([])),
            ("stop_reason", Value::Null),
            ("stop_sequence", Value::Null),
            ("usage", usage),
        ];
        keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// Why an answer ended: the keys of a message that say so.
fn end(reason: FinishReason, stop: Option<String>) -> Map<String, Value> {
    let reason = match reason {
        FinishReason::Length => "max_tokens",
        FinishReason::ToolCalls => "tool_use",
        _ if stop.is_some() => "stop_sequence",
        _ => "end_turn",
    };
    let keys = [("stop_reason", Value::from(reason)), ("stop_sequence", stop.into())];
    keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Input tokens are those that no cache had.
fn usage_json(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

/// The kind of a content block that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    Call(usize),
}

/// The content blocks of a stream: one is open at most.
struct Blocks<'a> {
    out: &'a Out,
    open: Option<Kind>,
    index: usize,
}

impl Blocks<'_> {
    fn delta(&mut self, kind: Kind, start: impl FnOnce() -> Value, delta: Value) {
        if self.open != Some(kind) {
            self.close();
            self.open = Some(kind);
            let block = json!({"type": "content_block_start", "index": self.index, "content_block": start()});
            self.out.event("content_block_start", &block);
        }
        let delta = json!({"type": "content_block_delta", "index": self.index, "delta": delta});
        self.out.event("content_block_delta", &delta);
    }

    fn close(&mut self) {
        if let Some(kind) = self.open.take() {
            if kind == Kind::Thinking {
                let delta = json!({"type": "signature_delta", "signature": ""});
                let delta = json!({"type": "content_block_delta", "index": self.index, "delta": delta});
                self.out.event("content_block_delta", &delta);
            }
            self.out.event("content_block_stop", &json!({"type": "content_block_stop", "index": self.index}));
            self.index += 1;
        }
    }

    fn call(&mut self, call: ToolCall) {
        let block = || json!({"type": "tool_use", "id": call.id, "name": call.name, "input": {}});
        let delta = json!({"type": "input_json_delta", "partial_json": call.piece.text});
        self.delta(Kind::Call(call.index), block, delta);
    }
}

async fn stream(mut events: Events, head: Head, out: Out) {
    let message = head.message(usage_json(&events.started().await));
    out.event("message_start", &json!({"type": "message_start", "message": message}));
    out.event("ping", &json!({"type": "ping"}));
    let mut blocks = Blocks { out: &out, open: None, index: 0 };
    while let Some(event) = events.next().await {
        match event {
            Event::Text(piece) if piece.text.is_empty() => {}
            Event::Text(piece) => {
                let delta = json!({"type": "text_delta", "text": piece.text});
                blocks.delta(Kind::Text, || json!({"type": "text", "text": "", "citations": null}), delta);
            }
            Event::Reasoning(piece) if piece.text.is_empty() => {}
            Event::Reasoning(piece) => {
                let delta = json!({"type": "thinking_delta", "thinking": piece.text});
                blocks.delta(Kind::Thinking, || json!({"type": "thinking", "thinking": "", "signature": ""}), delta);
            }
            Event::ToolCall(call) => blocks.call(call),
            Event::Done(done) => {
                blocks.close();
                if let Some(error) = done.error {
                    out.event("error", &ApiError::from(error).to_json(true));
                    return;
                }
                let delta = end(done.reason, done.stop);
                let usage = usage_json(&done.usage);
                out.event("message_delta", &json!({"type": "message_delta", "delta": delta, "usage": usage}));
                out.event("message_stop", &json!({"type": "message_stop"}));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::answer::{Call, Choice};

    #[test]
    fn a_call_that_is_cut_off_is_text() {
        let call = |arguments: &str| Call { id: "1".to_owned(), name: "f".to_owned(), arguments: arguments.to_owned() };
        let calls = vec![call("{\"a\": 1}"), call("{\"a\": \"half"), call("[1]"), call("")];
        let choice = Choice { calls, text: "Sure.".to_owned(), ..Choice::default() };
        let head = Head { id: "m".to_owned(), model: "m".to_owned() };
        let whole = head.whole(Answer { choices: vec![choice], usage: Usage::default() });
        let texts: Vec<_> =
            whole["content"].as_array().unwrap().iter().filter_map(|part| part["text"].as_str()).collect();
        assert_eq!(texts, ["Sure.", "f {\"a\": \"half", "f [1]", "f "]);
        assert_eq!(whole["content"][1]["input"], json!({"a": 1}));
    }
}
