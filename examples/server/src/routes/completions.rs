//! `POST /v1/completions`: texts that the model goes on with.

use axum::extract::{Extension, State};
use axum::response::Response;
use omlx_client::{Event, FinishReason, Request, TokenLogprob, Usage};
use serde_json::{Map, Value, json};

use crate::app::{App, Shared, unix_time};
use crate::http::answer::{Answer, Events};
use crate::http::body::{JsonObject, json_response};
use crate::http::error::ApiError;
use crate::http::guard::RequestId;
use crate::http::openai::{finish_word, streaming, usage_json};
use crate::http::sse::{self, Out};

/// Keys that mean something here or in the library.
pub(super) const KNOWN: &[&str] = &[
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "model",
    "n",
    "presence_penalty",
    "priority",
    "prompt",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
];

/// What OpenAI's API takes if nothing is said.
const MAX_TOKENS: u64 = 16;
/// Prompts of one request at most.
const MAX_PROMPTS: usize = 32;

/// The handler.
pub async fn handle(
    State(app): State<Shared>,
    Extension(request_id): Extension<RequestId>,
    body: JsonObject,
) -> Result<Response, ApiError> {
    let (requests, head, streams) = body.with(&app, begin).await?;
    if streams {
        let prompts = Events::begin_all(requests).await?;
        return Ok(sse::respond(&app, &request_id.0, |out| stream(prompts, head, out)));
    }
    let mut answers = Vec::new();
    for request in requests {
        answers.push(Answer::collect(request).await?);
    }
    Ok(json_response(&head.whole(answers)))
}

/// Starts the requests, one for each prompt, and says whether their answers are streamed.
fn begin(app: &App, mut body: Map<String, Value>) -> Result<(Vec<Request>, Head, bool), ApiError> {
    app.note_ignored("completions", &body, KNOWN);
    for unsupported in ["suffix", "echo", "best_of"] {
        let value = body.remove(unsupported).unwrap_or_default();
        if !matches!(value, Value::Null | Value::Bool(false)) && value != 1 {
            return Err(ApiError::bad_request(format!("{unsupported:?} is not supported")).with_code("unsupported"));
        }
    }
    let (streams, usage) = streaming(&mut body)?;
    // A count here, a switch and a count in the library.
    let count = body.remove("logprobs").filter(|count| !count.is_null());
    let with_logprobs = count.is_some();
    if let Some(count) = count {
        body.insert("logprobs".to_owned(), true.into());
        body.insert("top_logprobs".to_owned(), count);
    }
    if body.get("max_tokens").is_none_or(Value::is_null) {
        body.insert("max_tokens".to_owned(), MAX_TOKENS.into());
    }
    let choices = body.get("n").and_then(Value::as_u64).unwrap_or(1).max(1) as usize;
    let requests = prompts(&mut body)?.into_iter().map(|prompt| {
        let mut one = body.clone();
        one.insert("prompt".to_owned(), prompt);
        app.generate(one)
    });
    let requests = requests.collect::<Result<Vec<Request>, _>>()?;
    let model = requests.first().map(Request::model).unwrap_or_default();
    let head = Head { id: app.id("cmpl-"), created: unix_time(), model, usage, with_logprobs, choices };
    Ok((requests, head, streams))
}

/// The prompts of a request: a text, token ids, or an array of either.
fn prompts(body: &mut Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    match body.remove("prompt") {
        Some(text @ Value::String(_)) => Ok(vec![text]),
        Some(Value::Array(items)) if !items.is_empty() => {
            if items.iter().all(Value::is_number) {
                return Ok(vec![Value::Array(items)]);
            }
            if items.len() > MAX_PROMPTS {
                return Err(ApiError::bad_request(format!("more than {MAX_PROMPTS} prompts")));
            }
            match items.iter().all(|item| item.is_string() || item.is_array()) {
                true => Ok(items),
                false => Err(ApiError::bad_request("\"prompt\" mixes texts and token ids")),
            }
        }
        _ => Err(ApiError::bad_request("\"prompt\" must be a text, token ids, or an array of them")),
    }
}

struct Head {
    id: String,
    created: u64,
    model: String,
    usage: bool,
    with_logprobs: bool,
    /// Answers to each prompt.
    choices: usize,
}

impl Head {
    fn whole(&self, answers: Vec<Answer>) -> Value {
        let (mut choices, mut usage) = (Vec::new(), Usage::default());
        for (prompt, answer) in answers.iter().enumerate() {
            add(&mut usage, &answer.usage);
            for (index, choice) in answer.choices.iter().enumerate() {
                let index = prompt * self.choices + index;
                choices.push(self.choice(index, &choice.text, &choice.logprobs, 0, Some(choice.finish)));
            }
        }
        let mut whole = self.chunk(choices.into());
        whole["usage"] = usage_json(&usage);
        whole
    }

    fn choice(
        &self,
        index: usize,
        text: &str,
        tokens: &[TokenLogprob],
        offset: usize,
        finish: Option<FinishReason>,
    ) -> Value {
        let logprobs = if self.with_logprobs { logprobs_json(tokens, offset) } else { Value::Null };
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish.map(finish_word)})
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

async fn stream(prompts: Vec<Events>, head: Head, out: Out) {
    let mut usage = Usage::default();
    let mut offsets = vec![0; head.choices * prompts.len()];
    for (prompt, mut events) in prompts.into_iter().enumerate() {
        let first = prompt * head.choices;
        while let Some(event) = events.next().await {
            match event {
                Event::Text(piece) if piece.text.is_empty() && piece.logprobs.is_empty() => {}
                Event::Text(piece) => {
                    let index = first + piece.choice;
                    let offset = offsets.get(index).copied().unwrap_or_default();
                    let choice = head.choice(index, &piece.text, &piece.logprobs, offset, None);
                    if let Some(offset) = offsets.get_mut(index) {
                        *offset += piece.text.len();
                    }
                    out.data(&head.chunk(json!([choice])));
                }
                Event::ChoiceDone(choice, reason, _) => {
                    out.data(&head.chunk(json!([head.choice(first + choice, "", &[], 0, Some(reason))])));
                }
                Event::Done(done) => {
                    if let Some(error) = done.error {
                        out.data(&ApiError::from(error).to_json(false));
                        return;
                    }
                    add(&mut usage, &done.usage);
                    if head.choices == 1 {
                        out.data(&head.chunk(json!([head.choice(first, "", &[], 0, Some(done.reason))])));
                    }
                }
                _ => {}
            }
        }
    }
    if head.usage {
        let mut chunk = head.chunk(json!([]));
        chunk["usage"] = usage_json(&usage);
        out.data(&chunk);
    }
    out.done();
}

fn add(sum: &mut Usage, usage: &Usage) {
    sum.prompt_tokens += usage.prompt_tokens;
    sum.cached_tokens += usage.cached_tokens;
    sum.completion_tokens += usage.completion_tokens;
    sum.reasoning_tokens += usage.reasoning_tokens;
}

/// The older form of log-probabilities: parallel arrays.
fn logprobs_json(tokens: &[TokenLogprob], mut offset: usize) -> Value {
    let text = |token: &TokenLogprob| String::from_utf8_lossy(&token.bytes).into_owned();
    let mut offsets = Vec::new();
    for token in tokens {
        offsets.push(offset);
        offset += token.bytes.len();
    }
    let top = tokens
        .iter()
        .map(|token| token.top.iter().map(|one| (text(one), Value::from(one.logprob))).collect::<Map<String, Value>>());
    json!({
        "tokens": tokens.iter().map(text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}
