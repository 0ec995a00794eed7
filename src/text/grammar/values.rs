//! Values that stand without quotes where they are strings: what a JSON schema says of those, as a terminal, and of the others.

use serde_json::{Map, Value, json};

use super::rules::{ANY, json_regex, string, without};
use crate::error::{Error, Result};
use crate::text::answer::ArgumentType;

/// Keywords that demand nothing.
const NOTES: [&str; 15] = [
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$schema",
    "$id",
    "$defs",
    "definitions",
    "x-guidance",
    "nullable",
];
/// Keywords that demand something of strings.
const OF_STRINGS: [&str; 4] = ["pattern", "minLength", "maxLength", "format"];
/// Keywords that demand something of others.
const OF_OTHERS: [&str; 16] = [
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "uniqueItems",
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "minProperties",
    "maxProperties",
];
const TYPES: [&str; 7] = ["string", "number", "integer", "boolean", "null", "object", "array"];
/// References that lead to each other.
const MAX_DEPTH: usize = 16;

/// How the reader of a format takes a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// As a string.
    Certain,
    /// The same, but for the word null.
    OrNull,
    /// As something else if it looks so.
    Guess,
}

impl Reading {
    /// How the text of an argument with this schema is taken.
    pub fn of(schema: &Value) -> Self {
        match ArgumentType::of(schema) {
            ArgumentType::Text => Self::Certain,
            ArgumentType::TextOrNull => Self::OrNull,
            ArgumentType::Value | ArgumentType::Unknown => Self::Guess,
        }
    }

    fn takes(self, text: &str) -> bool {
        let kind = match self {
            Self::Certain => return true,
            Self::OrNull => ArgumentType::TextOrNull,
            Self::Guess => ArgumentType::Value,
        };
        serde_json::from_str::<Value>(&kind.json(text)).is_ok_and(|value| value == text)
    }
}

/// Which texts can be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Texts<'a> {
    /// What none may have in it.
    pub ends: &'a [&'a str],
    /// None begins or ends with a line break.
    pub edges: bool,
    /// How they are taken.
    pub reading: Reading,
}

impl Texts<'_> {
    fn have(&self, text: &str) -> bool {
        let edges = self.edges && (text.starts_with('\n') || text.ends_with('\n'));
        !edges && !self.ends.iter().any(|end| text.contains(end)) && self.reading.takes(text)
    }

    /// All of them that the keywords of `schema` allow, as a terminal.
    fn terminal(&self, schema: &Map<String, Value>) -> Result<String> {
        let known =
            |key: &str| key == "type" || [&NOTES[..], &OF_STRINGS, &OF_OTHERS].iter().any(|all| all.contains(&key));
        if let Some(other) = schema.keys().find(|key| !known(key)) {
            return Err(Error::unsupported(format!("the keyword {other:?} of texts without quotes")));
        }
        let mut all = vec![ANY.to_owned()];
        all.extend(self.ends.iter().map(|end| without(end)));
        if self.edges {
            all.extend([format!("~(\"\\n\" {ANY})"), format!("~({ANY} \"\\n\")")]);
        }
        if self.reading == Reading::Guess {
            // Words, numbers and brackets: what would not be taken as a string.
            let words = "null|true|false|None|True|False|-?[0-9]+(\\.[0-9]+)?([eE][+-]?[0-9]+)?";
            all.extend([format!("~/\\s*({words})\\s*/"), "~/\\s*[\\[{(](?s:.*)/".to_owned()]);
        }
        let length = |key: &str| match schema.get(key) {
            None => Ok(None),
            Some(length) => match length.as_u64() {
                Some(length) => Ok(Some(length)),
                None => Err(Error::invalid_request(format!("{key:?} is a number of characters"))),
            },
        };
        match (length("minLength")?, length("maxLength")?) {
            (None, None) => {}
            (least, most) => {
                let (least, most) = (least.unwrap_or(0), most.map_or(String::new(), |most| most.to_string()));
                all.push(format!("/(?s:.){{{least},{most}}}/"));
            }
        }
        if let Some(pattern) = schema.get("pattern") {
            let pattern = pattern.as_str().ok_or_else(|| Error::invalid_request("\"pattern\" is a text"))?;
            all.push(json_regex(&unanchored(pattern)));
        }
        if let Some(format) = schema.get("format") {
            let known = format.as_str().and_then(format_regex);
            let known =
                known.ok_or_else(|| Error::unsupported(format!("\"format\": {format} of a text without quotes")))?;
            all.push(json_regex(known));
        }
        Ok(all.join(" & "))
    }
}

/// A regular expression that matches all of a text in which `pattern`, whose anchors are at its ends, is found.
fn unanchored(pattern: &str) -> String {
    let (before, inner) = match pattern.strip_prefix('^') {
        Some(inner) => ("", inner),
        None => ("(?s:.*)", pattern),
    };
    let escapes = |text: &str| text.bytes().rev().take_while(|byte| *byte == b'\\').count();
    let (inner, after) = match inner.strip_suffix('$') {
        Some(inner) if escapes(inner) % 2 == 0 => (inner, ""),
        _ => (inner, "(?s:.*)"),
    };
    format!("{before}(?:{inner}){after}")
}

/// Formats of strings that are common among tools.
fn format_regex(name: &str) -> Option<&'static str> {
    Some(match name {
        "date" => "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])",
        "time" => "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])",
        "date-time" => {
            "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?\
             (Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
        }
        "email" => {
            "[A-Za-z0-9_+-]+(\\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]+(-[A-Za-z0-9]+)*(\\.[A-Za-z0-9]+(-[A-Za-z0-9]+)*)+"
        }
        "uuid" => "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        "ipv4" => "((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])",
        "uri" | "url" => {
            "[a-z][a-z0-9+.-]*://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~!$&'()*+,;=:@%-]*)*(\\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?"
        }
        _ => return None,
    })
}

/// What a schema accepts.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// Its strings, a terminal; with what has no brackets where that stands in their place. `None` if it accepts none.
    pub text: Option<String>,
    /// The schema of everything else.
    pub other: Option<Value>,
}

impl Values {
    /// Of an argument with `schema`, a part of `root`; its strings are as `texts` says. `apart`: a mark tells them from
    /// everything else. Something is left in any case.
    pub fn of(root: &Value, schema: &Value, texts: &Texts<'_>, apart: bool) -> Result<Self> {
        let mut parts = Parts { root, texts, strings: Vec::new(), others: Vec::new() };
        parts.take(schema, 0)?;
        let Parts { mut strings, others, .. } = parts;
        if strings.is_empty() {
            return Ok(Self { text: None, other: Some(embedded(root, schema)?) });
        }
        let mut rest = Vec::new();
        for Other { schema, terminal, .. } in others {
            match terminal {
                // One terminal has both: a second one would be read as the first as long as it could be.
                Some(Some(terminal)) if !apart => strings.push(terminal),
                Some(None) if !apart => {
                    return Err(Error::unsupported(format!("{schema} beside texts without quotes")));
                }
                _ => rest.push(schema),
            }
        }
        let other = match rest.len() {
            0 => None,
            1 => rest.pop(),
            _ => Some(json!({ "anyOf": rest })),
        };
        Ok(Self { text: Some(strings.join(" | ")), other: other.map(|other| embedded(root, &other)).transpose()? })
    }
}

/// A part of a schema that accepts no strings.
struct Other {
    /// `number` also of integers.
    kind: &'static str,
    schema: Value,
    /// `None` if it accepts what is in brackets; `Some(None)` if what it accepts has no terminal.
    terminal: Option<Option<String>>,
}

/// A schema, taken apart.
struct Parts<'a> {
    root: &'a Value,
    texts: &'a Texts<'a>,
    strings: Vec<String>,
    others: Vec<Other>,
}

impl Parts<'_> {
    fn take(&mut self, schema: &Value, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(Error::unsupported("references that lead to each other"));
        }
        let none = Map::new();
        let keywords = match schema {
            Value::Bool(true) => &none,
            Value::Object(keywords) => keywords,
            _ => return Err(Error::invalid_request("a JSON schema is an object")),
        };
        if let Some(reference) = keywords.get("$ref") {
            alone(keywords, "$ref")?;
            return self.take(resolve(self.root, reference)?, depth + 1);
        }
        if let Some([one]) = keywords.get("allOf").and_then(Value::as_array).map(Vec::as_slice) {
            alone(keywords, "allOf")?;
            return self.take(one, depth + 1);
        }
        if let Some(key) = ["anyOf", "oneOf"].into_iter().find(|key| keywords.contains_key(*key)) {
            alone(keywords, key)?;
            return self.branches(key, &keywords[key], depth);
        }
        self.types(keywords)
    }

    fn branches(&mut self, key: &str, branches: &Value, depth: usize) -> Result<()> {
        let branches = branches.as_array().ok_or_else(|| Error::invalid_request(format!("{key:?} is an array")))?;
        let (strings, others) = (self.strings.len(), self.others.len());
        branches.iter().try_for_each(|branch| self.take(branch, depth + 1))?;
        let kinds: Vec<&str> = self.others[others..].iter().map(|other| other.kind).collect();
        let twice = kinds.iter().enumerate().any(|(at, kind)| kinds[..at].contains(kind));
        // Without strings the whole schema is llguidance's business; literals that differ do not overlap.
        let texts = &self.strings[strings..];
        let apart = texts.len() < 2 || {
            let again = |(at, text): (usize, &String)| !text.starts_with('"') || texts[..at].contains(text);
            !texts.iter().enumerate().any(again)
        };
        if key == "oneOf" && !texts.is_empty() && (twice || !apart) {
            return Err(Error::unsupported("options of \"oneOf\" that may overlap, with texts without quotes"));
        }
        Ok(())
    }

    fn types(&mut self, keywords: &Map<String, Value>) -> Result<()> {
        let types: Vec<&str> = match keywords.get("type") {
            None => TYPES.to_vec(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            Some(name) => name.as_str().into_iter().collect(),
        };
        if types.is_empty() || !types.iter().all(|name| TYPES.contains(name)) {
            return Err(Error::invalid_request(format!("there is no type {}", keywords["type"])));
        }
        let constant = keywords.get("const").map(std::slice::from_ref);
        let listed = || keywords.get("enum").and_then(Value::as_array).map(Vec::as_slice);
        if let Some(values) = constant.or_else(listed) {
            return self.literals(keywords, values, &types);
        }
        let demands = |key: &String| !NOTES.contains(&key.as_str()) && key != "type";
        for name in types {
            let Some(kind) = TYPES.into_iter().find(|kind| *kind == name) else { continue };
            if kind == "string" {
                self.strings.push(self.texts.terminal(keywords)?);
                continue;
            }
            let mut schema = keywords.clone();
            OF_STRINGS.iter().for_each(|key| drop(schema.remove(*key)));
            schema.insert("type".to_owned(), kind.into());
            let free = !schema.keys().any(demands);
            let terminal = scalar(kind).map(|regex| free.then(|| format!("/{regex}/")));
            let kind = if kind == "integer" { "number" } else { kind };
            self.others.push(Other { kind, schema: Value::Object(schema), terminal });
        }
        Ok(())
    }

    /// The `values` of these `types`.
    fn literals(&mut self, keywords: &Map<String, Value>, values: &[Value], types: &[&str]) -> Result<()> {
        for value in values {
            let kind = match value {
                Value::String(_) => "string",
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(number) if number.is_f64() => "number",
                Value::Number(_) if types.contains(&"number") => "number",
                Value::Number(_) => "integer",
                Value::Array(_) => "array",
                Value::Object(_) => "object",
            };
            if !types.contains(&kind) {
                continue;
            }
            let Value::String(text) = value else {
                let terminal = scalar(kind).map(|_| Some(string(&value.to_string())));
                self.others.push(Other { kind: "", schema: json!({ "enum": [value] }), terminal });
                continue;
            };
            alone(keywords, if keywords.contains_key("const") { "const" } else { "enum" })?;
            if !self.texts.have(text) {
                return Err(Error::unsupported(format!("the text {text:?} would not be read as what it is")));
            }
            self.strings.push(string(text));
        }
        Ok(())
    }
}

/// What values of a type without brackets look like.
fn scalar(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "null" => "null",
        "boolean" => "true|false",
        "integer" => "-?(0|[1-9][0-9]{0,17})",
        "number" => "-?(0|[1-9][0-9]{0,17})(\\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?",
        _ => return None,
    })
}

/// An error if something else is demanded beside the keyword `main`.
fn alone(keywords: &Map<String, Value>, main: &str) -> Result<()> {
    let fine = |key: &&String| NOTES.contains(&key.as_str()) || *key == main || *key == "type";
    match keywords.keys().find(|key| !fine(key)) {
        Some(other) => Err(Error::unsupported(format!("the keyword {other:?} beside {main:?}"))),
        None => Ok(()),
    }
}

/// What a reference within `root` means.
pub(super) fn resolve<'a>(root: &'a Value, reference: &Value) -> Result<&'a Value> {
    let path = reference.as_str().and_then(|reference| reference.strip_prefix('#'));
    let path =
        path.ok_or_else(|| Error::unsupported(format!("the reference {reference}, which is not within the schema")))?;
    root.pointer(path).ok_or_else(|| Error::invalid_request(format!("the reference {reference} leads nowhere")))
}

/// `schema` by itself, with the definitions of `root`, of which it is a part.
pub(super) fn embedded(root: &Value, schema: &Value) -> Result<Value> {
    let mut schema = match schema {
        Value::Object(schema) => schema.clone(),
        Value::Bool(true) => Map::new(),
        _ => return Err(Error::invalid_request("a JSON schema is an object")),
    };
    let kept = ["$defs", "definitions"];
    kept.iter().for_each(|key| drop(schema.remove(*key)));
    let mut used = references(&Value::Object(schema.clone()));
    for key in kept {
        if let Some(definitions) = root.get(key)
            && used.iter().any(|reference| reference.starts_with(&format!("#/{key}/")))
        {
            schema.insert(key.to_owned(), definitions.clone());
            used.extend(references(definitions));
        }
    }
    match used.iter().find(|reference| !kept.iter().any(|key| reference.starts_with(&format!("#/{key}/")))) {
        Some(other) => Err(Error::unsupported(format!("the reference {other:?}, which is not to a definition"))),
        None => Ok(Value::Object(schema)),
    }
}

/// All references in `schema`.
fn references(schema: &Value) -> Vec<String> {
    match schema {
        Value::Array(items) => items.iter().flat_map(references).collect(),
        Value::Object(keys) => {
            let own = keys.get("$ref").and_then(Value::as_str).map(str::to_owned);
            own.into_iter().chain(keys.values().flat_map(references)).collect()
        }
        _ => Vec::new(),
    }
}
