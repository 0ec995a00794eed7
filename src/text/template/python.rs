//! Where Jinja templates see through to Python and `minijinja` differs: how values print, and methods of `str` and
//! `list`.

use std::fmt::Write;

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;

/// Installs the printing rules, the methods and the filters and tests of Jinja that are missing or differ.
pub(super) fn add_to(env: &mut Environment<'_>) {
    env.set_formatter(print);
    env.set_unknown_method_callback(call_method);
    env.add_filter("string", |state: &State, value: &Value| -> Result<Value, Error> {
        match value.as_str() {
            Some(_) => Ok(value.clone()),
            None => to_str(state, value).map(Value::from),
        }
    });
    env.add_filter("trim", |state: &State, value: &Value, chars: Option<&str>| -> Result<String, Error> {
        let text = to_str(state, value)?;
        Ok(strip(&text, chars, true, true).to_owned())
    });
    for name in ["e", "escape", "forceescape"] {
        env.add_filter(name, escape);
    }
    env.add_filter("wordcount", |text: &str| {
        text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty()).count()
    });
    env.add_filter("center", |text: &str, width: Option<usize>| -> Result<String, Error> {
        pad(text, width.unwrap_or(80), ' ', Align::Center)
    });
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Iterable)
    });
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_test("callable", |value: &Value| {
        value.as_object().is_some_and(|o| o.type_name().ends_with("::Macro") || value.kind() == ValueKind::Plain)
    });
}

/// `{{ value }}`.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&to_str(state, value)?)?,
    }
    Ok(())
}

/// Python's `str(value)`; an undefined value is the empty string.
fn to_str(state: &State, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        repr(state, value, &mut out)?;
    }
    Ok(out)
}

/// Python's `repr(value)`.
fn repr(state: &State, value: &Value, out: &mut String) -> Result<(), Error> {
    let before = out.len();
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String => str_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => match is_float(value) {
            Some(number) => out.push_str(&float_repr(number)),
            None => out.push_str(&value.to_string()),
        },
        ValueKind::Map if !value.as_object().is_some_and(|o| o.type_name().ends_with("::Macro")) => {
            let mut separator = "{";
            for key in value.try_iter()? {
                out.push_str(separator);
                repr(state, &key, out)?;
                out.push_str(": ");
                repr(state, &value.get_item(&key)?, out)?;
                separator = ", ";
            }
            out.push_str(if separator == "{" { "{}" } else { "}" });
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (index, item) in value.try_iter()?.checked().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(state, &item?, out)?;
            }
            out.push_str(if value.is_tuple() && value.len() == Some(1) { "," } else { "" });
            out.push(close);
        }
        _ => out.push_str(&value.to_string()),
    }
    state.consume_fuel(1 + ((out.len() - before) / 16) as u64)
}

/// Python's `repr` of a string: single quotes unless only those occur inside, escapes for what is not printable.
fn str_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            // Writing to a String cannot fail.
            _ => {
                let _ = match u32::from(c) {
                    code @ ..=0xff => write!(out, "\\x{code:02x}"),
                    code @ ..=0xffff => write!(out, "\\u{code:04x}"),
                    code => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// `str.isprintable`: Rust's debug form escapes the same Unicode categories. Combining marks are escaped by it only at
/// the start of a string, hence the letter in front.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    let mut buffer = ['x', c].iter().collect::<String>();
    let plain = buffer.len();
    buffer = buffer.escape_debug().to_string();
    buffer.len() == plain
}

/// The number if it is a float; integers and booleans are not.
pub(super) fn is_float(value: &Value) -> Option<f64> {
    if value.is_number() && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// Python's `repr` of a float: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
pub(super) fn float_repr(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() { "nan".into() } else { format!("{number}") };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        format!("{number:?}")
    } else {
        format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    }
}

/// `escape` with the entities of Python's MarkupSafe; the result is marked safe.
fn escape(state: &State, value: &Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let mut out = String::new();
    for c in to_str(state, value)?.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    Ok(Value::from_safe_string(out))
}

/// Methods of Python's types: the ones below, then those of `minijinja-contrib`.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => str_method(state, value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Seq | ValueKind::Iterable => list_method(value, method, args)?,
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let mut items = value.try_iter()?;
    Ok(match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = items.position(|item| item == *wanted);
            Some(Value::from(found.ok_or_else(|| invalid("index: the value is not in the list"))?))
        }
        "copy" => {
            let () = from_args(args)?;
            Some(Value::from(items.collect::<Vec<_>>()))
        }
        _ => None,
    })
}

/// Methods of `str` that `minijinja-contrib` lacks or that differ there; `None` for the rest.
fn str_method(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    state.consume_fuel(1 + (text.len() / 16) as u64)?;
    let value = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, limit) = split_arguments(args)?;
            split(text, separator.as_deref(), limit, method == "rsplit")?
        }
        "splitlines" => {
            let (keep_ends, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep_ends = keep_ends.or(kwargs.get("keepends")?).unwrap_or(false);
            kwargs.assert_all_used()?;
            Value::from(split_lines(text, keep_ends))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            partition(text, separator, method == "rpartition")?
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if method == "index" { text.find(part) } else { text.rfind(part) };
            let at = found.ok_or_else(|| invalid(format!("{method}: substring not found")))?;
            Value::from(text[..at].chars().count())
        }
        "ljust" | "rjust" | "center" | "zfill" => justify(text, method, args)?,
        "title" => {
            let () = from_args(args)?;
            Value::from(title(text))
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            join(text, items)?
        }
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn join(separator: &str, items: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let item = item?;
        out.push_str(if index > 0 { separator } else { "" });
        out.push_str(item.as_str().ok_or_else(|| invalid(format!("join: item {index} is not a string")))?);
    }
    Ok(Value::from(out))
}

/// `str.isspace` for one character: Unicode white space and the four ASCII information separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let strippable = |c: char| chars.map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if start { text.trim_start_matches(strippable) } else { text };
    if end { text.trim_end_matches(strippable) } else { text }
}

/// `sep=None, maxsplit=-1`, by position or name.
fn split_arguments(args: &[Value]) -> Result<(Option<String>, Option<usize>), Error> {
    let (separator, limit, kwargs): (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
    let separator = separator.or(kwargs.get("sep")?).filter(|v| !v.is_none());
    let limit = limit.or(kwargs.get("maxsplit")?);
    kwargs.assert_all_used()?;
    let separator = match separator {
        Some(value) => Some(value.as_str().ok_or_else(|| invalid("split: the separator is not a string"))?.to_owned()),
        None => None,
    };
    let limit = match limit {
        Some(value) => i64::try_from(value)?,
        None => -1,
    };
    Ok((separator, usize::try_from(limit).ok()))
}

fn split(text: &str, separator: Option<&str>, limit: Option<usize>, from_right: bool) -> Result<Value, Error> {
    let limit = limit.unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(invalid("split: empty separator")),
        Some(separator) if from_right => text.rsplitn(limit.saturating_add(1), separator).collect(),
        Some(separator) => text.splitn(limit.saturating_add(1), separator).collect(),
        None => split_words(text, limit, from_right),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Words between runs of white space, the last (from the right: the first) with what is left after `limit` splits.
fn split_words(text: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = strip(text, None, !from_right, from_right);
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(cut) = cut.filter(|_| parts.len() < limit) else {
            parts.push(rest);
            break;
        };
        let next = cut + rest[cut..].chars().next().map_or(1, char::len_utf8);
        let (word, left) = if from_right { (&rest[next..], &rest[..cut]) } else { (&rest[..cut], &rest[next..]) };
        parts.push(word);
        rest = strip(left, None, !from_right, from_right);
    }
    parts
}

fn split_lines(text: &str, keep_ends: bool) -> Vec<Value> {
    let is_end = |c| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let mark = match rest[end..].chars().next() {
            Some('\r') if rest[end..].starts_with("\r\n") => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        lines.push(Value::from(&rest[..if keep_ends { end + mark } else { end }]));
        rest = &rest[end + mark..];
    }
    lines
}

fn partition(text: &str, separator: &str, from_right: bool) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(invalid("partition: empty separator"));
    }
    let found = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::new(parts.into_iter().map(Value::from).collect())))
}

enum Align {
    Left,
    Right,
    Center,
}

fn justify(text: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    let mut chars = fill.unwrap_or(if method == "zfill" { "0" } else { " " }).chars();
    let (Some(fill), None) = (chars.next(), chars.next()) else {
        return Err(invalid(format!("{method}: the fill must be one character")));
    };
    let padded = match method {
        "ljust" => pad(text, width, fill, Align::Left),
        "rjust" => pad(text, width, fill, Align::Right),
        "center" => pad(text, width, fill, Align::Center),
        // zfill keeps a sign in front.
        _ => match text.strip_prefix(['+', '-']) {
            Some(digits) => pad(digits, width.saturating_sub(1), fill, Align::Right).map(|d| text[..1].to_owned() + &d),
            None => pad(text, width, fill, Align::Right),
        },
    };
    padded.map(Value::from)
}

fn pad(text: &str, width: usize, fill: char, align: Align) -> Result<String, Error> {
    if width > 1 << 16 {
        return Err(invalid("the width is too large"));
    }
    let missing = width.saturating_sub(text.chars().count());
    let left = match align {
        Align::Left => 0,
        Align::Right => missing,
        // CPython puts the odd one to the left if the width is odd.
        Align::Center => missing / 2 + (missing & width & 1),
    };
    let run = |count| std::iter::repeat_n(fill, count);
    Ok(run(left).chain(text.chars()).chain(run(missing - left)).collect())
}

/// `str.title`: a letter after a non-letter is upper case, any other lower.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut after_letter = false;
    for c in text.chars() {
        if after_letter {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        after_letter = c.is_lowercase() || c.is_uppercase();
    }
    out
}

fn invalid(detail: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
