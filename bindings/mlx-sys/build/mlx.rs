//! Where the prebuilt MLX is: `MLX_ROOT`, else the pinned wheel.

use crate::fail::{Failure, cargo_env, watched_env};
use crate::wheel::{self, Platform};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only version that works: MLX's C++ interface changes between patch releases.
pub const VERSION: &str = "0.32.2";

/// The oldest glibc that the wheels for Linux run on.
const GLIBC: (u32, u32) = (2, 35);

/// A checked MLX folder, with `include/mlx` and `lib/libmlx.*`.
pub struct Mlx {
    pub root: PathBuf,
}

impl Mlx {
    pub fn lib(&self) -> PathBuf {
        self.root.join("lib")
    }

    /// The folders that C++ code needs to include MLX.
    pub fn includes(&self) -> Vec<PathBuf> {
        let include = self.root.join("include");
        let metal = include.join("metal_cpp");
        if metal.is_dir() { vec![include, metal] } else { vec![include] }
    }

    /// The kind of wheel, told by the headers that only it has; `MLX_ROOT` can hold any kind.
    pub fn wheel(&self) -> &'static str {
        let has = |name: &str| self.root.join("include").join(name).is_dir();
        match (has("metal_cpp"), has("cutlass")) {
            (true, _) => "metal",
            (_, true) => "cuda",
            _ => "cpu",
        }
    }

    /// Links MLX into every dependent. Comes after mlx-c, which needs it: linkers read from left to right.
    pub fn link(&self) {
        println!("cargo::rustc-link-search=native={}", self.lib().display());
        println!("cargo::rustc-link-lib=dylib=mlx");
    }
}

pub fn locate() -> Result<Mlx, Failure> {
    let target = Platform::target()?;
    let root = match watched_env("MLX_ROOT") {
        Some(root) => fs::canonicalize(&root).map_err(|error| {
            Failure::new(format!("MLX_ROOT is {root}, which cannot be opened: {error}\n{}", root_help(&target)))
        })?,
        None => from_wheel(&target)?,
    };
    check(&root, &target)?;
    Ok(Mlx { root })
}

fn root_help(target: &Platform) -> String {
    format!(
        "MLX_ROOT must name a folder with include/mlx/version.h and lib/{}, such as the 'mlx' folder of the Python\n\
         packages mlx-cpu, mlx-cuda-13 or mlx-metal {VERSION}. Unset it to download the pinned wheel.",
        target.shared_library("mlx")
    )
}

fn from_wheel(target: &Platform) -> Result<PathBuf, Failure> {
    let default = if target.os == "macos" { "metal" } else { "cpu" };
    let choice = watched_env("OMLX_MLX_WHEEL").unwrap_or_else(|| default.to_owned());
    let package = match choice.as_str() {
        "cpu" => "mlx-cpu",
        "cuda" => "mlx-cuda-13",
        "metal" => "mlx-metal",
        other => {
            return Err(Failure::new(format!(
                "OMLX_MLX_WHEEL is '{other}'; it must be cpu or cuda (on Linux) or metal (on macOS)"
            )));
        }
    };
    let host = Platform::host();
    if *target != host {
        return Err(Failure::new(format!(
            "cross-compiling from {host} to {target}: the MLX wheel is downloaded for the machine that builds only\n\
             Set MLX_ROOT to MLX {VERSION} for {target} (the 'mlx' folder of its wheel)."
        )));
    }
    if target.os == "linux" {
        check_glibc()?;
    }
    let instead = format!("MLX_ROOT to a folder that holds MLX {VERSION} (README of bindings/mlx-sys)");
    Ok(wheel::unpacked(package, target, &instead)?.join("mlx"))
}

/// Fails unless `root` holds the header and library of exactly [`VERSION`].
fn check(root: &Path, target: &Platform) -> Result<(), Failure> {
    let header = root.join("include/mlx/version.h");
    for file in [&header, &root.join("lib").join(target.shared_library("mlx"))] {
        // A file that goes away later (a cleaned folder) must run this script again.
        println!("cargo::rerun-if-changed={}", file.display());
        if !file.is_file() {
            return Err(Failure::new(format!(
                "the MLX folder {} is incomplete: no file {}\n{}",
                root.display(),
                file.strip_prefix(root).unwrap_or(file).display(),
                root_help(target)
            )));
        }
    }
    let text = fs::read_to_string(&header).map_err(|error| Failure::io("read", &header, &error))?;
    let found = ["MAJOR", "MINOR", "PATCH"].map(|part| version_part(&text, part).unwrap_or("?")).join(".");
    if found == VERSION {
        return Ok(());
    }
    Err(Failure::new(format!(
        "MLX {found} found in {}, but exactly MLX {VERSION} is needed\n\
         MLX's C++ interface changes between patch releases: a program built against one does not load with another.\n\
         Point MLX_ROOT at MLX {VERSION}, or unset it to download the pinned wheel.",
        root.display()
    )))
}

/// The number in `#define MLX_VERSION_<part> <number>`.
fn version_part<'a>(header: &'a str, part: &str) -> Option<&'a str> {
    let name = format!("MLX_VERSION_{part}");
    header.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("#define") && words.next() == Some(&name)).then(|| words.next())?
    })
}

/// pip would only say that it found no matching wheel.
fn check_glibc() -> Result<(), Failure> {
    let found = if cargo_env("CARGO_CFG_TARGET_ENV")? == "gnu" { glibc() } else { None };
    match found {
        Some(version) if version >= GLIBC => Ok(()),
        found => Err(Failure::new(format!(
            "the MLX wheels for Linux need glibc {}.{} or newer; this system has {}\n\
             Build on a newer system (Debian 12, Ubuntu 22.04), or set MLX_ROOT to MLX {VERSION} built for this one.",
            GLIBC.0,
            GLIBC.1,
            found.map_or("none that getconf knows".to_owned(), |(major, minor)| format!("glibc {major}.{minor}"))
        ))),
    }
}

/// The version of the C library, from a line such as `glibc 2.36`.
fn glibc() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
}
