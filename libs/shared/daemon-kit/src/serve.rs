//! The layers every request passes, running, and stopping.

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use futures::FutureExt;
use hyper::body::Body as _;
use parking_lot::Mutex;
use pool_registry_types::ErrorBody;
use pool_registry_types::routes::headers;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tower_http::cors::{AllowHeaders, CorsLayer};

use crate::answer;
use crate::answer_room::{self, AnswerRoom};
use crate::audit::{self, Audit};
use crate::auth::{self, Gate};
use crate::calls::{Arrived, Calls};
use crate::correlation::Answering;
use crate::hangups;
use crate::telemetry::{self, Logs};

/// What a daemon puts around its routes.
#[derive(Debug, Clone)]
pub(crate) struct Edge {
    pub gate: Gate,
    pub audit: Audit,
    pub calls: Arc<Calls>,
    /// Where the routes are shown.
    pub page: Option<&'static str>,
}

/// Puts the common layer around the routes, and outside of it CORS, where the gate knows origins.
pub(crate) fn with_layers(routes: Router, edge: Edge) -> Router {
    let cors = (!edge.gate.origins.is_empty()).then(|| {
        CorsLayer::new()
            .allow_origin(edge.gate.origins.clone())
            .allow_methods([Method::GET, Method::POST, Method::DELETE])
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(headers::FOR_CLIENTS.map(HeaderName::from_static))
            .max_age(Duration::from_secs(3600))
    });
    let page = edge.page;
    let routes = routes
        .fallback(move || async move { answer::not_found(page) })
        .method_not_allowed_fallback(answer::method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::new((edge, AnswerRoom::default())), layer));
    match cors {
        None => routes,
        // Its own answers have the headers of every answer too.
        Some(cors) => routes.layer(cors).layer(middleware::from_fn(with_headers)),
    }
}

/// What every request passes: the ids of its answer, the audit log, the gate, and panics. One layer,
/// because each boxes and clones all that is inside it, for each request.
async fn layer(State(around): State<Arc<(Edge, AnswerRoom)>>, mut request: Request, next: Next) -> Response {
    let (edge, room) = &*around;
    let is_page = answer::is_page(request.uri().path());
    let is_others = answer_room::is_others(request.uri().path());
    let arrived = Arrived::of(&request);
    let mut answering = Answering::begin(&mut request, &arrived);
    let mut call = audit::begin(&edge.audit, &request, answering.ids());
    let mut admission = auth::admit(&edge.gate, &mut request);
    if let Some(call) = &mut call {
        call.found(std::mem::take(&mut admission.found));
    }
    let is_refused = admission.refused.is_some();
    if is_refused {
        answering.is_refused();
    }
    let mut response = match admission.refused.take() {
        None if is_encoded(&request) => answer::encoded(),
        None => {
            let answered = AssertUnwindSafe(next.run(request)).catch_unwind().await;
            let response = answered.unwrap_or_else(answer::panicked);
            if is_others { response } else { room.counted(admission.holder, response) }
        }
        Some(refused) => {
            // Whoever does not wait for the answer counts too.
            edge.calls.refused(&arrived, refused.0.code);
            auth::refuse(refused).await
        }
    };
    admission.finish(&edge.gate, &mut response);
    edge.calls.answered(&arrived, &response);
    if let Some(error) = response.extensions().get::<ErrorBody>().filter(|_| !is_refused) {
        edge.calls.refused(&arrived, error.code);
    }
    if let Some(call) = call {
        call.answered(&response);
    }
    let mut response = answering.finish(response, edge.gate.shapes);
    answer::set_headers(&mut response, is_page);
    response
}

/// Whether the request has a body that is not there as it is.
fn is_encoded(request: &Request) -> bool {
    let mut codings = request.headers().get_all(header::CONTENT_ENCODING).iter();
    let is_other = |value: &HeaderValue| !value.as_bytes().eq_ignore_ascii_case(b"identity");
    codings.any(is_other) && !request.body().is_end_stream()
}

async fn with_headers(request: Request, next: Next) -> Response {
    let is_page = answer::is_page(request.uri().path());
    let mut response = next.run(request).await;
    answer::set_headers(&mut response, is_page);
    response
}

/// How long blocking calls that hang (a dead mount, a dead driver) may delay the exit.
const BLOCKING_PATIENCE: Duration = Duration::from_secs(1);

/// Runs a daemon on a runtime of its own, says why it failed if it did, and ends in bounded time,
/// also when nobody reads its log.
pub fn block_on<E: std::error::Error>(logs: Logs, daemon: impl Future<Output = Result<(), E>>) -> ExitCode {
    raise_file_limit();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            drop(logs);
            telemetry::say_fatal(&error);
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        *SIGNALS.lock() = Some(signals());
        let outcome = daemon.await;
        // The last ones are of tasks that have just ended.
        span_export::stop().await;
        outcome
    });
    runtime.shutdown_timeout(BLOCKING_PATIENCE);
    // What was logged stands before why the daemon ends.
    drop(logs);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::say_fatal(&error);
            ExitCode::FAILURE
        }
    }
}

/// Every connection is a file: as many as this process may have, not as many as a shell gives.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// What a daemon is told by signals, from when this was made.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// SIGHUP stops it too.
    on_terminal: bool,
}

/// Those of this process, from its first moment on until somebody waits for them: a daemon that was stopped
/// while it still started ends as any other.
static SIGNALS: Mutex<Option<std::io::Result<Signals>>> = Mutex::new(None);

fn signals() -> std::io::Result<Signals> {
    let on_terminal = hangups::on_terminal();
    Ok(Signals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
        hangup: signal(SignalKind::hangup())?,
        on_terminal,
    })
}

/// Resolves at the first SIGTERM or SIGINT since the start of the daemon, and on a terminal SIGHUP. What
/// any other SIGHUP does is [`hangups`]' to say.
pub async fn stop_signal() {
    let since_start = SIGNALS.lock().take();
    let mut signals = match since_start.unwrap_or_else(signals) {
        Ok(signals) => signals,
        Err(error) => {
            tracing::error!(%error, "signals cannot be received: stop this process with SIGKILL");
            return std::future::pending().await;
        }
    };
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
            _ = signals.hangup.recv() => match signals.on_terminal {
                true => return,
                false => hangups::received(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use axum::routing::get;
    use tower::ServiceExt;

    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::auth::{Need, Tokens};
    use crate::connections::{self, ConnLimits, ServeOptions};
    use crate::hosts::AllowedHosts;
    use crate::tokens::Scope;

    fn open_edge() -> Edge {
        let gate = Gate {
            tokens: Tokens::default(),
            needs: |_, _| Need::Scope(Scope::Admin),
            certificate: None,
            nodes_show_certificates: false,
            quota: None,
            origins: vec![HeaderValue::from_static("http://pages.example")],
            hosts: AllowedHosts::default(),
            shapes: None,
        };
        Edge { gate, audit: Audit::default(), calls: Arc::default(), page: None }
    }

    async fn ask(path: &str, method: &str, headers: &[(&str, &str)]) -> (u16, axum::http::HeaderMap, String) {
        let routes = Router::new()
            .route("/fine", get(|| async { "fine" }))
            .route("/broken", get(|| async { panic!("a secret of ours") as &str }));
        let mut request = Request::builder().uri(path).method(method).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        let response = with_layers(routes, open_edge()).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let text = to_bytes(body, 4096).await.unwrap();
        (parts.status.as_u16(), parts.headers, String::from_utf8(text.to_vec()).unwrap())
    }

    /// Asks on a connection. Returns the status; nothing where it is closed.
    async fn ask_again(socket: &mut TcpStream, token: &str) -> Option<String> {
        let head = format!("GET /fine HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n");
        socket.write_all(head.as_bytes()).await.ok()?;
        let mut answer = [0; 2048];
        let read = socket.read(&mut answer).await.ok().filter(|read| *read > 0)?;
        Some(String::from_utf8_lossy(&answer[9..12.min(read)]).into_owned())
    }

    // CLOUD-2760
    #[tokio::test]
    async fn connections_that_have_shown_a_token_outlive_any_number_of_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let routes = Router::new().route("/fine", get(|| async { "fine" }));
        let tokens = Tokens::load(Some("a-token-of-ours".into()), None).unwrap();
        let edge = Edge { gate: Gate { tokens, ..open_edge().gate }, ..open_edge() };
        let limits = ConnLimits { connections: 8, ..ConnLimits::default() };
        let options = ServeOptions { limits, ..ServeOptions::default() };
        let counts = Arc::clone(&options.counts);
        let stop = CancellationToken::new();
        let grace = Duration::from_secs(1);
        let server =
            tokio::spawn(connections::run(listener, with_layers(routes, edge), options, stop.clone(), grace));
        let asked = |token: &'static str| async move {
            let mut socket = TcpStream::connect(addr).await.unwrap();
            ask_again(&mut socket, token).await.map(|status| (socket, status))
        };
        let (mut known, status) = asked("a-token-of-ours").await.unwrap();
        assert_eq!(status, "200");
        // Many that say nothing, and some whose token is none.
        let mut strangers = Vec::new();
        for _ in 0..50 {
            strangers.push(TcpStream::connect(addr).await.unwrap());
        }
        for _ in 0..3 {
            let (socket, status) = asked("a-token-of-others").await.unwrap();
            assert_eq!(status, "401");
            strangers.push(socket);
        }
        let (mut late, status) = asked("a-token-of-ours").await.expect("there is room");
        assert_eq!(status, "200");
        for socket in [&mut known, &mut late] {
            assert_eq!(ask_again(socket, "a-token-of-ours").await.as_deref(), Some("200"));
        }
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        assert_eq!((load(&counts.over_limit), load(&counts.made_room)), (0, 48));
        // Once all are known, the newest is closed.
        let mut all = Vec::new();
        for _ in 0..6 {
            all.push(asked("a-token-of-ours").await.expect("there is room"));
        }
        assert!(asked("a-token-of-ours").await.is_none());
        assert_eq!(load(&counts.over_limit), 1);
        stop.cancel();
        server.await.unwrap().unwrap();
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

    // CLOUD-2984
    #[tokio::test]
    async fn a_body_in_a_coding_is_refused_with_the_one_that_is_taken() {
        let routes = || Router::new().route("/fine", get(|| async { "fine" }).post(|| async { "taken" }));
        for (coding, body, status) in [
            ("gzip", "{}", 415),
            ("identity, br", "{}", 415),
            ("Identity", "{}", 200),
            // Nothing is there that could be in a coding.
            ("gzip", "", 200),
        ] {
            let request =
                Request::post("/fine").header("host", "localhost").header("content-encoding", coding);
            let request = request.body(Body::from(body)).unwrap();
            let response = with_layers(routes(), open_edge()).oneshot(request).await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{coding}");
            let taken = response.headers().get("accept-encoding").map(|value| value.to_str().unwrap());
            assert_eq!(taken, (status == 415).then_some("identity"));
        }
    }

    // CLOUD-1117
    #[tokio::test]
    async fn every_answer_has_its_headers_and_only_configured_origins_may_call() {
        let origin = |origin| [("origin", origin), ("access-control-request-method", "GET")];
        let (_, headers, _) = ask("/fine", "GET", &[]).await;
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["cache-control"], "no-store");
        assert!(!headers.contains_key("access-control-allow-origin"));
        let (status, headers, _) = ask("/fine", "OPTIONS", &origin("http://pages.example")).await;
        assert_eq!(
            (status, &headers["access-control-allow-origin"]),
            (200, &"http://pages.example".parse().unwrap())
        );
        let (_, headers, _) = ask("/fine", "GET", &origin("http://other.example")).await;
        assert!(!headers.contains_key("access-control-allow-origin"));
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
