//! Kernels compiled at run time from source text, as nodes of MLX's graph: the thin layer over MLX's C interface.
//!
//! MLX compiles a kernel when a node of it is first evaluated, so errors in the source arrive there, and keeps what it
//! compiled for the life of the process.

use std::ffi::{CStr, CString, c_char};

use mlx_rs::{Array, Dtype, Stream};

use crate::error::{Error, Result};
use crate::mlx::checked;

/// What a kernel is called and made of.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Part of the function's name.
    pub name: &'static CStr,
    /// Names of the inputs. Where the body mentions `<input>_shape` or `<input>_strides`, they exist.
    pub inputs: &'a [&'static CStr],
    /// Names of the outputs.
    pub outputs: &'a [&'static CStr],
    /// Texts before the function, after the prelude of the language.
    pub headers: &'a [&'static str],
    /// What the body can use.
    pub constants: &'a [Constant],
    /// Body of the function, in parts.
    pub body: &'a [&'static str],
    /// Whether inputs that are no run of memory are copied before; otherwise the body must mind their strides.
    pub contiguous: bool,
}

impl Source<'_> {
    /// What comes before the function, and its body.
    fn texts(&self, language: Language) -> Result<(String, String)> {
        let headers = std::iter::once(language.prelude()).chain(self.headers.iter().copied());
        let mut body = String::new();
        for constant in self.constants {
            body += &match constant {
                Constant::Int(name, value) => format!("constexpr int {name}={value};\n"),
                Constant::Type(name, dtype) => format!("using {name}={};\n", language.type_name(*dtype)?),
            };
        }
        body.extend(self.body.iter().map(|part| squeezed(part)));
        Ok((headers.map(squeezed).collect(), body))
    }
}

/// A name for the body of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Constant {
    /// An integer.
    Int(&'static str, i32),
    /// A floating-point type.
    Type(&'static str, Dtype),
}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Threadgroups along three axes.
    pub groups: [usize; 3],
    /// Threads of a threadgroup.
    pub threads: usize,
}

/// A kernel for the GPU of the loaded MLX. Belongs to the thread that made it.
#[derive(Debug)]
pub struct CustomKernel {
    handle: Handle,
    outputs: usize,
}

#[derive(Debug)]
enum Handle {
    Cuda(mlx_sys::mlx_fast_cuda_kernel),
    Metal(mlx_sys::mlx_fast_metal_kernel),
}

/// The language that the loaded MLX compiles for its GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// CUDA C++.
    Cuda,
    /// Metal Shading Language.
    Metal,
}

impl Language {
    /// That of the loaded MLX, or an error if it has no GPU.
    pub fn of_mlx() -> Result<Self> {
        let (mut cuda, mut metal) = (false, false);
        // SAFETY: the flags outlive the calls.
        unsafe {
            checked(mlx_sys::mlx_cuda_is_available(&mut cuda))?;
            checked(mlx_sys::mlx_metal_is_available(&mut metal))?;
        }
        match (cuda, metal) {
            (true, _) => Ok(Language::Cuda),
            (_, true) => Ok(Language::Metal),
            _ => Err(Error::backend("the loaded MLX has no GPU")),
        }
    }

    /// Its name for a floating-point type.
    fn type_name(self, dtype: Dtype) -> Result<&'static str> {
        Ok(match (dtype, self) {
            (Dtype::Float32, _) => "float",
            (Dtype::Float16, Language::Cuda) => "__half",
            (Dtype::Float16, Language::Metal) => "half",
            (Dtype::Bfloat16, Language::Cuda) => "__nv_bfloat16",
            (Dtype::Bfloat16, Language::Metal) => "bfloat16_t",
            _ => return Err(Error::internal(format!("kernels have no type {dtype:?}"))),
        })
    }

    /// What makes the kernels' common dialect out of the language.
    fn prelude(self) -> &'static str {
        match self {
            Language::Cuda => include_str!("source/cuda.h"),
            Language::Metal => include_str!("source/metal.h"),
        }
    }
}

/// `text` without comments and spaces that mean nothing: MLX copies and hashes the source for every node, a microsecond
/// for 1.4 kB.
fn squeezed(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty()).flat_map(|line| [tight(line), "\n".into()]).collect()
}

/// `line` without spaces, but between words and between operators. Directives and lines with strings stay as they are.
fn tight(line: &str) -> String {
    if line.starts_with('#') || line.contains('"') {
        return line.into();
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let is_operator = |c: char| "+-*/&|<>=!".contains(c);
    let mut out = String::with_capacity(line.len());
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        let (before, after) = (out.chars().next_back().unwrap_or(' '), rest.peek().copied().unwrap_or(' '));
        let needed = is_word(before) && is_word(after) || is_operator(before) && is_operator(after);
        if c != ' ' || needed {
            out.push(c);
        }
    }
    out
}

fn c_text(text: String) -> Result<CString> {
    CString::new(text).map_err(|_| Error::internal("a kernel's source has a NUL"))
}

impl CustomKernel {
    /// Prepares a kernel; nothing is compiled yet.
    pub fn new(source: &Source<'_>) -> Result<Self> {
        let language = Language::of_mlx()?;
        let (header, body) = source.texts(language)?;
        let (header, body) = (c_text(header)?, c_text(body)?);
        let (inputs, outputs) = (Names::new(source.inputs), Names::new(source.outputs));
        // SAFETY: all texts and lists outlive the calls, which copy them.
        let handle = unsafe {
            let (name, body, header) = (source.name.as_ptr(), body.as_ptr(), header.as_ptr());
            match language {
                Language::Cuda => Handle::Cuda(mlx_sys::mlx_fast_cuda_kernel_new(
                    name,
                    inputs.0,
                    outputs.0,
                    body,
                    header,
                    source.contiguous,
                    0,
                )),
                Language::Metal => Handle::Metal(mlx_sys::mlx_fast_metal_kernel_new(
                    name,
                    inputs.0,
                    outputs.0,
                    body,
                    header,
                    source.contiguous,
                    false,
                )),
            }
        };
        let kernel = Self { handle, outputs: source.outputs.len() };
        if kernel.is_null() {
            return Err(failure("MLX refused a kernel"));
        }
        Ok(kernel)
    }

    fn is_null(&self) -> bool {
        match &self.handle {
            Handle::Cuda(handle) => handle.ctx.is_null(),
            Handle::Metal(handle) => handle.ctx.is_null(),
        }
    }

    /// A node that runs the kernel, with outputs of these shapes and types.
    ///
    /// Outputs are uninitialised memory that the kernel must fill. MLX checks neither the kernel's indices nor those
    /// that it reads from arrays.
    pub fn launch(&self, inputs: &[&Array], outputs: &[(&[i32], Dtype)], launch: Launch) -> Result<Vec<Array>> {
        if outputs.len() != self.outputs {
            return Err(Error::internal("a kernel was launched with a wrong number of outputs"));
        }
        let threads = dimension(launch.threads)?;
        let mut grid = [1; 3];
        for (axis, (side, groups)) in grid.iter_mut().zip(launch.groups).enumerate() {
            *side = dimension(if axis == 0 { groups.saturating_mul(launch.threads) } else { groups })?;
        }
        let inputs = Arrays::new(inputs);
        let mut results = Arrays::empty();
        let stream = Stream::thread_local_or_default();
        // SAFETY: handles, shapes and names outlive the calls; the configuration is freed by `Settings`.
        unsafe {
            match &self.handle {
                Handle::Cuda(kernel) => {
                    let settings = cuda::Settings::new(outputs, grid, threads)?;
                    checked(mlx_sys::mlx_fast_cuda_kernel_apply(
                        &mut results.0,
                        *kernel,
                        inputs.0,
                        settings.0,
                        stream.as_ptr(),
                    ))?;
                }
                Handle::Metal(kernel) => {
                    let settings = metal::Settings::new(outputs, grid, threads)?;
                    checked(mlx_sys::mlx_fast_metal_kernel_apply(
                        &mut results.0,
                        *kernel,
                        inputs.0,
                        settings.0,
                        stream.as_ptr(),
                    ))?;
                }
            }
        }
        (0..self.outputs).map(|i| results.get(i)).collect()
    }
}

impl Drop for CustomKernel {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once; nodes of the graph own what they need. NULL is allowed.
        unsafe {
            match &self.handle {
                Handle::Cuda(handle) => mlx_sys::mlx_fast_cuda_kernel_free(*handle),
                Handle::Metal(handle) => mlx_sys::mlx_fast_metal_kernel_free(*handle),
            }
        }
    }
}

fn dimension(size: usize) -> Result<i32> {
    i32::try_from(size).map_err(|_| Error::internal("a kernel was launched on too many threads"))
}

/// The error of the last MLX call.
fn failure(otherwise: &str) -> Error {
    checked(1).err().unwrap_or_else(|| Error::backend(otherwise))
}

/// The same code for the two sets of functions with the same shape.
macro_rules! settings {
    ($module:ident, $raw:ident, $new:ident, $free:ident, $output:ident, $grid:ident, $group:ident) => {
        mod $module {
            use super::*;

            /// MLX's description of one launch.
            pub struct Settings(pub mlx_sys::$raw);

            impl Settings {
                pub fn new(outputs: &[(&[i32], Dtype)], grid: [i32; 3], threads: i32) -> Result<Self> {
                    // SAFETY: the handle is freed on drop; shapes outlive the calls, which copy them.
                    unsafe {
                        let settings = Self(mlx_sys::$new());
                        if settings.0.ctx.is_null() {
                            return Err(failure("MLX made no kernel configuration"));
                        }
                        for (shape, dtype) in outputs {
                            checked(mlx_sys::$output(settings.0, shape.as_ptr(), shape.len(), (*dtype).into()))?;
                        }
                        checked(mlx_sys::$grid(settings.0, grid[0], grid[1], grid[2]))?;
                        checked(mlx_sys::$group(settings.0, threads, 1, 1))?;
                        Ok(settings)
                    }
                }
            }

            impl Drop for Settings {
                fn drop(&mut self) {
                    // SAFETY: made in `new`, freed once.
                    unsafe { mlx_sys::$free(self.0) }
                }
            }
        }
    };
}

settings!(
    cuda,
    mlx_fast_cuda_kernel_config,
    mlx_fast_cuda_kernel_config_new,
    mlx_fast_cuda_kernel_config_free,
    mlx_fast_cuda_kernel_config_add_output_arg,
    mlx_fast_cuda_kernel_config_set_grid,
    mlx_fast_cuda_kernel_config_set_thread_group
);
settings!(
    metal,
    mlx_fast_metal_kernel_config,
    mlx_fast_metal_kernel_config_new,
    mlx_fast_metal_kernel_config_free,
    mlx_fast_metal_kernel_config_add_output_arg,
    mlx_fast_metal_kernel_config_set_grid,
    mlx_fast_metal_kernel_config_set_thread_group
);

/// A list of names for a C call.
struct Names(mlx_sys::mlx_vector_string);

impl Names {
    fn new(names: &[&CStr]) -> Self {
        let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        // SAFETY: as many texts as are said, copied by the call.
        Self(unsafe { mlx_sys::mlx_vector_string_new_data(pointers.as_mut_ptr(), pointers.len()) })
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed once.
        unsafe { mlx_sys::mlx_vector_string_free(self.0) };
    }
}

/// A list of array handles for a C call.
struct Arrays(mlx_sys::mlx_vector_array);

impl Arrays {
    fn new(arrays: &[&Array]) -> Self {
        let handles: Vec<mlx_sys::mlx_array> = arrays.iter().map(|array| array.as_ptr()).collect();
        // SAFETY: live handles; the list holds references of its own.
        Self(unsafe { mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len()) })
    }

    fn empty() -> Self {
        // SAFETY: no preconditions.
        Self(unsafe { mlx_sys::mlx_vector_array_new() })
    }

    fn get(&self, index: usize) -> Result<Array> {
        // SAFETY: an empty handle, which the call fills or leaves empty; `Array` frees it in both cases.
        unsafe {
            let mut raw = mlx_sys::mlx_array_new();
            let code = mlx_sys::mlx_vector_array_get(&mut raw, self.0, index);
            let array = Array::from_ptr(raw);
            checked(code).map(|()| array)
        }
    }
}

impl Drop for Arrays {
    fn drop(&mut self) {
        // SAFETY: made here, freed once.
        unsafe { mlx_sys::mlx_vector_array_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squeezing_keeps_what_is_compiled() {
        let text = "// what\n  int a = b + -1;  // why\n\n#define B \\\n  2\n  asm(\"x %0, y\" : \"=f\"(y));\n";
        assert_eq!(squeezed(text), "int a=b+ -1;\n#define B \\\n2\nasm(\"x %0, y\" : \"=f\"(y));\n");
        assert_eq!(tight("const device T* a = (x < y && !z) ? &b : * c;"), "const device T*a=(x<y&& !z)?&b:*c;");
    }

    #[test]
    fn both_languages_get_their_prelude_names_and_constants() {
        let source = Source {
            name: c"none",
            inputs: &[],
            outputs: &[c"x"],
            headers: &["inline int twice(int a) { return 2 * a; }  // why\n"],
            constants: &[Constant::Int("N", 7), Constant::Type("T", Dtype::Bfloat16)],
            body: &["x[0] = T(twice(N));\n", "x[1] = T(0);\n"],
            contiguous: true,
        };
        for (language, bf16, mark) in
            [(Language::Cuda, "__nv_bfloat16", "__syncthreads"), (Language::Metal, "bfloat16_t", "threadgroup_barrier")]
        {
            let (header, body) = source.texts(language).unwrap();
            assert!(header.contains(mark) && header.ends_with("inline int twice(int a){return 2*a;}\n"), "{header}");
            assert_eq!(body, format!("constexpr int N=7;\nusing T={bf16};\nx[0]=T(twice(N));\nx[1]=T(0);\n"));
            let integers = Source { constants: &[Constant::Type("T", Dtype::Int32)], ..source };
            assert!(integers.texts(language).is_err());
        }
    }

    #[test]
    fn both_preludes_offer_the_same_functions() {
        let functions = |language: Language| -> std::collections::BTreeSet<String> {
            let lines = language.prelude().lines().filter(|line| line.starts_with("inline "));
            let name =
                |line: &str| line.split('(').next().and_then(|head| head.split(' ').next_back()).map(str::to_owned);
            lines.filter_map(name).collect()
        };
        assert_eq!(functions(Language::Cuda), functions(Language::Metal));
        assert!(functions(Language::Cuda).contains("from_lane_xor"));
    }

    #[test]
    fn without_a_gpu_there_is_an_error() {
        crate::mlx::init().unwrap();
        if crate::mlx::gpu_available() {
            return;
        }
        let source = Source {
            name: c"none",
            inputs: &[],
            outputs: &[c"x"],
            headers: &[],
            constants: &[],
            body: &[""],
            contiguous: true,
        };
        assert!(CustomKernel::new(&source).unwrap_err().message().contains("GPU"));
    }
}
