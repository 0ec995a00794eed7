//! What hosts ask of encoders, as they write it: JSON in the shape of the common embedding and rerank APIs, checked once. Pure.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::engine::request::Priority;
use crate::error::{Error, Result};

/// Texts of one request at most.
const MAX_TEXTS: usize = 65_536;

/// A text, or what a tokenizer made of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum TextOrTokens {
    /// Special tokens are added.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
}

/// A checked request to an embedding model or a reranker.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodeRequest {
    /// Id of the model; the pool's default if absent.
    pub model: Option<String>,
    /// What to compute.
    pub task: EncodeTask,
    /// Cut texts that are too long; otherwise they are an error.
    pub truncate: bool,
    /// Before whom it runs.
    pub priority: Priority,
    /// Tokens of a text at most, where that is less than the model takes. Not part of the JSON.
    pub context_limit: Option<usize>,
    /// Whether its events tell how far the model is loaded. Not part of the JSON.
    pub tells_loading: bool,
}

/// What an encoder is to compute.
#[derive(Debug, Clone, PartialEq)]
pub enum EncodeTask {
    /// A vector of each text.
    Embed {
        /// At least one.
        texts: Vec<TextOrTokens>,
        /// The first dimensions only.
        dimensions: Option<usize>,
        /// Whether vectors have length 1; otherwise as the model declares.
        normalize: Option<bool>,
        /// Give them as text, too.
        base64: bool,
    },
    /// A score of each document.
    Rerank {
        /// What is asked.
        query: String,
        /// At least one.
        documents: Vec<String>,
        /// What relevance means, for models that are told.
        instruction: Option<String>,
        /// How many of the best are ranked; all by default.
        top: Option<usize>,
    },
}

/// The JSON of an embedding request. Field names are the API.
#[derive(Debug, Deserialize)]
struct RawEmbed {
    model: Option<String>,
    input: RawInput,
    dimensions: Option<usize>,
    normalize: Option<bool>,
    encoding_format: Option<EncodingFormat>,
    truncate: Option<bool>,
    priority: Option<Priority>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum RawInput {
    Text(String),
    Tokens(Vec<u32>),
    Many(Vec<TextOrTokens>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum EncodingFormat {
    Float,
    Base64,
}

/// The JSON of a rerank request.
#[derive(Debug, Deserialize)]
struct RawRerank {
    model: Option<String>,
    query: String,
    documents: Vec<Value>,
    instruction: Option<String>,
    top_n: Option<usize>,
    truncate: Option<bool>,
    priority: Option<Priority>,
}

impl EncodeRequest {
    /// Parses and checks a request for vectors. Keys that are not known are an error unless `lenient`.
    pub fn embed_from_json(json: &[u8], lenient: bool) -> Result<Self> {
        let raw: RawEmbed = parse(json, lenient)?;
        let texts = match raw.input {
            RawInput::Text(text) => vec![TextOrTokens::Text(text)],
            RawInput::Tokens(ids) if ids.is_empty() => Vec::new(),
            RawInput::Tokens(ids) => vec![TextOrTokens::Tokens(ids)],
            RawInput::Many(texts) => texts,
        };
        check_count("input", texts.len())?;
        if let Some(empty) = texts.iter().position(|text| matches!(text, TextOrTokens::Tokens(ids) if ids.is_empty())) {
            return Err(Error::invalid_request(format!("text {empty} of \"input\" has no tokens")));
        }
        if raw.dimensions == Some(0) {
            return Err(Error::invalid_request("\"dimensions\" must be at least 1"));
        }
        let base64 = raw.encoding_format == Some(EncodingFormat::Base64);
        let task = EncodeTask::Embed { texts, dimensions: raw.dimensions, normalize: raw.normalize, base64 };
        Ok(Self::new(raw.model, task, raw.truncate, raw.priority))
    }

    /// Parses and checks a request for scores, likewise.
    pub fn rerank_from_json(json: &[u8], lenient: bool) -> Result<Self> {
        let raw: RawRerank = parse(json, lenient)?;
        check_count("documents", raw.documents.len())?;
        if raw.top_n == Some(0) {
            return Err(Error::invalid_request("\"top_n\" must be at least 1"));
        }
        let text = |(at, document)| document_text(at, document, lenient);
        let documents: Result<Vec<String>> = raw.documents.into_iter().enumerate().map(text).collect();
        let documents = documents?;
        let task = EncodeTask::Rerank { query: raw.query, documents, instruction: raw.instruction, top: raw.top_n };
        Ok(Self::new(raw.model, task, raw.truncate, raw.priority))
    }

    fn new(model: Option<String>, task: EncodeTask, truncate: Option<bool>, priority: Option<Priority>) -> Self {
        Self {
            model,
            task,
            truncate: truncate.unwrap_or(true),
            priority: priority.unwrap_or_default(),
            context_limit: None,
            tells_loading: false,
        }
    }
}

/// The text of a document: itself, or the "text" of an object. What else an object has is not read.
fn document_text(at: usize, document: Value, lenient: bool) -> Result<String> {
    let keys = match document {
        Value::String(text) => return Ok(text),
        Value::Object(keys) => keys,
        _ => return Err(Error::invalid_request(format!("document {at} is neither a text nor an object with one"))),
    };
    const MEDIA: [&str; 3] = ["image", "audio", "video"];
    if let Some(key) = keys.keys().find(|key| MEDIA.iter().any(|media| key.starts_with(media))) {
        return Err(Error::unsupported(format!("document {at} has {key:?}: only texts are supported")));
    }
    match keys.get("text") {
        Some(Value::String(text)) if lenient || keys.len() == 1 => Ok(text.clone()),
        Some(Value::String(_)) => Err(Error::invalid_request(format!("document {at} has other keys than \"text\""))),
        _ => Err(Error::invalid_request(format!("document {at} has no \"text\""))),
    }
}

fn check_count(name: &str, count: usize) -> Result<()> {
    match count {
        0 => Err(Error::invalid_request(format!("{name:?} is empty"))),
        n if n > MAX_TEXTS => Err(Error::invalid_request(format!("{name:?} has {n} texts, {MAX_TEXTS} are possible"))),
        _ => Ok(()),
    }
}

fn parse<T: DeserializeOwned>(json: &[u8], lenient: bool) -> Result<T> {
    let mut unknown = Vec::new();
    let mut reader = serde_json::Deserializer::from_slice(json);
    let raw = serde_ignored::deserialize(&mut reader, |path| unknown.push(path.to_string()))
        .and_then(|raw| reader.end().map(|()| raw))
        .map_err(|e| Error::invalid_request(format!("the request is not valid: {e}")))?;
    if !lenient && !unknown.is_empty() {
        unknown.truncate(8);
        return Err(Error::invalid_request(format!("unknown keys: {}", unknown.join(", "))));
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn embed(json: &str) -> Result<EncodeRequest> {
        EncodeRequest::embed_from_json(json.as_bytes(), false)
    }

    fn rerank(json: &str) -> Result<EncodeRequest> {
        EncodeRequest::rerank_from_json(json.as_bytes(), false)
    }

    #[test]
    fn texts_come_alone_or_as_many_and_as_tokens() {
        let texts = |json: &str| match embed(&format!(r#"{{"input":{json}}}"#)).unwrap().task {
            EncodeTask::Embed { texts, .. } => texts,
            EncodeTask::Rerank { .. } => panic!("not what was asked"),
        };
        let (text, tokens) = (|t: &str| TextOrTokens::Text(t.into()), TextOrTokens::Tokens);
        assert_eq!(texts(r#""a""#), [text("a")]);
        assert_eq!(texts(r#"["a","",[3,4]]"#), [text("a"), text(""), tokens(vec![3, 4])]);
        assert_eq!(texts("[5,6]"), [tokens(vec![5, 6])]);
        assert_eq!(texts("[[5],[6,7]]"), [tokens(vec![5]), tokens(vec![6, 7])]);
    }

    #[test]
    fn the_usual_fields_arrive() {
        let request = embed(
            r#"{"model":"m","input":"a","dimensions":8,"normalize":false,"encoding_format":"base64","truncate":false,
                "priority":"low"}"#,
        )
        .unwrap();
        assert_eq!((request.model.as_deref(), request.truncate, request.priority), (Some("m"), false, Priority::Low));
        let EncodeTask::Embed { dimensions, normalize, base64, .. } = request.task else { panic!("not vectors") };
        assert_eq!((dimensions, normalize, base64), (Some(8), Some(false), true));
        let request = rerank(r#"{"query":"q","documents":["a",{"text":"b"}],"top_n":1,"instruction":"i"}"#).unwrap();
        assert!(request.truncate);
        let documents = vec!["a".to_owned(), "b".to_owned()];
        let task = EncodeTask::Rerank { query: "q".into(), documents, instruction: Some("i".into()), top: Some(1) };
        assert_eq!(request.task, task);
    }

    #[test]
    fn bad_requests_are_refused() {
        let many = format!(r#"{{"input":[{}"x"]}}"#, r#""x","#.repeat(MAX_TEXTS));
        for json in [
            "",
            "{}",
            r#"{"input":[]}"#,
            r#"{"input":[[]]}"#,
            r#"{"input":["a",[]]}"#,
            r#"{"input":[-1]}"#,
            r#"{"input":{"text":"a"}}"#,
            r#"{"input":"a","dimensions":0}"#,
            r#"{"input":"a","dimensions":-4}"#,
            r#"{"input":"a","encoding_format":"hex"}"#,
            r#"{"input":"a","user":"me"}"#,
            r#"{"input":"a"} x"#,
            many.as_str(),
        ] {
            let shown: String = json.chars().take(60).collect();
            assert_eq!(embed(json).map_err(|e| e.status()), Err(Status::InvalidRequest), "{shown}");
        }
        assert!(EncodeRequest::embed_from_json(br#"{"input":"a","user":"me"}"#, true).is_ok());
        for json in [
            r#"{"documents":["a"]}"#,
            r#"{"query":"q","documents":[]}"#,
            r#"{"query":"q","documents":[1]}"#,
            r#"{"query":"q","documents":["a"],"top_n":0}"#,
            r#"{"query":"q","documents":["a"],"more":1}"#,
            r#"{"query":"q","documents":[{"title":"a"}]}"#,
            r#"{"query":"q","documents":[{"text":"a","title":"b"}]}"#,
        ] {
            assert_eq!(rerank(json).map_err(|e| e.status()), Err(Status::InvalidRequest), "{json}");
        }
        let titled = br#"{"query":"q","documents":[{"text":"a","title":"b"}]}"#;
        assert!(EncodeRequest::rerank_from_json(titled, true).is_ok());
        let picture = r#"{"query":"q","documents":[{"text":"a","image_url":"b"}]}"#;
        assert_eq!(rerank(picture).map_err(|e| e.status()), Err(Status::Unsupported));
        assert!(EncodeRequest::rerank_from_json(picture.as_bytes(), true).is_err(), "a picture is not left out");
    }
}
