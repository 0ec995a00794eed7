//! Models of a pool: catalogue, load, unload.

use std::ffi::c_char;
use std::path::Path;

use serde_json::json;

use super::{borrow, boundary, bytes, omlx_error, omlx_pool, omlx_string, optional_string, output, string};
use crate::engine::LoadedInfo;
use crate::error::{Error, Status};
use crate::mlx::Device;
use crate::pool::ModelEntry;

/// All models of the pool as a JSON array, ordered by id. Each object has "id", "loaded", "file_bytes" and, where
/// known, "folder", "model_type", "context_length" (tokens), "quantization_bits"; "problem" says why a model cannot be
/// loaded; a loaded one has "device" ("cpu" or "gpu"), "weight_bytes" and "load_seconds". More keys may come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_models(
    pool: *mut omlx_pool,
    models_json: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        output(models_json, "models_json")?;
        // SAFETY: NULL or a live handle, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        let device = pool.pool.device();
        let models: Vec<_> =
            pool.pool.models().iter().map(|(entry, loaded)| describe(entry, *loaded, device)).collect();
        omlx_string::write(serde_json::Value::Array(models).to_string(), models_json)
    })
}

fn describe(entry: &ModelEntry, loaded: Option<LoadedInfo>, device: Device) -> serde_json::Value {
    let mut object = json!({ "id": entry.id, "loaded": loaded.is_some(), "file_bytes": entry.file_bytes });
    let mut set = |key: &str, value: Option<serde_json::Value>| {
        if let Some(value) = value {
            object[key] = value;
        }
    };
    set("folder", entry.folder.as_ref().map(|folder| json!(folder.to_string_lossy())));
    set("model_type", entry.model_type.as_ref().map(|t| json!(t)));
    set("context_length", entry.context_length.map(|n| json!(n)));
    set("quantization_bits", entry.quantization_bits.map(|n| json!(n)));
    set("problem", entry.problem.as_ref().map(|problem| json!(problem.message())));
    set("device", loaded.map(|_| json!(device.name())));
    set("weight_bytes", loaded.map(|info| json!(info.weight_bytes)));
    set("load_seconds", loaded.map(|info| json!(info.load_seconds)));
    object
}

/// Adds the model in `folder` under `id`; an `id` of NULL takes the folder's name. Loads nothing, but reads the model's
/// config. Blocking for that.
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_MODEL` (damaged config), `OMLX_E_UNSUPPORTED` (unknown type; the
/// message lists the known ones), `OMLX_E_INVALID_ARGUMENT` (id in use).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_add_model(
    pool: *mut omlx_pool,
    folder: *const c_char,
    id: *const c_char,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, folder, id) =
            unsafe { (borrow(pool, "pool")?, string(folder, "folder")?, optional_string(id, "id")?) };
        pool.pool.add_model(Path::new(folder), id).map(|_| ())
    })
}

/// Loads a model and waits until it is ready. Requests load their model by themselves; this does it before them.
/// Blocking.
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_MODEL` (the message names what is missing or damaged),
/// `OMLX_E_UNSUPPORTED`, `OMLX_E_CLOSED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_model_load(
    pool: *mut omlx_pool,
    id: *const c_char,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, id) = unsafe { (borrow(pool, "pool")?, string(id, "id")?) };
        pool.pool.load(id).map(|_| ())
    })
}

/// Unloads a model and waits until its memory is free. `drain` 0 cancels its requests, otherwise they end first (later ones
/// load the model again at once, beside it). `freed`, which may be NULL, receives the bytes that became free. A model that is
/// not loaded is no error; the next request loads it again. Blocking.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_model_unload(
    pool: *mut omlx_pool,
    id: *const c_char,
    drain: u32,
    freed: *mut u64,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, id) = unsafe { (borrow(pool, "pool")?, string(id, "id")?) };
        let bytes = pool.pool.unload(id, drain != 0)?;
        if !freed.is_null() {
            // SAFETY: not NULL, so room for a number by the header's contract.
            unsafe { freed.write(bytes) };
        }
        Ok(())
    })
}

/// Changes what is settled about a model, by a JSON object of `settings_len` bytes; null takes a key back (RFC 7396). It
/// holds at once, and is in the pool's `settings_file` when this returns:
///
///   "alias"           another name for it in requests
///   "pinned"          true: it is not unloaded to make room, nor when its time is up
///   "preload"         true: it is loaded when the pool is opened
///   "ttl_seconds"     it is unloaded after so many seconds without a request; below 0: only when its memory is needed
///   "context_length"  tokens of a prompt and its answer at most, where that is less than the model can
///   "defaults"        for requests that do not say: "max_tokens", "temperature", "top_p", "top_k", "min_p",
///                     "repetition_penalty", "presence_penalty", "frequency_penalty" and "chat_template_kwargs"
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_ARGUMENT`, `OMLX_E_IO` (the file cannot be written: nothing has changed).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_model_configure(
    pool: *mut omlx_pool,
    id: *const c_char,
    settings_json: *const c_char,
    settings_len: usize,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, id, json) = unsafe {
            (borrow(pool, "pool")?, string(id, "id")?, bytes(settings_json.cast(), settings_len, "settings_json")?)
        };
        let patch = serde_json::from_slice(json).map_err(|e| Error::invalid_argument(format!("settings: {e}")))?;
        pool.pool.configure(id, &patch)
    })
}

/// What is settled about a model, as the JSON object that `omlx_model_configure` takes; nothing is "{}".
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_model_settings(
    pool: *mut omlx_pool,
    id: *const c_char,
    settings_json: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        output(settings_json, "settings_json")?;
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, id) = unsafe { (borrow(pool, "pool")?, string(id, "id")?) };
        omlx_string::write(pool.pool.settings(id)?.to_json()?.to_string(), settings_json)
    })
}
