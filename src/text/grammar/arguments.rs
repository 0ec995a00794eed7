//! Grammars of the arguments of a call: a JSON object, or each by itself between tags, as Python's or as Gemma's. They come
//! in the order of the schema, and none that it does not name.

use serde_json::{Map, Value, json};

use super::rules::{Rules, string};
use super::values::{Reading, Texts, Values, resolve};
use crate::error::{Error, Result};
use crate::text::answer::Arguments;

/// Keywords of a function's schema that these grammars keep to, or that demand nothing of what they write.
const KNOWN: [&str; 16] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "strict",
    "x-guidance",
];

/// Adds the rules of arguments that `schema` accepts; returns what stands for them in the rule `name`.
pub(super) fn add(rules: &mut Rules<'_>, name: &str, schema: &Value, arguments: Arguments) -> Result<String> {
    let items = format!("{name}_arguments");
    if arguments == Arguments::Json {
        rules.add_json(&items, schema)?;
        return Ok(items);
    }
    let mut places = Vec::new();
    for (at, property) in properties(schema)?.into_iter().enumerate() {
        let rule = format!("{name}_{at}");
        let written = Argument { rules, rule: &rule, root: schema, property: &property, arguments }.add();
        written.map_err(|error| error.context(format!("the argument {:?}", property.key)))?;
        places.push((rule, property.required));
    }
    Ok(match arguments {
        Arguments::Json | Arguments::Tagged { .. } => {
            let all = places.iter().map(|(rule, required)| if *required { rule.clone() } else { format!("{rule}?") });
            all.collect::<Vec<_>>().join(" ")
        }
        Arguments::Python => separated(rules, &items, &places, ", "),
        Arguments::Gemma { .. } => format!("\"{{\" {} \"}}\"", separated(rules, &items, &places, ",")),
    })
}

/// The items with `separator` between those that are there; what stands for them in a rule.
fn separated(rules: &mut Rules<'_>, name: &str, items: &[(String, bool)], separator: &str) -> String {
    let rest = |at: usize| if at < items.len() { format!("{name}_rest_{at}") } else { String::new() };
    for (at, (item, required)) in items.iter().enumerate().skip(1) {
        let optional = if *required { "" } else { "?" };
        rules.add(&rest(at), &format!("({} {item}){optional} {}", string(separator), rest(at + 1)));
    }
    let first_required = items.iter().position(|(_, required)| *required);
    let firsts = items.iter().enumerate().take(first_required.map_or(items.len(), |at| at + 1));
    let mut begins: Vec<String> = firsts.map(|(at, (item, _))| format!("{item} {}", rest(at + 1))).collect();
    if first_required.is_none() {
        begins.push("\"\"".to_owned());
    }
    rules.add(name, &begins.join(" | "));
    name.to_owned()
}

struct Property {
    key: String,
    schema: Value,
    required: bool,
    /// Readers of answers know its type.
    declared: bool,
}

/// The properties of an object's schema.
fn properties(root: &Value) -> Result<Vec<Property>> {
    let no_schema = || Error::invalid_request("the schema of arguments is an object");
    let mut schema = root.as_object().ok_or_else(no_schema)?;
    for _ in 0..16 {
        let Some(reference) = schema.get("$ref") else { break };
        schema = resolve(root, reference)?.as_object().ok_or_else(no_schema)?;
    }
    if let Some(other) = schema.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(Error::unsupported(format!("the keyword {other:?} of arguments that are not JSON")));
    }
    let is_object = |kind: &Value| kind == "object";
    match schema.get("type") {
        None => {}
        Some(Value::Array(kinds)) if kinds.iter().any(is_object) => {}
        Some(kind) if is_object(kind) => {}
        Some(kind) => return Err(Error::invalid_request(format!("arguments are an object, not {kind}"))),
    }
    let none = Map::new();
    let declared = match schema.get("properties") {
        None => &none,
        Some(properties) => {
            properties.as_object().ok_or_else(|| Error::invalid_request("\"properties\" is an object"))?
        }
    };
    let required: Vec<&str> = match schema.get("required") {
        None => Vec::new(),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        Some(_) => return Err(Error::invalid_request("\"required\" is an array of names")),
    };
    let known = root.get("$ref").is_none();
    let mut all: Vec<Property> = Vec::new();
    for (key, schema) in declared {
        let required = required.contains(&key.as_str());
        match schema {
            Value::Bool(false) if !required => continue,
            Value::Bool(false) => return Err(Error::invalid_request(format!("{key:?} is required and forbidden"))),
            _ => all.push(Property { key: key.clone(), schema: schema.clone(), required, declared: known }),
        }
    }
    let others = schema.get("additionalProperties");
    for key in required.into_iter().filter(|key| !declared.contains_key(*key)) {
        if others == Some(&Value::Bool(false)) {
            return Err(Error::invalid_request(format!("{key:?} is required and forbidden")));
        }
        let schema = others.filter(|others| others.is_object()).cloned().unwrap_or_else(|| json!({}));
        all.push(Property { key: key.to_owned(), schema, required: true, declared: false });
    }
    Ok(all)
}

/// One argument, whose rule is to be added.
struct Argument<'a, 'b> {
    rules: &'a mut Rules<'b>,
    rule: &'a str,
    /// The schema of all arguments.
    root: &'a Value,
    property: &'a Property,
    arguments: Arguments,
}

impl Argument<'_, '_> {
    fn add(&mut self) -> Result<()> {
        match self.arguments {
            Arguments::Tagged { .. } => self.tagged(),
            Arguments::Gemma { delimiter } => self.gemma(delimiter),
            Arguments::Json | Arguments::Python => self.python(),
        }
    }

    /// `BEFORE key AFTER value END`.
    fn tagged(&mut self) -> Result<()> {
        let Arguments::Tagged { before_key, after_key, after_other_key, after_value, ends, lines } = self.arguments
        else {
            return Ok(());
        };
        let key = &self.property.key;
        if key.is_empty() || key.trim() != key || key.contains(['<', '>', '\n', '"']) {
            return Err(Error::unsupported("this name cannot stand between tags"));
        }
        // Where lines are cut off, those that the format writes itself must be the ones.
        let edges = lines && !after_key.ends_with('\n');
        let reading = match after_other_key {
            Some(_) => Reading::Certain,
            None if self.property.declared => Reading::of(&self.property.schema),
            None => Reading::Guess,
        };
        let values =
            Values::of(self.root, &self.property.schema, &Texts { ends, edges, reading }, after_other_key.is_some())?;
        let head = |after: &str| format!("{before_key}{key}{after}");
        let mut bodies = Vec::new();
        if let Some(text) = &values.text {
            // A text ends where its end begins, so both are one terminal, as far as no special token is of the end.
            let (plain, _) = self.rules.split(after_value);
            let terminal = self.rule.to_uppercase();
            self.rules.add(&terminal, &format!("({text}) {}", string(plain)));
            let rest = self.rules.literal(&after_value[plain.len()..]);
            bodies.push(format!("{} {terminal} {rest}", self.rules.literal(&head(after_key))));
        }
        if let Some(other) = &values.other {
            let json = format!("{}_json", self.rule);
            self.rules.add_json(&json, other)?;
            let before = self.rules.literal(&head(after_other_key.unwrap_or(after_key)));
            bodies.push(format!("{before} {json} {}", self.rules.literal(after_value)));
        }
        self.rules.add(self.rule, &bodies.join(" | "));
        Ok(())
    }

    /// `key:value`.
    fn gemma(&mut self, delimiter: &str) -> Result<()> {
        let key = &self.property.key;
        let bare = !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || "_.-".contains(c));
        let key = if bare { key.clone() } else { string(key) };
        let texts = Texts { ends: &[delimiter], edges: false, reading: Reading::Certain };
        let values = Values::of(self.root, &self.property.schema, &texts, true)?;
        let mut bodies = Vec::new();
        if let Some(text) = &values.text {
            let (plain, _) = self.rules.split(delimiter);
            let terminal = self.rule.to_uppercase();
            self.rules.add(&terminal, &format!("({text}) {}", string(plain)));
            let mark = self.rules.literal(delimiter);
            bodies.push(format!("{mark} {terminal} {}", self.rules.literal(&delimiter[plain.len()..])));
        }
        if let Some(other) = &values.other {
            let json = format!("{}_json", self.rule);
            self.rules.add_json(&json, other)?;
            bodies.push(json);
        }
        self.rules.add(self.rule, &format!("{} ({})", string(&format!("{key}:")), bodies.join(" | ")));
        Ok(())
    }

    /// `key=value`: what JSON has, Python's readers of ours take; its own words for some are what models know.
    fn python(&mut self) -> Result<()> {
        let key = &self.property.key;
        let mut letters = key.chars();
        let begins = letters.next().is_some_and(|c| c.is_alphabetic() || c == '_');
        if !begins || !letters.all(|c| c.is_alphanumeric() || c == '_') {
            return Err(Error::unsupported("this name cannot be one of Python's"));
        }
        let body = match self.property.schema.get("type").and_then(Value::as_str) {
            Some("boolean") if !self.property.schema.get("enum").is_some_and(Value::is_array) => {
                "\"True\" | \"False\"".to_owned()
            }
            Some("null") => "\"None\"".to_owned(),
            _ => {
                let json = format!("{}_json", self.rule);
                self.rules.add_json(&json, &super::values::embedded(self.root, &self.property.schema)?)?;
                json
            }
        };
        self.rules.add(self.rule, &format!("{} ({body})", string(&format!("{key}="))));
        Ok(())
    }
}
