//! Rows between the pools and memory of the host's. No step may be on its way that uses the blocks.

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::blocks::BlockId;
use super::pages::{Pages, place};
use super::rows::{LayerRows, RowBuffer, RowLayout, RowType};
use crate::error::{Error, Result};
use crate::kernels::{Backend, read_array};
use crate::mlx::{self, HostBuffer};

impl Pages {
    /// What a token of a group stores; `None` where rows have a number format that no tier takes.
    pub fn row_layout(&self, group: usize) -> Option<Arc<RowLayout>> {
        let layout = self.layout();
        let dtype = row_type(layout.dtype)?;
        let layers = layout.layers.iter().enumerate().filter(|(_, layer)| layer.group == group);
        let layers = layers.map(|(layer, rows)| LayerRows { layer, keys: rows.keys, values: rows.values });
        Some(Arc::new(RowLayout { dtype, state: None, layers: layers.collect() }))
    }

    /// Copies the rows of consecutive blocks of a group to `to`, which has as many tokens as the blocks, or fewer.
    pub fn read_rows(&self, blocks: &[BlockId], to: &mut RowBuffer) -> Result<()> {
        let layout = Arc::clone(to.layout());
        let Backend::Cpu(cpu) = self.backend() else { return self.gather_rows(blocks, to) };
        for (at, rows) in layout.layers.iter().enumerate() {
            let (keys, values) = to.rows_mut(at, 0..to.tokens());
            self.wait(rows.layer)?;
            let pool = self.layer(rows.layer)?;
            let block = layout.row_bytes(at);
            let (block_keys, block_values) = (block.0 * self.block_tokens(), block.1 * self.block_tokens());
            let keys = keys.chunks_mut(block_keys.max(1)).zip(blocks);
            let keys = keys.map(|(to, &block)| (pool.0, place(block) as usize * block_keys, to));
            let values = values.chunks_mut(block_values.max(1)).zip(blocks);
            let values = values.map(|(to, &block)| (pool.1, place(block) as usize * block_values, to));
            cpu.read_parts(keys.chain(values).collect())?;
        }
        Ok(())
    }

    /// The same by MLX's operations, all layers in one graph: to wait for each would take longer than to copy it.
    fn gather_rows(&self, blocks: &[BlockId], to: &mut RowBuffer) -> Result<()> {
        let layout = Arc::clone(to.layout());
        let places = places(blocks)?;
        let mut gathered = Vec::with_capacity(2 * layout.layers.len());
        for rows in &layout.layers {
            self.wait(rows.layer)?;
            let (keys, values) = self.layer(rows.layer)?;
            for pool in [keys, values].into_iter().filter(|pool| pool.size() > 0) {
                gathered.push(pool.take_axis(&places, 0)?);
            }
        }
        mlx_rs::transforms::eval(&gathered)?;
        let mut gathered = gathered.into_iter();
        for at in 0..layout.layers.len() {
            let (keys, values) = to.rows_mut(at, 0..to.tokens());
            for to in [keys, values].into_iter().filter(|to| !to.is_empty()) {
                let rows = gathered.next().ok_or_else(|| Error::internal("rows that were not gathered"))?;
                read_array(&rows, to)?;
            }
        }
        Ok(())
    }

    /// Copies the rows of `tokens` of `from` to consecutive blocks of a group, which they fill, but for the last block.
    /// What is behind them there may be anything.
    pub fn write_rows(&mut self, blocks: &[BlockId], from: &RowBuffer, tokens: Range<usize>) -> Result<()> {
        let layout = Arc::clone(from.layout());
        let block_tokens = self.block_tokens();
        if blocks.len() != tokens.len().div_ceil(block_tokens) {
            return Err(Error::internal(format!("{} blocks for {} rows", blocks.len(), tokens.len())));
        }
        let Backend::Cpu(cpu) = self.backend() else { return self.scatter_rows(blocks, from, tokens) };
        for (at, rows) in layout.layers.iter().enumerate() {
            let (keys, values) = from.rows(at, tokens.clone());
            let pool = self.layer(rows.layer)?;
            let block = layout.row_bytes(at);
            let (block_keys, block_values) = (block.0 * block_tokens, block.1 * block_tokens);
            let keys = keys.chunks(block_keys.max(1)).zip(blocks);
            let keys = keys.map(|(from, &block)| (pool.0, place(block) as usize * block_keys, from));
            let values = values.chunks(block_values.max(1)).zip(blocks);
            let values = values.map(|(from, &block)| (pool.1, place(block) as usize * block_values, from));
            cpu.write_parts(keys.chain(values).collect())?;
        }
        Ok(())
    }

    /// The same by MLX's operations, all layers in one graph, in which the pools have no other user.
    fn scatter_rows(&mut self, blocks: &[BlockId], from: &RowBuffer, tokens: Range<usize>) -> Result<()> {
        let layout = Arc::clone(from.layout());
        let places = places(blocks)?;
        for (at, rows) in layout.layers.iter().enumerate() {
            let (keys, values) = from.rows(at, tokens.clone());
            let scattered = |pool: Array, rows: &[u8]| -> Result<Array> {
                // Nothing where values are a part of keys.
                if pool.size() == 0 {
                    return Ok(pool);
                }
                let update = places_filled_with(&pool, blocks.len(), rows)?;
                mlx::scatter(pool, &[&places], &update)
            };
            self.replace(rows.layer, |key_pool, value_pool| {
                Ok((scattered(key_pool, keys)?, scattered(value_pool, values)?))
            })?;
        }
        let pools = layout.layers.iter().map(|rows| self.layer(rows.layer)).collect::<Result<Vec<_>>>()?;
        Ok(mlx_rs::transforms::eval(pools.into_iter().flat_map(|(keys, values)| [keys, values]))?)
    }
}

/// The format of rows of numbers of a type, if tiers take it.
pub fn row_type(dtype: Dtype) -> Option<RowType> {
    match dtype {
        Dtype::Float32 => Some(RowType::F32),
        Dtype::Float16 => Some(RowType::F16),
        Dtype::Bfloat16 => Some(RowType::Bf16),
        _ => None,
    }
}

/// `bytes`, and zeros where there are too few of them, as the update of a scatter to `count` places of `pool [places, ..]`:
/// `[count, 1, ..]`.
pub fn places_filled_with(pool: &Array, count: usize, bytes: &[u8]) -> Result<Array> {
    let mut shape = pool.shape().to_vec();
    shape[0] = count as i32;
    let all: usize = shape.iter().map(|&n| n as usize).product::<usize>() * mlx::item_size(pool.dtype());
    let mut filled = HostBuffer::new(all)?;
    filled.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
    Ok(filled.into_array(&shape, pool.dtype())?.expand_dims(1)?)
}

/// Places of blocks in the arrays, as an array.
fn places(blocks: &[BlockId]) -> Result<Array> {
    mlx::indices(&blocks.iter().map(|&block| place(block) as i32).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{GroupKind, KvLayout};
    use crate::kernels::{Cpu, Precision};
    use crate::mlx::Device;

    fn moved(backend: Backend, dtype: Dtype) {
        mlx::init().unwrap();
        mlx::on_device(Device::Cpu, || {
            // The middle one is in another group, whose blocks of the same numbers are others.
            let (full, window) = (GroupKind::Full, GroupKind::Window(9));
            let layers = [(full, (2, 4), (0, 0)), (window, (1, 4), (1, 4)), (full, (1, 8), (2, 3))];
            let layout = KvLayout::new(&layers, dtype);
            let mut pages = Pages::new(backend, &layout, 8)?;
            pages.resize(&[9, 2]);
            pages.resize_all()?;
            let rows = pages.row_layout(0).unwrap();
            assert_eq!(rows.layers.iter().map(|rows| rows.layer).collect::<Vec<_>>(), [0, 2]);
            let mut whole = RowBuffer::new(Arc::clone(&rows), 24, 0);
            let pages_len = whole.pages().len();
            (0..pages_len).for_each(|at| whole.pages_mut()[at] = (at * 7 % 251) as u8 & 0x3f);
            // Three blocks out of order, then a part of them in others, the last one half full.
            pages.write_rows(&[5, 2, 7], &whole, 0..24)?;
            pages.write_rows(&[0, 8], &whole, 8..20)?;
            let mut read = RowBuffer::new(Arc::clone(&rows), 24, 0);
            pages.read_rows(&[5, 2, 7], &mut read)?;
            assert_eq!(read.all_rows(), whole.all_rows());
            let mut read = RowBuffer::new(Arc::clone(&rows), 12, 0);
            pages.read_rows(&[0, 8], &mut read)?;
            for at in 0..2 {
                assert_eq!(read.rows(at, 0..12), whole.rows(at, 8..20));
            }
            pages.read_rows(&[8, 0], &mut read)?;
            assert_ne!(read.rows(0, 0..12), whole.rows(0, 8..20), "the order of blocks is not noticed");
            assert!(pages.write_rows(&[1], &whole, 0..9).is_err());
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn rows_move_between_pools_and_memory() {
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            moved(Backend::Mlx, dtype);
            moved(Backend::Cpu(Cpu::new(Some(2), Precision::Exact)), dtype);
        }
    }
}
