//! `omlx_error`: details of a failed call.

use std::ffi::{CString, c_char};
use std::time::Duration;

use crate::error::{Error, Status};

/// Details of a failed call. Owned by the host, freed with `omlx_error_release`.
pub struct omlx_error {
    status: Status,
    message: CString,
    after: Option<Duration>,
}

/// `text` for C: a NUL byte inside would cut it short, so it becomes a space.
pub(super) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

impl omlx_error {
    pub(super) fn new(error: Error) -> Self {
        Self { status: error.status(), message: c_string(error.message()), after: error.after() }
    }
}

/// The status that the failed call returned; `OMLX_OK` for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_error_status(error: *const omlx_error) -> Status {
    // SAFETY: NULL or a live error, by the header's contract.
    unsafe { error.as_ref() }.map_or(Status::Ok, |error| error.status)
}

/// What went wrong, for people; alive as long as the error; "" for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_error_message(error: *const omlx_error) -> *const c_char {
    // SAFETY: NULL or a live error, by the header's contract.
    unsafe { error.as_ref() }.map_or(c"".as_ptr(), |error| error.message.as_ptr())
}

/// Milliseconds after which it makes sense to try again, after `OMLX_E_BUSY`; 0 if that is not known.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_error_retry_after_ms(error: *const omlx_error) -> u64 {
    // SAFETY: NULL or a live error, by the header's contract.
    let after = unsafe { error.as_ref() }.and_then(|error| error.after);
    after.map_or(0, |after| after.as_millis().max(1) as u64)
}

/// Frees an error; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_error_release(error: *mut omlx_error) {
    // SAFETY: NULL or an error that was not released, by the header's contract.
    unsafe { super::free(error) };
}
