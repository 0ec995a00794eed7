//! Downloads of models.

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use crate::error::{Error, Result, Status, check};
use crate::ffi;
use crate::pool::Pool;
use crate::text::take;

/// What a download is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DownloadState {
    /// Asking the hub which files there are.
    Listing,
    /// Fetching and checking files.
    Fetching,
    /// Writing through and moving into place.
    Installing,
    /// The model is in the pool.
    Done,
    /// It failed; [`Download::wait`] says why.
    Failed,
    /// It was cancelled.
    Cancelled,
    /// Another one.
    Other(u32),
}

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownloadProgress {
    /// What it is doing.
    pub state: DownloadState,
    /// Bytes that are there.
    pub bytes_done: u64,
    /// Bytes of all files; 0 until they are listed.
    pub bytes_total: u64,
    /// Bytes that were there before.
    pub bytes_kept: u64,
    /// Files that are complete.
    pub files_done: u64,
    /// All files; 0 until they are listed.
    pub files_total: u64,
    /// Requests that were repeated.
    pub retries: u64,
}

impl DownloadProgress {
    /// Whether it is over, one way or the other.
    pub fn is_over(&self) -> bool {
        matches!(self.state, DownloadState::Done | DownloadState::Failed | DownloadState::Cancelled)
    }

    fn read(progress: &ffi::omlx_download_progress) -> Self {
        let state = match progress.state {
            ffi::OMLX_DOWNLOAD_STATE_LISTING => DownloadState::Listing,
            ffi::OMLX_DOWNLOAD_STATE_FETCHING => DownloadState::Fetching,
            ffi::OMLX_DOWNLOAD_STATE_INSTALLING => DownloadState::Installing,
            ffi::OMLX_DOWNLOAD_STATE_DONE => DownloadState::Done,
            ffi::OMLX_DOWNLOAD_STATE_FAILED => DownloadState::Failed,
            ffi::OMLX_DOWNLOAD_STATE_CANCELLED => DownloadState::Cancelled,
            other => DownloadState::Other(other),
        };
        Self {
            state,
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            bytes_kept: progress.bytes_kept,
            files_done: progress.files_done,
            files_total: progress.files_total,
            retries: progress.retries,
        }
    }
}

/// A download. Dropping it cancels it.
#[derive(Debug)]
pub struct Download {
    handle: NonNull<ffi::omlx_download>,
}

// SAFETY: every C function may be called from any thread, several at once; the release needs `&mut self`.
unsafe impl Send for Download {}
// SAFETY: as above.
unsafe impl Sync for Download {}

impl Pool {
    /// Starts to download a model, by a JSON object.
    pub fn download(&self, json: &str) -> Result<Download> {
        let mut download = null_mut();
        // SAFETY: the pool, the JSON and the output live for the call.
        check(|error| unsafe {
            ffi::omlx_download_start(self.pointer(), json.as_ptr().cast(), json.len(), &mut download, error)
        })?;
        let handle = NonNull::new(download).ok_or_else(|| Error::new(Status::Internal, "no download came back"))?;
        Ok(Download { handle })
    }
}

type OnProgress = Box<dyn Fn(&DownloadProgress) -> bool + Send + Sync>;

impl Download {
    /// How far it is.
    pub fn progress(&self) -> Result<DownloadProgress> {
        let mut progress = ffi::omlx_download_progress {
            struct_size: size_of::<ffi::omlx_download_progress>() as u32,
            state: 0,
            bytes_done: 0,
            bytes_total: 0,
            bytes_kept: 0,
            files_done: 0,
            files_total: 0,
            retries: 0,
        };
        // SAFETY: the download and the output live for the call.
        check(|error| unsafe { ffi::omlx_download_status(self.handle.as_ptr(), &mut progress, error) })?;
        Ok(DownloadProgress::read(&progress))
    }

    /// Has `callback` told of progress, at once and then on threads of the library; `false` cancels the download. It
    /// must return quickly.
    pub fn on_progress(&self, callback: impl Fn(&DownloadProgress) -> bool + Send + Sync + 'static) -> Result<()> {
        let callback: Box<OnProgress> = Box::new(Box::new(callback));
        let data = Box::into_raw(callback).cast();
        // SAFETY: the download is alive; the data is given back in `on_destroy`, also when this fails.
        check(|error| unsafe {
            ffi::omlx_download_set_callback(self.handle.as_ptr(), Some(on_progress), data, Some(on_destroy), error)
        })
    }

    /// Waits until it is over and returns what came of it, a JSON object; without a `timeout` for ever. Blocking unless
    /// the timeout is zero.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<String> {
        let milliseconds = timeout.map_or(-1, |timeout| i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX));
        let mut result = null_mut();
        // SAFETY: the download and the output live for the call.
        check(|error| unsafe { ffi::omlx_download_wait(self.handle.as_ptr(), milliseconds, &mut result, error) })?;
        // SAFETY: given to us.
        Ok(unsafe { take(result) })
    }

    /// Asks it to end.
    pub fn cancel(&self) {
        // SAFETY: the download is alive.
        unsafe { ffi::omlx_download_cancel(self.handle.as_ptr()) };
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // SAFETY: our reference, given back once.
        unsafe { ffi::omlx_download_release(self.handle.as_ptr()) };
    }
}

unsafe extern "C" fn on_progress(user_data: *mut c_void, progress: *const ffi::omlx_download_progress) -> i32 {
    // SAFETY: the callback lives until `on_destroy`, the progress for this call.
    let (callback, progress) = unsafe { (&*user_data.cast::<OnProgress>(), DownloadProgress::read(&*progress)) };
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| callback(&progress)));
    // A callback that panicked has not asked for more.
    i32::from(!told.unwrap_or(false))
}

unsafe extern "C" fn on_destroy(user_data: *mut c_void) {
    // SAFETY: called once, with the box that was given away.
    drop(unsafe { Box::from_raw(user_data.cast::<OnProgress>()) });
}
