//! What the process has beside the ledger: a number in the status and the metrics, and a warning where it is large.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use omlx::pool::{EnginePool, PoolOptions, Reading};
use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::folders::model;
use crate::{MB, Told, answer, options, until};

/// Footprints that were warned of, by whatever pool of this process.
static WARNED: Mutex<Vec<u64>> = Mutex::new(Vec::new());

struct Warnings;

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        if line.message == "memory outside the ledger" {
            WARNED.lock().unwrap().push(line.footprint);
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    footprint: u64,
}

impl Visit for Line {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "footprint" {
            self.footprint = value;
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}

#[test]
fn what_is_outside_the_ledger_is_told_and_warned_of_when_it_is_much() {
    tracing::subscriber::set_global_default(Warnings).unwrap();
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), "a", 1, 1);
    // No other pool of this process has such a footprint.
    let base = 7_000_000 * MB;
    let reading = Reading { total: 2 * base, available: base, footprint: base, ..Reading::default() };
    let reading = Arc::new(Mutex::new(reading));
    let options = PoolOptions { models_dir: Some(folder.path().to_owned()), ..options(2000 * MB) };
    let pool = EnginePool::open_on(options, Box::new(Told(Arc::clone(&reading)))).unwrap();
    answer(&pool, &json!({ "model": "a", "prompt": [1], "max_tokens": 1 })).unwrap();
    let used = pool.status()["memory"]["used"].as_u64().unwrap();
    let unaccounted = || pool.status()["memory"]["unaccounted"].as_u64().unwrap();
    let warned = || WARNED.lock().unwrap().iter().filter(|&&footprint| footprint >= base).count();
    // The footprint is as the ledger says, and so much more.
    let becomes = |more: u64| {
        reading.lock().unwrap().footprint = base + used + more;
        until(|| unaccounted() == more);
        let metrics: Value = serde_json::from_str(&pool.metrics_json()).unwrap();
        assert_eq!(metrics["pool"]["memory_unaccounted_bytes"], more);
        assert_eq!(metrics["pool"]["memory_footprint_bytes"], base + used + more);
        // Until the machine has been read once more.
        std::thread::sleep(Duration::from_millis(1200));
        warned()
    };
    assert_eq!(unaccounted(), 0, "what was there before the pool is not its own");
    assert_eq!(becomes(500 * MB), 0, "some is normal");
    assert_eq!(becomes(600 * MB), 1, "a warning, and only one");
    assert_eq!(becomes(100 * MB), 1);
    assert_eq!(becomes(700 * MB), 2, "it is back");
}
