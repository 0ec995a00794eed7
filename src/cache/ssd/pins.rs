//! Prefixes whose segments stay.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::prefix::{BlockKey, chain_key};
use crate::cache::spans::{Span, root_key};

/// A prefix of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// What the model's rows depend on.
    pub fingerprint: [u8; 32],
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Cache groups of the model.
    pub groups: usize,
    /// The prefix.
    pub tokens: Arc<[u32]>,
}

/// All pinned prefixes.
#[derive(Debug, Default)]
pub struct Pins {
    list: Vec<Pin>,
    /// The blocks of the prefixes by the key of the tokens before them.
    blocks: HashMap<BlockKey, Vec<Arc<[u32]>>>,
    /// Of each prefix the keys of the tokens before each block, in the last group: states, if there are some, are in that.
    keys: Vec<Vec<BlockKey>>,
}

impl Pins {
    /// Adds a prefix; `false` if it is there.
    pub fn add(&mut self, pin: Pin) -> bool {
        let new = !pin.tokens.is_empty() && !self.list.contains(&pin);
        if new {
            self.list.push(pin);
            self.index();
        }
        new
    }

    /// Removes a prefix; `false` if it is not there.
    pub fn remove(&mut self, pin: &Pin) -> bool {
        let before = self.list.len();
        self.list.retain(|other| other != pin);
        self.index();
        self.list.len() < before
    }

    /// All of them.
    pub fn list(&self) -> &[Pin] {
        &self.list
    }

    /// Whether a span has a block of one of them.
    pub fn protect(&self, span: &Span, block_tokens: usize) -> bool {
        if self.blocks.is_empty() {
            return false;
        }
        let mut key = span.parent;
        span.tokens.chunks(block_tokens).any(|tokens| {
            // An incomplete block is a part of every longer one that begins with it.
            let same = |pinned: &Arc<[u32]>| pinned.starts_with(tokens) || tokens.starts_with(pinned);
            let found = self.blocks.get(&key).is_some_and(|pinned| pinned.iter().any(same));
            key = chain_key(&key, tokens);
            found
        }) || span.tokens.len() == 1 && self.protect_state(span)
    }

    /// Whether a state stands for a beginning of one of them: it is the span of the last token, within a block.
    fn protect_state(&self, span: &Span) -> bool {
        self.list.iter().zip(&self.keys).any(|(pin, keys)| {
            let (block, last) = (span.start / pin.block_tokens, span.start);
            let before = pin.tokens.get(block * pin.block_tokens..last);
            let key = keys.get(block).zip(before).filter(|_| pin.tokens.get(last) == span.tokens.first());
            key.is_some_and(|(key, before)| chain_key(key, before) == span.parent)
        })
    }

    fn index(&mut self) {
        self.blocks.clear();
        self.keys.clear();
        for pin in &self.list {
            let mut keys = Vec::new();
            for group in 0..pin.groups {
                let mut key = root_key(&pin.fingerprint, group);
                keys.clear();
                for tokens in pin.tokens.chunks(pin.block_tokens) {
                    let next = chain_key(&key, tokens);
                    self.blocks.entry(key).or_default().push(tokens.into());
                    keys.push(key);
                    key = next;
                }
            }
            self.keys.push(keys);
        }
    }
}
