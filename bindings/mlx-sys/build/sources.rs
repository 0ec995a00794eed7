//! Where the mlx-c sources are: `MLX_C_ROOT`, else inside the published `mlx-sys` package in cargo's registry.

use crate::fail::{Failure, cargo_env, watched_env};
use crate::mlx::VERSION;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The mlx-c folder (it holds `mlx/c/*.cpp`), checked to be written for [`VERSION`] of MLX.
pub fn locate() -> Result<PathBuf, Failure> {
    let root = match watched_env("MLX_C_ROOT") {
        Some(root) => PathBuf::from(root),
        None => package_folder()?.join("src/mlx-c"),
    };
    check(&root)?;
    Ok(root)
}

fn check(root: &Path) -> Result<(), Failure> {
    let script = root.join("CMakeLists.txt");
    println!("cargo::rerun-if-changed={}", script.display());
    let help = "MLX_C_ROOT must name a folder with the mlx-c sources (CMakeLists.txt, mlx/c/*.cpp).\n\
                Unset it to take them from the published mlx-sys package.";
    let text = std::fs::read_to_string(&script)
        .map_err(|error| Failure::new(format!("no mlx-c in {}: CMakeLists.txt: {error}\n{help}", root.display())))?;
    if !text.contains(&format!("GIT_TAG v{VERSION})")) {
        return Err(Failure::new(format!("the mlx-c in {} is not written for MLX {VERSION}\n{help}", root.display())));
    }
    Ok(())
}

/// Asks cargo where it put the package that `mlx-c-source/Cargo.toml` pins, fetching it if needed.
fn package_folder() -> Result<PathBuf, Failure> {
    // Without the network first: the build that runs this may itself be an offline one.
    let json = metadata(true).or_else(|_| metadata(false)).map_err(|printed| {
        Failure::new(format!(
            "cannot get the mlx-c sources: cargo did not find the package mlx-sys 0.7.0\n{printed}\n\
             crates.io must be reachable once.\n\
             To build without it, set MLX_C_ROOT to the mlx-c sources for MLX {VERSION}."
        ))
    })?;
    manifest_path(&json)
        .and_then(|manifest| Some(Path::new(&manifest).parent()?.to_owned()))
        .ok_or_else(|| Failure::new("cannot get the mlx-c sources: cargo metadata did not name mlx-sys 0.7.0"))
}

/// The output of `cargo metadata`, or what it printed as an error.
fn metadata(offline: bool) -> Result<String, String> {
    let env = |name| cargo_env(name).map_err(|_| format!("{name} is not set"));
    let folder = Path::new(&env("CARGO_MANIFEST_DIR")?).join("mlx-c-source");
    let mut command = Command::new(env("CARGO")?);
    command.current_dir(&folder).args(["metadata", "--format-version", "1", "--locked"]);
    command.args(["--filter-platform", &env("HOST")?]);
    if offline {
        command.arg("--offline");
    }
    // What the outer cargo chose for its own build must not reach this one, and no clean-up of the registry may
    // start while the outer cargo reads it.
    for name in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR"]
    {
        command.env_remove(name);
    }
    for name in ["CARGO_BUILD_TARGET", "CARGO_MAKEFLAGS", "MAKEFLAGS", "MFLAGS"] {
        command.env_remove(name);
    }
    command.env("CARGO_CACHE_AUTO_CLEAN_FREQUENCY", "never");
    let output = command.output().map_err(|error| format!("cargo does not run: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim_end().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The manifest of mlx-sys in the output of `cargo metadata`: the first `manifest_path` after the package's name.
fn manifest_path(json: &str) -> Option<String> {
    let (_, package) = json.split_once(r#"{"name":"mlx-sys","version":"0.7.0""#)?;
    let (_, path) = package.split_once(r#""manifest_path":""#)?;
    let mut text = String::new();
    let mut chars = path.chars();
    loop {
        match chars.next()? {
            '"' => return Some(text),
            '\\' => text.push(chars.next()?),
            other => text.push(other),
        }
    }
}
