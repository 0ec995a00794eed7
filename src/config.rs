//! `config.json` and `generation_config.json` of a model folder.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result, Status};
use crate::mlx::{QuantFormat, QuantMode};

/// Largest JSON file of a model folder that is read; real ones stay far below.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Where configs keep rotary settings, among them what others have beside these.
const ROPE_OBJECTS: [&str; 2] = ["rope_parameters", "rope_scaling"];

/// Reads and parses a JSON file; `InvalidModel` names the file when it is not valid JSON.
pub fn read_json(path: &Path) -> Result<Value> {
    let name = path.display();
    let size = std::fs::metadata(path).map_err(|e| Error::io(&name, &e))?.len();
    if size > MAX_JSON_BYTES {
        return Err(Error::invalid_model(format!("{name}: {size} bytes are too many for a JSON file")));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(&name, &e))?;
    parse_json(&bytes).map_err(|e| Error::invalid_model(format!("{name}: {e}")))
}

/// What Python writes for numbers that JSON does not have (Nemotron-H: `"time_step_limit": [0.0, Infinity]`), and what they are read
/// as: a number that becomes infinite in f32, and nothing.
const PYTHON_NUMBERS: [(&str, &str); 2] = [("Infinity", "1e308"), ("NaN", "null")];

/// JSON, or what Python's `json` and transformers (`{"__float__": "Infinity"}`) make of it.
fn parse_json(bytes: &[u8]) -> serde_json::Result<Value> {
    let mut value = match serde_json::from_slice(bytes) {
        Ok(value) => value,
        // The error is that of the file as it is.
        Err(error) => serde_json::from_slice(&with_json_numbers(bytes)).map_err(|_| error)?,
    };
    unwrap_floats(&mut value);
    Ok(value)
}

/// `bytes` with Python's numbers replaced, outside of strings.
fn with_json_numbers(bytes: &[u8]) -> Vec<u8> {
    let (mut out, mut rest, mut quoted) = (Vec::with_capacity(bytes.len()), bytes, false);
    while let Some(&byte) = rest.first() {
        let python = PYTHON_NUMBERS.iter().find(|(word, _)| !quoted && rest.starts_with(word.as_bytes()));
        let (taken, written) = match python {
            Some((word, number)) => (word.len(), number.as_bytes()),
            // A quote behind a backslash ends nothing.
            None if quoted && byte == b'\\' && rest.len() > 1 => (2, &rest[..2]),
            None => {
                quoted ^= byte == b'"';
                (1, &rest[..1])
            }
        };
        out.extend(written);
        rest = &rest[taken..];
    }
    out
}

/// Replaces the objects that transformers writes for such numbers.
fn unwrap_floats(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(unwrap_floats),
        Value::Object(object) => {
            let number = match (object.len(), object.get("__float__").and_then(Value::as_str)) {
                (1, Some("Infinity")) => Some(Value::from(1e308)),
                (1, Some("-Infinity")) => Some(Value::from(-1e308)),
                (1, Some("NaN")) => Some(Value::Null),
                _ => None,
            };
            match number {
                Some(number) => *value = number,
                None => object.values_mut().for_each(unwrap_floats),
            }
        }
        _ => {}
    }
}

/// A model's `config.json`, kept whole: each architecture takes out what it knows.
///
/// The language model of a config that wraps one (`text_config`, beside the parts for images or sound) is what is read.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    raw: Value,
    /// Whether the language model is in `text_config`.
    wrapped: bool,
    model_type: String,
    quantization: Option<Quantization>,
}

impl ModelConfig {
    /// Reads `config.json` in `folder`.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        Self::from_value(read_json(&path)?).map_err(|e| e.context(path.display()))
    }

    /// Takes a parsed configuration.
    pub fn from_value(raw: Value) -> Result<Self> {
        let wrapped = raw.get("text_config").is_some_and(Value::is_object);
        let named = |config: &Value| config.get("model_type").and_then(Value::as_str).map(str::to_owned);
        let outer = named(&raw).ok_or_else(|| Error::invalid_model("\"model_type\" is missing"))?;
        let inner = raw.get("text_config").filter(|_| wrapped);
        let model_type = inner.map_or(outer.clone(), |text| named(text).unwrap_or(format!("{outer}_text")));
        let quantization = Quantization::from_config(&raw)?;
        Ok(Self { raw, wrapped, model_type, quantization })
    }

    /// All of it.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// The part that describes the language model.
    fn text(&self) -> &Value {
        if self.wrapped { &self.raw["text_config"] } else { &self.raw }
    }

    /// Whether it also describes what is not the language model.
    pub fn is_wrapped(&self) -> bool {
        self.wrapped
    }

    /// The architecture's name.
    pub fn model_type(&self) -> &str {
        &self.model_type
    }

    /// How the weights are quantised, if they are.
    pub fn quantization(&self) -> Option<&Quantization> {
        self.quantization.as_ref()
    }

    /// The fields that an architecture declares; a missing or mistyped one is an error that names it.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(self.text())
            .map_err(|e| Error::invalid_model(format!("config.json of type {:?}: {e}", self.model_type)))
    }

    /// The same, where what the config does not have is taken from `defaults`, an object. It has a `rope_theta`, too, if that is
    /// among other rotary settings, where transformers 5 keeps it.
    pub fn parse_over<T: DeserializeOwned>(&self, mut defaults: Value) -> Result<T> {
        if let (Some(defaults), Some(own)) = (defaults.as_object_mut(), self.text().as_object()) {
            let names_theta = |object: &&str| own.get(*object).is_some_and(|rope| !rope["rope_theta"].is_null());
            if ROPE_OBJECTS.iter().any(names_theta) {
                defaults.remove("rope_theta");
            }
            let given = own.iter().filter(|(_, value)| !value.is_null());
            defaults.extend(given.map(|(key, value)| (key.clone(), value.clone())));
        }
        T::deserialize(&defaults)
            .map_err(|e| Error::invalid_model(format!("config.json of type {:?}: {e}", self.model_type)))
    }

    /// A field of the language model's part.
    pub fn field(&self, key: &str) -> Option<&Value> {
        self.text().get(key).filter(|value| !value.is_null())
    }

    /// A positive integer field, if present.
    pub fn integer(&self, key: &str) -> Option<usize> {
        self.field(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok())
    }
}

/// The `quantization` object that MLX tools write: a default format and per-layer exceptions.
#[derive(Debug, Clone)]
pub struct Quantization {
    default: QuantFormat,
    /// Layer path to its own format; `None` means the layer is not quantised.
    layers: std::collections::HashMap<String, Option<QuantFormat>>,
}

impl Quantization {
    fn from_config(config: &Value) -> Result<Option<Self>> {
        let object = match (config.get("quantization"), config.get("quantization_config")) {
            (Some(own), _) if !own.is_null() => own,
            (_, Some(other)) if !other.is_null() => {
                if let Some(method) = other.get("quant_method").and_then(Value::as_str) {
                    // gpt-oss as its authors publish it: experts alone, in blocks that `weights` knows.
                    if method == "mxfp4" {
                        let default = QuantFormat { group_size: 32, bits: 4, mode: QuantMode::Mxfp4 };
                        return Ok(Some(Self { default, layers: std::collections::HashMap::new() }));
                    }
                    return Err(Error::unsupported(format!(
                        "quantization method {method:?} is not supported; convert the model to MLX format"
                    )));
                }
                other
            }
            _ => return Ok(None),
        };
        let object = object.as_object().ok_or_else(|| Error::invalid_model("\"quantization\" must be an object"))?;
        let default = parse_format(object, None).map_err(|e| e.context("quantization"))?;
        let mut layers = std::collections::HashMap::new();
        for (path, value) in object {
            let format = match value {
                Value::Object(format) => {
                    Some(parse_format(format, Some(default)).map_err(|e| e.context(format!("quantization.{path}")))?)
                }
                Value::Bool(false) => None,
                Value::Bool(true) => Some(default),
                _ => continue,
            };
            layers.insert(path.clone(), format);
        }
        Ok(Some(Self { default, layers }))
    }

    /// The format of layers without an exception.
    pub fn default_format(&self) -> QuantFormat {
        self.default
    }

    /// The format of the layer at `path` (without the tensor's own name); `None` if it is declared as not quantised.
    pub fn format_of(&self, path: &str) -> Option<QuantFormat> {
        self.layers.get(path).copied().unwrap_or(Some(self.default))
    }
}

/// A format object; what it leaves out comes from `inherit`, or from MLX's defaults for the mode.
fn parse_format(object: &serde_json::Map<String, Value>, inherit: Option<QuantFormat>) -> Result<QuantFormat> {
    let mode = match object.get("mode").and_then(Value::as_str) {
        // Also of a layer's own format, whatever the default's mode is (mlx-lm, `utils.py`).
        None | Some("affine") => QuantMode::Affine,
        Some("mxfp4") => QuantMode::Mxfp4,
        Some("mxfp8") => QuantMode::Mxfp8,
        Some("nvfp4") => QuantMode::Nvfp4,
        Some(other) => return Err(Error::unsupported(format!("unknown mode {other:?}"))),
    };
    let (group_default, bits_default) = match mode {
        QuantMode::Affine => (64, 4),
        QuantMode::Mxfp4 => (32, 4),
        QuantMode::Mxfp8 => (32, 8),
        QuantMode::Nvfp4 => (16, 4),
    };
    let inherit = inherit.filter(|f| f.mode == mode);
    let number = |key: &str, inherited: Option<usize>, default: usize| match object.get(key) {
        None | Some(Value::Null) => Ok(inherited.unwrap_or(default)),
        Some(value) => value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Error::invalid_model(format!("{key:?} must be a positive integer, not {value}"))),
    };
    let group_size = number("group_size", inherit.map(|f| f.group_size), group_default)?;
    let bits = number("bits", inherit.map(|f| f.bits), bits_default)?;
    let known = match mode {
        QuantMode::Affine => [32, 64, 128].contains(&group_size) && [2, 3, 4, 5, 6, 8].contains(&bits),
        _ => (group_size, bits) == (group_default, bits_default),
    };
    if !known {
        return Err(Error::unsupported(format!("{bits} bits in groups of {group_size} do not exist in {mode:?} mode")));
    }
    Ok(QuantFormat { group_size, bits, mode })
}

/// One token id or a list of them, as both occur in configurations.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// Sampling defaults and end-of-text tokens of a model, from `generation_config.json` and `config.json`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a turn.
    pub eos: Vec<u32>,
    /// Softmax temperature; 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Number of most likely tokens kept.
    pub top_k: Option<u32>,
    /// Least probability relative to the best token's.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens already seen.
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_tokens: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
struct GenerationConfigFile {
    eos_token_id: Option<OneOrMany>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<usize>,
}

impl GenerationDefaults {
    /// Reads `generation_config.json` in `folder`, if there is one; end tokens fall back to `config.json`.
    pub fn load(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let path = folder.join("generation_config.json");
        let file = match read_json(&path) {
            Ok(value) => GenerationConfigFile::deserialize(&value)
                .map_err(|e| Error::invalid_model(format!("{}: {e}", path.display())))?,
            Err(e) if e.status() == Status::NotFound => GenerationConfigFile::default(),
            Err(e) => return Err(e),
        };
        Self::new(file, config)
    }

    /// The defaults of a model without a generation config.
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        Self::new(GenerationConfigFile::default(), config)
    }

    fn new(file: GenerationConfigFile, config: &ModelConfig) -> Result<Self> {
        fn of(part: &Value) -> Option<&Value> {
            part.get("eos_token_id").filter(|value| !value.is_null())
        }
        let from_config = match of(&config.raw).or_else(|| of(config.text())) {
            None => None,
            Some(value) => Some(
                OneOrMany::deserialize(value)
                    .map_err(|_| Error::invalid_model("config.json: \"eos_token_id\" must be one or more token ids"))?,
            ),
        };
        let eos = match file.eos_token_id.or(from_config) {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![id],
            Some(OneOrMany::Many(ids)) => ids,
        };
        // Hugging Face's meaning: without do_sample the sampling fields are present but unused.
        let sampling = file.do_sample.unwrap_or(false);
        // The ranges of requests; what lies outside is left out, as if the file did not have it.
        let within = |value: Option<f32>, low: f32, high: f32| value.filter(|v| (low..=high).contains(v));
        Ok(Self {
            eos,
            temperature: sampling.then_some(within(file.temperature, 0.0, 100.0).unwrap_or(1.0)),
            top_p: within(file.top_p, f32::MIN_POSITIVE, 1.0).filter(|_| sampling),
            top_k: file.top_k.and_then(|k| u32::try_from(k).ok()).filter(|_| sampling),
            min_p: within(file.min_p, 0.0, 1.0).filter(|_| sampling),
            repetition_penalty: within(file.repetition_penalty, f32::MIN_POSITIVE, 100.0),
            max_tokens: file.max_new_tokens.filter(|&n| n > 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(extra: Value) -> Result<ModelConfig> {
        let mut value = json!({"model_type": "llama"});
        value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ModelConfig::from_value(value)
    }

    #[test]
    fn the_language_model_of_a_wrapper_is_read() {
        let text = json!({"model_type": "qwen3", "hidden_size": 8});
        let wrapper = config(json!({"model_type": "seeing", "hidden_size": 4, "text_config": text})).unwrap();
        assert_eq!((wrapper.model_type(), wrapper.integer("hidden_size")), ("qwen3", Some(8)));
        let unnamed = config(json!({"model_type": "seeing", "text_config": {}})).unwrap();
        assert_eq!((unnamed.model_type(), unnamed.is_wrapped()), ("seeing_text", true));
        let plain = config(json!({"hidden_size": 4, "text_config": null})).unwrap();
        assert_eq!((plain.model_type(), plain.integer("hidden_size"), plain.is_wrapped()), ("llama", Some(4), false));
    }

    #[test]
    fn numbers_that_only_python_writes_are_read() {
        let text = br#"{"limit": [0.0, Infinity, -Infinity, NaN], "said": "a \"Infinity\" of NaN", "c": "\\"}"#;
        assert!(serde_json::from_slice::<Value>(text).is_err(), "it is JSON already");
        let value = parse_json(text).unwrap();
        let limit: (f32, f32, f32, Option<f32>) = serde_json::from_value(value["limit"].clone()).unwrap();
        assert_eq!(limit, (0.0, f32::INFINITY, f32::NEG_INFINITY, None));
        assert_eq!(value["said"], "a \"Infinity\" of NaN");
        let named = br#"{"limit": [0.0, {"__float__": "Infinity"}], "other": {"__float__": "1", "x": {}}}"#;
        let named = parse_json(named).unwrap();
        assert_eq!(serde_json::from_value::<(f32, f32)>(named["limit"].clone()).unwrap(), (0.0, f32::INFINITY));
        assert_eq!(named["other"], json!({"__float__": "1", "x": {}}));
        for broken in [&br#"{"a": Infinit}"#[..], br#"{"a": "NaN}"#, br#"{"a": "\\"#, b"{\"a\": InfinityNaN}"] {
            assert!(parse_json(broken).is_err(), "{}", String::from_utf8_lossy(broken));
        }
    }

    #[test]
    fn per_layer_formats_override_the_default() {
        let config = config(json!({"quantization": {
            "group_size": 64, "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 6},
            "lm_head": {"mode": "mxfp4"},
            "model.layers.0.mlp.down_proj": false,
        }}))
        .unwrap();
        let q = config.quantization().unwrap();
        let affine = |group_size, bits| Some(QuantFormat { group_size, bits, mode: QuantMode::Affine });
        assert_eq!(q.format_of("model.layers.1.mlp.down_proj"), affine(64, 4));
        assert_eq!(q.format_of("model.embed_tokens"), affine(32, 6));
        assert_eq!(q.format_of("lm_head"), Some(QuantFormat { group_size: 32, bits: 4, mode: QuantMode::Mxfp4 }));
        assert_eq!(q.format_of("model.layers.0.mlp.down_proj"), None);
    }

    #[test]
    fn impossible_formats_are_refused() {
        for bad in [
            json!({"group_size": 48, "bits": 4}),
            json!({"group_size": 64, "bits": 7}),
            json!({"group_size": 64, "bits": 4, "mode": "mxfp4"}),
            json!({"mode": "int4"}),
            json!({"bits": -1}),
        ] {
            assert!(config(json!({"quantization": bad})).is_err(), "{bad} was accepted");
        }
        let foreign = config(json!({"quantization_config": {"quant_method": "gptq", "bits": 4}})).unwrap_err();
        assert_eq!(foreign.status(), Status::Unsupported);
        let blocks = json!({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}});
        let format = config(blocks).unwrap().quantization().unwrap().default_format();
        assert_eq!(format, QuantFormat { group_size: 32, bits: 4, mode: QuantMode::Mxfp4 });
    }

    #[test]
    fn generation_defaults_follow_do_sample() {
        let config = config(json!({"eos_token_id": 7})).unwrap();
        let file = |value: Value| GenerationConfigFile::deserialize(&value).unwrap();
        let greedy = GenerationDefaults::new(file(json!({"temperature": 0.6, "top_p": 0.9})), &config).unwrap();
        assert_eq!((greedy.temperature, greedy.top_p, greedy.eos), (None, None, vec![7]));
        let sampled =
            GenerationDefaults::new(file(json!({"do_sample": true, "top_k": 20, "eos_token_id": [1, 2]})), &config)
                .unwrap();
        assert_eq!((sampled.temperature, sampled.top_k, sampled.eos), (Some(1.0), Some(20), vec![1, 2]));
        let odd = json!({"do_sample": true, "top_k": -1, "top_p": 0, "repetition_penalty": 0, "max_new_tokens": 0});
        let odd = GenerationDefaults::new(file(odd), &config).unwrap();
        assert_eq!((odd.top_k, odd.top_p, odd.repetition_penalty, odd.max_tokens), (None, None, None, None));
    }
}
