//! Every registered type on the GPU, if there is one: the greedy tokens of its fixture, which mlx-lm gave in f32, and what a second turn finds.

use std::path::{Path, PathBuf};

use mlx_rs::Dtype;
use omlx::error::{Error, Result};
use omlx::mlx::{self, Device};
use omlx::pool::{EnginePool, PoolOptions};
use safetensors::SafeTensors;
use serde_json::json;

use crate::engine::{answer_with_usage, request};

/// Of all tokens, those that rounding may have decided.
const OTHERWISE: f64 = 0.02;

pub fn give_the_reference_tokens() -> Result<()> {
    let (mut compared, mut other, mut failures) = (0, 0, Vec::new());
    let folders = fixtures()?;
    for folder in &folders {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match check(folder) {
            Ok(Outcome { tokens, different }) => {
                println!("  {name}: {different} of {tokens} tokens are others");
                (compared, other) = (compared + tokens, other + different);
            }
            Err(error) => {
                println!("  {name}: {error}");
                failures.push(name);
            }
        }
    }
    if folders.len() < 30 || !failures.is_empty() || other as f64 > OTHERWISE * compared as f64 {
        return Err(Error::internal(format!("{other} of {compared} tokens are others; failed: {failures:?}")));
    }
    Ok(())
}

struct Outcome {
    tokens: usize,
    different: usize,
}

/// The fixture's own greedy tokens, twice: the second time behind what is cached; and then a second turn, which computes its own
/// tokens alone and gives what a pool gives that has cached nothing.
fn check(folder: &Path) -> Result<Outcome> {
    let io = |error: &dyn std::fmt::Display| Error::internal(format!("{}: {error}", folder.display()));
    let bytes = std::fs::read(folder.join("expected.safetensors")).map_err(|error| io(&error))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| io(&error))?;
    let ids = |tensor: &str| -> Result<Vec<u32>> {
        let words = tensors.tensor(tensor).map_err(|error| io(&error))?.data().chunks_exact(4);
        Ok(words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    };
    let (prompt, greedy) = (ids("prompt")?, ids("greedy")?);
    let pool = open(folder)?;
    let ask = |pool: &EnginePool, prompt: &[u32]| {
        let body = json!({ "prompt": prompt, "max_tokens": greedy.len(), "ignore_eos": true, "temperature": 0 });
        answer_with_usage(&pool.generate(request(&body)?)?)?.ok_or_else(|| Error::internal("nobody cancels"))
    };
    let differ = |one: &[u32], other: &[u32]| one.iter().zip(other).filter(|(one, other)| one != other).count();
    let (mut tokens, mut different) = (0, 0);
    for cached in [0, prompt.len() - 1] {
        let (found, usage) = ask(&pool, &prompt)?;
        if usage.cached_tokens != cached || found.len() != greedy.len() {
            return Err(Error::internal(format!("{} tokens, {} cached", found.len(), usage.cached_tokens)));
        }
        tokens += greedy.len();
        different += differ(&found, &greedy);
        if cached > 0 {
            let turn: Vec<u32> = prompt.iter().chain(&found).chain(&prompt[..3]).copied().collect();
            let (behind, usage) = ask(&pool, &turn)?;
            let least = prompt.len() + found.len() - 1;
            if usage.cached_tokens < least {
                return Err(Error::internal(format!("{} of {least} cached", usage.cached_tokens)));
            }
            let fresh = open(folder)?;
            tokens += behind.len();
            different += differ(&behind, &ask(&fresh, &turn)?.0);
            fresh.close();
        }
    }
    pool.close();
    Ok(Outcome { tokens, different })
}

fn open(folder: &Path) -> Result<EnginePool> {
    let device = if mlx::gpu_available() { Device::Gpu } else { Device::Cpu };
    let options = PoolOptions { device: Some(device), dtype: Some(Dtype::Float32), ..PoolOptions::default() };
    let pool = EnginePool::open(options)?;
    pool.add_model(folder, Some("model"))?;
    Ok(pool)
}

fn fixtures() -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let entries = std::fs::read_dir(&root).map_err(|error| Error::internal(error.to_string()))?;
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    folders.retain(|folder| folder.to_string_lossy().ends_with("-f32"));
    folders.sort();
    Ok(folders)
}
