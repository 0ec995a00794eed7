//! The folder stays within its limit, and what goes first is what is worth least.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::disk::{Disk, Random};
use super::*;
use crate::cache::ssd::{Folder, index};

/// The limit for so many files, and not one more, with an index that has just been made.
fn tight(files: u64) -> u64 {
    let disk = Disk::new();
    drop(open(&disk, room_for(1)).unwrap());
    FOLDERS + (2 * disk.bytes(index::FILE).len() as u64).max((256 + 32) * 1024) + files * (FILE + 8 * 1024)
}

#[test]
fn ten_times_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let limit = tight(30);
    let tier = ColdTier::open(Arc::new(Folder::new(&path).unwrap()), options(limit)).unwrap();
    let model = tier.model(id("small", 1)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Between two stores as well as after each.
        let watch = scope.spawn(|| {
            let mut peak = 0;
            while !stop.load(Ordering::Relaxed) {
                peak = peak.max(du(&path));
            }
            peak
        });
        let mut written = 0;
        for seed in 0.. {
            let tokens = conversation(seed, 16);
            for start in [0, 8] {
                match store(&model, &tokens[..start + 8], start).unwrap() {
                    Stored::Written(bytes) => written += bytes,
                    outcome => panic!("{outcome:?}"),
                }
                assert!(du(&path) <= limit, "{} of {limit}", du(&path));
            }
            assert_eq!(restored(&model, 0, &tokens), Ok(16));
            if written > 10 * 30 * FILE {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let peak = watch.join().unwrap();
        assert!(peak <= limit && peak > 20 * FILE, "{peak} of {limit}");
    });
    let stats = tier.stats().sums;
    assert!(stats.evicted > 250 && stats.entries >= 20, "{stats:?}");
}

#[test]
fn leaves_go_first_and_old_ones_before_new_ones() {
    let disk = Disk::new();
    let (tier, model) = open(&disk, tight(12)).unwrap();
    let long = conversation(0, 24);
    for start in [0, 8, 16] {
        store(&model, &long[..start + 8], start).unwrap();
    }
    // Used again and again, its beginning stays although it is the oldest, and it is never cut in the middle.
    let mut lengths = Vec::new();
    for seed in 1..40 {
        store(&model, &conversation(seed, 8), 0).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        lengths.push(restored(&model, 0, &long).unwrap());
    }
    assert_eq!(lengths, vec![24; 39]);
    assert_eq!(restored(&model, 0, &conversation(1, 8)), Ok(0));
    assert_eq!(restored(&model, 0, &conversation(39, 8)), Ok(8));
    // Without use it goes from its end.
    lengths.clear();
    for seed in 40..80 {
        store(&model, &conversation(seed, 8), 0).unwrap();
        lengths.push(model.find(0, &long, 0).iter().map(|found| found.piece.tokens).sum());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    lengths.dedup();
    assert_eq!(lengths, [24, 16, 8, 0]);
    assert!(tier.stats().sums.evicted > 60);
}

#[test]
fn last_uses_survive_a_restart() {
    let disk = Disk::new();
    let limit = tight(8);
    let wait = || std::thread::sleep(std::time::Duration::from_millis(3));
    {
        let (_tier, model) = open(&disk, limit).unwrap();
        for seed in 0..6 {
            store(&model, &conversation(seed, 8), 0).unwrap();
            wait();
        }
        assert_eq!(restored(&model, 0, &conversation(0, 8)), Ok(8));
    }
    let (tier, model) = open(&disk, limit).unwrap();
    for seed in 10.. {
        wait();
        store(&model, &conversation(seed, 8), 0).unwrap();
        if tier.stats().sums.evicted == 3 {
            break;
        }
    }
    let held = |seed| model.find(0, &conversation(seed, 8), 0).len();
    assert_eq!([0, 1, 2, 3, 4].map(held), [1, 0, 0, 0, 1]);
}

#[test]
fn what_is_dear_to_compute_stays_longer() {
    let disk = Disk::new();
    let (_tier, model) = open(&disk, tight(8)).unwrap();
    let dear = conversation(0, 8);
    // 3 ms for 32 KiB are 92 s for a gigabyte: an hour and a half.
    model.store(0, &span(1, 0, &dear, 0), rows(1, 0, &dear, 0), 3e-3).unwrap();
    for seed in 1..30 {
        let tokens = conversation(seed, 8);
        model.store(0, &span(1, 0, &tokens, 0), rows(1, 0, &tokens, 0), 1e-6).unwrap();
    }
    assert_eq!((restored(&model, 0, &dear), restored(&model, 0, &conversation(1, 8))), (Ok(8), Ok(0)));
}

#[test]
fn a_prefix_longer_than_the_limit_keeps_its_beginning() {
    let disk = Disk::new();
    let (_tier, model) = open(&disk, tight(6)).unwrap();
    let tokens = conversation(0, 200);
    let outcomes: Vec<Stored> =
        (0..200).step_by(8).map(|start| store(&model, &tokens[..start + 8], start).unwrap()).collect();
    let written = outcomes.iter().take_while(|&&outcome| outcome == Stored::Written(FILE)).count();
    assert!((4..16).contains(&written), "{outcomes:?}");
    assert!(outcomes[written..].iter().all(|&outcome| outcome == Stored::NoRoom), "{outcomes:?}");
    assert_eq!(restored(&model, 0, &tokens), Ok(8 * written));
}

#[test]
fn quotas_limits_and_clearing() {
    let disk = Disk::new();
    let (tier, model) = open(&disk, room_for(40)).unwrap();
    let other = tier.model(id("other", 2)).unwrap();
    tier.set_limits(ColdOptions { model_quota: Some(5 * (FILE + 8 * 1024)), ..options(room_for(40)) });
    for seed in 0..12 {
        let tokens = conversation(seed, 8);
        store(&model, &tokens, 0).unwrap();
        if seed < 3 {
            other.store(0, &span(2, 0, &tokens, 0), rows(2, 0, &tokens, 0), 0.0).unwrap();
        }
    }
    let entries = |tier: &ColdTier, name: &str| tier.stats().models[name].entries;
    assert_eq!((entries(&tier, "small"), entries(&tier, "other")), (5, 3));
    tier.set_limits(ColdOptions { model_quota: Some(2 * (FILE + 8 * 1024)), ..options(room_for(40)) });
    assert_eq!((entries(&tier, "small"), entries(&tier, "other")), (2, 2));
    assert_eq!(tier.clear(Some("nobody")), 0);
    assert_eq!(tier.clear(Some("other")), 2 * FILE);
    assert_eq!((entries(&tier, "small"), entries(&tier, "other")), (2, 0));
    // Smaller than its own index: everything goes, nothing is written, nothing breaks.
    tier.set_limits(options(1));
    assert_eq!(entries(&tier, "small"), 0);
    assert_eq!(store(&model, &conversation(50, 8), 0).unwrap(), Stored::NoRoom);
    tier.set_limits(options(room_for(40)));
    assert_eq!(store(&model, &conversation(50, 8), 0).unwrap(), Stored::Written(FILE));
    assert_eq!(tier.clear(None), FILE);
    assert_eq!(disk.names(), [index::FILE]);
}

#[test]
fn pinned_prefixes_stay() {
    let disk = Disk::new();
    let limit = tight(10);
    let (tier, model) = open(&disk, limit).unwrap();
    let pinned = conversation(0, 18);
    // Before and after what it pins is stored.
    store(&model, &pinned[..8], 0).unwrap();
    model.pin(&pinned).unwrap();
    store(&model, &pinned[..16], 8).unwrap();
    store(&model, &pinned, 16).unwrap();
    // It goes on from the middle of the pinned part, but is not itself pinned.
    let fork = [&pinned[..8], &[1, 2, 3, 4]].concat();
    store(&model, &fork, 8).unwrap();
    drop((tier, model));
    let (tier, model) = open(&disk, limit).unwrap();
    assert_eq!(model.pins(), [Arc::from(&pinned[..])]);
    for seed in 1..40 {
        assert_eq!(store(&model, &conversation(seed, 8), 0).unwrap(), Stored::Written(FILE));
    }
    assert_eq!((restored(&model, 0, &pinned), restored(&model, 0, &fork)), (Ok(18), Ok(8)));
    tier.clear(None);
    assert_eq!((restored(&model, 0, &pinned), tier.stats().sums.entries), (Ok(18), 3));
    model.unpin(&pinned).unwrap();
    assert!(model.pins().is_empty());
    assert_eq!(tier.clear(None), 3 * FILE);
}

/// The pins of a model that is gone go with its files, those of others stay.
#[test]
fn a_model_that_is_gone_is_forgotten_with_its_pins() {
    let disk = Disk::new();
    let tokens = conversation(0, 8);
    {
        let (tier, model) = open(&disk, room_for(20)).unwrap();
        let other = tier.model(id("other", 2)).unwrap();
        store(&model, &tokens, 0).unwrap();
        other.store(0, &span(2, 0, &tokens, 0), rows(2, 0, &tokens, 0), 0.0).unwrap();
        model.pin(&tokens).unwrap();
        other.pin(&tokens).unwrap();
        assert_eq!((tier.clear(Some("small")), tier.forget("nobody")), (0, 0));
        assert_eq!((tier.forget("small"), tier.knows("small"), tier.knows("nobody")), (FILE, true, false));
        assert_eq!((model.pins().len(), other.pins().len()), (0, 1));
    }
    let (tier, model) = open(&disk, room_for(20)).unwrap();
    assert_eq!((model.pins().len(), tier.stats().sums.entries, tier.clear(None)), (0, 1, 0));
    // Names are longer than what files keep of them.
    let long = "long/".repeat(100);
    let third = tier.model(id(&long, 3)).unwrap();
    third.store(0, &span(3, 0, &tokens, 0), rows(3, 0, &tokens, 0), 0.0).unwrap();
    assert_eq!((tier.knows(&long), tier.clear(Some(&long))), (true, FILE));
}

#[test]
fn many_threads_keep_the_limit() {
    let disk = Disk::new();
    let limit = tight(12);
    let (tier, model) = open(&disk, limit).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let model = model.clone();
            scope.spawn(move || {
                let mut random = Random::new(thread);
                for _ in 0..60 {
                    let tokens = conversation(random.below(40), 16);
                    let start = if random.coin() { 0 } else { 8 };
                    store(&model, &tokens[..start + 8], start).unwrap();
                    restored(&model, 0, &conversation(random.below(40), 16)).unwrap();
                }
            });
        }
    });
    // Those being written included.
    let (_, peak) = disk.used();
    let index = disk.bytes(index::FILE).len() as u64;
    assert!(peak <= 12 * FILE + index, "{peak} bytes at once, {index} of them the index");
    let stats = tier.stats().sums;
    assert_eq!((stats.damaged, stats.entries as usize + 1), (0, disk.names().len()));
}

#[test]
fn an_index_that_is_mostly_empty_is_written_again() {
    let disk = Disk::new();
    let limit = FOLDERS + (64 << 20);
    let (tier, model) = open(&disk, limit).unwrap();
    model.pin(&conversation(5000, 8)).unwrap();
    tier.remember_hash(b"key", [3; 32]);
    let kept = conversation(0, 8);
    for seed in 0..1200 {
        store(&model, &conversation(seed, 80), 0).unwrap();
    }
    let (_, peak) = disk.used();
    assert!(peak <= limit - FOLDERS);
    tier.sync().unwrap();
    let full = tier.stats().index_bytes;
    tier.clear(None);
    store(&model, &kept, 0).unwrap();
    tier.sync().unwrap();
    let stats = tier.stats();
    assert!(full > 1 << 20 && stats.index_bytes <= 1 << 20, "{full} bytes, then {}", stats.index_bytes);
    assert_eq!(stats.index_bytes, disk.bytes(index::FILE).len() as u64);
    drop((tier, model));
    let (tier, model) = open(&disk, limit).unwrap();
    assert_eq!((restored(&model, 0, &kept), model.pins().len()), (Ok(8), 1));
    assert_eq!(tier.remembered_hash(b"key"), Some([3; 32]));
}
