//! Two sides that run at the same time, steps and what is beside them: what waits for memory leaves a part of the threads to
//! what multiplies.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::cpu::threads::{Sharing, beside};
use super::node::{CpuKernel, Input, Output, node};
use super::ops::Cpu;
use crate::error::{Error, Result};
use crate::mlx::SideStream;

impl Cpu {
    /// Whether there are threads for two sides.
    pub fn can_share(&self) -> bool {
        self.workers().count() > 1
    }

    /// Lets two sides share the threads, if they can.
    pub fn share(&self) -> Option<Arc<Sharing>> {
        self.can_share().then(|| Arc::new(self.workers().share()))
    }
}

/// Where the second side is computed.
pub struct Side(SideStream);

impl Side {
    /// One that no other thread uses.
    pub fn new() -> Result<Self> {
        SideStream::new().map(Self)
    }

    /// Has what `body` describes be computed here; its kernels take the second side's part of the threads.
    pub fn run<T>(&self, body: impl FnOnce() -> T) -> T {
        self.0.run(|| beside(body))
    }
}

/// An array, `[1]` u32, that calls `then` when it is computed, on one of MLX's threads: once `array` is.
pub fn after(array: &Array, then: impl Fn() + Send + Sync + 'static) -> Result<Array> {
    node(After(then), &[array], &[1], Dtype::Uint32)
}

struct After<F>(F);

impl<F: Fn() + Send + Sync> CpuKernel for After<F> {
    fn run(&self, _: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        (self.0)();
        outputs.pop().ok_or_else(|| Error::internal("a kernel without output"))?.into_words()?.fill(0);
        Ok(())
    }
}
