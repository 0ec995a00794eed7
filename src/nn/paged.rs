//! Attention over blocks with the GPU kernels: single rows read the blocks themselves; of longer pieces of prompts the
//! keys are gathered into one run for MLX's own attention, in few different shapes.

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::Array;
use mlx_rs::fast::{ScaledDotProductAttentionMask as Mask, scaled_dot_product_attention};
use mlx_rs::ops::concatenate;

use crate::error::{Error, Result};
use crate::kernels::gpu::{PagedAttention, Pool};
use crate::kernels::{Placement, Segment, Window};
use crate::mlx;

/// Pieces of prompts that go on are computed as if they began at a multiple of this, and ended at one: every new pair of
/// lengths costs a plan of cuDNN's, 40 to 70 ms.
const GRID: usize = 512;

/// Blocks of the shortest tables.
const SHORTEST_TABLE: usize = 16;

/// A step's places as index arrays, made when first needed and shared by all layers.
#[derive(Debug)]
pub struct PagedIndex {
    placement: Arc<Placement>,
    block_tokens: usize,
    made: Option<Arrays>,
    splits: Option<usize>,
}

#[derive(Debug)]
struct Arrays {
    copies: Option<Copies>,
    /// Where the rows go, `[T]` i32; of spare ones -1, which is nowhere.
    slots: Array,
    /// Whether attention appends the rows itself.
    fused: bool,
    singles: Option<Singles>,
    chunks: Vec<Chunk>,
}

/// Whole blocks to be copied first.
#[derive(Debug)]
struct Copies {
    from: Array,
    to: Array,
    tokens: usize,
    length: Array,
}

/// Rows that are attended to one by one.
#[derive(Debug)]
struct Singles {
    rows: usize,
    /// Those that are not spare.
    busy: usize,
    /// `[rows, blocks]` i32.
    tables: Array,
    /// Keys that each row sees, `[rows]` i32; none for spare ones.
    lengths: Array,
}

/// A longer piece of a prompt, with the spare rows behind it.
#[derive(Debug)]
struct Chunk {
    rows: Range<usize>,
    /// Without it the piece begins its sequence: its keys are its own rows.
    gathered: Option<Gathered>,
    /// The same where a layer without rows of its own needs it: made when it first does.
    stored: Option<Gathered>,
    mask: Option<(Window, Array)>,
}

#[derive(Debug)]
struct Gathered {
    /// Rows before the piece that are computed in vain.
    before: usize,
    /// Queries with them, and with what fills the last grid cell.
    queries: usize,
    /// Keys from the sequence's beginning to the last query's own.
    keys: usize,
    table: Array,
    /// Keys that exist, `[1]` i32; the others are zeros that no query of the piece sees.
    length: Array,
}

impl PagedIndex {
    /// For a step on blocks of `block_tokens`.
    pub fn new(placement: &Arc<Placement>, block_tokens: usize) -> Self {
        Self { placement: Arc::clone(placement), block_tokens, made: None, splits: None }
    }

    /// The same with that many splits of the keys of each single row.
    pub(super) fn with_splits(self, splits: usize) -> Self {
        Self { splits: Some(splits), ..self }
    }

    /// Appends keys and values, `rows [T, kv_heads, width]` both, to the pool and attends with `queries [T, heads, width]`: the
    /// same shape. Without them the pool has the step's rows already, and its copies. Also returns what must be evaluated with
    /// the step if nothing in it depends on the appended rows.
    pub fn attend(
        &mut self,
        kernels: &PagedAttention,
        pool: &mut Pool<'_>,
        queries: &Array,
        rows: Option<(&Array, &Array)>,
    ) -> Result<(Array, Option<Array>)> {
        let splits = self.splits;
        let arrays = match &mut self.made {
            Some(arrays) => arrays,
            none => none.insert(Arrays::new(&self.placement, self.block_tokens)?),
        };
        if let (Some(Copies { from, to, tokens, length }), Some(_)) = (&arrays.copies, rows) {
            // All are read before one is written: a block may be copied and given away in one step.
            let (keys, values) = kernels.gather(pool, from, length, *tokens)?;
            kernels.append(pool, &keys, &values, to)?;
        }
        let (own_rows, appended) = if arrays.fused { (rows, None) } else { (None, rows) };
        if let Some((keys, values)) = appended {
            kernels.append(pool, keys, values, &arrays.slots)?;
        }
        let mut unread = appended.is_some();
        let mut attended = Vec::with_capacity(1 + arrays.chunks.len());
        if let Some(Singles { rows, busy, tables, lengths }) = &arrays.singles {
            let own = |array: &Array| match array.dim(0) as usize == *rows {
                true => Ok(array.clone()),
                false => mlx::rows(array, 0, *rows),
            };
            let new = own_rows.map(|(keys, values)| Ok::<_, Error>((own(keys)?, own(values)?))).transpose()?;
            let new = new.as_ref().map(|(keys, values)| (keys, values));
            let tokens = tables.dim(1) as usize * kernels.spec().block_tokens;
            let splits = Some(splits.unwrap_or_else(|| kernels.splits(*busy, tokens)));
            attended.push(kernels.decode_in(splits, pool, &own(queries)?, new, tables, lengths)?);
            unread = false;
        }
        for chunk in &mut arrays.chunks {
            unread &= chunk.gathered.is_none();
            if rows.is_none() {
                chunk.find_stored(&self.placement, self.block_tokens)?;
            }
            attended.push(chunk.attend(kernels, pool, queries, rows)?);
        }
        let attended = match &attended[..] {
            [] => return Err(Error::internal("a step without rows")),
            [one] => one.clone(),
            several => concatenate(several, 0)?,
        };
        Ok((attended, unread.then(|| pool.order.token().clone())))
    }
}

impl Arrays {
    fn new(placement: &Placement, block_tokens: usize) -> Result<Self> {
        let mut slots: Vec<i32> = placement.slots.iter().map(|&slot| slot as i32).collect();
        placement.spare.iter().cloned().flatten().for_each(|row| slots[row] = -1);
        let (singles, chunks): (Vec<&Segment>, Vec<&Segment>) =
            placement.segments.iter().partition(|segment| segment.rows.end <= placement.singles);
        let chunks = chunks.iter().map(|segment| Chunk::new(segment, placement, block_tokens));
        Ok(Self {
            copies: Copies::new(&placement.copies, block_tokens)?,
            slots: mlx::indices(&slots)?,
            fused: can_fuse(placement, block_tokens),
            singles: Singles::new(&singles, placement, block_tokens)?,
            chunks: chunks.collect::<Result<_>>()?,
        })
    }
}

impl Copies {
    fn new(copies: &[(u32, u32)], block_tokens: usize) -> Result<Option<Self>> {
        if copies.is_empty() {
            return Ok(None);
        }
        let from: Vec<i32> = copies.iter().map(|copy| copy.0 as i32).collect();
        let slot = |block: u32| (0..block_tokens).map(move |at| block as i32 * block_tokens as i32 + at as i32);
        let to: Vec<i32> = copies.iter().flat_map(|copy| slot(copy.1)).collect();
        let length = mlx::indices(&[to.len() as i32])?;
        Ok(Some(Self { from: mlx::indices(&from)?, to: mlx::indices(&to)?, tokens: to.len(), length }))
    }
}

impl Singles {
    fn new(segments: &[&Segment], placement: &Placement, block_tokens: usize) -> Result<Option<Self>> {
        let rows = placement.singles;
        if rows == 0 {
            return Ok(None);
        }
        let longest = segments.iter().map(|segment| blocks_of(segment, block_tokens)).max().unwrap_or(1);
        let width = table_width(longest);
        let (mut tables, mut lengths) = (vec![0; rows * width], vec![0; rows]);
        for segment in segments {
            let own = &placement.tables[segment.table..segment.table + blocks_of(segment, block_tokens)];
            for (at, row) in segment.rows.clone().enumerate() {
                lengths[row] = (segment.start + at + 1) as i32;
                tables[row * width..].iter_mut().zip(own).for_each(|(to, &block)| *to = block as i32);
            }
        }
        let tables = Array::from_slice(&tables, &[rows as i32, width as i32]);
        let busy = lengths.iter().filter(|&&length| length > 0).count();
        Ok(Some(Self { rows, busy, tables, lengths: mlx::indices(&lengths)? }))
    }
}

impl Chunk {
    fn new(segment: &Segment, placement: &Placement, block_tokens: usize) -> Result<Self> {
        let spare = placement.spare.iter().find(|spare| spare.start == segment.rows.end);
        let rows = segment.rows.start..spare.map_or(segment.rows.end, |spare| spare.end);
        let start = segment.start;
        if start == 0 {
            return Ok(Self { rows, gathered: None, stored: None, mask: None });
        }
        let before = start % GRID;
        let queries = (before + rows.len()).next_multiple_of(GRID);
        let gathered = Gathered::new(segment, placement, block_tokens, (before, queries))?;
        Ok(Self { rows, gathered: Some(gathered), stored: None, mask: None })
    }

    /// Sees to it that the piece can be read from the pool, also if it begins its sequence.
    fn find_stored(&mut self, placement: &Placement, block_tokens: usize) -> Result<()> {
        if self.gathered.is_none() && self.stored.is_none() {
            let segment = placement.segments.iter().find(|segment| segment.rows.start == self.rows.start);
            let segment = segment.ok_or_else(|| Error::internal("a piece without a segment"))?;
            // As many keys as if they were its own rows: the same shapes.
            self.stored = Some(Gathered::new(segment, placement, block_tokens, (0, self.rows.len()))?);
        }
        Ok(())
    }

    /// Queries and keys of the whole step, or the pool's; the rows of this piece of it.
    fn attend(
        &mut self,
        kernels: &PagedAttention,
        pool: &mut Pool<'_>,
        queries: &Array,
        new: Option<(&Array, &Array)>,
    ) -> Result<Array> {
        let Range { start, end } = self.rows;
        let own = |array: &Array| match start == 0 && end == array.dim(0) as usize {
            true => Ok(array.clone()),
            false => mlx::rows(array, start, end),
        };
        let mut queries = own(queries)?;
        let (keys, values) = match (self.gathered.as_ref().or(self.stored.as_ref().filter(|_| new.is_none())), new) {
            (None, None) => return Err(Error::internal("a piece without keys")),
            (None, Some((keys, values))) => (own(keys)?, own(values)?),
            (Some(Gathered { before, queries: all, keys, table, length }), _) => {
                let behind = all - before - self.rows.len();
                if before + behind > 0 {
                    let widths = [(*before as i32, behind as i32), (0, 0), (0, 0)];
                    queries = mlx_rs::ops::pad(&queries, &widths[..], None, None)?;
                }
                kernels.gather(pool, table, length, *keys)?
            }
        };
        // From token-major [n, heads, width] to MLX's [1, heads, n, width]; views, nothing is copied.
        let by_head = |rows: &Array| -> Result<Array> { Ok(rows.transpose_axes(&[1, 0, 2])?.expand_dims(0)?) };
        let (queries, keys, values) = (by_head(&queries)?, by_head(&keys)?, by_head(&values)?);
        let spec = kernels.spec();
        let mask = self.mask(spec.window, queries.dim(2), keys.dim(2))?;
        let attended = match mask {
            Some(mask) => scaled_dot_product_attention(&queries, &keys, &values, spec.scale, mask, None)?,
            None => scaled_dot_product_attention(&queries, &keys, &values, spec.scale, Mask::Causal, None)?,
        };
        let attended = attended.squeeze_axes(&[0])?.transpose_axes(&[1, 0, 2])?;
        match &self.gathered {
            Some(Gathered { before, queries, .. }) if *queries != self.rows.len() => {
                mlx::rows(&attended, *before, before + self.rows.len())
            }
            _ => Ok(attended),
        }
    }

    /// `[queries, keys]` booleans, if a causal mask is not enough; the last query's own key is the last one.
    fn mask(&mut self, window: Option<Window>, queries: i32, keys: i32) -> Result<Option<&Array>> {
        let Some(window) = window.filter(|window| keys as usize > window.tokens()) else { return Ok(None) };
        if self.mask.as_ref().is_none_or(|(known, _)| *known != window) {
            let range = |from: i32, to: i32| mlx_rs::ops::arange::<i32, i32>(from, to, None);
            let own = range(keys - queries, keys)?.expand_dims(1)?;
            let all = range(0, keys)?.expand_dims(0)?;
            let tokens = Array::from_int(window.tokens() as i32);
            let near = match window {
                Window::Sliding(_) => own.subtract(&all)?.lt(&tokens)?,
                Window::Chunked(_) => own.floor_divide(&tokens)?.eq(all.floor_divide(&tokens)?)?,
            };
            self.mask = Some((window, all.le(&own)?.logical_and(near)?));
        }
        Ok(self.mask.as_ref().map(|(_, mask)| mask))
    }
}

impl Gathered {
    /// For `queries` rows, of which `before` ones go before those of the segment.
    fn new(
        segment: &Segment,
        placement: &Placement,
        block_tokens: usize,
        (before, queries): (usize, usize),
    ) -> Result<Self> {
        let keys = segment.start - before + queries;
        let own = &placement.tables[segment.table..segment.table + blocks_of(segment, block_tokens)];
        let mut table = vec![0; keys.div_ceil(block_tokens).max(own.len())];
        table.iter_mut().zip(own).for_each(|(to, &block)| *to = block as i32);
        let length = mlx::indices(&[(segment.start + segment.rows.len()) as i32])?;
        Ok(Self { before, queries, keys, table: mlx::indices(&table)?, length })
    }
}

/// Blocks up to a segment's last token.
fn blocks_of(segment: &Segment, block_tokens: usize) -> usize {
    (segment.start + segment.rows.len()).div_ceil(block_tokens)
}

/// Blocks of tables for sequences of that many: at most a quarter more, from 64 on.
fn table_width(blocks: usize) -> usize {
    blocks.next_multiple_of((blocks.next_power_of_two() / 4).max(SHORTEST_TABLE))
}

/// Whether each row of the step can append its own key while the others attend: they are single tokens, and no other
/// sequence reads a block that one of them fills up.
fn can_fuse(placement: &Placement, block_tokens: usize) -> bool {
    let Placement { segments, tables, .. } = placement;
    let table = |segment: &Segment| &tables[segment.table..segment.table + blocks_of(segment, block_tokens)];
    segments.iter().all(|segment| segment.rows.len() == 1 && segment.rows.end <= placement.singles)
        && segments.iter().enumerate().all(|(at, segment)| {
            // Only whole blocks are shared in the step that writes them.
            (segment.start + 1) % block_tokens != 0 || {
                let filled = table(segment).last();
                segments
                    .iter()
                    .enumerate()
                    .all(|(other, segment)| other == at || table(segment).iter().all(|block| Some(block) != filled))
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(segments: Vec<Segment>, tables: Vec<u32>, singles: usize) -> Placement {
        Placement { segments, tables, singles, ..Placement::default() }
    }

    #[test]
    fn rows_append_on_their_way_unless_another_reads_the_block_they_fill() {
        let row = |row: usize, start: usize, table: usize| Segment { rows: row..row + 1, start, table };
        // Two sequences share block 5; the second one's newest token lies in block 7, the first one's in 6.
        let tables = vec![5, 6, 5, 7];
        assert!(can_fuse(&placement(vec![row(0, 9, 0), row(1, 12, 2)], tables.clone(), 8), 8));
        assert!(can_fuse(&placement(vec![row(0, 15, 0), row(1, 12, 2)], tables.clone(), 8), 8));
        // The first one fills block 5 only now.
        assert!(!can_fuse(&placement(vec![row(0, 7, 0), row(1, 12, 2)], tables.clone(), 8), 8));
        // Several tokens of one sequence; a piece of a prompt.
        assert!(!can_fuse(&placement(vec![Segment { rows: 0..3, start: 9, table: 0 }], tables.clone(), 8), 8));
        assert!(!can_fuse(&placement(vec![Segment { rows: 0..1, start: 9, table: 0 }], tables, 0), 8));
    }

    #[test]
    fn tables_come_in_few_widths() {
        assert_eq!([1, 16, 17, 64, 65, 130, 1000].map(table_width), [16, 16, 32, 64, 96, 192, 1024]);
        let widths: std::collections::BTreeSet<usize> = (1..5000).map(table_width).collect();
        assert!(widths.len() < 25, "{widths:?}");
    }

    #[test]
    fn masks_begin_where_windows_do() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(mlx::Device::Cpu, || {
            let mut chunk = Chunk { rows: 0..6, gathered: None, stored: None, mask: None };
            for window in [Window::Sliding(4), Window::Chunked(4)] {
                let mask = chunk.mask(Some(window), 6, 11)?.unwrap().contiguous()?;
                let expected: Vec<bool> =
                    (5..11).flat_map(|own| (0..11).map(move |key| (window.first(own)..=own).contains(&key))).collect();
                assert_eq!(mask.as_slice::<bool>(), expected, "{window:?}");
                assert!(chunk.mask(Some(window), 4, 4)?.is_none());
            }
            Ok(())
        });
        outcome.unwrap();
    }

    #[test]
    fn pieces_that_go_on_lie_on_a_grid() {
        mlx::init().unwrap();
        let outcome = mlx::on_device(mlx::Device::Cpu, || {
            let placement = Placement {
                tables: (1..100).collect(),
                segments: vec![Segment { rows: 8..108, start: 700, table: 0 }],
                spare: vec![3..8, 108..136],
                singles: 8,
                ..Placement::default()
            };
            let chunk = Chunk::new(&placement.segments[0], &placement, 32)?;
            let gathered = chunk.gathered.unwrap();
            assert_eq!((chunk.rows, gathered.before), (8..136, 700 - 512));
            assert_eq!((gathered.queries, gathered.keys, gathered.table.size()), (512, 1024, 32));
            Ok(())
        });
        outcome.unwrap();
    }
}
