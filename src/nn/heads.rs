//! From a joined projection to normalised and turned heads, where the CPU kernels do not do it on their way.

use std::cell::RefCell;

use mlx_rs::{Array, Dtype};

use super::attention::CoreSpec;
use super::check::close;
use super::{RmsNorm, Rope};
use crate::error::{Error, Result};
use crate::kernels::Backend;
use crate::kernels::gpu::{HeadsKernel, HeadsSpec};
use crate::mlx;

/// What a layer does with its heads.
#[derive(Debug)]
pub struct Heads {
    spec: CoreSpec,
    norms: Option<Norms>,
    /// Angle per position of each pair, `[dims / 2]` f32.
    frequencies: Array,
    /// The GPU's kernel, if it works.
    kernel: Option<HeadsKernel>,
}

#[derive(Debug)]
struct Norms {
    eps: f32,
    /// Weights `[width]` of queries and keys, in the type of the activations.
    each: [Array; 2],
    /// The same for all heads, with ones for values: `[heads + 2 kv_heads, width]`.
    all: Array,
}

impl Norms {
    fn new(spec: &CoreSpec, norms: &[RmsNorm; 2], dtype: Dtype) -> Result<Self> {
        let width = spec.key_width as i32;
        let weight = |norm: &RmsNorm| norm.parts().0.as_dtype(dtype);
        let each = [weight(&norms[0])?, weight(&norms[1])?];
        let of = |norm: &Array, heads: usize| mlx_rs::ops::broadcast_to(norm, &[heads as i32, width]);
        let ones = mlx_rs::ops::ones_dtype(&[spec.kv_heads as i32, width], dtype)?;
        let all = [of(&each[0], spec.heads)?, of(&each[1], spec.kv_heads)?, ones];
        let all = mlx_rs::ops::concatenate(&all, 0)?;
        mlx_rs::transforms::eval(each.iter().chain([&all]))?;
        Ok(Self { eps: norms[0].parts().1, each, all })
    }

    /// Of `heads [T, heads + 2 kv_heads, width]`: the same shape.
    fn apply(&self, heads: &Array) -> Result<Array> {
        Ok(mlx_rs::fast::rms_norm(heads, None, self.eps)?.multiply(&self.all)?.as_dtype(heads.dtype())?)
    }
}

impl Heads {
    /// For a layer whose activations are of type `dtype`; `norms` are those of queries and keys.
    pub fn new(
        spec: &CoreSpec,
        norms: Option<&[RmsNorm; 2]>,
        rope: &Rope,
        backend: &Backend,
        dtype: Dtype,
    ) -> Result<Self> {
        let CoreSpec { heads, kv_heads, key_width, value_width, turned_first, .. } = *spec;
        let norms = match norms {
            Some(norms) if !matches!(backend, Backend::Cpu(_)) => Some(Norms::new(spec, norms, dtype)?),
            _ => None,
        };
        let rotation = rope.rotation();
        let frequencies = Array::from_slice(&rotation.frequencies, &[rotation.frequencies.len() as i32]);
        let mut layer = Self { spec: *spec, norms, frequencies, kernel: None };
        let normed_last = turned_first && layer.norms.is_some();
        let in_kernel = rotation.dims > 0 && !normed_last && key_width == value_width && !spec.values_in_keys;
        if backend.gpu().is_some() && in_kernel {
            layer.kernel = layer.checked_kernel(
                &HeadsSpec {
                    heads,
                    kv_heads,
                    head_dim: key_width,
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
        let [queries, keys, values] = match &self.kernel {
            Some(kernel) if joined.dtype() == kernel.spec().dtype => self.launch(kernel, joined, positions),
            _ => self.composed(joined, rope, positions),
        }?;
        match self.spec.value_norm {
            Some(eps) => Ok([queries, keys, mlx_rs::fast::rms_norm(values, None, eps)?]),
            None => Ok([queries, keys, values]),
        }
    }

    /// Queries alone, `[T, heads, width]`, of `joined [T, heads * width]`: of a layer that has no keys and values of its own.
    pub fn queries(&self, joined: &Array, rope: &Rope, positions: &Array) -> Result<Array> {
        let CoreSpec { heads, key_width, turned_first, .. } = self.spec;
        let queries = joined.reshape(&[joined.dim(0), heads as i32, key_width as i32])?;
        let Some(Norms { eps, each: [weight, _], .. }) = &self.norms else { return rope.forward(&queries, positions) };
        let norm = |x: &Array| -> Result<Array> { Ok(mlx_rs::fast::rms_norm(x, Some(weight), *eps)?) };
        match turned_first {
            true => norm(&rope.forward(&queries, positions)?),
            false => rope.forward(&norm(&queries)?, positions),
        }
    }

    fn launch(&self, kernel: &HeadsKernel, joined: &Array, positions: &Array) -> Result<[Array; 3]> {
        let norms = self.norms.as_ref().map(|norms| [&norms.each[0], &norms.each[1]]);
        kernel.launch(joined, positions, &self.frequencies, norms)
    }

    /// With MLX's operations. Values are normalised and turned too, in vain: a few operations on one run of memory cost
    /// less than many on parts.
    fn composed(&self, joined: &Array, rope: &Rope, positions: &Array) -> Result<[Array; 3]> {
        let CoreSpec { heads, kv_heads, key_width, value_width, turned_first, .. } = self.spec;
        if key_width != value_width || self.spec.values_in_keys {
            return self.apart(joined, rope, positions);
        }
        let joined = joined.reshape(&[joined.dim(0), (heads + 2 * kv_heads) as i32, key_width as i32])?;
        let turned = match &self.norms {
            Some(norms) if turned_first => norms.apply(&rope.forward(&joined, positions)?)?,
            Some(norms) => rope.forward(&norms.apply(&joined)?, positions)?,
            None => rope.forward(&joined, positions)?,
        };
        Ok([
            mlx::heads(&turned, 0, heads)?,
            mlx::heads(&turned, heads, heads + kv_heads)?,
            mlx::heads(&joined, heads + kv_heads, heads + 2 * kv_heads)?,
        ])
    }

    /// The same for values of another width, or within keys, which have no norms.
    fn apart(&self, joined: &Array, rope: &Rope, positions: &Array) -> Result<[Array; 3]> {
        let CoreSpec { heads, kv_heads, key_width, value_width, .. } = self.spec;
        if self.norms.is_some() {
            return Err(Error::internal("norms of heads whose values have another width"));
        }
        let turning = (heads + kv_heads) * key_width;
        let turned = mlx::columns(joined, 0, turning)?;
        let turned = turned.reshape(&[joined.dim(0), (heads + kv_heads) as i32, key_width as i32])?;
        let turned = rope.forward(&turned, positions)?;
        let keys = mlx::heads(&turned, heads, heads + kv_heads)?;
        let values = if self.spec.values_in_keys {
            mlx::slice_axis(&keys, 2, key_width - value_width, key_width)?
        } else {
            let values = mlx::columns(joined, turning, turning + kv_heads * value_width)?;
            values.reshape(&[joined.dim(0), kv_heads as i32, value_width as i32])?
        };
        Ok([mlx::heads(&turned, 0, heads)?, keys, values])
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
