//! `/admin/api/models`: the catalogue, loading and unloading, what is settled about a model.

use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::{parsed, required};
use crate::app::{App, Shared};
use crate::http::body::{JsonObject, blocking, flag, json_response};
use crate::http::error::ApiError;

/// `GET`: all models, those with problems too, and what is settled about them.
pub async fn list(State(app): State<Shared>) -> Result<Response, ApiError> {
    let mut models = parsed(&app.pool.models()?);
    for model in models.as_array_mut().into_iter().flatten() {
        let settings = model["id"].as_str().and_then(|id| app.pool.model_settings(id).ok());
        model["settings"] = settings.map_or(Value::Null, |text| parsed(&text));
        // Paths are nobody's business who is not on this machine.
        for path in ["folder", "license_file"] {
            model.as_object_mut().and_then(|model| model.remove(path));
        }
    }
    Ok(json_response(&json!({"models": models})))
}

/// `POST load`: `{"id"}`; answers when the model is there.
pub async fn load(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    let id = required(&body, "id")?.to_owned();
    blocking(move || {
        app.pool.load_model(&id)?;
        Ok(json_response(&json!({"id": id, "loaded": true})))
    })
    .await
}

/// `POST unload`: `{"id", "drain"}`; answers when the memory is free.
pub async fn unload(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    let (id, drain) = (required(&body, "id")?.to_owned(), flag(&body, "drain")?);
    blocking(move || {
        let freed = app.pool.unload_model(&id, drain)?;
        Ok(json_response(&json!({"id": id, "loaded": false, "freed_bytes": freed})))
    })
    .await
}

/// `POST pin`: `{"id", "pinned"}`.
pub async fn pin(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    let (id, pinned) = (required(&body, "id")?, flag(&body, "pinned")?);
    settle(&app, id, &json!({"pinned": pinned}))
}

/// `POST configure`: `{"id", "settings"}`, the settings as the library takes them.
pub async fn configure(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    let settings = body.get("settings").filter(|settings| settings.is_object());
    let settings = settings.ok_or_else(|| ApiError::bad_request("\"settings\" must be an object"))?;
    settle(&app, required(&body, "id")?, settings)
}

fn settle(app: &App, id: &str, settings: &Value) -> Result<Response, ApiError> {
    app.pool.configure_model(id, &settings.to_string())?;
    Ok(json_response(&json!({"id": id, "settings": parsed(&app.pool.model_settings(id)?)})))
}

/// `POST rescan`: looks into the folders again.
pub async fn rescan(State(app): State<Shared>) -> Result<Response, ApiError> {
    blocking(move || {
        app.pool.rescan()?;
        Ok(json_response(&Value::Object(Map::new())))
    })
    .await
}
