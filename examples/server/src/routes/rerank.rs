//! `POST /v1/rerank`: how well documents answer a query, in the common shape (Jina's and Cohere's).

use axum::extract::State;
use axum::response::Response;
use omlx_client::{Event, Pool, Request};
use serde_json::{Map, Value, json};

use crate::app::{App, Shared};
use crate::http::body::{JsonObject, flag, json_response};
use crate::http::error::ApiError;

/// Keys that mean something here or in the library.
pub(super) const KNOWN: &[&str] =
    &["documents", "instruction", "model", "priority", "query", "return_documents", "top_n", "truncate"];

/// The handler.
pub async fn handle(State(app): State<Shared>, body: JsonObject) -> Result<Response, ApiError> {
    let (mut request, documents) = body.with(&app, begin).await?;
    let (mut results, mut tokens) = (Vec::new(), 0);
    while let Some(event) = request.next().await {
        match event {
            Event::Scores(scores) => {
                for index in scores.order {
                    let index = index as usize;
                    let mut result = json!({"index": index, "relevance_score": scores.values.get(index)});
                    if let Some(documents) = &documents {
                        let document = documents.get(index).cloned().unwrap_or_default();
                        let text = if document.is_string() { json!({"text": document}) } else { document };
                        result["document"] = text;
                    }
                    results.push(result);
                }
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
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(json_response(&json!({"object": "list", "model": request.model(), "results": results, "usage": usage})))
}

/// Starts the request; also returns the documents if the answer is to have them.
fn begin(app: &App, mut body: Map<String, Value>) -> Result<(Request, Option<Value>), ApiError> {
    app.note_ignored("rerank", &body, KNOWN);
    let with_documents = flag(&body, "return_documents")?;
    body.remove("return_documents");
    let documents = with_documents.then(|| body.get("documents").cloned().unwrap_or_default());
    Ok((app.start(body, Pool::rerank)?, documents))
}
