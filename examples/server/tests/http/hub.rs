//! The hub of the library's own tests, with the bundled model in it.

use server::{Hub, large, small};

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
