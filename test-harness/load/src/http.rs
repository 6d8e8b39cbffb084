//! A client that costs little: one request, its stream read for token markers, times taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::ValueEnum;
use http_body_util::{BodyExt, Full};
use hyper::{Request, header};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

/// What one request brought.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) first_token: Duration,
    pub(crate) tokens: usize,
}

/// In which API one asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Api {
    /// Tasks of ours, and the completions of llama.cpp's own API.
    V2,
    /// Chat completions of OpenAI's.
    V1,
}

fn chat_task(tokens: u32) -> Value {
    json!({
        "model": "fake-model", "stream": true, "max_tokens": tokens,
        "messages": [{"role": "user", "content": "x"}]
    })
}

/// What stands once in each token's chunk of a chat.
const CHAT_MARKER: &[u8] = b"\"delta\":{\"content\"";

/// Asks for completions, of one endpoint or of several in turn.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    client: Client<HttpConnector, Full<Bytes>>,
    urls: Arc<[String]>,
    turn: Arc<AtomicUsize>,
    authorization: Option<String>,
    /// What stands once in each token's event, and in no other.
    token_marker: &'static [u8],
    task: fn(u32) -> Value,
    /// Tokens that all its requests have brought so far.
    all: Arc<AtomicU64>,
    /// Requests of its that have brought a token.
    begun: Arc<AtomicU64>,
}

fn client() -> Client<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).pool_max_idle_per_host(1024).build(connector)
}

impl Caller {
    /// Fake engines, or what speaks like one.
    pub(crate) fn engines(urls: &[String], api: Api) -> Self {
        match api {
            Api::V2 => Self::new(
                urls,
                "/completion",
                b"\"stop\":false",
                |tokens| json!({"prompt": "x", "stream": true, "n_predict": tokens}),
            ),
            Api::V1 => Self::new(urls, "/v1/chat/completions", CHAT_MARKER, chat_task),
        }
    }

    /// Through both daemons.
    pub(crate) fn cluster(url: &str, token: &str, api: Api) -> Self {
        let urls = [url.to_owned()];
        let caller = match api {
            Api::V2 => Self::new(
                &urls,
                "/v2/tasks",
                b"event: token",
                |tokens| json!({"model_ref": "fake-model", "prompt": "x", "max_tokens": tokens}),
            ),
            Api::V1 => Self::new(&urls, "/v1/chat/completions", CHAT_MARKER, chat_task),
        };
        Self { authorization: Some(format!("Bearer {token}")), ..caller }
    }

    fn new(urls: &[String], path: &str, token_marker: &'static [u8], task: fn(u32) -> Value) -> Self {
        Self {
            client: client(),
            urls: urls.iter().map(|url| format!("{url}{path}")).collect(),
            turn: Arc::default(),
            authorization: None,
            token_marker,
            task,
            all: Arc::default(),
            begun: Arc::default(),
        }
    }

    /// Tokens that this caller and its clones have seen.
    pub(crate) fn tokens_seen(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }

    /// Requests of this caller and its clones that have brought a token.
    pub(crate) fn streams_begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// One request to its end. Panics on anything but a whole answer.
    pub(crate) async fn run(&self, tokens: u32) -> Seen {
        let start = Instant::now();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.urls.len();
        let mut request = Request::post(&self.urls[turn])
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "text/event-stream");
        if let Some(value) = &self.authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        let body = Full::new(Bytes::from((self.task)(tokens).to_string()));
        let request = request.body(body).expect("a well-formed request");
        let response = self.client.request(request).await.expect("an answer");
        assert_eq!(response.status(), 200, "a refusal");
        let (mut first, mut seen, mut tail) = (None, 0, Vec::new());
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.expect("a whole stream").into_data() else { continue };
            // A marker may be split between two pieces.
            tail.extend_from_slice(&data);
            let (found, keep) = count(&tail, self.token_marker);
            seen += found;
            self.all.fetch_add(found as u64, Ordering::Relaxed);
            tail.drain(..keep);
            if seen > 0 && first.is_none() {
                first = Some(start.elapsed());
                self.begun.fetch_add(1, Ordering::Relaxed);
            }
        }
        assert_eq!(seen, tokens as usize, "tokens were lost or doubled");
        Seen { first_token: first.expect("at least one token"), tokens: seen }
    }
}

/// Markers in the bytes, and how many bytes are done with.
fn count(bytes: &[u8], token_marker: &[u8]) -> (usize, usize) {
    let (mut found, mut at, mut done) = (0, 0, 0);
    while let Some(offset) = bytes[at..].iter().position(|b| *b == token_marker[0]) {
        at += offset;
        if bytes[at..].len() < token_marker.len() {
            return (found, at);
        }
        if bytes[at..].starts_with(token_marker) {
            found += 1;
            at += token_marker.len();
        } else {
            at += 1;
        }
        done = at;
    }
    (found, bytes.len().max(done))
}
