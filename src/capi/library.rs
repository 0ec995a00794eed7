//! The library itself: version and ABI.

use std::ffi::c_char;

use super::omlx_error;
use crate::error::{Error, Status};

/// Version of the binary interface that this header describes. 0: it may still change from version to version.
pub const OMLX_ABI_VERSION: u32 = 0;

/// The library's version, such as "0.1.0"; static memory.
#[unsafe(no_mangle)]
pub extern "C" fn omlx_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version of MLX that this build needs, exactly; static memory.
#[unsafe(no_mangle)]
pub extern "C" fn omlx_mlx_version() -> *const c_char {
    crate::mlx::VERSION.as_ptr()
}

/// The binary interface that the loaded library offers; `omlx_check_abi` compares it with `OMLX_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn omlx_abi_version() -> u32 {
    OMLX_ABI_VERSION
}

/// Checks that the loaded library fits the header the host was compiled with: pass `OMLX_ABI_VERSION`.
///
/// `OMLX_E_UNSUPPORTED` if it does not; nothing else of the library may then be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_check_abi(header_version: u32, error: *mut *mut omlx_error) -> Status {
    super::boundary(error, || {
        if header_version == OMLX_ABI_VERSION {
            return Ok(());
        }
        let what = format!("the host was built for ABI {header_version}, this library has {OMLX_ABI_VERSION}");
        Err(Error::unsupported(what))
    })
}

/// Name of a status, such as "OMLX_E_NOT_FOUND"; "OMLX_E_UNKNOWN" for a number that is none; static memory.
#[unsafe(no_mangle)]
pub extern "C" fn omlx_status_name(status: i32) -> *const c_char {
    let name = Status::ALL.iter().find(|s| **s as i32 == status);
    name.map_or(c"OMLX_E_UNKNOWN", |status| status.c_name()).as_ptr()
}
