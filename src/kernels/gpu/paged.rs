//! The paged cache with kernels of our own: appends in place, attention of decoding rows, and gathering of a sequence's
//! rows for prompts.
//!
//! Keys and values of a layer are two arrays `[blocks, block_tokens, kv_heads, head_dim]`, which the
//! cache owns. MLX takes them for constants: a kernel that writes them as outputs would have to own them alone, and MLX keeps
//! every array that a step reads until that step has finished, so that with two steps on their way each append would
//! copy its pool (measured). Therefore appends write behind MLX's back, and order is kept by a chain: **every kernel
//! that touches a pool takes the pool's order token as an input and puts an output of its own in its place.** What MLX
//! knows of the tokens is enough, on both backends:
//!
//! - within one CUDA graph MLX makes an edge from the node that wrote an input to the node that reads it; graphs of one
//!   stream run one after another;
//! - within one Metal encoder MLX sets a barrier between them, between encoders a fence.
//!
//! So reads follow the writes before them and writes the reads before them, within a step and across steps, however
//! steps are cut into evaluations; and a write that nobody reads is made up for when the next kernel is evaluated. A
//! dependency without a kernel (`mlx_depends`) would give MLX no edge: its result has the buffer of the pool itself.
//!
//! A node of a custom kernel costs the host 7 to 14 us, several times what one of MLX's own does. So attention is one
//! node: it can append its rows' own keys and values before, and its last threadgroup puts the splits of long rows
//! together.
//!
//! Small arrays: on CUDA MLX keeps arrays of up to 8 bytes in the host's memory, where every threadgroup would read
//! them through the bus. Tables, lengths and slots should be views of larger arrays.

use std::rc::Rc;

use mlx_rs::{Array, Dtype};

use super::custom::Launch;
use super::layout::{COUNTERS, Layout, MOST_SPLITS};
use super::sources::Kernels;
use crate::error::{Error, Result};
use crate::kernels::Window;

/// Shape of a token that is nothing else; at least 16 bytes, see above.
const TOKEN: &[i32] = &[8];

/// Threads of the kernels that copy rows.
pub const COPY_THREADS: usize = 128;

/// What one layer's attention is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedSpec {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head: 64, 80, 96, 128, 192 or 256.
    pub head_dim: usize,
    /// Tokens of a block: a power of two from 8 to 256.
    pub block_tokens: usize,
    /// Factor on the products of queries and keys.
    pub scale: f32,
    /// What a query sees; `None` is all up to itself.
    pub window: Option<Window>,
    /// Type of queries, pools and results: f32, f16 or bf16.
    pub dtype: Dtype,
}

/// What keeps the kernels that use the pools of one layer in order. There must be one for each layer's pools.
#[derive(Debug)]
pub struct Order {
    /// An output of the newest kernel.
    token: Array,
    /// Zeros between kernels: how many splits of a row are done.
    counters: Array,
}

impl Order {
    /// For pools of this type that no kernel has used yet; evaluated.
    pub fn new(dtype: Dtype) -> Result<Self> {
        let token = mlx_rs::ops::zeros_dtype(TOKEN, dtype)?;
        let counters = mlx_rs::ops::zeros_dtype(&[COUNTERS as i32], Dtype::Uint32)?;
        mlx_rs::transforms::eval([&token, &counters])?;
        Ok(Self { token, counters })
    }

    /// An array that is computed once all kernels so far have run. Evaluate it with a step whose appends no attention
    /// reads; its elements mean nothing.
    pub fn token(&self) -> &Array {
        &self.token
    }

    /// Waits for all kernels so far: before operations of MLX use the pools.
    pub fn wait(&self) -> Result<()> {
        Ok(self.token.eval()?)
    }
}

/// Keys and values of one layer, `[blocks, block_tokens, kv_heads, head_dim]` each, evaluated and contiguous.
///
/// The host must not look at them ([`Array::as_slice`] moves an array into memory that the host shares).
#[derive(Debug)]
pub struct Pool<'a> {
    /// Keys.
    pub keys: &'a Array,
    /// Values.
    pub values: &'a Array,
    /// The order of the kernels that use these two.
    pub order: &'a mut Order,
}

/// Attention of one kind of layer over a [`Pool`]. Belongs to the thread that made it, whose default stream must
/// be the GPU's.
#[derive(Debug, Clone)]
pub struct PagedAttention {
    spec: PagedSpec,
    layout: Layout,
    kernels: Rc<Kernels>,
}

impl PagedAttention {
    /// Prepares the kernels for `spec`; an error if they do not cover it or there is no GPU. They are compiled when
    /// they are first evaluated.
    pub fn new(spec: PagedSpec) -> Result<Self> {
        check_spec(&spec)?;
        Self::with_layout(spec, Layout::new(&spec))
    }

    /// The same with a layout of one's own, for measurements and tests.
    pub fn with_layout(spec: PagedSpec, layout: Layout) -> Result<Self> {
        check_spec(&spec)?;
        if !layout.fits(&spec) {
            return Err(Error::internal(format!("{layout:?} does not fit {spec:?}")));
        }
        Ok(Self { spec, layout, kernels: Kernels::shared(&spec, &layout)? })
    }

    /// What it was made for.
    pub fn spec(&self) -> &PagedSpec {
        &self.spec
    }

    /// Writes `keys` and `values [T, kv_heads, head_dim]` (any strides) to `slots [T]` (u32 or i32), which count tokens
    /// over all blocks. A slot outside of the pool takes nothing; of equal slots any one wins.
    pub fn append(&self, pool: &mut Pool<'_>, keys: &Array, values: &Array, slots: &Array) -> Result<()> {
        self.check_pool(pool)?;
        let tokens = slots.size();
        self.expect_rows(keys, tokens as i32, self.spec.kv_heads, "keys")?;
        self.expect_rows(values, tokens as i32, self.spec.kv_heads, "values")?;
        if slots.ndim() != 1 || ![Dtype::Uint32, Dtype::Int32].contains(&slots.dtype()) || tokens == 0 {
            return Err(Error::internal(format!("no slots: {:?} {:?}", slots.shape(), slots.dtype())));
        }
        let launch = Launch { groups: [tokens, 1, 1], threads: COPY_THREADS };
        let inputs = [pool.keys, pool.values, keys, values, slots, &pool.order.token];
        let results = self.kernels.append.launch(&inputs, &[(TOKEN, self.spec.dtype)], launch)?;
        [pool.order.token] = take_outputs(results)?;
        Ok(())
    }

    /// Copies the first `tokens` rows of a sequence out of its blocks: keys and values `[tokens, kv_heads, head_dim]`.
    ///
    /// `table [blocks]` (i32) lists enough ids of blocks of the pool, which nobody checks. Rows from `length [1]` (i32)
    /// on are zeros.
    pub fn gather(&self, pool: &mut Pool<'_>, table: &Array, length: &Array, tokens: usize) -> Result<(Array, Array)> {
        let PagedSpec { kv_heads, head_dim, block_tokens, dtype, .. } = self.spec;
        self.check_pool(pool)?;
        expect(table, &[table.size() as i32], Dtype::Int32, "table")?;
        expect(length, &[1], Dtype::Int32, "length")?;
        if tokens == 0 || table.size() * block_tokens < tokens {
            return Err(Error::internal(format!("{} blocks do not hold {tokens} tokens", table.size())));
        }
        let shape: &[i32] = &[tokens as i32, kv_heads as i32, head_dim as i32];
        let outputs = [(shape, dtype), (shape, dtype), (TOKEN, dtype)];
        let launch = Launch { groups: [tokens, 1, 1], threads: COPY_THREADS };
        let inputs = [pool.keys, pool.values, table, length, &pool.order.token];
        let results = self.kernels.gather.launch(&inputs, &outputs, launch)?;
        let [keys, values, order] = take_outputs(results)?;
        pool.order.token = order;
        Ok((keys, values))
    }

    /// Into how many parts the keys of each row are split: from shapes alone, so that the host need not know lengths.
    pub fn splits(&self, rows: usize, tokens: usize) -> usize {
        self.layout.splits(&self.spec, rows, tokens)
    }

    /// Attention of `queries [B, heads, head_dim]` (any strides), one row of a sequence each, over the sequences' blocks,
    /// in `splits` parts (see [`splits`](Self::splits), which is meant without it): the same shape.
    ///
    /// `tables [B, blocks]` (i32, a run of memory) lists the ids of a row's blocks, padded with any id of the pool; nobody
    /// checks them. `lengths [B]` (i32, likewise) counts the keys that a row sees, itself included, at most `blocks *
    /// block_tokens`; a row of length 0 gives zeros.
    ///
    /// With `new_rows`, one token's keys and values `[B, kv_heads, head_dim]` (any strides) for each row, these are first
    /// appended at the place of the row's last key, by the same kernel. The block of that key must belong to this row
    /// alone: rows do not see what others append. Without them all keys must have been appended.
    pub fn decode_in(
        &self,
        splits: Option<usize>,
        pool: &mut Pool<'_>,
        queries: &Array,
        new_rows: Option<(&Array, &Array)>,
        tables: &Array,
        lengths: &Array,
    ) -> Result<Array> {
        let PagedSpec { heads, kv_heads, head_dim, block_tokens, dtype, .. } = self.spec;
        self.check_pool(pool)?;
        let rows = queries.shape().first().copied().unwrap_or_default();
        let blocks = tables.shape().last().copied().unwrap_or_default();
        let splits = splits.unwrap_or_else(|| self.splits(rows as usize, blocks as usize * block_tokens));
        self.expect_rows(queries, rows, heads, "queries")?;
        expect(tables, &[rows, blocks], Dtype::Int32, "tables")?;
        expect(lengths, &[rows], Dtype::Int32, "lengths")?;
        let (_, sets) = self.layout.subsets(heads / kv_heads);
        let counted = rows as usize * kv_heads * sets <= COUNTERS;
        if rows == 0 || splits == 0 || splits > MOST_SPLITS || splits > 1 && !counted {
            return Err(Error::internal(format!("no attention of {rows} rows in {splits} splits")));
        }
        let mut inputs = vec![queries, pool.keys, pool.values, tables, lengths, &pool.order.token];
        if splits > 1 {
            inputs.push(&pool.order.counters);
        }
        if let Some((keys, values)) = new_rows {
            self.expect_rows(keys, rows, kv_heads, "keys")?;
            self.expect_rows(values, rows, kv_heads, "values")?;
            inputs.extend([keys, values]);
        }
        let shape: &[i32] = &[rows, heads as i32, head_dim as i32];
        // Sums, and what `decode/partial.k` puts behind them.
        let partials: &[i32] = &[rows, heads as i32, splits as i32, head_dim as i32 + 4];
        let (out, partials) = ((shape, dtype), (partials, Dtype::Float32));
        let outputs: &[_] = match (splits > 1, self.layout.last_combines) {
            (false, _) => &[out],
            (true, true) => &[out, partials],
            (true, false) => &[partials],
        };
        let kernel = &self.kernels.decode[usize::from(new_rows.is_some())][usize::from(splits > 1)];
        let launch = Launch { groups: [kv_heads * sets, splits, rows as usize], threads: self.layout.simds * 32 };
        let mut results = kernel.launch(&inputs, outputs, launch)?;
        if splits > 1 && !self.layout.last_combines {
            let [partials] = take_outputs(results)?;
            let launch = Launch { groups: [rows as usize * heads, 1, 1], threads: 128 };
            results = self.kernels.combine.launch(&[&partials], &[out], launch)?;
        }
        results.truncate(1);
        let [out] = take_outputs(results)?;
        pool.order.token = out.clone();
        Ok(out)
    }

    /// An error if `pool` was not made for these layers.
    fn check_pool(&self, pool: &Pool<'_>) -> Result<()> {
        let PagedSpec { kv_heads, head_dim, block_tokens, dtype, .. } = self.spec;
        let shape = [pool.keys.dim(0), block_tokens as i32, kv_heads as i32, head_dim as i32];
        expect(pool.keys, &shape, dtype, "a pool")
    }

    fn expect_rows(&self, array: &Array, rows: i32, heads: usize, what: &str) -> Result<()> {
        expect(array, &[rows, heads as i32, self.spec.head_dim as i32], self.spec.dtype, what)
    }
}

/// An error if the kernels do not cover `spec`.
pub fn check_spec(spec: &PagedSpec) -> Result<()> {
    let PagedSpec { heads, kv_heads, head_dim, block_tokens, window, dtype, .. } = *spec;
    let supported = kv_heads > 0
        && heads >= kv_heads
        && heads.is_multiple_of(kv_heads)
        && [64, 80, 96, 128, 192, 256].contains(&head_dim)
        && block_tokens.is_power_of_two()
        && (8..=256).contains(&block_tokens)
        && window.is_none_or(|window| (1..=i32::MAX as usize).contains(&window.tokens()))
        && format_code(dtype).is_some();
    if supported { Ok(()) } else { Err(Error::internal(format!("the paged kernels do not cover {spec:?}"))) }
}

/// What `numbers.h` calls a type.
pub fn format_code(dtype: Dtype) -> Option<i32> {
    match dtype {
        Dtype::Float32 => Some(0),
        Dtype::Float16 => Some(1),
        Dtype::Bfloat16 => Some(2),
        _ => None,
    }
}

fn expect(array: &Array, shape: &[i32], dtype: Dtype, what: &str) -> Result<()> {
    if array.shape() == shape && array.dtype() == dtype {
        return Ok(());
    }
    let (found, found_dtype) = (array.shape(), array.dtype());
    Err(Error::internal(format!("{what}: {found_dtype:?} {found:?}, expected {dtype:?} {shape:?}")))
}

fn take_outputs<const N: usize>(results: Vec<Array>) -> Result<[Array; N]> {
    results.try_into().map_err(|_| Error::internal("a kernel with a wrong number of outputs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_do_not_cover_is_refused() {
        let good = PagedSpec {
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            block_tokens: 32,
            scale: 0.1,
            window: Some(Window::Sliding(7)),
            dtype: Dtype::Float16,
        };
        check_spec(&good).unwrap();
        for bad in [
            PagedSpec { heads: 3, ..good },
            PagedSpec { kv_heads: 0, ..good },
            PagedSpec { head_dim: 72, ..good },
            PagedSpec { block_tokens: 24, ..good },
            PagedSpec { block_tokens: 512, ..good },
            PagedSpec { window: Some(Window::Sliding(0)), ..good },
            PagedSpec { window: Some(Window::Chunked(0)), ..good },
            PagedSpec { dtype: Dtype::Int32, ..good },
        ] {
            assert!(check_spec(&bad).is_err(), "{bad:?}");
        }
    }
}
