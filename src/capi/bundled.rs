//! The models that are shipped with the library: found from where its own file lies.

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Places of the bundled models relative to a folder above the library: installed, and in a source tree.
const PLACES: [&str; 2] = ["share/omlx/models", "models"];

/// A model that must be in a folder for it to be ours: "models" alone is a common name.
const MARK: &str = "tiny-chat/config.json";

/// `Dl_info` of `<dlfcn.h>`.
#[repr(C)]
struct DlInfo {
    file: *const c_char,
    base: *mut c_void,
    symbol: *const c_char,
    address: *mut c_void,
}

unsafe extern "C" {
    fn dladdr(address: *const c_void, info: *mut DlInfo) -> c_int;
}

/// The file this code was loaded from: the shared library, or the program it is linked into.
fn own_file() -> Option<PathBuf> {
    let mut info = DlInfo {
        file: std::ptr::null(),
        base: std::ptr::null_mut(),
        symbol: std::ptr::null(),
        address: std::ptr::null_mut(),
    };
    let address: *const c_void = (own_file as fn() -> Option<PathBuf>) as *const c_void;
    // SAFETY: any address may be asked for; `info` outlives the call.
    let found = unsafe { dladdr(address, &mut info) } != 0 && !info.file.is_null();
    // SAFETY: the loader's own NUL-terminated string, alive while the library is loaded.
    let file = found.then(|| unsafe { CStr::from_ptr(info.file) })?;
    // Links are followed: a link to the library in another place is still this library.
    Path::new(OsStr::from_bytes(file.to_bytes())).canonicalize().ok()
}

/// The folder of the bundled models, if they are installed.
pub(super) fn models_dir() -> Option<PathBuf> {
    let file = own_file()?;
    let candidates = file.ancestors().skip(1).flat_map(|folder| PLACES.map(|place| folder.join(place)));
    candidates.into_iter().find(|models| models.join(MARK).is_file())
}
