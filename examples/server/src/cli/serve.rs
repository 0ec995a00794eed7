//! `omlx-server serve`

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::App;
use crate::http::listen;
use crate::log;
use crate::options::Options;
use crate::routes;

/// Serves until a signal to end.
pub fn run(options: &Options) -> Result<(), String> {
    let host = options.text("host");
    let host = if host == "localhost" { "127.0.0.1" } else { host };
    let host: IpAddr = host.trim_matches(['[', ']']).parse().map_err(|_| format!("--host: {host:?} is no address"))?;
    let address = SocketAddr::new(host, options.number("port")?);
    let app = Arc::new(App::open(options)?);
    listen::check_address(host, &app.keys, options.switch("allow-no-key"))?;
    // Connections are this thread's: their work is small, and sharing it would cost every token more than it saves.
    let runtime = Builder::new_current_thread().thread_name("omlx-http").enable_all().build();
    let runtime = runtime.map_err(|error| format!("the runtime: {error}"))?;
    let served = runtime.block_on(async {
        let listener = TcpListener::bind(address).await.map_err(|error| format!("{address}: {error}"))?;
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        let mut term = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
        log::info("listening", &[("url", format!("http://{address}").into()), ("keys", app.keys.required().into())]);
        let stop = async {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        listen::serve(Arc::clone(&app), listener, routes::router(Arc::clone(&app)), stop).await;
        Ok::<_, String>(())
    });
    // Requests that outlived their time are cut off here.
    runtime.shutdown_timeout(Duration::from_secs(1));
    let closed = app.pool.close().map_err(|error| error.to_string());
    log::info("ended", &[]);
    served.and(closed)
}
