//! The link over HTTP: the routes as they are served, the node's agent behind them, and an engine of the
//! test's own. The control plane's side speaks by the bodies and records that its lanes use.

#![expect(clippy::disallowed_methods, reason = "what the test asks of its own daemon is read whole")]

use std::sync::Arc;
use std::time::Duration;

use attempt_link::records::{Content, RecordDecoder};
use attempt_link::wire::{
    LinkKey, LinkQuery, ResumeOrder, Seen, Start, StartFacts, StartSpec, WrittenStart, write_single,
    write_starts,
};
use axum::Router;
use axum::body::Bytes;
use axum::response::sse::{Event, Sse};
use axum::routing::{get, post};
use daemon_kit::Tokens;
use daemon_kit::auth::Gate;
use daemon_kit::calls::Calls;
use daemon_kit::connections::{ConnLimits, Counts, Streaming};
use daemon_kit::front::{Front, FrontSettings, Shown};
use daemon_kit::hosts::AllowedHosts;
use daemon_kit::tls::TlsPaths;
use futures::stream;
use handoff_watcher::Change;
use node_agent::{Agent, Identity, IntentFile, Node};
use owned_tasks::StreamThreads;
use pool_registry_types::node::Capabilities;
use pool_registry_types::placement::Labels;
use pool_registry_types::task::Workload;
use pool_registry_types::{LogId, MachineId, ModelRef, NodeId, PoolId, TaskId};
use reqwest::StatusCode;
use serde_json::{Value, json};
use task_stream::{Payload, PayloadFormat};
use tokio::sync::mpsc::Sender;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::*;
use crate::api;
use crate::state::App;

/// Nothing here takes as long.
const SOON: Duration = Duration::from_secs(20);
const LIFE: LifeId = LifeId(Uuid::from_u128(0x11fe));
const BOOT: BootId = BootId(Uuid::from_u128(1));
const LOG: LogId = LogId(Uuid::from_u128(0xc));
const CONTROL: &str = "token-of-control";
const NEW_CONTROL: &str = "another-of-control";
const CLIENT: &str = "token-of-clients";

/// A node that is served, and whose engine answers with as many tokens as it is asked for.
struct Served {
    url: String,
    agent: Arc<Agent>,
    client: reqwest::Client,
    tokens: tempfile::NamedTempFile,
    stop: CancellationToken,
    _changes: Sender<Change>,
    _folder: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn engine() -> String {
    let models = json!({"data": [{"id": "m"}]});
    let complete = |asked: axum::Json<Value>| async move {
        let tokens = asked["max_tokens"].as_u64().unwrap();
        let texts = (0..tokens).map(|n| json!({"choices": [{"text": format!("w{n} ")}]}).to_string());
        let end = json!({"choices": [{"text": "", "finish_reason": "length"}],
            "usage": {"completion_tokens": tokens}});
        let events = texts.chain([end.to_string(), "[DONE]".to_owned()]);
        Sse::new(stream::iter(
            events.map(|data| Ok::<_, std::convert::Infallible>(Event::default().data(data))),
        ))
    };
    let routes = Router::new()
        .route("/v1/models", get(|| std::future::ready(axum::Json(models))))
        .route("/v1/completions", post(complete));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

fn token(name: &str, token: &str, scope: &str) -> String {
    format!("[[token]]\nname = \"{name}\"\ntoken = \"{token}\"\nscopes = [\"{scope}\"]\n")
}

async fn serve() -> Served {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().unwrap();
    let node_id = NodeId::new("a").unwrap();
    let identity = Identity {
        node_id: node_id.clone(),
        machine_id: MachineId::new("m").unwrap(),
        boot_id: BOOT,
        address: "http://127.0.0.1:9200".into(),
        version: "0".into(),
        labels: Labels::new(),
        capabilities: Capabilities::default(),
        features: Vec::new(),
    };
    let tokens_file = tempfile::NamedTempFile::new().unwrap();
    let text = token("control", CONTROL, "control") + &token("client", CLIENT, "client");
    std::fs::write(&tokens_file, text).unwrap();
    let tokens = Tokens::load(None, Some(tokens_file.path().to_owned())).unwrap();
    let settings = FrontSettings {
        prefix: "POOL_MANAGERD",
        addr: "127.0.0.1:0".parse().unwrap(),
        metrics_addr: None,
        max_connections: None,
        tls: TlsPaths::default(),
        audit_log: None,
        spans: None,
    };
    let front = Front::open(&settings).await.unwrap();
    let url = format!("http://{}", front.bound);
    let intent_file = IntentFile::new(folder.path(), folder.path(), &node_id);
    let agent = Agent::new(identity, Duration::from_secs(10), 1, intent_file, front.loops.clone());
    agent.keep_streams(64 * 1024 * 1024);
    agent.keep_links();
    agent.take_links_of(LIFE);
    let (send, changes) = tokio::sync::mpsc::channel(1);
    agent.follow_handoffs(changes);
    let handoff = json!({"pool_id": "p", "replica_id": "r0", "engine": "openai", "models": ["m"],
        "slots": 4, "url": engine().await});
    let handoff = serde_json::from_value(handoff).unwrap();
    send.send(Change::Bound { file: "p-r0.json".into(), handoff }).await.unwrap();
    let (counts, calls) = (Arc::new(Counts::default()), Arc::new(Calls::default()));
    let app = Arc::new(App {
        agent: Arc::clone(&agent),
        own: Node::new(Arc::clone(&agent)),
        alone: true,
        tokens: tokens.clone(),
        connections: Arc::clone(&counts),
        calls: Arc::clone(&calls),
        certificate: None,
    });
    let gate = Gate {
        tokens,
        needs: api::needs,
        certificate: None,
        nodes_show_certificates: false,
        quota: None,
        origins: Vec::new(),
        hosts: AllowedHosts::default(),
        shapes: None,
    };
    let stop = CancellationToken::new();
    let threads = StreamThreads::start(1).unwrap();
    agent.stream_on(threads.clone());
    let streaming = Streaming { threads, is_stream: api::is_stream };
    let limits = ConnLimits::default();
    let shown = Shown {
        routes: api::router(app),
        page: None,
        gate,
        counts,
        calls,
        limits,
        streaming,
        answers_after_end: None,
        open_routes: Router::new(),
    };
    front.serve(shown, &TaskTracker::new(), &stop);
    let client = reqwest::Client::new();
    let served = Served { url, agent, client, tokens: tokens_file, stop, _changes: send, _folder: folder };
    let ready = async {
        while !served.agent.pools().first().is_some_and(|pool| pool.ready) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, ready).await.unwrap();
    served
}

impl Served {
    async fn get(&self, query: &LinkQuery) -> reqwest::Response {
        let request = self.client.get(format!("{}{}", self.url, query.path())).bearer_auth(CONTROL);
        tokio::time::timeout(SOON, request.send()).await.unwrap().unwrap()
    }

    async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> (StatusCode, Value) {
        let request = self.client.post(format!("{}{path}", self.url)).bearer_auth(CONTROL).body(body);
        let answer = tokio::time::timeout(SOON, request.send()).await.unwrap().unwrap();
        (answer.status(), answer.json().await.unwrap())
    }

    /// A link that is named at once.
    async fn open(&self, n: u64) -> Link {
        let query = LinkQuery { boot_id: BOOT, life: LIFE, lane: 0, n };
        let mut link =
            Link { answer: self.get(&query).await, key: query.key(), decoder: RecordDecoder::new() };
        assert_eq!(link.answer.status(), StatusCode::OK);
        assert_eq!(link.answer.headers()["content-type"], "application/octet-stream");
        assert_eq!(link.answer.headers()["x-accel-buffering"], "no");
        let Some((_, Content::Hello(hello))) = link.next().await else { panic!("no hello") };
        assert_eq!((hello.node_id.as_str(), hello.boot_id), ("a", BOOT));
        let named = json!({"life": LIFE, "lane": 0, "n": n}).to_string();
        assert_eq!(
            self.post(paths::ATTEMPTS_CONTROL, named).await,
            (StatusCode::OK, json!({"unknown": [], "gone": []}))
        );
        link
    }
}

struct Link {
    answer: reqwest::Response,
    key: LinkKey,
    decoder: RecordDecoder,
}

impl Link {
    /// The next record that is not `alive`: number, first, count and bytes, and what it says.
    async fn next(&mut self) -> Option<((u64, u64, u32, Bytes), Content)> {
        loop {
            while let Some(record) = self.decoder.next_record().unwrap() {
                let content = Content::read(&record).unwrap();
                if !matches!(content, Content::Alive(_)) {
                    let head = record.head;
                    return Some(((head.number, head.first, head.count, record.bytes), content));
                }
            }
            let bytes = tokio::time::timeout(SOON, self.answer.chunk()).await.unwrap().unwrap()?;
            self.decoder.push(bytes);
        }
    }

    /// All frames of attempts up to their ends, by their numbers, which must be these.
    async fn whole(&mut self, numbers: &[u64]) -> Vec<String> {
        let mut frames = vec![(String::new(), 0_u64, false); numbers.len()];
        while frames.iter().any(|(_, _, over)| !over) {
            let ((number, first, count, bytes), content) = self.next().await.unwrap();
            let at = numbers.iter().position(|other| *other == number).expect("a number of ours");
            let (text, next, over) = &mut frames[at];
            match content {
                Content::Accepted(_) => {}
                Content::Frames => {
                    assert_eq!(first, *next);
                    *next += u64::from(count);
                    text.push_str(std::str::from_utf8(&bytes).unwrap());
                }
                Content::End(_) => {
                    assert_eq!(first, *next);
                    *over = true;
                }
                other => panic!("{number}: {other:?}"),
            }
        }
        frames.into_iter().map(|(text, ..)| text).collect()
    }
}

fn attempt(n: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(n))
}

fn start(number: u64, prompt: &str, tokens: u32) -> Start {
    let facts = StartFacts {
        number,
        pool_id: PoolId::new("p").unwrap(),
        attempt_id: attempt(u128::from(number)),
        task_id: TaskId(Uuid::from_u128(0xa)),
        log_id: LOG,
        first_index: 0,
        deadline_ms: None,
        replica_hint: None,
        resume: None,
        spec: StartSpec {
            model_ref: ModelRef::new("m").unwrap(),
            workload: Workload::default(),
            reasoning: None,
            max_tokens: Some(tokens),
        },
        payload_format: PayloadFormat::Native,
        keep: true,
        traceparent: String::new(),
        correlation_id: String::new(),
        tracestate: String::new(),
        caller: None,
    };
    let bytes = json!({"model_ref": "m", "prompt": prompt}).to_string().into();
    Start::new(facts, &Payload { format: PayloadFormat::Native, bytes })
}

fn written(start: &Start) -> WrittenStart {
    WrittenStart::new(start)
}

// CLOUD-2605
// CLOUD-2610
// CLOUD-2631
#[tokio::test]
async fn attempts_of_small_and_large_payloads_share_a_link_and_are_read_again_over_the_next_one() {
    let node = serve().await;
    let mut link = node.open(1).await;
    let body =
        write_starts(link.key, &[written(&start(1, "x", 3)), written(&start(2, "y", 40))], &[], &[]).unwrap();
    assert_eq!(node.post(paths::ATTEMPTS, body).await, (StatusCode::OK, json!({})));
    let large = written(&start(3, &"z".repeat(300 * 1024), 2));
    assert!(large.goes_alone());
    let body = write_single(link.key, &large).unwrap().concat();
    let path = paths::attempt(attempt(3));
    assert_eq!(node.post(&path, body).await, (StatusCode::OK, json!({})));
    let texts = link.whole(&[1, 2, 3]).await;
    for (text, tokens) in texts.iter().zip([3, 40, 2]) {
        assert_eq!(text.matches("event: token").count(), tokens, "{text}");
        assert!(text.contains(&format!("\"tokens_out\":{tokens},")), "{text}");
        assert!(!text.contains("report-seq") && !text.contains(": ka"), "{text}");
    }
    let body = write_single(link.key, &written(&start(8, "z", 1))).unwrap().concat();
    assert_eq!(node.post(&path, body).await.0, StatusCode::OK);
    let Some(((8, ..), Content::Refused(refused))) = link.next().await else { panic!("another's path") };
    assert_eq!(refused.code, ErrorCode::InvalidParams);
    drop(link);
    let mut link = node.open(2).await;
    let orders = [(4, 2, 0), (5, 7, 0), (6, 1, 9)].map(|(number, n, from)| ResumeOrder {
        attempt_id: attempt(n),
        log_id: LOG,
        from,
        number,
    });
    let body = json!({"life": LIFE, "lane": 0, "n": 2, "resume": orders}).to_string();
    let (status, answer) = node.post(paths::ATTEMPTS_CONTROL, body).await;
    assert_eq!((status, answer), (StatusCode::OK, json!({"unknown": [attempt(7)], "gone": [attempt(1)]})));
    assert_eq!(link.whole(&[4]).await, [texts[1].clone()]);
    let seen = [Seen { number: 4, next: 41 }];
    let body = write_starts(link.key, &[], &seen, &[1, 2, 3].map(attempt)).unwrap();
    assert_eq!(node.post(paths::ATTEMPTS, body).await.0, StatusCode::OK);
    assert_eq!(node.agent.held_bytes(), 0);
}

// CLOUD-2611
// CLOUD-2612
// CLOUD-2613
#[tokio::test]
async fn who_names_another_boot_life_lane_or_link_hears_which() {
    let node = serve().await;
    let link = node.open(3).await;
    let mine = LinkQuery { boot_id: BOOT, life: LIFE, lane: 0, n: 4 };
    for (query, status, code) in [
        (LinkQuery { boot_id: BootId(Uuid::from_u128(2)), ..mine }, 409, "WRONG_NODE"),
        (LinkQuery { n: 3, ..mine }, 409, "STALE_LINK"),
        (LinkQuery { life: LifeId(Uuid::from_u128(2)), ..mine }, 409, "STALE_LINK"),
        (LinkQuery { lane: 256, ..mine }, 400, "INVALID_PARAMS"),
    ] {
        let answer = node.get(&query).await;
        assert_eq!(answer.status(), status, "{query:?}");
        assert_eq!(answer.json::<Value>().await.unwrap()["code"], code, "{query:?}");
    }
    let stale = LinkKey { n: 2, ..link.key };
    let (status, answer) = node.post(paths::ATTEMPTS, write_starts(stale, &[], &[], &[]).unwrap()).await;
    assert_eq!((status.as_u16(), &answer["code"]), (409, &json!("STALE_LINK")));
    for (path, body) in [
        (paths::ATTEMPTS.to_owned(), "{}"),
        (paths::ATTEMPTS_CONTROL.to_owned(), "[]"),
        (paths::attempt(attempt(1)), "no line"),
    ] {
        let (status, answer) = node.post(&path, body).await;
        assert_eq!((status.as_u16(), &answer["code"]), (400, &json!("INVALID_PARAMS")), "{path}");
    }
}

// CLOUD-1110
// CLOUD-2656
#[tokio::test]
async fn only_the_scope_control_opens_a_link_and_one_whose_token_is_gone_takes_no_start() {
    let node = serve().await;
    let query = LinkQuery { boot_id: BOOT, life: LIFE, lane: 0, n: 1 };
    let client = &node.client;
    for (token, status) in [(CLIENT, 403), ("nobody's", 401)] {
        let get = client.get(format!("{}{}", node.url, query.path()));
        let mut requests = vec![get];
        for path in [paths::ATTEMPTS, paths::ATTEMPTS_CONTROL, &paths::attempt(attempt(1))] {
            requests.push(client.post(format!("{}{path}", node.url)).body("{}"));
        }
        for request in requests {
            assert_eq!(request.bearer_auth(token).send().await.unwrap().status(), status);
        }
    }
    let link = node.open(1).await;
    let text = std::fs::read_to_string(&node.tokens).unwrap();
    // The same token, which may do less.
    let text = text.replace("\"control\"", "\"node\"") + &token("new", NEW_CONTROL, "control");
    std::fs::write(&node.tokens, text).unwrap();
    let body = write_starts(link.key, &[written(&start(1, "x", 1))], &[], &[]).unwrap();
    let refused = async {
        loop {
            node.agent.check_links();
            let request = client.post(format!("{}{}", node.url, paths::ATTEMPTS)).body(body.clone());
            let answer = request.bearer_auth(NEW_CONTROL).send().await.unwrap();
            assert_eq!(answer.status(), 401);
            let answer: Value = answer.json().await.unwrap();
            if answer["message"].as_str().unwrap().contains("opened with") {
                break;
            }
        }
    };
    tokio::time::timeout(SOON, refused).await.unwrap();
    assert_eq!(node.agent.running(), 0);
}
