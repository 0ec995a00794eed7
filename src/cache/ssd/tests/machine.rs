//! Any sequence of operations against a plain map of what was stored.

use std::collections::HashSet;

use proptest::prelude::*;

use super::disk::Disk;
use super::*;

#[derive(Debug, Clone)]
enum Step {
    /// Stores the tokens between two lengths of one of a few conversations that share beginnings.
    Store {
        group: usize,
        seed: u64,
        start: usize,
        end: usize,
    },
    /// Restores as much as there is.
    Restore {
        group: usize,
        seed: u64,
        length: usize,
    },
    /// Closes and opens the tier, perhaps without its index.
    Reopen {
        index: bool,
    },
    /// Damages a file.
    Damage {
        which: usize,
        at: usize,
    },
    Clear,
    Pin {
        seed: u64,
        length: usize,
    },
    Unpin {
        seed: u64,
        length: usize,
    },
}

/// Conversations 0 to 3 share their first 8 tokens, 0 and 1 their first 14.
fn tokens(seed: u64, length: usize) -> Vec<u32> {
    let mut all = conversation(0, 32);
    if seed > 0 {
        let shared = if seed == 1 { 14 } else { 8 };
        all.splice(shared.., conversation(seed, 32 - shared));
    }
    all.truncate(length);
    all
}

fn step() -> impl Strategy<Value = Step> {
    let sequence = (0..2usize, 0..4u64, 0..8usize, 1..=32usize);
    prop_oneof![
        8 => sequence.clone().prop_map(|(group, seed, start, length)| {
            let start = (start * BLOCK).min((length - 1) / BLOCK * BLOCK);
            // Whole blocks, or fewer tokens than one.
            let whole = (length - start) / BLOCK * BLOCK;
            let end = if whole > 0 { start + whole } else { length };
            Step::Store { group, seed, start, end }
        }),
        4 => sequence.prop_map(|(group, seed, _, length)| Step::Restore { group, seed, length }),
        1 => any::<bool>().prop_map(|index| Step::Reopen { index }),
        1 => (any::<usize>(), 0..FILE as usize).prop_map(|(which, at)| Step::Damage { which, at }),
        1 => Just(Step::Clear),
        1 => (0..4u64, 1..=32usize).prop_map(|(seed, length)| Step::Pin { seed, length }),
        1 => (0..4u64, 1..=32usize).prop_map(|(seed, length)| Step::Unpin { seed, length }),
    ]
}

/// All tokens up to the end of every block that was ever stored, by group.
type Model = HashSet<(usize, Vec<u32>)>;

/// How many tokens a tier that loses nothing would restore.
fn expected(model: &Model, group: usize, wanted: &[u32]) -> usize {
    let common = |stored: &[u32]| stored.iter().zip(wanted).take_while(|(a, b)| a == b).count();
    // Each block needs all before it; the last one may be used in part.
    let mut held = 0;
    loop {
        let blocks = model.iter().filter(|(of, stored)| {
            *of == group && stored.len() > held && stored.len() <= held + BLOCK && common(stored) >= held
        });
        let best = blocks.map(|(_, stored)| common(stored)).max().unwrap_or(held);
        if best < held + BLOCK {
            return best.max(held);
        }
        held = best;
    }
}

fn run(steps: &[Step], limit: u64, lossless: bool) -> Result<(), TestCaseError> {
    let disk = Disk::new();
    let (mut tier, mut model) = open(&disk, limit).unwrap();
    let mut stored = Model::new();
    let mut damaged = false;
    for step in steps {
        match *step {
            Step::Store { group, seed, start, end } => {
                let all = tokens(seed, end);
                let outcome =
                    model.store(group, &span(1, group, &all, start), rows(1, group, &all, start), 0.0).unwrap();
                if outcome != Stored::NoRoom {
                    let ends = (start..end).step_by(BLOCK).map(|block| (block + BLOCK).min(end));
                    stored.extend(ends.map(|end| (group, all[..end].to_vec())));
                }
                prop_assert!(!lossless || outcome != Stored::NoRoom);
            }
            Step::Restore { group, seed, length } => {
                let all = tokens(seed, length);
                let held = restored(&model, group, &all).map_err(TestCaseError::fail)?;
                let most = expected(&stored, group, &all);
                prop_assert!(held <= most, "{held} of {most}");
                prop_assert!(!lossless || held == most, "{held} of {most}");
            }
            Step::Reopen { index } => {
                drop((tier, model));
                if !index {
                    disk.delete(crate::cache::ssd::index::FILE);
                }
                (tier, model) = open(&disk, limit).unwrap();
            }
            Step::Damage { which, at } if !lossless => {
                let files: Vec<_> = disk.names().into_iter().filter(|name| name.ends_with(".safetensors")).collect();
                if !files.is_empty() {
                    disk.change(&files[which % files.len()], |bytes| bytes[at] ^= 0x10);
                    damaged = true;
                }
            }
            Step::Clear if !lossless => drop(tier.clear(None)),
            Step::Pin { seed, length } => model.pin(&tokens(seed, length)).unwrap(),
            Step::Unpin { seed, length } => model.unpin(&tokens(seed, length)).unwrap(),
            Step::Damage { .. } | Step::Clear => {}
        }
        let (_, peak) = disk.used();
        prop_assert!(peak <= limit - FOLDERS, "{peak} of {limit}");
        let stats = tier.stats().sums;
        prop_assert!(damaged || stats.damaged == 0);
        prop_assert_eq!(stats.entries as usize + 1, disk.names().len());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn with_room_nothing_is_lost(steps in prop::collection::vec(step(), 1..60)) {
        run(&steps, room_for(200), true)?;
    }

    #[test]
    fn without_room_nothing_is_wrong(steps in prop::collection::vec(step(), 1..80)) {
        // An empty index takes the first of the two megabytes.
        run(&steps, FOLDERS + (1 << 20) + (256 << 10) + 6 * (FILE + 8 * 1024), false)?;
    }
}
