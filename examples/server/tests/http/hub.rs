//! The hub of the library's own tests, with the bundled model in it.

use std::time::Duration;

use server::{Fault, Hub, large, small};

use crate::harness::root;

#[allow(dead_code, reason = "the faults that it can have are for other tests")]
#[path = "../../../../tests/hub/server.rs"]
pub mod server;

/// The repository.
pub const REPO: &str = "org/tiny";

/// A hub that has the bundled model as [`REPO`].
pub fn with_the_bundled_model() -> Hub {
    let files = std::fs::read_dir(root().join("models/tiny-chat")).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let (name, content) = (path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
        if name.ends_with(".safetensors") { large(name, content) } else { small(name, content) }
    });
    let hub = Hub::new();
    hub.commit(REPO, &["main"], &files.collect::<Vec<_>>());
    hub
}

/// The same, but a byte of the head of a small file comes only so often: the others are seen to be there before.
pub fn slow(every: Duration) -> Hub {
    let hub = with_the_bundled_model();
    let is_small =
        |seen: &server::Seen| seen.path.starts_with("/api/resolve-cache") && seen.path.ends_with("README.md");
    hub.fault(1, Fault::DripHead(every), is_small);
    hub
}

/// A hub for another process, with `OMLX_TEST_HUB`: says where it is, and ends with its input. By itself it does nothing.
#[test]
fn serves_others() {
    if std::env::var_os("OMLX_TEST_HUB").is_none() {
        return;
    }
    let hub = slow(Duration::from_millis(30));
    println!("{}", hub.endpoint());
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}
