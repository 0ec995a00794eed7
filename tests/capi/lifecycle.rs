//! The C programs in `c/`: requests, pools and models from birth to death, caches, and what hosts may pass in. Each runs as it
//! is and under the sanitizers. Those instrument the C side only; the library's memory is watched where C touches it,
//! and for leaks, because it comes from the same `malloc`.

use std::fs;

use crate::cc;

const SANITIZERS: &str = "-fsanitize=address,undefined";

fn run(name: &str, suffix: &str, flags: &[&str], models: &str) {
    run_with(name, suffix, flags, &[models]);
}

fn run_with(name: &str, suffix: &str, flags: &[&str], args: &[&str]) {
    let source = cc::root().join(format!("tests/capi/c/{name}.c"));
    let flags: Vec<_> = ["-std=c99", "-g"].iter().chain(flags).copied().collect();
    let program = cc::compile(&source, &format!("{name}{suffix}"), &flags);
    let outcome = cc::run_ok(&program, args);
    assert_eq!(outcome.stdout, format!("{name}: 0 failures\n"), "{}", outcome.stderr);
    assert_eq!(outcome.stderr, "", "the library prints nothing");
}

#[test]
fn requests_pools_and_models() {
    run("lifecycle", "", &[], "models");
}

#[test]
fn requests_pools_and_models_under_sanitizers() {
    run("lifecycle", "-sanitized", &[SANITIZERS], "models");
}

#[test]
fn inputs() {
    run("inputs", "", &[], "models");
}

#[test]
fn inputs_under_sanitizers() {
    run("inputs", "-sanitized", &[SANITIZERS], "models");
}

#[test]
fn vectors_and_scores() {
    run("encode", "", &[], "tests/fixtures/encoders");
}

#[test]
fn vectors_and_scores_under_sanitizers() {
    run("encode", "-sanitized", &[SANITIZERS], "tests/fixtures/encoders");
}

fn run_cache(suffix: &str, flags: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    run_with("cache", suffix, flags, &["models", folder.path().to_str().expect("UTF-8")]);
}

#[test]
fn caches() {
    run_cache("", &[]);
}

#[test]
fn caches_under_sanitizers() {
    run_cache("-sanitized", &[SANITIZERS]);
}

/// Reads an event after its life, which the header forbids; or, with an argument, forgets to release one string.
const WRONG: &str = r#"
#include "harness.h"

int main(int argc, char **argv) {
    const char *json = "{\"prompt\":[5,6],\"max_tokens\":3,\"ignore_eos\":true}";
    omlx_pool *pool = open_pool("models");
    omlx_string *models = NULL;
    omlx_request *request = NULL;
    const omlx_event *first = NULL, *second = NULL;
    (void)argv;
    if (argc > 1) {
        omlx_pool_models(pool, &models, NULL);
        models = NULL;
        end_pool(pool);
        return finish("wrong");
    }
    omlx_generate(pool, json, strlen(json), NULL, &request, NULL);
    omlx_request_next(request, -1, &first, NULL);
    omlx_request_next(request, -1, &second, NULL);
    printf("%u\n", first->kind);
    omlx_request_release(request);
    end_pool(pool);
    return finish("wrong");
}
"#;

#[test]
fn the_sanitizers_see_the_librarys_memory() {
    let source = cc::work_dir().join("wrong-host.c");
    fs::write(&source, WRONG).expect("a source file");
    let harness = format!("-I{}", cc::root().join("tests/capi/c").display());
    let program = cc::compile(&source, "wrong-host", &["-std=c99", "-g", SANITIZERS, &harness]);
    let outcome = cc::run(&program, &[]);
    assert!(!outcome.success && outcome.stderr.contains("heap-use-after-free"), "{}", outcome.stderr);
    if cfg!(target_os = "linux") {
        let outcome = cc::run(&program, &["leak"]);
        assert!(!outcome.success && outcome.stderr.contains("detected memory leaks"), "{}", outcome.stderr);
    }
}
