//! Weights of a model: safetensors files (one or many), or random numbers of the same shapes for benchmarks.
//!
//! Every tensor is taken exactly once, by name and expected shape. What is missing, has another shape, or is left
//! over is an error that names the tensor. Files are read with ordinary reads into buffers that MLX then owns:
//! no memory map, so a file that shrinks or a disk that fails is an error and not a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mlx_rs::{Array, Dtype};
use safetensors::tensor::{Dtype as FileDtype, Metadata, TensorInfo};
use serde_json::Value;

use crate::config::{ModelConfig, read_json};
use crate::error::{Error, Result, Status};
use crate::kernels::Backend;
use crate::mlx::{self, HostBuffer, Matrix, QuantFormat, QuantMode, QuantizedMatrix};

/// Largest safetensors header that is read; the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where a model's tensors come from.
enum Source {
    Files(BTreeMap<String, FileTensor>),
    /// Random numbers; the counter makes every tensor a distinct buffer with distinct content.
    Random {
        drawn: u64,
    },
}

/// A tensor in a safetensors file: `info.data_offsets` count from `data_start`.
struct FileTensor {
    file: Arc<WeightFile>,
    info: TensorInfo,
}

struct WeightFile {
    path: PathBuf,
    file: File,
    data_start: u64,
}

/// What weights will take, see [`Weights::planned`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Planned {
    /// All tensors.
    pub bytes: usize,
    /// The largest one.
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
        let mut tensors = BTreeMap::new();
        for (path, expected) in weight_files(folder)? {
            let (file, metadata) = open_file(&path)?;
            let found = metadata.tensors();
            if let Some(name) = expected.iter().find(|name| !found.contains_key(*name)) {
                let path = path.display();
                return Err(Error::invalid_model(format!(
                    "tensor {name:?} is missing from {path}, where the index has it"
                )));
            }
            for (name, info) in found {
                let tensor = FileTensor { file: Arc::clone(&file), info: info.clone() };
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::invalid_model(format!("tensor {name:?} is in more than one file")));
                }
            }
        }
        Ok(Self::new(Source::Files(tensors), config, dtype))
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

    /// Bytes that the tensors that are left will take, those of the largest one, and the size of a floating-point number;
    /// known before anything is read. Nothing for random weights.
    pub fn planned(&self) -> Planned {
        let Source::Files(tensors) = &self.source else { return Planned::default() };
        let size = |tensor: &FileTensor| {
            let (start, end) = tensor.info.data_offsets;
            let converted = self.dtype.filter(|_| is_float(tensor.info.dtype));
            let numbers: usize = tensor.info.shape.iter().product();
            converted.map_or(end - start, |dtype| numbers * item_size(dtype))
        };
        let floats = tensors.values().find(|tensor| is_float(tensor.info.dtype));
        let stored = floats.and_then(|tensor| mlx_dtype(tensor.info.dtype));
        Planned {
            bytes: tensors.values().map(size).sum(),
            largest: tensors.values().map(size).max().unwrap_or(0),
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
            Source::Files(tensors) => tensors.contains_key(name),
            Source::Random { .. } => false,
        }
    }

    /// Whether a tensor that is not taken yet has a name that `wanted` accepts. Random weights have no names.
    pub fn any(&self, wanted: impl Fn(&str) -> bool) -> bool {
        match &self.source {
            Source::Files(tensors) => tensors.keys().any(|name| wanted(name)),
            Source::Random { .. } => false,
        }
    }

    /// Drops the tensors that `unused` accepts: known leftovers of training code.
    pub fn discard(&mut self, unused: impl Fn(&str) -> bool) {
        if let Source::Files(tensors) = &mut self.source {
            tensors.retain(|name, _| !unused(name));
        }
    }

    /// The floating-point tensor `name` of exactly `shape`.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Array> {
        let array = match &mut self.source {
            Source::Files(tensors) => take(tensors, name, shape, &[Dtype::Float32, Dtype::Float16, Dtype::Bfloat16])?,
            Source::Random { drawn } => random_floats(shape, next_key(drawn)?)?,
        };
        let array = match self.dtype {
            Some(dtype) if array.dtype() != dtype => array.as_dtype(dtype)?,
            _ => array,
        };
        self.float_type.get_or_insert(array.dtype());
        self.keep(array)
    }

    /// The weight matrix `{path}.weight` of logical shape `[rows, columns]`, dense or quantised as it is stored.
    pub fn matrix(&mut self, path: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let declared = self.config.quantization().and_then(|q| q.format_of(path));
        let stored_quantized = match &self.source {
            Source::Files(tensors) => tensors.contains_key(&format!("{path}.scales")),
            Source::Random { .. } => declared.is_some(),
        };
        if !stored_quantized {
            return Ok(Matrix::Dense(self.tensor(&format!("{path}.weight"), &[rows, columns])?));
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
        self.quantized(path, rows, columns, format).map(Matrix::Quantized)
    }

    fn quantized(&mut self, path: &str, rows: usize, columns: usize, format: QuantFormat) -> Result<QuantizedMatrix> {
        let packed = [rows, columns * format.bits / 32];
        let groups = [rows, columns / format.group_size];
        let weight = self.words(&format!("{path}.weight"), &packed, Dtype::Uint32)?;
        let scales_name = format!("{path}.scales");
        let (scales, biases) = match format.mode {
            QuantMode::Affine => {
                let scales = self.tensor(&scales_name, &groups)?;
                (scales, Some(self.tensor(&format!("{path}.biases"), &groups)?))
            }
            _ => (self.words(&scales_name, &groups, Dtype::Uint8)?, None),
        };
        Ok(QuantizedMatrix { weight, scales, biases, format })
    }

    /// A tensor of packed bits, never converted.
    fn words(&mut self, name: &str, shape: &[usize], dtype: Dtype) -> Result<Array> {
        let array = match &mut self.source {
            Source::Files(tensors) => take(tensors, name, shape, &[dtype])?,
            Source::Random { drawn } => {
                let key = next_key(drawn)?;
                match dtype {
                    // Exponents around one, so that products stay finite.
                    Dtype::Uint8 => Array::full::<u8>(&dims(shape), Array::from_int(120))?,
                    _ => mlx::random_words(&dims(shape), &key)?,
                }
            }
        };
        self.keep(array)
    }

    /// Evaluates at once: the load is then one tensor above the final size, and errors name their tensor.
    fn keep(&mut self, array: Array) -> Result<Array> {
        if let Some(error) = (self.watch)(self.bytes) {
            return Err(error);
        }
        array.eval()?;
        self.bytes += array.nbytes();
        Ok(array)
    }

    /// Errors with the names of tensors that nobody took: they would silently change the model.
    pub fn finish(self) -> Result<()> {
        let Source::Files(tensors) = self.source else { return Ok(()) };
        if tensors.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = tensors.keys().take(5).map(String::as_str).collect();
        let more = tensors.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Err(Error::invalid_model(format!(
            "tensors that a {:?} model does not have: {}{more}",
            self.config.model_type(),
            names.join(", ")
        )))
    }
}

/// The folder's weight files, each with the tensors that the index expects in it.
pub fn weight_files(folder: &Path) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let index = folder.join("model.safetensors.index.json");
    match read_json(&index) {
        Ok(value) => return indexed_files(folder, &value).map_err(|e| e.context(index.display())),
        Err(e) if e.status() == Status::NotFound => {}
        Err(e) => return Err(e),
    }
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![(single, Vec::new())]);
    }
    Err(Error::not_found(format!(
        "{}: neither model.safetensors nor model.safetensors.index.json is there",
        folder.display()
    )))
}

fn indexed_files(folder: &Path, index: &Value) -> Result<Vec<(PathBuf, Vec<String>)>> {
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::invalid_model("\"weight_map\" is missing"))?;
    let mut files: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .filter(|name| !name.contains(['/', '\\', '\0']) && *name != "..")
            .ok_or_else(|| Error::invalid_model(format!("tensor {tensor:?}: {file} is not a file name")))?;
        files.entry(file).or_default().push(tensor.clone());
    }
    Ok(files.into_iter().map(|(name, tensors)| (folder.join(name), tensors)).collect())
}

/// Opens one safetensors file and checks that its header is sound and its length is exactly what the header says.
fn open_file(path: &Path) -> Result<(Arc<WeightFile>, Metadata)> {
    let name = path.display();
    let damaged = |what: String| Error::invalid_model(format!("{name}: {what}"));
    let mut file = File::open(path).map_err(|e| Error::io(&name, &e))?;
    let len = file.metadata().map_err(|e| Error::io(&name, &e))?.len();
    if len < 8 {
        return Err(damaged(format!("{len} bytes are too few for a safetensors file")));
    }
    let mut prefix = [0u8; 8];
    file.read_exact(&mut prefix).map_err(|e| Error::io(&name, &e))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES || header_len > len - 8 {
        return Err(damaged(format!("a header of {header_len} bytes does not fit in a file of {len}")));
    }
    let mut header = vec![0u8; header_len as usize];
    file.read_exact(&mut header).map_err(|e| Error::io(&name, &e))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| damaged(format!("damaged header: {e}")))?;
    let expected = 8 + header_len + metadata.data_len() as u64;
    if expected != len {
        return Err(damaged(format!("truncated or damaged: {len} bytes instead of {expected}")));
    }
    Ok((Arc::new(WeightFile { path: path.to_owned(), file, data_start: 8 + header_len }), metadata))
}

/// Reads and removes tensor `name`, which must have `shape` and one of the `allowed` types.
fn take(tensors: &mut BTreeMap<String, FileTensor>, name: &str, shape: &[usize], allowed: &[Dtype]) -> Result<Array> {
    let FileTensor { file, info } =
        tensors.remove(name).ok_or_else(|| Error::invalid_model(format!("tensor {name:?} is missing")))?;
    let bad = |what: String| Error::invalid_model(format!("tensor {name:?} in {}: {what}", file.path.display()));
    if info.shape != shape {
        return Err(bad(format!("its shape is {:?} instead of {shape:?}", info.shape)));
    }
    let dtype = mlx_dtype(info.dtype)
        .filter(|dtype| allowed.contains(dtype))
        .ok_or_else(|| bad(format!("its type {:?} is not one of {allowed:?}", info.dtype)))?;
    let (start, end) = info.data_offsets;
    let mut buffer = HostBuffer::new(end - start).map_err(|e| e.context(name))?;
    file.file
        .read_exact_at(buffer.as_mut_slice(), file.data_start + start as u64)
        .map_err(|e| Error::io(format!("tensor {name:?} in {}", file.path.display()), &e))?;
    buffer.into_array(&dims(shape), dtype)
}

fn is_float(dtype: FileDtype) -> bool {
    matches!(dtype, FileDtype::F32 | FileDtype::F16 | FileDtype::BF16)
}

fn item_size(dtype: Dtype) -> usize {
    if dtype == Dtype::Float32 { 4 } else { 2 }
}

fn mlx_dtype(dtype: FileDtype) -> Option<Dtype> {
    Some(match dtype {
        FileDtype::F32 => Dtype::Float32,
        FileDtype::F16 => Dtype::Float16,
        FileDtype::BF16 => Dtype::Bfloat16,
        FileDtype::U8 => Dtype::Uint8,
        FileDtype::U32 => Dtype::Uint32,
        _ => return None,
    })
}

/// MLX's shape type; every dimension came from a header that was checked against the file's length.
fn dims(shape: &[usize]) -> Vec<i32> {
    shape.iter().map(|&n| i32::try_from(n).unwrap_or(i32::MAX)).collect()
}

fn next_key(drawn: &mut u64) -> Result<Array> {
    *drawn += 1;
    Ok(mlx_rs::random::key(*drawn)?)
}

/// Small values around zero, so that a deep random model stays finite.
fn random_floats(shape: &[usize], key: Array) -> Result<Array> {
    Ok(mlx_rs::random::uniform::<_, f32>(-0.05, 0.05, &dims(shape), &key)?)
}
