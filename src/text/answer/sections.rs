//! Calls between special tokens: DeepSeek V3, R1 and V3.1, and Kimi K2.

use super::calls::{CallReader, Calls, Expect, Expected, MAX_NAME, Step, Until, is_name};
use super::format::CallSyntax;
use super::object::ArgumentsObject;

/// The marks of a section.
#[derive(Debug)]
pub(super) struct Marks {
    call: &'static str,
    head_end: &'static str,
    call_end: &'static str,
    section_end: &'static str,
    head: Head,
}

/// What stands before the arguments.
#[derive(Debug, Clone, Copy)]
enum Head {
    /// The name; or the word "function", after which a line with the name and a fenced block follow.
    DeepSeek,
    /// `functions.NAME:INDEX`, which is also the id.
    Kimi,
}

pub(super) static DEEPSEEK: Marks = Marks {
    call: "<｜tool▁call▁begin｜>",
    head_end: "<｜tool▁sep｜>",
    call_end: "<｜tool▁call▁end｜>",
    section_end: "<｜tool▁calls▁end｜>",
    head: Head::DeepSeek,
};

const DEEPSEEK_MARKS: &[&str] =
    &["<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"];

/// V3 and R1.
pub(super) static DEEPSEEK_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<｜tool▁calls▁begin｜>"],
    open: "<｜tool▁calls▁begin｜>",
    before_name: "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    after_name: "\n```json\n",
    after_arguments: "\n```<｜tool▁call▁end｜>",
    between: "\n",
    close: "<｜tool▁calls▁end｜>",
    marks: DEEPSEEK_MARKS,
    ends_reasoning: true,
    ..CallSyntax::JSON
};

/// From V3.1 on.
pub(super) static DEEPSEEK_V31_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<｜tool▁calls▁begin｜>"],
    open: "<｜tool▁calls▁begin｜>",
    before_name: "<｜tool▁call▁begin｜>",
    after_name: "<｜tool▁sep｜>",
    after_arguments: "<｜tool▁call▁end｜>",
    close: "<｜tool▁calls▁end｜>",
    marks: DEEPSEEK_MARKS,
    ends_reasoning: true,
    ..CallSyntax::JSON
};

pub(super) static KIMI: Marks = Marks {
    call: "<|tool_call_begin|>",
    head_end: "<|tool_call_argument_begin|>",
    call_end: "<|tool_call_end|>",
    section_end: "<|tool_calls_section_end|>",
    head: Head::Kimi,
};

pub(super) static KIMI_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<|tool_calls_section_begin|>"],
    open: "<|tool_calls_section_begin|>",
    before_name: "<|tool_call_begin|>functions.",
    index_before_arguments: Some(":"),
    after_name: "<|tool_call_argument_begin|>",
    after_arguments: "<|tool_call_end|>",
    close: "<|tool_calls_section_end|>",
    marks: &["<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"],
    ends_reasoning: true,
    ..CallSyntax::JSON
};

/// Reads one section.
#[derive(Debug)]
pub(super) struct SectionReader {
    marks: &'static Marks,
    state: State,
    expect: Expect,
    head: String,
    calls: usize,
}

#[derive(Debug)]
enum State {
    /// Before a call or the end.
    Gap,
    Head(Until),
    /// The line with the name, before a fenced block.
    NameLine,
    Fence,
    Arguments {
        arguments: ArgumentsObject,
        fenced: bool,
    },
    FenceEnd,
    End,
}

impl SectionReader {
    pub fn new(marks: &'static Marks) -> Self {
        Self { marks, state: State::Gap, expect: Expect::default(), head: String::new(), calls: 0 }
    }

    fn to(&mut self, state: State) -> Step {
        self.state = state;
        Step::More
    }

    /// Expects `mark`, after which `state` follows.
    fn expect(&mut self, c: char, mark: &str, state: State) -> Step {
        match self.expect.step(c, &[mark]) {
            Expected::More => Step::More,
            Expected::Mark(_) => self.to(state),
            Expected::Other => Step::Bad,
        }
    }

    fn arguments(fenced: bool) -> State {
        State::Arguments { arguments: ArgumentsObject::default(), fenced }
    }

    fn end_head(&mut self, calls: &mut Calls) -> Step {
        let head = self.head.trim();
        let (name, id) = match self.marks.head {
            Head::DeepSeek if head == "function" => {
                self.head.clear();
                return self.to(State::NameLine);
            }
            Head::DeepSeek => (head, None),
            Head::Kimi => {
                let name = head.strip_prefix("functions.").unwrap_or(head);
                let index = |index: &str| !index.is_empty() && index.chars().all(|c| c.is_ascii_digit());
                let numbered = name.rsplit_once(':').filter(|(_, digits)| index(digits));
                // Without a number it would be the id of every call of this tool.
                (numbered.map_or(name, |(name, _)| name), numbered.map(|_| head))
            }
        };
        if !is_name(name) {
            return Step::Bad;
        }
        calls.begin(name, id);
        self.to(Self::arguments(false))
    }

    fn name_line(&mut self, c: char, calls: &mut Calls) -> Step {
        if c != '\n' {
            self.head.push(c);
            return if self.head.len() > MAX_NAME { Step::Bad } else { Step::More };
        }
        let name = self.head.trim();
        if !is_name(name) {
            return Step::Bad;
        }
        calls.begin(name, None);
        self.to(State::Fence)
    }
}

impl CallReader for SectionReader {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match &mut self.state {
            State::Gap => match self.expect.step(c, &[self.marks.call, self.marks.section_end]) {
                Expected::More => Step::More,
                Expected::Mark(0) => {
                    self.head.clear();
                    self.to(State::Head(Until::new(self.marks.head_end)))
                }
                Expected::Mark(_) if self.calls > 0 => Step::Done,
                Expected::Mark(_) | Expected::Other => Step::Bad,
            },
            State::Head(until) => match until.step(c, &mut self.head) {
                true => self.end_head(calls),
                false if self.head.len() > MAX_NAME => Step::Bad,
                false => Step::More,
            },
            State::NameLine => self.name_line(c, calls),
            State::Fence => self.expect(c, "```json", Self::arguments(true)),
            State::Arguments { arguments, fenced } => match (arguments.step(c, calls), *fenced) {
                (Step::Done, true) => {
                    self.calls += 1;
                    self.to(State::FenceEnd)
                }
                (Step::Done, false) => {
                    self.calls += 1;
                    self.to(State::End)
                }
                (other, _) => other,
            },
            State::FenceEnd => self.expect(c, "```", State::End),
            State::End => self.expect(c, self.marks.call_end, State::Gap),
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        match self.state {
            State::Gap => self.calls > 0 && self.expect.is_idle(),
            State::FenceEnd | State::End => true,
            _ => false,
        }
    }
}
