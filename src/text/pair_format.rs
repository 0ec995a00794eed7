//! How decoders are asked whether a document answers a query: one prompt of an instruction and the two texts.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::special::SpecialTokens;
use super::{ChatInput, ChatTemplates, LocalTime, read_json};
use crate::error::Result;

/// The prompt of Qwen3-Reranker up to the instruction, between its parts, and behind the document, as on its model card.
const QWEN: [&str; 4] = [
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. \
     Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n<Instruct>: ",
    "\n<Query>: ",
    "\n<Document>: ",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
];

/// Its instruction where a request has none.
const QWEN_INSTRUCTION: &str = "Given a web search query, retrieve relevant passages that answer the query";

/// What stands for instruction, query and document when a template is rendered; no template has these characters.
const MARKS: [char; 3] = ['\u{e0a1}', '\u{e0a2}', '\u{e0a3}'];

/// A prompt around a query and a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairFormat {
    /// With an instruction of the request's.
    told: Vec<Piece>,
    /// Without one.
    untold: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Instruction,
    Query,
    Document,
}

#[derive(Debug, Default, Deserialize)]
struct ModelType {
    model_type: Option<String>,
}

/// What sentence-transformers saves about prompts.
#[derive(Debug, Default, Deserialize)]
struct Prompts {
    prompts: Option<std::collections::HashMap<String, String>>,
    default_prompt_name: Option<String>,
}

impl Prompts {
    fn default_prompt(&self) -> Option<&str> {
        self.prompts.as_ref()?.get(self.default_prompt_name.as_ref()?).map(String::as_str)
    }
}

impl PairFormat {
    /// The format of the model in `folder`: its chat template if that has the roles `query` and `document` (as in
    /// sentence-transformers, with the instruction as `system`), else that of Qwen3-Reranker for models of its type.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        if let Some(format) = Self::of_template(folder)? {
            return Ok(Some(format));
        }
        let config: ModelType = read_json(folder, "config.json")?.unwrap_or_default();
        Ok((config.model_type.as_deref() == Some("qwen3")).then(Self::qwen))
    }

    fn qwen() -> Self {
        let pieces = |instruction: Piece| {
            let slots = [instruction, Piece::Query, Piece::Document].into_iter().map(Some).chain([None]);
            let pieces = QWEN.iter().zip(slots);
            pieces.flat_map(|(text, slot)| std::iter::once(Piece::Literal((*text).to_owned())).chain(slot)).collect()
        };
        Self { told: pieces(Piece::Instruction), untold: pieces(Piece::Literal(QWEN_INSTRUCTION.to_owned())) }
    }

    fn of_template(folder: &Path) -> Result<Option<Self>> {
        let config: Value = read_json(folder, "tokenizer_config.json")?.unwrap_or_default();
        let templates = ChatTemplates::load(folder, &config, &SpecialTokens::load(folder, &config)?, LocalTime::now)?;
        let [instruction, query, document] = MARKS.map(String::from);
        // A template of chats may refuse these roles, or leave them out.
        let render = |system: Option<&str>| {
            let system = system.map(|text| json!({"role": "system", "content": text}));
            let pair = [json!({"role": "query", "content": query}), json!({"role": "document", "content": document})];
            let messages = Value::Array(system.into_iter().chain(pair).collect());
            let input = ChatInput {
                messages: &messages,
                tools: None,
                template: None,
                add_generation_prompt: false,
                kwargs: None,
            };
            templates.render(&input).ok().map(|text| split(&text))
        };
        let both = |pieces: &Vec<Piece>| pieces.contains(&Piece::Query) && pieces.contains(&Piece::Document);
        let prompts: Prompts = read_json(folder, "config_sentence_transformers.json")?.unwrap_or_default();
        let Some(untold) = render(prompts.default_prompt()).filter(both) else { return Ok(None) };
        let told = render(Some(&instruction)).filter(both).filter(|pieces| pieces.contains(&Piece::Instruction));
        Ok(Some(Self { told: told.unwrap_or_else(|| untold.clone()), untold }))
    }

    /// The prompt in two parts: the end of the first may be cut off, the second is what the model answers to.
    pub fn fill(&self, instruction: Option<&str>, query: &str, document: &str) -> (String, &str) {
        let pieces = if instruction.is_some() { &self.told } else { &self.untold };
        let text = |piece: &Piece| match piece {
            Piece::Literal(text) => text.clone(),
            Piece::Instruction => instruction.unwrap_or_default().to_owned(),
            Piece::Query => query.to_owned(),
            Piece::Document => document.to_owned(),
        };
        match pieces.split_last() {
            Some((Piece::Literal(suffix), first)) => (first.iter().map(text).collect(), suffix),
            _ => (pieces.iter().map(text).collect(), ""),
        }
    }
}

/// A rendered template with its marks as pieces.
fn split(mut text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    while !text.is_empty() {
        let (literal, rest) = text.split_at(text.find(MARKS).unwrap_or(text.len()));
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal.to_owned()));
        }
        let mut rest = rest.chars();
        pieces.extend(rest.next().map(|mark| match mark {
            mark if mark == MARKS[0] => Piece::Instruction,
            mark if mark == MARKS[1] => Piece::Query,
            _ => Piece::Document,
        }));
        text = rest.as_str();
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(folder.path().join(name), text).unwrap());
        folder
    }

    fn load(files: &[(&str, &str)]) -> Option<PairFormat> {
        PairFormat::load(folder(files).path()).unwrap()
    }

    #[test]
    fn qwen_is_asked_as_on_its_card() {
        let format = load(&[("config.json", r#"{"model_type": "qwen3"}"#)]).unwrap();
        let system = "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the \
                      Instruct provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n";
        let suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
        let (first, last) = format.fill(Some("i"), "q", "d");
        assert_eq!(first, format!("{system}<|im_start|>user\n<Instruct>: i\n<Query>: q\n<Document>: d"));
        assert_eq!(last, suffix);
        let (first, _) = format.fill(None, " q", "d ");
        let instruction = "Given a web search query, retrieve relevant passages that answer the query";
        assert!(first.ends_with(&format!("user\n<Instruct>: {instruction}\n<Query>:  q\n<Document>: d ")), "{first}");
        assert_eq!(load(&[("config.json", r#"{"model_type": "llama"}"#)]), None);
        assert_eq!(load(&[]), None);
    }

    #[test]
    fn a_template_with_the_two_roles_comes_first() {
        let template = "{% for m in messages %}[{{ m.role[0] }}:{{ m.content | trim }}]{% endfor %}!";
        let config = ("config.json", r#"{"model_type": "qwen3"}"#);
        let format = load(&[config, ("chat_template.jinja", template)]).unwrap();
        assert_eq!(format.fill(Some("i"), "q", "d"), ("[s:i][q:q][d:d".to_owned(), "]!"));
        assert_eq!(format.fill(None, "q", "d"), ("[q:q][d:d".to_owned(), "]!"));
        let prompts = r#"{"prompts": {"web": "w"}, "default_prompt_name": "web"}"#;
        let own = ("config_sentence_transformers.json", prompts);
        let format = load(&[own, ("chat_template.jinja", template)]).unwrap();
        assert_eq!(format.fill(None, "q", "d").0, "[s:w][q:q][d:d");
        assert_eq!(format.fill(Some("i"), "q", "d").0, "[s:i][q:q][d:d");
        // Chats: others' roles are left out, or refused.
        let chat = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
        assert_eq!(load(&[config, ("chat_template.jinja", chat)]), Some(PairFormat::qwen()));
        let strict = "{{ raise_exception('roles must alternate') }}";
        assert_eq!(load(&[("chat_template.jinja", strict)]), None);
    }
}
