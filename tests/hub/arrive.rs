//! What arrives, from which revision, and what becomes of what is there.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use omlx::error::Status;
use omlx::hub::State;
use serde_json::json;

use crate::server::{Fault, large, noise, small};
use crate::{BLOCK, Case, REPO, content, expected, model, until};

#[test]
fn a_model_arrives_whole() {
    let mut wanted = vec![
        small("1_Pooling/config.json", "{\"pooling\":1}"),
        small("README.md", ""),
        small("a name.txt", "with a space"),
        small("config.json", "{}"),
        large("model-1.safetensors", noise(1, 100 * BLOCK)),
        large("model-2.safetensors", noise(2, 33 * BLOCK + 1)),
        small("tokenizer.json", noise(3, 3 * BLOCK + 5)),
    ];
    let all = [&wanted[..], &[large("pytorch_model.bin", noise(4, 10)), small(".gitattributes", "x")]].concat();
    let case = Case::new(&all);
    case.hub.require("hf_secret");
    let (arrival, progress) = case.arrive(json!({ "token": "hf_secret" }));
    wanted.sort_by(|a, b| a.path.cmp(&b.path));
    assert_eq!(content(&case.model()), expected(&wanted));
    assert!(!case.staging().exists(), "nothing is left beside it");
    assert_eq!((arrival.id.as_str(), arrival.folder, arrival.changed), (REPO, case.model(), true));

    let bytes: u64 = wanted.iter().map(|file| file.content.len() as u64).sum();
    assert_eq!((progress.state, progress.retries, progress.bytes_kept), (State::Done, 0, 0));
    assert_eq!((progress.bytes_done, progress.bytes_total), (bytes, bytes));
    assert_eq!((progress.files_done, progress.files_total), (7, 7));

    let seen = case.hub.seen();
    let (network, hub): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.network);
    assert!(network.len() > 8, "large files come in pieces: {}", network.len());
    assert!(network.iter().all(|seen| seen.token.is_none()), "the token went to another server");
    assert!(hub.iter().all(|seen| seen.token.as_deref() == Some("hf_secret")));
    // The branch may move meanwhile: only the listing names it.
    let branch = hub.iter().filter(|seen| seen.path.contains("main")).count();
    assert_eq!((branch, hub[0].path.as_str()), (1, "/api/models/org/model/revision/main?blobs=true"));
    assert!(hub[1..].iter().all(|seen| seen.path.contains(&arrival.commit.clone().unwrap())));
    assert_eq!(case.hub.network_bytes(), 133 * BLOCK + 1, "nothing is fetched twice");
}

#[test]
fn connections_work_at_the_same_time() {
    let case = Case::new(&model());
    // Each of the first four hangs: were there fewer connections, the fourth would never come.
    case.hub.fault(4, Fault::Hang(Some(10)), |seen| seen.network);
    let download = case.start(json!({ "connections": 4 }), crate::tuning());
    until("four requests at once", || case.hub.seen().iter().filter(|seen| seen.network).count() == 4);
    download.cancel();
    let outcome = download.wait(Some(Duration::from_secs(10)));
    assert_eq!(outcome.unwrap_err().status(), Status::Cancelled);

    let case = Case::new(&model());
    case.hub.fault(1, Fault::Hang(Some(10)), |seen| seen.network);
    let download = case.start(json!({ "connections": 1 }), crate::tuning());
    until("a request", || case.hub.seen().iter().any(|seen| seen.network));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(case.hub.seen().iter().filter(|seen| seen.network).count(), 1, "one connection has one request");
    download.cancel();
}

#[test]
fn who_is_told_of_the_end_can_ask_for_it() {
    let case = Case::new(&model());
    let download = case.start(json!({}), crate::tuning());
    let (own, heard) = (download.clone(), Arc::new(Mutex::new(None)));
    let slot = Arc::clone(&heard);
    download.watch(Some(Box::new(move |progress| {
        if progress.state.is_over() {
            let outcome = own.wait(Some(Duration::ZERO));
            std::thread::sleep(Duration::from_millis(100));
            *slot.lock().unwrap() = Some(outcome);
        }
        true
    })));
    until("it is over", || download.outcome().is_some());
    let arrival = download.wait(Some(Duration::from_secs(30))).unwrap();
    let heard = heard.lock().unwrap().take().expect("a wait ends after the last call");
    assert_eq!(heard.unwrap(), arrival);
}

#[test]
fn a_function_that_panics_ends_its_download() {
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::Hang(None), |_| true);
    let download = case.start(json!({}), crate::tuning());
    download.watch(Some(Box::new(|_| panic!("of the host"))));
    let outcome = download.wait(Some(Duration::from_secs(5)));
    assert_eq!(outcome.unwrap_err().status(), Status::Cancelled);
}

#[test]
fn files_and_patterns_choose() {
    let case =
        Case::new(&[small("config.json", "{}"), small("a/b.txt", "b"), small("a/c/d.txt", "d"), small("x.bin", "x")]);
    let (_, progress) = case.arrive(json!({ "files": ["x.bin", "a/b.txt"] }));
    assert_eq!(content(&case.model()).into_keys().collect::<Vec<_>>(), ["a/b.txt", "x.bin"]);
    assert_eq!(progress.files_total, 2);
    // More of the same commit is added; what is there is not fetched again.
    case.hub.forget();
    let (_, progress) = case.arrive(json!({ "patterns": ["**.txt"] }));
    assert_eq!(content(&case.model()).into_keys().collect::<Vec<_>>(), ["a/b.txt", "a/c/d.txt", "x.bin"]);
    assert_eq!((progress.files_total, progress.bytes_kept, progress.bytes_done), (3, 2, 3));
    let files: Vec<_> = case.hub.seen().into_iter().filter(|seen| seen.path.contains("/resolve/")).collect();
    assert!(files.iter().all(|seen| seen.path.ends_with("a/c/d.txt")), "{files:?}");

    case.hub.forget();
    assert!(!case.arrive(json!({ "files": ["x.bin"] })).0.changed);
    assert!(!case.arrive(json!({ "patterns": ["**.txt"] })).0.changed);
    assert!(case.hub.seen().is_empty(), "what is there needs no hub");
    let error = case.run(json!({ "files": ["missing.txt"] })).0.unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("missing.txt"), "{error}");
    assert_eq!(case.run(json!({ "patterns": ["*.nothing"] })).0.unwrap_err().status(), Status::NotFound);
    assert_eq!(content(&case.model()).len(), 3);
}

#[test]
fn revisions_are_branches_tags_and_commits() {
    let case = Case::new(&[small("config.json", "main")]);
    let commit = case.hub.commit(REPO, &["v1", "refs/pr/1"], &[small("config.json", "other")]);
    for revision in ["v1", "refs/pr/1", &commit] {
        let (arrival, _) = case.arrive(json!({ "revision": revision }));
        assert_eq!(arrival.commit.as_ref(), Some(&commit));
        assert_eq!(content(&case.model())["config.json"], b"other");
        fs::remove_dir_all(case.model()).unwrap();
    }
    assert_ne!(case.arrive(json!({})).0.commit, Some(commit));
    let error = case.run(json!({ "revision": "no such" })).0.unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("revision"), "{error}");
}

#[test]
fn a_model_that_is_there_is_left_alone() {
    let case = Case::new(&model());
    case.arrive(json!({}));
    case.hub.commit(REPO, &["main"], &[small("config.json", "{\"new\":1}")]);
    case.hub.forget();
    let (arrival, _) = case.arrive(json!({}));
    assert!(!arrival.changed && case.hub.seen().is_empty());
    assert_eq!(content(&case.model()), expected(&model()));
    // The commit that is there, asked for by its name.
    assert!(!case.arrive(json!({ "revision": arrival.commit })).0.changed);
    assert!(case.hub.seen().is_empty());
    // What somebody removed comes back.
    fs::remove_file(case.model().join("config.json")).unwrap();
    assert!(case.arrive(json!({})).0.changed);
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(case.hub.network_bytes(), 0, "the weights were there");
}

#[test]
fn another_revision_replaces_the_whole() {
    let mut files = model();
    files.push(small("gone.json", "{}"));
    files.push(large("other.safetensors", noise(5, 9 * BLOCK)));
    let case = Case::new(&files);
    case.arrive(json!({}));
    // One file of it was edited, in a way that its length does not show.
    fs::write(case.model().join("other.safetensors"), noise(6, 9 * BLOCK)).unwrap();
    fs::write(case.model().join("own.txt"), "of the user").unwrap();
    files.retain(|file| file.path != "gone.json");
    files[0] = small("config.json", "{\"new\":1}");
    case.hub.commit(REPO, &["main"], &files);
    case.hub.forget();
    let (arrival, progress) = case.arrive(json!({ "revision": "main" }));
    assert!(arrival.changed);
    assert_eq!(content(&case.model()), expected(&files));
    assert!(!case.staging().exists());
    assert_eq!(case.hub.network_bytes(), 9 * BLOCK, "what has not changed is not fetched again");
    assert_eq!(progress.bytes_kept, (50 * BLOCK + 123) as u64);
    // Asked for again, there is nothing to do but to ask.
    case.hub.forget();
    assert!(!case.arrive(json!({ "revision": "main" })).0.changed);
    assert_eq!(case.hub.seen().len(), 1);
}

#[test]
fn a_failed_replacement_leaves_the_old_version() {
    let case = Case::new(&model());
    let commit = case.arrive(json!({})).0.commit;
    let files = [small("config.json", "{\"new\":1}"), large("model.safetensors", noise(2, 50 * BLOCK))];
    case.hub.commit(REPO, &["main"], &files);
    case.hub.fault(usize::MAX, Fault::Wrong, |seen| seen.network);
    assert_eq!(case.run(json!({ "revision": "main" })).0.unwrap_err().status(), Status::Checksum);
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(case.arrive(json!({})).0.commit, commit);
    case.hub.repair();
    case.arrive(json!({ "revision": "main" }));
    assert_eq!(content(&case.model()), expected(&files));
}

/// An attempt that was cancelled has linked a file, which then is edited where it lies.
#[test]
fn an_edited_file_does_not_arrive_through_a_link() {
    let mut files = model();
    let case = Case::new(&files);
    case.arrive(json!({}));
    files.push(large("second.safetensors", noise(7, 9 * BLOCK)));
    case.hub.commit(REPO, &["main"], &files);
    case.hub.fault(usize::MAX, Fault::Hang(Some(10)), |seen| seen.network);
    let download = case.start(json!({ "revision": "main" }), crate::tuning());
    until("the rest is fetched", || download.progress().state == State::Fetching && download.progress().bytes_kept > 0);
    download.cancel();
    let _ = download.wait(Some(Duration::from_secs(5)));
    assert!(case.staging().join("files/model.safetensors").exists());
    let mut file = fs::OpenOptions::new().write(true).open(case.model().join("model.safetensors")).unwrap();
    std::io::Write::write_all(&mut file, b"edited").unwrap();
    case.hub.repair();
    case.arrive(json!({ "revision": "main" }));
    assert_eq!(content(&case.model()), expected(&files));
}

#[test]
fn a_folder_of_the_user_is_not_touched() {
    let case = Case::new(&model());
    fs::create_dir_all(case.model()).unwrap();
    fs::write(case.model().join("config.json"), "own").unwrap();
    let (arrival, _) = case.arrive(json!({}));
    assert_eq!((arrival.changed, arrival.commit), (false, None));
    for more in [json!({ "revision": "main" }), json!({ "files": ["model.safetensors"] })] {
        let error = case.run(more).0.unwrap_err();
        assert_eq!(error.status(), Status::InvalidRequest, "{error}");
    }
    assert_eq!(content(&case.model())["config.json"], b"own");
    assert!(case.hub.seen().is_empty() && !case.staging().exists());
}

#[test]
fn offline_nothing_is_sent() {
    let case = Case::new(&model());
    let error = case.run(json!({ "offline": true })).0.unwrap_err();
    assert_eq!(error.status(), Status::Offline);
    assert!(case.hub.seen().is_empty() && case.is_clean());
    case.arrive(json!({}));
    case.hub.forget();
    assert!(!case.arrive(json!({ "offline": true })).0.changed, "what is there can be had");
    let error = case.run(json!({ "offline": true, "revision": "main" })).0.unwrap_err();
    assert_eq!(error.status(), Status::Offline);
    assert!(case.hub.seen().is_empty());
}

#[test]
fn one_download_of_a_model_at_a_time() {
    let case = Case::new(&model());
    case.hub.fault(4, Fault::Hang(Some(10)), |seen| seen.network);
    let first = case.start(json!({}), crate::tuning());
    until("the first download fetches", || case.hub.seen().iter().any(|seen| seen.network));
    let error = case.run(json!({})).0.unwrap_err();
    assert_eq!(error.status(), Status::Busy, "{error}");
    // Another model is not concerned.
    case.hub.commit("org/other", &["main"], &[small("config.json", "{}")]);
    case.arrive(json!({ "repo": "org/other" }));
    first.cancel();
    assert_eq!(first.wait(Some(Duration::from_secs(5))).unwrap_err().status(), Status::Cancelled);
    case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
}

#[test]
fn mirrors_that_list_names_alone_are_asked_for_each_file() {
    let case = Case::new(&model());
    let commit = case.hub.commit(REPO, &["main"], &model());
    let names: Vec<_> = model().iter().map(|file| json!({ "rfilename": file.path })).collect();
    case.hub.list(json!({ "sha": commit, "siblings": names }));
    case.hub.fault(1, Fault::Wrong, |seen| seen.network);
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
    // One for the weights; two for the config, which comes from the hub's own cache.
    let asked: Vec<_> = case.hub.seen().into_iter().filter(|seen| seen.method == "HEAD").collect();
    assert!(asked.len() == 3 && !asked.iter().any(|seen| seen.network), "{asked:?}");
    assert!(progress.retries > 0, "the checksum of the headers found what was wrong");
}
