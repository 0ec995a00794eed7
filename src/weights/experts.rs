//! The matrices of a layer's experts as stacks, in whichever of the known ways a checkpoint stores them.

use mlx_rs::{Array, Dtype};

use super::{Source, Weights};
use crate::error::{Error, Result};
use crate::mlx::{self, Matrix, QuantFormat, QuantMode, QuantizedMatrix};

/// A layer's experts.
#[derive(Debug, Clone)]
pub struct ExpertShape {
    /// How many there are.
    pub count: usize,
    /// Width of what they take.
    pub columns: usize,
    /// Width inside.
    pub inner: usize,
    /// Whether there is a gate.
    pub gated: bool,
    /// Whether each has biases.
    pub bias: bool,
    /// What MLX's tools put before the names of stacked projections: `switch_mlp` for most.
    pub stacked: &'static str,
    /// What they call gate, up and down: [`PROJECTIONS`] for most.
    pub projections: [&'static str; 3],
    /// Whether `experts.gate_up_proj` and `experts.down_proj` are `[experts, input, output]` (Llama 4).
    pub transposed: bool,
}

/// The usual names of gate, up and down.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// What they are called in separate experts.
const SEPARATE: [[&str; 3]; 2] = [PROJECTIONS, ["w1", "w3", "w2"]];

/// Codes of a block of mxfp4 in Hugging Face's gpt-oss, and the bytes that they take.
const BLOCK: (usize, usize) = (32, 16);

/// Matrices of the same shape, one for each expert.
#[derive(Debug)]
pub struct Stack {
    /// `[experts, out, in]`, dense or quantised.
    pub matrix: Matrix,
    /// `[experts, out]`.
    pub bias: Option<Array>,
}

/// The stacks of a layer.
#[derive(Debug)]
pub struct ExpertStacks {
    /// Gate and up, or up alone.
    pub inputs: Vec<Stack>,
    /// Down.
    pub output: Stack,
}

/// What is read of separate experts at once.
#[derive(Clone, Copy)]
struct Part {
    /// Place among gate, up and down.
    which: usize,
    rows: usize,
    columns: usize,
}

impl ExpertShape {
    fn parts(&self) -> (Vec<Part>, Part) {
        let input = |which| Part { which, rows: self.inner, columns: self.columns };
        let inputs = if self.gated { vec![input(0), input(1)] } else { vec![input(1)] };
        (inputs, Part { which: 2, rows: self.columns, columns: self.inner })
    }
}

impl Weights {
    /// The experts under `path`: stacked as MLX's tools write them (mlx-lm, `models/switch_layers.py`), or as Hugging Face has
    /// them, separate (`experts.N.up_proj`, `experts.N.w3`) or gate and up in one tensor (`experts.gate_up_proj`,
    /// `input_linear`, and gpt-oss's blocks of mxfp4).
    ///
    /// Separate and joined ones are copied, a projection at a time, so that at most a layer is there twice.
    pub fn experts(&mut self, path: &str, shape: &ExpertShape) -> Result<ExpertStacks> {
        let stacked = if shape.stacked.is_empty() { path.to_owned() } else { format!("{path}.{}", shape.stacked) };
        let [_, up, _] = shape.projections;
        let has = |weights: &Self, name: &str| weights.contains(&format!("{path}.{name}"));
        let (inputs, output) = shape.parts();
        if !matches!(self.source, Source::Random { .. }) && !self.contains(&format!("{stacked}.{up}.weight")) {
            if let Some(names) = SEPARATE.iter().find(|names| has(self, &format!("experts.0.{}.weight", names[1]))) {
                let mut read = |part| self.separate(path, &stacked, names, shape, part);
                let inputs = inputs.into_iter().map(&mut read).collect::<Result<_>>()?;
                return Ok(ExpertStacks { inputs, output: read(output)? });
            }
            if has(self, "experts.gate_up_proj_blocks") {
                return self.mxfp4_blocks(&format!("{path}.experts"), shape);
            }
            if has(self, "experts.gate_up_proj") {
                let [both, down] = ["gate_up_proj", "down_proj"].map(|name| format!("{path}.experts.{name}"));
                return self.halves(&both, &down, shape);
            }
            if has(self, "input_linear.weight") {
                let [both, down] = ["input_linear", "output_linear"].map(|name| format!("{path}.{name}.weight"));
                return self.halves(&both, &down, shape);
            }
        }
        let mut read = |part: Part| -> Result<Stack> {
            let name = format!("{stacked}.{}", shape.projections[part.which]);
            let matrix = self.matrix_of(&name, &name, &[shape.count], part.rows, part.columns)?;
            let bias = shape.bias.then(|| self.tensor(&format!("{name}.bias"), &[shape.count, part.rows]));
            Ok(Stack { matrix, bias: bias.transpose()? })
        };
        let inputs = inputs.into_iter().map(&mut read).collect::<Result<_>>()?;
        Ok(ExpertStacks { inputs, output: read(output)? })
    }

    /// One projection of separate experts; its format is declared as that of the stack.
    fn separate(
        &mut self,
        path: &str,
        stacked: &str,
        names: &[&str; 3],
        shape: &ExpertShape,
        part: Part,
    ) -> Result<Stack> {
        let declared = format!("{stacked}.{}", shape.projections[part.which]);
        let (mut matrices, mut biases) = (Vec::with_capacity(shape.count), Vec::new());
        for expert in 0..shape.count {
            let name = format!("{path}.experts.{expert}.{}", names[part.which]);
            matrices.push(self.matrix_of(&name, &declared, &[], part.rows, part.columns)?);
            if shape.bias {
                biases.push(self.tensor(&format!("{name}.bias"), &[part.rows])?);
            }
        }
        let bias = if shape.bias { Some(evaluated(mlx_rs::ops::stack(&biases, 0)?)?) } else { None };
        Ok(Stack { matrix: stack(&matrices, path)?, bias })
    }

    /// Gate and up in one tensor `[experts, 2 inner, columns]`, the one before the other, or transposed.
    fn halves(&mut self, both: &str, down: &str, shape: &ExpertShape) -> Result<ExpertStacks> {
        let ExpertShape { count, columns, inner, .. } = *shape;
        if shape.bias || !shape.gated {
            return Err(Error::unsupported(format!("{both:?}: biases, or no gate, in joined tensors of experts")));
        }
        let stack = |array| Ok::<_, Error>(Stack { matrix: Matrix::Dense(evaluated(array)?), bias: None });
        let axis = if shape.transposed { 2 } else { 1 };
        let turned = |array: Array| -> Result<Array> {
            Ok(if shape.transposed { array.swap_axes(1, 2)?.contiguous()? } else { array.contiguous()? })
        };
        let order = |rows, columns| if shape.transposed { [count, columns, rows] } else { [count, rows, columns] };
        let joined = self.tensor(both, &order(2 * inner, columns))?;
        let half = |from, to| stack(turned(mlx::slice_axis(&joined, axis, from, to)?)?);
        let inputs = vec![half(0, inner)?, half(inner, 2 * inner)?];
        drop(joined);
        let output = self.tensor(down, &order(columns, inner))?;
        let output = if shape.transposed { turned(output)? } else { output };
        Ok(ExpertStacks { inputs, output: stack(output)? })
    }

    /// gpt-oss as its authors publish it: rows of gate and up alternate, and codes are bytes.
    fn mxfp4_blocks(&mut self, path: &str, shape: &ExpertShape) -> Result<ExpertStacks> {
        let ExpertShape { count, columns, inner, .. } = *shape;
        let format = QuantFormat { group_size: BLOCK.0, bits: 4, mode: QuantMode::Mxfp4 };
        let mut read = |name: &str, rows: usize, columns: usize| -> Result<[Array; 3]> {
            let groups = columns / BLOCK.0;
            let blocks = self.words(&format!("{path}.{name}_blocks"), &[count, rows, groups, BLOCK.1], Dtype::Uint8)?;
            let words = [count, rows, groups * BLOCK.1 / 4].map(|n| n as i32);
            Ok([
                blocks.view::<u32>()?.reshape(&words)?,
                self.words(&format!("{path}.{name}_scales"), &[count, rows, groups], Dtype::Uint8)?,
                self.tensor(&format!("{path}.{name}_bias"), &[count, rows])?,
            ])
        };
        let stack = |[weight, scales, bias]: [Array; 3]| -> Result<Stack> {
            let (weight, scales) = (evaluated(weight)?, evaluated(scales)?);
            let matrix = Matrix::Quantized(QuantizedMatrix { weight, scales, biases: None, format });
            Ok(Stack { matrix, bias: Some(evaluated(bias)?) })
        };
        let joined = read("gate_up_proj", 2 * inner, columns)?;
        let every_second = |array: &Array, first: usize| -> Result<Array> {
            let mut shape = vec![count as i32, inner as i32, 2];
            shape.extend(&array.shape()[2..]);
            let one = mlx::slice_axis(&array.reshape(&shape)?, 2, first, first + 1)?;
            shape.remove(2);
            Ok(one.reshape(&shape)?.contiguous()?)
        };
        let half = |first| -> Result<Stack> {
            let [weight, scales, bias] = &joined;
            stack([every_second(weight, first)?, every_second(scales, first)?, every_second(bias, first)?])
        };
        let inputs = vec![half(0)?, half(1)?];
        drop(joined);
        Ok(ExpertStacks { inputs, output: stack(read("down_proj", columns, inner)?)? })
    }
}

/// At once, so that what it was made of can go.
fn evaluated(array: Array) -> Result<Array> {
    array.eval()?;
    Ok(array)
}

/// One stack of matrices that have the same format.
fn stack(matrices: &[Matrix], path: &str) -> Result<Matrix> {
    let mixed = || Error::unsupported(format!("{path:?}: some experts are quantised and others are not"));
    let join = |arrays: Vec<&Array>| -> Result<Array> { evaluated(mlx_rs::ops::stack(&arrays, 0)?) };
    let dense = |matrix: &Matrix| matches!(matrix, Matrix::Dense(_));
    if matrices.iter().all(dense) {
        let weights = matrices.iter().filter_map(|matrix| match matrix {
            Matrix::Dense(weight) => Some(weight),
            Matrix::Quantized(_) => None,
        });
        return Ok(Matrix::Dense(join(weights.collect())?));
    }
    let packed: Vec<&QuantizedMatrix> = matrices
        .iter()
        .map(|matrix| match matrix {
            Matrix::Quantized(matrix) => Ok(matrix),
            Matrix::Dense(_) => Err(mixed()),
        })
        .collect::<Result<_>>()?;
    let biases: Option<Vec<&Array>> = packed.iter().map(|matrix| matrix.biases.as_ref()).collect();
    Ok(Matrix::Quantized(QuantizedMatrix {
        weight: join(packed.iter().map(|matrix| &matrix.weight).collect())?,
        scales: join(packed.iter().map(|matrix| &matrix.scales).collect())?,
        biases: biases.map(join).transpose()?,
        format: packed[0].format,
    }))
}
