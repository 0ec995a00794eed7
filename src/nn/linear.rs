//! Linear layers, dense or quantised as the checkpoint has them.

use mlx_rs::Array;

use super::RmsNorm;
use crate::error::Result;
use crate::kernels::{Backend, Cpu, Join, Operand};
use crate::mlx::Matrix;
use crate::weights::Weights;

/// `y = x W^T + b` over the last axis.
#[derive(Debug)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
    backend: Backend,
}

impl Linear {
    /// Takes `{path}.weight [output, input]` (with scales and biases if quantised) and `{path}.bias [output]`.
    pub fn load(weights: &mut Weights, path: &str, input: usize, output: usize, bias: bool) -> Result<Self> {
        let matrix = weights.matrix(path, output, input)?;
        let bias = bias.then(|| weights.tensor(&format!("{path}.bias"), &[output])).transpose()?;
        Ok(Self { matrix, bias, backend: weights.backend().clone() })
    }

    fn operand(&self) -> Operand<'_> {
        Operand { matrix: &self.matrix, bias: self.bias.as_ref() }
    }

    /// The kernels, if all of `layers` can be computed by them.
    fn kernels<'a>(layers: &[&'a Linear]) -> Option<&'a Cpu> {
        let mut kernels = layers.iter().map(|layer| layer.backend.kernels(&layer.matrix));
        let first = kernels.next()??;
        kernels.all(|cpu| cpu.is_some()).then_some(first)
    }

    /// `x [T, input] -> [T, output]`.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        project(&self.backend, self.operand(), x)
    }

    /// `residual + forward(x)`.
    pub fn forward_onto(&self, x: &Array, residual: &Array) -> Result<Array> {
        match Self::kernels(&[self]) {
            Some(cpu) => cpu.linear(x, None, &[self.operand()], Join::Add(residual)),
            None => Ok(residual.add(self.forward(x)?)?),
        }
    }

    /// The outputs of layers for `norm(x)`, side by side: `[T, sum of outputs]`.
    pub fn forward_joined(layers: &[&Linear], x: &Array, norm: &RmsNorm) -> Result<Array> {
        if let Some(cpu) = Self::kernels(layers) {
            let operands: Vec<_> = layers.iter().map(|layer| layer.operand()).collect();
            return cpu.linear(x, Some(norm.parts()), &operands, Join::Concat);
        }
        let x = &norm.forward(x)?;
        let outputs = layers.iter().map(|layer| layer.forward(x)).collect::<Result<Vec<_>>>()?;
        Ok(mlx_rs::ops::concatenate(&outputs, -1)?)
    }

    /// `silu(gate(y)) * up(y)` of `y = norm(x)`.
    pub fn forward_gated(gate: &Linear, up: &Linear, x: &Array, norm: &RmsNorm) -> Result<Array> {
        if let Some(cpu) = Self::kernels(&[gate, up]) {
            return cpu.linear(x, Some(norm.parts()), &[gate.operand(), up.operand()], Join::SwiGlu);
        }
        let x = &norm.forward(x)?;
        let gate = gate.forward(x)?;
        // Composed by hand: the activations of mlx-rs use MLX's compile, which starts a compiler on the CPU.
        Ok(gate.multiply(mlx_rs::ops::sigmoid(&gate)?)?.multiply(up.forward(x)?)?)
    }
}

/// `x [T, columns] -> [T, rows]` on `backend`.
pub(super) fn project(backend: &Backend, operand: Operand<'_>, x: &Array) -> Result<Array> {
    if let Some(cpu) = backend.kernels(operand.matrix) {
        return cpu.linear(x, None, &[operand], Join::Concat);
    }
    let y = match operand.matrix {
        Matrix::Dense(weight) => x.matmul(weight.transpose()?)?,
        Matrix::Quantized(weight) => weight.matmul(x)?,
    };
    Ok(match operand.bias {
        Some(bias) => y.add(bias)?,
        None => y,
    })
}
