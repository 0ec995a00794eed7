//! A model's tokens as grammars see them.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use super::compiled::CompiledGrammars;
use super::thinking::Thinking;
use super::{Constraint, ThinkingMarkers, TokenMatcher, matcher};
use crate::error::{Error, Result, Status};
use crate::panics;
use crate::text::Tokenizer;

/// Longer tokens are not used under a grammar: the tree of all tokens has this depth at most.
const MAX_TOKEN_BYTES: usize = 250;
/// The tree numbers its tokens with 24 bits, and its nodes with 22.
const MAX_VOCAB: usize = 1 << 20;

/// A model's tokens as grammars see them. Immutable and shared between threads; for 150 000 tokens it takes about a second to
/// build, and 54 MB.
pub struct GrammarVocabulary {
    factory: ParserFactory,
    trie: TokEnv,
    vocab: usize,
    eos: Vec<u32>,
    thinking: Option<Thinking>,
    compiled: CompiledGrammars,
}

impl GrammarVocabulary {
    /// The vocabulary of a model whose output layer has `vocab` rows and whose answers end with one of `eos`; how it marks its
    /// thinking, if it may think.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, eos: &[u32], thinking: Option<ThinkingMarkers>) -> Result<Self> {
        if !tokenizer.has_token_bytes() {
            return Err(Error::unsupported("no grammar without a byte-level or SentencePiece tokenizer"));
        }
        let tokens = (0..vocab as u32).map(|id| match tokenizer.token_bytes(id) {
            Some(bytes) if tokenizer.is_marker(id) => [&[TokTrie::SPECIAL_TOKEN_MARKER], &bytes[..]].concat(),
            Some(bytes) => bytes,
            None => Vec::new(),
        });
        let encode = |text: &str| match tokenizer.token_id(text) {
            Some(id) => Ok(vec![id]),
            None => tokenizer.encode(text, false),
        };
        let new = Self::of_tokens(tokens.collect(), eos)?;
        let Some(markers) = thinking else { return Ok(new) };
        let ids = [encode(&markers.open)?, encode(&markers.close)?];
        new.with_thinking(&markers, ids)
    }

    /// The same for a model that thinks between `markers`, whose tokens are `ids`.
    pub(crate) fn with_thinking(mut self, markers: &ThinkingMarkers, ids: [Vec<u32>; 2]) -> Result<Self> {
        self.thinking = Some(Thinking::new(markers, ids, |id| self.token_bytes(id), self.vocab)?);
        Ok(self)
    }

    /// Tokens by their bytes, those of special ones behind [`TokTrie::SPECIAL_TOKEN_MARKER`]; ids that are none are empty.
    pub(crate) fn of_tokens(mut tokens: Vec<Vec<u8>>, eos: &[u32]) -> Result<Self> {
        let vocab = tokens.len();
        if vocab >= MAX_VOCAB {
            return Err(Error::unsupported(format!("no grammar for a vocabulary of {vocab} tokens")));
        }
        // The byte that marks special tokens occurs in no text.
        let marker = TokTrie::SPECIAL_TOKEN_MARKER;
        let unusable = |bytes: &[u8]| bytes.len() > MAX_TOKEN_BYTES || bytes.iter().skip(1).any(|byte| *byte == marker);
        tokens.iter_mut().filter(|bytes| unusable(bytes) || **bytes == [marker]).for_each(Vec::clear);
        // Behind the vocabulary a token that stands for the end where the model has none.
        let end = vocab as u32;
        tokens.push([&[marker], &b"<|end of text|>"[..]].concat());
        let eos: Vec<u32> = eos.iter().copied().filter(|id| (*id as usize) < vocab).collect();
        let ends = if eos.is_empty() { vec![end] } else { eos.clone() };
        let built = panics::catch(|| {
            let trie = TokTrie::from(&TokRxInfo::new(tokens.len() as u32, ends[0]), &tokens).with_eos_tokens(&ends);
            let trie: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&trie, InferenceCapabilities::default(), &slices)
                .map_err(|error| Error::internal(format!("the vocabulary for grammars: {error}")))?;
            factory.quiet().limits_mut().verbose_errors = false;
            Ok((factory, trie))
        });
        let (factory, trie) = built.and_then(|built| built)?;
        Ok(Self { factory, trie, vocab, eos, thinking: None, compiled: CompiledGrammars::default() })
    }

    /// Compiles a constraint, or finds it compiled. What cannot be generated is `InvalidRequest`, or `Unsupported` if only llguidance does not know
    /// how.
    pub fn compile(&self, constraint: &Constraint) -> Result<TokenMatcher> {
        let trie = self.trie.tok_trie();
        let grammar = constraint.grammar(|text| trie.get_special_token(text))?;
        let source = serde_json::to_string(&grammar).map_err(|e| Error::internal(format!("a grammar: {e}")))?;
        if let Some(matcher) = self.compiled.get(&source) {
            return Ok(TokenMatcher::new(matcher, self.vocab));
        }
        let parser = panics::catch(|| self.factory.create_parser(grammar))?;
        let mut compiled = Matcher::new(parser);
        // A grammar with nothing but the empty text.
        let done = compiled.consume_tokens(&[]).is_ok() && compiled.is_stopped();
        match compiled.get_error() {
            Some(error) => Err(refusal(&matcher::message(&error))),
            None if done => Err(Error::invalid_request("the constraint allows nothing but the empty text")),
            None => {
                self.compiled.put(source, &compiled);
                Ok(TokenMatcher::new(compiled, self.vocab))
            }
        }
    }

    /// Tokens of the model's output layer.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The tokens that end an answer.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    #[cfg(test)]
    pub(super) fn compiled(&self) -> &CompiledGrammars {
        &self.compiled
    }

    pub(super) fn thinking(&self) -> Option<&Thinking> {
        self.thinking.as_ref()
    }

    /// Whether a grammar has this token only where it names it.
    pub(super) fn is_special(&self, id: u32) -> bool {
        (id as usize) < self.vocab && self.trie.tok_trie().token(id).starts_with(&[TokTrie::SPECIAL_TOKEN_MARKER])
    }

    /// The bytes of a token in a text, also of a special one; of none where it has none.
    pub(super) fn token_bytes(&self, id: u32) -> &[u8] {
        if id as usize >= self.vocab {
            return &[];
        }
        let bytes = self.trie.tok_trie().token(id);
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(bytes)
    }
}

/// llguidance has one kind of error for what is wrong and for what it cannot do.
fn refusal(message: &str) -> Error {
    let lower = message.to_lowercase();
    let unsupported = ["support", "unimplemented", "too complex", "too large", "limit"];
    let status = match unsupported.iter().any(|word| lower.contains(word)) {
        true => Status::Unsupported,
        false => Status::InvalidRequest,
    };
    Error::new(status, format!("the constraint cannot be used: {message}"))
}

impl std::fmt::Debug for GrammarVocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vocab, eos, .. } = self;
        f.debug_struct("GrammarVocabulary").field("vocab", vocab).field("eos", eos).finish_non_exhaustive()
    }
}
