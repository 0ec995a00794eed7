//! Types of arguments, for formats that write values without quotes.

use std::collections::HashMap;

use serde_json::Value;

use super::json::{Scan, ValueScanner, quoted};
use super::loose::{LooseScanner, PYTHON};

/// How the text of an argument becomes JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArgumentType {
    /// A string, whatever it looks like.
    Text,
    /// A string, or null.
    TextOrNull,
    /// Something other than a string if it can be read so.
    Value,
    /// Not declared: as [`Value`](Self::Value).
    Unknown,
}

/// The declared types of the arguments of all tools of a request.
#[derive(Debug, Default)]
pub(super) struct ToolTypes {
    tools: HashMap<String, HashMap<String, ArgumentType>>,
}

impl ToolTypes {
    /// From tool definitions in OpenAI's shape, with or without the outer object.
    pub fn new(tools: &Value) -> Self {
        let entry = |tool: &Value| {
            let function = tool.get("function").unwrap_or(tool);
            let name = function.get("name")?.as_str()?.to_owned();
            let properties = function.get("parameters").and_then(|p| p.get("properties")).and_then(Value::as_object);
            let types = properties.into_iter().flatten().map(|(key, schema)| (key.clone(), ArgumentType::of(schema)));
            Some((name, types.collect()))
        };
        Self { tools: tools.as_array().into_iter().flatten().filter_map(entry).collect() }
    }

    pub fn of(&self, tool: &str, key: &str) -> ArgumentType {
        self.tools.get(tool).and_then(|tool| tool.get(key)).copied().unwrap_or(ArgumentType::Unknown)
    }
}

fn type_of(schema: &Value) -> ArgumentType {
    let mut names: Vec<&str> = Vec::new();
    let mut types = |value: &Value| match value {
        Value::String(name) => names.extend(["string", "null"].into_iter().find(|n| n == name).or(Some("other"))),
        _ => names.push("other"),
    };
    match (schema.get("type"), schema.get("enum")) {
        (Some(Value::Array(list)), _) => list.iter().for_each(&mut types),
        (Some(one), _) => types(one),
        (None, Some(Value::Array(list))) if !list.is_empty() && list.iter().all(Value::is_string) => {
            names.push("string")
        }
        (None, _) => {
            let branches = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(key)?.as_array());
            branches.into_iter().flatten().for_each(|branch| types(branch.get("type").unwrap_or(&Value::Null)));
        }
    }
    match (names.contains(&"string"), names.contains(&"null"), names.contains(&"other")) {
        (true, false, false) => ArgumentType::Text,
        (true, true, false) => ArgumentType::TextOrNull,
        (false, false, false) => ArgumentType::Unknown,
        _ => ArgumentType::Value,
    }
}

impl ArgumentType {
    /// Of an argument with this JSON schema.
    pub fn of(schema: &Value) -> Self {
        type_of(schema)
    }

    /// The JSON text of a whole value.
    pub fn json(self, text: &str) -> String {
        let trimmed = text.trim();
        match self {
            Self::Text => quoted(text),
            Self::TextOrNull if matches!(trimmed, "null" | "None") => "null".to_owned(),
            Self::TextOrNull => quoted(text),
            Self::Value | Self::Unknown => other_than_text(trimmed).unwrap_or_else(|| quoted(text)),
        }
    }
}

/// `text` if it is JSON and not a string, or what Python's notation means.
fn other_than_text(text: &str) -> Option<String> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::String(_)) => return None,
        Ok(_) => return Some(text.to_owned()),
        Err(_) if !text.starts_with(['{', '[', '(', 'T', 'F', 'N']) => return None,
        Err(_) => {}
    }
    let (mut scanner, mut out) = (LooseScanner::new(&PYTHON), String::new());
    let mut chars = text.chars().chain(Some(' '));
    let end = chars.by_ref().map(|c| scanner.step(c, &mut out)).find(|scan| *scan != Scan::More);
    // Only the space at the end may be left: one behind a container, none behind a word.
    let left = chars.count();
    matches!((end, left), (Some(Scan::Last), 1) | (Some(Scan::Past), 0)).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_come_from_the_schema() {
        let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"properties": {
            "text": {"type": "string"}, "count": {"type": "integer"}, "maybe": {"type": ["string", "null"]},
            "either": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "mixed": {"type": ["string", "number"]},
            "choice": {"enum": ["1", "2"]}, "any": {}}}}}, {"name": "g"}, 7]);
        let types = ToolTypes::new(&tools);
        let expected = [
            ("text", ArgumentType::Text),
            ("count", ArgumentType::Value),
            ("maybe", ArgumentType::TextOrNull),
            ("either", ArgumentType::TextOrNull),
            ("mixed", ArgumentType::Value),
            ("choice", ArgumentType::Text),
            ("any", ArgumentType::Unknown),
            ("absent", ArgumentType::Unknown),
        ];
        expected.iter().for_each(|(key, kind)| assert_eq!(types.of("f", key), *kind, "{key}"));
        assert_eq!(types.of("unknown", "text"), ArgumentType::Unknown);
    }

    #[test]
    fn values_become_json() {
        let cases = [
            (ArgumentType::Text, "12", "\"12\""),
            (ArgumentType::Value, " 12\n", "12"),
            (ArgumentType::Value, "True", "true"),
            (ArgumentType::Value, "{'a': (1, None)}", "{\"a\": [1, null]}"),
            (ArgumentType::Value, "{'a': 1} x", "\"{'a': 1} x\""),
            (ArgumentType::Value, "Trueish", "\"Trueish\""),
            (ArgumentType::Value, "twelve", "\"twelve\""),
            (ArgumentType::Unknown, "\"q\"", "\"\\\"q\\\"\""),
            (ArgumentType::TextOrNull, "null", "null"),
            (ArgumentType::TextOrNull, "nullable", "\"nullable\""),
        ];
        cases.iter().for_each(|(kind, text, json)| assert_eq!(kind.json(text), *json, "{kind:?} {text}"));
    }
}
