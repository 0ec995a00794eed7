//! The library itself: version and ABI.

use std::ffi::c_char;

use super::{OMLX_ABI_VERSION, omlx_error};
use crate::error::{Error, Status};

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

/// The binary interface that the loaded library offers: its `OMLX_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn omlx_abi_version() -> u32 {
    OMLX_ABI_VERSION
}

/// Checks that the loaded library fits the header the host was compiled with: pass `OMLX_ABI_VERSION`. It does if that is
/// between 1 and its own number, since interfaces with a number only grow; a library with the number 0 fits 0 alone.
///
/// `OMLX_E_UNSUPPORTED` if it does not; nothing else of the library may then be used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omlx_check_abi(header_version: u32, error: *mut *mut omlx_error) -> Status {
    super::boundary(error, || {
        if fits(header_version, OMLX_ABI_VERSION) {
            return Ok(());
        }
        let what = format!("the host was built for ABI {header_version}, this library has {OMLX_ABI_VERSION}");
        Err(Error::unsupported(what))
    })
}

/// Whether a library with the number `library` has all that the header with the number `header` promises.
fn fits(header: u32, library: u32) -> bool {
    header <= library && (header > 0 || library == 0)
}

/// Name of a status, such as "OMLX_E_NOT_FOUND"; "OMLX_E_UNKNOWN" for a number that is none; static memory.
#[unsafe(no_mangle)]
pub extern "C" fn omlx_status_name(status: i32) -> *const c_char {
    let name = Status::ALL.iter().find(|s| **s as i32 == status);
    name.map_or(c"OMLX_E_UNKNOWN", |status| status.c_name()).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn a_library_fits_all_headers_since_the_first_promise() {
        let headers = |library| (0..6).filter(|&header| fits(header, library)).collect::<Vec<_>>();
        assert_eq!(headers(0), [0]);
        assert_eq!(headers(1), [1]);
        assert_eq!(headers(2), [1, 2]);
        assert_eq!(headers(4), [1, 2, 3, 4]);
        assert!(!fits(u32::MAX, 4) && fits(4, u32::MAX));
    }
}
