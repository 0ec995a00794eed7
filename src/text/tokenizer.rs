//! The tokenizer of a model: `tokenizer.json` through the `tokenizers` crate.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;
use tokenizers::{AddedToken, PostProcessor, TruncationParams, truncate_encodings};

use super::TextTokens;
use super::decoding::{Decoding, Piece, byte_level};
use super::detokenizer::Detokenizer;
use crate::error::{Error, Result};
use crate::panics;

const FILE: &str = "tokenizer.json";

/// Text to token ids and back. Immutable and shared between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    decoding: Decoding,
    special: HashSet<u32>,
    /// Special tokens, and added ones that look like a tag.
    markers: HashSet<u32>,
    vocab_size: usize,
}

/// The one part of `tokenizer.json` that the `tokenizers` crate does not hand out.
#[derive(Deserialize)]
struct DecoderEntry {
    #[serde(default)]
    decoder: serde_json::Value,
}

impl Tokenizer {
    /// Reads `folder/tokenizer.json`; `None` if there is no such file, `InvalidModel` if it cannot be understood.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        super::read_bytes(folder, FILE)?.map(|bytes| Self::from_json(&bytes)).transpose()
    }

    /// From the content of a `tokenizer.json`.
    ///
    /// Truncation and padding that the file asks for are switched off: the engine decides what fits.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let invalid = |e: &dyn std::fmt::Display| Error::invalid_model(format!("{FILE}: {e}"));
        let entry: DecoderEntry = serde_json::from_slice(json).map_err(|e| invalid(&e))?;
        // The crate is not proof against every inconsistent file (ids out of range, for one).
        let parsed = panics::catch(|| tokenizers::Tokenizer::from_bytes(json));
        let mut inner = parsed.map_err(|_| invalid(&"inconsistent content"))?.map_err(|e| invalid(&e))?;
        inner.with_truncation(None).map_err(|e| invalid(&e))?;
        inner.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let is_marker = |token: &AddedToken| token.special || is_tag(&token.content);
        let markers = added.iter().filter(|(_, token)| is_marker(token)).map(|(id, _)| *id).collect();
        let vocab_size = inner.get_vocab_size(true);
        Ok(Self { decoding: Decoding::parse(&entry.decoder), inner, special, markers, vocab_size })
    }

    /// Token ids of `text`; with `add_special_tokens` also those that the model's post-processor adds (BOS and the
    /// like).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoded = panics::catch(|| self.inner.encode_fast(text, add_special_tokens));
        match encoded {
            Ok(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Ok(Err(e)) => Err(Error::invalid_request(format!("the text cannot be tokenised: {e}"))),
            Err(_) => Err(Error::internal("the tokenizer failed on this text")),
        }
    }

    /// Token ids and types of a text or pair with all special tokens, of which `most` are kept: the longer text of a pair loses
    /// its end first.
    pub fn encode_input(&self, first: &str, second: Option<&str>, most: usize) -> Result<TextTokens> {
        match panics::catch(|| self.try_encode_input(first, second, most)) {
            Ok(Ok(tokens)) => Ok(tokens),
            Ok(Err(e)) => Err(Error::invalid_request(format!("the text cannot be tokenised: {e}"))),
            Err(_) => Err(Error::internal("the tokenizer failed on this text")),
        }
    }

    fn try_encode_input(&self, first: &str, second: Option<&str>, most: usize) -> tokenizers::Result<TextTokens> {
        let special = self.inner.get_post_processor().map_or(0, |p| p.added_tokens(second.is_some()));
        let first = self.inner.encode_fast(first, false)?;
        let second = second.map(|text| self.inner.encode_fast(text, false)).transpose()?;
        let count = first.len() + second.as_ref().map_or(0, |second| second.len());
        let params = TruncationParams { max_length: most.saturating_sub(special), ..TruncationParams::default() };
        let (first, second) = truncate_encodings(first, second, &params)?;
        let joined = self.inner.post_process(first, second, true)?;
        let (ids, types) = (joined.get_ids().to_vec(), joined.get_type_ids().to_vec());
        Ok(TextTokens { ids, types, truncated: count + special > most })
    }

    /// Text of `ids`. Ids outside the vocabulary are left out, special tokens too if `skip_special`.
    ///
    /// Bytes that are not UTF-8 become U+FFFD. This equals the decoder of `tokenizers`, except that an invalid run of
    /// SentencePiece byte tokens keeps its valid characters (there the whole run becomes U+FFFD, which no streaming
    /// decoder can know in time). Pushing the ids through a [`Detokenizer`] gives the same text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if self.decoding == Decoding::Other {
            return self.decode_whole(ids, skip_special);
        }
        let mut detokenizer = Detokenizer::new(skip_special);
        let mut text = String::new();
        for id in ids {
            text += detokenizer.push(self, *id)?;
        }
        text += detokenizer.finish(self)?;
        Ok(text)
    }

    /// Id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The bytes that a token contributes to a text, for log-probabilities; `None` for an id outside the vocabulary.
    ///
    /// They need not be UTF-8: a character may spread over several tokens. A leading space is kept even where decoding
    /// would strip it from the start of a text.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        Some(match &self.decoding {
            Decoding::ByteLevel => byte_level(&token),
            Decoding::Pieces(pieces) => match pieces.piece(&token, false) {
                Piece::Byte(byte) => vec![byte],
                Piece::Text(text) => text.into_bytes(),
            },
            Decoding::Words | Decoding::Other => token.into_bytes(),
        })
    }

    /// [`token_bytes`](Self::token_bytes) as text, with U+FFFD for what is not UTF-8.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.token_bytes(id).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Number of tokens, added ones included. A model's output layer may be wider (padded).
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether the token is marked special, so that `skip_special` leaves it out of texts.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Whether the token marks a part of a conversation (`<|im_end|>`, `<think>`) rather than being a piece of its text.
    pub fn is_marker(&self, id: u32) -> bool {
        self.markers.contains(&id)
    }

    /// Whether the [`token_bytes`](Self::token_bytes) of a text's tokens, joined, are the text.
    pub fn has_token_bytes(&self) -> bool {
        matches!(self.decoding, Decoding::ByteLevel | Decoding::Pieces(_))
    }

    pub(super) fn decoding(&self) -> &Decoding {
        &self.decoding
    }

    /// The vocabulary's spelling of a token.
    pub(super) fn spelling(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Decoding by the `tokenizers` crate.
    pub(super) fn decode_whole(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let decoded = panics::catch(|| self.inner.decode(ids, skip_special));
        match decoded {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(e)) => Err(Error::invalid_model(format!("{FILE}: {e}"))),
            Err(_) => Err(Error::internal("the tokenizer failed to decode")),
        }
    }
}

fn is_tag(token: &str) -> bool {
    let within = |open, close| token.len() > 2 && token.starts_with(open) && token.ends_with(close);
    within('<', '>') || within('[', ']')
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { decoding, vocab_size, .. } = self;
        f.debug_struct("Tokenizer").field("vocab_size", vocab_size).field("decoding", decoding).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(super) mod tests;
