//! The weight files of a model folder: their headers are checked when they are opened, their tensors are read layer by layer.
//!
//! Files are read with ordinary reads into memory that becomes the arrays: no memory map, so a file that shrinks or a disk
//! that fails is an error and not a signal.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use mlx_rs::{Array, Dtype};
use safetensors::tensor::{Dtype as FileDtype, Metadata, TensorInfo};
use serde_json::Value;

use crate::config::read_json;
use crate::error::{Error, Result, Status};
use crate::mlx::HostBuffer;
use crate::sync::lock;

/// Largest safetensors header that is read; the format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Threads that read a layer: one keeps neither a disk busy nor, where the system has the file in memory, the memory.
const READERS: usize = 4;

/// Bytes that one of them reads at once.
const PIECE: usize = 2 << 20;

/// The tensors of a model's files that nobody has taken yet.
pub(super) struct Files {
    tensors: BTreeMap<String, FileTensor>,
}

/// A tensor in a safetensors file: `info.data_offsets` count from `data_start`.
struct FileTensor {
    file: Arc<WeightFile>,
    info: TensorInfo,
    /// Once its layer has been read.
    data: Option<HostBuffer>,
}

struct WeightFile {
    path: PathBuf,
    file: File,
    data_start: u64,
}

/// Bytes of a file, and where they go.
struct Piece<'a> {
    file: &'a WeightFile,
    /// The tensor that they belong to.
    name: &'a str,
    /// In the file.
    start: u64,
    bytes: &'a mut [u8],
}

impl Files {
    /// Opens the weight files of `folder` and checks their headers and lengths; no tensor data is read yet.
    pub fn open(folder: &Path) -> Result<Self> {
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
                let tensor = FileTensor { file: Arc::clone(&file), info: info.clone(), data: None };
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::invalid_model(format!("tensor {name:?} is in more than one file")));
                }
            }
        }
        Ok(Self { tensors })
    }

    /// Whether a tensor of this name is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The names of the tensors that are left.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What the headers tell of the tensors that are left.
    pub fn infos(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|tensor| &tensor.info)
    }

    /// Drops the tensors that `unused` accepts.
    pub fn discard(&mut self, unused: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| !unused(name));
    }

    /// Bytes of the largest layer: those are read at once.
    pub fn largest_layer(&self) -> usize {
        let mut layers: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            *layers.entry(layer_of(name)).or_default() += tensor.len();
        }
        layers.into_values().max().unwrap_or(0)
    }

    /// Removes tensor `name`, which must have `shape` and one of the `allowed` types. With the first tensor of a layer all of
    /// its tensors are read.
    pub fn take(&mut self, name: &str, shape: &[usize], allowed: &[Dtype]) -> Result<Array> {
        let missing = || Error::invalid_model(format!("tensor {name:?} is missing"));
        let FileTensor { file, info, data } = self.tensors.get(name).ok_or_else(missing)?;
        let bad = |what: String| Error::invalid_model(format!("tensor {name:?} in {}: {what}", file.path.display()));
        if info.shape != shape {
            return Err(bad(format!("its shape is {:?} instead of {shape:?}", info.shape)));
        }
        let dtype = mlx_dtype(info.dtype)
            .filter(|dtype| allowed.contains(dtype))
            .ok_or_else(|| bad(format!("its type {:?} is not one of {allowed:?}", info.dtype)))?;
        if data.is_none() {
            self.read(layer_of(name))?;
        }
        let data = self.tensors.remove(name).and_then(|tensor| tensor.data).ok_or_else(missing)?;
        data.into_array(&dims(shape), dtype)
    }

    /// Reads the tensors of a layer, on a few threads.
    fn read(&mut self, layer: &str) -> Result<()> {
        let from = self.tensors.range_mut(layer.to_owned()..);
        let mut tensors: Vec<(&String, &mut FileTensor)> =
            from.take_while(|(name, _)| name.starts_with(layer)).filter(|(name, _)| layer_of(name) == layer).collect();
        // In the order of the file, as far as there is one.
        tensors.sort_by_key(|(_, tensor)| tensor.info.data_offsets.0);
        let lens: Vec<usize> = tensors.iter().map(|(_, tensor)| tensor.len()).collect();
        let mut buffers = HostBuffer::several(&lens).map_err(|e| e.context(layer))?;
        let mut pieces = Vec::new();
        for ((name, tensor), buffer) in tensors.iter().zip(&mut buffers) {
            let start = tensor.file.data_start + tensor.info.data_offsets.0 as u64;
            for (at, bytes) in buffer.as_mut_slice().chunks_mut(PIECE).enumerate() {
                pieces.push(Piece { file: &tensor.file, name, start: start + (at * PIECE) as u64, bytes });
            }
        }
        read_pieces(pieces)?;
        for ((_, tensor), buffer) in tensors.into_iter().zip(buffers) {
            tensor.data = Some(buffer);
        }
        Ok(())
    }
}

impl FileTensor {
    /// Bytes in the file.
    fn len(&self) -> usize {
        self.info.data_offsets.1 - self.info.data_offsets.0
    }
}

impl Piece<'_> {
    fn read(self) -> Result<()> {
        let what = || format!("tensor {:?} in {}", self.name, self.file.path.display());
        self.file.file.read_exact_at(self.bytes, self.start).map_err(|e| Error::io(what(), &e))
    }
}

/// Reads all of them, or tells the first error.
fn read_pieces(pieces: Vec<Piece<'_>>) -> Result<()> {
    let helpers = READERS.min(pieces.len()).saturating_sub(1);
    let (pieces, failure) = (Mutex::new(pieces.into_iter()), Mutex::new(Ok(())));
    let read = || {
        loop {
            let next = lock(&pieces).next();
            match next.map(Piece::read) {
                None => return,
                Some(Ok(())) => {}
                Some(error) => {
                    // The others need not go on.
                    lock(&pieces).by_ref().for_each(drop);
                    *lock(&failure) = error;
                    return;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // Without a thread there is one less.
            let _ = std::thread::Builder::new().name("omlx-load".to_owned()).spawn_scoped(scope, read);
        }
        read();
    });
    failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What the names of all tensors of a layer begin with: up to the layer's number, or else all but the last part.
fn layer_of(name: &str) -> &str {
    let mut end = 0;
    for part in name.split_inclusive('.') {
        end += part.len();
        let number = part.strip_suffix('.').unwrap_or_default();
        if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            return &name[..end];
        }
    }
    name.rfind('.').map_or(name, |dot| &name[..=dot])
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

/// MLX's type of a tensor in a file, if there is one.
pub(super) fn mlx_dtype(dtype: FileDtype) -> Option<Dtype> {
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
pub(super) fn dims(shape: &[usize]) -> Vec<i32> {
    shape.iter().map(|&n| i32::try_from(n).unwrap_or(i32::MAX)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_what_names_begin_with() {
        let layers = [
            ("model.layers.1.mlp.up_proj.weight", "model.layers.1."),
            ("model.layers.12.mlp.experts.3.up_proj.scales", "model.layers.12."),
            ("model.embed_tokens.weight", "model.embed_tokens."),
            ("h.0.weight", "h.0."),
            ("weight", "weight"),
            ("a.7", "a."),
            ("..7..", "..7."),
            ("", ""),
        ];
        for (name, layer) in layers {
            assert_eq!(layer_of(name), layer, "{name}");
        }
    }

    /// A file of two layers, some of whose tensors are several pieces, some nothing.
    fn write(path: &Path) -> Vec<(&'static str, Vec<u8>)> {
        let sizes =
            [("x.1.a", 3 * PIECE + 5), ("x.10.a", 7), ("x.1.b", 1), ("x.1.none", 0), ("x.1.c", PIECE), ("y", 9)];
        let content = |seed: usize, size: usize| (0..size).map(|at| (at * 31 + at / 251 + seed) as u8).collect();
        let tensors: Vec<(_, Vec<u8>)> =
            sizes.into_iter().enumerate().map(|(seed, (name, size))| (name, content(seed, size))).collect();
        let view =
            |bytes| safetensors::tensor::TensorView::new(FileDtype::U8, vec![<[u8]>::len(bytes)], bytes).unwrap();
        let views = tensors.iter().map(|(name, bytes)| (*name, view(bytes)));
        safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
        tensors
    }

    #[test]
    fn what_is_taken_is_what_the_file_has() {
        crate::mlx::init().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let tensors = write(folder.path());
        let mut files = Files::open(folder.path()).unwrap();
        assert_eq!(files.largest_layer(), 4 * PIECE + 6);
        for (name, bytes) in &tensors {
            let array = files.take(name, &[bytes.len()], &[Dtype::Uint8]).unwrap();
            assert!(bytes.is_empty() || array.as_slice::<u8>() == bytes, "{name}");
        }
        assert_eq!(files.names().count(), 0);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_that_names_a_tensor() {
        crate::mlx::init().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let tensors = write(folder.path());
        let mut files = Files::open(folder.path()).unwrap();
        let file = File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
        file.set_len(2 * PIECE as u64).unwrap();
        let (name, bytes) = &tensors[0];
        let error = files.take(name, &[bytes.len()], &[Dtype::Uint8]).unwrap_err();
        assert!(error.status() == Status::Io && error.message().contains("x.1."), "{error}");
    }
}
