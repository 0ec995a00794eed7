//! The C programs in `c/`: requests, pools and models from birth to death, caches, and what hosts may pass in. Each runs as it
//! is and under the sanitizers. Those instrument the C side only; the library's memory is watched where C touches it,
//! and for leaks, because it comes from the same `malloc`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cc::SANITIZERS;
use crate::{cc, prototypes};

/// What the program says of itself when the sanitizers are in it.
const LINKED: [&str; 2] = ["__asan_init", "__ubsan_handle_"];

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
    run("lifecycle", "-sanitized", &SANITIZERS, "models");
}

#[test]
fn inputs() {
    run("inputs", "", &[], "models");
}

#[test]
fn inputs_under_sanitizers() {
    run("inputs", "-sanitized", &SANITIZERS, "models");
}

#[test]
fn vectors_and_scores() {
    run("encode", "", &[], "tests/fixtures/encoders");
}

#[test]
fn vectors_and_scores_under_sanitizers() {
    run("encode", "-sanitized", &SANITIZERS, "tests/fixtures/encoders");
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
    run_cache("-sanitized", &SANITIZERS);
}

/// Runs a program that also takes an empty folder.
fn run_with_folder(name: &str, suffix: &str, flags: &[&str], args: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let args: Vec<_> = args.iter().copied().chain([folder.path().to_str().expect("UTF-8")]).collect();
    run_with(name, suffix, flags, &args);
}

const ENCODERS_AND_CHAT: [&str; 2] = ["tests/fixtures/encoders", "models/tiny-chat"];

#[test]
fn functions_in_callbacks() {
    run_with_folder("callbacks", "", &[], &ENCODERS_AND_CHAT);
}

#[test]
fn functions_in_callbacks_under_sanitizers() {
    run_with_folder("callbacks", "-sanitized", &SANITIZERS, &ENCODERS_AND_CHAT);
}

/// Functions that the header does not mark as blocking, and that `source` does not call.
fn not_called(header: &str, source: &str) -> Vec<String> {
    let called = |name: &str| source.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == name);
    let blocks = |name: &str| {
        let (before, _) = header
            .split_once(&format!(" {name}("))
            .or_else(|| header.split_once(&format!("*{name}(")))
            .expect("a function");
        let docs = before.rsplit("\n\n").next().expect("its documentation");
        docs.contains("Blocking") && !docs.contains("Blocking\n/// unless") && !docs.contains("Blocking unless")
    };
    let functions = prototypes::parse(header).into_iter().map(|function| function.name);
    functions.filter(|name| !blocks(name) && !called(name)).collect()
}

/// `callbacks.c` leaves none out, and leaving one out would be seen.
#[test]
fn every_function_that_does_not_block_is_called_in_callbacks() {
    let source = fs::read_to_string(cc::root().join("tests/capi/c/callbacks.c")).expect("callbacks.c");
    let header = prototypes::header();
    assert_eq!(not_called(&header, &source), Vec::<String>::new());
    assert_eq!(not_called(&header, &source.replace("omlx_pool_status(", "(")), ["omlx_pool_status"]);
    let more = header.replace("/// Drops a reference; NULL is ignored. The last one", "/// Blocking. The last one");
    assert_eq!(not_called(&more, &source.replace("omlx_pool_release(", "(")), Vec::<String>::new());
}

#[test]
fn handles_in_every_order() {
    run_with_folder("orders", "", &[], &ENCODERS_AND_CHAT);
}

#[test]
fn handles_in_every_order_under_sanitizers() {
    run_with_folder("orders", "-sanitized", &SANITIZERS, &ENCODERS_AND_CHAT);
}

/// `tests/capi/tsan` looks for races in it; here it has to do what it says.
#[test]
fn many_threads() {
    run("races", "", &[], "tests/fixtures/null");
}

#[test]
fn many_threads_under_sanitizers() {
    run("races", "-sanitized", &SANITIZERS, "tests/fixtures/null");
}

/// Reads an event after its life, which the header forbids; or, with an argument, forgets to release one string; or, with two,
/// adds up more than an int holds.
const WRONG: &str = r#"
#include "harness.h"

int main(int argc, char **argv) {
    const char *json = "{\"prompt\":[5,6],\"max_tokens\":3,\"ignore_eos\":true}";
    omlx_pool *pool = open_pool("models");
    omlx_string *models = NULL;
    omlx_request *request = NULL;
    const omlx_event *first = NULL, *second = NULL;
    (void)argv;
    if (argc > 2)
        return (int)(2147483647 + argc == 0); /* Undefined: too large. */
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

/// Symbols that a program takes from elsewhere.
fn undefined(program: &Path) -> String {
    let output = Command::new("nm").arg("-u").arg(program).output().expect("nm starts");
    String::from_utf8(output.stdout).expect("ASCII")
}

/// Whether what was freed is overwritten where the allocator keeps nothing of its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const FREED: &str = "#include <stdlib.h>
int main(void) {
    unsigned char *volatile freed = malloc(2000);
    void *volatile behind = malloc(10);
    free(freed);
    return behind == NULL || freed[100] != 165;
}
";

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn programs_find_freed_memory_overwritten() {
    let source = cc::work_dir().join("freed.c");
    fs::write(&source, FREED).expect("a source file");
    let program = cc::compile(&source, "freed", &["-std=c99", "-w"]);
    let outcome = cc::run(&program, &[]);
    assert!(outcome.success, "{}", outcome.stderr);
    // It can tell: nothing is overwritten for a program that is started by itself.
    assert!(!std::process::Command::new(&program).status().expect("it starts").success());
}

#[test]
fn the_sanitizers_see_the_librarys_memory() {
    let source = cc::work_dir().join("wrong-host.c");
    fs::write(&source, WRONG).expect("a source file");
    let harness = format!("-I{}", cc::root().join("tests/capi/c").display());
    let flags = ["-std=c99", "-g", &harness];
    let program = cc::compile(&source, "wrong-host", &flags.into_iter().chain(SANITIZERS).collect::<Vec<_>>());
    let bare = cc::compile(&source, "wrong-host-bare", &flags);
    assert!(LINKED.iter().all(|name| undefined(&program).contains(name)), "{}", undefined(&program));
    assert!(!LINKED.iter().any(|name| undefined(&bare).contains(name)), "{}", undefined(&bare));
    let outcome = cc::run(&program, &[]);
    assert!(!outcome.success && outcome.stderr.contains("heap-use-after-free"), "{}", outcome.stderr);
    let outcome = cc::run(&program, &["a", "number"]);
    let stops = !outcome.success && outcome.stderr.contains("runtime error: signed integer overflow");
    assert!(stops, "{}", outcome.stderr);
    if cfg!(target_os = "linux") {
        let outcome = cc::run(&program, &["leak"]);
        assert!(!outcome.success && outcome.stderr.contains("detected memory leaks"), "{}", outcome.stderr);
    }
}
