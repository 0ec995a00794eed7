//! What answers cost over HTTP: rates against the C API's in turns, the server's time on a processor for each token, the time
//! that it adds to the first token, and many streams at once.
//!
//! usage: cargo bench -p omlx-server --bench tax -- [rate] [first] [streams] [--rounds N] [--bundled]
//!
//! All parts if none is named; `--bundled` takes the small bundled model, of which the processor's time for each token is a
//! larger part. Nothing else should run.

mod client;
mod model;
mod processor;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use client::{Reading, Server, body};
use model::Shape;
use omlx_client::Pool;
use processor::{Used, used, used_by_this_thread};

/// Qwen3-0.6B.
const SHAPE: Shape = Shape {
    hidden: 1024,
    layers: 28,
    mlp: 3072,
    heads: 16,
    kv_heads: 8,
    head_dim: 128,
    vocab: 151_936,
    context: 40_960,
};

/// Tokens of each answer, by how many there are at a time.
const BATCHES: &[(usize, usize)] = &[(1, 96), (8, 32)];
/// Requests for one token, each way.
const FIRSTS: usize = 40;
/// Streams that answer, tokens of each, and streams that wait behind them.
const ACTIVE: usize = 64;
const ACTIVE_TOKENS: usize = 24;
const IDLE: usize = 200;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|argument| argument == word);
    let all = !["rate", "first", "streams"].iter().any(|part| has(part));
    let rounds = arguments.iter().position(|argument| argument == "--rounds");
    let rounds = rounds.map_or(4, |at| arguments[at + 1].parse().expect("--rounds takes a number"));
    let models = models(has("--bundled"));
    if all || has("rate") || has("first") {
        let (server, pool) = (Server::start(&models, &[]), client::open(&models));
        for (batch, tokens) in [(8, 2), (1, 2)] {
            over_http(&server, batch, tokens);
            by_c(&pool, batch, tokens);
        }
        if all || has("first") {
            first(&server, &pool);
        }
        if all || has("rate") {
            BATCHES.iter().for_each(|(batch, tokens)| rate(&server, &pool, rounds, *batch, *tokens));
        }
    }
    if all || has("streams") {
        streams(&models);
    }
}

/// The folder of models: the bundled one's, or that of a large one in the target folder, written the first time.
fn models(bundled: bool) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    if bundled {
        return folder;
    }
    let models = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tax");
    if !models.join("qwen3-0.6b/tokenizer.json").exists() {
        model::write_model(&models.join("qwen3-0.6b"), &SHAPE, &folder.join("tiny-chat"))
            .expect("the model is written");
    }
    models
}

/// What `batch` answers of `tokens` tokens took: seconds, time on a processor, pieces.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    used: Used,
    pieces: usize,
}

fn measure(process: u32, batch: usize, read: impl Fn(usize) -> Reading + Sync) -> Cost {
    let (before, began) = (used(process), Instant::now());
    let pieces = std::thread::scope(|scope| {
        let read = &read;
        let readers: Vec<_> = (0..batch).map(|number| scope.spawn(move || read(number).pieces)).collect();
        readers.into_iter().map(|reader| reader.join().expect("an answer")).sum()
    });
    Cost { seconds: began.elapsed().as_secs_f64(), used: used(process) - before, pieces }
}

fn over_http(server: &Server, batch: usize, tokens: usize) -> Cost {
    measure(server.id(), batch, |number| server.send(&body(number, tokens)).read())
}

fn by_c(pool: &Pool, batch: usize, tokens: usize) -> Cost {
    measure(std::process::id(), batch, |number| client::read(pool, &body(number, tokens)))
}

/// Microseconds on a processor, for each token, of threads that do nothing but take it from the C API and write it to a socket.
fn least(pool: &Pool, batch: usize, tokens: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let seconds: f64 = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..batch)
            .map(|number| {
                let socket = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
                socket.set_nodelay(true).expect("a socket");
                let mut reader = listener.accept().expect("a connection").0;
                scope.spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
                scope.spawn(move || {
                    let before = used_by_this_thread();
                    client::forward(pool, &body(number, tokens), socket);
                    used_by_this_thread() - before
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().expect("an answer")).sum()
    });
    seconds / (batch * tokens) as f64 * 1e6
}

fn rate(server: &Server, pool: &Pool, rounds: usize, batch: usize, tokens: usize) {
    let sampled = (batch * tokens) as f64;
    let (mut ratios, mut http, mut more, mut floor) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        // Whoever comes second finds the machine as the first has left it.
        let (h, c) = if round % 2 == 0 {
            let h = over_http(server, batch, tokens);
            (h, by_c(pool, batch, tokens))
        } else {
            let c = by_c(pool, batch, tokens);
            (over_http(server, batch, tokens), c)
        };
        println!(
            "  {batch}: HTTP {:.2} tokens/s in {} pieces, {:.0} us a token, connections {:.1}; C {:.2} in {}, {:.0} us",
            sampled / h.seconds,
            h.pieces,
            h.used.all / sampled * 1e6,
            h.used.http / sampled * 1e6,
            sampled / c.seconds,
            c.pieces,
            c.used.all / sampled * 1e6,
        );
        ratios.push(c.seconds / h.seconds);
        http.push(h.used.http / sampled * 1e6);
        more.push((h.used.all - c.used.all) / sampled * 1e6);
        floor.push(least(pool, batch, tokens));
    }
    println!(
        "{batch} at a time, {rounds} pairs: HTTP has {:.4} of the C API's rate ({}); connections take {:.1} us a token ({}), \
         threads that only take and write {:.1} ({}); the process takes {:.0} us a token more ({})",
        median(&mut ratios),
        range(&ratios, 4),
        median(&mut http),
        range(&http, 1),
        median(&mut floor),
        range(&floor, 1),
        median(&mut more),
        range(&more, 0),
    );
}

fn first(server: &Server, pool: &Pool) {
    let (mut http, mut c) = (Vec::new(), Vec::new());
    let milliseconds = |reading: Reading| reading.first.as_secs_f64() * 1e3;
    for _ in 0..FIRSTS {
        // The same prompt each time, so that one token is all that is computed.
        http.push(milliseconds(server.send(&body(0, 1)).read()));
        c.push(milliseconds(client::read(pool, &body(0, 1))));
    }
    let (http, c) = (median(&mut http), median(&mut c));
    println!("first token, medians of {FIRSTS}: HTTP {http:.3} ms, C {c:.3} ms, added {:.3} ms", http - c);
}

/// Answers that run, and streams that wait behind them and are left before their turn.
fn streams(models: &Path) {
    let sequences = ACTIVE.to_string();
    let server = Server::start(models, &["--max-sequences", &sequences, "--queue-length", "512", "--keep-alive", "1"]);
    over_http(&server, 1, 2);
    let before = used(server.id());
    let began = Instant::now();
    let (pieces, silent, seconds) = std::thread::scope(|scope| {
        let active: Vec<_> = (0..ACTIVE).map(|number| server.send(&body(number, ACTIVE_TOKENS))).collect();
        let active: Vec<_> = active.into_iter().map(|stream| scope.spawn(|| stream.read().pieces)).collect();
        std::thread::sleep(Duration::from_millis(100));
        let mut idle: Vec<_> = (0..IDLE).map(|number| server.send(&body(ACTIVE + number, 8))).collect();
        let silent = idle.iter_mut().filter_map(|stream| stream.is_silent().then_some(())).count();
        let pieces: usize = active.into_iter().map(|reader| reader.join().expect("an answer")).sum();
        (pieces, silent, began.elapsed().as_secs_f64())
    });
    let (tokens, cost) = ((ACTIVE * ACTIVE_TOKENS) as f64, used(server.id()) - before);
    let left = Instant::now();
    while server.metric("omlx_running_sequences") + server.metric("omlx_waiting_sequences") > 0.0 {
        assert!(left.elapsed() < Duration::from_secs(60), "requests go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    println!(
        "{ACTIVE} answers beside {IDLE} streams that wait: {pieces} pieces of {tokens} tokens, {:.1} tokens/s, connections \
         {:.1} us a token; {silent} said that they live; all gone {:.2} s after they were left",
        tokens / seconds,
        cost.http / tokens * 1e6,
        left.elapsed().as_secs_f64(),
    );
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let half = numbers.len() / 2;
    if numbers.len() % 2 == 1 { numbers[half] } else { (numbers[half - 1] + numbers[half]) / 2.0 }
}

/// Of sorted numbers.
fn range(numbers: &[f64], places: usize) -> String {
    format!("{:.places$} to {:.places$}", numbers[0], numbers[numbers.len() - 1])
}
