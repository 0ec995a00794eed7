//! Weight matrices as MLX stores them, one or a stack, and the products with them that `mlx-rs` does not offer.

use std::ffi::CStr;

use mlx_rs::{Array, Dtype};

use super::{array_from, no_array};
use crate::error::Result;

/// A quantisation format of MLX: how many weights share a scale, bits per weight, and the number format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantFormat {
    /// Weights in a group along the input axis.
    pub group_size: usize,
    /// Bits per weight.
    pub bits: usize,
    /// Number format.
    pub mode: QuantMode,
}

/// Number format of quantised weights, as MLX names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantMode {
    /// Integers with a scale and a bias per group.
    Affine,
    /// 4-bit floats (E2M1) with one E8M0 scale per 32.
    Mxfp4,
    /// 8-bit floats (E4M3) with one E8M0 scale per 32.
    Mxfp8,
    /// 4-bit floats (E2M1) with one E4M3 scale per 16.
    Nvfp4,
}

impl QuantMode {
    /// Its name in a config.
    pub fn name(self) -> &'static str {
        match self {
            QuantMode::Affine => "affine",
            QuantMode::Mxfp4 => "mxfp4",
            QuantMode::Mxfp8 => "mxfp8",
            QuantMode::Nvfp4 => "nvfp4",
        }
    }

    fn c_name(self) -> &'static CStr {
        match self {
            QuantMode::Affine => c"affine",
            QuantMode::Mxfp4 => c"mxfp4",
            QuantMode::Mxfp8 => c"mxfp8",
            QuantMode::Nvfp4 => c"nvfp4",
        }
    }
}

/// The two forms of a weight matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// `[out, in]` floats.
    Dense(Array),
    /// MLX's packed form.
    Quantized(QuantizedMatrix),
}

impl Matrix {
    /// Products with some of the matrices of a stack `[experts, out, in]`: `x [.., rows, in]` to `[.., rows, out]`, with the matrix
    /// `experts [..]` (u32) for each of the leading places, to which those of `x` are broadcast. `sorted` promises that experts
    /// ascend.
    pub fn gather_matmul(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        match self {
            Matrix::Dense(weight) => {
                let weight = weight.swap_axes(-1, -2)?;
                // SAFETY: every handle is alive for the call; MLX copies what it keeps.
                array_from(|out, stream| unsafe {
                    let (x, weight) = (x.as_ptr(), weight.as_ptr());
                    mlx_sys::mlx_gather_mm(out, x, weight, no_array(), experts.as_ptr(), sorted, stream)
                })
            }
            Matrix::Quantized(matrix) => matrix.gather_matmul(x, experts, sorted),
        }
    }
}

/// A weight matrix `[out, in]` in MLX's packed form.
#[derive(Debug, Clone)]
pub struct QuantizedMatrix {
    /// Packed words, `[out, in * bits / 32]` u32.
    pub weight: Array,
    /// `[out, in / group_size]`; the activations' type for affine, u8 otherwise.
    pub scales: Array,
    /// Same shape as `scales`; affine only.
    pub biases: Option<Array>,
    /// Format of the three arrays.
    pub format: QuantFormat,
}

impl QuantizedMatrix {
    fn biases_ptr(&self) -> mlx_sys::mlx_array {
        self.biases.as_ref().map_or_else(no_array, Array::as_ptr)
    }

    /// `x [.., in] -> [.., out]`: the product with the transposed matrix.
    pub fn matmul(&self, x: &Array) -> Result<Array> {
        // SAFETY: every handle is alive for the call; MLX copies what it keeps.
        array_from(|out, stream| unsafe {
            mlx_sys::mlx_quantized_matmul(
                out,
                x.as_ptr(),
                self.weight.as_ptr(),
                self.scales.as_ptr(),
                self.biases_ptr(),
                true,
                some_int(self.format.group_size),
                some_int(self.format.bits),
                self.format.mode.c_name().as_ptr(),
                stream,
            )
        })
    }

    fn gather_matmul(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        // SAFETY: every handle is alive for the call; MLX copies what it keeps.
        array_from(|out, stream| unsafe {
            mlx_sys::mlx_gather_qmm(
                out,
                x.as_ptr(),
                self.weight.as_ptr(),
                self.scales.as_ptr(),
                self.biases_ptr(),
                no_array(),
                experts.as_ptr(),
                true,
                some_int(self.format.group_size),
                some_int(self.format.bits),
                self.format.mode.c_name().as_ptr(),
                sorted,
                stream,
            )
        })
    }

    /// The rows `ids [n]` unpacked to `dtype`: `[n, in]`.
    pub fn rows(&self, ids: &Array, dtype: Dtype) -> Result<Array> {
        let biases = self.biases.as_ref().map(|b| b.take_axis(ids, 0)).transpose()?;
        self.unpack(&self.weight.take_axis(ids, 0)?, &self.scales.take_axis(ids, 0)?, biases.as_ref(), dtype)
    }

    /// The whole matrix unpacked to `dtype`: `[out, in]`.
    pub fn unpacked(&self, dtype: Dtype) -> Result<Array> {
        self.unpack(&self.weight, &self.scales, self.biases.as_ref(), dtype)
    }

    fn unpack(&self, weight: &Array, scales: &Array, biases: Option<&Array>, dtype: Dtype) -> Result<Array> {
        let dtype = mlx_sys::mlx_optional_dtype { value: dtype.into(), has_value: true };
        // SAFETY: every handle is alive for the call; MLX copies what it keeps.
        array_from(|out, stream| unsafe {
            mlx_sys::mlx_dequantize(
                out,
                weight.as_ptr(),
                scales.as_ptr(),
                biases.map_or_else(no_array, Array::as_ptr),
                some_int(self.format.group_size),
                some_int(self.format.bits),
                self.format.mode.c_name().as_ptr(),
                no_array(),
                dtype,
                stream,
            )
        })
    }
}

fn some_int(value: usize) -> mlx_sys::mlx_optional_int {
    mlx_sys::mlx_optional_int { value: value as i32, has_value: true }
}
