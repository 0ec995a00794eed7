//! Texts that pass a decoder as a whole, for their hidden states: no sequence goes on, so that nothing is kept.

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::Array;
use mlx_rs::ops::concatenate;

use super::{PackedTexts, Step};
use crate::cache::{KvLayout, Pages};
use crate::error::{Error, Result};
use crate::kernels::{Backend, Placement, Segment};
use crate::mlx;
use crate::weights::Weights;

/// Tokens of a block where the backend does not say: one chunk of the CPU kernels' attention.
const BLOCK_TOKENS: usize = 32;

/// What takes batches of texts through the layers of a decoder, over pools that all layers share.
///
/// Texts are the segments of a step, as prompts are, so that none sees another. More rows than fit into one pass take turns in
/// every layer; a longer text is cut, and goes on as a prompt in chunks does.
#[derive(Debug)]
pub struct WholeTexts {
    backend: Backend,
    most: usize,
}

/// Rows that pass a layer together.
#[derive(Debug)]
struct Pass {
    rows: Range<usize>,
    /// Their places in their texts `[T]`, i32.
    positions: Array,
    placement: Arc<Placement>,
}

impl WholeTexts {
    /// For the model that takes `weights`; at most `most` rows pass a layer together.
    pub fn new(weights: &Weights, most: usize) -> Self {
        Self { backend: weights.backend().clone(), most }
    }

    /// Hidden states `x [T, hidden]` of `texts` before the first of `depth` layers to those behind the last. A token stores
    /// `layout`, which not every layer has a part in; `layers` takes the rows of a step through a range of layers.
    pub fn forward(
        &self,
        texts: &PackedTexts,
        (layout, depth): (&KvLayout, usize),
        mut x: Array,
        layers: impl Fn(Array, Range<usize>, &mut Step<'_>) -> Result<Array>,
    ) -> Result<Array> {
        let block_tokens = self.backend.gpu().map_or(BLOCK_TOKENS, |gpu| gpu.block_tokens);
        let (pieces, blocks) = pieces(&texts.segments(), self.most, block_tokens);
        let mut pages = Pages::shared(self.backend.clone(), layout, block_tokens, blocks)?;
        let passes = pieces.iter().map(|pieces| Pass::new(pieces, block_tokens)).collect::<Result<Vec<_>>>()?;
        if let [pass] = &passes[..] {
            // What is written and never read need not be evaluated: `Step::unread` is dropped.
            return layers(x, 0..depth, &mut pass.step(&mut pages));
        }
        for layer in 0..depth {
            let mut parts = Vec::with_capacity(passes.len());
            for pass in &passes {
                let rows = mlx::rows(&x, pass.rows.start, pass.rows.end)?;
                let mut step = pass.step(&mut pages);
                let part = layers(rows, layer..layer + 1, &mut step)?;
                // The next one may read what this one has written behind MLX's back. It also bounds the memory.
                mlx_rs::transforms::eval(std::iter::once(&part).chain(&step.unread))?;
                parts.push(part);
            }
            x = concatenate(&parts, 0)?;
        }
        Ok(x)
    }
}

/// Some rows of one text.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    /// Of the batch.
    rows: Range<usize>,
    /// Place of the first one in its text.
    start: usize,
    /// Of its text; its other blocks follow.
    first_block: usize,
}

/// The pieces of each pass of at most `most` rows, and the blocks of all texts. Only texts that fit into no pass are cut.
fn pieces(texts: &[Range<usize>], most: usize, block_tokens: usize) -> (Vec<Vec<Piece>>, usize) {
    let (mut passes, mut room, mut first_block) = (Vec::<Vec<Piece>>::new(), 0, 0);
    for text in texts {
        let mut start = 0;
        while start < text.len() {
            let left = text.len() - start;
            if left > room && room < most {
                passes.push(Vec::new());
                room = most;
            }
            let rows = text.start + start..text.start + start + left.min(room);
            (start, room) = (start + rows.len(), room - rows.len());
            let piece = Piece { start: rows.start - text.start, rows, first_block };
            passes.last_mut().into_iter().for_each(|pass| pass.push(piece.clone()));
        }
        first_block += text.len().div_ceil(block_tokens);
    }
    (passes, first_block)
}

impl Pass {
    fn new(pieces: &[Piece], block_tokens: usize) -> Result<Self> {
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
            return Err(Error::internal("a pass without rows"));
        };
        let rows = first.rows.start..last.rows.end;
        let (mut tables, mut slots, mut segments) = (Vec::new(), Vec::new(), Vec::new());
        let mut positions = Vec::with_capacity(rows.len());
        for piece in pieces {
            let (start, end) = (piece.start, piece.start + piece.rows.len());
            // Block 0 belongs to nobody.
            let first_block = 1 + piece.first_block as u32;
            let own = piece.rows.start - rows.start..piece.rows.end - rows.start;
            segments.push(Segment { rows: own, start, table: tables.len() });
            tables.extend(first_block..first_block + end.div_ceil(block_tokens) as u32);
            slots.extend((start..end).map(|at| first_block * block_tokens as u32 + at as u32));
            positions.extend((start..end).map(|at| at as i32));
        }
        let placement = Placement { tables, slots, segments, ..Placement::default() };
        Ok(Self { rows, positions: mlx::indices(&positions)?, placement: Arc::new(placement) })
    }

    fn step<'a>(&'a self, pages: &'a mut Pages) -> Step<'a> {
        Step::new(&self.positions, pages, std::slice::from_ref(&self.placement))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_only_where_they_fit_nowhere() {
        let piece = |rows: Range<usize>, start: usize, first_block: usize| Piece { rows, start, first_block };
        let (passes, blocks) = pieces(&[0..1, 1..4, 4..8, 8..27], 8, 4);
        let expected = [
            vec![piece(0..1, 0, 0), piece(1..4, 0, 1), piece(4..8, 0, 2)],
            vec![piece(8..16, 0, 3)],
            vec![piece(16..24, 8, 3)],
            vec![piece(24..27, 16, 3)],
        ];
        assert_eq!((&passes[..], blocks), (&expected[..], 8));
        // The next text does not fit behind the first one, but whole into a pass of its own.
        let (passes, blocks) = pieces(&[0..3, 3..9], 8, 4);
        assert_eq!((passes, blocks), (vec![vec![piece(0..3, 0, 0)], vec![piece(3..9, 0, 1)]], 3));
        assert_eq!(pieces(&[0..8, 8..9], 8, 8).0.len(), 2);
    }
}
