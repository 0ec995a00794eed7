//! Harmony, the format of gpt-oss: an answer is messages in channels, and a call is a message to a function.

use super::calls::{Calls, Finder, Step, is_name};
use super::format::CallSyntax;
use super::object::ArgumentsObject;

pub(super) static SYNTAX: CallSyntax = CallSyntax {
    openings: &["<|channel|>"],
    before_name: "<|channel|>commentary to=functions.",
    after_name: " <|constrain|>json<|message|>",
    after_arguments: "<|call|>",
    ..CallSyntax::JSON
};

const MARKS: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"];
const START: usize = 0;
const CHANNEL: usize = 1;
const MESSAGE: usize = 2;
const CONSTRAIN: usize = 3;

/// Longest header of a message, in bytes; what is longer is text.
const MAX_HEADER: usize = 512;

/// Walks through the messages of an answer.
#[derive(Debug)]
pub(super) struct Harmony {
    with_tools: bool,
    calls: Calls,
    finder: Finder,
    state: State,
    /// The header being read, marks included.
    header: String,
    /// A message of this kind has come: the next begins on a line of its own.
    said: [bool; 2],
}

#[derive(Debug)]
enum State {
    /// Between a message's start and its text.
    Header {
        /// What has come is the beginning of a header only if it is a recipient or a channel: the prompt had the start.
        bare: bool,
    },
    Text {
        thinks: bool,
    },
    Call(ArgumentsObject),
    /// After a message.
    Gap,
}

impl Harmony {
    /// `start` is the beginning of the message that the prompt has opened.
    pub fn new(with_tools: bool, start: &str, calls: Calls) -> Self {
        let state = State::Header { bare: true };
        let mut harmony =
            Self { with_tools, calls, finder: Finder::default(), state, header: String::new(), said: [false; 2] };
        start.chars().for_each(|c| harmony.step(c));
        if let State::Header { bare } = &mut harmony.state
            && harmony.header.ends_with("assistant")
        {
            *bare = true;
            harmony.header.clear();
        }
        // The prompt's part of the message is not of the answer.
        harmony.calls.parts.take();
        harmony.said = [false; 2];
        harmony
    }

    pub fn calls(&mut self) -> &mut Calls {
        &mut self.calls
    }

    pub fn complete_calls(&self) -> usize {
        self.calls.complete()
    }

    pub fn thinks(&self) -> bool {
        matches!(self.state, State::Text { thinks: true })
    }

    pub fn step(&mut self, c: char) {
        let mut text = String::new();
        let mark = self.finder.step(c, &MARKS, &mut text);
        text.chars().for_each(|c| self.text(c));
        if let Some(mark) = mark {
            self.mark(mark);
        }
    }

    pub fn finish(&mut self) {
        let rest = self.finder.take();
        rest.chars().for_each(|c| self.text(c));
        self.end_message(false);
        let header = std::mem::take(&mut self.header);
        // What a mark began is no text, though the answer ends within it.
        if matches!(self.state, State::Header { bare: true }) && !MARKS.iter().any(|mark| header.contains(mark)) {
            self.calls.parts.content(&header);
        }
    }

    fn text(&mut self, c: char) {
        match &mut self.state {
            State::Header { bare } => {
                self.header.push(c);
                let start = self.header.trim_start();
                let fits = !*bare || start.contains("<|") || "to=".starts_with(start) || start.starts_with("to=");
                if !fits || self.header.len() > MAX_HEADER {
                    self.give_back_header();
                }
            }
            State::Text { thinks: true } => self.calls.parts.reasoning(c.encode_utf8(&mut [0; 4])),
            State::Text { thinks: false } => self.calls.parts.content(c.encode_utf8(&mut [0; 4])),
            State::Call(arguments) => {
                self.calls.raw.push(c);
                if arguments.step(c, &mut self.calls) == Step::Bad {
                    self.give_back_call();
                } else if !self.calls.is_open() {
                    self.state = State::Gap;
                }
            }
            State::Gap if c.is_whitespace() => {}
            State::Gap => {
                self.begin_text(false);
                self.text(c);
            }
        }
    }

    fn mark(&mut self, mark: usize) {
        match (&self.state, mark) {
            // Arguments may be about marks.
            (State::Call(arguments), _) if arguments.in_text() => MARKS[mark].chars().for_each(|c| self.text(c)),
            (State::Header { .. }, MESSAGE) => self.begin_message(),
            (State::Header { .. }, CHANNEL | CONSTRAIN) if self.header.len() <= MAX_HEADER => {
                self.header.push_str(MARKS[mark]);
            }
            (State::Header { .. }, _) if !self.header.trim().is_empty() => {
                self.header.push_str(MARKS[mark]);
                self.give_back_header();
                self.state = State::Gap;
                if mark == START {
                    self.begin_header("");
                }
            }
            (_, START) => {
                self.end_message(false);
                self.begin_header("");
            }
            (_, CHANNEL) => {
                self.end_message(false);
                self.begin_header(MARKS[CHANNEL]);
            }
            (State::Text { .. } | State::Call(_), MESSAGE | CONSTRAIN) => {
                MARKS[mark].chars().for_each(|c| self.text(c));
            }
            (State::Text { .. } | State::Call(_), _) => self.end_message(true),
            _ => {}
        }
    }

    fn begin_header(&mut self, text: &str) {
        self.header.clear();
        self.header.push_str(text);
        self.state = State::Header { bare: false };
    }

    fn begin_text(&mut self, thinks: bool) {
        if std::mem::replace(&mut self.said[usize::from(thinks)], true) {
            if thinks { self.calls.parts.reasoning("\n\n") } else { self.calls.parts.content("\n\n") }
        }
        self.state = State::Text { thinks };
    }

    /// The header is whole.
    fn begin_message(&mut self) {
        let header = std::mem::take(&mut self.header);
        let after = |mark: &str| header.split_once(mark).map(|(_, rest)| rest);
        let word =
            |text: &str| text.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or_default().to_owned();
        let channel = after("<|channel|>").map(|rest| word(rest.trim_start())).unwrap_or_default();
        let recipient = after("to=").map(word).filter(|_| self.with_tools);
        match recipient {
            Some(recipient) => {
                let name = recipient.strip_prefix("functions.").unwrap_or(&recipient);
                if is_name(name) {
                    self.calls.begin(name, None);
                    self.state = State::Call(ArgumentsObject::default());
                } else {
                    tracing::warn!("a message to a tool without a name is sent as text");
                    self.begin_text(false);
                    self.calls.parts.content(&header);
                }
            }
            None => self.begin_text(channel == "analysis"),
        }
    }

    /// The message ends, by its mark or without.
    fn end_message(&mut self, marked: bool) {
        if let State::Call(arguments) = &self.state {
            match (arguments.is_empty(), marked) {
                // A call without arguments may have no text.
                (true, true) => {
                    self.calls.arguments("{}");
                    self.calls.end();
                }
                (true, false) => {
                    tracing::warn!("a tool call is cut off before its arguments");
                    self.calls.abandon();
                }
                (false, _) => self.give_back_call(),
            }
        }
        if !matches!(self.state, State::Header { .. }) {
            self.state = State::Gap;
        }
    }

    fn give_back_header(&mut self) {
        let header = std::mem::take(&mut self.header);
        self.begin_text(false);
        self.calls.parts.content(&header);
    }

    fn give_back_call(&mut self) {
        tracing::warn!("a tool call is malformed or cut off; the rest of it is sent as text");
        let raw = std::mem::take(&mut self.calls.raw);
        self.calls.abandon();
        self.begin_text(false);
        self.calls.parts.content(&raw);
    }
}
