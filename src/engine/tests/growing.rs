//! The cache grows, and hosts are heard meanwhile.

use super::*;

#[test]
fn hosts_are_heard_while_the_cache_grows() {
    let pool = pool("slow-growth");
    pool.load("slow-growth").unwrap();
    // Half a second for each of the four arrays.
    [0, 1, 1, 1].into_iter().for_each(|passes| crate::fault::arm("pages.slow", "slow-growth", passes));
    let started = Instant::now();
    let state = generate(&pool, "slow-growth", 1);
    std::thread::sleep(Duration::from_millis(100));
    state.cancel();
    let (tokens, done) = finish(&state);
    let heard = started.elapsed();
    assert_eq!((tokens.len(), done.reason), (0, FinishReason::Cancelled));
    // What has begun comes to its end, and what comes later does without it.
    let (tokens, done) = finish(&generate(&pool, "slow-growth", 3));
    assert_eq!((tokens.len(), done.reason), (3, FinishReason::Length));
    let grown = started.elapsed();
    assert!(heard + Duration::from_millis(400) < grown, "heard after {heard:?}, grown after {grown:?}");
}
