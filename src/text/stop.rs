//! Stop strings over a stream of text.
//!
//! An Aho-Corasick automaton (A. V. Aho, M. J. Corasick, "Efficient string matching", CACM 18(6), 1975) walks the
//! bytes once. Its state is the longest suffix of the text that could still become a stop string: exactly that much is
//! withheld, so what is emitted does not depend on how the text was cut into pieces.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::error::{Error, Result};

/// What one [`StopMatcher::push`] releases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that can no longer be part of a stop string.
    pub emit: String,
    /// Index of the stop string that ended the text. The stop string itself is never emitted.
    pub matched: Option<usize>,
}

/// Finds the first stop string in a stream of text.
///
/// The match that *ends* first wins; of several that end at the same place the longest, of equal strings the one with
/// the lowest index. Matching is by bytes, which on UTF-8 is the same as by characters. Time is linear in the
/// text, memory in the stop strings. After a match all further text is dropped.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    nodes: Vec<Node>,
    state: usize,
    /// Text seen but not released; always `nodes[state].depth` bytes between calls.
    held: VecDeque<u8>,
    matched: Option<usize>,
    /// The stop strings.
    stops: Arc<[String]>,
}

/// A state of the automaton: one prefix of at least one stop string.
#[derive(Debug, Clone, Default)]
struct Node {
    /// Next states by byte, few per node.
    edges: Vec<(u8, usize)>,
    /// The longest proper suffix of this prefix that is a prefix too.
    fail: usize,
    /// Length of the prefix in bytes.
    depth: usize,
    /// The longest stop string that is a suffix of this prefix: its index and length.
    output: Option<(usize, usize)>,
}

impl StopMatcher {
    /// A matcher for `stops`; an empty stop string is `InvalidRequest`, no stop string at all is fine.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<Self> {
        let mut nodes = vec![Node::default()];
        for (index, stop) in stops.iter().enumerate() {
            let stop = stop.as_ref();
            if stop.is_empty() {
                return Err(Error::invalid_request("an empty stop string"));
            }
            let mut state = 0;
            for &byte in stop.as_bytes() {
                state = match nodes[state].next(byte) {
                    Some(next) => next,
                    None => {
                        let depth = nodes[state].depth + 1;
                        nodes.push(Node { depth, ..Node::default() });
                        let next = nodes.len() - 1;
                        nodes[state].edges.push((byte, next));
                        next
                    }
                };
            }
            nodes[state].output.get_or_insert((index, stop.len()));
        }
        link(&mut nodes);
        let stops = stops.iter().map(|stop| stop.as_ref().to_owned()).collect();
        Ok(Self { nodes, state: 0, held: VecDeque::new(), matched: None, stops })
    }

    /// Takes the next piece of text and releases what is now safe.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.matched.is_some() {
            return StopOutcome::default();
        }
        for &byte in text.as_bytes() {
            self.held.push_back(byte);
            self.state = self.step(byte);
            if let Some((index, length)) = self.nodes[self.state].output {
                let emit = self.release(self.held.len() - length);
                self.held.clear();
                self.matched = Some(index);
                return StopOutcome { emit, matched: self.matched };
            }
        }
        let emit = self.release(self.held.len() - self.nodes[self.state].depth);
        StopOutcome { emit, matched: None }
    }

    /// The text ended: releases what was withheld.
    pub fn finish(&mut self) -> String {
        self.state = 0;
        self.release(self.held.len())
    }

    /// Index of the stop string found so far.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// The stop string found so far.
    pub fn matched_text(&self) -> Option<&str> {
        self.stops.get(self.matched?).map(String::as_str)
    }

    /// The automaton's transition; amortised constant time, because every failure link shortens the state.
    fn step(&self, byte: u8) -> usize {
        let mut state = self.state;
        loop {
            match self.nodes[state].next(byte) {
                Some(next) => return next,
                None if state == 0 => return 0,
                None => state = self.nodes[state].fail,
            }
        }
    }

    /// Takes `count` bytes from the front of the withheld text.
    fn release(&mut self, count: usize) -> String {
        let bytes: Vec<u8> = self.held.drain(..count).collect();
        // Pieces and stop strings are whole UTF-8 strings and no character starts with a continuation byte, so every
        // cut lies between characters and nothing is replaced here.
        String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned())
    }
}

impl Node {
    fn next(&self, byte: u8) -> Option<usize> {
        self.edges.iter().find(|(b, _)| *b == byte).map(|(_, next)| *next)
    }
}

/// Sets the failure links and the inherited outputs, breadth first.
fn link(nodes: &mut [Node]) {
    let mut queue: VecDeque<usize> = nodes[0].edges.iter().map(|(_, next)| *next).collect();
    while let Some(state) = queue.pop_front() {
        for (byte, next) in nodes[state].edges.clone() {
            let mut fail = nodes[state].fail;
            nodes[next].fail = loop {
                match nodes[fail].next(byte) {
                    Some(target) => break target,
                    None if fail == 0 => break 0,
                    None => fail = nodes[fail].fail,
                }
            };
            queue.push_back(next);
        }
        // A node's own string is longer than any that it inherits.
        let inherited = nodes[nodes[state].fail].output;
        nodes[state].output = nodes[state].output.or(inherited);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops).unwrap();
        let mut text = String::new();
        for piece in pieces {
            text += &matcher.push(piece).emit;
        }
        text += &matcher.finish();
        (text, matcher.matched())
    }

    /// The definition, by brute force: the first end, then the longest, then the lowest index.
    fn reference(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let Some(head) = text.get(..end) else { continue };
            let ending = stops.iter().enumerate().filter(|(_, stop)| head.ends_with(stop.as_str()));
            if let Some((index, stop)) = ending.min_by_key(|(index, stop)| (std::cmp::Reverse(stop.len()), *index)) {
                return (head[..head.len() - stop.len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn finds_and_withholds() {
        assert_eq!(run(&["STOP"], &["a ST", "OP b"]), ("a ".into(), Some(0)));
        assert_eq!(run(&["STOP"], &["a ST", "ART"]), ("a START".into(), None));
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".into(), Some(1)));
        assert_eq!(run(&["bc", "abc"], &["xabc"]), ("x".into(), Some(1)));
        assert_eq!(run(&["é"], &["è", "é"]), ("è".into(), Some(0)));
        assert_eq!(run(&[], &["text"]), ("text".into(), None));
        assert_eq!(run(&["a", "a"], &["a"]), (String::new(), Some(0)));
    }

    #[test]
    fn withholds_exactly_the_possible_prefix() {
        let mut matcher = StopMatcher::new(&["\n\nUser:", "aab"]).unwrap();
        assert_eq!(matcher.push("x\n").emit, "x");
        assert_eq!(matcher.push("\n\n").emit, "\n");
        assert_eq!(matcher.push("User").emit, "");
        assert_eq!(matcher.push("a").emit, "\n\nUser");
        assert_eq!(matcher.push("aa").emit, "a");
        let last = matcher.push("b and more");
        assert_eq!((last.emit.as_str(), last.matched), ("", Some(1)));
        assert_eq!(matcher.push("more"), StopOutcome::default());
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        let error = StopMatcher::new(&["a", ""]).unwrap_err();
        assert_eq!(error.status(), crate::error::Status::InvalidRequest);
    }

    #[test]
    fn a_long_repetitive_stop_string_costs_linear_time() {
        let stop = "a".repeat(1000) + "b";
        let mut matcher = StopMatcher::new(&[stop]).unwrap();
        let (mut emitted, pushes) = (0, 1_000_000);
        let start = std::time::Instant::now();
        for _ in 0..pushes {
            emitted += matcher.push("a").emit.len();
        }
        // Quadratic work would be 10^9 steps, tens of seconds in a debug build.
        assert!(start.elapsed().as_secs() < 10);
        assert_eq!(emitted, pushes - 1000);
        assert_eq!(matcher.finish().len(), 1000);
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abcé😀]{0,4}", 0..12),
        ) {
            let text = pieces.concat();
            let mut matcher = StopMatcher::new(&stops).unwrap();
            let mut emitted = String::new();
            for piece in &pieces {
                emitted += &matcher.push(piece).emit;
                // No less than the definition allows is withheld.
                if matcher.matched().is_none() {
                    let held = &text[emitted.len()..][..matcher.held.len()];
                    prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held)));
                }
            }
            emitted += &matcher.finish();
            prop_assert_eq!((emitted, matcher.matched()), reference(&stops, &text));
        }
    }
}
