//! Hosts that exit in the middle of answers, without closing anything, end normally: CUDA ends itself then, and nobody may
//! still use it.

use std::process::{Child, Command};

use mlx_rs::Dtype;
use omlx::error::{Error, Result};
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use serde_json::json;

use crate::engine::request;
use crate::steps::small;

/// Set for a host: after how many events it exits.
pub const HOST: &str = "OMLX_TEST_EXITING_HOST";

/// Rounds of hosts, and how many there are at a time: a busy machine shows more.
const ROUNDS: usize = 3;
const HOSTS: usize = 8;

/// What a host exits with.
const CODE: i32 = 7;

pub fn hosts_end_normally() -> Result<()> {
    let program = std::env::current_exe().map_err(|error| Error::io("the name of this program", &error))?;
    let mut ends = Vec::new();
    for round in 0..ROUNDS {
        let start = |host: usize| {
            let child = Command::new(&program).env(HOST, (round + host).to_string()).spawn();
            child.map_err(|error| Error::io("starting a host", &error))
        };
        let hosts: Vec<Child> = (0..HOSTS).map(start).collect::<Result<_>>()?;
        for mut host in hosts {
            ends.push(host.wait().map_err(|error| Error::io("waiting for a host", &error))?);
        }
    }
    let ill: Vec<_> = ends.iter().filter(|end| end.code() != Some(CODE)).map(|end| end.to_string()).collect();
    if ill.is_empty() { Ok(()) } else { Err(Error::internal(format!("of {} hosts: {}", ends.len(), ill.join(", ")))) }
}

/// The host: an answer, in the middle of which the process exits.
pub fn host(events: usize) -> Result<()> {
    let device = if omlx::mlx::gpu_available() { Device::Gpu } else { Device::Cpu };
    let options = PoolOptions { device: Some(device), dtype: Some(Dtype::Float32), ..PoolOptions::default() };
    let pool = EnginePool::open(options)?;
    pool.add_random_model("model", small("llama", 64, json!({}))?)?;
    let body = json!({ "model": "model", "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true });
    let state = pool.generate(request(&body)?)?;
    for _ in 0..=events {
        state.next(None).map_err(|_| Error::internal("no event came"))?;
    }
    std::process::exit(CODE);
}
