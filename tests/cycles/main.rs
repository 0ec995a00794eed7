//! Loading, using and unloading a model leaves nothing behind. A test program of its own: memory and threads are
//! counted per process. `OMLX_CYCLES` sets the number of cycles.

#![cfg(target_os = "linux")]

mod held;
#[path = "../capi/host.rs"]
mod host;

use held::held;
use host::Pool;

/// Cycles without the environment variable.
const CYCLES: usize = 15;
/// Cycles after which the allocator, MLX and the thread pools have what they keep for ever.
const WARM_UP: usize = 5;
/// What may remain, however many the cycles: the model's weights alone are more in the type they are computed in.
const TOLERANCE: i64 = 8 << 20;
const REQUEST: &str = r#"{"messages":[{"role":"user","content":"Tell me a joke."}],"max_tokens":3,"temperature":0}"#;

fn cycles(pool: &Pool, count: usize, expected: &str) {
    for _ in 0..count {
        pool.load();
        assert_eq!(pool.answer(REQUEST), expected);
        pool.unload();
    }
}

#[test]
fn load_generate_unload_leaves_memory_where_it_was() {
    let count = std::env::var("OMLX_CYCLES").map_or(CYCLES, |n| n.parse().expect("OMLX_CYCLES is a number"));
    let pool = Pool::open();
    let expected = pool.answer(REQUEST);
    assert!(!expected.is_empty());
    cycles(&pool, WARM_UP, &expected);
    let before = held();
    cycles(&pool, count, &expected);
    let after = held();
    let grown = after.bytes - before.bytes;
    println!("{count} cycles: {grown} bytes more, {} of {} threads", after.threads, before.threads);
    assert!(grown < TOLERANCE, "{count} cycles left {grown} bytes");
    assert_eq!(after.threads, before.threads, "threads of this process");

    // The measure sees what is left behind.
    let leaked = std::hint::black_box(vec![1u8; 64 << 20].leak());
    let seen = held().bytes - after.bytes;
    assert!(seen > 60 << 20, "64 MB left behind show as {seen} bytes");
    assert_eq!(leaked[leaked.len() - 1], 1);
    let waiting = std::thread::spawn(std::thread::park);
    assert_eq!(held().threads, after.threads + 1);
    waiting.thread().unpark();
    assert!(waiting.join().is_ok());
}
