//! `POST /v1/responses`: OpenAI's newer interface, streamed or not; nothing is stored.

use axum::extract::{Extension, State};
use axum::response::Response;
use omlx_client::{Event, FinishReason, Request, ToolCall, Usage};
use serde_json::{Map, Value, json};

use crate::app::{App, Shared, unix_time};
use crate::http::answer::{Answer, Call, Events};
use crate::http::body::{JsonObject, flag, json_response};
use crate::http::error::ApiError;
use crate::http::guard::RequestId;
use crate::http::responses_input as input;
use crate::http::sse::{self, Out};

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
    let choice = answer.choices.into_iter().next().unwrap_or_default();
    let mut output = Vec::new();
    if !choice.reasoning.is_empty() {
        output.push(reasoning_item(&head.item("rs", 0), &choice.reasoning));
    }
    if !choice.text.is_empty() || choice.calls.is_empty() {
        output.push(message_item(&head.item("msg", output.len()), &choice.text, "completed"));
    }
    for call in &choice.calls {
        output.push(call_item(&head.item("fc", output.len()), call, "completed"));
    }
    Ok(json_response(&head.response(choice.finish, output, Some(&answer.usage))))
}

/// Starts the request, and says whether its answer is streamed.
fn begin(app: &App, body: Map<String, Value>) -> Result<(Request, Head, bool), ApiError> {
    app.note_ignored("responses", &body, input::KNOWN);
    let streams = flag(&body, "stream")?;
    let request = app.generate(input::to_chat(&body)?)?;
    let head = Head::new(app.id("resp_"), &body, request.model());
    Ok((request, head, streams))
}

struct Head {
    id: String,
    /// The response without what is still to come.
    base: Map<String, Value>,
}

impl Head {
    fn new(id: String, body: &Map<String, Value>, model: String) -> Self {
        let given =
            |key: &str, default: Value| body.get(key).filter(|value| !value.is_null()).cloned().unwrap_or(default);
        let base = [
            ("id", Value::from(id.as_str())),
            ("object", "response".into()),
            ("created_at", unix_time().into()),
            ("status", "in_progress".into()),
            ("error", Value::Null),
            ("incomplete_details", Value::Null),
            ("instructions", given("instructions", Value::Null)),
            ("max_output_tokens", given("max_output_tokens", Value::Null)),
            ("model", model.into()),
            ("output", json!([])),
            ("parallel_tool_calls", given("parallel_tool_calls", true.into())),
            ("previous_response_id", Value::Null),
            ("reasoning", given("reasoning", json!({"effort": null, "summary": null}))),
            ("store", false.into()),
            ("temperature", given("temperature", Value::Null)),
            ("text", given("text", json!({"format": {"type": "text"}}))),
            ("tool_choice", given("tool_choice", "auto".into())),
            ("tools", given("tools", json!([]))),
            ("top_p", given("top_p", Value::Null)),
            ("truncation", "disabled".into()),
            ("usage", Value::Null),
            ("metadata", given("metadata", json!({}))),
        ];
        Self { id, base: base.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
    }

    /// The id of an item: that of the response and the item's place.
    fn item(&self, kind: &str, index: usize) -> String {
        format!("{kind}_{}_{index}", self.id.trim_start_matches("resp_"))
    }

    fn response(&self, reason: FinishReason, output: Vec<Value>, usage: Option<&Usage>) -> Value {
        let mut response = self.base.clone();
        let length = reason == FinishReason::Length;
        let status = if length { "incomplete" } else { "completed" };
        response.insert("status".to_owned(), status.into());
        if length {
            response.insert("incomplete_details".to_owned(), json!({"reason": "max_output_tokens"}));
        }
        response.insert("output".to_owned(), output.into());
        response.insert("usage".to_owned(), usage.map_or(Value::Null, usage_json));
        Value::Object(response)
    }
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    })
}

fn reasoning_item(id: &str, text: &str) -> Value {
    json!({"id": id, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]})
}

fn message_item(id: &str, text: &str, status: &str) -> Value {
    let content = if status == "completed" { json!([text_part(text)]) } else { json!([]) };
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn call_item(id: &str, call: &Call, status: &str) -> Value {
    let (call_id, name, arguments) = (&call.id, &call.name, &call.arguments);
    json!({"id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name, "arguments": arguments})
}

/// An item that is being written.
enum Item {
    Reasoning(String),
    Text(String),
    Call(usize, Call),
}

/// The items of a stream: one is open at most.
struct Items<'a> {
    head: &'a Head,
    out: &'a Out,
    open: Option<(String, Item)>,
    done: Vec<Value>,
    sequence: u64,
}

impl Items<'_> {
    fn send(&mut self, kind: &str, mut event: Value) {
        event["type"] = kind.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        self.out.event(kind, &event);
    }

    fn begin(&mut self, id: String, item: Item, json: Value) {
        self.close();
        let index = self.done.len();
        self.send("response.output_item.added", json!({"output_index": index, "item": json}));
        if matches!(item, Item::Text(_)) {
            let part = json!({"item_id": id, "output_index": index, "content_index": 0, "part": text_part("")});
            self.send("response.content_part.added", part);
        }
        self.open = Some((id, item));
    }

    fn text(&mut self, piece: &str) {
        if !matches!(self.open, Some((_, Item::Text(_)))) {
            let id = self.head.item("msg", self.done.len() + usize::from(self.open.is_some()));
            let json = message_item(&id, "", "in_progress");
            self.begin(id, Item::Text(String::new()), json);
        }
        let index = self.done.len();
        if let Some((id, Item::Text(text))) = &mut self.open {
            text.push_str(piece);
            let event =
                json!({"item_id": id, "output_index": index, "content_index": 0, "delta": piece, "logprobs": []});
            self.send("response.output_text.delta", event);
        }
    }

    fn reasoning(&mut self, piece: &str) {
        if !matches!(self.open, Some((_, Item::Reasoning(_)))) {
            let id = self.head.item("rs", self.done.len() + usize::from(self.open.is_some()));
            let json = json!({"id": id, "type": "reasoning", "summary": [], "content": []});
            self.begin(id, Item::Reasoning(String::new()), json);
        }
        let index = self.done.len();
        if let Some((id, Item::Reasoning(text))) = &mut self.open {
            text.push_str(piece);
            let event = json!({"item_id": id, "output_index": index, "content_index": 0, "delta": piece});
            self.send("response.reasoning_text.delta", event);
        }
    }

    fn call(&mut self, piece: ToolCall) {
        if !matches!(&self.open, Some((_, Item::Call(index, _))) if *index == piece.index) {
            let id = self.head.item("fc", self.done.len() + usize::from(self.open.is_some()));
            let call = Call { id: piece.id, name: piece.name, arguments: String::new() };
            let json = call_item(&id, &call, "in_progress");
            self.begin(id, Item::Call(piece.index, call), json);
        }
        let index = self.done.len();
        if let Some((id, Item::Call(_, call))) = &mut self.open {
            call.arguments.push_str(&piece.piece.text);
            let event = json!({"item_id": id, "output_index": index, "delta": piece.piece.text});
            self.send("response.function_call_arguments.delta", event);
        }
    }

    fn close(&mut self) {
        let Some((id, item)) = self.open.take() else { return };
        let index = self.done.len();
        let at = |mut event: Value| {
            event["item_id"] = id.as_str().into();
            event["output_index"] = index.into();
            event
        };
        let json = match &item {
            Item::Text(text) => {
                let event = at(json!({"content_index": 0, "text": text, "logprobs": []}));
                self.send("response.output_text.done", event);
                self.send("response.content_part.done", at(json!({"content_index": 0, "part": text_part(text)})));
                message_item(&id, text, "completed")
            }
            Item::Reasoning(text) => {
                self.send("response.reasoning_text.done", at(json!({"content_index": 0, "text": text})));
                reasoning_item(&id, text)
            }
            Item::Call(_, call) => {
                let event = at(json!({"name": call.name, "arguments": call.arguments}));
                self.send("response.function_call_arguments.done", event);
                call_item(&id, call, "completed")
            }
        };
        self.send("response.output_item.done", json!({"output_index": index, "item": json}));
        self.done.push(json);
    }
}

async fn stream(mut events: Events, head: Head, out: Out) {
    let mut items = Items { head: &head, out: &out, open: None, done: Vec::new(), sequence: 0 };
    for kind in ["response.created", "response.in_progress"] {
        items.send(kind, json!({"response": head.base}));
    }
    while let Some(event) = events.next().await {
        match event {
            Event::Text(piece) if !piece.text.is_empty() => items.text(&piece.text),
            Event::Reasoning(piece) if !piece.text.is_empty() => items.reasoning(&piece.text),
            Event::ToolCall(call) => items.call(call),
            Event::Done(done) => {
                if let Some(error) = done.error {
                    items.close();
                    let mut response = head.base.clone();
                    response.insert("status".to_owned(), "failed".into());
                    response.insert("error".to_owned(), json!({"code": "server_error", "message": error.message}));
                    items.send("response.failed", json!({"response": response}));
                    return;
                }
                if items.done.is_empty() && items.open.is_none() {
                    items.text("");
                }
                items.close();
                let output = std::mem::take(&mut items.done);
                let response = head.response(done.reason, output, Some(&done.usage));
                let kind = if done.reason == FinishReason::Length { "incomplete" } else { "completed" };
                items.send(&format!("response.{kind}"), json!({"response": response}));
            }
            _ => {}
        }
    }
}
