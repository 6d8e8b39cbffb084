//! Attempts on an engine of the test's own, which remembers what each request carried.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use parking_lot::Mutex;
use pool_registry_types::node::Capabilities;
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::task::{ChatMessage, InferRequest, Recovery, Resume, ResumeMode, Role, TaskRequest};
use pool_registry_types::trace::read_traceparent;
use pool_registry_types::{BootId, LogId, MachineId, ModelRef, NodeId};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::*;
use crate::IntentFile;
use crate::agent::Agent;
use node_core::{Identity, Readiness, ReplicaSpec, Retention};

const PROMPT: &str = "a secret of the client's";
const ANSWERS: [(&str, &str, &str); 5] = [
    ("/apply-template", "application/json", r#"{"prompt":"<u>hi</u>"}"#),
    ("/props", "application/json", r#"{"chat_template":"{{ messages }}"}"#),
    ("/detokenize", "application/json", r#"{"content":"w0 "}"#),
    ("/v1/models", "application/json", r#"{"data":[{"id":"m"}]}"#),
    (
        "/completion",
        "text/event-stream",
        "data: {\"content\":\"w1 \",\"stop\":true,\"stop_type\":\"limit\",\"tokens_predicted\":1}\n\n",
    ),
];

/// The path of each request and its headers, in the order in which they came.
type Seen = Arc<Mutex<Vec<(String, BTreeMap<String, String>)>>>;

async fn engine() -> (String, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Seen::default();
    let all = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(BufReader::new(stream), Arc::clone(&all)));
        }
    });
    (url, seen)
}

async fn serve(mut stream: BufReader<TcpStream>, seen: Seen) {
    let mut line = String::new();
    while stream.read_line(&mut line).await.unwrap_or(0) > 0 {
        let target = line.split(' ').nth(1).unwrap_or_default();
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let mut headers = BTreeMap::new();
        loop {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        line.clear();
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        let known = ANSWERS.iter().find(|(known, ..)| *known == path);
        seen.lock().push((path, headers));
        let (status, kind, body) = match known {
            Some((_, kind, body)) => ("200 OK", *kind, *body),
            None => {
                ("400 Bad Request", "application/json", r#"{"error":{"message":"a secret of the client's"}}"#)
            }
        };
        let head =
            format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.get_mut().write_all(head.as_bytes()).await.unwrap();
        stream.get_mut().write_all(body.as_bytes()).await.unwrap();
    }
}

/// A node whose one pool `p` has this engine, which gave the name of its model itself.
pub(crate) fn node(folder: &tempfile::TempDir, url: String) -> Arc<Agent> {
    let node_id = NodeId::new("a").unwrap();
    let intent_file = IntentFile::new(folder.path(), folder.path(), &node_id);
    let identity = Identity {
        node_id,
        machine_id: MachineId::new("m").unwrap(),
        boot_id: BootId(Uuid::from_u128(1)),
        address: "http://127.0.0.1:9200".into(),
        version: "0".into(),
        labels: Labels::new(),
        capabilities: Capabilities::default(),
        features: Vec::new(),
    };
    let agent = Agent::new(identity, Duration::from_secs(10), 1, intent_file, owned_tasks::Loops::default());
    let spec = ReplicaSpec {
        replica_id: ReplicaId::new("r0").unwrap(),
        engine: EngineKind::LlamaCpp,
        engine_version: None,
        url,
        models: vec![ModelRef::new("m").unwrap()],
        engine_names: BTreeMap::new(),
        names_from_engine: true,
        slots: 1,
        ctx_max: None,
        device_mask: None,
        warning: None,
    };
    let stop = CancellationToken::new();
    agent.bind_unless(&stop, &pool(), spec, Some(Readiness::Ready)).unwrap();
    agent
}

pub(crate) fn pool() -> PoolId {
    PoolId::new("p").unwrap()
}

pub(crate) fn asked(attempt: u128, task: TaskRequest, resume: Option<Resume>) -> InferRequest {
    InferRequest {
        task_id: TaskId(Uuid::from_u128(0xa)),
        attempt_id: AttemptId(Uuid::from_u128(attempt)),
        node_id: NodeId::new("a").unwrap(),
        boot_id: BootId(Uuid::from_u128(1)),
        log_id: LogId(Uuid::from_u128(0xc)),
        first_index: u64::from(resume.is_some()),
        replica_hint: None,
        resume,
        thoughts: true,
        task,
    }
}

/// Messages whose first token was sent by an attempt that was lost.
fn continued(attempt: u128) -> InferRequest {
    let model = ModelRef::new("m").unwrap();
    let task = TaskRequest {
        prompt: None,
        messages: Some(vec![ChatMessage { role: Role::User, content: PROMPT.into() }]),
        recovery: Recovery::Continue,
        max_tokens: Some(2),
        ..TaskRequest::completion(model, "")
    };
    let resume = Resume {
        mode: ResumeMode::Append,
        text: "w0 ".into(),
        reasoning: String::new(),
        token_ids: vec![0],
        tokens: 1,
    };
    asked(attempt, task, Some(resume))
}

/// An embedding, which this engine does not have.
fn refused(attempt: u128) -> InferRequest {
    let task =
        serde_json::json!({"workload": "embedding", "model_ref": "m", "inputs": {"embedding": [PROMPT]}});
    asked(attempt, serde_json::from_value(task).unwrap(), None)
}

fn trace() -> TraceContext {
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned();
    TraceContext { traceparent, correlation_id: "order-7".into(), tracestate: "vendor=x".into() }
}

async fn run(agent: &Arc<Agent>, request: InferRequest, trace: Option<&TraceContext>) -> String {
    let exchange =
        agent.infer(&pool(), request, 100, Retention::Attached, trace).unwrap().reader.into_exchange();
    let pieces: Vec<_> = exchange.map(|Ok(bytes)| bytes).collect().await;
    String::from_utf8(pieces.concat()).unwrap()
}

// CLOUD-1151
// CLOUD-1153
// CLOUD-1943
#[tokio::test]
async fn every_request_to_an_engine_for_one_attempt_carries_the_same_child_of_the_clients_trace() {
    let folder = tempfile::tempdir().unwrap();
    let (url, seen) = engine().await;
    let agent = node(&folder, url);
    let fresh = asked(1, TaskRequest::completion(ModelRef::new("m").unwrap(), PROMPT), None);
    let mut parents = Vec::new();
    for (request, asks) in [
        // Over a connection that is new the engine is asked whether it still has the model.
        (fresh, &["/completion", "/props", "/v1/models"][..]),
        (continued(2), &["/apply-template", "/props", "/detokenize", "/completion"]),
    ] {
        let attempt_id = request.attempt_id.to_string();
        let stream = run(&agent, request, Some(&trace())).await;
        assert!(stream.contains("\"t\":\"w1 \"") && stream.contains("event: end"), "{stream}");
        let requests = std::mem::take(&mut *seen.lock());
        let paths: Vec<&str> = requests.iter().map(|(path, _)| path.as_str()).collect();
        // The pool may have made one connection more than it needed, which then is new too.
        assert!(paths.starts_with(asks), "{paths:?}");
        let traceparent = requests[0].1["traceparent"].clone();
        for (path, headers) in &requests {
            let reported = ["traceparent", "tracestate", "x-correlation-id", "x-request-id"]
                .map(|name| headers[name].as_str());
            assert_eq!(
                reported,
                [traceparent.as_str(), "vendor=x", "order-7", attempt_id.as_str()],
                "{path}"
            );
        }
        assert_eq!(read_traceparent(&traceparent).as_ref(), Some(&traceparent));
        let passed_on = TraceContext { traceparent: traceparent.clone(), ..trace() };
        assert_eq!(passed_on.trace_id(), trace().trace_id());
        parents.push(traceparent);
    }
    assert!(parents[0] != parents[1] && !parents.contains(&trace().traceparent), "{parents:?}");
    run(&agent, continued(3), None).await;
    let ours = |name: &str| ["traceparent", "tracestate", "x-correlation-id", "x-request-id"].contains(&name);
    assert!(!seen.lock().iter().any(|(_, headers)| headers.keys().any(|name| ours(name))));
}

// CLOUD-1152
#[tokio::test]
async fn each_line_of_an_attempt_names_its_ids_and_nothing_of_its_prompt() {
    // Beside a single subscriber, what other threads log first is nobody's from then on.
    let _other = tracing::Dispatch::new(tracing_subscriber::registry());
    let (mut reader, writer) = std::io::pipe().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(std::sync::Mutex::new(writer))
        .finish();
    let logging = tracing::subscriber::set_default(subscriber);
    let folder = tempfile::tempdir().unwrap();
    let (url, _) = engine().await;
    let agent = node(&folder, url);
    let trace = trace();
    run(&agent, continued(1), Some(&trace)).await;
    let again = agent.infer(&pool(), continued(1), 100, Retention::Attached, Some(&trace)).unwrap_err();
    assert_eq!(again.code.as_str(), "ATTEMPT_DUPLICATE");
    assert!(run(&agent, refused(2), Some(&trace)).await.contains("event: error"));
    agent.infer(&pool(), continued(3), 100, Retention::Attached, Some(&trace)).unwrap().reader.stop();
    drop(logging);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(!text.contains(PROMPT), "{text}");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lines = lines.iter().filter(|line| line["attempt_id"].is_string());
    let reported: Vec<_> = lines
        .map(|line| {
            let ids = ["correlation_id", "trace_id", "task_id"].map(|name| line[name].as_str().unwrap());
            assert_eq!(ids, ["order-7", trace.trace_id(), "00000000-0000-0000-0000-00000000000a"], "{line}");
            let attempt = line["attempt_id"].as_str().unwrap().chars().last().unwrap();
            (
                attempt,
                line["level"].as_str().unwrap().to_owned(),
                line["message"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let reported: Vec<_> =
        reported.iter().map(|(n, level, what)| (*n, level.as_str(), what.as_str())).collect();
    let expected = [
        ('1', "DEBUG", "an attempt is accepted"),
        ('1', "INFO", "an attempt has ended"),
        ('1', "DEBUG", "an attempt is refused"),
        ('2', "DEBUG", "an attempt is accepted"),
        ('2', "INFO", "an attempt has failed"),
        ('3', "DEBUG", "an attempt is accepted"),
        ('3', "INFO", "an attempt is stopped before its end"),
    ];
    assert_eq!(reported, expected, "{text}");
}
