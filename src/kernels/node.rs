//! Graph nodes that run code of ours.
//!
//! A [`CpuKernel`] becomes a graph node (`shim.cpp`) that MLX schedules like its own operations, on its own threads.
//! Kernels may fail and even panic: both end the evaluation with an error, and neither reaches a C++ frame.

use std::borrow::Cow;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex};

use mlx_rs::{Array, Dtype, Stream};

use super::cpu::floats::{Float, Floats, FloatsMut, SharedMut, bf16_to_f32, f16_to_f32};
use super::cpu::threads::{beside, is_beside};
use crate::error::{Error, Result};
use crate::panics;
use crate::sync::lock;

/// Is in the message of an error that was a panic: a defect, not a condition.
pub const PANIC_MARK: &str = "in a kernel: ";

/// Reads evaluated inputs and fills outputs. Runs on MLX's threads, at most once per graph node.
pub trait CpuKernel: Send + Sync {
    /// Computes the first of `outputs` from `inputs`: an element that is not written may be anything. The others are the
    /// arrays that the node writes to, which are not among `inputs`.
    fn run(&self, inputs: &[Input<'_>], outputs: Vec<Output<'_>>) -> Result<()>;
}

/// An evaluated input; its strides, in elements, are arbitrary.
#[derive(Debug)]
pub struct Input<'a> {
    raw: &'a RawArray,
}

/// What a kernel writes: one run of memory, in row-major order.
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
const DTYPES: [Dtype; 6] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16, Dtype::Uint32, Dtype::Int32, Dtype::Uint8];

impl RawArray {
    fn shape(&self) -> &[i32] {
        if self.ndim == 0 {
            return &[];
        }
        // SAFETY: MLX keeps `ndim` dimensions alive while the kernel runs.
        unsafe { std::slice::from_raw_parts(self.shape, self.ndim) }
    }

    fn dtype(&self) -> Option<Dtype> {
        DTYPES.get(self.dtype as usize).copied()
    }

    fn len(&self) -> usize {
        self.shape().iter().map(|&n| n as usize).product()
    }

    /// # Safety
    /// `T` is the element type, and the elements are one run of memory.
    unsafe fn elements<'a, T>(&self) -> &'a [T] {
        match self.len() {
            0 => &[],
            // SAFETY: the caller's promise; evaluated, and alive while the kernel runs.
            len => unsafe { std::slice::from_raw_parts(self.data.cast(), len) },
        }
    }

    /// # Safety
    /// As `elements`, and nobody else refers to the memory.
    unsafe fn elements_mut<'a, T>(&self) -> &'a mut [T] {
        match self.len() {
            0 => &mut [],
            // SAFETY: the caller's promise.
            len => unsafe { std::slice::from_raw_parts_mut(self.data.cast(), len) },
        }
    }
}

fn wrong_type(found: Option<Dtype>) -> Error {
    Error::internal(format!("a kernel does not take elements of type {found:?}"))
}

impl<'a> Input<'a> {
    /// Dimensions.
    pub fn shape(&self) -> &'a [i32] {
        self.raw.shape()
    }

    fn strides(&self) -> &'a [i64] {
        match self.raw.ndim {
            0 => &[],
            // SAFETY: MLX keeps as many strides as dimensions.
            ndim => unsafe { std::slice::from_raw_parts(self.raw.strides, ndim) },
        }
    }

    /// Whether the elements are one row-major run of memory.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1i64;
        for (&size, &stride) in self.shape().iter().zip(self.strides()).rev() {
            if size > 1 && stride != expected {
                return false;
            }
            expected *= i64::from(size);
        }
        true
    }

    fn contiguous(&self) -> Result<()> {
        if self.is_contiguous() { Ok(()) } else { Err(Error::internal("a kernel needs contiguous input")) }
    }

    /// The elements of a floating-point array that is one row-major run of memory; make it contiguous before.
    pub fn floats(&self) -> Result<Floats<'a>> {
        self.contiguous()?;
        // SAFETY: contiguous, and of the type that is asked for.
        unsafe {
            match self.raw.dtype() {
                Some(Dtype::Float32) => Ok(Floats::F32(self.raw.elements())),
                Some(Dtype::Float16) => Ok(Floats::F16(self.raw.elements())),
                Some(Dtype::Bfloat16) => Ok(Floats::Bf16(self.raw.elements())),
                other => Err(wrong_type(other)),
            }
        }
    }

    /// The elements of a floating-point array with any strides, as f32 in row-major order; copied if need be.
    pub fn to_f32(&self) -> Result<Cow<'a, [f32]>> {
        if self.is_contiguous() {
            return Ok(match self.floats()? {
                Floats::F32(x) => Cow::Borrowed(x),
                Floats::F16(x) => x.iter().map(|&x| f16_to_f32(x)).collect(),
                Floats::Bf16(x) => x.iter().map(|&x| bf16_to_f32(x)).collect(),
            });
        }
        let mut out = Vec::with_capacity(self.raw.len());
        match self.raw.dtype() {
            // SAFETY: the type that is asked for.
            Some(Dtype::Float32) => unsafe { self.gather::<f32>(&mut out, |x| x) },
            // SAFETY: as above.
            Some(Dtype::Float16) => unsafe { self.gather::<u16>(&mut out, f16_to_f32) },
            // SAFETY: as above.
            Some(Dtype::Bfloat16) => unsafe { self.gather::<u16>(&mut out, bf16_to_f32) },
            other => return Err(wrong_type(other)),
        }
        Ok(Cow::Owned(out))
    }

    /// All elements in row-major order, converted.
    ///
    /// # Safety
    /// `T` is the element type.
    unsafe fn gather<T: Copy>(&self, out: &mut Vec<f32>, convert: impl Fn(T) -> f32) {
        let (shape, strides) = (self.shape(), self.strides());
        if shape.contains(&0) {
            return;
        }
        // The inner axes that are one run of memory are copied at once.
        let (mut run, mut outer) = (1usize, shape.len());
        while outer > 0 && (shape[outer - 1] == 1 || strides[outer - 1] == run as i64) {
            run *= shape[outer - 1] as usize;
            outer -= 1;
        }
        let mut index = vec![0i32; outer];
        loop {
            let at: i64 = index.iter().zip(strides).map(|(&i, &stride)| i64::from(i) * stride).sum();
            // SAFETY: strides and shape describe the array's own memory.
            let elements = unsafe { std::slice::from_raw_parts(self.raw.data.cast::<T>().offset(at as isize), run) };
            out.extend(elements.iter().map(|&x| convert(x)));
            let Some(axis) = (0..outer).rev().find(|&axis| index[axis] + 1 < shape[axis]) else { return };
            index[axis] += 1;
            index[axis + 1..].fill(0);
        }
    }

    /// The elements of a contiguous u32 array.
    pub fn words(&self) -> Result<&'a [u32]> {
        self.contiguous()?;
        match self.raw.dtype() {
            // SAFETY: contiguous, and of this type.
            Some(Dtype::Uint32) => Ok(unsafe { self.raw.elements() }),
            other => Err(wrong_type(other)),
        }
    }

    /// The elements of a contiguous i32 array.
    pub fn integers(&self) -> Result<&'a [i32]> {
        self.contiguous()?;
        match self.raw.dtype() {
            // SAFETY: contiguous, and of this type.
            Some(Dtype::Int32) => Ok(unsafe { self.raw.elements() }),
            other => Err(wrong_type(other)),
        }
    }

    /// The bytes of a contiguous u8 or u32 array.
    pub fn bytes(&self) -> Result<&'a [u8]> {
        self.contiguous()?;
        let item = match self.raw.dtype() {
            Some(Dtype::Uint8) => 1,
            Some(Dtype::Uint32) => 4,
            other => return Err(wrong_type(other)),
        };
        match self.raw.len() * item {
            0 => Ok(&[]),
            // SAFETY: contiguous, and any bytes are bytes.
            len => Ok(unsafe { std::slice::from_raw_parts(self.raw.data.cast(), len) }),
        }
    }
}

impl<'a> Output<'a> {
    /// Dimensions.
    pub fn shape(&self) -> &'a [i32] {
        self.raw.shape()
    }

    /// The elements of a floating-point output, to be written.
    pub fn into_floats(self) -> Result<FloatsMut<'a>> {
        // SAFETY: freshly allocated for this node, or one of its written inputs, which nobody else touches while the
        // kernel runs (see `writing_node`); of the type that is asked for.
        unsafe {
            match self.raw.dtype() {
                Some(Dtype::Float32) => Ok(FloatsMut::F32(self.raw.elements_mut())),
                Some(Dtype::Float16) => Ok(FloatsMut::F16(self.raw.elements_mut())),
                Some(Dtype::Bfloat16) => Ok(FloatsMut::Bf16(self.raw.elements_mut())),
                other => Err(wrong_type(other)),
            }
        }
    }

    /// The elements of a floating-point array that is written in place, some by this kernel and others by those that run at the
    /// same time.
    pub fn shared(&self) -> Result<SharedMut> {
        let float = match self.raw.dtype() {
            Some(Dtype::Float32) => Float::F32,
            Some(Dtype::Float16) => Float::F16,
            Some(Dtype::Bfloat16) => Float::Bf16,
            other => return Err(wrong_type(other)),
        };
        // SAFETY: of this type and length, and alive while the kernel runs.
        Ok(unsafe { SharedMut::from_raw(float, self.raw.data.cast(), self.raw.len()) })
    }

    /// The elements of a u32 output, to be written.
    pub fn into_words(self) -> Result<&'a mut [u32]> {
        match self.raw.dtype() {
            // SAFETY: as in `into_floats`.
            Some(Dtype::Uint32) => Ok(unsafe { self.raw.elements_mut() }),
            other => Err(wrong_type(other)),
        }
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
    /// How many of the inputs are written to: the last ones.
    written: usize,
    /// Whether it was described for the second side of a step.
    beside: bool,
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
    writing_node(kernel, inputs, 0, shape, dtype)
}

/// The same for a kernel that also writes to the last `written` of its inputs, in place.
///
/// MLX knows nothing of these writes: nodes that touch such an array take effect in the order in which their stream
/// runs them, and every handle to it sees them. Where two streams have such nodes, these keep to different places
/// ([`Output::shared`]). It must be an evaluated array with memory of its own, which no other input shares and which the host
/// does not read meanwhile.
pub fn writing_node<K: CpuKernel + 'static>(
    kernel: K,
    inputs: &[&Array],
    written: usize,
    shape: &[i32],
    dtype: Dtype,
) -> Result<Array> {
    let code = DTYPES.iter().position(|known| *known == dtype).ok_or_else(|| wrong_type(Some(dtype)))?;
    let task = Task { kernel: Box::new(kernel), written, beside: is_beside(), failure: FAILURE.with(Arc::clone) };
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
        // SAFETY: the shim passes the box made in `writing_node`, `input_count` inputs and one output, all alive for the
        // call.
        let (task, inputs, output) = unsafe {
            let inputs = if input_count == 0 { &[] } else { std::slice::from_raw_parts(inputs, input_count) };
            (&*kernel.cast::<Task>(), inputs, &*output)
        };
        let inputs: Vec<_> = inputs.iter().map(|raw| Input { raw }).collect();
        let (inputs, written) = inputs.split_at(inputs.len() - task.written);
        written.iter().try_for_each(Input::contiguous).map_err(|error| error.message().to_owned())?;
        let outputs = std::iter::once(output).chain(written.iter().map(|input| input.raw));
        let outputs = outputs.map(|raw| Output { raw }).collect();
        let run = || task.kernel.run(inputs, outputs).map_err(|error| error.message().to_owned());
        if task.beside { beside(run) } else { run() }
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
    // SAFETY: the pointer made in `writing_node`, passed here exactly once.
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
        fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
            let (Floats::F32(x), FloatsMut::F32(out)) = (inputs[0].floats()?, outputs.remove(0).into_floats()?) else {
                return Err(wrong_type(None));
            };
            for (out, value) in out.iter_mut().zip(x) {
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
            let x = Array::from_slice(&[1i32, 2], &[2]);
            let kernel = AddThen { addend: 0.0, then: || Ok(()), _alive: Arc::new(()) };
            let y = node(kernel, &[&x], &[2], Dtype::Float32)?;
            settle(&y)
        });
        assert!(outcome.unwrap_err().message().contains("Int32"));
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

    /// Adds one to each element of its input, in place, and gives their sum.
    struct Increment;

    impl CpuKernel for Increment {
        fn run(&self, _: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
            let (array, sum) = (outputs.remove(1), outputs.remove(0));
            let (FloatsMut::F32(array), FloatsMut::F32(sum)) = (array.into_floats()?, sum.into_floats()?) else {
                return Err(wrong_type(None));
            };
            array.iter_mut().for_each(|x| *x += 1.0);
            sum[0] = array.iter().sum();
            Ok(())
        }
    }

    #[test]
    fn written_inputs_change_in_place_and_in_order() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let x = Array::full::<f32>(&[1000], Array::from_f32(1.0))?;
            settle(&x)?;
            let place = x.as_slice::<f32>().as_ptr();
            let increment = || writing_node(Increment, &[&x], 1, &[1], Dtype::Float32);
            // Two steps on their way at once, as an engine has them.
            let first = increment()?;
            mlx_rs::transforms::async_eval([&first])?;
            let second = increment()?;
            mlx_rs::transforms::async_eval([&second])?;
            settle(&second)?;
            assert_eq!((first.as_slice::<f32>(), second.as_slice::<f32>()), (&[2000.0][..], &[3000.0][..]));
            assert_eq!((x.as_slice::<f32>().as_ptr(), x.as_slice::<f32>()[999]), (place, 3.0));
            // What is no run of memory is refused, and stays as it is.
            let strided = Array::from_slice(&[1f32, 2.0, 3.0, 4.0], &[2, 2]).transpose()?;
            settle(&strided)?;
            let refused = settle(&writing_node(Increment, &[&strided], 1, &[1], Dtype::Float32)?);
            assert!(refused.unwrap_err().message().contains("contiguous"));
            Ok(())
        });
        outcome.unwrap();
    }

    #[test]
    fn strided_numbers_are_gathered() {
        struct Flatten;
        impl CpuKernel for Flatten {
            fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
                let FloatsMut::F32(out) = outputs.remove(0).into_floats()? else { return Err(wrong_type(None)) };
                out.copy_from_slice(&inputs[0].to_f32()?);
                Ok(())
            }
        }
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
                let x = Array::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]).as_dtype(dtype)?.transpose()?;
                let y = node(Flatten, &[&x], &[6], Dtype::Float32)?;
                settle(&y)?;
                assert_eq!(y.as_slice::<f32>(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
            }
            Ok(())
        });
        outcome.unwrap();
    }
}
