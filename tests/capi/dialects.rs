//! The header compiles in every dialect that hosts use, with all warnings as errors.

use std::fs;
use std::path::PathBuf;

use crate::cc;

/// Uses what only exists as macros and enumerators: prototypes are checked by including them.
const USES: &str = r#"
#include "omlx.h"
#include "omlx.h"

int probe(uint32_t kind, omlx_status status);

int probe(uint32_t kind, omlx_status status) {
    omlx_pool_options pool = OMLX_POOL_OPTIONS_INIT;
    omlx_generate_options generate = OMLX_GENERATE_OPTIONS_INIT;
    omlx_download_progress progress = OMLX_DOWNLOAD_PROGRESS_INIT;
    omlx_cache_limits limits = OMLX_CACHE_LIMITS_INIT;
    omlx_event_kind text = OMLX_EVENT_KIND_TEXT;
    pool.device = OMLX_DEVICE_CPU;
    pool.dtype = OMLX_DTYPE_F32;
    switch (kind) {
    case OMLX_EVENT_KIND_TEXT: return OMLX_FINISH_REASON_STOP;
    case OMLX_EVENT_KIND_DONE: return OMLX_LOG_LEVEL_WARN;
    default: return status == OMLX_OK && sizeof(text) == 4 && sizeof(status) == 4
        && pool.struct_size == sizeof pool && generate.struct_size == sizeof generate
        && limits.struct_size == sizeof limits && progress.struct_size == sizeof progress
        && progress.state == OMLX_DOWNLOAD_STATE_LISTING && omlx_check_abi(OMLX_ABI_VERSION, 0) == OMLX_OK;
    }
}
"#;

fn source(name: &str, text: &str) -> PathBuf {
    let path = cc::work_dir().join(name);
    fs::write(&path, text).expect("a source file");
    path
}

#[test]
fn c_dialects() {
    let file = source("dialect.c", USES);
    for dialect in ["-std=c99", "-std=c11", "-std=c17", "-std=gnu17", "-std=c2x"] {
        let flags: Vec<_> =
            cc::STRICT.iter().copied().chain([dialect, "-Wstrict-prototypes", "-Wconversion"]).collect();
        cc::check(&file, false, &flags).unwrap_or_else(|messages| panic!("{dialect}:\n{messages}"));
    }
}

#[test]
fn cxx_dialects() {
    let file = source("dialect.cpp", USES);
    for dialect in ["-std=c++11", "-std=c++14", "-std=c++17", "-std=c++20"] {
        let flags: Vec<_> = cc::STRICT.iter().copied().chain([dialect, "-Wold-style-cast", "-Wconversion"]).collect();
        cc::check(&file, true, &flags).unwrap_or_else(|messages| panic!("{dialect}:\n{messages}"));
    }
}

/// The same check refuses what it should: these flags do make warnings errors.
#[test]
fn a_wrong_use_is_refused() {
    let wrong =
        USES.replace("omlx_pool_options pool = OMLX_POOL_OPTIONS_INIT;", "omlx_pool_options pool = {0}; int unused;");
    assert_ne!(wrong, USES);
    for (name, cxx, dialect) in [("wrong.c", false, "-std=c99"), ("wrong.cpp", true, "-std=c++11")] {
        let flags: Vec<_> = cc::STRICT.iter().copied().chain([dialect]).collect();
        let messages = cc::check(&source(name, &wrong), cxx, &flags).expect_err("a warning must be an error");
        assert!(messages.contains("unused"), "{messages}");
    }
}
