//! The machine stops at every single operation of the disk: afterwards there are the exact rows, or none.

use std::collections::BTreeSet;

use super::disk::{Disk, Plan};
use super::*;
use crate::cache::ssd::index;

/// What a run had finished when the machine stopped.
#[derive(Default)]
struct Done {
    /// Conversations, each a span from its beginning, whose store had returned.
    stored: Vec<Vec<u32>>,
    /// Those that may have been evicted since.
    evicted: BTreeSet<Vec<u32>>,
}

struct Scenario {
    before: Disk,
    /// Spans that are on the disk before.
    old: Vec<Vec<u32>>,
    limit: u64,
    run: fn(&Disk, u64, &mut Done) -> Result<()>,
}

/// What another process finds, or what is wrong with it.
fn check(disk: &Disk, scenario: &Scenario, done: &Done) -> Result<(), String> {
    let (tier, model) = open(disk, scenario.limit).map_err(|error| error.to_string())?;
    for tokens in scenario.old.iter().chain(&done.stored) {
        let held = restored(&model, 0, tokens)?;
        if held != tokens.len() && !done.evicted.contains(tokens) {
            return Err(format!("{held} of {} stored tokens are there", tokens.len()));
        }
    }
    let stats = tier.stats().sums;
    if stats.damaged > 0 {
        return Err(format!("{} damaged files under the names of whole ones", stats.damaged));
    }
    let names = disk.names();
    if names.iter().any(|name| name.ends_with(".tmp")) || names.len() as u64 != stats.entries + 1 {
        return Err(format!("orphans: {names:?} for {} entries", stats.entries));
    }
    let used = disk.used().0;
    if used > scenario.limit - FOLDERS {
        return Err(format!("{used} bytes of {}", scenario.limit));
    }
    // It goes on working.
    let tokens = conversation(999, 8);
    match store(&model, &tokens, 0) {
        Ok(Stored::Written(_)) if restored(&model, 0, &tokens)? == 8 => {}
        outcome => return Err(format!("after the restart: {outcome:?}")),
    }
    drop((tier, model));
    let (_tier, model) = open(disk, scenario.limit).map_err(|error| error.to_string())?;
    if restored(&model, 0, &tokens)? != 8 {
        return Err("what was stored after the restart is gone".to_owned());
    }
    Ok(())
}

/// Stops the machine at every operation of the scenario, with several things left on the disk each time. Returns how many
/// operations there were, or the first thing that was wrong.
fn stop_everywhere(scenario: &Scenario, lies: bool) -> Result<u64, String> {
    for stop in 0.. {
        let disk = scenario.before.copy();
        disk.plan(Plan { stop: Some(stop), lies, ..Plan::default() });
        let mut done = Done::default();
        let outcome = (scenario.run)(&disk, scenario.limit, &mut done);
        let (finished, peak) = (disk.operations() <= stop, disk.used().1);
        if peak > scenario.limit - FOLDERS {
            return Err(format!("stop {stop}: {peak} bytes at once"));
        }
        if finished {
            outcome.map_err(|error| error.to_string())?;
        }
        for seed in 0..4 {
            let after = disk.after_stop(stop * 1000 + seed);
            check(&after, scenario, &done).map_err(|error| format!("stop {stop}, seed {seed}: {error}"))?;
        }
        if finished {
            return Ok(stop);
        }
    }
    unreachable!("the scenario ends")
}

fn prepared(count: u64, limit: u64) -> (Disk, Vec<Vec<u32>>) {
    let disk = Disk::new();
    let (_tier, model) = open(&disk, limit).unwrap();
    let old: Vec<Vec<u32>> = (0..count).map(|seed| conversation(seed, 8)).collect();
    for tokens in &old {
        assert_eq!(store(&model, tokens, 0).unwrap(), Stored::Written(FILE));
    }
    drop((_tier, model));
    disk.copy().plan(Plan::default());
    (disk, old)
}

fn stores() -> Scenario {
    let limit = room_for(40);
    let (before, old) = prepared(2, limit);
    let run = |disk: &Disk, limit, done: &mut Done| {
        let (tier, model) = open(disk, limit)?;
        let tokens = conversation(50, 21);
        for end in [8, 20, 21] {
            let start = [0, 8, 20][[8, 20, 21].iter().position(|&other| other == end).unwrap_or(0)];
            store(&model, &tokens[..end], start)?;
            done.stored.push(tokens[..end].to_vec());
        }
        // An end that makes a shorter one useless.
        let longer = [&tokens[..21], &[5, 6, 7]].concat();
        store(&model, &longer, 20)?;
        done.stored.push(longer);
        tier.sync()
    };
    Scenario { before, old, limit, run }
}

#[test]
fn a_stop_while_storing() {
    let operations = stop_everywhere(&stores(), false).unwrap();
    assert!(operations > 50, "{operations} operations");
}

#[test]
fn a_disk_that_lies_is_found_out() {
    let error = stop_everywhere(&stores(), true).unwrap_err();
    assert!(error.contains("stored tokens are there") || error.contains("damaged"), "{error}");
}

#[test]
fn a_stop_while_evicting() {
    // The limit of the second run has room for fewer files than there are.
    let (before, old) = prepared(12, room_for(40));
    let run = |disk: &Disk, limit, done: &mut Done| {
        done.evicted.extend((0..12).map(|seed| conversation(seed, 8)));
        let (tier, model) = open(disk, limit)?;
        for seed in 60..64 {
            let tokens = conversation(seed, 8);
            assert_eq!(store(&model, &tokens, 0)?, Stored::Written(FILE));
            done.stored.push(tokens);
        }
        assert!(tier.stats().sums.evicted >= 8, "the limit is smaller than what there was");
        done.evicted.extend(done.stored.iter().cloned());
        tier.clear(None);
        Ok(())
    };
    let limit = FOLDERS + tight_limit(8);
    let scenario = Scenario { before, old, limit, run };
    let operations = stop_everywhere(&scenario, false).unwrap();
    assert!(operations > 50, "{operations} operations");
}

/// Bytes for so many files and the index that a new tier has.
fn tight_limit(files: u64) -> u64 {
    let (disk, _) = prepared(1, room_for(40));
    let index = disk.bytes(index::FILE).len() as u64;
    2 * index + files * (FILE + 8 * 1024)
}

#[test]
fn a_stop_while_the_index_is_written_again() {
    let limit = room_for(40);
    let (before, old) = prepared(6, limit);
    before.change(index::FILE, |bytes| bytes[..4096].fill(0xa5));
    let run = |disk: &Disk, limit, done: &mut Done| {
        let (tier, model) = open(disk, limit)?;
        let tokens = conversation(70, 8);
        store(&model, &tokens, 0)?;
        done.stored.push(tokens);
        assert_eq!(tier.stats().sums.entries, 7);
        Ok(())
    };
    let scenario = Scenario { before, old, limit, run };
    let operations = stop_everywhere(&scenario, false).unwrap();
    assert!(operations > 30, "{operations} operations");
}
