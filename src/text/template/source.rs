//! Preparing a template's source: what transformers adds to Jinja's grammar, and limits that keep a hostile template
//! from exhausting the stack of the compiler.
//!
//! Works on tags, not on expressions: it only needs to know where comments, raw blocks and strings are.

/// Filter that `{% set x = .. %}` is routed through; see [`super::limits`].
pub(super) const BOUND_FILTER: &str = "__bound";
/// The same for `{% set ns.x = .. %}`.
pub(super) const BOUND_ATTRIBUTE_FILTER: &str = "__bound_attribute";
/// Filter that what a loop runs over is routed through: Python refuses `none`, the engine would not.
pub(super) const ITERABLE_FILTER: &str = "__iterable";

const MAX_BYTES: usize = 1 << 20;
/// The compiler recurses over chains such as `a + b + c` and `a.b.c`.
const MAX_TAG_TOKENS: usize = 4096;
/// Filters, subscripts and list displays in one tag: each may nest a value once more.
const MAX_TAG_NESTING: usize = 256;
/// The compiler recurses over `elif` chains.
const MAX_ELIFS: usize = 1024;

/// Returns the source for `minijinja`, or why it is refused.
///
/// * Newlines become `\n`, as Jinja's lexer does.
/// * `{% generation %}` blocks, which mark the assistant's text for training, become transparent scopes.
/// * Assigned values pass a filter that bounds how deep they nest, and what a loop runs over one that refuses `none`.
pub(super) fn prepare(source: &str) -> Result<String, String> {
    if source.len() > MAX_BYTES {
        return Err(format!("the template is longer than {MAX_BYTES} bytes"));
    }
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let (mut rest, mut elifs) = (source.as_str(), 0);
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min() {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = match rest.as_bytes()[1] {
            b'#' => rest.find("#}").map_or(rest.len(), |end| end + 2),
            b'{' => scan_tag(rest, "}}")?.length,
            _ => {
                let tag = scan_tag(rest, "%}")?;
                let text = &rest[..tag.length];
                elifs += usize::from(keyword(text) == "elif");
                if elifs > MAX_ELIFS {
                    return Err(format!("the template has more than {MAX_ELIFS} elif tags"));
                }
                let length = if keyword(text) == "raw" { raw_length(rest, tag.length) } else { tag.length };
                match rewrite(text, &tag) {
                    Some(new) => out.push_str(&new),
                    None => out.push_str(&rest[..length]),
                }
                rest = &rest[length..];
                continue;
            }
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    Ok(out)
}

/// One `{{ .. }}` or `{% .. %}`.
struct Tag {
    /// Bytes with both delimiters.
    length: usize,
    /// Place of the first `=` outside brackets and strings that is not a comparison.
    assign: Option<usize>,
    /// What a `for` tag runs over: from the word `in` to `if`, `recursive` or the end of the tag.
    iterable: (Option<usize>, Option<usize>),
    closed: bool,
}

/// Finds the end of the tag at the start of `text`. As in Jinja, the end mark does not count inside brackets and
/// strings.
fn scan_tag(text: &str, end: &str) -> Result<Tag, String> {
    let bytes = text.as_bytes();
    let (mut at, mut depth, mut tokens, mut nesting) = (2, 0usize, 0, 0);
    let (mut assign, mut iterable) = (None, (None, None));
    while at < bytes.len() {
        if depth == 0 && text[at..].starts_with(end) {
            return Ok(Tag { length: at + end.len(), assign, iterable, closed: true });
        }
        let byte = bytes[at];
        let width = match byte {
            b'\'' | b'"' => string_length(&bytes[at..]),
            b'=' | b'!' | b'<' | b'>' if bytes.get(at + 1) == Some(&b'=') => 2,
            _ if is_word(byte) => bytes[at..].iter().take_while(|b| is_word(**b)).count(),
            _ => text[at..].chars().next().map_or(1, char::len_utf8),
        };
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b'=' if width == 1 && depth == 0 && assign.is_none() => assign = Some(at),
            _ => {}
        }
        match &text[at..at + width] {
            "in" if depth == 0 && iterable.0.is_none() => iterable.0 = Some(at + width),
            "if" | "recursive" if depth == 0 && iterable.0.is_some() && iterable.1.is_none() => iterable.1 = Some(at),
            _ => {}
        }
        tokens += usize::from(!byte.is_ascii_whitespace());
        nesting += usize::from(matches!(byte, b'|' | b'['));
        if tokens > MAX_TAG_TOKENS || nesting > MAX_TAG_NESTING {
            return Err("a tag of the template is too long".into());
        }
        at += width;
    }
    // Unclosed: the compiler reports it.
    Ok(Tag { length: text.len(), assign, iterable, closed: false })
}

/// The tag's replacement, if it needs one.
fn rewrite(tag: &str, found: &Tag) -> Option<String> {
    if !found.closed {
        return None;
    }
    let body_end = tag.len() - 2 - usize::from(tag[..tag.len() - 2].ends_with(['-', '+']));
    match keyword(tag) {
        "generation" => Some(tag.replacen("generation", "with", 1)),
        "endgeneration" => Some(tag.replacen("endgeneration", "endwith", 1)),
        "set" => {
            let assign = found.assign?;
            let attribute = tag[..assign].contains('.');
            let filter = if attribute { BOUND_ATTRIBUTE_FILTER } else { BOUND_FILTER };
            filtered(tag, assign + 1, body_end, filter)
        }
        "for" => filtered(tag, found.iterable.0?, found.iterable.1.unwrap_or(body_end), ITERABLE_FILTER),
        _ => None,
    }
}

/// `tag` with the expression at `start..end` passed through `filter`. No expression stays none, for the compiler to
/// refuse.
fn filtered(tag: &str, start: usize, end: usize, filter: &str) -> Option<String> {
    let (head, value, tail) = (&tag[..start], tag.get(start..end)?, &tag[end..]);
    (!value.trim().is_empty()).then(|| format!("{head}({value})|{filter} {tail}"))
}

/// The statement's name: the first word of a `{% .. %}` tag.
fn keyword(tag: &str) -> &str {
    let body = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let end = body.bytes().position(|b| !is_word(b)).unwrap_or(body.len());
    &body[..end]
}

/// Length of a raw block up to its end tag, which the main loop then copies like any other.
fn raw_length(text: &str, start: usize) -> usize {
    let mut at = start;
    while let Some(next) = text[at..].find("{%") {
        at += next;
        if keyword(&text[at..]) == "endraw" {
            return at;
        }
        at += 2;
    }
    text.len()
}

/// Length of the string literal at the start of `bytes`, quotes included.
fn string_length(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b if b == bytes[0] => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_scopes() {
        let source = "a{%- generation -%} {{ '{% generation %}' }} {% endgeneration %}{# {% generation %} #}";
        let expected = "a{%- with -%} {{ '{% generation %}' }} {% endwith %}{# {% generation %} #}";
        assert_eq!(prepare(source).unwrap(), expected);
    }

    #[test]
    fn assignments_are_bounded() {
        let prepared = prepare("{%- set a, b = (1, '%}=') -%}{% set ns.x={'a': {}}%}{% set q %}x{% endset %}").unwrap();
        let expected = "{%- set a, b =( (1, '%}=') )|__bound -%}{% set ns.x=({'a': {}})|__bound_attribute %}{% set q %}x{% endset %}";
        assert_eq!(prepared, expected);
        assert_eq!(prepare("{% set x = %}").unwrap(), "{% set x = %}");
        assert_eq!(prepare("{% set x | default(a=1) %}y").unwrap(), "{% set x | default(a=1) %}y");
    }

    #[test]
    fn loops_refuse_none() {
        let prepared =
            prepare("{%- for k, v in d.items() if k in 'x' %}{% for x in [1 if a] recursive -%}{% for %}").unwrap();
        let expected = "{%- for k, v in( d.items() )|__iterable if k in 'x' %}\
                        {% for x in( [1 if a] )|__iterable recursive -%}{% for %}";
        assert_eq!(prepared, expected);
    }

    #[test]
    fn raw_comments_newlines_and_unclosed_tags_pass() {
        let source = "{% raw %}{% set a = 1 %}{{{% endraw %}{# {{ #}{% set b = 1 %}x\r\ny\rz{{ 'a";
        let expected = "{% raw %}{% set a = 1 %}{{{% endraw %}{# {{ #}{% set b =( 1 )|__bound %}x\ny\nz{{ 'a";
        assert_eq!(prepare(source).unwrap(), expected);
        assert_eq!(prepare("é{{ 'é' ~ é }}{%").unwrap(), "é{{ 'é' ~ é }}{%");
        assert_eq!(prepare("{% set x = 'a\\").unwrap(), "{% set x = 'a\\");
    }

    #[test]
    fn oversized_templates_are_refused() {
        assert!(prepare(&"x".repeat(MAX_BYTES + 1)).is_err());
        assert!(prepare(&format!("{{{{ 1{} }}}}", "+1".repeat(3000))).is_err());
        assert!(prepare(&format!("{{{{ 1{} }}}}", "|string".repeat(300))).is_err());
        assert!(prepare(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(2000))).is_err());
        assert!(prepare(&"{{ 1 + 1 }}".repeat(3000)).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_scanned(parts in proptest::collection::vec(
            proptest::sample::select(vec!["{%", "%}", "{{", "}}", "{#", "#}", "-", "set ", "for ", " in ", "if ", "raw", "endraw",
                "x", "é🙂", "=", "==", "'", "\"", "\\", "(", "]", "{", ".", "\r\n", "generation"]), 0..24)) {
            let source = parts.concat();
            let prepared = prepare(&source).unwrap();
            // Outside of tags nothing changes, and a filter is only ever added.
            proptest::prop_assert!(prepared.len() + 2 * parts.len() >= source.len());
            proptest::prop_assert_eq!(prepared.matches('é').count(), source.matches('é').count());
        }
    }
}
