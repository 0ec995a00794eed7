//! From a joined projection to normalised and turned heads, where the CPU kernels do not do it on their way.

use std::cell::RefCell;

use mlx_rs::{Array, Dtype};

use super::check::close;
use super::{AttentionSpec, NormOver, RmsNorm, Rope};
use crate::error::Result;
use crate::kernels::Backend;
use crate::kernels::gpu::{HeadsKernel, HeadsSpec};
use crate::mlx;

/// What a layer does with its heads.
#[derive(Debug)]
pub struct Heads {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    norms: Option<Norms>,
    /// Angle per position of each pair, `[dims / 2]` f32.
    frequencies: Array,
    /// The GPU's kernel, if it works.
    kernel: Option<HeadsKernel>,
}

#[derive(Debug)]
struct Norms {
    eps: f32,
    /// Whether heads turn before.
    last: bool,
    /// Weights `[width]` of queries and keys, in the type of the activations.
    each: [Array; 2],
    /// The same for all heads, with ones for values: `[heads + 2 kv_heads, width]`.
    all: Array,
}

impl Norms {
    fn new(spec: &AttentionSpec, norms: &[RmsNorm; 2], dtype: Dtype) -> Result<Self> {
        let width = spec.head_dim as i32;
        let weight = |norm: &RmsNorm| norm.parts().0.as_dtype(dtype);
        let each = [weight(&norms[0])?, weight(&norms[1])?];
        let of = |norm: &Array, heads: usize| mlx_rs::ops::broadcast_to(norm, &[heads as i32, width]);
        let ones = mlx_rs::ops::ones_dtype(&[spec.kv_heads as i32, width], dtype)?;
        let all = [of(&each[0], spec.heads)?, of(&each[1], spec.kv_heads)?, ones];
        let all = mlx_rs::ops::concatenate(&all, 0)?;
        mlx_rs::transforms::eval(each.iter().chain([&all]))?;
        let last = spec.qk_norm.is_some_and(|norm| norm.over == NormOver::TurnedHead);
        Ok(Self { eps: norms[0].parts().1, last, each, all })
    }

    /// Of `heads [T, heads + 2 kv_heads, width]`: the same shape.
    fn apply(&self, heads: &Array) -> Result<Array> {
        Ok(mlx_rs::fast::rms_norm(heads, None, self.eps)?.multiply(&self.all)?.as_dtype(heads.dtype())?)
    }
}

impl Heads {
    /// For a layer whose activations are of type `dtype`; `norms` are those of queries and keys.
    pub fn new(
        spec: &AttentionSpec,
        norms: Option<&[RmsNorm; 2]>,
        rope: &Rope,
        backend: &Backend,
        dtype: Dtype,
    ) -> Result<Self> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = *spec;
        let of_heads = spec.qk_norm.is_some_and(|norm| norm.over != NormOver::Token);
        let norms = match norms {
            Some(norms) if of_heads && !matches!(backend, Backend::Cpu(_)) => Some(Norms::new(spec, norms, dtype)?),
            _ => None,
        };
        let rotation = rope.rotation();
        let frequencies = Array::from_slice(&rotation.frequencies, &[rotation.frequencies.len() as i32]);
        let mut layer = Self { heads, kv_heads, head_dim, norms, frequencies, kernel: None };
        let in_kernel = rotation.dims > 0 && layer.norms.as_ref().is_none_or(|norms| !norms.last);
        if backend.gpu().is_some() && in_kernel {
            layer.kernel = layer.checked_kernel(
                &HeadsSpec {
                    heads,
                    kv_heads,
                    head_dim,
                    dims: rotation.dims,
                    traditional: rotation.traditional,
                    magnitude: rotation.magnitude,
                    norm_eps: layer.norms.as_ref().map(|norms| norms.eps),
                    dtype,
                },
                rope,
            );
        }
        Ok(layer)
    }

    /// Queries `[T, heads, width]`, keys and values `[T, kv_heads, width]` of `joined [T, columns]` at `positions [T]`.
    pub fn split(&self, joined: &Array, rope: &Rope, positions: &Array) -> Result<[Array; 3]> {
        match &self.kernel {
            Some(kernel) if joined.dtype() == kernel.spec().dtype => self.launch(kernel, joined, positions),
            _ => self.composed(joined, rope, positions),
        }
    }

    fn launch(&self, kernel: &HeadsKernel, joined: &Array, positions: &Array) -> Result<[Array; 3]> {
        let norms = self.norms.as_ref().map(|norms| [&norms.each[0], &norms.each[1]]);
        kernel.launch(joined, positions, &self.frequencies, norms)
    }

    /// With MLX's operations. Values are normalised and turned too, in vain: a few operations on one run of memory cost
    /// less than many on parts.
    fn composed(&self, joined: &Array, rope: &Rope, positions: &Array) -> Result<[Array; 3]> {
        let Self { heads, kv_heads, .. } = *self;
        let joined = joined.reshape(&[joined.dim(0), (heads + 2 * kv_heads) as i32, self.head_dim as i32])?;
        let turned = match &self.norms {
            Some(norms) if norms.last => norms.apply(&rope.forward(&joined, positions)?)?,
            Some(norms) => rope.forward(&norms.apply(&joined)?, positions)?,
            None => rope.forward(&joined, positions)?,
        };
        Ok([
            mlx::heads(&turned, 0, heads)?,
            mlx::heads(&turned, heads, heads + kv_heads)?,
            mlx::heads(&joined, heads + kv_heads, heads + 2 * kv_heads)?,
        ])
    }

    /// The kernel for `spec`, if it works here; otherwise a warning. Checked once for each thread and kind of layer.
    fn checked_kernel(&self, spec: &HeadsSpec, rope: &Rope) -> Option<HeadsKernel> {
        thread_local! {
            static KNOWN: RefCell<Vec<(HeadsSpec, Option<HeadsKernel>)>> = const { RefCell::new(Vec::new()) };
        }
        let known = KNOWN.with_borrow(|known| known.iter().find(|(other, _)| other == spec).map(|(_, k)| k.clone()));
        known.unwrap_or_else(|| {
            let found = self.check(spec, rope);
            if let Err(error) = &found {
                tracing::warn!(?spec, %error, "a GPU kernel is not used");
            }
            let found = found.ok();
            KNOWN.with_borrow_mut(|known| known.push((*spec, found.clone())));
            found
        })
    }

    /// The kernel; an error if it and MLX's operations differ.
    fn check(&self, spec: &HeadsSpec, rope: &Rope) -> Result<HeadsKernel> {
        let kernel = HeadsKernel::new(*spec)?;
        let positions = mlx::indices(&[0, 3, 700, 1, 5000])?;
        let columns = (spec.heads + 2 * spec.kv_heads) * spec.head_dim;
        let joined = mlx_rs::random::normal::<f32>(&[5, columns as i32], None, None, &mlx_rs::random::key(1)?)?;
        let joined = joined.as_dtype(spec.dtype)?;
        let found = self.launch(&kernel, &joined, &positions)?;
        let expected = self.composed(&joined, rope, &positions)?;
        for (found, expected) in found.iter().zip(&expected) {
            let wide = |array: &Array| array.as_dtype(Dtype::Float32);
            close(&wide(found)?, &wide(expected)?, spec.dtype, "norms and rotations")?;
        }
        Ok(kernel)
    }
}
