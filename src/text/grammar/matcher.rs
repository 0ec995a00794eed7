//! A compiled grammar and how far an answer has come in it.

use llguidance::Matcher;

use super::TokenMask;
use crate::error::{Error, Result};

/// How far an answer has come in its grammar. Clones go on by themselves.
#[derive(Clone)]
pub struct TokenMatcher {
    inner: Matcher,
    vocab: usize,
}

impl TokenMatcher {
    pub(super) fn new(inner: Matcher, vocab: usize) -> Self {
        Self { inner, vocab }
    }

    /// The tokens that may come next; the end of text is one of them where the grammar is complete. An error if the
    /// grammar is too complex at this place, or if no token can continue the text.
    pub fn mask(&mut self) -> Result<TokenMask> {
        let allowed = self.inner.compute_mask_or_eos().map_err(|error| failure("no next token", &error))?;
        Ok(TokenMask::from_words(allowed.as_slice().to_vec(), self.vocab))
    }

    /// Whether `token` may come next.
    pub fn accepts(&mut self, token: u32) -> bool {
        // A matcher that has failed says so later.
        (token as usize) < self.vocab && self.inner.validate_tokens(&[token]).is_ok_and(|accepted| accepted == 1)
    }

    /// Goes on by `token`, which must be allowed.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        self.inner.consume_token(token).map_err(|error| failure("a token that does not fit", &error))
    }

    /// Whether the text is complete as it is.
    pub fn may_end(&mut self) -> bool {
        self.inner.is_accepting().unwrap_or(false) || self.must_end()
    }

    /// Whether the text is complete and nothing can follow it.
    pub fn must_end(&self) -> bool {
        self.inner.is_stopped() && self.inner.stop_reason().is_ok()
    }
}

impl std::fmt::Debug for TokenMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenMatcher").field("stopped", &self.inner.is_stopped()).finish_non_exhaustive()
    }
}

/// A failure while an answer is generated: of the limits on how complex a grammar may be, or a defect.
fn failure(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::unsupported(format!("the grammar has {what} here: {}", message(error)))
}

/// llguidance's message without its frame.
pub(super) fn message(error: &dyn std::fmt::Display) -> String {
    error.to_string().replace("<non-verbose/>", "").trim().to_owned()
}
