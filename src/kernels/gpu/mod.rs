//! GPU kernels of our own: a paged cache of keys and values that they write and read in place, and small fused operations.
//!
//! The kernels in `source/` are bodies of functions in the Metal Shading Language, of which they use a subset that
//! `source/cuda.h` turns into CUDA. They have run on CUDA (one H200); as Metal they have never been compiled.

mod custom;
mod fused;
mod heads;
mod layout;
pub mod paged;
mod sources;

use mlx_rs::memory;

pub use custom::Language;
pub use heads::{HeadsKernel, HeadsSpec};
pub use layout::Layout;
pub use paged::{Order, PagedAttention, PagedSpec, Pool};

/// The kernels' place in a [`Backend`](super::Backend): MLX's operations on a GPU, and ours where they work.
#[derive(Debug, Clone, Copy)]
pub struct Gpu {
    /// Tokens of a block of the KV cache.
    pub block_tokens: usize,
    /// Whether MLX computes with CUDA, whose quantised product is slow for many rows; Metal's needs no help.
    cuda: bool,
}

impl Gpu {
    /// For the GPU of the loaded MLX.
    pub fn new(block_tokens: usize) -> Self {
        Self { block_tokens, cuda: Language::of_mlx() == Ok(Language::Cuda) }
    }

    /// Whether a product of that many rows with a quantised matrix is to be computed with the matrix unpacked before, and there is
    /// room for it: steps on their way hold what their layers have unpacked. With 512 rows it is faster, with large matrices from
    /// 256 on (measured on an H200); and MLX's own kernel gives wrong tiles now and then, which is rare with fewer rows
    /// (BENCHMARKS.md).
    pub fn unpacks(&self, rows: usize) -> bool {
        let faster = self.cuda && rows >= 256;
        faster && matches!((memory::active_memory(), memory::memory_limit()), (Ok(used), Ok(limit)) if used < limit / 2)
    }
}
