//! Tells the linker where MLX lies and what the shared library is called.

use std::env;
use std::path::PathBuf;

#[path = "src/capi/abi.rs"]
mod abi;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/capi/abi.rs");
    compile_shim();
    let library = env::var("DEP_MLX_LIBDIR").expect("mlx-sys publishes the folder of libmlx");
    let macos = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "macos");
    // Beside the binary first, for installed layouts; then where the build found MLX.
    let origin = if macos { "@loader_path" } else { "$ORIGIN" };
    for folder in [origin, &library] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
    // Programs of other packages that hold this library need the same: DEP_OMLX_LIBDIR in their build scripts.
    println!("cargo:libdir={library}");
    if !macos {
        // A CUDA build of libmlx needs libraries of the NVIDIA driver, which a build machine may lack.
        println!("cargo:rustc-link-arg=-Wl,--allow-shlib-undefined");
    }
    // 1 from the first promise on: later interfaces only add to it, and its programs must find every later library.
    let number = u32::from(abi::OMLX_ABI_VERSION != 0);
    let (file, linked, flag) = match macos {
        true => ("deps/libomlx.dylib", format!("libomlx.{number}.dylib"), "-install_name,@rpath/"),
        false => ("deps/libomlx.so", format!("libomlx.so.{number}"), "-soname,"),
    };
    println!("cargo:rustc-cdylib-link-arg=-Wl,{flag}{linked}");
    // The crate llguidance has a C API of its own, which is none of ours.
    let hide = if macos { "-unexported_symbol,_llg_*" } else { "--exclude-libs,ALL" };
    println!("cargo:rustc-cdylib-link-arg=-Wl,{hide}");
    link_by_its_own_name(file, &linked);
}

/// Programs look the library up by the name it calls itself, which cargo does not give the file. The one in `deps` is
/// always the newest: `cargo test` does not renew the other.
fn link_by_its_own_name(file: &str, linked: &str) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // <target>/<profile>/build/<package>/out
    let Some(profile) = out.ancestors().nth(3) else { return };
    let link = profile.join(linked);
    let _ = std::fs::remove_file(&link);
    if let Err(error) = std::os::unix::fs::symlink(file, &link) {
        println!("cargo:warning={}: {error}", link.display());
    }
}

/// What MLX's C interface lacks: graph nodes that call kernels in Rust, and memory that becomes arrays.
fn compile_shim() {
    let sources = ["src/kernels/shim.cpp", "src/mlx/buffer.cpp"];
    for source in sources {
        println!("cargo:rerun-if-changed={source}");
    }
    let include = env::var_os("DEP_MLX_INCLUDE").expect("mlx-sys publishes MLX's include folders");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).files(sources);
    // MLX's own headers are not free of warnings.
    for folder in env::split_paths(&include) {
        build.flag("-isystem").flag(folder);
    }
    build.compile("omlx_shim");
}
