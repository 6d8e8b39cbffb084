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
    // A router handed over as it is would be copied, route by route, for each connection.
    let app = app.into_make_service();
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

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use axum::routing::get;
    use tower::ServiceExt;

    use super::*;

    async fn ask(path: &str, method: &str, headers: &[(&str, &str)]) -> (u16, axum::http::HeaderMap, String) {
        let routes = Router::new()
            .route("/fine", get(|| async { "fine" }))
            .route("/broken", get(|| async { panic!("a secret of ours") as &str }));
        let mut request = Request::builder().uri(path).method(method);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        let response = with_layers(routes, Tokens::default()).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let text = to_bytes(body, 4096).await.unwrap();
        (parts.status.as_u16(), parts.headers, String::from_utf8(text.to_vec()).unwrap())
    }

    // CLOUD-1104
    #[tokio::test]
    async fn unknown_paths_wrong_methods_and_panics_have_bodies_of_ours() {
        for (path, method, status, code) in [
            ("/nowhere", "GET", 404, "NOT_FOUND"),
            ("/fine", "POST", 405, "METHOD_NOT_ALLOWED"),
            ("/broken", "GET", 500, "INTERNAL"),
        ] {
            let (is, headers, text) = ask(path, method, &[]).await;
            assert_eq!(is, status, "{text}");
            assert!(text.contains(&format!("\"code\":\"{code}\"")) && !text.contains("secret"), "{text}");
            let id = headers["x-correlation-id"].to_str().unwrap();
            assert!(text.contains(id), "{text}");
        }
    }

    // CLOUD-1102
    #[tokio::test]
    async fn ids_are_taken_over_when_they_are_good_and_drawn_when_not() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let parent = format!("00-{trace}-00f067aa0ba902b7-01");
        let (_, headers, _) =
            ask("/fine", "GET", &[("x-correlation-id", "abc"), ("traceparent", &parent)]).await;
        assert_eq!(
            (&headers["x-correlation-id"], &headers["x-trace-id"]),
            (&"abc".parse().unwrap(), &trace.parse().unwrap())
        );
        let long = "x".repeat(129);
        for bad in ["a b", &long] {
            let (_, headers, _) =
                ask("/fine", "GET", &[("x-correlation-id", bad), ("traceparent", "nonsense")]).await;
            assert_ne!(headers["x-correlation-id"], bad);
            assert_eq!(headers["x-trace-id"].len(), 32);
        }
    }
}
