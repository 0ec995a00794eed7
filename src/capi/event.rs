//! `omlx_event`: what a request tells its host.

use std::ffi::{CString, c_char};

use super::array_pointer;
use super::error::c_string;
use crate::engine::{
    Delta, DeltaKind, Done, Embeddings, Event, FinishReason, Scores, TokenLogprob, ToolCallPart, Usage,
};
use crate::error::Status;

/// Kinds of events. Hosts ignore kinds they do not know.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_event_kind {
    /// A piece of the answer: `text`, `tokens` and `logprobs`. The text may be empty, while a character, a possible
    /// stop string or a mark is incomplete.
    Text = 1,
    /// The end of the request, exactly once and last: `finish_reason`, `status`, `error_message` and `usage`.
    Done = 2,
    /// The end of one of several answers: `choice` and `finish_reason`. Not sent for the only one.
    ChoiceDone = 3,
    /// The vectors of an `omlx_embed`: `values` with a row for each text; `text`, if base64 was asked for; `truncated`.
    Embeddings = 4,
    /// The scores of an `omlx_rerank`: `values` with a row for each document; `order`; `truncated`.
    Scores = 5,
    /// The model is being loaded: `loaded_bytes` of `total_bytes`. Only for requests that asked for it.
    Loading = 6,
    /// A piece of what the model thinks before it answers; fields as for text. Chat requests only.
    Reasoning = 7,
    /// A piece of a tool call: `text` is the next piece of its arguments, together JSON text; `tool_index`, `tool_id` and
    /// `tool_name` are the same in all pieces of a call, the first of which has no text. `tokens` and `logprobs` as for
    /// text. A call that is malformed or cut off ends early, and its rest is text. Chat requests with tools only.
    ToolCall = 8,
    /// The prompt begins to be computed: `prompt_tokens` and `cached_tokens` of `usage`, of which the latter may grow until the
    /// end, where another request computes the same. Before any text, and only for requests that asked for it.
    Started = 9,
}

/// Why a request ended.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_finish_reason {
    /// It has not ended.
    None = 0,
    /// The model ended its turn, or a stop string or stop token came.
    Stop = 1,
    /// `max_tokens` or the end of the context was reached.
    Length = 2,
    /// The host cancelled it, or its model was unloaded.
    Cancelled = 3,
    /// See `status` and `error_message`.
    Error = 4,
    /// The model ended its turn, and has made at least one whole tool call, for which it awaits results.
    ToolCalls = 5,
}

/// Log-probability of a token: natural logarithm, of the model's own distribution before penalties and temperature.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct omlx_token_logprob {
    /// Token id.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The token's bytes; may hold a part of a character. Not NUL-terminated.
    pub bytes: *const u8,
    /// Number of bytes.
    pub byte_count: usize,
    /// The likeliest tokens in its place, best first; NULL unless asked for. Their own `top` is NULL.
    pub top: *const omlx_token_logprob,
    /// Number of likeliest tokens.
    pub top_count: usize,
}

/// Counts and times of a request.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct omlx_usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Prompt tokens that a cache had already.
    pub cached_tokens: u64,
    /// Tokens sampled, an end-of-turn token included.
    pub completion_tokens: u64,
    /// Those of them that were reasoning, its marks included.
    pub reasoning_tokens: u64,
    /// From `omlx_generate` to the first token, loading the model included; 0 if none came.
    pub seconds_to_first_token: f64,
    /// Rate of the tokens after the first, per second; 0 with fewer than two.
    pub tokens_per_second: f64,
}

/// One event. It and all it points to live until the callback returns, or until the next call of
/// `omlx_request_next` on the same request.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct omlx_event {
    /// Bytes of this struct in the library that fills it; fields behind the end are not there.
    pub struct_size: u32,
    /// An `omlx_event_kind`.
    pub kind: u32,
    /// Which of several answers; 0 for the only one.
    pub choice: u32,
    /// An `omlx_finish_reason`.
    pub finish_reason: u32,
    /// Whole UTF-8 characters, NUL-terminated; never NULL. May contain NUL characters: use `text_len`.
    pub text: *const c_char,
    /// Bytes of text.
    pub text_len: usize,
    /// Ids of the tokens sampled since the last event; NULL if there are none.
    pub tokens: *const u32,
    /// Number of tokens.
    pub token_count: usize,
    /// One per token if the request asked for log-probabilities, else NULL.
    pub logprobs: *const omlx_token_logprob,
    /// Number of log-probabilities.
    pub logprob_count: usize,
    /// An `omlx_status`: why the request failed or was cancelled, else `OMLX_OK`.
    pub status: i32,
    /// Which tool call of the answer, from 0.
    pub tool_index: u32,
    /// Id of the tool call, for the message with its result, NUL-terminated; never NULL.
    pub tool_id: *const c_char,
    /// Name of the called tool, NUL-terminated; never NULL. It need not be one that the request has.
    pub tool_name: *const c_char,
    /// Details of the failure, NUL-terminated; never NULL.
    pub error_message: *const c_char,
    /// Filled in the done event; in the started event as far as it is known.
    pub usage: omlx_usage,
    /// Numbers `[rows, columns]`, row after row, in the order of the request's texts; NULL if there are none.
    pub values: *const f32,
    /// Texts.
    pub rows: usize,
    /// Numbers for each text: the dimensions of a vector, or 1 for a score.
    pub columns: usize,
    /// Which documents have the best scores, best first: `top_n` of them, or all; NULL if there are none.
    pub order: *const u32,
    /// Number of these documents.
    pub order_count: usize,
    /// Texts of which the end was left out because they were too long.
    pub truncated: usize,
    /// Bytes of the model's weights that are there.
    pub loaded_bytes: u64,
    /// Bytes that there will be; 0 until that is known, and while the model waits for memory.
    pub total_bytes: u64,
    /// The stop string that ended the answer, NUL-terminated; empty if none did; never NULL. In the done event and at the end
    /// of one of several answers.
    pub stop_string: *const c_char,
}

/// An event in C's form with everything it points to.
pub(super) struct EventView {
    event: omlx_event,
    _text: Vec<u8>,
    _tokens: Vec<u32>,
    _logprobs: LogprobView,
    _values: Vec<f32>,
    _order: Vec<u32>,
    /// What most events do not have, and what the event's pointers lead to otherwise.
    _texts: [Option<CString>; 4],
}

#[derive(Default)]
struct LogprobView {
    entries: Vec<omlx_token_logprob>,
    _tops: Vec<Vec<omlx_token_logprob>>,
    _source: Vec<TokenLogprob>,
}

// SAFETY: the pointers lead into this object's own heap memory, which nobody changes.
unsafe impl Send for EventView {}

impl LogprobView {
    fn new(source: Vec<TokenLogprob>) -> Self {
        let entry = |l: &TokenLogprob, top: &[omlx_token_logprob]| omlx_token_logprob {
            token: l.token,
            logprob: l.logprob,
            bytes: array_pointer(&l.bytes),
            byte_count: l.bytes.len(),
            top: array_pointer(top),
            top_count: top.len(),
        };
        let tops: Vec<Vec<_>> = source.iter().map(|l| l.top.iter().map(|t| entry(t, &[])).collect()).collect();
        let entries = source.iter().zip(&tops).map(|(l, top)| entry(l, top)).collect();
        // Moving the vectors moves their headers only; the pointers lead to their heap memory.
        Self { entries, _tops: tops, _source: source }
    }
}

impl EventView {
    pub fn new(event: Event) -> Self {
        match event {
            Event::Delta(delta) => {
                let kind = match delta.kind {
                    DeltaKind::Text => omlx_event_kind::Text,
                    DeltaKind::Reasoning => omlx_event_kind::Reasoning,
                    DeltaKind::ToolCall(_) => omlx_event_kind::ToolCall,
                };
                Self::build(kind, delta, None)
            }
            Event::ChoiceDone(choice, reason, stop) => {
                // The usage is the request's.
                let end = Done { reason, stop, error: None, usage: Usage::default() };
                Self::build(omlx_event_kind::ChoiceDone, Delta { choice, ..Delta::default() }, Some(end))
            }
            Event::Done(done) => Self::build(omlx_event_kind::Done, Delta::default(), Some(done)),
            Event::Started(prompt_tokens, cached_tokens) => {
                let mut view = Self::build(omlx_event_kind::Started, Delta::default(), None);
                view.event.usage = usage(&Usage { prompt_tokens, cached_tokens, ..Usage::default() });
                view
            }
            Event::Loading(there, all) => {
                let mut view = Self::build(omlx_event_kind::Loading, Delta::default(), None);
                (view.event.loaded_bytes, view.event.total_bytes) = (there, all);
                view
            }
            Event::Embeddings(Embeddings { dimensions, values, text, truncated }) => {
                let view = Self::build(omlx_event_kind::Embeddings, Delta { text, ..Delta::default() }, None);
                view.with_rows(values, dimensions, Vec::new(), truncated)
            }
            Event::Scores(Scores { values, order, truncated }) => {
                let view = Self::build(omlx_event_kind::Scores, Delta::default(), None);
                view.with_rows(values, 1, order, truncated)
            }
        }
    }

    fn with_rows(mut self, values: Vec<f32>, columns: usize, order: Vec<u32>, truncated: usize) -> Self {
        self.event.values = array_pointer(&values);
        self.event.rows = values.len() / columns.max(1);
        self.event.columns = columns;
        self.event.order = array_pointer(&order);
        self.event.order_count = order.len();
        self.event.truncated = truncated;
        Self { _values: values, _order: order, ..self }
    }

    fn build(kind: omlx_event_kind, delta: Delta, done: Option<Done>) -> Self {
        let Delta { choice, kind: delta_kind, text, tokens, logprobs } = delta;
        let (tool_index, tool) = match &delta_kind {
            DeltaKind::ToolCall(ToolCallPart { index, id, name }) => (*index, [id.as_str(), name]),
            DeltaKind::Text | DeltaKind::Reasoning => (0, ["", ""]),
        };
        let logprobs = LogprobView::new(logprobs);
        let text_len = text.len();
        let mut text = text.into_bytes();
        text.push(0);
        let error = done.as_ref().and_then(|done| done.error.as_ref());
        let message = error.map_or("", |error| error.message());
        let stop = done.as_ref().and_then(|done| done.stop.as_deref()).unwrap_or_default();
        let texts = [tool[0], tool[1], message, stop].map(|text| (!text.is_empty()).then(|| c_string(text)));
        let [tool_id, tool_name, error_message, stop_string] =
            texts.each_ref().map(|text| text.as_ref().map_or(c"".as_ptr(), |text| text.as_ptr()));
        let event = omlx_event {
            struct_size: size_of::<omlx_event>() as u32,
            kind: kind as u32,
            choice: choice as u32,
            finish_reason: done.as_ref().map_or(omlx_finish_reason::None, |d| finish_reason(d.reason)) as u32,
            text: text.as_ptr().cast(),
            text_len,
            tokens: array_pointer(&tokens),
            token_count: tokens.len(),
            logprobs: array_pointer(&logprobs.entries),
            logprob_count: logprobs.entries.len(),
            status: error.map_or(Status::Ok, |error| error.status()) as i32,
            tool_index: tool_index as u32,
            tool_id,
            tool_name,
            error_message,
            usage: done.as_ref().map(|done| usage(&done.usage)).unwrap_or_default(),
            values: std::ptr::null(),
            rows: 0,
            columns: 0,
            order: std::ptr::null(),
            order_count: 0,
            truncated: 0,
            loaded_bytes: 0,
            total_bytes: 0,
            stop_string,
        };
        Self {
            event,
            _text: text,
            _tokens: tokens,
            _logprobs: logprobs,
            _values: Vec::new(),
            _order: Vec::new(),
            _texts: texts,
        }
    }

    /// Valid as long as `self` is neither moved out of its box nor dropped.
    pub fn as_ptr(&self) -> *const omlx_event {
        &raw const self.event
    }
}

fn finish_reason(reason: FinishReason) -> omlx_finish_reason {
    match reason {
        FinishReason::Stop => omlx_finish_reason::Stop,
        FinishReason::ToolCalls => omlx_finish_reason::ToolCalls,
        FinishReason::Length => omlx_finish_reason::Length,
        FinishReason::Cancelled => omlx_finish_reason::Cancelled,
        FinishReason::Error => omlx_finish_reason::Error,
    }
}

fn usage(usage: &Usage) -> omlx_usage {
    omlx_usage {
        prompt_tokens: usage.prompt_tokens as u64,
        cached_tokens: usage.cached_tokens as u64,
        completion_tokens: usage.completion_tokens as u64,
        reasoning_tokens: usage.reasoning_tokens as u64,
        seconds_to_first_token: usage.seconds_to_first_token,
        tokens_per_second: usage.tokens_per_second,
    }
}
