//! Models of a pool: catalogue, load, unload.

use std::ffi::c_char;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{borrow, boundary, bytes, omlx_error, omlx_pool, omlx_string, optional_string, output, string};
use crate::error::{Error, Status};
use crate::mlx::{Device, QuantFormat};
use crate::pool::ModelInfo;

/// All models of the pool as a JSON array, ordered by id. Each object has "id", "loaded", "file_bytes" (of the weight files)
/// and, where known:
///
///   "alias"            another name for it in requests
///   "folder"           its path
///   "kind"             "llm", "embedding", "reranker" or "vision": settled by `omlx_model_configure`, else detected
///   "model_type"       the architecture
///   "context_length"   tokens
///   "quantization"     an object with "bits", "group_size" and "mode" ("affine", "mxfp4", "mxfp8" or "nvfp4"), but for
///                      exceptions of single layers; "quantization_bits" is the first
///   "license"          as its README.md names it
///   "license_file"     path of the file with its text
///   "problem"          why it cannot be used: the config is damaged, weights are missing or have another format, the
///                      architecture is not supported; of a vision model it begins with "unsupported: vision"
///   "problem_status"   the class of that, such as "OMLX_E_UNSUPPORTED": requests for the model fail with it
///   "device"           of a loaded one, "cpu" or "gpu"
///   "weight_bytes", "load_seconds"   of a loaded one
///
/// Folders that only look like models are listed with their problem, too. More keys may come.
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
        let models: Vec<_> = pool.pool.models().iter().map(|model| describe(model, device)).collect();
        omlx_string::write(serde_json::Value::Array(models).to_string(), models_json)
    })
}

fn describe(model: &ModelInfo, device: Device) -> serde_json::Value {
    let ModelInfo { entry, alias, loaded } = model;
    let mut object = json!({ "id": entry.id, "loaded": loaded.is_some(), "file_bytes": entry.file_bytes });
    let mut set = |key: &str, value: Option<serde_json::Value>| {
        if let Some(value) = value {
            object[key] = value;
        }
    };
    let path = |path: &PathBuf| json!(path.to_string_lossy());
    let format = |format: &QuantFormat| json!({ "bits": format.bits, "group_size": format.group_size, "mode": format.mode.name() });
    set("alias", alias.as_ref().map(|alias| json!(alias)));
    set("folder", entry.folder.as_ref().map(path));
    set("kind", entry.kind.map(|kind| json!(kind.name())));
    set("model_type", entry.model_type.as_ref().map(|t| json!(t)));
    set("context_length", entry.context_length.map(|n| json!(n)));
    set("quantization_bits", entry.quantization.map(|format| json!(format.bits)));
    set("quantization", entry.quantization.as_ref().map(format));
    set("license", entry.license.as_ref().map(|license| json!(license)));
    set("license_file", entry.license_file.as_ref().map(path));
    set("problem", entry.problem.as_ref().map(|problem| json!(problem.message())));
    set("problem_status", entry.problem.as_ref().map(|problem| json!(problem.status().c_name().to_string_lossy())));
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

/// Looks into the pool's `models_dir` and `hub_cache` again: models that are new or have changed come in, and those that are
/// gone go out, also of those that were added or downloaded. Loaded ones stay as they are. If a folder cannot be read,
/// nothing changes. Blocking while the folders are read.
///
/// Errors: `OMLX_E_NOT_FOUND` (a folder is gone), `OMLX_E_IO`, `OMLX_E_CLOSED`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_rescan(pool: *mut omlx_pool, error: *mut *mut omlx_error) -> Status {
    boundary(error, || {
        // SAFETY: NULL or a live handle, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        pool.pool.rescan()
    })
}

/// Loads a model and waits until it is ready. Requests load their model by themselves; this does it before them.
/// Blocking.
///
/// Errors: `OMLX_E_NOT_FOUND`, `OMLX_E_INVALID_MODEL` (the message names what is missing or damaged),
/// `OMLX_E_UNSUPPORTED`, `OMLX_E_OUT_OF_MEMORY` (the memory limit does not allow it), `OMLX_E_CANCELLED` (it was unloaded
/// meanwhile), `OMLX_E_CLOSED`.
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
///   "preload"         true: it is loaded now, and when a pool with these settings is opened
///   "ttl_seconds"     it is unloaded after so many seconds without a request; below 0: only when its memory is needed
///   "context_length"  tokens of a prompt and its answer at most, where that is less than the model can
///   "kind"            "llm", "embedding" or "reranker": what it is used for, where its folder tells something else. If it is
///                     loaded, it ends the requests it has; the next one loads it anew
///   "defaults"        for requests that do not say: "max_tokens", "temperature", "top_p", "top_k", "min_p",
///                     "repetition_penalty", "presence_penalty", "frequency_penalty", "thinking_budget" and
///                     "chat_template_kwargs"
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
