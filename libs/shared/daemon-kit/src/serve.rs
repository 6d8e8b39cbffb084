//! Listening, the layers every request passes, and stopping.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::middleware;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::auth::{self, Tokens};
use crate::{answer, correlation, telemetry};

/// Why the daemon does not listen.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: cannot listen on {addr}: {source}")]
pub struct ListenError {
    pub variable: &'static str,
    pub addr: SocketAddr,
    #[source]
    pub source: std::io::Error,
}

/// Binds the address that the variable names.
pub async fn bind(variable: &'static str, addr: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(addr).await.map_err(|source| ListenError { variable, addr, source })
}

/// Puts the common layers around the routes: outermost the correlation id, then panics, then
/// the token.
pub fn with_layers(routes: Router, tokens: Tokens) -> Router {
    routes
        .fallback(answer::not_found)
        .method_not_allowed_fallback(answer::method_not_allowed)
        .layer(middleware::from_fn_with_state(tokens, auth::layer))
        .layer(CatchPanicLayer::custom(answer::panicked))
        .layer(middleware::from_fn(correlation::layer))
}

/// Serves until `stop`, then lets running requests finish for `grace`.
pub async fn run(
    listener: TcpListener,
    app: Router,
    stop: CancellationToken,
    grace: Duration,
) -> std::io::Result<()> {
    // Without it a small answer waits up to 40 ms for the peer's acknowledgement.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection without TCP_NODELAY");
        }
    });
    let stopped = stop.clone();
    let server = axum::serve(listener, app).with_graceful_shutdown(async move { stopped.cancelled().await });
    let serving = async move { server.await };
    tokio::pin!(serving);
    tokio::select! {
        done = &mut serving => return done,
        () = stop.cancelled() => {}
    }
    match tokio::time::timeout(grace, &mut serving).await {
        Ok(done) => done,
        Err(_) => Ok(()),
    }
}

/// How long blocking calls that hang (a dead mount, a dead driver) may delay the exit.
const BLOCKING_PATIENCE: Duration = Duration::from_secs(1);

/// Runs a daemon on a runtime of its own, says why it failed if it did, and ends in bounded time.
pub fn block_on<E: std::error::Error>(daemon: impl Future<Output = Result<(), E>>) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            telemetry::say_fatal(&error);
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(daemon);
    runtime.shutdown_timeout(BLOCKING_PATIENCE);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::say_fatal(&error);
            ExitCode::FAILURE
        }
    }
}

/// Resolves at the first SIGTERM or SIGINT.
pub async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = signal(SignalKind::terminate());
    let interrupt = signal(SignalKind::interrupt());
    match (terminate, interrupt) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        }
        _ => {
            tracing::error!("signals cannot be received: stop this process with SIGKILL");
            std::future::pending::<()>().await;
        }
    }
}
