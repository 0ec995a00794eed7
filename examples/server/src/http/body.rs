//! Bodies of requests: read within limits of size and time, parsed as JSON objects.

use std::future::poll_fn;
use std::pin::pin;
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequest;
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use axum::response::Response;
use http_body::Body as _;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::app::{App, Shared};

/// A body takes this many pauses of the full timeout at most.
const PAUSES: u32 = 8;

/// Bytes from which reading and writing JSON takes long enough to be noticed by other connections.
const LONG: usize = 256 << 10;

/// A body that is a JSON object, and whether it is long.
pub struct JsonObject(pub Map<String, Value>, pub bool);

impl JsonObject {
    /// Does `work` with the object, which passes over all of it; on another thread if it is long.
    pub async fn with<T: Send + 'static>(
        self,
        app: &Shared,
        work: impl FnOnce(&App, Map<String, Value>) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (Self(object, long), app) = (self, Shared::clone(app));
        aside(long, move || work(&app, object)).await
    }
}

/// Does what passes over a whole body, on another thread if that is long.
async fn aside<T: Send + 'static>(
    long: bool,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if long { blocking(work).await } else { work() }
}

impl FromRequest<Shared> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request<Body>, app: &Shared) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            // Web pages can send other types anywhere without asking.
            let what = "the Content-Type must be application/json";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, what));
        }
        let bytes = read(request, app.limits.body, app.limits.timeout).await?;
        let long = bytes.len() > LONG;
        aside(long, move || parse(&bytes)).await.map(|object| Self(object, long))
    }
}

fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::bad_request("the body must be a JSON object")),
        Err(error) => Err(ApiError::bad_request(format!("the body is not valid JSON: {error}"))),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

async fn read(request: Request<Body>, limit: usize, timeout: Duration) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {limit} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    // What is announced as too large is not read.
    let announced = request.body().size_hint().lower();
    if announced > limit as u64 {
        return Err(too_large());
    }
    let deadline = tokio::time::Instant::now() + timeout * PAUSES;
    let mut body = pin!(request.into_body());
    let mut bytes = Vec::new();
    loop {
        let frame = poll_fn(|context| body.as_mut().poll_frame(context));
        let patience = deadline.min(tokio::time::Instant::now() + timeout);
        let frame = tokio::time::timeout_at(patience, frame).await;
        let frame = frame.map_err(|_| ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body came too slowly"))?;
        let Some(frame) = frame else { return Ok(bytes) };
        let frame = frame.map_err(|error| ApiError::bad_request(format!("the body broke off: {error}")))?;
        if let Ok(data) = frame.into_data() {
            if bytes.len() + data.len() > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&data);
        }
    }
}

/// A response with a JSON body.
pub fn json_response(value: &Value) -> Response {
    json_text(value.to_string())
}

/// The same of a text that is JSON already.
pub fn json_text(text: String) -> Response {
    let mut response = Response::new(Body::from(text));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Runs what may wait, such as reading a tokenizer, on a thread that may.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |_| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the work could not be done");
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// A switch that may be missing.
pub fn flag(body: &Map<String, Value>, key: &str) -> Result<bool, ApiError> {
    match body.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(ApiError::bad_request(format!("{key:?} must be true or false"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_on_a_long_body_is_done_elsewhere() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let elsewhere = |long| {
            let here = std::thread::current().id();
            runtime.block_on(aside(long, move || Ok(std::thread::current().id() != here))).unwrap()
        };
        assert!(elsewhere(true) && !elsewhere(false));
    }
}
