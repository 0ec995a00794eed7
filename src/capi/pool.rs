//! `omlx_pool`: an engine pool.

use std::ffi::c_char;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use mlx_rs::Dtype;

use super::{SizedOptions, borrow, boundary, bundled, callback, omlx_error, omlx_string, optional_string, output};
use crate::error::{Error, Result, Status};
use crate::kernels::Precision;
use crate::mlx::Device;
use crate::pool::{Codec, EnginePool, MemoryLimit, PoolOptions, TierOptions};
use crate::sync::lock;

/// Where to compute.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_device {
    /// The GPU if there is one, else the CPU.
    Auto = 0,
    /// The CPU.
    Cpu = 1,
    /// The GPU; `OMLX_E_UNSUPPORTED` if there is none.
    Gpu = 2,
}

/// Number format of weights that are not quantised, of keys and values, and on a GPU of activations.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_dtype {
    /// The model's own format.
    Auto = 0,
    /// 32-bit floats.
    F32 = 1,
    /// 16-bit floats.
    F16 = 2,
    /// 16-bit brain floats.
    Bf16 = 3,
}

/// How products with weights are computed on the CPU.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_precision {
    /// Quantised weights: activations are rounded to 8 bits per group of weights, about five times as fast. Others: sums
    /// of prompts are added in another order than those of answers.
    Fast = 0,
    /// 32-bit floats, added in a fixed order: results do not depend on what else is computed, on `prefill_chunk` or
    /// on `threads` (except for weights in mxfp8, which MLX computes).
    Exact = 1,
}

/// How keys and values are stored in files.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_cache_codec {
    /// As they are: what is read is what was computed, bit for bit.
    Exact = 0,
    /// 8 bits a number, with a scale for each head of each token: half the size of 16-bit numbers, and answers that may
    /// differ.
    Bits8 = 1,
}

/// Options of a pool. Start from `OMLX_POOL_OPTIONS_INIT`; zero means default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct omlx_pool_options {
    /// `sizeof(omlx_pool_options)`, set by `OMLX_POOL_OPTIONS_INIT`.
    pub struct_size: u32,
    /// An `omlx_device`.
    pub device: u32,
    /// An `omlx_dtype`.
    pub dtype: u32,
    /// Upper limit of every model's context in tokens; 0 is the model's own.
    pub context_length: u32,
    /// A folder of model folders (flat or `org/model`), or one model folder. NULL takes the models that come with the
    /// library, in `share/omlx/models` or `models` in or above the folder of its file; without them the pool is empty.
    pub models_dir: *const c_char,
    /// Id of the model for requests that name none. NULL takes the only usable model, if there is just one.
    pub default_model: *const c_char,
    /// Prompt tokens in one forward pass; 0 is 128 on the CPU and 2048 on a GPU. Smaller values hear a cancel sooner.
    pub prefill_chunk: u32,
    /// Not 0: leave the environment alone. Otherwise, where MLX computes with CUDA, the first pool of the process sets
    /// those of `MLX_CUDA_GRAPH_CACHE_SIZE` (4096), `MLX_CUDA_SDPA_CACHE_SIZE` (2048), `MLX_ENABLE_CACHE_THRASHING_CHECK`
    /// (0), `MLX_MAX_OPS_PER_BUFFER` (100) and `MLX_MAX_MB_PER_BUFFER` (100000) that are not set. No other thread may
    /// call getenv() or setenv() meanwhile. With glibc it also sets M_MMAP_THRESHOLD to 4 MiB, so that large blocks return
    /// to the system when they are freed. Whatever this is, where MLX has no GPU every step sets MLX's memory limit, that of
    /// the whole process, to 16 MiB above what is in use.
    pub keep_environment: u32,
    /// Threads that compute on the CPU, at most 1024, shared by all engines of the process; 0 is the number of physical
    /// cores.
    pub threads: u32,
    /// An `omlx_precision`; without effect on a GPU.
    pub precision: u32,
    /// Answers of a model that are computed together; 0 is 8. More wait in the queue.
    pub max_sequences: u32,
    /// Requests that may wait for a model; 0 is 64. One more is refused with `OMLX_E_BUSY`.
    pub queue_length: u32,
    /// Bytes that keys and values of each model may take; 0 is an eighth of the machine's memory. Taken as they are needed.
    /// What no answer uses any more stays for later requests that begin with the same tokens.
    pub cache_bytes: u64,
    /// Tokens of a block of the KV cache, a power of two from 8 to 256; 0 is 32.
    pub block_tokens: u32,
    /// What a step should take while answers are running, in milliseconds; 0 is 50. Prompts are computed in pieces that
    /// keep to it: less makes running answers smoother, and new ones begin later.
    pub target_latency_ms: u32,
    /// A folder for keys and values that outlive the process: a prompt that was computed once is read from there, after a
    /// restart too. One process at a time can use it. NULL keeps nothing. The files tell what was said: they are created
    /// for their owner alone (0600 in 0700), marked as not to be backed up, and not encrypted.
    pub cache_dir: *const c_char,
    /// Bytes that the files may take, of all models together; 0 is a tenth of what is free on that disk when the pool
    /// opens (their own included), 64 GiB at most. Nothing is written that leaves less than 2 GiB free.
    pub cold_bytes: u64,
    /// Bytes that the files of one model may take; 0 is no limit of its own.
    pub cold_bytes_per_model: u64,
    /// Bytes of the host's memory for keys and values that had to leave the pools; 0 is an eighth of the memory where
    /// pools lie in that of a GPU, and nothing where both are the same.
    pub hot_bytes: u64,
    /// Text that keeps users of one `cache_dir` apart: pools with different ones share nothing. NULL is none.
    pub cache_namespace: *const c_char,
    /// Not 0: keys and values are written as soon as they are computed, not only when they have to make room, when a
    /// model has nothing to do, or when it is unloaded.
    pub cache_write_through: u32,
    /// An `omlx_cache_codec`.
    pub cache_codec: u32,
    /// Bytes that weights, caches and work of all models may take together. What does not fit makes the least recently used
    /// models go, waits for those that are in use, or is refused with `OMLX_E_OUT_OF_MEMORY`. 0 is what the system (or its
    /// container) can spare: all but 8 GiB, at least half, and never more than is available; on a GPU with memory of its
    /// own, what MLX would use of that.
    pub memory_limit: u64,
    /// The same as a part of the memory, in percent; 0 is none. Not together with `memory_limit`.
    pub memory_percent: u32,
    /// Seconds after which a model without requests is unloaded; 0: when its memory is needed.
    pub ttl_seconds: u32,
    /// A file that keeps what `omlx_model_configure` settles. It need not exist. NULL forgets it when the pool is closed.
    pub settings_file: *const c_char,
    /// A folder in which tools of the Hugging Face hub keep models (`models--org--name/snapshots`): those are in the pool,
    /// too, as `org/name`, unless `models_dir` has that id. An empty text is the standard folder, which need not exist:
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else `~/.cache/huggingface/hub`. NULL looks into none. Nothing is written
    /// there.
    pub hub_cache: *const c_char,
    /// As `hot_bytes`, as a part of the memory of the host, or of its container, in percent; 0 is none. Not together with
    /// `hot_bytes`.
    pub hot_percent: u32,
    /// Must be 0.
    pub reserved: u32,
}

impl Default for omlx_pool_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            device: 0,
            dtype: 0,
            context_length: 0,
            models_dir: std::ptr::null(),
            default_model: std::ptr::null(),
            prefill_chunk: 0,
            keep_environment: 0,
            threads: 0,
            precision: 0,
            max_sequences: 0,
            queue_length: 0,
            cache_bytes: 0,
            block_tokens: 0,
            target_latency_ms: 0,
            cache_dir: std::ptr::null(),
            cold_bytes: 0,
            cold_bytes_per_model: 0,
            hot_bytes: 0,
            cache_namespace: std::ptr::null(),
            cache_write_through: 0,
            cache_codec: 0,
            memory_limit: 0,
            memory_percent: 0,
            ttl_seconds: 0,
            settings_file: std::ptr::null(),
            hub_cache: std::ptr::null(),
            hot_percent: 0,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), the size comes first, and every other field is an integer or a nullable pointer.
unsafe impl SizedOptions for omlx_pool_options {
    const MIN_SIZE: usize = std::mem::offset_of!(Self, threads);
}

impl omlx_pool_options {
    /// # Safety
    /// The strings are NULL or NUL-terminated and alive.
    unsafe fn to_pool_options(self) -> Result<PoolOptions> {
        let device = match self.device {
            0 => None,
            1 => Some(Device::Cpu),
            2 => Some(Device::Gpu),
            other => return Err(Error::invalid_argument(format!("device {other} does not exist"))),
        };
        let dtype = match self.dtype {
            0 => None,
            1 => Some(Dtype::Float32),
            2 => Some(Dtype::Float16),
            3 => Some(Dtype::Bfloat16),
            other => return Err(Error::invalid_argument(format!("dtype {other} does not exist"))),
        };
        let precision = match self.precision {
            0 => Precision::Fast,
            1 => Precision::Exact,
            other => return Err(Error::invalid_argument(format!("precision {other} does not exist"))),
        };
        let codec = match self.cache_codec {
            0 => Codec::Exact,
            1 => Codec::Bits8,
            other => return Err(Error::invalid_argument(format!("cache_codec {other} does not exist"))),
        };
        let nonzero = |n: u32| (n > 0).then_some(n as usize);
        let bytes = |n: u64| (n > 0).then_some(n);
        // SAFETY: passed on to the caller.
        let (models_dir, default_model, cache_dir, namespace, settings_file, hub_cache) = unsafe {
            (
                optional_string(self.models_dir, "models_dir")?,
                optional_string(self.default_model, "default_model")?,
                optional_string(self.cache_dir, "cache_dir")?,
                optional_string(self.cache_namespace, "cache_namespace")?,
                optional_string(self.settings_file, "settings_file")?,
                optional_string(self.hub_cache, "hub_cache")?,
            )
        };
        Ok(PoolOptions {
            models_dir: models_dir.map(PathBuf::from).or_else(bundled::models_dir),
            default_model: default_model.map(str::to_owned),
            device,
            dtype,
            context: nonzero(self.context_length),
            prefill_chunk: nonzero(self.prefill_chunk),
            overlap: None,
            keep_environment: self.keep_environment != 0,
            threads: nonzero(self.threads),
            precision,
            block_tokens: nonzero(self.block_tokens),
            cache_bytes: (self.cache_bytes > 0).then(|| usize::try_from(self.cache_bytes).unwrap_or(usize::MAX)),
            max_sequences: nonzero(self.max_sequences),
            queue_length: nonzero(self.queue_length),
            tiers: TierOptions {
                folder: cache_dir.map(PathBuf::from),
                cold_bytes: bytes(self.cold_bytes),
                cold_bytes_per_model: bytes(self.cold_bytes_per_model),
                codec,
                write_through: self.cache_write_through != 0,
                namespace: namespace.unwrap_or_default().as_bytes().to_vec(),
                hot_bytes: bytes(self.hot_bytes),
                hot_percent: (self.hot_percent > 0).then_some(self.hot_percent),
                always_restore: false,
            },
            memory: memory_limit(self.memory_limit, self.memory_percent)?,
            ttl: (self.ttl_seconds > 0).then(|| Duration::from_secs(self.ttl_seconds.into())),
            settings_file: settings_file.map(PathBuf::from),
            hub_cache: hub_cache.map(PathBuf::from),
            target_latency: (self.target_latency_ms > 0).then(|| Duration::from_millis(self.target_latency_ms.into())),
        })
    }
}

fn memory_limit(bytes: u64, percent: u32) -> Result<MemoryLimit> {
    match (bytes, percent) {
        (0, 0) => Ok(MemoryLimit::Auto),
        (bytes, 0) => Ok(MemoryLimit::Bytes(bytes)),
        (0, percent) => Ok(MemoryLimit::Percent(percent.into())),
        _ => Err(Error::invalid_argument("a memory limit in bytes and in percent")),
    }
}

/// An engine pool: models, and an engine for each one that is loaded. Reference-counted.
pub struct omlx_pool {
    pub(super) pool: EnginePool,
    /// The host named no folder of models: what is in the library's own is not ours to change.
    pub(super) bundled: bool,
    pub(super) dispatchers: Arc<Dispatchers>,
}

/// Counts the threads that run event callbacks, so that closing can wait for them.
#[derive(Default)]
pub(super) struct Dispatchers {
    running: Mutex<usize>,
    changed: Condvar,
}

/// One running dispatcher; leaves the count when dropped.
pub(super) struct Dispatcher(Arc<Dispatchers>);

impl Dispatchers {
    pub fn enter(self: &Arc<Self>) -> Dispatcher {
        *lock(&self.running) += 1;
        Dispatcher(Arc::clone(self))
    }

    fn wait(&self) {
        let mut running = lock(&self.running);
        while *running > 0 {
            running = self.changed.wait(running).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        *lock(&self.0.running) -= 1;
        self.0.changed.notify_all();
    }
}

/// Opens a pool and lists its models, loading none. `options` may be NULL. Blocking while the folders are read.
///
/// Errors: `OMLX_E_NOT_FOUND` (no such folder), `OMLX_E_UNSUPPORTED` (no GPU), `OMLX_E_BACKEND` (MLX of another
/// version), `OMLX_E_BUSY` (another pool, of this process or of another one, uses the `cache_dir`), `OMLX_E_IO`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_open(
    options: *const omlx_pool_options,
    pool: *mut *mut omlx_pool,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        let pool = output(pool, "pool")?;
        // SAFETY: NULL or sized options with live strings, by the header's contract.
        let (options, bundled) = unsafe {
            let options = super::options(options, "options")?;
            (options.to_pool_options()?, options.models_dir.is_null())
        };
        let opened = omlx_pool { pool: EnginePool::open(options)?, bundled, dispatchers: Arc::default() };
        // SAFETY: checked above not to be NULL.
        unsafe { pool.write(Arc::into_raw(Arc::new(opened)).cast_mut()) };
        Ok(())
    })
}

/// How metrics are written.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum omlx_metrics_format {
    /// `{"models": {id: {name: number}}, "pool": {name: number}}`.
    Json = 0,
    /// Prometheus's text format, version 0.0.4.
    Prometheus = 1,
}

/// Counters and state of all loaded models: queue, steps, tokens, cache and its tiers; and of the pool: memory and tiers.
/// `format` is an `omlx_metrics_format`.
///
/// For supervisors: `"step_age_seconds"` of a model grows while one step is being computed, and is 0 while none is, whether
/// there are no requests or their readers are behind. One that only grows is a device, a kernel or a host's wake function that
/// does not return.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_metrics(
    pool: *mut omlx_pool,
    format: u32,
    text: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or a live handle, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        let metrics = match format {
            0 => pool.pool.metrics_json(),
            1 => pool.pool.metrics_prometheus(),
            other => return Err(Error::invalid_argument(format!("metrics format {other} does not exist"))),
        };
        omlx_string::write(metrics, text)
    })
}

/// The pool's memory and its models that are loaded, or about to be, as a JSON object:
///
///   "device"   "cpu" or "gpu"
///   "memory"   bytes: "limit", "used", "peak" (the most that was ever used), "waiting" (what models wait for), "owners"
///              (by model: "weights", "cache", "workspace", "hot"), "footprint" (of the process), "unaccounted" (what it has
///              beyond "used" and what it had when the pool was opened), "system_total" and "system_available"; and
///              "pressure", of the whole system: 0, 1 (caches shrink) or 2 (idle models go)
///   "models"   by id: "state" ("loading", "loaded" or "failed"; then "error"), "loaded_bytes" of "weight_bytes",
///              "requests" that have not ended, "idle_seconds", "pinned" and "ttl_seconds"
///   "leaving"  engines that end their last requests, or give their memory back
///
/// More keys may come.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_status(
    pool: *mut omlx_pool,
    status_json: *mut *mut omlx_string,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        output(status_json, "status_json")?;
        // SAFETY: NULL or a live handle, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        omlx_string::write(pool.pool.status().to_string(), status_json)
    })
}

/// Changes `memory_limit` or `memory_percent` of the pool's options while it is open; both 0 is automatic. What is beyond
/// the new limit goes as soon as no request uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_set_memory_limit(
    pool: *mut omlx_pool,
    bytes: u64,
    percent: u32,
    error: *mut *mut omlx_error,
) -> Status {
    boundary(error, || {
        // SAFETY: NULL or a live handle, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        pool.pool.set_memory_limit(memory_limit(bytes, percent)?)
    })
}

/// Ends all requests (their done events have `OMLX_E_CLOSED`) and downloads, unloads all models, and waits until the
/// engines' threads are gone and all callbacks have returned. Call it before the process exits: otherwise an exit hook
/// ends the engines, and the process waits for that, ten seconds at most. The handle stays valid, refuses further work
/// with `OMLX_E_CLOSED`, and must still be released. Blocking; in an event callback it may be called all the same, and
/// does not wait for callbacks then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_close(pool: *mut omlx_pool, error: *mut *mut omlx_error) -> Status {
    boundary(error, || {
        // SAFETY: NULL or a live handle, by the header's contract.
        let pool = unsafe { borrow(pool, "pool") }?;
        pool.pool.close();
        if !callback::in_callback() {
            pool.dispatchers.wait();
        }
        Ok(())
    })
}

/// Adds a reference; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_retain(pool: *mut omlx_pool) {
    // SAFETY: NULL or a live handle, by the header's contract.
    unsafe { super::retain(pool) };
}

/// Drops a reference; NULL is ignored. The last one closes the pool without waiting for its threads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_pool_release(pool: *mut omlx_pool) {
    // SAFETY: NULL or a reference that the host owns, by the header's contract.
    unsafe { super::release(pool) };
}
