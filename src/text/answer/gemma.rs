//! `call:f{key:value}` between marks, strings between marks of their own: FunctionGemma and Gemma 4.

use super::calls::{CallReader, Calls, Expect, Expected, MAX_NAME, Step, is_name};
use super::format::{Arguments, CallSyntax};
use super::json::{Scan, ValueScanner};
use super::loose::{LooseScanner, Notation};

pub(super) static FUNCTION_GEMMA: Notation = Notation { delimiter: Some("<escape>"), bare: true };

pub(super) static FUNCTION_GEMMA_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<start_function_call>"],
    before_name: "<start_function_call>call:",
    after_arguments: "<end_function_call>",
    arguments: Arguments::Gemma { delimiter: "<escape>" },
    marks: &["<escape>", "<end_function_call>"],
    ..CallSyntax::JSON
};

pub(super) static GEMMA: Notation = Notation { delimiter: Some("<|\"|>"), bare: true };

pub(super) static GEMMA_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<|tool_call>"],
    before_name: "<|tool_call>call:",
    after_arguments: "<tool_call|>",
    arguments: Arguments::Gemma { delimiter: "<|\"|>" },
    marks: &["<|\"|>", "<tool_call|>"],
    ..CallSyntax::JSON
};

/// Reads one call.
#[derive(Debug)]
pub(super) struct GemmaCall {
    close: &'static str,
    state: State,
    expect: Expect,
    name: String,
    arguments: LooseScanner,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Start,
    Name,
    Arguments,
    Close,
}

impl GemmaCall {
    pub fn new(notation: &'static Notation, close: &'static str) -> Self {
        Self {
            close,
            state: State::Start,
            expect: Expect::default(),
            name: String::new(),
            arguments: LooseScanner::new(notation),
        }
    }

    /// Expects `mark`.
    fn expect(&mut self, c: char, mark: &str, then: Step) -> Step {
        match self.expect.step(c, &[mark]) {
            Expected::More => Step::More,
            Expected::Mark(_) => then,
            Expected::Other => Step::Bad,
        }
    }
}

impl CallReader for GemmaCall {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match self.state {
            State::Start => {
                let step = self.expect(c, "call:", Step::Done);
                if step == Step::Done {
                    self.state = State::Name;
                    return Step::More;
                }
                step
            }
            State::Name if c == '{' => {
                let name = self.name.trim();
                if !is_name(name) {
                    return Step::Bad;
                }
                calls.begin(name, None);
                self.state = State::Arguments;
                self.step(c, calls)
            }
            State::Name if self.name.len() > MAX_NAME => Step::Bad,
            State::Name => {
                self.name.push(c);
                Step::More
            }
            State::Arguments => {
                let mut piece = String::new();
                let scan = self.arguments.step(c, &mut piece);
                calls.arguments(&piece);
                if !piece.is_empty() && self.arguments.has_left(scan) {
                    calls.raw.push(c);
                }
                match scan {
                    Scan::More => Step::More,
                    Scan::Last => {
                        calls.end();
                        self.state = State::Close;
                        Step::More
                    }
                    Scan::Past | Scan::Bad => Step::Bad,
                }
            }
            State::Close => self.expect(c, self.close, Step::Done),
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        self.state == State::Close
    }
}
