//! Texts of a batch packed without padding.

use std::ops::Range;
use std::sync::Arc;

use mlx_rs::Array;

/// The tokens of several texts one after the other: `T` rows. Texts of the same length are neighbours, so that they can be
/// computed together as one array.
#[derive(Debug)]
pub struct PackedTexts {
    /// Token ids `[T]`, u32.
    pub tokens: Array,
    /// Token types `[T]`, u32.
    pub token_types: Array,
    /// Places in their texts `[T]`, i32.
    pub positions: Array,
    segments: Arc<[Range<usize>]>,
    order: Vec<usize>,
    runs: Vec<Run>,
}

/// Neighbouring texts of the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Their rows, `count * length`.
    pub rows: Range<usize>,
    /// Tokens of each.
    pub length: usize,
    /// How many.
    pub count: usize,
}

impl PackedTexts {
    /// Packs texts, each given as its token ids and as many token types; none of them may be empty.
    pub fn new(texts: &[(&[u32], &[u32])]) -> Self {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&text| texts[text].0.len());
        let (mut tokens, mut types, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let mut segments = Vec::with_capacity(texts.len());
        let mut runs: Vec<Run> = Vec::new();
        for &text in &order {
            let (start, length) = (tokens.len(), texts[text].0.len());
            tokens.extend_from_slice(texts[text].0);
            types.extend_from_slice(texts[text].1);
            positions.extend(0..length as i32);
            segments.push(start..start + length);
            match runs.last_mut() {
                Some(run) if run.length == length => {
                    run.rows.end += length;
                    run.count += 1;
                }
                _ => runs.push(Run { rows: start..start + length, length, count: 1 }),
            }
        }
        let shape = [tokens.len() as i32];
        Self {
            tokens: Array::from_slice(&tokens, &shape),
            token_types: Array::from_slice(&types, &shape),
            positions: Array::from_slice(&positions, &shape),
            segments: segments.into(),
            order,
            runs,
        }
    }

    /// Rows of each text, in the order of the rows.
    pub fn segments(&self) -> Arc<[Range<usize>]> {
        Arc::clone(&self.segments)
    }

    /// Which of the caller's texts each segment is.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The segments in runs of one length.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_one_length_are_neighbours() {
        let zeros = [0u32; 3];
        let texts: [&[u32]; 4] = [&[1, 2, 3], &[4], &[5, 6, 7], &[8]];
        let texts: Vec<_> = texts.iter().map(|ids| (*ids, &zeros[..ids.len()])).collect();
        let packed = PackedTexts::new(&texts);
        assert_eq!(packed.order(), [1, 3, 0, 2]);
        assert_eq!(packed.segments()[..], [0..1, 1..2, 2..5, 5..8]);
        assert_eq!(packed.runs(), [Run { rows: 0..2, length: 1, count: 2 }, Run { rows: 2..8, length: 3, count: 2 }]);
    }
}
