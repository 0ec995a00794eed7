//! Everything between text and token ids. Pure: no array, no device, no thread of an engine.
//!
//! The data path of a chat request:
//!
//! ```text
//! messages, tools ── ChatTemplates::render ──▶ prompt text ── Tokenizer::encode ──▶ prompt ids ──┐
//!                                                                                              │ engine
//! events ◀── AnswerParser::push ◀── StopMatcher::push ◀── Detokenizer::push ◀── sampled ids ◀──┘
//! ```
//!
//! [`TextModel`] is what a model folder says about text: the tokenizer, the special tokens and the chat templates.
//! It is immutable and shared by all requests; a [`Detokenizer`], a [`StopMatcher`] and an [`AnswerParser`] belong to one
//! sequence.
//!
//! A rendered chat already holds its special tokens, so it is encoded with `add_special_tokens = false`; a plain
//! completion prompt is encoded with `true`.

pub mod answer;
mod decoding;
pub mod detokenizer;
mod encoder_input;
pub mod grammar;
mod pair_format;
mod special;
pub mod stop;
pub mod template;
pub mod tokenizer;

use std::path::Path;

use serde::de::DeserializeOwned;

pub use answer::{AnswerFormat, AnswerParser, AnswerPart, AnswerSettings, AnswerShape, ToolFormat};
pub use detokenizer::Detokenizer;
pub use encoder_input::{TextInput, TextLimits, TextTokens};
pub use pair_format::PairFormat;
pub use special::SpecialTokens;
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatInput, ChatTemplates, LocalTime};
pub use tokenizer::Tokenizer;

use crate::error::{Error, Result};

/// What a model folder says about text.
#[derive(Debug)]
pub struct TextModel {
    tokenizer: Option<Tokenizer>,
    templates: ChatTemplates,
    special_tokens: SpecialTokens,
    answer_format: AnswerFormat,
}

impl TextModel {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the chat templates of `folder`.
    ///
    /// Each file may be absent: without `tokenizer.json` the model takes prompts of token ids only, and what needs text
    /// fails with `Unsupported`; without a template [`ChatTemplates::render`] fails with `Template`. A file that is
    /// there but damaged is `InvalidModel` and named.
    pub fn load(folder: &Path) -> Result<Self> {
        Self::load_with_clock(folder, LocalTime::now)
    }

    /// [`load`](Self::load) with another clock behind the templates' `strftime_now`, for reproducible prompts.
    pub fn load_with_clock(folder: &Path, now: fn() -> LocalTime) -> Result<Self> {
        let config: Option<serde_json::Value> = read_json(folder, "tokenizer_config.json")?;
        let config = config.unwrap_or(serde_json::Value::Null);
        let special_tokens = SpecialTokens::load(folder, &config)?;
        let templates = ChatTemplates::load(folder, &config, &special_tokens, now)?;
        let tokenizer = Tokenizer::load(folder)?;
        let has_token = |token: &str| tokenizer.as_ref().is_some_and(|t| t.token_id(token).is_some());
        let answer_format = AnswerFormat::detect(templates.text(), has_token);
        Ok(Self { tokenizer, templates, special_tokens, answer_format })
    }

    /// The tokenizer; `Unsupported` if the folder has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::unsupported("the model folder has no tokenizer.json: only prompts of token ids are possible")
        })
    }

    /// The chat templates, possibly none.
    pub fn templates(&self) -> &ChatTemplates {
        &self.templates
    }

    /// How the model marks reasoning and tool calls.
    pub fn answer_format(&self) -> AnswerFormat {
        self.answer_format
    }

    /// The named special tokens of the model, as text.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// Id of the end-of-sequence token that `tokenizer_config.json` names.
    ///
    /// The engine joins it with the list in `generation_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.special_token_id("eos_token")
    }

    /// Id of the beginning-of-sequence token that `tokenizer_config.json` names.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.special_token_id("bos_token")
    }

    fn special_token_id(&self, name: &str) -> Option<u32> {
        self.tokenizer.as_ref()?.token_id(self.special_tokens.get(name)?)
    }
}

/// The bytes of `folder/name`, `None` if there is no such file.
fn read_bytes(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    match std::fs::read(folder.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(name, &e)),
    }
}

/// The UTF-8 text of `folder/name`, `None` if there is no such file.
fn read_text(folder: &Path, name: &str) -> Result<Option<String>> {
    let Some(bytes) = read_bytes(folder, name)? else { return Ok(None) };
    let text = String::from_utf8(bytes).map_err(|e| Error::invalid_model(format!("{name}: {e}")))?;
    Ok(Some(text))
}

/// The JSON document `folder/name`, `None` if there is no such file.
fn read_json<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<Option<T>> {
    let Some(bytes) = read_bytes(folder, name)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes).map_err(|e| Error::invalid_model(format!("{name}: {e}")))?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests;
