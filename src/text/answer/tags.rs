//! Calls whose arguments stand between tags, without quotes: Qwen3-Coder and Qwen3.5, Seed, GLM, MiniMax, DeepSeek's DSML.

use super::AnswerShape;
use super::calls::{CallReader, Calls, Expect, Expected, Finder, MAX_NAME, Step, Until, is_name};
use super::format::{Arguments, CallSyntax};
use super::json::{JsonScanner, Scan, ValueScanner, escape_into, quoted};
use super::schema::ArgumentType;

/// How the tags are written.
#[derive(Debug)]
pub(super) struct Tags {
    /// Before a name; empty where the block's opening is.
    function: &'static str,
    /// After a name; empty: a line break or the next tag.
    function_end: &'static str,
    key: &'static str,
    key_end: &'static str,
    /// Before a value, if the key's end is not enough.
    value: &'static str,
    /// After a value. A line break before one of the others, which stand where the first was forgotten, is of the mark.
    value_ends: &'static [&'static str],
    /// The end of a call; empty where the block's end is.
    call_end: &'static str,
    block_end: &'static str,
    /// A line break on each side of a value is not of it.
    lines: bool,
}

pub(super) static QWEN: Tags = Tags {
    function: "<function=",
    function_end: ">",
    key: "<parameter=",
    key_end: ">",
    value: "",
    value_ends: &["</parameter>", "\n<parameter=", "\n</function>"],
    call_end: "</function>",
    block_end: "</tool_call>",
    lines: true,
};

pub(super) static QWEN_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<tool_call>", "<function="],
    before_name: "<tool_call>\n<function=",
    after_name: ">\n",
    after_arguments: "</function>\n</tool_call>",
    between: "\n",
    arguments: Arguments::Tagged {
        before_key: "<parameter=",
        after_key: ">\n",
        after_other_key: None,
        after_value: "\n</parameter>\n",
        ends: QWEN.value_ends,
        lines: QWEN.lines,
    },
    ends_reasoning: true,
    ..CallSyntax::JSON
};

pub(super) static SEED: Tags = Tags { block_end: "</seed:tool_call>", ..QWEN };

pub(super) static SEED_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<seed:tool_call>", "<function="],
    before_name: "<seed:tool_call>\n<function=",
    after_name: ">\n",
    after_arguments: "</function>\n</seed:tool_call>",
    between: "\n",
    arguments: Arguments::Tagged {
        before_key: "<parameter=",
        after_key: ">",
        after_other_key: None,
        after_value: "</parameter>\n",
        ends: SEED.value_ends,
        lines: SEED.lines,
    },
    ends_reasoning: true,
    ..CallSyntax::JSON
};

pub(super) static GLM: Tags = Tags {
    function: "",
    function_end: "",
    key: "<arg_key>",
    key_end: "</arg_key>",
    value: "<arg_value>",
    value_ends: &["</arg_value>"],
    call_end: "",
    block_end: "</tool_call>",
    lines: false,
};

pub(super) static GLM_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<tool_call>"],
    before_name: "<tool_call>",
    after_name: "\n",
    after_arguments: "</tool_call>",
    between: "\n",
    arguments: Arguments::Tagged {
        before_key: "<arg_key>",
        after_key: "</arg_key>\n<arg_value>",
        after_other_key: None,
        after_value: "</arg_value>\n",
        ends: GLM.value_ends,
        lines: GLM.lines,
    },
    ends_reasoning: true,
    ..CallSyntax::JSON
};

pub(super) static MINIMAX: Tags = Tags {
    function: "<invoke name=\"",
    function_end: "\">",
    key: "<parameter name=\"",
    key_end: "\">",
    value: "",
    value_ends: &["</parameter>"],
    call_end: "</invoke>",
    block_end: "</minimax:tool_call>",
    lines: false,
};

pub(super) static MINIMAX_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<minimax:tool_call>"],
    open: "<minimax:tool_call>\n",
    before_name: "<invoke name=\"",
    after_name: "\">\n",
    after_arguments: "</invoke>",
    between: "\n",
    close: "\n</minimax:tool_call>",
    arguments: Arguments::Tagged {
        before_key: "<parameter name=\"",
        after_key: "\">",
        after_other_key: None,
        after_value: "</parameter>\n",
        ends: MINIMAX.value_ends,
        lines: MINIMAX.lines,
    },
    ends_reasoning: true,
    ..CallSyntax::JSON
};

pub(super) static DSML: Tags = Tags {
    function: "<｜DSML｜invoke name=\"",
    function_end: "\">",
    key: "<｜DSML｜parameter name=\"",
    // After the key an attribute says whether the value is a string.
    key_end: ">",
    value: "",
    value_ends: &["</｜DSML｜parameter>"],
    call_end: "</｜DSML｜invoke>",
    block_end: "</｜DSML｜function_calls>",
    lines: false,
};

/// DeepSeek's later name of the block.
pub(super) static DSML_TOOLS: Tags = Tags { block_end: "</｜DSML｜tool_calls>", ..DSML };

pub(super) static DSML_SYNTAX: CallSyntax = CallSyntax {
    openings: &["<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"],
    open: "<｜DSML｜function_calls>\n",
    before_name: "<｜DSML｜invoke name=\"",
    after_name: "\">\n",
    after_arguments: "</｜DSML｜invoke>",
    between: "\n",
    close: "\n</｜DSML｜function_calls>",
    marks: &["｜DSML｜"],
    arguments: Arguments::Tagged {
        before_key: "<｜DSML｜parameter name=\"",
        after_key: "\" string=\"true\">",
        after_other_key: Some("\" string=\"false\">"),
        after_value: "</｜DSML｜parameter>\n",
        ends: DSML.value_ends,
        lines: DSML.lines,
    },
    ends_reasoning: true,
    ..CallSyntax::JSON
};

/// Reads one block.
#[derive(Debug)]
pub(super) struct TagReader {
    tags: &'static Tags,
    /// The block began with a call's own tag and need not end with another.
    bare: bool,
    state: State,
    expect: Expect,
    name: String,
    key: String,
    kind: ArgumentType,
    value: String,
    /// Arguments of the call so far.
    count: usize,
    /// Calls of the block so far.
    calls: usize,
}

#[derive(Debug)]
enum State {
    /// Before a call or the end of the block.
    Gap,
    Name(Until),
    /// The name is ended by a line break or a tag.
    NameLine,
    /// Before an argument or the end of the call.
    Body,
    Key(Until),
    BeforeValue,
    Value {
        ends: Finder,
        first: bool,
        /// What begins with a bracket, where it is certainly JSON: its strings may have the end in them.
        json: Option<JsonScanner>,
    },
}

impl TagReader {
    pub fn new(tags: &'static Tags, bare: bool) -> Self {
        let mut reader = Self {
            tags,
            bare,
            state: State::Gap,
            expect: Expect::default(),
            name: String::new(),
            key: String::new(),
            kind: ArgumentType::Unknown,
            value: String::new(),
            count: 0,
            calls: 0,
        };
        if bare {
            reader.begin_name();
        } else if tags.function.is_empty() {
            reader.state = State::NameLine;
        }
        reader
    }

    fn to(&mut self, state: State) -> Step {
        self.state = state;
        Step::More
    }

    fn begin_name(&mut self) -> Step {
        self.name.clear();
        self.to(State::Name(Until::new(self.tags.function_end)))
    }

    fn end_name(&mut self) -> Step {
        self.name = self.name.trim().to_owned();
        if !is_name(&self.name) {
            return Step::Bad;
        }
        self.count = 0;
        self.to(State::Body)
    }

    /// The call begins with the first tag behind its name: the name alone may be text about the tool.
    fn begin_call(&mut self, calls: &mut Calls) {
        if !calls.is_open() {
            calls.begin(&self.name, None);
        }
    }

    fn begin_key(&mut self, calls: &mut Calls) -> Step {
        calls.raw.push_str(self.tags.key);
        self.key.clear();
        self.to(State::Key(Until::new(self.tags.key_end)))
    }

    fn end_call(&mut self, calls: &mut Calls) {
        self.begin_call(calls);
        calls.arguments(if self.count == 0 { "{}" } else { "}" });
        calls.end();
        self.calls += 1;
        self.state = State::Gap;
    }

    fn gap(&mut self, c: char) -> Step {
        match self.expect.step(c, &[self.tags.block_end, self.tags.function]) {
            Expected::More => Step::More,
            Expected::Mark(0) if self.calls > 0 => Step::Done,
            Expected::Mark(1) => self.begin_name(),
            Expected::Other if self.bare => Step::Past,
            Expected::Mark(_) | Expected::Other => Step::Bad,
        }
    }

    fn body(&mut self, c: char, calls: &mut Calls) -> Step {
        let Tags { key, call_end, block_end, .. } = *self.tags;
        let marks = [key, block_end, call_end];
        let marks = if call_end.is_empty() { &marks[..2] } else { &marks[..] };
        match self.expect.step(c, marks) {
            Expected::More => Step::More,
            Expected::Mark(0) => {
                self.begin_call(calls);
                calls.raw.clear();
                self.begin_key(calls)
            }
            Expected::Mark(1) => {
                self.end_call(calls);
                Step::Done
            }
            Expected::Mark(_) => {
                self.end_call(calls);
                Step::More
            }
            Expected::Other => Step::Bad,
        }
    }

    /// The key was read, and what stands beside it.
    fn end_key(&mut self, calls: &Calls) -> Step {
        let (key, attribute) = match self.key.split_once('"') {
            Some((key, attribute)) => (key, attribute),
            None => (self.key.as_str(), ""),
        };
        let key = key.trim().to_owned();
        if key.is_empty() || key.contains(['<', '>', '\n']) {
            return Step::Bad;
        }
        self.kind = match attribute.trim().trim_end_matches('"') {
            "" => calls.tools.of(&self.name, &key),
            "string=\"true" => ArgumentType::Text,
            "string=\"false" => ArgumentType::Value,
            _ => return Step::Bad,
        };
        self.key = key;
        match self.tags.value {
            "" => self.begin_value(),
            _ => self.to(State::BeforeValue),
        }
    }

    fn begin_value(&mut self) -> Step {
        self.value.clear();
        self.to(State::Value { ends: Finder::default(), first: true, json: None })
    }

    /// What stands before a value in the arguments.
    fn value_prefix(&self) -> String {
        format!("{}{}: ", if self.count == 0 { "{" } else { ", " }, quoted(&self.key))
    }

    fn value(&mut self, c: char, calls: &mut Calls) -> Step {
        let State::Value { ends, first, json } = &mut self.state else { return Step::Bad };
        let in_json =
            matches!(self.kind, ArgumentType::Value | ArgumentType::Unknown) && calls.shape != AnswerShape::Free;
        if in_json && json.is_none() && matches!(c, '[' | '{') && self.value.trim().is_empty() {
            *json = Some(JsonScanner::default());
        }
        if let Some(scanner) = json {
            let in_text = scanner.in_text();
            if scanner.step(c, &mut String::new()) == Scan::Bad {
                *json = None;
            } else if in_text {
                self.value.push(c);
                return Step::More;
            }
        }
        let mut piece = String::new();
        let end = ends.step(c, self.tags.value_ends, &mut piece);
        let mut piece = piece.as_str();
        if *first && !piece.is_empty() {
            piece = piece.strip_prefix('\n').filter(|_| self.tags.lines).unwrap_or(piece);
            *first = false;
        }
        let held = ends.held().to_owned();
        self.value.push_str(piece);
        if let Some(end) = end {
            if end == 0 && self.tags.lines && self.value.ends_with('\n') {
                self.value.pop();
            }
            let json = match self.kind {
                ArgumentType::Text => {
                    let mut rest = self.text_start();
                    self.value.chars().for_each(|c| escape_into(c, &mut rest));
                    rest + "\""
                }
                kind => self.value_prefix() + &kind.json(&self.value),
            };
            calls.arguments(&json);
            self.count += 1;
            self.key.clear();
            match end {
                0 => self.state = State::Body,
                1 => return self.begin_key(calls),
                _ => self.end_call(calls),
            }
            return Step::More;
        }
        if self.kind == ArgumentType::Text {
            self.stream_text(&held, calls);
        }
        Step::More
    }

    /// What stands before the next piece of a string.
    fn text_start(&mut self) -> String {
        // A key that has come out is empty.
        if self.key.is_empty() {
            return String::new();
        }
        let start = self.value_prefix() + "\"";
        self.key.clear();
        start
    }

    /// Lets out what is certain of a string: all but a line break at the end, which may be the last.
    fn stream_text(&mut self, held: &str, calls: &mut Calls) {
        let last = if self.tags.lines && self.value.ends_with('\n') { "\n" } else { "" };
        let certain = self.value.len() - last.len();
        if certain == 0 {
            return;
        }
        let mut piece = self.text_start();
        self.value[..certain].chars().for_each(|c| escape_into(c, &mut piece));
        calls.arguments(&piece);
        calls.raw.push_str(last);
        calls.raw.push_str(held);
        self.value.drain(..certain);
    }
}

impl CallReader for TagReader {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match &mut self.state {
            State::Gap => self.gap(c),
            State::Name(until) => match until.step(c, &mut self.name) {
                true => self.end_name(),
                false if self.name.len() > MAX_NAME || c == '\n' => Step::Bad,
                false => Step::More,
            },
            State::NameLine => match c {
                '<' => match self.end_name() {
                    Step::More => self.body(c, calls),
                    other => other,
                },
                '\n' if !self.name.trim().is_empty() => self.end_name(),
                _ if self.name.len() > MAX_NAME => Step::Bad,
                _ => {
                    self.name.push(c);
                    Step::More
                }
            },
            State::Body => self.body(c, calls),
            State::Key(until) => match until.step(c, &mut self.key) {
                true => self.end_key(calls),
                false if self.key.len() > MAX_NAME => Step::Bad,
                false => Step::More,
            },
            State::BeforeValue => match self.expect.step(c, &[self.tags.value]) {
                Expected::More => Step::More,
                Expected::Mark(_) => self.begin_value(),
                Expected::Other => Step::Bad,
            },
            State::Value { .. } => self.value(c, calls),
        }
    }

    fn finish(&mut self, _: &mut Calls) -> bool {
        matches!(self.state, State::Gap) && self.calls > 0 && self.expect.is_idle()
    }
}
