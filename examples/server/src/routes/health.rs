//! `GET /health`, `/health/live`, `/health/ready`: whether the server runs, and whether it takes work.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

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

/// How long models may work on one step.
const PATIENCE: Duration = Duration::from_secs(60);

/// When models that had work were last seen to get on.
#[derive(Debug, Default)]
pub struct Pulse(Mutex<Option<(u64, Instant)>>);

impl Pulse {
    /// Takes the number of steps so far and whether there is work, and says for how long nothing has come of it.
    fn stalled(&self, steps: u64, busy: bool, now: Instant) -> Duration {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match *last {
            Some((before, since)) if busy && before == steps => now.saturating_duration_since(since),
            _ => {
                *last = busy.then_some((steps, now));
                Duration::ZERO
            }
        }
    }
}

/// Why work would not be taken.
fn readiness(app: &App) -> Result<(), &'static str> {
    if app.draining.load(Ordering::Relaxed) {
        return Err("the server is ending");
    }
    let metrics = app.pool.metrics(Metrics::Json).map_err(|_| "the pool does not answer")?;
    let metrics: Value = serde_json::from_str(&metrics).unwrap_or_default();
    let models = metrics["models"].as_object();
    let sum = |name: &str| models.into_iter().flatten().filter_map(|(_, model)| model[name].as_u64()).sum::<u64>();
    match app.pulse.stalled(sum("steps"), sum("running_sequences") > 0, Instant::now()) > PATIENCE {
        true => Err("no step has ended for a minute"),
        false => Ok(()),
    }
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
    fn only_work_that_stands_still_is_a_stall() {
        let (pulse, began) = (Pulse::default(), Instant::now());
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let stalled = |steps, busy, seconds| pulse.stalled(steps, busy, at(seconds)).as_secs();
        assert_eq!(stalled(5, false, 0), 0);
        // Idle for long, then a first step that takes its time.
        assert_eq!(stalled(5, true, 1000), 0);
        assert_eq!(stalled(5, true, 1010), 10);
        assert_eq!(stalled(6, true, 1020), 0);
        assert_eq!(stalled(6, true, 1100), 80);
        assert_eq!(stalled(6, false, 1110), 0);
        assert_eq!(stalled(6, true, 1200), 0);
    }
}
