//! Compiles mlx-c against the chosen MLX and publishes what a dependent needs to compile C++ against both.

use crate::fail::{Failure, cargo_env, watched_env};
use crate::mlx::{Mlx, VERSION};
use std::fs;
use std::path::{Path, PathBuf};

/// The oldest macOS that the MLX wheels run on.
const MACOS: &str = "14.0";

pub fn mlx_c(mlx: &Mlx, mlx_c: &Path) -> Result<(), Failure> {
    let native = Path::new(&cargo_env("CARGO_MANIFEST_DIR")?).join("native");
    let mut build = cc::Build::new();
    // Optimised in every profile: these thin wrappers are on the path of each operation, and nobody debugs them here.
    build.cpp(true).std("c++20").opt_level(2).debug(false).warnings(false);
    build.include(mlx_c).includes(mlx.includes());
    build.flag("-idirafter").flag(native.join("fallback")).flag("-include").flag(native.join("prelude.hpp"));
    // Error messages quote the source file; they should not name a folder of the machine that built it.
    build.flag(format!("-ffile-prefix-map={}=mlx-c", mlx_c.display()));
    build.files(cpp_files(&mlx_c.join("mlx/c"))?);
    if cargo_env("CARGO_CFG_TARGET_VENDOR")? != "apple" {
        build.file(native.join("mach_time.cpp"));
    } else if watched_env("MACOSX_DEPLOYMENT_TARGET").is_none() {
        build.env("MACOSX_DEPLOYMENT_TARGET", MACOS);
    }
    build.try_compile("mlxc").map_err(|error| {
        Failure::new(format!(
            "cannot compile mlx-c: {error}\n\
             A C++20 compiler is needed: g++ 12 or newer (on Debian: apt install g++), or the command line\n\
             tools of Xcode.\n\
             CXX names another compiler."
        ))
    })
}

/// Metadata, which cargo hands to the build scripts of direct dependents as `DEP_MLX_<NAME>`.
pub fn publish(mlx: &Mlx, mlx_c: &Path) -> Result<(), Failure> {
    let mut folders = mlx.includes();
    folders.push(mlx_c.to_owned());
    let include = std::env::join_paths(folders)
        .map_err(|error| Failure::new(format!("a path list cannot hold a folder of MLX: {error}")))?;
    println!("cargo::metadata=include={}", include.display());
    println!("cargo::metadata=defines=");
    println!("cargo::metadata=cxxflags=-std=c++20");
    println!("cargo::metadata=root={}", mlx.root.display());
    println!("cargo::metadata=libdir={}", mlx.lib().display());
    println!("cargo::metadata=version={VERSION}");
    println!("cargo::metadata=wheel={}", mlx.wheel());
    Ok(())
}

fn cpp_files(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = fs::read_dir(folder).map_err(|error| Failure::io("read", folder, &error))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "cpp"));
    files.sort();
    Ok(files)
}
