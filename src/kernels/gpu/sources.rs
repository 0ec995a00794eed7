//! The sources in `source/` put together and handed to MLX.

use std::cell::RefCell;
use std::rc::Rc;

use super::custom::{Constant, CustomKernel, Source};
use super::layout::{Layout, MOST_SPLITS};
use super::paged::{COPY_THREADS, PagedSpec, format_code};
use crate::error::Result;
use crate::kernels::Window;

/// The kernels of one kind of layer.
#[derive(Debug)]
pub struct Kernels {
    /// `append.k`.
    pub append: CustomKernel,
    /// `gather.k`.
    pub gather: CustomKernel,
    /// `decode/`, by whether rows append their own key and value, and whether there are splits.
    pub decode: [[CustomKernel; 2]; 2],
    /// `combine.k`.
    pub combine: CustomKernel,
}

const ROWS: &str = include_str!("source/rows.h");

impl Kernels {
    fn new(spec: &PagedSpec, layout: &Layout) -> Result<Self> {
        let constants = &constants(spec, layout)[..];
        let append = Source {
            name: c"omlx_append",
            inputs: &[c"keys", c"values", c"key_rows", c"value_rows", c"slots", c"order"],
            outputs: &[c"next_order"],
            headers: &[ROWS],
            constants,
            body: &[include_str!("source/append.k")],
            contiguous: false,
        };
        let gather = Source {
            name: c"omlx_gather",
            inputs: &[c"keys", c"values", c"table", c"lengths", c"order"],
            outputs: &[c"key_rows", c"value_rows", c"next_order"],
            headers: &[],
            constants,
            body: &[include_str!("source/gather.k")],
            contiguous: true,
        };
        let combine = Source {
            name: c"omlx_combine",
            inputs: &[c"partials"],
            outputs: &[c"out"],
            headers: &[],
            constants,
            body: &[include_str!("source/combine.k")],
            contiguous: true,
        };
        let decode = |appends, splits| decode_kernel(constants, layout.last_combines, appends, splits);
        Ok(Self {
            append: CustomKernel::new(&append)?,
            gather: CustomKernel::new(&gather)?,
            decode: [[decode(false, false)?, decode(false, true)?], [decode(true, false)?, decode(true, true)?]],
            combine: CustomKernel::new(&combine)?,
        })
    }

    /// Those of this thread, made once for each kind of layer.
    pub fn shared(spec: &PagedSpec, layout: &Layout) -> Result<Rc<Self>> {
        type Known = Vec<(PagedSpec, Layout, Rc<Kernels>)>;
        thread_local! {
            static KNOWN: RefCell<Known> = const { RefCell::new(Vec::new()) };
        }
        KNOWN.with_borrow_mut(|known| {
            if let Some((.., kernels)) = known.iter().find(|(s, l, _)| s == spec && l == layout) {
                return Ok(Rc::clone(kernels));
            }
            let kernels = Rc::new(Self::new(spec, layout)?);
            known.push((*spec, *layout, Rc::clone(&kernels)));
            Ok(kernels)
        })
    }
}

/// The attention kernel, of which a source has only what its case needs: every kilobyte costs time in each step.
fn decode_kernel(constants: &[Constant], last_combines: bool, appends: bool, splits: bool) -> Result<CustomKernel> {
    let mut inputs = vec![c"queries", c"keys", c"values", c"tables", c"lengths", c"order"];
    let mut headers = vec![include_str!("source/numbers.h")];
    let mut body = vec![include_str!("source/decode/share.k")];
    if splits {
        inputs.push(c"counters");
    }
    if appends {
        inputs.extend([c"key_rows", c"value_rows"]);
        headers.push(ROWS);
        body.push(include_str!("source/decode/own.k"));
    }
    body.push(include_str!("source/decode/keys.k"));
    let outputs: &[_] = match (splits, last_combines) {
        (false, _) => &[c"out"],
        (true, true) => &[c"out", c"partials"],
        (true, false) => &[c"partials"],
    };
    body.extend(match (splits, last_combines) {
        (false, _) => &[include_str!("source/decode/result.k")][..],
        (true, true) => &[include_str!("source/decode/partial.k"), include_str!("source/decode/last.k")],
        (true, false) => &[include_str!("source/decode/partial.k")],
    });
    CustomKernel::new(&Source {
        name: c"omlx_decode",
        inputs: &inputs,
        outputs,
        headers: &headers,
        constants,
        body: &body,
        contiguous: false,
    })
}

/// What the kernels' bodies can use.
fn constants(spec: &PagedSpec, layout: &Layout) -> [Constant; 16] {
    let PagedSpec { heads, kv_heads, head_dim, block_tokens, dtype, window, scale } = *spec;
    let Layout { unroll, simds, lane_heads, .. } = *layout;
    let (subsets, sets) = layout.subsets(heads / kv_heads);
    // Weights are powers of two.
    let scale = scale * std::f32::consts::LOG2_E;
    [
        Constant::Type("T", dtype),
        Constant::Int("FORMAT", format_code(dtype).unwrap_or_default()),
        Constant::Int("D", head_dim as i32),
        Constant::Int("KV_HEADS", kv_heads as i32),
        Constant::Int("GROUP", (heads / kv_heads) as i32),
        Constant::Int("BLOCK_TOKENS", block_tokens as i32),
        Constant::Int("WINDOW", window.map_or(0, |window| window.tokens() as i32)),
        Constant::Int("CHUNKED", i32::from(matches!(window, Some(Window::Chunked(_))))),
        Constant::Int("SCALE_BITS", scale.to_bits() as i32),
        Constant::Int("UNROLL", unroll as i32),
        Constant::Int("SIMDS", simds as i32),
        Constant::Int("SUBSETS", subsets as i32),
        Constant::Int("SETS", sets as i32),
        Constant::Int("LANE_HEADS", lane_heads as i32),
        Constant::Int("MOST_SPLITS", MOST_SPLITS as i32),
        Constant::Int("THREADS", COPY_THREADS as i32),
    ]
}
