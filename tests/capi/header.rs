//! `include/omlx.h` is what the Rust sources say: generated here, compared with the committed file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use omlx::error::Status;

use crate::prototypes;

/// The header's order: sections, and in each the declarations by name. A new item must find its place here.
const SECTIONS: &[(&str, &[&str])] = &[
    ("Version", &["OMLX_ABI_VERSION", "omlx_version", "omlx_mlx_version", "omlx_abi_version"]),
    (
        "Status and errors",
        &[
            "omlx_status",
            "omlx_status_name",
            "omlx_error",
            "omlx_error_status",
            "omlx_error_message",
            "omlx_error_retry_after_ms",
            "omlx_error_release",
            "omlx_check_abi",
        ],
    ),
    (
        "Returned text and token ids",
        &[
            "omlx_string",
            "omlx_string_data",
            "omlx_string_len",
            "omlx_string_release",
            "omlx_tokens",
            "omlx_tokens_data",
            "omlx_tokens_count",
            "omlx_tokens_release",
        ],
    ),
    (
        "Pools",
        &[
            "omlx_device",
            "omlx_dtype",
            "omlx_precision",
            "omlx_cache_codec",
            "omlx_pool_options",
            "omlx_pool",
            "omlx_pool_open",
            "omlx_pool_close",
            "omlx_metrics_format",
            "omlx_pool_metrics",
            "omlx_pool_status",
            "omlx_pool_set_memory_limit",
            "omlx_pool_retain",
            "omlx_pool_release",
        ],
    ),
    (
        "Models",
        &[
            "omlx_pool_models",
            "omlx_pool_add_model",
            "omlx_pool_rescan",
            "omlx_model_load",
            "omlx_model_unload",
            "omlx_model_configure",
            "omlx_model_settings",
        ],
    ),
    ("Events", &["omlx_event_kind", "omlx_finish_reason", "omlx_token_logprob", "omlx_usage", "omlx_event"]),
    (
        "Requests",
        &[
            "omlx_event_fn",
            "omlx_wake_fn",
            "omlx_destroy_fn",
            "omlx_generate_options",
            "omlx_request",
            "omlx_generate",
            "omlx_embed",
            "omlx_rerank",
            "omlx_request_model",
            "omlx_request_next",
            "omlx_request_set_wake",
            "omlx_request_cancel",
            "omlx_request_retain",
            "omlx_request_release",
        ],
    ),
    (
        "Downloads",
        &[
            "omlx_download_state",
            "omlx_download_progress",
            "omlx_download",
            "omlx_download_start",
            "omlx_download_status",
            "omlx_progress_fn",
            "omlx_download_set_callback",
            "omlx_download_wait",
            "omlx_download_cancel",
            "omlx_download_retain",
            "omlx_download_release",
        ],
    ),
    ("Tokens and templates", &["omlx_tokenize", "omlx_detokenize", "omlx_render_template"]),
    (
        "Cache",
        &[
            "omlx_cache_stats",
            "omlx_cache_find",
            "omlx_cache_prefetch",
            "omlx_cache_flush",
            "omlx_cache_tier",
            "omlx_cache_clear",
            "omlx_cache_limits",
            "omlx_cache_set_limits",
            "omlx_cache_get_limits",
            "omlx_cache_pin",
            "omlx_cache_unpin",
        ],
    ),
    ("Log", &["omlx_log_level", "omlx_log_fn", "omlx_set_log_hook"]),
];

/// Defines enumerations with a fixed width in every dialect: C before C23 has no enumerations of a given type.
const ENUM_MACRO: &str = "\
// An enumeration `name` whose values are stored as `type`.
#if defined(__cplusplus)
#define OMLX_ENUM(name, type) enum name : type
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L
#define OMLX_ENUM(name, type) enum name : type; typedef enum name name; enum name : type
#else
#define OMLX_ENUM(name, type) typedef type name; enum name
#endif
";

/// Longest line of a declaration.
const WIDTH: usize = 110;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The whole header.
fn generate() -> String {
    let raw = declarations();
    let (preface, body) = raw.split_once("\n\n").expect("a preface and declarations");
    let mut items: BTreeMap<String, String> =
        body.trim().split("\n\n").map(|item| (item_name(item), arrange(item))).collect();
    let mut header = format!(
        "{preface}\n\n#ifndef OMLX_H\n#define OMLX_H\n\n#include <stddef.h>\n#include <stdint.h>\n\n\
         #ifdef __cplusplus\nextern \"C\" {{\n#endif\n\n{ENUM_MACRO}"
    );
    for (title, names) in SECTIONS {
        header += &format!("\n// {title} {}\n", "-".repeat(WIDTH - 4 - title.len()));
        for name in *names {
            let item =
                items.remove(*name).unwrap_or_else(|| panic!("SECTIONS lists {name}, src/capi does not have it"));
            header += &format!("\n{item}\n");
        }
    }
    assert!(items.is_empty(), "give these a place in SECTIONS: {:?}", items.keys());
    header + "\n#undef OMLX_ENUM\n\n#ifdef __cplusplus\n} // extern \"C\"\n#endif\n\n#endif // OMLX_H\n"
}

/// What cbindgen makes of the sources.
fn declarations() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml");
    let mut sources: Vec<PathBuf> = std::fs::read_dir(root().join("src/capi"))
        .expect("src/capi")
        .map(|entry| entry.expect("an entry of src/capi").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    sources.push(root().join("src/error.rs"));
    sources.sort();
    let builder = cbindgen::Builder::new().with_config(config);
    let builder = sources.iter().fold(builder, |builder, source| builder.with_src(source));
    let mut text = Vec::new();
    builder.generate().expect("cbindgen reads the sources").write(&mut text);
    String::from_utf8(text).expect("UTF-8").trim_start().to_owned()
}

/// The first line of an item that is not documentation.
fn first_line(item: &str) -> &str {
    item.lines().find(|line| !line.starts_with("//")).unwrap_or_else(|| panic!("no declaration in {item:?}"))
}

/// The name that an item declares.
fn item_name(item: &str) -> String {
    let line = first_line(item);
    let text = match line.split_once("(*") {
        Some((_, name)) => name,
        None => ["#define ", "enum ", "typedef struct "].iter().find_map(|p| line.strip_prefix(p)).unwrap_or(line),
    };
    let is_name = |word: &&str| word.to_ascii_lowercase().starts_with("omlx_");
    let mut words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(is_name);
    let name = words.find(|word| *word != "omlx_status" || line.starts_with("enum "));
    name.unwrap_or_else(|| panic!("no name in {line:?}")).to_owned()
}

/// One item in the header's style.
fn arrange(item: &str) -> String {
    let (docs, code): (Vec<_>, Vec<_>) = item.lines().partition(|line| line.starts_with("//"));
    let (docs, line) = (docs.join("\n"), first_line(item));
    let code = if line.starts_with("enum ") {
        enumeration(&code)
    } else if line.starts_with("typedef struct ") {
        structure(&code)
    } else if line.starts_with("#define ") {
        code.join("\n")
    } else {
        function(&code)
    };
    format!("{docs}\n{code}")
}

/// `OMLX_ENUM(name, type) { ... };`, with the names of the statuses as [`Status::c_name`] has them.
fn enumeration(code: &[&str]) -> String {
    let name = code[0].trim_start_matches("enum ");
    let kind = code.iter().find_map(|line| line.trim().strip_prefix(": ")).expect("every enumeration has a repr");
    let body = code.iter().filter(|line| line.starts_with("    ")).map(|line| {
        line.replacen("    OMLX_STATUS_OK", "    OMLX_OK", 1).replacen("    OMLX_STATUS_", "    OMLX_E_", 1)
    });
    format!("OMLX_ENUM({name}, {kind}) {{\n{}\n}};", body.collect::<Vec<_>>().join("\n"))
}

/// A struct, or the forward declaration of an opaque one; option structs get their `_INIT` macro.
fn structure(code: &[&str]) -> String {
    let name = item_name(code[0]);
    let own_pointer = format!("const struct {name} *");
    let fields = code.iter().map(|line| match line.starts_with(' ') && !line.contains(&own_pointer) {
        true => line.replace("struct omlx_", "omlx_"),
        false => (*line).to_owned(),
    });
    let definition = fields.collect::<Vec<_>>().join("\n");
    // Hosts fill those that want to know their size; events are made by the library alone.
    if !definition.contains(&format!("`sizeof({name})`")) {
        return definition;
    }
    let fields = code.iter().filter(|line| line.starts_with("    ") && line.ends_with(';') && !line.contains("///"));
    let values = fields.skip(1).map(|field| if field.contains('*') || field.contains("_fn ") { "NULL" } else { "0" });
    let values = values.collect::<Vec<_>>().join(", ");
    let upper = name.to_uppercase();
    format!(
        "{definition}\n\n/// Initialiser of `{name}`: all defaults.\n#define {upper}_INIT {{ sizeof({name}), {values} }}"
    )
}

/// A prototype or a function type, on one line where it fits, else with one parameter per line.
fn function(code: &[&str]) -> String {
    let joined = code.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ").replace("struct omlx_", "omlx_");
    if joined.len() <= WIDTH {
        return joined;
    }
    let (start, parameters) = joined.rsplit_once('(').expect("a parameter list");
    format!("{start}(\n    {}", parameters.replace(", ", ",\n    "))
}

#[test]
fn the_committed_header_is_what_the_sources_say() {
    let path = root().join("include/omlx.h");
    let generated = generate();
    if std::env::var_os("OMLX_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("include/");
        std::fs::write(&path, &generated).expect("include/omlx.h is writable");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let differing = committed.lines().zip(generated.lines()).position(|(old, new)| old != new);
    assert!(
        committed == generated,
        "include/omlx.h differs from the sources (first at line {}); OMLX_BLESS=1 cargo test --test capi header",
        differing.map_or(committed.lines().count().min(generated.lines().count()), |line| line) + 1
    );
}

#[test]
fn every_status_has_its_name_and_number() {
    let header = prototypes::header();
    for status in Status::ALL {
        let line = format!("    {} = {},", status.c_name().to_str().expect("ASCII"), status as i32);
        assert!(header.lines().any(|l| l == line), "{line:?} is not in the header");
    }
    let count = header.lines().filter(|line| line.starts_with("    OMLX_E_")).count();
    assert_eq!(count + 1, Status::ALL.len(), "statuses in the header that Status::ALL lacks");
}

/// Event kinds of the header that the article lacks in its table.
fn kinds_without_a_row<'a>(header: &'a str, article: &str) -> Vec<&'a str> {
    let kinds = header.lines().filter_map(|line| line.strip_prefix("    OMLX_EVENT_KIND_")?.split(' ').next());
    kinds.filter(|kind| !article.contains(&format!("\n| `OMLX_EVENT_KIND_{kind}` |"))).collect()
}

#[test]
fn the_article_on_events_has_every_kind() {
    let (header, path) = (prototypes::header(), root().join("docs/events.md"));
    let article = std::fs::read_to_string(path).expect("docs/events.md");
    assert_eq!(kinds_without_a_row(&header, &article), Vec::<&str>::new());
    let without = article.replace("| `OMLX_EVENT_KIND_STARTED` |", "|");
    assert_eq!(kinds_without_a_row(&header, &without), ["STARTED"]);
}

#[test]
fn the_header_has_no_word_of_rust() {
    let header = prototypes::header();
    for word in ["Option<", "Arc", "[`", "::", "u32`", "i32`", "usize", "struct omlx_pool *", "unsafe"] {
        assert!(!header.contains(word), "{word:?} in include/omlx.h");
    }
}
