//! Chat with a model in the terminal, through the C ABI.
//!
//! ```text
//! cargo run --release --example chat -- "Tell me a short story about a fox."   one answer
//! cargo run --release --example chat                                           a conversation, ended by Ctrl-D
//! ```
//!
//! Options: `--models FOLDER` (default: the bundled model), `--model ID`, `--temperature T`.

use std::ffi::{CStr, CString};
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::ptr::{null, null_mut};

use omlx::capi::*;
use omlx::error::Status;
use serde_json::{Map, Value, json};

/// The pool's handle; released when dropped.
struct Pool(*mut omlx_pool);

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the handle came from `omlx_pool_open` and is used by nobody else any more.
        unsafe {
            omlx_pool_close(self.0, null_mut());
            omlx_pool_release(self.0);
        }
    }
}

/// Turns a failed call into its message.
fn check(call: impl FnOnce(*mut *mut omlx_error) -> Status) -> Result<(), String> {
    let mut error = null_mut();
    if call(&mut error) == Status::Ok {
        return Ok(());
    }
    // SAFETY: the call failed, so `error` is NULL or a live error; both are allowed, and it is released once.
    unsafe {
        let message = CStr::from_ptr(omlx_error_message(error)).to_string_lossy().into_owned();
        omlx_error_release(error);
        Err(message)
    }
}

impl Pool {
    fn open(models: &str) -> Result<Self, String> {
        let models = CString::new(models).map_err(|e| e.to_string())?;
        let options = omlx_pool_options { models_dir: models.as_ptr(), ..Default::default() };
        let mut pool = null_mut();
        // SAFETY: options and strings live for the call.
        check(|error| unsafe { omlx_pool_open(&options, &mut pool, error) })?;
        Ok(Self(pool))
    }

    /// Prints the answer to `messages` as it comes and returns it.
    fn answer(&self, settings: &Map<String, Value>, messages: &[Value]) -> Result<String, String> {
        let mut object = settings.clone();
        object.insert("messages".into(), Value::Array(messages.to_vec()));
        let json = Value::Object(object).to_string();
        let mut request = null_mut();
        // SAFETY: pool and text live for the call.
        check(|error| unsafe { omlx_generate(self.0, json.as_ptr().cast(), json.len(), null(), &mut request, error) })?;
        let answer = read_answer(request);
        // SAFETY: the handle came from `omlx_generate` and is not used after this.
        unsafe { omlx_request_release(request) };
        answer
    }
}

fn read_answer(request: *mut omlx_request) -> Result<String, String> {
    let mut answer = String::new();
    loop {
        let mut event = null();
        // SAFETY: the handle is alive; the event is read before the next call.
        check(|error| unsafe { omlx_request_next(request, -1, &mut event, error) })?;
        // SAFETY: success means that `event` points to an event that lives until the next call.
        let event = unsafe { &*event };
        let thought = event.kind == omlx_event_kind::Reasoning as u32;
        if thought || event.kind == omlx_event_kind::Text as u32 {
            // SAFETY: `text_len` bytes of UTF-8.
            let bytes = unsafe { std::slice::from_raw_parts(event.text.cast::<u8>(), event.text_len) };
            let text = String::from_utf8_lossy(bytes);
            print!("{text}");
            std::io::stdout().flush().map_err(|e| e.to_string())?;
            if !thought {
                answer.push_str(&text);
            }
        } else if event.kind == omlx_event_kind::Done as u32 {
            println!();
            // SAFETY: NUL-terminated and never NULL.
            let message = unsafe { CStr::from_ptr(event.error_message) }.to_string_lossy().into_owned();
            let usage = event.usage;
            eprintln!(
                "[{} prompt tokens, {} tokens, first after {:.2} s, {:.1} tokens/s]",
                usage.prompt_tokens, usage.completion_tokens, usage.seconds_to_first_token, usage.tokens_per_second
            );
            return if event.status == Status::Ok as i32 { Ok(answer) } else { Err(message) };
        }
    }
}

fn run() -> Result<(), String> {
    let mut models = concat!(env!("CARGO_MANIFEST_DIR"), "/models").to_owned();
    let mut settings = Map::new();
    let mut prompt = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--models" => models = value()?,
            "--model" => drop(settings.insert("model".into(), json!(value()?))),
            "--temperature" => {
                let value: f64 = value()?.parse().map_err(|e| format!("--temperature: {e}"))?;
                settings.insert("temperature".into(), json!(value));
            }
            _ => prompt.push(arg),
        }
    }
    let pool = Pool::open(&models)?;
    if !prompt.is_empty() {
        let message = json!({ "role": "user", "content": prompt.join(" ") });
        return pool.answer(&settings, &[message]).map(|_| ());
    }
    let mut messages = Vec::new();
    eprint!("> ");
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| e.to_string())?;
        if !line.trim().is_empty() {
            messages.push(json!({ "role": "user", "content": line }));
            let answer = pool.answer(&settings, &messages)?;
            messages.push(json!({ "role": "assistant", "content": answer }));
        }
        eprint!("> ");
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}
