//! From what an encoder computes to what its host asked for. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::engine::events::{Embeddings, Scores};
use crate::error::{Error, Result};

/// What becomes of the rows that were computed for the texts of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Vectors.
    Embeddings {
        /// The first dimensions only (Kusupati et al. 2022, "Matryoshka").
        dimensions: Option<usize>,
        /// Whether they have length 1; otherwise as the model declares.
        normalize: Option<bool>,
        /// Give them as text, too.
        base64: bool,
    },
    /// Scores.
    Scores {
        /// How many of the best are ranked; all by default.
        top: Option<usize>,
    },
}

/// Vectors of rows, all of which have the same width.
pub fn embeddings(rows: Vec<Vec<f32>>, dimensions: usize, normalize: bool, base64: bool) -> Result<Embeddings> {
    let mut values = Vec::with_capacity(rows.len() * dimensions);
    for row in rows {
        let vector = row.get(..dimensions).ok_or_else(|| Error::internal("a vector is too short"))?;
        let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
        // As torch's `normalize` does, which leaves a vector of zeros as it is.
        let divisor = if normalize { length.max(1e-12) } else { 1.0 };
        values.extend(vector.iter().map(|x| x / divisor));
    }
    let text = if base64 { base64_array(&values, dimensions)? } else { String::new() };
    Ok(Embeddings { dimensions, values, text, truncated: 0 })
}

/// A JSON array of one string for each vector: its numbers, f32 with the lowest byte first, in base64 (RFC 4648).
fn base64_array(values: &[f32], dimensions: usize) -> Result<String> {
    let vectors = values.chunks_exact(dimensions).map(|vector| {
        let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
        STANDARD.encode(bytes)
    });
    let vectors: Vec<String> = vectors.collect();
    serde_json::to_string(&vectors).map_err(|error| Error::internal(format!("vectors as text: {error}")))
}

/// Scores and the `top` best texts of them, best first; of equal ones the first to be given.
pub fn scores(rows: Vec<Vec<f32>>, top: usize) -> Scores {
    let values: Vec<f32> = rows.into_iter().map(|row| row.first().copied().unwrap_or(f32::NAN)).collect();
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]));
    order.truncate(top);
    Scores { values, order, truncated: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_cut_before_they_are_normalised() {
        let rows = || vec![vec![3.0, 4.0, 100.0], vec![0.0, 0.0, 1.0]];
        let both = embeddings(rows(), 2, true, false).unwrap();
        assert_eq!((both.dimensions, both.values), (2, vec![0.6, 0.8, 0.0, 0.0]));
        assert_eq!(embeddings(rows(), 3, false, false).unwrap().values, rows().concat());
        assert!(embeddings(rows(), 4, false, false).is_err());
    }

    #[test]
    fn base64_has_the_bytes_of_each_vector() {
        let given = embeddings(vec![vec![1.0, -2.5], vec![0.0, 3.0]], 2, false, true).unwrap();
        let texts: Vec<String> = serde_json::from_str(&given.text).unwrap();
        let decoded = STANDARD.decode(&texts[0]).unwrap();
        assert_eq!(decoded, [1f32.to_le_bytes(), (-2.5f32).to_le_bytes()].concat());
        assert_eq!(texts[1], "AAAAAAAAQEA=");
    }

    #[test]
    fn the_best_scores_come_first() {
        let given = scores(vec![vec![0.1], vec![0.9], vec![0.1], vec![0.5]], 3);
        assert_eq!((given.values, given.order), (vec![0.1, 0.9, 0.1, 0.5], vec![1, 3, 0]));
    }
}
