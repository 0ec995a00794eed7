//! Tests of the cold tier, and what they share: a small model whose rows follow from its tokens.

mod basic;
mod crash;
mod damage;
mod disk;
mod faults;
mod kill;
mod limits;
mod machine;
mod speed;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::tier::FOLDERS;
use super::{ColdModel, ColdOptions, ColdTier, ModelId, Storage, Stored, row_buffer};
use crate::cache::prefix::chain_key;
use crate::cache::rows::{LayerRows, RowBuffer, RowLayout, RowType};
use crate::cache::spans::{Span, root_key};
use crate::error::Result;

/// Tokens of a block.
pub const BLOCK: usize = 4;

/// Bytes of a file of the small model, of up to 160 tokens, and what it is charged with.
pub const FILE: u64 = 32 * 1024;

pub fn layout() -> Arc<RowLayout> {
    let layers = [1, 4].map(|layer| LayerRows { layer, keys: (2, 4), values: (2, 8) });
    Arc::new(RowLayout { dtype: RowType::Bf16, state: None, layers: layers.into() })
}

pub fn id(name: &str, fingerprint: u8) -> ModelId {
    ModelId {
        name: name.to_owned(),
        fingerprint: [fingerprint; 32],
        block_tokens: BLOCK,
        layouts: vec![layout(), layout()],
    }
}

/// A limit with room for so many files of the small model and their index.
pub fn room_for(files: u64) -> u64 {
    FOLDERS + 4 * 1024 * 1024 + files * (FILE + 8 * 1024)
}

pub fn options(limit: u64) -> ColdOptions {
    ColdOptions { min_free: 0, ..ColdOptions::new(limit) }
}

pub fn open(storage: &(impl Storage + Clone + 'static), limit: u64) -> Result<(Arc<ColdTier>, ColdModel)> {
    let tier = ColdTier::open(Arc::new(storage.clone()), options(limit))?;
    let model = tier.model(id("small", 1))?;
    Ok((tier, model))
}

/// The span of `tokens[start..]` in a group of the small model.
pub fn span(fingerprint: u8, group: usize, tokens: &[u32], start: usize) -> Span {
    let root = root_key(&[fingerprint; 32], group);
    let parent = tokens[..start].chunks(BLOCK).fold(root, |key, tokens| chain_key(&key, tokens));
    Span { parent, start, tokens: tokens[start..].into() }
}

/// The rows of `tokens[start..]`: each depends on all tokens up to its own, on the group and on the fingerprint.
pub fn rows(fingerprint: u8, group: usize, tokens: &[u32], start: usize) -> RowBuffer {
    let layout = layout();
    let mut buffer = row_buffer(&layout, tokens.len() - start);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[fingerprint, group as u8]);
    for (at, token) in tokens.iter().enumerate() {
        hasher.update(&token.to_le_bytes());
        if at < start {
            continue;
        }
        let mut source = hasher.finalize_xof();
        for layer in 0..layout.layers.len() {
            let (keys, values) = buffer.rows_mut(layer, at - start..at - start + 1);
            source.fill(keys);
            source.fill(values);
            // Finite numbers, as real rows are.
            keys.chunks_exact_mut(2).chain(values.chunks_exact_mut(2)).for_each(|number| number[1] &= 0xbf);
        }
    }
    buffer
}

pub fn store(model: &ColdModel, tokens: &[u32], start: usize) -> Result<Stored> {
    model.store(0, &span(1, 0, tokens, start), rows(1, 0, tokens, start), 0.01)
}

/// How many of `tokens` are found and read, from the first one on. Rows that are not exactly right are an error.
pub fn restored(model: &ColdModel, group: usize, tokens: &[u32]) -> Result<usize, String> {
    let fingerprint = 1;
    let expected = rows(fingerprint, group, tokens, 0);
    let mut held = 0;
    for piece in model.find(group, tokens, 0) {
        let place = piece.piece;
        if place.position != held {
            return Err(format!("a gap: {place:?} behind {held}"));
        }
        let Some(read) = model.read(group, &piece, tokens) else { break };
        for layer in 0..layout().layers.len() {
            let (keys, values) = read.rows(layer, place.skip..place.skip + place.tokens);
            if (keys, values) != expected.rows(layer, place.position..place.position + place.tokens) {
                return Err(format!("wrong rows: {place:?}"));
            }
        }
        held += place.tokens;
    }
    Ok(held)
}

/// A conversation: `count` tokens that follow from `seed`.
pub fn conversation(seed: u64, count: usize) -> Vec<u32> {
    let mut random = disk::Random::new(seed + 1);
    (0..count).map(|_| random.below(100_000) as u32).collect()
}

/// Bytes that `du` counts in a folder.
pub fn du(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let own = std::fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
    let inside = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| du(&entry.path()));
    own + inside.sum::<u64>()
}

/// All files below a folder.
pub fn files_in(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_in(&path) } else { vec![path] }).collect()
}
