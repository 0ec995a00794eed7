//! Small kernels that do in one node what takes MLX several: checked against those at first use.

use std::cell::RefCell;
use std::rc::Rc;

use mlx_rs::{Array, Dtype};

use super::Gpu;
use super::custom::{Constant, CustomKernel, Launch, Source};
use super::paged::format_code;
use crate::error::{Error, Result};
use crate::mlx;

const THREADS: usize = 128;

/// Columns of a thread in `swiglu.k`.
const COLUMNS: usize = 4;

/// Rounds of `noise.k`, as in MLX.
const NOISE_ROUNDS: i32 = 20;

/// A kernel with what is fixed in its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `swiglu.k` for this type.
    SwiGlu(Dtype),
    /// `noise.k` for rows of this length.
    Noise(usize),
}

impl Gpu {
    /// `silu(gate) * up` of `both [T, 2 width]`, gate before up: `[T, width]`; nothing if there is no kernel for it.
    pub fn swiglu(&self, both: &Array) -> Result<Option<Array>> {
        let kernel = match format_code(both.dtype()) {
            Some(_) => checked_kernel(Kind::SwiGlu(both.dtype())),
            None => None,
        };
        kernel.map(|kernel| swiglu(&kernel, both)).transpose()
    }

    /// Standard Gumbel noise `[keys, vocab]`, of each key the same as MLX's; nothing if there is no kernel for it.
    pub fn gumbel(&self, keys: &[u64], vocab: usize) -> Result<Option<Array>> {
        checked_kernel(Kind::Noise(vocab)).map(|kernel| gumbel(&kernel, keys, vocab)).transpose()
    }
}

/// The kernel, if it works here; otherwise a warning. Checked once for each thread.
fn checked_kernel(kind: Kind) -> Option<Rc<CustomKernel>> {
    thread_local! {
        static KNOWN: RefCell<Vec<(Kind, Option<Rc<CustomKernel>>)>> = const { RefCell::new(Vec::new()) };
    }
    let known =
        KNOWN.with_borrow(|known| known.iter().find(|(other, _)| *other == kind).map(|(_, found)| found.clone()));
    known.unwrap_or_else(|| {
        let found = kind.kernel().and_then(|kernel| kind.check(&kernel).map(|()| Rc::new(kernel)));
        if let Err(error) = &found {
            tracing::warn!(?kind, %error, "a GPU kernel is not used");
        }
        let found = found.ok();
        KNOWN.with_borrow_mut(|known| known.push((kind, found.clone())));
        found
    })
}

impl Kind {
    fn kernel(self) -> Result<CustomKernel> {
        let (name, input, second, third, body) = match self {
            Kind::SwiGlu(dtype) => {
                let columns = Constant::Int("COLUMNS", COLUMNS as i32);
                let number = Constant::Type("T", dtype);
                (c"omlx_swiglu", c"both", columns, number, include_str!("source/swiglu.k"))
            }
            Kind::Noise(vocab) => {
                let vocab = Constant::Int("VOCAB", vocab as i32);
                let rounds = Constant::Int("ROUNDS", NOISE_ROUNDS);
                (c"omlx_noise", c"keys", vocab, rounds, include_str!("source/noise.k"))
            }
        };
        CustomKernel::new(&Source {
            name,
            inputs: &[input],
            outputs: &[c"out"],
            headers: &[],
            constants: &[Constant::Int("THREADS", THREADS as i32), second, third],
            body: &[body],
            contiguous: true,
        })
    }

    /// An error if the kernel and MLX's operations differ.
    fn check(self, kernel: &CustomKernel) -> Result<()> {
        let (found, expected, bound) = match self {
            Kind::SwiGlu(dtype) => {
                let key = mlx_rs::random::key(1)?;
                let both = mlx_rs::random::normal::<f32>(&[3, 2 * 700], None, None, &key)?.as_dtype(dtype)?;
                let wide = both.as_dtype(Dtype::Float32)?;
                let (gate, up) = (mlx::columns(&wide, 0, 700)?, mlx::columns(&wide, 700, 1400)?);
                let expected = gate.multiply(mlx_rs::ops::sigmoid(&gate)?)?.multiply(up)?;
                (swiglu(kernel, &both)?.as_dtype(Dtype::Float32)?, expected, 1e-2)
            }
            Kind::Noise(vocab) => {
                let keys = [3, u64::MAX - 77, 1 << 40];
                let row = |&key: &u64| mlx_rs::random::gumbel::<f32>(&[1, vocab as i32], &mlx_rs::random::key(key)?);
                let rows = keys.iter().map(row).collect::<std::result::Result<Vec<_>, _>>()?;
                (gumbel(kernel, &keys, vocab)?, mlx_rs::ops::concatenate(&rows, 0)?, 1e-4)
            }
        };
        let error = found.subtract(&expected)?.abs()?.max(None)?;
        let error: f32 = error.try_item_exact().map_err(|error| Error::backend(format!("MLX: {error}")))?;
        let size: f32 = expected.abs()?.max(None)?.try_item_exact().map_err(|e| Error::backend(format!("MLX: {e}")))?;
        if error <= bound * size {
            return Ok(());
        }
        Err(Error::backend(format!("{self:?} is off by {error:.1e}, {:.1e} is allowed", bound * size)))
    }
}

fn swiglu(kernel: &CustomKernel, both: &Array) -> Result<Array> {
    let (rows, width) = (both.dim(0), both.dim(1) / 2);
    let launch = Launch { groups: [(width as usize).div_ceil(THREADS * COLUMNS), rows as usize, 1], threads: THREADS };
    one(kernel.launch(&[both], &[(&[rows, width], both.dtype())], launch)?)
}

fn gumbel(kernel: &CustomKernel, keys: &[u64], vocab: usize) -> Result<Array> {
    let mut words: Vec<u32> = keys.iter().flat_map(|key| [(key >> 32) as u32, *key as u32]).collect();
    // One key alone would stay in the host's memory (see `mlx::indices`).
    words.resize(words.len().max(4), 0);
    let words = Array::from_slice(&words, &[words.len() as i32]);
    let launch = Launch { groups: [vocab.div_ceil(2).div_ceil(THREADS), keys.len(), 1], threads: THREADS };
    one(kernel.launch(&[&words], &[(&[keys.len() as i32, vocab as i32], Dtype::Float32)], launch)?)
}

fn one(results: Vec<Array>) -> Result<Array> {
    results.into_iter().next().ok_or_else(|| Error::internal("a kernel without an output"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlx::Device;

    #[test]
    fn without_a_gpu_there_are_no_kernels() {
        mlx::init().unwrap();
        if mlx::gpu_available() {
            return;
        }
        let gpu = Gpu::new(32);
        let outcome = mlx::on_device(Device::Cpu, || {
            let both = mlx_rs::ops::zeros::<f32>(&[2, 8])?;
            Ok(gpu.swiglu(&both)?.is_none() && gpu.gumbel(&[1, 2], 10)?.is_none())
        });
        assert!(outcome.unwrap());
    }
}
