//! Calls to engines, over connections that are kept.
//!
//! A kept connection may have been closed by its engine while a request was on its way: that says
//! nothing of the engine, so the call is made once more, on a fresh one; where nothing listens any
//! more by then, the engine has ended with the request. A fresh connection that is
//! lost is never tried again here: a prompt that kills engines must not be handed to the next
//! process. Every body is bounded while it is read.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connection, HttpConnector, HttpInfo, capture_connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use node_registration::body::{BodyError, read_at_most};
use parking_lot::Mutex;
use pool_registry_types::routes::headers;
use pool_registry_types::{AttemptId, TraceContext};
use rustls_platform_verifier::BuilderVerifierExt;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::key::ApiKey;

/// Bound of connecting. Engines are near.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Unused connections are closed after this: before uvicorn, which vLLM, SGLang and others are
/// served by, closes them after 5 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// How soon a request on a connection that its engine had closed already fails.
const CLOSED_SAYS_SO: Duration = Duration::from_secs(1);
/// Kept connections to one engine that are unused.
const MOST_IDLE: usize = 64;
/// Longest answer to a question of ours, bytes: of metrics, mostly.
const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;
/// Longest error body of an engine that is read, bytes.
pub(super) const MAX_ERROR_BYTES: usize = 16 * 1024;
/// Causes that are told of one error.
const MOST_CAUSES: usize = 8;

/// Where an engine is, and what it is asked with.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// `http://host:port`, optionally with a path; without a trailing slash.
    pub url: String,
    pub key: Option<ApiKey>,
    /// What every request of one attempt carries; empty for looks.
    pub headers: HeaderMap,
}

impl Endpoint {
    pub(crate) fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), key: None, headers: HeaderMap::new() }
    }
}

/// By what an engine's log and traces name an attempt. The request's id is the attempt's, not the
/// correlation id: vLLM takes it for its own and fails on two that run under one, and a client may
/// use a correlation id as often as it likes.
pub(crate) fn attempt_headers(trace: &TraceContext, attempt: &AttemptId) -> HeaderMap {
    let attempt = attempt.to_string();
    let reported = [
        (headers::TRACEPARENT, trace.traceparent.as_str()),
        (headers::TRACESTATE, trace.tracestate.as_str()),
        (headers::CORRELATION_ID, trace.correlation_id.as_str()),
        (headers::REQUEST_ID, attempt.as_str()),
    ];
    let reported = reported.into_iter().filter(|(_, value)| !value.is_empty());
    reported
        .filter_map(|(name, value)| Some((HeaderName::from_static(name), HeaderValue::from_str(value).ok()?)))
        .collect()
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// Nothing listens there.
    #[error("{0}")]
    Refused(String),
    /// No connection for another reason: of names, routes or certificates.
    #[error("{0}")]
    Unreachable(String),
    /// Nothing came in time.
    #[error("{0}")]
    Silent(String),
    /// A fresh connection was lost before an answer came.
    #[error("{0}")]
    Lost(String),
    /// We have no descriptor, port or memory left, which says nothing of the engine.
    #[error("{0}")]
    Ours(String),
}

/// The head of an answer, and its body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub response: Response<Incoming>,
    /// Nothing was asked over its connection before: it may be another process than the last one.
    pub fresh: bool,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// The beginning of the body: what came of its first `most` bytes before it ended or broke, or
    /// time was up.
    pub(crate) async fn beginning(self, most: usize, patience: Duration) -> Vec<u8> {
        let mut body = self.response.into_body();
        let mut read = Vec::new();
        let reading = async {
            while read.len() < most
                && let Some(Ok(frame)) = body.frame().await
            {
                if let Ok(data) = frame.into_data() {
                    read.extend_from_slice(&data[..data.len().min(most - read.len())]);
                }
            }
        };
        // What has come counts.
        let _ = tokio::time::timeout(patience, reading).await;
        read
    }

    /// The whole body, of at most `most` bytes.
    pub(crate) async fn bytes(self, most: usize) -> Result<Bytes, BodyError> {
        read_at_most(self.response.into_body(), most).await
    }

    async fn json(self) -> Result<Value, BadAnswer> {
        let bytes = self.bytes(MAX_ANSWER_BYTES).await.map_err(BadAnswer::Body)?;
        super::json::document(&bytes).map_err(BadAnswer::Unreadable)
    }
}

/// Why an answer is no JSON.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadAnswer {
    #[error("{}", with_causes(.0))]
    Body(BodyError),
    #[error("unreadable: {0}")]
    Unreadable(serde_json::Error),
}

/// The ends of connections over which an answer came.
type Used = Arc<Mutex<BTreeSet<Ends>>>;
/// Ours and the engine's end of a connection.
type Ends = (SocketAddr, SocketAddr);

/// Makes connections, and forgets what was known of an earlier one with the same local end.
#[derive(Debug, Clone)]
struct Connector {
    inner: HttpsConnector<HttpConnector>,
    used: Used,
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

impl tower::Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, used) = (self.inner.call(uri), Arc::clone(&self.used));
        Box::pin(async move {
            let stream = connecting.await?;
            if let Some(ends) = ends(&stream.connected()) {
                used.lock().remove(&ends);
            }
            Ok(stream)
        })
    }
}

fn ends(connection: &hyper_util::client::legacy::connect::Connected) -> Option<Ends> {
    let mut about = http::Extensions::new();
    connection.get_extras(&mut about);
    about.get().map(both)
}

fn both(about: &HttpInfo) -> Ends {
    (about.local_addr(), about.remote_addr())
}

/// Most that a connection is read at once, and longest head of an answer, bytes: an engine that sends without
/// end keeps a thread from others for no longer than that takes.
const READ_BYTES: usize = 64 * 1024;

/// Most informational responses (1xx) before an answer. They may be any number: see RFC 9110, 15.2.
const MOST_INFORMATIONAL: usize = 64;

/// Calls engines. A connection is polled by the runtime that opened it, whoever uses it later: a thread
/// for streams has a client of its own.
#[derive(Debug, Clone)]
pub(crate) struct EngineClient {
    connector: Connector,
    kept: Client<Connector, Full<Bytes>>,
    /// Makes a connection for each call.
    fresh: Client<Connector, Full<Bytes>>,
    used: Used,
}

impl Default for EngineClient {
    fn default() -> Self {
        Self::new()
    }
}

impl EngineClient {
    pub(crate) fn new() -> Self {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        http.enforce_http(false);
        let versions =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("ring has the versions of TLS that rustls has");
        let tls = match versions.clone().with_platform_verifier() {
            Ok(trusting) => trusting.with_no_client_auth(),
            Err(error) => {
                tracing::debug!(%error, "this machine has no CA certificates: engines are reached by http:// only");
                versions.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
            }
        };
        let inner = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        Self::over(Connector { inner, used: Used::default() })
    }

    /// The same with connections of its own.
    pub(crate) fn apart(&self) -> Self {
        Self::over(self.connector.clone())
    }

    fn over(connector: Connector) -> Self {
        let client = |most_idle| {
            Client::builder(TokioExecutor::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_max_idle_per_host(most_idle)
                .http1_max_buf_size(READ_BYTES)
                .build(connector.clone())
        };
        let used = Arc::clone(&connector.used);
        Self { kept: client(MOST_IDLE), fresh: client(0), used, connector }
    }

    /// Asks at a path below the endpoint's URL. Who calls bounds the time.
    pub(crate) async fn get(&self, at: &Endpoint, path: &str) -> Result<Answer, CallError> {
        self.call(&Method::GET, at, path, Bytes::new()).await
    }

    pub(crate) async fn post(&self, at: &Endpoint, path: &str, body: &Value) -> Result<Answer, CallError> {
        self.call(&Method::POST, at, path, Bytes::from(body.to_string())).await
    }

    /// Asks with a body that is passed on as it came, whose type stands among the endpoint's headers where
    /// it is not JSON. `target` is a path and its query.
    pub(crate) async fn pass(&self, at: &Endpoint, target: &str, body: Bytes) -> Result<Answer, CallError> {
        self.call(&Method::POST, at, target, body).await
    }

    /// The JSON of an answer that is good.
    pub(crate) async fn get_json(&self, at: &Endpoint, path: &str) -> Result<Value, Question> {
        let answer = self.get(at, path).await.map_err(Question::Unanswered)?;
        match answer.status() {
            200..=299 => answer.json().await.map_err(Question::Bad),
            status => Err(Question::Status(status)),
        }
    }

    async fn call(
        &self,
        method: &Method,
        at: &Endpoint,
        path: &str,
        body: Bytes,
    ) -> Result<Answer, CallError> {
        let request = || {
            let mut request = Request::builder().method(method).uri(format!("{}{path}", at.url));
            if *method == Method::POST && !at.headers.contains_key(CONTENT_TYPE) {
                request = request.header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            }
            for (name, value) in &at.headers {
                request = request.header(name, value);
            }
            if let Some(key) = &at.key {
                request = request.header(AUTHORIZATION, key.bearer());
            }
            request.body(Full::new(body.clone())).map_err(|error| CallError::Unreachable(error.to_string()))
        };
        let mut first = request()?;
        let connection = capture_connection(&mut first);
        let began = Instant::now();
        let error = match requested(&self.kept, first).await {
            Ok(response) => return Ok(self.answered(response)),
            Err(Failed::Answering) => return Err(CallError::Lost(Failed::Answering.to_string())),
            Err(Failed::Request(error)) => error,
        };
        let ends = connection.connection_metadata().as_ref().and_then(ends);
        let was_used = ends.is_some_and(|ends| self.used.lock().remove(&ends));
        // What was closed before says so at once; what is lost later, or has begun to answer, had
        // the request.
        let had_it = began.elapsed() > CLOSED_SAYS_SO || answer_begun(&error);
        if !was_used || had_it {
            return Err(classify(&error));
        }
        tracing::debug!(url = at.url, "a kept connection was closed as it was used: asking on a fresh one");
        match requested(&self.fresh, request()?).await {
            Ok(response) => Ok(Answer { response, fresh: true }),
            Err(Failed::Answering) => Err(CallError::Lost(Failed::Answering.to_string())),
            Err(Failed::Request(error)) => Err(match classify(&error) {
                // It was there when the request went out and is not any more: that may be its doing.
                CallError::Refused(why) if *method == Method::POST => {
                    CallError::Lost(format!("closed as it was used, and then {why}"))
                }
                other => other,
            }),
        }
    }

    fn answered(&self, response: Response<Incoming>) -> Answer {
        let ends = response.extensions().get().map(both);
        let fresh = ends.is_none_or(|ends| self.used.lock().insert(ends));
        Answer { response, fresh }
    }
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{}", with_causes(.0))]
    Request(Error),
    #[error("more than {MOST_INFORMATIONAL} informational responses (HTTP 1xx) came before an answer")]
    Answering,
}

/// The answer to a request, whose connection is closed where its engine announces one without end.
async fn requested(
    client: &Client<Connector, Full<Bytes>>,
    mut request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, Failed> {
    let (came, too_many) = (AtomicUsize::new(0), Arc::new(Notify::new()));
    let exceeded = Arc::clone(&too_many);
    hyper::ext::on_informational(&mut request, move |_| {
        if came.fetch_add(1, Ordering::Relaxed) == MOST_INFORMATIONAL {
            exceeded.notify_one();
        }
    });
    tokio::select! {
        response = client.request(request) => response.map_err(Failed::Request),
        () = too_many.notified() => Err(Failed::Answering),
    }
}

/// Why a question has no JSON as its answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Question {
    #[error("{0}")]
    Unanswered(CallError),
    #[error("HTTP {0}")]
    Status(u16),
    #[error("{0}")]
    Bad(BadAnswer),
}

/// A model's name as one segment of a path, or as a value of a query.
pub(super) fn percent_encoded(model: &str) -> String {
    model.bytes().fold(String::new(), |mut path, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(path, "%{byte:02X}");
        }
        path
    })
}

fn classify(error: &Error) -> CallError {
    let text = with_causes(error);
    let kinds: Vec<&std::io::Error> = causes(error).filter_map(|cause| cause.downcast_ref()).collect();
    // EMFILE, ENFILE, ENOMEM, EADDRNOTAVAIL, ENOBUFS. Source: errno(3).
    let ours = |error: &&std::io::Error| matches!(error.raw_os_error(), Some(24 | 23 | 12 | 99 | 105));
    if kinds.iter().any(ours) {
        return CallError::Ours(text);
    }
    if kinds.iter().any(|error| error.kind() == std::io::ErrorKind::TimedOut) {
        return CallError::Silent(text);
    }
    if kinds.iter().any(|error| error.kind() == std::io::ErrorKind::ConnectionRefused) {
        return CallError::Refused(text);
    }
    if error.is_connect() { CallError::Unreachable(text) } else { CallError::Lost(text) }
}

/// Whether something came that is not the head of an answer.
fn answer_begun(error: &Error) -> bool {
    causes(error).filter_map(|cause| cause.downcast_ref::<hyper::Error>()).any(hyper::Error::is_parse)
}

fn causes<'e>(
    error: &'e (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'e (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source()).take(MOST_CAUSES)
}

/// An error with its causes.
pub(crate) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let texts: Vec<String> = causes(error).map(ToString::to_string).collect();
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// An engine that answers `answers[n]` requests on its connection n and then closes it as the
    /// next one is on its way. Counts its connections.
    async fn engine(answers: &'static [usize]) -> (Endpoint, Arc<AtomicU32>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = Endpoint::new(format!("http://{}", listener.local_addr().unwrap()));
        let connections = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            for answers in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                for _ in 0..*answers {
                    read_request(&mut stream).await;
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
                }
                read_request(&mut stream).await;
            }
        });
        (at, connections)
    }

    async fn read_request(stream: &mut TcpStream) {
        let mut read = Vec::new();
        while !read.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                return;
            }
            read.extend(byte);
        }
    }

    // CLOUD-1526
    #[tokio::test]
    async fn a_kept_connection_that_dies_as_it_is_used_is_not_a_dead_engine() {
        let (at, connections) = engine(&[1, 1, 0]).await;
        let client = EngineClient::new();
        let ask = async || {
            let answer = client.get(&at, "/").await?;
            let fresh = answer.fresh;
            assert_eq!(answer.bytes(2).await.unwrap(), "{}");
            Ok::<bool, CallError>(fresh)
        };
        assert_eq!(ask().await, Ok(true));
        assert_eq!(ask().await, Ok(true), "asked once more, on a fresh connection");
        assert_eq!(connections.load(Ordering::Relaxed), 2);
        // A fresh connection that dies is the engine's death, and not asked over again.
        assert!(matches!(ask().await, Err(CallError::Lost(_))));
        assert_eq!(connections.load(Ordering::Relaxed), 3);
    }

    // CLOUD-1526
    #[tokio::test]
    async fn an_engine_that_is_gone_once_a_kept_connection_has_died_has_died_of_it() {
        let (at, _) = engine(&[1]).await;
        let client = EngineClient::new();
        client.get(&at, "/").await.unwrap().bytes(2).await.unwrap();
        let ended = client.post(&at, "/", &serde_json::json!({})).await;
        assert!(matches!(&ended, Err(CallError::Lost(_))), "{ended:?}");
        let never_there = EngineClient::new().get(&at, "/").await;
        assert!(matches!(&never_there, Err(CallError::Refused(_))), "{never_there:?}");
    }

    // CLOUD-1526
    #[tokio::test]
    async fn a_connection_whose_answer_was_read_to_its_end_is_used_again() {
        let (at, connections) = engine(&[5]).await;
        let client = EngineClient::new();
        for n in 0..5 {
            let answer = client.get(&at, "/").await.unwrap();
            assert_eq!(answer.fresh, n == 0);
            answer.bytes(2).await.unwrap();
        }
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    }

    // CLOUD-1526
    #[tokio::test]
    async fn who_does_not_listen_has_refused_and_a_body_is_bounded() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nobody = Endpoint::new(format!("http://{}", listener.local_addr().unwrap()));
        drop(listener);
        let client = EngineClient::new();
        assert!(matches!(client.get(&nobody, "/").await, Err(CallError::Refused(_))));
        let (at, _) = engine(&[1]).await;
        assert!(client.get(&at, "/").await.unwrap().bytes(1).await.is_err());
    }

    // CLOUD-2780
    #[tokio::test]
    async fn an_engine_may_announce_its_answer_and_not_for_ever() {
        const EARLY: &[u8] = b"HTTP/1.1 103 Early Hints\r\n\r\n";
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = Endpoint::new(format!("http://{}", listener.local_addr().unwrap()));
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_request(&mut stream).await;
            stream.write_all(&EARLY.repeat(MOST_INFORMATIONAL)).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
            read_request(&mut stream).await;
            while stream.write_all(&EARLY.repeat(1_000)).await.is_ok() {}
        });
        let client = EngineClient::new();
        assert_eq!(client.get(&at, "/").await.unwrap().bytes(2).await.unwrap(), "{}");
        let ended = client.get(&at, "/").await.map(|answer| answer.status());
        let Err(CallError::Lost(why)) = &ended else { panic!("{ended:?}") };
        assert!(why.contains("informational"), "{why}");
    }

    // CLOUD-2720
    #[tokio::test]
    async fn what_an_engine_answers_without_end_is_read_no_further_than_its_bound() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = Endpoint::new(format!("http://{}", listener.local_addr().unwrap()));
        let sent = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&sent);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                read_request(&mut stream).await;
                stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n[").await.unwrap();
                while stream.write_all(&[b'1'; 64 * 1024]).await.is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // Beside what is read, what fits into the buffers of the kernel is sent.
        let most = |bytes: usize| u32::try_from((bytes + 16 * 1024 * 1024) / (64 * 1024)).unwrap();
        let client = EngineClient::new();
        let answer = client.get_json(&at, "/v1/models").await;
        assert!(
            matches!(&answer, Err(Question::Bad(BadAnswer::Body(BodyError::TooLong { .. })))),
            "{answer:?}"
        );
        assert!(sent.swap(0, Ordering::Relaxed) <= most(MAX_ANSWER_BYTES));
        let answer = client.get(&at, "/completion").await.unwrap();
        assert_eq!(answer.beginning(MAX_ERROR_BYTES, Duration::from_secs(10)).await.len(), MAX_ERROR_BYTES);
        assert!(sent.load(Ordering::Relaxed) <= most(MAX_ERROR_BYTES));
    }
}
