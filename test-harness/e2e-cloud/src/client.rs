//! A client of the HTTP API, and what it saw.

use std::time::{Duration, Instant};

use futures::StreamExt;
use pool_registry_types::sse::Decoder;
use pool_registry_types::view::{ClusterView, NodeView};
use reqwest::{Method, RequestBuilder, Response};
use serde_json::Value;

/// How every token of the tests begins.
const SECRET_PREFIX: &str = "test-token-";
/// Longest that a stream is read.
const STREAM_PATIENCE: Duration = Duration::from_secs(90);

/// Whether a token of the tests stands in the bytes: all of them begin alike.
pub fn holds_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET_PREFIX.len()).any(|window| window == SECRET_PREFIX.as_bytes())
}

/// Talks to one control plane.
#[derive(Debug, Clone)]
pub struct Client {
    pub base: String,
    pub token: Option<String>,
    http: reqwest::Client,
}

/// Everything that one reader of one stream saw, in order.
#[derive(Debug, Clone, Default)]
pub struct Transcript {
    pub status: u16,
    pub task_id: String,
    pub bytes: Vec<u8>,
    /// Name, id and data of each event.
    pub events: Vec<(String, Option<String>, Value)>,
    pub first_token_after: Option<Duration>,
    /// When each token came.
    pub tokens_at: Vec<Instant>,
    /// When the first token of an attempt after the first one came.
    pub replaced_at: Option<Instant>,
    /// When the reader saw the stream end.
    pub took: Duration,
    /// The body of an answer that is no stream.
    pub refusal: Value,
}

impl Transcript {
    pub fn tokens(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter(|(name, ..)| name == "token")
            .filter_map(|(.., data)| data["t"].as_str())
            .collect()
    }

    /// What the model thought.
    pub fn reasoning(&self) -> String {
        let thoughts = self.events.iter().filter(|(name, ..)| name == "reasoning");
        thoughts.filter_map(|(.., data)| data["t"].as_str()).collect()
    }

    /// The data of each `result`.
    pub fn results(&self) -> Vec<&Value> {
        self.events.iter().filter(|(name, ..)| name == "result").map(|(.., data)| data).collect()
    }

    pub fn text(&self) -> String {
        self.tokens().concat()
    }

    pub fn names(&self) -> Vec<&str> {
        self.events.iter().map(|(name, ..)| name.as_str()).collect()
    }

    /// The nodes that sent tokens or an end.
    pub fn node(&self) -> Option<&str> {
        self.events
            .iter()
            .find(|(name, ..)| name == "started")
            .and_then(|(.., data)| data["node_id"].as_str())
    }

    /// The code of the terminal error; nothing after an `end`.
    pub fn error(&self) -> Option<&str> {
        self.events.iter().find(|(name, ..)| name == "error").and_then(|(.., data)| data["code"].as_str())
    }

    pub fn completed(&self) -> bool {
        self.events.last().is_some_and(|(name, ..)| name == "end")
    }

    /// How many attempts have sent tokens.
    pub fn starts(&self) -> usize {
        self.events.iter().filter(|(name, ..)| name == "started").count()
    }

    /// The invariants of every stream: indices without gap or repeat, `started` before the first
    /// token and once for each attempt that sends any, exactly one terminal event and nothing after it.
    pub fn check(&self) {
        assert_eq!(self.status, 200, "no stream: {}", self.refusal);
        let names = self.names();
        let terminals = names.iter().filter(|name| ["end", "error"].contains(name)).count();
        assert_eq!(terminals, 1, "{names:?}");
        assert!(["end", "error"].contains(names.last().expect("a terminal")), "{names:?}");
        let starts: Vec<u64> = self
            .events
            .iter()
            .filter(|(name, ..)| name == "started")
            .filter_map(|(.., data)| data["attempt"].as_u64())
            .collect();
        assert!(starts.is_sorted() && !starts.windows(2).any(|pair| pair[0] == pair[1]), "{starts:?}");
        let with_id =
            self.events.iter().filter(|(name, ..)| !["started", "metrics"].contains(&name.as_str()));
        for (n, (name, id, data)) in with_id.enumerate() {
            let number = id.as_deref().and_then(|id| id.rsplit_once(':')).map(|(_, n)| n.to_owned());
            assert_eq!(number, Some(n.to_string()), "the id of frame {n}");
            if ["token", "reasoning", "result"].contains(&name.as_str()) {
                assert_eq!(data["i"], n, "the index of {name} {n}");
            }
        }
        if ["token", "reasoning", "result"].iter().any(|name| names.contains(name)) {
            let first = names.iter().find(|name| **name != "metrics");
            assert_eq!(first, Some(&"started"), "{names:?}");
        }
    }
}

impl Client {
    pub fn new(base: &str, token: Option<&str>) -> Self {
        // Only the first installation in a process can fail.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(2)).build();
        let http = http.expect("a plain client can be made");
        Self { base: base.to_owned(), token: token.map(str::to_owned), http }
    }

    /// The same, trusting this CA (PEM) and no other.
    pub fn with_ca(base: &str, token: Option<&str>, ca: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ca = reqwest::Certificate::from_pem(ca.as_bytes()).expect("a certificate");
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(2))
            .tls_certs_only([ca]);
        let http = http.build().expect("a client that trusts one CA");
        Self { base: base.to_owned(), token: token.map(str::to_owned), http }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub async fn get(&self, path: &str) -> Result<Response, reqwest::Error> {
        self.request(Method::GET, path).timeout(Duration::from_secs(5)).send().await
    }

    pub async fn get_json(&self, path: &str) -> Option<Value> {
        let body = self.get(path).await.ok()?.bytes().await.ok()?;
        assert!(!holds_secret(&body), "an answer holds a token");
        serde_json::from_slice(&body).ok()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path)
            .timeout(Duration::from_secs(10))
            .json(body)
            .send()
            .await
            .expect("an answer")
    }

    pub async fn nodes(&self) -> Vec<NodeView> {
        match self.get("/v2/nodes").await {
            Ok(response) => response.json::<ClusterView>().await.map(|view| view.nodes).unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    /// The node's liveness as the API shows it, or nothing when it is not listed.
    pub async fn node(&self, node_id: &str) -> Option<NodeView> {
        self.nodes().await.into_iter().find(|node| node.node_id.as_str() == node_id)
    }

    /// Submits a task and reads its stream to the end.
    pub async fn run(&self, task: Value) -> Transcript {
        let start = Instant::now();
        let request =
            self.request(Method::POST, "/v2/tasks").header("accept", "text/event-stream").json(&task);
        match request.send().await {
            Ok(response) => read(response, start, usize::MAX).await,
            Err(error) => Transcript { refusal: Value::String(error.to_string()), ..Transcript::default() },
        }
    }

    /// Reads a task's stream, from the start or after an id, `events` events at most.
    pub async fn follow(&self, task_id: &str, after: Option<&str>, events: usize) -> Transcript {
        let start = Instant::now();
        let mut request = self.request(Method::GET, &format!("/v2/tasks/{task_id}/events"));
        if let Some(id) = after {
            request = request.header("last-event-id", id);
        }
        read(request.send().await.expect("an answer"), start, events).await
    }

    /// Reads a task's stream from the start until so many tokens were seen, or to its end.
    pub async fn follow_tokens(&self, task_id: &str, tokens: usize) -> Transcript {
        // One more event than tokens: `started`.
        self.follow(task_id, None, tokens + 1).await
    }

    /// Reads the stream at a path to its end.
    pub async fn follow_at(&self, path: &str) -> Transcript {
        let response = self.request(Method::GET, path).send().await.expect("an answer");
        read(response, Instant::now(), usize::MAX).await
    }

    /// The first changes of the cluster that a follower hears of, name and data of each.
    pub async fn follow_changes(
        &self,
        path: &str,
        at_least: usize,
        patience: Duration,
    ) -> Vec<(String, Value)> {
        let response = self.request(Method::GET, path).send().await.expect("an answer");
        let reading = read(response, Instant::now(), at_least);
        let transcript = tokio::time::timeout(patience, reading).await.expect("changes in time");
        transcript.events.into_iter().map(|(name, _, data)| (name, data)).collect()
    }

    /// Expects a refusal; returns its status and body.
    pub async fn refused(&self, task: &Value) -> (u16, Value) {
        let response = self.post("/v2/tasks", task).await;
        let (status, body) = (response.status().as_u16(), response.bytes().await.unwrap_or_default());
        assert!(!holds_secret(&body), "an answer holds a token");
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }
}

/// What a stream of changes, opened before, brings in this span: name and data of each event.
pub async fn changes_during(response: Response, span: Duration) -> Vec<(String, Value)> {
    assert_eq!(response.status(), 200);
    let (mut decoder, mut body) = (Decoder::new(), response.bytes_stream());
    let mut changes = Vec::new();
    let reading = async {
        while let Some(Ok(bytes)) = body.next().await {
            decoder.push(&bytes);
            while let Some(frame) = decoder.next_frame().expect("an event stream") {
                let Some(data) = &frame.data else { continue };
                let data: Value = serde_json::from_str(data).expect("JSON in every event");
                changes.push((frame.event.to_owned(), data));
            }
        }
    };
    assert!(tokio::time::timeout(span, reading).await.is_err(), "a stream of changes has no end");
    changes
}

async fn read(response: Response, start: Instant, at_most: usize) -> Transcript {
    let header = response.headers().get("x-llorch-task-id").and_then(|value| value.to_str().ok());
    let mut transcript = Transcript {
        status: response.status().as_u16(),
        task_id: header.unwrap_or_default().to_owned(),
        ..Transcript::default()
    };
    if transcript.status != 200 {
        let body = response.bytes().await.unwrap_or_default();
        assert!(!holds_secret(&body), "an answer holds a token");
        transcript.refusal = serde_json::from_slice(&body).unwrap_or_default();
        return transcript;
    }
    let (mut decoder, mut body) = (Decoder::new(), response.bytes_stream());
    let reading = async {
        while let Some(Ok(bytes)) = body.next().await {
            transcript.bytes.extend_from_slice(&bytes);
            decoder.push(&bytes);
            while let Some(frame) = decoder.next_frame().expect("an event stream") {
                let Some(data) = &frame.data else { continue };
                if frame.event == "token" {
                    transcript.first_token_after.get_or_insert_with(|| start.elapsed());
                    transcript.tokens_at.push(Instant::now());
                }
                let data: Value = serde_json::from_str(data).expect("JSON in every event");
                // It comes together with the attempt's first token.
                if frame.event == "started" && data["attempt"].as_u64() > Some(1) {
                    transcript.replaced_at.get_or_insert_with(Instant::now);
                }
                transcript.events.push((frame.event.to_owned(), frame.id.map(str::to_owned), data));
                if transcript.events.len() >= at_most {
                    return;
                }
            }
        }
    };
    assert!(tokio::time::timeout(STREAM_PATIENCE, reading).await.is_ok(), "the stream has no end");
    assert!(!holds_secret(&transcript.bytes), "a stream holds a token");
    transcript.took = start.elapsed();
    transcript
}
