//! Grammars of tool calls, for models that write their arguments as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::constraint::json_schema;
use crate::error::{Error, Result};

/// Calls that an answer may have at most.
const MAX_CALLS: usize = 16;
/// Of a tool.
const MAX_NAME_BYTES: usize = 256;

/// How a model writes calls: `open`, then for each call `before_name`, the name, `after_name`, the arguments as JSON,
/// `after_arguments`, with `between` between them, then `close`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallLayout {
    /// Before the first call.
    pub open: &'static str,
    /// Before a name.
    pub before_name: &'static str,
    /// Between a name and the arguments.
    pub after_name: &'static str,
    /// After the arguments.
    pub after_arguments: &'static str,
    /// Between calls.
    pub between: &'static str,
    /// After the last call.
    pub close: &'static str,
}

/// An answer of nothing but calls.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCalls {
    /// How they are written.
    pub layout: CallLayout,
    /// Name of each function that may be called, and the JSON schema of its arguments.
    pub functions: Vec<(String, Value)>,
    /// Whether there may be several.
    pub parallel: bool,
}

impl ToolCalls {
    /// Of OpenAI's tool definitions; of all of them, or of the function `only`.
    pub fn new(layout: CallLayout, tools: &[Value], only: Option<&str>, parallel: bool) -> Result<Self> {
        let mut functions = Vec::new();
        for tool in tools {
            let function = tool.get("function").unwrap_or(tool);
            let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
            if name.is_empty() || name.len() > MAX_NAME_BYTES {
                return Err(Error::invalid_request(format!("the name of a tool has 1 to {MAX_NAME_BYTES} bytes")));
            }
            if only.is_none_or(|only| only == name) {
                functions.push((name.to_owned(), arguments(function.get("parameters"))));
            }
        }
        match (functions.is_empty(), only) {
            (false, _) => Ok(Self { layout, functions, parallel }),
            (true, Some(only)) => Err(Error::invalid_request(format!("there is no tool {only:?} to be called"))),
            (true, None) => Err(Error::invalid_request("there are no tools to be called")),
        }
    }

    /// In llguidance's Lark; `special` knows the ids of special tokens.
    pub(super) fn lark(&self, special: impl Fn(&str) -> Option<u32>) -> Result<String> {
        let CallLayout { open, before_name, after_name, after_arguments, between, close } = self.layout;
        let text = |text: &str| literal(text, &special);
        let more =
            if self.parallel { format!("({} call){{0,{}}}", text(between), MAX_CALLS - 1) } else { String::new() };
        let mut lark = format!("start: {} call {more} {}\ncall: ", text(open), text(close));
        let names = (0..self.functions.len()).map(|at| format!("call_{at}")).collect::<Vec<_>>();
        lark += &names.join(" | ");
        for (name, (function, schema)) in names.iter().zip(&self.functions) {
            // A name may hold what JSON has to escape where it stands within quotes.
            let quoted = Value::from(function.as_str()).to_string();
            let inner = if before_name.ends_with('"') { &quoted[1..quoted.len() - 1] } else { function };
            let head =
                [&text(before_name), &Value::from(inner).to_string(), &text(after_name)].map(String::as_str).join(" ");
            let tail = text(after_arguments);
            let schema = json_schema(schema).map_err(|error| error.context(format!("the tool {function:?}")))?;
            write!(lark, "\n{name}: {head} {name}_arguments {tail}\n{name}_arguments: %json {schema}")
                .map_err(|_| Error::internal("no grammar of tool calls"))?;
        }
        Ok(lark)
    }
}

/// The schema of a function's arguments: any object where it has none.
fn arguments(parameters: Option<&Value>) -> Value {
    match parameters {
        None | Some(Value::Null) => json!({ "type": "object" }),
        Some(Value::Object(schema)) if !schema.contains_key("type") => {
            let mut schema = schema.clone();
            schema.insert("type".to_owned(), json!("object"));
            Value::Object(schema)
        }
        Some(schema) => schema.clone(),
    }
}

/// `text` as it is in Lark: strings, and special tokens by their ids.
fn literal(text: &str, special: impl Fn(&str) -> Option<u32>) -> String {
    let mut parts = Vec::new();
    let (mut plain, mut rest) = (String::new(), text);
    let string = |plain: &mut String, parts: &mut Vec<String>| {
        if !plain.is_empty() {
            parts.push(Value::from(std::mem::take(plain)).to_string());
        }
    };
    while let Some(first) = rest.chars().next() {
        let ends = (1..=rest.len()).filter(|end| rest.is_char_boundary(*end));
        let found = ends.rev().find_map(|end| Some((end, special(&rest[..end])?)));
        match found {
            Some((end, id)) => {
                string(&mut plain, &mut parts);
                parts.push(format!("<[{id}]>"));
                rest = &rest[end..];
            }
            None => {
                plain.push(first);
                rest = &rest[first.len_utf8()..];
            }
        }
    }
    string(&mut plain, &mut parts);
    parts.join(" ")
}
