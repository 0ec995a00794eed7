//! The pool arrays: keys and values of all sequences, layer by layer, in blocks.
//!
//! `[blocks, block_tokens, heads, width]`, token-major, so that an append is one run of memory. The first block belongs to
//! no sequence: rows that nobody reads go there, and tables point to it where their rows do not matter. Blocks of the
//! allocator begin behind it.
//!
//! The kernels write to the arrays themselves ([`Pages::layer`], [`Pages::pool`]); with MLX's operations
//! [`Pages::append`] makes a new array in the place of the old one, in place as long as nothing outside this type keeps a
//! handle across a step.

use std::collections::BTreeSet;
use std::ops::Range;

use mlx_rs::{Array, Dtype};

use super::group::GroupKind;
use super::manager::BlockCopy;
use crate::error::{Error, Result};
use crate::kernels::gpu::{Order, Pool};
use crate::kernels::{Backend, Placement};
use crate::mlx;

/// Blocks in front that belong to no sequence.
const SPARE: usize = 1;

/// Cache group of a layer, and heads and width of its keys and of its values.
pub type LayerShape = (GroupKind, (usize, usize), (usize, usize));

/// What one token of a sequence stores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvLayout {
    /// The cache groups: all layers of a group have the same tokens' rows.
    pub groups: Vec<GroupKind>,
    /// What the layers store, first to last.
    pub layers: Vec<LayerLayout>,
    /// Type of keys and values; that of the model's weights.
    pub dtype: Dtype,
}

/// What one token stores in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLayout {
    /// The layer's cache group.
    pub group: usize,
    /// Heads and width of keys.
    pub keys: (usize, usize),
    /// Heads and width of values; nothing where they are a part of keys.
    pub values: (usize, usize),
}

impl LayerLayout {
    /// Numbers of a token.
    fn numbers(&self) -> usize {
        self.keys.0 * self.keys.1 + self.values.0 * self.values.1
    }
}

impl KvLayout {
    /// Layers given by the rows that they need, and heads and width of their keys and of their values. Layers that need the
    /// same rows are one group.
    pub fn new(layers: &[LayerShape], dtype: Dtype) -> Self {
        let groups: BTreeSet<GroupKind> = layers.iter().map(|layer| layer.0).collect();
        let groups: Vec<GroupKind> = groups.into_iter().collect();
        let layer = |&(kind, keys, values)| {
            let group = groups.iter().position(|&group| group == kind).unwrap_or(0);
            LayerLayout { group, keys, values }
        };
        let layers = layers.iter().map(layer).collect();
        Self { groups, layers, dtype }
    }

    /// Bytes of one token's rows in all layers.
    pub fn token_bytes(&self) -> usize {
        (0..self.groups.len()).map(|group| self.group_token_bytes(group)).sum()
    }

    /// The same in the layers of a group.
    pub fn group_token_bytes(&self, group: usize) -> usize {
        self.group_token_numbers(group) * mlx::item_size(self.dtype)
    }

    /// Numbers instead of bytes.
    pub fn group_token_numbers(&self, group: usize) -> usize {
        self.layers.iter().filter(|layer| layer.group == group).map(LayerLayout::numbers).sum()
    }
}

#[derive(Debug)]
struct LayerPool {
    keys: Array,
    values: Array,
    /// Of the GPU kernels that use the two, since the first one has.
    order: Option<Order>,
}

impl LayerPool {
    /// Bytes of keys and of values.
    fn bytes(&self) -> (usize, usize) {
        (self.keys.nbytes(), self.values.nbytes())
    }
}

/// The pool arrays of a model.
#[derive(Debug)]
pub struct Pages {
    backend: Backend,
    layout: KvLayout,
    block_tokens: usize,
    /// `None` only while an array is being replaced.
    layers: Vec<Option<LayerPool>>,
    /// Which of them each layer of the model has, where some have the same.
    shared: Option<Vec<usize>>,
    /// Blocks that all layers of each group have, the spare one aside.
    capacities: Vec<usize>,
    /// What they will be, and the arrays that still have to get there: keys and values in turn, layer by layer.
    resize: Option<(Vec<usize>, Range<usize>)>,
}

impl Pages {
    /// Pools without blocks but for the spare one. What a block holds that nobody has written is anything with the CPU
    /// kernels, which do not look at it, and zeros elsewhere: a masked row must be finite there.
    pub fn new(backend: Backend, layout: &KvLayout, block_tokens: usize) -> Result<Self> {
        let layers = vec![(); layout.layers.len()].into_iter().map(|()| None).collect();
        let (layout, capacities) = (layout.clone(), vec![0; layout.groups.len()]);
        let mut pages = Self { backend, layout, block_tokens, layers, shared: None, capacities, resize: None };
        for layer in 0..pages.layers.len() {
            let (keys, values) = (pages.empty(layer, false, 0)?, pages.empty(layer, true, 0)?);
            let pool = LayerPool { keys, values, order: None };
            mlx_rs::transforms::eval([&pool.keys, &pool.values])?;
            pages.layers[layer] = Some(pool);
        }
        Ok(pages)
    }

    /// Pools of `blocks` blocks for sequences that pass the model in one go: layers of the same shape share theirs, because
    /// none reads what another has written. There is one group: nothing goes before the sequences end.
    pub fn shared(backend: Backend, layout: &KvLayout, block_tokens: usize, blocks: usize) -> Result<Self> {
        let mut shapes: Vec<LayerLayout> = Vec::new();
        let pools = layout.layers.iter().map(|layer| {
            let shape = LayerLayout { group: 0, ..*layer };
            shapes.iter().position(|known| *known == shape).unwrap_or_else(|| {
                shapes.push(shape);
                shapes.len() - 1
            })
        });
        let pools = pools.collect();
        let layout = KvLayout { groups: vec![GroupKind::Full], layers: shapes, dtype: layout.dtype };
        let mut pages = Self::new(backend, &layout, block_tokens)?;
        pages.shared = Some(pools);
        pages.resize(&[blocks]);
        pages.resize_all()?;
        Ok(pages)
    }

    /// Which pool `layer` has.
    fn pool_of(&self, layer: usize) -> usize {
        self.shared.as_ref().map_or(layer, |pools| pools[layer])
    }

    /// What a token stores.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// The cache group of `layer`.
    pub fn group(&self, layer: usize) -> usize {
        self.layout.layers[self.pool_of(layer)].group
    }

    /// Blocks that every layer of each group has.
    pub fn capacities(&self) -> &[usize] {
        &self.capacities
    }

    /// Bytes of a block in all layers of a group.
    pub fn block_bytes(&self, group: usize) -> usize {
        self.layout.group_token_bytes(group) * self.block_tokens
    }

    /// Bytes of all arrays.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(|pool| pool.keys.nbytes() + pool.values.nbytes()).sum()
    }

    /// Bytes of all arrays while the groups become as large as `capacities` blocks need.
    pub fn bytes_to_hold(&self, capacities: &[usize]) -> usize {
        let sizes = capacities.iter().zip(&self.capacities).enumerate();
        let bytes: usize = sizes.map(|(group, (new, old))| (new.max(old) + SPARE) * self.block_bytes(group)).sum();
        // The old one of what is replaced at a time.
        let replaced = |(layout, pool): (&LayerLayout, &Option<LayerPool>)| {
            let changes = capacities[layout.group] != self.capacities[layout.group];
            let (keys, values) = pool.as_ref().filter(|_| changes).map_or((0, 0), LayerPool::bytes);
            if self.at_a_time() == 1 { keys.max(values) } else { keys + values }
        };
        bytes + self.layout.layers.iter().zip(&self.layers).map(replaced).max().unwrap_or(0)
    }

    /// Arrays that are resized together.
    fn at_a_time(&self) -> usize {
        if matches!(self.backend, Backend::Cpu(_)) { 1 } else { 2 }
    }

    /// Begins to change the number of blocks of each group; [`resize_part`](Self::resize_part) does it. What is behind a
    /// smaller number is lost. Takes the place of a change that has not come to its end.
    pub fn resize(&mut self, capacities: &[usize]) {
        // A layer that is there already is not touched again.
        let arrays = 0..2 * self.layers.len();
        let changes = capacities != self.capacities || arrays.clone().any(|array| !self.stays(capacities, array));
        self.resize = changes.then(|| (capacities.to_vec(), arrays));
        self.capacities.iter_mut().zip(capacities).for_each(|(now, &new)| *now = new.min(*now));
    }

    /// Leaves what has been resized as it is, and the rest, too.
    pub fn stop_resizing(&mut self) {
        self.resize = None;
    }

    /// Whether there is more to be resized.
    pub fn is_resizing(&self) -> bool {
        self.resize.is_some()
    }

    /// Resizes keys or values of a layer, on the CPU, or both: old and new arrays exist side by side of these, and of no
    /// others. Returns whether more are to follow. New blocks may be used when none is left.
    pub fn resize_part(&mut self) -> Result<bool> {
        let arrays = self.at_a_time();
        let Some((capacities, mut left)) = self.resize.take() else { return Ok(false) };
        // Those that stay as they are take no time.
        let part: Vec<usize> = left.by_ref().filter(|&array| !self.stays(&capacities, array)).take(arrays).collect();
        let more = left.clone().any(|array| !self.stays(&capacities, array));
        self.resize = Some((capacities.clone(), left));
        for array in part {
            let (layer, values) = (array / 2, array % 2 == 1);
            let pool = self.layers[layer].as_ref().ok_or_else(|| Error::internal("a layer without a pool"))?;
            // MLX does not see what the kernels write.
            pool.order.iter().try_for_each(Order::wait)?;
            let capacity = capacities[self.layout.layers[layer].group];
            let new = self.resized(layer, values, capacity)?;
            // Waited for: two arrays on their way would be two arrays of extra memory.
            mlx_rs::transforms::eval([&new])?;
            if let Some(pool) = &mut self.layers[layer] {
                *(if values { &mut pool.values } else { &mut pool.keys }) = new;
            }
        }
        if !more {
            self.capacities = capacities;
            self.resize = None;
        }
        Ok(more)
    }

    /// Whether the next part is of one of these layers.
    pub fn resizes_next(&self, mut layers: Range<usize>) -> bool {
        let next = self.resize.as_ref().and_then(|(capacities, left)| {
            let array = left.clone().find(|&array| !self.stays(capacities, array))?;
            Some(array / 2)
        });
        next.is_some_and(|pool| layers.any(|layer| self.pool_of(layer) == pool))
    }

    /// Whether both arrays of the pool to which an array belongs have the size already that they get.
    fn stays(&self, capacities: &[usize], array: usize) -> bool {
        let blocks = capacities[self.layout.layers[array / 2].group] + SPARE;
        self.layers[array / 2]
            .as_ref()
            .is_some_and(|pool| pool.keys.dim(0) as usize == blocks && pool.values.dim(0) as usize == blocks)
    }

    /// Does all that is left to resize.
    pub fn resize_all(&mut self) -> Result<()> {
        while self.resize_part()? {}
        Ok(())
    }

    /// A copy of keys or values with another number of blocks.
    fn resized(&self, layer: usize, values: bool, capacity: usize) -> Result<Array> {
        let pool = self.layers[layer].as_ref().ok_or_else(|| Error::internal("a layer without a pool"))?;
        let old = if values { &pool.values } else { &pool.keys };
        if old.size() == 0 {
            return self.empty(layer, values, capacity);
        }
        match &self.backend {
            Backend::Cpu(cpu) => cpu.resize_rows(old, capacity + SPARE),
            Backend::Mlx | Backend::Gpu(_) => {
                let kept = (capacity + SPARE).min(old.dim(0) as usize);
                mlx::write_rows(self.empty(layer, values, capacity)?, &mlx::rows(old, 0, kept)?, 0, kept)
            }
        }
    }

    /// Blocks of keys and of values of `layer`, which kernels write to in place.
    pub fn layer(&self, layer: usize) -> Result<(&Array, &Array)> {
        let pool =
            self.layers[self.pool_of(layer)].as_ref().ok_or_else(|| Error::internal("a layer without a pool"))?;
        Ok((&pool.keys, &pool.values))
    }

    /// Keys and values of `layer` for the GPU kernels, which write to them in place.
    pub fn pool(&mut self, layer: usize) -> Result<Pool<'_>> {
        let (dtype, layer) = (self.layout.dtype, self.pool_of(layer));
        let pool = self.layers[layer].as_mut().ok_or_else(|| Error::internal("a layer without a pool"))?;
        let order = match &mut pool.order {
            Some(order) => order,
            none => none.insert(Order::new(dtype)?),
        };
        Ok(Pool { keys: &pool.keys, values: &pool.values, order })
    }

    /// Copies whole blocks of `layer` and then writes rows `[T, heads, width]` to it, all in the places that `writes`
    /// names.
    pub fn append(&mut self, layer: usize, writes: &Writes, keys: &Array, values: &Array) -> Result<(&Array, &Array)> {
        let layer = self.pool_of(layer);
        // Taken out, so that each operation holds the only handle and MLX writes in place.
        let LayerPool { keys: old_keys, values: old_values, order } =
            self.layers[layer].take().ok_or_else(|| Error::internal("a layer without a pool"))?;
        let keys = writes.apply(old_keys, keys)?;
        // There is nothing to write where values are a part of keys.
        let values = if old_values.size() == 0 { old_values } else { writes.apply(old_values, values)? };
        let pool = LayerPool { keys, values, order };
        let pool = self.layers[layer].insert(pool);
        Ok((&pool.keys, &pool.values))
    }

    /// Takes the arrays of a layer out, so that nothing else refers to them, for `change` to make others of them. No step
    /// may be on its way.
    pub(super) fn replace(
        &mut self,
        layer: usize,
        change: impl FnOnce(Array, Array) -> Result<(Array, Array)>,
    ) -> Result<()> {
        let LayerPool { keys, values, order } =
            self.layers[layer].take().ok_or_else(|| Error::internal("a layer without a pool"))?;
        // MLX does not see what the kernels write.
        order.iter().try_for_each(Order::wait)?;
        let (keys, values) = change(keys, values)?;
        self.layers[layer] = Some(LayerPool { keys, values, order });
        Ok(())
    }

    /// Who computes with the arrays.
    pub(super) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Waits for the kernels that have written to a layer.
    pub(super) fn wait(&self, layer: usize) -> Result<()> {
        let pool = self.layers[layer].as_ref().ok_or_else(|| Error::internal("a layer without a pool"))?;
        pool.order.iter().try_for_each(Order::wait)
    }

    /// All arrays, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flatten().flat_map(|pool| [&pool.keys, &pool.values])
    }

    fn empty(&self, layer: usize, values: bool, capacity: usize) -> Result<Array> {
        let LayerLayout { keys, values: of_values, .. } = self.layout.layers[layer];
        let (heads, width) = if values { of_values } else { keys };
        zeros(&[capacity + SPARE, self.block_tokens, heads, width], self.layout.dtype)
    }
}

/// Where a step writes, as index arrays: made once for all layers.
#[derive(Debug)]
pub struct Writes {
    /// Blocks to copy from and to.
    copies: Option<(Array, Array)>,
    /// Block and offset of every row, `[T]` i32 each.
    blocks: Array,
    offsets: Array,
}

impl Writes {
    /// The writes of a step on blocks of `block_tokens`.
    pub fn new(placement: &Placement, block_tokens: usize) -> Self {
        let index = |values: Vec<i32>| Array::from_slice(&values, &[values.len() as i32]);
        let slots = placement.slots.iter().map(|&slot| slot as usize);
        let copies = (!placement.copies.is_empty()).then(|| {
            let side = |side: fn(&(u32, u32)) -> u32| placement.copies.iter().map(|copy| side(copy) as i32).collect();
            (index(side(|copy| copy.0)), index(side(|copy| copy.1)))
        });
        Self {
            copies,
            blocks: index(slots.clone().map(|slot| (slot / block_tokens) as i32).collect()),
            offsets: index(slots.map(|slot| (slot % block_tokens) as i32).collect()),
        }
    }

    fn apply(&self, mut pool: Array, rows: &Array) -> Result<Array> {
        if let Some((from, to)) = &self.copies {
            // All are read before one is written: a block that is copied and given away in one step comes out right. MLX
            // copies the pool for it, because the blocks were read from it.
            let blocks = pool.take_axis(from, 0)?;
            pool = mlx::scatter(pool, &[to], &blocks.expand_dims(1)?)?;
        }
        let rows = rows.as_dtype(pool.dtype())?;
        mlx::scatter(pool, &[&self.blocks, &self.offsets], &rows.expand_dims_axes(&[1, 2])?)
    }
}

/// The place in the arrays of a block of the allocator's.
pub fn place(block: u32) -> u32 {
    block + SPARE as u32
}

/// Places in the arrays that those of `copies` go from and to which are in a group.
pub fn copy_places(copies: &[BlockCopy], group: usize) -> Vec<(u32, u32)> {
    let own = copies.iter().filter(|copy| copy.group == group);
    own.map(|copy| (place(copy.from), place(copy.to))).collect()
}

fn zeros(shape: &[usize], dtype: Dtype) -> Result<Array> {
    let shape = shape.iter().map(|&n| i32::try_from(n)).collect::<std::result::Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| Error::internal("a pool of more than 2^31 rows"))?;
    Ok(mlx_rs::ops::zeros_dtype(&shape, dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Cpu, Precision, Segment};
    use crate::mlx::{self as seam, Device};

    const BLOCK_TOKENS: usize = 8;

    fn pages(backend: Backend, layers: usize, width: usize, blocks: usize) -> Result<Pages> {
        let layout = KvLayout::new(&vec![(GroupKind::Full, (1, width), (1, width)); layers], Dtype::Float32);
        let mut pages = Pages::new(backend, &layout, BLOCK_TOKENS)?;
        pages.resize(&[blocks]);
        pages.resize_all()?;
        Ok(pages)
    }

    fn writes(copies: Vec<(u32, u32)>, slots: Vec<u32>) -> Writes {
        let segments = vec![Segment { rows: 0..slots.len(), start: 0, table: 0 }];
        Writes::new(&Placement { copies, slots, segments, ..Placement::default() }, BLOCK_TOKENS)
    }

    fn on_cpu(body: impl FnOnce() -> Result<()>) {
        seam::init().unwrap();
        seam::on_device(Device::Cpu, body).unwrap();
    }

    #[test]
    fn appends_copy_no_pool_unless_an_alias_is_held() {
        on_cpu(|| {
            let mut pages = pages(Backend::Mlx, 3, 64, 100)?;
            let rows = Array::full::<f32>(&[1, 1, 64], Array::from_f32(2.0))?;
            let places = |pages: &Pages| -> Vec<*const f32> {
                pages.arrays().map(|pool| pool.try_as_slice::<f32>().unwrap().as_ptr()).collect()
            };
            let step = |pages: &mut Pages| {
                let writes = writes(vec![], vec![17]);
                (0..3).try_for_each(|layer| pages.append(layer, &writes, &rows, &rows).map(|_| ()))?;
                Ok::<_, Error>(mlx_rs::transforms::eval(pages.arrays())?)
            };
            let before = places(&pages);
            step(&mut pages)?;
            assert_eq!(places(&pages), before, "a pool was copied");
            // Negative control: what this type must never allow from outside.
            let alias = pages.layer(1)?.0.clone();
            step(&mut pages)?;
            let moved: Vec<bool> = places(&pages).iter().zip(&before).map(|(now, before)| now != before).collect();
            assert_eq!(moved, [false, false, true, false, false, false], "the alias is not noticed");
            drop(alias);
            Ok(())
        });
    }

    #[test]
    fn rows_survive_copies_and_resizing() {
        rows_survive(Backend::Mlx);
        rows_survive(Backend::Cpu(Cpu::new(Some(2), Precision::Exact)));
    }

    fn rows_survive(backend: Backend) {
        on_cpu(|| {
            let mut pages = pages(backend, 2, 4, 3)?;
            let rows = |from: usize, count: usize| {
                let values: Vec<f32> = (from * 4..(from + count) * 4).map(|i| i as f32).collect();
                Array::from_slice(&values, &[count as i32, 1, 4])
            };
            let slots = |block: u32, offsets: std::ops::Range<u32>| offsets.map(|o| block * 8 + o).collect::<Vec<_>>();
            let append = |pages: &mut Pages, writes: Writes, new: &Array| -> Result<()> {
                let negative = new.negative()?;
                (0..2).try_for_each(|layer| pages.append(layer, &writes, new, &negative).map(|_| ()))
            };
            append(&mut pages, writes(vec![], slots(2, 0..5)), &rows(0, 5))?;
            // Block 2 is copied to 1 and overwritten in the same step.
            append(&mut pages, writes(vec![(2, 1)], slots(2, 0..2)), &rows(50, 2))?;
            for blocks in [9, 2] {
                pages.resize(&[blocks]);
                pages.resize_all()?;
                assert_eq!((pages.capacities(), pages.is_resizing()), (&[blocks][..], false));
            }
            for layer in 0..2 {
                let (keys, values) = pages.layer(layer)?;
                assert_eq!(keys.shape(), [3, 8, 1, 4]);
                let host = |array: &Array, block: i32| -> Result<Vec<f32>> {
                    let block = array.take_axis(Array::from_slice(&[block], &[1]), 0)?;
                    Ok(block.contiguous()?.as_slice::<f32>()[..20].to_vec())
                };
                let expected: Vec<f32> = (0..20).map(|i| i as f32).collect();
                assert_eq!(host(keys, 1)?, expected);
                assert_eq!(host(&values.negative()?, 1)?, expected);
                let overwritten: Vec<f32> = (200..208).chain(8..20).map(|i| i as f32).collect();
                assert_eq!(host(keys, 2)?, overwritten);
            }
            Ok(())
        });
    }

    /// Groups have sizes of their own, and layers keys and values of their own widths; what is resized is no more than that.
    #[test]
    fn groups_are_resized_apart() {
        on_cpu(|| {
            let (full, window) = (GroupKind::Full, GroupKind::Window(9));
            let layers = [(window, (2, 4), (1, 6)), (full, (1, 4), (1, 4)), (window, (2, 4), (1, 6))];
            let layout = KvLayout::new(&layers, Dtype::Float32);
            assert_eq!(
                (&layout.groups[..], layout.layers[0].group, layout.layers[1].group),
                (&[full, window][..], 1, 0)
            );
            let mut pages = Pages::new(Backend::Cpu(Cpu::new(Some(1), Precision::Exact)), &layout, BLOCK_TOKENS)?;
            let block = BLOCK_TOKENS * 4;
            assert_eq!((pages.block_bytes(0), pages.block_bytes(1)), (8 * block, 2 * 14 * block));
            assert_eq!(pages.bytes(), (8 + 28) * block);
            let places = |pages: &Pages| -> Vec<*const f32> {
                pages.arrays().map(|pool| pool.try_as_slice::<f32>().unwrap().as_ptr()).collect()
            };
            for capacities in [[10, 3], [20, 3], [20, 7], [5, 1]] {
                let before = (pages.capacities().to_vec(), places(&pages));
                let (expected, most) = (pages.bytes_to_hold(&capacities), pages.bytes());
                pages.resize(&capacities);
                let (mut parts, mut peak) = (1, 0);
                let next = |pages: &Pages| -> Vec<usize> { (0..3).filter(|&l| pages.resizes_next(l..l + 1)).collect() };
                let mut order = next(&pages);
                assert!(pages.resizes_next(0..3) && !pages.resizes_next(0..0));
                while pages.resize_part()? {
                    parts += 1;
                    peak = peak.max(pages.bytes());
                    order.extend(next(&pages));
                }
                let layers = |group: usize| if group == 0 { vec![1, 1] } else { vec![0, 0, 2, 2] };
                let mut resized: Vec<usize> =
                    (0..2).filter(|&group| capacities[group] != before.0[group]).flat_map(layers).collect();
                resized.sort_unstable();
                assert_eq!(order, resized, "{capacities:?}");
                assert!(!pages.resizes_next(0..3));
                let changed = [1, 2].iter().zip(capacities.iter().zip(&before.0)).filter(|(_, (new, old))| new != old);
                assert_eq!(parts, changed.map(|(layers, _)| 2 * layers).sum::<usize>(), "{capacities:?}");
                assert_eq!(pages.capacities(), capacities);
                assert_eq!(pages.bytes(), (capacities[0] + 1) * 8 * block + (capacities[1] + 1) * 28 * block);
                assert!(
                    expected > pages.bytes().max(most).max(peak),
                    "the array that is replaced is not reckoned with"
                );
                if capacities[1] == before.0[1] {
                    assert_eq!(places(&pages)[..2], before.1[..2], "a pool of the other group was copied");
                }
            }
            // What takes the place of another change finds each array where that has come to.
            pages.resize(&[30, 9]);
            assert!(pages.resize_part()? && pages.resize_part()? && pages.resize_part()?);
            pages.resize(&[5, 1]);
            pages.resize_all()?;
            assert_eq!((pages.capacities(), pages.bytes()), (&[5, 1][..], 6 * 8 * block + 2 * 28 * block));
            Ok(())
        });
    }
}
