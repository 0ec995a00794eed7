//! Convolutions and recurrences composed of MLX's operations: what a GPU uses, and what the CPU kernels are compared with.
//!
//! Few rows pass one after another. Many pass in chunks: within a chunk every row's contribution to every later one comes
//! from products of matrices, and only the state passes from chunk to chunk (Yang et al. 2024, "Parallelizing Linear
//! Transformers with the Delta Rule over Sequence Length", with the decays of "Gated Delta Networks"; for state spaces
//! Dao and Gu 2024, section 6).

use mlx_rs::{Array, Dtype, ops};

use super::state::{Part, StateIndex, StatePools};
use crate::error::Result;
use crate::kernels::{Recurrence, RecurrentKind, RecurrentWeights, Taps, UNIT_EPS};
use crate::mlx;

/// Rows of a chunk.
const CHUNK: usize = 64;

/// Rows from which on chunks are used.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunksFrom(pub usize);

/// Which of a convolution's inputs are multiplied, and what becomes of the sums.
#[derive(Debug, Clone, Copy)]
pub(super) enum ConvolutionForm {
    /// `silu(convolution(x))`.
    Silu,
    /// Of `B`, `C` and `x` side by side: `C * convolution(B * x)`.
    Gated,
}

/// Rows of the convolution's input, `[T, channels]` or of a gated one `[T, 3 * channels]`: `[count, length, channels]` of
/// each part, f32. `pools` keeps its last inputs in its first array.
pub(super) fn convolve(
    x: &Array,
    taps: Taps<'_>,
    form: ConvolutionForm,
    pools: &mut StatePools,
    index: &mut StateIndex,
) -> Result<Vec<Array>> {
    let (count, channels) = (taps.weight.dim(0) as usize, taps.weight.dim(1) as usize);
    let mut parts = Vec::new();
    pools.advance(0, index, |part, kept| {
        let rows = part.rows(x)?;
        let third = |index: usize| mlx::slice_axis(&rows, 2, index * channels, (index + 1) * channels);
        let (input, gate) = match form {
            ConvolutionForm::Silu => (rows.clone(), None),
            ConvolutionForm::Gated => (third(2)?.multiply(third(0)?)?, Some(third(1)?)),
        };
        let all = ops::concatenate(&[kept.as_dtype(input.dtype())?, input], 1)?;
        let length = part.length;
        let wide = all.as_dtype(Dtype::Float32)?;
        let mut sum: Option<Array> = None;
        for tap in 0..count {
            // MLX's own grouped convolution has a plan for every shape on CUDA.
            let term = mlx::heads(&wide, tap, tap + length)?.multiply(mlx::rows(taps.weight, tap, tap + 1)?)?;
            sum = Some(match sum {
                None => term,
                Some(sum) => sum.add(term)?,
            });
        }
        let mut out = sum.unwrap_or(wide);
        if let Some(bias) = taps.bias {
            out = out.add(bias)?;
        }
        parts.push(match gate {
            None => out.multiply(ops::sigmoid(&out)?)?,
            Some(gate) => out.multiply(gate)?,
        });
        mlx::heads(&all, length, length + count - 1)
    })?;
    Ok(parts)
}

/// The recurrence over what `convolve` gave, with its gated norm: `joined [T, columns]` to `[T, value columns]` f32. `pools`
/// keeps the states in its second array.
pub(super) fn recur(
    joined: &Array,
    convolved: &[Array],
    weights: &RecurrentWeights<'_>,
    kind: &RecurrentKind,
    chunks: ChunksFrom,
    (pools, index): (&mut StatePools, &mut StateIndex),
) -> Result<Array> {
    let mut parts = Vec::new();
    let mut convolved = convolved.iter();
    pools.advance(1, index, |part, state| {
        let convolved = convolved.next().ok_or_else(|| crate::error::Error::internal("a part without convolution"))?;
        let rows = part.rows(joined)?.as_dtype(Dtype::Float32)?;
        let terms = Terms::new(part, &rows, convolved, weights, kind)?;
        let (mut read, state) =
            if part.length >= chunks.0.max(2) { terms.in_chunks(kind, state)? } else { terms.one_by_one(state)? };
        if let (Recurrence::StateSpace { .. }, Some(skip)) = (kind.recurrence, weights.skip) {
            let skip = skip.reshape(&[-1, 1])?;
            read = read.add(terms.given.multiply(skip)?)?;
        }
        parts.push(gated_norm(part, &read, &rows, weights, kind)?);
        Ok(state)
    })?;
    index.join(parts, joined.dim(0) as usize)
}

/// `[count, length, heads, value_width]` to `[count, length, value columns]`.
fn gated_norm(
    part: &Part,
    read: &Array,
    rows: &Array,
    weights: &RecurrentWeights<'_>,
    kind: &RecurrentKind,
) -> Result<Array> {
    let (columns, first) = (kind.value_columns(), kind.columns().output_gates);
    let flat = [part.count as i32, part.length as i32, columns as i32];
    let grouped = [part.count as i32, part.length as i32, -1, kind.norm_group as i32];
    let gates = mlx::slice_axis(rows, 2, first, first + columns)?;
    let gates = gates.multiply(ops::sigmoid(&gates)?)?;
    let mut x = read.reshape(&flat)?;
    let gate_first = kind.recurrence != Recurrence::Delta;
    if gate_first {
        x = x.multiply(&gates)?;
    }
    let normed = mlx_rs::fast::rms_norm(x.reshape(&grouped)?, None::<&Array>, kind.norm_eps)?;
    let shared = weights.norm.dim(0) as usize == kind.norm_group;
    let weight = if shared { weights.norm.clone() } else { weights.norm.reshape(&[-1, kind.norm_group as i32])? };
    let normed = normed.multiply(weight)?.reshape(&flat)?;
    Ok(if gate_first { normed } else { normed.multiply(gates)? })
}

/// What a part's rows bring to the recurrence, all f32.
struct Terms {
    /// `[count, length, heads, key_width]`.
    queries: Array,
    keys: Array,
    /// Values as they are: `[count, length, heads, value_width]`.
    given: Array,
    /// What is added where nothing is replaced: values times step sizes, or the values of the delta rule.
    values: Array,
    /// Logarithms of how much stays: `[count, length, heads]`.
    decays: Array,
    /// How much is replaced: `[count, length, heads]`; of the delta rule.
    gates: Option<Array>,
}

impl Terms {
    fn new(
        part: &Part,
        rows: &Array,
        convolved: &Array,
        weights: &RecurrentWeights<'_>,
        kind: &RecurrentKind,
    ) -> Result<Self> {
        let RecurrentKind { heads, groups, key_width, value_width, .. } = *kind;
        let (at, [count, length]) = (kind.columns(), [part.count as i32, part.length as i32]);
        let take = |first: usize, heads: usize, width: usize| -> Result<Array> {
            let columns = mlx::slice_axis(convolved, 2, first, first + heads * width)?;
            Ok(columns.reshape(&[count, length, heads as i32, width as i32])?)
        };
        let delta = kind.recurrence == Recurrence::Delta;
        let width = key_width as f32;
        let per_head = |first: usize, scale: f32| -> Result<Array> {
            let mut x = take(first, groups, key_width)?;
            if delta {
                // The norm divides by the root of the mean, which is that of the sum over the root of the width.
                let unit = mlx_rs::fast::rms_norm(&x, None::<&Array>, UNIT_EPS / width)?;
                x = unit.multiply(Array::from_f32(scale * width.powf(-0.5)))?;
            }
            let shape = [count, length, groups as i32, (heads / groups) as i32, key_width as i32];
            let shared = ops::broadcast_to(&x.expand_dims(3)?, &shape)?;
            Ok(shared.reshape(&[count, length, heads as i32, key_width as i32])?)
        };
        let steps = mlx::slice_axis(rows, 2, at.steps, at.steps + heads)?.add(weights.step_bias)?;
        let steps = ops::logaddexp(&steps, Array::from_f32(0.0))?;
        let given = take(at.values, heads, value_width)?;
        let (values, steps, gates) = match kind.recurrence {
            Recurrence::Delta => {
                let gates = ops::sigmoid(mlx::slice_axis(rows, 2, at.gates, at.gates + heads)?)?;
                (given.clone(), steps, Some(gates))
            }
            Recurrence::StateSpace { limits: (least, largest) } => {
                let steps = ops::minimum(ops::maximum(steps, Array::from_f32(least))?, Array::from_f32(largest))?;
                (given.multiply(steps.expand_dims(-1)?)?, steps, None)
            }
        };
        Ok(Self {
            queries: per_head(at.queries, width.powf(-0.5))?,
            keys: per_head(at.keys, 1.0)?,
            given,
            values,
            decays: steps.multiply(weights.rates)?,
            gates,
        })
    }

    /// Row after row: what is read, `[count, length, heads, value_width]`, and the last state.
    fn one_by_one(&self, mut state: Array) -> Result<(Array, Array)> {
        let length = self.decays.dim(1) as usize;
        let stays = ops::exp(&self.decays)?;
        let mut read = Vec::with_capacity(length);
        for row in 0..length {
            // `[count, heads, ..]`, as columns of keys and rows of values.
            let of = |x: &Array| -> Result<Array> { Ok(mlx::heads(x, row, row + 1)?.squeeze_axes(&[1])?) };
            let (query, key) = (of(&self.queries)?.expand_dims(-1)?, of(&self.keys)?.expand_dims(-1)?);
            let mut added = of(&self.values)?.expand_dims(-2)?;
            state = state.multiply(of(&stays)?.expand_dims_axes(&[-1, -2])?)?;
            if let Some(gates) = &self.gates {
                let known = state.multiply(&key)?.sum_axis(-2, true)?;
                added = added.subtract(known)?.multiply(of(gates)?.expand_dims_axes(&[-1, -2])?)?;
            }
            state = state.add(key.multiply(added)?)?;
            read.push(state.multiply(query)?.sum_axis(-2, false)?);
        }
        let read = if length == 1 { read[0].expand_dims(1)? } else { ops::stack(&read, 1)? };
        Ok((read, state))
    }

    /// The same in chunks.
    fn in_chunks(&self, kind: &RecurrentKind, mut state: Array) -> Result<(Array, Array)> {
        let (count, length, heads) = (self.decays.dim(0), self.decays.dim(1), self.decays.dim(2));
        let chunks = (length as usize).div_ceil(CHUNK) as i32;
        let chunk = CHUNK as i32;
        // `[count, heads, chunks, CHUNK, width]`: rows of zeros at the end change nothing, and their decay is none.
        let cut = |x: &Array| -> Result<Array> {
            let width = x.dim(3);
            let missing = chunks * chunk - length;
            let padded = if missing > 0 {
                ops::concatenate(&[x.clone(), ops::zeros_dtype(&[count, missing, heads, width], Dtype::Float32)?], 1)?
            } else {
                x.clone()
            };
            Ok(padded.reshape(&[count, chunks, chunk, heads, width])?.transpose_axes(&[0, 3, 1, 2, 4])?)
        };
        let (queries, keys, mut values) = (cut(&self.queries)?, cut(&self.keys)?, cut(&self.values)?);
        let decays = cut(&self.decays.expand_dims(-1)?)?.cumsum(3, None, None)?;
        // `[.., i, j]`: what is left at row `i` of what row `j` has added, and nothing where `j` comes later.
        let earlier = ops::tri::<f32>(chunk, None, None)?;
        let between = decays.subtract(decays.transpose_axes(&[0, 1, 2, 4, 3])?)?;
        let left =
            ops::exp(ops::select(&earlier.as_dtype(Dtype::Bool)?, &between, Array::from_f32(f32::NEG_INFINITY))?)?;
        let (since, keys_t) = (ops::exp(&decays)?, keys.transpose_axes(&[0, 1, 2, 4, 3])?);
        let mut recalled = None;
        if let Some(gates) = &self.gates {
            // Every row replaces what earlier ones of its chunk have added: a triangular system.
            let gates = cut(&gates.expand_dims(-1)?)?;
            let strict = earlier.subtract(ops::eye::<f32>(chunk, None, None)?)?;
            let system = keys.matmul(&keys_t)?.multiply(&left)?.multiply(&gates)?.multiply(strict)?;
            let solved = unit_inverse(&system)?;
            values = solved.matmul(values.multiply(&gates)?)?;
            recalled = Some(solved.matmul(keys.multiply(gates.multiply(&since)?)?)?);
        }
        let within = queries.matmul(&keys_t)?.multiply(&left)?;
        let queries = queries.multiply(&since)?;
        let last = mlx::slice_axis(&decays, 3, CHUNK - 1, CHUNK)?;
        let keys_t = keys.multiply(ops::exp(last.subtract(&decays)?)?)?.transpose_axes(&[0, 1, 2, 4, 3])?;
        let stays = ops::exp(last)?;
        let mut read = Vec::with_capacity(chunks as usize);
        for at in 0..chunks as usize {
            let of = |x: &Array| -> Result<Array> { Ok(mlx::slice_axis(x, 2, at, at + 1)?.squeeze_axes(&[2])?) };
            let mut added = of(&values)?;
            if let Some(recalled) = &recalled {
                added = added.subtract(of(recalled)?.matmul(&state)?)?;
            }
            read.push(of(&queries)?.matmul(&state)?.add(of(&within)?.matmul(&added)?)?);
            state = state.multiply(of(&stays)?)?.add(of(&keys_t)?.matmul(added)?)?;
        }
        // `[count, heads, rows, width]` to `[count, rows, heads, width]`, without the rows at the end.
        let read = if chunks == 1 { read.remove(0) } else { ops::concatenate(&read, 2)? };
        let read = mlx::keys(&read, length as usize)?.transpose_axes(&[0, 2, 1, 3])?;
        Ok((read.reshape(&[count, length, heads, kind.value_width as i32])?, state))
    }
}

/// `(1 + a)^-1` of strictly lower triangular matrices `[.., n, n]`, n a power of two: inverses of blocks on the diagonal are
/// made of those of half the size. A series of powers would cancel badly where keys are alike.
fn unit_inverse(a: &Array) -> Result<Array> {
    let n = a.dim(a.ndim() as i32 - 1);
    let eye = ops::eye::<f32>(n, None, None)?;
    let mut inverse = eye;
    let mut size = 1;
    while size < n {
        // The blocks below the diagonal that the next size adds.
        let inside = |i: i32, j: i32| i / (2 * size) == j / (2 * size) && i / size != j / size;
        let mask: Vec<f32> = (0..n * n).map(|at| f32::from(u8::from(inside(at / n, at % n)))).collect();
        let blocks = a.multiply(Array::from_slice(&mask, &[n, n]))?;
        let lower = if size == 1 { blocks } else { inverse.matmul(blocks)?.matmul(&inverse)? };
        inverse = inverse.subtract(lower)?;
        size *= 2;
    }
    Ok(inverse)
}
