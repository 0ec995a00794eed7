//! Local language models as a library: an engine pool over Apple's MLX, behind a stable C ABI (`include/omlx.h`).
//!
//! The C functions are in [`capi`]; the Rust modules below it are the implementation, public for the project's own
//! examples and tests, and without a promise of stability. `ARCHITECTURE.md` draws the picture.

pub mod cache;
pub mod capi;
pub mod config;
pub mod engine;
pub mod error;
mod fault;
pub mod hub;
pub mod kernels;
pub mod ledger;
#[cfg(test)]
mod logged;
pub mod mlx;
pub mod models;
pub mod nn;
mod panics;
pub mod pool;
pub mod sampling;
mod sync;
pub mod text;
pub mod weights;
