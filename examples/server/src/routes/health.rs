//! `GET /health`, `/health/live`, `/health/ready`: whether the server runs, and whether it takes work.

use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::{App, Shared};
use crate::http::body::json_response;

/// Live and ready at once; 503 if not ready.
pub async fn all(State(app): State<Shared>) -> Response {
    answer(readiness(&app))
}

/// The process answers.
pub async fn live() -> Response {
    json_response(&json!({"live": true}))
}

/// New work would be taken.
pub async fn ready(State(app): State<Shared>) -> Response {
    answer(readiness(&app))
}

/// Why work would not be taken.
fn readiness(app: &App) -> Result<(), &'static str> {
    if app.draining.load(Ordering::Relaxed) {
        return Err("the server is ending");
    }
    app.pool.status().map(drop).map_err(|_| "the pool does not answer")
}

fn answer(readiness: Result<(), &str>) -> Response {
    let reason = readiness.err().map_or(Value::Null, Value::from);
    let mut response = json_response(&json!({"live": true, "ready": reason.is_null(), "reason": reason}));
    if !reason.is_null() {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}
