//! Kernels for CPUs, in plain Rust on slices: no MLX here.
//!
//! Sizes that do not agree are defects of the caller and panic before anything is read.

// Register tiles index several arrays by one counter, in plain loops (see `simd`).
#![allow(clippy::needless_range_loop)]

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod convolution;
mod dot;
pub mod elementwise;
pub mod experts;
pub mod floats;
mod gemm;
mod integer;
mod math;
pub mod matmul;
pub mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod quantize;
pub mod routing;
pub mod sample;
pub mod scalar;
pub mod scan;
pub mod simd;
pub mod texts;
pub mod threads;

pub use simd::Isa;
