//! `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: Hermes, Qwen and many others.

use super::calls::{CallReader, Calls, Expect, Expected, Step};
use super::format::CallSyntax;
use super::object::CallObject;

pub(super) static SYNTAX: CallSyntax = CallSyntax {
    openings: &["<tool_call>"],
    before_name: "<tool_call>\n{\"name\": \"",
    after_name: "\", \"arguments\": ",
    after_arguments: "}\n</tool_call>",
    between: "\n",
    ..CallSyntax::JSON
};

const CLOSE: &str = "</tool_call>";

/// Reads one block; some models put several objects into it.
#[derive(Debug)]
pub(super) struct Hermes {
    object: Option<CallObject>,
    close: Expect,
}

impl Hermes {
    pub fn new() -> Self {
        Self { object: Some(CallObject::new(false)), close: Expect::default() }
    }
}

impl CallReader for Hermes {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        if let Some(object) = &mut self.object {
            match object.step(c, calls) {
                Step::Done => self.object = None,
                Step::Past => {
                    self.object = None;
                    return self.step(c, calls);
                }
                other => return other,
            }
            return Step::More;
        }
        if c == '{' && self.close.is_idle() {
            self.object = Some(CallObject::new(false));
            return self.step(c, calls);
        }
        match self.close.step(c, &[CLOSE]) {
            Expected::More => Step::More,
            Expected::Mark(_) => Step::Done,
            Expected::Other => Step::Bad,
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        self.object.as_ref().is_none_or(CallObject::is_whole)
    }
}
