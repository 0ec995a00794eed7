//! Notations that are nearly JSON, Python's literals and Gemma's, turned into JSON one character at a time.

use super::calls::Until;
use super::json::{CodeUnits, MAX_DEPTH, Scan, ValueScanner, escape_into, quoted};

/// Longest number or word without quotes, in bytes.
const MAX_WORD: usize = 256;

/// What tells the notations apart.
#[derive(Debug)]
pub(super) struct Notation {
    /// A mark on both sides of strings in which nothing is escaped.
    pub delimiter: Option<&'static str>,
    /// Keys, and strings that look like nothing else, need no quotes.
    pub bare: bool,
}

/// `{'a': [1, True, None]}`.
pub(super) static PYTHON: Notation = Notation { delimiter: None, bare: false };

/// Scans one value.
#[derive(Debug, Clone)]
pub(super) struct LooseScanner {
    notation: &'static Notation,
    /// The closing bracket of each open container.
    open: Vec<char>,
    state: State,
    /// A comma is written only once another item comes.
    comma: bool,
    word: String,
    surrogates: CodeUnits,
}

#[derive(Debug, Clone)]
enum State {
    /// A value, or the end of the container.
    Value,
    /// A key, or the end of the container.
    Key,
    Colon,
    Next,
    Text {
        quote: char,
        key: bool,
    },
    Escape {
        quote: char,
        key: bool,
    },
    /// Digits of a code point: how many are missing, and its value so far.
    Code {
        quote: char,
        key: bool,
        left: u8,
        value: u32,
    },
    Delimited {
        end: Until,
        key: bool,
    },
    /// The beginning of a delimiter, or of a word.
    Word {
        key: bool,
    },
}

impl ValueScanner for LooseScanner {
    fn step(&mut self, c: char, out: &mut String) -> Scan {
        match self.state.clone() {
            State::Text { quote, key } => self.text(c, quote, key, out),
            State::Escape { quote, key } => self.escape(c, quote, key, out),
            State::Code { quote, key, left, value } => match c.to_digit(16) {
                None => Scan::Bad,
                Some(digit) if left > 1 => {
                    self.to(State::Code { quote, key, left: left - 1, value: value << 4 | digit })
                }
                Some(digit) => {
                    self.code(value << 4 | digit, out);
                    self.to(State::Text { quote, key })
                }
            },
            State::Delimited { mut end, key } => {
                let mut piece = String::new();
                let ended = end.step(c, &mut piece);
                piece.chars().for_each(|c| escape_into(c, out));
                self.state = State::Delimited { end, key };
                if ended { self.end_text(key, out) } else { Scan::More }
            }
            State::Word { key } => self.word(c, key, out),
            _ if c.is_whitespace() => Scan::More,
            // After a colon a value must come.
            State::Value if c != '}' && Some(&c) == self.open.last() => self.close(out),
            State::Value => self.begin(c, out),
            State::Key if c == '}' => self.close(out),
            State::Key if matches!(c, '"' | '\'') => {
                self.item(out);
                out.push('"');
                self.to(State::Text { quote: c, key: true })
            }
            State::Key if self.notation.bare => {
                self.word.clear();
                self.state = State::Word { key: true };
                self.word(c, true, out)
            }
            State::Colon if c == ':' => {
                out.push_str(": ");
                self.to(State::Value)
            }
            State::Key | State::Colon => Scan::Bad,
            State::Next => match c {
                ',' if !self.open.is_empty() => {
                    self.comma = true;
                    let in_object = self.open.last() == Some(&'}');
                    self.to(if in_object { State::Key } else { State::Value })
                }
                c if Some(&c) == self.open.last() => self.close(out),
                _ => Scan::Bad,
            },
        }
    }
}

impl LooseScanner {
    pub fn new(notation: &'static Notation) -> Self {
        Self {
            notation,
            open: Vec::new(),
            state: State::Value,
            comma: false,
            word: String::new(),
            surrogates: CodeUnits::default(),
        }
    }

    /// With a piece that has come out: whether the last character only ended a word of it and has not come out itself.
    pub fn has_left(&self, scan: Scan) -> bool {
        self.comma || matches!(scan, Scan::Past | Scan::Bad)
    }

    fn to(&mut self, state: State) -> Scan {
        self.state = state;
        Scan::More
    }

    /// An item begins: writes the comma before it.
    fn item(&mut self, out: &mut String) {
        if std::mem::take(&mut self.comma) {
            out.push_str(", ");
        }
    }

    fn begin(&mut self, c: char, out: &mut String) -> Scan {
        match c {
            '{' | '[' | '(' if self.open.len() == MAX_DEPTH => return Scan::Bad,
            '(' if self.notation.bare => return Scan::Bad,
            ',' | ':' | ']' | '}' | ')' => return Scan::Bad,
            _ => {}
        }
        match c {
            '{' => {
                self.item(out);
                out.push('{');
                self.open.push('}');
                self.to(State::Key)
            }
            '[' | '(' => {
                self.item(out);
                out.push('[');
                self.open.push(if c == '[' { ']' } else { ')' });
                self.to(State::Value)
            }
            '"' | '\'' => {
                self.item(out);
                out.push('"');
                self.to(State::Text { quote: c, key: false })
            }
            _ => {
                self.word.clear();
                self.state = State::Word { key: false };
                self.word(c, false, out)
            }
        }
    }

    fn close(&mut self, out: &mut String) -> Scan {
        self.comma = false;
        out.push(if self.open.pop() == Some('}') { '}' } else { ']' });
        self.end_value()
    }

    fn end_value(&mut self) -> Scan {
        self.state = State::Next;
        if self.open.is_empty() { Scan::Last } else { Scan::More }
    }

    fn end_text(&mut self, key: bool, out: &mut String) -> Scan {
        out.push('"');
        if key { self.to(State::Colon) } else { self.end_value() }
    }

    fn text(&mut self, c: char, quote: char, key: bool, out: &mut String) -> Scan {
        if c == '\\' {
            return self.to(State::Escape { quote, key });
        }
        self.surrogates.end(out);
        match c {
            c if c == quote => self.end_text(key, out),
            c => {
                escape_into(c, out);
                Scan::More
            }
        }
    }

    fn escape(&mut self, c: char, quote: char, key: bool, out: &mut String) -> Scan {
        let digits = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        if digits > 0 {
            return self.to(State::Code { quote, key, left: digits, value: 0 });
        }
        self.surrogates.end(out);
        match c {
            'n' => out.push_str("\\n"),
            't' => out.push_str("\\t"),
            'r' => out.push_str("\\r"),
            'b' => out.push_str("\\b"),
            'f' => out.push_str("\\f"),
            '\n' => {}
            '\\' | '\'' | '"' | '/' => escape_into(c, out),
            // Python keeps the backslash of what is no escape.
            c => {
                out.push_str("\\\\");
                escape_into(c, out);
            }
        }
        self.to(State::Text { quote, key })
    }

    fn code(&mut self, code: u32, out: &mut String) {
        match u16::try_from(code) {
            Ok(unit) => self.surrogates.push(unit, out),
            Err(_) => {
                self.surrogates.end(out);
                escape_into(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), out);
            }
        }
    }

    /// A delimiter, a key, a number, `true` and its like, or a string without quotes.
    fn word(&mut self, c: char, key: bool, out: &mut String) -> Scan {
        let bare_text = self.notation.bare && !key;
        let ends = |c: char| match c {
            ',' | '}' | ']' => true,
            ':' | '{' | '[' | '(' | ')' | '"' | '\'' => !bare_text,
            _ => false,
        };
        let in_delimiter = |word: &str| self.notation.delimiter.is_some_and(|mark| mark.starts_with(word));
        let mut grown = self.word.clone();
        grown.push(c);
        if in_delimiter(&grown) {
            self.word = grown;
            if self.notation.delimiter == Some(self.word.as_str()) {
                self.item(out);
                out.push('"');
                let end = Until::new(self.notation.delimiter.unwrap_or_default());
                return self.to(State::Delimited { end, key });
            }
            return Scan::More;
        }
        if !ends(c) && (bare_text || !c.is_whitespace()) {
            self.word = grown;
            return if self.word.len() > MAX_WORD { Scan::Bad } else { Scan::More };
        }
        self.end_word(c, key, out)
    }

    /// The word has ended before `c`.
    fn end_word(&mut self, c: char, key: bool, out: &mut String) -> Scan {
        let word = std::mem::take(&mut self.word);
        let word = word.trim();
        if word.is_empty() {
            return Scan::Bad;
        }
        let json = match word {
            _ if key => quoted(word),
            "True" | "true" => "true".to_owned(),
            "False" | "false" => "false".to_owned(),
            "None" | "null" => "null".to_owned(),
            word if serde_json::from_str::<serde_json::Number>(word).is_ok() => word.to_owned(),
            word if self.notation.bare => quoted(word),
            _ => return Scan::Bad,
        };
        self.item(out);
        out.push_str(&json);
        self.state = if key { State::Colon } else { State::Next };
        if !key && self.open.is_empty() {
            return Scan::Past;
        }
        self.step(c, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(notation: &'static Notation, text: &str) -> Option<String> {
        let (mut scanner, mut out) = (LooseScanner::new(notation), String::new());
        let last = text.chars().map(|c| scanner.step(c, &mut out)).find(|scan| *scan != Scan::More);
        matches!(last, Some(Scan::Last | Scan::Past)).then_some(out)
    }

    #[test]
    fn python_literals() {
        for (python, expected) in [
            ("[1, -2.5e3,]", "[1, -2.5e3]"),
            ("{'a': \"b'\", \"c\": ('x',), }", "{\"a\": \"b'\", \"c\": [\"x\"]}"),
            ("{}", "{}"),
            ("()", "[]"),
            ("'it\\'s \\x41\\u00e9\\U0001F642 \\d \"q\"\n'", "\"it's Aé🙂 \\\\d \\\"q\\\"\\n\""),
            ("'\\ud83d\\ude00\\ud83d\\n\\ud83d\\x41\\ude00\\ud83d'", "\"😀\u{fffd}\\n\u{fffd}A\u{fffd}\u{fffd}\""),
            ("True ", "true"),
            ("None,", "null"),
            ("7)", "7"),
        ] {
            let out = json(&PYTHON, python).unwrap_or_else(|| panic!("{python}"));
            assert_eq!(out, expected);
            serde_json::from_str::<serde_json::Value>(&out).unwrap();
        }
        for bad in ["[1 2]", "{1: 2}", "name ", "[,]", "{'a' 1}", "(]", "'\\xg0'", "01 ", "--1 "] {
            assert_eq!(json(&PYTHON, bad), None, "{bad}");
        }
        assert_eq!(json(&PYTHON, &"[".repeat(MAX_DEPTH + 1)), None);
    }

    #[test]
    fn delimited_strings_hold_anything() {
        static GEMMA: Notation = Notation { delimiter: Some("<q>"), bare: true };
        for (text, expected) in [
            ("{a:<q>x\"}\\,<q>,b:[1,true,<q><q>]}", "{\"a\": \"x\\\"}\\\\,\", \"b\": [1, true, \"\"]}"),
            ("{<q>a b<q>:{c:two words,d:<<}}", "{\"a b\": {\"c\": \"two words\", \"d\": \"<<\"}}"),
            ("{a:\"j\\n\"}", "{\"a\": \"j\\n\"}"),
            (
                "{time:10:30,text:it's (so) \"fine\",l:[x:y]}",
                "{\"time\": \"10:30\", \"text\": \"it's (so) \\\"fine\\\"\", \"l\": [\"x:y\"]}",
            ),
        ] {
            assert_eq!(json(&GEMMA, text).as_deref(), Some(expected), "{text}");
        }
        for bad in ["{a}", "{:1}", "{a:}", "(1)"] {
            assert_eq!(json(&GEMMA, bad), None, "{bad}");
        }
    }
}
