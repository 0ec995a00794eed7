//! The C++ header: every dialect that it promises, all of the C functions, programs that use it, and the README's sample.

use std::fs;
use std::path::Path;

use crate::cc::{self, SANITIZERS};
use crate::host::Pool;
use crate::prototypes;

/// Everything that C++ compilers can complain about.
const STRICT: [&str; 9] = [
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pedantic",
    "-Wconversion",
    "-Wshadow",
    "-Wold-style-cast",
    "-Wnon-virtual-dtor",
    "-g",
];

/// C functions that have no place in the C++ header.
const NOT_NEEDED: &[(&str, &str)] = &[
    ("omlx_abi_version", "omlx_check_abi is called"),
    ("omlx_error_status", "the call has returned it"),
    ("omlx_pool_retain", "handles have one owner"),
    ("omlx_request_retain", "handles have one owner"),
    ("omlx_download_retain", "handles have one owner"),
];

fn strict(dialect: &'static str) -> Vec<&'static str> {
    STRICT.into_iter().chain([dialect]).collect()
}

fn program(name: &str) -> std::path::PathBuf {
    cc::root().join("tests/capi/cpp").join(name).with_extension("cpp")
}

#[test]
fn dialects() {
    for dialect in ["-std=c++17", "-std=c++20"] {
        for source in [program("client"), program("concepts"), cc::root().join("examples/cpp/chat.cpp")] {
            cc::check(&source, true, &strict(dialect)).unwrap_or_else(|messages| panic!("{dialect}:\n{messages}"));
        }
    }
    for dialect in ["-std=c++11", "-std=c++14"] {
        let messages = cc::check(&program("concepts"), true, &[dialect]).expect_err("C++17 is needed");
        assert!(messages.contains("omlx.hpp needs C++17 or later"), "{messages}");
    }
}

/// What must not compile: a copied handle, a wake function that may throw, a callback that returns something else.
#[test]
fn wrong_uses_are_refused() {
    for (number, (wrong, complaint)) in [
        ("omlx::request copy(omlx::request &r) { return r; }", "deleted"),
        ("void wake(omlx::request &r) { r.on_wake([] {}); }", "must be noexcept"),
        (
            "void log() { omlx::set_log_hook(OMLX_LOG_LEVEL_WARN, [](omlx_log_level, std::string_view) {}); }",
            "must be noexcept",
        ),
        ("void start(omlx::pool &p) { p.generate(\"\", [](const omlx::event &) { return 1; }); }", "whether to go on"),
        ("int unused(int x) { return 0; }", "unused"),
    ]
    .into_iter()
    .enumerate()
    {
        let source = cc::work_dir().join(format!("wrong-{number}.cpp"));
        fs::write(&source, format!("#include \"omlx.hpp\"\n{wrong}\n")).expect("a source file");
        let messages = cc::check(&source, true, &strict("-std=c++17")).expect_err(wrong);
        assert!(messages.contains(complaint), "{wrong}: {messages}");
    }
}

#[test]
fn every_function_has_its_place() {
    let mut text = String::new();
    for file in
        ["omlx.hpp", "omlx/base.hpp", "omlx/callback.hpp", "omlx/download.hpp", "omlx/event.hpp", "omlx/request.hpp"]
    {
        let path = cc::root().join("bindings/cpp").join(file);
        text += &fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    let used = |name: &str| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == name);
    let functions = prototypes::parse(&prototypes::header());
    let missing: Vec<_> = functions.iter().filter(|f| !used(&f.name)).map(|f| f.name.as_str()).collect();
    let mut expected: Vec<_> = NOT_NEEDED.iter().map(|(name, _)| *name).collect();
    expected.sort_by_key(|name| functions.iter().position(|f| f.name == *name));
    assert_eq!(missing, expected);
}

fn run_client(suffix: &str, flags: &[&'static str]) {
    let cache = tempfile::tempdir().expect("a folder");
    let flags: Vec<_> = strict("-std=c++17").into_iter().chain(flags.iter().copied()).collect();
    let client =
        cc::try_compile(&program("client"), &format!("client{suffix}"), &flags).unwrap_or_else(|m| panic!("{m}"));
    let folders = ["models", "tests/fixtures/encoders", cache.path().to_str().expect("UTF-8")];
    let outcome = cc::run_ok(&client, &folders);
    assert_eq!(outcome.stdout, "client: 0 failures\n", "{}", outcome.stderr);
    assert_eq!(outcome.stderr, "", "the library prints nothing");
}

#[test]
fn a_client() {
    run_client("", &[]);
}

/// With its leaks: a handle or a callback that is not given back is one.
#[test]
fn a_client_under_sanitizers() {
    run_client("-sanitized", &SANITIZERS);
}

/// Generations that are dropped at random points; OMLX_CHURN has more of them. With leaks, like those of `a_client`.
#[test]
fn generations_that_are_dropped() {
    let count = std::env::var("OMLX_CHURN").unwrap_or_else(|_| "300".to_owned());
    let seed = std::env::var("OMLX_SEED").unwrap_or_else(|_| std::process::id().to_string());
    let flags: Vec<_> = strict("-std=c++17").into_iter().chain(["-O1"]).chain(SANITIZERS).collect();
    let churn = cc::try_compile(&program("churn"), "churn", &flags).unwrap_or_else(|m| panic!("{m}"));
    let outcome = cc::run_ok(&churn, &["models", &count, &seed]);
    println!("seed {seed}: {}", outcome.stdout);
    assert!(outcome.stdout.ends_with("\nchurn: 0 failures\n"), "seed {seed}: {}", outcome.stdout);
    assert_eq!(outcome.stderr, "", "seed {seed}: the library prints nothing");
}

/// A handle that nobody owns any more.
const LEAK: &str = r#"
#include "harness.hpp"

int main() {
    omlx::pool pool = open_pool("models");
    auto *forgotten = new omlx::request(pool.generate(R"({"prompt":[5],"max_tokens":1})"));
    forgotten = nullptr;
    return forgotten != nullptr;
}
"#;

#[test]
fn a_leaked_handle_is_seen() {
    if !cfg!(target_os = "linux") {
        return;
    }
    let source = cc::work_dir().join("leak.cpp");
    fs::write(&source, LEAK).expect("a source file");
    let harness = format!("-I{}", cc::root().join("tests/capi/cpp").display());
    let flags: Vec<_> = ["-std=c++17", "-g", &harness].into_iter().chain(SANITIZERS).collect();
    let outcome = cc::run(&cc::compile(&source, "leak", &flags), &[]);
    assert!(!outcome.success && outcome.stderr.contains("detected memory leaks"), "{}", outcome.stderr);
}

/// The C++ program that the README shows.
fn readme_sample(readme: &str) -> &str {
    let (_, rest) = readme.split_once("```cpp\n").expect("a sample in C++");
    rest.split_once("```").expect("its end").0
}

#[test]
fn the_readmes_sample_answers() {
    let readme = fs::read_to_string(cc::root().join("README.md")).expect("README.md");
    let sample = readme_sample(&readme);
    assert!((8..=20).contains(&sample.lines().count()), "{} lines", sample.lines().count());
    let source = cc::work_dir().join("sample.cpp");
    fs::write(&source, sample).expect("a source file");
    let outcome = cc::run_ok(&cc::compile(&source, "sample", &["-std=c++17"]), &[]);
    let request = r#"{"messages":[{"role":"user","content":"What is 12 plus 30?"}]}"#;
    assert!(sample.contains("What is 12 plus 30?"));
    assert_eq!(outcome.stdout.trim_end(), Pool::open().answer(request).trim_end());
    // What the sample catches is said.
    fs::write(&source, sample.replace("\"models\"", "\"no/such/folder\"")).expect("a source file");
    let outcome = cc::run(&cc::compile(&source, "sample-wrong", &["-std=c++17"]), &[]);
    assert!(!outcome.success && outcome.stderr.contains("OMLX_E_NOT_FOUND: no/such/folder"), "{}", outcome.stderr);
}

#[test]
fn the_example_holds_a_conversation() {
    let chat = cc::compile(Path::new(&cc::root().join("examples/cpp/chat.cpp")), "chat-cpp", &["-std=c++17"]);
    let outcome = cc::run_with_input(&chat, &["models"], "My name is Ann.\nWhat is 12 plus 30?\n");
    assert!(outcome.success, "{}", outcome.stderr);
    assert_eq!(outcome.stdout.lines().filter(|line| !line.is_empty()).count(), 2, "{}", outcome.stdout);
    let cached = outcome.stderr.split(" of them cached").nth(1).and_then(|text| text.rsplit(' ').next());
    assert!(cached.and_then(|n| n.parse::<u32>().ok()).is_some_and(|n| n > 10), "{}", outcome.stderr);
}
