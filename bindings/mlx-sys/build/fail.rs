//! Errors of the build as text for a reader: what is wrong, what was tried, what to do.

use std::path::Path;

/// A failed build step. Each line of the text becomes one error line of cargo.
#[derive(Debug)]
pub struct Failure(String);

impl Failure {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// A failed file operation.
    pub fn io(action: &str, path: &Path, error: &std::io::Error) -> Self {
        Self(format!("cannot {action} {}: {error}", path.display()))
    }

    pub fn report_and_exit(&self) -> ! {
        for line in self.0.lines().filter(|line| !line.trim().is_empty()) {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

/// The value of an environment variable, watched for changes. An empty value counts as unset.
pub fn watched_env(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A variable that cargo sets for every build script.
pub fn cargo_env(name: &str) -> Result<String, Failure> {
    std::env::var(name).map_err(|_| Failure::new(format!("{name} is not set; the build script must be run by cargo")))
}
