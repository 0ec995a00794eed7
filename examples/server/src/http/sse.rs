//! Server-sent events. The work that makes them runs inside the body: when the client goes away, hyper drops the body, with
//! it the work, and with that the request, which is thereby cancelled.

use std::fmt::Write;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use http_body::Frame;
use serde_json::Value;
use tokio::time::Sleep;

use crate::app::Shared;
use crate::log;

/// What a stream says when it has nothing to say.
const COMMENT: &[u8] = b": keep-alive\n\n";

/// Where the work puts its events.
#[derive(Debug, Clone, Default)]
pub struct Out(Arc<Mutex<BytesMut>>);

impl Out {
    /// An event without a name: JSON.
    pub fn data(&self, data: &Value) {
        self.write(format_args!("data: {data}\n\n"));
    }

    /// An event with a name.
    pub fn event(&self, name: &str, data: &Value) {
        self.write(format_args!("event: {name}\ndata: {data}\n\n"));
    }

    /// An event that is put together of JSON's parts: `text` stands between `before` and `after` as a string.
    pub fn around(&self, text: &str, before: std::fmt::Arguments<'_>, after: std::fmt::Arguments<'_>) {
        let mut bytes = self.lock();
        // Writing to memory cannot fail, and a text is always JSON.
        let _ = bytes.write_fmt(before);
        let _ = serde_json::to_writer((&mut *bytes).writer(), text);
        let _ = bytes.write_fmt(after);
    }

    /// The word that ends OpenAI's streams.
    pub fn done(&self) {
        self.write(format_args!("data: [DONE]\n\n"));
    }

    fn write(&self, event: std::fmt::Arguments<'_>) {
        let _ = self.lock().write_fmt(event);
    }

    /// All events so far, which are gone then; their memory is used again when they have been sent.
    pub fn take(&self) -> Bytes {
        self.lock().split().freeze()
    }

    fn lock(&self) -> MutexGuard<'_, BytesMut> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A streamed answer; `work` gets the place for its events.
pub fn respond<F>(app: &Shared, id: &str, work: impl FnOnce(Out) -> F) -> Response
where
    F: Future<Output = ()> + Send + 'static,
{
    let out = Out::default();
    let interval = app.limits.keep_alive;
    let stream = EventStream {
        work: Some(Box::pin(work(out.clone()))),
        out,
        interval,
        spoken: Instant::now(),
        silence: Box::pin(tokio::time::sleep(interval)),
        app: Arc::clone(app),
        id: id.to_owned(),
        began: Instant::now(),
    };
    let mut response = Response::new(Body::new(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that collect answers would hold the events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct EventStream {
    /// `None` when it is over.
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    out: Out,
    interval: Duration,
    /// When it last said something.
    spoken: Instant,
    /// Set anew when it ends, not with every event.
    silence: Pin<Box<Sleep>>,
    app: Shared,
    id: String,
    began: Instant,
}

impl EventStream {
    /// Ready when nothing was said for too long.
    fn poll_silence(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.silence.as_mut().poll(context));
            let next = self.spoken + self.interval;
            if next <= Instant::now() {
                return Poll::Ready(());
            }
            self.silence.as_mut().reset(next.into());
        }
    }
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(work) = &mut self.work
            && work.as_mut().poll(context).is_ready()
        {
            self.work = None;
        }
        let mut bytes = self.out.take();
        if bytes.is_empty() {
            if self.work.is_none() {
                return Poll::Ready(None);
            }
            ready!(self.poll_silence(context));
            bytes = Bytes::from_static(COMMENT);
        }
        self.spoken = Instant::now();
        Poll::Ready(Some(Ok(Frame::data(bytes))))
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        let abandoned = self.work.is_some();
        if abandoned {
            self.app.abandoned.fetch_add(1, Ordering::Relaxed);
        }
        let milliseconds = self.began.elapsed().as_millis() as u64;
        let fields = [("id", self.id.as_str().into()), ("ms", milliseconds.into()), ("abandoned", abandoned.into())];
        log::info("stream", &fields);
    }
}
