//! Text and numbers that cross the border.

use std::ffi::CString;
use std::path::Path;
use std::ptr::null;

use crate::error::{Error, Result, Status};
use crate::ffi;

/// Text for a function that wants a final NUL.
pub(crate) fn c_text(what: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::new(Status::InvalidArgument, format!("{what} has a NUL character")))
}

/// The same, or NULL.
pub(crate) struct OptionalText(Option<CString>);

impl OptionalText {
    pub(crate) fn new(what: &str, text: Option<&str>) -> Result<Self> {
        text.map(|text| c_text(what, text)).transpose().map(Self)
    }

    pub(crate) fn path(what: &str, path: Option<&Path>) -> Result<Self> {
        let text = path.map(|path| {
            path.to_str().ok_or_else(|| Error::new(Status::InvalidArgument, format!("{what} is not UTF-8")))
        });
        Self::new(what, text.transpose()?)
    }

    /// Alive as long as `self`.
    pub(crate) fn pointer(&self) -> *const std::ffi::c_char {
        self.0.as_ref().map_or(null(), |text| text.as_ptr())
    }
}

/// Takes over a text that the library returned.
///
/// # Safety
/// `string` is NULL or a string that nobody else owns.
pub(crate) unsafe fn take(string: *mut ffi::omlx_string) -> String {
    // SAFETY: by the contract of this function; all three take NULL.
    unsafe {
        let (data, len) = (ffi::omlx_string_data(string), ffi::omlx_string_len(string));
        let text = String::from_utf8_lossy(slice(data.cast::<u8>(), len)).into_owned();
        ffi::omlx_string_release(string);
        text
    }
}

/// Takes over token ids that the library returned.
///
/// # Safety
/// `tokens` is NULL or tokens that nobody else owns.
pub(crate) unsafe fn take_tokens(tokens: *mut ffi::omlx_tokens) -> Vec<u32> {
    // SAFETY: by the contract of this function; all three take NULL.
    unsafe {
        let ids = slice(ffi::omlx_tokens_data(tokens), ffi::omlx_tokens_count(tokens)).to_vec();
        ffi::omlx_tokens_release(tokens);
        ids
    }
}

/// `count` values; NULL is none.
///
/// # Safety
/// `data` is NULL or points to `count` values that live for `'a`.
pub(crate) unsafe fn slice<'a, T>(data: *const T, count: usize) -> &'a [T] {
    if data.is_null() {
        return &[];
    }
    // SAFETY: by the contract of this function.
    unsafe { std::slice::from_raw_parts(data, count) }
}
