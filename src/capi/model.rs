//! Models of a pool: catalogue, load, unload.

use std::ffi::c_char;
use std::path::Path;

use serde_json::json;

use super::{borrow, boundary, omlx_error, omlx_pool, omlx_string, optional_string, output, string};
use crate::engine::LoadedInfo;
use crate::error::Status;
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

/// Cancels the model's requests, frees its memory and waits for that. A model that is not loaded is no error; the next
/// request loads it again. Blocking.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_model_unload(
    pool: *mut omlx_pool,
    id: *const c_char,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, id) = unsafe { (borrow(pool, "pool")?, string(id, "id")?) };
        pool.pool.unload(id)
    })
}
