//! `omlx_download`: a model on its way from a hub.

use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::callback::{UserData, omlx_destroy_fn, omlx_progress_fn};
use super::request::MAX_WAIT_MS;
use super::{SizedOptions, borrow, boundary, bytes, omlx_error, omlx_pool, omlx_string, output};
use crate::error::{Error, Status};
use crate::hub::{Download, DownloadRequest, OnProgress, Progress, State};

/// What a download is doing.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_download_state {
    /// Asking the hub which files there are.
    Listing = 0,
    /// Fetching and checking files.
    Fetching = 1,
    /// Writing through and moving into place.
    Installing = 2,
    /// Over: the model is there, and in the pool.
    Done = 3,
    /// Over: it failed. `omlx_download_wait` says why.
    Failed = 4,
    /// Over: it was cancelled.
    Cancelled = 5,
}

/// How far a download is. Start from `OMLX_DOWNLOAD_PROGRESS_INIT`. The host computes rates, from the growth of
/// `bytes_done`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct omlx_download_progress {
    /// `sizeof(omlx_download_progress)`, set by `OMLX_DOWNLOAD_PROGRESS_INIT`: no more is written.
    pub struct_size: u32,
    /// An `omlx_download_state`.
    pub state: u32,
    /// Bytes that are there, `bytes_kept` included. Falls when a file has to be fetched anew.
    pub bytes_done: u64,
    /// Bytes of all files; 0 until they are listed.
    pub bytes_total: u64,
    /// Bytes that an earlier attempt, or the version that is being replaced, had left.
    pub bytes_kept: u64,
    /// Files that are complete and checked.
    pub files_done: u64,
    /// All files; 0 until they are listed.
    pub files_total: u64,
    /// Requests that were repeated after a failure.
    pub retries: u64,
}

impl Default for omlx_download_progress {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            state: 0,
            bytes_done: 0,
            bytes_total: 0,
            bytes_kept: 0,
            files_done: 0,
            files_total: 0,
            retries: 0,
        }
    }
}

// SAFETY: repr(C), the size comes first, and every other field is an integer.
unsafe impl SizedOptions for omlx_download_progress {
    const MIN_SIZE: usize = 56;
}

impl From<Progress> for omlx_download_progress {
    fn from(progress: Progress) -> Self {
        let Progress { state, bytes_done, bytes_total, bytes_kept, files_done, files_total, retries } = progress;
        let state = match state {
            State::Listing => omlx_download_state::Listing,
            State::Fetching => omlx_download_state::Fetching,
            State::Installing => omlx_download_state::Installing,
            State::Done => omlx_download_state::Done,
            State::Failed => omlx_download_state::Failed,
            State::Cancelled => omlx_download_state::Cancelled,
        };
        Self {
            struct_size: size_of::<Self>() as u32,
            state: state as u32,
            bytes_done,
            bytes_total,
            bytes_kept,
            files_done,
            files_total,
            retries,
        }
    }
}

/// A download. Reference-counted; it does not need its pool's handle to live on.
pub struct omlx_download {
    download: Download,
}

impl Drop for omlx_download {
    fn drop(&mut self) {
        self.download.cancel();
    }
}

/// Starts to download a model from the Hugging Face hub, or a mirror of it, and returns at once. When the download is
/// over, the model is in the pool, its id the repository's name; if the folder is not a usable model,
/// `omlx_pool_models` says why.
///
/// `download_json` is a JSON object of `download_len` bytes:
///
///   "repo"         the repository, such as "org/name"
///   "revision"     a branch, tag or commit, else "main"
///   "files"        exactly these files; or
///   "patterns"     files that any of these describes: `*` is any text within one folder, `**` any text, `?` one
///                  character; else what a model needs, as safetensors
///   "folder"       the folder of models, else the pool's `models_dir`; the model goes to org/name in it
///   "endpoint"     URL of the hub, else HF_ENDPOINT of the environment, else https://huggingface.co
///   "token"        access token, else HF_TOKEN, else what the hub's login command left (unless the endpoint is neither
///                  encrypted nor this machine). Sent to the endpoint alone; never part of a message
///   "offline"      do not use the network: OMLX_E_OFFLINE unless the model is there; else HF_HUB_OFFLINE decides
///   "connections"  at the same time; else 4, at most 32
///
/// All files come from one commit. They are put together in a hidden folder beside the model's, checked (SHA-256, for
/// small files the id of the git blob), written through, and put into place at once: a model is there whole or not at
/// all. What an attempt leaves that was cancelled or broke off, the next one goes on with. A model that is there is
/// left alone; if it came by a download and "revision" asks for another commit, it is replaced, and a loaded one goes
/// on as it was until it is unloaded. Connections use HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, and trust
/// Mozilla's certificates, or those in the PEM file that SSL_CERT_FILE names.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_CLOSED`; others come from `omlx_download_wait`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_start(
    pool: *mut omlx_pool,
    download_json: *const c_char,
    download_len: usize,
    download: *mut *mut omlx_download,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let download = output(download, "download")?;
        // SAFETY: NULL or valid, by the header's contract.
        let (pool, json) =
            unsafe { (borrow(pool, "pool")?, bytes(download_json.cast(), download_len, "download_json")?) };
        let request = DownloadRequest::from_json(json)?;
        if pool.bundled && request.folder.is_none() {
            return Err(Error::invalid_request("\"folder\" is missing, and the pool was opened without models_dir"));
        }
        let started = pool.pool.download(request)?;
        // SAFETY: checked above not to be NULL.
        unsafe { download.write(Arc::into_raw(Arc::new(omlx_download { download: started })).cast_mut()) };
        Ok(())
    })
}

/// Says how far a download is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_status(
    download: *mut omlx_download,
    progress: *mut omlx_download_progress,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let progress = output(progress, "progress")?;
        // SAFETY: NULL or a live handle, by the header's contract.
        let download = unsafe { borrow(download, "download") }?;
        let current = omlx_download_progress::from(download.download.progress());
        // SAFETY: not NULL, and the struct begins with its size.
        unsafe { super::write_sized(progress, current, "progress") }
    })
}

/// Has `callback` called with the progress from now on, the first time before this returns; NULL removes it. The last
/// call comes before an `omlx_download_wait` that waits returns. `user_data` and `destroy` may be NULL; `destroy` runs when
/// the download is over or another callback takes its place, but not during a call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_set_callback(
    download: *mut omlx_download,
    callback: omlx_progress_fn,
    user_data: *mut c_void,
    destroy: omlx_destroy_fn,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let user_data = UserData::new(user_data, destroy);
        // SAFETY: NULL or a live handle, by the header's contract.
        let download = unsafe { borrow(download, "download") }?;
        // The host's functions that are called here may release the handle.
        let download = download.download.clone();
        download.watch(callback.map(|callback| -> OnProgress {
            Box::new(move |progress| {
                let progress = omlx_download_progress::from(progress);
                // SAFETY: the host's function with its own data, which lives as long as this closure.
                unsafe { callback(user_data.pointer(), &progress) == 0 }
            })
        }));
        Ok(())
    })
}

/// Waits `timeout_ms` milliseconds until a download is over; 0 never waits, a negative timeout waits for ever.
/// `result_json`, which may be NULL, receives an object with "id", "folder", "commit" (null for a folder that something
/// else put there) and "changed" (false if everything was there already). Blocking unless `timeout_ms` is 0.
///
/// Errors: `OMLX_E_TIMEOUT` (it is still running); and why it failed: `OMLX_E_CANCELLED` (also by `omlx_pool_close`),
/// `OMLX_E_NOT_FOUND` (repository, revision or file), `OMLX_E_UNAUTHORIZED` (a token is needed, or terms have to be
/// accepted; the message says which), `OMLX_E_OFFLINE`, `OMLX_E_NO_SPACE` (with the numbers), `OMLX_E_NETWORK` (with
/// the cause), `OMLX_E_CHECKSUM` (something else came than was announced), `OMLX_E_BUSY` (another download of this
/// model is running, in any process; or the hub has had enough: `omlx_error_retry_after_ms`), `OMLX_E_INVALID_REQUEST`
/// (the folder is there, and no download put it there), `OMLX_E_INVALID_MODEL` (file names that lead out of the
/// folder), `OMLX_E_IO`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_wait(
    download: *mut omlx_download,
    timeout_ms: i64,
    result_json: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or a live handle, by the header's contract.
        let download = unsafe { borrow(download, "download") }?;
        let timeout = u64::try_from(timeout_ms).ok().map(|ms| Duration::from_millis(ms.min(MAX_WAIT_MS)));
        let arrival = download.download.wait(timeout)?;
        if result_json.is_null() {
            return Ok(());
        }
        let folder = arrival.folder.to_string_lossy();
        let result =
            json!({ "id": arrival.id, "folder": folder, "commit": arrival.commit, "changed": arrival.changed });
        omlx_string::write(result.to_string(), result_json)
    })
}

/// Asks a download to end; it is over within a second, unless the disk takes longer to write a file through. What has
/// been fetched stays in the hidden folder for the next attempt. NULL and downloads that are over are ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_cancel(download: *mut omlx_download) {
    // SAFETY: NULL or a live handle, by the header's contract.
    if let Some(download) = unsafe { download.as_ref() } {
        download.download.cancel();
    }
}

/// Adds a reference; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_retain(download: *mut omlx_download) {
    // SAFETY: NULL or a live handle, by the header's contract.
    unsafe { super::retain(download) };
}

/// Drops a reference; NULL is ignored. With the last one the download is cancelled, without waiting for that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_download_release(download: *mut omlx_download) {
    // SAFETY: NULL or a reference that the host owns, by the header's contract.
    unsafe { super::release(download) };
}
