//! A call as one JSON object: `{"name": "f", "arguments": {...}}`.

use super::calls::{Calls, MAX_NAME, Step, is_name};
use super::json::{JsonScanner, Scan, ValueScanner};

/// Reads one object. The arguments come out as they are written if the name came before them.
#[derive(Debug)]
pub(super) struct CallObject {
    /// Only an object that can be nothing else is a call: it has arguments, and no keys that calls have not.
    strict: bool,
    state: State,
    scanner: JsonScanner,
    /// The key or value that is being read, as far as it has not come out.
    text: String,
    name: Option<String>,
    /// Arguments that came before the name.
    waiting: Option<String>,
    whole: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Open,
    FirstKey,
    NextKey,
    Key,
    Colon(Field),
    Value(Field),
    Next,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Field {
    Name,
    Arguments,
    /// Arguments that are coming out.
    Streamed,
    Other,
}

impl CallObject {
    pub fn new(strict: bool) -> Self {
        Self {
            strict,
            state: State::Open,
            scanner: JsonScanner::default(),
            text: String::new(),
            name: None,
            waiting: None,
            whole: false,
        }
    }

    /// Whether the call is whole, and of the object nothing but its last brace is missing.
    pub fn is_whole(&self) -> bool {
        self.whole && self.state == State::Next
    }

    /// `Past` if the call is whole and `c` not of the object: its last brace is missing.
    pub fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match (self.state, c) {
            (State::Key, _) => self.key(c),
            (State::Value(field), _) => self.value(field, c, calls),
            (_, ' ' | '\t' | '\n' | '\r') => Step::More,
            (State::Open, '{') => self.to(State::FirstKey),
            (State::FirstKey | State::Next, '}') => self.close(calls),
            (State::FirstKey | State::NextKey, '"') => {
                self.begin_text();
                self.state = State::Key;
                self.key(c)
            }
            (State::Colon(field), ':') => {
                self.begin_text();
                self.to(State::Value(field))
            }
            (State::Next, ',') => self.to(State::NextKey),
            (State::Next, _) if self.whole => Step::Past,
            _ => Step::Bad,
        }
    }

    fn to(&mut self, state: State) -> Step {
        self.state = state;
        Step::More
    }

    fn begin_text(&mut self) {
        self.scanner = JsonScanner::default();
        self.text.clear();
    }

    fn key(&mut self, c: char) -> Step {
        match self.scanner.step(c, &mut self.text) {
            Scan::More if self.text.len() <= MAX_NAME => Step::More,
            Scan::Last => {
                let has_arguments = self.whole || self.waiting.is_some();
                let field = match serde_json::from_str::<String>(&self.text).as_deref() {
                    Ok("name") if self.name.is_none() => Field::Name,
                    Ok("arguments" | "parameters") if !has_arguments => Field::Arguments,
                    Ok("name" | "arguments" | "parameters") | Err(_) => return Step::Bad,
                    Ok(key) if self.strict && !matches!(key, "type" | "id") => return Step::Bad,
                    Ok(_) => Field::Other,
                };
                self.to(State::Colon(field))
            }
            _ => Step::Bad,
        }
    }

    fn value(&mut self, field: Field, c: char, calls: &mut Calls) -> Step {
        if self.scanner.is_idle() && matches!(c, ' ' | '\t' | '\n' | '\r') {
            return Step::More;
        }
        let scan = self.scanner.step(c, &mut self.text);
        match (scan, field) {
            (Scan::Bad, _) => return Step::Bad,
            (Scan::More | Scan::Last, Field::Streamed) => {
                calls.arguments(&self.text);
                self.text.clear();
            }
            (Scan::More, Field::Arguments) => {
                if let (Some(name), "{") = (&self.name, self.text.as_str()) {
                    calls.begin(name, None);
                    calls.arguments("{");
                    self.text.clear();
                    self.state = State::Value(Field::Streamed);
                }
            }
            (Scan::More, Field::Name) if self.text.len() > 2 * MAX_NAME => return Step::Bad,
            _ => {}
        }
        match scan {
            Scan::More => Step::More,
            scan => {
                self.state = State::Next;
                match self.end_value(field, calls) {
                    false => Step::Bad,
                    true if scan == Scan::Past => self.step(c, calls),
                    true => Step::More,
                }
            }
        }
    }

    /// Whether the value is one that its key may have.
    fn end_value(&mut self, field: Field, calls: &mut Calls) -> bool {
        match field {
            Field::Other => {}
            Field::Streamed => {
                calls.end();
                self.whole = true;
            }
            Field::Name => match serde_json::from_str::<String>(&self.text) {
                Ok(name) if is_name(&name) => self.name = Some(name),
                _ => return false,
            },
            Field::Arguments => match arguments(self.text.trim()) {
                Some(arguments) => self.waiting = Some(arguments),
                None => return false,
            },
        }
        if let (Some(name), Some(arguments)) = (&self.name, &self.waiting) {
            calls.whole(name, None, arguments);
            self.waiting = None;
            self.whole = true;
        }
        true
    }

    fn close(&mut self, calls: &mut Calls) -> Step {
        match &self.name {
            _ if self.whole => calls.raw.clear(),
            Some(name) if !self.strict => {
                calls.whole(name, None, "{}");
                self.whole = true;
            }
            _ => return Step::Bad,
        }
        Step::Done
    }
}

/// The arguments by themselves: an object that comes out as it is written.
#[derive(Debug, Default)]
pub(super) struct ArgumentsObject {
    scanner: JsonScanner,
    begun: bool,
}

impl ArgumentsObject {
    /// `Done` with the last brace, which ends the call.
    pub fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match c {
            c if !self.begun && c.is_whitespace() => return Step::More,
            '{' => self.begun = true,
            _ if !self.begun => return Step::Bad,
            _ => {}
        }
        let mut piece = String::new();
        let scan = self.scanner.step(c, &mut piece);
        calls.arguments(&piece);
        match scan {
            Scan::More => Step::More,
            Scan::Last => {
                calls.end();
                Step::Done
            }
            Scan::Past | Scan::Bad => Step::Bad,
        }
    }

    /// Whether the next character is one of a string.
    pub fn in_text(&self) -> bool {
        self.scanner.in_text()
    }

    /// Whether nothing of them was read.
    pub fn is_empty(&self) -> bool {
        !self.begun
    }
}

/// The text of the arguments: an object, or one as a string, or nothing.
fn arguments(text: &str) -> Option<String> {
    match text.chars().next()? {
        '{' => Some(text.to_owned()),
        'n' => Some("{}".to_owned()),
        '"' => {
            let inner: String = serde_json::from_str(text).ok()?;
            serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&inner).ok()?;
            Some(inner)
        }
        _ => None,
    }
}
