//! The number of the binary interface. The build script reads this file too, for the library's name.

/// Version of the binary interface that this header describes. 0: it may still change from version to version.
pub const OMLX_ABI_VERSION: u32 = 0;
