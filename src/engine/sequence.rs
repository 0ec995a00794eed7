//! One sampled continuation of a request: its tokens, its text, and when it ends. Pure.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::events::{Delta, Done, EventSink, FinishReason, TokenLogprob, Usage};
use crate::error::{Error, Result, Status};
use crate::sampling::SamplingParams;
use crate::text::{Detokenizer, StopMatcher, TextModel};

/// Names a sequence within its engine; never reused.
pub type SequenceId = u64;

/// A request as the worker needs it: nothing optional, everything checked.
#[derive(Debug)]
pub struct Prepared {
    /// Prompt tokens; never empty, and shorter than the context.
    pub prompt: Vec<u32>,
    /// Tokens to sample at most; prompt and answer fit the context.
    pub max_tokens: usize,
    /// Sampling parameters, seed included.
    pub sampling: SamplingParams,
    /// Tokens that end the answer and are not part of it.
    pub stop_tokens: HashSet<u32>,
    /// Finds the strings that end the answer and are not part of it.
    pub stop: StopMatcher,
    /// Where the events go.
    pub sink: EventSink,
}

/// A sequence in the scheduler's hands.
#[derive(Debug)]
pub struct Sequence {
    pub(super) id: SequenceId,
    /// Prompt and sampled tokens that have been read.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    /// Tokens whose keys and values are computed or being computed.
    pub(super) computed: usize,
    /// Sampled tokens that are still on the device.
    pub(super) unread: usize,
    pub(super) max_tokens: usize,
    sampling: SamplingParams,
    stop_tokens: HashSet<u32>,
    sink: EventSink,
    text: Option<TextState>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

#[derive(Debug)]
struct TextState {
    model: Arc<TextModel>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
}

impl TextState {
    /// What was held back because a character or a stop string might have followed.
    fn tail(&mut self) -> String {
        if self.stop.matched().is_some() {
            return String::new();
        }
        let rest = self.model.tokenizer().and_then(|tokenizer| self.detokenizer.finish(tokenizer)).unwrap_or_default();
        let outcome = self.stop.push(rest);
        let mut tail = outcome.emit;
        if outcome.matched.is_none() {
            tail.push_str(&self.stop.finish());
        }
        tail
    }
}

/// A token read back from the device.
#[derive(Debug, Clone)]
pub struct SampledToken {
    /// Its id.
    pub token: u32,
    /// Log-probability of it and the likeliest ones (id, value), best first, if asked for.
    pub logprob: Option<(f32, Vec<(u32, f32)>)>,
}

impl Sequence {
    /// `text` is absent for models without a tokenizer: their events carry token ids only.
    pub fn new(id: SequenceId, prepared: Prepared, text: Option<Arc<TextModel>>) -> Self {
        let text = text.map(|model| TextState { detokenizer: Detokenizer::new(true), stop: prepared.stop, model });
        Self {
            id,
            prompt_len: prepared.prompt.len(),
            tokens: prepared.prompt,
            computed: 0,
            unread: 0,
            max_tokens: prepared.max_tokens,
            sampling: prepared.sampling,
            stop_tokens: prepared.stop_tokens,
            sink: prepared.sink,
            text,
            first_token: None,
            last_token: None,
        }
    }

    /// Its name.
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }

    /// How it samples.
    pub fn sampling(&self) -> &SamplingParams {
        &self.sampling
    }

    /// Sampled tokens that have been read.
    pub fn completion_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether the host asked to end it.
    pub fn is_cancelled(&self) -> bool {
        self.sink.state().is_cancelled()
    }

    /// Whether the host is too far behind with reading.
    pub fn is_paused(&self) -> bool {
        self.sink.state().is_full()
    }

    /// Takes one sampled token: sends its text, and says whether the sequence ends with it.
    pub fn accept(&mut self, sampled: SampledToken, now: Instant) -> Result<Option<FinishReason>> {
        self.unread -= 1;
        self.tokens.push(sampled.token);
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        if self.stop_tokens.contains(&sampled.token) {
            return Ok(Some(FinishReason::Stop));
        }
        let mut delta = Delta { text: String::new(), tokens: vec![sampled.token], logprobs: Vec::new() };
        let mut stopped = false;
        if let Some(text) = &mut self.text {
            let piece = text.detokenizer.push(text.model.tokenizer()?, sampled.token)?;
            let outcome = text.stop.push(piece);
            delta.text = outcome.emit;
            stopped = outcome.matched.is_some();
        }
        if let Some((logprob, top)) = sampled.logprob {
            delta.logprobs.push(self.logprob(sampled.token, logprob, top));
        }
        self.sink.delta(delta);
        Ok(if stopped {
            Some(FinishReason::Stop)
        } else if self.completion_len() >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        })
    }

    fn logprob(&self, token: u32, logprob: f32, top: Vec<(u32, f32)>) -> TokenLogprob {
        let tokenizer = self.text.as_ref().and_then(|text| text.model.tokenizer().ok());
        let bytes = |id| tokenizer.and_then(|tokenizer| tokenizer.token_bytes(id)).unwrap_or_default();
        let entry = |(token, logprob)| TokenLogprob { token, logprob, bytes: bytes(token), top: Vec::new() };
        TokenLogprob { top: top.into_iter().map(entry).collect(), ..entry((token, logprob)) }
    }

    /// Ends the sequence and its request. What the stop matcher still withheld is sent first, unless a stop string
    /// was found or the request failed.
    pub fn finish(mut self, end: Result<FinishReason, Error>) {
        let usage = self.usage();
        let reason = match end {
            Ok(reason) => reason,
            Err(error) => return self.sink.fail_with(error, usage),
        };
        let tail = self.text.as_mut().map(TextState::tail).unwrap_or_default();
        if !tail.is_empty() {
            self.sink.delta(Delta { text: tail, ..Delta::default() });
        }
        self.sink.done(Done { reason, error: None, usage });
    }

    fn usage(&self) -> Usage {
        let accepted = self.sink.state().accepted();
        let generated = self.completion_len();
        let rate = match (self.first_token, self.last_token) {
            (Some(first), Some(last)) if generated > 1 && last > first => {
                (generated - 1) as f64 / (last - first).as_secs_f64()
            }
            _ => 0.0,
        };
        Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens: 0,
            completion_tokens: generated,
            seconds_to_first_token: self.first_token.map_or(0.0, |first| (first - accepted).as_secs_f64()),
            tokens_per_second: rate,
        }
    }
}

/// The error of a request that its host cancelled.
pub fn cancelled() -> Error {
    Error::new(Status::Cancelled, "the request was cancelled")
}
