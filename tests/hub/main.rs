//! Downloads against a hub on this machine: what arrives and how, what an interruption leaves, what broken servers
//! cannot do, and the C functions.

mod arrive;
mod capi;
mod child;
mod faults;
mod refuse;
mod resume;
mod server;
mod tls;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use omlx::error::Result;
use omlx::hub::{Arrival, Download, DownloadRequest, Progress, Tuning};
use serde_json::{Value, json};
use tempfile::TempDir;

use server::{File, Hub, large, noise, small};

const REPO: &str = "org/model";

/// Blocks of the tests: small, so that small files have many.
const BLOCK: usize = 4 << 10;

/// Limits that do not keep a test waiting.
fn tuning() -> Tuning {
    Tuning {
        connect: Duration::from_secs(10),
        stall: Duration::from_secs(10),
        least: 1,
        backoff: Duration::from_millis(10),
        attempts: 4,
        block: BLOCK as u64,
        piece: 16 << 10,
    }
}

/// A hub and a folder of models.
struct Case {
    hub: Hub,
    folder: TempDir,
}

impl Case {
    /// With `files` as the main branch of [`REPO`].
    fn new(files: &[File]) -> Self {
        Self::of(Hub::new(), files)
    }

    fn of(hub: Hub, files: &[File]) -> Self {
        let case = Self { hub, folder: tempfile::tempdir().unwrap() };
        case.hub.commit(REPO, &["main"], files);
        case
    }

    fn request(&self, more: Value) -> Value {
        let mut request = json!({ "repo": REPO, "endpoint": self.hub.endpoint(), "offline": false });
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        request
    }

    fn start(&self, more: Value, tuning: Tuning) -> Download {
        let request = DownloadRequest::from_json(self.request(more).to_string().as_bytes()).unwrap();
        Download::start(request, self.folder.path(), tuning, |_| ()).unwrap()
    }

    fn tuned(&self, more: Value, tuning: Tuning) -> (Result<Arrival>, Progress) {
        let download = self.start(more, tuning);
        let outcome = download.wait(Some(Duration::from_secs(60)));
        (outcome, download.progress())
    }

    fn run(&self, more: Value) -> (Result<Arrival>, Progress) {
        self.tuned(more, tuning())
    }

    fn arrive(&self, more: Value) -> (Arrival, Progress) {
        let (outcome, progress) = self.run(more);
        (outcome.unwrap(), progress)
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join(REPO)
    }

    fn staging(&self) -> PathBuf {
        self.folder.path().join("org/.model.omlx-download")
    }

    /// Whether nothing of a download is to be seen, hidden things included.
    fn is_clean(&self) -> bool {
        std::fs::read_dir(self.folder.path()).unwrap().next().is_none()
    }
}

/// Files in `folder`, without the marker.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with(".omlx-download.json") {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// The content of `files`.
fn expected(files: &[File]) -> BTreeMap<String, Vec<u8>> {
    files.iter().map(|file| (file.path.clone(), file.content.clone())).collect()
}

/// A model of a config and weights of many blocks.
fn model() -> Vec<File> {
    vec![small("config.json", "{}"), large("model.safetensors", noise(1, 50 * BLOCK + 123))]
}

/// Waits until `condition` holds.
fn until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
