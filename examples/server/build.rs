//! Tells the linker where MLX lies.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let library = env::var("DEP_OMLX_CLIENT_LIBDIR").expect("omlx-client publishes the folder of libmlx");
    let macos = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "macos");
    // Beside the program first, for installed layouts; then where the build found MLX.
    let origin = if macos { "@loader_path" } else { "$ORIGIN" };
    for folder in [origin, &library] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
    if !macos {
        // A CUDA build of libmlx needs libraries of the NVIDIA driver, which a build machine may lack.
        println!("cargo:rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
}
