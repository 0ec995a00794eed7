//! What an answer has to look like.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::ToolCalls;
use crate::error::{Error, Result};

/// What an answer has to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// A JSON value that a JSON schema accepts.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// A text that a regular expression matches from its beginning to its end.
    Regex(String),
    /// A text of a grammar in llguidance's variant of Lark; it starts at the rule `start`.
    Lark(String),
    /// One of several texts.
    Choice(Vec<String>),
    /// Nothing but tool calls.
    ToolCalls(ToolCalls),
}

/// Spaces between the tokens of JSON: enough for any indentation, but a model that does not know how to go on must not
/// write spaces for ever.
const JSON_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";

/// Texts of a choice at most, and bytes of a regular expression or grammar.
const MAX_CHOICES: usize = 4096;
const MAX_GRAMMAR_BYTES: usize = 1 << 20;

impl Constraint {
    /// The grammar in llguidance's terms. Whether that can be compiled is seen when it is. `special` knows the ids of special
    /// tokens.
    pub(super) fn grammar(&self, special: impl Fn(&str) -> Option<u32>) -> Result<TopLevelGrammar> {
        match self {
            Self::JsonSchema(schema) => Ok(TopLevelGrammar::from_json_schema(json_schema(schema)?)),
            Self::JsonObject => Ok(TopLevelGrammar::from_json_schema(json_schema(&json!({ "type": "object" }))?)),
            Self::Regex(regex) => Ok(TopLevelGrammar::from_regex(short("regular expression", regex)?)),
            Self::Lark(grammar) => Ok(TopLevelGrammar::from_lark(short("grammar", grammar)?.to_owned())),
            Self::ToolCalls(calls) => Ok(TopLevelGrammar::from_lark(calls.lark(special)?)),
            Self::Choice(choices) => {
                if choices.is_empty() || choices.len() > MAX_CHOICES || choices.iter().any(String::is_empty) {
                    let what = format!("a choice has 1 to {MAX_CHOICES} texts, none of them empty");
                    return Err(Error::invalid_request(what));
                }
                let texts: Vec<String> = choices.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | "))))
            }
        }
    }
}

/// `schema` with our options in place of its own, which might loosen it.
pub(super) fn json_schema(schema: &Value) -> Result<Value> {
    let mut object = match schema {
        Value::Object(object) => object.clone(),
        Value::Bool(true) => serde_json::Map::new(),
        Value::Bool(false) => return Err(Error::invalid_request("no value satisfies the schema false")),
        _ => return Err(Error::invalid_request("a JSON schema is an object")),
    };
    object.insert("x-guidance".to_owned(), json!({ "whitespace_pattern": JSON_SPACE }));
    Ok(Value::Object(object))
}

fn short<'a>(what: &str, text: &'a str) -> Result<&'a str> {
    match text.len() {
        0 => Err(Error::invalid_request(format!("the {what} is empty"))),
        1..=MAX_GRAMMAR_BYTES => Ok(text),
        more => Err(Error::invalid_request(format!("the {what} has {more} bytes, more than {MAX_GRAMMAR_BYTES}"))),
    }
}
