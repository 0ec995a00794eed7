//! The binary interface is what `include/omlx.abi` says: functions and callbacks with their types, enumerators with their
//! numbers, structs with the place and type of every field, as a C compiler, as Rust and as the library's symbols have them. And what
//! was promised once still holds: every `include/abi-N` is a part of the interface of today, and programs built with its
//! header run.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{cc, layout, prototypes};

/// The interface, item by item: what it is, and what it consists of.
type Items = BTreeMap<String, Vec<String>>;

fn committed() -> PathBuf {
    cc::root().join("include/omlx.abi")
}

/// `text` in one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A definition over several lines: name, what follows it in the first line, and its parts without comments.
fn definitions<'a>(code: &'a str, start: &'a str) -> impl Iterator<Item = (&'a str, Vec<&'a str>)> {
    code.split('\n').enumerate().filter_map(move |(at, line)| {
        let head = line.strip_prefix(start)?.strip_suffix(" {")?;
        let parts = code.split('\n').skip(at + 1).take_while(|line| line.starts_with(' '));
        Some((head, parts.map(str::trim).collect()))
    })
}

/// A parameter or field as C writes it.
fn declaration(kind: &str, name: &str) -> String {
    format!("{kind}{}{name}", if kind.ends_with('*') { "" } else { " " })
}

/// What the header says, sizes and places of fields aside: enumerations, callbacks and functions.
fn declared(header: &str) -> Items {
    let code = header.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut items = Items::new();
    for (head, parts) in definitions(&code, "OMLX_ENUM(") {
        let head = head.trim_end_matches(')').replace(", ", " ");
        items.insert(format!("enum {head}"), parts.iter().map(|part| part.trim_end_matches(',').to_owned()).collect());
    }
    for callback in code.split(';').map(one_line).filter_map(|t| t.split_once("typedef ").map(|(_, t)| t.to_owned())) {
        if let Some((returns, rest)) = callback.split_once(" (*") {
            items.insert(format!("callback {}", rest.replacen(')', "", 1)), vec![format!("returns {returns}")]);
        }
    }
    for function in prototypes::parse(header) {
        let parameters: Vec<_> = function.parameters.iter().map(|p| declaration(&p.kind, &p.name)).collect();
        let name = format!("function {}({})", function.name, parameters.join(", "));
        items.insert(name, vec![format!("returns {}", function.returns)]);
    }
    items
}

/// The header's structs: names, and type and name of every field.
fn structs(header: &str) -> Vec<(String, Vec<(String, String)>)> {
    let code = header.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let field = |part: &str| {
        let part = part.trim_end_matches(';');
        let at = part.rfind(['*', ' ']).unwrap_or_else(|| panic!("not a field: {part:?}"));
        (part[..=at].trim().replace("struct ", ""), part[at + 1..].to_owned())
    };
    let found = definitions(&code, "typedef struct ");
    found.map(|(name, parts)| (name.to_owned(), parts.into_iter().map(field).collect())).collect()
}

/// The name of a struct of which this is the item.
fn struct_name(item: &str) -> Option<&str> {
    item.strip_prefix("struct ")?.split(' ').next()
}

/// A C program that prints size, alignment and places, in the form of [`layout::of_rust`].
fn measuring(header: &str) -> String {
    let mut source = "#include <stdio.h>\n#include \"omlx.h\"\n\n".to_owned();
    let mut body = String::new();
    for (name, fields) in structs(header) {
        let _ = writeln!(source, "struct place_{name} {{ char first; {name} second; }};");
        let size = format!("(unsigned)sizeof({name}), (unsigned)offsetof(struct place_{name}, second)");
        let _ = writeln!(body, "    printf(\"struct {name} size %u align %u\\n\", {size});");
        for (_, field) in fields {
            let (offset, size) = (format!("offsetof({name}, {field})"), format!("sizeof((({name} *)0)->{field})"));
            let _ = writeln!(body, "    printf(\"    %u %u {field}\\n\", (unsigned){offset}, (unsigned){size});");
        }
    }
    let _ = write!(source, "\nint main(void) {{\n{body}    return 0;\n}}\n");
    source
}

/// Sizes and places as a C or C++ compiler has them with the header in `include`.
fn of_c(header: &str, include: &Path, name: &str, flags: &[&str]) -> String {
    let source = cc::work_dir().join(name);
    fs::write(&source, measuring(header)).expect("a source file");
    let include = format!("-I{}", include.display());
    let flags: Vec<_> = flags.iter().copied().chain([include.as_str()]).collect();
    cc::run_ok(&cc::compile(&source, &name.replace('.', "-"), &flags), &[]).stdout
}

/// Items of a text in the form of `omlx.abi`.
fn read(text: &str) -> Items {
    let mut items = Items::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_prefix("    ") {
            Some(part) => items.get_mut(&current).expect("an item before its parts").push(part.to_owned()),
            None => {
                current = line.to_owned();
                items.insert(current.clone(), Vec::new());
            }
        }
    }
    items
}

fn write(items: &Items) -> String {
    let mut text = "# The binary interface of libomlx on 64-bit systems. Fields: place, size, type, name. Written by\n\
                    # OMLX_BLESS=1 cargo test --test capi abi; a changed line is a change of the interface.\n"
        .to_owned();
    for (item, parts) in items {
        let _ = writeln!(text, "\n{item}");
        for part in parts {
            let _ = writeln!(text, "    {part}");
        }
    }
    text
}

/// The interface of the header in the folder `include`: its declarations, and its structs with the layout that C gives them.
fn interface(header: &str, include: &Path, name: &str) -> Items {
    let mut items = declared(header);
    let mut layout = read(&of_c(header, include, name, &["-std=c99"]));
    for (name, fields) in structs(header) {
        let found = layout.iter_mut().find(|(item, _)| struct_name(item) == Some(&name));
        let (_, places) = found.expect("a struct that C has seen");
        for (place, (kind, field)) in places.iter_mut().zip(fields) {
            let numbers = place.strip_suffix(&field).expect("fields in the same order");
            *place = format!("{numbers}{}", declaration(&kind, &field));
        }
    }
    items.extend(layout);
    items
}

/// The interface of today.
fn today(header: &str, name: &str) -> Items {
    let mut items = interface(header, &cc::root().join("include"), name);
    items.insert(format!("abi {}", omlx::capi::OMLX_ABI_VERSION), Vec::new());
    items
}

/// What `new` breaks of the promises of `old`.
fn broken(old: &Items, new: &Items) -> Vec<String> {
    let mut problems = Vec::new();
    for (item, parts) in old {
        let Some(name) = struct_name(item) else {
            // Enumerations may get more numbers; functions and callbacks stay what they are.
            match new.get(item) {
                Some(found) if parts.iter().all(|part| found.contains(part)) => {}
                Some(_) => problems.push(format!("{item} has changed")),
                None if item.starts_with("abi ") => {}
                None => problems.push(format!("{item} is gone")),
            }
            continue;
        };
        // Structs grow at their end: with the same alignment, and all old fields where they were.
        let Some((grown, fields)) = new.iter().find(|(other, _)| struct_name(other) == Some(name)) else {
            problems.push(format!("struct {name} is gone"));
            continue;
        };
        let number = |text: &str, key: &str| {
            text.split_once(key).and_then(|(_, rest)| rest.split(' ').next()?.parse::<usize>().ok())
        };
        if number(grown, " size ") < number(item, " size ") || number(grown, " align ") != number(item, " align ") {
            problems.push(format!("{item} became {grown}"));
        }
        if !fields.starts_with(parts) {
            problems.push(format!("fields of struct {name} have changed"));
        }
        // Where the old struct ends in padding, its programs have anything in the place of a new field.
        let place = |field: &String| field.split(' ').next().and_then(|place| place.parse().ok());
        if fields.iter().skip(parts.len()).any(|field| place(field) < number(item, " size ")) {
            problems.push(format!("a new field of struct {name} lies in its old part"));
        }
        // Structs inside of others, and in arrays, cannot grow.
        let sized = parts.first().is_some_and(|field| field.ends_with(" struct_size"));
        if !sized && (grown != item || fields != parts) {
            problems.push(format!("struct {name} does not know its size, and has changed"));
        }
    }
    problems
}

#[test]
fn the_interface_is_what_was_committed() {
    let items = today(&prototypes::header(), "layout.c");
    let text = write(&items);
    let old = fs::read_to_string(committed()).unwrap_or_default();
    if std::env::var_os("OMLX_BLESS").is_some() {
        fs::write(committed(), &text).expect("include/omlx.abi is writable");
        return;
    }
    let (old, differing) = (read(&old), "include/omlx.abi differs; OMLX_BLESS=1 cargo test --test capi abi");
    let gone: Vec<_> = old.iter().filter(|item| !items.contains_key(item.0) || items[item.0] != *item.1).collect();
    let came: Vec<_> = items.iter().filter(|item| !old.contains_key(item.0) || old[item.0] != *item.1).collect();
    assert!(gone.is_empty() && came.is_empty(), "{differing}:\n- {gone:#?}\n+ {came:#?}");
}

#[test]
fn c_cxx_and_rust_have_the_same_structs() {
    let (header, include) = (prototypes::header(), cc::root().join("include"));
    let rust = layout::of_rust();
    assert_eq!(of_c(&header, &include, "layout-rust.c", &["-std=c11"]), rust);
    assert_eq!(of_c(&header, &include, "layout-rust.cpp", &["-std=c++11"]), rust);
}

/// What `text` becomes when `from` is replaced, which must be there.
fn with(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from:?} is not there");
    text.replace(from, to)
}

/// A field that moves is seen by the C compiler, and another type of an argument or of a field by the reader.
#[test]
fn a_change_of_the_header_is_seen() {
    let header = prototypes::header();
    let changed = with(&header, "    uint32_t threads;\n", "    uint64_t threads;\n");
    let changed = with(
        &changed,
        "omlx_pool_set_memory_limit(omlx_pool *pool, uint64_t bytes",
        "omlx_pool_set_memory_limit(omlx_pool *pool, int64_t bytes",
    );
    let changed = with(&changed, "OMLX_E_BUSY = 9", "OMLX_E_BUSY = 99");
    let changed = with(&changed, "    float logprob;\n", "    uint32_t logprob;\n");
    let include = folder_with(&changed, "changed");
    let layout = of_c(&changed, &include, "layout-changed.c", &["-std=c99"]);
    assert_ne!(layout, layout::of_rust());
    let items = interface(&changed, &include, "layout-changed.c");
    let problems = broken(&today(&header, "layout-before.c"), &items);
    let expected =
        ["omlx_pool_set_memory_limit", "enum omlx_status", "struct omlx_pool_options", "struct omlx_token_logprob"];
    for what in expected {
        assert!(problems.iter().any(|problem| problem.contains(what)), "{what}: {problems:?}");
    }
    assert!(problems.iter().all(|problem| expected.iter().any(|what| problem.contains(what))), "{problems:?}");
}

/// What grows as the header promises breaks nothing, and what does not is named.
#[test]
fn growing_breaks_nothing() {
    let text = fs::read_to_string(committed()).expect("include/omlx.abi");
    let old = read(&text);
    assert!(old.len() > 70, "{}", old.len());
    assert_eq!(broken(&old, &old), Vec::<String>::new());
    let grown =
        with(&text, "\nstruct omlx_event ", "\nfunction omlx_new(void)\n    returns void\n\nstruct omlx_event ");
    let grown = with(&grown, "    OMLX_E_CHECKSUM = 20\n", "    OMLX_E_CHECKSUM = 20\n    OMLX_E_NEW = 21\n");
    let size = old.keys().find(|item| item.starts_with("struct omlx_cache_limits")).expect("the struct").clone();
    let larger = with(&grown, &size, &size.replace("size 32", "size 40"));
    let last = "    24 8 uint64_t cold_bytes_per_model\n";
    let larger = with(&larger, last, &format!("{last}    32 8 uint64_t new_field\n"));
    assert_eq!(broken(&old, &read(&larger)), Vec::<String>::new());
    for (from, to, what) in [
        (last, "", "fields of struct omlx_cache_limits"),
        (last, &format!("{last}    28 4 uint32_t new_field\n"), "a new field of struct omlx_cache_limits"),
        (
            "    0 8 uint64_t prompt_tokens\n",
            "    0 4 uint32_t prompt_tokens\n",
            "struct omlx_usage does not know its size",
        ),
        ("    OMLX_OK = 0\n", "", "enum omlx_status int32_t has changed"),
        ("function omlx_version()", "function omlx_version(int32_t x)", "function omlx_version() is gone"),
    ] {
        let problems = broken(&old, &read(&with(&text, from, to)));
        assert!(problems.iter().any(|problem| problem.contains(what)), "{what}: {problems:?}");
    }
}

/// The numbers of the interfaces that are kept, in `include/abi-N`.
fn kept() -> Vec<(u32, PathBuf)> {
    let entries =
        fs::read_dir(cc::root().join("include")).expect("include").map(|entry| entry.expect("an entry").path());
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("abi-")?.parse().ok();
    entries.filter_map(|path| Some((number(&path)?, path))).collect()
}

/// What a program built with the header in `folder` does with the library of today.
fn with_todays_library(folder: &Path, name: &str) -> cc::Outcome {
    let source = cc::root().join("tests/capi/c/kept.c");
    let program = cc::compile(&source, name, &["-std=c99", &format!("-I{}", folder.display())]);
    let empty = tempfile::tempdir().expect("a folder");
    cc::run(&program, &["tests/fixtures/encoders", "models/tiny-chat", empty.path().to_str().expect("UTF-8")])
}

fn runs_with_todays_library(folder: &Path, name: &str) {
    let outcome = with_todays_library(folder, name);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("kept: 0 failures\n", ""), "{name}");
}

/// A folder with `header`.
fn folder_with(header: &str, name: &str) -> PathBuf {
    let folder = cc::work_dir().join(name);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join("omlx.h"), header).expect("a header");
    folder
}

/// The number is 0 until the interface is promised. From then on each number has its folder, and keeps its promise.
#[test]
fn kept_interfaces_still_hold() {
    let (header, current) = (prototypes::header(), omlx::capi::OMLX_ABI_VERSION);
    // The name that programs of all these interfaces look for.
    let number = if current == 0 { 0 } else { 1 };
    let (linux, macos) = (format!("libomlx.so.{number}"), format!("libomlx.{number}.dylib"));
    assert_eq!(cc::soname(), if cfg!(target_os = "macos") { macos } else { linux });
    let kept = kept();
    assert_eq!(kept.len(), current as usize, "include/ has a folder for each number up to {current}: {kept:?}");
    let items = today(&header, "layout-today.c");
    for (number, folder) in kept {
        assert!((1..=current).contains(&number), "{}", folder.display());
        let old = read(&fs::read_to_string(folder.join("omlx.abi")).expect("the kept interface"));
        assert!(old.contains_key(&format!("abi {number}")), "{} is that of another number", folder.display());
        assert_eq!(broken(&old, &items), Vec::<String>::new(), "of {}", folder.display());
        assert!(number < current || old == items, "what was added since number {number} needs the next one");
        runs_with_todays_library(&folder, &format!("kept-{number}"));
    }
}

/// Structs of today, and the first of their fields that did not come with them.
const GROWN: [(&str, &str); 3] =
    [("omlx_pool_options", "threads"), ("omlx_generate_options", "loading_events"), ("omlx_event", "loaded_bytes")];

/// `header` with structs that end before a field.
fn older(header: &str, structs_and_fields: &[(&str, &str)]) -> String {
    let mut header = header.to_owned();
    for &(name, field) in structs_and_fields {
        let structs = structs(&header);
        let (_, fields) = structs.iter().find(|(other, _)| other == name).expect("the struct");
        let kept = fields.iter().position(|(_, other)| other == field).expect("the field");
        let (before, rest) = header.split_once(&format!("typedef struct {name} {{\n")).expect("its beginning");
        let (body, after) = rest.split_once(&format!("}} {name};\n")).expect("its end");
        let mut seen = 0;
        let body = body.split_inclusive('\n').take_while(|line| {
            let is_older = seen < kept;
            seen += usize::from(!line.trim_start().starts_with("//"));
            is_older
        });
        let mut cut = format!("{before}typedef struct {name} {{\n{}}} {name};\n", body.collect::<String>());
        let macro_start = format!("#define {}_INIT ", name.to_uppercase());
        for line in after.split_inclusive('\n') {
            match line.starts_with(&macro_start) {
                true => cut += &format!("{} }}\n", line.split(", ").take(kept).collect::<Vec<_>>().join(", ")),
                false => cut += line,
            }
        }
        header = cut;
    }
    header
}

/// The way in which a kept header is checked, played with that of today, with one whose structs have not grown yet, and
/// with wrong ones: with another number, and with a struct that was never so short.
#[test]
fn a_program_with_a_kept_header_is_built_and_run() {
    let header = prototypes::header();
    runs_with_todays_library(&folder_with(&header, "abi-today"), "kept-today");

    let before = older(&header, &GROWN);
    let folder = folder_with(&before, "abi-older");
    let (old, new) = (interface(&before, &folder, "layout-older.c"), today(&header, "layout-newer.c"));
    for (name, _) in GROWN {
        let same = |item: &&String| struct_name(item) == Some(name) && new.contains_key(*item);
        assert_eq!(old.keys().find(same), None, "{name} is not shorter");
    }
    assert_eq!(broken(&old, &new), Vec::<String>::new());
    runs_with_todays_library(&folder, "kept-older");

    let number = format!("#define OMLX_ABI_VERSION {}", omlx::capi::OMLX_ABI_VERSION);
    let other = with(&header, &number, "#define OMLX_ABI_VERSION 4711");
    let outcome = with_todays_library(&folder_with(&other, "abi-other"), "kept-other");
    assert!(!outcome.success && outcome.stderr.contains("ABI 4711"), "{}", outcome.stderr);
    let short = older(&header, &[("omlx_pool_options", "prefill_chunk")]);
    let outcome = with_todays_library(&folder_with(&short, "abi-short"), "kept-short");
    assert!(!outcome.success && outcome.stderr.contains("options.struct_size is 32"), "{}", outcome.stderr);
}
