//! What OpenAI's endpoints have in common.

use omlx_client::{FinishReason, Usage};
use serde_json::{Map, Value, json};

use super::body::flag;
use super::error::ApiError;

/// Whether the answer is streamed, and whether the stream ends with its usage. The library does not know `stream_options`.
pub fn streaming(body: &mut Map<String, Value>) -> Result<(bool, bool), ApiError> {
    let usage = match body.remove("stream_options") {
        None | Some(Value::Null) => false,
        Some(Value::Object(options)) => flag(&options, "include_usage")?,
        Some(_) => return Err(ApiError::bad_request("\"stream_options\" must be an object")),
    };
    Ok((flag(body, "stream")?, usage))
}

/// Asks the template for thinking or none, unless the request says so itself.
pub fn enable_thinking(body: &mut Map<String, Value>, on: bool) {
    tell_template(body, "enable_thinking", on.into());
}

/// The same in OpenAI's words: some templates have the switch, others (gpt-oss) read the word.
pub fn reasoning_effort(body: &mut Map<String, Value>, effort: Value) {
    enable_thinking(body, effort != "none" && effort != "minimal");
    tell_template(body, "reasoning_effort", effort);
}

fn tell_template(body: &mut Map<String, Value>, key: &str, value: Value) {
    let kwargs = body.entry("chat_template_kwargs").or_insert(Value::Null);
    if kwargs.is_null() {
        *kwargs = json!({});
    }
    if let Some(kwargs) = kwargs.as_object_mut() {
        kwargs.entry(key).or_insert(value);
    }
}

/// OpenAI's usage object.
pub fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    })
}

/// OpenAI's word for the end of an answer.
pub fn finish_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
        _ => "stop",
    }
}
