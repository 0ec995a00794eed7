//! Options of the commands: one table, from which come flags, environment variables, keys of the settings file, and the help.
//!
//! A flag beats the environment, which beats the settings file, which beats the default.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::Value;

/// An option: `--name VALUE`, `OMLX_SERVER_NAME`, or `"name"` in the settings file (with `_` for `-`).
struct Spec {
    name: &'static str,
    /// What stands for the value in the help; "" for a switch.
    value: &'static str,
    default: &'static str,
    help: &'static str,
}

const fn spec(name: &'static str, value: &'static str, default: &'static str, help: &'static str) -> Spec {
    Spec { name, value, default, help }
}

const SPECS: &[Spec] = &[
    spec("config", "FILE", "", "settings file: a JSON object with these names as keys"),
    spec("models", "FOLDER", "", "folder of model folders (default: the bundled ones)"),
    spec("hub-cache", "FOLDER", "", "models of the hub's own tools; 'default' is their folder"),
    spec("default-model", "ID", "", "for requests that name no model, or an unknown one"),
    spec("host", "ADDRESS", "127.0.0.1", "address to listen on"),
    spec("port", "PORT", "8000", "port to listen on; 0 takes a free one"),
    spec("api-key-file", "FILE", "", "API keys, one a line; or OMLX_SERVER_API_KEY"),
    spec("allow-no-key", "", "", "listen on other addresses than this machine's without a key"),
    spec("allowed-hosts", "NAMES", "", "names by which clients may call the server, with commas"),
    spec("cors-origins", "URLS", "", "web pages that may call the server, with commas"),
    spec("max-body-mb", "MIB", "16", "largest body of a request"),
    spec("max-connections", "COUNT", "1024", "connections at the same time"),
    spec("timeout", "SECONDS", "15", "for the head of a request, and between pieces of its body"),
    spec("keep-alive", "SECONDS", "10", "between comments in a stream that has nothing to say"),
    spec("drain", "SECONDS", "30", "for running requests to end after SIGTERM"),
    spec("device", "DEVICE", "auto", "auto, cpu or gpu"),
    spec("precision", "NAME", "fast", "fast or exact (on a CPU)"),
    spec("threads", "COUNT", "0", "computing threads; 0: one for each core"),
    spec("context-length", "TOKENS", "0", "limit of every model's context; 0: its own"),
    spec("max-sequences", "COUNT", "0", "answers of a model computed together; 0: 8"),
    spec("queue-length", "COUNT", "0", "requests that may wait for a model; 0: 64"),
    spec("memory-gb", "GIB", "0", "memory of all models together; 0: what can be spared"),
    spec("ttl", "SECONDS", "0", "unload models unused for so long; 0: when memory is needed"),
    spec("cache-dir", "FOLDER", "", "keep keys and values there, over restarts"),
    spec("cache-gb", "GIB", "0", "disk space for them; 0: a tenth of what is free"),
    spec("model-settings", "FILE", "", "where the admin page's settings of models are kept"),
    spec("log-level", "LEVEL", "info", "error, warn, info or debug"),
    spec("log-format", "FORMAT", "text", "text or json"),
];

/// Values of all options.
#[derive(Debug, Clone)]
pub struct Options {
    values: BTreeMap<&'static str, String>,
    /// Arguments that are no options.
    pub rest: Vec<String>,
}

impl Options {
    /// Reads arguments, environment and settings file. Anything unknown in arguments or file is an error.
    pub fn read(arguments: Vec<String>, environment: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let (flags, rest) = flags(arguments)?;
        let mut values: BTreeMap<_, _> = SPECS.iter().map(|spec| (spec.name, spec.default.to_owned())).collect();
        let variables: BTreeMap<_, _> =
            SPECS.iter().filter_map(|spec| Some((spec.name, environment(&variable(spec.name))?))).collect();
        let config = flags.get("config").or_else(|| variables.get("config"));
        if let Some(file) = config.filter(|file| !file.is_empty()) {
            values.extend(settings(file)?);
        }
        values.extend(variables);
        values.extend(flags);
        Ok(Self { values, rest })
    }

    /// A text; "" where nothing is said.
    pub fn text(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }

    /// A text, if there is one.
    pub fn given(&self, name: &str) -> Option<String> {
        Some(self.text(name)).filter(|text| !text.is_empty()).map(str::to_owned)
    }

    /// A path, if there is one.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.given(name).map(PathBuf::from)
    }

    /// Whether a switch is on.
    pub fn switch(&self, name: &str) -> bool {
        matches!(self.text(name), "1" | "true" | "yes" | "on")
    }

    /// A number.
    pub fn number<T: FromStr>(&self, name: &str) -> Result<T, String> {
        self.text(name).parse().map_err(|_| format!("--{name}: {:?} is not a number in range", self.text(name)))
    }

    /// Gibibytes, fractions allowed, as bytes.
    pub fn gibibytes(&self, name: &str) -> Result<u64, String> {
        match self.number::<f64>(name)? {
            number if (0.0..1e9).contains(&number) => Ok((number * f64::from(1 << 30)) as u64),
            _ => Err(format!("--{name}: {:?} is not a size", self.text(name))),
        }
    }

    /// The items of a list with commas.
    pub fn list(&self, name: &str) -> Vec<String> {
        let items = self.text(name).split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(str::to_owned).collect()
    }
}

type Values = BTreeMap<&'static str, String>;

/// What the arguments say, and those that are no options.
fn flags(arguments: Vec<String>) -> Result<(Values, Vec<String>), String> {
    let (mut values, mut rest) = (Values::new(), Vec::new());
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let Some(flag) = argument.strip_prefix("--") else {
            rest.push(argument);
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let spec = find(name).ok_or_else(|| format!("there is no option --{name}; see --help"))?;
        let value = match value {
            Some(value) => value,
            None if spec.value.is_empty() => "true".to_owned(),
            None => arguments.next().ok_or_else(|| format!("--{name} needs a value"))?,
        };
        values.insert(spec.name, value);
    }
    Ok((values, rest))
}

/// What the settings file says.
fn settings(file: &str) -> Result<Values, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    let object: serde_json::Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| format!("{file}: {error}"))?;
    let mut values = Values::new();
    for (key, value) in object {
        let spec = find(&key.replace('_', "-")).filter(|spec| spec.name != "config");
        let spec = spec.ok_or_else(|| format!("{file}: {key:?} is not a setting"))?;
        let text = match value {
            Value::String(text) => text,
            Value::Number(number) => number.to_string(),
            Value::Bool(switch) => switch.to_string(),
            Value::Array(items) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            _ => return Err(format!("{file}: {key:?} has a value of another kind")),
        };
        values.insert(spec.name, text);
    }
    Ok(values)
}

fn find(name: &str) -> Option<&'static Spec> {
    SPECS.iter().find(|spec| spec.name == name)
}

fn variable(name: &str) -> String {
    format!("OMLX_SERVER_{}", name.to_uppercase().replace('-', "_"))
}

/// The help: a screen.
pub fn help() -> String {
    let mut text = String::from(
        "omlx-server: local language models over HTTP (OpenAI's and Anthropic's APIs)\n\n\
         omlx-server serve            serve; its page is http://127.0.0.1:8000/\n\
         omlx-server models           list the models\n\
         omlx-server pull ORG/NAME    download a model from the hub\n\
         omlx-server chat [TEXT]      talk to the default model\n\
         omlx-server bench            measure the default model\n\n\
         Also as OMLX_SERVER_NAME in the environment, or \"name\" in the settings file; flags win, then\n\
         the environment.\n\n",
    );
    for spec in SPECS {
        let flag = format!("--{} {}", spec.name, spec.value);
        let default = match spec.default {
            "" | "0" => String::new(),
            default => format!(" ({default})"),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {flag:<26}{}{default}", spec.help);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"port": 1, "host": "file", "drain": 3, "allowed_hosts": ["a", "b"]}"#).unwrap();
        let file = file.path().to_str().unwrap();
        let environment = |name: &str| match name {
            "OMLX_SERVER_PORT" => Some("2".to_owned()),
            "OMLX_SERVER_HOST" => Some("environment".to_owned()),
            _ => None,
        };
        let options = Options::read(arguments(&["--config", file, "--port=4", "hello"]), environment).unwrap();
        assert_eq!(options.number::<u16>("port"), Ok(4));
        assert_eq!(options.text("host"), "environment");
        assert_eq!(options.number::<u64>("drain"), Ok(3));
        assert_eq!(options.text("device"), "auto");
        assert_eq!(options.list("allowed-hosts"), ["a", "b"]);
        assert_eq!(options.rest, ["hello"]);
    }

    #[test]
    fn what_is_unknown_is_an_error() {
        assert!(Options::read(arguments(&["--prot", "1"]), |_| None).unwrap_err().contains("--prot"));
        assert!(Options::read(arguments(&["--port"]), |_| None).unwrap_err().contains("needs a value"));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"prot": 1}"#).unwrap();
        let words = arguments(&["--config", file.path().to_str().unwrap()]);
        assert!(Options::read(words, |_| None).unwrap_err().contains("prot"));
        let options = Options::read(arguments(&["--port", "99999"]), |_| None).unwrap();
        assert!(options.number::<u16>("port").is_err());
    }

    #[test]
    fn the_help_fits_a_screen() {
        let help = help();
        assert!(help.lines().count() <= 45, "{} lines", help.lines().count());
        assert!(help.lines().all(|line| line.chars().count() <= 100));
    }
}
