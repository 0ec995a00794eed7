//! The 8-bit codec: rows as signed bytes, with one scale for each token and head. Symmetric: `value = byte * scale`, where
//! `scale` is the largest magnitude of the token's head divided by 127, so that the error is at most half a scale.

use std::sync::Arc;

use half::{bf16, f16};

use super::Codec;
use super::segment::{data_bytes, head_bytes_in, row_buffer};
use crate::cache::rows::{PAGE, RowBuffer, RowLayout, RowType};

/// Memory of whole pages that begins at a page.
#[derive(Debug)]
pub struct PageBuffer {
    memory: Vec<u8>,
    first: usize,
    len: usize,
}

impl PageBuffer {
    /// `bytes` zeros: whole pages.
    pub fn new(bytes: usize) -> Self {
        let memory = vec![0; bytes + PAGE];
        let first = memory.as_ptr().align_offset(PAGE).min(PAGE);
        Self { memory, first, len: bytes }
    }

    /// The pages.
    pub fn pages(&self) -> &[u8] {
        &self.memory[self.first..self.first + self.len]
    }

    /// The same, to be filled.
    pub fn pages_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.first..self.first + self.len]
    }
}

/// The pages of a file for `rows`, but for its header and tokens; `None` if a number is not finite.
pub fn encode(rows: &RowBuffer) -> Option<PageBuffer> {
    let (layout, tokens) = (rows.layout(), rows.tokens());
    let head = head_bytes_in(layout, Codec::Bits8);
    let mut file = PageBuffer::new(head + data_bytes(layout, tokens, Codec::Bits8).1);
    let mut out = &mut file.pages_mut()[head..];
    for (at, layer) in layout.layers.iter().enumerate() {
        let (keys, values) = rows.rows(at, 0..tokens);
        for (rows, (heads, width)) in [(keys, layer.keys), (values, layer.values)] {
            let (bytes, rest) = out.split_at_mut(tokens * heads * width);
            let (scales, rest) = rest.split_at_mut(tokens * heads * size_of::<f32>());
            out = rest;
            let row_bytes = (width * layout.dtype.bytes()).max(1);
            let numbers = rows.chunks_exact(row_bytes).zip(bytes.chunks_exact_mut(width.max(1)));
            for ((row, bytes), scale) in numbers.zip(scales.chunks_exact_mut(size_of::<f32>())) {
                scale.copy_from_slice(&encode_row(layout.dtype, row, bytes)?.to_le_bytes());
            }
        }
    }
    Some(file)
}

/// The rows of a file that [`encode`] made.
pub fn decode(file: &[u8], layout: &Arc<RowLayout>, tokens: usize) -> RowBuffer {
    let mut rows = row_buffer(layout, tokens);
    let mut data = &file[head_bytes_in(layout, Codec::Bits8)..];
    for (at, layer) in layout.layers.iter().enumerate() {
        let (keys, values) = rows.rows_mut(at, 0..tokens);
        for (rows, (heads, width)) in [(keys, layer.keys), (values, layer.values)] {
            let (bytes, rest) = data.split_at(tokens * heads * width);
            let (scales, rest) = rest.split_at(tokens * heads * size_of::<f32>());
            data = rest;
            let row_bytes = (width * layout.dtype.bytes()).max(1);
            let numbers = rows.chunks_exact_mut(row_bytes).zip(bytes.chunks_exact(width.max(1)));
            for ((row, bytes), scale) in numbers.zip(scales.chunks_exact(size_of::<f32>())) {
                let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
                decode_row(layout.dtype, bytes, scale, row);
            }
        }
    }
    rows
}

fn number(dtype: RowType, bytes: &[u8]) -> f32 {
    match dtype {
        RowType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        RowType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        RowType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}

/// Writes a head's row as bytes and returns their scale.
fn encode_row(dtype: RowType, row: &[u8], out: &mut [u8]) -> Option<f32> {
    let numbers = || row.chunks_exact(dtype.bytes()).map(|bytes| number(dtype, bytes));
    // `f32::max` would drop a NaN.
    let largest = numbers().try_fold(0f32, |largest, n| n.is_finite().then(|| largest.max(n.abs())))?;
    let scale = largest / 127.0;
    if scale > 0.0 {
        // A scale of few bits (subnormal) can make the quotient larger than 127; the conversion saturates.
        out.iter_mut().zip(numbers()).for_each(|(byte, n)| *byte = ((n / scale).round() as i8).cast_unsigned());
    }
    Some(scale)
}

fn decode_row(dtype: RowType, bytes: &[u8], scale: f32, out: &mut [u8]) {
    for (byte, out) in bytes.iter().zip(out.chunks_exact_mut(dtype.bytes())) {
        let n = (f32::from(byte.cast_signed()) * scale).clamp(f32::MIN, f32::MAX);
        match dtype {
            RowType::F32 => out.copy_from_slice(&n.to_le_bytes()),
            RowType::F16 => out.copy_from_slice(&f16::from_f32(n).to_le_bytes()),
            RowType::Bf16 => out.copy_from_slice(&bf16::from_f32(n).to_le_bytes()),
        }
    }
}
