//! Requests of OpenAI's responses API as the library's.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::openai::reasoning_effort;

/// Keys that mean something here.
pub const KNOWN: &[&str] = &[
    "input",
    "instructions",
    "max_output_tokens",
    "model",
    "parallel_tool_calls",
    "priority",
    "reasoning",
    "seed",
    "stream",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
];

/// The chat request that says the same.
pub fn to_chat(body: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    for key in ["previous_response_id", "conversation", "prompt"] {
        if body.get(key).is_some_and(|value| !value.is_null()) {
            let what = format!("{key:?} is not supported: nothing is stored here, send the whole input");
            return Err(ApiError::bad_request(what).with_code("unsupported"));
        }
    }
    let mut chat = Map::new();
    for key in ["model", "temperature", "top_p", "seed", "priority", "parallel_tool_calls"] {
        chat.extend(body.get(key).filter(|value| !value.is_null()).map(|value| (key.to_owned(), value.clone())));
    }
    if let Some(most) = body.get("max_output_tokens").filter(|most| !most.is_null()) {
        chat.insert("max_tokens".to_owned(), most.clone());
    }
    let mut messages = Messages::default();
    match body.get("instructions") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => messages.list.push(json!({"role": "system", "content": text})),
        Some(_) => return Err(ApiError::bad_request("\"instructions\" must be a text")),
    }
    match body.get("input") {
        Some(Value::String(text)) => messages.list.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) => items.iter().try_for_each(|item| messages.add(item))?,
        _ => return Err(ApiError::bad_request("\"input\" must be a text or an array of items")),
    }
    chat.insert("messages".to_owned(), messages.list.into());
    tools(body, &mut chat)?;
    if let Some(effort) = body.get("reasoning").and_then(|reasoning| reasoning["effort"].as_str()) {
        reasoning_effort(&mut chat, effort.into());
    }
    if let Some(format) = body.get("text").and_then(|text| text.get("format")) {
        chat.insert("response_format".to_owned(), response_format(format));
    }
    Ok(chat)
}

/// The schema lies one level deeper in the chat API.
fn response_format(format: &Value) -> Value {
    match format["type"].as_str() {
        Some("json_schema") => {
            let mut schema = format.clone();
            if let Some(object) = schema.as_object_mut() {
                object.remove("type");
            }
            json!({"type": "json_schema", "json_schema": schema})
        }
        _ => format.clone(),
    }
}

/// Messages; thinking and calls join the assistant's message that they belong to.
#[derive(Default)]
struct Messages {
    list: Vec<Value>,
}

impl Messages {
    fn add(&mut self, item: &Value) -> Result<(), ApiError> {
        match item["type"].as_str() {
            None | Some("message") => self.message(item),
            Some("function_call") => {
                let function = json!({"name": item["name"], "arguments": item["arguments"]});
                let call = json!({"id": item["call_id"], "type": "function", "function": function});
                let message = self.assistant();
                match message.get_mut("tool_calls").and_then(Value::as_array_mut) {
                    Some(calls) => calls.push(call),
                    None => message["tool_calls"] = json!([call]),
                }
                Ok(())
            }
            Some("function_call_output") => {
                let content = text_of(&item["output"])?;
                self.list.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": content}));
                Ok(())
            }
            Some("reasoning") => {
                let parts = if item["content"].is_array() { &item["content"] } else { &item["summary"] };
                let text = text_of(parts)?;
                if !text.is_empty() {
                    self.list.push(json!({"role": "assistant", "content": "", "reasoning_content": text}));
                }
                Ok(())
            }
            Some("item_reference") => Err(ApiError::bad_request("references to items: nothing is stored here")),
            Some(other) => Err(ApiError::bad_request(format!("an item of type {other:?} is not supported"))),
        }
    }

    fn message(&mut self, item: &Value) -> Result<(), ApiError> {
        let role = item["role"].as_str().ok_or_else(|| ApiError::bad_request("an item without \"role\""))?;
        let text = text_of(&item["content"])?;
        if role == "assistant" {
            // A message that thinking began goes on here.
            let message = self.assistant();
            let before = message["content"].as_str().unwrap_or_default().to_owned();
            message["content"] = (before + &text).into();
            return Ok(());
        }
        let role = if role == "developer" { "system" } else { role };
        self.list.push(json!({"role": role, "content": text}));
        Ok(())
    }

    /// The assistant's message at the end, a new one if there is none.
    fn assistant(&mut self) -> &mut Value {
        if self.list.last().is_none_or(|last| last["role"] != "assistant") {
            self.list.push(json!({"role": "assistant", "content": ""}));
        }
        let last = self.list.len() - 1;
        &mut self.list[last]
    }
}

/// The text of a content, which is a text or an array of parts.
fn text_of(content: &Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text.clone()),
        Value::Null => return Ok(String::new()),
        Value::Array(parts) => parts,
        _ => return Err(ApiError::bad_request("a content must be a text or an array of parts")),
    };
    let mut text = String::new();
    for part in parts {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("input_text" | "output_text" | "text" | "reasoning_text" | "summary_text"), Some(piece)) => {
                text.push_str(piece);
            }
            (Some("refusal"), _) => text.push_str(part["refusal"].as_str().unwrap_or_default()),
            (kind, _) => {
                let what = format!("a part of type {:?}: only text is supported", kind.unwrap_or_default());
                return Err(ApiError::bad_request(what).with_code("unsupported"));
            }
        }
    }
    Ok(text)
}

/// Functions lie one level deeper in the chat API. Tools that OpenAI's servers run are left out.
fn tools(body: &Map<String, Value>, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let tools = match body.get("tools") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(tools)) => tools,
        Some(_) => return Err(ApiError::bad_request("\"tools\" must be an array")),
    };
    let own = tools.iter().filter(|tool| tool["type"] == "function").filter_map(Value::as_object).map(|tool| {
        let mut function = tool.clone();
        function.remove("type");
        json!({"type": "function", "function": function})
    });
    let own: Vec<Value> = own.collect();
    if own.is_empty() {
        return Ok(());
    }
    chat.insert("tools".to_owned(), own.into());
    let choice = match body.get("tool_choice") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Object(choice)) if choice.get("type").is_some_and(|kind| kind == "function") => {
            json!({"type": "function", "function": {"name": choice.get("name")}})
        }
        Some(other) => other.clone(),
    };
    chat.insert("tool_choice".to_owned(), choice);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_messages() {
        let body = json!({"instructions": "Be brief.", "input": [
            {"role": "developer", "content": "More."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I ask."}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"}],
            "tools": [{"type": "function", "name": "weather", "parameters": {}}, {"type": "web_search"}],
            "tool_choice": {"type": "function", "name": "weather"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}});
        let chat = Value::Object(to_chat(body.as_object().unwrap()).unwrap());
        let call =
            |id: &str, name: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}});
        assert_eq!(
            chat["messages"],
            json!([
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "More."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "I ask.", "reasoning_content": "hm",
             "tool_calls": [call("c1", "weather"), call("c2", "time")]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"}])
        );
        assert_eq!(chat["tools"], json!([{"type": "function", "function": {"name": "weather", "parameters": {}}}]));
        assert_eq!(chat["tool_choice"], json!({"type": "function", "function": {"name": "weather"}}));
        assert_eq!(chat["response_format"]["json_schema"], json!({"name": "n", "schema": {}}));
    }

    #[test]
    fn the_effort_reaches_templates() {
        let told = |reasoning: Value| {
            let body = json!({"input": "x", "reasoning": reasoning});
            to_chat(body.as_object().unwrap()).unwrap().remove("chat_template_kwargs")
        };
        let low = json!({"enable_thinking": true, "reasoning_effort": "low"});
        assert_eq!(told(json!({"effort": "low", "summary": "auto"})), Some(low));
        let minimal = json!({"enable_thinking": false, "reasoning_effort": "minimal"});
        assert_eq!(told(json!({"effort": "minimal"})), Some(minimal));
        assert_eq!(told(json!({"summary": "auto"})), None);
    }

    #[test]
    fn what_would_need_a_memory_is_refused() {
        for body in [json!({"input": "x", "previous_response_id": "r"}), json!({"input": [{"type": "item_reference"}]})]
        {
            assert!(to_chat(body.as_object().unwrap()).is_err());
        }
    }
}
