//! Norms and rotations of heads in one kernel.

use std::rc::Rc;

use mlx_rs::{Array, Dtype};

use super::custom::{Constant, CustomKernel, Launch, Source};
use super::paged::format_code;
use crate::error::{Error, Result};

/// SIMD groups of a threadgroup, each of which takes a head.
const SIMDS: usize = 4;

/// What one layer does with the heads of its joined projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadsSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Dimensions that turn: the first ones of each head, an even number.
    pub dims: usize,
    /// Pairs are neighbours instead of halves.
    pub traditional: bool,
    /// Multiplies the dimensions that turn.
    pub magnitude: f32,
    /// Epsilon of the RMS norm of each query and key head, if there is one.
    pub norm_eps: Option<f32>,
    /// Type of everything but positions and frequencies.
    pub dtype: Dtype,
}

/// The kernel for one kind of layer. Belongs to the thread that made it.
#[derive(Debug, Clone)]
pub struct HeadsKernel {
    spec: HeadsSpec,
    kernel: Rc<CustomKernel>,
}

impl HeadsKernel {
    /// Prepares the kernel; an error if it does not cover `spec` or there is no GPU.
    pub fn new(spec: HeadsSpec) -> Result<Self> {
        let HeadsSpec { heads, kv_heads, head_dim, dims, traditional, magnitude, norm_eps, dtype } = spec;
        if format_code(dtype).is_none() || !dims.is_multiple_of(2) || dims > head_dim || head_dim > 256 {
            return Err(Error::internal(format!("the heads kernel does not cover {spec:?}")));
        }
        let inputs = [c"joined", c"positions", c"frequencies", c"query_weight", c"key_weight"];
        let fill = match norm_eps {
            Some(_) => include_str!("source/heads/norm.k"),
            None => include_str!("source/heads/plain.k"),
        };
        let kernel = CustomKernel::new(&Source {
            name: c"omlx_heads",
            inputs: &inputs[..if norm_eps.is_some() { 5 } else { 3 }],
            outputs: &[c"queries", c"keys", c"values"],
            headers: &[],
            constants: &[
                Constant::Type("T", dtype),
                Constant::Int("D", head_dim as i32),
                Constant::Int("HEADS", heads as i32),
                Constant::Int("KV_HEADS", kv_heads as i32),
                Constant::Int("SIMDS", SIMDS as i32),
                Constant::Int("DIMS", dims as i32),
                Constant::Int("TRADITIONAL", i32::from(traditional)),
                Constant::Int("MAGNITUDE_BITS", magnitude.to_bits() as i32),
                Constant::Int("EPS_BITS", norm_eps.unwrap_or_default().to_bits() as i32),
            ],
            body: &[include_str!("source/heads/place.k"), fill, include_str!("source/heads/turn.k")],
            contiguous: true,
        })?;
        Ok(Self { spec, kernel: Rc::new(kernel) })
    }

    /// What it was made for.
    pub fn spec(&self) -> &HeadsSpec {
        &self.spec
    }

    /// Queries `[T, heads, width]`, keys and values `[T, kv_heads, width]` of `joined [T, columns]` at `positions [T]`
    /// (i32), turned by `frequencies [dims / 2]` (f32) per position; `norms` are the weights `[width]` for queries and keys.
    pub fn launch(
        &self,
        joined: &Array,
        positions: &Array,
        frequencies: &Array,
        norms: Option<[&Array; 2]>,
    ) -> Result<[Array; 3]> {
        let HeadsSpec { heads, kv_heads, head_dim, dims, norm_eps, dtype, .. } = self.spec;
        let (tokens, all) = (joined.dim(0), heads + 2 * kv_heads);
        let fits = joined.shape() == [tokens, (all * head_dim) as i32]
            && joined.dtype() == dtype
            && positions.shape() == [tokens]
            && positions.dtype() == Dtype::Int32
            && frequencies.shape() == [(dims / 2) as i32]
            && frequencies.dtype() == Dtype::Float32
            && norms.is_some() == norm_eps.is_some()
            && norms.iter().flatten().all(|norm| norm.shape() == [head_dim as i32] && norm.dtype() == dtype);
        if !fits {
            return Err(Error::internal(format!("{:?} is not what the heads kernel takes", joined.shape())));
        }
        let mut inputs = vec![joined, positions, frequencies];
        inputs.extend(norms.into_iter().flatten());
        let shape = |heads: usize| [tokens, heads as i32, head_dim as i32];
        let (queries, keys) = (shape(heads), shape(kv_heads));
        let outputs = [(&queries[..], dtype), (&keys[..], dtype), (&keys[..], dtype)];
        let launch = Launch { groups: [all.div_ceil(SIMDS), tokens as usize, 1], threads: SIMDS * 32 };
        let results = self.kernel.launch(&inputs, &outputs, launch)?;
        results.try_into().map_err(|_| Error::internal("a kernel with a wrong number of outputs"))
    }
}
