//! Connections: how many, how slow, and how they end.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use omlx_client::LogLevel;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::keys::Keys;
use super::reader::Reader;
use crate::app::Shared;
use crate::log;

/// Bytes of a request's head at most.
const MAX_HEAD: usize = 64 << 10;
/// How long a client may take nothing of an answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// Headers of a request at most.
const MAX_HEADERS: usize = 100;

/// Refuses to be reachable from elsewhere without a key, unless told to.
pub fn check_address(address: IpAddr, keys: &Keys, allowed: bool) -> Result<(), String> {
    if address.is_loopback() || keys.required() || allowed {
        return Ok(());
    }
    Err(format!(
        "{address} can be reached from other machines: set API keys (--api-key-file, OMLX_SERVER_API_KEY), or say \
         --allow-no-key"
    ))
}

/// Serves until `stop` is done, then lets running requests end, for a while.
pub async fn serve(app: Shared, listener: TcpListener, router: Router, stop: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(app.limits.connections));
    let (ending, ended) = watch::channel(false);
    let mut stop = std::pin::pin!(stop);
    loop {
        let place = Arc::clone(&places).acquire_owned();
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = accept(&listener, place) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                tokio::spawn(connection(app.clone(), stream, router.clone(), ended.clone(), place));
            }
            Err(error) => {
                // Out of descriptors, most likely: others have to end first.
                log::write(LogLevel::Warn, "accept", &[("error", error.to_string().into())]);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    app.draining.store(true, Ordering::Relaxed);
    log::info("draining", &[("active", app.active.load(Ordering::Relaxed).into())]);
    // The receivers are the connections' own.
    drop(ended);
    let _ = ending.send(true);
    if tokio::time::timeout(app.limits.drain, ending.closed()).await.is_err() {
        log::write(LogLevel::Warn, "drain", &[("error", "requests are still running, and are cut off".into())]);
    }
}

async fn accept(
    listener: &TcpListener,
    place: impl Future<Output = Result<OwnedSemaphorePermit, tokio::sync::AcquireError>>,
) -> std::io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = place.await.map_err(std::io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn connection(
    app: Shared,
    stream: TcpStream,
    router: Router,
    mut ended: watch::Receiver<bool>,
    place: OwnedSemaphorePermit,
) {
    // Tokens are small, and should leave at once.
    let _ = stream.set_nodelay(true);
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(app.limits.timeout);
    builder.max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    let connection =
        builder.serve_connection(TokioIo::new(Reader::new(stream, PATIENCE)), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        // What it returns holds a lock.
        () = async { drop(ended.wait_for(|ended| *ended).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        log::write(LogLevel::Debug, "connection", &[("error", error.to_string().into())]);
    }
    drop(place);
}
