//! The kernels of each kind of layer against MLX's operations, and that wrong tables show.

use mlx_rs::Dtype;
use omlx::error::{Error, Result};
use omlx::kernels::Window;
use omlx::kernels::gpu::PagedSpec;
use omlx::nn::compare_paged;

pub fn agree() -> Result<()> {
    let bf16 = PagedSpec {
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        block_tokens: 32,
        scale: 128f32.powf(-0.5),
        window: None,
        dtype: Dtype::Bfloat16,
    };
    for spec in [
        bf16,
        PagedSpec { heads: 14, kv_heads: 2, head_dim: 64, block_tokens: 16, ..bf16 },
        PagedSpec { heads: 32, window: Some(Window::Sliding(40)), dtype: Dtype::Float16, ..bf16 },
        PagedSpec { heads: 40, window: Some(Window::Chunked(40)), ..bf16 },
        PagedSpec { heads: 8, head_dim: 96, block_tokens: 8, dtype: Dtype::Float32, ..bf16 },
        PagedSpec { heads: 4, kv_heads: 1, head_dim: 256, block_tokens: 64, ..bf16 },
    ] {
        compare_paged(&spec, false).map_err(|error| error.context(format!("{spec:?}")))?;
        if compare_paged(&spec, true).is_ok() {
            return Err(Error::internal(format!("wrong tables go unnoticed: {spec:?}")));
        }
    }
    Ok(())
}
