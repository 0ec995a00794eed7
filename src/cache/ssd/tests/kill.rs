//! A process that is killed at any moment, on a real folder.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disk::Random;
use super::*;
use crate::cache::ssd::Folder;

const FOLDER: &str = "OMLX_KILL_FOLDER";
const SEED: &str = "OMLX_KILL_SEED";
/// A file that gets a byte for each span that the child has stored.
const PROGRESS: &str = "OMLX_KILL_PROGRESS";
const LIMIT_FILES: u64 = 24;

/// No child takes longer to begin, on the slowest machine that this is meant for.
const PATIENCE: Duration = Duration::from_secs(120);

/// The child: writes, reads and evicts until it is killed. Does nothing in an ordinary run of the tests.
#[test]
fn child() {
    let (Ok(path), Ok(seed), Ok(progress)) = (std::env::var(FOLDER), std::env::var(SEED), std::env::var(PROGRESS))
    else {
        return;
    };
    let seed: u64 = seed.parse().unwrap();
    let tier = ColdTier::open(Arc::new(Folder::new(path).unwrap()), options(room_for(LIMIT_FILES))).unwrap();
    let model = tier.model(id("small", 1)).unwrap();
    let mut progress = OpenOptions::new().create(true).append(true).open(progress).unwrap();
    let mut random = Random::new(seed);
    loop {
        let tokens = conversation(random.below(60), 20);
        for (start, end) in [(0, 8), (8, 16), (16, 18), (16, 20)] {
            if matches!(store(&model, &tokens[..end], start).unwrap(), Stored::Written(_)) {
                progress.write_all(&[0]).unwrap();
            }
        }
        restored(&model, 0, &conversation(random.below(60), 20)).unwrap();
        if random.below(20) == 0 {
            tier.clear(None);
        }
    }
}

/// Spans that a child has stored so far.
fn stored(progress: &Path) -> u64 {
    fs::metadata(progress).map_or(0, |metadata| metadata.len())
}

/// What a process that ends in the middle of a write leaves behind.
fn unfinished(path: &Path) -> usize {
    files_in(path).iter().filter(|file| file.extension().is_some_and(|extension| extension == "tmp")).count()
}

#[test]
fn killed_at_random() {
    let kills = std::env::var("OMLX_KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(20);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let limit = room_for(LIMIT_FILES);
    let mut random = Random::new(17);
    let module = module_path!().split_once("::").unwrap().1;
    let (mut held, mut in_a_write) = (0, 0);
    for kill in 0..kills {
        let progress = folder.path().join(format!("progress-{kill}"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::child")])
            .env(FOLDER, &path)
            .env(SEED, kill.to_string())
            .env(PROGRESS, &progress)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It works when it has stored something in this run; then it lives a random while.
        let begun = Instant::now();
        while stored(&progress) == 0 && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(2));
        }
        let first = stored(&progress);
        std::thread::sleep(Duration::from_micros(random.below(150_000)));
        assert_eq!(child.try_wait().unwrap(), None, "kill {kill}: the child works until it is killed");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(first > 0, "kill {kill}: the child never wrote");
        in_a_write += usize::from(unfinished(&path) > 0);
        assert!(du(&path) <= limit, "kill {kill}: {} of {limit} bytes", du(&path));
        let storage = Arc::new(Folder::new(&path).unwrap());
        let tier = ColdTier::open(storage, options(limit)).unwrap();
        let model = tier.model(id("small", 1)).unwrap();
        for seed in 0..60 {
            held += restored(&model, 0, &conversation(seed, 20)).unwrap_or_else(|wrong| panic!("kill {kill}: {wrong}"));
        }
        let stats = tier.stats().sums;
        assert_eq!(stats.damaged, 0, "kill {kill}");
        let files = files_in(&path.join("segments"));
        assert_eq!(files.len() as u64, stats.entries, "kill {kill}: {files:?}");
        assert!(du(&path) <= limit);
    }
    assert!(held > 0, "nothing was ever found: the children did not write");
    // Most of a child's time goes to writes; the rest of them were killed between two.
    println!("{in_a_write} of {kills} kills hit a child in the middle of a write");
    assert!(in_a_write * 10 >= kills, "only {in_a_write} of {kills} kills hit a child in the middle of a write");
}
