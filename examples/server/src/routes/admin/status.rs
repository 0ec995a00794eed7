//! `GET /admin/api/status`: memory, loaded models, versions.

use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::response::Response;
use omlx_client::Metrics;
use serde_json::json;

use super::parsed;
use crate::app::Shared;
use crate::http::body::json_response;
use crate::http::error::ApiError;

/// The handler.
pub async fn handle(State(app): State<Shared>) -> Result<Response, ApiError> {
    Ok(json_response(&json!({
        "version": omlx_client::version(),
        "mlx_version": omlx_client::mlx_version(),
        "uptime_seconds": app.started.elapsed().as_secs(),
        "active": app.active.load(Ordering::Relaxed),
        "draining": app.draining.load(Ordering::Relaxed),
        "pool": parsed(&app.pool.status()?),
        "metrics": parsed(&app.pool.metrics(Metrics::Json)?),
    })))
}
