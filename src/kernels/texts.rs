//! What encoders need besides products, as operations on MLX arrays.

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::cpu::elementwise::LayerNorm;
use super::cpu::floats::Rows;
use super::cpu::texts::TextAttention;
use super::node::{CpuKernel, Input, Output, node};
use super::ops::{Cpu, last};
use crate::error::{Error, Result};

/// Heads of queries, of keys or of values: some columns of an array.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// `[T, ..]`, of which all but the first axis are taken for one.
    pub array: &'a Array,
    /// The first column.
    pub first: usize,
}

/// What attention within texts is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TextAttentionKind {
    /// Number of heads.
    pub heads: usize,
    /// Width of each.
    pub width: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// How far a token sees to either side.
    pub window: Option<usize>,
}

impl Cpu {
    /// Attention of every token of `T` to its text: `[T, heads * width]` f32. `texts` are the rows of each.
    pub fn attend_texts(
        &self,
        inputs: [Columns<'_>; 3],
        kind: TextAttentionKind,
        texts: Arc<[Range<usize>]>,
    ) -> Result<Array> {
        let shape = [inputs[0].array.dim(0), (kind.heads * kind.width) as i32];
        let kernel = AttendTexts { cpu: self.clone(), kind, texts, first: inputs.map(|input| input.first) };
        node(kernel, &inputs.map(|input| input.array), &shape, Dtype::Float32)
    }

    /// Layer norm of the rows of `x [T, width]`: f32.
    pub fn layer_norm(&self, x: &Array, weight: &Array, bias: Option<&Array>, eps: f32) -> Result<Array> {
        let shape = x.shape().to_vec();
        let inputs: Vec<&Array> = [x, weight].into_iter().chain(bias).collect();
        node(NormRows { cpu: self.clone(), eps }, &inputs, &shape, Dtype::Float32)
    }
}

struct AttendTexts {
    cpu: Cpu,
    kind: TextAttentionKind,
    texts: Arc<[Range<usize>]>,
    first: [usize; 3],
}

impl CpuKernel for AttendTexts {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let TextAttentionKind { heads, width, scale, window } = self.kind;
        let numbers = [inputs[0].to_f32()?, inputs[1].to_f32()?, inputs[2].to_f32()?];
        let rows = |at: usize| -> Result<Rows<'_>> {
            let stride = inputs[at].shape()[1..].iter().map(|&n| n as usize).product();
            let numbers = numbers[at].get(self.first[at]..).ok_or_else(|| Error::internal("columns of heads"))?;
            Ok(Rows { numbers, width: heads * width, stride })
        };
        let inputs = [rows(0)?, rows(1)?, rows(2)?];
        let attention = TextAttention { inputs, heads, scale, window, texts: &self.texts };
        attention.run(self.cpu.isa, &self.cpu.workers, last(&mut outputs)?);
        Ok(())
    }
}

struct NormRows {
    cpu: Cpu,
    eps: f32,
}

impl CpuKernel for NormRows {
    fn run(&self, inputs: &[Input<'_>], mut outputs: Vec<Output<'_>>) -> Result<()> {
        let bias = inputs.get(2).map(|bias| bias.floats()).transpose()?;
        let norm = LayerNorm { weight: inputs[1].floats()?, bias, eps: self.eps };
        norm.run(self.cpu.isa, &self.cpu.workers, &inputs[0].to_f32()?, last(&mut outputs)?);
        Ok(())
    }
}
