//! JSON, one character at a time: checks it, and says where a value ends.

/// Deepest nesting of arguments; what nests deeper is malformed.
pub(super) const MAX_DEPTH: usize = 100;

/// Longest number, in bytes: short enough that one without an exponent is in range.
const MAX_NUMBER: usize = 256;

/// What a character was to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scan {
    /// A part of it.
    More,
    /// Its last character.
    Last,
    /// Nothing: the value ended before.
    Past,
    /// What no value can have there.
    Bad,
}

/// Turns the text of a value into JSON text, one character at a time.
pub(super) trait ValueScanner {
    /// Takes the next character and adds to `out` what is now certain.
    fn step(&mut self, c: char, out: &mut String) -> Scan;
}

/// Scans one JSON value. The text passes through as it is, but for what models write and JSON forbids in strings: bare control
/// characters become escapes, and lone surrogates U+FFFD.
#[derive(Debug, Clone, Default)]
pub(super) struct JsonScanner {
    /// Whether each open container is an object.
    open: Vec<bool>,
    state: State,
    /// An escape or an exponent, which comes out as a whole.
    held: String,
    number: String,
    surrogates: CodeUnits,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum State {
    #[default]
    Value,
    /// After `[`: a value or the end.
    FirstItem,
    /// After `{`: a key or the end.
    FirstKey,
    Key,
    Colon,
    /// After a value: a comma or the end.
    Next,
    Text {
        key: bool,
    },
    Escape {
        key: bool,
    },
    Hex {
        key: bool,
        left: u8,
    },
    Number(Number),
    /// What is left of `true`, `false` or `null`.
    Word(&'static str),
}

/// Where in a number the scanner is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Number {
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

impl Number {
    fn next(self, c: char) -> Option<Self> {
        Some(match (self, c) {
            (Self::Minus, '0') => Self::Zero,
            (Self::Minus, '1'..='9') | (Self::Digits, '0'..='9') => Self::Digits,
            (Self::Zero | Self::Digits, '.') => Self::Point,
            (Self::Point | Self::Fraction, '0'..='9') => Self::Fraction,
            (Self::Zero | Self::Digits | Self::Fraction, 'e' | 'E') => Self::Exponent,
            (Self::Exponent, '+' | '-') => Self::Sign,
            (Self::Exponent | Self::Sign | Self::Power, '0'..='9') => Self::Power,
            _ => return None,
        })
    }

    fn may_end(self) -> bool {
        matches!(self, Self::Zero | Self::Digits | Self::Fraction | Self::Power)
    }

    fn in_exponent(self) -> bool {
        matches!(self, Self::Exponent | Self::Sign | Self::Power)
    }
}

impl ValueScanner for JsonScanner {
    fn step(&mut self, c: char, out: &mut String) -> Scan {
        let before = self.state;
        let scan = self.advance(c);
        match (before, self.state, scan) {
            (_, _, Scan::Bad) => {}
            (_, State::Escape { .. } | State::Hex { .. }, _) => self.held.push(c),
            (_, State::Number(number), Scan::More) if number.in_exponent() => self.held.push(c),
            (State::Escape { .. } | State::Hex { .. }, ..) => {
                self.held.push(c);
                self.end_escape(out);
            }
            (_, state, _) => {
                self.surrogates.end(out);
                out.push_str(&std::mem::take(&mut self.held));
                match state {
                    _ if scan == Scan::Past => {}
                    State::Text { .. } if c < ' ' => escape_into(c, out),
                    _ => out.push(c),
                }
            }
        }
        scan
    }
}

impl JsonScanner {
    /// Whether nothing but white space has come.
    pub fn is_idle(&self) -> bool {
        self.state == State::Value && self.open.is_empty()
    }

    /// Whether the next character is one of a string.
    pub fn in_text(&self) -> bool {
        matches!(self.state, State::Text { .. })
    }

    fn end_escape(&mut self, out: &mut String) {
        let escape = std::mem::take(&mut self.held);
        match escape.strip_prefix("\\u").map(|digits| u16::from_str_radix(digits, 16)) {
            Some(Ok(unit @ 0xd800..=0xdfff)) => self.surrogates.push(unit, out),
            _ => {
                self.surrogates.end(out);
                out.push_str(&escape);
            }
        }
    }

    fn advance(&mut self, c: char) -> Scan {
        match self.state {
            State::Text { key } => self.text(c, key),
            State::Escape { key } => match c {
                'u' => self.to(State::Hex { key, left: 4 }),
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => self.to(State::Text { key }),
                _ => Scan::Bad,
            },
            State::Hex { key, left } if c.is_ascii_hexdigit() => {
                self.to(if left == 1 { State::Text { key } } else { State::Hex { key, left: left - 1 } })
            }
            State::Hex { .. } => Scan::Bad,
            State::Number(number) => match number.next(c) {
                Some(_) if self.number.len() == MAX_NUMBER => Scan::Bad,
                Some(next) => {
                    self.number.push(c);
                    self.to(State::Number(next))
                }
                None if !number.may_end() => Scan::Bad,
                // Out of range: nobody could read the arguments.
                None if serde_json::from_str::<serde_json::Number>(&self.number).is_err() => Scan::Bad,
                None if self.open.is_empty() => Scan::Past,
                None => {
                    self.state = State::Next;
                    self.advance(c)
                }
            },
            State::Word(left) => match left.strip_prefix(c) {
                Some("") => self.close_value(),
                Some(left) => self.to(State::Word(left)),
                None => Scan::Bad,
            },
            _ if matches!(c, ' ' | '\t' | '\n' | '\r') => Scan::More,
            State::Value => self.begin(c),
            State::FirstItem if c == ']' => self.close(),
            State::FirstItem => self.begin(c),
            State::FirstKey if c == '}' => self.close(),
            State::FirstKey | State::Key if c == '"' => self.to(State::Text { key: true }),
            State::FirstKey | State::Key => Scan::Bad,
            State::Colon if c == ':' => self.to(State::Value),
            State::Colon => Scan::Bad,
            State::Next => match (c, self.open.last()) {
                (',', Some(true)) => self.to(State::Key),
                (',', Some(false)) => self.to(State::Value),
                ('}', Some(true)) | (']', Some(false)) => self.close(),
                _ => Scan::Bad,
            },
        }
    }

    fn to(&mut self, state: State) -> Scan {
        self.state = state;
        Scan::More
    }

    fn begin(&mut self, c: char) -> Scan {
        self.number.clear();
        self.number.push(c);
        match c {
            '{' | '[' if self.open.len() == MAX_DEPTH => Scan::Bad,
            '{' => {
                self.open.push(true);
                self.to(State::FirstKey)
            }
            '[' => {
                self.open.push(false);
                self.to(State::FirstItem)
            }
            '"' => self.to(State::Text { key: false }),
            't' => self.to(State::Word("rue")),
            'f' => self.to(State::Word("alse")),
            'n' => self.to(State::Word("ull")),
            '-' => self.to(State::Number(Number::Minus)),
            '0' => self.to(State::Number(Number::Zero)),
            '1'..='9' => self.to(State::Number(Number::Digits)),
            _ => Scan::Bad,
        }
    }

    fn text(&mut self, c: char, key: bool) -> Scan {
        match (c, key) {
            ('\\', _) => self.to(State::Escape { key }),
            ('"', true) => self.to(State::Colon),
            ('"', false) => self.close_value(),
            _ => Scan::More,
        }
    }

    fn close(&mut self) -> Scan {
        self.open.pop();
        self.close_value()
    }

    fn close_value(&mut self) -> Scan {
        self.state = State::Next;
        if self.open.is_empty() { Scan::Last } else { Scan::More }
    }
}

/// Code units of UTF-16, as escapes write them: a high surrogate waits for its low one, and a lone one becomes U+FFFD.
#[derive(Debug, Clone, Default)]
pub(super) struct CodeUnits(Vec<u16>);

impl CodeUnits {
    pub fn push(&mut self, unit: u16, out: &mut String) {
        self.0.push(unit);
        if !matches!(unit, 0xd800..=0xdbff) {
            self.end(out);
        }
    }

    /// No other unit follows.
    pub fn end(&mut self, out: &mut String) {
        let chars = char::decode_utf16(self.0.drain(..));
        chars.for_each(|c| escape_into(c.unwrap_or(char::REPLACEMENT_CHARACTER), out));
    }
}

/// Adds `c` as it stands in a JSON string.
pub(super) fn escape_into(c: char, out: &mut String) {
    match c {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
        c => out.push(c),
    }
}

/// `text` as a JSON string.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    text.chars().for_each(|c| escape_into(c, &mut out));
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The bytes of the first value, if `text` begins with one, and what passed through.
    fn scan(text: &str) -> Option<(usize, String)> {
        let (mut scanner, mut out) = (JsonScanner::default(), String::new());
        for (at, c) in text.char_indices() {
            match scanner.step(c, &mut out) {
                Scan::More => {}
                Scan::Last => return Some((at + c.len_utf8(), out)),
                Scan::Past => return Some((at, out)),
                Scan::Bad => return None,
            }
        }
        None
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(scan(&nested(MAX_DEPTH)).is_some());
        assert!(scan(&nested(MAX_DEPTH + 1)).is_none());
    }

    #[test]
    fn control_characters_in_strings_are_escaped() {
        let (_, out) = scan("{\"a\n\": \"\t\u{1}\"}").unwrap();
        assert_eq!(out, "{\"a\\n\": \"\\t\\u0001\"}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["a\n"], "\t\u{1}");
    }

    #[test]
    fn surrogates_come_in_pairs() {
        for (text, expected) in [
            (r#""\ud83d\ude00""#, Some("\"😀\"")),
            (r#""\ud83d""#, Some("\"\u{fffd}\"")),
            (r#""\ude00 \u00e9""#, Some("\"\u{fffd} \\u00e9\"")),
            (r#""\ud83d\ud83d\ude00""#, Some("\"\u{fffd}😀\"")),
            (r#"{"\ud83dx": "\ud83d\n\ud83d\u0041"}"#, Some("{\"\u{fffd}x\": \"\u{fffd}\\n\u{fffd}\\u0041\"}")),
            (r#""\ud83d\x""#, None),
        ] {
            assert_eq!(scan(text).map(|(_, out)| out).as_deref(), expected, "{text}");
        }
        // Neither half comes out before it is known what it is.
        let (mut scanner, mut out) = (JsonScanner::default(), String::new());
        r#""a\ud83d\ude0"#.chars().for_each(|c| assert_eq!(scanner.step(c, &mut out), Scan::More));
        assert_eq!(out, "\"a");
    }

    #[test]
    fn numbers_out_of_range_are_none() {
        assert_eq!(scan("[1e30, -2]").map(|(_, out)| out).as_deref(), Some("[1e30, -2]"));
        assert_eq!(scan("[1e999]"), None);
        assert_eq!(scan("1e999 "), None);
        assert_eq!(scan(&("9".repeat(256) + " ")).map(|(end, _)| end), Some(256));
        assert_eq!(scan(&("9".repeat(257) + " ")), None);
    }

    proptest! {
        #[test]
        fn escapes_become_what_serde_takes(text in "\"(\\\\u(d8|dc|00)[0-9]{2}|\\\\n|x){0,6}\"") {
            let (_, out) = scan(&text).unwrap();
            prop_assert!(serde_json::from_str::<String>(&out).is_ok(), "{}", out);
        }

        #[test]
        fn agrees_with_serde_on_what_is_json(text in "[\\[\\]{}:,\"a0-2.eE+\\-\\\\ \ntrufalsn]{0,24}") {
            // A space ends a number.
            let text = text + " ";
            let mut values = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
            let expected = values.next().and_then(Result::ok).map(|_| values.byte_offset());
            let ours = scan(&text).filter(|(end, _)| text[..*end].trim_start() == &text[..*end] || *end > 0);
            match (ours, expected) {
                // serde stops before what it cannot be followed by; a value of ours that ends there is the same.
                (Some((end, _)), Some(byte)) => prop_assert_eq!(end, byte),
                (None, Some(byte)) => prop_assert!(false, "missed {:?}", &text[..byte]),
                (Some((end, out)), None) => {
                    let found = serde_json::from_str::<serde_json::Value>(&out);
                    // Bare control characters are the difference.
                    prop_assert!(found.is_ok(), "{:?}", &text[..end]);
                }
                (None, None) => {}
            }
        }
    }
}
