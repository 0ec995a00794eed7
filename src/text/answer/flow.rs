//! Answers that are one text with marks in it: everything but Harmony.

use super::AnswerShape;
use super::calls::{CallReader, Calls, Finder, Step};
use super::format::{AnswerFormat, BlockStart, CallSyntax, ReasoningSyntax, THINK, ToolFormat};

/// Walks through an answer: text for the user, reasoning, and blocks of calls that readers take.
#[derive(Debug)]
pub(super) struct Flow {
    reasoning: Option<ReasoningSyntax>,
    tools: Option<(ToolFormat, &'static CallSyntax)>,
    calls: Calls,
    finder: Finder,
    /// Which of the two texts is being written.
    thinks: bool,
    /// A call ended the reasoning: its close may still come.
    unclosed: bool,
    content: Spaces,
    thoughts: Spaces,
    block: Option<Block>,
    /// The text is being read for the second time.
    again: bool,
}

/// A block of calls that is being read.
#[derive(Debug)]
struct Block {
    reader: Box<dyn CallReader>,
    opening: &'static str,
    /// Calls that had begun before it.
    before: usize,
    /// It began in text that is being read for the second time.
    again: bool,
}

/// White space of one of the texts: held until it is known to be between words, and not around a mark.
#[derive(Debug, Default)]
struct Spaces {
    /// Something else than white space has come.
    said: bool,
    /// It has come since the last mark.
    said_since: bool,
    held: String,
    /// A mark came last: white space after it is not of the text.
    skip: bool,
    /// What is held stands before a mark.
    marked: bool,
}

impl Spaces {
    /// The white space that comes out before `c`, if `c` comes out.
    fn say(&mut self, c: char) -> Option<String> {
        if c.is_whitespace() {
            if !self.skip {
                self.held.push(c);
                self.marked = false;
            }
            return None;
        }
        (self.said, self.said_since, self.skip, self.marked) = (true, true, false, false);
        Some(std::mem::take(&mut self.held))
    }

    fn mark(&mut self) {
        if !self.said {
            self.held.clear();
        }
        self.skip = !self.said || !self.held.is_empty();
        self.marked = true;
        self.said_since = false;
    }

    /// The text has ended.
    fn rest(&mut self) -> String {
        if self.marked { String::new() } else { std::mem::take(&mut self.held) }
    }
}

/// A mark in the text, by its place in [`Flow::marks`].
#[derive(Debug, Clone, Copy)]
enum Mark {
    Think,
    EndThink,
    Opening(usize),
}

impl Flow {
    /// `tools` is `None` where calls shall stay text; with `thinks` the prompt has opened the reasoning.
    pub fn new(format: &AnswerFormat, with_tools: bool, thinks: bool, calls: Calls) -> Self {
        let tools = format.tools.filter(|_| with_tools).map(|tools| (tools, tools.syntax()));
        let thoughts = Spaces { skip: true, ..Spaces::default() };
        Self {
            reasoning: format.reasoning,
            tools,
            calls,
            finder: Finder::default(),
            thinks,
            unclosed: false,
            content: Spaces::default(),
            thoughts,
            block: None,
            again: false,
        }
    }

    pub fn calls(&mut self) -> &mut Calls {
        &mut self.calls
    }

    pub fn complete_calls(&self) -> usize {
        self.calls.complete()
    }

    pub fn thinks(&self) -> bool {
        self.thinks
    }

    /// The marks that mean something now.
    fn marks(&self) -> ([&'static str; 4], [Mark; 4], usize) {
        let (mut texts, mut marks, mut count) = ([""; 4], [Mark::Think; 4], 0);
        let mut add = |text, mark| {
            (texts[count], marks[count]) = (text, mark);
            count += 1;
        };
        match self.reasoning {
            Some(reasoning) if self.thinks => {
                add(reasoning.close, Mark::EndThink);
                if !self.thoughts.said {
                    add(reasoning.open, Mark::Think);
                }
            }
            Some(reasoning) => {
                // Text may be about `<think>`; the others are special tokens.
                if reasoning != THINK || !self.content.said_since {
                    add(reasoning.open, Mark::Think);
                }
                if self.unclosed {
                    add(reasoning.close, Mark::EndThink);
                }
            }
            None => {}
        }
        if let Some((_, syntax)) = self.tools.filter(|(_, syntax)| self.may_call(syntax)) {
            syntax.openings.iter().take(2).enumerate().for_each(|(i, text)| add(text, Mark::Opening(i)));
        }
        (texts, marks, count)
    }

    /// Whether an opening of a call means one.
    fn may_call(&self, syntax: &CallSyntax) -> bool {
        if self.thinks {
            return syntax.ends_reasoning;
        }
        self.calls.shape != AnswerShape::CallsOrText || !self.content.said
    }

    pub fn step(&mut self, c: char) {
        if self.block.is_some() {
            return self.read(c);
        }
        let (texts, marks, count) = self.marks();
        if self.finder.held().is_empty() && !texts[..count].iter().any(|mark| mark.starts_with(c)) {
            return self.say(c);
        }
        let mut text = String::new();
        let mark = self.finder.step(c, &texts[..count], &mut text);
        text.chars().for_each(|c| self.say(c));
        if let Some(index) = mark {
            self.mark(marks[index]);
        }
    }

    pub fn finish(&mut self) {
        if let Some(mut block) = self.block.take() {
            if block.reader.finish(&mut self.calls) {
                self.calls.raw.clear();
                self.content.mark();
            } else {
                self.give_back(&block, "the answer ends within a tool call");
                // What was read again may have begun another block.
                return self.finish();
            }
        }
        let rest = self.finder.take();
        rest.chars().for_each(|c| self.say(c));
        if self.block.is_some() {
            return self.finish();
        }
        let spaces = if self.thinks { self.thoughts.rest() } else { self.content.rest() };
        self.write(&spaces);
    }

    fn write(&mut self, text: &str) {
        if self.thinks { self.calls.parts.reasoning(text) } else { self.calls.parts.content(text) }
    }

    /// A character of one of the texts; the first of the answer may begin a block.
    fn say(&mut self, c: char) {
        if self.block.is_some() {
            return self.read(c);
        }
        if let Some((tools, syntax)) = self.tools
            && !self.thinks
            && !self.content.said
            && !self.again
            && self.calls.shape != AnswerShape::CallsOrText
            && syntax.starts.contains(&c)
        {
            self.begin(tools, BlockStart::First(c), "");
            return self.read(c);
        }
        self.write_char(c);
    }

    fn write_char(&mut self, c: char) {
        let spaces = if self.thinks { &mut self.thoughts } else { &mut self.content };
        let held = spaces.say(c);
        if let Some(held) = held {
            self.write(&held);
            self.write(c.encode_utf8(&mut [0; 4]));
        }
    }

    fn mark(&mut self, mark: Mark) {
        match mark {
            Mark::Think | Mark::EndThink => {
                self.content.mark();
                self.thoughts.mark();
                self.thinks = matches!(mark, Mark::Think);
                self.unclosed = false;
            }
            Mark::Opening(index) => {
                if let Some((tools, syntax)) = self.tools {
                    self.begin(tools, BlockStart::Opening(index), syntax.openings[index]);
                }
            }
        }
    }

    fn begin(&mut self, tools: ToolFormat, start: BlockStart, opening: &'static str) {
        let Some(reader) = tools.reader(start) else { return };
        self.calls.raw.clear();
        self.block = Some(Block { reader, opening, before: self.calls.begun(), again: self.again });
    }

    fn read(&mut self, c: char) {
        let Some(mut block) = self.block.take() else { return };
        self.calls.raw.push(c);
        match block.reader.step(c, &mut self.calls) {
            Step::More => {
                if self.calls.begun() > block.before && self.thinks {
                    self.thoughts.mark();
                    (self.thinks, self.unclosed) = (false, true);
                }
                self.block = Some(block);
            }
            Step::Done => {
                self.calls.raw.clear();
                self.content.mark();
            }
            Step::Past => self.give_back(&block, ""),
            Step::Bad => self.give_back(&block, "a tool call is malformed"),
        }
    }

    /// The block has ended before what was read last: that is text, and read again as such, but only once.
    fn give_back(&mut self, block: &Block, warning: &str) {
        let raw = std::mem::take(&mut self.calls.raw);
        let begun = self.calls.begun() > block.before;
        self.calls.abandon();
        if !warning.is_empty() && (begun || !block.opening.is_empty()) {
            tracing::warn!(bytes = raw.len(), "{warning}; the rest of it is sent as text");
        }
        if begun {
            self.content.mark();
        } else {
            block.opening.chars().for_each(|c| self.write_char(c));
        }
        let (now, later) = match raw.char_indices().next_back() {
            Some((last, _)) if block.again => raw.split_at(last),
            _ if block.opening.is_empty() && !begun => raw.split_at(raw.chars().next().map_or(0, char::len_utf8)),
            _ => ("", raw.as_str()),
        };
        now.chars().for_each(|c| self.write_char(c));
        let was = std::mem::replace(&mut self.again, true);
        later.chars().for_each(|c| self.step(c));
        self.again = was;
    }
}
