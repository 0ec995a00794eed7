//! `GET /openapi.json`: the description of the interface.

use axum::response::Response;

use crate::http::body::json_text;

/// The document, as it is in the repository.
pub const DOCUMENT: &str = include_str!("openapi.json");

/// The handler.
pub async fn handle() -> Response {
    json_text(DOCUMENT.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::DOCUMENT;
    use crate::http::{anthropic, responses_input};
    use crate::routes::{chat_completions, completions, embeddings, rerank};

    #[test]
    fn every_key_that_means_something_is_described() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        for (schema, known) in [
            ("ChatRequest", chat_completions::KNOWN),
            ("CompletionRequest", completions::KNOWN),
            ("ResponsesRequest", responses_input::KNOWN),
            ("EmbeddingsRequest", embeddings::KNOWN),
            ("RerankRequest", rerank::KNOWN),
            ("MessagesRequest", anthropic::KNOWN),
        ] {
            let described = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
            for key in known {
                assert!(described.contains_key(*key), "{schema} has no {key}");
            }
            // What clients send as a matter of course is described, although it means nothing.
            let means = |key: &str| known.contains(&key) || ["metadata", "store"].contains(&key);
            assert!(described.keys().all(|key| means(key)), "{schema}: a key that means nothing");
        }
    }
}
