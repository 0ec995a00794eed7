//! The log hook: what the library would print if it printed.

use std::ffi::{c_char, c_void};
use std::fmt::Write;
use std::sync::{Arc, Mutex, Once};

use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use super::callback::{UserData, omlx_destroy_fn};
use super::error::c_string;
use super::{boundary, omlx_error};
use crate::error::{Error, Status};
use crate::sync::lock;

/// How serious a log line is.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_log_level {
    /// Something failed.
    Error = 1,
    /// Something is not as it should be; the library copes.
    Warn = 2,
    /// What a user may want to know.
    Info = 3,
    /// What a developer may want to know.
    Debug = 4,
}

/// Receives one log line: an `omlx_log_level` and a text that lives for the call. Called on any thread, several at
/// once. It must not call the library.
pub type omlx_log_fn = Option<unsafe extern "C" fn(user_data: *mut c_void, level: u32, message: *const c_char)>;

struct Hook {
    function: unsafe extern "C" fn(*mut c_void, u32, *const c_char),
    user_data: UserData,
    max_level: u32,
}

/// Process-wide, as a log hook is.
static HOOK: Mutex<Option<Arc<Hook>>> = Mutex::new(None);

/// Sets the log hook of the process, which receives lines up to `max_level` (an `omlx_log_level`). NULL removes it:
/// the library is then silent; the old one may still be running, so its data is freed in its `destroy` only.
/// `user_data` and `destroy` may be NULL.
///
/// Errors: `OMLX_E_INVALID_ARGUMENT` (no such level), `OMLX_E_UNSUPPORTED` (the host is a Rust program with a
/// `tracing` subscriber of its own; the lines go there).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_set_log_hook(
    hook: omlx_log_fn,
    max_level: u32,
    user_data: *mut c_void,
    destroy: omlx_destroy_fn,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let user_data = UserData::new(user_data, destroy);
        if hook.is_some() && !(omlx_log_level::Error as u32..=omlx_log_level::Debug as u32).contains(&max_level) {
            return Err(Error::invalid_argument(format!("log level {max_level} does not exist")));
        }
        if hook.is_some() {
            install()?;
        }
        let new = hook.map(|function| Arc::new(Hook { function, user_data, max_level }));
        // The old one goes outside the lock: its destroy function is the host's.
        let old = std::mem::replace(&mut *lock(&HOOK), new);
        drop(old);
        Ok(())
    })
}

fn install() -> crate::error::Result<()> {
    static INSTALL: Once = Once::new();
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    INSTALL.call_once(|| *lock(&INSTALLED) = tracing::subscriber::set_global_default(HookSubscriber).is_ok());
    if *lock(&INSTALLED) {
        return Ok(());
    }
    Err(Error::unsupported("this process has a tracing subscriber already"))
}

fn rank(level: &Level) -> u32 {
    match *level {
        Level::ERROR => omlx_log_level::Error as u32,
        Level::WARN => omlx_log_level::Warn as u32,
        Level::INFO => omlx_log_level::Info as u32,
        Level::DEBUG => omlx_log_level::Debug as u32,
        Level::TRACE => u32::MAX,
    }
}

/// Turns tracing events into lines; the library opens no spans.
struct HookSubscriber;

impl Subscriber for HookSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let wanted = lock(&HOOK).as_ref().is_some_and(|hook| rank(metadata.level()) <= hook.max_level);
        wanted && metadata.target().starts_with("omlx")
    }

    fn event(&self, event: &Event<'_>) {
        let hook = lock(&HOOK).clone();
        if let Some(hook) = hook {
            let mut line = Line::default();
            event.record(&mut line);
            let line = c_string(&(line.message + &line.fields));
            // SAFETY: the host's function with its own data; the line outlives the call.
            unsafe { (hook.function)(hook.user_data.pointer(), rank(event.metadata().level()), line.as_ptr()) };
        }
    }

    fn register_callsite(&self, _: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        // The hook's level may change at any time.
        tracing::subscriber::Interest::sometimes()
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// `message key=value ...`
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
