//! Texts and pairs of texts as the token ids that encoders take.

use std::path::Path;

use serde::Deserialize;

use super::{PairFormat, Tokenizer, read_json};
use crate::error::{Error, Result, Status};

/// One text, or two that are read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextInput<'a> {
    /// For an embedding.
    One(&'a str),
    /// For a score.
    Pair {
        /// What relevance means, for models that are told.
        instruction: Option<&'a str>,
        /// What is asked.
        query: &'a str,
        /// What may answer it.
        document: &'a str,
    },
}

/// The tokens of a text or pair, special ones included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TextTokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// As many token types: which of two texts each token belongs to.
    pub types: Vec<u32>,
    /// Whether tokens were left out, because there were too many.
    pub truncated: bool,
}

/// What a model folder says about the texts of an encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextLimits {
    /// Tokens that are kept, special ones included.
    pub max_tokens: usize,
    /// Whether texts are put in lower case before they are tokenised.
    pub lowercase: bool,
    /// Whether the model is told token types; otherwise all are 0.
    pub token_types: bool,
    /// The prompt that pairs are put into; otherwise they are the two texts of the model's post-processor.
    pub pair: Option<PairFormat>,
}

/// The file of sentence-transformers about its encoder; named after the architecture.
const SENTENCE_FILES: [&str; 3] =
    ["sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json"];

#[derive(Debug, Default, Deserialize)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
    do_lower_case: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    /// A float where it means "no limit".
    model_max_length: Option<f64>,
    model_input_names: Option<Vec<String>>,
}

impl TextLimits {
    /// Reads `sentence_bert_config.json` (and its other names) and `tokenizer_config.json` of `folder`, each of which may be
    /// absent; the model itself takes `most` tokens. As in sentence-transformers, `max_seq_length` comes before
    /// `model_max_length`. What pairs look like is in [`PairFormat::load`].
    pub fn load(folder: &Path, most: usize) -> Result<Self> {
        let mut sentence = SentenceConfig::default();
        for name in SENTENCE_FILES {
            if let Some(config) = read_json(folder, name)? {
                sentence = config;
                break;
            }
        }
        let tokenizer: TokenizerConfig = read_json(folder, "tokenizer_config.json")?.unwrap_or_default();
        let declared = tokenizer.model_max_length.filter(|&n| n >= 1.0).map(|n| n as usize);
        let limit = sentence.max_seq_length.filter(|&n| n > 0).or(declared).unwrap_or(most);
        let names = tokenizer.model_input_names;
        Ok(Self {
            max_tokens: limit.min(most),
            lowercase: sentence.do_lower_case.unwrap_or(false),
            token_types: names.is_none_or(|names| names.iter().any(|name| name == "token_type_ids")),
            pair: PairFormat::load(folder)?,
        })
    }

    /// Token ids and types of `input`, with the special tokens of the model's post-processor. Texts lose blanks at their ends;
    /// what exceeds the limit is cut off at the end, of a pair always from the longer text.
    ///
    /// Pairs in a prompt keep their blanks, and lose their end but for what the prompt has behind them; `ContextLength` if not
    /// even that fits.
    pub fn encode(&self, tokenizer: &Tokenizer, input: TextInput<'_>) -> Result<TextTokens> {
        let prepare = |text: &str| match self.lowercase {
            true => text.trim().to_lowercase(),
            false => text.trim().to_owned(),
        };
        let mut tokens = match (input, &self.pair) {
            (TextInput::One(text), _) => tokenizer.encode_input(&prepare(text), None, self.max_tokens)?,
            (TextInput::Pair { query, document, .. }, None) => {
                tokenizer.encode_input(&prepare(query), Some(&prepare(document)), self.max_tokens)?
            }
            (TextInput::Pair { instruction, query, document }, Some(format)) => {
                let (text, suffix) = format.fill(instruction, query, document);
                self.prompt(tokenizer.encode(&text, false)?, &tokenizer.encode(suffix, false)?)?
            }
        };
        if !self.token_types {
            tokens.types.fill(0);
        }
        if tokens.ids.is_empty() {
            return Err(Error::invalid_request("a text without tokens has no embedding"));
        }
        Ok(tokens)
    }

    fn prompt(&self, mut ids: Vec<u32>, suffix: &[u32]) -> Result<TextTokens> {
        let kept = self.max_tokens.checked_sub(suffix.len()).filter(|&kept| kept > 0).ok_or_else(|| {
            let (length, most) = (suffix.len(), self.max_tokens);
            Error::new(
                Status::ContextLength,
                format!("the prompt ends with {length} tokens of {most} that are possible"),
            )
        })?;
        let truncated = ids.len() > kept;
        ids.truncate(kept);
        ids.extend_from_slice(suffix);
        Ok(TextTokens { types: vec![0; ids.len()], ids, truncated })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Single letters, `[` before a text, `]` after each; the second one has type 1.
    fn tokenizer() -> Tokenizer {
        let special = |id: u32, token: &str| json!({"id": token, "ids": [id], "tokens": [token]});
        let piece = |token: &str, kind: u32| json!({"SpecialToken": {"id": token, "type_id": kind}});
        let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
        let vocab: serde_json::Map<_, _> =
            "[]abcdefgh".chars().zip(0..).map(|(c, id)| (c.to_string(), json!(id))).collect();
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [piece("[", 0), text("A", 0), piece("]", 0)],
                "pair": [piece("[", 0), text("A", 0), piece("]", 0), text("B", 1), piece("]", 1)],
                "special_tokens": {"[": special(0, "["), "]": special(1, "]")},
            },
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        });
        Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
    }

    fn limits(max_tokens: usize) -> TextLimits {
        TextLimits { max_tokens, lowercase: true, token_types: true, pair: None }
    }

    fn pair<'a>(query: &'a str, document: &'a str) -> TextInput<'a> {
        TextInput::Pair { instruction: None, query, document }
    }

    #[test]
    fn the_longer_text_of_a_pair_loses_its_end() {
        let tokenizer = tokenizer();
        let encode = |most, input| {
            let TextTokens { ids, types, truncated } = limits(most).encode(&tokenizer, input).unwrap();
            assert_eq!(ids.len(), types.len());
            (ids, types.iter().sum::<u32>(), truncated)
        };
        let letters = |text: &str| text.chars().map(|c| "[]abcdefgh".find(c).unwrap() as u32).collect::<Vec<_>>();
        assert_eq!(encode(5, TextInput::One(" ABC ")), (letters("[abc]"), 0, false));
        assert_eq!(encode(4, TextInput::One("abc")), (letters("[ab]"), 0, true));
        assert_eq!(encode(8, pair("ab", "cdefgh")), (letters("[ab]cde]"), 4, true));
        assert_eq!(encode(8, pair("cdefgh", "ab")), (letters("[cde]ab]"), 3, true));
        assert_eq!(encode(9, pair("abcd", "efgh")), (letters("[abc]efg]"), 4, true));
        // Nothing but special tokens fits.
        assert_eq!(encode(3, pair("a", "b")), (letters("[]]"), 1, true));
        let untold = TextLimits { token_types: false, ..limits(9) };
        assert_eq!(untold.encode(&tokenizer, pair("a", "b")).unwrap().types, [0; 5]);
    }

    #[test]
    fn the_smallest_declared_limit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: serde_json::Value| {
            std::fs::write(folder.path().join(name), content.to_string()).unwrap();
        };
        let limits = |max_tokens, lowercase, token_types| TextLimits { max_tokens, lowercase, token_types, pair: None };
        let most = || TextLimits::load(folder.path(), 512).unwrap();
        assert_eq!(most(), limits(512, false, true));
        write("tokenizer_config.json", json!({"model_max_length": 1e30, "model_input_names": ["input_ids"]}));
        assert_eq!(most(), limits(512, false, false));
        write("tokenizer_config.json", json!({"model_max_length": 128}));
        assert_eq!(most().max_tokens, 128);
        write("sentence_bert_config.json", json!({"max_seq_length": 256, "do_lower_case": true}));
        assert_eq!(most(), limits(256, true, true));
        write("sentence_bert_config.json", json!({"max_seq_length": null}));
        assert_eq!(most().max_tokens, 128);
    }

    #[test]
    fn a_prompt_keeps_what_follows_the_document() {
        let folder = tempfile::tempdir().unwrap();
        let template = "{% for m in messages %}{{ m.content }}{% if m.role == 'query' %}h{% endif %}{% endfor %}gg";
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let (tokenizer, letters) = (tokenizer(), |text: &str| -> Vec<u32> {
            text.chars().map(|c| "[]abcdefgh".find(c).unwrap() as u32).collect()
        });
        let encode = |most: usize, instruction: Option<&str>| {
            let limits = TextLimits::load(folder.path(), most).unwrap();
            let TextTokens { ids, types, truncated } =
                limits.encode(&tokenizer, TextInput::Pair { instruction, query: "ab", document: "cde" })?;
            assert_eq!(types, vec![0; ids.len()]);
            Ok::<_, Error>((ids, truncated))
        };
        // No special tokens: the template has what there is to be.
        assert_eq!(encode(8, None).unwrap(), (letters("abhcdegg"), false));
        assert_eq!(encode(7, None).unwrap(), (letters("abhcdgg"), true));
        assert_eq!(encode(9, Some("ff")).unwrap(), (letters("ffabhcdgg"), true));
        assert_eq!(encode(3, None).unwrap(), (letters("agg"), true));
        assert_eq!(encode(2, None).unwrap_err().status(), Status::ContextLength);
    }
}
