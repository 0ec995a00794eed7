//! The `tojson` filter as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`, nothing escaped for
//! HTML, keys in their order.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::python::{float_repr, is_float};

/// Arguments of `json.dumps` that transformers lets through.
struct Style {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (positional, kwargs) = from_args::<(&[Value], Kwargs)>(&args)?;
    let argument = |position: usize, name: &str| -> Result<Option<Value>, Error> {
        match positional.get(position) {
            Some(value) => Ok(Some(value.clone())),
            None => kwargs.get::<Option<Value>>(name),
        }
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = argument(1, "indent")?.filter(|v| !v.is_none()).map(|v| indent_unit(&v)).transpose()?;
    let separators = argument(2, "separators")?.filter(|v| !v.is_none()).map(|v| separator_pair(&v)).transpose()?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    if positional.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let default_item = if indent.is_some() { "," } else { ", " };
    let (item_separator, key_separator) = separators.unwrap_or_else(|| (default_item.into(), ": ".into()));
    let style = Style { ensure_ascii, sort_keys, indent, item_separator, key_separator };
    let mut out = String::new();
    dump(state, value, &style, 0, &mut out)?;
    Ok(Value::from(out))
}

/// A number means so many spaces, a string is taken as it is.
fn indent_unit(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let count = if value.kind() == ValueKind::Bool { Some(i64::from(value.is_true())) } else { value.as_i64() };
    match count {
        // Any real template asks for a few; a width like 10^9 is an attack on memory.
        Some(count @ ..=256) => Ok(" ".repeat(usize::try_from(count).unwrap_or(0))),
        _ => Err(Error::new(ErrorKind::InvalidOperation, "tojson: unusable indent")),
    }
}

fn separator_pair(value: &Value) -> Result<(String, String), Error> {
    let parts: Vec<Value> = value.try_iter()?.collect();
    match parts.as_slice() {
        [item, key] if item.as_str().is_some() && key.as_str().is_some() => Ok((item.to_string(), key.to_string())),
        _ => Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings")),
    }
}

fn dump(state: &State, value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    let before = out.len();
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => dump_number(value, out),
        ValueKind::String => dump_str(value.as_str().unwrap_or_default(), style.ensure_ascii, out),
        ValueKind::Map => dump_map(state, value, style, depth, out)?,
        ValueKind::Seq | ValueKind::Iterable => {
            let mut items = value.try_iter()?.checked().peekable();
            if items.peek().is_none() {
                out.push_str("[]");
            } else {
                let mut separator = "[";
                for item in items {
                    out.push_str(separator);
                    new_line(style, depth + 1, out);
                    dump(state, &item?, style, depth + 1, out)?;
                    separator = &style.item_separator;
                }
                new_line(style, depth, out);
                out.push(']');
            }
        }
        kind => return Err(not_serializable(kind)),
    }
    // Text is built outside the engine's own accounting; nested output is counted once per level.
    state.consume_fuel(1 + ((out.len() - before) / 16) as u64)
}

fn dump_map(state: &State, value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    if value.as_object().is_some_and(|o| o.type_name().ends_with("::Namespace") || o.type_name().ends_with("::Macro")) {
        return Err(not_serializable(ValueKind::Plain));
    }
    let mut keys: Vec<Value> = value.try_iter()?.collect();
    if style.sort_keys {
        if keys.iter().any(|k| k.kind() != keys[0].kind()) {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: keys of different types cannot be sorted"));
        }
        keys.sort();
    }
    if keys.is_empty() {
        out.push_str("{}");
        return Ok(());
    }
    let mut separator = "{";
    for key in keys {
        out.push_str(separator);
        new_line(style, depth + 1, out);
        dump_key(&key, style, out)?;
        out.push_str(&style.key_separator);
        dump(state, &value.get_item(&key)?, style, depth + 1, out)?;
        separator = &style.item_separator;
    }
    new_line(style, depth, out);
    out.push('}');
    Ok(())
}

/// Python turns numbers, booleans and None into string keys.
fn dump_key(key: &Value, style: &Style, out: &mut String) -> Result<(), Error> {
    let mut text = String::new();
    match key.kind() {
        ValueKind::String => text.push_str(key.as_str().unwrap_or_default()),
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if key.is_true() { "true" } else { "false" }),
        ValueKind::Number => dump_number(key, &mut text),
        kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: a key cannot be a {kind}"))),
    }
    dump_str(&text, style.ensure_ascii, out);
    Ok(())
}

fn dump_number(value: &Value, out: &mut String) {
    match is_float(value) {
        Some(number) if number.is_nan() => out.push_str("NaN"),
        Some(number) if number.is_infinite() => out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" }),
        Some(number) => out.push_str(&float_repr(number)),
        None => out.push_str(&value.to_string()),
    }
}

fn dump_str(text: &str, ensure_ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            _ if c < ' ' || (ensure_ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

fn new_line(style: &Style, depth: usize, out: &mut String) {
    if let Some(unit) = &style.indent {
        out.push('\n');
        (0..depth).for_each(|_| out.push_str(unit));
    }
}

fn not_serializable(kind: ValueKind) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: a value of kind {kind} is not JSON serializable"))
}
