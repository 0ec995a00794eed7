//! The reference HTTP server of libomlx. It uses the C ABI alone, through `omlx-client`: what it cannot do, the ABI lacks.
//!
//! `routes/` has a file for each endpoint, `http/` what all of them share, `cli/` the commands.

mod app;
mod cli;
mod http;
mod log;
mod options;
mod routes;

fn main() -> std::process::ExitCode {
    cli::run(std::env::args().skip(1).collect())
}
