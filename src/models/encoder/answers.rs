//! Which tokens a language model answers with when it is asked for relevance.

use std::path::Path;

use serde_json::Value;

use super::pipeline::optional;
use crate::config::read_json;
use crate::error::{Error, Result};
use crate::text::Tokenizer;

/// Tokens whose logits make the score of a causal reranker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerTokens {
    /// That a document is relevant.
    pub yes: u32,
    /// That it is not; without it the logit of the other one is all there is.
    pub no: Option<u32>,
}

impl AnswerTokens {
    /// What the module `LogitScore` of sentence-transformers in `folder` says; else the tokens "yes" and "no".
    pub fn load(folder: &Path) -> Result<Self> {
        if let Some(place) = module(folder)? {
            let path = folder.join(place).join("config.json");
            let config = read_json(&path)?;
            let token = |key: &str| match config.get(key) {
                None | Some(Value::Null) => Ok(None),
                Some(id) => match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
                    Some(id) => Ok(Some(id)),
                    None => Err(Error::invalid_model(format!("{}: {key:?} is {id}", path.display()))),
                },
            };
            let missing = || Error::invalid_model(format!("{}: \"true_token_id\" is missing", path.display()));
            return Ok(Self { yes: token("true_token_id")?.ok_or_else(missing)?, no: token("false_token_id")? });
        }
        let tokenizer = Tokenizer::load(folder)?;
        let token = |answer: &str| {
            let id = tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_id(answer));
            id.ok_or_else(|| Error::unsupported(format!("a reranker without a head needs {answer:?} as one token")))
        };
        Ok(Self { yes: token("yes")?, no: Some(token("no")?) })
    }

    /// Whether the files of sentence-transformers in `folder` declare such a score; files that cannot be read do not.
    pub fn declared(folder: &Path) -> bool {
        module(folder).is_ok_and(|module| module.is_some())
    }
}

/// The folder of the module `LogitScore`, if `modules.json` has one.
fn module(folder: &Path) -> Result<Option<String>> {
    let Some(modules) = optional(&folder.join("modules.json"))? else { return Ok(None) };
    let text = |module: &Value, key: &str| module.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let is_score = |module: &&Value| text(module, "type").rsplit('.').next() == Some("LogitScore");
    let Some(place) = modules.as_array().into_iter().flatten().find(is_score).map(|module| text(module, "path")) else {
        return Ok(None);
    };
    if super::pipeline::is_outside(&place) {
        return Err(Error::invalid_model("modules.json: a module lies outside of the model's folder"));
    }
    Ok(Some(place))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::Status;

    #[test]
    fn modules_or_the_tokenizer_name_the_answers() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        let load = || AnswerTokens::load(folder.path());
        assert!(!AnswerTokens::declared(folder.path()));
        assert_eq!(load().unwrap_err().status(), Status::Unsupported);
        let tokenizer = |vocab: Value| {
            json!({"version": "1.0", "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "no"}})
        };
        write("tokenizer.json", tokenizer(json!({"no": 0, "yes": 1})));
        assert_eq!(load().unwrap(), AnswerTokens { yes: 1, no: Some(0) });
        write("tokenizer.json", tokenizer(json!({"no": 0})));
        assert_eq!(load().unwrap_err().status(), Status::Unsupported);

        std::fs::create_dir(folder.path().join("1_LogitScore")).unwrap();
        let kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore";
        write("modules.json", json!([{"path": "", "type": "Transformer"}, {"path": "1_LogitScore", "type": kind}]));
        assert!(AnswerTokens::declared(folder.path()));
        write("1_LogitScore/config.json", json!({"true_token_id": 7, "false_token_id": 5}));
        assert_eq!(load().unwrap(), AnswerTokens { yes: 7, no: Some(5) });
        write("1_LogitScore/config.json", json!({"true_token_id": 7, "false_token_id": null}));
        assert_eq!(load().unwrap(), AnswerTokens { yes: 7, no: None });
        write("1_LogitScore/config.json", json!({"true_token_id": -1}));
        assert_eq!(load().unwrap_err().status(), Status::InvalidModel);
        write("modules.json", json!([{"path": "../1_LogitScore", "type": kind}]));
        assert_eq!(load().unwrap_err().status(), Status::InvalidModel);
    }
}
