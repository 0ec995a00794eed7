//! From the texts of a request to the tokens of a job. Pure.

use super::output::Output;
use super::request::{EncodeTask, TextOrTokens};
use crate::error::{Error, Result, Status};
use crate::text::{TextInput, TextLimits, TextTokens, Tokenizer};

/// What turns texts into what an encoder takes.
#[derive(Debug)]
pub struct EncoderText<'a> {
    /// The model's tokenizer, or why there is none: then it takes token ids only.
    pub tokenizer: Result<&'a Tokenizer>,
    /// What the model's folder says about texts.
    pub limits: TextLimits,
    /// Number of token ids.
    pub vocab: usize,
    /// Whether longer texts are cut, or an error.
    pub truncate: bool,
}

impl EncoderText<'_> {
    /// The tokens of all texts of a task, and what becomes of what is computed for them.
    pub fn prepare(&self, task: &EncodeTask) -> Result<(Vec<TextTokens>, Output)> {
        let (texts, output) = match task {
            EncodeTask::Embed { texts, dimensions, normalize, base64 } => {
                let texts: Result<Vec<_>> = texts.iter().enumerate().map(|(at, text)| self.text(at, text)).collect();
                (texts, Output::Embeddings { dimensions: *dimensions, normalize: *normalize, base64: *base64 })
            }
            EncodeTask::Rerank { query, documents, instruction, top } => {
                let instruction = instruction.as_deref();
                let pair =
                    |(at, document): (usize, &String)| self.input(at, TextInput::Pair { instruction, query, document });
                (documents.iter().enumerate().map(pair).collect(), Output::Scores { top: *top })
            }
        };
        Ok((texts?, output))
    }

    fn text(&self, at: usize, text: &TextOrTokens) -> Result<TextTokens> {
        match text {
            TextOrTokens::Text(text) => self.input(at, TextInput::One(text)),
            TextOrTokens::Tokens(ids) => {
                let kept = ids.len().min(self.limits.max_tokens);
                let truncated = kept < ids.len();
                self.checked(at, TextTokens { ids: ids[..kept].to_vec(), types: vec![0; kept], truncated })
            }
        }
    }

    fn input(&self, at: usize, input: TextInput<'_>) -> Result<TextTokens> {
        let tokens = self.limits.encode(self.tokenizer.clone()?, input);
        self.checked(at, tokens.map_err(|error| error.context(format!("text {at}")))?)
    }

    fn checked(&self, at: usize, text: TextTokens) -> Result<TextTokens> {
        if text.truncated && !self.truncate {
            let what = format!("text {at} has more than {} tokens", self.limits.max_tokens);
            return Err(Error::new(Status::ContextLength, what));
        }
        match text.ids.iter().find(|&&id| id as usize >= self.vocab) {
            None => Ok(text),
            Some(id) => {
                let what = format!("text {at}: token {id} is not in the model's vocabulary of {}", self.vocab);
                Err(Error::invalid_request(what))
            }
        }
    }
}
