//! Pools.

use std::path::PathBuf;
use std::ptr::{NonNull, null_mut};

use crate::error::{Error, Result, Status, check};
use crate::ffi;
use crate::library::check_abi;
use crate::request::{Request, RequestOptions};
use crate::text::{OptionalText, take, take_tokens};

/// Where to compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The GPU if there is one.
    #[default]
    Auto = ffi::OMLX_DEVICE_AUTO as isize,
    /// The CPU.
    Cpu = ffi::OMLX_DEVICE_CPU as isize,
    /// The GPU.
    Gpu = ffi::OMLX_DEVICE_GPU as isize,
}

/// Number format of weights that are not quantised, of keys and values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dtype {
    /// The model's own.
    #[default]
    Auto = ffi::OMLX_DTYPE_AUTO as isize,
    /// 32-bit floats.
    F32 = ffi::OMLX_DTYPE_F32 as isize,
    /// 16-bit floats.
    F16 = ffi::OMLX_DTYPE_F16 as isize,
    /// 16-bit brain floats.
    Bf16 = ffi::OMLX_DTYPE_BF16 as isize,
}

/// How products with quantised weights are computed on the CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Activations of 8 bits.
    #[default]
    Fast = ffi::OMLX_PRECISION_FAST as isize,
    /// 32-bit floats in a fixed order.
    Exact = ffi::OMLX_PRECISION_EXACT as isize,
}

/// How keys and values are stored in files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CacheCodec {
    /// As they are.
    #[default]
    Exact = ffi::OMLX_CACHE_CODEC_EXACT as isize,
    /// 8 bits a number.
    Bits8 = ffi::OMLX_CACHE_CODEC_BITS8 as isize,
}

/// How metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metrics {
    /// A JSON object.
    Json = ffi::OMLX_METRICS_FORMAT_JSON as isize,
    /// Prometheus's text format.
    Prometheus = ffi::OMLX_METRICS_FORMAT_PROMETHEUS as isize,
}

/// Options of a pool, as `omlx_pool_options` describes them; 0 and `None` are defaults.
#[derive(Debug, Clone, Default)]
#[expect(missing_docs, reason = "the header describes the fields by these names")]
pub struct PoolOptions {
    pub device: Device,
    pub dtype: Dtype,
    pub context_length: u32,
    pub models_dir: Option<PathBuf>,
    pub default_model: Option<String>,
    pub prefill_chunk: u32,
    pub keep_environment: bool,
    pub threads: u32,
    pub precision: Precision,
    pub max_sequences: u32,
    pub queue_length: u32,
    pub cache_bytes: u64,
    pub block_tokens: u32,
    pub target_latency_ms: u32,
    pub cache_dir: Option<PathBuf>,
    pub cold_bytes: u64,
    pub cold_bytes_per_model: u64,
    pub hot_bytes: u64,
    pub cache_namespace: Option<String>,
    pub cache_write_through: bool,
    pub cache_codec: CacheCodec,
    pub memory_limit: u64,
    pub memory_percent: u32,
    pub ttl_seconds: u32,
    pub settings_file: Option<PathBuf>,
    pub hub_cache: Option<String>,
    pub hot_percent: u32,
}

/// An engine pool. Dropping it closes it without waiting; [`Pool::close`] waits.
#[derive(Debug)]
pub struct Pool {
    handle: NonNull<ffi::omlx_pool>,
}

// SAFETY: every C function may be called from any thread, several at once; the release needs `&mut self`.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// Opens a pool and lists its models. Blocking.
    pub fn open(options: &PoolOptions) -> Result<Self> {
        check_abi()?;
        let models_dir = OptionalText::path("models_dir", options.models_dir.as_deref())?;
        let default_model = OptionalText::new("default_model", options.default_model.as_deref())?;
        let cache_dir = OptionalText::path("cache_dir", options.cache_dir.as_deref())?;
        let cache_namespace = OptionalText::new("cache_namespace", options.cache_namespace.as_deref())?;
        let settings_file = OptionalText::path("settings_file", options.settings_file.as_deref())?;
        let hub_cache = OptionalText::new("hub_cache", options.hub_cache.as_deref())?;
        let options = ffi::omlx_pool_options {
            struct_size: size_of::<ffi::omlx_pool_options>() as u32,
            device: options.device as u32,
            dtype: options.dtype as u32,
            context_length: options.context_length,
            models_dir: models_dir.pointer(),
            default_model: default_model.pointer(),
            prefill_chunk: options.prefill_chunk,
            keep_environment: options.keep_environment.into(),
            threads: options.threads,
            precision: options.precision as u32,
            max_sequences: options.max_sequences,
            queue_length: options.queue_length,
            cache_bytes: options.cache_bytes,
            block_tokens: options.block_tokens,
            target_latency_ms: options.target_latency_ms,
            cache_dir: cache_dir.pointer(),
            cold_bytes: options.cold_bytes,
            cold_bytes_per_model: options.cold_bytes_per_model,
            hot_bytes: options.hot_bytes,
            cache_namespace: cache_namespace.pointer(),
            cache_write_through: options.cache_write_through.into(),
            cache_codec: options.cache_codec as u32,
            memory_limit: options.memory_limit,
            memory_percent: options.memory_percent,
            ttl_seconds: options.ttl_seconds,
            settings_file: settings_file.pointer(),
            hub_cache: hub_cache.pointer(),
            hot_percent: options.hot_percent,
            reserved: 0,
        };
        let mut pool = null_mut();
        // SAFETY: the options and their texts live for the call.
        check(|error| unsafe { ffi::omlx_pool_open(&options, &mut pool, error) })?;
        let handle = NonNull::new(pool).ok_or_else(|| Error::new(Status::Internal, "no pool came back"))?;
        Ok(Self { handle })
    }

    /// Ends all requests and downloads, unloads all models and waits for that. Blocking.
    pub fn close(&self) -> Result<()> {
        // SAFETY: the pool is alive.
        check(|error| unsafe { ffi::omlx_pool_close(self.pointer(), error) })
    }

    /// Counters and state.
    pub fn metrics(&self, format: Metrics) -> Result<String> {
        // SAFETY: the pool is alive.
        self.text(|pool, text, error| unsafe { ffi::omlx_pool_metrics(pool, format as u32, text, error) })
    }

    /// Memory and loaded models, a JSON object.
    pub fn status(&self) -> Result<String> {
        // SAFETY: the pool is alive.
        self.text(|pool, text, error| unsafe { ffi::omlx_pool_status(pool, text, error) })
    }

    /// Changes the memory limit, in bytes or in percent; both 0 is automatic.
    pub fn set_memory_limit(&self, bytes: u64, percent: u32) -> Result<()> {
        // SAFETY: the pool is alive.
        check(|error| unsafe { ffi::omlx_pool_set_memory_limit(self.pointer(), bytes, percent, error) })
    }

    /// Starts a generation.
    pub fn generate(&self, json: &str, options: RequestOptions) -> Result<Request> {
        // SAFETY: the pool is alive.
        unsafe { Request::start(ffi::omlx_generate, self.pointer(), json, options) }
    }

    /// Starts to compute vectors of texts.
    pub fn embed(&self, json: &str, options: RequestOptions) -> Result<Request> {
        // SAFETY: the pool is alive.
        unsafe { Request::start(ffi::omlx_embed, self.pointer(), json, options) }
    }

    /// Starts to compute scores of documents.
    pub fn rerank(&self, json: &str, options: RequestOptions) -> Result<Request> {
        // SAFETY: the pool is alive.
        unsafe { Request::start(ffi::omlx_rerank, self.pointer(), json, options) }
    }

    /// Token ids of a text. Blocking while the tokenizer is read.
    pub fn tokenize(&self, model: Option<&str>, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let model = OptionalText::new("model", model)?;
        let (data, len, special) = (text.as_ptr().cast(), text.len(), add_special_tokens.into());
        let mut tokens = null_mut();
        // SAFETY: the pool, the texts and the output live for the call.
        check(|error| unsafe {
            ffi::omlx_tokenize(self.pointer(), model.pointer(), data, len, special, &mut tokens, error)
        })?;
        // SAFETY: given to us.
        Ok(unsafe { take_tokens(tokens) })
    }

    /// Text of token ids. Blocking while the tokenizer is read.
    pub fn detokenize(&self, model: Option<&str>, tokens: &[u32]) -> Result<String> {
        let model = OptionalText::new("model", model)?;
        let (data, count) = (tokens.as_ptr(), tokens.len());
        // SAFETY: the pool, the model's name and the tokens live for the call.
        self.text(|pool, text, error| unsafe { ffi::omlx_detokenize(pool, model.pointer(), data, count, text, error) })
    }

    /// The prompt that a chat template makes of a request; with `lenient` keys that the library does not know are ignored.
    /// Blocking while the tokenizer is read.
    pub fn render_template(&self, json: &str, lenient: bool) -> Result<String> {
        let (data, len, lenient) = (json.as_ptr().cast(), json.len(), lenient.into());
        // SAFETY: the pool and the JSON live for the call.
        self.text(|pool, text, error| unsafe { ffi::omlx_render_template(pool, data, len, lenient, text, error) })
    }

    pub(crate) fn pointer(&self) -> *mut ffi::omlx_pool {
        self.handle.as_ptr()
    }

    /// Runs a function that returns a text.
    pub(crate) fn text(
        &self,
        call: impl FnOnce(*mut ffi::omlx_pool, *mut *mut ffi::omlx_string, *mut *mut ffi::omlx_error) -> ffi::omlx_status,
    ) -> Result<String> {
        let mut text = null_mut();
        check(|error| call(self.pointer(), &mut text, error))?;
        // SAFETY: given to us.
        Ok(unsafe { take(text) })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: our reference, given back once.
        unsafe { ffi::omlx_pool_release(self.pointer()) };
    }
}
