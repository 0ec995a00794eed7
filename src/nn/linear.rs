//! Linear layers, dense or quantised as the checkpoint has them.

use mlx_rs::Array;

use crate::error::Result;
use crate::kernels::{Backend, Cpu, Join, Operand};
use crate::mlx::{self, Matrix};
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
            Some(cpu) => cpu.linear(x, &[self.operand()], Join::Add(residual)),
            None => Ok(residual.add(self.forward(x)?)?),
        }
    }

    /// The outputs of layers that share their input, in their order.
    pub fn forward_all<const N: usize>(layers: [&Linear; N], x: &Array) -> Result<[Array; N]> {
        let Some(cpu) = Self::kernels(&layers) else {
            return try_map(layers, |layer| layer.forward(x));
        };
        let joined = cpu.linear(x, &layers.map(Linear::operand), Join::Concat)?;
        let mut start = 0;
        try_map(layers, |layer| {
            let width = layer.width();
            start += width;
            mlx::columns(&joined, start - width, start)
        })
    }

    /// `silu(gate(x)) * up(x)`.
    pub fn forward_gated(gate: &Linear, up: &Linear, x: &Array) -> Result<Array> {
        if let Some(cpu) = Self::kernels(&[gate, up]) {
            return cpu.linear(x, &[gate.operand(), up.operand()], Join::SwiGlu);
        }
        let gate = gate.forward(x)?;
        // Composed by hand: the activations of mlx-rs use MLX's compile, which starts a compiler on the CPU.
        Ok(gate.multiply(mlx_rs::ops::sigmoid(&gate)?)?.multiply(up.forward(x)?)?)
    }

    /// Output features.
    fn width(&self) -> usize {
        match &self.matrix {
            Matrix::Dense(weight) => weight.dim(0) as usize,
            Matrix::Quantized(matrix) => matrix.weight.dim(0) as usize,
        }
    }
}

fn try_map<T, U, const N: usize>(items: [T; N], mut f: impl FnMut(T) -> Result<U>) -> Result<[U; N]> {
    let done = items.into_iter().map(&mut f).collect::<Result<Vec<_>>>()?;
    done.try_into().map_err(|_| crate::error::Error::internal("as many results as items"))
}

/// `x [T, columns] -> [T, rows]` on `backend`.
pub(super) fn project(backend: &Backend, operand: Operand<'_>, x: &Array) -> Result<Array> {
    if let Some(cpu) = backend.kernels(operand.matrix) {
        return cpu.linear(x, &[operand], Join::Concat);
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
