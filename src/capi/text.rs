//! `omlx_string` and `omlx_tokens`: text and token ids that the library returns; tokenising and rendering.

use std::ffi::c_char;

use super::{borrow, boundary, bytes, omlx_error, omlx_pool, optional_string, output};
use crate::engine::Request;
use crate::error::{Result, Status};

/// Text that the library returned. Owned by the host, freed with `omlx_string_release`.
pub struct omlx_string {
    /// With a NUL byte behind the end.
    bytes: Vec<u8>,
}

impl omlx_string {
    /// Writes `text` as a new handle to `out`, which the caller checked.
    pub(super) fn write(text: String, out: *mut *mut omlx_string) -> Result<()> {
        let out = output(out, "text")?;
        let mut bytes = text.into_bytes();
        bytes.push(0);
        // SAFETY: not NULL, so it points to a pointer the host lets us write.
        unsafe { out.write(Box::into_raw(Box::new(Self { bytes }))) };
        Ok(())
    }
}

/// The text: UTF-8, NUL-terminated, alive as long as the string; "" for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_string_data(string: *const omlx_string) -> *const c_char {
    // SAFETY: NULL or a live string, by the header's contract.
    unsafe { string.as_ref() }.map_or(c"".as_ptr(), |string| string.bytes.as_ptr().cast())
}

/// Bytes of the text without the final NUL; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_string_len(string: *const omlx_string) -> usize {
    // SAFETY: NULL or a live string, by the header's contract.
    unsafe { string.as_ref() }.map_or(0, |string| string.bytes.len() - 1)
}

/// Frees a string; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_string_release(string: *mut omlx_string) {
    // SAFETY: NULL or a string that was not released, by the header's contract.
    unsafe { super::free(string) };
}

/// Token ids that the library returned. Owned by the host, freed with `omlx_tokens_release`.
pub struct omlx_tokens {
    ids: Vec<u32>,
}

/// The ids, alive as long as `tokens`; NULL for NULL and if there are none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_tokens_data(tokens: *const omlx_tokens) -> *const u32 {
    // SAFETY: NULL or live tokens, by the header's contract.
    unsafe { tokens.as_ref() }.map_or(std::ptr::null(), |tokens| super::array_pointer(&tokens.ids))
}

/// Number of ids; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_tokens_count(tokens: *const omlx_tokens) -> usize {
    // SAFETY: NULL or live tokens, by the header's contract.
    unsafe { tokens.as_ref() }.map_or(0, |tokens| tokens.ids.len())
}

/// Frees token ids; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_tokens_release(tokens: *mut omlx_tokens) {
    // SAFETY: NULL or tokens that were not released, by the header's contract.
    unsafe { super::free(tokens) };
}

/// Token ids of a text. A `model` of NULL is the default model. With `add_special_tokens` not 0 the tokenizer adds what
/// it puts around a text, often a token at its beginning. No weights are loaded. Blocking while the tokenizer is read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_tokenize(
    pool: *mut omlx_pool,
    model: *const c_char,
    text: *const c_char,
    text_len: usize,
    add_special_tokens: i32,
    tokens: *mut *mut omlx_tokens,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let tokens = output(tokens, "tokens")?;
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, model, input) =
            unsafe { (borrow(pool, "pool")?, optional_string(model, "model")?, super::text(text, text_len, "text")?) };
        let ids = pool.pool.tokenize(model, input, add_special_tokens != 0)?;
        // SAFETY: checked above not to be NULL.
        unsafe { tokens.write(Box::into_raw(Box::new(omlx_tokens { ids }))) };
        Ok(())
    })
}

/// Text of token ids, special tokens included; what is not UTF-8 becomes U+FFFD. A `model` of NULL is the default
/// model. Blocking while the tokenizer is read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_detokenize(
    pool: *mut omlx_pool,
    model: *const c_char,
    tokens: *const u32,
    token_count: usize,
    text: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        output(text, "text")?;
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, model, ids) = unsafe {
            (borrow(pool, "pool")?, optional_string(model, "model")?, super::array(tokens, token_count, "tokens")?)
        };
        omlx_string::write(pool.pool.detokenize(model, ids)?, text)
    })
}

/// The prompt that a chat template makes of a request, which is JSON as for `omlx_generate`, with "messages"; `lenient` as in
/// `omlx_generate_options`. Blocking while the tokenizer is read.
///
/// Errors: `OMLX_E_TEMPLATE` (the template failed or refused the messages), and those of `omlx_generate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_render_template(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    lenient: i32,
    text: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        output(text, "text")?;
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, json) = unsafe { (borrow(pool, "pool")?, bytes(request_json.cast(), request_len, "request_json")?) };
        let request = Request::from_json(json, lenient != 0)?;
        omlx_string::write(pool.pool.render(&request)?, text)
    })
}
