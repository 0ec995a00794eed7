//! Kernels of our own, where MLX has nothing or is far from the machine's limit.
//!
//! `cpu` holds the computations, on slices and without MLX; `node` and `shim.cpp` put them into MLX's graph; [`Cpu`]
//! offers them as operations on arrays. `gpu` has kernels that MLX compiles at run time.

/// What kernels compute, as a number: to be increased whenever keys or values come out differently, so that stored ones
/// of before are not used.
pub const NUMERICS: u32 = 3;

mod experts;
pub mod gpu;
mod laid_out;
mod node;
mod ops;
mod recurrent;
mod scratch;
mod sides;
mod texts;
mod transfer;

pub use omlx_kernels_cpu as cpu;

pub use cpu::attention::{AttentionKind, Segment, Window};
pub use cpu::matmul::Precision;
pub use cpu::routing::{GroupScore, Groups, Normalize, Routing, Scores, Ties};
pub use cpu::sample::Draw;
pub use cpu::scan::StateRun;
pub use experts::{ExpertActivation, ExpertOperands, RouterOperands, SharedOperands};
pub use gpu::Gpu;
pub use laid_out::{LaidOut, Weight};
pub use node::{CpuKernel, Input, Output, PANIC_MARK, check, node};
pub use ops::{Backend, Cpu, Heads, Join, NormOf, Operand, Placement, Rotation, ValuePool};
pub use recurrent::{Recurrence, RecurrentColumns, RecurrentKind, RecurrentWeights, StatePlacement, Taps, UNIT_EPS};
pub use sides::{Side, after};
pub use texts::{Columns, TextAttentionKind};
pub use transfer::read_array;
