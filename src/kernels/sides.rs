//! Two sides of a step that run at the same time: what waits for memory leaves a part of the threads to what multiplies.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::cpu::threads::{Sharing, beside};
use super::node::{CpuKernel, Input, Output, node};
use super::ops::Cpu;
use crate::error::{Error, Result};
use crate::mlx::SideStream;

impl Cpu {
    /// Lets two sides share the threads; `None` where there is only one.
    pub fn share(&self) -> Option<Arc<Sharing>> {
        (self.workers().count() > 1).then(|| Arc::new(self.workers().share()))
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

/// An array, `[1]` u32, that ends `sharing` when it is computed: once `array` is.
pub fn end_sharing(sharing: &Arc<Sharing>, array: &Array) -> Result<Array> {
    node(End(Arc::clone(sharing)), &[array], &[1], Dtype::Uint32)
}

struct End(Arc<Sharing>);

impl CpuKernel for End {
    fn run(&self, _: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        self.0.end();
        outputs.pop().ok_or_else(|| Error::internal("a kernel without output"))?.into_words()?.fill(0);
        Ok(())
    }
}
