//! Requests: streams of events.

use std::ffi::c_void;
use std::future::poll_fn;
use std::pin::Pin;
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_core::Stream;

use crate::error::{Error, Result, Status, check};
use crate::event::Event;
use crate::ffi;

/// How a request is delivered.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestOptions {
    /// Ignore keys of the JSON that the library does not know.
    pub lenient: bool,
    /// Begin with [`Event::Loading`] while the model is being loaded.
    pub loading_events: bool,
}

/// A generation, or texts that are encoded. Dropping it cancels it.
#[derive(Debug)]
pub struct Request {
    handle: NonNull<ffi::omlx_request>,
    wake: Arc<WakeCell>,
}

// SAFETY: the C functions may be called from any thread; only reading events must be done by one at a time, and needs
// `&mut self`.
unsafe impl Send for Request {}
// SAFETY: as above.
unsafe impl Sync for Request {}

/// Whom to wake when an event comes.
#[derive(Debug, Default)]
struct WakeCell(Mutex<Option<Waker>>);

impl WakeCell {
    fn set(&self, waker: &Waker) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some(old) if old.will_wake(waker) => {}
            _ => *slot = Some(waker.clone()),
        }
    }

    fn wake(&self) {
        let waker = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

unsafe extern "C" fn on_wake(user_data: *mut c_void) {
    // SAFETY: the cell given to `omlx_request_set_wake`, alive until `on_destroy`.
    let cell = unsafe { &*user_data.cast::<WakeCell>() };
    // A waker of somebody's runtime must not unwind into C.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cell.wake()));
}

unsafe extern "C" fn on_destroy(user_data: *mut c_void) {
    // SAFETY: called once, with the reference that was given away.
    drop(unsafe { Arc::from_raw(user_data.cast_const().cast::<WakeCell>()) });
}

type Start = unsafe extern "C" fn(
    *mut ffi::omlx_pool,
    *const std::ffi::c_char,
    usize,
    *const ffi::omlx_generate_options,
    *mut *mut ffi::omlx_request,
    *mut *mut ffi::omlx_error,
) -> ffi::omlx_status;

impl Request {
    /// Starts a request by one of the C functions that do.
    ///
    /// # Safety
    /// `pool` is a live pool.
    pub(crate) unsafe fn start(
        start: Start,
        pool: *mut ffi::omlx_pool,
        json: &str,
        options: RequestOptions,
    ) -> Result<Self> {
        let options = ffi::omlx_generate_options {
            struct_size: size_of::<ffi::omlx_generate_options>() as u32,
            lenient: options.lenient.into(),
            callback: None,
            user_data: null_mut(),
            destroy: None,
            loading_events: options.loading_events.into(),
            reserved: 0,
        };
        let mut handle = null_mut();
        // SAFETY: everything is alive for the call.
        check(|error| unsafe { start(pool, json.as_ptr().cast(), json.len(), &options, &mut handle, error) })?;
        let handle = NonNull::new(handle).ok_or_else(|| Error::new(Status::Internal, "no request came back"))?;
        let request = Self { handle, wake: Arc::default() };
        let cell = Arc::into_raw(Arc::clone(&request.wake)).cast_mut().cast();
        // SAFETY: the request is alive; the cell is given back in `on_destroy`, also when this fails.
        check(|error| unsafe {
            ffi::omlx_request_set_wake(request.handle.as_ptr(), Some(on_wake), cell, Some(on_destroy), error)
        })?;
        Ok(request)
    }

    /// The next event; `None` after the done event.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_event(context)).await
    }

    /// Polls for the next event.
    pub fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        // First without, then again with the waker in place: an event that came between would wake nobody.
        for registered in [false, true] {
            match self.fetch(Some(Duration::ZERO)) {
                Ok(event) => return Poll::Ready(event),
                Err(error) if error.status != Status::Timeout => return Poll::Ready(None),
                Err(_) if registered => {}
                Err(_) => self.wake.set(context.waker()),
            }
        }
        Poll::Pending
    }

    /// Waits for the next event; `None` after the done event. `OMLX_E_TIMEOUT` if none comes in time; without a
    /// `timeout` it waits for ever. Blocking.
    pub fn next_blocking(&mut self, timeout: Option<Duration>) -> Result<Option<Event>> {
        self.fetch(timeout)
    }

    fn fetch(&mut self, timeout: Option<Duration>) -> Result<Option<Event>> {
        let milliseconds = timeout.map_or(-1, |timeout| i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX));
        loop {
            let mut event = null();
            // SAFETY: the request is alive, and `&mut self` makes this its only reader. Errors are told by the status.
            let status = unsafe { ffi::omlx_request_next(self.handle.as_ptr(), milliseconds, &mut event, null_mut()) };
            match status {
                // SAFETY: on success the event is there until the next call.
                ffi::OMLX_OK => match unsafe { Event::read(&*event) } {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                },
                ffi::OMLX_E_CLOSED => return Ok(None),
                code => {
                    let status = Status::from_code(code);
                    return Err(Error::new(status, status.name()));
                }
            }
        }
    }

    /// Asks the request to end; its done event comes within one step of the model.
    pub fn cancel(&self) {
        // SAFETY: the request is alive.
        unsafe { ffi::omlx_request_cancel(self.handle.as_ptr()) };
    }
}

impl Stream for Request {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll_event(context)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // SAFETY: our reference, given back once.
        unsafe { ffi::omlx_request_release(self.handle.as_ptr()) };
    }
}
