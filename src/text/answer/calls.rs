//! What the readers of tool calls share: where calls go, and small pieces of parsing.

use std::fmt::Debug;
use std::sync::Arc;

use super::AnswerShape;
use super::ids::CallIds;
use super::parts::Parts;
use super::schema::ToolTypes;

/// Longest name of a tool, key of an argument and id of a call, in bytes; what is longer is no call.
pub(super) const MAX_NAME: usize = 256;

/// What a character was to a block of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A part of it.
    More,
    /// Its last character.
    Done,
    /// The block ended with the last thing that came out of it; what was read since is text again.
    Past,
    /// Not what a block of calls has there.
    Bad,
}

/// Reads one block of calls from behind its opening, character by character.
pub(super) trait CallReader: Debug + Send {
    /// Takes the next character.
    fn step(&mut self, c: char, calls: &mut Calls) -> Step;

    /// The text has ended: whether nothing of a call is missing.
    fn finish(&mut self, calls: &mut Calls) -> bool;
}

/// Where readers put calls.
#[derive(Debug)]
pub(super) struct Calls {
    pub parts: Parts,
    /// What was read since a call's piece came out: text again if the rest is malformed.
    pub raw: String,
    pub tools: Arc<ToolTypes>,
    pub shape: AnswerShape,
    ids: CallIds,
    begun: usize,
    complete: usize,
    /// A call has begun and is neither whole nor given up.
    open: bool,
}

impl Calls {
    pub fn new(tools: Arc<ToolTypes>, ids: CallIds) -> Self {
        let (parts, raw, shape) = Default::default();
        Self { parts, raw, tools, shape, ids, begun: 0, complete: 0, open: false }
    }

    /// A call begins; `id` is what the model named it.
    pub fn begin(&mut self, name: &str, id: Option<&str>) {
        let index = self.begun;
        self.begun += 1;
        self.open = true;
        let id = id.map_or_else(|| self.ids.next(), str::to_owned);
        self.parts.call(index, id, name.to_owned());
        self.raw.clear();
    }

    /// The next piece of its arguments, JSON text.
    pub fn arguments(&mut self, piece: &str) {
        if !piece.is_empty() {
            self.parts.arguments(piece);
            self.raw.clear();
        }
    }

    /// The call is whole.
    pub fn end(&mut self) {
        self.complete += 1;
        self.open = false;
        self.raw.clear();
    }

    /// The call that has begun, if it is not whole, never will be.
    pub fn abandon(&mut self) {
        self.open = false;
    }

    /// A whole call at once.
    pub fn whole(&mut self, name: &str, id: Option<&str>, arguments: &str) {
        self.begin(name, id);
        self.arguments(arguments);
        self.end();
    }

    /// Calls that have begun.
    pub fn begun(&self) -> usize {
        self.begun
    }

    /// Calls that are whole.
    pub fn complete(&self) -> usize {
        self.complete
    }

    /// Whether a call has begun and is not whole.
    pub fn is_open(&self) -> bool {
        self.open
    }
}

/// Whether a tool may have this name.
pub(super) fn is_name(name: &str) -> bool {
    let fits = |c: char| !c.is_whitespace() && !c.is_control() && !"<>{}[]()\"'`|,;=".contains(c);
    !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(fits)
}

/// Finds marks in text; none is the beginning of another.
#[derive(Debug, Clone, Default)]
pub(super) struct Finder {
    /// What may be the beginning of a mark.
    held: String,
}

impl Finder {
    /// Adds to `out` what is certainly not of a mark; the index of the mark that is whole.
    pub fn step(&mut self, c: char, marks: &[&str], out: &mut String) -> Option<usize> {
        if self.held.is_empty() && !marks.iter().any(|mark| mark.starts_with(c)) {
            out.push(c);
            return None;
        }
        self.held.push(c);
        if let Some(index) = marks.iter().position(|mark| *mark == self.held) {
            self.held.clear();
            return Some(index);
        }
        while !marks.iter().any(|mark| mark.starts_with(self.held.as_str())) {
            out.push(self.held.remove(0));
            if self.held.is_empty() {
                break;
            }
        }
        None
    }

    /// What may be the beginning of a mark.
    pub fn held(&self) -> &str {
        &self.held
    }

    /// The text has ended: what was no mark after all.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Takes what lies before a mark.
#[derive(Debug, Clone)]
pub(super) struct Until {
    mark: &'static str,
    finder: Finder,
}

impl Until {
    pub fn new(mark: &'static str) -> Self {
        Self { mark, finder: Finder::default() }
    }

    /// Adds to `out` what is certainly not of the mark; whether the mark is whole.
    pub fn step(&mut self, c: char, out: &mut String) -> bool {
        self.finder.step(c, &[self.mark], out).is_some()
    }
}

/// Expects one of a few marks, after white space.
#[derive(Debug, Clone, Default)]
pub(super) struct Expect {
    held: String,
}

/// What [`Expect`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// Nothing yet.
    More,
    /// The mark with this index.
    Mark(usize),
    /// Something else.
    Other,
}

impl Expect {
    /// Takes the next character; no mark is the beginning of another.
    pub fn step(&mut self, c: char, marks: &[&str]) -> Expected {
        if self.held.is_empty() && c.is_whitespace() {
            return Expected::More;
        }
        self.held.push(c);
        if let Some(index) = marks.iter().position(|mark| *mark == self.held) {
            self.held.clear();
            return Expected::Mark(index);
        }
        if marks.iter().any(|mark| mark.starts_with(self.held.as_str())) { Expected::More } else { Expected::Other }
    }

    /// Whether no part of a mark was read.
    pub fn is_idle(&self) -> bool {
        self.held.is_empty()
    }
}
