//! Times how a prompt comes back: computed, from the pools, and from files after a restart. JSON lines on standard output.
//!
//! ```text
//! cargo run --release --example restart -- --random qwen3-0.6b-4bit --prompt 8000 --cache DIR
//! ```
//!
//! Options: a model folder or `--random NAME`, `--prompt N` tokens (default 8000), `--cache DIR` an empty folder on the disk
//! to be measured, `--rounds N` (default 9), `--hot` (bring rows back from the host's memory instead of files).
//!
//! `disk` reads the same files in the same way and does nothing with them; rounds of it and of `restore` take turns. All
//! reads pass by the page cache where the file system can.

mod shapes;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use omlx::cache::rows::PAGE;
use omlx::engine::{Event, Request};
use omlx::error::{Error, Result};
use omlx::pool::{EnginePool, PoolOptions, TierOptions, TierSet};
use serde_json::{Value, json};
use shapes::random_config;

struct Options {
    folder: Option<String>,
    random: Option<String>,
    prompt: usize,
    rounds: usize,
    cache: PathBuf,
    hot: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options =
            Self { folder: None, random: None, prompt: 8000, rounds: 9, cache: PathBuf::new(), hot: false };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| Error::invalid_argument(format!("{arg} needs a value")));
            let number =
                |text: String| text.parse().map_err(|_| Error::invalid_argument(format!("{text:?} is not a number")));
            match arg.as_str() {
                "--random" => options.random = Some(value()?),
                "--prompt" => options.prompt = number(value()?)?,
                "--rounds" => options.rounds = number(value()?)?.max(1),
                "--cache" => options.cache = value()?.into(),
                "--hot" => options.hot = true,
                _ if arg.starts_with("--") => return Err(Error::invalid_argument(format!("no option {arg:?}"))),
                _ => options.folder = Some(arg),
            }
        }
        Ok(options)
    }

    fn open(&self) -> Result<EnginePool> {
        let tiers = TierOptions {
            folder: Some(self.cache.clone()),
            hot_bytes: self.hot.then_some(16 << 30),
            always_restore: true,
            ..TierOptions::default()
        };
        let pool = EnginePool::open(PoolOptions { tiers, cache_bytes: Some(8 << 30), ..PoolOptions::default() })?;
        match (&self.random, &self.folder) {
            (Some(name), None) => pool.add_random_model("bench", random_config(name)?)?,
            (None, Some(folder)) => drop(pool.add_model(Path::new(folder), Some("bench"))?),
            _ => return Err(Error::invalid_argument("give a model folder or --random NAME")),
        }
        pool.load("bench")?;
        // The files of the model are read in the background; the cold tier waits for that.
        while find(&pool, &self.request(1)?)?["stopped_by"] == "not_identified" {
            std::thread::sleep(Duration::from_millis(10));
        }
        first_token(&pool, &short()?)?;
        Ok(pool)
    }

    fn request(&self, tokens: usize) -> Result<Request> {
        let ids: Vec<usize> = (0..self.prompt).map(|i| 7 + (i * 31 + i / 900) % 900).collect();
        request(json!({ "prompt": ids, "max_tokens": tokens, "ignore_eos": true, "temperature": 0 }))
    }
}

fn request(mut json: Value) -> Result<Request> {
    json["model"] = json!("bench");
    Request::from_json(json.to_string().as_bytes(), false)
}

fn short() -> Result<Request> {
    request(json!({ "prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": true, "temperature": 0 }))
}

fn find(pool: &EnginePool, request: &Request) -> Result<Value> {
    let found = pool.cache_find(request)?;
    serde_json::from_str(&found).map_err(|e| Error::internal(format!("{found}: {e}")))
}

/// Seconds to the first token, and which one it is.
fn first_token(pool: &EnginePool, request: &Request) -> Result<(f64, u32)> {
    let sent = Instant::now();
    let state = pool.generate(request.clone())?;
    let mut first = None;
    loop {
        match state.next(None) {
            Ok(Event::Delta(delta)) => {
                let token = delta.tokens.first().copied();
                first = first.or(token.map(|token| (sent.elapsed().as_secs_f64(), token)));
            }
            Ok(
                Event::Loading(..)
                | Event::Started(..)
                | Event::ChoiceDone(..)
                | Event::Embeddings(_)
                | Event::Scores(_),
            ) => {}
            Ok(Event::Done(done)) => {
                return done.error.map_or(first.ok_or_else(|| Error::internal("no token came")), Err);
            }
            Err(_) => return Err(Error::internal("the request ended without a done event")),
        }
    }
}

/// All segment files below a folder.
fn segments(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(segments(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Bytes and seconds of reading files whole, on four threads, past the page cache.
fn read_plainly(files: &[PathBuf]) -> std::io::Result<(u64, f64)> {
    let open = |path: &PathBuf| {
        let direct = if cfg!(target_os = "linux") { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
        File::options().read(true).custom_flags(direct).open(path).or_else(|_| File::open(path))
    };
    let begun = Instant::now();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let read = || -> std::io::Result<u64> {
        let (mut bytes, mut memory) = (0, Vec::new());
        while let Some(path) = files.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            let file = open(path)?;
            let len = file.metadata()?.len() as usize;
            memory.resize(memory.len().max(len + PAGE), 0u8);
            let start = memory.as_ptr().align_offset(PAGE);
            file.read_exact_at(&mut memory[start..start + len], 0)?;
            bytes += len as u64;
        }
        Ok(bytes)
    };
    let bytes = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(read)).collect();
        readers.into_iter().try_fold(0, |sum, reader| {
            let bytes = reader.join().map_err(|_| std::io::Error::other("a reader failed"))??;
            Ok::<_, std::io::Error>(sum + bytes)
        })
    })?;
    Ok((bytes, begun.elapsed().as_secs_f64()))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run() -> Result<()> {
    let options = Options::parse()?;
    let request = options.request(1)?;
    let pool = options.open()?;
    let (computed, token) = first_token(&pool, &request)?;
    let (pooled, again) = first_token(&pool, &request)?;
    let flushed = Instant::now();
    pool.cache_flush(None, Duration::from_secs(600))?;
    let flushed = flushed.elapsed().as_secs_f64();
    pool.close();
    drop(pool);

    let pool = options.open()?;
    let (restarted, restored_token) = first_token(&pool, &request)?;
    if again != token || restored_token != token {
        return Err(Error::internal(format!("{token} computed, {again} from pools, {restored_token} restored")));
    }
    let io = |e: std::io::Error| Error::io(options.cache.display(), &e);
    let files = segments(&options.cache).map_err(io)?;
    let (mut disk, mut restore) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    for _ in 0..options.rounds {
        let (read, seconds) = read_plainly(&files).map_err(io)?;
        bytes = read;
        disk.push(read as f64 / seconds);
        pool.cache_clear(None, TierSet { pools: true, hot: false, cold: false })?;
        let begun = Instant::now();
        let there = pool.cache_prefetch(&request)?;
        restore.push(begun.elapsed().as_secs_f64());
        if there + 1 != options.prompt {
            return Err(Error::internal(format!("{there} of {} tokens came back", options.prompt)));
        }
    }
    let ratios = disk.iter().zip(&restore).map(|(disk, seconds)| bytes as f64 / seconds / disk).collect();
    let seconds = median(restore);
    println!(
        "{}",
        json!({
            "prompt": options.prompt, "files": files.len(), "bytes": bytes, "from": if options.hot { "hot" } else { "cold" },
            "computed_s": computed, "pool_hit_s": pooled, "restarted_s": restarted, "flush_s": flushed,
            "restore_s": seconds, "restore_ms_per_token": seconds * 1e3 / options.prompt as f64,
            "restore_gb_s": bytes as f64 / seconds / 1e9, "disk_gb_s": median(disk) / 1e9, "restore_to_disk": median(ratios),
        })
    );
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
