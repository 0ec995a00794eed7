//! Errors of the disk at every operation: none is a panic or a wrong row, and afterwards everything works again.

use std::sync::Arc;

use super::disk::{Disk, Plan};
use super::*;
use crate::cache::ssd::{Folder, index};
use crate::error::Status;

const NO_SPACE: i32 = 28;
const IO: i32 = 5;
const READ_ONLY: i32 = 30;

/// A day of work; what the disk refuses does not stop it.
fn work(disk: &Disk, limit: u64) -> Result<(), String> {
    let Ok((tier, model)) = open(disk, limit) else { return Ok(()) };
    for seed in 0..6 {
        let tokens = conversation(seed, 12);
        for (start, end) in [(0, 8), (8, 12)] {
            let _ = store(&model, &tokens[..end], start);
            restored(&model, 0, &tokens)?;
        }
    }
    tier.remember_hash(b"weights", [1; 32]);
    let _ = model.pin(&conversation(0, 12));
    let _ = tier.sync();
    tier.clear(None);
    let _ = store(&model, &conversation(7, 8), 0);
    restored(&model, 0, &conversation(7, 8))?;
    Ok(())
}

#[test]
fn errors_at_every_operation() {
    let index = {
        let disk = Disk::new();
        drop(open(&disk, room_for(10)).unwrap());
        disk.bytes(index::FILE).len() as u64
    };
    // Room for 8 of the 13 files.
    let limit = FOLDERS + 2 * index + 8 * (FILE + 8 * 1024);
    for (error, forever) in [(IO, false), (NO_SPACE, true), (READ_ONLY, true)] {
        for at in 0.. {
            let disk = Disk::new();
            disk.plan(Plan { fail: Some((at, error, forever)), ..Plan::default() });
            work(&disk, limit).unwrap_or_else(|wrong| panic!("error {error} at {at}: {wrong}"));
            let reached = disk.operations() > at;
            let (used, peak) = disk.used();
            assert!(peak <= limit - FOLDERS, "error {error} at {at}: {used} bytes, once {peak}");
            disk.plan(Plan::default());
            let (tier, model) = open(&disk, limit).unwrap_or_else(|wrong| panic!("error {error} at {at}: {wrong}"));
            for seed in 0..8 {
                restored(&model, 0, &conversation(seed, 12)).unwrap();
            }
            let tokens = conversation(50, 8);
            assert_eq!(store(&model, &tokens, 0).unwrap(), Stored::Written(FILE), "error {error} at {at}");
            assert_eq!(restored(&model, 0, &tokens), Ok(8));
            assert!(disk.names().iter().all(|name| !name.ends_with(".tmp")), "error {error} at {at}");
            let (entries, names) = (tier.stats().sums.entries, disk.names());
            assert_eq!(entries + 1, names.len() as u64, "error {error} at {at}: {names:?}");
            if !reached {
                assert!(at > 100);
                break;
            }
        }
    }
}

#[test]
fn the_same_tier_works_again_when_the_disk_does() {
    for at in (0..300).step_by(2) {
        let disk = Disk::new();
        let (tier, model) = open(&disk, room_for(20)).unwrap();
        disk.plan(Plan { fail: Some((at, IO, true)), ..Plan::default() });
        for seed in 0..6 {
            let _ = store(&model, &conversation(seed, 8), 0);
            let _ = tier.sync();
        }
        disk.plan(Plan::default());
        let tokens = conversation(50, 8);
        assert_eq!(store(&model, &tokens, 0).unwrap(), Stored::Written(FILE));
        tier.sync().unwrap();
        assert!(disk.names().iter().all(|name| !name.ends_with(".tmp")), "at {at}");
        for seed in 0..6 {
            let tokens = conversation(seed, 8);
            assert!(matches!(store(&model, &tokens, 0).unwrap(), Stored::Written(_) | Stored::Present), "at {at}");
            assert_eq!(restored(&model, 0, &tokens), Ok(8), "at {at}");
        }
        // The index has it all: nothing is read from headers.
        drop((tier, model));
        let records = crate::cache::ssd::index::Index::open(Arc::new(disk.clone()), Arc::default()).1;
        assert_eq!(records.map(|contents| contents.records.len()), Some(7), "at {at}");
    }
}

#[test]
fn a_full_disk_refuses_or_evicts() {
    let disk = Disk::new();
    let (tier, model) = open(&disk, room_for(100)).unwrap();
    for seed in 0..10 {
        store(&model, &conversation(seed, 8), 0).unwrap();
    }
    disk.set_capacity(disk.used().0);
    // The oldest go for the new one: a file is not quite enough for a file and what the folder may need for it.
    assert_eq!(store(&model, &conversation(20, 8), 0).unwrap(), Stored::Written(FILE));
    assert_eq!(tier.stats().sums.evicted, 2);
    // With a guard that cannot be kept nothing is written, and nothing thrown away for it.
    tier.set_limits(ColdOptions { min_free: 1 << 30, ..options(room_for(100)) });
    assert_eq!(store(&model, &conversation(21, 8), 0).unwrap(), Stored::NoRoom);
    let stats = tier.stats().sums;
    assert_eq!((stats.refused, stats.evicted), (1, 2));
    disk.set_capacity(2 << 30);
    assert_eq!(store(&model, &conversation(21, 8), 0).unwrap(), Stored::Written(FILE));
}

#[test]
fn a_folder_that_disappears() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let tier = ColdTier::open(Arc::new(Folder::new(&path).unwrap()), options(room_for(10))).unwrap();
    let model = tier.model(id("small", 1)).unwrap();
    let tokens = conversation(0, 8);
    store(&model, &tokens, 0).unwrap();
    std::fs::remove_dir_all(&path).unwrap();
    assert_eq!(restored(&model, 0, &tokens), Ok(0));
    let error = store(&model, &conversation(1, 8), 0).unwrap_err();
    assert!(matches!(error.status(), Status::Io | Status::NotFound), "{error}");
    assert_eq!(tier.clear(None), 0);
    let _ = tier.sync();
    drop((tier, model));
    let tier = ColdTier::open(Arc::new(Folder::new(&path).unwrap()), options(room_for(10))).unwrap();
    let model = tier.model(id("small", 1)).unwrap();
    assert_eq!(store(&model, &tokens, 0).unwrap(), Stored::Written(FILE));
    assert_eq!(restored(&model, 0, &tokens), Ok(8));
}

#[test]
fn a_read_only_disk_can_still_be_read() {
    let disk = Disk::new();
    let tokens = conversation(0, 8);
    let (tier, model) = open(&disk, room_for(10)).unwrap();
    store(&model, &tokens, 0).unwrap();
    drop((tier, model));
    // Errors only where something would change.
    disk.set_read_only(true);
    let (_tier, model) = open(&disk, room_for(10)).unwrap();
    assert_eq!(restored(&model, 0, &tokens), Ok(8));
    let error = store(&model, &conversation(1, 8), 0).unwrap_err();
    assert_eq!(error.status(), Status::Io);
    assert_eq!(restored(&model, 0, &tokens), Ok(8));
}
