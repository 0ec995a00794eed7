//! What is refused: repositories that are not there or not for us, servers that lie, disks that are too small.

use std::time::Duration;

use omlx::error::{Error, Status};
use serde_json::{Value, json};

use crate::server::{Fault, large, noise, small};
use crate::{BLOCK, Case, REPO, model};

/// The error that `fault` leads to, at requests that `matcher` takes; nothing must have arrived.
fn error(fault: Fault, network: bool) -> Error {
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, fault, move |seen| seen.network == network && !seen.path.contains("/api/"));
    let error = case.run(json!({})).0.unwrap_err();
    assert!(!case.model().exists(), "{error}");
    error
}

#[test]
fn what_is_not_there() {
    let case = Case::new(&model());
    let error = case.run(json!({ "repo": "org/nothing" })).0.unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("org/nothing"), "{error}");
    assert!(case.is_clean(), "nothing is left of it");
    assert_eq!(case.hub.seen().len(), 1, "trying again is useless");
    assert_eq!(case.run(json!({ "files": ["missing.txt"] })).0.unwrap_err().status(), Status::NotFound);
    assert!(case.is_clean(), "nor of that");
}

#[test]
fn what_is_not_for_us_says_what_to_do() {
    let case = Case::new(&model());
    case.hub.require("hf_right");
    let without = case.run(json!({})).0.unwrap_err();
    let wrong = case.run(json!({ "token": "hf_wrong" })).0.unwrap_err();
    for (error, hint) in [(&without, "HF_TOKEN"), (&wrong, "expired")] {
        assert_eq!(error.status(), Status::Unauthorized);
        assert!(error.message().contains(hint) && error.message().contains(REPO), "{error}");
        assert!(!error.message().contains("hf_w"), "the token is in {error}");
    }
    case.hub.fault(1, Fault::Status(403, &[("X-Error-Code", "GatedRepo")]), |_| true);
    let gated = case.run(json!({ "token": "hf_right" })).0.unwrap_err();
    assert_eq!(gated.status(), Status::Unauthorized);
    let page = format!("{}/{REPO}", case.hub.endpoint());
    assert!(gated.message().contains("terms") && gated.message().contains(&page), "{gated}");
    assert!(case.is_clean());
    case.arrive(json!({ "token": "hf_right" }));
}

#[test]
fn lengths_and_content_must_be_those_announced() {
    for (fault, network) in [
        (Fault::Wrong, true),
        (Fault::Longer(1), true),
        (Fault::Longer(-1), true),
        (Fault::Chunked(1), true),
        (Fault::OtherRange, true),
        (Fault::Status(416, &[]), true),
        (Fault::Header("X-Repo-Commit", "a".repeat(40)), false),
        (Fault::Header("X-Linked-Size", "5".into()), false),
        (Fault::Header("X-Linked-ETag", format!("\"{}\"", "a".repeat(64))), false),
    ] {
        let error = error(fault, network);
        assert_eq!(error.status(), Status::Checksum, "{error}");
        assert!(!error.message().contains("secret"), "a signature is in {error}");
    }
    // The same ways, and nothing wrong.
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::Chunked(0), |seen| seen.network);
    case.arrive(json!({}));
}

#[test]
fn other_content_for_small_files_is_refused() {
    let case = Case::new(&[small("config.json", "{}"), large("model.safetensors", noise(1, BLOCK))]);
    case.hub.fault(usize::MAX, Fault::Wrong, |seen| seen.path.contains("resolve-cache"));
    assert_eq!(case.run(json!({})).0.unwrap_err().status(), Status::Checksum);
    assert!(!case.model().exists());
}

#[test]
fn encodings_and_redirects_without_end() {
    let encoded = error(Fault::Header("Content-Encoding", "gzip".into()), true);
    assert_eq!(encoded.status(), Status::Network, "{encoded}");
    let around = error(Fault::Status(302, &[("Location", "/org/model/resolve/around")]), false);
    assert!(around.status() == Status::Network && around.message().contains("redirects"), "{around}");
    let nowhere = error(Fault::Status(302, &[]), false);
    assert!(nowhere.status() == Status::Network && nowhere.message().contains("nowhere"), "{nowhere}");
    let file = error(Fault::Status(302, &[("Location", "file:///etc/passwd")]), false);
    assert_eq!(file.status(), Status::Network);
}

/// A case whose hub lists `files`, whatever it has.
fn listing(files: Value) -> (Case, Error) {
    let case = Case::new(&[]);
    case.hub.list(json!({ "sha": "a".repeat(40), "siblings": files }));
    let error = case.run(json!({ "patterns": ["**"] })).0.unwrap_err();
    (case, error)
}

#[test]
fn files_stay_in_the_models_folder() {
    let entry = |path: &str| json!({ "rfilename": path, "size": 1, "blobId": "a".repeat(40) });
    for path in ["../evil.json", "/tmp/evil.json", "a/../../../evil.json", "a//b", "..", "", "a\\..\\b", "a\nb"] {
        let (case, error) = listing(json!([entry("config.json"), entry(path)]));
        assert_eq!(error.status(), Status::InvalidModel, "{path:?}: {error}");
        assert_eq!(case.hub.seen().len(), 1, "nothing is fetched");
        assert!(!case.model().exists());
    }
    let (_, error) = listing(json!([entry("config.json"), entry("config.json")]));
    assert_eq!(error.status(), Status::InvalidModel, "{error}");
    // The library's own file is not the hub's to write.
    let (_, error) = listing(json!([entry(".omlx-download.json")]));
    assert_eq!(error.status(), Status::InvalidModel, "{error}");
}

#[test]
fn a_disk_that_is_too_small() {
    let size = 1u64 << 60;
    let entry = |path: &str, size: u64| json!({ "rfilename": path, "size": size, "blobId": "a".repeat(40) });
    let (case, error) = listing(json!([entry("model.safetensors", size)]));
    assert_eq!(error.status(), Status::NoSpace);
    let numbers: Vec<u64> = error.message().split(' ').filter_map(|word| word.parse().ok()).collect();
    assert!(numbers.len() == 2 && numbers[0] >= size && numbers[1] < size && numbers[1] > 0, "{error}");
    assert!(case.is_clean());
    let (_, error) = listing(json!([entry("a", u64::MAX), entry("b", 2)]));
    assert_eq!(error.status(), Status::Checksum, "{error}");
}

#[test]
fn what_is_not_a_hub() {
    for listing in [json!([]), json!({ "sha": "main" }), json!({ "siblings": [] }), json!("text")] {
        let case = Case::new(&[]);
        case.hub.list(listing);
        assert_eq!(case.run(json!({})).0.unwrap_err().status(), Status::Network);
        assert!(case.is_clean());
    }
    let case = Case::new(&[]);
    case.hub.list(json!({ "sha": "a".repeat(40), "siblings": [] }));
    assert_eq!(case.run(json!({ "revision": "b".repeat(40) })).0.unwrap_err().status(), Status::Checksum);
}

#[test]
fn a_folder_that_cannot_be_written() {
    let case = Case::new(&model());
    std::fs::write(case.folder.path().join("org"), "a file").unwrap();
    let error = case.run(json!({})).0.unwrap_err();
    assert_eq!(error.status(), Status::Io, "{error}");
    assert!(error.message().contains("org"), "{error}");
    let download = case.start(json!({}), crate::tuning());
    assert!(download.wait(Some(Duration::from_secs(10))).is_err());
}
