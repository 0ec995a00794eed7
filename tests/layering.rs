//! Imports point one way, pure modules stay pure, and unsafe code stays where it belongs (ARCHITECTURE.md).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Each top-level module of `src` and the ones it may import.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("sync", &[]),
    ("logged", &[]),
    ("panics", &["error"]),
    ("hub", &["error", "panics", "sync"]),
    ("ledger", &["error", "sync"]),
    ("mlx", &["error", "panics", "sync"]),
    ("kernels", &["error", "mlx", "panics", "sync"]),
    ("fault", &["error", "kernels", "sync"]),
    ("config", &["error", "mlx"]),
    ("weights", &["config", "error", "kernels", "mlx", "sync"]),
    ("cache", &["error", "kernels", "logged", "mlx", "sync"]),
    ("nn", &["cache", "error", "kernels", "mlx", "weights"]),
    ("models", &["cache", "config", "error", "mlx", "nn", "text", "weights"]),
    ("sampling", &["error", "kernels", "mlx"]),
    ("text", &["error", "logged", "panics", "sync"]),
    (
        "engine",
        &[
            "cache", "config", "error", "fault", "kernels", "ledger", "mlx", "models", "nn", "panics", "sampling",
            "sync", "text", "weights",
        ],
    ),
    (
        "pool",
        &[
            "cache", "config", "engine", "error", "hub", "kernels", "ledger", "mlx", "models", "panics", "sync",
            "weights",
        ],
    ),
    ("capi", &["engine", "error", "fault", "hub", "kernels", "mlx", "panics", "pool", "sync"]),
    ("lib", &[]),
];

/// Files and folders that never touch MLX: they run in milliseconds and under any checker.
const PURE: &[&str] = &[
    "error.rs",
    "hub",
    "ledger.rs",
    "panics.rs",
    "sync.rs",
    "text",
    "cache/blocks.rs",
    "cache/fingerprint.rs",
    "cache/group.rs",
    "cache/hot.rs",
    "cache/manager.rs",
    "cache/prefix.rs",
    "cache/rows.rs",
    "cache/share.rs",
    "cache/spans.rs",
    "cache/ssd",
    "engine/answer.rs",
    "engine/encode/jobs.rs",
    "engine/encode/output.rs",
    "engine/encode/request.rs",
    "engine/encode/text.rs",
    "engine/events.rs",
    "engine/metrics.rs",
    "engine/pace.rs",
    "engine/queue.rs",
    "engine/request.rs",
    "engine/response_format.rs",
    "engine/scheduler",
    "engine/scheduler.rs",
    "engine/sequence.rs",
    "engine/shape.rs",
    "engine/turns.rs",
    "engine/worth.rs",
    "kernels/cpu",
    "pool/policy.rs",
    "pool/settings.rs",
    "sampling/params.rs",
];

/// What makes a file impure, where it is not one of the pure ones that it imports.
const IMPURE_MARKS: &[&str] = &[
    "mlx_rs",
    "mlx_sys",
    "crate::mlx",
    "crate::kernels",
    "crate::nn",
    "crate::models",
    // Blocks and their index are pure; their modules are named in full.
    "crate::cache::{",
    "crate::cache::pages",
    "cache::Pages",
    "crate::weights",
];

const UNSAFE_PLACES: &[&str] = &["capi/", "kernels/", "mlx.rs", "mlx/"];

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Relative path and code of every Rust file, without comments and test modules.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![source_root()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                let name = path.strip_prefix(source_root()).unwrap().to_string_lossy().replace('\\', "/");
                files.push((name, code(&std::fs::read_to_string(&path).unwrap())));
            }
        }
    }
    files.sort();
    files
}

/// Code lines up to a trailing `#[cfg(test)] mod`.
fn code(text: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        if trimmed.starts_with("mod ") && trimmed.ends_with('{') && lines.last() == Some(&"#[cfg(test)]") {
            break;
        }
        if !trimmed.starts_with("//") {
            lines.push(line);
        }
    }
    lines.join("\n")
}

fn layer_of(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The first path segments after `crate::`, those of grouped imports included.
fn imports(code: &str) -> BTreeSet<String> {
    let identifier = |text: &str| -> String { text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    let mut found = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => {
                let group = group.split('}').next().unwrap_or_default();
                found.extend(group.split(',').map(|part| identifier(part.trim())));
            }
            None => drop(found.insert(identifier(rest))),
        }
    }
    found.remove("");
    found
}

fn wrong_imports(file: &str, code: &str) -> Vec<String> {
    let layer = layer_of(file);
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
        return vec![format!("{file}: module {layer:?} has no place in the layers")];
    };
    let wrong = imports(code).into_iter().filter(|import| import != layer && !allowed.contains(&import.as_str()));
    wrong.map(|import| format!("{file}: {layer} may not import {import}")).collect()
}

fn impurities(file: &str, code: &str) -> Vec<String> {
    let pure = PURE.iter().any(|p| file == *p || file.starts_with(&format!("{p}/")));
    let found = IMPURE_MARKS.iter().filter(|mark| pure && code.contains(*mark));
    found.map(|mark| format!("{file}: a pure file mentions {mark}")).collect()
}

fn misplaced_unsafe(file: &str, code: &str) -> Vec<String> {
    let allowed = UNSAFE_PLACES.iter().any(|place| file.starts_with(place));
    let lines =
        code.lines().filter(|line| !allowed && line.split(|c: char| !c.is_alphanumeric()).any(|w| w == "unsafe"));
    lines.map(|line| format!("{file}: unsafe code: {}", line.trim())).collect()
}

fn check(rule: impl Fn(&str, &str) -> Vec<String>) {
    let complaints: Vec<String> = sources().iter().flat_map(|(file, code)| rule(file, code)).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn imports_point_one_way() {
    check(wrong_imports);
    let bad = "use crate::{error::Error, engine::Engine};";
    assert_eq!(wrong_imports("nn/linear.rs", bad), ["nn/linear.rs: nn may not import engine"]);
    assert_eq!(wrong_imports("surprise.rs", "").len(), 1, "a new module must take its place");
}

#[test]
fn pure_files_do_not_touch_mlx() {
    check(impurities);
    let files: Vec<String> = sources().into_iter().map(|(file, _)| file).collect();
    for pure in PURE {
        assert!(files.iter().any(|file| file.starts_with(pure)), "{pure} is listed, but not there");
    }
    assert_eq!(impurities("text/stop.rs", "use mlx_rs::Array;").len(), 1);
}

#[test]
fn unsafe_code_stays_at_the_borders() {
    check(misplaced_unsafe);
    assert_eq!(misplaced_unsafe("engine/mod.rs", "    unsafe { boom() }").len(), 1);
    assert!(misplaced_unsafe("engine/mod.rs", "    let unsafer = 1;").is_empty());
}

#[test]
fn files_stay_readable() {
    let long = |file: &str, code: &str| match code.lines().count() {
        lines if lines > 600 => vec![format!("{file}: {lines} lines of code")],
        _ => Vec::new(),
    };
    check(long);
    assert_eq!(long("x.rs", &"x\n".repeat(601)).len(), 1);
}
