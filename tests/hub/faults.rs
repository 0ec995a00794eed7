//! Servers and connections that fail for a while: the download goes on, or ends with the cause.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use omlx::error::Status;
use omlx::hub::{State, Tuning};
use serde_json::json;

use crate::server::{Fault, Seen, large, noise, small};
use crate::{BLOCK, Case, content, expected, model, tuning, until};

#[test]
fn passing_failures_are_repeated() {
    for fault in [
        Fault::Status(500, &[]),
        Fault::Status(503, &[]),
        Fault::Status(408, &[]),
        Fault::Status(429, &[]),
        Fault::Close,
        Fault::Cut(100),
    ] {
        let case = Case::new(&model());
        // Each of the three servers' roles once: the listing, a small file, a large one.
        case.hub.fault(1, fault.clone(), |seen| seen.path.contains("/api/models/"));
        case.hub.fault(1, fault.clone(), |seen| seen.path.ends_with("config.json"));
        case.hub.fault(1, fault, |seen| seen.network);
        let (_, progress) = case.arrive(json!({}));
        assert_eq!(content(&case.model()), expected(&model()));
        assert!(progress.retries >= 2, "{progress:?}");
    }
}

#[test]
fn an_expired_signature_is_renewed() {
    let case = Case::new(&model());
    case.hub.fault(2, Fault::Status(403, &[]), |seen| seen.network);
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(progress.retries, 2);
    let links = case.hub.seen().iter().filter(|seen| seen.path.ends_with("model.safetensors")).count();
    assert_eq!(links, case.hub.seen().iter().filter(|seen| seen.network).count(), "every attempt asks the hub anew");
}

#[test]
fn a_server_says_when_to_come_again() {
    let case = Case::new(&model());
    case.hub.fault(1, Fault::Status(429, &[("Retry-After", "1")]), |seen| seen.path.contains("/api/models/"));
    let started = Instant::now();
    case.arrive(json!({}));
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());

    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::Status(429, &[("Retry-After", "4000")]), |_| true);
    let error = case.run(json!({})).0.unwrap_err();
    assert_eq!((error.status(), error.after()), (Status::Busy, Some(Duration::from_secs(4000))));
    assert_eq!(case.hub.seen().len(), 1, "too long to wait for");
}

#[test]
fn attempts_are_limited_and_the_cause_is_told() {
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::Status(500, &[]), |seen| seen.network);
    let (outcome, progress) = case.run(json!({ "connections": 1 }));
    let error = outcome.unwrap_err();
    assert_eq!((error.status(), progress.state), (Status::Network, State::Failed));
    assert!(error.message().contains("500"), "{error}");
    assert!(!error.message().contains("secret"), "a signature is in {error}");
    assert_eq!(case.hub.seen().iter().filter(|seen| seen.network).count(), 4);
    assert!(!case.model().exists());

    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = case.run(json!({ "endpoint": format!("http://{nobody}") })).0.unwrap_err();
    assert_eq!(error.status(), Status::Network);
    assert!(error.message().to_lowercase().contains("refused"), "{error}");
}

#[test]
fn a_broken_connection_goes_on_where_it_broke() {
    let case = Case::new(&[large("model.safetensors", noise(1, 20 * BLOCK))]);
    // More often than the limit: what progresses does not count as failing.
    case.hub.fault(6, Fault::Cut(BLOCK + 1), |seen| seen.network);
    let tuning = Tuning { piece: 1 << 20, ..tuning() };
    let (outcome, progress) = case.tuned(json!({ "connections": 1 }), tuning);
    outcome.unwrap();
    assert_eq!(content(&case.model())["model.safetensors"], noise(1, 20 * BLOCK));
    assert_eq!(progress.retries, 6);
    let starts: Vec<_> =
        case.hub.seen().iter().filter(|s| s.network).map(|s| s.range.as_ref().map_or(0, |r| r.start)).collect();
    assert_eq!(starts, (0..7).map(|n| n * (BLOCK + 1)).collect::<Vec<_>>());
}

#[test]
fn a_silent_connection_is_replaced() {
    for fault in [Fault::Hang(None), Fault::Hang(Some(100))] {
        let case = Case::new(&model());
        case.hub.fault(1, fault.clone(), |seen| seen.path.contains("/api/models/"));
        case.hub.fault(2, fault, |seen| seen.network);
        let (outcome, progress) = case.tuned(json!({}), Tuning { stall: Duration::from_millis(300), ..tuning() });
        outcome.unwrap();
        assert_eq!(content(&case.model()), expected(&model()));
        assert!(progress.retries >= 3, "{progress:?}");
    }
}

#[test]
fn a_dripping_connection_is_replaced() {
    let drip = |stall: u64| {
        let case = Case::new(&[large("model.safetensors", noise(1, 200))]);
        case.hub.fault(1, Fault::Drip(Duration::from_millis(10)), |seen| seen.network);
        let tuning = Tuning { stall: Duration::from_millis(stall), least: 100, ..tuning() };
        let (outcome, progress) = case.tuned(json!({}), tuning);
        outcome.unwrap();
        assert_eq!(content(&case.model())["model.safetensors"], noise(1, 200));
        progress.retries
    };
    assert!(drip(300) >= 1, "30 bytes in that time are too few");
    assert_eq!(drip(20_000), 0, "200 bytes in that time are enough");
}

/// No byte is late, but all of them together are.
#[test]
fn dripping_headers_and_listings_are_given_up() {
    let drip = Duration::from_millis(20);
    for fault in [Fault::DripHead(drip), Fault::Drip(drip)] {
        let case = Case::new(&model());
        case.hub.fault(1, fault, |seen| seen.path.contains("/api/models/"));
        let started = Instant::now();
        let (outcome, progress) = case.tuned(json!({}), Tuning { stall: Duration::from_millis(200), ..tuning() });
        outcome.unwrap();
        assert_eq!(progress.retries, 1);
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }
}

#[test]
fn a_server_without_ranges_sends_the_whole_once() {
    let case = Case::new(&model());
    case.hub.fault(usize::MAX, Fault::IgnoreRange, |seen| seen.network);
    let (_, progress) = case.arrive(json!({ "connections": 1 }));
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(case.hub.seen().iter().filter(|seen| seen.network).count(), 1);
    assert_eq!(progress.bytes_done, progress.bytes_total);

    // With several connections, and one that breaks.
    let case = Case::new(&model());
    case.hub.fault(1, Fault::Cut(30 * BLOCK), |seen| seen.network && seen.range.is_none());
    case.hub.fault(1, Fault::Close, |seen| seen.network);
    case.hub.fault(usize::MAX, Fault::IgnoreRange, |seen| seen.network);
    let (_, progress) = case.arrive(json!({ "connections": 4 }));
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(progress.bytes_done, progress.bytes_total);
}

/// One connection gets a range, late and wrong, while another gets the whole file: what the first one would write after
/// the file was checked must not arrive.
#[test]
fn a_server_that_changes_its_mind_about_ranges() {
    let case = Case::new(&model());
    let first = |seen: &Seen| seen.network && seen.range.as_ref().is_some_and(|range| range.start == 0);
    case.hub.fault(1, Fault::Late(Duration::from_millis(500)), first);
    case.hub.fault(usize::MAX, Fault::IgnoreRange, |seen| seen.network);
    let (_, progress) = case.arrive(json!({ "connections": 2 }));
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!(progress.bytes_done, progress.bytes_total);
}

#[test]
fn wrong_content_is_fetched_once_more() {
    let case = Case::new(&model());
    case.hub.fault(1, Fault::Wrong, |seen| seen.network);
    case.hub.fault(1, Fault::Wrong, |seen| seen.path.contains("resolve-cache"));
    let (_, progress) = case.arrive(json!({}));
    assert_eq!(content(&case.model()), expected(&model()));
    assert_eq!((progress.retries, progress.bytes_done), (2, progress.bytes_total));
}

/// Runs `cancel` on a download that is stuck, and says how long it took to be over.
fn cancelled_after(case: &Case, endpoint: &str, stuck: impl Fn() -> bool) -> Duration {
    let patient = Tuning { connect: Duration::from_secs(60), stall: Duration::from_secs(60), ..tuning() };
    let download = case.start(json!({ "endpoint": endpoint }), patient);
    until("it is stuck", stuck);
    std::thread::sleep(Duration::from_millis(100));
    assert!(download.outcome().is_none(), "{:?}", download.outcome());
    let started = Instant::now();
    download.cancel();
    let outcome = download.wait(Some(Duration::from_secs(30)));
    assert_eq!(outcome.unwrap_err().status(), Status::Cancelled);
    assert_eq!(download.progress().state, State::Cancelled);
    started.elapsed()
}

#[test]
fn a_cancel_takes_effect_within_a_second() {
    let files = [small("config.json", "{}"), large("model.safetensors", noise(1, 50 * BLOCK))];
    type Stuck = fn(&Case) -> bool;
    let network: Stuck = |case| case.hub.seen().iter().any(|seen| seen.network);
    let listing: Stuck = |case| !case.hub.seen().is_empty();
    let always = |fault: Fault| (usize::MAX, fault);
    for ((times, fault), at_network) in [
        (always(Fault::Hang(None)), true),
        (always(Fault::Hang(Some(100))), true),
        (always(Fault::Drip(Duration::from_millis(50))), true),
        (always(Fault::Hang(None)), false),
        (always(Fault::Hang(Some(10))), false),
        (always(Fault::Status(429, &[("Retry-After", "50")])), false),
    ] {
        let case = Case::new(&files);
        case.hub.fault(times, fault, move |seen| seen.network == at_network);
        let stuck = if at_network { network } else { listing };
        let elapsed = cancelled_after(&case, &case.hub.endpoint(), || stuck(&case));
        assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
        assert!(!case.model().exists());
    }
}

/// A host that does not even accept connections: its queue of them is full.
#[test]
#[cfg(target_os = "linux")]
fn a_cancel_does_not_wait_for_a_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: the descriptor is open; listening again changes the length of the queue.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        waiting.push(stream);
    }
    let case = Case::new(&[]);
    let elapsed = cancelled_after(&case, &format!("http://{address}"), || true);
    assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
}
