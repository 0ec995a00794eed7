//! Errors of C calls as values.

use std::ffi::CStr;
use std::fmt;
use std::ptr::null_mut;
use std::time::Duration;

use crate::ffi;

/// What calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $code:ident,)*) => {
        /// The class of a failure.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Status {
            $($(#[$doc])* $name,)*
            /// One that this client does not know.
            Other(i32),
        }

        impl Status {
            /// The status that the library calls `code`; there is none for success.
            pub fn from_code(code: i32) -> Self {
                match code {
                    $(ffi::$code => Self::$name,)*
                    other => Self::Other(other),
                }
            }

            /// Its number in the C interface.
            pub fn code(self) -> i32 {
                match self {
                    $(Self::$name => ffi::$code,)*
                    Self::Other(code) => code,
                }
            }
        }
    };
}

statuses! {
    /// An option out of range, text with a NUL character.
    InvalidArgument = OMLX_E_INVALID_ARGUMENT,
    /// The request's JSON is malformed, has an unknown key, or a value out of range.
    InvalidRequest = OMLX_E_INVALID_REQUEST,
    /// No such model, file or folder.
    NotFound = OMLX_E_NOT_FOUND,
    /// The library cannot do that.
    Unsupported = OMLX_E_UNSUPPORTED,
    /// The model's folder is damaged.
    InvalidModel = OMLX_E_INVALID_MODEL,
    /// The prompt does not fit the model's context.
    ContextLength = OMLX_E_CONTEXT_LENGTH,
    /// The request was cancelled.
    Cancelled = OMLX_E_CANCELLED,
    /// The pool is closed.
    Closed = OMLX_E_CLOSED,
    /// A queue is full; see [`Error::retry_after`].
    Busy = OMLX_E_BUSY,
    /// The memory limit does not allow it.
    OutOfMemory = OMLX_E_OUT_OF_MEMORY,
    /// The operating system refused an input or output operation.
    Io = OMLX_E_IO,
    /// The time allowed for a wait has passed.
    Timeout = OMLX_E_TIMEOUT,
    /// The chat template failed or refused the messages.
    Template = OMLX_E_TEMPLATE,
    /// MLX failed or has the wrong version.
    Backend = OMLX_E_BACKEND,
    /// A defect of the library.
    Internal = OMLX_E_INTERNAL,
    /// The hub asks for a token, or for its terms to be accepted.
    Unauthorized = OMLX_E_UNAUTHORIZED,
    /// A server cannot be reached, or does not answer as it should.
    Network = OMLX_E_NETWORK,
    /// The network would be needed, and offline mode forbids it.
    Offline = OMLX_E_OFFLINE,
    /// The disk has too little room.
    NoSpace = OMLX_E_NO_SPACE,
    /// What was downloaded is not what was announced.
    Checksum = OMLX_E_CHECKSUM,
}

impl Status {
    /// Its name in the C interface, such as "OMLX_E_NOT_FOUND".
    pub fn name(self) -> &'static str {
        // SAFETY: takes any number and returns static text.
        unsafe { static_text(ffi::omlx_status_name(self.code())) }
    }
}

/// Why a call or a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Its class.
    pub status: Status,
    /// What went wrong, for people.
    pub message: String,
    /// When it makes sense to try again, where the library knows.
    pub retry_after: Option<Duration>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl Error {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_after: None }
    }

    /// The error that a call left.
    ///
    /// # Safety
    /// `error` is NULL or an error that nobody else owns.
    unsafe fn take(code: i32, error: *mut ffi::omlx_error) -> Self {
        // SAFETY: by the contract of this function; both functions take NULL.
        let (message, retry) = unsafe { (text(ffi::omlx_error_message(error)), ffi::omlx_error_retry_after_ms(error)) };
        // SAFETY: as above, and not used again.
        unsafe { ffi::omlx_error_release(error) };
        let status = Status::from_code(code);
        let message = if message.is_empty() { status.name().to_owned() } else { message };
        Self { status, message, retry_after: (retry > 0).then(|| Duration::from_millis(retry)) }
    }
}

/// Runs a C function that takes an error output as its last parameter.
pub(crate) fn check(call: impl FnOnce(*mut *mut ffi::omlx_error) -> ffi::omlx_status) -> Result<()> {
    let mut error = null_mut();
    match call(&mut error) {
        ffi::OMLX_OK => Ok(()),
        // SAFETY: the call failed and gave its error to us.
        code => Err(unsafe { Error::take(code, error) }),
    }
}

/// A copy of a C string; "" for NULL.
///
/// # Safety
/// `text` is NULL or a NUL-terminated string.
pub(crate) unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the contract of this function.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Static text of the library.
///
/// # Safety
/// `text` is a NUL-terminated string that is never freed.
pub(crate) unsafe fn static_text(text: *const std::ffi::c_char) -> &'static str {
    // SAFETY: by the contract of this function.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap_or_default()
}
