//! `POST /v1/embeddings`: vectors of texts.

use axum::extract::State;
use axum::response::Response;
use omlx_client::{Event, Pool};
use serde_json::{Value, json};

use crate::app::Shared;
use crate::http::body::{JsonObject, json_response};
use crate::http::error::ApiError;

/// Keys that mean something in the library.
pub(super) const KNOWN: &[&str] =
    &["dimensions", "encoding_format", "input", "model", "normalize", "priority", "truncate"];

/// The handler.
pub async fn handle(State(app): State<Shared>, body: JsonObject) -> Result<Response, ApiError> {
    let (mut request, base64) = body
        .with(&app, |app, body| {
            app.note_ignored("embeddings", &body, KNOWN);
            let base64 = body.get("encoding_format").is_some_and(|format| format == "base64");
            Ok((app.start(body, Pool::embed)?, base64))
        })
        .await?;
    let (mut data, mut tokens) = (Vec::new(), 0);
    while let Some(event) = request.next().await {
        match event {
            Event::Embeddings(vectors) if base64 => {
                let texts: Vec<String> = serde_json::from_str(&vectors.text).unwrap_or_default();
                data = texts.into_iter().map(Value::from).collect();
            }
            Event::Embeddings(vectors) => {
                data = vectors.values.chunks(vectors.dimensions.max(1)).map(Value::from).collect();
            }
            Event::Done(done) => {
                if let Some(error) = done.error {
                    return Err(error.into());
                }
                tokens = done.usage.prompt_tokens;
            }
            _ => {}
        }
    }
    let data = data.into_iter().enumerate();
    let data: Vec<Value> =
        data.map(|(index, vector)| json!({"object": "embedding", "index": index, "embedding": vector})).collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(json_response(&json!({"object": "list", "data": data, "model": request.model(), "usage": usage})))
}
