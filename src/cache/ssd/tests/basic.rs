//! What the tier is for: stored, found, read; and the format.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use safetensors::{Dtype, SafeTensors};

use super::disk::Disk;
use super::*;
use crate::cache::ssd::{Access, Codec, ColdReader, ColdWriter, Folder};
use crate::error::Status;

#[test]
fn rows_come_back_after_a_restart() {
    let disk = Disk::new();
    let tokens = conversation(0, 26);
    {
        let (tier, model) = open(&disk, room_for(20)).unwrap();
        assert_eq!(store(&model, &tokens[..16], 0).unwrap(), Stored::Written(FILE));
        assert_eq!(store(&model, &tokens[..24], 16).unwrap(), Stored::Written(FILE));
        assert_eq!(store(&model, &tokens, 24).unwrap(), Stored::Written(FILE));
        assert_eq!(store(&model, &tokens[..16], 0).unwrap(), Stored::Present);
        assert_eq!(restored(&model, 0, &tokens), Ok(26));
        assert_eq!(restored(&model, 1, &tokens), Ok(0), "another group");
        let stats = tier.stats();
        assert_eq!((stats.sums.entries, stats.sums.bytes, stats.sums.hit_tokens), (3, 3 * FILE, 26));
        assert_eq!((stats.sums.written_tokens, stats.sums.written_bytes), (26, 3 * FILE));
        assert_eq!(stats.models.keys().collect::<Vec<_>>(), ["small"]);
        let (own, sums) = (&stats.models["small"], &stats.sums);
        assert!(own.read_seconds > 0.0 && own.read_seconds <= sums.read_seconds, "{stats:?}");
        assert!(tier.read_rate(1e3) > 1050.0, "what was read counts: {}", tier.read_rate(1e3));
        assert_eq!(own.written_bytes_per_new_token(), None);
        model.count_new(10);
        let stats = tier.stats();
        assert_eq!(stats.models["small"].written_bytes_per_new_token(), Some(3.0 * FILE as f64 / 10.0));
    }
    let (tier, model) = open(&disk, room_for(20)).unwrap();
    assert_eq!(restored(&model, 0, &tokens), Ok(26));
    let other = [&tokens[..18], &[1, 2, 3]].concat();
    assert_eq!(restored(&model, 0, &other), Ok(18), "exact to the token");
    let stranger = tier.model(id("small", 2)).unwrap();
    assert_eq!(stranger.find(0, &tokens, 0), []);
    // What was found may not be read for other tokens: in it, or before it.
    let piece = model.find(0, &tokens, 0)[1];
    for changed in [0, 15, 16, 23] {
        let mut other = tokens.clone();
        other[changed] ^= 1;
        assert!(model.read(0, &piece, &other).is_none(), "token {changed}");
    }
    assert!(model.read(0, &piece, &tokens[..23]).is_none());
    assert!(model.read(1, &piece, &tokens).is_none());
    assert!(stranger.read(0, &piece, &tokens).is_none());
    assert!(model.read(0, &piece, &tokens).is_some());
    assert_eq!(tier.stats().sums.damaged, 0);
}

#[test]
fn longer_ends_replace_shorter_ones() {
    let disk = Disk::new();
    let tokens = conversation(0, 12);
    let (tier, model) = open(&disk, room_for(20)).unwrap();
    for end in [9, 10, 12] {
        let start = if end == 9 { 0 } else { 8 };
        if start == 0 {
            store(&model, &tokens[..8], 0).unwrap();
        }
        store(&model, &tokens[..end], 8).unwrap();
        assert_eq!((restored(&model, 0, &tokens), tier.stats().sums.entries), (Ok(end), 2));
    }
    assert_eq!(disk.names().iter().filter(|name| name.ends_with(".safetensors")).count(), 2);
}

#[test]
fn every_safetensors_library_can_read_a_segment() {
    let disk = Disk::new();
    let (_tier, model) = open(&disk, room_for(20)).unwrap();
    let tokens = conversation(3, 8);
    store(&model, &tokens, 0).unwrap();
    let name = disk.names().into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
    let bytes = disk.bytes(&name);
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((header + 8) % (16 * 1024), 0, "data begins at a page");
    assert_eq!(bytes.len() % (16 * 1024), 0);
    let metadata = metadata.metadata().as_ref().unwrap();
    assert_eq!((metadata["format"].as_str(), metadata["version"].as_str()), ("omlx.kv", "1"));
    assert_eq!((metadata["model"].as_str(), metadata["start"].as_str()), ("small", "0"));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let layers = ["layers.1.keys", "layers.1.values", "layers.4.keys", "layers.4.values"];
    assert_eq!(names, [&["_pad.0"], &layers[..], &["tokens"]].concat());
    let expected = rows(1, 0, &tokens, 0);
    for (at, layer) in [(0, 1), (1, 4)] {
        let (keys, values) = expected.rows(at, 0..8);
        let tensor = file.tensor(&format!("layers.{layer}.keys")).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape(), tensor.data()), (Dtype::BF16, &[8, 2, 4][..], keys));
        let tensor = file.tensor(&format!("layers.{layer}.values")).unwrap();
        assert_eq!((tensor.shape(), tensor.data()), (&[8, 2, 8][..], values));
    }
    let tensor = file.tensor("tokens").unwrap();
    let written: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    assert_eq!((tensor.dtype(), tensor.data()), (Dtype::I32, &written[..]));
}

#[test]
fn eight_bits_are_close_and_never_mixed_with_exact_rows() {
    let disk = Disk::new();
    let tokens = conversation(4, 64);
    let (tier, model) = open(&disk, room_for(20)).unwrap();
    let limits = |codec| crate::cache::ssd::ColdOptions { codec, ..options(room_for(20)) };
    tier.set_limits(limits(Codec::Bits8));
    assert!(matches!(store(&model, &tokens, 0).unwrap(), Stored::Written(_)));
    let piece = model.find(0, &tokens, 0)[0];
    let (read, expected) = (model.read(0, &piece, &tokens).unwrap(), rows(1, 0, &tokens, 0));
    let numbers = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(2).map(|n| bf16::from_le_bytes([n[0], n[1]]).to_f32()).collect()
    };
    let (mut worst, mut exact) = (0f32, 0);
    for at in 0..2 {
        let ((keys, values), (right_keys, right_values)) = (read.rows(at, 0..64), expected.rows(at, 0..64));
        for (got, right, width) in [(keys, right_keys, 4), (values, right_values, 8)] {
            for (got, right) in numbers(got).chunks(width).zip(numbers(right).chunks(width)) {
                let largest = right.iter().fold(0f32, |largest, n| largest.max(n.abs()));
                for (got, right) in got.iter().zip(right) {
                    worst = worst.max((got - right).abs() / largest);
                    exact += usize::from(got == right);
                }
            }
        }
    }
    // Half a step of 1/127, and half a unit in the last place of the 8 bits that bf16 has.
    assert!(worst > 0.0 && worst <= 0.5 / 127.0 + 0.5 / 256.0, "worst error {worst}");
    assert!(exact > 0);
    assert!(SafeTensors::deserialize(&disk.bytes(&disk.names().pop().unwrap())).is_ok());
    // Exact reads do not see it, and the other way round.
    tier.set_limits(limits(Codec::Exact));
    assert_eq!(model.find(0, &tokens, 0), []);
    assert!(model.read(0, &piece, &tokens).is_none());
    assert!(matches!(store(&model, &tokens, 0).unwrap(), Stored::Written(_)));
    assert_eq!(restored(&model, 0, &tokens), Ok(64));
    drop((tier, model));
    let (tier, model) = open(&disk, room_for(20)).unwrap();
    assert_eq!((restored(&model, 0, &tokens), tier.stats().sums.entries), (Ok(64), 2));
    // Numbers without a scale are not stored.
    tier.set_limits(limits(Codec::Bits8));
    let tokens = conversation(5, 4);
    let mut infinite = rows(1, 0, &tokens, 0);
    infinite.rows_mut(0, 0..1).0[..2].copy_from_slice(&bf16::INFINITY.to_le_bytes());
    let error = model.store(0, &span(1, 0, &tokens, 0), infinite, 0.0).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert!(disk.names().iter().all(|name| !name.ends_with(".tmp")));
}

#[test]
fn a_folder_has_one_holder_and_one_reader_outside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let storage = || Arc::new(Folder::new(&path).unwrap());
    let tokens = conversation(6, 40);
    {
        let tier = ColdTier::open(storage(), options(room_for(10))).unwrap();
        let busy = ColdTier::open(storage(), options(room_for(10))).unwrap_err();
        assert_eq!(busy.status(), Status::Busy);
        assert!(busy.message().contains(path.to_str().unwrap()), "{busy}");
        let model = tier.model(id("small", 1)).unwrap();
        store(&model, &tokens, 0).unwrap();
        tier.remember_hash(b"device 1 inode 2", [7; 32]);
    }
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert!(files_in(&path).len() >= 4);
    for file in files_in(&path) {
        assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700), "{}", file.display());
    }
    let tag = std::fs::read_to_string(path.join("CACHEDIR.TAG")).unwrap();
    assert!(tag.starts_with("Signature: 8a477f597d28d172789f06886806bc55"));
    let tier = ColdTier::open(storage(), options(room_for(10))).unwrap();
    let model = tier.model(id("small", 1)).unwrap();
    assert_eq!(restored(&model, 0, &tokens), Ok(40));
    assert_eq!(tier.remembered_hash(b"device 1 inode 2"), Some([7; 32]));
    assert_eq!(tier.remembered_hash(b"another"), None);
    let (free, total) = tier.disk_bytes().unwrap();
    assert!(free > 0 && free < total);
}

#[test]
fn direct_and_buffered_access_see_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Folder::new(folder.path()).unwrap();
    let mut buffer = rows(1, 0, &conversation(1, 200), 0);
    let before = buffer.pages().to_vec();
    storage.create("direct", Access::Direct).unwrap().write_at(0, buffer.pages()).unwrap();
    let file = storage.open("direct", Access::Buffered).unwrap();
    let mut middle = vec![0; 1000];
    file.read_at(16_500, &mut middle).unwrap();
    assert_eq!(middle, before[16_500..17_500]);
    file.write_at(3, b"changed").unwrap();
    let file = storage.open("direct", Access::Direct).unwrap();
    file.read_at(0, buffer.pages_mut()).unwrap();
    assert_eq!((&buffer.pages()[3..10], &buffer.pages()[10..]), (&b"changed"[..], &before[10..]));
    let missing = storage.open("nothing", Access::Direct).unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
    assert_eq!(file.read_at(1 << 20, buffer.pages_mut()).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn threads_write_and_read_in_the_background() {
    let disk = Disk::new();
    let (_tier, model) = open(&disk, room_for(100)).unwrap();
    let tokens = conversation(9, 80);
    let writer = ColdWriter::new(usize::MAX).unwrap();
    for start in (0..80).step_by(8) {
        let (span, rows) = (span(1, 0, &tokens[..start + 8], start), rows(1, 0, &tokens[..start + 8], start));
        writer.submit(model.clone(), 0, span, rows, 0.0).unwrap();
    }
    assert!(writer.flush(Duration::from_secs(60)));
    assert_eq!((writer.pending_bytes(), restored(&model, 0, &tokens)), (0, Ok(80)));
    // An idle writer takes anything, a busy one what fits.
    let small = ColdWriter::new(1).unwrap();
    let more: Vec<Vec<u32>> = (20..40).map(|seed| conversation(seed, 8)).collect();
    let refused = more
        .iter()
        .filter(|tokens| small.submit(model.clone(), 0, span(1, 0, tokens, 0), rows(1, 0, tokens, 0), 0.0).is_err());
    assert!(refused.count() < 20);
    drop(small);
    let reader = ColdReader::new(3).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let shared: Arc<[u32]> = tokens.clone().into();
    let pieces = model.find(0, &tokens, 0);
    reader.read(model.clone(), 0, pieces[0], Arc::clone(&shared), Box::new(|_| panic!("a callback that fails")));
    for piece in &pieces {
        let (send, piece) = (send.clone(), *piece);
        let done = Box::new(move |rows: Option<RowBuffer>| send.send((piece.piece.position, rows.is_some())).unwrap());
        reader.read(model.clone(), 0, piece, Arc::clone(&shared), done);
    }
    drop((reader, send));
    let mut read: Vec<_> = receive.iter().collect();
    read.sort_unstable();
    assert_eq!(read, (0..80).step_by(8).map(|position| (position, true)).collect::<Vec<_>>());
}
