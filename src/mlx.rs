//! The seam to MLX: the few calls that `mlx-rs` does not offer, start-up checks, and error conversion.
//!
//! Everything else uses `mlx-rs` directly. MLX's default error handler ends the process, so [`init`] must run
//! before any other MLX call; the engine worker and the pool call it first.

mod buffer;
mod matrix;

pub use buffer::{HostBuffer, populate, prefer_huge_pages};
pub use matrix::{Matrix, QuantFormat, QuantMode, QuantizedMatrix};

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, Once, OnceLock};
use std::time::Duration;

use mlx_rs::{Array, Dtype, Stream};

use crate::error::{Error, Result};
use crate::panics;
use crate::sync::lock;

/// The only MLX version whose binary interface this library was built against.
pub const VERSION: &CStr = c"0.32.2";

impl From<mlx_rs::error::Exception> for Error {
    fn from(e: mlx_rs::error::Exception) -> Self {
        Error::backend(format!("MLX: {}", e.what()))
    }
}

/// Where an engine computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The CPU backend.
    Cpu,
    /// Metal or CUDA, whichever the loaded MLX offers.
    Gpu,
}

impl Device {
    fn mlx(self) -> mlx_rs::Device {
        match self {
            Device::Cpu => mlx_rs::Device::cpu(),
            Device::Gpu => mlx_rs::Device::gpu(),
        }
    }

    /// Whether its memory is another one than the host's.
    pub fn has_own_memory(self) -> bool {
        self == Device::Gpu && !cfg!(target_os = "macos")
    }

    /// Lower-case name for events and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Gpu => "gpu",
        }
    }
}

thread_local! {
    /// Message of the last failed MLX call on this thread.
    static LAST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

unsafe extern "C" {
    /// mlx-rs's own handler, which feeds the errors of its wrappers.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

/// Keeps the message for [`checked`] and passes it on to mlx-rs.
extern "C" fn error_handler(message: *const c_char, data: *mut c_void) {
    // SAFETY: MLX passes a NUL-terminated string that lives for the call; the callee copies it.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    LAST_ERROR.with(|slot| *slot.borrow_mut() = Some(text));
    // SAFETY: the same string, within the same call.
    unsafe { default_mlx_error_handler(message, data) };
}

/// Installs the error handler and checks the version of the `libmlx` that was loaded. Cheap after the first call.
///
/// A library of another version is reported here at the latest; usually the dynamic linker refuses it earlier.
pub fn init() -> Result<()> {
    static STATE: Mutex<Option<Result<()>>> = Mutex::new(None);
    lock(&STATE).get_or_insert_with(init_once).clone()
}

fn init_once() -> Result<()> {
    // mlx-rs registers its handler on its first guarded call; ours must come after it to stay in place.
    mlx_rs::memory::active_memory()?;
    // SAFETY: a plain function pointer without data; it stays valid for the life of the process.
    unsafe { mlx_sys::mlx_set_error_handler(Some(error_handler), std::ptr::null_mut(), None) };
    let found = version()?;
    let needed = VERSION.to_string_lossy();
    if found != needed {
        return Err(Error::backend(format!(
            "the loaded libmlx is version {found}, but this library needs exactly {needed}; install that version or \
             remove the other one from the library path"
        )));
    }
    // Above its limit MLX makes every evaluation wait for all others, and two that wait for each other wait for ever. The
    // ledger decides what fits; a GPU's limit stays, because its allocator frees what it keeps when it gets there.
    if !gpu_available() {
        mlx_rs::memory::set_memory_limit(usize::MAX)?;
    }
    Ok(())
}

/// The version of the loaded `libmlx`.
pub fn version() -> Result<String> {
    // SAFETY: the string handle is created, filled, read and freed here.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        let code = mlx_sys::mlx_version(&mut text);
        let result =
            checked(code).map(|()| CStr::from_ptr(mlx_sys::mlx_string_data(text)).to_string_lossy().into_owned());
        mlx_sys::mlx_string_free(text);
        result
    }
}

/// Has `hook` called when the process exits normally, before the destructors of static objects that exist by now.
pub fn at_exit(hook: extern "C" fn()) {
    // SAFETY: a plain function that lives as long as the library; it may not unwind, which `extern "C"` enforces.
    if unsafe { libc::atexit(hook) } != 0 {
        tracing::warn!("no room for an exit hook: close pools before the process exits");
    }
}

/// Ends what CUDA streams keep, once nobody uses them any more, in the last moments of a process.
///
/// The destructor of MLX's streams leaves a thread behind that destroys CUDA handles; where that is while CUDA ends itself, it
/// throws, and the process aborts. Nothing tells when the thread has ended: it needs microseconds.
pub fn end_streams() {
    static ENDED: Once = Once::new();
    ENDED.call_once(|| {
        if cuda_available() {
            // SAFETY: without arguments; it clears the streams of this thread and those made for any thread.
            let code = unsafe { mlx_sys::mlx_clear_streams() };
            if let Err(error) = checked(code) {
                tracing::debug!(%error, "MLX's streams");
            }
            std::thread::sleep(STREAMS_END);
        }
    });
}

/// See [`end_streams`]. For processes in which no engine has ever computed: the hook of engines comes before this one.
extern "C" fn end_streams_at_exit() {
    // A panic may not leave an exit hook.
    let _ = panics::catch(end_streams);
}

/// See [`end_streams`].
const STREAMS_END: Duration = Duration::from_millis(20);

/// Bytes that MLX would use of its device's memory at most.
pub fn memory_limit() -> u64 {
    mlx_rs::memory::memory_limit().map_or(u64::MAX, |bytes| bytes as u64)
}

/// Bytes that MLX has of its device's memory.
pub fn used_memory() -> u64 {
    let active = mlx_rs::memory::active_memory().unwrap_or(0);
    (active + mlx_rs::memory::cache_memory().unwrap_or(0)) as u64
}

/// MLX keeps so many bytes of freed buffers for reuse.
pub fn set_cache_limit(bytes: u64) {
    if let Err(error) = mlx_rs::memory::set_cache_limit(usize::try_from(bytes).unwrap_or(usize::MAX)) {
        tracing::warn!(%error, "the limit of MLX's buffers could not be set");
    }
}

/// Bytes of results that operations on the CPU may be ahead by.
const AHEAD: usize = 16 << 20;

/// Keeps what is evaluated next from running far ahead of itself: for CPUs, and for the whole process.
///
/// MLX gives all operations that it has handed to its threads the memory of their results, some fifty of them, unless its
/// limit is reached: then it waits for those that run. With few in memory at a time their buffers are used again, while they are in
/// the processor's caches, instead of being returned to the system and cleared by it for every layer.
pub fn limit_ahead() {
    if gpu_available() {
        return;
    }
    let limit = mlx_rs::memory::active_memory().and_then(|used| mlx_rs::memory::set_memory_limit(used + AHEAD));
    if let Err(error) = limit {
        tracing::warn!(%error, "the limit of MLX's memory could not be set");
    }
}

/// Has the C library take blocks of this size and more from the system, and give them back when they are freed. By itself glibc
/// stops doing so for blocks of up to 32 MiB as soon as one has been freed, and weights are such blocks.
pub const LARGE_BLOCK: usize = 4 << 20;

/// See [`LARGE_BLOCK`]; for the whole process.
pub fn map_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time from any thread.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BLOCK as i32);
    }
}

/// Keeps so many bytes of a Mac's GPU memory from being moved out; elsewhere nothing happens.
pub fn set_wired_limit(bytes: u64) {
    if cfg!(target_os = "macos") && gpu_available() {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if let Err(error) = mlx_rs::memory::set_wired_limit(bytes) {
            tracing::warn!(%error, "the wired limit could not be set");
        }
    }
}

/// What macOS says of its memory: 1 is normal, 2 a warning, 4 critical. 0 elsewhere.
pub fn memory_pressure_level() -> i32 {
    #[cfg(target_os = "macos")]
    {
        let (mut level, mut size) = (0i32, size_of::<i32>());
        // SAFETY: a NUL-terminated name, and room for the number whose size is passed.
        let code = unsafe {
            let name = c"kern.memorystatus_vm_pressure_level".as_ptr();
            libc::sysctlbyname(name, (&raw mut level).cast(), &mut size, std::ptr::null_mut(), 0)
        };
        if code == 0 { level } else { 0 }
    }
    #[cfg(not(target_os = "macos"))]
    0
}

/// Gives memory that is free back to the system: what MLX keeps for reuse, and what the C library does.
///
/// glibc keeps large blocks, too, once a few have been freed, and MLX allocates on the CPU with it.
pub fn return_free_memory() {
    if let Err(error) = mlx_rs::memory::clear_cache() {
        tracing::warn!(%error, "MLX's buffer cache could not be cleared");
    }
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes of memory that the machine has.
pub fn physical_memory() -> usize {
    // SAFETY: plain numbers in and out.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    pages.max(0) as usize * size.max(0) as usize
}

/// Whether the loaded MLX has a usable GPU. Asked once: every step wants to know.
pub fn gpu_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let mut available = false;
        // SAFETY: the handle is created and freed here, the flag outlives the call.
        unsafe {
            let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
            let code = mlx_sys::mlx_device_is_available(&mut available, device);
            mlx_sys::mlx_device_free(device);
            code == 0 && available
        }
    })
}

/// Whether the loaded MLX computes with CUDA.
fn cuda_available() -> bool {
    let mut available = false;
    // SAFETY: the flag outlives the call.
    unsafe { mlx_sys::mlx_cuda_is_available(&mut available) == 0 && available }
}

/// What MLX's CUDA backend reads from the environment, and better values than its defaults for many small steps:
/// its caches of graphs and attention plans count all misses of the process and fail after twice their size (shapes in
/// buckets keep them few, but a server runs for months), and larger buffers halve the host's share of a small step.
const CUDA_ENVIRONMENT: [(&str, &str); 5] = [
    ("MLX_CUDA_GRAPH_CACHE_SIZE", "4096"),
    ("MLX_CUDA_SDPA_CACHE_SIZE", "2048"),
    ("MLX_ENABLE_CACHE_THRASHING_CHECK", "0"),
    ("MLX_MAX_OPS_PER_BUFFER", "100"),
    ("MLX_MAX_MB_PER_BUFFER", "100000"),
];

/// Sets the variables of [`CUDA_ENVIRONMENT`] that are not set, once per process and on CUDA only.
pub fn set_environment() {
    static SET: std::sync::Once = std::sync::Once::new();
    SET.call_once(|| {
        if !cuda_available() {
            return;
        }
        for (name, value) in CUDA_ENVIRONMENT {
            if std::env::var_os(name).is_none() {
                // SAFETY: a race with a host thread that reads the environment through C is possible, which is why
                // the header lists the variables and has an option against it.
                unsafe { std::env::set_var(name, value) };
            }
        }
    });
}

/// Runs `body` with its MLX operations on `device`. No array may leave `body` unevaluated.
///
/// MLX gives every stream of the CPU a thread of its own, which it never ends, and makes default streams for every
/// thread that evaluates. So this lends the thread streams of the process for both devices, and takes them back.
pub fn on_device<T>(device: Device, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let lent = (
        LentStream::default_for(Device::Cpu)?,
        if gpu_available() { Some(LentStream::default_for(Device::Gpu)?) } else { None },
    );
    let stream = Stream::try_default_on_device(&device.mlx())?;
    let result = mlx_rs::with_stream(&stream, body);
    // Waits for what is left on them: only then are the last arrays gone, and their memory can be returned.
    drop(lent);
    return_free_memory();
    result
}

/// Streams that no thread uses at the moment. MLX's streams for any thread are not synchronised: one thread at a time.
static IDLE_STREAMS: Mutex<Vec<(Device, RawStream)>> = Mutex::new(Vec::new());

/// A handle of MLX's to a stream; never freed, because the stream never is.
#[derive(Clone, Copy)]
struct RawStream(mlx_sys::mlx_stream);

// SAFETY: it refers to a stream that was made for use by any thread, one at a time.
unsafe impl Send for RawStream {}

/// A stream that is the default of the thread for its device until it is dropped.
struct LentStream {
    device: Device,
    stream: RawStream,
}

impl LentStream {
    fn default_for(device: Device) -> Result<Self> {
        let mut idle = lock(&IDLE_STREAMS);
        let found = idle.iter().position(|(d, _)| *d == device).map(|at| idle.swap_remove(at).1);
        drop(idle);
        let stream = match found {
            Some(stream) => stream,
            None => RawStream::new(device)?,
        };
        let lent = Self { device, stream };
        // SAFETY: a live stream that no other thread uses.
        checked(unsafe { mlx_sys::mlx_set_default_stream(stream.0) })?;
        Ok(lent)
    }
}

impl Drop for LentStream {
    fn drop(&mut self) {
        // What was launched and not read, such as a step after the last stop, must not meet the next user.
        // SAFETY: a live stream.
        let code = unsafe { mlx_sys::mlx_synchronize(self.stream.0) };
        if let Err(error) = checked(code) {
            tracing::debug!(%error, "work left on a stream failed");
        }
        lock(&IDLE_STREAMS).push((self.device, self.stream));
    }
}

/// A second stream of the CPU's, for what is to be computed beside what the thread computes on its own.
pub struct SideStream {
    stream: Stream,
    // Dropped behind the handle: waits for what is left.
    _lent: LentStream,
}

impl SideStream {
    /// One that no other thread uses.
    pub fn new() -> Result<Self> {
        let cpu = Device::Cpu.mlx();
        let own = Stream::try_default_on_device(&cpu)?;
        let lent = LentStream::default_for(Device::Cpu)?;
        let stream = Stream::try_default_on_device(&cpu)?;
        // SAFETY: the live stream that was the default before.
        checked(unsafe { mlx_sys::mlx_set_default_stream(own.as_ptr()) })?;
        Ok(Self { stream, _lent: lent })
    }

    /// Has what `body` describes be computed here.
    pub fn run<T>(&self, body: impl FnOnce() -> T) -> T {
        mlx_rs::with_stream(&self.stream, body)
    }
}

impl RawStream {
    fn new(device: Device) -> Result<Self> {
        let kind = match device {
            Device::Cpu => mlx_sys::mlx_device_type__MLX_CPU,
            Device::Gpu => mlx_sys::mlx_device_type__MLX_GPU,
        };
        // SAFETY: the device handle is created and freed here.
        let stream = unsafe {
            let device = mlx_sys::mlx_device_new_type(kind, 0);
            let stream = mlx_sys::mlx_stream_new_thread_unsafe(device);
            mlx_sys::mlx_device_free(device);
            stream
        };
        if stream.ctx.is_null() {
            return Err(checked(1).err().unwrap_or_else(|| Error::backend("MLX made no stream")));
        }
        static HOOK: Once = Once::new();
        if device == Device::Gpu {
            HOOK.call_once(|| at_exit(end_streams_at_exit));
        }
        Ok(Self(stream))
    }
}

pub(crate) fn checked(code: i32) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let message = LAST_ERROR.with(|slot| slot.borrow_mut().take());
    Err(Error::backend(format!("MLX: {}", message.as_deref().unwrap_or("unknown error"))))
}

/// Wraps an MLX C function that writes one array.
fn array_from(op: impl FnOnce(*mut mlx_sys::mlx_array, mlx_sys::mlx_stream) -> i32) -> Result<Array> {
    let stream = Stream::thread_local_or_default();
    // SAFETY: an empty handle; `op` fills it or leaves it empty, and `Array` frees it in both cases.
    unsafe {
        let mut raw = mlx_sys::mlx_array_new();
        let code = op(&mut raw, stream.as_ptr());
        let array = Array::from_ptr(raw);
        checked(code).map(|()| array)
    }
}

/// An absent optional array in MLX's C interface.
fn no_array() -> mlx_sys::mlx_array {
    mlx_sys::mlx_array { ctx: std::ptr::null_mut() }
}

/// First indices, end indices and strides of rows `start..stop` of the first axis, whole in the others.
fn row_range(array: &Array, start: usize, stop: usize) -> (Vec<i32>, Vec<i32>, Vec<i32>) {
    let mut from = vec![0; array.ndim()];
    let mut to = array.shape().to_vec();
    let steps = vec![1; array.ndim()];
    from[0] = start as i32;
    to[0] = stop as i32;
    (from, to, steps)
}

/// `target` with `update` written at `start..stop` of its first axis, in place when nothing else refers to `target`.
pub fn write_rows(target: Array, update: &Array, start: usize, stop: usize) -> Result<Array> {
    let (from, to, steps) = row_range(&target, start, stop);
    // SAFETY: the index arrays have one entry per axis and outlive the call.
    array_from(|out, stream| unsafe {
        mlx_sys::mlx_slice_update(
            out,
            target.as_ptr(),
            update.as_ptr(),
            from.as_ptr(),
            from.len(),
            to.as_ptr(),
            to.len(),
            steps.as_ptr(),
            steps.len(),
            stream,
        )
    })
}

/// Rows `start..stop` of the first axis; a view, nothing is copied.
pub fn rows(source: &Array, start: usize, stop: usize) -> Result<Array> {
    let (from, to, steps) = row_range(source, start, stop);
    // SAFETY: the index arrays have one entry per axis and outlive the call.
    array_from(|out, stream| unsafe {
        mlx_sys::mlx_slice(
            out,
            source.as_ptr(),
            from.as_ptr(),
            from.len(),
            to.as_ptr(),
            to.len(),
            steps.as_ptr(),
            steps.len(),
            stream,
        )
    })
}

/// `target` with `updates` written where `indices` say, for each of its first axes one array of places `[n]`; in place
/// when nothing else refers to `target`. `updates` is `[n, 1, ..]` with a 1 for every indexed axis. Places must exist.
pub fn scatter(target: Array, indices: &[&Array], updates: &Array) -> Result<Array> {
    let axes: Vec<i32> = (0..indices.len() as i32).collect();
    let handles: Vec<_> = indices.iter().map(|index| index.as_ptr()).collect();
    // SAFETY: all handles are alive for the call; MLX copies what it keeps, and the vector is freed here.
    array_from(|out, stream| unsafe {
        let places = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
        let code =
            mlx_sys::mlx_scatter(out, target.as_ptr(), places, updates.as_ptr(), axes.as_ptr(), axes.len(), stream);
        mlx_sys::mlx_vector_array_free(places);
        code
    })
}

/// The first `count` keys of `[sequences, heads, keys, width]`; a view, nothing is copied.
pub fn keys(source: &Array, count: usize) -> Result<Array> {
    slice_axis(source, 2, 0, count)
}

/// Indices `[n]` on the device. Of up to 8 bytes MLX's CUDA backend keeps in the host's memory, where every threadgroup
/// would read them through the bus: those are views of longer arrays.
pub fn indices(values: &[i32]) -> Result<Array> {
    const LEAST: usize = 4;
    if values.len() >= LEAST || values.is_empty() {
        return Ok(Array::from_slice(values, &[values.len() as i32]));
    }
    let mut padded = [0; LEAST];
    padded[..values.len()].copy_from_slice(values);
    rows(&Array::from_slice(&padded, &[LEAST as i32]), 0, values.len())
}

/// Heads `from..to` of `[T, heads, width]`; a view, nothing is copied.
pub fn heads(source: &Array, from: usize, to: usize) -> Result<Array> {
    slice_axis(source, 1, from, to)
}

/// Columns `from..to` of `[T, columns]`; a view, nothing is copied.
pub fn columns(source: &Array, from: usize, to: usize) -> Result<Array> {
    slice_axis(source, 1, from, to)
}

/// Places `start..stop` of an axis; a view, nothing is copied.
pub fn slice_axis(source: &Array, axis: usize, start: usize, stop: usize) -> Result<Array> {
    let (mut from, mut to) = (vec![0; source.ndim()], source.shape().to_vec());
    let steps = vec![1; source.ndim()];
    (from[axis], to[axis]) = (start as i32, stop as i32);
    // SAFETY: one entry for each axis, which outlive the call.
    array_from(|out, stream| unsafe {
        let n = from.len();
        mlx_sys::mlx_slice(out, source.as_ptr(), from.as_ptr(), n, to.as_ptr(), n, steps.as_ptr(), n, stream)
    })
}

/// `shape` uniformly random 32-bit words from `key`.
pub fn random_words(shape: &[i32], key: &Array) -> Result<Array> {
    // SAFETY: shape and key outlive the call.
    array_from(|out, stream| unsafe {
        mlx_sys::mlx_random_bits(out, shape.as_ptr(), shape.len(), 4, key.as_ptr(), stream)
    })
}

/// Bytes of one element.
pub fn item_size(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bool | Dtype::Uint8 | Dtype::Int8 => 1,
        Dtype::Uint16 | Dtype::Int16 | Dtype::Float16 | Dtype::Bfloat16 => 2,
        Dtype::Uint32 | Dtype::Int32 | Dtype::Float32 => 4,
        Dtype::Uint64 | Dtype::Int64 | Dtype::Float64 | Dtype::Complex64 => 8,
    }
}
