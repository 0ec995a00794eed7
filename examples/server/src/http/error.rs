//! Errors as clients see them: OpenAI's objects, or Anthropic's under `/v1/messages`.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use omlx_client::{Error, Status};
use serde_json::{Value, json};

/// A request that failed. The guard writes it in the dialect of its path.
#[derive(Debug, Clone)]
pub struct ApiError {
    /// Of the answer.
    pub status: StatusCode,
    /// A word for programs, such as "context_length_exceeded".
    pub code: Option<&'static str>,
    /// For people.
    pub message: String,
    /// When to come again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// An error with a status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, code: None, message: message.into(), retry_after: None }
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// The same with a code.
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The object that goes into a body or a stream.
    pub fn to_json(&self, anthropic: bool) -> Value {
        if anthropic {
            return json!({"type": "error", "error": {"type": self.anthropic_type(), "message": self.message}});
        }
        json!({"error": {"message": self.message, "type": self.openai_type(), "param": null, "code": self.code}})
    }

    /// The response in one of the dialects.
    pub fn to_response(&self, anthropic: bool) -> Response {
        let mut response = Response::new(Body::from(self.to_json(anthropic).to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
        }
        response
    }

    fn openai_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        }
    }
}

/// Carries the error to the guard.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let (status, code) = match error.status {
            Status::InvalidArgument | Status::InvalidRequest | Status::Template => (400, None),
            Status::Unsupported => (400, Some("unsupported")),
            Status::ContextLength => (400, Some("context_length_exceeded")),
            Status::NotFound => (404, Some("model_not_found")),
            Status::InvalidModel => (422, Some("invalid_model")),
            Status::Busy => (429, Some("busy")),
            Status::Closed => (503, Some("closed")),
            Status::Cancelled => (503, Some("cancelled")),
            Status::OutOfMemory => (503, Some("out_of_memory")),
            Status::Timeout => (504, Some("timeout")),
            Status::Unauthorized | Status::Network | Status::Offline | Status::Checksum => (502, Some("hub")),
            Status::NoSpace => (507, Some("no_space")),
            _ => (500, None),
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, code, message: error.message, retry_after: error.retry_after }
    }
}
