//! Requests of Anthropic's API as the library's.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::openai::enable_thinking;
use crate::app::App;

/// Keys that mean something here.
pub const KNOWN: &[&str] = &[
    "max_tokens",
    "messages",
    "model",
    "output_config",
    "output_format",
    "priority",
    "seed",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
];

/// Logs, once for each, the keys of a request that mean nothing here, those inside of it too.
pub fn note_ignored(app: &App, route: &str, body: &Map<String, Value>) {
    app.note_ignored(route, body, KNOWN);
    nested(body, |place, object, known| app.note_ignored(format_args!("{route} {place}"), object, known));
}

/// Visits the objects inside a request, each with where it is and the keys that mean something.
fn nested(body: &Map<String, Value>, visit: impl Fn(&str, &Map<String, Value>, &[&str])) {
    fn items(value: Option<&Value>) -> impl Iterator<Item = &Map<String, Value>> {
        value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_object)
    }
    for block in items(body.get("system")) {
        visit("system[]", block, known_of(block));
    }
    for tool in items(body.get("tools")) {
        visit("tools[]", tool, &["description", "input_schema", "name", "type"]);
    }
    for message in items(body.get("messages")) {
        visit("messages[]", message, &["content", "role"]);
        for block in items(message.get("content")) {
            visit("content[]", block, known_of(block));
            items(block.get("content")).for_each(|part| visit("content[]", part, known_of(part)));
        }
    }
}

/// Keys of a block that mean something, the signatures that answers have included.
fn known_of(block: &Map<String, Value>) -> &'static [&'static str] {
    match block.get("type").and_then(Value::as_str) {
        Some("document") => &["source", "type"],
        Some("thinking") => &["signature", "thinking", "type"],
        Some("redacted_thinking") => &["data", "type"],
        Some("tool_use") => &["id", "input", "name", "type"],
        Some("tool_result") => &["content", "is_error", "tool_use_id", "type"],
        _ => &["text", "type"],
    }
}

/// The chat request that says the same.
pub fn to_chat(body: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let mut chat = Map::new();
    for key in ["model", "max_tokens", "temperature", "top_p", "top_k", "seed", "priority"] {
        chat.extend(body.get(key).filter(|value| !value.is_null()).map(|value| (key.to_owned(), value.clone())));
    }
    chat.extend(body.get("stop_sequences").map(|stops| ("stop".to_owned(), stops.clone())));
    let mut messages = Vec::new();
    if let Some(system) = system(body.get("system"))? {
        messages.push(json!({"role": "system", "content": system}));
    }
    let given = body.get("messages").and_then(Value::as_array);
    let given = given.ok_or_else(|| ApiError::bad_request("\"messages\" must be an array"))?;
    for message in given {
        convert(message, &mut messages)?;
    }
    chat.insert("messages".to_owned(), messages.into());
    tools(body, &mut chat)?;
    let thinking = body.get("thinking");
    let on = thinking.and_then(|thinking| thinking["type"].as_str()).is_some_and(|kind| kind != "disabled");
    enable_thinking(&mut chat, on);
    if let Some(budget) = thinking.filter(|_| on).map(|thinking| &thinking["budget_tokens"]).filter(|b| b.is_u64()) {
        chat.insert("thinking_budget".to_owned(), budget.clone());
    }
    let format = body.get("output_format").or_else(|| body.get("output_config")?.get("format"));
    if let Some(schema) = format.and_then(|format| format.get("schema")) {
        let schema = json!({"name": "output", "schema": schema, "strict": true});
        chat.insert("response_format".to_owned(), json!({"type": "json_schema", "json_schema": schema}));
    }
    Ok(chat)
}

/// The system prompt, without lines at its head that change with every call: they would spoil the cached prefix.
fn system(system: Option<&Value>) -> Result<Option<String>, ApiError> {
    let text = match system {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => without_billing(text).to_owned(),
        Some(Value::Array(blocks)) => {
            let mut texts = Vec::new();
            for (index, block) in blocks.iter().enumerate() {
                let text = block["text"].as_str();
                let text = text.ok_or_else(|| ApiError::bad_request("blocks of \"system\" must have a \"text\""))?;
                let text = if index == 0 { without_billing(text) } else { text };
                texts.extend(Some(text).filter(|text| !text.is_empty()));
            }
            texts.join("\n")
        }
        Some(_) => return Err(ApiError::bad_request("\"system\" must be a text or an array of blocks")),
    };
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// The text behind lines such as `x-anthropic-billing-header: ...`.
fn without_billing(mut text: &str) -> &str {
    while text.starts_with("x-anthropic-") {
        let (line, rest) = text.split_once('\n').unwrap_or((text, ""));
        if !line.contains(':') {
            break;
        }
        text = rest.trim_start_matches(['\r', '\n']);
    }
    text
}

/// Adds the messages that one of Anthropic's stands for: results of tools have their own.
fn convert(message: &Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = message["role"].as_str();
    let role = role.ok_or_else(|| ApiError::bad_request("a message without \"role\""))?;
    let blocks = match &message["content"] {
        Value::String(text) => {
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Value::Array(blocks) => blocks,
        _ => return Err(ApiError::bad_request("the \"content\" of a message must be a text or an array of blocks")),
    };
    if role == "assistant" {
        messages.push(assistant(blocks)?);
        return Ok(());
    }
    let mut text = String::new();
    for block in blocks {
        if block["type"] == "tool_result" {
            flush(role, &mut text, messages);
            messages.push(tool_result(block)?);
        } else {
            add_line(&mut text, block_text(block)?);
        }
    }
    flush(role, &mut text, messages);
    Ok(())
}

fn flush(role: &str, text: &mut String, messages: &mut Vec<Value>) {
    if !text.is_empty() {
        messages.push(json!({"role": role, "content": std::mem::take(text)}));
    }
}

fn add_line(text: &mut String, line: &str) {
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(line);
}

fn block_text(block: &Value) -> Result<&str, ApiError> {
    let text = match block["type"].as_str() {
        Some("text") => block["text"].as_str(),
        Some("document") if block["source"]["type"] == "text" => block["source"]["data"].as_str(),
        Some(other) => {
            let what = format!("a block of type {other:?}: only text is supported");
            return Err(ApiError::bad_request(what).with_code("unsupported"));
        }
        None => None,
    };
    text.ok_or_else(|| ApiError::bad_request("a block without type or text"))
}

fn assistant(blocks: &[Value]) -> Result<Value, ApiError> {
    let (mut text, mut thinking, mut calls) = (String::new(), String::new(), Vec::new());
    for block in blocks {
        match block["type"].as_str() {
            Some("thinking") => add_line(&mut thinking, block["thinking"].as_str().unwrap_or_default()),
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let arguments = block["input"].to_string();
                let function = json!({"name": block["name"], "arguments": arguments});
                calls.push(json!({"id": block["id"], "type": "function", "function": function}));
            }
            _ => add_line(&mut text, block_text(block)?),
        }
    }
    let mut message = json!({"role": "assistant", "content": text});
    if !thinking.is_empty() {
        message["reasoning_content"] = thinking.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    Ok(message)
}

fn tool_result(block: &Value) -> Result<Value, ApiError> {
    let mut text = String::new();
    match &block["content"] {
        Value::String(content) => text.push_str(content),
        Value::Array(blocks) => {
            for block in blocks {
                add_line(&mut text, block_text(block)?);
            }
        }
        Value::Null => {}
        _ => {
            return Err(ApiError::bad_request("the \"content\" of a tool_result must be a text or an array of blocks"));
        }
    }
    if block["is_error"] == true {
        text.insert_str(0, "Error: ");
    }
    Ok(json!({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}))
}

/// Tools and which of them may be called. Tools that Anthropic's servers run have no schema, and are left out.
fn tools(body: &Map<String, Value>, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let tools = match body.get("tools") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(tools)) => tools,
        Some(_) => return Err(ApiError::bad_request("\"tools\" must be an array")),
    };
    let own = tools.iter().filter(|tool| tool.get("input_schema").is_some());
    let own = own.map(|tool| {
        let mut function = json!({"name": tool["name"], "parameters": tool["input_schema"]});
        if let Some(description) = tool.get("description") {
            function["description"] = description.clone();
        }
        json!({"type": "function", "function": function})
    });
    let own: Vec<Value> = own.collect();
    if own.is_empty() {
        return Ok(());
    }
    chat.insert("tools".to_owned(), own.into());
    let Some(choice) = body.get("tool_choice").filter(|choice| !choice.is_null()) else { return Ok(()) };
    let word = match choice["type"].as_str() {
        Some("auto") => json!("auto"),
        Some("any") => json!("required"),
        Some("none") => json!("none"),
        Some("tool") => json!({"type": "function", "function": {"name": choice["name"]}}),
        _ => return Err(ApiError::bad_request("\"tool_choice\" must have a type: auto, any, tool or none")),
    };
    chat.insert("tool_choice".to_owned(), word);
    if choice["disable_parallel_tool_use"] == true {
        chat.insert("parallel_tool_calls".to_owned(), false.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: Value) -> Value {
        to_chat(body.as_object().unwrap()).map(Value::Object).unwrap()
    }

    #[test]
    fn what_changes_at_the_head_of_a_system_prompt_is_left_out() {
        let head = "x-anthropic-billing-header: cc_version=2.1.37.f3c; cch=b1a2c;";
        let of = |system: Value| chat(json!({"messages": [], "system": system}))["messages"].clone();
        let kept = json!([{"role": "system", "content": "You are careful.\nBe brief."}]);
        let blocks = |first: &str| {
            json!([{"type": "text", "text": first}, {"type": "text", "text": "You are careful."},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}])
        };
        assert_eq!(of(blocks(head)), kept);
        assert_eq!(of(json!(format!("{head}\n\nYou are careful.\nBe brief."))), kept);
        // Only at the head, and only what looks like one.
        assert_eq!(of(json!("Hello\nx-anthropic-a: b"))[0]["content"], "Hello\nx-anthropic-a: b");
        assert_eq!(of(json!("x-anthropic- is a prefix"))[0]["content"], "x-anthropic- is a prefix");
        assert_eq!(of(json!(head)), json!([]));
    }

    #[test]
    fn turns_with_tools_are_converted() {
        let messages = json!([
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I ask."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And?"}]}]);
        let tools = json!([{"name": "weather", "description": "d", "input_schema": {"type": "object"}},
            {"type": "web_search_20250305", "name": "web_search"}]);
        let chat = chat(json!({"model": "m", "max_tokens": 5, "messages": messages, "tools": tools,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["x"]}));
        assert_eq!(
            chat["messages"],
            json!([
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "I ask.", "reasoning_content": "hm", "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}}]},
            {"role": "tool", "tool_call_id": "t1", "content": "rain"},
            {"role": "user", "content": "And?"}])
        );
        assert_eq!(chat["tools"].as_array().map(Vec::len), Some(1));
        assert_eq!(chat["tool_choice"], "required");
        assert_eq!(chat["parallel_tool_calls"], false);
        assert_eq!(chat["chat_template_kwargs"]["enable_thinking"], true);
        assert_eq!(chat["thinking_budget"], 1024);
        assert_eq!(chat["stop"], json!(["x"]));
    }

    #[test]
    fn pictures_are_refused() {
        let content = json!([{"type": "image", "source": {}}]);
        let body = json!({"messages": [{"role": "user", "content": content}]});
        let error = to_chat(body.as_object().unwrap()).unwrap_err();
        assert_eq!(error.code, Some("unsupported"));
    }
}
