//! Events of a request as values.

use crate::error::{Error, Status, text};
use crate::ffi;
use crate::text::slice;

/// What a request tells. Kinds that this client does not know are left out.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// Bytes of the model's weights that are there, and that there will be (0 until that is known).
    Loading(u64, u64),
    /// The prompt begins to be computed: its tokens, and those of them that a cache has.
    Started(u64, u64),
    /// A piece of the answer.
    Text(Piece),
    /// A piece of what the model thought before it.
    Reasoning(Piece),
    /// A piece of a tool call's arguments.
    ToolCall(ToolCall),
    /// The end of one of several answers: which, why, and by which stop string.
    ChoiceDone(usize, FinishReason, Option<String>),
    /// The vectors of texts.
    Embeddings(Embeddings),
    /// The scores of documents.
    Scores(Scores),
    /// The end, once and last.
    Done(Done),
}

/// A piece of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Piece {
    /// Which of several answers.
    pub choice: usize,
    /// Whole characters; may be empty.
    pub text: String,
    /// The tokens sampled since the last event.
    pub tokens: Vec<u32>,
    /// One per token, if the request asked for them.
    pub logprobs: Vec<TokenLogprob>,
}

/// A piece of a tool call.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ToolCall {
    /// The next piece of the arguments, JSON; and the tokens.
    pub piece: Piece,
    /// Which of the answer's calls.
    pub index: usize,
    /// Its id, the same in all its pieces.
    pub id: String,
    /// The tool's name, the same in all its pieces.
    pub name: String,
}

/// Log-probability of a token: natural logarithm.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Its bytes; may be a part of a character.
    pub bytes: Vec<u8>,
    /// The likeliest tokens in its place, best first.
    pub top: Vec<TokenLogprob>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model ended its turn, or a stop string came.
    Stop,
    /// The most tokens were reached.
    Length,
    /// It ended with a call of a tool.
    ToolCalls,
    /// It was cancelled.
    Cancelled,
    /// The error of the done event.
    Error,
    /// Another one.
    Other(u32),
}

/// Counts and times of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Those that a cache had.
    pub cached_tokens: u64,
    /// Tokens sampled.
    pub completion_tokens: u64,
    /// Those of them that were thinking.
    pub reasoning_tokens: u64,
    /// Seconds to the first token; 0 if none came.
    pub seconds_to_first_token: f64,
    /// Tokens per second after the first; 0 with fewer than two.
    pub tokens_per_second: f64,
}

/// Vectors of texts, in their order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Embeddings {
    /// `[texts, dimensions]`.
    pub values: Vec<f32>,
    /// Numbers of each vector.
    pub dimensions: usize,
    /// The same as a JSON array of base64 texts, if the request asked for it.
    pub text: String,
    /// Texts that were cut.
    pub truncated: usize,
}

/// Scores of documents.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// One for each document, in their order.
    pub values: Vec<f32>,
    /// The best documents, best first.
    pub order: Vec<u32>,
    /// Documents that were cut.
    pub truncated: usize,
}

/// The end of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Why.
    pub reason: FinishReason,
    /// The stop string that ended the answer.
    pub stop: Option<String>,
    /// Set if it failed or was cancelled.
    pub error: Option<Error>,
    /// Counts and times.
    pub usage: Usage,
}

impl Event {
    /// A copy of a C event; `None` for an unknown kind.
    ///
    /// # Safety
    /// `event` and all that it points to is alive.
    pub(crate) unsafe fn read(event: &ffi::omlx_event) -> Option<Self> {
        // SAFETY: the event's pointers are as the header says, all of this function.
        unsafe {
            Some(match event.kind {
                ffi::OMLX_EVENT_KIND_TEXT => Self::Text(piece(event)),
                ffi::OMLX_EVENT_KIND_REASONING => Self::Reasoning(piece(event)),
                ffi::OMLX_EVENT_KIND_TOOL_CALL => Self::ToolCall(ToolCall {
                    piece: piece(event),
                    index: event.tool_index as usize,
                    id: text(event.tool_id),
                    name: text(event.tool_name),
                }),
                ffi::OMLX_EVENT_KIND_CHOICE_DONE => {
                    Self::ChoiceDone(event.choice as usize, reason(event.finish_reason), stop_string(event))
                }
                ffi::OMLX_EVENT_KIND_STARTED => Self::Started(event.usage.prompt_tokens, event.usage.cached_tokens),
                ffi::OMLX_EVENT_KIND_LOADING => Self::Loading(event.loaded_bytes, event.total_bytes),
                ffi::OMLX_EVENT_KIND_EMBEDDINGS => Self::Embeddings(Embeddings {
                    values: slice(event.values, event.rows * event.columns).to_vec(),
                    dimensions: event.columns,
                    text: text_of(event),
                    truncated: event.truncated,
                }),
                ffi::OMLX_EVENT_KIND_SCORES => Self::Scores(Scores {
                    values: slice(event.values, event.rows * event.columns).to_vec(),
                    order: slice(event.order, event.order_count).to_vec(),
                    truncated: event.truncated,
                }),
                ffi::OMLX_EVENT_KIND_DONE => Self::Done(Done {
                    reason: reason(event.finish_reason),
                    stop: stop_string(event),
                    error: (event.status != ffi::OMLX_OK)
                        .then(|| Error::new(Status::from_code(event.status), text(event.error_message))),
                    usage: usage(&event.usage),
                }),
                _ => return None,
            })
        }
    }
}

/// # Safety
/// As for [`Event::read`].
unsafe fn text_of(event: &ffi::omlx_event) -> String {
    // SAFETY: `text` has `text_len` bytes.
    String::from_utf8_lossy(unsafe { slice(event.text.cast::<u8>(), event.text_len) }).into_owned()
}

/// # Safety
/// As for [`Event::read`].
unsafe fn stop_string(event: &ffi::omlx_event) -> Option<String> {
    // SAFETY: NUL-terminated.
    Some(unsafe { text(event.stop_string) }).filter(|stop| !stop.is_empty())
}

/// # Safety
/// As for [`Event::read`].
unsafe fn piece(event: &ffi::omlx_event) -> Piece {
    // SAFETY: counts belong to their pointers.
    unsafe {
        Piece {
            choice: event.choice as usize,
            text: text_of(event),
            tokens: slice(event.tokens, event.token_count).to_vec(),
            logprobs: slice(event.logprobs, event.logprob_count).iter().map(|item| logprob(item)).collect(),
        }
    }
}

/// # Safety
/// As for [`Event::read`].
unsafe fn logprob(item: &ffi::omlx_token_logprob) -> TokenLogprob {
    // SAFETY: counts belong to their pointers; those in `top` have none of their own.
    unsafe {
        TokenLogprob {
            token: item.token,
            logprob: item.logprob,
            bytes: slice(item.bytes, item.byte_count).to_vec(),
            top: slice(item.top, item.top_count).iter().map(|item| logprob(item)).collect(),
        }
    }
}

fn reason(number: u32) -> FinishReason {
    match number {
        ffi::OMLX_FINISH_REASON_STOP => FinishReason::Stop,
        ffi::OMLX_FINISH_REASON_LENGTH => FinishReason::Length,
        ffi::OMLX_FINISH_REASON_CANCELLED => FinishReason::Cancelled,
        ffi::OMLX_FINISH_REASON_ERROR => FinishReason::Error,
        ffi::OMLX_FINISH_REASON_TOOL_CALLS => FinishReason::ToolCalls,
        other => FinishReason::Other(other),
    }
}

fn usage(usage: &ffi::omlx_usage) -> Usage {
    Usage {
        prompt_tokens: usage.prompt_tokens,
        cached_tokens: usage.cached_tokens,
        completion_tokens: usage.completion_tokens,
        reasoning_tokens: usage.reasoning_tokens,
        seconds_to_first_token: usage.seconds_to_first_token,
        tokens_per_second: usage.tokens_per_second,
    }
}
