//! Calls as Python writes them: `[f(a=1), g(b="x")]`: Llama 4, LFM2, and Gemma 3 in a fenced block.

use super::calls::{CallReader, Calls, Expect, Expected, MAX_NAME, Step, is_name};
use super::format::{Arguments, CallSyntax};
use super::json::{Scan, ValueScanner, quoted};
use super::loose::{LooseScanner, PYTHON};

/// Llama 3.2 and 4.
pub(super) static SYNTAX: CallSyntax = CallSyntax {
    openings: &["<|python_start|>"],
    starts: &['['],
    open: "[",
    after_name: "(",
    after_arguments: ")",
    between: ", ",
    close: "]",
    marks: &["<|python_end|>"],
    arguments: Arguments::Python,
    ..CallSyntax::JSON
};

/// LFM2.
pub(super) static LFM2_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<|tool_call_start|>"],
    starts: &[],
    open: "<|tool_call_start|>[",
    close: "]<|tool_call_end|>",
    marks: &["<|tool_call_end|>"],
    ..SYNTAX_BASE
};

/// Gemma 3, whose template knows no tools; this is what its makers recommend to ask for.
pub(super) static FENCED_SYNTAX: CallSyntax = CallSyntax {
    openings: &["```tool_code"],
    starts: &[],
    open: "```tool_code\n",
    between: "\n",
    close: "\n```",
    marks: &[],
    ..SYNTAX_BASE
};

const SYNTAX_BASE: CallSyntax = CallSyntax {
    after_name: "(",
    after_arguments: ")",
    between: ", ",
    arguments: Arguments::Python,
    ..CallSyntax::JSON
};

/// Reads a list of calls.
#[derive(Debug)]
pub(super) struct Pythonic {
    /// Whether the calls stand in brackets.
    list: bool,
    /// What ends the block, if anything does.
    close: Option<&'static str>,
    state: State,
    expect: Expect,
    name: String,
    key: String,
    value: LooseScanner,
    /// Arguments of the call so far.
    count: usize,
    calls: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Start,
    /// Before a call.
    Item,
    Name,
    /// Before a key or the closing parenthesis.
    Argument,
    Key,
    Value,
    AfterValue,
    AfterCall,
    Close,
}

impl Pythonic {
    pub fn new(list: bool, close: Option<&'static str>) -> Self {
        Self {
            list,
            close,
            state: if list { State::Start } else { State::Item },
            expect: Expect::default(),
            name: String::new(),
            key: String::new(),
            value: LooseScanner::new(&PYTHON),
            count: 0,
            calls: 0,
        }
    }

    fn to(&mut self, state: State) -> Step {
        self.state = state;
        Step::More
    }

    fn item(&mut self, c: char) -> Step {
        if !c.is_alphabetic() && c != '_' {
            return Step::Bad;
        }
        self.name.clear();
        self.name.push(c);
        self.to(State::Name)
    }

    fn name(&mut self, c: char) -> Step {
        match c {
            '(' if is_name(self.name.trim_end()) => {
                self.count = 0;
                self.to(State::Argument)
            }
            c if self.name.len() < MAX_NAME && (c.is_alphanumeric() || "_.- ".contains(c)) => {
                self.name.push(c);
                Step::More
            }
            _ => Step::Bad,
        }
    }

    fn argument(&mut self, c: char, calls: &mut Calls) -> Step {
        match c {
            ')' => {
                if self.count == 0 {
                    calls.begin(self.name.trim_end(), None);
                    calls.arguments("{}");
                } else {
                    calls.arguments("}");
                }
                calls.end();
                self.calls += 1;
                self.to(State::AfterCall)
            }
            c if c.is_alphabetic() || c == '_' => {
                self.key.clear();
                self.key.push(c);
                self.to(State::Key)
            }
            _ => Step::Bad,
        }
    }

    fn key(&mut self, c: char) -> Step {
        match c {
            '=' => {
                self.value = LooseScanner::new(&PYTHON);
                self.to(State::Value)
            }
            c if self.key.len() < MAX_NAME && (c.is_alphanumeric() || "_ ".contains(c)) => {
                self.key.push(c);
                Step::More
            }
            _ => Step::Bad,
        }
    }

    fn value(&mut self, c: char, calls: &mut Calls) -> Step {
        let mut piece = String::new();
        let scan = self.value.step(c, &mut piece);
        if !piece.is_empty() && !self.key.is_empty() {
            if self.count == 0 {
                // Not earlier: `[f(a=b)]` may be text.
                calls.begin(self.name.trim_end(), None);
            }
            let start = if self.count == 0 { "{" } else { ", " };
            piece = format!("{start}{}: {piece}", quoted(self.key.trim_end()));
            self.key.clear();
            self.count += 1;
        }
        calls.arguments(&piece);
        if !piece.is_empty() && self.value.has_left(scan) {
            calls.raw.push(c);
        }
        match scan {
            Scan::More => Step::More,
            Scan::Last => self.to(State::AfterValue),
            Scan::Past => {
                self.state = State::AfterValue;
                self.step(c, calls)
            }
            Scan::Bad => Step::Bad,
        }
    }

    fn after_call(&mut self, c: char) -> Step {
        match (c, self.list, self.close) {
            (',', true, _) => self.to(State::Item),
            (']', true, None) => Step::Done,
            (']', true, Some(_)) => self.to(State::Close),
            ('`', false, _) => self.close(c),
            (_, false, _) => self.item(c),
            _ => Step::Bad,
        }
    }

    fn close(&mut self, c: char) -> Step {
        self.state = State::Close;
        match self.expect.step(c, self.close.as_slice()) {
            Expected::More => Step::More,
            Expected::Mark(_) => Step::Done,
            Expected::Other => Step::Bad,
        }
    }
}

impl CallReader for Pythonic {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match self.state {
            State::Name => self.name(c),
            State::Key => self.key(c),
            State::Value => self.value(c, calls),
            State::Close => self.close(c),
            _ if c.is_whitespace() => Step::More,
            State::Start if c == '[' => self.to(State::Item),
            State::Start => Step::Bad,
            State::Item => self.item(c),
            State::Argument => self.argument(c, calls),
            State::AfterValue => match c {
                ',' => self.to(State::Argument),
                ')' => self.argument(c, calls),
                _ => Step::Bad,
            },
            State::AfterCall => self.after_call(c),
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        matches!(self.state, State::AfterCall | State::Close)
    }
}
