//! `/admin/api/downloads`: models from the hub.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use omlx_client::{Download, DownloadState};
use serde_json::{Map, Value, json};

use super::required;
use crate::app::Shared;
use crate::http::body::{JsonObject, json_response};
use crate::http::error::ApiError;

/// Downloads that are remembered at most; those that are over go first.
const MOST: usize = 64;

/// What a request may say. Folder and endpoint are the server's to choose: a client could have files written, or other
/// servers called, where it could not itself.
const KEYS: &[&str] = &["repo", "revision", "files", "patterns", "token", "connections"];

/// The downloads that were started here.
#[derive(Debug, Default)]
pub struct Downloads(Mutex<Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    id: String,
    repo: String,
    download: Download,
}

impl Downloads {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GET`: all of them and how far they are.
pub async fn list(State(app): State<Shared>) -> Result<Response, ApiError> {
    let entries = app.downloads.lock();
    let all = entries.iter().map(describe).collect::<Result<Vec<_>, _>>()?;
    Ok(json_response(&json!({"downloads": all})))
}

/// `POST`: starts one.
pub async fn start(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    if let Some(key) = body.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(ApiError::bad_request(format!("{key:?} is none of {}", KEYS.join(", "))));
    }
    let repo = required(&body, "repo")?.to_owned();
    if !is_repository(&repo) {
        return Err(ApiError::bad_request("\"repo\" must be a name such as org/name"));
    }
    let body: Map<String, Value> = body.into_iter().filter(|(_, value)| !value.is_null()).collect();
    let mut entries = app.downloads.lock();
    if entries.len() >= MOST {
        entries.retain(|entry| entry.download.progress().is_ok_and(|progress| !progress.is_over()));
        if entries.len() >= MOST {
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too many downloads are running"));
        }
    }
    let download = app.pool.download(&Value::Object(body).to_string())?;
    let entry = Entry { id: app.id("dl_"), repo, download };
    let described = describe(&entry)?;
    entries.push(entry);
    Ok(json_response(&described))
}

/// `DELETE {id}`: ends one, and forgets one that is over.
pub async fn cancel(State(app): State<Shared>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let mut entries = app.downloads.lock();
    let place = entries.iter().position(|entry| entry.id == id);
    let place = place.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "there is no such download"))?;
    entries[place].download.cancel();
    let described = describe(&entries[place])?;
    if entries[place].download.progress()?.is_over() {
        entries.remove(place);
    }
    Ok(json_response(&described))
}

fn describe(entry: &Entry) -> Result<Value, ApiError> {
    let progress = entry.download.progress()?;
    let state = match progress.state {
        DownloadState::Listing => "listing",
        DownloadState::Fetching => "fetching",
        DownloadState::Installing => "installing",
        DownloadState::Done => "done",
        DownloadState::Failed => "failed",
        DownloadState::Cancelled => "cancelled",
        _ => "unknown",
    };
    let error = if progress.is_over() { entry.download.wait(Some(Duration::ZERO)).err() } else { None };
    Ok(json!({
        "id": entry.id,
        "repo": entry.repo,
        "state": state,
        "bytes_done": progress.bytes_done,
        "bytes_total": progress.bytes_total,
        "files_done": progress.files_done,
        "files_total": progress.files_total,
        "error": error.map(|error| error.message),
    }))
}

/// `org/name` of letters, digits, dots, dashes and underscores, no part of which can lead out of a folder.
fn is_repository(repo: &str) -> bool {
    let part = |part: &str| {
        (1..=96).contains(&part.len())
            && !part.starts_with(['.', '-'])
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    repo.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

#[cfg(test)]
mod tests {
    use super::is_repository;

    #[test]
    fn names_of_repositories_cannot_lead_out_of_a_folder() {
        for good in ["org/name", "mlx-community/Qwen3-0.6B-4bit", "a_b/c.d"] {
            assert!(is_repository(good), "{good}");
        }
        for bad in
            ["name", "../x", "org/..", "/etc/passwd", "a/b/c", "org/.git", "a\\b/c", "a/b\0", "org/%2e%2e", "/", "a/"]
        {
            assert!(!is_repository(bad), "{bad}");
        }
    }
}
