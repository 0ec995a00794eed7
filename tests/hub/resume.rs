//! What an interruption leaves, and what the next attempt makes of it.

use std::fs;
use std::time::Duration;

use omlx::error::Status;
use serde_json::json;

use crate::server::{Fault, large, noise, small};
use crate::{BLOCK, Case, REPO, child, content, expected, model, tuning, until};

/// Lets a download come some way: each of its connections stops in the middle of its piece.
fn interrupt(case: &Case) {
    case.hub.fault(usize::MAX, Fault::Hang(Some(2 * BLOCK + 100)), |seen| seen.network);
    let download = case.start(json!({ "connections": 3 }), tuning());
    until("it comes some way", || download.progress().bytes_done >= (6 * BLOCK + 300) as u64);
    download.cancel();
    assert_eq!(download.wait(Some(Duration::from_secs(5))).unwrap_err().status(), Status::Cancelled);
    assert!(!case.model().exists(), "a part of a model looks like one");
    case.hub.repair();
    case.hub.forget();
}

#[test]
fn a_cancelled_download_goes_on() {
    let case = Case::new(&model());
    interrupt(&case);
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
    // Six whole blocks, and the config.
    assert_eq!(progress.bytes_kept as usize, 6 * BLOCK + 2);
    assert_eq!(case.hub.network_bytes(), 44 * BLOCK + 123);
    assert!(!case.hub.seen().iter().any(|seen| seen.path.ends_with("config.json")), "it was there");
}

#[test]
fn other_content_starts_over() {
    let case = Case::new(&model());
    interrupt(&case);
    let files = [small("config.json", "{}"), large("model.safetensors", noise(9, 50 * BLOCK + 123))];
    case.hub.commit(REPO, &["main"], &files);
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&files));
    assert_eq!(progress.bytes_kept, 2, "the config alone is the same");
    assert_eq!(case.hub.network_bytes(), 50 * BLOCK + 123);
    assert_eq!(progress.retries, 0);
}

#[test]
fn what_a_loss_of_power_spoils_is_found() {
    let case = Case::new(&model());
    interrupt(&case);
    // The journal lists blocks that never reached the disk.
    let path = case.staging().join("files/model.safetensors");
    fs::write(&path, vec![0; fs::metadata(&path).unwrap().len() as usize]).unwrap();
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(progress.retries, 1);
    assert_eq!(progress.bytes_done, progress.bytes_total);
    assert_eq!(case.hub.network_bytes(), 44 * BLOCK + 50 * BLOCK + 2 * 123);
}

#[test]
fn leftovers_of_another_selection_do_not_arrive() {
    let case = Case::new(&[model(), vec![small("extra.bin", "x"), small("more/extra.bin", "x")]].concat());
    case.hub.fault(usize::MAX, Fault::Hang(Some(10)), |seen| seen.network);
    let download = case.start(json!({ "patterns": ["**"] }), tuning());
    until("the small files are there", || download.progress().files_done == 3);
    download.cancel();
    let _ = download.wait(Some(Duration::from_secs(5)));
    assert!(case.staging().join("files/extra.bin").exists());
    case.hub.repair();
    case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
    assert!(!case.model().join("more").exists());
}

#[test]
fn a_killed_process_leaves_what_another_goes_on_with() {
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::Hang(Some(2 * BLOCK + 100)), |seen| seen.network);
    let mut child = child::start(&case, &[json!({ "connections": 3 })], &[]);
    let journal = case.staging().join("journals/model.safetensors.journal");
    let lines = || fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    until("six blocks are noted", || lines() == 7);
    // Held by another process.
    assert_eq!(case.run(json!({})).0.unwrap_err().status(), Status::Busy);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!case.model().exists());
    case.hub.repair();
    case.hub.forget();
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(progress.bytes_kept as usize, 6 * BLOCK + 2);
    assert_eq!(case.hub.network_bytes(), 44 * BLOCK + 123);
}

/// At any time there is one version or the other, and the next download goes well.
#[test]
fn kills_leave_a_whole_model() {
    let versions = [1, 2].map(|n| {
        let config = small("config.json", format!("{{\"version\":{n}}}"));
        vec![config, small("same.json", "{}"), large("model.safetensors", noise(n, 30 * BLOCK))]
    });
    let case = Case::new(&versions[0]);
    let commits = versions.each_ref().map(|files| case.hub.commit(REPO, &[], files));
    let requests: Vec<_> = (0..200).map(|n| json!({ "revision": commits[n % 2] })).collect();
    case.arrive(requests[1].clone());
    let mut interrupted = 0;
    for round in 0..20 {
        let mut child = child::start(&case, &requests, &[]);
        // Each round at another moment, the later ones after some replacements.
        until("a download begins", || case.staging().exists());
        std::thread::sleep(Duration::from_millis(11 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = content(&case.model());
        let version = versions.iter().position(|files| expected(files) == found).expect("a whole version");
        interrupted += usize::from(case.staging().exists());
        let marker = fs::read_to_string(case.model().join(".omlx-download.json")).unwrap();
        assert!(marker.contains(&commits[version]));
        let other = 1 - version;
        case.arrive(json!({ "revision": commits[other] }));
        assert_eq!(content(&case.model()), expected(&versions[other]));
        assert!(!case.staging().exists());
    }
    assert!(interrupted > 0, "none was killed in the middle");
}

/// Between the two halves of a replacement, where folders cannot be exchanged at once.
#[test]
fn an_old_version_comes_back_after_a_crash() {
    let case = Case::new(&model());
    case.arrive(json!({}));
    fs::create_dir(case.staging()).unwrap();
    fs::rename(case.model(), case.staging().join("old")).unwrap();
    case.hub.forget();
    assert!(!case.arrive(json!({})).0.changed);
    assert_eq!(content(&case.model()), expected(&model()));
    assert!(case.hub.seen().is_empty() && !case.staging().exists());
}
