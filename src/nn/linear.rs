//! Linear layers, dense or quantised as the checkpoint has them.

use mlx_rs::Array;

use super::{Activation, RmsNorm};
use crate::error::{Error, Result};
use crate::kernels::{Backend, Cpu, Join, LaidOut, Operand, Weight};
use crate::mlx::{self, Matrix, QuantizedMatrix};
use crate::weights::Weights;

#[derive(Debug, Clone)]
enum Form {
    /// As the checkpoint has it.
    Stored(Matrix),
    /// As the CPU kernels read it.
    LaidOut(LaidOut),
}

/// `y = x W^T + b` over the last axis. A clone has the same arrays.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Form,
    bias: Option<Array>,
    backend: Backend,
}

impl Linear {
    /// Takes `{path}.weight [output, input]` (with scales and biases if quantised) and `{path}.bias [output]`.
    pub fn load(weights: &mut Weights, path: &str, input: usize, output: usize, bias: bool) -> Result<Self> {
        let matrix = weights.matrix(path, output, input)?;
        let bias = bias.then(|| weights.tensor(&format!("{path}.bias"), &[output])).transpose()?;
        Ok(Self { weight: Form::Stored(matrix), bias, backend: weights.backend().clone() })
    }

    /// Lays its weights out for products of many rows, where the CPU kernels compute those; outputs cannot be taken apart or
    /// rearranged from then on, nor gate each other in the same product.
    pub(super) fn lay_out(&mut self) -> Result<()> {
        if let (Backend::Cpu(cpu), Form::Stored(matrix)) = (&self.backend, &self.weight)
            && let Some(laid_out) = cpu.lay_out(matrix)?
        {
            self.weight = Form::LaidOut(laid_out);
        }
        Ok(())
    }

    fn stored(&self) -> Result<&Matrix> {
        match &self.weight {
            Form::Stored(matrix) => Ok(matrix),
            Form::LaidOut(_) => Err(Error::internal("weights that are laid out have no rows")),
        }
    }

    /// The layer that gives outputs `from..to` of this one's.
    pub fn outputs(&self, from: usize, to: usize) -> Result<Self> {
        self.rearranged(|rows| mlx::rows(rows, from, to))
    }

    /// With outputs in another order: `order[i]` becomes output `i`. Evaluated, so that the old ones can go.
    pub(super) fn reordered(&self, order: &[i32]) -> Result<Self> {
        let order = mlx::indices(order)?;
        self.rearranged(|rows| {
            let taken = rows.take_axis(&order, 0)?;
            taken.eval()?;
            Ok(taken)
        })
    }

    /// With other outputs, whose rows `change` makes of those of each array.
    fn rearranged(&self, change: impl Fn(&Array) -> Result<Array>) -> Result<Self> {
        let matrix = match self.stored()? {
            Matrix::Dense(weight) => Matrix::Dense(change(weight)?),
            Matrix::Quantized(matrix) => Matrix::Quantized(QuantizedMatrix {
                weight: change(&matrix.weight)?,
                scales: change(&matrix.scales)?,
                biases: matrix.biases.as_ref().map(&change).transpose()?,
                format: matrix.format,
            }),
        };
        let bias = self.bias.as_ref().map(&change).transpose()?;
        Ok(Self { weight: Form::Stored(matrix), bias, backend: self.backend.clone() })
    }

    pub(super) fn operand(&self) -> Operand<'_> {
        let matrix = match &self.weight {
            Form::Stored(matrix) => matrix.into(),
            Form::LaidOut(laid_out) => Weight::LaidOut(laid_out),
        };
        Operand { matrix, bias: self.bias.as_ref() }
    }

    /// The kernels, if all of `layers` can be computed by them.
    fn kernels<'a>(layers: &[&'a Linear]) -> Option<&'a Cpu> {
        let mut kernels = layers.iter().map(|layer| layer.backend.kernels(layer.operand().matrix));
        let first = kernels.next()??;
        kernels.all(|cpu| cpu.is_some()).then_some(first)
    }

    /// `x [T, input] -> [T, output]`.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        project(&self.backend, self.operand(), x)
    }

    /// `activation(forward(y))`, where `y` is `x` or, if there is a norm, `norm(x)`.
    pub fn forward_activated(&self, x: &Array, norm: Option<&RmsNorm>, activation: Activation) -> Result<Array> {
        let join = match activation {
            Activation::Gelu => Some(Join::Gelu),
            Activation::SquaredRelu => Some(Join::SquaredRelu),
            Activation::GeluTanh | Activation::Relu | Activation::Silu | Activation::Tanh => None,
        };
        if let (Some(cpu), Some(join)) = (Self::kernels(&[self]), join) {
            return cpu.linear(x, norm.map(RmsNorm::parts), &[self.operand()], join);
        }
        let normed = norm.map(|norm| norm.forward(x)).transpose()?;
        activation.forward(&self.forward(normed.as_ref().unwrap_or(x))?)
    }

    /// `forward(x)`, added to `residual` if there is one.
    pub fn forward_to(&self, x: &Array, residual: Option<&Array>) -> Result<Array> {
        match residual {
            Some(residual) => self.forward_onto(x, residual),
            None => self.forward(x),
        }
    }

    /// `residual + forward(x)`.
    pub fn forward_onto(&self, x: &Array, residual: &Array) -> Result<Array> {
        match Self::kernels(&[self]) {
            Some(cpu) => cpu.linear(x, None, &[self.operand()], Join::Add(residual)),
            None => Ok(residual.add(self.forward(x)?)?),
        }
    }
}

/// Layers that read the same input, their outputs side by side.
#[derive(Debug)]
pub struct Joined {
    /// With MLX's operations one layer, if all have the same format: a product has a price of its own, however narrow.
    layers: Vec<Linear>,
}

impl Joined {
    /// Joins `layers`, of which there must be one.
    pub fn new(layers: Vec<Linear>) -> Result<Self> {
        let merged = match Linear::kernels(&layers.iter().collect::<Vec<_>>()) {
            Some(_) => None,
            None => merge(&layers)?,
        };
        Ok(Self { layers: merged.map_or(layers, |one| vec![one]) })
    }

    /// See [`Linear::lay_out`].
    pub(super) fn lay_out(&mut self) -> Result<()> {
        self.layers.iter_mut().try_for_each(Linear::lay_out)
    }

    pub(super) fn operands(&self) -> Vec<Operand<'_>> {
        self.layers.iter().map(Linear::operand).collect()
    }

    fn kernels(&self) -> Option<&Cpu> {
        Linear::kernels(&self.layers.iter().collect::<Vec<_>>())
    }

    /// `x [T, input]`, normalised before if there is a norm, to `[T, sum of outputs]`.
    pub fn forward(&self, x: &Array, norm: Option<&RmsNorm>) -> Result<Array> {
        match (self.kernels(), norm) {
            (Some(cpu), Some(norm)) => cpu.linear(x, Some(norm.parts()), &self.operands(), Join::Concat),
            (None, Some(norm)) => self.project(&norm.forward(x)?),
            (_, None) => self.project(x),
        }
    }

    /// `x [T, input]` to `[T, sum of outputs]`.
    pub fn project(&self, x: &Array) -> Result<Array> {
        if let Some(cpu) = self.kernels() {
            return cpu.linear(x, None, &self.operands(), Join::Concat);
        }
        match &self.layers[..] {
            [one] => one.forward(x),
            layers => {
                let outputs = layers.iter().map(|layer| layer.forward(x)).collect::<Result<Vec<_>>>()?;
                Ok(mlx_rs::ops::concatenate(&outputs, -1)?)
            }
        }
    }

    /// Of two layers of the same width, `activation(gate(y)) * up(y)`, where `y` is `x` or, if there is a norm, `norm(x)`.
    pub fn forward_gated(&self, x: &Array, norm: Option<&RmsNorm>, activation: Activation) -> Result<Array> {
        let silu = activation == Activation::Silu;
        if let Some(cpu) = self.kernels().filter(|_| silu) {
            return cpu.linear(x, norm.map(RmsNorm::parts), &self.operands(), Join::SwiGlu);
        }
        let both = self.forward(x, norm)?;
        let gpu = self.layers[0].backend.gpu().filter(|_| silu);
        if let Some(gated) = gpu.map(|gpu| gpu.swiglu(&both)).transpose()?.flatten() {
            return Ok(gated);
        }
        let width = both.dim(1) as usize / 2;
        let (gate, up) = (mlx::columns(&both, 0, width)?, mlx::columns(&both, width, 2 * width)?);
        Ok(activation.forward(&gate)?.multiply(up)?)
    }
}

/// One layer with the outputs of all, if they have one format; evaluated, so that the parts can go.
fn merge(layers: &[Linear]) -> Result<Option<Linear>> {
    let join = |parts: Vec<&Array>| -> Result<Array> { Ok(mlx_rs::ops::concatenate(&parts, 0)?) };
    let all = |part: fn(&Linear) -> Option<&Array>| -> Result<Option<Array>> {
        layers.iter().map(part).collect::<Option<Vec<_>>>().map(join).transpose()
    };
    let dense = all(|layer| match &layer.weight {
        Form::Stored(Matrix::Dense(weight)) => Some(weight),
        _ => None,
    })?;
    let packed: Option<Vec<&QuantizedMatrix>> = layers
        .iter()
        .map(|layer| match &layer.weight {
            Form::Stored(Matrix::Quantized(matrix)) => Some(matrix),
            _ => None,
        })
        .collect();
    let matrix = match (dense, packed) {
        (Some(weight), _) => Matrix::Dense(weight),
        (None, Some(parts)) => {
            let first = parts[0];
            if parts.iter().any(|part| part.format != first.format || part.biases.is_some() != first.biases.is_some()) {
                return Ok(None);
            }
            let biases: Option<Vec<&Array>> = parts.iter().map(|part| part.biases.as_ref()).collect();
            Matrix::Quantized(QuantizedMatrix {
                weight: join(parts.iter().map(|part| &part.weight).collect())?,
                scales: join(parts.iter().map(|part| &part.scales).collect())?,
                biases: biases.map(join).transpose()?,
                format: first.format,
            })
        }
        (None, None) => return Ok(None),
    };
    let bias = all(|layer| layer.bias.as_ref())?;
    if bias.is_none() && layers.iter().any(|layer| layer.bias.is_some()) {
        return Ok(None);
    }
    let arrays = match &matrix {
        Matrix::Dense(weight) => vec![weight],
        Matrix::Quantized(matrix) => [&matrix.weight, &matrix.scales].into_iter().chain(&matrix.biases).collect(),
    };
    mlx_rs::transforms::eval(arrays.into_iter().chain(&bias))?;
    Ok(Some(Linear { weight: Form::Stored(matrix), bias, backend: layers[0].backend.clone() }))
}

/// `x [T, columns] -> [T, rows]` on `backend`.
pub(super) fn project(backend: &Backend, operand: Operand<'_>, x: &Array) -> Result<Array> {
    if let Some(cpu) = backend.kernels(operand.matrix) {
        return cpu.linear(x, None, &[operand], Join::Concat);
    }
    let y = match operand.matrix {
        Weight::LaidOut(_) => return Err(Error::internal("weights that are laid out are for the CPU kernels")),
        Weight::Stored(Matrix::Dense(weight)) => x.matmul(weight.transpose()?)?,
        Weight::Stored(Matrix::Quantized(weight)) => match backend.gpu() {
            Some(gpu) if gpu.unpacks(x.dim(0) as usize) => x.matmul(weight.unpacked(x.dtype())?.transpose()?)?,
            _ => weight.matmul(x)?,
        },
    };
    Ok(match operand.bias {
        Some(bias) => y.add(bias)?,
        None => y,
    })
}
