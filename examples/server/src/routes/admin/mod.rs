//! `/admin/api`: models, downloads, caches and settings, for the page and for scripts.

mod cache;
pub mod downloads;
mod models;
mod settings;
mod status;

use axum::Router;
use axum::routing::{delete, get, post};
use serde_json::{Map, Value};

use crate::app::Shared;
use crate::http::error::ApiError;

/// The endpoints of this part.
pub fn router() -> Router<Shared> {
    Router::new()
        .route("/status", get(status::handle))
        .route("/models", get(models::list))
        .route("/models/load", post(models::load))
        .route("/models/unload", post(models::unload))
        .route("/models/pin", post(models::pin))
        .route("/models/configure", post(models::configure))
        .route("/models/rescan", post(models::rescan))
        .route("/downloads", get(downloads::list).post(downloads::start))
        .route("/downloads/{id}", delete(downloads::cancel))
        .route("/cache", get(cache::stats))
        .route("/cache/clear", post(cache::clear))
        .route("/cache/flush", post(cache::flush))
        .route("/settings", get(settings::read).patch(settings::change))
}

/// A text that must be there.
fn required<'a>(body: &'a Map<String, Value>, key: &str) -> Result<&'a str, ApiError> {
    body.get(key).and_then(Value::as_str).ok_or_else(|| ApiError::bad_request(format!("{key:?} must be a text")))
}

/// A text that may be missing.
fn optional<'a>(body: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(ApiError::bad_request(format!("{key:?} must be a text"))),
    }
}

/// A number that may be missing; 0 then.
fn number(body: &Map<String, Value>, key: &str) -> Result<u64, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => {
            value.as_u64().ok_or_else(|| ApiError::bad_request(format!("{key:?} must be a whole number, 0 or more")))
        }
    }
}

/// JSON that the library wrote.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}
