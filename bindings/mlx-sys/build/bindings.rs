//! Generates the Rust bindings of mlx-c with bindgen.

use crate::fail::{Failure, cargo_env, watched_env};
use crate::wheel::{self, Platform};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Takes the place of `mlx/c/half.h`, like `native/prelude.hpp` does for C++: `lib.rs` defines the types, alike on
/// every platform, and no header of ARM intrinsics has to be parsed.
const HALF_TYPES: &str = "#define MLX_HALF_H\n#define HAS_FLOAT16\n#define HAS_BFLOAT16\n\
                          typedef struct { unsigned short bits; } float16_t;\ntypedef unsigned short bfloat16_t;\n";

pub fn generate(mlx_c: &Path) -> Result<(), Failure> {
    let libclang = libclang()?;
    // SAFETY: the script has no other thread; it compiles, with several, only afterwards.
    unsafe { std::env::set_var("LIBCLANG_PATH", &libclang) };

    let mut wrapper = HALF_TYPES.to_owned();
    for header in headers(&mlx_c.join("mlx/c"))? {
        wrapper += &format!("#include \"mlx/c/{header}\"\n");
    }
    let mut builder = bindgen::Builder::default()
        .header_contents("mlx_c.h", &wrapper)
        .clang_arg(format!("-I{}", mlx_c.display()))
        .formatter(bindgen::Formatter::None)
        .blocklist_type("float16_t|bfloat16_t")
        // As in the published package: their C types do not match rustc's own declarations of them.
        .blocklist_function("malloc|realloc");
    if let Some(folder) = compiler_headers() {
        builder = builder.clang_arg("-idirafter").clang_arg(folder);
    }
    let bindings = without_panic(|| builder.generate()).map_err(|error| {
        Failure::new(format!(
            "bindgen failed with libclang from {}\n{error}\n\
             LIBCLANG_PATH must name libclang or its folder, for the processor of this machine.\n\
             Unset it for the default.",
            libclang.display()
        ))
    })?;
    let file = Path::new(&cargo_env("OUT_DIR")?).join("bindings.rs");
    bindings.write_to_file(&file).map_err(|error| Failure::io("write", &file, &error))
}

/// Runs bindgen, which panics if it cannot load libclang, and gives a panic back as an error.
fn without_panic<T, E: ToString>(bindgen: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(bindgen));
    let _ = std::panic::take_hook();
    match result {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(panic.downcast_ref::<String>().map_or("it panicked".to_owned(), String::clone)),
    }
}

/// libclang, or the folder that holds it: `LIBCLANG_PATH`, else Xcode's, else the pinned wheel. A libclang that is
/// installed elsewhere is not used, so that every machine generates the same bindings.
fn libclang() -> Result<PathBuf, Failure> {
    if let Some(path) = watched_env("LIBCLANG_PATH") {
        return Ok(PathBuf::from(path));
    }
    let host = Platform::host();
    if host.os == "macos"
        && let Some(path) = xcode_libclang()
    {
        return Ok(path);
    }
    let instead = "LIBCLANG_PATH to libclang (the file or its folder)";
    let folder = wheel::unpacked("libclang", &host, instead)?.join("libclang-18.1.1.data/platlib/clang/native");
    Ok(folder.join(host.shared_library("clang")))
}

fn xcode_libclang() -> Option<PathBuf> {
    let output = Command::new("xcode-select").arg("--print-path").output().ok()?;
    let developer = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    let library = "usr/lib/libclang.dylib";
    [developer.join("Toolchains/XcodeDefault.xctoolchain").join(library), developer.join(library)]
        .into_iter()
        .find(|path| path.is_file())
}

/// The folder with `stddef.h` and the like of the C compiler: the libclang wheel has none.
fn compiler_headers() -> Option<String> {
    let mut compiler = cc::Build::new().try_get_compiler().ok()?.to_command();
    let output = compiler.arg("-print-file-name=include").output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    Path::new(&folder).is_absolute().then_some(folder)
}

fn headers(folder: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(folder).map_err(|error| Failure::io("read", folder, &error))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut headers: Vec<String> = names.filter(|name| name.ends_with(".h")).collect();
    headers.sort();
    Ok(headers)
}
