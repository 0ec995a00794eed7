//! Token embeddings, also used as the output head of models with tied weights.

use mlx_rs::{Array, Dtype};

use super::linear::project;
use crate::error::Result;
use crate::kernels::{Backend, Operand};
use crate::mlx::Matrix;
use crate::weights::Weights;

/// A table `[vocab, hidden]`, looked up by token id.
#[derive(Debug)]
pub struct Embedding {
    table: Matrix,
    dtype: Option<Dtype>,
    backend: Backend,
}

impl Embedding {
    /// Takes `{path}.weight [vocab, hidden]`.
    pub fn load(weights: &mut Weights, path: &str, vocab: usize, hidden: usize) -> Result<Self> {
        let table = weights.matrix(path, vocab, hidden)?;
        let dtype = match &table {
            _ if matches!(weights.backend(), Backend::Cpu(_)) => Some(Dtype::Float32),
            Matrix::Quantized(q) if q.biases.is_none() => weights.dtype().or(Some(Dtype::Bfloat16)),
            Matrix::Quantized(q) => Some(q.scales.dtype()),
            Matrix::Dense(_) => None,
        };
        Ok(Self { table, dtype, backend: weights.backend().clone() })
    }

    /// `ids [T] -> [T, hidden]`.
    pub fn forward(&self, ids: &Array) -> Result<Array> {
        if let Some(cpu) = self.backend.kernels(&self.table) {
            return cpu.take_rows(&self.table, ids);
        }
        match &self.table {
            Matrix::Dense(table) => Ok(table.take_axis(ids, 0)?),
            Matrix::Quantized(table) => table.rows(ids, self.dtype.unwrap_or(Dtype::Float32)),
        }
    }

    /// `x [T, hidden] -> [T, vocab]`: the table as an output projection.
    pub fn as_head(&self, x: &Array) -> Result<Array> {
        project(&self.backend, Operand { matrix: (&self.table).into(), bias: None }, x)
    }
}
