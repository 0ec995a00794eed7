//! What all requests share.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use omlx_client::{Device, Pool, PoolOptions, Precision, Request, RequestOptions, Status};
use serde_json::{Map, Value};

use crate::http::error::ApiError;
use crate::http::keys::Keys;
use crate::log;
use crate::options::Options;
use crate::routes::admin::downloads::Downloads;

/// Names of ignored keys that are remembered at most: clients choose them.
const MOST_IGNORED: usize = 256;

/// The state of the server, behind an `Arc`.
#[derive(Debug)]
pub struct App {
    /// The models.
    pub pool: Pool,
    /// Who may call.
    pub keys: Keys,
    /// What requests may take.
    pub limits: Limits,
    /// Names by which the server may be called, beside addresses and `localhost`.
    pub allowed_hosts: Vec<String>,
    /// Web pages that may call it.
    pub cors_origins: Vec<String>,
    /// Downloads that the admin page started.
    pub downloads: Downloads,
    /// No new work is taken.
    pub draining: AtomicBool,
    /// Requests being answered.
    pub active: AtomicU64,
    /// Requests so far.
    pub requests: AtomicU64,
    /// Answers with an error so far.
    pub failures: AtomicU64,
    /// Streams that clients left before their end.
    pub abandoned: AtomicU64,
    /// When it began.
    pub started: Instant,
    ignored: Mutex<BTreeSet<String>>,
    serial: AtomicU64,
    salt: u64,
}

/// What requests may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a body.
    pub body: usize,
    /// Connections.
    pub connections: usize,
    /// For a head, and between pieces of a body.
    pub timeout: Duration,
    /// Between comments in a silent stream.
    pub keep_alive: Duration,
    /// For running requests at the end.
    pub drain: Duration,
}

/// The state as handlers get it.
pub type Shared = Arc<App>;

impl App {
    /// Opens the pool and reads the keys. Blocking.
    pub fn open(options: &Options) -> Result<Self, String> {
        let seconds = |name| options.number::<u64>(name).map(Duration::from_secs);
        let limits = Limits {
            body: options.number::<usize>("max-body-mb")?.saturating_mul(1 << 20),
            connections: options.number::<usize>("max-connections")?.clamp(1, 1 << 20),
            timeout: seconds("timeout")?.max(Duration::from_secs(1)),
            keep_alive: seconds("keep-alive")?.max(Duration::from_secs(1)),
            drain: seconds("drain")?,
        };
        let keys = Keys::read(options.path("api-key-file").as_deref(), std::env::var("OMLX_SERVER_API_KEY").ok())?;
        Ok(Self {
            pool: open_pool(options)?,
            keys,
            limits,
            allowed_hosts: options.list("allowed-hosts"),
            cors_origins: options.list("cors-origins"),
            downloads: Downloads::default(),
            draining: AtomicBool::new(false),
            active: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            started: Instant::now(),
            ignored: Mutex::default(),
            serial: AtomicU64::new(0),
            salt: std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0),
        })
    }

    /// A new id, such as "chatcmpl-0123456789abcdef".
    pub fn id(&self, prefix: &str) -> String {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        // A bijection of the serial number, so that ids differ within a process; the salt keeps processes apart.
        format!("{prefix}{:016x}", (serial ^ self.salt).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Starts a generation. A model that is not known is the default one.
    pub fn generate(&self, body: Map<String, Value>) -> Result<Request, ApiError> {
        self.start(body, Pool::generate)
    }

    /// Starts a request by one of the pool's functions.
    pub fn start(
        &self,
        body: Map<String, Value>,
        start: fn(&Pool, &str, RequestOptions) -> omlx_client::Result<Request>,
    ) -> Result<Request, ApiError> {
        let options = RequestOptions { lenient: true, started_event: true, ..RequestOptions::default() };
        self.with_default_model(body, |app, json| start(&app.pool, json, options)).map(|(_, request)| request)
    }

    /// Calls with the JSON of `body`, and if its model is not known, without it: the library then takes its default, or
    /// the only one of the kind. Returns the name of the model, too, if it was used.
    pub fn with_default_model<T>(
        &self,
        mut body: Map<String, Value>,
        call: impl Fn(&Self, &str) -> omlx_client::Result<T>,
    ) -> Result<(Option<String>, T), ApiError> {
        let named = body.get("model").and_then(Value::as_str).map(str::to_owned);
        match call(self, &text(&body)) {
            Ok(result) => Ok((named, result)),
            Err(error) if error.status == Status::NotFound && body.remove("model").is_some() => {
                // What it said about the name is more useful than that there is no default.
                call(self, &text(&body)).map(|result| (None, result)).map_err(|other| match other.status {
                    Status::NotFound | Status::InvalidRequest => ApiError::from(error),
                    _ => ApiError::from(other),
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Logs, once for each, the keys of a body that are not in `known`.
    pub fn note_ignored(&self, route: impl std::fmt::Display, body: &Map<String, Value>, known: &[&str]) {
        let unknown = body.keys().filter(|key| !known.contains(&key.as_str()));
        for key in unknown {
            let name: String = format!("{route} {key}").chars().take(100).collect();
            let mut ignored = self.ignored.lock().unwrap_or_else(PoisonError::into_inner);
            if ignored.len() < MOST_IGNORED && ignored.insert(name) {
                let key: String = key.chars().take(80).collect();
                log::info("ignored", &[("route", route.to_string().into()), ("key", key.into())]);
            }
        }
    }
}

/// The JSON of an object.
fn text(object: &Map<String, Value>) -> String {
    // Writing values to memory cannot fail.
    serde_json::to_string(object).unwrap_or_default()
}

/// Seconds since 1970.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Opens the pool that the options describe. Blocking.
pub fn open_pool(options: &Options) -> Result<Pool, String> {
    let device = match options.text("device") {
        "auto" => Device::Auto,
        "cpu" => Device::Cpu,
        "gpu" => Device::Gpu,
        other => return Err(format!("--device: {other:?} is none of auto, cpu, gpu")),
    };
    let precision = match options.text("precision") {
        "fast" => Precision::Fast,
        "exact" => Precision::Exact,
        other => return Err(format!("--precision: {other:?} is neither fast nor exact")),
    };
    let hub_cache = options.given("hub-cache").map(|folder| if folder == "default" { String::new() } else { folder });
    let options = PoolOptions {
        device,
        precision,
        hub_cache,
        models_dir: options.path("models"),
        default_model: options.given("default-model"),
        threads: options.number("threads")?,
        context_length: options.number("context-length")?,
        max_sequences: options.number("max-sequences")?,
        queue_length: options.number("queue-length")?,
        memory_limit: options.gibibytes("memory-gb")?,
        ttl_seconds: options.number("ttl")?,
        cache_dir: options.path("cache-dir"),
        cold_bytes: options.gibibytes("cache-gb")?,
        settings_file: options.path("model-settings"),
        ..PoolOptions::default()
    };
    Pool::open(&options).map_err(|error| error.to_string())
}
