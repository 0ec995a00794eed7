//! A process that is killed at any moment, on a real folder.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disk::Random;
use super::*;
use crate::cache::ssd::Folder;

const FOLDER: &str = "OMLX_KILL_FOLDER";
const SEED: &str = "OMLX_KILL_SEED";
const LIMIT_FILES: u64 = 24;

/// The child: writes, reads and evicts until it is killed. Does nothing in an ordinary run of the tests.
#[test]
fn child() {
    let (Ok(path), Ok(seed)) = (std::env::var(FOLDER), std::env::var(SEED)) else { return };
    let seed: u64 = seed.parse().unwrap();
    let tier = ColdTier::open(Arc::new(Folder::new(path).unwrap()), options(room_for(LIMIT_FILES))).unwrap();
    let model = tier.model(id("small", 1)).unwrap();
    let mut random = Random::new(seed);
    loop {
        let tokens = conversation(random.below(60), 20);
        for (start, end) in [(0, 8), (8, 16), (16, 18), (16, 20)] {
            store(&model, &tokens[..end], start).unwrap();
        }
        restored(&model, 0, &conversation(random.below(60), 20)).unwrap();
        if random.below(20) == 0 {
            tier.clear(None);
        }
    }
}

#[test]
fn killed_at_random() {
    let kills = std::env::var("OMLX_KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(20);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let limit = room_for(LIMIT_FILES);
    let mut random = Random::new(17);
    let module = module_path!().split_once("::").unwrap().1;
    let mut held = 0;
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::child")])
            .env(FOLDER, &path)
            .env(SEED, kill.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It has begun when it has the lock; then it lives a random while.
        let begun = Instant::now();
        while !path.join("segments").exists() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_micros(20_000 + random.below(130_000)));
        assert_eq!(child.try_wait().unwrap(), None, "the child works until it is killed");
        child.kill().unwrap();
        child.wait().unwrap();
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
}
