//! Where a model's thinking begins and ends, by the bytes of its tokens.

use super::TokenMask;
use crate::error::{Error, Result};

/// The texts around a model's thinking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkingMarkers {
    /// Such as `<think>`.
    pub open: String,
    /// Such as `</think>`.
    pub close: String,
}

/// Whether an answer begins with thinking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ThinkingStart {
    /// It does not.
    Never,
    /// If the model opens it.
    #[default]
    Free,
    /// The prompt has opened it.
    Opened,
}

/// A model's markers, and which of its tokens concern them.
#[derive(Debug)]
pub(super) struct Thinking {
    open: Vec<u8>,
    close: Vec<u8>,
    /// The token of the opening marker, if it is one.
    open_token: Option<u32>,
    /// The tokens of the closing marker.
    close_tokens: Vec<u32>,
    /// By how much of the opening marker is there: the tokens that continue it.
    opening: Vec<Vec<u32>>,
    /// Tokens that may complete the closing marker and go on behind it.
    crossing: Vec<u32>,
    /// Tokens of white space alone.
    space: Vec<u32>,
    /// By how much of the closing marker was there: how much is left of that when its next byte is another one
    /// (Knuth, Morris, Pratt 1977).
    fallback: Vec<usize>,
}

/// How a piece of text changes what is known of the closing marker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Close<'a> {
    /// So many bytes of it are at the end of the text.
    Partial(usize),
    /// It is complete; this is behind it.
    Complete(&'a [u8]),
}

impl Thinking {
    /// `ids` are the tokens of the two markers, `bytes` the text of a token of the vocabulary.
    pub(super) fn new<'a>(
        markers: &ThinkingMarkers,
        [open_ids, close_tokens]: [Vec<u32>; 2],
        bytes: impl Fn(u32) -> &'a [u8],
        vocab: usize,
    ) -> Result<Self> {
        let (open, close) = (markers.open.as_bytes().to_vec(), markers.close.as_bytes().to_vec());
        let (false, Some(last)) = (open.is_empty(), close.last()) else {
            return Err(Error::internal("a marker of thinking is empty"));
        };
        if close_tokens.is_empty() || close_tokens.iter().any(|id| *id as usize >= vocab) {
            return Err(Error::invalid_model("the tokens that end the thinking are not in the model's vocabulary"));
        }
        let (mut opening, mut crossing, mut space) = (vec![Vec::new(); open.len()], Vec::new(), Vec::new());
        let open_token = <[u32; 1]>::try_from(open_ids).ok().map(|[id]| id);
        for id in 0..vocab as u32 {
            let token = bytes(id);
            let Some((_, before)) = token.split_last() else { continue };
            if token.iter().all(u8::is_ascii_whitespace) {
                space.push(id);
            }
            if before.contains(last) {
                crossing.push(id);
            }
            if open_token.is_none() {
                (0..open.len()).filter(|at| open[*at..].starts_with(token)).for_each(|at| opening[at].push(id));
            }
        }
        if let Some(id) = open_token {
            opening[0].push(id);
        }
        let fallback = fallbacks(&close);
        Ok(Self { open, close, open_token, close_tokens, opening, crossing, space, fallback })
    }

    /// The tokens that continue the opening marker behind its first `matched` bytes.
    pub(super) fn opening(&self, matched: usize) -> &[u32] {
        self.opening.get(matched).map_or(&[], Vec::as_slice)
    }

    /// How much of the opening marker is there with `token`, whose text is `bytes`, behind its first `matched` bytes; `None` if
    /// it is something else.
    pub(super) fn open(&self, matched: usize, token: u32, bytes: &[u8]) -> Option<usize> {
        if self.open_token == Some(token) && matched == 0 {
            return Some(self.open.len());
        }
        let rest = self.open.get(matched..)?;
        (!bytes.is_empty() && rest.starts_with(bytes)).then_some(matched + bytes.len())
    }

    /// Whether so much is all of the opening marker.
    pub(super) fn is_open(&self, matched: usize) -> bool {
        matched >= self.open.len()
    }

    /// The tokens that end the thinking.
    pub(super) fn close_tokens(&self) -> &[u32] {
        &self.close_tokens
    }

    /// Tokens of white space alone.
    pub(super) fn space(&self) -> &[u32] {
        &self.space
    }

    /// Looks for the closing marker in `bytes`, behind a text that ends with the first `matched` bytes of it.
    pub(super) fn close<'a>(&self, mut matched: usize, bytes: &'a [u8]) -> Close<'a> {
        for (at, byte) in bytes.iter().enumerate() {
            while matched > 0 && self.close[matched] != *byte {
                matched = self.fallback[matched];
            }
            matched += usize::from(self.close[matched] == *byte);
            if matched == self.close.len() {
                return Close::Complete(&bytes[at + 1..]);
            }
        }
        Close::Partial(matched)
    }

    /// Removes from `mask` the tokens that would complete the closing marker and have more than white space behind it.
    pub(super) fn forbid_crossing<'a>(&self, matched: usize, mask: &mut TokenMask, bytes: impl Fn(u32) -> &'a [u8]) {
        let crosses = |id: &&u32| match self.close(matched, bytes(**id)) {
            Close::Complete(rest) => !rest.iter().all(u8::is_ascii_whitespace),
            Close::Partial(_) => false,
        };
        self.crossing.iter().filter(crosses).for_each(|id| mask.forbid(*id));
    }
}

fn fallbacks(marker: &[u8]) -> Vec<usize> {
    let mut fallback = vec![0; marker.len()];
    let mut matched = 0;
    for at in 1..marker.len() {
        fallback[at] = matched;
        while matched > 0 && marker[matched] != marker[at] {
            matched = fallback[matched];
        }
        matched += usize::from(marker[matched] == marker[at]);
    }
    fallback
}
