//! `/admin/api/settings`: limits that can change while the server runs.

use axum::extract::State;
use axum::response::Response;
use omlx_client::CacheLimits;
use serde_json::json;

use super::{number, parsed};
use crate::app::Shared;
use crate::http::body::{JsonObject, blocking, json_response};
use crate::http::error::ApiError;

const KEYS: &[&str] = &["memory_limit", "memory_percent", "hot_bytes", "cold_bytes", "cold_bytes_per_model"];

/// `GET`: limits and what else the server was started with.
pub async fn read(State(app): State<Shared>) -> Result<Response, ApiError> {
    let limits = app.limits;
    let (status, caches) = (parsed(&app.pool.status()?), app.pool.cache_limits()?);
    // Without a folder there are no files, and most have no limit for a model.
    let some = |bytes: u64| (bytes > 0 && bytes < u64::MAX).then_some(bytes);
    Ok(json_response(&json!({
        "memory_limit": status["memory"]["limit"],
        "hot_bytes": caches.hot_bytes,
        "cold_bytes": some(caches.cold_bytes),
        "cold_bytes_per_model": some(caches.cold_bytes_per_model),
        "max_body_bytes": limits.body,
        "max_connections": limits.connections,
        "timeout_seconds": limits.timeout.as_secs(),
        "keep_alive_seconds": limits.keep_alive.as_secs(),
        "drain_seconds": limits.drain.as_secs(),
        "keys_required": app.keys.required(),
        "allowed_hosts": app.allowed_hosts,
        "cors_origins": app.cors_origins,
    })))
}

/// `PATCH`: changes limits of memory and caches; what is not named stays.
pub async fn change(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    if let Some(key) = body.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(ApiError::bad_request(format!("{key:?} is none of {}", KEYS.join(", "))));
    }
    let percent = number(&body, "memory_percent")?;
    let percent = u32::try_from(percent).map_err(|_| ApiError::bad_request("\"memory_percent\" is too large"))?;
    let memory = number(&body, "memory_limit")?;
    let limits = CacheLimits {
        hot_bytes: number(&body, "hot_bytes")?,
        cold_bytes: number(&body, "cold_bytes")?,
        cold_bytes_per_model: number(&body, "cold_bytes_per_model")?,
        ..CacheLimits::default()
    };
    let state = app.clone();
    blocking(move || {
        if body.contains_key("memory_limit") || body.contains_key("memory_percent") {
            state.pool.set_memory_limit(memory, percent)?;
        }
        if body.keys().any(|key| key.ends_with("_bytes") || key.starts_with("cold_")) {
            state.pool.set_cache_limits(limits)?;
        }
        Ok(())
    })
    .await?;
    read(State(app)).await
}
