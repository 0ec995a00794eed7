//! How long it takes to open a large tier.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use super::*;
use crate::cache::ssd::index::{Changes, Index, IndexSpace, record_bytes};
use crate::cache::ssd::segment::{Segment, SegmentName};
use crate::cache::ssd::{Codec, Folder};

/// Fills a folder with an index of `count` spans of 64 tokens in chains of 16, and with empty files of their names.
fn fill(path: &Path, count: usize) -> Vec<Vec<u32>> {
    let storage: Arc<dyn Storage> = Arc::new(Folder::new(path).unwrap());
    storage.create_folder("segments").unwrap();
    let space = Arc::new(IndexSpace { allowed: AtomicU64::new(u64::MAX), ..IndexSpace::default() });
    let (mut index, _) = Index::open(storage, space);
    let mut put = Vec::new();
    let mut all = Vec::new();
    for chain in 0..count.div_ceil(16) {
        let tokens = conversation(chain as u64, 16 * 64);
        let mut parent = root_key(&[1; 32], 0);
        for (at, part) in tokens.chunks(64).enumerate() {
            let span = Span { parent, start: 64 * at, tokens: part.into() };
            parent = span.key(16);
            let segment = Segment {
                fingerprint: [1; 32],
                group: 0,
                block_tokens: 16,
                codec: Codec::Exact,
                span,
                cost: 0.1,
                model: "small".into(),
            };
            let name = SegmentName::new(&segment, &parent);
            std::fs::create_dir_all(path.join(name.folder())).unwrap();
            std::fs::File::create(path.join(name.file())).unwrap();
            put.push((name, record_bytes(&segment, &parent, 1 << 20), 1));
        }
        all.push(tokens);
    }
    index.rewrite(Changes { put, ..Changes::default() }).unwrap();
    all
}

#[test]
fn opening_with_many_entries() {
    let release = !cfg!(debug_assertions);
    let count = if release { 100_000 } else { 10_000 };
    let folder = tempfile::tempdir().unwrap();
    let all = fill(folder.path(), count);
    let begun = Instant::now();
    let storage = Arc::new(Folder::new(folder.path()).unwrap());
    let tier = ColdTier::open(storage, options(1 << 40)).unwrap();
    let taken = begun.elapsed();
    let model = tier.model(ModelId { block_tokens: 16, ..id("small", 1) }).unwrap();
    println!("{count} entries of 64 tokens opened in {:.3} s", taken.as_secs_f64());
    assert!(tier.stats().sums.entries as usize >= count);
    for tokens in all.iter().step_by(97) {
        assert_eq!(model.find(0, tokens, 0).len(), 16);
    }
    assert!(!release || taken.as_secs_f64() < 1.0, "{taken:?}");
}
