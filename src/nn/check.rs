//! Whether the GPU kernels compute what MLX's operations do, on the device at hand: asked once for each kind of layer.

use std::cell::RefCell;
use std::sync::Arc;

use mlx_rs::{Array, Dtype};

use super::gather::Scores;
use super::{Gathers, PagedIndex};
use crate::cache::{GroupKind, KvLayout, Pages};
use crate::error::{Error, Result};
use crate::kernels::gpu::{PagedAttention, PagedSpec};
use crate::kernels::{Backend, Placement, Segment};
use crate::mlx;

/// The kernels for `spec`, if they work here; otherwise a warning, and MLX's operations are to be used. Checked once for
/// each thread and kind of layer.
pub fn check_paged(spec: &PagedSpec) -> Option<PagedAttention> {
    thread_local! {
        static KNOWN: RefCell<Vec<(PagedSpec, Option<PagedAttention>)>> = const { RefCell::new(Vec::new()) };
    }
    let known =
        KNOWN.with_borrow(|known| known.iter().find(|(other, _)| other == spec).map(|(_, found)| found.clone()));
    known.unwrap_or_else(|| {
        let started = std::time::Instant::now();
        let found = match compare_paged(spec, false) {
            Ok(kernels) => {
                tracing::debug!(?spec, seconds = started.elapsed().as_secs_f64(), "the GPU kernels work");
                Some(kernels)
            }
            Err(error) => {
                tracing::warn!(?spec, %error, "the GPU kernels are not used: attention will be slow");
                None
            }
        };
        KNOWN.with_borrow_mut(|known| known.push((*spec, found.clone())));
        found
    })
}

/// Compiles the kernels for `spec` and plays some steps of a few sequences with them and with MLX's operations; an error
/// if the two differ. With `wrong_tables` the kernels get tables in another order, which must be noticed.
pub fn compare_paged(spec: &PagedSpec, wrong_tables: bool) -> Result<PagedAttention> {
    let kernels = PagedAttention::new(*spec)?;
    let mut case = Case::new(&kernels, wrong_tables)?;
    let block = spec.block_tokens;
    // Pieces of prompts, and a short one as single rows.
    case.step("prompts", 1, &[(B, 0, block - 1)], &[(A, 0, 3 * block + 4), (D, 0, 2 * block + 6)], &[])?;
    for (at, splits) in [(0, 1), (1, 3)] {
        let singles = [(A, 3 * block + 4 + at, 1), (B, block - 1 + at, 1), (C, at, 1), (D, 2 * block + 6 + at, 1)];
        case.step("rows that append themselves", splits, &singles, &[], &[])?;
    }
    // A sequence that goes on in the middle of a copied block, and rows that do not append themselves.
    let copied = (case.tables[A][1], case.tables[E][1]);
    case.step("a prompt that goes on", 1, &[(C, 2, 2)], &[(E, block + 3, 2 * block + 1)], &[copied])?;
    case.step("rows that are appended before", 3, &[(D, 2 * block + 8, 2), (C, 4, 1)], &[], &[])?;
    Ok(kernels)
}

/// Sequences of the case; `E` begins with the first block of `A`.
const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const D: usize = 3;
const E: usize = 4;

/// Blocks of the pools, the spare one aside.
const BLOCKS: usize = 29;

/// Spare rows behind the singles and behind each chunk.
const SPARE: usize = 3;

/// Sequence, position of the first token, tokens.
type Run = (usize, usize, usize);

/// Pools of both sides.
struct Case<'a> {
    kernels: &'a PagedAttention,
    wrong_tables: bool,
    tables: [Vec<u32>; 5],
    pages: Pages,
    /// In f32, written by MLX's operations.
    expected: Pages,
    /// Of the next random numbers.
    seed: u64,
}

impl<'a> Case<'a> {
    fn new(kernels: &'a PagedAttention, wrong_tables: bool) -> Result<Self> {
        let PagedSpec { kv_heads, head_dim, block_tokens, dtype, .. } = *kernels.spec();
        let pages = |dtype| -> Result<Pages> {
            let rows = (kv_heads, head_dim);
            let layout = KvLayout::new(&[(GroupKind::Full, rows, rows)], dtype);
            let mut pages = Pages::new(Backend::Mlx, &layout, block_tokens)?;
            pages.resize(&[BLOCKS]);
            pages.resize_all()?;
            Ok(pages)
        };
        let (mut own, expected) = (pages(dtype)?, pages(Dtype::Float32)?);
        // Slots that nobody wrote hold no numbers, so that reading one shows.
        let slots: Vec<i32> = (0..((BLOCKS + 1) * block_tokens) as i32).collect();
        let shape = [slots.len() as i32, kv_heads as i32, head_dim as i32];
        let nothing = Array::full::<f32>(&shape, Array::from_f32(f32::NAN))?.as_dtype(dtype)?;
        kernels.append(&mut own.pool(0)?, &nothing, &nothing, &mlx::indices(&slots)?)?;
        // Neighbours in a sequence are none in the pool.
        let mut free = (0..BLOCKS as u32).map(|i| 1 + i * 12 % BLOCKS as u32);
        let mut tables = [5, 3, 1, 4, 6].map(|blocks| free.by_ref().take(blocks).collect::<Vec<u32>>());
        tables[E][0] = tables[A][0];
        Ok(Self { kernels, wrong_tables, tables, pages: own, expected, seed: 0 })
    }

    fn step(
        &mut self,
        what: &str,
        splits: usize,
        singles: &[Run],
        chunks: &[Run],
        copies: &[(u32, u32)],
    ) -> Result<()> {
        let PagedSpec { heads, kv_heads, head_dim, block_tokens, scale, window, dtype } = *self.kernels.spec();
        let mut placement = self.placement(singles, chunks, copies);
        let rows = placement.slots.len();
        let mut random = |heads: usize| -> Result<Array> {
            self.seed += 1;
            let shape = [rows as i32, heads as i32, head_dim as i32];
            let key = mlx_rs::random::key(self.seed)?;
            Ok(mlx_rs::random::normal::<f32>(&shape, None, None, &key)?.as_dtype(dtype)?)
        };
        let (queries, keys, values) = (random(heads)?, random(kv_heads)?, random(kv_heads)?);

        let wide = |array: &Array| array.as_dtype(Dtype::Float32);
        let mut gathers = Gathers::new(&Arc::new(self.placement(singles, chunks, copies)), block_tokens);
        let pools = self.expected.append(0, gathers.writes(), &wide(&keys)?, &wide(&values)?)?;
        let expected = gathers.attend(
            &wide(&queries)?,
            pools,
            &Scores { scale, window, soft_cap: None, sinks: None, values_in_keys: None },
        )?;

        if self.wrong_tables {
            placement.tables.reverse();
        }
        let segments = placement.segments.clone();
        let mut index = PagedIndex::new(&Arc::new(placement), block_tokens).with_splits(splits);
        let mut pool = self.pages.pool(0)?;
        let (found, _) = index.attend(self.kernels, &mut pool, &queries, Some((&keys, &values)))?;
        // And as a layer does that has the rows of another one.
        let (read, _) = index.attend(self.kernels, &mut pool, &queries, None)?;
        for (found, how) in [(found, what.to_owned()), (read, format!("{what}, read again"))] {
            let found = found.as_dtype(Dtype::Float32)?;
            for Segment { rows, .. } in &segments {
                let of = |array: &Array| mlx::rows(array, rows.start, rows.end);
                close(&of(&found)?, &of(&expected)?, dtype, &how)?;
            }
        }
        Ok(())
    }

    fn placement(&self, singles: &[Run], chunks: &[Run], copies: &[(u32, u32)]) -> Placement {
        let block_tokens = self.kernels.spec().block_tokens;
        let mut placement = Placement { copies: copies.to_vec(), ..Placement::default() };
        let add = |placement: &mut Placement, &(sequence, start, tokens): &Run| {
            let (table, row) = (placement.tables.len(), placement.slots.len());
            let own = &self.tables[sequence];
            placement.tables.extend(own);
            let slot = |at: usize| own[at / block_tokens] * block_tokens as u32 + (at % block_tokens) as u32;
            placement.slots.extend((start..start + tokens).map(slot));
            placement.segments.push(Segment { rows: row..row + tokens, start, table });
        };
        let fill_up = |placement: &mut Placement| {
            let rows = placement.slots.len();
            placement.spare.push(rows..rows + SPARE);
            placement.slots.extend([0; SPARE]);
        };
        singles.iter().for_each(|run| add(&mut placement, run));
        fill_up(&mut placement);
        placement.singles = placement.slots.len();
        for run in chunks {
            add(&mut placement, run);
            fill_up(&mut placement);
        }
        placement
    }
}

/// `|found - expected| / |expected|`, NaN if either is not finite.
fn difference(found: &Array, expected: &Array) -> Result<f32> {
    let error = found.subtract(expected)?.square()?.sum(None)?;
    let error = error.divide(expected.square()?.sum(None)?)?.sqrt()?;
    error.try_item_exact::<f32>().map_err(|error| Error::backend(format!("MLX: {error}")))
}

pub(super) fn close(found: &Array, expected: &Array, dtype: Dtype, what: &str) -> Result<()> {
    // MLX multiplies f32 in TF32 by default, which is what most of the first bound is for.
    let bound = match dtype {
        Dtype::Float32 => 2e-3,
        Dtype::Float16 => 3e-3,
        _ => 1.2e-2,
    };
    let error = difference(found, expected)?;
    if error <= bound {
        return Ok(());
    }
    Err(Error::backend(format!("{what}: off by {error:.1e} of the size, {bound:.1e} are allowed")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mlx::Device;

    #[test]
    fn a_result_that_is_off_or_not_finite_is_refused() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(Device::Cpu, || {
            let good = Array::from_slice(&[1f32, -2.0, 3.0, 4.0], &[4]);
            close(&good, &good, Dtype::Float32, "the same")?;
            for last in [4.1, f32::NAN, f32::INFINITY] {
                let bad = Array::from_slice(&[1f32, -2.0, 3.0, last], &[4]);
                assert!(close(&bad, &good, Dtype::Bfloat16, "another").is_err(), "{last}");
            }
            Ok(())
        });
        outcome.unwrap();
    }

    #[test]
    fn without_a_gpu_the_kernels_are_not_used() {
        mlx::init().unwrap();
        if mlx::gpu_available() {
            return;
        }
        let spec = PagedSpec {
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            block_tokens: 16,
            scale: 0.1,
            window: None,
            dtype: Dtype::Float16,
        };
        assert!(mlx::on_device(Device::Cpu, || Ok(check_paged(&spec).is_none())).unwrap());
    }
}
