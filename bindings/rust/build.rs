//! Makes Rust declarations of the C header and hands on where libmlx lies.

#[path = "build/header.rs"]
mod header;

use std::env;
use std::path::Path;

const HEADER: &str = "../../include/omlx.h";

fn main() {
    for input in ["build.rs", "build/header.rs", HEADER] {
        println!("cargo:rerun-if-changed={input}");
    }
    let text = std::fs::read_to_string(HEADER).unwrap_or_else(|error| panic!("{HEADER}: {error}"));
    let declarations = header::to_rust(&text).unwrap_or_else(|problem| panic!("{HEADER}: {problem}"));
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    std::fs::write(Path::new(&out).join("omlx.rs"), declarations).expect("OUT_DIR can be written");

    let library = env::var("DEP_OMLX_LIBDIR").expect("omlx publishes the folder of libmlx");
    println!("cargo:libdir={library}");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{library}");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os != "macos") {
        println!("cargo:rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
}
