//! From hidden states of tokens to one vector per text, for all texts of a batch at once.

use mlx_rs::ops::{concatenate, maximum};
use mlx_rs::{Array, Dtype};

use crate::error::Result;
use crate::mlx;
use crate::nn::PackedTexts;

/// Which hidden states make a text's vector, as sentence-transformers names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// That of the first token.
    Cls,
    /// The largest value of each dimension.
    Max,
    /// Their mean.
    Mean,
    /// That of the last token.
    LastToken,
}

/// Least norm that a vector is divided by.
const TINY: f32 = 1e-12;

impl Pooling {
    /// `hidden [T, width]` to `[texts, width]`, f32, texts in the order of their rows.
    pub fn forward(self, hidden: &Array, texts: &PackedTexts) -> Result<Array> {
        let taken = |row: fn(&std::ops::Range<usize>) -> usize| -> Result<Array> {
            let rows: Vec<i32> = texts.segments().iter().map(|rows| row(rows) as i32).collect();
            Ok(hidden.take_axis(mlx::indices(&rows)?, 0)?.as_dtype(Dtype::Float32)?)
        };
        match self {
            Self::Cls => taken(|rows| rows.start),
            Self::LastToken => taken(|rows| rows.end - 1),
            Self::Max => over_runs(hidden, texts, |x| Ok(x.max_axis(1, false)?)),
            Self::Mean => over_runs(hidden, texts, |x| Ok(x.mean_axis(1, false)?)),
        }
    }
}

/// `reduce` of `[count, length, width]` to `[count, width]` for texts of each length, put together.
fn over_runs(hidden: &Array, texts: &PackedTexts, reduce: impl Fn(Array) -> Result<Array>) -> Result<Array> {
    let hidden = hidden.as_dtype(Dtype::Float32)?;
    let parts = texts
        .runs()
        .iter()
        .map(|run| {
            let shape = [run.count as i32, run.length as i32, hidden.dim(1)];
            reduce(mlx::rows(&hidden, run.rows.start, run.rows.end)?.reshape(&shape)?)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(concatenate(&parts, 0)?)
}

/// Rows of `x [texts, width]` over their Euclidean norms.
pub(super) fn normalize(x: &Array) -> Result<Array> {
    let norms = x.multiply(x)?.sum_axis(1, true)?.sqrt()?;
    Ok(x.divide(maximum(norms, Array::from_f32(TINY))?)?)
}
