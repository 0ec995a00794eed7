//! Grammars in llguidance's Lark, put together rule by rule.

use llguidance::regex_to_lark;
use serde_json::Value;

use super::constraint::json_schema;
use crate::error::Result;

/// Any text; special tokens are none.
pub(super) const ANY: &str = "/(?s:.*)/";

/// The rules of a grammar so far.
pub(super) struct Rules<'a> {
    lark: String,
    special: &'a dyn Fn(&str) -> Option<u32>,
}

impl<'a> Rules<'a> {
    /// None yet; `special` knows the ids of special tokens.
    pub fn new(special: &'a dyn Fn(&str) -> Option<u32>) -> Self {
        Self { lark: String::new(), special }
    }

    /// Adds a rule, or a terminal if its name is in capitals.
    pub fn add(&mut self, name: &str, body: &str) {
        self.lark.push_str(&format!("{name}: {body}\n"));
    }

    /// Adds the rule of a JSON value that `schema` accepts.
    pub fn add_json(&mut self, name: &str, schema: &Value) -> Result<()> {
        self.add(name, &format!("%json {}", json_schema(schema)?));
        Ok(())
    }

    /// The grammar.
    pub fn into_lark(self) -> String {
        self.lark
    }

    /// `text` in a rule: strings, and special tokens by their ids.
    pub fn literal(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (plain, token) = self.split(rest);
            if !plain.is_empty() {
                parts.push(string(plain));
            }
            rest = &rest[plain.len()..];
            if let Some((length, id)) = token {
                parts.push(format!("<[{id}]>"));
                rest = &rest[length..];
            }
        }
        parts.join(" ")
    }

    /// What of `text` stands before its first special token, and that: its length in bytes and its id.
    pub fn split<'b>(&self, text: &'b str) -> (&'b str, Option<(usize, u32)>) {
        for (at, _) in text.char_indices() {
            let rest = &text[at..];
            let ends = (1..=rest.len()).rev().filter(|end| rest.is_char_boundary(*end));
            let mut found = ends.filter_map(|end| Some((end, (self.special)(&rest[..end])?)));
            if let Some(token) = found.next() {
                return (&text[..at], Some(token));
            }
        }
        (text, None)
    }
}

/// A text in Lark.
pub(super) fn string(text: &str) -> String {
    Value::from(text).to_string()
}

/// A regular expression in Lark.
pub(super) fn regex(regex: &str) -> String {
    format!("/{}/", regex_to_lark(regex, ""))
}

/// A regular expression of a JSON schema in Lark: its classes know ASCII only.
pub(super) fn json_regex(regex: &str) -> String {
    format!("/{}/", regex_to_lark(regex, "dw"))
}

/// In a terminal: every text that has not `text` in it.
pub(super) fn without(text: &str) -> String {
    format!("~({ANY} {} {ANY})", string(text))
}
