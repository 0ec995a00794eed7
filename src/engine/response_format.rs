//! The key `response_format` of a request: what the answer has to look like. Pure.

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::text::grammar::Constraint;

/// OpenAI's kinds, and three of our own.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: NamedSchema },
    Regex { regex: String },
    Grammar { grammar: String },
    Choice { choices: Vec<String> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedSchema {
    schema: Value,
    // The schema always holds, and needs no name.
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(rename = "description")]
    _description: Option<String>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// The constraint that `format` stands for; none for `{"type": "text"}`.
pub(super) fn constraint(format: &Value) -> Result<Option<Constraint>> {
    let invalid = |error| Error::invalid_request(format!("\"response_format\": {error}"));
    Ok(match ResponseFormat::deserialize(format).map_err(invalid)? {
        ResponseFormat::Text => None,
        ResponseFormat::JsonObject => Some(Constraint::JsonObject),
        ResponseFormat::JsonSchema { json_schema } => Some(Constraint::JsonSchema(json_schema.schema)),
        ResponseFormat::Regex { regex } => Some(Constraint::Regex(regex)),
        ResponseFormat::Grammar { grammar } => Some(Constraint::Lark(grammar)),
        ResponseFormat::Choice { choices } => Some(Constraint::Choice(choices)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_kind_is_a_constraint() {
        let schema = json!({ "type": "integer" });
        let named = json!({ "name": "n", "strict": true, "schema": schema });
        for (format, expected) in [
            (json!({ "type": "text" }), None),
            (json!({ "type": "json_object" }), Some(Constraint::JsonObject)),
            (json!({ "type": "json_schema", "json_schema": named }), Some(Constraint::JsonSchema(schema))),
            (json!({ "type": "regex", "regex": "a+" }), Some(Constraint::Regex("a+".into()))),
            (json!({ "type": "grammar", "grammar": "start: \"a\"" }), Some(Constraint::Lark("start: \"a\"".into()))),
            (json!({ "type": "choice", "choices": ["a"] }), Some(Constraint::Choice(vec!["a".into()]))),
        ] {
            assert_eq!(constraint(&format).unwrap(), expected, "{format}");
        }
        for wrong in [
            json!("json_object"),
            json!({ "type": "xml" }),
            json!({ "type": "json_schema" }),
            json!({ "type": "json_schema", "json_schema": { "name": "n" } }),
            json!({ "type": "regex", "regex": "a", "flags": "i" }),
            json!({ "type": "choice", "choices": [1] }),
        ] {
            let error = constraint(&wrong).expect_err(&wrong.to_string());
            assert!(error.message().contains("response_format"), "{error}");
        }
    }
}
