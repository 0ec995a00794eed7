//! The arrays that hold a sequence's keys and values.
//!
//! Each sequence owns one contiguous run of rows per layer, grown in steps. Rows are token-major, so that an append is
//! one run of memory. MLX's attention takes them as `[capacity, heads, width]` ([`SequenceCache::append`]), in place as
//! long as nothing outside this type keeps a handle to the arrays across a step. The CPU kernels take blocks
//! `[capacity / BLOCK_TOKENS, BLOCK_TOKENS, heads, width]` ([`SequenceCache::blocks`]) and write to them themselves.

use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use crate::error::{Error, Result};
use crate::kernels::{Placement, Segment};
use crate::mlx;

/// Tokens of a block; also the steps in which contiguous rows grow.
const BLOCK_TOKENS: usize = 256;

/// What one token of a sequence stores, layer by layer.
#[derive(Debug, Clone)]
pub struct KvLayout {
    /// `(heads, width)` of keys and of values in each layer.
    pub layers: Vec<(usize, usize)>,
    /// Type of blocks; that of the model's weights.
    pub dtype: Dtype,
}

#[derive(Debug)]
struct LayerKv {
    keys: Array,
    values: Array,
}

/// Keys and values of one sequence.
#[derive(Debug)]
pub struct SequenceCache {
    layers: Vec<Option<LayerKv>>,
    layout: KvLayout,
    len: usize,
    /// Where the step's rows go, until it is counted.
    placement: Option<Arc<Placement>>,
    /// Computed after the newest writes to blocks.
    marker: Option<Array>,
}

impl SequenceCache {
    /// An empty cache; arrays are made when the first rows arrive, in their type.
    pub fn new(layout: &KvLayout) -> Self {
        let layers = layout.layers.iter().map(|_| None).collect();
        Self { layers, layout: layout.clone(), len: 0, placement: None, marker: None }
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes the step's rows `[T, heads, width]` behind the stored ones of `layer` and returns views of all rows,
    /// `[len + T, heads, width]`. The length moves once per step, by [`advance`](Self::advance).
    pub fn append(&mut self, layer: usize, keys: &Array, values: &Array) -> Result<(Array, Array)> {
        let end = self.len + keys.dim(0) as usize;
        let shape = self.layout.layers[layer];
        let slot = &mut self.layers[layer];
        // Taken out, so that the slice below holds the only handle and MLX writes in place.
        let LayerKv { keys: old_keys, values: old_values } = match slot.take() {
            Some(kv) => kv,
            None => LayerKv {
                keys: zeros(&[BLOCK_TOKENS.max(end), shape.0, shape.1], keys.dtype())?,
                values: zeros(&[BLOCK_TOKENS.max(end), shape.0, shape.1], values.dtype())?,
            },
        };
        let capacity = end.next_multiple_of(BLOCK_TOKENS);
        let new_keys = mlx::write_rows(with_room(old_keys, end, capacity)?, keys, self.len, end)?;
        let new_values = mlx::write_rows(with_room(old_values, end, capacity)?, values, self.len, end)?;
        let views = (mlx::rows(&new_keys, 0, end)?, mlx::rows(&new_values, 0, end)?);
        *slot = Some(LayerKv { keys: new_keys, values: new_values });
        Ok(views)
    }

    /// The blocks of keys and of values of `layer`, evaluated, with room for `tokens` more: kernels write in place.
    pub fn blocks(&mut self, layer: usize, tokens: usize) -> Result<(&Array, &Array)> {
        let blocks = (self.len + tokens).div_ceil(BLOCK_TOKENS);
        let (heads, width) = self.layout.layers[layer];
        let dtype = self.layout.dtype;
        let make = || zeros(&[blocks, BLOCK_TOKENS, heads, width], dtype);
        // By half, so that a long prompt is not copied once for every block.
        let grow = |array: Array| {
            let capacity = blocks.max(array.dim(0) as usize * 3 / 2);
            with_room(array, blocks, capacity)
        };
        let kv = match self.layers[layer].take() {
            Some(LayerKv { keys, values }) => LayerKv { keys: grow(keys)?, values: grow(values)? },
            None => LayerKv { keys: make()?, values: make()? },
        };
        // Nothing to do but for new arrays.
        mlx_rs::transforms::eval([&kv.keys, &kv.values])?;
        let kv = self.layers[layer].insert(kv);
        Ok((&kv.keys, &kv.values))
    }

    /// Takes note of an array that is computed after the step's writes to the blocks.
    pub fn mark(&mut self, marker: Array) {
        self.marker = Some(marker);
    }

    /// Where the step's `tokens` rows belong in the blocks.
    pub fn placement(&mut self, tokens: usize) -> Arc<Placement> {
        let (start, end) = (self.len, self.len + tokens);
        let make = || {
            Arc::new(Placement {
                tables: (0..end.div_ceil(BLOCK_TOKENS) as u32).collect(),
                slots: (start as u32..end as u32).collect(),
                segments: vec![Segment { rows: 0..tokens, start, table: 0 }],
            })
        };
        Arc::clone(self.placement.get_or_insert_with(make))
    }

    /// Counts `tokens` rows, appended to every layer, as stored.
    pub fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        self.placement = None;
    }

    /// All arrays, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flatten().flat_map(|kv| [&kv.keys, &kv.values])
    }

    /// An array that is computed once the newest rows are: for waiting without holding the arrays themselves.
    pub fn marker(&self) -> Result<Array> {
        if let Some(marker) = &self.marker {
            return Ok(marker.clone());
        }
        let newest = self.layers.iter().flatten().last();
        let newest = newest.filter(|_| self.len > 0).ok_or_else(|| Error::internal("an empty cache has no marker"))?;
        Ok(mlx::rows(&newest.keys, self.len - 1, self.len)?.sum(None)?)
    }

    /// Bytes of all arrays, used or not.
    pub fn bytes(&self) -> usize {
        self.arrays().map(Array::nbytes).sum()
    }
}

fn zeros(shape: &[usize], dtype: Dtype) -> Result<Array> {
    let shape = shape.iter().map(|&n| i32::try_from(n)).collect::<std::result::Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| Error::internal("a cache of more than 2^31 rows"))?;
    Ok(mlx_rs::ops::zeros_dtype(&shape, dtype)?)
}

/// `array` if its first axis has `needed` entries, otherwise a copy of it with `capacity`.
fn with_room(array: Array, needed: usize, capacity: usize) -> Result<Array> {
    let have = array.dim(0) as usize;
    if have >= needed {
        return Ok(array);
    }
    let mut shape: Vec<usize> = array.shape().iter().map(|&n| n as usize).collect();
    shape[0] = capacity;
    mlx::write_rows(zeros(&shape, array.dtype())?, &array, 0, have)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlx::{self as seam, Device};

    const ROW: i32 = 1 << 16;

    fn rows(count: i32, value: f32) -> Array {
        Array::full::<f32>(&[count, 1, ROW], Array::from_f32(value)).unwrap()
    }

    fn append(cache: &mut SequenceCache, count: i32, value: f32) -> Result<(Array, Array)> {
        let views = cache.append(0, &rows(count, value), &rows(count, -value))?;
        cache.advance(count as usize);
        Ok(views)
    }

    fn layout() -> KvLayout {
        KvLayout { layers: vec![(1, ROW as usize)], dtype: Dtype::Float32 }
    }

    /// Peak bytes above the present use while `body` runs. MLX counts for the whole process: no other test of this
    /// size may run in it.
    fn extra_peak(body: impl FnOnce() -> Result<()>) -> Result<usize> {
        let before = mlx_rs::memory::active_memory()?;
        mlx_rs::memory::reset_peak_memory()?;
        body()?;
        Ok(mlx_rs::memory::peak_memory()?.saturating_sub(before))
    }

    #[test]
    fn an_append_writes_in_place_unless_an_alias_is_held() {
        seam::init().unwrap();
        let outcome = seam::on_device(Device::Cpu, || {
            let mut cache = SequenceCache::new(&layout());
            append(&mut cache, 100, 1.0)?;
            mlx_rs::transforms::eval(cache.arrays())?;
            let pool = cache.bytes() / 2;
            let step = |cache: &mut SequenceCache| {
                append(cache, 1, 2.0)?;
                Ok(mlx_rs::transforms::eval(cache.arrays())?)
            };
            let in_place = extra_peak(|| step(&mut cache))?;
            assert!(in_place < pool / 2, "{in_place} bytes for one row: a pool of {pool} was copied");
            // Negative control: what this type must never allow from outside.
            let alias = cache.arrays().next().cloned();
            let copied = extra_peak(|| step(&mut cache))?;
            assert!(copied >= pool, "only {copied} bytes although an alias is held: this test sees nothing");
            drop(alias);
            Ok(())
        });
        outcome.unwrap();
    }

    #[test]
    fn rows_survive_growth() {
        seam::init().unwrap();
        let outcome = seam::on_device(Device::Cpu, || {
            let layout = KvLayout { layers: vec![(2, 4)], dtype: Dtype::Float32 };
            let mut cache = SequenceCache::new(&layout);
            let mut expected = Vec::new();
            for (step, count) in [3, 250, 1, 1, 1, 300, 1].into_iter().enumerate() {
                let values: Vec<f32> = (0..count * 8).map(|i| (step * 10_000 + i) as f32).collect();
                let rows = Array::from_slice(&values, &[count as i32, 2, 4]);
                expected.extend(values);
                let (keys, kept) = cache.append(0, &rows, &rows.negative()?)?;
                cache.advance(count);
                assert_eq!(keys.contiguous()?.as_slice::<f32>(), expected);
                assert_eq!(kept.negative()?.contiguous()?.as_slice::<f32>(), expected);
            }
            assert_eq!(cache.len(), 557);
            Ok(())
        });
        outcome.unwrap();
    }
}
