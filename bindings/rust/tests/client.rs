//! The client with the bundled model.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use omlx_client::{
    CacheLimits, Device, Download, Event, FinishReason, Metrics, Pool, PoolOptions, Request, RequestOptions, Status,
    Tiers,
};
use serde_json::{Value, json};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models")
}

fn pool() -> Pool {
    Pool::open(&PoolOptions { device: Device::Cpu, models_dir: Some(models()), ..PoolOptions::default() }).unwrap()
}

fn question(max_tokens: u32) -> String {
    let messages = json!([{"role": "user", "content": "What is 12 plus 30?"}]);
    json!({"messages": messages, "temperature": 0, "max_tokens": max_tokens}).to_string()
}

fn start(pool: &Pool, json: &str) -> Request {
    pool.generate(json, RequestOptions::default()).unwrap()
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread. A wake that is lost shows as a panic.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let (mut future, mut context) = (pin!(future), Context::from_waker(&waker));
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
            return result;
        }
        let parked = std::time::Instant::now();
        std::thread::park_timeout(Duration::from_secs(60));
        assert!(parked.elapsed() < Duration::from_secs(60), "nobody woke the reader");
    }
}

async fn read(mut request: Request) -> (String, omlx_client::Done) {
    let mut text = String::new();
    loop {
        match request.next().await {
            Some(Event::Text(piece)) => text.push_str(&piece.text),
            Some(Event::Done(done)) => {
                assert_eq!(request.next().await, None);
                return (text, done);
            }
            Some(_) => {}
            None => panic!("no done event"),
        }
    }
}

#[test]
fn handles_cross_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Pool>();
    shared::<Request>();
    shared::<Download>();
}

#[test]
fn answers_come_to_polls_and_to_waits() {
    let pool = pool();
    let (text, done) = block_on(read(start(&pool, &question(40))));
    assert!(text.contains("42"), "{text}");
    assert_eq!((done.reason, done.error), (FinishReason::Stop, None));
    assert!(done.usage.prompt_tokens > 0 && done.usage.seconds_to_first_token > 0.0);
    let mut request = start(&pool, &question(40));
    let mut waited = String::new();
    while let Some(event) = request.next_blocking(Some(Duration::from_secs(60))).unwrap() {
        if let Event::Text(piece) = event {
            waited.push_str(&piece.text);
        }
    }
    assert_eq!(waited, text);
}

#[test]
fn a_request_tells_its_model_its_start_and_what_stopped_it() {
    let pool = pool();
    let json =
        json!({"messages": [{"role": "user", "content": "What is 12 plus 30?"}], "temperature": 0, "stop": ["42"]});
    let options = RequestOptions { started_event: true, ..RequestOptions::default() };
    let mut request = pool.generate(&json.to_string(), options).unwrap();
    assert_eq!(request.model(), "tiny-chat");
    let Some(Event::Started(prompt, 0)) = block_on(request.next()) else { panic!("no start") };
    let (text, done) = block_on(read(request));
    assert!(!text.contains("42"), "{text}");
    assert_eq!((done.stop.as_deref(), done.usage.prompt_tokens), (Some("42"), prompt));
    assert_eq!(block_on(read(start(&pool, &question(40)))).1.stop, None);
}

#[test]
fn many_streams_wake_their_own_readers() {
    let pool = Arc::new(pool());
    let (alone, _) = block_on(read(start(&pool, &question(40))));
    let threads: Vec<_> = (0..16)
        .map(|_| {
            let pool = Arc::clone(&pool);
            std::thread::spawn(move || block_on(read(start(&pool, &question(40)))).0)
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), alone);
    }
}

#[test]
fn requests_end_when_they_are_cancelled_or_dropped() {
    let pool = pool();
    let long = json!({"prompt": "Once", "max_tokens": 4000, "ignore_eos": true}).to_string();
    let mut request = start(&pool, &long);
    assert!(matches!(block_on(request.next()), Some(Event::Text(_))));
    request.cancel();
    let (_, done) = block_on(read(request));
    assert_eq!(done.reason, FinishReason::Cancelled);
    assert_eq!(done.error.unwrap().status, Status::Cancelled);
    let mut request = start(&pool, &long);
    block_on(request.next());
    drop(request);
    for _ in 0..500 {
        let metrics: Value = serde_json::from_str(&pool.metrics(Metrics::Json).unwrap()).unwrap();
        if metrics["models"]["tiny-chat"]["running_sequences"] == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("a dropped request goes on");
}

#[test]
fn errors_are_typed() {
    let pool = pool();
    let refused = |json: &str| pool.generate(json, RequestOptions::default()).unwrap_err();
    let error = refused("{");
    assert_eq!(error.status, Status::InvalidRequest);
    assert!(error.to_string().contains("not valid"), "{error}");
    assert_eq!(refused(r#"{"prompt":"a","model":"none"}"#).status, Status::NotFound);
    assert_eq!(refused(r#"{"prompt":"a","colour":1}"#).status, Status::InvalidRequest);
    let lenient = RequestOptions { lenient: true, ..RequestOptions::default() };
    assert!(pool.generate(r#"{"prompt":"a","colour":1,"max_tokens":1}"#, lenient).is_ok());
    assert_eq!(pool.load_model("a\0b").unwrap_err().status, Status::InvalidArgument);
    let nowhere = PoolOptions { models_dir: Some("/nowhere/at/all".into()), ..PoolOptions::default() };
    assert_eq!(Pool::open(&nowhere).unwrap_err().status, Status::NotFound);
    // Found by the engine, told in the done event.
    let long = json!({"prompt": vec![5; 9000], "max_tokens": 1}).to_string();
    let (_, done) = block_on(read(start(&pool, &long)));
    assert_eq!(done.error.unwrap().status, Status::ContextLength);
    pool.close().unwrap();
    assert_eq!(refused(r#"{"prompt":"a"}"#).status, Status::Closed);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let options = PoolOptions {
        device: Device::Cpu,
        models_dir: Some(models()),
        max_sequences: 1,
        queue_length: 1,
        ..PoolOptions::default()
    };
    let pool = Pool::open(&options).unwrap();
    let long = json!({"prompt": "Once", "max_tokens": 4000, "ignore_eos": true}).to_string();
    let mut running = Vec::new();
    let error = loop {
        match pool.generate(&long, RequestOptions::default()) {
            Ok(request) => running.push(request),
            Err(error) => break error,
        }
        assert!(running.len() < 10);
    };
    assert_eq!(error.status, Status::Busy);
    assert!(error.retry_after.is_some_and(|wait| wait > Duration::ZERO));
}

#[test]
fn texts_tokens_and_settings_go_both_ways() {
    let pool = pool();
    let tokens = pool.tokenize(None, "A fox.", false).unwrap();
    assert_eq!(pool.detokenize(Some("tiny-chat"), &tokens).unwrap(), "A fox.");
    assert!(pool.render_template(&question(1), false).unwrap().contains("12 plus 30"));
    let foreign = json!({"messages": [{"role": "user", "content": "12 plus 30"}], "store": true}).to_string();
    assert!(pool.render_template(&foreign, true).unwrap().contains("12 plus 30"));
    assert_eq!(pool.render_template(&foreign, false).unwrap_err().status, Status::InvalidRequest);
    pool.set_cache_limits(CacheLimits { hot_bytes: 1 << 20, ..CacheLimits::default() }).unwrap();
    let limits = CacheLimits { hot_bytes: 1 << 20, cold_bytes_per_model: u64::MAX, ..CacheLimits::default() };
    assert_eq!(pool.cache_limits().unwrap(), limits);
    pool.configure_model("tiny-chat", r#"{"pinned":true}"#).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&pool.model_settings("tiny-chat").unwrap()).unwrap()["pinned"], true);
    pool.load_model("tiny-chat").unwrap();
    block_on(read(start(&pool, &question(4))));
    assert!(serde_json::from_str::<Value>(&pool.cache_stats(None).unwrap()).unwrap().is_object());
    assert!(pool.cache_clear(None, Tiers::POOLS | Tiers::COLD).unwrap() > 0);
    assert!(pool.unload_model("tiny-chat", true).unwrap() > 1_000_000);
}

#[test]
fn a_download_that_cannot_be_says_why() {
    let folder = tempfile_folder();
    let options = PoolOptions { device: Device::Cpu, models_dir: Some(folder.clone()), ..PoolOptions::default() };
    let pool = Pool::open(&options).unwrap();
    let (sender, states) = std::sync::mpsc::channel();
    let download = pool.download(r#"{"repo":"org/name","offline":true}"#).unwrap();
    download
        .on_progress(move |progress| {
            sender.send(progress.state).unwrap();
            true
        })
        .unwrap();
    let error = download.wait(Some(Duration::from_secs(60))).unwrap_err();
    assert_eq!(error.status, Status::Offline);
    assert!(download.progress().unwrap().is_over());
    assert!(states.iter().last().is_some(), "the callback was not told, or not freed");
    std::fs::remove_dir_all(folder).unwrap();
}

fn tempfile_folder() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("omlx-client-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}
