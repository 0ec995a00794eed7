//! Times how models come from the disk: one load beside a loop that only reads the same files, and two models that take
//! turns under a limit that holds one. JSON lines on standard output.
//!
//! ```text
//! cargo run --release --example load -- --random qwen3-0.6b-4bit --folder DIR
//! ```
//!
//! Options: `--random NAME` (default `qwen3-0.6b-4bit`, 335 MB), `--folder DIR` on the disk to be measured (two models of random
//! weights are written there, unless they are there), `--rounds N` (default 9), `--cache DIR` (an empty folder: the pool
//! caches in files, so that the first load of a model hashes its files, too).
//!
//! Before each measurement the files leave the system's cache (on Linux; elsewhere they stay), except where it says `cached`.

mod shapes;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use omlx::cache::rows::PAGE;
use omlx::engine::{Event, Request};
use omlx::error::{Error, Result};
use omlx::pool::{EnginePool, MemoryLimit, PoolOptions, TierOptions};
use serde_json::{Map, Value, json};
use shapes::random_config;

const MODELS: [&str; 2] = ["a", "b"];

/// Bytes that the loop which only reads reads at once.
const PIECE: u64 = 4 << 20;

struct Options {
    random: String,
    folder: PathBuf,
    rounds: usize,
    cache: Option<PathBuf>,
}

fn number(text: &str) -> Result<usize> {
    text.parse().map_err(|_| Error::invalid_argument(format!("{text:?} is not a number")))
}

impl Options {
    fn parse() -> Result<Self> {
        let mut options = Self { random: "qwen3-0.6b-4bit".to_owned(), folder: PathBuf::new(), rounds: 9, cache: None };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| Error::invalid_argument(format!("{arg} needs a value")));
            match arg.as_str() {
                "--random" => options.random = value()?,
                "--folder" => options.folder = value()?.into(),
                "--rounds" => options.rounds = number(&value()?)?.max(1),
                "--cache" => options.cache = Some(value()?.into()),
                _ => return Err(Error::invalid_argument(format!("no option {arg:?}"))),
            }
        }
        if options.folder.as_os_str().is_empty() {
            return Err(Error::invalid_argument("--folder says where the models are"));
        }
        Ok(options)
    }

    fn weights(&self, model: &str) -> PathBuf {
        self.folder.join(model).join("model.safetensors")
    }

    fn open(&self, memory: MemoryLimit) -> Result<EnginePool> {
        let tiers = TierOptions { folder: self.cache.clone(), ..TierOptions::default() };
        let models_dir = Some(self.folder.clone());
        // A small cache of keys and values: what is measured is the weights.
        EnginePool::open(PoolOptions {
            models_dir,
            memory,
            tiers,
            cache_bytes: Some(64 << 20),
            ..PoolOptions::default()
        })
    }
}

/// Name, type and shape of every tensor of a Qwen3 model, quantised as its config says.
fn tensors(config: &Value) -> Vec<(String, &'static str, Vec<usize>)> {
    let number = |name: &str| config[name].as_u64().unwrap_or_default() as usize;
    let (hidden, mlp, head) = (number("hidden_size"), number("intermediate_size"), number("head_dim"));
    let (queries, keys) = (number("num_attention_heads") * head, number("num_key_value_heads") * head);
    let quantization = config.get("quantization");
    let mut tensors = Vec::new();
    let mut matrix = |path: &str, rows: usize, columns: usize| match quantization {
        Some(format) => {
            let of = |name: &str| format[name].as_u64().unwrap_or(1) as usize;
            let groups = vec![rows, columns / of("group_size")];
            tensors.push((format!("{path}.weight"), "U32", vec![rows, columns * of("bits") / 32]));
            tensors.push((format!("{path}.scales"), "BF16", groups.clone()));
            tensors.push((format!("{path}.biases"), "BF16", groups));
        }
        None => tensors.push((format!("{path}.weight"), "BF16", vec![rows, columns])),
    };
    matrix("model.embed_tokens", number("vocab_size"), hidden);
    if config["tie_word_embeddings"] == false {
        matrix("lm_head", number("vocab_size"), hidden);
    }
    for layer in 0..number("num_hidden_layers") {
        let mut in_layer = |name: &str, rows, columns| matrix(&format!("model.layers.{layer}.{name}"), rows, columns);
        in_layer("self_attn.q_proj", queries, hidden);
        in_layer("self_attn.k_proj", keys, hidden);
        in_layer("self_attn.v_proj", keys, hidden);
        in_layer("self_attn.o_proj", hidden, queries);
        in_layer("mlp.gate_proj", mlp, hidden);
        in_layer("mlp.up_proj", mlp, hidden);
        in_layer("mlp.down_proj", hidden, mlp);
    }
    for layer in 0..number("num_hidden_layers") {
        let norms = [("input", hidden), ("post_attention", hidden)];
        let norms = norms.map(|(name, width)| (format!("{name}_layernorm"), width));
        let heads = ["q", "k"].map(|name| (format!("self_attn.{name}_norm"), head));
        let all = norms.into_iter().chain(heads);
        tensors.extend(all.map(|(name, width)| (format!("model.layers.{layer}.{name}.weight"), "BF16", vec![width])));
    }
    tensors.push(("model.norm.weight".to_owned(), "BF16", vec![hidden]));
    tensors
}

/// Writes a model folder; `seed` makes its numbers others than those of other models.
fn write_model(folder: &Path, config: &Value, seed: u64) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let (tensors, mut header, mut end) = (tensors(config), Map::new(), 0);
    for (name, dtype, shape) in &tensors {
        let bytes = shape.iter().product::<usize>() * if *dtype == "U32" { 4 } else { 2 };
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes] }));
        end += bytes;
    }
    let header = Value::from(header).to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) as u32
    };
    for (name, dtype, shape) in &tensors {
        for _ in 0..shape.iter().product::<usize>() {
            match name.rsplit_once('.') {
                _ if *dtype == "U32" => file.write_all(&random().to_le_bytes())?,
                // 1 in a norm; else about a hundredth, and minus eight times that, so that codes lie around zero.
                _ if shape.len() == 1 => file.write_all(&0x3f80u16.to_le_bytes())?,
                Some((_, "scales")) => file.write_all(&0x3c00u16.to_le_bytes())?,
                Some((_, "biases")) => file.write_all(&0xbd80u16.to_le_bytes())?,
                _ => file.write_all(&(random() as u16 & 0x80ff | 0x3c00).to_le_bytes())?,
            }
        }
    }
    file.into_inner()?.sync_all()
}

/// Lets the system forget what it keeps of a file.
fn forget(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    #[cfg(target_os = "linux")]
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    drop(file);
    Ok(())
}

/// Bytes per second of reading a file whole, on four threads, past the system's cache where that is possible.
fn read_plainly(path: &Path) -> std::io::Result<f64> {
    let open = || {
        let direct = if cfg!(target_os = "linux") { rustix::fs::OFlags::DIRECT.bits() as i32 } else { 0 };
        File::options().read(true).custom_flags(direct).open(path).or_else(|_| File::open(path))
    };
    let len = open()?.metadata()?.len();
    let (begun, next) = (Instant::now(), AtomicU64::new(0));
    let read = || -> std::io::Result<()> {
        let file = open()?;
        let mut memory = vec![0; PIECE as usize + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        loop {
            let at = next.fetch_add(PIECE, Ordering::Relaxed);
            if at >= len {
                return Ok(());
            }
            // A whole piece is asked for, as direct reads want it; the last one ends with the file.
            let (mut got, wanted) = (0, PIECE.min(len - at) as usize);
            while got < wanted {
                match file.read_at(&mut memory[start + got..start + PIECE as usize], at + got as u64)? {
                    0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                    count => got += count,
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(read)).collect();
        let joined = |reader: std::thread::ScopedJoinHandle<'_, _>| {
            reader.join().unwrap_or_else(|_| Err(std::io::Error::other("a reader failed")))
        };
        readers.into_iter().try_for_each(joined)
    })?;
    Ok(len as f64 / begun.elapsed().as_secs_f64())
}

/// Seconds until the first token of an answer of `model`.
fn first_token(pool: &EnginePool, model: &str) -> Result<f64> {
    let json = json!({ "model": model, "prompt": [5, 6, 7], "max_tokens": 1, "ignore_eos": true, "temperature": 0 });
    let request = Request::from_json(json.to_string().as_bytes(), false)?;
    let sent = Instant::now();
    let state = pool.generate(request)?;
    let mut first = None;
    loop {
        match state.next(None) {
            Ok(Event::Delta(_)) => first = first.or(Some(sent.elapsed().as_secs_f64())),
            Ok(Event::Done(done)) => {
                return done.error.map_or(first.ok_or_else(|| Error::internal("no token came")), Err);
            }
            Ok(_) => {}
            Err(status) => return Err(Error::new(status, "reading an event")),
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One model, loaded and unloaded, in turn with the loop that only reads.
fn measure_loads(options: &Options) -> Result<()> {
    let path = options.weights(MODELS[0]);
    let io = |e: std::io::Error| Error::io(path.display(), &e);
    let bytes = path.metadata().map_err(io)?.len();
    let pool = options.open(MemoryLimit::Auto)?;
    let load = || -> Result<f64> {
        let begun = Instant::now();
        pool.load(MODELS[0])?;
        let seconds = begun.elapsed().as_secs_f64();
        pool.unload(MODELS[0], false)?;
        Ok(seconds)
    };
    let (mut disk, mut seconds, mut ratios, mut cached) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..options.rounds {
        forget(&path).map_err(io)?;
        let rate = read_plainly(&path).map_err(io)?;
        forget(&path).map_err(io)?;
        let took = load()?;
        println!("{}", json!({ "round": round, "disk_gb_s": rate / 1e9, "load_s": took }));
        disk.push(rate);
        seconds.push(took);
        ratios.push(bytes as f64 / took / rate);
        cached.push(load()?);
    }
    println!(
        "{}",
        json!({
            "bytes": bytes, "load_s": median(&seconds), "load_gb_s": bytes as f64 / median(&seconds) / 1e9,
            "disk_gb_s": median(&disk) / 1e9, "load_to_disk": median(&ratios), "cached_load_s": median(&cached),
        })
    );
    pool.close();
    Ok(())
}

/// Two models in turn, under a limit that holds one of them.
fn measure_swaps(options: &Options) -> Result<()> {
    let paths = MODELS.map(|model| options.weights(model));
    let io = |e: std::io::Error| Error::io(options.folder.display(), &e);
    let bytes = paths[0].metadata().map_err(io)?.len();
    let pool = options.open(MemoryLimit::Bytes(bytes * 3 / 2 + (400 << 20)))?;
    for cached in [false, true] {
        let mut swaps = Vec::new();
        first_token(&pool, MODELS[0])?;
        for round in 0..options.rounds {
            // The one that is not there.
            let next = 1 - round % 2;
            if !cached {
                forget(&paths[next]).map_err(io)?;
            }
            swaps.push(first_token(&pool, MODELS[next])?);
            let loaded = pool.models().iter().filter(|model| model.loaded.is_some()).count();
            if loaded != 1 {
                return Err(Error::internal(format!("{loaded} models are loaded: nothing was swapped")));
            }
        }
        let last = MODELS[options.rounds % 2];
        let there = first_token(&pool, last)?;
        println!(
            "{}",
            json!({ "swap_to_first_token_s": median(&swaps), "all_s": swaps, "cached": cached, "without_swap_s": there })
        );
        pool.unload(last, false)?;
    }
    pool.close();
    Ok(())
}

fn run() -> Result<()> {
    let options = Options::parse()?;
    let config = random_config(&options.random)?;
    for (seed, model) in MODELS.into_iter().enumerate() {
        let folder = options.folder.join(model);
        if !options.weights(model).exists() {
            write_model(&folder, config.raw(), seed as u64).map_err(|e| Error::io(folder.display(), &e))?;
        }
    }
    measure_loads(&options)?;
    measure_swaps(&options)
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
