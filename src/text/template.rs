//! Chat templates: messages to prompt text, byte for byte as Hugging Face transformers 5.23.0 renders them
//! (`apply_chat_template`, `transformers/utils/chat_template_utils.py`).
//!
//! Templates are Jinja programs from the model folder and therefore untrusted: they see only the data of the request,
//! run on a thread of their own with a stack of known size, and are bounded in work, recursion, nesting and time.
//!
//! Known differences from transformers, all outside of what templates do in practice: comparing unlike types gives
//! false where Python raises; `%` does not format strings, `+x` and macro `varargs` do not
//! exist; a float with an exponent prints in Rust's notation inside `~`; integers beyond 64 bits become floats.

mod arguments;
mod clock;
mod input;
mod json;
mod limits;
mod python;
mod source;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value};

pub use clock::LocalTime;
pub use input::ChatInput;

use super::special::SpecialTokens;
use crate::error::{Error, Result, Status};
use crate::panics;

/// What one rendering may cost: an instruction is one, and so are 64 bytes of data. Bounds the memory to about 512 MB
/// and the work, which a chat of 1 MB does not come near.
const FUEL: u64 = 8_000_000;
/// Depth of blocks, loops and macro calls (a macro call counts as four).
const RECURSION_LIMIT: usize = 200;
/// Address space for the rendering thread's stack; only what is used is ever committed.
const STACK_BYTES: usize = 64 << 20;
/// Fuel counts steps, not time: a step can compare long strings. A rendering that takes longer fails.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// The chat templates of a model.
#[derive(Debug)]
pub struct ChatTemplates {
    shared: Arc<Shared>,
    special_tokens: SpecialTokens,
    time_limit: Duration,
    /// All templates, for those who look for marks in them.
    text: String,
}

struct Shared {
    env: Environment<'static>,
    /// Every template by name, with the reason if it cannot be compiled.
    names: BTreeMap<String, Option<String>>,
    /// Renderings that ran out of time and are still using up their fuel.
    overdue: AtomicUsize,
}

/// The message of a template's `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplates {
    /// Reads the templates of a model folder; `config` is its parsed `tokenizer_config.json`, `now` as in
    /// [`new`](Self::new).
    ///
    /// As in transformers, `chat_template.jinja` and `additional_chat_templates/*.jinja` replace the `chat_template` of
    /// the configuration (a string, or a list of `{"name", "template"}`). A `chat_template.json`, which older
    /// processors have, is used if there is neither.
    pub fn load(
        folder: &Path,
        config: &serde_json::Value,
        special_tokens: &SpecialTokens,
        now: fn() -> LocalTime,
    ) -> Result<Self> {
        let mut sources = additional_templates(folder)?;
        if let Some(source) = super::read_text(folder, "chat_template.jinja")? {
            sources.insert("default".into(), source);
        }
        if sources.is_empty() {
            sources = configured_templates("tokenizer_config.json", config)?;
        }
        if sources.is_empty() {
            let legacy: Option<serde_json::Value> = super::read_json(folder, "chat_template.json")?;
            sources = configured_templates("chat_template.json", &legacy.unwrap_or_default())?;
        }
        Self::new(sources, special_tokens.clone(), now)
    }

    /// From template sources by name. `now` is the clock behind `strftime_now`.
    ///
    /// A template that cannot be compiled is an error only when it is rendered: the model may still be used without it.
    pub fn new(
        sources: BTreeMap<String, String>,
        special_tokens: SpecialTokens,
        now: fn() -> LocalTime,
    ) -> Result<Self> {
        let text = sources.values().map(String::as_str).collect::<Vec<_>>().join("\n");
        let shared = on_big_stack(move || {
            let mut env = environment(now);
            let names = sources.into_iter().map(|(name, source)| {
                let compiled = source::prepare(&source)
                    .and_then(|source| env.add_template_owned(name.clone(), source).map_err(|e| describe(&name, &e)));
                (name, compiled.err())
            });
            let names = names.collect();
            Arc::new(Shared { env, names, overdue: AtomicUsize::new(0) })
        })?;
        Ok(Self { shared, special_tokens, time_limit: TIME_LIMIT, text })
    }

    /// Names of the templates, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shared.names.keys().map(String::as_str)
    }

    /// The sources of all templates.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// `messages` as these templates take them, if that is not how they are: hosts send the arguments of earlier tool calls
    /// as JSON text, as OpenAI's API does, and most templates take objects.
    pub fn with_argument_objects(&self, messages: &serde_json::Value) -> Option<serde_json::Value> {
        arguments::take_objects(&self.text).then(|| arguments::objects(messages)).flatten()
    }

    /// Renders a chat to prompt text, special tokens included.
    ///
    /// Status `InvalidRequest` if messages, tools or the template's name are unusable, `Template` if the model has no
    /// template, or the template fails, refuses the messages or takes too much work. Takes no lock; any thread.
    pub fn render(&self, input: &ChatInput<'_>) -> Result<String> {
        let name = self.select(input)?;
        let context = input::context(input, &self.special_tokens)?;
        if self.shared.overdue.load(Ordering::Relaxed) > 0 {
            return Err(Error::template(format!(
                "template {name:?} is still busy with a rendering that took too long"
            )));
        }
        // Whoever is the second to set `over` knows that the other side is done with it.
        let over = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = channel();
        let (shared, job_name, job_over) = (Arc::clone(&self.shared), name.to_owned(), Arc::clone(&over));
        spawn(move || {
            let result = panics::catch(|| shared.render(&job_name, context));
            let failed = |_| Err(Error::internal(format!("template {job_name:?}: the engine failed")));
            // The receiver is gone if the time was over.
            drop(sender.send(result.unwrap_or_else(failed)));
            if job_over.swap(true, Ordering::AcqRel) {
                shared.overdue.fetch_sub(1, Ordering::Relaxed);
            }
        })?;
        receiver.recv_timeout(self.time_limit).unwrap_or_else(|_| {
            self.shared.overdue.fetch_add(1, Ordering::Relaxed);
            if over.swap(true, Ordering::AcqRel) {
                self.shared.overdue.fetch_sub(1, Ordering::Relaxed);
            }
            Err(Error::template(format!("template {name:?} took longer than {} s", self.time_limit.as_secs())))
        })
    }

    /// The template to use: the named one, else `tool_use` if there are tools, else `default` (transformers'
    /// `get_chat_template`).
    fn select<'a>(&'a self, input: &ChatInput<'a>) -> Result<&'a str> {
        let names = &self.shared.names;
        let known = || names.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        if names.is_empty() {
            return Err(Error::template("the model has no chat template"));
        }
        let name = match input.template {
            Some(name) if names.contains_key(name) => name,
            Some(name) => {
                return Err(Error::invalid_request(format!("no chat template {name:?}; the model has: {}", known())));
            }
            None if input.tools.is_some() && names.contains_key("tool_use") => "tool_use",
            None if names.contains_key("default") => "default",
            None => return Err(Error::template(format!("no default chat template; name one of: {}", known()))),
        };
        match names.get(name) {
            Some(Some(reason)) => Err(Error::template(reason.clone())),
            _ => Ok(name),
        }
    }
}

impl Shared {
    fn render(&self, name: &str, context: Value) -> Result<String> {
        let rendered = self.env.get_template(name).and_then(|template| template.render(context));
        rendered.map_err(|e| Error::template(describe(name, &e)))
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("names", &self.names).finish_non_exhaustive()
    }
}

/// Jinja as transformers sets it up.
fn environment(now: fn() -> LocalTime) -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION_LIMIT);
    env.remove_global("debug");
    env.add_filter("tojson", json::tojson);
    env.add_function("raise_exception", |message: &Value| -> Result<Value, minijinja::Error> {
        let raised = Raised(message.to_string());
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
    });
    env.add_function("strftime_now", move |format: &str| {
        now().format(format).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
    });
    python::add_to(&mut env);
    limits::add_to(&mut env);
    env
}

/// An error of the engine for people: which template, which line, what.
fn describe(name: &str, error: &minijinja::Error) -> String {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = source {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return format!("the chat template refuses the messages: {raised}");
        }
        source = cause.source();
    }
    let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    let detail = error.detail().map(|detail| format!(": {detail}")).unwrap_or_default();
    format!("chat template {name:?}{line}: {}{detail}", error.kind())
}

/// Runs `job` on a thread with a stack that no template which passed the limits can exhaust.
fn spawn(job: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>> {
    let builder = std::thread::Builder::new().name("omlx-template".into()).stack_size(STACK_BYTES);
    builder.spawn(job).map_err(|e| Error::io("a thread for the chat template", &e))
}

fn on_big_stack<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (sender, receiver) = channel();
    // If the receiver were gone nobody would want the value.
    spawn(move || drop(sender.send(job())))?;
    receiver.recv().map_err(|_| Error::internal("the compiler of chat templates failed"))
}

/// `additional_chat_templates/NAME.jinja`.
fn additional_templates(folder: &Path) -> Result<BTreeMap<String, String>> {
    const FOLDER: &str = "additional_chat_templates";
    let mut sources = BTreeMap::new();
    let entries = match std::fs::read_dir(folder.join(FOLDER)) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(sources);
        }
        Err(e) => return Err(Error::io(FOLDER, &e)),
    };
    for entry in entries {
        let file = entry.map_err(|e| Error::io(FOLDER, &e))?.file_name();
        let Some(file) = file.to_str() else { continue };
        let Some(name) = file.strip_suffix(".jinja") else { continue };
        if let Some(source) = super::read_text(folder, &format!("{FOLDER}/{file}"))? {
            sources.insert(name.to_owned(), source);
        }
    }
    Ok(sources)
}

/// The `chat_template` entry of a JSON file: a string or a list of named ones.
fn configured_templates(file: &str, config: &serde_json::Value) -> Result<BTreeMap<String, String>> {
    let invalid =
        || Error::new(Status::InvalidModel, format!("{file}: chat_template is neither text nor a list of named texts"));
    match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(BTreeMap::new()),
        Some(serde_json::Value::String(source)) => Ok([("default".to_owned(), source.clone())].into()),
        Some(serde_json::Value::Array(list)) => {
            let named = list.iter().map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)));
            let named = named.map(|entry| entry.map(|(name, source)| (name.to_owned(), source.to_owned())));
            named.collect::<Option<_>>().ok_or_else(invalid)
        }
        Some(_) => Err(invalid()),
    }
}

#[cfg(test)]
mod tests;
