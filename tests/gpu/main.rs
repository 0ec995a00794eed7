//! What only a GPU can show: the kernels against MLX's operations, answers in company against answers alone, thousands of
//! random step shapes, and that no step copies a pool.
//!
//! ```text
//! cargo test --release --test gpu                    everything
//! OMLX_GPU=required cargo test --release --test gpu  the same, and it is an error if there is no GPU
//! cargo test --release --test gpu -- shapes          what has "shapes" in its name
//! ```
//!
//! Without a GPU it says so and does only what a CPU can: how steps are packed for a GPU, by MLX's operations, rows that leave
//! the pools and come back, and the answers of every registered type.

mod company;
mod engine;
mod exit;
mod kernels;
mod pools;
mod repeats;
mod shapes;
mod steps;
mod tiers;
mod types;

use std::process::ExitCode;
use std::time::Instant;

use omlx::error::Result;
use omlx::mlx::{self, Device};

type Check = fn() -> Result<()>;

/// Name, check, and whether it needs a GPU.
const CHECKS: [(&str, Check, bool); 12] = [
    ("company changes no logits in buckets, MLX's operations", company::changes_nothing_in_buckets, false),
    ("kernels compute what MLX's operations do", kernels::agree, true),
    ("company changes no logits in half", company::changes_nothing_in_half, true),
    ("company changes no logits in bfloat", company::changes_nothing_in_bfloat, true),
    ("wrong tables are noticed", company::wrong_tables_are_noticed, true),
    ("answers are those alone", engine::answers_are_those_alone, true),
    ("pools are written in place", pools::written_in_place, true),
    ("types give the reference tokens, and go on from what is cached", types::give_the_reference_tokens, false),
    ("rows come back from files and the host's memory", tiers::restored_rows_are_those_that_left, false),
    ("hosts may exit at any time", exit::hosts_end_normally, false),
    ("steps repeat bit for bit", repeats::steps_repeat_bit_for_bit, true),
    ("5000 shapes run", shapes::run, true),
];

fn main() -> ExitCode {
    // The caches that overflow must fail here, as they would without the library's settings.
    // And f32 is to be f32, so that answers can be compared token by token.
    for (name, value) in [("MLX_ENABLE_CACHE_THRASHING_CHECK", "1"), ("MLX_ENABLE_TF32", "0")] {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(name, value) };
    }
    mlx::init().expect("MLX");
    mlx::set_environment();
    let gpu = mlx::gpu_available();
    if let Some(events) = std::env::var(exit::HOST).ok().and_then(|events| events.parse().ok()) {
        println!("a host ends too soon: {:?}", exit::host(events));
        return ExitCode::FAILURE;
    }
    let required = std::env::var("OMLX_GPU").is_ok_and(|value| value == "required");
    if !gpu && required {
        println!("FAILED: the loaded MLX has no GPU");
        return ExitCode::FAILURE;
    }
    // Whatever else the test runner passes begins with a dash.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let (mut failed, mut skipped) = (0, 0);
    for (name, check, needs_gpu) in CHECKS {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            println!("not asked for: {name}");
            continue;
        }
        if needs_gpu && !gpu {
            println!("SKIPPED, the loaded MLX has no GPU: {name}");
            skipped += 1;
            continue;
        }
        let device = if needs_gpu { Device::Gpu } else { Device::Cpu };
        let started = Instant::now();
        let outcome = std::thread::spawn(move || mlx::on_device(device, check)).join();
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(Ok(())) => println!("ok: {name} ({seconds:.1} s)"),
            Ok(Err(error)) => {
                println!("FAILED: {name} ({seconds:.1} s): {error}");
                failed += 1;
            }
            Err(_) => {
                println!("FAILED: {name} ({seconds:.1} s): a panic, above");
                failed += 1;
            }
        }
    }
    println!("{failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
