//! The version functions say what the rest of the project says.

use std::ffi::{CStr, c_char};

use omlx::capi::{omlx_mlx_version, omlx_version};

fn text(pointer: *const c_char) -> &'static str {
    // SAFETY: static NUL-terminated text, by the header.
    unsafe { CStr::from_ptr(pointer) }.to_str().expect("ASCII")
}

#[test]
fn versions() {
    assert_eq!(text(omlx_version()), env!("CARGO_PKG_VERSION"));
    assert_eq!(text(omlx_mlx_version()), omlx::mlx::VERSION.to_str().unwrap());
}
