//! `GET /openapi.json`: the description of the interface.

use axum::response::Response;

use crate::http::body::json_text;

/// The document, as it is in the repository.
pub const DOCUMENT: &str = include_str!("openapi.json");

/// The handler.
pub async fn handle() -> Response {
    json_text(DOCUMENT.to_owned())
}
