//! A host in Rust, as small as the tests need it: the C functions on the bundled model.

#![allow(dead_code, reason = "several test programs share this file, and none needs all of it")]

use std::ffi::CString;
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use omlx::capi::*;
use omlx::error::Status;

/// A pool with the bundled model; closed when dropped.
pub struct Pool(*mut omlx_pool);

/// A request in the pull form; cancelled and read to its end when dropped.
pub struct Request(*mut omlx_request);

impl Pool {
    /// Opens it; nothing is loaded.
    pub fn open() -> Self {
        let folder = CString::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-chat")).expect("no NUL");
        let options = omlx_pool_options { models_dir: folder.as_ptr(), ..Default::default() };
        let mut pool = null_mut();
        // SAFETY: options, string and output live for the call.
        assert_eq!(unsafe { omlx_pool_open(&options, &mut pool, null_mut()) }, Status::Ok);
        Self(pool)
    }

    /// Loads the model.
    pub fn load(&self) {
        // SAFETY: a live handle and a NUL-terminated string.
        assert_eq!(unsafe { omlx_model_load(self.0, c"tiny-chat".as_ptr(), null_mut()) }, Status::Ok);
    }

    /// Unloads the model.
    pub fn unload(&self) {
        // SAFETY: a live handle and a NUL-terminated string.
        assert_eq!(unsafe { omlx_model_unload(self.0, c"tiny-chat".as_ptr(), 0, null_mut(), null_mut()) }, Status::Ok);
    }

    /// Starts a request, and how long the call took.
    pub fn start(&self, json: &str) -> (Request, Duration) {
        let mut request = null_mut();
        let started = Instant::now();
        // SAFETY: a live handle, `json.len()` bytes, an output that lives for the call.
        let status =
            unsafe { omlx_generate(self.0, json.as_ptr().cast(), json.len(), null(), &mut request, null_mut()) };
        let elapsed = started.elapsed();
        assert_eq!(status, Status::Ok);
        (Request(request), elapsed)
    }

    /// The whole answer to a request.
    pub fn answer(&self, json: &str) -> String {
        self.start(json).0.text()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the handle is not used after this.
        unsafe {
            omlx_pool_close(self.0, null_mut());
            omlx_pool_release(self.0);
        }
    }
}

impl Request {
    /// Reads it to its end.
    pub fn text(&self) -> String {
        let (mut text, mut event) = (Vec::new(), null());
        // SAFETY: a live handle; each event is read before the next is fetched, within the lengths it gives.
        unsafe {
            while omlx_request_next(self.0, -1, &mut event, null_mut()) == Status::Ok {
                let event = &*event;
                assert_eq!(event.status, Status::Ok as i32);
                text.extend_from_slice(std::slice::from_raw_parts(event.text.cast(), event.text_len));
            }
        }
        String::from_utf8(text).expect("events hold whole characters")
    }

    /// Asks it to end, without waiting for that.
    pub fn cancel(&self) {
        // SAFETY: a live handle.
        unsafe { omlx_request_cancel(self.0) };
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let mut event = null();
        self.cancel();
        // SAFETY: the handle is live until its release; the events are not looked at.
        unsafe {
            while omlx_request_next(self.0, -1, &mut event, null_mut()) == Status::Ok {}
            omlx_request_release(self.0);
        }
    }
}
