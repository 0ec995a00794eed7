//! Kernels of our own inside MLX's graph, on the CPU.
//!
//! A [`CpuKernel`] becomes a graph node (`shim.cpp`) that MLX schedules like its own operations, on its own threads.
//! Kernels may fail and even panic: both end the evaluation with an error, and neither reaches a C++ frame.

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mlx_rs::{Array, Dtype, Stream};

use crate::error::{Error, Result};

/// Starts the message of an error that was a panic: a defect, not a condition.
pub const PANIC_PREFIX: &str = "kernel panic: ";

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
}

impl RawArray {
    fn shape(&self) -> &[i32] {
        if self.ndim == 0 {
            return &[];
        }
        // SAFETY: MLX keeps `ndim` dimensions alive while the kernel runs.
        unsafe { std::slice::from_raw_parts(self.shape, self.ndim) }
    }

    fn len(&self) -> usize {
        self.shape().iter().map(|&n| n as usize).product()
    }
}

impl<'a> Input<'a> {
    /// Dimensions.
    pub fn shape(&self) -> &'a [i32] {
        self.raw.shape()
    }

    /// The elements as f32 if the array is one row-major run of memory, else an error: make it contiguous before.
    ///
    /// The node's maker vouches for the type.
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
        // SAFETY: contiguous, evaluated, and alive while the kernel runs.
        Ok(unsafe { std::slice::from_raw_parts(self.raw.data.cast(), self.raw.len()) })
    }
}

impl<'a> Output<'a> {
    /// Dimensions.
    pub fn shape(&self) -> &'a [i32] {
        self.raw.shape()
    }

    /// The elements as f32, to be overwritten. The node's maker vouches for the type.
    pub fn into_f32(self) -> &'a mut [f32] {
        // SAFETY: freshly allocated for this node, referred to by nobody else while the kernel runs.
        unsafe { std::slice::from_raw_parts_mut(self.raw.data.cast(), self.raw.len()) }
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

/// A graph node of `shape` and `dtype` that `kernel` computes from `inputs`.
pub fn node<K: CpuKernel + 'static>(kernel: K, inputs: &[&Array], shape: &[i32], dtype: Dtype) -> Result<Array> {
    let code = match dtype {
        Dtype::Float32 => 0,
        Dtype::Float16 => 1,
        Dtype::Bfloat16 => 2,
        Dtype::Uint32 => 3,
        other => return Err(Error::internal(format!("kernels have no output type {other:?}"))),
    };
    let kernel: Box<dyn CpuKernel> = Box::new(kernel);
    let stream = Stream::thread_local_or_default();
    let inputs: Vec<*mut c_void> = inputs.iter().map(|input| input.as_ptr().ctx).collect();
    let mut message = [0 as c_char; 512];
    // SAFETY: a fat pointer does not fit into a C pointer, so the box is boxed; `drop_kernel` undoes both. Inputs,
    // shape, stream and message outlive the call.
    let context = unsafe {
        omlx_kernel_array_new(
            Box::into_raw(Box::new(kernel)).cast(),
            run_kernel,
            drop_kernel,
            inputs.as_ptr(),
            inputs.len(),
            shape.as_ptr(),
            shape.len(),
            code,
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
        let (kernel, inputs, output) = unsafe {
            let inputs = if input_count == 0 { &[] } else { std::slice::from_raw_parts(inputs, input_count) };
            (&*kernel.cast::<Box<dyn CpuKernel>>(), inputs, &*output)
        };
        let inputs: Vec<_> = inputs.iter().map(|raw| Input { raw }).collect();
        kernel.run(&inputs, Output { raw: output }).map_err(|error| error.message().to_owned())
    };
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown");
        Err(format!("{PANIC_PREFIX}{text}"))
    });
    let Err(text) = outcome else { return 0 };
    let bytes = text.as_bytes();
    let len = bytes.len().min(message_size.saturating_sub(1));
    // SAFETY: `message` has `message_size` zeroed bytes, and one is left for the final NUL.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), message, len) };
    1
}

extern "C" fn drop_kernel(kernel: *mut c_void) {
    // SAFETY: the pointer made in `node`, passed here exactly once.
    let kernel = unsafe { Box::from_raw(kernel.cast::<Box<dyn CpuKernel>>()) };
    // A destructor that panics would unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(kernel)));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
            for (out, value) in output.into_f32().iter_mut().zip(inputs[0].as_f32()?) {
                *out = value + self.addend;
            }
            (self.then)()
        }
    }

    /// `2 * (x + 1)` where the addition is a kernel that then does `after`; `alive` counts the kernel's owners.
    fn evaluate(after: impl Fn() -> Result<()> + Send + Sync + 'static, alive: &Arc<()>) -> Result<Vec<f32>> {
        mlx::init()?;
        mlx::on_device(Device::Cpu, || {
            let x = Array::from_slice(&[1f32, 2.0, 3.0], &[3]);
            let kernel = AddThen { addend: 1.0, then: after, _alive: Arc::clone(alive) };
            let sum = node(kernel, &[&x], &[3], Dtype::Float32)?;
            let doubled = sum.add(&sum)?;
            doubled.eval()?;
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
        assert!(panic.message().contains("kernel panic: on purpose"), "{panic}");
        assert_eq!(evaluate(|| Ok(()), &alive).unwrap(), [4.0, 6.0, 8.0]);
        assert_eq!(Arc::strong_count(&alive), 1, "a failed kernel outlived its graph");
    }

    #[test]
    fn a_strided_input_is_refused() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let x = Array::from_slice(&[1f32, 2.0, 3.0, 4.0], &[2, 2]).transpose()?;
            let kernel = AddThen { addend: 0.0, then: || Ok(()), _alive: Arc::new(()) };
            let y = node(kernel, &[&x], &[2, 2], Dtype::Float32)?;
            Ok(y.eval()?)
        });
        assert!(outcome.unwrap_err().message().contains("contiguous"));
    }
}
