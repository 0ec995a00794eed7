//! `/admin/api/cache`: what is cached, and forgetting it.

use std::collections::HashMap;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::response::Response;
use omlx_client::Tiers;
use serde_json::{Map, Value, json};

use super::{optional, parsed};
use crate::app::Shared;
use crate::http::body::{JsonObject, blocking, json_response};
use crate::http::error::ApiError;

/// Longest wait for the disk.
const FLUSH: Duration = Duration::from_secs(60);

/// `GET`: the caches of all loaded models, or of `?model=`.
pub async fn stats(
    State(app): State<Shared>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, ApiError> {
    if let Some(model) = query.get("model") {
        return Ok(json_response(&json!({"models": {model: parsed(&app.pool.cache_stats(Some(model))?)}})));
    }
    let models = parsed(&app.pool.models()?);
    let loaded = models.as_array().into_iter().flatten().filter(|model| model["loaded"] == true);
    let ids = loaded.filter_map(|model| model["id"].as_str());
    // One that was unloaded meanwhile has none.
    let all: Map<String, Value> =
        ids.filter_map(|id| Some((id.to_owned(), parsed(&app.pool.cache_stats(Some(id)).ok()?)))).collect();
    Ok(json_response(&json!({"models": all})))
}

/// `POST clear`: `{"model", "tiers": ["pools", "hot", "cold"]}`; all models and all tiers if nothing is said.
pub async fn clear(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    let (model, tiers) = (optional(&body, "model")?.map(str::to_owned), tiers(body.get("tiers"))?);
    blocking(move || {
        let bytes = app.pool.cache_clear(model.as_deref(), tiers)?;
        Ok(json_response(&json!({"freed_bytes": bytes})))
    })
    .await
}

/// `POST flush`: `{"model"}`; answers when all is on the disk.
pub async fn flush(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    let model = optional(&body, "model")?.map(str::to_owned);
    blocking(move || {
        app.pool.cache_flush(model.as_deref(), FLUSH)?;
        Ok(json_response(&Value::Object(Map::new())))
    })
    .await
}

fn tiers(value: Option<&Value>) -> Result<Tiers, ApiError> {
    let names = match value {
        None | Some(Value::Null) => return Ok(Tiers::ALL),
        Some(Value::Array(names)) if !names.is_empty() => names,
        Some(_) => return Err(ApiError::bad_request("\"tiers\" must be an array of pools, hot, cold")),
    };
    let mut sum = None;
    for name in names {
        let tier = match name.as_str() {
            Some("pools") => Tiers::POOLS,
            Some("hot") => Tiers::HOT,
            Some("cold") => Tiers::COLD,
            _ => return Err(ApiError::bad_request(format!("{name} is none of pools, hot, cold"))),
        };
        sum = Some(sum.map_or(tier, |sum| sum | tier));
    }
    Ok(sum.unwrap_or(Tiers::ALL))
}
