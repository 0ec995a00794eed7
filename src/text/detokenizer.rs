//! Token ids to text, one at a time, for streaming.

use std::collections::HashSet;
use std::sync::Arc;

use super::decoding::{Decoding, Piece, Pieces, byte_level};
use super::tokenizer::Tokenizer;
use crate::error::Result;

/// How many tokens a decoder without a streaming form may withhold because its text ends in U+FFFD.
const MAX_WITHHELD: usize = 8;

/// Incremental detokeniser of one sequence.
///
/// It never emits part of a character: the bytes of an incomplete one are withheld until it is complete, until it
/// cannot be completed any more (then it is U+FFFD), or until [`finish`](Self::finish). All pieces joined equal
/// [`Tokenizer::decode`] of all ids. A push costs the same however long the sequence is. For byte-level and
/// SentencePiece vocabularies this is exact, token by token; other decoders are run over a short window of tokens,
/// where the joined text may differ if a decoder looks further back than that.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    skip_special: bool,
    /// Special tokens that stay nevertheless.
    kept: Arc<HashSet<u32>>,
    /// Bytes of a character that is not complete.
    partial: Utf8Assembler,
    /// Whether no token has contributed yet.
    at_start: bool,
    /// Characters that SentencePiece still strips from the start of the text; `None` before the first token.
    to_strip: Option<usize>,
    window: Window,
    /// What the last call released.
    out: String,
}

impl Detokenizer {
    /// A detokeniser for one sequence; `skip_special` leaves special tokens out.
    pub fn new(skip_special: bool) -> Self {
        Self::keeping(skip_special, Arc::default())
    }

    /// The same, but the tokens `kept` are never left out: marks that mean something to who reads the text.
    pub fn keeping(skip_special: bool, kept: Arc<HashSet<u32>>) -> Self {
        Self {
            skip_special,
            kept,
            partial: Utf8Assembler::default(),
            at_start: true,
            to_strip: None,
            window: Window::default(),
            out: String::new(),
        }
    }

    /// Takes the next token and returns the text that it completes, often a word, sometimes nothing.
    ///
    /// All calls of one detokeniser take the same `tokenizer`. An id outside the vocabulary gives nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<&str> {
        self.out.clear();
        if self.skip_special && tokenizer.is_special(id) && !self.kept.contains(&id) {
            return Ok("");
        }
        let Some(token) = tokenizer.spelling(id) else { return Ok("") };
        match tokenizer.decoding() {
            Decoding::ByteLevel => self.partial.push(&byte_level(&token), &mut self.out),
            Decoding::Pieces(pieces) => self.push_piece(pieces, &token),
            Decoding::Words => {
                if !self.at_start {
                    self.out.push(' ');
                }
                self.out.push_str(&token);
            }
            // What is left out has not come this far.
            Decoding::Other => self.window.push(tokenizer, id, &mut self.out)?,
        }
        self.at_start = false;
        Ok(&self.out)
    }

    /// The sequence ended: returns what was withheld, an incomplete character as U+FFFD.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<&str> {
        self.out.clear();
        self.partial.finish(&mut self.out);
        if *tokenizer.decoding() == Decoding::Other {
            self.window.finish(tokenizer, &mut self.out)?;
        }
        Ok(&self.out)
    }

    fn push_piece(&mut self, pieces: &Pieces, token: &str) {
        match pieces.piece(token, self.at_start) {
            Piece::Byte(byte) => self.partial.push(&[byte], &mut self.out),
            Piece::Text(text) => {
                self.partial.finish(&mut self.out);
                self.out.push_str(&text);
            }
        }
        let Some((strip, count)) = pieces.strip_start else { return };
        let left = self.to_strip.unwrap_or(count);
        let cut = self.out.chars().take(left).take_while(|c| *c == strip).count();
        let kept = self.out.split_off(cut * strip.len_utf8());
        self.to_strip = Some(if kept.is_empty() { left - cut } else { 0 });
        self.out = kept;
    }
}

/// Joins bytes to characters like `String::from_utf8_lossy`, but over pieces.
#[derive(Debug, Clone, Default)]
struct Utf8Assembler {
    /// At most three bytes between calls: the start of a character.
    partial: Vec<u8>,
}

impl Utf8Assembler {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.partial.extend_from_slice(bytes);
        let mut rest = self.partial.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, tail) = rest.split_at(e.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    rest = tail;
                    let Some(bad) = e.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        let done = self.partial.len() - rest.len();
        self.partial.drain(..done);
    }

    fn finish(&mut self, out: &mut String) {
        if !self.partial.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
    }
}

/// Streaming for a decoder that only knows whole sequences: decode the tokens since the last release together with the
/// ones of that release, which give them their context, and emit what is new.
#[derive(Debug, Clone, Default)]
struct Window {
    ids: Vec<u32>,
    /// How many of `ids` are already in the emitted text.
    emitted: usize,
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, out: &mut String) -> Result<()> {
        self.ids.push(id);
        self.release(tokenizer, false, out)
    }

    fn finish(&mut self, tokenizer: &Tokenizer, out: &mut String) -> Result<()> {
        self.release(tokenizer, true, out)
    }

    fn release(&mut self, tokenizer: &Tokenizer, all: bool, out: &mut String) -> Result<()> {
        let text = tokenizer.decode_whole(&self.ids, false)?;
        let withheld = self.ids.len() - self.emitted;
        if !all && withheld < MAX_WITHHELD && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(());
        }
        let before = tokenizer.decode_whole(&self.ids[..self.emitted], false)?;
        let common = text.char_indices().zip(before.chars()).take_while(|((_, a), b)| a == b).last();
        let start = common.map_or(0, |((at, c), _)| at + c.len_utf8());
        out.push_str(&text[start..]);
        self.ids.drain(..self.emitted);
        self.emitted = self.ids.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
