//! What the shared library exports is what the header declares.

use std::collections::BTreeSet;
use std::process::Command;

use crate::{cc, prototypes};

/// Exported although nobody should need it: mlx-rs defines it for C.
const FOREIGN: [&str; 1] = ["default_mlx_error_handler"];

/// The symbols that the library defines for others.
fn exported() -> BTreeSet<String> {
    let flags: &[&str] = if cfg!(target_os = "macos") { &["-gU"] } else { &["-D", "--defined-only"] };
    let output = Command::new("nm").args(flags).arg(cc::library()).output().expect("nm starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("nm writes ASCII");
    let prefix = if cfg!(target_os = "macos") { "_" } else { "" };
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(2)?.strip_prefix(prefix));
    names.map(str::to_owned).collect()
}

fn declared(header: &str) -> BTreeSet<String> {
    prototypes::parse(header).into_iter().map(|prototype| prototype.name).collect()
}

/// Names that only one of the two has.
fn differences(declared: &BTreeSet<String>, exported: &BTreeSet<String>) -> Vec<String> {
    let foreign = |name: &&String| !FOREIGN.contains(&name.as_str());
    declared.symmetric_difference(exported).filter(foreign).cloned().collect()
}

#[test]
fn the_library_exports_the_header() {
    let (declared, exported) = (declared(&prototypes::header()), exported());
    assert!(declared.len() > 25, "{declared:?}");
    assert_eq!(differences(&declared, &exported), Vec::<String>::new());
}

/// The comparison sees a function that is missing in the library, and one that is missing in the header.
#[test]
fn a_difference_is_seen() {
    let header = prototypes::header();
    let more = format!("{header}\nvoid omlx_not_there(void);\n");
    assert_eq!(differences(&declared(&more), &exported()), ["omlx_not_there"]);
    let less = header.replace("void omlx_pool_release(omlx_pool *pool);", "");
    assert_eq!(differences(&declared(&less), &exported()), ["omlx_pool_release"]);
}
