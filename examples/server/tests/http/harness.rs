//! A started server, and a client of plain sockets, so that tests can send what no library would.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program, running on a port of its own.
pub struct Server {
    child: Child,
    /// Where it listens, such as "127.0.0.1:40001".
    pub address: String,
    lines: Receiver<String>,
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The program, with no setting from outside.
pub fn program() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_omlx-server"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("OMLX_SERVER_")) {
        program.env_remove(name);
    }
    program
}

/// A command that would serve the bundled model.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = program();
    command.args(["serve", "--port", "0", "--device", "cpu", "--models"]).arg(root().join("models")).args(arguments);
    command
}

impl Server {
    /// With the bundled model and further arguments.
    pub fn start(arguments: &[&str]) -> Self {
        Self::spawn(command(arguments))
    }

    /// From a command.
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                // Tests that read no more lines are fine.
                let _ = sender.send(line);
            }
        });
        let mut server = Self { child, address: String::new(), lines };
        let line = server.line("listening");
        let url = line.split("http://").nth(1).and_then(|rest| rest.split('"').next());
        server.address = url.unwrap_or_else(|| panic!("no address in {line}")).to_owned();
        server
    }

    /// The next line of the log that has `word` in it.
    pub fn line(&self, word: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|error| panic!("no line with {word:?}: {error}"));
            if line.contains(word) {
                return line;
            }
        }
    }

    /// The lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// A connection.
    pub fn connect(&self) -> Connection {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Connection { stream: BufReader::new(stream), host: self.address.clone() }
    }

    /// One request on a connection of its own.
    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut connection = self.connect();
        connection.send(method, path, headers, body);
        connection.reply()
    }

    /// `GET`.
    pub fn get(&self, path: &str) -> Reply {
        self.call("GET", path, &[], "")
    }

    /// `POST` of JSON.
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.call("POST", path, &[], &body.to_string())
    }

    /// A number of the metrics, summed over its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let lines = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        let values: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert!(!values.is_empty(), "no {name} in {text}");
        values.iter().sum()
    }

    /// Waits until nothing is running any more.
    pub fn wait_idle(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(RUNNING) + self.metric(WAITING) > 0.0 {
            assert!(Instant::now() < deadline, "requests go on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Bytes of memory that the process has.
    pub fn memory(&self) -> u64 {
        self.status_bytes("VmRSS:")
    }

    /// Bytes of memory that it had at most.
    pub fn peak_memory(&self) -> u64 {
        self.status_bytes("VmHWM:")
    }

    fn status_bytes(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    }

    /// File descriptors that the process has.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        let status = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sequences that run, and requests that wait.
pub const RUNNING: &str = "omlx_running_sequences";
pub const WAITING: &str = "omlx_waiting_sequences";

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to a server.
pub struct Connection {
    pub stream: BufReader<TcpStream>,
    host: String,
}

impl Connection {
    /// Sends a request; `Host` and `Content-Type` may be given instead.
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) {
        let mut head = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n", body.len());
        let host = self.host.clone();
        for (name, value) in [("Host", host.as_str()), ("Content-Type", "application/json"), ("Connection", "close")] {
            if !headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name)) {
                head += &format!("{name}: {value}\r\n");
            }
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        self.write((head + "\r\n" + body).as_bytes());
    }

    /// Sends bytes; whether that went: a server that has hung up is no error here.
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        self.stream.get_mut().write_all(bytes).is_ok()
    }

    /// Reads a whole reply; status 0 if the server hung up without one.
    pub fn reply(&mut self) -> Reply {
        let mut reply = self.head();
        let mut body = Vec::new();
        if reply.header("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = self.chunk() {
                body.extend(chunk);
            }
        } else if let Some(length) = reply.header("content-length") {
            body.resize(length.parse().unwrap(), 0);
            self.stream.read_exact(&mut body).unwrap();
        }
        reply.body = String::from_utf8(body).unwrap();
        reply
    }

    /// Reads the head of a reply.
    pub fn head(&mut self) -> Reply {
        let mut reply = Reply::default();
        let mut line = String::new();
        if self.stream.read_line(&mut line).unwrap_or(0) == 0 {
            return reply;
        }
        reply.status = line.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{line:?}"));
        loop {
            line.clear();
            self.stream.read_line(&mut line).unwrap();
            match line.trim_end().split_once(": ") {
                Some((name, value)) => reply.headers.push((name.to_ascii_lowercase(), value.to_owned())),
                None => return reply,
            }
        }
    }

    /// The next chunk of a streamed body; `None` at its end, also where the connection broke.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut line = String::new();
        self.stream.read_line(&mut line).ok()?;
        let length = usize::from_str_radix(line.trim(), 16).ok()?;
        if length == 0 {
            // The line behind the last chunk: another reply may follow.
            let _ = self.stream.read_line(&mut line);
            return None;
        }
        let mut chunk = vec![0; length + 2];
        self.stream.read_exact(&mut chunk).ok()?;
        chunk.truncate(length);
        Some(chunk)
    }

    /// Breaks the connection.
    pub fn hang_up(self) {
        let _ = self.stream.get_ref().shutdown(Shutdown::Both);
    }
}

/// What a server answered.
#[derive(Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    /// A header by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// The body as JSON of a reply that must have this status.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        self.json()
    }

    /// The events of a stream: name ("" without) and data.
    pub fn events(&self) -> Vec<(String, String)> {
        assert_eq!(self.status, 200, "{}", self.body);
        let blocks = self.body.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
        let field = |block: &str, name: &str| {
            block.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned()
        };
        blocks.map(|block| (field(block, "event: "), field(block, "data: "))).collect()
    }

    /// The data of all events that are JSON.
    pub fn data(&self) -> Vec<Value> {
        self.events().iter().filter_map(|(_, data)| serde_json::from_str(data).ok()).collect()
    }
}
