//! What an answer has to look like.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::ToolCalls;
use super::rules::{ANY, Rules, regex, string};
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
    /// Tool calls, which are marked, or something else.
    Either(ToolCalls, Box<Constraint>),
    /// One of these, in a message of Harmony's behind others with thinking.
    Channels(Box<Constraint>, Option<usize>),
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
            Self::Choice(_) | Self::ToolCalls(_) | Self::Either(..) | Self::Channels(..) => {
                let mut rules = Rules::new(&special);
                let start = self.add(&mut rules)?;
                rules.add("start", &start);
                Ok(TopLevelGrammar::from_lark(rules.into_lark()))
            }
        }
    }

    /// Adds the rules of this; what stands for it in a rule.
    fn add(&self, rules: &mut Rules<'_>) -> Result<String> {
        match self {
            Self::ToolCalls(calls) => calls.add(rules)?,
            Self::Either(calls, other) => {
                calls.add(rules)?;
                other.add_form(rules, calls.opening())?;
                return Ok("calls | form".to_owned());
            }
            Self::Channels(inner, budget) => return inner.add_in_channels(rules, *budget),
            other => {
                other.add_form(rules, "")?;
                return Ok("form".to_owned());
            }
        }
        Ok("calls".to_owned())
    }

    /// Adds the rule `form`, of which nothing begins with `opening` if that is not empty.
    fn add_form(&self, rules: &mut Rules<'_>, opening: &str) -> Result<()> {
        match self {
            Self::JsonSchema(schema) => rules.add_json("form", schema)?,
            Self::JsonObject => rules.add_json("form", &json!({ "type": "object" }))?,
            Self::Regex(pattern) => {
                let pattern = regex(short("regular expression", pattern)?);
                let other = if opening.is_empty() { ANY.to_owned() } else { format!("~({} {ANY})", string(opening)) };
                rules.add("FORM", &format!("{pattern} & {other} & {ANY}"));
                rules.add("form", "FORM");
            }
            Self::Lark(grammar) => rules.add("form", &format!("%lark {{\n{}\n}}", short("grammar", grammar)?)),
            Self::Choice(choices) => {
                if choices.is_empty() || choices.len() > MAX_CHOICES || choices.iter().any(String::is_empty) {
                    let what = format!("a choice has 1 to {MAX_CHOICES} texts, none of them empty");
                    return Err(Error::invalid_request(what));
                }
                if let Some(call) = choices.iter().find(|text| !opening.is_empty() && text.starts_with(opening)) {
                    return Err(Error::unsupported(format!("the choice {call:?} looks like a tool call")));
                }
                rules.add("form", &choices.iter().map(|text| string(text)).collect::<Vec<_>>().join(" | "));
            }
            Self::ToolCalls(_) | Self::Either(..) | Self::Channels(..) => {
                return Err(Error::internal("a form of an answer that has forms in it"));
            }
        }
        Ok(())
    }

    /// The messages of an answer in Harmony, at most `budget` tokens of thinking first.
    fn add_in_channels(&self, rules: &mut Rules<'_>, budget: Option<usize>) -> Result<String> {
        let inner = match self {
            Self::ToolCalls(_) => self.add(rules)?,
            Self::Either(calls, other) => {
                calls.add(rules)?;
                other.add_form(rules, "")?;
                format!("calls | {} form", rules.literal(FINAL))
            }
            other => format!("{} {}", rules.literal(FINAL), other.add(rules)?),
        };
        if budget == Some(0) {
            return Ok(inner);
        }
        let limit = budget.map_or(String::new(), |tokens| format!("[max_tokens={tokens}]"));
        rules.add(&format!("thought{limit}"), "/(?s:.+)/");
        rules.add("thinking", &format!("{} thought {}", rules.literal(ANALYSIS), rules.literal(NEXT)));
        rules.add("said", &inner);
        Ok("thinking? said".to_owned())
    }
}

/// Harmony's beginnings of messages, behind the prompt that has begun the first.
const ANALYSIS: &str = "<|channel|>analysis<|message|>";
const FINAL: &str = "<|channel|>final<|message|>";
const NEXT: &str = "<|end|><|start|>assistant";

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
