//! `GET /v1/models` and `GET /v1/models/{id}`: the models that can be used.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::{App, Shared};
use crate::http::body::json_response;
use crate::http::error::ApiError;

/// The handler of the list.
pub async fn list(State(app): State<Shared>) -> Result<Response, ApiError> {
    Ok(json_response(&json!({"object": "list", "data": usable(&app)?, "has_more": false})))
}

/// The handler of a single one.
pub async fn one(State(app): State<Shared>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let found = usable(&app)?.into_iter().find(|model| model["id"] == id);
    let missing = || ApiError::new(StatusCode::NOT_FOUND, format!("there is no model {id:?}"));
    found.map(|model| json_response(&model)).ok_or_else(|| missing().with_code("model_not_found"))
}

fn usable(app: &App) -> Result<Vec<Value>, ApiError> {
    let models: Value = serde_json::from_str(&app.pool.models()?).unwrap_or_default();
    let models = models.as_array().cloned().unwrap_or_default().into_iter();
    let usable = models.filter(|model| model.get("problem").is_none_or(Value::is_null));
    // Both APIs' fields: OpenAI's `object`, `created`, `owned_by`; Anthropic's `type`, `display_name`, `created_at`.
    Ok(usable
        .map(|model| {
            json!({
                "id": model["id"],
                "object": "model",
                "created": 0,
                "owned_by": "local",
                "type": "model",
                "display_name": model["id"],
                "created_at": "1970-01-01T00:00:00Z",
                "kind": model["kind"],
                "loaded": model["loaded"],
                "context_length": model["context_length"],
            })
        })
        .collect())
}
