//! Answers of a model: the beginning of a stream, or all of it collected.

use std::time::Duration;

use omlx_client::{Event, FinishReason, Piece, Request, TokenLogprob, ToolCall, Usage};

use super::error::ApiError;

/// How long a stream waits for its first event before it sends its head: what fails by then is an error of HTTP.
const PATIENCE: Duration = Duration::from_secs(3);

/// A request whose first event was looked at.
pub struct Events {
    first: Option<Event>,
    request: Request,
}

impl Events {
    /// Waits a while for the first event. A request that has failed by then is an error.
    pub async fn begin(mut request: Request) -> Result<Self, ApiError> {
        let first = match tokio::time::timeout(PATIENCE, request.next()).await {
            Ok(Some(Event::Done(done))) => match done.error {
                Some(error) => return Err(error.into()),
                None => Some(Event::Done(done)),
            },
            Ok(event) => event,
            Err(_) => None,
        };
        Ok(Self { first, request })
    }

    /// The next event.
    pub async fn next(&mut self) -> Option<Event> {
        match self.first.take() {
            Some(event) => Some(event),
            None => self.request.next().await,
        }
    }
}

/// A tool call, whole.
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// Its id.
    pub id: String,
    /// The tool.
    pub name: String,
    /// JSON.
    pub arguments: String,
}

/// One answer, whole.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Its text.
    pub text: String,
    /// What was thought before.
    pub reasoning: String,
    /// Tools to call.
    pub calls: Vec<Call>,
    /// Of its text, if asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Default for Choice {
    fn default() -> Self {
        let finish = FinishReason::Stop;
        Self { text: String::new(), reasoning: String::new(), calls: Vec::new(), logprobs: Vec::new(), finish }
    }
}

/// All answers to a request.
#[derive(Debug, Default)]
pub struct Answer {
    /// In the order of their numbers; at least one.
    pub choices: Vec<Choice>,
    /// Counts.
    pub usage: Usage,
}

impl Answer {
    /// Reads a request to its end.
    pub async fn collect(mut request: Request) -> Result<Self, ApiError> {
        let mut answer = Self::default();
        while let Some(event) = request.next().await {
            match event {
                Event::Text(piece) => answer.text(piece),
                Event::Reasoning(piece) => answer.choice(piece.choice).reasoning.push_str(&piece.text),
                Event::ToolCall(call) => answer.call(call),
                Event::ChoiceDone(choice, reason) => answer.choice(choice).finish = reason,
                Event::Done(done) => {
                    if let Some(error) = done.error {
                        return Err(error.into());
                    }
                    answer.usage = done.usage;
                    if answer.choices.len() <= 1 {
                        answer.choice(0).finish = done.reason;
                    }
                }
                _ => {}
            }
        }
        Ok(answer)
    }

    fn text(&mut self, piece: Piece) {
        let choice = self.choice(piece.choice);
        choice.text.push_str(&piece.text);
        choice.logprobs.extend(piece.logprobs);
    }

    fn call(&mut self, call: ToolCall) {
        let choice = self.choice(call.piece.choice);
        while choice.calls.len() <= call.index {
            choice.calls.push(Call::default());
        }
        let slot = &mut choice.calls[call.index];
        (slot.id, slot.name) = (call.id, call.name);
        slot.arguments.push_str(&call.piece.text);
    }

    fn choice(&mut self, index: usize) -> &mut Choice {
        if self.choices.len() <= index {
            self.choices.resize_with(index + 1, Choice::default);
        }
        &mut self.choices[index]
    }
}

/// OpenAI's word for the end of an answer.
pub fn finish_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
        _ => "stop",
    }
}
