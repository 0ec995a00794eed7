//! `GET /metrics`: the library's counters and the server's own, for Prometheus.

use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use omlx_client::Metrics;

use crate::app::Shared;
use crate::http::error::ApiError;

/// The handler.
pub async fn handle(State(app): State<Shared>) -> Result<Response, ApiError> {
    let mut text = app.pool.metrics(Metrics::Prometheus)?;
    let own = [
        ("omlx_http_requests_total", "counter", "Requests received.", app.requests.load(Relaxed)),
        ("omlx_http_failures_total", "counter", "Requests answered with an error.", app.failures.load(Relaxed)),
        ("omlx_http_abandoned_total", "counter", "Streams that clients left.", app.abandoned.load(Relaxed)),
        ("omlx_http_active", "gauge", "Requests whose answer has not begun.", app.active.load(Relaxed)),
        ("omlx_http_uptime_seconds", "gauge", "Age of the server.", app.started.elapsed().as_secs()),
    ];
    for (name, kind, help, value) in own {
        // Writing to a string cannot fail.
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n");
    }
    let mut response = Response::new(Body::from(text));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}
