//! What the text of an answer means: text for the user, reasoning, tool calls.
//!
//! [`AnswerFormat::detect`] decides once per model how it marks them; an [`AnswerParser`] reads the answer of one sequence,
//! character by character, so that what comes out does not depend on how the text was cut into pieces:
//!
//! ```text
//! text ──▶ Flow (marks of reasoning and calls) ──▶ a CallReader for each block of calls ──▶ AnswerPart
//!          or Harmony (messages in channels)
//! ```
//!
//! Arguments come out as JSON text as soon as they are certain. What is malformed or cut off comes out as text, with a
//! warning in the log: all of it if its call has not begun, else the rest. Time is linear in the text: what was taken for a
//! call is read a second time as text, and never a third.
//!
//! A new format is a file with a [`CallSyntax`] and a `CallReader`, and its lines in `format.rs`.

mod calls;
mod flow;
mod format;
mod gemma;
mod harmony;
mod hermes;
mod ids;
mod json;
mod llama;
mod loose;
mod mistral;
mod object;
mod parts;
mod pythonic;
mod schema;
mod sections;
mod tags;

use std::sync::Arc;

use serde_json::Value;

pub use format::{AnswerFormat, Arguments, CallSyntax, ReasoningSyntax, ToolFormat};
pub use parts::AnswerPart;
pub use schema::ArgumentType;

use calls::Calls;
use flow::Flow;
use harmony::Harmony;
use ids::{CallIds, IdStyle};
use schema::ToolTypes;

/// What a grammar has an answer be, as far as that tells calls from other text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AnswerShape {
    /// There is none.
    #[default]
    Free,
    /// Calls, whose values have their declared types.
    Calls,
    /// The same, behind an opening with which the answer begins; else all of it is text.
    CallsOrText,
}

/// What parsers of the answers to one request share.
#[derive(Debug, Clone)]
pub struct AnswerSettings {
    format: AnswerFormat,
    /// Absent if calls shall stay text.
    tools: Option<Arc<ToolTypes>>,
    /// The prompt ends with the opening of reasoning.
    thinks: bool,
    /// The beginning of the message that the prompt ends with, where that matters.
    start: String,
    shape: AnswerShape,
}

impl AnswerSettings {
    /// For answers to `prompt`, the rendered chat; `tools` are the definitions that the model was given, if calls are wanted.
    pub fn new(format: AnswerFormat, tools: Option<&Value>, prompt: &str) -> Self {
        let end = prompt.trim_end();
        // Without a budget Seed's template lets reasoning begin with a note about that.
        let end = end.strip_suffix("<seed:cot_budget_reflect>").unwrap_or(end).trim_end();
        let opened = |open: &str| end.ends_with(open.trim_end());
        let start = match format.tools {
            Some(ToolFormat::Harmony) => prompt.rfind("<|start|>").map_or("", |at| &prompt[at..]).to_owned(),
            _ => String::new(),
        };
        Self {
            format,
            tools: tools.map(|tools| Arc::new(ToolTypes::new(tools))),
            thinks: format.reasoning.is_some_and(|reasoning| opened(reasoning.open)),
            start,
            shape: AnswerShape::Free,
        }
    }

    /// The same for answers that a grammar gives this shape.
    pub fn shaped(self, shape: AnswerShape) -> Self {
        Self { shape, ..self }
    }

    /// Texts of the special tokens that the parser has to see.
    pub fn marks(&self) -> impl Iterator<Item = &'static str> {
        self.format.marks(self.tools.is_some())
    }

    /// A parser for one answer; `seed` makes the ids of its calls.
    pub fn parser(&self, seed: u64) -> AnswerParser {
        let style = self.format.tools.map_or(IdStyle::Common, ToolFormat::id_style);
        let mut calls = Calls::new(self.tools.clone().unwrap_or_default(), CallIds::new(style, seed));
        calls.shape = self.shape;
        let with_tools = self.tools.is_some();
        AnswerParser {
            inner: match self.format.tools {
                Some(ToolFormat::Harmony) => Inner::Harmony(Harmony::new(with_tools, &self.start, calls)),
                _ => Inner::Flow(Flow::new(&self.format, with_tools, self.thinks, calls)),
            },
        }
    }
}

/// Reads one answer.
#[derive(Debug)]
pub struct AnswerParser {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Flow(Flow),
    Harmony(Harmony),
}

impl AnswerParser {
    /// Takes the next piece of text and returns what is now certain, neighbours of one kind joined.
    pub fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        match &mut self.inner {
            Inner::Flow(flow) => text.chars().for_each(|c| flow.step(c)),
            Inner::Harmony(harmony) => text.chars().for_each(|c| harmony.step(c)),
        }
        self.calls().parts.take()
    }

    /// The text has ended: returns what was withheld.
    pub fn finish(&mut self) -> Vec<AnswerPart> {
        match &mut self.inner {
            Inner::Flow(flow) => flow.finish(),
            Inner::Harmony(harmony) => harmony.finish(),
        }
        self.calls().parts.take()
    }

    /// Whether the text that comes next is reasoning.
    pub fn is_reasoning(&self) -> bool {
        match &self.inner {
            Inner::Flow(flow) => flow.thinks(),
            Inner::Harmony(harmony) => harmony.thinks(),
        }
    }

    /// Calls that are whole.
    pub fn complete_calls(&self) -> usize {
        match &self.inner {
            Inner::Flow(flow) => flow.complete_calls(),
            Inner::Harmony(harmony) => harmony.complete_calls(),
        }
    }

    fn calls(&mut self) -> &mut Calls {
        match &mut self.inner {
            Inner::Flow(flow) => flow.calls(),
            Inner::Harmony(harmony) => harmony.calls(),
        }
    }
}

#[cfg(test)]
mod tests;
