//! Attention over paged keys and values composed of MLX's operations: blocks are gathered, then attended to.
//!
//! Rows that decode go together, over as many blocks as the longest of them needs; each prompt chunk by itself. It is what
//! a GPU uses where it has no kernel of ours, and what such a kernel is compared with.

use std::sync::Arc;

use mlx_rs::Array;
use mlx_rs::fast::{ScaledDotProductAttentionMask as Mask, scaled_dot_product_attention};
use mlx_rs::ops::concatenate;

use crate::cache::Writes;
use crate::error::{Error, Result};
use crate::kernels::{Placement, Segment, Window};

/// How queries and keys become weights.
#[derive(Debug, Clone, Copy)]
pub struct Scores<'a> {
    /// Factor on their products.
    pub scale: f32,
    /// What a query sees; `None` is all up to itself.
    pub window: Option<Window>,
    /// Products become `cap * tanh(product / cap)`.
    pub soft_cap: Option<f32>,
    /// `[heads]`: a score that attends to nothing.
    pub sinks: Option<&'a Array>,
    /// Values are the last columns of keys, so many; their pool is not looked at.
    pub values_in_keys: Option<usize>,
}

/// A step's places as index arrays, made when first needed and shared by all layers.
#[derive(Debug)]
pub struct Gathers {
    placement: Arc<Placement>,
    block_tokens: usize,
    writes: Option<Writes>,
    /// Of the window of the last layer.
    parts: Option<(Option<Window>, Vec<Part>)>,
}

/// Rows that are attended to by one call.
#[derive(Debug)]
struct Part {
    /// Rows of the step, and how many spare ones follow them.
    rows: std::ops::Range<usize>,
    spare: usize,
    /// `[sequences, blocks]` i32: from the first block on that the first row of each sequence sees.
    tables: Array,
    /// Tokens of each sequence from there up to the last.
    lengths: Vec<usize>,
    /// For each sequence and row of it the first of these tokens that the row sees.
    firsts: Vec<usize>,
}

impl Gathers {
    /// For a step on blocks of `block_tokens`.
    pub fn new(placement: &Arc<Placement>, block_tokens: usize) -> Self {
        Self { placement: Arc::clone(placement), block_tokens, writes: None, parts: None }
    }

    /// Where the step writes.
    pub fn writes(&mut self) -> &Writes {
        self.writes.get_or_insert_with(|| Writes::new(&self.placement, self.block_tokens))
    }

    /// Queries `[T, heads, width]` over the pools of a layer: the same shape.
    pub fn attend(&mut self, queries: &Array, (keys, values): (&Array, &Array), scores: &Scores<'_>) -> Result<Array> {
        let known = self.parts.take().filter(|(window, _)| *window == scores.window);
        let parts = known.map_or_else(|| self.parts(scores.window), |(_, parts)| parts);
        let mut attended = Vec::with_capacity(parts.len());
        for part in &parts {
            let rows = part.attend(queries, keys, values, scores)?;
            let mut shape = rows.shape().to_vec();
            shape[0] = part.spare as i32;
            let spare = (part.spare > 0).then(|| mlx_rs::ops::zeros_dtype(&shape, rows.dtype())).transpose()?;
            attended.extend(std::iter::once(rows).chain(spare));
        }
        self.parts = Some((scores.window, parts));
        match attended.len() {
            0 => Err(Error::internal("a step without rows")),
            1 => Ok(attended.into_iter().next().unwrap_or_else(|| queries.clone())),
            _ => Ok(concatenate(&attended, 0)?),
        }
    }

    fn parts(&self, window: Option<Window>) -> Vec<Part> {
        let Placement { segments, tables, .. } = &*self.placement;
        let decoding = segments.iter().take_while(|segment| segment.rows.len() == 1).count();
        let groups = (decoding > 0).then_some(0..decoding).into_iter();
        let groups = groups.chain((decoding..segments.len()).map(|at| at..at + 1));
        groups
            .map(|group| {
                let segments = &segments[group];
                let seen = |position| window.map_or(0, |window| window.first(position));
                let first = |s: &Segment| seen(s.start) / self.block_tokens;
                let length = |s: &Segment| s.start + s.rows.len() - first(s) * self.block_tokens;
                let lengths: Vec<usize> = segments.iter().map(length).collect();
                let blocks = |length: usize| length.div_ceil(self.block_tokens);
                let width = lengths.iter().map(|&length| blocks(length)).max().unwrap_or(0);
                let row = |(segment, &length): (&Segment, &usize)| {
                    let own = &tables[segment.table + first(segment)..][..blocks(length)];
                    // Block 0 holds no rows of anybody's.
                    own.iter()
                        .map(|&block| block as i32)
                        .chain(std::iter::repeat_n(0, width - own.len()))
                        .collect::<Vec<_>>()
                };
                let ids: Vec<i32> = segments.iter().zip(&lengths).flat_map(row).collect();
                let firsts = segments.iter().flat_map(|s| {
                    let positions = s.start..s.start + s.rows.len();
                    positions.map(move |position| seen(position) - first(s) * self.block_tokens)
                });
                let firsts = firsts.collect();
                let rows = segments[0].rows.start..segments[segments.len() - 1].rows.end;
                let spare = self.placement.spare.iter().find(|spare| spare.start == rows.end);
                Part {
                    rows,
                    spare: spare.map_or(0, |spare| spare.len()),
                    tables: Array::from_slice(&ids, &[segments.len() as i32, width as i32]),
                    lengths,
                    firsts,
                }
            })
            .collect()
    }
}

impl Part {
    fn attend(&self, queries: &Array, keys: &Array, values: &Array, scores: &Scores<'_>) -> Result<Array> {
        let Scores { scale, soft_cap, sinks, .. } = *scores;
        let sequences = self.lengths.len() as i32;
        let rows = (self.rows.len() / self.lengths.len()) as i32;
        let (heads, width) = (queries.dim(1), queries.dim(2));
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        // [sequences, heads, rows, width]
        let queries = crate::mlx::rows(queries, self.rows.start, self.rows.end)?;
        let queries = queries.reshape(&[sequences, rows, heads, width])?.transpose_axes(&[0, 2, 1, 3])?;
        let gather = |pool: &Array| -> Result<Array> {
            let blocks = pool.take_axis(&self.tables, 0)?;
            let all = blocks.dim(1) * blocks.dim(2);
            let keys = blocks.reshape(&[sequences, all, pool.dim(2), pool.dim(3)])?.transpose_axes(&[0, 2, 1, 3])?;
            // What lies behind the last key of all: a view, nothing is copied.
            crate::mlx::keys(&keys, longest)
        };
        let keys = gather(keys)?;
        let values = match scores.values_in_keys {
            Some(columns) => {
                let row = keys.dim(3) as usize;
                crate::mlx::slice_axis(&keys, 3, row - columns, row)?
            }
            None => gather(values)?,
        };
        let one = self.lengths.iter().all(|&length| length == longest);
        let windowed = self.firsts.iter().any(|&first| first > 0);
        let mask = || self.mask(rows as usize, longest, windowed);
        let attended = match (soft_cap, windowed) {
            (Some(cap), _) => capped_attention([&queries, &keys, &values], scale, cap, &mask()?)?,
            (None, false) if one && rows == 1 => {
                scaled_dot_product_attention(&queries, &keys, &values, scale, None, sinks)?
            }
            (None, false) if one => scaled_dot_product_attention(&queries, &keys, &values, scale, Mask::Causal, sinks)?,
            (None, _) => scaled_dot_product_attention(&queries, &keys, &values, scale, &mask()?, sinks)?,
        };
        Ok(attended.transpose_axes(&[0, 2, 1, 3])?.reshape(&[sequences * rows, heads, values.dim(3)])?)
    }

    /// `[sequences, 1, rows, longest]` booleans: the last `rows` tokens of each sequence see themselves and what is before
    /// them, with `windowed` from the first one on that each sees.
    fn mask(&self, rows: usize, longest: usize, windowed: bool) -> Result<Array> {
        let own: Vec<i32> =
            self.lengths.iter().flat_map(|&length| (length - rows..length).map(|position| position as i32)).collect();
        let all: Vec<i32> = (0..longest as i32).collect();
        let shape = [self.lengths.len() as i32, 1, rows as i32, 1];
        let own = Array::from_slice(&own, &shape);
        let all = Array::from_slice(&all, &[1, 1, 1, longest as i32]);
        let causal = all.le(&own)?;
        if !windowed {
            return Ok(causal);
        }
        let firsts: Vec<i32> = self.firsts.iter().map(|&first| first as i32).collect();
        Ok(causal.logical_and(all.ge(Array::from_slice(&firsts, &shape))?)?)
    }
}

/// Attention whose scores are capped: queries `[sequences, heads, rows, width]`, keys and values `[sequences, kv_heads, keys, width]`,
/// the mask as [`Part::mask`] gives it; the shape of the queries out.
fn capped_attention([queries, keys, values]: [&Array; 3], scale: f32, cap: f32, mask: &Array) -> Result<Array> {
    let shape = queries.shape().to_vec();
    let [sequences, heads, rows, width] = [shape[0], shape[1], shape[2], shape[3]];
    let kv_heads = keys.dim(1);
    let number = |value: f32| Array::from_f32(value).as_dtype(queries.dtype());
    let queries = queries.multiply(number(scale)?)?.reshape(&[sequences, kv_heads, heads / kv_heads, rows, width])?;
    let (keys, values) = (keys.expand_dims(2)?, values.expand_dims(2)?);
    let scores = queries.matmul(keys.swap_axes(3, 4)?)?;
    let scores = mlx_rs::ops::tanh(scores.divide(number(cap)?)?)?.multiply(number(cap)?)?;
    let least = Array::from_f32(f32::NEG_INFINITY).as_dtype(scores.dtype())?;
    let scores = mlx_rs::ops::select(mask.expand_dims(2)?, scores, least)?;
    let weights = mlx_rs::ops::softmax_axis(&scores, -1, true)?;
    Ok(weights.matmul(&values)?.reshape(&[sequences, heads, rows, values.dim(4)])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlx::{self, Device};

    /// Blocks behind a window are not read: the spare block, which takes their place, may hold anything.
    #[test]
    fn what_is_behind_a_window_is_not_read() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let random = |shape: &[i32], seed: u64| -> Result<Array> {
                Ok(mlx_rs::random::normal::<f32>(shape, None, None, &mlx_rs::random::key(seed)?)?)
            };
            let nothing = Array::full::<f32>(&[1, 4, 1, 8], Array::from_f32(f32::NAN))?;
            let pool = |seed: u64| -> Result<Array> { Ok(concatenate(&[&nothing, &random(&[9, 4, 1, 8], seed)?], 0)?) };
            let (keys, values, queries) = (pool(1)?, pool(2)?, random(&[5, 2, 8], 3)?);
            // Two rows that decode, and a piece of a prompt; the first ones to be seen are 10, 5 and 6, in chunks 10.
            let row = |rows: std::ops::Range<usize>, start: usize, table: usize| Segment { rows, start, table };
            let segments = vec![row(0..1, 14, 0), row(1..2, 9, 4), row(2..5, 10, 7)];
            let attend = |window: Window, tables: [u32; 11]| -> Result<Vec<f32>> {
                let placement =
                    Placement { tables: tables.to_vec(), segments: segments.clone(), ..Placement::default() };
                let scores =
                    Scores { scale: 0.3, window: Some(window), soft_cap: None, sinks: None, values_in_keys: None };
                let attended = Gathers::new(&Arc::new(placement), 4).attend(&queries, (&keys, &values), &scores)?;
                Ok(attended.contiguous()?.as_slice::<f32>().to_vec())
            };
            for (window, needed) in [(Window::Sliding(5), [2, 5, 8]), (Window::Chunked(5), [2, 5, 9])] {
                let all = attend(window, [1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3])?;
                assert!(all.iter().all(|number| number.is_finite()));
                assert_eq!(attend(window, [0, 0, 3, 4, 0, 6, 7, 0, 9, 2, 3])?, all, "{window:?}");
                for needed in needed {
                    let mut tables = [1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3];
                    tables[needed] = 0;
                    let attended = attend(window, tables)?;
                    assert!(attended.iter().any(|number| number.is_nan()), "the block at {needed} is not read");
                }
            }
            Ok(())
        });
        outcome.unwrap();
    }
}
