//! Mistral: `[TOOL_CALLS][{"name": "f", "arguments": {...}}]`, later `[TOOL_CALLS]f[ARGS]{...}`.

use super::calls::{CallReader, Calls, Expect, Expected, MAX_NAME, Step, Until, is_name};
use super::format::CallSyntax;
use super::object::{ArgumentsObject, CallObject};

/// Up to version 7 of the tokenizer.
pub(super) static ARRAY: CallSyntax = CallSyntax {
    openings: &["[TOOL_CALLS]"],
    open: "[TOOL_CALLS] [",
    before_name: "{\"name\": \"",
    after_name: "\", \"arguments\": ",
    after_arguments: "}",
    between: ", ",
    close: "]",
    ..CallSyntax::JSON
};

/// From version 11 on.
pub(super) static NAMED: CallSyntax = CallSyntax {
    openings: &["[TOOL_CALLS]"],
    marks: &["[ARGS]", "[CALL_ID]"],
    before_name: "[TOOL_CALLS]",
    after_name: "[ARGS]",
    ..CallSyntax::JSON
};

/// Reads either form.
#[derive(Debug)]
pub(super) struct Mistral {
    state: State,
    name: String,
    id: String,
}

#[derive(Debug)]
enum State {
    Start,
    /// An object of an array.
    Object(CallObject),
    NextObject,
    Name,
    AfterName(Expect),
    Id(Until),
    Arguments(ArgumentsObject),
}

impl Mistral {
    pub fn new() -> Self {
        Self { state: State::Start, name: String::new(), id: String::new() }
    }

    fn to(&mut self, state: State) -> Step {
        self.state = state;
        Step::More
    }

    fn begin(&mut self, c: char, calls: &mut Calls) -> Step {
        let name = self.name.trim();
        let id = Some(self.id.trim()).filter(|id| !id.is_empty());
        if !is_name(name) || !id.is_none_or(is_name) {
            return Step::Bad;
        }
        calls.begin(name, id);
        self.state = State::Arguments(ArgumentsObject::default());
        self.step(c, calls)
    }
}

impl CallReader for Mistral {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match &mut self.state {
            State::Start | State::NextObject if c.is_whitespace() => Step::More,
            State::Start if c == '[' => self.to(State::Object(CallObject::new(false))),
            State::Start => {
                self.state = State::Name;
                self.step(c, calls)
            }
            State::Object(object) => match object.step(c, calls) {
                Step::Done => self.to(State::NextObject),
                Step::Past => Step::Bad,
                other => other,
            },
            State::NextObject => match c {
                ',' => self.to(State::Object(CallObject::new(false))),
                ']' => Step::Done,
                _ => Step::Bad,
            },
            State::Name => match c {
                '{' => self.begin(c, calls),
                '[' => {
                    self.state = State::AfterName(Expect::default());
                    self.step(c, calls)
                }
                _ if self.name.len() > MAX_NAME => Step::Bad,
                _ => {
                    self.name.push(c);
                    Step::More
                }
            },
            State::AfterName(expect) => match expect.step(c, &["[ARGS]", "[CALL_ID]"]) {
                Expected::More if c == '{' => self.begin(c, calls),
                Expected::More => Step::More,
                Expected::Mark(0) => self.to(State::AfterName(Expect::default())),
                Expected::Mark(_) => self.to(State::Id(Until::new("[ARGS]"))),
                Expected::Other if c == '{' => self.begin(c, calls),
                Expected::Other => Step::Bad,
            },
            State::Id(until) => match until.step(c, &mut self.id) {
                true => self.to(State::AfterName(Expect::default())),
                false if self.id.len() > MAX_NAME => Step::Bad,
                false => Step::More,
            },
            State::Arguments(arguments) => arguments.step(c, calls),
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        match &self.state {
            State::NextObject => true,
            State::Object(object) => object.is_whole(),
            _ => false,
        }
    }
}
