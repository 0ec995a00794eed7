//! The commands.

mod bench;
mod chat;
mod models;
mod pull;
mod serve;

use std::process::ExitCode;

use crate::log::{self, Style};
use crate::options::{Options, help};

/// Runs what the arguments ask for.
pub fn run(mut arguments: Vec<String>) -> ExitCode {
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") || arguments.is_empty() {
        print!("{}", help());
        return ExitCode::SUCCESS;
    }
    if arguments[0] == "--version" {
        println!("omlx-server {}, libomlx {}", env!("CARGO_PKG_VERSION"), omlx_client::version());
        return ExitCode::SUCCESS;
    }
    let command = arguments.remove(0);
    match dispatch(&command, arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("omlx-server: {message}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: &str, arguments: Vec<String>) -> Result<(), String> {
    let options = Options::read(arguments, |name| std::env::var(name).ok())?;
    let mut style = Style::parse(options.text("log-level"), options.text("log-format"))?;
    if command != "serve" {
        style.level = style.level.min(omlx_client::LogLevel::Warn);
    }
    log::start(style);
    match command {
        "serve" => serve::run(&options),
        "models" => models::run(&options),
        "pull" => pull::run(&options),
        "chat" => chat::run(&options),
        "bench" => bench::run(&options),
        other => Err(format!("there is no command {other:?}; see --help")),
    }
}
