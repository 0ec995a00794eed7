//! What only a GPU can show: the kernels against MLX's operations, answers in company against answers alone, thousands of
//! random step shapes, and that no step copies a pool.
//!
//! ```text
//! cargo test --release --test gpu                    everything
//! OMLX_GPU=required cargo test --release --test gpu  the same, and it is an error if there is no GPU
//! cargo test --release --test gpu -- shapes          what has "shapes" in its name
//! ```
//!
//! Without a GPU it says so and does nothing: `.ci/run` has none.

mod company;
mod kernels;
mod pools;
mod shapes;
mod steps;

use std::process::ExitCode;
use std::time::Instant;

use omlx::error::Result;
use omlx::mlx::{self, Device};

type Check = fn() -> Result<()>;

const CHECKS: [(&str, Check); 6] = [
    ("kernels compute what MLX's operations do", kernels::agree),
    ("company changes no logits in f16", company::changes_nothing_in_f16),
    ("company changes no logits in bf16", company::changes_nothing_in_bf16),
    ("wrong tables are noticed", company::wrong_tables_are_noticed),
    ("pools are written in place", pools::written_in_place),
    ("5000 shapes run", shapes::run),
];

fn main() -> ExitCode {
    // The caches that overflow must fail here, as they would without the library's settings.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("MLX_ENABLE_CACHE_THRASHING_CHECK", "1") };
    mlx::init().expect("MLX");
    mlx::set_environment();
    if !mlx::gpu_available() {
        println!("SKIPPED: the loaded MLX has no GPU, so that none of the {} GPU checks ran", CHECKS.len());
        let required = std::env::var("OMLX_GPU").is_ok_and(|value| value == "required");
        return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    // Whatever else the test runner passes begins with a dash.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let mut failed = 0;
    for (name, check) in CHECKS {
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            println!("not asked for: {name}");
            continue;
        }
        let started = Instant::now();
        let outcome = std::thread::spawn(move || mlx::on_device(Device::Gpu, check)).join();
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
    println!("{failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
