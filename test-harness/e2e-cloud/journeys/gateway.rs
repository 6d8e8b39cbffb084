//! The routes of OpenAI's and Anthropic's clients, to the byte: an engine that writes down what comes and
//! answers by a script stands behind the real daemons.

use std::time::Duration;

use e2e_cloud::{Client, Cluster, Engine, Options, eventually};
use reqwest::{Method, Response};
use serde_json::{Value, json};

mod constraints;
mod departures;
mod identity;
mod keyed;
mod requests;
mod sse;
mod unqueued;

const CHAT: &str = "/v1/chat/completions";
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer of the engine, to the byte.
#[derive(Debug, Clone)]
struct Script {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    /// Each with how often it comes.
    pieces: Vec<(Vec<u8>, usize)>,
    pause_ms: u64,
    breaks: bool,
}

impl Script {
    fn new(status: u16, content_type: &str) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.as_bytes().to_vec())];
        Self { status, headers, pieces: Vec::new(), pause_ms: 0, breaks: false }
    }

    fn piece(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.pieces.push((bytes.into(), 1));
        self
    }

    /// Of which the body consists.
    fn bytes(&self) -> Vec<u8> {
        let all: Vec<Vec<u8>> = self.pieces.iter().map(|(bytes, times)| bytes.repeat(*times)).collect();
        all.concat()
    }

    fn json(&self) -> Value {
        let pieces = self.pieces.iter().map(|(bytes, times)| json!({"bytes": bytes, "times": times}));
        json!({
            "status": self.status, "headers": self.headers, "pieces": pieces.collect::<Vec<_>>(),
            "pause_ms": self.pause_ms, "breaks": self.breaks,
        })
    }
}

/// What an engine was asked.
#[derive(Debug)]
struct Received {
    path: String,
    query: Option<String>,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

impl Received {
    fn read(seen: &Value) -> Option<Self> {
        let bytes = |list: &Value| -> Option<Vec<u8>> {
            list.as_array()?.iter().map(|byte| u8::try_from(byte.as_u64()?).ok()).collect()
        };
        let headers = seen["headers"].as_array()?.iter();
        Some(Self {
            path: seen["path"].as_str()?.to_owned(),
            query: seen["query"].as_str().map(str::to_owned),
            headers: headers
                .map(|pair| Some((pair[0].as_str()?.to_owned(), bytes(&pair[1])?)))
                .collect::<Option<_>>()?,
            body: bytes(&seen["body"])?,
        })
    }

    fn header(&self, name: &str) -> Option<String> {
        let (_, value) = self.headers.iter().find(|(of, _)| of == name)?;
        Some(String::from_utf8_lossy(value).into_owned())
    }
}

async fn set(engine: &Client, script: &Script) {
    let answer = engine.request(Method::PUT, "/fake/script").json(&script.json()).send().await;
    assert_eq!(answer.expect("an answer").status(), 204);
}

async fn received(engine: &Client) -> Vec<Received> {
    let seen = engine.request(Method::GET, "/fake/received").send().await.expect("an answer");
    let seen: Value = seen.json().await.expect("JSON");
    let seen = seen["requests"].as_array().expect("requests").iter();
    seen.map(|request| Received::read(request).expect("a request")).collect()
}

fn fake(slots: u32) -> Engine {
    Engine::Fake { slots, first_token_ms: 5, pace_ms: 5, dialect: "vllm" }
}

/// A cluster whose engines answer by scripts, and clients of these.
async fn scripted(nodes: usize, slots: u32) -> (Cluster, Vec<Client>) {
    let control = vec![("ORCHESTRATORD_MODEL_ALIASES", "gpt-4o=fake-model".to_owned())];
    let cluster = Cluster::start(Options { nodes, engine: fake(slots), control, ..Options::default() }).await;
    let engines = (0..nodes).map(|n| Client::new(&cluster.engine_url(n), None)).collect();
    (cluster, engines)
}

async fn post(client: &Client, path: &str, body: impl Into<reqwest::Body>) -> Response {
    let request = client.request(Method::POST, path).header("content-type", "application/json").body(body);
    request.timeout(PATIENCE).send().await.expect("an answer")
}

fn chat(tokens: u32) -> Value {
    json!({"model": "fake-model", "stream": true, "max_tokens": tokens, "messages": [{"role": "user", "content": "hi"}]})
}

fn header<'r>(response: &'r Response, name: &str) -> &'r str {
    response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Requests that the engine works on, and that wait there, by its own count.
async fn busy(engine: &Client) -> Option<u64> {
    let busy = engine.get_json("/fake/busy").await?;
    Some(busy["busy"].as_u64()? + busy["waiting"].as_u64()?)
}

/// Waits until nothing of ours runs or waits: by the engine's own count, by the tasks, and by the slots.
async fn is_idle(cluster: &Cluster, engines: &[Client], patience: Duration) {
    for engine in engines {
        eventually("the engine is idle", patience, || async { (busy(engine).await? == 0).then_some(()) })
            .await;
    }
    eventually("no task runs or waits", patience, || async {
        for state in ["running", "queued"] {
            let tasks = cluster.client.get_json(&format!("/v2/tasks?limit=500&state={state}")).await?;
            if !tasks["tasks"].as_array()?.is_empty() {
                return None;
            }
        }
        Some(())
    })
    .await;
    eventually("every slot is free", patience, || async {
        let nodes = cluster.client.nodes().await;
        let mut pools = nodes.iter().flat_map(|node| &node.pools);
        (nodes.len() == engines.len() && pools.all(|pool| pool.slots_free == pool.slots_total)).then_some(())
    })
    .await;
}
