//! The two ways to an answer: a started server, and the C API in this process. Both readers do as little as they can.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use omlx_client::{Device, Event, Pool, PoolOptions, RequestOptions};
use serde_json::{Value, json};

/// Longest wait for the next bytes of a stream.
const PATIENCE: Duration = Duration::from_secs(120);

/// A request for `tokens` tokens; `number` makes its prompt and its answer another one.
pub fn body(number: usize, tokens: usize) -> Value {
    json!({
        "messages": [{"role": "user", "content": format!("{number}. Tell me a long story about a fox and a hedgehog.")}],
        "max_tokens": tokens, "ignore_eos": true, "temperature": 0.8, "seed": number, "stream": true,
    })
}

/// What reading an answer showed.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// From the request to the first piece of the answer.
    pub first: Duration,
    /// Pieces.
    pub pieces: usize,
}

/// The server as a process of its own.
pub struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Serves the models in `models`.
    pub fn start(models: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_omlx-server"));
        command.args(["serve", "--port", "0", "--device", "cpu", "--log-level", "info", "--models"]).arg(models);
        let mut child = command.args(arguments).stderr(Stdio::piped()).spawn().expect("the server starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains("listening")).expect("the server listens");
        let address =
            line.split("http://").nth(1).and_then(|rest| rest.split('"').next()).expect("an address").to_owned();
        // It must not wait for somebody to read its log.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request.
    pub fn send(&self, body: &Value) -> Stream {
        let began = Instant::now();
        let mut socket = TcpStream::connect(&self.address).expect("a connection");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let (host, body) = (&self.address, body.to_string());
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all((head + &body).as_bytes()).expect("the request is sent");
        Stream { socket, began }
    }

    /// A number of `/metrics`.
    pub fn metric(&self, name: &str) -> f64 {
        let mut socket = TcpStream::connect(&self.address).expect("a connection");
        let head = format!("GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.address);
        socket.write_all(head.as_bytes()).expect("the request is sent");
        let mut text = String::new();
        socket.read_to_string(&mut text).expect("an answer");
        let lines = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A streamed answer.
pub struct Stream {
    socket: TcpStream,
    began: Instant,
}

impl Stream {
    /// Reads to the end.
    pub fn read(mut self) -> Reading {
        let (mut first, mut pieces, mut kept) = (None, 0, 0);
        let mut bytes = vec![0; 64 << 10];
        loop {
            let length = self.socket.read(&mut bytes[kept..]).expect("the stream goes on");
            if length == 0 {
                return Reading { first: first.unwrap_or_default(), pieces };
            }
            let all = kept + length;
            // The beginning of the mark may be at the end of what is there.
            let found = count(&bytes[..all]);
            if found > 0 {
                first.get_or_insert_with(|| self.began.elapsed());
            }
            pieces += found;
            kept = all.min(MARK.len());
            bytes.copy_within(all - kept..all, 0);
        }
    }

    /// Waits for a comment in a stream that has nothing to say; false if something else comes first.
    pub fn is_silent(&mut self) -> bool {
        let mut text = Vec::new();
        let mut bytes = [0; 4096];
        while !text.windows(11).any(|window| window == b": keep-aliv") {
            let length = self.socket.read(&mut bytes).expect("a comment");
            text.extend(&bytes[..length]);
            if length == 0 || count(&text) > 0 {
                return false;
            }
        }
        true
    }
}

/// What every piece of an answer has, and nothing else.
const MARK: &[u8] = b"content\":\"";

fn count(bytes: &[u8]) -> usize {
    // The first chunk of an answer has an empty one.
    bytes.windows(MARK.len() + 1).filter(|window| window.starts_with(MARK) && window[MARK.len()] != b'"').count()
}

/// A pool with the models in `models`.
pub fn open(models: &Path) -> Pool {
    let options = PoolOptions { device: Device::Cpu, models_dir: Some(models.to_owned()), ..PoolOptions::default() };
    Pool::open(&options).expect("a pool")
}

/// Reads an answer through the C API, and writes as many bytes as a chunk has to `socket` for each piece: what a server does
/// at least.
pub fn forward(pool: &Pool, body: &Value, mut socket: TcpStream) -> Reading {
    read_each(pool, body, || socket.write_all(&[b'x'; CHUNK]).expect("a reader"))
}

/// Bytes of a chunk of one token, about.
const CHUNK: usize = 213;

/// Reads an answer through the C API.
pub fn read(pool: &Pool, body: &Value) -> Reading {
    read_each(pool, body, || {})
}

fn read_each(pool: &Pool, body: &Value, mut on_piece: impl FnMut()) -> Reading {
    let began = Instant::now();
    let options = RequestOptions { lenient: true, ..RequestOptions::default() };
    let mut request = pool.generate(&body.to_string(), options).expect("a request");
    let (mut first, mut pieces) = (None, 0);
    while let Some(event) = request.next_blocking(None).expect("an event") {
        match event {
            Event::Text(piece) | Event::Reasoning(piece) if !piece.text.is_empty() => {
                first.get_or_insert_with(|| began.elapsed());
                pieces += 1;
                on_piece();
            }
            Event::Done(done) => assert_eq!(done.error, None),
            _ => {}
        }
    }
    Reading { first: first.unwrap_or_default(), pieces }
}
