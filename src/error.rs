//! The one error type of the crate: a stable status code and a message for people.
//!
//! The codes are the C ABI's `omlx_status`; there is no second list to keep in step.

use std::ffi::CStr;
use std::fmt;
use std::time::Duration;

/// Outcome of a call. `0` is success, everything else names a class of failure a host can act on.
///
/// The numbers are part of the ABI: new ones are appended, none is ever reused.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// A NULL or unusable pointer, an unknown `struct_size`, an option out of range.
    InvalidArgument = 1,
    /// The request's JSON is malformed, has an unknown key, or a value out of range.
    InvalidRequest = 2,
    /// No such model, file or folder.
    NotFound = 3,
    /// The model type, weight format or request feature is not supported by this build.
    Unsupported = 4,
    /// The model folder is damaged or inconsistent (config, weights, tokenizer).
    InvalidModel = 5,
    /// The prompt does not fit the model's context.
    ContextLength = 6,
    /// The request was cancelled by the host.
    Cancelled = 7,
    /// The pool is closed or closing.
    Closed = 8,
    /// A queue is full; try again later.
    Busy = 9,
    /// The memory limit does not allow it.
    OutOfMemory = 10,
    /// The operating system refused an input or output operation.
    Io = 11,
    /// The time allowed for a wait has passed; nothing is lost, call again.
    Timeout = 12,
    /// The chat template failed or refused the messages.
    Template = 13,
    /// The compute backend (MLX) failed or has the wrong version.
    Backend = 14,
    /// A defect of this library (a panic was caught). The engine concerned is discarded.
    Internal = 15,
    /// The hub asks for an access token, or for its terms to be accepted.
    Unauthorized = 16,
    /// A server cannot be reached, or does not answer as it should.
    Network = 17,
    /// The network would be needed, and offline mode forbids it.
    Offline = 18,
    /// The disk has too little room.
    NoSpace = 19,
    /// What was downloaded is not what was announced: another checksum, length or version.
    Checksum = 20,
}

impl Status {
    /// All of them, in the order of their numbers, which have no gaps.
    pub const ALL: [Status; 21] = {
        use Status::*;
        [
            Ok,
            InvalidArgument,
            InvalidRequest,
            NotFound,
            Unsupported,
            InvalidModel,
            ContextLength,
            Cancelled,
            Closed,
            Busy,
            OutOfMemory,
            Io,
            Timeout,
            Template,
            Backend,
            Internal,
            Unauthorized,
            Network,
            Offline,
            NoSpace,
            Checksum,
        ]
    };

    /// Its name in C.
    pub fn c_name(self) -> &'static CStr {
        match self {
            Status::Ok => c"OMLX_OK",
            Status::InvalidArgument => c"OMLX_E_INVALID_ARGUMENT",
            Status::InvalidRequest => c"OMLX_E_INVALID_REQUEST",
            Status::NotFound => c"OMLX_E_NOT_FOUND",
            Status::Unsupported => c"OMLX_E_UNSUPPORTED",
            Status::InvalidModel => c"OMLX_E_INVALID_MODEL",
            Status::ContextLength => c"OMLX_E_CONTEXT_LENGTH",
            Status::Cancelled => c"OMLX_E_CANCELLED",
            Status::Closed => c"OMLX_E_CLOSED",
            Status::Busy => c"OMLX_E_BUSY",
            Status::OutOfMemory => c"OMLX_E_OUT_OF_MEMORY",
            Status::Io => c"OMLX_E_IO",
            Status::Timeout => c"OMLX_E_TIMEOUT",
            Status::Template => c"OMLX_E_TEMPLATE",
            Status::Backend => c"OMLX_E_BACKEND",
            Status::Internal => c"OMLX_E_INTERNAL",
            Status::Unauthorized => c"OMLX_E_UNAUTHORIZED",
            Status::Network => c"OMLX_E_NETWORK",
            Status::Offline => c"OMLX_E_OFFLINE",
            Status::NoSpace => c"OMLX_E_NO_SPACE",
            Status::Checksum => c"OMLX_E_CHECKSUM",
        }
    }
}

/// Everything that can go wrong, as a [`Status`] and a message that names the thing concerned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    status: Status,
    message: String,
    after: Option<Duration>,
}

/// Result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of class `status`; `message` should name the file, tensor, key or value concerned.
    pub fn new(status: Status, message: impl Into<String>) -> Self {
        debug_assert_ne!(status, Status::Ok, "an error needs a failing status");
        Self { status, message: message.into(), after: None }
    }

    /// The same error with the time after which it makes sense to try again.
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.after = Some(after);
        self
    }

    /// The time after which it makes sense to try again, if that is known.
    pub fn after(&self) -> Option<Duration> {
        self.after
    }

    /// The class of failure.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The message alone.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same error with `what` put in front of its message.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// An operating-system error on `what`; "not found" keeps its own status.
    pub fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        let status = match error.kind() {
            std::io::ErrorKind::NotFound => Status::NotFound,
            _ => Status::Io,
        };
        Self::new(status, format!("{what}: {error}"))
    }
}

/// Short constructors, one per class of failure that is raised in many places.
macro_rules! constructors {
    ($($name:ident => $status:ident),* $(,)?) => {
        impl Error {
            $(
                #[doc = concat!("An error with [`Status::", stringify!($status), "`].")]
                pub fn $name(message: impl Into<String>) -> Self {
                    Self::new(Status::$status, message)
                }
            )*
        }
    };
}

constructors! {
    invalid_argument => InvalidArgument,
    invalid_request => InvalidRequest,
    not_found => NotFound,
    unsupported => Unsupported,
    invalid_model => InvalidModel,
    template => Template,
    backend => Backend,
    internal => Internal,
    network => Network,
    checksum => Checksum,
}
