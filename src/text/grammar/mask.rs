//! A set of token ids.

/// The tokens that may come next, a bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
    vocab: usize,
}

impl TokenMask {
    /// No token of a vocabulary of `vocab`.
    pub fn none(vocab: usize) -> Self {
        Self { words: vec![0; vocab.div_ceil(32)], vocab }
    }

    /// Every token of a vocabulary of `vocab`.
    pub fn all(vocab: usize) -> Self {
        Self::from_words(vec![u32::MAX; vocab.div_ceil(32)], vocab)
    }

    /// From bits in ascending order, 32 a word; those behind the vocabulary are dropped.
    pub(super) fn from_words(mut words: Vec<u32>, vocab: usize) -> Self {
        words.resize(vocab.div_ceil(32), 0);
        if let (Some(last), used @ 1..) = (words.last_mut(), vocab % 32) {
            *last &= u32::MAX >> (32 - used);
        }
        Self { words, vocab }
    }

    /// Whether `token` may come next.
    pub fn allows(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Adds a token; one outside the vocabulary is ignored.
    pub fn allow(&mut self, token: u32) {
        if (token as usize) < self.vocab {
            self.words[token as usize / 32] |= 1 << (token % 32);
        }
    }

    /// Removes a token.
    pub fn forbid(&mut self, token: u32) {
        if let Some(word) = self.words.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }

    /// Number of tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Whether no token may come.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The bits, token 0 in the lowest one of the first word.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The tokens, in ascending order.
    pub fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.vocab as u32).filter(|token| self.allows(*token))
    }
}
