//! The client's end of a connection, as one who must read: an answer that nobody takes would hold its blocks for ever.

use std::io::{Error, ErrorKind, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// A stream whose writes fail when the other side has not read for too long. It takes one buffer at a time, so that hyper puts
/// the frame of a chunk and its few bytes into one.
pub struct Reader {
    stream: TcpStream,
    patience: Duration,
    /// Set while a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Reader {
    /// Around the stream of a client, which may take nothing of what waits for it for as long as `patience`.
    pub fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, stalled: None }
    }

    /// The outcome of a write, or an error if it has been waiting for too long.
    fn watch(&mut self, written: Poll<Result<usize>>, context: &mut Context<'_>) -> Poll<Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(Error::new(ErrorKind::TimedOut, "the client does not read")))
    }
}

impl AsyncRead for Reader {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Reader {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(written, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    /// Writes more than any buffer takes to a client that reads, or does not.
    async fn write(reads: bool) -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let mut client = TcpStream::connect(listener.local_addr()?).await?;
        let mut server = Reader::new(listener.accept().await?.0, Duration::from_secs(1));
        if reads {
            tokio::spawn(async move { tokio::io::copy(&mut client, &mut tokio::io::sink()).await });
            return server.write_all(&vec![0; 64 << 20]).await;
        }
        let written = server.write_all(&vec![0; 64 << 20]).await;
        drop(client);
        written
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_cut_off() {
        assert_eq!(write(false).await.unwrap_err().kind(), ErrorKind::TimedOut);
        write(true).await.unwrap();
    }
}
