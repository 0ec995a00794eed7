//! The endpoints, a file each.

pub mod admin;
mod chat_completions;
mod completions;
mod count_tokens;
mod embeddings;
mod health;
mod messages;
mod metrics;
mod models;
mod openapi;
mod page;
mod rerank;
mod responses;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};

use crate::app::Shared;
use crate::http::guard::guard;

/// All endpoints behind the guard.
pub fn router(app: Shared) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/responses", post(responses::handle))
        .route("/v1/embeddings", post(embeddings::handle))
        .route("/v1/rerank", post(rerank::handle))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/messages", post(messages::handle))
        .route("/v1/messages/count_tokens", post(count_tokens::handle))
        .route("/health", get(health::all))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(metrics::handle))
        .route("/openapi.json", get(openapi::handle))
        .route("/", get(page::handle))
        .nest("/admin/api", admin::router())
        .layer(from_fn_with_state(app.clone(), guard))
        .with_state(app)
}
