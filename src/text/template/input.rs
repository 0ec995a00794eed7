//! What a chat template sees of a request.

use minijinja::Value;
use serde_json::{Map, Value as Json};

use crate::error::{Error, Result};
use crate::text::special::SpecialTokens;

/// Deepest nesting of messages, tools and arguments.
const MAX_DEPTH: usize = 128;

/// Names under which transformers finds the reasoning of an assistant message.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One chat to render.
#[derive(Debug, Clone, Copy)]
pub struct ChatInput<'a> {
    /// The messages: a non-empty array of objects.
    ///
    /// As in transformers, keys whose value is null are dropped and reasoning is found under any of its three names. A
    /// `content` list of text parts only is joined to one string, because many templates know nothing else; a list
    /// with any other part reaches the template as it is.
    pub messages: &'a Json,
    /// Tool definitions: an array of objects. `Some` of an empty array still counts as "with tools".
    pub tools: Option<&'a Json>,
    /// Whether the prompt ends with the opening of an assistant message.
    pub add_generation_prompt: bool,
    /// Name of the template; `None` chooses as transformers does.
    pub template: Option<&'a str>,
    /// Further variables of the template (`enable_thinking`, `documents`, ...). They win over special tokens.
    pub kwargs: Option<&'a Map<String, Json>>,
}

impl<'a> ChatInput<'a> {
    /// A chat that asks for an answer: no tools, the default template, no further variables.
    pub fn new(messages: &'a Json) -> Self {
        Self { messages, tools: None, add_generation_prompt: true, template: None, kwargs: None }
    }
}

/// The variables of the template.
pub(super) fn context(input: &ChatInput<'_>, special_tokens: &SpecialTokens) -> Result<Value> {
    let mut variables: Vec<(String, Value)> = Vec::new();
    variables.extend(special_tokens.iter().map(|(name, text)| (name.to_owned(), Value::from(text))));
    variables.push(("documents".to_owned(), Value::from(())));
    for (name, value) in input.kwargs.into_iter().flatten() {
        if ["messages", "tools", "add_generation_prompt"].contains(&name.as_str()) {
            return Err(Error::invalid_request(format!("{name:?} is not a free variable of the chat template")));
        }
        variables.push((name.clone(), to_value(value, 0)?));
    }
    variables.push(("messages".to_owned(), messages(input.messages)?));
    variables.push(("tools".to_owned(), tools(input.tools)?));
    variables.push(("add_generation_prompt".to_owned(), Value::from(input.add_generation_prompt)));
    // Later entries replace earlier ones.
    Ok(Value::from_pairs(variables))
}

fn messages(messages: &Json) -> Result<Value> {
    let list = messages.as_array().ok_or_else(|| Error::invalid_request("messages is not an array"))?;
    if list.is_empty() {
        return Err(Error::invalid_request("messages is empty"));
    }
    let convert = |(index, message): (usize, &Json)| {
        let object = message.as_object();
        object
            .ok_or_else(|| Error::invalid_request(format!("messages[{index}] is not an object")))
            .and_then(message_value)
    };
    Ok(Value::from(list.iter().enumerate().map(convert).collect::<Result<Vec<_>>>()?))
}

fn message_value(message: &Map<String, Json>) -> Result<Value> {
    let present = || message.iter().filter(|(_, value)| !value.is_null());
    let reasoning = REASONING.iter().find_map(|name| present().find(|(key, _)| key == name)).map(|(_, value)| value);
    let mut pairs = Vec::with_capacity(message.len() + 2);
    // The order of transformers: `thinking` in front, the other keys in theirs, `reasoning_content` at its place or
    // last.
    if let Some(reasoning) = reasoning {
        let thinking = message.get("thinking").filter(|value| !value.is_null()).unwrap_or(reasoning);
        pairs.push(("thinking", to_value(thinking, 2)?));
    }
    for (key, value) in present().filter(|(key, _)| reasoning.is_none() || *key != "thinking") {
        let joined = if key == "content" { joined_text(value) } else { None };
        pairs.push((key, joined.map_or_else(|| to_value(value, 2), |text| Ok(Value::from(text)))?));
    }
    if let Some(reasoning) = reasoning.filter(|_| pairs.iter().all(|(key, _)| *key != "reasoning_content")) {
        pairs.push(("reasoning_content", to_value(reasoning, 2)?));
    }
    Ok(Value::from_pairs(pairs))
}

/// The text of a content list that has text parts only.
fn joined_text(content: &Json) -> Option<String> {
    let parts = content.as_array()?.iter();
    parts.map(|part| if part["type"] == "text" { part["text"].as_str() } else { None }).collect()
}

fn tools(tools: Option<&Json>) -> Result<Value> {
    let Some(tools) = tools else { return Ok(Value::from(())) };
    match tools.as_array() {
        Some(list) if list.iter().all(Json::is_object) => to_value(tools, 0),
        _ => Err(Error::invalid_request("tools is not an array of objects")),
    }
}

fn to_value(json: &Json, depth: usize) -> Result<Value> {
    if depth > MAX_DEPTH {
        return Err(Error::invalid_request(format!("the chat nests deeper than {MAX_DEPTH}")));
    }
    Ok(match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => {
            Value::from(items.iter().map(|item| to_value(item, depth + 1)).collect::<Result<Vec<_>>>()?)
        }
        Json::Object(map) => {
            let pairs = map.iter().map(|(key, value)| Ok((key.as_str(), to_value(value, depth + 1)?)));
            Value::from_pairs(pairs.collect::<Result<Vec<_>>>()?)
        }
    })
}
