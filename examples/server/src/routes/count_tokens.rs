//! `POST /v1/messages/count_tokens`: how long the prompt of a request would be.

use axum::extract::State;
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::Shared;
use crate::http::anthropic;
use crate::http::body::{JsonObject, blocking, json_response};
use crate::http::error::ApiError;

/// The handler.
pub async fn handle(State(app): State<Shared>, JsonObject(body, _): JsonObject) -> Result<Response, ApiError> {
    // Reading a tokenizer may wait, however short the text is.
    let tokens = blocking(move || -> Result<usize, ApiError> {
        anthropic::note_ignored(&app, "messages/count_tokens", &body);
        let chat = anthropic::to_chat(&body)?;
        let (model, text) = app.with_default_model(chat, |app, json| app.pool.render_template(json, true))?;
        Ok(app.pool.tokenize(model.as_deref(), &text, false)?.len())
    });
    let tokens = tokens.await?;
    Ok(json_response(&json!({"input_tokens": Value::from(tokens)})))
}
