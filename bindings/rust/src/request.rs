//! Requests: streams of events.

use std::ffi::c_void;
use std::future::poll_fn;
use std::pin::Pin;
use std::ptr::{NonNull, null, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_core::Stream;

use crate::error::{Error, Result, Status, check, text};
use crate::event::Event;
use crate::ffi;

/// How a request is delivered.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestOptions {
    /// Ignore keys of the JSON that the library does not know.
    pub lenient: bool,
    /// Begin with [`Event::Loading`] while the model is being loaded.
    pub loading_events: bool,
    /// Tell by [`Event::Started`] when the prompt begins to be computed.
    pub started_event: bool,
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

/// Whom to wake when an event comes, and whether there may be one.
#[derive(Debug)]
struct WakeCell {
    waker: Mutex<Option<Waker>>,
    /// False if all events have been read and none has come since.
    ready: AtomicBool,
}

impl WakeCell {
    fn set(&self, waker: &Waker) {
        let mut slot = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &*slot {
            Some(old) if old.will_wake(waker) => {}
            _ => *slot = Some(waker.clone()),
        }
    }

    fn wake(&self) {
        self.ready.store(true, Ordering::Release);
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
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
            started_event: options.started_event.into(),
        };
        let mut handle = null_mut();
        // SAFETY: everything is alive for the call.
        check(|error| unsafe { start(pool, json.as_ptr().cast(), json.len(), &options, &mut handle, error) })?;
        let handle = NonNull::new(handle).ok_or_else(|| Error::new(Status::Internal, "no request came back"))?;
        let wake = Arc::new(WakeCell { waker: Mutex::default(), ready: AtomicBool::new(true) });
        let request = Self { handle, wake };
        let cell = Arc::into_raw(Arc::clone(&request.wake)).cast_mut().cast();
        // SAFETY: the request is alive; the cell is given back in `on_destroy`, also when this fails.
        check(|error| unsafe {
            ffi::omlx_request_set_wake(request.handle.as_ptr(), Some(on_wake), cell, Some(on_destroy), error)
        })?;
        Ok(request)
    }

    /// Id of the model that answers.
    pub fn model(&self) -> String {
        // SAFETY: the request is alive, and with it the text.
        unsafe { text(ffi::omlx_request_model(self.handle.as_ptr())) }
    }

    /// The next event; `None` after the done event.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_event(context)).await
    }

    /// Polls for the next event.
    pub fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        // In place before looking: an event that came between would wake nobody.
        self.wake.set(context.waker());
        if !self.wake.ready.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        match self.fetch(Some(Duration::ZERO)) {
            Err(error) if error.status == Status::Timeout => Poll::Pending,
            outcome => {
                // There may be more, of which the library does not tell again.
                self.wake.ready.store(true, Ordering::Release);
                Poll::Ready(outcome.unwrap_or_default())
            }
        }
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
