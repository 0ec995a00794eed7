//! One sampled continuation of a request: its tokens, its text, and when it ends. Pure.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::answer::{AnswerPlan, AnswerText, Pieces};
use super::events::{ChoiceSink, Delta, EventSink, FinishReason, TokenLogprob, Usage};
use super::marks::Marks;
use super::queue::QueueTicket;
use super::request::Priority;
use crate::cache::manager::Table;
use crate::error::{Error, Result, Status};
use crate::sampling::SamplingParams;
use crate::text::grammar::{Guide, TokenMask};
use crate::text::{StopMatcher, TextModel};

/// Names a sequence within its engine; never reused.
pub type SequenceId = u64;

/// A request as the worker needs it: nothing optional, everything checked.
#[derive(Debug)]
pub struct Prepared {
    /// Prompt tokens; never empty, and shorter than the context.
    pub prompt: Vec<u32>,
    /// Tokens of the prompt up to the end of its last message: what follows asks for the answer.
    pub last_message: usize,
    /// Tokens to sample at most; prompt and answer fit the context.
    pub max_tokens: usize,
    /// Sampling parameters, seed included.
    pub sampling: SamplingParams,
    /// Tokens that end the answer and are not part of it.
    pub stop_tokens: HashSet<u32>,
    /// Finds the strings that end the answer and are not part of it.
    pub stop: StopMatcher,
    /// Which tokens the answer may have, if not all.
    pub guide: Option<Guide>,
    /// How the answer is told apart into text, reasoning and tool calls; `None` if all of it is text.
    pub answer: Option<AnswerPlan>,
    /// Its place in the queue.
    pub ticket: Option<QueueTicket>,
    /// Answers to the same prompt; at least one.
    pub choices: usize,
    /// Before whom it runs.
    pub priority: Priority,
    /// Whether its events tell when it begins.
    pub tells_start: bool,
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
    /// Where its states are kept.
    pub(super) marks: Marks,
    /// Tokens whose keys and values are computed or being computed.
    pub(super) computed: usize,
    /// Sampled tokens that are still on the device.
    pub(super) unread: usize,
    pub(super) max_tokens: usize,
    pub(super) priority: Priority,
    /// When it was queued.
    pub(super) queued: Instant,
    /// Prompt tokens that the cache had.
    cached: usize,
    /// The most tokens that it had computed so far.
    reached: usize,
    /// Its place in the queue, until it runs.
    pub(super) ticket: Option<QueueTicket>,
    /// The host is still to be told that the prompt has begun: by the first of its answers.
    untold: bool,
    /// Its blocks, while it has any.
    pub(super) table: Option<Table>,
    sampling: SamplingParams,
    stop_tokens: HashSet<u32>,
    guide: Option<Guide>,
    /// Why no mask could be made for its next token.
    unguided: Option<Error>,
    sink: ChoiceSink,
    text: Option<AnswerText>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
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
    /// The sequences of a request, one for each answer, named from `first` on. `text` is absent for models without a
    /// tokenizer: their events carry token ids only.
    pub fn of_request(first: SequenceId, prepared: Prepared, text: Option<Arc<TextModel>>, now: Instant) -> Vec<Self> {
        let Prepared {
            prompt,
            last_message,
            max_tokens,
            sampling,
            stop_tokens,
            stop,
            guide,
            answer,
            mut ticket,
            choices,
            priority,
            tells_start,
            sink,
        } = prepared;
        let sinks = ChoiceSink::of(sink, choices).into_iter().enumerate();
        sinks
            .map(|(choice, sink)| Self {
                id: first + choice as SequenceId,
                prompt_len: prompt.len(),
                marks: Marks::new(prompt.len(), last_message),
                tokens: prompt.clone(),
                computed: 0,
                unread: 0,
                max_tokens,
                priority,
                queued: now,
                cached: 0,
                reached: 0,
                ticket: if choice == 0 { ticket.take() } else { None },
                untold: tells_start && choice == 0,
                table: None,
                // Answers differ, and the first is the one that a request for a single answer gets.
                sampling: SamplingParams { seed: sampling.seed.wrapping_add(choice as u64), ..sampling.clone() },
                stop_tokens: stop_tokens.clone(),
                guide: guide.clone(),
                unguided: None,
                sink,
                text: text.clone().map(|model| AnswerText::new(model, stop.clone(), answer.as_ref(), choice)),
                first_token: None,
                last_token: None,
            })
            .collect()
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

    /// Tells the host of what was sent.
    pub fn tell(&self) {
        self.sink.state().tell();
    }

    /// Whether its next token can only be chosen when all before it have been read.
    pub fn depends_on_unread(&self) -> bool {
        self.guide.as_ref().is_some_and(Guide::depends_on_unread)
    }

    /// Whether its next tokens may be some only.
    pub fn is_guided(&self) -> bool {
        self.guide.as_ref().is_some_and(Guide::restricts)
    }

    /// The tokens that may come next; `None` if all may. All before have been read. What goes wrong ends the sequence when
    /// it takes the next token.
    pub fn mask(&mut self) -> Option<TokenMask> {
        let mask = self.guide.as_mut().map_or(Ok(None), Guide::mask);
        mask.unwrap_or_else(|error| {
            self.unguided = Some(error);
            None
        })
    }

    /// Sampled tokens that have been read.
    pub fn completion_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Tokens that are known, or on their way, and not computed.
    pub fn left(&self) -> usize {
        (self.tokens.len() + self.unread).saturating_sub(self.computed)
    }

    /// Its first `tokens` tokens need not be computed. Returns how many of them are of the prompt and were not before.
    pub fn skip_to(&mut self, tokens: usize) -> usize {
        self.computed = tokens;
        let new = tokens.min(self.prompt_len).saturating_sub(self.reached);
        self.cached += new;
        self.reach();
        new
    }

    /// Its tokens up to `end` are being computed; whether another one is sampled after them.
    pub fn run_to(&mut self, end: usize) -> bool {
        let samples = end >= self.tokens.len();
        self.unread += usize::from(samples);
        self.computed = end;
        self.reach();
        samples
    }

    /// Tells the host that it begins, if it is to be told.
    pub fn tell_start(&mut self) {
        if std::mem::take(&mut self.untold) {
            self.sink.start(self.prompt_len, self.cached);
        }
    }

    /// What is computed again later counts neither as new nor as cached.
    fn reach(&mut self) {
        self.reached = self.reached.max(self.computed);
    }

    /// Whether the host asked to end it.
    pub fn is_cancelled(&self) -> bool {
        self.sink.state().is_cancelled() || self.sink.is_over()
    }

    /// Whether the host is too far behind with reading.
    pub fn sink_is_full(&self) -> bool {
        self.sink.state().is_full()
    }

    /// Takes one sampled token: sends its text, and says whether the sequence ends with it.
    pub fn accept(&mut self, sampled: SampledToken, now: Instant) -> Result<Option<FinishReason>> {
        self.unread -= 1;
        self.tokens.push(sampled.token);
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        if let Some(error) = self.unguided.take() {
            return Err(error);
        }
        if self.stop_tokens.contains(&sampled.token) {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(guide) = &mut self.guide {
            guide.accept(sampled.token)?;
        }
        let Pieces { pieces, ends: stopped } = match &mut self.text {
            Some(text) => text.push(sampled.token)?,
            None => Pieces { pieces: vec![Default::default()], ends: false },
        };
        let mut logprob = sampled.logprob.map(|(logprob, top)| self.logprob(sampled.token, logprob, top));
        let mut token = Some(sampled.token);
        for (kind, text) in pieces {
            let (tokens, logprobs) = (token.take().into_iter().collect(), logprob.take().into_iter().collect());
            self.sink.delta(Delta { kind, text, tokens, logprobs, ..Delta::default() });
        }
        let complete = self.guide.as_ref().is_some_and(Guide::is_complete);
        Ok(if stopped || complete {
            Some(FinishReason::Stop)
        } else if self.completion_len() >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        })
    }

    fn logprob(&self, token: u32, logprob: f32, top: Vec<(u32, f32)>) -> TokenLogprob {
        let tokenizer = self.text.as_ref().and_then(AnswerText::tokenizer);
        let bytes = |id| tokenizer.and_then(|tokenizer| tokenizer.token_bytes(id)).unwrap_or_default();
        let entry = |(token, logprob)| TokenLogprob { token, logprob, bytes: bytes(token), top: Vec::new() };
        TokenLogprob { top: top.into_iter().map(entry).collect(), ..entry((token, logprob)) }
    }

    /// Ends the sequence, and its request if it is the last of it or failed. What was still held back of its text is sent
    /// first, unless the request failed.
    pub fn finish(mut self, end: Result<FinishReason, Error>) {
        let usage = self.usage();
        let end = end.map(|reason| {
            let text = self.text.as_mut();
            for (kind, text) in text.map(AnswerText::finish).unwrap_or_default() {
                self.sink.delta(Delta { kind, text, ..Delta::default() });
            }
            match self.text.as_ref().map_or(0, AnswerText::complete_calls) {
                calls if calls > 0 && reason == FinishReason::Stop => FinishReason::ToolCalls,
                _ => reason,
            }
        });
        let stop = self.text.as_ref().and_then(AnswerText::stopped_by).map(str::to_owned);
        self.sink.finish(end, stop, usage);
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
            cached_tokens: self.cached,
            completion_tokens: generated,
            reasoning_tokens: self.text.as_ref().map_or(0, AnswerText::reasoning_tokens),
            seconds_to_first_token: self.first_token.map_or(0.0, |first| (first - accepted).as_secs_f64()),
            tokens_per_second: rate,
        }
    }
}

/// The error of a request that its host cancelled.
pub fn cancelled() -> Error {
    Error::new(Status::Cancelled, "the request was cancelled")
}
