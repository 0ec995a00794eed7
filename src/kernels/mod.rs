//! Kernels of our own, where MLX has nothing or is far from the machine's limit.
//!
//! `cpu` holds the computations, on slices and without MLX; `node` and `shim.cpp` put them into MLX's graph; [`Cpu`]
//! offers them as operations on arrays. `gpu` has kernels that MLX compiles at run time.

pub mod cpu;
pub mod gpu;
mod node;
mod ops;

pub use cpu::attention::{AttentionKind, Segment};
pub use cpu::matmul::Precision;
pub use cpu::sample::Draw;
pub use gpu::Gpu;
pub use node::{CpuKernel, Input, Output, PANIC_MARK, check, node};
pub use ops::{Backend, Cpu, Heads, Join, NormOf, Operand, Placement, Rotation};
