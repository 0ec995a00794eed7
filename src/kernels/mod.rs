//! Kernels of our own inside MLX's graph, on the CPU.
//!
//! A [`CpuKernel`] becomes a graph node (`shim.cpp`) that MLX schedules like its own operations, on its own threads.
//! Kernels may fail and even panic: both end the evaluation with an error, and neither reaches a C++ frame.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex};

use mlx_rs::{Array, Dtype, Stream};

use crate::error::{Error, Result};
use crate::panics;
use crate::sync::lock;

/// Is in the message of an error that was a panic: a defect, not a condition.
pub const PANIC_MARK: &str = "in a kernel: ";

/// Reads evaluated inputs and fills an output. Runs on MLX's threads, at most once per graph node.
pub trait CpuKernel: Send + Sync {
    /// Computes `output` from `inputs`; every element of `output` must be written.
    fn run(&self, inputs: &[Input<'_>], output: Output<'_>) -> Result<()>;
}

/// An evaluated input; its strides, in elements, are arbitrary.
#[derive(Debug)]
pub struct Input<'a> {
    raw: &'a RawArray,
}

/// The output, contiguous in row-major order.
#[derive(Debug)]
pub struct Output<'a> {
    raw: &'a RawArray,
}

#[repr(C)]
#[derive(Debug)]
struct RawArray {
    data: *mut c_void,
    shape: *const i32,
    strides: *const i64,
    ndim: usize,
    /// Index into [`DTYPES`], or past its end.
    dtype: u32,
}

/// Element types that kernels read and write; their places are the shim's codes.
const DTYPES: [Dtype; 4] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16, Dtype::Uint32];

impl RawArray {
    fn shape(&self) -> &[i32] {
        if self.ndim == 0 {
            return &[];
        }
        // SAFETY: MLX keeps `ndim` dimensions alive while the kernel runs.
        unsafe { std::slice::from_raw_parts(self.shape, self.ndim) }
    }

    /// Number of elements, if they have the type `dtype`.
    fn len_of(&self, dtype: Dtype) -> Result<usize> {
        if DTYPES.get(self.dtype as usize) != Some(&dtype) {
            return Err(Error::internal(format!("a kernel took an array for {dtype:?} that is none")));
        }
        Ok(self.shape().iter().map(|&n| n as usize).product())
    }
}

impl<'a> Input<'a> {
    /// Dimensions.
    pub fn shape(&self) -> &'a [i32] {
        self.raw.shape()
    }

    /// The elements of an f32 array that is one row-major run of memory; make it contiguous before.
    pub fn as_f32(&self) -> Result<&'a [f32]> {
        let mut expected = 1i64;
        for (axis, &size) in self.shape().iter().enumerate().rev() {
            // SAFETY: MLX keeps as many strides as dimensions.
            let stride = unsafe { *self.raw.strides.add(axis) };
            if size > 1 && stride != expected {
                return Err(Error::internal("a kernel needs contiguous input"));
            }
            expected *= i64::from(size);
        }
        let len = self.raw.len_of(Dtype::Float32)?;
        if len == 0 {
            return Ok(&[]);
        }
        // SAFETY: contiguous, evaluated, of this type, and alive while the kernel runs.
        Ok(unsafe { std::slice::from_raw_parts(self.raw.data.cast(), len) })
    }
}

impl<'a> Output<'a> {
    /// Dimensions.
    pub fn shape(&self) -> &'a [i32] {
        self.raw.shape()
    }

    /// The elements of an f32 output, to be overwritten.
    pub fn into_f32(self) -> Result<&'a mut [f32]> {
        let len = self.raw.len_of(Dtype::Float32)?;
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: freshly allocated for this node, of this type, referred to by nobody else while the kernel runs.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.raw.data.cast(), len) })
    }
}

type Run = extern "C" fn(*const c_void, *const RawArray, usize, *const RawArray, *mut c_char, usize) -> i32;

unsafe extern "C" {
    /// Makes the node; takes the kernel in every case. NULL with a message in `message` on failure.
    fn omlx_kernel_array_new(
        kernel: *mut c_void,
        run: Run,
        drop: extern "C" fn(*mut c_void),
        inputs: *const *mut c_void,
        input_count: usize,
        shape: *const i32,
        ndim: usize,
        dtype: u32,
        stream: *const c_void,
        message: *mut c_char,
        message_size: usize,
    ) -> *mut c_void;
}

thread_local! {
    /// The first failure of the kernels that this thread put into graphs, until it is asked for.
    static FAILURE: Arc<Mutex<Option<String>>> = Arc::default();
}

/// A kernel in a graph, and where its failure is noted.
struct Task {
    kernel: Box<dyn CpuKernel>,
    failure: Arc<Mutex<Option<String>>>,
}

/// An error if a kernel that this thread put into a graph has failed since the last call.
///
/// To be called when results of the graph have arrived: MLX hands a failure only to those who are already waiting when
/// it happens, and gives everyone else the unfinished numbers.
pub fn check() -> Result<()> {
    match FAILURE.with(|failure| lock(failure).take()) {
        None => Ok(()),
        Some(text) => Err(Error::backend(text)),
    }
}

/// A graph node of `shape` and `dtype` that `kernel` computes from `inputs`.
pub fn node<K: CpuKernel + 'static>(kernel: K, inputs: &[&Array], shape: &[i32], dtype: Dtype) -> Result<Array> {
    let code = DTYPES.iter().position(|known| *known == dtype);
    let code = code.ok_or_else(|| Error::internal(format!("kernels have no output type {dtype:?}")))?;
    let task = Task { kernel: Box::new(kernel), failure: FAILURE.with(Arc::clone) };
    let stream = Stream::thread_local_or_default();
    let inputs: Vec<*mut c_void> = inputs.iter().map(|input| input.as_ptr().ctx).collect();
    let mut message = [0 as c_char; 512];
    // SAFETY: `drop_kernel` takes the box back. Inputs, shape, stream and message outlive the call.
    let context = unsafe {
        omlx_kernel_array_new(
            Box::into_raw(Box::new(task)).cast(),
            run_kernel,
            drop_kernel,
            inputs.as_ptr(),
            inputs.len(),
            shape.as_ptr(),
            shape.len(),
            code as u32,
            stream.as_ptr().ctx,
            message.as_mut_ptr(),
            message.len(),
        )
    };
    if context.is_null() {
        // SAFETY: the buffer was zeroed, and the last byte is never written.
        let text = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
        return Err(Error::backend(format!("MLX: {text}")));
    }
    // SAFETY: a fresh array that nobody else owns.
    Ok(unsafe { Array::from_ptr(mlx_sys::mlx_array { ctx: context }) })
}

extern "C" fn run_kernel(
    kernel: *const c_void,
    inputs: *const RawArray,
    input_count: usize,
    output: *const RawArray,
    message: *mut c_char,
    message_size: usize,
) -> i32 {
    let body = || {
        // SAFETY: the shim passes the box made in `node`, `input_count` inputs and one output, all alive for the call.
        let (task, inputs, output) = unsafe {
            let inputs = if input_count == 0 { &[] } else { std::slice::from_raw_parts(inputs, input_count) };
            (&*kernel.cast::<Task>(), inputs, &*output)
        };
        let inputs: Vec<_> = inputs.iter().map(|raw| Input { raw }).collect();
        task.kernel.run(&inputs, Output { raw: output }).map_err(|error| error.message().to_owned())
    };
    let outcome = panics::catch(body).unwrap_or_else(|panic| Err(format!("{PANIC_MARK}{}", panic.message())));
    let Err(text) = outcome else { return 0 };
    // SAFETY: as above.
    let task = unsafe { &*kernel.cast::<Task>() };
    lock(&task.failure).get_or_insert_with(|| text.clone());
    let bytes = text.as_bytes();
    let len = bytes.len().min(message_size.saturating_sub(1));
    // SAFETY: `message` has `message_size` zeroed bytes, and one is left for the final NUL.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), message, len) };
    1
}

extern "C" fn drop_kernel(kernel: *mut c_void) {
    // SAFETY: the pointer made in `node`, passed here exactly once.
    let kernel = unsafe { Box::from_raw(kernel.cast::<Task>()) };
    // A destructor that panics would unwind into C++.
    let _ = panics::catch(|| drop(kernel));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlx::{self, Device};

    /// Adds a number, then does something else; owns a witness of its life.
    struct AddThen<F> {
        addend: f32,
        then: F,
        _alive: Arc<()>,
    }

    impl<F: Fn() -> Result<()> + Send + Sync> CpuKernel for AddThen<F> {
        fn run(&self, inputs: &[Input<'_>], output: Output<'_>) -> Result<()> {
            for (out, value) in output.into_f32()?.iter_mut().zip(inputs[0].as_f32()?) {
                *out = value + self.addend;
            }
            (self.then)()
        }
    }

    /// Evaluates, and finds a failure whether or not MLX reports it.
    fn settle(array: &Array) -> Result<()> {
        let evaluated = array.eval();
        check()?;
        Ok(evaluated?)
    }

    /// `2 * (x + 1)` where the addition is a kernel that then does `after`; `alive` counts the kernel's owners.
    fn evaluate(after: impl Fn() -> Result<()> + Send + Sync + 'static, alive: &Arc<()>) -> Result<Vec<f32>> {
        mlx::init()?;
        mlx::on_device(Device::Cpu, || {
            let x = Array::from_slice(&[1f32, 2.0, 3.0], &[3]);
            let kernel = AddThen { addend: 1.0, then: after, _alive: Arc::clone(alive) };
            let sum = node(kernel, &[&x], &[3], Dtype::Float32)?;
            let doubled = sum.add(&sum)?;
            settle(&doubled)?;
            Ok(doubled.as_slice::<f32>().to_vec())
        })
    }

    #[test]
    fn a_kernel_is_part_of_the_graph_and_is_freed() {
        let alive = Arc::new(());
        assert_eq!(evaluate(|| Ok(()), &alive).unwrap(), [4.0, 6.0, 8.0]);
        assert_eq!(Arc::strong_count(&alive), 1, "the kernel outlived its graph");
    }

    #[test]
    fn errors_and_panics_reach_the_caller_and_the_next_graph_works() {
        let alive = Arc::new(());
        let error = evaluate(|| Err(Error::internal("no such luck")), &alive).unwrap_err();
        assert!(error.message().contains("no such luck"), "{error}");
        let panic = evaluate(|| panic!("on purpose"), &alive).unwrap_err();
        assert!(panic.message().contains(PANIC_MARK) && panic.message().contains("on purpose"), "{panic}");
        assert_eq!(evaluate(|| Ok(()), &alive).unwrap(), [4.0, 6.0, 8.0]);
        assert_eq!(Arc::strong_count(&alive), 1, "a failed kernel outlived its graph");
    }

    #[test]
    fn a_failure_is_known_to_those_who_come_late() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let x = Array::from_slice(&[1f32], &[1]);
            let kernel = AddThen { addend: 1.0, then: || panic!("unseen"), _alive: Arc::new(()) };
            let y = node(kernel, &[&x], &[1], Dtype::Float32)?;
            // Whether MLX reports the failure here, below, or not at all is a matter of time; `check` knows in any case.
            let _ = mlx_rs::transforms::async_eval([&y]);
            std::thread::sleep(std::time::Duration::from_millis(200));
            let _ = y.eval();
            assert!(check().is_err_and(|error| error.message().contains("unseen")));
            check()
        });
        outcome.expect("a failure is reported once");
    }

    #[test]
    fn a_wrong_type_is_refused() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let x = Array::from_slice(&[1f32, 2.0], &[2]).as_dtype(Dtype::Float16)?;
            let kernel = AddThen { addend: 0.0, then: || Ok(()), _alive: Arc::new(()) };
            let y = node(kernel, &[&x], &[2], Dtype::Float32)?;
            settle(&y)
        });
        assert!(outcome.unwrap_err().message().contains("Float32"));
    }

    #[test]
    fn a_strided_input_is_refused() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let x = Array::from_slice(&[1f32, 2.0, 3.0, 4.0], &[2, 2]).transpose()?;
            let kernel = AddThen { addend: 0.0, then: || Ok(()), _alive: Arc::new(()) };
            let y = node(kernel, &[&x], &[2, 2], Dtype::Float32)?;
            settle(&y)
        });
        assert!(outcome.unwrap_err().message().contains("contiguous"));
    }
}
