//! Vectors and scores of texts.

use std::ffi::c_char;

use super::request::start;
use super::{boundary, omlx_error, omlx_generate_options, omlx_pool, omlx_request};
use crate::engine::EncodeRequest;
use crate::error::Status;

/// Starts to compute the vectors of texts and returns at once. The request's events are one `OMLX_EVENT_KIND_EMBEDDINGS` and the
/// done event; callbacks, `omlx_request_next` and cancelling are those of `omlx_generate`.
///
/// `request_json` is a JSON object of `request_len` bytes with the keys of OpenAI's embeddings, and some more:
///
///   what to encode   "input": a text, an array of texts, token ids, or an array of arrays of them (which are taken as
///                    they are, without special tokens); at most 65536 texts. What a model wants to be told before a
///                    text ("query: ") is the host's to write.
///   by which model   "model": the id of an embedding model
///   the vectors      "dimensions": the first ones only; "normalize": whether their length is 1 (by default as the model's
///                    folder says); "encoding_format": "float", or "base64", which gives them as `text`, too: a JSON array
///                    of strings, each a vector of 32-bit floats, lowest byte first
///   long texts       "truncate": true (the default) leaves out the end of a text that is too long, and the event says of
///                    how many; false makes it `OMLX_E_CONTEXT_LENGTH`
///   before whom      "priority": "high", "normal" or "low"
///
/// Texts of all requests share batches, in turns. `usage.prompt_tokens` counts all tokens.
///
/// Errors: those of `omlx_generate`; `OMLX_E_UNSUPPORTED` if the model is none for embeddings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_embed(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    options: *const omlx_generate_options,
    request: *mut *mut omlx_request,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        unsafe {
            start(pool, request_json, request_len, options, request, |pool, json, options| {
                let mut request = EncodeRequest::embed_from_json(json, options.lenient != 0)?;
                request.tells_loading = options.loading_events != 0;
                pool.encode(request)
            })
        }
    })
}

/// Starts to compute how well documents answer a query and returns at once. The request's events are one
/// `OMLX_EVENT_KIND_SCORES` and the done event, otherwise like `omlx_embed`.
///
/// `request_json` is a JSON object of `request_len` bytes:
///
///   "query"        a text
///   "documents"    an array of texts, or of objects with a "text"; at most 65536
///   "model"        the id of a reranker
///   "top_n"        how many of the best documents `order` lists; all by default
///   "instruction"  what relevance means, for models that are told
///   "truncate", "priority"  as for `omlx_embed`
///
/// Scores are what the model's cross-encoder gives, usually between 0 and 1; only those of one model can be compared.
///
/// Errors: those of `omlx_generate`; `OMLX_E_UNSUPPORTED` if the model is no reranker.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_rerank(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    options: *const omlx_generate_options,
    request: *mut *mut omlx_request,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        unsafe {
            start(pool, request_json, request_len, options, request, |pool, json, options| {
                let mut request = EncodeRequest::rerank_from_json(json, options.lenient != 0)?;
                request.tells_loading = options.loading_events != 0;
                pool.encode(request)
            })
        }
    })
}
