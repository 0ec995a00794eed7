//! Downloads in a process of their own: one that can be killed, or has another environment.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use omlx::hub::{Download, DownloadRequest};
use serde_json::{Value, json};

use crate::{Case, tuning};

/// Tells the other process what to do.
const TASK: &str = "OMLX_TEST_DOWNLOAD";

/// The other process; by itself it does nothing.
#[test]
fn downloads() {
    let Ok(task) = std::env::var(TASK) else { return };
    let task: Value = serde_json::from_str(&task).unwrap();
    let models = Path::new(task["models"].as_str().unwrap());
    for request in task["requests"].as_array().unwrap() {
        let request = DownloadRequest::from_json(request.to_string().as_bytes()).unwrap();
        let outcome = Download::start(request, models, tuning(), |_| ()).and_then(|download| download.wait(None));
        let text = outcome.map_or_else(|e| format!("{:?}: {e}", e.status()), |_| "arrived".to_owned());
        std::fs::write(models.join(".outcome"), text).unwrap();
    }
}

/// Starts downloads of `requests`, one after the other, in another process.
pub fn start(case: &Case, requests: &[Value], variables: &[(&str, &str)]) -> Child {
    let requests: Vec<_> = requests.iter().map(|more| case.request(more.clone())).collect();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child::downloads"])
        .env(TASK, json!({ "requests": requests, "models": case.folder.path() }).to_string())
        .envs(variables.iter().copied())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// What came of the last download of a process that has ended.
pub fn outcome(case: &Case, mut child: Child) -> String {
    assert!(child.wait().unwrap().success());
    std::fs::read_to_string(case.folder.path().join(".outcome")).unwrap()
}
