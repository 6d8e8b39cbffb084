//! The calls of a node to the control plane, over HTTP or in process.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::limits::MAX_ANSWER_BYTES;
use pool_registry_types::node::{Heartbeat, HeartbeatAnswer, RegisterAnswer, RegisterRequest};
use pool_registry_types::{Epoch, ErrorBody, ErrorCode, NodeId, routes};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use serde::{Serialize, de::DeserializeOwned};

use crate::body::read_at_most;

/// Bound of one call, connecting included.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound of connecting. Source: .specs/01 CLOUD-1501.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a call had no good answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    #[error("the control plane refused: {0}")]
    Refused(ErrorBody),
    #[error("the control plane was not reached: {0}")]
    Unreachable(String),
}

impl CallError {
    pub fn is_unknown_node(&self) -> bool {
        matches!(self, Self::Refused(body) if body.code == ErrorCode::NodeUnknown)
    }
}

/// What a node calls. Implemented over HTTP and, in the home profile, in process.
pub trait ControlPlane: Send + Sync + 'static {
    /// Where it is called; nothing in process.
    fn url(&self) -> Option<&str> {
        None
    }

    fn register(
        &self,
        request: RegisterRequest,
    ) -> impl Future<Output = Result<RegisterAnswer, CallError>> + Send;

    fn heartbeat(
        &self,
        node_id: &NodeId,
        beat: Heartbeat,
    ) -> impl Future<Output = Result<HeartbeatAnswer, CallError>> + Send;

    fn deregister(
        &self,
        node_id: &NodeId,
        epoch: &Epoch,
    ) -> impl Future<Output = Result<(), CallError>> + Send;
}

/// The header by which a node shows itself, as of now.
pub type Credentials = Arc<dyn Fn() -> Option<HeaderValue> + Send + Sync>;

/// An error with its causes in words.
pub type Explain = fn(&(dyn std::error::Error + 'static)) -> String;

/// The control plane at a URL.
#[derive(Clone)]
pub struct HttpControlPlane {
    base: String,
    client: reqwest::Client,
    credentials: Credentials,
    explain: Explain,
}

impl std::fmt::Debug for HttpControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HttpControlPlane({})", self.base)
    }
}

impl HttpControlPlane {
    /// The client that [`Self::new`] wants, without the TLS that is the daemon's own.
    pub fn client() -> reqwest::ClientBuilder {
        reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .no_proxy()
            // A token goes where it was meant to go.
            .redirect(reqwest::redirect::Policy::none())
    }

    /// `base` is `http://host:port` or `https://host:port`, without a path.
    pub fn new(base: &str, client: reqwest::Client, credentials: Credentials, explain: Explain) -> Self {
        Self { base: base.trim_end_matches('/').to_owned(), client, credentials, explain }
    }

    async fn call<A: DeserializeOwned>(
        &self,
        method: reqwest::Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Option<A>, CallError> {
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(value) = (self.credentials)() {
            request = request.header(AUTHORIZATION, value);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let unreachable =
            |error: reqwest::Error| CallError::Unreachable((self.explain)(&error.without_url()));
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        if status == reqwest::StatusCode::NO_CONTENT {
            return Ok(None);
        }
        let bytes = read_at_most(reqwest::Body::from(response), MAX_ANSWER_BYTES).await;
        let bytes = bytes.map_err(|error| CallError::Unreachable((self.explain)(&error)))?;
        if status.is_success() {
            let answer = serde_json::from_slice(&bytes);
            return answer.map(Some).map_err(|e| CallError::Unreachable(format!("unreadable answer: {e}")));
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(mut body) => {
                body.cut();
                Err(CallError::Refused(body))
            }
            Err(_) => Err(CallError::Unreachable(format!("HTTP {status} without an error body"))),
        }
    }
}

const NO_BODY: Option<&()> = None;

impl ControlPlane for HttpControlPlane {
    fn url(&self) -> Option<&str> {
        Some(&self.base)
    }

    async fn register(&self, request: RegisterRequest) -> Result<RegisterAnswer, CallError> {
        self.call(reqwest::Method::POST, routes::NODE_REGISTER, Some(&request)).await.and_then(some_body)
    }

    async fn heartbeat(&self, node_id: &NodeId, beat: Heartbeat) -> Result<HeartbeatAnswer, CallError> {
        let path = routes::node_heartbeat(node_id);
        self.call(reqwest::Method::POST, &path, Some(&beat)).await.and_then(some_body)
    }

    async fn deregister(&self, node_id: &NodeId, epoch: &Epoch) -> Result<(), CallError> {
        let path = routes::node(node_id, epoch);
        self.call::<serde_json::Value>(reqwest::Method::DELETE, &path, NO_BODY).await.map(|_| ())
    }
}

fn some_body<A>(answer: Option<A>) -> Result<A, CallError> {
    answer.ok_or_else(|| CallError::Unreachable("an answer without a body".into()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// Takes one call, answers it with so many bytes, or until nobody reads them, and says how many went out.
    fn answering(status: &'static str, most: usize) -> (String, std::thread::JoinHandle<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let serving = std::thread::spawn(move || {
            let (mut caller, _) = listener.accept().unwrap();
            let _ = caller.read(&mut [0; 4096]).unwrap();
            write!(caller, "HTTP/1.1 {status}\r\nconnection: close\r\n\r\n").unwrap();
            let piece = [b' '; 64 * 1024];
            let mut sent = 0;
            while sent < most && caller.write_all(&piece).is_ok() {
                sent += piece.len();
            }
            sent
        });
        (base, serving)
    }

    // CLOUD-2720
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn an_answer_without_end_is_read_no_further_than_its_bound() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let most = 64 * MAX_ANSWER_BYTES;
        for status in ["200 OK", "503 Service Unavailable"] {
            let (base, serving) = answering(status, most);
            let client = HttpControlPlane::client().build().unwrap();
            let plane = HttpControlPlane::new(&base, client, Arc::new(|| None), |error| error.to_string());
            let node_id = NodeId::new("a").unwrap();
            let error = plane.deregister(&node_id, &Epoch::new("1").unwrap()).await.unwrap_err();
            assert!(error.to_string().contains("is longer than 1048576 bytes"), "{error}");
            drop(plane);
            // What lies in the buffers of the kernel was sent too.
            let sent = serving.join().unwrap();
            assert!(sent < most, "{sent} bytes were read");
        }
    }
}
