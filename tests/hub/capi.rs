//! The C functions: a model that arrives in a pool and answers.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use omlx::capi::*;
use omlx::error::Status;
use serde_json::{Value, json};

use crate::server::{Fault, File, large, small};
use crate::{Case, model, until};

/// A tiny model, as a repository has it.
fn fixture() -> Vec<File> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama-f32");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let file = |path: std::path::PathBuf| {
        let (name, content) = (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap());
        if name.ends_with(".safetensors") { large(&name, content) } else { small(&name, content) }
    };
    files.map(file).collect()
}

struct Pool(*mut omlx_pool);

impl Pool {
    fn open(folder: &Path) -> Self {
        let folder = CString::new(folder.to_str().unwrap()).unwrap();
        Self::with(folder.as_ptr())
    }

    /// `folder` is NULL or a string that lives for the call.
    fn with(folder: *const c_char) -> Self {
        let options = omlx_pool_options { models_dir: folder, device: 1, ..Default::default() };
        let mut pool = null_mut();
        // SAFETY: options, string and output live for the call.
        assert_eq!(unsafe { omlx_pool_open(&options, &mut pool, null_mut()) }, Status::Ok);
        Self(pool)
    }

    fn start(&self, json: &Value) -> (Status, *mut omlx_download) {
        let (json, mut download) = (json.to_string(), null_mut());
        // SAFETY: a live handle, `json.len()` bytes, an output that lives for the call.
        let status =
            unsafe { omlx_download_start(self.0, json.as_ptr().cast(), json.len(), &mut download, null_mut()) };
        (status, download)
    }

    fn models(&self) -> Value {
        let mut text = null_mut();
        // SAFETY: a live handle and an output that lives for the call.
        assert_eq!(unsafe { omlx_pool_models(self.0, &mut text, null_mut()) }, Status::Ok);
        take(text)
    }

    fn close(&self) {
        // SAFETY: a live handle.
        assert_eq!(unsafe { omlx_pool_close(self.0, null_mut()) }, Status::Ok);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
        // SAFETY: the handle is not used after this.
        unsafe { omlx_pool_release(self.0) };
    }
}

/// Reads and releases a JSON text.
fn take(text: *mut omlx_string) -> Value {
    // SAFETY: a string that the library just returned; its data is read before the release.
    unsafe {
        let value = serde_json::from_slice(CStr::from_ptr(omlx_string_data(text)).to_bytes()).unwrap();
        omlx_string_release(text);
        value
    }
}

/// Status, message and result of a wait.
fn wait(download: *mut omlx_download, timeout_ms: i64) -> (Status, String, Value) {
    let (mut text, mut error) = (null_mut(), null_mut());
    // SAFETY: a live handle; the outputs live for the call, the error until its release.
    unsafe {
        let status = omlx_download_wait(download, timeout_ms, &mut text, &mut error);
        let message = CStr::from_ptr(omlx_error_message(error)).to_str().unwrap().to_owned();
        assert_eq!(omlx_error_status(error), status);
        omlx_error_release(error);
        (status, message, if text.is_null() { Value::Null } else { take(text) })
    }
}

fn progress(download: *mut omlx_download) -> omlx_download_progress {
    let mut progress = omlx_download_progress::default();
    // SAFETY: a live handle and a struct of its size.
    assert_eq!(unsafe { omlx_download_status(download, &mut progress, null_mut()) }, Status::Ok);
    progress
}

#[test]
fn a_downloaded_model_answers() {
    let case = Case::new(&fixture());
    let pool = Pool::open(case.folder.path());
    assert_eq!(pool.models(), json!([]));
    let mut request = json!({ "repo": "org/model", "endpoint": case.hub.endpoint(), "offline": false });
    let (status, download) = pool.start(&request);
    assert_eq!(status, Status::Ok);
    let (status, message, result) = wait(download, 30_000);
    assert_eq!(status, Status::Ok, "{message}");
    assert_eq!((&result["id"], &result["changed"]), (&json!("org/model"), &json!(true)));
    assert_eq!(result["folder"].as_str(), case.model().to_str());
    let seen = progress(download);
    assert_eq!((seen.state, seen.bytes_done), (omlx_download_state::Done as u32, seen.bytes_total));
    assert!(seen.bytes_total > 0 && seen.files_done == seen.files_total && seen.files_total > 1);

    let models = pool.models();
    assert_eq!((&models[0]["id"], &models[0]["problem"]), (&json!("org/model"), &Value::Null), "{models}");
    // It is the pool's only model.
    let (json, mut answer, mut event) = (br#"{"prompt":[1,2,3],"max_tokens":4}"#, null_mut(), null());
    let mut tokens = 0;
    // SAFETY: live handles; each event is read before the next is fetched.
    unsafe {
        let status = omlx_generate(pool.0, json.as_ptr().cast(), json.len(), null(), &mut answer, null_mut());
        assert_eq!(status, Status::Ok);
        while omlx_request_next(answer, -1, &mut event, null_mut()) == Status::Ok {
            assert_eq!((*event).status, Status::Ok as i32);
            tokens += (*event).token_count;
        }
        omlx_request_release(answer);
        omlx_download_retain(download);
        omlx_download_release(download);
    }
    assert_eq!(tokens, 4);

    // Files that are no usable model are listed with the reason, and another revision takes their place.
    let broken = [small("config.json", "{\"model_type\":\"unheard-of\"}")];
    case.hub.commit("org/model", &["broken"], &broken);
    request["revision"] = json!("broken");
    let (_, other) = pool.start(&request);
    assert_eq!(wait(other, 30_000).0, Status::Ok);
    assert!(pool.models()[0]["problem"].as_str().is_some_and(|problem| problem.contains("unheard-of")));
    // A host that has released one, and one that waits without wanting the result.
    // SAFETY: live handles, used no more after their release.
    unsafe {
        assert_eq!(omlx_download_wait(other, 0, null_mut(), null_mut()), Status::Ok);
        omlx_download_release(other);
        omlx_download_release(download);
    }
}

#[test]
fn waits_cancels_and_closes() {
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::Hang(Some(10)), |seen| seen.network);
    let pool = Pool::open(case.folder.path());
    let request = json!({ "repo": "org/model", "endpoint": case.hub.endpoint(), "offline": false });
    let hangs = || case.hub.seen().iter().any(|seen| seen.network);
    let (_, download) = pool.start(&request);
    until("it hangs", hangs);
    assert_eq!(wait(download, 0).0, Status::Timeout);
    assert_eq!(progress(download).state, omlx_download_state::Fetching as u32);
    let started = Instant::now();
    // SAFETY: a live handle.
    unsafe { omlx_download_cancel(download) };
    assert_eq!(wait(download, -1).0, Status::Cancelled);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(progress(download).state, omlx_download_state::Cancelled as u32);
    // SAFETY: a live handle, used no more.
    unsafe { omlx_download_release(download) };

    // The last reference: nobody could ask for the result.
    case.hub.forget();
    let (_, download) = pool.start(&request);
    until("it hangs", hangs);
    // SAFETY: a live handle, used no more.
    unsafe { omlx_download_release(download) };
    case.hub.forget();
    let deadline = Instant::now() + Duration::from_secs(5);
    let download = loop {
        assert!(Instant::now() < deadline, "the released download goes on");
        let (_, download) = pool.start(&request);
        if wait(download, 200).0 != Status::Busy {
            break download;
        }
        // SAFETY: a live handle, used no more.
        unsafe { omlx_download_release(download) };
    };
    until("it hangs", hangs);
    let started = Instant::now();
    pool.close();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(wait(download, 0).0, Status::Cancelled, "a closed pool has no running downloads");
    assert_eq!(pool.start(&request).0, Status::Closed);
    // SAFETY: a live handle, used no more.
    unsafe { omlx_download_release(download) };
}

/// What a progress callback was told, and what it shall answer.
#[derive(Default)]
struct Told {
    calls: Mutex<Vec<(Instant, omlx_download_progress)>>,
    running: AtomicBool,
    destroyed: AtomicU32,
    /// States in which it cancels.
    cancels_in: Option<omlx_download_state>,
    pause: Duration,
}

impl Told {
    fn set(&self, download: *mut omlx_download) {
        let data = std::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: a live handle; the tests keep `self` until its data is given back.
        let status =
            unsafe { omlx_download_set_callback(download, Some(on_progress), data, Some(on_destroy), null_mut()) };
        assert_eq!(status, Status::Ok);
    }

    fn states(&self) -> Vec<u32> {
        let mut states: Vec<_> = self.calls.lock().unwrap().iter().map(|(_, progress)| progress.state).collect();
        states.dedup();
        states
    }

    fn is_destroyed(&self) -> bool {
        let destroyed = self.destroyed.load(Ordering::SeqCst);
        assert!(destroyed < 2);
        destroyed == 1
    }
}

unsafe extern "C" fn on_progress(told: *mut c_void, progress: *const omlx_download_progress) -> i32 {
    // SAFETY: `Told::set` gave this pointer; the library's lives for the call.
    let (told, progress) = unsafe { (&*told.cast::<Told>(), *progress) };
    assert!(!told.is_destroyed());
    assert!(!told.running.swap(true, Ordering::SeqCst), "one call at a time");
    told.calls.lock().unwrap().push((Instant::now(), progress));
    std::thread::sleep(told.pause);
    told.running.store(false, Ordering::SeqCst);
    i32::from(told.cancels_in.is_some_and(|state| state as u32 == progress.state))
}

unsafe extern "C" fn on_destroy(told: *mut c_void) {
    // SAFETY: as above.
    unsafe { &*told.cast::<Told>() }.destroyed.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_callback_is_told_of_progress() {
    use omlx_download_state::*;
    let case = Case::new(&model());
    let pool = Pool::open(case.folder.path());
    // Slow enough that there is something to be told of.
    case.hub.fault(1, Fault::Late(Duration::from_millis(300)), |seen| seen.network);
    case.hub.fault(1, Fault::Hang(Some(10)), |seen| seen.path.contains("/api/models/"));
    let mut request = json!({ "repo": "org/model", "endpoint": case.hub.endpoint(), "offline": false });
    let (told, removed) = (Told::default(), Told::default());
    let (_, download) = pool.start(&request);
    removed.set(download);
    assert_eq!(removed.states(), [Listing as u32], "at once");
    told.set(download);
    assert!(removed.is_destroyed() && !told.is_destroyed());
    until("it hangs", || !case.hub.seen().is_empty());
    // SAFETY: a live handle, used no more.
    unsafe { omlx_download_release(download) };

    // The next one goes well.
    let (_, download) = loop {
        let (status, download) = pool.start(&request);
        if wait(download, 100).0 != Status::Busy {
            break (status, download);
        }
        // SAFETY: a live handle, used no more.
        unsafe { omlx_download_release(download) };
    };
    until("the released one has told of its end", || told.is_destroyed());
    assert_eq!(told.states(), [Listing as u32, Cancelled as u32]);
    let told = Told { pause: Duration::from_millis(5), ..Told::default() };
    told.set(download);
    assert_eq!(wait(download, 30_000).0, Status::Ok);
    let states = told.states();
    assert!(states.ends_with(&[Fetching as u32, Installing as u32, Done as u32]), "{states:?}");
    let calls = told.calls.lock().unwrap().clone();
    assert!(calls.iter().all(|(_, progress)| progress.bytes_done <= progress.bytes_total), "{calls:?}");
    let too_often = |pair: &[(Instant, omlx_download_progress)]| {
        pair[0].1.state == pair[1].1.state && pair[1].0 - pair[0].0 < Duration::from_millis(50)
    };
    assert!(!calls.windows(2).any(too_often), "{calls:?}");
    let (_, last) = calls.last().unwrap();
    assert_eq!((last.bytes_done, last.files_done), (last.bytes_total, last.files_total));
    assert_eq!(calls.iter().filter(|(_, progress)| progress.state == Done as u32).count(), 1);
    until("its data is given back", || told.is_destroyed());
    // Too late for anything but the end.
    let late = Told::default();
    late.set(download);
    assert!(late.is_destroyed() && late.states() == [Done as u32]);

    // One that cancels.
    request["repo"] = json!("org/other");
    case.hub.commit("org/other", &["main"], &model());
    case.hub.fault(usize::MAX, Fault::Hang(Some(10)), |seen| seen.network);
    let (_, other) = pool.start(&request);
    let cancelling = Told { cancels_in: Some(Fetching), ..Told::default() };
    cancelling.set(other);
    assert_eq!(wait(other, 30_000).0, Status::Cancelled);
    assert_eq!(cancelling.states().last(), Some(&(Cancelled as u32)));
    until("its data is given back", || cancelling.is_destroyed());
    // SAFETY: live handles, used no more.
    unsafe {
        omlx_download_release(download);
        omlx_download_release(other);
    }
}

#[test]
fn bad_requests_and_structs_are_refused() {
    let case = Case::new(&model());
    let pool = Pool::open(case.folder.path());
    for request in [json!({}), json!({ "repo": "../x" }), json!({ "repo": "a/b", "unheard_of": 1 }), json!([])] {
        let (status, download) = pool.start(&request);
        assert_eq!((status, download.is_null()), (Status::InvalidRequest, true), "{request}");
    }
    let (status, download) = pool.start(&json!({ "repo": "org/none", "offline": true }));
    assert_eq!(status, Status::Ok);
    let (status, message, result) = wait(download, 30_000);
    assert_eq!((status, result), (Status::Offline, Value::Null));
    assert!(message.contains("org/none"), "{message}");
    let mut old = omlx_download_progress { struct_size: 8, ..Default::default() };
    // SAFETY: a live handle, used no more after its release, and a struct that says that it is shorter than it is.
    unsafe {
        assert_eq!(omlx_download_status(download, &mut old, null_mut()), Status::InvalidArgument);
        assert_eq!((old.struct_size, old.state), (8, 0));
        omlx_download_release(download);
    }
    // A pool over one model has no folder of models.
    let single = Pool::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/llama-f32"));
    assert_eq!(single.start(&json!({ "repo": "org/model" })).0, Status::InvalidRequest);
    // Nor are the bundled models a place for others.
    let bundled = Pool::with(null());
    assert_eq!(bundled.start(&json!({ "repo": "org/model", "offline": true })).0, Status::InvalidRequest);
}
