//! Weights of a model: safetensors files (one or many), or random numbers of the same shapes for benchmarks.
//!
//! Every tensor is taken exactly once, by name and expected shape. What is missing, has another shape, or is left
//! over is an error that names the tensor.

mod experts;
mod files;

use std::path::Path;

use mlx_rs::{Array, Dtype};
use safetensors::tensor::{Dtype as FileDtype, TensorInfo};

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kernels::Backend;
use crate::mlx::{self, Matrix, QuantFormat, QuantMode, QuantizedMatrix};

pub use experts::{ExpertShape, ExpertStacks, PROJECTIONS, Stack};
pub use files::weight_files;

use files::{Files, dims, mlx_dtype};

/// Where a model's tensors come from.
enum Source {
    Files(Files),
    /// Random numbers; the counter makes every tensor a distinct buffer with distinct content.
    Random {
        drawn: u64,
    },
}

/// What weights will take, see [`Weights::planned`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Planned {
    /// All tensors.
    pub bytes: usize,
    /// Those of the largest layer, as they are stored: they are read at once.
    pub largest: usize,
    /// A floating-point number; 0 if that is not known.
    pub float_bytes: usize,
}

/// Hands out the tensors of one model, converted to its compute type.
pub struct Weights {
    source: Source,
    config: ModelConfig,
    dtype: Option<Dtype>,
    bytes: usize,
    backend: Backend,
    /// Type of the first floating-point tensor that was taken.
    float_type: Option<Dtype>,
    /// Told before every tensor how many bytes are there: an error ends the loading.
    watch: Box<dyn Fn(usize) -> Option<Error>>,
}

impl Weights {
    /// Opens the weight files of `folder` and checks their headers and lengths; no tensor data is read yet.
    ///
    /// Floating-point tensors are converted to `dtype` as they are taken; `None` keeps the type of the files.
    pub fn open(folder: &Path, config: &ModelConfig, dtype: Option<Dtype>) -> Result<Self> {
        Ok(Self::new(Source::Files(Files::open(folder)?), config, dtype))
    }

    /// Random weights for `config`: right for timing, meaningless otherwise. `dtype` defaults to bfloat16.
    pub fn random(config: &ModelConfig, dtype: Option<Dtype>) -> Self {
        Self::new(Source::Random { drawn: 0 }, config, Some(dtype.unwrap_or(Dtype::Bfloat16)))
    }

    fn new(source: Source, config: &ModelConfig, dtype: Option<Dtype>) -> Self {
        Self {
            source,
            config: config.clone(),
            dtype,
            bytes: 0,
            backend: Backend::Mlx,
            float_type: None,
            watch: Box::new(|_| None),
        }
    }

    /// The same, but `watch` is told before every tensor how many bytes there are so far; an error that it returns ends the
    /// loading.
    pub fn watched_by(mut self, watch: impl Fn(usize) -> Option<Error> + 'static) -> Self {
        self.watch = Box::new(watch);
        self
    }

    /// The same, for layers that are computed by `backend`; without this it is MLX.
    pub fn computed_by(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Who computes the layers that take these weights.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Bytes of all tensors taken so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that the tensors that are left will take, those of the largest layer, and the size of a floating-point number;
    /// known before anything is read. Nothing for random weights.
    pub fn planned(&self) -> Planned {
        let Source::Files(files) = &self.source else { return Planned::default() };
        let size = |info: &TensorInfo| {
            let (start, end) = info.data_offsets;
            let converted = self.dtype.filter(|_| is_float(info.dtype));
            let numbers: usize = info.shape.iter().product();
            converted.map_or(end - start, |dtype| numbers * item_size(dtype))
        };
        let mut infos = files.infos();
        let stored = infos.find(|info| is_float(info.dtype)).and_then(|info| mlx_dtype(info.dtype));
        Planned {
            bytes: files.infos().map(size).sum(),
            largest: files.largest_layer(),
            float_bytes: self.dtype.or(stored).map_or(0, item_size),
        }
    }

    /// The type that floating-point tensors are converted to, if any.
    pub fn dtype(&self) -> Option<Dtype> {
        self.dtype
    }

    /// The type of the floating-point tensors taken so far: that of the first one.
    pub fn float_type(&self) -> Dtype {
        self.float_type.unwrap_or(Dtype::Float32)
    }

    /// Whether a tensor of this name is there and not taken yet. Random weights have none that is optional.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Files(files) => files.contains(name),
            Source::Random { .. } => false,
        }
    }

    /// Whether a tensor that is not taken yet has a name that `wanted` accepts. Random weights have no names.
    pub fn any(&self, wanted: impl Fn(&str) -> bool) -> bool {
        match &self.source {
            Source::Files(files) => files.names().any(wanted),
            Source::Random { .. } => false,
        }
    }

    /// Drops the tensors that `unused` accepts: known leftovers of training code.
    pub fn discard(&mut self, unused: impl Fn(&str) -> bool) {
        if let Source::Files(files) = &mut self.source {
            files.discard(unused);
        }
    }

    /// The floating-point tensor `name` of exactly `shape`.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Array> {
        let array = match &mut self.source {
            Source::Files(files) => files.take(name, shape, &[Dtype::Float32, Dtype::Float16, Dtype::Bfloat16])?,
            Source::Random { drawn } => random_floats(shape, next_key(drawn)?)?,
        };
        let converted = self.dtype.filter(|&dtype| array.dtype() != dtype);
        let array = match converted {
            Some(dtype) => array.as_dtype(dtype)?,
            None => array,
        };
        self.float_type.get_or_insert(array.dtype());
        self.keep(array, converted.is_some())
    }

    /// The same, but never converted: a number that the checkpoint keeps more exactly than others.
    pub fn unconverted(&mut self, name: &str, shape: &[usize]) -> Result<Array> {
        let dtype = self.dtype.take();
        let array = self.tensor(name, shape);
        self.dtype = dtype;
        array
    }

    /// The weight matrix `{path}.weight` of logical shape `[rows, columns]`, dense or quantised as it is stored.
    pub fn matrix(&mut self, path: &str, rows: usize, columns: usize) -> Result<Matrix> {
        self.matrix_of(path, path, &[], rows, columns)
    }

    /// `count` matrices of the same shape in one tensor, `[count, rows, columns]`.
    pub fn stack(&mut self, path: &str, count: usize, rows: usize, columns: usize) -> Result<Matrix> {
        self.matrix_of(path, path, &[count], rows, columns)
    }

    /// The same for as many matrices as `stacked` has axes for, `[stacked.., rows, columns]`, whose format is declared for the
    /// layer at `declared`.
    fn matrix_of(
        &mut self,
        path: &str,
        declared: &str,
        stacked: &[usize],
        rows: usize,
        columns: usize,
    ) -> Result<Matrix> {
        let declared = self.config.quantization().and_then(|q| q.format_of(declared));
        let stored_quantized = match &self.source {
            Source::Files(files) => files.contains(&format!("{path}.scales")),
            Source::Random { .. } => declared.is_some(),
        };
        let shape = |columns: usize| [stacked, &[rows, columns]].concat();
        if !stored_quantized {
            return Ok(Matrix::Dense(self.tensor(&format!("{path}.weight"), &shape(columns))?));
        }
        let format = declared.ok_or_else(|| {
            Error::invalid_model(format!("{path:?} is stored quantised, but config.json declares no format for it"))
        })?;
        if !columns.is_multiple_of(format.group_size) || !(columns * format.bits).is_multiple_of(32) {
            return Err(Error::invalid_model(format!(
                "{path:?}: {columns} columns do not divide into groups of {} weights",
                format.group_size
            )));
        }
        let (packed, groups) = (shape(columns * format.bits / 32), shape(columns / format.group_size));
        self.quantized(path, &packed, &groups, format).map(Matrix::Quantized)
    }

    fn quantized(
        &mut self,
        path: &str,
        packed: &[usize],
        groups: &[usize],
        format: QuantFormat,
    ) -> Result<QuantizedMatrix> {
        let weight = self.words(&format!("{path}.weight"), packed, Dtype::Uint32)?;
        let scales_name = format!("{path}.scales");
        let (scales, biases) = match format.mode {
            QuantMode::Affine => {
                let scales = self.tensor(&scales_name, groups)?;
                (scales, Some(self.tensor(&format!("{path}.biases"), groups)?))
            }
            _ => (self.words(&scales_name, groups, Dtype::Uint8)?, None),
        };
        Ok(QuantizedMatrix { weight, scales, biases, format })
    }

    /// A tensor of packed bits, never converted.
    fn words(&mut self, name: &str, shape: &[usize], dtype: Dtype) -> Result<Array> {
        let array = match &mut self.source {
            Source::Files(files) => files.take(name, shape, &[dtype])?,
            Source::Random { drawn } => {
                let key = next_key(drawn)?;
                match dtype {
                    // Exponents around one, so that products stay finite.
                    Dtype::Uint8 => Array::full::<u8>(&dims(shape), Array::from_int(120))?,
                    _ => mlx::random_words(&dims(shape), &key)?,
                }
            }
        };
        self.keep(array, false)
    }

    /// Evaluates at once: the load is then one layer above the final size at most, and errors name their tensor.
    fn keep(&mut self, array: Array, converted: bool) -> Result<Array> {
        if let Some(error) = (self.watch)(self.bytes) {
            return Err(error);
        }
        // What was read is there already: to ask MLX would cost a change of threads for each tensor.
        if converted || matches!(self.source, Source::Random { .. }) {
            array.eval()?;
        }
        self.bytes += array.nbytes();
        Ok(array)
    }

    /// Errors with the names of tensors that nobody took: they would silently change the model.
    pub fn finish(self) -> Result<()> {
        let Source::Files(files) = self.source else { return Ok(()) };
        let left = files.names().count();
        if left == 0 {
            return Ok(());
        }
        let names: Vec<_> = files.names().take(5).collect();
        let more = left - names.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Err(Error::invalid_model(format!(
            "tensors that a {:?} model does not have: {}{more}",
            self.config.model_type(),
            names.join(", ")
        )))
    }
}

fn is_float(dtype: FileDtype) -> bool {
    matches!(dtype, FileDtype::F32 | FileDtype::F16 | FileDtype::BF16)
}

fn item_size(dtype: Dtype) -> usize {
    if dtype == Dtype::Float32 { 4 } else { 2 }
}

fn next_key(drawn: &mut u64) -> Result<Array> {
    *drawn += 1;
    Ok(mlx_rs::random::key(*drawn)?)
}

/// Small values around zero, so that a deep random model stays finite.
fn random_floats(shape: &[usize], key: Array) -> Result<Array> {
    Ok(mlx_rs::random::uniform::<_, f32>(-0.05, 0.05, &dims(shape), &key)?)
}
