//! `omlx_request`: a running request.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::callback::{self, UserData, omlx_destroy_fn, omlx_event_fn, omlx_wake_fn};
use super::error::c_string;
use super::event::EventView;
use super::pool::Dispatcher;
use super::{SizedOptions, borrow, boundary, bytes, omlx_error, omlx_event, omlx_pool, output, split_options};
use crate::engine::{Done, Event, Request, RequestState, Usage, Wake};
use crate::error::{Error, Result, Status};
use crate::fault;
use crate::panics;
use crate::pool::EnginePool;
use crate::sync::lock;

/// How a request is delivered, of whatever kind it is. Start from `OMLX_GENERATE_OPTIONS_INIT`; zero means default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct omlx_generate_options {
    /// `sizeof(omlx_generate_options)`, set by `OMLX_GENERATE_OPTIONS_INIT`.
    pub struct_size: u32,
    /// Not 0: ignore keys of the request that the library does not know. 0 makes them `OMLX_E_INVALID_REQUEST`.
    pub lenient: u32,
    /// Receives the events. NULL: the host fetches them with `omlx_request_next` instead.
    pub callback: omlx_event_fn,
    /// Passed to `callback` and `destroy`.
    pub user_data: *mut c_void,
    /// NULL, or called exactly once: after the last callback, or when `omlx_generate` fails. Only if it refuses the
    /// `struct_size` as too small, nothing is called.
    pub destroy: omlx_destroy_fn,
    /// Not 0: the events begin with `OMLX_EVENT_KIND_LOADING` while the model is being loaded.
    pub loading_events: u32,
    /// Not 0: there is an `OMLX_EVENT_KIND_STARTED` before the first text. Not for texts that are encoded.
    pub started_event: u32,
}

impl Default for omlx_generate_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            lenient: 0,
            callback: None,
            user_data: std::ptr::null_mut(),
            destroy: None,
            loading_events: 0,
            started_event: 0,
        }
    }
}

// SAFETY: repr(C), the size comes first, and every other field is an integer, a nullable pointer or function.
unsafe impl SizedOptions for omlx_generate_options {
    const MIN_SIZE: usize = std::mem::offset_of!(Self, loading_events);
}

/// A generation, or texts that are encoded. Reference-counted; it does not need its pool's handle to live on.
pub struct omlx_request {
    state: Arc<RequestState>,
    /// The event that the host reads in the pull form.
    current: Mutex<Option<Box<EventView>>>,
    pull: bool,
    model: CString,
}

impl Drop for omlx_request {
    fn drop(&mut self) {
        if self.pull {
            // Nobody can read the answer any more.
            self.state.set_wake(None);
            self.state.cancel();
        }
    }
}

/// Starts a generation and returns at once: loading the model, rendering and tokenising happen on other threads, and
/// what fails there arrives in the done event.
///
/// `request_json` is a JSON object of `request_len` bytes with the keys of OpenAI's chat completions and those that
/// local servers have added to them:
///
///   what to answer   "messages", with what the chat template takes: "chat_template" (the name of one of the
///                    model's), "chat_template_kwargs", "add_generation_prompt"; or "prompt", a text or token ids
///   what to call     "tools", "tool_choice" ("auto"; "none": the model is not told of them; "required" or {"type":"function",
///                    "function":{"name":N}}: the answer is calls, whose arguments the tool's schema accepts),
///                    "parallel_tool_calls" (false: the answer ends with its first call)
///   by which model   "model": an id of `omlx_pool_models`
///   how to sample    "temperature" (0 is greedy), "top_p", "top_k", "min_p", "seed", "repetition_penalty",
///                    "presence_penalty", "frequency_penalty", "logit_bias"
///   in which form    "response_format": {"type":T}, where T is "text", "json_object", "json_schema" (with "json_schema":
///                    {"schema":S}), "regex" ("regex":R), "choice" ("choices":[..]) or "grammar" ("grammar":G, in the Lark
///                    dialect of llguidance); the answer has it unless it ends with `OMLX_FINISH_REASON_LENGTH` or at a stop
///                    string, or calls tools, if there are any. Thinking may come before it
///   how to think     "thinking_budget": tokens of thinking at most; then it is ended
///   when to stop     "max_tokens" or "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos"
///   what to report   "logprobs", "top_logprobs"
///   how many answers "n", at most 16; each has its `choice` in the events, and its own end before the done event
///   before whom      "priority": "high", "normal" or "low"; within a class the first to come is first
///
/// What is not given comes from the model's generation_config.json, else sampling is greedy and the context is the only
/// limit. What the model thinks before it answers "messages", and what it calls if there are "tools", are events of their
/// own where its way to write them is known; an answer to a "prompt" is text. Requests on one model are computed together,
/// as many as `max_sequences` of the pool's options says; more wait.
///
/// `options` may be NULL. `request` receives a handle; it may be NULL if there is a callback, which may run before this
/// function returns.
///
/// Parts of messages other than text (pictures, sounds, films, files, also in results of tools) are `OMLX_E_UNSUPPORTED`.
///
/// Errors: `OMLX_E_INVALID_REQUEST`, `OMLX_E_UNSUPPORTED`, `OMLX_E_NOT_FOUND` (model), `OMLX_E_BUSY` (too many wait:
/// `omlx_error_retry_after_ms`), `OMLX_E_CLOSED`. A prompt that the KV cache cannot hold ends with `OMLX_E_OUT_OF_MEMORY`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_generate(
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
                let mut request = Request::from_json(json, options.lenient != 0)?;
                request.tells_loading = options.loading_events != 0;
                request.tells_start = options.started_event != 0;
                pool.generate(request)
            })
        }
    })
}

/// Starts a request of any kind; `submit` parses it and passes it on.
///
/// # Safety
/// All pointers as `omlx_generate` takes them.
pub(super) unsafe fn start(
    pool: *mut omlx_pool,
    request_json: *const c_char,
    request_len: usize,
    options: *const omlx_generate_options,
    request: *mut *mut omlx_request,
    submit: impl FnOnce(&EnginePool, &[u8], &omlx_generate_options) -> Result<Arc<RequestState>>,
) -> Result<()> {
    // SAFETY: NULL or sized options, by the header's contract.
    let (options, newer) = unsafe { split_options(options, "options") }?;
    // First of all, so that a failure below also runs the destroy function.
    let user_data = UserData::new(options.user_data, options.destroy);
    newer?;
    if request.is_null() && options.callback.is_none() {
        return Err(Error::invalid_argument("request is NULL, and there is no callback"));
    }
    // SAFETY: NULL or valid, by the header's contract.
    let (pool, json) = unsafe { (borrow(pool, "pool")?, bytes(request_json.cast(), request_len, "request_json")?) };
    // Counted before the request exists: a close that comes between waits for its callbacks.
    let dispatcher = pool.dispatchers.enter();
    let state = submit(&pool.pool, json, &options)?;
    if let Some(callback) = options.callback {
        spawn_dispatcher(Arc::clone(&state), callback, user_data, dispatcher)?;
    }
    if !request.is_null() {
        let (model, pull) = (c_string(state.model()), options.callback.is_none());
        let handle = omlx_request { state, current: Mutex::default(), pull, model };
        // SAFETY: not NULL.
        unsafe { request.write(Arc::into_raw(Arc::new(handle)).cast_mut()) };
    }
    Ok(())
}

type EventCallback = unsafe extern "C" fn(*mut c_void, *const omlx_event) -> i32;

/// Gives the request a thread that feeds its callback: a slow one then delays nobody else.
fn spawn_dispatcher(
    state: Arc<RequestState>,
    callback: EventCallback,
    user_data: UserData,
    dispatcher: Dispatcher,
) -> Result<()> {
    let cancel = Arc::clone(&state);
    let thread = std::thread::Builder::new().name("omlx-events".into()).spawn(move || {
        callback::as_dispatcher(|| {
            if let Err(error) = panics::catch(|| deliver_all(&state, callback, &user_data)) {
                // The host still gets its done event.
                state.cancel();
                deliver(Event::Done(Done::failed(error, Usage::default())), callback, &user_data);
            }
            drop(user_data);
        });
        drop(dispatcher);
    });
    thread.map(|_| ()).map_err(|e| {
        cancel.cancel();
        Error::io("starting a callback thread", &e)
    })
}

/// Feeds a callback until the done event.
fn deliver_all(state: &RequestState, callback: EventCallback, user_data: &UserData) {
    let mut refused = false;
    while let Ok(event) = state.next(None) {
        fault::point("callback", "");
        // A host that has had enough may have torn down what text would go to.
        if refused && matches!(event, Event::Delta(_)) {
            continue;
        }
        if deliver(event, callback, user_data) != 0 {
            refused = true;
            state.cancel();
        }
    }
}

fn deliver(event: Event, callback: EventCallback, user_data: &UserData) -> i32 {
    let view = EventView::new(event);
    // SAFETY: the host's function with its own data; the view outlives the call.
    unsafe { callback(user_data.pointer(), view.as_ptr()) }
}

/// Id of the model that answers a request: as in `omlx_pool_models`, also where the request had an alias or none. Alive as
/// long as the request; "" for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_request_model(request: *const omlx_request) -> *const c_char {
    // SAFETY: NULL or a live handle, by the header's contract.
    unsafe { request.as_ref() }.map_or(c"".as_ptr(), |request| request.model.as_ptr())
}

/// Waits `timeout_ms` milliseconds for the next event of a request without callback; 0 never waits, a negative timeout
/// waits for ever. `event` is valid until the next event is fetched or the request is released. Blocking unless
/// `timeout_ms` is 0.
///
/// Errors: `OMLX_E_TIMEOUT` (none came in time), `OMLX_E_CLOSED` (the done event was fetched already).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_request_next(
    request: *mut omlx_request,
    timeout_ms: i64,
    event: *mut *const omlx_event,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let event = output(event, "event")?;
        // SAFETY: NULL or a live handle, by the header's contract.
        let request = unsafe { borrow(request, "request") }?;
        if !request.pull {
            return Err(Error::invalid_argument("the events of this request go to its callback"));
        }
        let timeout = u64::try_from(timeout_ms).ok().map(|ms| Duration::from_millis(ms.min(MAX_WAIT_MS)));
        let next = request.state.next(timeout).map_err(|status| match status {
            Status::Timeout => Error::new(status, "no event came in time"),
            _ => Error::new(status, "the request has ended and its done event was read"),
        })?;
        let pointer = lock(&request.current).insert(Box::new(EventView::new(next))).as_ptr();
        // SAFETY: checked above not to be NULL.
        unsafe { event.write(pointer) };
        Ok(())
    })
}

/// Longest finite wait, about a century: deadlines stay computable.
pub(super) const MAX_WAIT_MS: u64 = 100 * 366 * 24 * 3600 * 1000;

/// Sets a function that is called when an event becomes available, before this returns if one is waiting already: for
/// run loops that must not block. NULL removes it; the old one may still be running then, so its data is freed in its
/// `destroy` only. `user_data` and `destroy` may be NULL. `OMLX_E_INVALID_ARGUMENT` for a request with a callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_request_set_wake(
    request: *mut omlx_request,
    wake: omlx_wake_fn,
    user_data: *mut c_void,
    destroy: omlx_destroy_fn,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let user_data = UserData::new(user_data, destroy);
        // SAFETY: NULL or a live handle, by the header's contract.
        let request = unsafe { borrow(request, "request") }?;
        if !request.pull {
            return Err(Error::invalid_argument("the events of this request go to its callback"));
        }
        // The host's functions that are called here may release the handle.
        let state = Arc::clone(&request.state);
        state.set_wake(wake.map(|wake| -> Wake {
            Box::new(move || {
                // SAFETY: the host's function with its own data, which lives as long as this closure.
                unsafe { wake(user_data.pointer()) }
            })
        }));
        Ok(())
    })
}

/// Asks the request to end; its done event comes within one step of the model, or when the model is loaded. NULL and
/// ended requests are ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_request_cancel(request: *mut omlx_request) {
    // SAFETY: NULL or a live handle, by the header's contract.
    if let Some(request) = unsafe { request.as_ref() } {
        request.state.cancel();
    }
}

/// Adds a reference; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_request_retain(request: *mut omlx_request) {
    // SAFETY: NULL or a live handle, by the header's contract.
    unsafe { super::retain(request) };
}

/// Drops a reference; NULL is ignored. With the last one a request without callback is cancelled; one with a callback
/// goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_request_release(request: *mut omlx_request) {
    // SAFETY: NULL or a reference that the host owns, by the header's contract.
    unsafe { super::release(request) };
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::ptr::{null, null_mut};
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::capi::{omlx_pool_close, omlx_pool_open, omlx_pool_options, omlx_pool_release};

    /// What the host is told: kind and status of an event, or `None` for the end of its data.
    type Told = Option<(u32, i32)>;

    unsafe extern "C" fn on_event(user_data: *mut c_void, event: *const omlx_event) -> i32 {
        // SAFETY: the sender lives until `on_destroy`, the event for the call.
        let (sender, event) = unsafe { (&*user_data.cast::<Sender<Told>>(), &*event) };
        sender.send(Some((event.kind, event.status))).map_or(1, |()| 0)
    }

    unsafe extern "C" fn on_destroy(user_data: *mut c_void) {
        // SAFETY: the box made by the test, given back once.
        let sender = unsafe { Box::from_raw(user_data.cast::<Sender<Told>>()) };
        let _ = sender.send(None);
    }

    #[test]
    fn a_panic_beside_the_callback_ends_the_request_with_an_error() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama-f32");
        let folder = std::ffi::CString::new(folder.to_str().unwrap()).unwrap();
        let pool_options = omlx_pool_options { models_dir: folder.as_ptr(), device: 1, ..Default::default() };
        let json = br#"{"prompt":[1,2,3],"max_tokens":300}"#;
        let mut pool = null_mut();
        let (sender, told) = channel::<Told>();
        let options = omlx_generate_options {
            callback: Some(on_event),
            destroy: Some(on_destroy),
            user_data: Box::into_raw(Box::new(sender)).cast(),
            ..Default::default()
        };
        crate::fault::arm("callback", "", 2);
        // SAFETY: everything outlives the calls; the handle is closed before it is released.
        unsafe {
            assert_eq!(omlx_pool_open(&pool_options, &mut pool, null_mut()), Status::Ok);
            let generate = omlx_generate(pool, json.as_ptr().cast(), json.len(), &options, null_mut(), null_mut());
            assert_eq!(generate, Status::Ok);
        }
        let mut seen = Vec::new();
        while let Some(event) = told.recv_timeout(Duration::from_secs(60)).expect("the host is told of the end") {
            seen.push(event);
        }
        assert_eq!(seen, [(1, 0), (1, 0), (2, Status::Internal as i32)]);
        assert!(told.recv_timeout(Duration::from_secs(60)).is_err(), "something came after the destroy call");
        // SAFETY: as above; NULL is allowed.
        unsafe {
            assert_eq!(omlx_pool_close(pool, null_mut()), Status::Ok);
            omlx_pool_release(pool);
            assert_eq!(omlx_pool_open(null(), null_mut(), null_mut()), Status::InvalidArgument);
        }
    }
}
