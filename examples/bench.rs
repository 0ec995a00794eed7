//! Times a model: JSON lines on standard output.
//!
//! ```text
//! cargo run --release --example bench -- models/tiny-chat --prompt 128 --steps 32
//! cargo run --release --example bench -- --random qwen3-0.6b-4bit --prompt 512,2048 --batch 1,4,8
//! ```
//!
//! Options: `--prompt N,..` prompt lengths (default 512), `--steps N` tokens after the first (default 32), `--batch N,..`
//! requests at a time (default 1), `--context N` tokens before decoding (default 512), `--device cpu|gpu`,
//! `--dtype f32|f16|bf16`, `--precision fast|exact`, `--threads N`, `--latency N` (a prompt of N tokens beside a running
//! answer; give a `--batch` of at least 2 with it), `--temperature X` (default 0), `--cache DIR` (rows are written to files there
//! as soon as they are computed), `--bandwidth` (what decoding reads is held against a loop that only reads, before and after it).
//!
//! `prefillN` is N over the time to the first token. `decode` counts all tokens that come while every request decodes,
//! over that time; their prompts are in the cache by then. What weights say does not change their speed, but where they lie may: those of
//! `--random` are buffers of their own, those of a folder lie side by side, on huge pages where the system has them.
//! With `--bandwidth` a step counts as reading all weights (so the embeddings are tied, and no layer has experts) and all rows of
//! its sequences.

mod shapes;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mlx_rs::Dtype;
use omlx::engine::{EngineMetrics, Event, Request, RequestState};
use omlx::error::{Error, Result};
use omlx::kernels::Precision;
use omlx::kernels::cpu::threads::Workers;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions, TierOptions};
use serde_json::{Value, json};
use shapes::random_config;

struct Options {
    folder: Option<String>,
    random: Option<String>,
    prompts: Vec<usize>,
    steps: usize,
    batches: Vec<usize>,
    context: usize,
    device: Option<Device>,
    dtype: Option<Dtype>,
    precision: Precision,
    threads: Option<usize>,
    latency: Option<usize>,
    temperature: f64,
    cache: Option<String>,
    bandwidth: bool,
}

fn numbers(text: &str) -> Result<Vec<usize>> {
    let parsed: std::result::Result<_, _> = text.split(',').map(|part| part.trim().parse()).collect();
    parsed.map_err(|_| Error::invalid_argument(format!("{text:?} is not a list of numbers")))
}

fn number(text: &str) -> Result<usize> {
    text.parse().map_err(|_| Error::invalid_argument(format!("{text:?} is not a number")))
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self {
            folder: None,
            random: None,
            prompts: vec![512],
            steps: 32,
            batches: vec![1],
            context: 512,
            device: None,
            dtype: None,
            precision: Precision::Fast,
            threads: None,
            latency: None,
            temperature: 0.0,
            cache: None,
            bandwidth: false,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| Error::invalid_argument(format!("{arg} needs a value")));
            match arg.as_str() {
                "--random" => options.random = Some(value()?),
                "--prompt" => options.prompts = numbers(&value()?)?,
                "--steps" => options.steps = number(&value()?)?.max(1),
                "--batch" => options.batches = numbers(&value()?)?,
                "--context" => options.context = number(&value()?)?.max(1),
                "--device" => {
                    options.device = Some(match value()?.as_str() {
                        "cpu" => Device::Cpu,
                        "gpu" => Device::Gpu,
                        other => return Err(Error::invalid_argument(format!("no device {other:?}"))),
                    });
                }
                "--dtype" => {
                    options.dtype = Some(match value()?.as_str() {
                        "f32" => Dtype::Float32,
                        "f16" => Dtype::Float16,
                        "bf16" => Dtype::Bfloat16,
                        other => return Err(Error::invalid_argument(format!("no dtype {other:?}"))),
                    });
                }
                "--precision" => {
                    options.precision = match value()?.as_str() {
                        "fast" => Precision::Fast,
                        "exact" => Precision::Exact,
                        other => return Err(Error::invalid_argument(format!("no precision {other:?}"))),
                    };
                }
                "--latency" => options.latency = Some(number(&value()?)?.max(1)),
                "--temperature" => {
                    let text = value()?;
                    let wrong = || Error::invalid_argument(format!("{text:?} is not a number"));
                    options.temperature = text.parse().map_err(|_| wrong())?;
                }
                "--cache" => options.cache = Some(value()?),
                "--bandwidth" => options.bandwidth = true,
                "--threads" => options.threads = Some(number(&value()?)?.max(1)),
                _ if arg.starts_with("--") => return Err(Error::invalid_argument(format!("no option {arg:?}"))),
                _ => options.folder = Some(arg),
            }
        }
        Ok(options)
    }
}

/// A prompt of `len` tokens that no other `salt` shares a prefix with.
fn request(len: usize, salt: usize, tokens: usize, temperature: f64) -> Result<Request> {
    let ids: Vec<usize> = (0..len).map(|i| 7 + (i * 31 + salt * 97) % 900).collect();
    let json = json!({
        "model": "bench", "prompt": ids, "max_tokens": tokens, "ignore_eos": true, "temperature": temperature,
        "seed": salt,
    });
    Request::from_json(json.to_string().as_bytes(), false)
}

/// When each token of a request arrived.
fn arrivals(state: &RequestState) -> Result<Vec<Instant>> {
    let mut times = Vec::new();
    loop {
        match state.next(None) {
            Ok(Event::Delta(delta)) => times.extend(delta.tokens.iter().map(|_| Instant::now())),
            Ok(
                Event::Loading(..)
                | Event::Started(..)
                | Event::ChoiceDone(..)
                | Event::Embeddings(_)
                | Event::Scores(_),
            ) => {}
            Ok(Event::Done(done)) => return done.error.map_or(Ok(times), Err),
            Err(_) => return Err(Error::internal("the request ended without a done event")),
        }
    }
}

fn emit(device: Device, name: &str, batch: usize, tokens: usize, time: Duration) {
    let rate = (tokens as f64 / time.as_secs_f64() * 100.0).round() / 100.0;
    line(json!({ "engine": "omlx", "device": device.name(), "name": name, "batch": batch, "tok_s": rate }));
}

fn line(value: Value) {
    println!("{value}");
}

/// Time to the first token of the second of two prompts of `len` tokens: the first one grows the cache, and on a GPU
/// compiles what steps of this size need.
fn prefill(pool: &EnginePool, len: usize) -> Result<Duration> {
    let mut time = Duration::ZERO;
    for salt in 0..2 {
        let sent = Instant::now();
        // Nothing of it may be in the cache.
        let times = arrivals(&*pool.generate(request(len, len + salt, 1, 0.0)?)?)?;
        time = *times.first().ok_or_else(|| Error::internal("no token came"))? - sent;
    }
    Ok(time)
}

/// Tokens and time of `batch` requests while all of them decode. Their prompts are in the cache by then, so that they
/// begin together.
fn decode(pool: &EnginePool, options: &Options, batch: usize) -> Result<(usize, Duration)> {
    for salt in 0..batch {
        arrivals(&*pool.generate(request(options.context, salt, 1, 0.0)?)?)?;
    }
    let states: Vec<Arc<RequestState>> = (0..batch)
        .map(|salt| pool.generate(request(options.context, salt, options.steps + batch, options.temperature)?))
        .collect::<Result<_>>()?;
    let readers: Vec<_> = states.into_iter().map(|state| std::thread::spawn(move || arrivals(&state))).collect();
    let times: Vec<Vec<Instant>> = readers
        .into_iter()
        .map(|reader| reader.join().unwrap_or_else(|_| Err(Error::internal("a reader failed"))))
        .collect::<Result<_>>()?;
    let start = times.iter().filter_map(|t| t.first()).max().copied().unwrap_or_else(Instant::now);
    let end = times.iter().filter_map(|t| t.last()).min().copied().unwrap_or(start);
    let counted = times.iter().flatten().filter(|time| **time > start && **time <= end).count();
    Ok((counted, end - start))
}

/// Milliseconds between the tokens of a running answer while a prompt of `len` tokens is computed beside it, and between the
/// same tokens of the same answer when it is alone; and the prompt's rate as a share of its quiet one.
fn latency(pool: &EnginePool, len: usize) -> Result<()> {
    let gaps = |times: &[Instant]| {
        let mut gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3).collect();
        gaps.sort_by(f64::total_cmp);
        gaps
    };
    let quiet_prompt = prefill(pool, len)?;
    // Long enough to outlast the prompt.
    let running = pool.generate(request(64, 5001, 20_000, 0.0)?)?;
    let reader = {
        let running = Arc::clone(&running);
        std::thread::spawn(move || {
            let mut times = Vec::new();
            while let Ok(event) = running.next(None) {
                if let Event::Delta(delta) = event {
                    times.extend(delta.tokens.iter().map(|_| Instant::now()));
                }
            }
            times
        })
    };
    std::thread::sleep(Duration::from_secs(2));
    let sent = Instant::now();
    let first = *arrivals(&*pool.generate(request(len, len + 7, 1, 0.0)?)?)?
        .first()
        .ok_or_else(|| Error::internal("no token came"))?;
    running.cancel();
    let times = reader.join().map_err(|_| Error::internal("a reader failed"))?;
    let (from, to) = (times.partition_point(|time| *time < sent), times.partition_point(|time| *time <= first));
    let beside = gaps(&times[from..to]);
    // A longer answer has more keys to read: the quiet one is compared where it is as long.
    let alone = arrivals(&*pool.generate(request(64, 5001, to, 0.0)?)?)?;
    let quiet = gaps(&alone[from.min(alone.len())..]);
    let at = |gaps: &[f64], part: f64| gaps.get(((gaps.len() - 1) as f64 * part) as usize).copied().unwrap_or(f64::NAN);
    line(json!({
        "engine": "omlx", "device": pool.device().name(), "name": format!("latency{len}"),
        "quiet_median_ms": at(&quiet, 0.5), "quiet_p99_ms": at(&quiet, 0.99), "median_ms": at(&beside, 0.5), "p99_ms": at(&beside, 0.99),
        "tokens_beside": beside.len(), "prompt_rate": quiet_prompt.as_secs_f64() / (first - sent).as_secs_f64(),
    }));
    Ok(())
}

fn metrics(pool: &EnginePool) -> EngineMetrics {
    pool.metrics().into_iter().next().map(|(_, metrics)| metrics).unwrap_or_default()
}

/// Milliseconds of a step: describing it, encoding it, waiting for it. The first two run while the device computes the
/// step before.
fn parts(device: Device, batch: usize, before: &EngineMetrics, after: &EngineMetrics) {
    let steps = (after.steps - before.steps).max(1) as f64;
    let of = |part: fn(&EngineMetrics) -> f64| ((part(after) - part(before)) / steps * 1e6).round() / 1e3;
    line(json!({
        "engine": "omlx", "device": device.name(), "name": "step", "batch": batch, "ms": of(|m| m.step_seconds),
        "build_ms": of(|m| m.build_seconds), "encode_ms": of(|m| m.encode_seconds), "wait_ms": of(|m| m.wait_seconds),
        "host_ms": of(|m| m.host_seconds),
    }));
}

/// A loop that only reads, on the threads that kernels compute on.
struct Reading {
    workers: Workers,
    memory: Vec<u64>,
}

impl Reading {
    /// More than any cache holds.
    const BYTES: usize = 1 << 30;

    fn new(threads: Option<usize>) -> Self {
        Self { workers: Workers::shared(threads), memory: (0..Self::BYTES as u64 / 8).collect() }
    }

    /// Bytes a second, the median of five passes.
    fn rate(&self) -> f64 {
        let share = self.memory.len() / self.workers.count();
        let mut rates = [0.0; 5];
        for rate in &mut rates {
            let start = Instant::now();
            self.workers.run(self.workers.count(), &|task| {
                let numbers = &self.memory[task * share..(task + 1) * share];
                std::hint::black_box(numbers.iter().fold(0, |sum, number| sum ^ number));
            });
            *rate = Self::BYTES as f64 / start.elapsed().as_secs_f64();
        }
        rates.sort_by(f64::total_cmp);
        rates[2]
    }
}

/// What decoding read in a second, as a share of `reading`.
fn bandwidth(device: Device, batch: usize, context: usize, rate: f64, reading: f64, metrics: &EngineMetrics) {
    let rows = batch * context * (metrics.block_bytes / metrics.block_tokens.max(1));
    let bytes = metrics.weight_bytes + rows;
    let read = bytes as f64 * rate / batch as f64;
    line(json!({
        "engine": "omlx", "device": device.name(), "name": "bandwidth", "batch": batch, "bytes_a_step": bytes,
        "gb_s": read / 1e9, "reading_gb_s": reading / 1e9, "share": read / reading,
    }));
}

fn run() -> Result<()> {
    let options = Options::parse()?;
    let Options { device, dtype, precision, threads, .. } = options;
    let tiers = TierOptions {
        folder: options.cache.as_ref().map(PathBuf::from),
        write_through: options.cache.is_some(),
        ..TierOptions::default()
    };
    let pool = EnginePool::open(PoolOptions {
        tiers,
        device,
        dtype,
        precision,
        threads,
        // Two of them for an answer beside a prompt.
        max_sequences: options.batches.iter().copied().chain(options.latency.map(|_| 2)).max(),
        ..Default::default()
    })?;
    match (&options.random, &options.folder) {
        (Some(name), None) => pool.add_random_model("bench", random_config(name)?)?,
        (None, Some(folder)) => drop(pool.add_model(Path::new(folder), Some("bench"))?),
        _ => return Err(Error::invalid_argument("give a model folder or --random NAME")),
    }
    let device = pool.device();
    let info = pool.load("bench")?;
    line(json!({
        "engine": "omlx", "device": device.name(), "name": "load",
        "seconds": info.load_seconds, "weight_bytes": info.weight_bytes,
    }));
    arrivals(&*pool.generate(request(16, 99, 2, options.temperature)?)?)?;
    for &len in &options.prompts {
        emit(device, &format!("prefill{len}"), 1, len, prefill(&pool, len)?);
    }
    let reading = options.bandwidth.then(|| Reading::new(threads));
    for &batch in &options.batches {
        if device == Device::Gpu {
            // Compiles what steps of this size need.
            decode(&pool, &options, batch)?;
        }
        let (before, read_before) = (metrics(&pool), reading.as_ref().map(Reading::rate));
        let (tokens, time) = decode(&pool, &options, batch)?;
        emit(device, "decode", batch, tokens, time);
        let after = metrics(&pool);
        parts(device, batch, &before, &after);
        if let (Some(reading), Some(read_before)) = (&reading, read_before) {
            let (rate, context) = (tokens as f64 / time.as_secs_f64(), options.context + options.steps / 2);
            bandwidth(device, batch, context, rate, (read_before + reading.rate()) / 2.0, &after);
        }
    }
    if let Some(len) = options.latency {
        latency(&pool, len)?;
    }
    for (id, metrics) in pool.metrics() {
        let share = metrics.host_seconds / metrics.step_seconds;
        line(json!({ "engine": "omlx", "name": "host", "model": id, "share_of_step_time": share }));
    }
    let peak = mlx_rs::memory::peak_memory()?;
    line(json!({ "engine": "omlx", "device": device.name(), "name": "memory", "peak_bytes": peak }));
    pool.close();
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
