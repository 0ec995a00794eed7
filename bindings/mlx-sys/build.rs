//! Finds or downloads MLX, generates the bindings of mlx-c, compiles it and tells dependents where all is.

#[path = "build/bindings.rs"]
mod bindings;
#[path = "build/compile.rs"]
mod compile;
#[path = "build/fail.rs"]
mod fail;
#[path = "build/mlx.rs"]
mod mlx;
#[path = "build/sources.rs"]
mod sources;
#[path = "build/wheel.rs"]
mod wheel;

use fail::Failure;

fn main() {
    if let Err(failure) = run() {
        failure.report_and_exit();
    }
}

fn run() -> Result<(), Failure> {
    for input in ["build.rs", "build", "native", "wheels.txt", "mlx-c-source"] {
        println!("cargo::rerun-if-changed={input}");
    }
    let mlx = mlx::locate()?;
    let mlx_c = sources::locate()?;
    bindings::generate(&mlx_c)?;
    compile::mlx_c(&mlx, &mlx_c)?;
    mlx.link();
    compile::publish(&mlx, &mlx_c)
}
