//! Answers of a model: the beginning of a stream, or all of it collected.

use std::time::Duration;

use omlx_client::{Done, Event, FinishReason, Piece, Request, TokenLogprob, ToolCall, Usage};
use tokio::time::Instant;

use super::error::ApiError;

/// How long a stream waits for its first event before it sends its head: what fails by then is an error of HTTP.
const PATIENCE: Duration = Duration::from_secs(3);

/// A request whose first piece was looked at.
pub struct Events {
    first: Option<Event>,
    request: Request,
    /// Of the prompt.
    started: Option<Usage>,
}

impl Events {
    /// Waits a while for the first piece. A request that has failed by then is an error.
    pub async fn begin(request: Request) -> Result<Self, ApiError> {
        Self::begin_until(request, Instant::now() + PATIENCE).await
    }

    /// The same for requests whose answers make one stream: a while for all of them together.
    pub async fn begin_all(requests: Vec<Request>) -> Result<Vec<Self>, ApiError> {
        let deadline = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        for request in requests {
            all.push(Self::begin_until(request, deadline).await?);
        }
        Ok(all)
    }

    async fn begin_until(request: Request, deadline: Instant) -> Result<Self, ApiError> {
        let mut events = Self { first: None, request, started: None };
        // What is there already is taken after the deadline, too.
        let first = tokio::time::timeout_at(deadline, events.piece()).await.unwrap_or_default();
        match first {
            Some(Event::Done(Done { error: Some(error), .. })) => Err(error.into()),
            first => Ok(Self { first, ..events }),
        }
    }

    /// Counts of the prompt, when it begins to be computed; those of nothing if it never does.
    pub async fn started(&mut self) -> Usage {
        while self.started.is_none() && self.first.is_none() {
            match self.request.next().await {
                Some(Event::Started(prompt_tokens, cached_tokens)) => self.start(prompt_tokens, cached_tokens),
                None => break,
                event => self.first = event,
            }
        }
        self.started.unwrap_or_default()
    }

    /// The next event.
    pub async fn next(&mut self) -> Option<Event> {
        match self.first.take() {
            Some(event) => Some(event),
            None => self.piece().await,
        }
    }

    /// The next event that is not about the prompt.
    async fn piece(&mut self) -> Option<Event> {
        loop {
            match self.request.next().await {
                Some(Event::Started(prompt_tokens, cached_tokens)) => self.start(prompt_tokens, cached_tokens),
                event => return event,
            }
        }
    }

    fn start(&mut self, prompt_tokens: u64, cached_tokens: u64) {
        self.started = Some(Usage { prompt_tokens, cached_tokens, ..Usage::default() });
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
    /// The stop string that ended it.
    pub stop: Option<String>,
}

impl Default for Choice {
    fn default() -> Self {
        let finish = FinishReason::Stop;
        let (text, reasoning) = Default::default();
        Self { text, reasoning, calls: Vec::new(), logprobs: Vec::new(), finish, stop: None }
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
                Event::ChoiceDone(choice, reason, stop) => answer.end(choice, reason, stop),
                Event::Done(done) => {
                    if let Some(error) = done.error {
                        return Err(error.into());
                    }
                    answer.usage = done.usage;
                    if answer.choices.len() <= 1 {
                        answer.end(0, done.reason, done.stop);
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

    fn end(&mut self, choice: usize, reason: FinishReason, stop: Option<String>) {
        let choice = self.choice(choice);
        (choice.finish, choice.stop) = (reason, stop);
    }

    fn choice(&mut self, index: usize) -> &mut Choice {
        if self.choices.len() <= index {
            self.choices.resize_with(index + 1, Choice::default);
        }
        &mut self.choices[index]
    }
}
