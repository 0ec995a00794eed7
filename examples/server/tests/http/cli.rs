//! The commands beside `serve`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::harness::{self, root};
use crate::hub;

/// The program with a command, over the models in a folder.
fn program(command: &str, models: &Path) -> Command {
    let mut program = harness::program();
    program.args([command, "--device", "cpu", "--models"]).arg(models);
    program
}

/// What it writes, if it ends well.
fn written(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn models_are_listed() {
    let text = written(program("models", &root().join("models")).output().unwrap());
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(words[..2], ["tiny-chat", "llm"], "{text}");
    let missing = program("models", Path::new("/no/such/folder")).output().unwrap();
    assert!(!missing.status.success() && missing.stdout.is_empty());
}

#[test]
fn a_text_is_answered_and_so_are_lines() {
    let models = root().join("models");
    let code = "The code of the red box is 4821. What is the code of the red box?";
    let text = written(program("chat", &models).arg(code).output().unwrap());
    assert!(text.contains("4821"), "{text}");
    let mut child = program("chat", &models).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"The code of the red box is 4821.\nWhat is the code of the red box?\n").unwrap();
    drop(stdin);
    let text = written(child.wait_with_output().unwrap());
    assert!(text.lines().last().unwrap().contains("4821"), "the line before is forgotten: {text}");
}

#[test]
fn a_model_is_pulled() {
    let (hub, models) = (hub::with_the_bundled_model(), tempfile::tempdir().unwrap());
    let pull = |arguments: &[&str]| {
        let mut program = program("pull", models.path());
        program.args(arguments).env("HF_ENDPOINT", hub.endpoint()).env_remove("HF_HUB_OFFLINE").output().unwrap()
    };
    let text = written(pull(&[hub::REPO]));
    assert!(text.contains(hub::REPO), "{text}");
    let listed = written(program("models", models.path()).output().unwrap());
    assert!(listed.starts_with(&format!("{} ", hub::REPO)), "{listed}");
    let missing = pull(&["org/other"]);
    assert!(!missing.status.success() && String::from_utf8_lossy(&missing.stderr).contains("org/other"), "{missing:?}");
    assert!(!pull(&[]).status.success());
}
