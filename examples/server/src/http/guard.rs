//! What every request passes: who may call under which name, ids, errors in the path's dialect, the log.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::Response;

use super::error::ApiError;
use crate::app::{App, Shared};
use crate::log;

/// The id of a request, for handlers.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// Counts a request as being answered as long as it lives.
struct Active(Shared);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The middleware.
pub async fn guard(State(app): State<Shared>, mut request: Request<Body>, next: Next) -> Response {
    let began = Instant::now();
    app.requests.fetch_add(1, Ordering::Relaxed);
    app.active.fetch_add(1, Ordering::Relaxed);
    let active = Active(app.clone());
    let id = request_id(&app, request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let response = match admit(&app, &request) {
        Err(error) => Err(error),
        Ok(()) if method == Method::OPTIONS => Ok(preflight()),
        Ok(()) => {
            request.extensions_mut().insert(RequestId(id.clone()));
            Ok(next.run(request).await)
        }
    };
    let mut response = match response {
        Ok(mut response) => match response.extensions_mut().remove::<ApiError>() {
            Some(error) => fail(&app, &path, &error),
            None => by_router(&path, response),
        },
        Err(error) => fail(&app, &path, &error),
    };
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        // Each API's name for it.
        headers.insert("x-request-id", value.clone());
        headers.insert("request-id", value);
    }
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    if let Some(origin) = origin.filter(|origin| allowed_origin(&app, origin)) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    }
    let milliseconds = began.elapsed().as_millis() as u64;
    let fields = [
        ("id", id.into()),
        ("method", method.as_str().into()),
        ("path", path.chars().take(200).collect::<String>().into()),
        ("status", response.status().as_u16().into()),
        ("ms", milliseconds.into()),
    ];
    log::info("request", &fields);
    drop(active);
    response
}

/// Whether a request may come in at all.
fn admit(app: &App, request: &Request<Body>) -> Result<(), ApiError> {
    check_host(app, request.headers(), request.uri())?;
    check_origin(app, request.headers())?;
    let free = request.method() == Method::OPTIONS || is_public(request.uri().path());
    if !free && app.keys.required() && !presented(request.headers()).any(|key| app.keys.accept(key)) {
        let what = "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY";
        return Err(ApiError::new(StatusCode::UNAUTHORIZED, what).with_code("invalid_api_key"));
    }
    Ok(())
}

/// What anybody may fetch: it holds nothing.
fn is_public(path: &str) -> bool {
    matches!(path, "/" | "/openapi.json" | "/favicon.ico" | "/health" | "/health/live" | "/health/ready")
}

fn presented(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let bearer = headers.get_all(header::AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    bearer.chain(headers.get_all("x-api-key").iter().map(HeaderValue::as_bytes))
}

/// A web page can make its own name point to this machine, and its browser call here: names must be known ones.
fn check_host(app: &App, headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
    let refuse = |what: String| Err(ApiError::new(StatusCode::MISDIRECTED_REQUEST, what));
    let named = headers.get_all(header::HOST).iter().map(|value| value.to_str().unwrap_or("?"));
    let named: Vec<&str> = named.chain(uri.authority().map(|authority| authority.as_str())).collect();
    if named.is_empty() {
        return refuse("the Host header is missing".to_owned());
    }
    match named.iter().find(|name| !known_host(app, host_of(name))) {
        Some(name) => refuse(format!("{name:?} is not a name of this server; see --allowed-hosts")),
        None => Ok(()),
    }
}

fn known_host(app: &App, host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok()
        || app.allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(host))
}

/// The host without its port.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// Other pages' scripts may only call if they are allowed to.
fn check_origin(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let own = origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(_, name)| name == host);
    if own || allowed_origin(app, origin) {
        return Ok(());
    }
    Err(ApiError::new(StatusCode::FORBIDDEN, "calls from other web pages are not allowed; see --cors-origins"))
}

fn allowed_origin(app: &App, origin: &HeaderValue) -> bool {
    app.cors_origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes())
}

fn preflight() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, PATCH, DELETE"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("authorization, content-type, x-api-key, anthropic-version, anthropic-beta"),
    );
    response
}

/// The router's own answers, for unknown paths and methods, have no body.
fn by_router(path: &str, response: Response) -> Response {
    let error = match response.status() {
        StatusCode::NOT_FOUND => ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at {path:?}")),
        StatusCode::METHOD_NOT_ALLOWED => {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{path:?} does not take this method"))
        }
        _ => return response,
    };
    let mut described = error.to_response(is_anthropic(path));
    described.headers_mut().extend(response.headers().get(header::ALLOW).map(|allow| (header::ALLOW, allow.clone())));
    described
}

fn fail(app: &App, path: &str, error: &ApiError) -> Response {
    app.failures.fetch_add(1, Ordering::Relaxed);
    error.to_response(is_anthropic(path))
}

fn is_anthropic(path: &str) -> bool {
    path.starts_with("/v1/messages")
}

/// The client's id, if it is a plain one, else a new one.
fn request_id(app: &App, headers: &HeaderMap) -> String {
    let given = headers.get("x-request-id").and_then(|value| value.to_str().ok());
    let plain = |id: &&str| {
        (1..=80).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    given.filter(plain).map_or_else(|| app.id("req_"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_lose_their_ports() {
        for (authority, host) in
            [("localhost:8000", "localhost"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("a.b", "a.b"), ("a:b", "a:b")]
        {
            assert_eq!(host_of(authority), host);
        }
    }
}
