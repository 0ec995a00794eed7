//! Files that are not what they should be: each is a miss, and is gone afterwards.

use std::sync::Arc;

use super::disk::{Disk, Random};
use super::*;
use crate::cache::ssd::index;
use crate::logged::logged;

struct Damaged {
    disk: Disk,
    tokens: Vec<u32>,
    file: String,
}

fn one_file() -> Damaged {
    let (disk, tokens) = (Disk::new(), conversation(1, 8));
    let (_tier, model) = open(&disk, room_for(10)).unwrap();
    store(&model, &tokens, 0).unwrap();
    let file = disk.names().into_iter().find(|name| name.ends_with(".safetensors")).unwrap();
    drop((_tier, model));
    Damaged { disk, tokens, file }
}

/// Damages the file of a tier that is open, or closed with its index, or without: always a miss, the file goes, and the log
/// says so once.
fn is_noticed(change: impl Fn(&mut Vec<u8>)) {
    is_noticed_as("", change);
}

/// The same, with the reason that the log has.
fn is_noticed_as(reason: &str, change: impl Fn(&mut Vec<u8>)) {
    let Damaged { disk, tokens, file } = one_file();
    for (open_before, with_index) in [(true, true), (false, true), (false, false)] {
        let disk = disk.copy();
        let before = open_before.then(|| open(&disk, room_for(10)).unwrap());
        disk.change(&file, &change);
        if !with_index {
            disk.delete(index::FILE);
        }
        let ((tier, model, held), lines) = logged(|| {
            let (tier, model) = before.unwrap_or_else(|| open(&disk, room_for(10)).unwrap());
            let held = restored(&model, 0, &tokens);
            (tier, model, held)
        });
        assert_eq!(held, Ok(0), "open before {open_before}, index {with_index}");
        let told = lines.iter().filter(|line| line.contains(&format!("{file} is removed: ")) && line.contains(reason));
        assert_eq!(told.count(), 1, "open before {open_before}, index {with_index}: {lines:?}");
        assert!(!disk.names().contains(&file), "open before {open_before}, index {with_index}");
        assert_eq!((tier.stats().sums.entries, model.find(0, &tokens, 0)), (0, vec![]));
        assert_eq!(store(&model, &tokens, 0).unwrap(), Stored::Written(FILE));
        assert_eq!(restored(&model, 0, &tokens), Ok(8));
    }
}

#[test]
fn what_is_not_changed_is_read() {
    // The control of the tests below.
    let Damaged { disk, tokens, file } = one_file();
    disk.change(&file, |bytes| bytes[100] ^= 0);
    disk.delete(index::FILE);
    let (held, lines) = logged(|| {
        let (_tier, model) = open(&disk, room_for(10)).unwrap();
        restored(&model, 0, &tokens)
    });
    assert_eq!(held, Ok(8));
    assert!(!lines.iter().any(|line| line.contains(&file)), "{lines:?}");
}

#[test]
fn a_flipped_bit_anywhere() {
    let Damaged { disk, file, .. } = one_file();
    let (length, text) = (disk.bytes(&file).len(), {
        let bytes = disk.bytes(&file);
        bytes[8..].iter().position(|&byte| byte == b' ').unwrap() + 8
    });
    let mut random = Random::new(3);
    let anywhere = (0..120).map(|_| random.below(length as u64) as usize).collect::<Vec<_>>();
    // Every byte of the header's text, some of the spaces behind it, of the rows, the tokens and the filling.
    let data = 16 * 1024;
    let edges = [0, 7, text, data - 1, data, data + 2 * 8 * 24 * 2 - 1, data + 8 * 96, length - 1];
    for at in (8..text).step_by(3).chain(anywhere).chain(edges) {
        let bit = 1 << (at % 8);
        is_noticed(|bytes| bytes[at] ^= bit);
    }
}

#[test]
fn truncated_grown_and_foreign_files() {
    for length in [0, 1, 8, 100, 16 * 1024 - 1, 16 * 1024, 20_000, FILE as usize - 1, FILE as usize + 1, 1 << 20] {
        is_noticed(|bytes| bytes.resize(length, 0));
    }
    let replace = |bytes: &mut Vec<u8>, from: &str, to: &str| {
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    };
    is_noticed(|bytes| replace(bytes, r#""version":"1""#, r#""version":"2""#));
    is_noticed(|bytes| replace(bytes, "omlx.kv", "other.x"));
    is_noticed(|bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
    is_noticed(|bytes| bytes[..8].copy_from_slice(&(1u64 << 40).to_le_bytes()));
    is_noticed(|bytes| *bytes = b"not a safetensors file".to_vec());
}

/// Writes the header's checksum again, as somebody would who knows the format.
fn sign(bytes: &mut [u8]) {
    let at = bytes.windows(10).position(|part| part == br#""header":""#).unwrap() + 10;
    let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[at..at + 64].fill(b'0');
    let sum = blake3::hash(&bytes[..head]).to_hex();
    bytes[at..at + 64].copy_from_slice(sum.as_bytes());
}

#[test]
fn headers_that_are_whole_but_say_something_else() {
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: &mut Vec<u8>| {
            assert_eq!(from.len(), to.len());
            let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
            bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
            sign(bytes);
        }
    };
    is_noticed_as("version", replace(r#""version":"1""#, r#""version":"2""#));
    is_noticed_as("another model", replace(r#""group":"0""#, r#""group":"1""#));
    is_noticed(replace(r#""start":"0""#, r#""start":"4""#));
    is_noticed(replace("0101010101", "0202020202"));
    is_noticed(replace(r#""block_tokens":"4""#, r#""block_tokens":"8""#));
    is_noticed(replace("layers.4.keys", "layers.5.keys"));
    is_noticed(replace("BF16", "FP16"));
    is_noticed(replace("[8,2,4]", "[8,4,2]"));
    is_noticed(replace(r#""codec":"exact""#, r#""codec":"bits8""#));
}

#[test]
fn damaged_headers_are_not_even_adopted() {
    let Damaged { disk, file, .. } = one_file();
    let cost = disk.bytes(&file).windows(9).position(|part| part == br#""cost":"1"#).unwrap() + 8;
    for (at, entries) in [(cost, 0), (FILE as usize - 1, 1)] {
        let disk = disk.copy();
        disk.change(&file, |bytes| bytes[at] ^= 1);
        disk.delete(index::FILE);
        let (tier, _) = open(&disk, room_for(10)).unwrap();
        // Data is only looked at when it is read.
        assert_eq!((tier.stats().sums.entries, disk.names().contains(&file)), (entries, entries == 1));
    }
}

#[test]
fn files_in_each_others_place() {
    let disk = Disk::new();
    let (tokens, others) = (conversation(1, 8), conversation(2, 8));
    let (tier, model) = open(&disk, room_for(10)).unwrap();
    store(&model, &tokens, 0).unwrap();
    store(&model, &others, 0).unwrap();
    let files: Vec<String> = disk.names().into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    let (first, second) = (disk.bytes(&files[0]), disk.bytes(&files[1]));
    disk.change(&files[0], |bytes| *bytes = second);
    disk.change(&files[1], |bytes| *bytes = first);
    let without_index = disk.copy();
    assert_eq!((restored(&model, 0, &tokens), restored(&model, 0, &others)), (Ok(0), Ok(0)));
    assert_eq!(tier.stats().sums.damaged, 2);
    without_index.delete(index::FILE);
    let (tier, model) = open(&without_index, room_for(10)).unwrap();
    assert_eq!((restored(&model, 0, &tokens), restored(&model, 0, &others)), (Ok(0), Ok(0)));
    assert_eq!(tier.stats().sums.entries, 0);
}

#[test]
fn another_model_or_layout() {
    let Damaged { disk, tokens, file } = one_file();
    let (tier, model) = open(&disk, room_for(10)).unwrap();
    let stranger = tier.model(id("small", 2)).unwrap();
    assert_eq!(stranger.find(0, &tokens, 0), [], "another fingerprint never sees it");
    assert_eq!(restored(&model, 0, &tokens), Ok(8));
    let wide = |layout: &RowLayout| {
        let mut layout = layout.clone();
        layout.layers[1].values = (2, 9);
        Arc::new(layout)
    };
    let mut other = id("small", 1);
    other.layouts[0] = wide(&layout());
    let other = tier.model(other).unwrap();
    let piece = other.find(0, &tokens, 0)[0];
    assert!(other.read(0, &piece, &tokens).is_none(), "the same fingerprint cannot have another layout");
    assert!(!disk.names().contains(&file));
    let error = other.store(0, &span(1, 0, &tokens, 0), rows(1, 0, &tokens, 0), 0.0).unwrap_err();
    assert_eq!(error.status(), crate::error::Status::InvalidArgument);
}

#[test]
fn a_damaged_index_is_written_again() {
    let (disk, limit) = (Disk::new(), room_for(20));
    let (tier, model) = open(&disk, limit).unwrap();
    for seed in 0..6 {
        store(&model, &conversation(seed, 8), 0).unwrap();
    }
    drop((tier, model));
    let length = disk.bytes(index::FILE).len();
    let check = |disk: &Disk, what: &str| {
        for _ in 0..2 {
            let (tier, model) = open(disk, limit).unwrap();
            for seed in 0..6 {
                assert_eq!(restored(&model, 0, &conversation(seed, 8)), Ok(8), "{what}");
            }
            assert_eq!((tier.stats().sums.entries, tier.stats().sums.damaged), (6, 0), "{what}");
        }
    };
    let mut random = Random::new(11);
    for round in 0..150 {
        let copy = disk.copy();
        let (at, bit) = (random.below(length as u64) as usize, 1 << random.below(8));
        copy.change(index::FILE, |bytes| match round % 3 {
            0 => bytes[at] ^= bit,
            1 => bytes.truncate(at),
            _ => bytes[at..].iter_mut().take(600).for_each(|byte| *byte = 0xff),
        });
        check(&copy, &format!("round {round} at {at}"));
    }
    for change in [(|bytes| bytes.clear()) as fn(&mut Vec<u8>), |bytes| bytes.fill(0), |bytes| bytes[0] ^= 1] {
        let copy = disk.copy();
        copy.change(index::FILE, change);
        check(&copy, "special");
    }
    disk.delete(index::FILE);
    check(&disk, "no index");
}
