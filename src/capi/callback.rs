//! Host functions that the library calls: who owns their data, and when it is given back.

use std::cell::Cell;
use std::ffi::c_void;

use super::{omlx_download_progress, omlx_event};

/// Receives the events of a request, one call at a time, the done event last. Return 0 to go on; anything else
/// cancels the request, and only its done event follows. A slow callback delays its own request only: text that waits
/// is merged into one event.
pub type omlx_event_fn = Option<unsafe extern "C" fn(user_data: *mut c_void, event: *const omlx_event) -> i32>;

/// Called exactly once, when the library will not use `user_data` again.
pub type omlx_destroy_fn = Option<unsafe extern "C" fn(user_data: *mut c_void)>;

/// Told that an event is available where none was: fetch events with a timeout of 0 until `OMLX_E_TIMEOUT` or
/// `OMLX_E_CLOSED`, in the call or later elsewhere. It may come late, for an event that was fetched already. It must
/// return quickly: the model waits for it.
pub type omlx_wake_fn = Option<unsafe extern "C" fn(user_data: *mut c_void)>;

/// Receives the progress of a download, one call at a time, that with the last state last: at once, with every new state,
/// and ten times a second at most while bytes come. Return 0 to go on; anything else cancels the download. It must return
/// quickly: the download waits for it. `progress` is valid until it returns.
pub type omlx_progress_fn =
    Option<unsafe extern "C" fn(user_data: *mut c_void, progress: *const omlx_download_progress) -> i32>;

/// A host's data pointer with its destroy function, which runs exactly once, when this is dropped.
pub(super) struct UserData {
    pointer: *mut c_void,
    destroy: omlx_destroy_fn,
}

// SAFETY: the header asks for user data that may be used from any one thread at a time.
unsafe impl Send for UserData {}
// SAFETY: the pointer itself is only read; what it points to is the host's business.
unsafe impl Sync for UserData {}

impl UserData {
    pub fn new(pointer: *mut c_void, destroy: omlx_destroy_fn) -> Self {
        Self { pointer, destroy }
    }

    pub fn pointer(&self) -> *mut c_void {
        self.pointer
    }
}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the host's function with the host's pointer, once.
            unsafe { destroy(self.pointer) };
        }
    }
}

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside an event callback.
pub(super) fn in_callback() -> bool {
    IN_CALLBACK.get()
}

/// Marks this thread as a dispatcher while `body` runs.
pub(super) fn as_dispatcher<T>(body: impl FnOnce() -> T) -> T {
    IN_CALLBACK.set(true);
    let result = body();
    IN_CALLBACK.set(false);
    result
}
