//! `GET /health`, `/health/live`, `/health/ready`: whether the server runs, and whether it takes work.

use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use omlx_client::Metrics;
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

/// Seconds that a model may compute one step.
const PATIENCE: f64 = 60.0;

/// Why work would not be taken.
fn readiness(app: &App) -> Result<(), &'static str> {
    if app.draining.load(Ordering::Relaxed) {
        return Err("the server is ending");
    }
    let metrics = app.pool.metrics(Metrics::Json).map_err(|_| "the pool does not answer")?;
    match hangs(&serde_json::from_str(&metrics).unwrap_or_default()) {
        true => Err("a model has been computing one step for a minute"),
        false => Ok(()),
    }
}

/// Whether any model does not get on with a step that it has begun. One that computes nothing, since there are no requests or
/// their readers are behind, is well.
fn hangs(metrics: &Value) -> bool {
    let models = metrics["models"].as_object().into_iter().flatten();
    models.filter_map(|(_, model)| model["step_age_seconds"].as_f64()).any(|age| age > PATIENCE)
}

fn answer(readiness: Result<(), &str>) -> Response {
    let reason = readiness.err().map_or(Value::Null, Value::from);
    let mut response = json_response(&json!({"live": true, "ready": reason.is_null(), "reason": reason}));
    if !reason.is_null() {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_model_that_hangs_is_enough() {
        let metrics = |ages: &[f64]| {
            let model = |(index, age): (usize, &f64)| (index.to_string(), json!({"steps": 9, "step_age_seconds": age}));
            json!({"models": ages.iter().enumerate().map(model).collect::<serde_json::Map<_, _>>()})
        };
        assert!(!hangs(&metrics(&[])));
        assert!(!hangs(&metrics(&[0.0, 59.0])));
        assert!(hangs(&metrics(&[0.0, 61.0, 0.01])));
        // Rows in the tiers of a model that is not loaded.
        assert!(!hangs(&json!({"models": {"a": {"cold_bytes": 100}}})));
    }
}
