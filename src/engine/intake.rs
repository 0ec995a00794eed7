//! The thread between host and worker: renders, tokenises and resolves defaults, so that neither of them does.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use crossbeam_channel::{Receiver, Sender};
use serde_json::Value;

use super::answer::AnswerPlan;
use super::answer_form;
use super::encode::EncodeRequest;
use super::encode::text::EncoderText;
use super::events::EventSink;
use super::queue::QueueTicket;
use super::request::{ChatInput, Input, Request};
use super::sequence::{Prepared, cancelled};
use super::worker::Command;
use super::{EngineOptions, ModelSource, Shared};
use crate::config::{GenerationDefaults, ModelConfig};
use crate::error::{Error, Result, Status};
use crate::fault;
use crate::models::{self, ModelKind, encoder};
use crate::panics;
use crate::sampling::SamplingParams;
use crate::sync::lock;
use crate::text::answer::ReasoningSyntax;
use crate::text::grammar::{Constraint, GrammarVocabulary, Guide, ThinkingMarkers, ThinkingStart};
use crate::text::{AnswerSettings, StopMatcher, TextLimits, TextModel, Tokenizer};

/// What hosts and the pool ask of the intake thread.
#[derive(Debug)]
pub enum Message<R> {
    /// Prepare and run a request.
    Submit(Box<R>, QueueTicket, EventSink),
    /// Return.
    Stop,
}

impl<R> Message<R> {
    /// The sink of a submission that found no thread to take it.
    pub fn fail(self, error: Error) {
        if let Message::Submit(_, _, sink) = self {
            sink.fail(error);
        }
    }
}

/// The model's text side, which needs no weights: tokenizer, templates, defaults and limits.
#[derive(Debug)]
pub struct EngineText {
    /// Tokenizer and templates; absent for random weights.
    model: Option<Arc<TextModel>>,
    defaults: GenerationDefaults,
    context: usize,
    vocab: usize,
    /// Sequences of the model have more than rows.
    has_states: bool,
    /// Of an encoder: what its folder says about texts.
    limits: Option<TextLimits>,
    /// Built for the first request that needs it.
    grammar: OnceLock<Result<Arc<GrammarVocabulary>>>,
}

/// Tokens of a prompt that are read to see whether it has opened the thinking.
const PROMPT_END: usize = 64;

/// Text side of a model, loaded when first needed and shared by the engine and the pool.
#[derive(Debug)]
pub struct LazyText {
    source: ModelSource,
    kind: ModelKind,
    context: Option<usize>,
    loaded: Mutex<Option<Arc<EngineText>>>,
}

impl LazyText {
    /// Nothing is read yet.
    pub fn new(source: ModelSource, kind: ModelKind, context: Option<usize>) -> Self {
        Self { source, kind, context, loaded: Mutex::default() }
    }

    /// The text side, read from disk the first time; blocks for that.
    pub fn get(&self) -> Result<Arc<EngineText>> {
        let mut loaded = lock(&self.loaded);
        if let Some(text) = &*loaded {
            return Ok(Arc::clone(text));
        }
        let text = Arc::new(EngineText::load(&self.source, self.kind, self.context)?);
        *loaded = Some(Arc::clone(&text));
        Ok(text)
    }
}

impl EngineText {
    fn load(source: &ModelSource, kind: ModelKind, context: Option<usize>) -> Result<Self> {
        if let (ModelSource::Folder(folder), ModelKind::Embedding | ModelKind::Reranker) = (source, kind) {
            return Self::of_encoder(folder, context);
        }
        let (config, model, defaults) = match source {
            ModelSource::Folder(folder) => {
                let config = ModelConfig::load(folder)?;
                models::check_supported(&config)?;
                let defaults = GenerationDefaults::load(folder, &config)?;
                (config, Some(Arc::new(TextModel::load(folder)?)), defaults)
            }
            ModelSource::Random(config) => (config.clone(), None, GenerationDefaults::from_config(config)?),
        };
        let context = models::context_length(&config, context)?;
        Ok(Self {
            model,
            defaults,
            context,
            vocab: models::vocab_size(&config)?,
            has_states: models::plan(&config)?.state_bytes > 0,
            limits: None,
            grammar: OnceLock::new(),
        })
    }

    fn of_encoder(folder: &Path, context: Option<usize>) -> Result<Self> {
        let config = ModelConfig::load(folder)?;
        let most = encoder::max_tokens(&config)?;
        let context = context.map_or(most, |context| context.min(most));
        Ok(Self {
            model: Some(Arc::new(TextModel::load(folder)?)),
            defaults: GenerationDefaults::default(),
            context,
            vocab: models::vocab_size(&config)?,
            has_states: false,
            limits: Some(TextLimits::load(folder, context)?),
            grammar: OnceLock::new(),
        })
    }

    /// What turns the texts of `request` into tokens; of encoders only.
    pub fn encoder(&self, request: &EncodeRequest) -> Result<EncoderText<'_>> {
        let limits = self.limits.clone().ok_or_else(|| Error::internal("a language model has no limits of texts"))?;
        let max_tokens = request.context_limit.map_or(limits.max_tokens, |limit| limit.min(limits.max_tokens));
        Ok(EncoderText {
            tokenizer: self.tokenizer(),
            limits: TextLimits { max_tokens, ..limits },
            vocab: self.vocab,
            truncate: request.truncate,
        })
    }

    fn text_model(&self) -> Result<&TextModel> {
        self.model.as_deref().ok_or_else(|| Error::unsupported("this model has no tokenizer; send token ids"))
    }

    /// The tokenizer, or why there is none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.text_model()?.tokenizer()
    }

    /// The prompt text of a chat.
    pub fn render(&self, chat: &ChatInput) -> Result<String> {
        self.render_asking(chat, chat.add_generation_prompt)
    }

    fn render_asking(&self, chat: &ChatInput, add_generation_prompt: bool) -> Result<String> {
        let templates = self.text_model()?.templates();
        let messages = templates.with_argument_objects(&chat.messages);
        templates.render(&crate::text::ChatInput {
            messages: messages.as_ref().unwrap_or(&chat.messages),
            tools: chat.tools.as_ref(),
            template: chat.template.as_deref(),
            add_generation_prompt,
            kwargs: Some(&chat.kwargs),
        })
    }

    /// What turns sampled tokens into text, if the model has it.
    fn decoder(&self) -> Option<Arc<TextModel>> {
        self.model.clone().filter(|model| model.tokenizer().is_ok())
    }

    /// Prompt tokens of `input`, every one of which the model has.
    pub fn prompt(&self, input: &Input) -> Result<Vec<u32>> {
        self.prompt_and_text(input).map(|(ids, _)| ids)
    }

    /// The same, and of a chat the text.
    fn prompt_and_text(&self, input: &Input) -> Result<(Vec<u32>, Option<String>)> {
        let (ids, text) = match input {
            Input::Chat(chat) => {
                let text = self.render(chat)?;
                (self.tokenizer()?.encode(&text, false)?, Some(text))
            }
            Input::Text(text) => (self.tokenizer()?.encode(text, true)?, None),
            Input::Tokens(ids) => (ids.clone(), None),
        };
        // MLX does not check: it would read whatever lies behind the end of the table.
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            None => Ok((ids, text)),
            Some(id) => {
                let what = format!("token {id} is not in the model's vocabulary of {}", self.vocab);
                Err(match input {
                    Input::Tokens(_) => Error::invalid_request(what),
                    _ => Error::invalid_model(format!("the tokenizer does not fit the weights: {what}")),
                })
            }
        }
    }

    /// Tokens of `prompt` up to the end of the last message of a chat with this `text`, or but for the last one. Of models
    /// without states nobody asks.
    fn last_message(&self, input: &Input, prompt: &[u32], text: Option<&str>) -> usize {
        let asking = || {
            let (Input::Chat(chat), true) = (input, self.has_states) else { return None };
            let messages = self.render_asking(chat, false).ok()?;
            let asking = self.tokenizer().ok()?.encode(text?.strip_prefix(&*messages)?, false).ok()?;
            Some(asking.len()).filter(|_| prompt.ends_with(&asking))
        };
        prompt.len() - asking().filter(|asking| (1..prompt.len()).contains(asking)).unwrap_or(1)
    }

    /// The model's tokens as grammars see them; built by the first who asks.
    fn grammar(&self) -> Result<Arc<GrammarVocabulary>> {
        let build = || {
            let reasoning = self.text_model()?.answer_format().reasoning;
            let markers = reasoning.map(|ReasoningSyntax { open, close }| ThinkingMarkers {
                open: open.to_owned(),
                close: close.to_owned(),
            });
            let eos: Vec<u32> = self.eos().collect();
            GrammarVocabulary::new(self.tokenizer()?, self.vocab, &eos, markers).map(Arc::new)
        };
        self.grammar.get_or_init(build).clone()
    }

    fn eos(&self) -> impl Iterator<Item = u32> {
        self.defaults.eos.iter().copied().chain(self.model.as_ref().and_then(|model| model.eos_token_id()))
    }

    /// What holds the answer to the request's constraint and budget of thinking; `None` if it has neither. `text` is that of
    /// a chat.
    fn guide(&self, request: &Request, prompt: &[u32], text: Option<&str>) -> Result<Option<Guide>> {
        let format = match &self.model {
            Some(model) => model.answer_format().tools,
            None => None,
        };
        let constraint = answer_form::constraint(format, request, text)?;
        if constraint.is_none() && request.thinking_budget.is_none() {
            return Ok(None);
        }
        let grammar = self.grammar()?;
        let matcher = constraint.as_ref().map(|constraint| grammar.compile(constraint)).transpose()?;
        // In channels the thinking is a part of the form.
        if matches!(constraint, Some(Constraint::Channels(..))) {
            return Ok(Guide::new(grammar, matcher, ThinkingStart::Never, None));
        }
        let start = self.thinking_start(request, prompt)?;
        let guide = Guide::new(grammar, matcher, start, request.thinking_budget);
        let calls_end = match &constraint {
            Some(Constraint::ToolCalls(calls) | Constraint::Either(calls, _)) => calls.syntax.ends_reasoning,
            _ => false,
        };
        Ok(guide.map(|guide| if calls_end { guide.ended_by_calls() } else { guide }))
    }

    /// Whether the answer begins with thinking. The whole answer to a plain prompt is what was asked for, unless the prompt
    /// itself has opened the thinking.
    fn thinking_start(&self, request: &Request, prompt: &[u32]) -> Result<ThinkingStart> {
        let Some(ReasoningSyntax { open, close }) = self.text_model()?.answer_format().reasoning else {
            return Ok(ThinkingStart::Never);
        };
        let (open, close) = (open.trim_end(), close.trim_end());
        // Markers further ahead may be words of a message.
        let end = &prompt[prompt.len().saturating_sub(PROMPT_END)..];
        let end = self.tokenizer()?.decode(end, false)?;
        let Input::Chat(chat) = &request.input else {
            let opened = end.rfind(open) > end.rfind(close);
            return Ok(if opened { ThinkingStart::Opened } else { ThinkingStart::Never });
        };
        Ok(match end.trim_end() {
            end if end.ends_with(open) => ThinkingStart::Opened,
            end if end.ends_with(close) => ThinkingStart::Never,
            _ if chat.kwargs.get("enable_thinking") == Some(&Value::Bool(false)) => ThinkingStart::Never,
            _ => ThinkingStart::Free,
        })
    }

    /// How answers to a chat are read; other answers are text.
    fn answer(&self, request: &Request, prompt: Option<&str>) -> Option<AnswerPlan> {
        let (Input::Chat(chat), Some(prompt), Some(model)) = (&request.input, prompt, &self.model) else { return None };
        let format = model.answer_format();
        let shape = answer_form::shape(format.tools, request);
        let settings = AnswerSettings::new(format, chat.tools.as_ref(), prompt).shaped(shape);
        AnswerPlan::new(model, settings, chat.parallel_tool_calls, fresh_seed())
    }

    /// Resolves everything the request left open and checks it against the model.
    fn prepare(&self, request: Request, sink: EventSink) -> Result<Prepared, (Error, EventSink)> {
        let context = request.context_limit.map_or(self.context, |limit| limit.min(self.context));
        let (prompt, text) = match self.prompt_and_text(&request.input) {
            Ok((prompt, _)) if prompt.is_empty() => {
                return Err((Error::invalid_request("the prompt has no tokens"), sink));
            }
            Ok((prompt, _)) if prompt.len() >= context => {
                let (have, limit) = (prompt.len(), context);
                let what = format!("the prompt has {have} tokens, the context is {limit}");
                return Err((Error::new(Status::ContextLength, what), sink));
            }
            Ok(prompt) => prompt,
            Err(error) => return Err((error, sink)),
        };
        let guide = match self.guide(&request, &prompt, text.as_deref()) {
            Ok(guide) => guide,
            Err(error) => return Err((error, sink)),
        };
        let answer = self.answer(&request, text.as_deref());
        let last_message = self.last_message(&request.input, &prompt, text.as_deref());
        let defaults = &self.defaults;
        let room = context - prompt.len();
        let mut stop_tokens: HashSet<u32> = request.stop_tokens.iter().copied().collect();
        if !request.ignore_eos {
            stop_tokens.extend(self.eos());
        }
        let sampling = SamplingParams {
            temperature: request.temperature.or(defaults.temperature).unwrap_or(0.0),
            top_p: request.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: request.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: request.min_p.or(defaults.min_p).unwrap_or(0.0),
            seed: request.seed.unwrap_or_else(fresh_seed),
            repetition_penalty: request.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            presence_penalty: request.presence_penalty.unwrap_or(0.0),
            frequency_penalty: request.frequency_penalty.unwrap_or(0.0),
            logit_bias: request.logit_bias,
            top_logprobs: request.top_logprobs,
        };
        if let Some((token, _)) = sampling.logit_bias.iter().find(|(token, _)| *token as usize >= self.vocab) {
            return Err((Error::invalid_request(format!("\"logit_bias\": token {token} does not exist")), sink));
        }
        let stop = match StopMatcher::new(&request.stop) {
            Ok(stop) => stop,
            Err(error) => return Err((error, sink)),
        };
        Ok(Prepared {
            max_tokens: request.max_tokens.or(defaults.max_tokens).unwrap_or(room).min(room),
            prompt,
            last_message,
            sampling,
            stop_tokens,
            stop,
            guide,
            answer,
            ticket: None,
            choices: request.choices,
            priority: request.priority,
            tells_start: request.tells_start,
            sink,
        })
    }
}

/// A seed nobody chose: std's hasher keys come from the system's random numbers.
fn fresh_seed() -> u64 {
    RandomState::new().hash_one(std::time::Instant::now())
}

/// Passes requests to `admit` until told to stop; it sees to it that their sinks hear of what goes wrong.
pub fn main<R>(inbox: &Receiver<Message<R>>, shared: &Shared, admit: impl Fn(R, QueueTicket, EventSink)) {
    while let Ok(Message::Submit(request, ticket, sink)) = inbox.recv() {
        // A stop must not wait until the requests before it are prepared.
        if shared.failure.get().is_some() {
            sink.fail(shared.reason());
            continue;
        }
        if sink.state().is_cancelled() {
            sink.fail(cancelled());
            continue;
        }
        // A panic costs the request only: text is prepared from immutable data. The sink reports it if it is lost.
        if let Err(panic) = panics::catch(|| admit(*request, ticket, sink)) {
            tracing::error!(error = %panic, "preparing a request failed");
        }
    }
    while let Ok(message) = inbox.try_recv() {
        message.fail(shared.reason());
    }
}

/// Prepares a request and passes it to the worker.
pub fn admit(
    options: &EngineOptions,
    worker: &Sender<Command>,
    shared: &Shared,
    request: Request,
    ticket: QueueTicket,
    sink: EventSink,
) {
    fault::point("intake.prepare", &options.id);
    let prepared = match options.text.get() {
        Ok(text) => text.prepare(request, sink).map(|prepared| (prepared, text.decoder())),
        Err(error) => Err((error, sink)),
    };
    match prepared {
        Ok((mut prepared, text)) => {
            prepared.ticket = Some(ticket);
            let waker = worker.clone();
            prepared.sink.state().attach_worker(Box::new(move || drop(waker.send(Command::Wake))));
            let sent = worker.send(Command::Admit(Box::new(prepared), text));
            if let Err(Command::Admit(prepared, _)) = sent.map_err(|rejected| rejected.into_inner()) {
                prepared.sink.fail(shared.reason());
            }
        }
        Err((error, sink)) => sink.fail(error),
    }
}
