//! Linear layers, dense or quantised as the checkpoint has them.

use mlx_rs::Array;

use crate::error::Result;
use crate::weights::{Matrix, Weights};

/// `y = x W^T + b` over the last axis.
#[derive(Debug)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
}

impl Linear {
    /// Takes `{path}.weight [output, input]` (with scales and biases if quantised) and `{path}.bias [output]`.
    pub fn load(weights: &mut Weights, path: &str, input: usize, output: usize, bias: bool) -> Result<Self> {
        let matrix = weights.matrix(path, output, input)?;
        let bias = bias.then(|| weights.tensor(&format!("{path}.bias"), &[output])).transpose()?;
        Ok(Self { matrix, bias })
    }

    /// `x [T, input] -> [T, output]`.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        let y = project(&self.matrix, x)?;
        Ok(match &self.bias {
            Some(bias) => y.add(bias)?,
            None => y,
        })
    }
}

/// `x [T, columns] -> [T, rows]`: the product with the transposed matrix.
pub(super) fn project(matrix: &Matrix, x: &Array) -> Result<Array> {
    match matrix {
        Matrix::Dense(weight) => Ok(x.matmul(weight.transpose()?)?),
        Matrix::Quantized(weight) => weight.matmul(x),
    }
}
