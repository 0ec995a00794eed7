//! Grammars that have been compiled: the same ones come with every call of an agent.

use std::sync::Mutex;

use llguidance::Matcher;

use crate::sync::lock;

/// Grammars that are kept, and the longest source of one.
const MAX_KEPT: usize = 32;
const MAX_SOURCE_BYTES: usize = 64 << 10;

/// Compiled grammars by their sources, the most recently used last.
#[derive(Default)]
pub struct CompiledGrammars(Mutex<Vec<(String, Matcher)>>);

impl CompiledGrammars {
    /// A matcher at the beginning of the grammar, if that is here. It shares nothing with others: what one answer adds to the
    /// states of its lexer counts towards its own limits only.
    pub fn get(&self, source: &str) -> Option<Matcher> {
        let mut kept = lock(&self.0);
        let at = kept.iter().position(|(other, _)| other == source)?;
        let found = kept.remove(at);
        let matcher = found.1.deep_clone();
        kept.push(found);
        Some(matcher)
    }

    /// Keeps a grammar of which nothing has been read yet; the longest unused one goes.
    pub fn put(&self, source: String, matcher: &Matcher) {
        if source.len() > MAX_SOURCE_BYTES {
            return;
        }
        let mut kept = lock(&self.0);
        kept.retain(|(other, _)| *other != source);
        if kept.len() >= MAX_KEPT {
            kept.remove(0);
        }
        kept.push((source, matcher.deep_clone()));
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        lock(&self.0).len()
    }
}
