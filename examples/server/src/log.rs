//! The log: a line per event on standard error, as `name=value` or as JSON.

use std::io::Write;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use omlx_client::LogLevel;
use serde_json::{Map, Value};

/// What is written and how.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Up to which level.
    pub level: LogLevel,
    /// JSON instead of text.
    pub json: bool,
}

static STYLE: OnceLock<Style> = OnceLock::new();

impl Style {
    /// From the options' names.
    pub fn parse(level: &str, format: &str) -> Result<Self, String> {
        let level = match level {
            "error" => LogLevel::Error,
            "warn" => LogLevel::Warn,
            "info" => LogLevel::Info,
            "debug" => LogLevel::Debug,
            other => return Err(format!("--log-level: {other:?} is none of error, warn, info, debug")),
        };
        match format {
            "json" => Ok(Self { level, json: true }),
            "text" => Ok(Self { level, json: false }),
            other => Err(format!("--log-format: {other:?} is neither text nor json")),
        }
    }
}

/// Sets the style, once, and writes the library's lines too.
pub fn start(style: Style) {
    if STYLE.set(style).is_ok() {
        // Without the hook the library's lines are missing, nothing else.
        let _ = omlx_client::set_log_hook(style.level, |level, message| {
            write(level, "library", &[("message", message.into())]);
        });
    }
}

/// Writes a line. Values from clients are escaped.
pub fn write(level: LogLevel, event: &str, fields: &[(&str, Value)]) {
    let Some(style) = STYLE.get().filter(|style| level <= style.level) else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
    };
    let mut line = if style.json {
        let mut object = Map::new();
        object.insert("time".to_owned(), Value::from(now.as_millis() as u64));
        object.insert("level".to_owned(), name.into());
        object.insert("event".to_owned(), event.into());
        object.extend(fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        Value::Object(object).to_string()
    } else {
        let fields: String = fields.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        format!("{}.{:03} {name:<5} {event}{fields}", now.as_secs(), now.subsec_millis())
    };
    line.push('\n');
    // Nobody is left to tell if standard error is closed.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Writes a line of level `info`.
pub fn info(event: &str, fields: &[(&str, Value)]) {
    write(LogLevel::Info, event, fields);
}
