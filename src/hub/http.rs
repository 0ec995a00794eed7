//! Requests to a hub and to the servers it sends us on to.

use std::fs;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use ureq::http::{HeaderMap, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy};

use super::control::{Control, add};
use super::download::Tuning;
use super::request::{MAX_CONNECTIONS, Token};
use super::settings::Settings;
use super::url::Url;
use crate::error::{Error, Result, Status};

/// A hub sends us on once, to its cache or to a content delivery network; mirrors perhaps twice.
const MAX_REDIRECTS: usize = 6;

/// Bytes of a redirect's text that are read.
const MAX_REDIRECT_BYTES: usize = 16 << 10;

/// Longest wait between two attempts, and for a server that says when to come again.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// A request that failed, and whether the same one may succeed later.
pub struct Failure {
    pub error: Error,
    again: Again,
}

enum Again {
    Never,
    Later,
    After(Duration),
}

impl Failure {
    /// Trying again is useless.
    pub fn last(error: Error) -> Self {
        Self { error, again: Again::Never }
    }

    /// The connection's fault, or the server's for now.
    pub fn passing(error: Error) -> Self {
        Self { error, again: Again::Later }
    }

    fn from_ureq(url: &Url, error: ureq::Error) -> Self {
        use ureq::Error as E;
        match error {
            // These quote the URL.
            E::BadUri(_) | E::Http(_) => Self::last(Error::network(format!("{url}: not a usable URL"))),
            E::Io(_) | E::Timeout(_) | E::HostNotFound | E::ConnectionFailed | E::Protocol(_) | E::BodyStalled => {
                Self::passing(Error::network(format!("{url}: {error}")))
            }
            error => Self::last(Error::network(format!("{url}: {error}"))),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::last(error)
    }
}

/// Counts failures in a row, and waits longer after each.
pub struct Patience<'a> {
    control: &'a Control,
    tuning: &'a Tuning,
    failures: u32,
}

impl<'a> Patience<'a> {
    pub fn new(control: &'a Control, tuning: &'a Tuning) -> Self {
        Self { control, tuning, failures: 0 }
    }

    /// Something arrived: what failed before does not count any more.
    pub fn progressed(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt, or gives up with the failure's error.
    pub fn after(&mut self, failure: Failure) -> Result<()> {
        // A connection that was cut because of a stop is not the server's failure.
        self.control.check()?;
        self.failures += 1;
        let wait = match failure.again {
            Again::Never => return Err(failure.error),
            _ if self.failures >= self.tuning.attempts => return Err(failure.error),
            Again::After(wait) if wait > MAX_WAIT => return Err(failure.error),
            Again::After(wait) => wait,
            Again::Later => self.backoff(),
        };
        tracing::info!(error = %failure.error, ?wait, "a download's request is repeated");
        add(&self.control.retries, 1);
        self.control.sleep(wait)
    }

    /// Doubles from failure to failure; up to half of it more, so that clients do not come back together.
    fn backoff(&self) -> Duration {
        let wait = self.tuning.backoff * 2u32.pow(self.failures.min(16) - 1);
        let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
        wait.mul_f64(1.0 + f64::from(nanos % 1000) / 2000.0).min(MAX_WAIT)
    }

    /// Repeats `attempt` while that makes sense.
    pub fn run<T>(mut self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => self.after(failure)?,
            }
        }
    }
}

/// What the hub itself says of a file, before it sends us on.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct HubHeaders {
    pub commit: Option<String>,
    pub etag: Option<String>,
    pub size: Option<u64>,
}

impl HubHeaders {
    /// Takes over what an answer of the hub has. The etag and length of a redirect are its own, those with "linked" the
    /// file's.
    fn read(&mut self, headers: &HeaderMap, redirect: bool) {
        let get = |name: &str| headers.get(name)?.to_str().ok().map(str::to_owned);
        let own = |name: &str| if redirect { None } else { get(name) };
        self.commit = self.commit.take().or_else(|| get("x-repo-commit"));
        self.etag = self.etag.take().or_else(|| get("x-linked-etag")).or_else(|| own("etag"));
        self.size = self.size.or_else(|| get("x-linked-size")?.parse().ok());
    }
}

/// An answer with content, which is not read yet.
pub struct Answer {
    pub hub: HubHeaders,
    /// Bytes to come, where that was said.
    pub length: Option<u64>,
    /// Of a 206: what it holds, and the length of the whole.
    pub range: Option<(Range<u64>, Option<u64>)>,
    /// Where it comes from at last.
    pub url: Url,
    body: Body,
}

impl Answer {
    /// The content.
    pub fn into_reader(self) -> impl Read + 'static {
        self.body.into_reader()
    }
}

/// Sends requests on behalf of one download. Clones share connections.
#[derive(Clone)]
pub struct Client {
    agent: Agent,
    endpoint: Url,
    token: Option<Token>,
    /// Shown to people.
    repo: String,
    /// Longest time for the whole of a listing, or of a redirect's text.
    patience: Duration,
}

impl Client {
    /// A client whose connections end when `control` stops.
    pub fn new(settings: &Settings, tuning: &Tuning, control: &Control, repo: &str) -> Result<Self> {
        let tls = match &settings.certificates {
            Some(file) => TlsConfig::builder().root_certs(certificates(file)?),
            None => TlsConfig::builder(),
        };
        let proxy = if settings.endpoint.is_loopback() { None } else { Proxy::try_from_env() };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("omlx/", env!("CARGO_PKG_VERSION")))
            // What is compressed on the way has another length than was announced.
            .accept_encoding("identity")
            .timeout_resolve(Some(tuning.connect))
            .timeout_connect(Some(tuning.connect))
            .timeout_send_request(Some(tuning.stall))
            .timeout_recv_response(Some(tuning.stall))
            .timeout_per_read(Some(tuning.stall))
            .max_idle_connections(MAX_CONNECTIONS)
            .max_idle_connections_per_host(MAX_CONNECTIONS)
            .tls_config(tls.build())
            .proxy(proxy)
            .build()
            .new_agent();
        let hook = agent.clone();
        control.on_stop(move || hook.shutdown());
        let (endpoint, token) = (settings.endpoint.clone(), settings.token.clone());
        Ok(Self { agent, endpoint, token, repo: repo.to_owned(), patience: 4 * tuning.stall })
    }

    /// The hub's URL of `path`, which is percent-encoded.
    pub fn url(&self, path: &str) -> Url {
        self.endpoint.join(path)
    }

    /// What is at `url`, or a part of it, from wherever the hub sends us. Waits for the headers, at most as long as the
    /// limits of the settings.
    pub fn get(&self, url: &Url, range: Option<Range<u64>>) -> Result<Answer, Failure> {
        self.follow(url, false, range)
    }

    /// What the hub says of the file at `url`.
    pub fn head(&self, url: &Url) -> Result<Answer, Failure> {
        self.follow(url, true, None)
    }

    fn follow(&self, url: &Url, head: bool, range: Option<Range<u64>>) -> Result<Answer, Failure> {
        let mut url = url.clone();
        let mut hub = HubHeaders::default();
        for _ in 0..MAX_REDIRECTS {
            let response = self.send(&url, head, range.as_ref()).map_err(|e| Failure::from_ureq(&url, e))?;
            let status = response.status().as_u16();
            let redirect = matches!(status, 301 | 302 | 303 | 307 | 308);
            if url.same_server(&self.endpoint) && (redirect || response.status().is_success()) {
                hub.read(response.headers(), redirect);
            }
            // A signed URL is for one method: what the hub says must do.
            if redirect && !(head && hub.size.is_some()) {
                let location = response.headers().get("location").and_then(|l| l.to_str().ok());
                let location = location.ok_or_else(|| Error::network(format!("{url}: a redirect to nowhere")))?;
                let target = url.redirected(location)?;
                // Only what was read to its end leaves its connection to the next request.
                let _ = self.read_all(response.into_body().into_reader(), &url, MAX_REDIRECT_BYTES);
                url = target;
            } else if redirect || status == 200 || status == 206 {
                return answer(response, hub, url).map_err(Failure::last);
            } else {
                return Err(self.refusal(&url, status, response.headers()));
            }
        }
        Err(Failure::last(Error::network(format!("{url}: more than {MAX_REDIRECTS} redirects"))))
    }

    fn send(&self, url: &Url, head: bool, range: Option<&Range<u64>>) -> Result<Response<Body>, ureq::Error> {
        let text = url.text();
        let mut request = if head { self.agent.head(text) } else { self.agent.get(text) };
        // Whoever we are sent on to must not have it.
        if let Some(token) = self.token.as_ref().filter(|_| url.same_server(&self.endpoint)) {
            request = request.header("authorization", format!("Bearer {}", token.secret()));
        }
        if let Some(range) = range {
            request = request.header("range", format!("bytes={}-{}", range.start, range.end - 1));
        }
        request.call()
    }

    /// What a status other than success means, and what to do about it.
    fn refusal(&self, url: &Url, status: u16, headers: &HeaderMap) -> Failure {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let Self { repo, endpoint, .. } = self;
        let hub = url.same_server(endpoint);
        match (status, header("x-error-code")) {
            (401 | 403, "GatedRepo") => {
                let page = endpoint.join(&format!("/{repo}"));
                let token = "a token of that account (\"token\" or HF_TOKEN)";
                let what = format!("{repo} is gated: accept its terms at {page}, and give {token}");
                Failure::last(Error::new(Status::Unauthorized, what))
            }
            (401 | 403, _) if hub => {
                let why = match self.token {
                    Some(_) => "the token does not give access to it, or has expired",
                    None => "private repositories need a token (\"token\" or HF_TOKEN)",
                };
                Failure::last(Error::new(Status::Unauthorized, format!("{repo} does not exist, or not for us: {why}")))
            }
            (404 | 410, code) if hub => {
                let what = match code {
                    "RevisionNotFound" => "has no such revision",
                    "EntryNotFound" => "has no such file",
                    _ => "was not found",
                };
                Failure::last(Error::not_found(format!("{repo} {what} ({url})")))
            }
            (416, _) => {
                Failure::last(Error::checksum(format!("{url}: the server has fewer bytes than were announced")))
            }
            (429 | 503, _) => {
                let after = header("retry-after").parse().ok().map(Duration::from_secs);
                let status = if status == 429 { Status::Busy } else { Status::Network };
                let error = Error::new(status, format!("{url}: the server is busy"));
                let error = after.map_or(error.clone(), |after| error.retry_after(after));
                Failure { error, again: after.map_or(Again::Later, Again::After) }
            }
            // A signed URL that has expired: the next attempt gets a new one.
            (403 | 408 | 500.., _) => Failure::passing(Error::network(format!("{url}: HTTP status {status}"))),
            _ => Failure::last(Error::network(format!("{url}: HTTP status {status}"))),
        }
    }

    /// The whole content of `url`, of `limit` bytes at most.
    pub fn read(&self, url: &Url, limit: usize) -> Result<Vec<u8>, Failure> {
        self.read_all(self.get(url, None)?.into_reader(), url, limit)
    }

    fn read_all(&self, mut reader: impl Read, url: &Url, limit: usize) -> Result<Vec<u8>, Failure> {
        let started = Instant::now();
        let (mut content, mut chunk) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            match reader.read(&mut chunk) {
                Ok(0) => return Ok(content),
                Ok(read) => content.extend_from_slice(&chunk[..read]),
                Err(error) => return Err(Failure::passing(Error::network(format!("{url}: {error}")))),
            }
            if content.len() > limit {
                return Err(Failure::last(Error::network(format!("{url}: more than {limit} bytes"))));
            }
            if started.elapsed() > self.patience {
                return Err(Failure::passing(Error::network(format!("{url}: too slow"))));
            }
        }
    }
}

fn answer(response: Response<Body>, hub: HubHeaders, url: Url) -> Result<Answer> {
    let headers = response.headers();
    let get = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if !matches!(get("content-encoding"), None | Some("identity")) {
        return Err(Error::network(format!("{url}: the content is encoded, which was not asked for")));
    }
    let range = match response.status().as_u16() {
        206 => Some(
            get("content-range")
                .and_then(content_range)
                .ok_or_else(|| Error::network(format!("{url}: a part without a usable Content-Range")))?,
        ),
        _ => None,
    };
    let length = get("content-length").and_then(|length| length.parse().ok());
    Ok(Answer { hub, length, range, url, body: response.into_body() })
}

/// Reads `bytes FIRST-LAST/TOTAL`, where the total may be `*`.
fn content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = if total.trim() == "*" { None } else { Some(total.trim().parse().ok()?) };
    (first <= last).then_some((first..last.checked_add(1)?, total))
}

/// The certificates in a PEM file.
fn certificates(file: &Path) -> Result<RootCerts> {
    let name = |e: Error| e.context("SSL_CERT_FILE");
    let text = fs::read(file).map_err(|e| name(Error::io(file.display(), &e)))?;
    let mut found = Vec::new();
    for item in parse_pem(&text) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(error) => return Err(name(Error::invalid_argument(format!("{}: {error}", file.display())))),
        }
    }
    if found.is_empty() {
        return Err(name(Error::invalid_argument(format!("{}: no certificates", file.display()))));
    }
    Ok(RootCerts::new_with_certs(&found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(content_range("bytes 0-9/10"), Some((0..10, Some(10))));
        assert_eq!(content_range("bytes 5-5/*"), Some((5..6, None)));
        for bad in
            ["bytes */10", "bytes 5-4/10", "0-9/10", "bytes 0-9", "bytes a-b/c", "bytes 0-18446744073709551615/*"]
        {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
