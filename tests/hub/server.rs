//! A hub for tests: the protocol of the Hugging Face hub, a content delivery network on another port, and faults on
//! demand. Threads and sockets of the standard library.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};

/// A file of a commit. Large ones (LFS) come from the delivery network.
#[derive(Clone)]
pub struct File {
    pub path: String,
    pub content: Vec<u8>,
    pub large: bool,
}

pub fn small(path: &str, content: impl Into<Vec<u8>>) -> File {
    File { path: path.into(), content: content.into(), large: false }
}

pub fn large(path: &str, content: impl Into<Vec<u8>>) -> File {
    File { path: path.into(), content: content.into(), large: true }
}

/// `len` bytes without a pattern, of their own for each seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl File {
    pub fn sha256(&self) -> String {
        hex(digest(&SHA256, &self.content).as_ref())
    }

    pub fn git_id(&self) -> String {
        let blob = [format!("blob {}\0", self.content.len()).as_bytes(), &self.content].concat();
        hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
    }

    fn listed(&self) -> Value {
        let mut entry = json!({ "rfilename": self.path, "size": self.content.len(), "blobId": self.git_id() });
        if self.large {
            entry["lfs"] = json!({ "sha256": self.sha256(), "size": self.content.len(), "pointerSize": 134 });
        }
        entry
    }
}

/// What a server does instead of answering as it should.
#[derive(Clone)]
pub enum Fault {
    /// Another status, with headers.
    Status(u16, &'static [(&'static str, &'static str)]),
    /// Ends the connection without an answer.
    Close,
    /// Ends it after so many bytes of the content.
    Cut(usize),
    /// Says nothing more after so many bytes of the content; `None`: not even a header.
    Hang(Option<usize>),
    /// Sends a byte now and then.
    Drip(Duration),
    /// Sends a byte of the headers now and then.
    DripHead(Duration),
    /// Changes the content.
    Wrong,
    /// Sends the second half of the content so much later, and wrong.
    Late(Duration),
    /// Announces and sends so many bytes more (or fewer).
    Longer(i64),
    /// Sends the content without announcing its length, and so many bytes more.
    Chunked(usize),
    /// Sends everything, with 200.
    IgnoreRange,
    /// Sends another range than was asked for.
    OtherRange,
    /// Other headers.
    Header(&'static str, String),
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// By the delivery network, not the hub.
    pub network: bool,
    pub method: String,
    pub path: String,
    pub range: Option<Range<usize>>,
    pub token: Option<String>,
    /// Bytes of content that were sent.
    pub sent: usize,
}

type Matcher = Box<dyn Fn(&Seen) -> bool + Send>;

#[derive(Default)]
struct Inner {
    /// By repository: revisions, and files by commit.
    revisions: HashMap<(String, String), String>,
    commits: HashMap<(String, String), Vec<File>>,
    /// Faults with how often they are still to happen.
    faults: Vec<(Matcher, usize, Fault)>,
    seen: Vec<Seen>,
    listing: Option<Value>,
    token: Option<String>,
    network: Option<SocketAddr>,
}

/// A hub with its delivery network; both end with the process.
pub struct Hub {
    inner: Arc<Mutex<Inner>>,
    address: SocketAddr,
    encrypted: bool,
}

impl Hub {
    pub fn new() -> Self {
        Self::start(None)
    }

    /// A hub that encrypts, with the certificate in `tls/`, and a delivery network that does not.
    pub fn encrypted() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hub/tls");
        let chain = CertificateDer::pem_file_iter(folder.join("server.pem")).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(folder.join("server-key.pem")).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        Self::start(Some(Arc::new(config.with_single_cert(chain, key).unwrap())))
    }

    fn start(tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let inner = Arc::new(Mutex::new(Inner::default()));
        let serve = |network: bool, tls: Option<Arc<rustls::ServerConfig>>| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let inner = Arc::clone(&inner);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (inner, tls) = (Arc::clone(&inner), tls.clone());
                    std::thread::spawn(move || match tls {
                        None => connection(stream, &inner, network),
                        Some(tls) => {
                            let session = rustls::ServerConnection::new(tls).unwrap();
                            connection(rustls::StreamOwned::new(session, stream), &inner, network);
                        }
                    });
                }
            });
            address
        };
        let encrypted = tls.is_some();
        let (address, network) = (serve(false, tls), serve(true, None));
        inner.lock().unwrap().network = Some(network);
        Self { inner, address, encrypted }
    }

    pub fn endpoint(&self) -> String {
        match self.encrypted {
            true => format!("https://localhost:{}", self.address.port()),
            false => format!("http://{}", self.address),
        }
    }

    /// Adds a commit, to which the revisions lead; returns it.
    pub fn commit(&self, repo: &str, revisions: &[&str], files: &[File]) -> String {
        let mut inner = self.inner.lock().unwrap();
        let all: String = files.iter().map(|file| file.path.clone() + &file.git_id()).collect();
        let commit = small("", format!("{repo}{all}")).git_id();
        for revision in revisions.iter().copied().chain([commit.as_str()]) {
            inner.revisions.insert((repo.to_owned(), revision.to_owned()), commit.clone());
        }
        inner.commits.insert((repo.to_owned(), commit.clone()), files.to_vec());
        commit
    }

    /// The next `times` requests that match get `fault`.
    pub fn fault(&self, times: usize, fault: Fault, matcher: impl Fn(&Seen) -> bool + Send + 'static) {
        self.inner.lock().unwrap().faults.push((Box::new(matcher), times, fault));
    }

    /// From now on as it should.
    pub fn repair(&self) {
        self.inner.lock().unwrap().faults.clear();
    }

    /// Answers listings with this, whatever there is.
    pub fn list(&self, listing: Value) {
        self.inner.lock().unwrap().listing = Some(listing);
    }

    /// Refuses requests without this token.
    pub fn require(&self, token: &str) {
        self.inner.lock().unwrap().token = Some(token.to_owned());
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.inner.lock().unwrap().seen.clone()
    }

    /// Bytes of content that the delivery network has sent.
    pub fn network_bytes(&self) -> usize {
        self.seen().iter().filter(|seen| seen.network).map(|seen| seen.sent).sum()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        self.inner.lock().unwrap().seen.clear();
    }
}

fn connection(stream: impl Read + Write, inner: &Mutex<Inner>, network: bool) {
    let mut reader = BufReader::new(stream);
    while let Some(seen) = read_request(&mut reader, network) {
        let (index, fault) = {
            let mut inner = inner.lock().unwrap();
            inner.seen.push(seen.clone());
            let found = inner.faults.iter_mut().find(|(matcher, times, _)| *times > 0 && matcher(&seen));
            let fault = found.map(|(_, times, fault)| {
                *times -= 1;
                fault.clone()
            });
            (inner.seen.len() - 1, fault)
        };
        let answer = if network { blob(inner, &seen) } else { hub(inner, &seen) };
        let Some(sent) = send(reader.get_mut(), &seen, answer, fault) else { return };
        // The list may have been forgotten meanwhile.
        if let Some(entry) = inner.lock().unwrap().seen.get_mut(index) {
            entry.sent = sent;
        }
    }
}

fn read_request(reader: &mut impl BufRead, network: bool) -> Option<Seen> {
    let mut line = String::new();
    let mut next = |line: &mut String| {
        line.clear();
        (reader.read_line(line).ok()? > 0).then(|| line.trim_end().to_owned())
    };
    let first = next(&mut line)?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut seen = Seen { network, method, path, range: None, token: None, sent: 0 };
    loop {
        let header = next(&mut line)?;
        let Some((name, value)) = header.split_once(": ") else { return Some(seen) };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                seen.range = Some(first.parse().ok()?..last.parse::<usize>().ok()? + 1);
            }
            "authorization" => seen.token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
}

struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    content: Vec<u8>,
}

fn answer(status: u16, headers: &[(&str, String)], content: &[u8]) -> Answer {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    Answer { status, headers, content: content.to_vec() }
}

fn refuse(status: u16, code: &str) -> Answer {
    answer(status, &[("X-Error-Code", code.to_owned())], b"{}")
}

/// What the hub says.
fn hub(inner: &Mutex<Inner>, seen: &Seen) -> Answer {
    let inner = inner.lock().unwrap();
    if inner.token.is_some() && inner.token != seen.token {
        return refuse(401, if seen.token.is_none() { "RepoNotFound" } else { "" });
    }
    let path = seen.path.split('?').next().unwrap();
    if let Some((repo, revision)) = path.strip_prefix("/api/models/").and_then(|p| p.split_once("/revision/")) {
        assert!(seen.path.ends_with("?blobs=true"), "{}", seen.path);
        if let Some(listing) = &inner.listing {
            return answer(200, &[], listing.to_string().as_bytes());
        }
        if !inner.revisions.keys().any(|(known, _)| known == repo) {
            return refuse(404, "RepoNotFound");
        }
        let Some(commit) = inner.revisions.get(&(repo.to_owned(), revision.replace("%2F", "/"))) else {
            return refuse(404, "RevisionNotFound");
        };
        let files = &inner.commits[&(repo.to_owned(), commit.clone())];
        let siblings: Vec<_> = files.iter().map(File::listed).collect();
        return answer(200, &[], json!({ "id": repo, "sha": commit, "siblings": siblings }).to_string().as_bytes());
    }
    // As the hub answers for small files nowadays: a redirect to itself.
    let (path, cached) = path.strip_prefix("/api/resolve-cache").map_or((path, false), |path| (path, true));
    let Some((repo, rest)) = path[1..].split_once("/resolve/") else { return refuse(404, "") };
    let (commit, name) = rest.split_once('/').unwrap_or((rest, ""));
    let files = inner.commits.get(&(repo.to_owned(), commit.to_owned()));
    let name = name.replace("%20", " ");
    let Some(file) = files.and_then(|files| files.iter().find(|file| file.path == name)) else {
        return refuse(404, "EntryNotFound");
    };
    let size = file.content.len().to_string();
    match (file.large, cached) {
        (true, _) => {
            let network = inner.network.unwrap();
            let location = format!("http://{network}/{}?X-Signature=secret", file.sha256());
            let etag = format!("\"{}\"", file.sha256());
            let headers = [
                ("X-Repo-Commit", commit.to_owned()),
                ("X-Linked-Size", size),
                ("X-Linked-ETag", etag),
                ("ETag", "\"of the redirect\"".to_owned()),
                ("Location", location),
            ];
            answer(302, &headers, b"Found")
        }
        (false, false) => {
            let location = format!("/api/resolve-cache{path}");
            answer(307, &[("X-Repo-Commit", commit.to_owned()), ("Location", location)], b"")
        }
        (false, true) => {
            part(file, seen, &[("ETag", format!("\"{}\"", file.git_id())), ("X-Repo-Commit", commit.to_owned())])
        }
    }
}

/// What the delivery network says.
fn blob(inner: &Mutex<Inner>, seen: &Seen) -> Answer {
    let inner = inner.lock().unwrap();
    let Some((sha256, "X-Signature=secret")) = seen.path[1..].split_once('?') else { return refuse(403, "") };
    let file = inner.commits.values().flatten().find(|file| file.large && file.sha256() == sha256);
    file.map_or_else(|| refuse(404, ""), |file| part(file, seen, &[("ETag", "\"of the network\"".to_owned())]))
}

/// A file, or the range that was asked for.
fn part(file: &File, seen: &Seen, headers: &[(&str, String)]) -> Answer {
    let size = file.content.len();
    match &seen.range {
        None => answer(200, headers, &file.content),
        Some(range) if range.start >= size || range.end > size => {
            answer(416, &[("Content-Range", format!("bytes */{size}"))], b"")
        }
        Some(range) => {
            let content_range = ("Content-Range", format!("bytes {}-{}/{size}", range.start, range.end - 1));
            let headers = [headers, &[content_range]].concat();
            let mut answer = answer(206, &headers, &file.content[range.clone()]);
            // For servers that ignore ranges.
            answer.headers.push(("whole".into(), hex(&file.content)));
            answer
        }
    }
}

fn drip(stream: &mut impl Write, bytes: &[u8], every: Duration) -> Option<()> {
    for byte in bytes {
        stream.write_all(&[*byte]).ok()?;
        sleep(every);
    }
    Some(())
}

/// Sends an answer, or what a fault makes of it; `None` ends the connection.
fn send(stream: &mut (impl Read + Write), seen: &Seen, mut answer: Answer, fault: Option<Fault>) -> Option<usize> {
    let whole = answer.headers.iter().position(|(name, _)| name == "whole").map(|at| answer.headers.remove(at).1);
    let mut announced = answer.content.len() as i64;
    let mut chunked = false;
    let mut end = answer.content.len();
    match &fault {
        Some(Fault::Close) => return None,
        Some(Fault::Hang(None)) => {
            sleep(Duration::from_secs(3600));
            return None;
        }
        Some(Fault::Status(status, headers)) => {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
            answer = self::answer(*status, &headers, b"no");
            (announced, end) = (2, 2);
        }
        Some(Fault::Late(_)) => {
            let half = answer.content.len() / 2;
            answer.content[half..].iter_mut().for_each(|byte| *byte ^= 1);
        }
        Some(Fault::Wrong) if !answer.content.is_empty() => *answer.content.last_mut().unwrap() ^= 1,
        Some(Fault::Longer(more)) => {
            announced += more;
            answer.content.resize(announced as usize, 0);
            end = answer.content.len();
        }
        Some(Fault::Chunked(more)) => {
            chunked = true;
            answer.content.resize(answer.content.len() + more, 0);
        }
        Some(Fault::IgnoreRange) => {
            if let Some(whole) = whole {
                answer.status = 200;
                answer.headers.retain(|(name, _)| name != "Content-Range");
                let byte = |at: usize| u8::from_str_radix(&whole[2 * at..2 * at + 2], 16).unwrap();
                answer.content = (0..whole.len() / 2).map(byte).collect();
                end = answer.content.len();
                announced = end as i64;
            }
        }
        Some(Fault::OtherRange) => {
            for (_, value) in answer.headers.iter_mut().filter(|(name, _)| name == "Content-Range") {
                let (_, total) = value.split_once('/').unwrap();
                *value = format!("bytes 1-{announced}/{total}");
            }
        }
        Some(Fault::Header(name, value)) => {
            answer.headers.retain(|(known, _)| known != name);
            answer.headers.push(((*name).to_owned(), value.clone()));
        }
        Some(Fault::Cut(bytes) | Fault::Hang(Some(bytes))) => end = end.min(*bytes),
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &if chunked {
        "Transfer-Encoding: chunked\r\n\r\n".to_owned()
    } else {
        format!("Content-Length: {announced}\r\n\r\n")
    };
    match &fault {
        Some(Fault::DripHead(every)) => drip(stream, head.as_bytes(), *every)?,
        _ => stream.write_all(head.as_bytes()).ok()?,
    }
    if seen.method == "HEAD" {
        return Some(0);
    }
    let content = &answer.content[..if chunked { answer.content.len() } else { end }];
    match &fault {
        Some(Fault::Drip(every)) => drip(stream, content, *every)?,
        Some(Fault::Late(pause)) => {
            let (now, later) = content.split_at(content.len() / 2);
            stream.write_all(now).ok()?;
            sleep(*pause);
            stream.write_all(later).ok()?;
        }
        _ if chunked => {
            stream.write_all(format!("{:x}\r\n", content.len()).as_bytes()).ok()?;
            stream.write_all(content).ok()?;
            stream.write_all(b"\r\n0\r\n\r\n").ok()?;
        }
        _ => stream.write_all(content).ok()?,
    }
    match &fault {
        Some(Fault::Cut(_)) => None,
        Some(Fault::Hang(_)) => {
            // Until the client goes.
            let _ = stream.read(&mut [0]);
            None
        }
        _ => Some(content.len()),
    }
}
