//! A request as hosts write it: JSON in the shape of OpenAI's chat completions, checked once.

use std::collections::HashMap;
use std::fmt;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::response_format;
use crate::error::{Error, Result};
use crate::text::grammar::Constraint;

/// Stop strings and tokens of one request at most.
const MAX_STOPS: usize = 64;
/// Bytes of one stop string at most.
const MAX_STOP_BYTES: usize = 4096;
/// Most likely tokens reported at most, as in OpenAI's API.
const MAX_TOP_LOGPROBS: usize = 20;

/// Answers to one prompt at most.
const MAX_CHOICES: usize = 16;

/// Keys beside the text of a message or prompt that other APIs have for pictures, sounds and films.
const MEDIA_KEYS: [&str; 6] = ["image", "images", "audio", "audios", "video", "videos"];

/// Before whom a request runs; within a class the first to come is first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Somebody is watching.
    High,
    /// Nothing special.
    #[default]
    Normal,
    /// Work that can wait.
    Low,
}

/// What the model continues.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Messages, rendered by the model's chat template.
    Chat(Box<ChatInput>),
    /// Text as it is.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// The arguments of a chat template.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatInput {
    /// An array of message objects.
    pub messages: Value,
    /// An array of tool definitions.
    pub tools: Option<Value>,
    /// Whether the answer has to call tools.
    pub tool_choice: ToolChoice,
    /// Whether an answer may have more than one tool call.
    pub parallel_tool_calls: bool,
    /// Name of the template, for models with several.
    pub template: Option<String>,
    /// Ask for the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further template variables, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
}

/// Whether an answer has to call tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// As the model likes.
    Auto,
    /// Some tool.
    Required,
    /// The tool of this name.
    Named(String),
}

/// A checked request. What is `None` comes from the model's defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Id of the model; the pool's default if absent.
    pub model: Option<String>,
    /// What to continue.
    pub input: Input,
    /// Tokens to sample at most.
    pub max_tokens: Option<usize>,
    /// See [`SamplingParams`](crate::sampling::SamplingParams) for this and the following.
    pub temperature: Option<f32>,
    /// Nucleus mass, above 0.
    pub top_p: Option<f32>,
    /// Tokens kept; 0 is all.
    pub top_k: Option<u32>,
    /// Least relative probability.
    pub min_p: Option<f32>,
    /// Seed of the noise.
    pub seed: Option<u64>,
    /// Above 0; 1 is off.
    pub repetition_penalty: Option<f32>,
    /// -2 to 2.
    pub presence_penalty: Option<f32>,
    /// -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Token id and what is added to its logit, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report log-probabilities, and of how many likeliest tokens.
    pub top_logprobs: Option<usize>,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer, beside the model's own.
    pub stop_tokens: Vec<u32>,
    /// Do not stop at the model's end-of-text tokens.
    pub ignore_eos: bool,
    /// What the answer has to look like, behind its thinking.
    pub constraint: Option<Constraint>,
    /// Tokens of thinking at most.
    pub thinking_budget: Option<usize>,
    /// Answers to sample.
    pub choices: usize,
    /// Before whom it runs.
    pub priority: Priority,
    /// Tokens of prompt and answer at most, where that is less than the model's context. Not part of the JSON.
    pub context_limit: Option<usize>,
    /// Whether its events tell how far the model is loaded. Not part of the JSON.
    pub tells_loading: bool,
    /// Whether they tell when the prompt begins to be computed, and how much of it was cached. Not part of the JSON.
    pub tells_start: bool,
}

/// Keys of a request that a model may have defaults for.
const DEFAULTS: [&str; 10] = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "thinking_budget",
    "chat_template_kwargs",
];

/// The JSON object. Field names are the API.
#[derive(Debug, Deserialize)]
struct RawRequest {
    model: Option<String>,
    messages: Option<Vec<Value>>,
    prompt: Option<Prompt>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    response_format: Option<Value>,
    chat_template: Option<String>,
    chat_template_kwargs: Option<Map<String, Value>>,
    add_generation_prompt: Option<bool>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    seed: Option<i64>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<HashMap<String, f32>>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    stop: Option<Stop>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    thinking_budget: Option<usize>,
    n: Option<usize>,
    priority: Option<Priority>,
    /// Accepted for compatibility: every request streams.
    #[serde(rename = "stream")]
    _stream: Option<bool>,
}

#[derive(Debug)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// By hand: an untagged enum would keep every id as a generic value first, at several times the cost of a long prompt.
impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;

        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or an array of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, ids: A) -> Result<Prompt, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(ids)).map(Prompt::Tokens)
            }
        }

        deserializer.deserialize_any(PromptVisitor)
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Request {
    /// Parses and checks `json`. Keys that are not known are an error unless `lenient`.
    pub fn from_json(json: &[u8], lenient: bool) -> Result<Self> {
        let mut unknown = Vec::new();
        let mut reader = serde_json::Deserializer::from_slice(json);
        let raw: RawRequest = serde_ignored::deserialize(&mut reader, |path| unknown.push(path.to_string()))
            .and_then(|raw| reader.end().map(|()| raw))
            .map_err(|e| Error::invalid_request(format!("the request is not valid: {e}")))?;
        // A lenient host does not mean these.
        if let Some(key) = unknown.iter().find(|key| MEDIA_KEYS.contains(&key.as_str())) {
            return Err(Error::unsupported(format!("{key:?}: only text is supported")));
        }
        if !lenient && !unknown.is_empty() {
            unknown.truncate(8);
            return Err(Error::invalid_request(format!("unknown keys: {}", unknown.join(", "))));
        }
        raw.check()
    }

    /// A request that only says what requests of a model should say by default: some of the keys of a request, checked as
    /// there.
    pub fn defaults(keys: &Map<String, Value>) -> Result<Self> {
        if let Some(other) = keys.keys().find(|key| !DEFAULTS.contains(&key.as_str())) {
            let what = format!("{other:?} is none of the keys that may have a default: {}", DEFAULTS.join(", "));
            return Err(Error::invalid_request(what));
        }
        let mut request = keys.clone();
        request.insert("messages".to_owned(), serde_json::json!([{ "role": "user" }]));
        Self::from_json(Value::Object(request).to_string().as_bytes(), false)
    }

    /// The same request; what it leaves open is taken from `defaults`, made by [`Request::defaults`].
    pub fn or(mut self, defaults: &Self) -> Self {
        self.max_tokens = self.max_tokens.or(defaults.max_tokens);
        self.temperature = self.temperature.or(defaults.temperature);
        self.top_p = self.top_p.or(defaults.top_p);
        self.top_k = self.top_k.or(defaults.top_k);
        self.min_p = self.min_p.or(defaults.min_p);
        self.repetition_penalty = self.repetition_penalty.or(defaults.repetition_penalty);
        self.presence_penalty = self.presence_penalty.or(defaults.presence_penalty);
        self.frequency_penalty = self.frequency_penalty.or(defaults.frequency_penalty);
        self.thinking_budget = self.thinking_budget.or(defaults.thinking_budget);
        if let (Input::Chat(chat), Input::Chat(defaults)) = (&mut self.input, &defaults.input) {
            for (key, value) in &defaults.kwargs {
                chat.kwargs.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        self
    }
}

/// `value` if it lies in `range`, which also refuses NaN.
fn within(name: &str, value: Option<f32>, low: f32, high: f32) -> Result<Option<f32>> {
    match value {
        Some(v) if !(low..=high).contains(&v) => {
            Err(Error::invalid_request(format!("{name:?} must lie between {low} and {high}, not {v}")))
        }
        other => Ok(other),
    }
}

/// What of a message a text model would not see, by its name.
fn other_than_text(message: &Value) -> Option<String> {
    let has = |key: &&str| match message.get(key) {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    let beside = MEDIA_KEYS.iter().find(|key| has(key)).map(|key| format!("{key:?}"));
    beside.or_else(|| message.get("content").and_then(other_part))
}

/// The type of the first part in `content` that is not text; of results of tools it is what they hold. JSON that could be
/// read is not nested deeply.
fn other_part(content: &Value) -> Option<String> {
    let parts = match content {
        Value::Array(parts) => &parts[..],
        Value::Object(_) => std::slice::from_ref(content),
        _ => return None,
    };
    parts.iter().find_map(|part| match part.get("type").and_then(Value::as_str) {
        Some("text") => None,
        Some(kind) => part.get("content").and_then(other_part).or_else(|| Some(format!("a part of type {kind:?}"))),
        None => Some("a part without a type".to_owned()),
    })
}

impl RawRequest {
    fn check(self) -> Result<Request> {
        self.refuse_unsupported()?;
        if self.max_tokens == Some(0) || self.max_completion_tokens == Some(0) {
            return Err(Error::invalid_request("\"max_tokens\" must be at least 1"));
        }
        if self.n.is_some_and(|n| n == 0 || n > MAX_CHOICES) {
            return Err(Error::invalid_request(format!("\"n\" must lie between 1 and {MAX_CHOICES}")));
        }
        if self.top_p == Some(0.0) {
            return Err(Error::invalid_request("\"top_p\" must be above 0"));
        }
        if self.repetition_penalty == Some(0.0) {
            return Err(Error::invalid_request("\"repetition_penalty\" must be above 0"));
        }
        let top_logprobs = self.checked_logprobs()?;
        let stop = self.checked_stop()?;
        let logit_bias = self.checked_bias()?;
        // -1 is a common spelling of "off".
        let top_k = self.top_k.map(|k| if k == -1 { Ok(0) } else { u32::try_from(k) }).transpose();
        let top_k = top_k.map_err(|_| Error::invalid_request("\"top_k\" must be a count, 0 for all"))?;
        let stop_tokens = self.stop_token_ids.clone().unwrap_or_default();
        if stop_tokens.len() > MAX_STOPS {
            return Err(Error::invalid_request(format!("more than {MAX_STOPS} stop tokens")));
        }
        Ok(Request {
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            temperature: within("temperature", self.temperature, 0.0, 100.0)?,
            top_p: within("top_p", self.top_p, 0.0, 1.0)?,
            top_k,
            min_p: within("min_p", self.min_p, 0.0, 1.0)?,
            seed: self.seed.map(|seed| seed as u64),
            repetition_penalty: within("repetition_penalty", self.repetition_penalty, 0.0, 100.0)?,
            presence_penalty: within("presence_penalty", self.presence_penalty, -2.0, 2.0)?,
            frequency_penalty: within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?,
            logit_bias,
            top_logprobs,
            stop,
            stop_tokens,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            constraint: self.response_format.as_ref().map_or(Ok(None), response_format::constraint)?,
            thinking_budget: self.thinking_budget,
            choices: self.n.unwrap_or(1),
            priority: self.priority.unwrap_or_default(),
            context_limit: None,
            tells_loading: false,
            tells_start: false,
            model: self.model.clone(),
            input: self.input()?,
        })
    }

    /// What the API knows and this library does not do yet must not be ignored silently.
    fn refuse_unsupported(&self) -> Result<()> {
        match self.messages.iter().flatten().find_map(other_than_text) {
            Some(what) => Err(Error::unsupported(format!("{what} in a message: only text is supported"))),
            None => Ok(()),
        }
    }

    /// `None` if tools are not to be used.
    fn checked_tool_choice(&self) -> Result<Option<ToolChoice>> {
        let named = |choice: &Value| {
            let function = (choice.get("type")? == "function").then(|| choice.get("function"))??;
            Some(ToolChoice::Named(function.get("name")?.as_str()?.to_owned()))
        };
        let choice = match &self.tool_choice {
            None => Some(ToolChoice::Auto),
            Some(Value::String(choice)) => match choice.as_str() {
                "none" => return Ok(None),
                "auto" => Some(ToolChoice::Auto),
                "required" => Some(ToolChoice::Required),
                _ => None,
            },
            Some(choice) => named(choice),
        };
        let choice = choice.ok_or_else(|| {
            let known = "\"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": ..}}";
            Error::invalid_request(format!("\"tool_choice\" is {known}"))
        })?;
        if choice != ToolChoice::Auto && self.tools.as_ref().is_none_or(Vec::is_empty) {
            return Err(Error::invalid_request("\"tool_choice\" asks for a call, and there are no \"tools\""));
        }
        Ok(Some(choice))
    }

    fn checked_logprobs(&self) -> Result<Option<usize>> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, None) => Ok(None),
            (false, Some(_)) => Err(Error::invalid_request("\"top_logprobs\" needs \"logprobs\": true")),
            (true, n) if n.unwrap_or(0) <= MAX_TOP_LOGPROBS => Ok(Some(n.unwrap_or(0))),
            (true, _) => Err(Error::invalid_request(format!("\"top_logprobs\" is at most {MAX_TOP_LOGPROBS}"))),
        }
    }

    fn checked_stop(&self) -> Result<Vec<String>> {
        let stop = match &self.stop {
            None => return Ok(Vec::new()),
            Some(Stop::One(one)) => vec![one.clone()],
            Some(Stop::Many(many)) => many.clone(),
        };
        if stop.len() > MAX_STOPS || stop.iter().any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            let bounds = format!("at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_BYTES} bytes");
            return Err(Error::invalid_request(bounds));
        }
        Ok(stop)
    }

    fn checked_bias(&self) -> Result<Vec<(u32, f32)>> {
        let entries = self.logit_bias.iter().flatten().map(|(token, &bias)| {
            let token: u32 = token
                .parse()
                .map_err(|_| Error::invalid_request(format!("\"logit_bias\": {token:?} is not a token id")))?;
            within("logit_bias", Some(bias), -100.0, 100.0)?;
            Ok((token, bias))
        });
        entries.collect()
    }

    fn input(self) -> Result<Input> {
        let tool_choice = self.checked_tool_choice()?;
        match (self.messages, self.prompt) {
            (Some(_), Some(_)) => Err(Error::invalid_request("either \"messages\" or \"prompt\", not both")),
            (None, None) => Err(Error::invalid_request("\"messages\" is missing")),
            (Some(messages), None) if messages.is_empty() => Err(Error::invalid_request("\"messages\" is empty")),
            (Some(messages), None) => {
                if let Some(bad) = messages.iter().position(|m| !m.get("role").is_some_and(Value::is_string)) {
                    return Err(Error::invalid_request(format!("message {bad} is not an object with a \"role\"")));
                }
                let no_tools = tool_choice.is_none();
                Ok(Input::Chat(Box::new(ChatInput {
                    messages: Value::Array(messages),
                    tools: self.tools.filter(|tools| !tools.is_empty() && !no_tools).map(Value::Array),
                    tool_choice: tool_choice.unwrap_or(ToolChoice::Auto),
                    parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
                    template: self.chat_template,
                    add_generation_prompt: self.add_generation_prompt.unwrap_or(true),
                    kwargs: self.chat_template_kwargs.unwrap_or_default(),
                })))
            }
            (None, Some(_)) if self.tools.is_some() => {
                Err(Error::invalid_request("\"tools\" goes with \"messages\", not with \"prompt\""))
            }
            (None, Some(Prompt::Text(text))) if text.is_empty() => Err(Error::invalid_request("\"prompt\" is empty")),
            (None, Some(Prompt::Text(text))) => Ok(Input::Text(text)),
            (None, Some(Prompt::Tokens(ids))) if ids.is_empty() => Err(Error::invalid_request("\"prompt\" is empty")),
            (None, Some(Prompt::Tokens(ids))) => Ok(Input::Tokens(ids)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn parse(json: &str) -> Result<Request> {
        Request::from_json(json.as_bytes(), false)
    }

    #[test]
    fn the_usual_fields_arrive() {
        let request = parse(
            r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":0.5,"top_k":-1,"seed":-3,
                "stop":"END","logit_bias":{"7":-100},"logprobs":true,"top_logprobs":2,"max_completion_tokens":9,
                "stream":true,"chat_template_kwargs":{"enable_thinking":false}}"#,
        )
        .unwrap();
        assert_eq!((request.temperature, request.top_k, request.max_tokens), (Some(0.5), Some(0), Some(9)));
        assert_eq!((request.stop, request.logit_bias), (vec!["END".to_owned()], vec![(7, -100.0)]));
        assert_eq!((request.top_logprobs, request.seed), (Some(2), Some(-3i64 as u64)));
        let Input::Chat(chat) = request.input else { panic!("not a chat") };
        assert!(chat.add_generation_prompt && chat.tools.is_none());
        assert_eq!(chat.kwargs["enable_thinking"], false);
    }

    #[test]
    fn tools_and_how_to_call_them() {
        let chat = |more: &str| {
            let json = format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"tools":[{{"name":"f"}}]{more}}}"#);
            match parse(&json).unwrap().input {
                Input::Chat(chat) => (chat.tools.is_some(), chat.parallel_tool_calls),
                _ => panic!("not a chat"),
            }
        };
        assert_eq!(chat(""), (true, true));
        assert_eq!(chat(r#","tool_choice":"auto","parallel_tool_calls":false"#), (true, false));
        assert_eq!(chat(r#","tool_choice":"none""#), (false, true));
        assert_eq!(parse(r#"{"prompt":"x","parallel_tool_calls":1}"#).unwrap_err().status(), Status::InvalidRequest);
    }

    #[test]
    fn prompts_may_be_text_or_tokens() {
        assert_eq!(parse(r#"{"prompt":"x"}"#).unwrap().input, Input::Text("x".into()));
        assert_eq!(parse(r#"{"prompt":[1,2]}"#).unwrap().input, Input::Tokens(vec![1, 2]));
    }

    #[test]
    fn unknown_keys_are_named_unless_lenient() {
        let json = r#"{"prompt":"x","store":true}"#;
        assert!(parse(json).unwrap_err().message().contains("store"));
        assert!(Request::from_json(json.as_bytes(), true).is_ok());
    }

    #[test]
    fn what_is_not_text_is_refused_by_its_name() {
        let refused = |message: Value, name: &str| {
            let text = serde_json::json!({ "role": "user", "content": [{ "type": "text", "text": "before" }] });
            let json = serde_json::json!({ "messages": [text, message] }).to_string();
            for lenient in [false, true] {
                let error = Request::from_json(json.as_bytes(), lenient).expect_err(&json);
                assert_eq!(error.status(), Status::Unsupported, "{json}: {error}");
                assert!(error.message().contains(name), "{json}: {error}");
            }
        };
        let text = || serde_json::json!({ "type": "text", "text": "see" });
        for kind in [
            "image_url",
            "input_image",
            "image",
            "input_audio",
            "audio",
            "audio_url",
            "video",
            "video_url",
            "file",
            "input_file",
            "document",
        ] {
            let part = || serde_json::json!({ "type": kind, "source": { "type": "base64", "data": "AA==" } });
            let message = |role: &str, content: Value| serde_json::json!({ "role": role, "content": content });
            let name = format!("\"{kind}\"");
            refused(message("user", serde_json::json!([text(), part()])), &name);
            refused(message("user", part()), &name);
            refused(message("tool", serde_json::json!([text(), part()])), &name);
            let result =
                |content| serde_json::json!([{ "type": "tool_result", "tool_use_id": "1", "content": content }]);
            refused(message("user", result(serde_json::json!([text(), part()]))), &name);
        }
        for key in MEDIA_KEYS {
            refused(serde_json::json!({ "role": "user", "content": "see", key: ["AA=="] }), key);
            let beside = format!(r#"{{"prompt":"see","{key}":["AA=="]}}"#);
            assert_eq!(Request::from_json(beside.as_bytes(), true).unwrap_err().status(), Status::Unsupported);
        }
        refused(serde_json::json!({ "role": "user", "content": [{ "image_url": "x" }] }), "without a type");
        // What says that there is none is no picture.
        let none =
            r#"{"messages":[{"role":"assistant","content":[{"type":"text","text":"x"}],"audio":null,"images":[]}]}"#;
        assert!(parse(none).is_ok());
    }

    #[test]
    fn bad_requests_are_refused() {
        let deep = format!(r#"{{"messages":[{}1{}]}}"#, "[".repeat(100_000), "]".repeat(100_000));
        for (json, status) in [
            ("", Status::InvalidRequest),
            ("null", Status::InvalidRequest),
            ("{}", Status::InvalidRequest),
            (r#"{"messages":[]}"#, Status::InvalidRequest),
            (r#"{"messages":[{"content":"no role"}]}"#, Status::InvalidRequest),
            (r#"{"messages":[{"role":"user"}],"prompt":"x"}"#, Status::InvalidRequest),
            (r#"{"prompt":""}"#, Status::InvalidRequest),
            (r#"{"prompt":[]}"#, Status::InvalidRequest),
            (r#"{"prompt":[-1]}"#, Status::InvalidRequest),
            (r#"{"prompt":"x"} trailing"#, Status::InvalidRequest),
            (r#"{"prompt":"x","temperature":1e999}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","temperature":1e38}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","temperature":-1}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","top_p":0}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","top_k":99999999999}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","max_tokens":0}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","max_tokens":-5}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","max_tokens":1e400}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","logit_bias":{"one":1}}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","stop":[""]}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","top_logprobs":3}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","logprobs":true,"top_logprobs":21}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","prompt":"y"}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","n":0}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","n":17}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","priority":"urgent"}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","response_format":{"type":"xml"}}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","thinking_budget":-1}"#, Status::InvalidRequest),
            (r#"{"prompt":"x","tool_choice":"required"}"#, Status::InvalidRequest),
            (r#"{"messages":[{"role":"user"}],"tool_choice":"any"}"#, Status::InvalidRequest),
            (r#"{"messages":[{"role":"user"}],"tools":[],"tool_choice":"required"}"#, Status::InvalidRequest),
            (
                r#"{"messages":[{"role":"user"}],"tools":[{}],"tool_choice":{"type":"function"}}"#,
                Status::InvalidRequest,
            ),
            (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, Status::Unsupported),
            (deep.as_str(), Status::InvalidRequest),
        ] {
            let shown: String = json.chars().take(60).collect();
            assert_eq!(parse(json).map(|_| ()).map_err(|e| e.status()), Err(status), "{shown}");
        }
        assert!(Request::from_json(b"{\"prompt\":\"\xff\"}", false).is_err(), "invalid UTF-8 was accepted");
        assert!(Request::from_json(b"{\"prompt\":\"a\0b\"}", false).is_err(), "a raw NUL byte was accepted");
    }
}
