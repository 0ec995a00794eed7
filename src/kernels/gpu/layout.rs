//! How the attention kernel is spread over the device.

use mlx_rs::Dtype;

use super::custom::Language;
use super::paged::PagedSpec;

/// Counters of a pool: for rows and groups of heads whose keys are split.
pub const COUNTERS: usize = 4096;

/// Threadgroups of the attention kernel that run at once: two on each multiprocessor of an H200.
const GROUPS: usize = 264;

/// Keys of a split, if there are as many: fewer are not worth a threadgroup, more keep the others waiting.
const LEAST_KEYS: usize = 128;
const MOST_KEYS: usize = 4096;

/// Splits that can be put together.
pub const MOST_SPLITS: usize = 128;

/// How the attention kernel is laid out (see `source/decode/share.k`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Keys that a lane reads before it computes: 1, 2, 4 or 8.
    pub unroll: usize,
    /// SIMD groups of a threadgroup: a power of two up to 16.
    pub simds: usize,
    /// Query heads that a SIMD group computes with the keys it reads.
    pub lane_heads: usize,
    /// Whether the last threadgroup of a row puts its splits together, instead of a second kernel. CUDA only.
    pub last_combines: bool,
}

impl Layout {
    /// The best known one, by measurements on an H200.
    pub fn new(spec: &PagedSpec) -> Self {
        let group = spec.heads / spec.kv_heads;
        // As few subsets as possible of at most four heads, and these as even as possible.
        let lane_heads = group.div_ceil(group.div_ceil(4));
        // Shared memory is `simds * lane_heads * head_dim` floats: 32 KiB is all that Metal has.
        let simds = if lane_heads * spec.head_dim > 512 { 4 } else { 8 };
        // As many as registers allow with two threadgroups on a multiprocessor.
        let most = if lane_heads <= 2 && spec.dtype != Dtype::Float32 { 8 } else { 4 };
        let unroll = (spec.block_tokens / Self::keys_at_once(spec.head_dim)).min(most);
        Self { unroll, simds, lane_heads, last_combines: Language::of_mlx() == Ok(Language::Cuda) }
    }

    /// Keys that a SIMD group reads with one load a lane, eight numbers each.
    fn keys_at_once(head_dim: usize) -> usize {
        32 / (head_dim / 8).next_power_of_two().max(8)
    }

    /// Subsets of a KV head's query heads in a threadgroup, and threadgroups for all of them.
    pub fn subsets(&self, group: usize) -> (usize, usize) {
        let all = group.div_ceil(self.lane_heads);
        let inside = all.next_power_of_two().min(4).min(self.simds);
        (inside, all.div_ceil(inside))
    }

    /// Into how many parts the keys of each row are split, for tables with room for `tokens` keys.
    pub fn splits(&self, spec: &PagedSpec, rows: usize, tokens: usize) -> usize {
        let tokens = spec.window.map_or(tokens, |window| tokens.min(window.tokens()));
        let (_, sets) = self.subsets(spec.heads / spec.kv_heads);
        let groups = (rows * spec.kv_heads * sets).max(1);
        if groups > COUNTERS {
            return 1;
        }
        // As many threadgroups as run at once, but none with less than `LEAST_KEYS`.
        (GROUPS / groups).max(tokens / MOST_KEYS).min(tokens / LEAST_KEYS).clamp(1, MOST_SPLITS)
    }

    /// Whether the kernels can be compiled: tiles fit into blocks, and memory into a threadgroup.
    pub fn fits(&self, spec: &PagedSpec) -> bool {
        let Self { unroll, simds, lane_heads, last_combines } = *self;
        let (subsets, _) = self.subsets(spec.heads / spec.kv_heads);
        let sums = simds * lane_heads * (spec.head_dim + 2) * 4;
        let quads = (subsets * lane_heads * spec.head_dim).max(simds * 128) * 4;
        let (bytes, most) = if last_combines { (sums + quads + 16, 48 << 10) } else { (sums, 32 << 10) };
        [1, 2, 4, 8].contains(&unroll)
            && [1, 2, 4, 8, 16].contains(&simds)
            && (1..=8).contains(&lane_heads)
            && spec.block_tokens.is_multiple_of(unroll * Self::keys_at_once(spec.head_dim))
            // Where splits are put together, their shares take the place of sums.
            && subsets * MOST_SPLITS <= simds * spec.head_dim
            && bytes <= most
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Window;
    use crate::kernels::gpu::paged::check_spec;

    /// All specs that are covered, with many numbers of heads in a group.
    fn specs() -> impl Iterator<Item = PagedSpec> {
        let dims = [64, 80, 96, 128, 192, 256];
        let blocks = [8, 16, 32, 64, 128, 256];
        let groups = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32, 71];
        let dtypes = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];
        dims.into_iter().flat_map(move |head_dim| {
            blocks.into_iter().flat_map(move |block_tokens| {
                groups.into_iter().flat_map(move |group| {
                    dtypes.into_iter().map(move |dtype| PagedSpec {
                        heads: 2 * group,
                        kv_heads: 2,
                        head_dim,
                        block_tokens,
                        scale: 0.1,
                        window: None,
                        dtype,
                    })
                })
            })
        })
    }

    #[test]
    fn every_layer_has_a_layout_that_fits_both_languages() {
        for spec in specs() {
            check_spec(&spec).unwrap();
            for last_combines in [false, true] {
                let layout = Layout { last_combines, ..Layout::new(&spec) };
                assert!(layout.fits(&spec), "{layout:?} for {spec:?}");
                let (subsets, sets) = layout.subsets(spec.heads / spec.kv_heads);
                assert!(subsets * sets * layout.lane_heads >= spec.heads / spec.kv_heads);
                assert_eq!(layout.simds % subsets, 0);
            }
        }
        // Negative controls: a tile beyond its block, more memory than there is.
        let spec = specs().find(|spec| spec.block_tokens == 8 && spec.head_dim == 64).unwrap();
        assert!(!Layout { unroll: 4, ..Layout::new(&spec) }.fits(&spec));
        let spec = specs().find(|spec| spec.head_dim == 256 && spec.heads == 8).unwrap();
        assert!(!Layout { simds: 16, last_combines: false, ..Layout::new(&spec) }.fits(&spec));
    }

    #[test]
    fn splits_fill_the_device_and_no_more() {
        let spec = PagedSpec {
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            block_tokens: 32,
            scale: 0.1,
            window: None,
            dtype: Dtype::Bfloat16,
        };
        let layout = Layout::new(&spec);
        for (rows, tokens, splits) in [
            (1, 32, 1),
            (1, 512, 4),
            (1, 4096, 32),
            (1, 1 << 20, 128),
            (8, 512, 4),
            (8, 32768, 8),
            (32, 4096, 1),
            (32, 8192, 2),
            (1000, 1 << 20, 1),
        ] {
            assert_eq!(layout.splits(&spec, rows, tokens), splits, "{rows} rows, {tokens} tokens");
        }
        let narrow = PagedSpec { window: Some(Window::Sliding(1000)), ..spec };
        assert_eq!(layout.splits(&narrow, 1, 1 << 20), 7, "no more than the window has keys for");
    }
}
