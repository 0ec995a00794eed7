//! Llama 3: `{"name": "f", "parameters": {...}}`, with or without `<|python_tag|>` before it.

use super::calls::{CallReader, Calls, Step};
use super::format::CallSyntax;
use super::object::CallObject;

pub(super) static SYNTAX: CallSyntax = CallSyntax {
    openings: &["<|python_tag|>"],
    starts: &['{', '['],
    before_name: "{\"name\": \"",
    after_name: "\", \"parameters\": ",
    after_arguments: "}",
    between: "; ",
    ..CallSyntax::JSON
};

/// Reads objects one after the other. Without a mark an object must be a call and nothing else.
#[derive(Debug)]
pub(super) struct Llama {
    object: Option<CallObject>,
}

impl Llama {
    pub fn new() -> Self {
        Self { object: Some(CallObject::new(true)) }
    }
}

impl CallReader for Llama {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match (&mut self.object, c) {
            (Some(object), _) => match object.step(c, calls) {
                Step::Done => {
                    self.object = None;
                    Step::More
                }
                Step::Past => Step::Bad,
                other => other,
            },
            (None, '{') => {
                self.object = Some(CallObject::new(true));
                self.step(c, calls)
            }
            (None, ';' | ',') => Step::More,
            (None, c) if c.is_whitespace() => Step::More,
            (None, _) => Step::Past,
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        self.object.as_ref().is_none_or(CallObject::is_whole)
    }
}
