//! A host that exits in the middle of a generation, without closing anything, ends normally.
//!
//! The test starts itself again as the host. With the exit hook taken out, the first host dies of a signal.

use std::path::Path;
use std::process::Command;

use omlx::engine::{Event, Request};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};

const HOST: &str = "OMLX_TEST_EXITING_HOST";
const RUNS: usize = 16;

#[test]
fn a_host_may_exit_at_any_time() {
    let program = std::env::current_exe().unwrap();
    for run in 0..RUNS {
        let status = Command::new(&program).args(["--exact", "the_host"]).env(HOST, run.to_string()).status().unwrap();
        assert_eq!(status.code(), Some(7), "host {run} ended with {status}");
    }
}

/// Does nothing unless it is started as the host.
#[test]
fn the_host() {
    let Ok(run) = std::env::var(HOST) else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/qwen3-4bit");
    let pool = EnginePool::open(PoolOptions { device: Some(Device::Cpu), ..Default::default() }).unwrap();
    pool.add_model(&folder, Some("model")).unwrap();
    let request = Request::from_json(br#"{"prompt":[1,2,3],"max_tokens":400}"#, false).unwrap();
    let state = pool.generate(request).unwrap();
    // Every host stops elsewhere in its answer.
    for _ in 0..=run.parse::<usize>().unwrap() {
        assert!(matches!(state.next(None), Ok(Event::Delta(_))));
    }
    std::process::exit(7);
}
