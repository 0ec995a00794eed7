//! GPU kernels of our own: a paged cache of keys and values that they write and read in place, and small fused operations.
//!
//! The kernels in `source/` are bodies of functions in the Metal Shading Language, of which they use a subset that
//! `source/cuda.h` turns into CUDA. They have run on CUDA (one H200); as Metal they have never been compiled.

mod custom;
mod fused;
mod layout;
pub mod paged;
mod sources;

pub use custom::Language;
pub use layout::Layout;
pub use paged::{Order, PagedAttention, PagedSpec, Pool};

/// The kernels' place in a [`Backend`](super::Backend): MLX's operations on a GPU, and ours where they work.
#[derive(Debug, Clone, Copy)]
pub struct Gpu {
    /// Tokens of a block of the KV cache.
    pub block_tokens: usize,
    /// Rows from which on a quantised product is faster with its weights unpacked before.
    pub unpack_from: usize,
}

/// See [`Gpu::unpack_from`]; measured on an H200. Metal's product is good at any size.
const UNPACK_FROM: usize = 256;

impl Gpu {
    /// For the GPU of the loaded MLX.
    pub fn new(block_tokens: usize) -> Self {
        let unpack_from = if Language::of_mlx() == Ok(Language::Cuda) { UNPACK_FROM } else { usize::MAX };
        Self { block_tokens, unpack_from }
    }
}
