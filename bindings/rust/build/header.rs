//! Turns the declarations of `omlx.h` into Rust. It knows the header's own style and refuses everything else, so that what it
//! does not understand is an error of the build and not a wrong declaration.

use std::fmt::Write;

/// Rust declarations of all types, constants and functions in `header`.
pub fn to_rust(header: &str) -> Result<String, String> {
    let mut rust = String::from("use std::ffi::{c_char, c_void};\n");
    let mut functions = String::new();
    for statement in statements(&code(header)) {
        let text = statement.split_whitespace().collect::<Vec<_>>().join(" ");
        let known = enumeration(&text)
            .or_else(|| function_type(&text))
            .or_else(|| structure(&text))
            .map(|declaration| declaration.map(|declaration| rust += &declaration))
            .or_else(|| function(&text).map(|declaration| declaration.map(|declaration| functions += &declaration)));
        known.unwrap_or_else(|| Err("not a declaration".to_owned())).map_err(|what| format!("{what}: {text:?}"))?;
    }
    write!(rust, "unsafe extern \"C\" {{\n{functions}}}\n").map_err(|error| error.to_string())?;
    let version = header.lines().find_map(|line| line.strip_prefix("#define OMLX_ABI_VERSION "));
    let version = version.ok_or("no OMLX_ABI_VERSION")?;
    Ok(rust + &format!("pub const OMLX_ABI_VERSION: u32 = {version};\n"))
}

/// The header without comments, preprocessor lines, and the brackets that C++ wants.
fn code(header: &str) -> String {
    let mut continued = false;
    let mut lines = Vec::new();
    for line in header.lines() {
        let line = line.trim();
        let preprocessor = continued || line.starts_with('#');
        continued = preprocessor && line.ends_with('\\');
        if !preprocessor && !line.starts_with("//") && !line.starts_with("extern \"C\"") && !line.starts_with("} //") {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// What ends with a semicolon outside of braces.
fn statements(code: &str) -> Vec<String> {
    let (mut depth, mut statement, mut found) = (0_usize, String::new(), Vec::new());
    for character in code.chars() {
        match character {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ';' if depth == 0 => {
                found.push(std::mem::take(&mut statement));
                continue;
            }
            _ => {}
        }
        statement.push(character);
    }
    if !statement.trim().is_empty() {
        found.push(statement);
    }
    found
}

type Declaration = Option<Result<String, String>>;

/// `OMLX_ENUM(name, type) { NAME = 1, ... }`
fn enumeration(text: &str) -> Declaration {
    let (head, body) = text.strip_prefix("OMLX_ENUM(")?.split_once(") {")?;
    let (name, kind) = head.split_once(", ")?;
    let mut rust = match scalar(kind) {
        Some(kind) => format!("pub type {name} = {kind};\n"),
        None => return Some(Err(format!("an enumeration of {kind}"))),
    };
    for item in body.trim_end_matches('}').split(',').map(str::trim).filter(|item| !item.is_empty()) {
        match item.split_once(" = ") {
            Some((constant, value)) => rust += &format!("pub const {constant}: {name} = {value};\n"),
            None => return Some(Err(format!("an enumerator without value, {item}"))),
        }
    }
    Some(Ok(rust))
}

/// `typedef void (*name)(parameters)`
fn function_type(text: &str) -> Declaration {
    let (returns, rest) = text.strip_prefix("typedef ")?.split_once("(*")?;
    let (name, parameters) = rest.split_once(")(")?;
    Some(
        signature(returns, parameters.trim_end_matches(')'))
            .map(|s| format!("pub type {name} = Option<unsafe extern \"C\" fn{s}>;\n")),
    )
}

/// `typedef struct name name`, or with its fields.
fn structure(text: &str) -> Declaration {
    let rest = text.strip_prefix("typedef struct ")?;
    let Some((name, rest)) = rest.split_once(" {") else {
        let name = rest.split(' ').next()?;
        return Some(Ok(format!("#[repr(C)]\npub struct {name} {{ opaque: [u8; 0] }}\n")));
    };
    let mut rust = format!("#[repr(C)]\n#[derive(Clone, Copy)]\npub struct {name} {{\n");
    for field in rest.split_once('}')?.0.split(';').map(str::trim).filter(|field| !field.is_empty()) {
        match parameter(field) {
            Ok((name, kind)) => rust += &format!("pub {name}: {kind},\n"),
            Err(what) => return Some(Err(what)),
        }
    }
    Some(Ok(rust + "}\n"))
}

/// `type name(parameters)`
fn function(text: &str) -> Declaration {
    let (head, parameters) = text.split_once('(')?;
    let at = head.rfind(['*', ' '])? + 1;
    let parameters = parameters.trim_end_matches(')');
    Some(signature(&head[..at], parameters).map(|s| format!("pub fn {}{s};\n", &head[at..])))
}

fn signature(returns: &str, parameters: &str) -> Result<String, String> {
    let mut list = Vec::new();
    for text in parameters.split(',').map(str::trim).filter(|text| *text != "void") {
        let (name, kind) = parameter(text)?;
        list.push(format!("{name}: {kind}"));
    }
    let returns = match returns.trim() {
        "void" => String::new(),
        other => format!(" -> {}", kind(other)?),
    };
    Ok(format!("({}){returns}", list.join(", ")))
}

/// Name and Rust type of `const char *text`.
fn parameter(text: &str) -> Result<(&str, String), String> {
    let at = text.rfind(['*', ' ']).ok_or_else(|| format!("no type in {text:?}"))? + 1;
    match &text[at..] {
        name if is_name(name) => Ok((name, kind(&text[..at])?)),
        other => Err(format!("not a name: {other:?}")),
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The Rust type of a C type.
fn kind(text: &str) -> Result<String, String> {
    let (text, constant) = match text.trim().strip_prefix("const ") {
        Some(rest) => (rest, true),
        None => (text.trim(), false),
    };
    let base = text.trim_end_matches('*').trim();
    let stars = text.len() - text.trim_end_matches('*').len();
    let base = base.strip_prefix("struct ").unwrap_or(base);
    let rust = match scalar(base) {
        Some(rust) => rust,
        None if base.starts_with("omlx_") && is_name(base) => base,
        None => return Err(format!("an unknown type, {text:?}")),
    };
    match (stars, constant) {
        (0, false) => Ok(rust.to_owned()),
        (0, true) => Err(format!("a constant value, {text:?}")),
        // `const` belongs to what the first star points to.
        (stars, constant) => {
            let first = if constant { "*const " } else { "*mut " };
            Ok("*mut ".repeat(stars - 1) + first + rust)
        }
    }
}

fn scalar(name: &str) -> Option<&'static str> {
    Some(match name {
        "char" => "c_char",
        "void" => "c_void",
        "int32_t" => "i32",
        "int64_t" => "i64",
        "uint8_t" => "u8",
        "uint32_t" => "u32",
        "uint64_t" => "u64",
        "size_t" => "usize",
        "float" => "f32",
        "double" => "f64",
        _ => return None,
    })
}
