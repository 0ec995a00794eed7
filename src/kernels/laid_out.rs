//! Weights that lie as the CPU's products read them: [`lay_out`](super::cpu::matmul::lay_out), once for a loaded model.

use mlx_rs::{Array, Dtype};

use super::cpu::floats::{Floats, FloatsMut};
use super::cpu::matmul::{Precision, laid_out_len, lay_out};
use super::cpu::matrix::{Matrix as Packing, Storage};
use super::node::{CpuKernel, Input, Output, node};
use super::ops::{Cpu, last};
use crate::error::{Error, Result};
use crate::mlx::Matrix;

/// A matrix of f32 that products read as it lies. Of no use to anything else.
#[derive(Debug, Clone)]
pub struct LaidOut {
    /// Of one dimension.
    pub(super) panels: Array,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// The weights of a product.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// As the checkpoint has them.
    Stored(&'a Matrix),
    /// As products read them.
    LaidOut(&'a LaidOut),
}

impl<'a> From<&'a Matrix> for Weight<'a> {
    fn from(matrix: &'a Matrix) -> Self {
        Weight::Stored(matrix)
    }
}

impl Cpu {
    /// Lays out a matrix whose products mostly have many rows, in as much memory as it has, evaluated so that the matrix can go;
    /// `None` where products would be others: sums in a fixed order, or numbers of another type.
    pub fn lay_out(&self, matrix: &Matrix) -> Result<Option<LaidOut>> {
        let Matrix::Dense(weight) = matrix else { return Ok(None) };
        let &[rows, columns] = weight.shape() else { return Ok(None) };
        if weight.dtype() != Dtype::Float32 || self.precision != Precision::Fast {
            return Ok(None);
        }
        let (rows, columns) = (rows as usize, columns as usize);
        let len = i32::try_from(laid_out_len(rows, columns));
        let len = len.map_err(|_| Error::internal("a matrix of more than 2^31 numbers"))?;
        let panels = node(LayOut { cpu: self.clone(), rows, columns }, &[weight], &[len], Dtype::Float32)?;
        panels.eval()?;
        Ok(Some(LaidOut { panels, rows, columns }))
    }
}

struct LayOut {
    cpu: Cpu,
    rows: usize,
    columns: usize,
}

impl CpuKernel for LayOut {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let (Floats::F32(weights), FloatsMut::F32(panels)) = (inputs[0].floats()?, last(&mut outputs)?) else {
            return Err(Error::internal("a layout of another type"));
        };
        let matrix = Packing { rows: self.rows, columns: self.columns, storage: Storage::Dense(Floats::F32(weights)) };
        lay_out(self.cpu.isa, &self.cpu.workers, matrix, panels);
        Ok(())
    }
}
