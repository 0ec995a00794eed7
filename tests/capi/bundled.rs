//! A pool without models folder finds the models that are installed with the library.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::Value;

use crate::cc;

const SOURCE: &str = r#"
#include "harness.h"

int main(void) {
    omlx_pool *pool = open_pool(NULL);
    omlx_string *models = NULL;
    omlx_error *error = NULL;
    CHECK_STATUS(OMLX_OK, omlx_pool_models(pool, &models, &error));
    puts(omlx_string_data(models));
    omlx_string_release(models);
    end_pool(pool);
    return failures;
}
"#;

#[test]
fn a_pool_without_folder_finds_the_installed_models() {
    let prefix = cc::work_dir().join("installed");
    if prefix.exists() {
        fs::remove_dir_all(&prefix).expect("the old installation can go");
    }
    let (lib, models) = (prefix.join("lib"), prefix.join("share/omlx/models"));
    fs::create_dir_all(&lib).expect("a folder");
    fs::create_dir_all(&models).expect("a folder");
    // A file of its own: a link would lead back to where the library was built.
    fs::copy(cc::library(), lib.join(cc::soname())).expect("the library can be copied");
    symlink(cc::root().join("models/tiny-chat"), models.join("tiny-chat")).expect("a link to the model");

    let source = cc::work_dir().join("bundled.c");
    fs::write(&source, SOURCE).expect("a source file");
    let harness = format!("-I{}", cc::root().join("tests/capi/c").display());
    let program = cc::compile(&source, "bundled", &["-std=c99", &harness]);
    let outcome = cc::run_with(&program, &[], &lib);
    assert!(outcome.success, "{}", outcome.stderr);
    let found: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let entries = found.as_array().expect("an array");
    assert_eq!(entries.len(), 1, "{found}");
    assert_eq!(entries[0]["id"], "tiny-chat");
    let expected = models.canonicalize().expect("a path").join("tiny-chat");
    assert_eq!(entries[0]["folder"].as_str(), expected.to_str());
}
