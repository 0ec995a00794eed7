//! Which tokens a sequence may draw: thinking first, then the constraint.

use std::sync::Arc;

use super::thinking::{Close, Thinking};
use super::{GrammarVocabulary, ThinkingStart, TokenMask, TokenMatcher};
use crate::error::{Error, Result};

/// Bytes of white space between the thinking and what follows a grammar, at most.
const MAX_SPACE: usize = 8;

/// Which tokens a sequence may draw. Clones go on by themselves.
#[derive(Debug, Clone)]
pub struct Guide {
    vocabulary: Arc<GrammarVocabulary>,
    /// What has to follow the thinking, if that is constrained.
    matcher: Option<TokenMatcher>,
    budget: Option<usize>,
    /// A special token with which the matcher begins ends the thinking.
    ended_by_calls: bool,
    phase: Phase,
}

/// Where an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// At its beginning: so many bytes of the marker that opens the thinking are there.
    Beginning(usize),
    /// In the thinking: so many bytes of the closing marker are at its end, and so many tokens are there.
    Thinking { matched: usize, tokens: usize },
    /// The budget is spent: so many tokens of the closing marker are there.
    Closing(usize),
    /// Behind the thinking, and so many bytes of white space.
    Between(usize),
    /// In what follows.
    Answer,
}

impl Guide {
    /// For an answer that follows `matcher`, if there is one, behind at most `budget` tokens of thinking. `None` if nothing is
    /// to be watched.
    pub fn new(
        vocabulary: Arc<GrammarVocabulary>,
        matcher: Option<TokenMatcher>,
        start: ThinkingStart,
        budget: Option<usize>,
    ) -> Option<Self> {
        let start = if vocabulary.thinking().is_some() { start } else { ThinkingStart::Never };
        if matcher.is_none() && (budget.is_none() || start == ThinkingStart::Never) {
            return None;
        }
        let mut guide = Self { vocabulary, matcher, budget, ended_by_calls: false, phase: Phase::Answer };
        guide.phase = match start {
            ThinkingStart::Never => Phase::Answer,
            ThinkingStart::Free => Phase::Beginning(0),
            ThinkingStart::Opened => guide.in_thinking(0, 0),
        };
        Some(guide)
    }

    /// The same for a model whose calls end its thinking: what begins with a special token may begin there.
    pub fn ended_by_calls(self) -> Self {
        Self { ended_by_calls: true, ..self }
    }

    /// The tokens that may come next; `None` if all may.
    pub fn mask(&mut self) -> Result<Option<TokenMask>> {
        let vocabulary = &self.vocabulary;
        let thinking = vocabulary.thinking();
        let mut mask = match (self.phase, &mut self.matcher, thinking) {
            (Phase::Closing(at), _, Some(thinking)) => {
                let mut mask = TokenMask::none(vocabulary.vocab());
                thinking.close_tokens().get(at).into_iter().for_each(|id| mask.allow(*id));
                return Ok(Some(mask));
            }
            (_, None, _) => return Ok(None),
            (Phase::Thinking { matched, .. }, _, Some(thinking)) => {
                let mut mask = TokenMask::all(vocabulary.vocab());
                vocabulary.eos().iter().for_each(|id| mask.forbid(*id));
                thinking.forbid_crossing(matched, &mut mask, |id| vocabulary.token_bytes(id));
                return Ok(Some(mask));
            }
            // Within the opening marker nothing else can follow.
            (Phase::Beginning(1..), _, _) => TokenMask::none(vocabulary.vocab()),
            (_, Some(matcher), _) => matcher.mask()?,
        };
        if let Some(thinking) = thinking {
            match self.phase {
                Phase::Beginning(matched) => thinking.opening(matched).iter().for_each(|id| mask.allow(*id)),
                Phase::Between(bytes) => {
                    let fits = |id: &&u32| bytes + vocabulary.token_bytes(**id).len() <= MAX_SPACE;
                    thinking.space().iter().filter(fits).for_each(|id| mask.allow(*id));
                }
                _ => {}
            }
        }
        Ok(Some(mask))
    }

    /// Takes the token that was drawn, which the last mask allowed.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        let vocabulary = Arc::clone(&self.vocabulary);
        let bytes = vocabulary.token_bytes(token);
        let Some(thinking) = vocabulary.thinking() else { return self.accept_answer(token) };
        if matches!(self.phase, Phase::Thinking { .. }) && self.is_call(token) {
            return self.accept_answer(token);
        }
        match self.phase {
            Phase::Beginning(matched) => self.begin(thinking, matched, token, bytes),
            Phase::Thinking { matched, tokens } => {
                self.think(thinking, matched, tokens + 1, bytes);
                Ok(())
            }
            Phase::Closing(at) => {
                let done = at + 1 >= thinking.close_tokens().len();
                self.phase = if done { Phase::Between(0) } else { Phase::Closing(at + 1) };
                Ok(())
            }
            Phase::Between(before) => {
                let fits = self.matcher.as_mut().is_some_and(|matcher| matcher.accepts(token));
                if !fits && bytes.iter().all(u8::is_ascii_whitespace) {
                    self.phase = Phase::Between(before + bytes.len());
                    return Ok(());
                }
                self.accept_answer(token)
            }
            Phase::Answer => self.accept_answer(token),
        }
    }

    /// Whether the answer is complete and nothing can follow it.
    pub fn is_complete(&self) -> bool {
        self.phase == Phase::Answer && self.matcher.as_ref().is_some_and(TokenMatcher::must_end)
    }

    /// Whether the next mask is of some tokens only.
    pub fn restricts(&self) -> bool {
        self.matcher.is_some() || matches!(self.phase, Phase::Closing(_))
    }

    /// Whether the mask behind a token that is still unread depends on it.
    pub fn depends_on_unread(&self) -> bool {
        let spent = |tokens: usize| self.budget.is_some_and(|budget| tokens >= budget);
        self.matcher.is_some()
            || match self.phase {
                Phase::Beginning(_) => spent(0),
                Phase::Thinking { tokens, .. } => spent(tokens + 1),
                Phase::Closing(_) => true,
                Phase::Between(_) | Phase::Answer => false,
            }
    }

    /// At the beginning what fits the constraint is the answer, and not the beginning of a marker.
    fn begin(&mut self, thinking: &Thinking, matched: usize, token: u32, bytes: &[u8]) -> Result<()> {
        let answers = matched == 0 && self.matcher.as_mut().is_some_and(|matcher| matcher.accepts(token));
        match thinking.open(matched, token, bytes) {
            Some(matched) if !answers && thinking.is_open(matched) => self.phase = self.in_thinking(0, 0),
            Some(matched) if !answers => self.phase = Phase::Beginning(matched),
            _ => return self.accept_answer(token),
        }
        Ok(())
    }

    /// Whether `token`, within the thinking, begins a call.
    fn is_call(&mut self, token: u32) -> bool {
        self.ended_by_calls
            && self.vocabulary.is_special(token)
            && self.matcher.as_mut().is_some_and(|matcher| matcher.accepts(token))
    }

    fn think(&mut self, thinking: &Thinking, matched: usize, tokens: usize, bytes: &[u8]) {
        self.phase = match thinking.close(matched, bytes) {
            Close::Complete(rest) => Phase::Between(rest.len()),
            Close::Partial(matched) => self.in_thinking(matched, tokens),
        };
    }

    fn in_thinking(&self, matched: usize, tokens: usize) -> Phase {
        match self.budget {
            Some(budget) if tokens >= budget => Phase::Closing(0),
            _ => Phase::Thinking { matched, tokens },
        }
    }

    fn accept_answer(&mut self, token: u32) -> Result<()> {
        self.phase = Phase::Answer;
        let Some(matcher) = &mut self.matcher else { return Ok(()) };
        // Where no number was drawn (weights that overflow), the draw may be anything.
        if !matcher.accepts(token) {
            return Err(Error::backend(format!("token {token} was drawn, which the constraint does not allow")));
        }
        matcher.accept(token)
    }
}
