//! NULL for every pointer argument of every function: a C program written from the header's prototypes, so that no
//! function can be forgotten.

use std::fmt::Write;
use std::fs;

use crate::cc;
use crate::prototypes::{self, Parameter, Prototype};

/// Pointers that may be NULL, as their documentation says, beside `error`.
const OPTIONAL: &[(&str, &str)] = &[
    ("omlx_pool_open", "options"),
    ("omlx_pool_add_model", "id"),
    ("omlx_download_wait", "result_json"),
    ("omlx_model_unload", "freed"),
    ("omlx_download_set_callback", "callback"),
    ("omlx_download_set_callback", "user_data"),
    ("omlx_download_set_callback", "destroy"),
    ("omlx_generate", "options"),
    ("omlx_embed", "options"),
    ("omlx_rerank", "options"),
    ("omlx_request_set_wake", "wake"),
    ("omlx_request_set_wake", "user_data"),
    ("omlx_request_set_wake", "destroy"),
    ("omlx_tokenize", "model"),
    ("omlx_detokenize", "model"),
    ("omlx_cache_stats", "model"),
    ("omlx_cache_clear", "model"),
    ("omlx_cache_clear", "bytes"),
    ("omlx_cache_flush", "model"),
    ("omlx_cache_prefetch", "tokens"),
    ("omlx_cache_pin", "tokens"),
    ("omlx_set_log_hook", "hook"),
    ("omlx_set_log_hook", "user_data"),
    ("omlx_set_log_hook", "destroy"),
];

const START: &str = r#"
#include "harness.h"

/* Where outputs are sent: must stay as they are when a call fails. */
static void *const untouched = (void *)&failures;

/* The call got NULL for `parameter`: it must say so, and write nothing but the error. */
static void check_null(const char *function, const char *parameter, omlx_status status, omlx_error *error, void *output) {
    char expected[128];
    snprintf(expected, sizeof expected, "%s is NULL", parameter);
    if (status != OMLX_E_INVALID_ARGUMENT || omlx_error_status(error) != status ||
        strstr(omlx_error_message(error), expected) == NULL || output != untouched) {
        failures++;
        fprintf(stderr, "%s with NULL for %s: %s: %s\n", function, parameter, omlx_status_name(status),
                omlx_error_message(error));
    }
    omlx_error_release(error);
}

int main(void) {
    omlx_pool_options pool_options = OMLX_POOL_OPTIONS_INIT;
    omlx_generate_options generate_options = OMLX_GENERATE_OPTIONS_INIT;
    omlx_cache_limits cache_limits = OMLX_CACHE_LIMITS_INIT;
    omlx_download_progress progress = OMLX_DOWNLOAD_PROGRESS_INIT;
    const char *missing = "{\"repo\":\"org/missing\",\"folder\":\"/dev/null\",\"offline\":true}";
    const char *json = "{\"prompt\":[5,6],\"max_tokens\":1}";
    const uint32_t tokens[1] = {5};
    uint64_t number = 0;
    omlx_pool *pool = open_pool("models");
    omlx_request *request = NULL;
    omlx_download *download = NULL;
    omlx_error *error = NULL;
    (void)pool_options, (void)cache_limits, (void)progress, (void)tokens, (void)number; /* Not every selection of functions needs them. */
    CHECK_STATUS(OMLX_OK, omlx_generate(pool, json, strlen(json), &generate_options, &request, &error));
    CHECK_STATUS(OMLX_OK, omlx_download_start(pool, missing, strlen(missing), &download, &error));
"#;

const END: &str = r#"
    omlx_download_release(download);
    omlx_request_release(request);
    end_pool(pool);
    return finish("null");
}
"#;

fn is_error(parameter: &Parameter) -> bool {
    parameter.kind == "omlx_error **"
}

fn is_optional(optional: &[(&str, &str)], function: &Prototype, parameter: &Parameter) -> bool {
    is_error(parameter) || optional.contains(&(function.name.as_str(), parameter.name.as_str()))
}

/// NULL, or 0 for what is not a pointer.
fn nothing(parameter: &Parameter) -> &'static str {
    if parameter.is_pointer() { "NULL" } else { "0" }
}

/// An argument that the function takes.
fn something(parameter: &Parameter) -> String {
    match parameter.kind.as_str() {
        "omlx_pool *" => "pool",
        "omlx_request *" => "request",
        "const omlx_pool_options *" => "&pool_options",
        "const omlx_generate_options *" => "&generate_options",
        "const omlx_cache_limits *" | "omlx_cache_limits *" => "&cache_limits",
        "omlx_download *" => "download",
        "omlx_download_progress *" => "&progress",
        "const uint32_t *" => "tokens",
        "const char *" => "\"tiny-chat\"",
        "omlx_error **" => "&error",
        "void *" => "NULL",
        "size_t" | "int32_t" | "uint32_t" | "uint64_t" => "1",
        "int64_t" => "0",
        "uint64_t *" => "&number",
        kind if kind.ends_with("_fn") => "NULL",
        kind if kind.ends_with("**") => "&output",
        kind => panic!("no value for a parameter of type {kind}"),
    }
    .to_owned()
}

/// The C statements for one function.
fn statements(function: &Prototype, optional: &[(&str, &str)]) -> String {
    let Prototype { name, returns, parameters } = function;
    let arguments: Vec<_> = parameters.iter().map(nothing).collect();
    let call = format!("{name}({})", arguments.join(", "));
    let mut text = String::new();
    let reports = parameters.iter().any(is_error);
    let required: Vec<_> =
        parameters.iter().filter(|p| p.is_pointer() && !is_optional(optional, function, p)).collect();
    // Everything NULL at once.
    let _ = match returns.as_str() {
        "void" => writeln!(text, "    {call};"),
        "omlx_status" if required.is_empty() || !reports => writeln!(text, "    CHECK({call} == OMLX_OK);"),
        "omlx_status" => writeln!(text, "    CHECK({call} == OMLX_E_INVALID_ARGUMENT);"),
        "const char *" => writeln!(text, "    CHECK({call} != NULL);"),
        "size_t" | "uint64_t" => writeln!(text, "    CHECK({call} == 0);"),
        "const uint32_t *" => writeln!(text, "    CHECK({call} == NULL);"),
        _ => writeln!(text, "    (void){call};"),
    };
    if !reports {
        return text;
    }
    // One NULL among good arguments.
    for null in required {
        let argument = |p: &Parameter| if p == null { "NULL".to_owned() } else { something(p) };
        let arguments: Vec<_> = parameters.iter().map(argument).collect();
        let output = parameters.iter().find(|p| p.kind.ends_with("**") && !is_error(p));
        let kind = output.map_or("void *", |p| p.kind.trim_end_matches('*'));
        let kind = if output.is_some() { format!("{} *", kind.trim_end()) } else { kind.to_owned() };
        let _ = writeln!(
            text,
            "    {{ {kind}output = untouched; omlx_status status; (void)output; error = NULL;\n      status = {name}({});\n      \
             check_null(\"{name}\", \"{}\", status, error, (void *)output); }}",
            arguments.join(", "),
            null.name
        );
    }
    text
}

/// The whole program.
fn program(functions: &[Prototype], optional: &[(&str, &str)]) -> String {
    let calls: String = functions.iter().map(|function| statements(function, optional)).collect();
    format!("{START}{calls}{END}")
}

fn run(name: &str, text: &str) -> cc::Outcome {
    let source = cc::work_dir().join(format!("{name}.c"));
    fs::write(&source, text).expect("a source file");
    let harness = format!("-I{}", cc::root().join("tests/capi/c").display());
    cc::run(&cc::compile(&source, name, &["-std=c99", "-g", &harness]), &[])
}

#[test]
fn null_for_every_pointer() {
    let functions = prototypes::parse(&prototypes::header());
    for (function, parameter) in OPTIONAL {
        let known = functions.iter().any(|f| f.name == *function && f.parameters.iter().any(|p| p.name == *parameter));
        assert!(known, "the header has no {function} with a parameter {parameter}");
    }
    let text = program(&functions, OPTIONAL);
    assert!(functions.iter().all(|f| text.contains(&format!("{}(", f.name))));
    let outcome = run("null", &text);
    assert!(outcome.success, "{}", outcome.stderr);
}

/// A pointer that may be NULL, taken for one that may not: the program must notice that nothing complains.
#[test]
fn an_unnoticed_null_is_seen() {
    let functions: Vec<_> = prototypes::parse(&prototypes::header());
    let add: Vec<_> = functions.into_iter().filter(|f| f.name == "omlx_pool_add_model").collect();
    let outcome = run("null-unnoticed", &program(&add, &[]));
    let message = "omlx_pool_add_model with NULL for id: OMLX_E_NOT_FOUND";
    assert!(!outcome.success && outcome.stderr.contains(message), "{}", outcome.stderr);
}
