//! The library as a whole: versions and its log.

use std::ffi::{CStr, c_char, c_void};

use crate::error::{Result, check, static_text};
use crate::ffi;

/// The library's version.
pub fn version() -> &'static str {
    // SAFETY: static text.
    unsafe { static_text(ffi::omlx_version()) }
}

/// The version of MLX that it computes with.
pub fn mlx_version() -> &'static str {
    // SAFETY: static text.
    unsafe { static_text(ffi::omlx_mlx_version()) }
}

/// The binary interface that it offers.
pub fn abi_version() -> u32 {
    // SAFETY: takes nothing.
    unsafe { ffi::omlx_abi_version() }
}

/// Fails unless the linked library fits the header that this client was built from.
pub(crate) fn check_abi() -> Result<()> {
    // SAFETY: takes a number and an error output.
    check(|error| unsafe { ffi::omlx_check_abi(ffi::OMLX_ABI_VERSION, error) })
}

/// How serious a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Something failed.
    Error = ffi::OMLX_LOG_LEVEL_ERROR as isize,
    /// Something is not as it should be.
    Warn = ffi::OMLX_LOG_LEVEL_WARN as isize,
    /// What a user may want to know.
    Info = ffi::OMLX_LOG_LEVEL_INFO as isize,
    /// What a developer may want to know.
    Debug = ffi::OMLX_LOG_LEVEL_DEBUG as isize,
}

type Hook = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

/// Has `hook` told of log lines up to `level`, on any thread. It must not call the library.
pub fn set_log_hook(level: LogLevel, hook: impl Fn(LogLevel, &str) + Send + Sync + 'static) -> Result<()> {
    let hook: Box<Hook> = Box::new(Box::new(hook));
    let data = Box::into_raw(hook).cast();
    // SAFETY: the data is given back in `on_destroy`, also when this fails.
    check(|error| unsafe { ffi::omlx_set_log_hook(Some(on_line), level as u32, data, Some(on_destroy), error) })
}

unsafe extern "C" fn on_line(user_data: *mut c_void, level: u32, message: *const c_char) {
    // SAFETY: the hook lives until `on_destroy`, the text for this call.
    let (hook, message) = unsafe { (&*user_data.cast::<Hook>(), CStr::from_ptr(message)) };
    let level = match level {
        ffi::OMLX_LOG_LEVEL_ERROR => LogLevel::Error,
        ffi::OMLX_LOG_LEVEL_WARN => LogLevel::Warn,
        ffi::OMLX_LOG_LEVEL_INFO => LogLevel::Info,
        _ => LogLevel::Debug,
    };
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hook(level, &message.to_string_lossy())));
}

unsafe extern "C" fn on_destroy(user_data: *mut c_void) {
    // SAFETY: called once, with the box that was given away.
    drop(unsafe { Box::from_raw(user_data.cast::<Hook>()) });
}
