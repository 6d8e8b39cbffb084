//! Readers that come and go, on an engine of the test's own that makes a token when it may.

use std::time::Duration;

use pool_registry_types::ModelRef;
use pool_registry_types::task::TaskRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

use super::*;
use crate::attempt_log::tests::{asked, node, pool};

/// Nothing here takes as long.
const SOON: Duration = Duration::from_secs(10);

/// An engine that makes three tokens, each when it may.
#[derive(Debug)]
struct Engine {
    url: String,
    may: Arc<Semaphore>,
    /// A request was given up by the node.
    given_up: Arc<Notify>,
}

impl Engine {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let engine = Self { url, may: Arc::new(Semaphore::new(0)), given_up: Arc::default() };
        let (may, given_up) = (Arc::clone(&engine.may), Arc::clone(&engine.given_up));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&may), Arc::clone(&given_up)));
            }
        });
        engine
    }
}

async fn serve(mut stream: TcpStream, may: Arc<Semaphore>, given_up: Arc<Notify>) {
    let mut request = Vec::new();
    loop {
        let mut bytes = [0; 4096];
        let read = stream.read(&mut bytes).await.unwrap_or(0);
        if read == 0 {
            return;
        }
        request.extend_from_slice(&bytes[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        if text.starts_with("GET") && text.contains("\r\n\r\n") {
            let is_list = text.starts_with("GET /v1/models");
            let body =
                if is_list { r#"{"data":[{"id":"m"}]}"# } else { r#"{"chat_template":"{{ messages }}"}"# };
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json";
            let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
            request.clear();
        } else if text.starts_with("POST /completion") && text.ends_with('}') {
            return complete(stream, &may, &given_up).await;
        }
    }
}

async fn complete(mut stream: TcpStream, may: &Semaphore, given_up: &Notify) {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    for n in 0..3 {
        let mut byte = [0];
        tokio::select! {
            permit = may.acquire() => permit.unwrap().forget(),
            _ = stream.read(&mut byte) => return given_up.notify_one(),
        }
        let end = if n == 2 { r#","stop":true,"stop_type":"limit","tokens_predicted":3"# } else { "" };
        let event = format!("data: {{\"content\":\"w{n} \"{end}}}\n\n");
        stream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
}

fn begin(agent: &Arc<Agent>, attempt: u128, retention: Retention) -> Inference {
    let request = asked(attempt, TaskRequest::completion(ModelRef::new("m").unwrap(), "x"), None);
    agent.infer(&pool(), request, retention, None).unwrap()
}

fn id(attempt: u128) -> AttemptId {
    AttemptId(Uuid::from_u128(attempt))
}

/// Reads on until the stream has this, or its end.
async fn read_until(reader: &mut AttemptReader, what: &str) -> String {
    let mut all = String::new();
    while !all.contains(what) {
        let Some(bytes) = timeout(SOON, reader.next()).await.unwrap() else { break };
        all.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    all.replace(": ka\n\n", "")
}

// CLOUD-1560
// CLOUD-1566
#[tokio::test]
async fn a_reader_that_is_dropped_ends_nothing_and_another_one_gets_every_byte_from_its_record_on() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut first = begin(&agent, 1, Retention::Keep);
    engine.may.add_permits(1);
    let before = read_until(&mut first.reader, "w0 ").await;
    drop(first.reader);
    engine.may.add_permits(2);
    let mut again = agent.resume(&id(1), 0).unwrap();
    assert_eq!((&again.replica_id, again.report_seq), (&first.replica_id, first.report_seq));
    let all = read_until(&mut again.reader, "report-seq").await;
    assert!(all.starts_with(&before), "{all}");
    let frames = ["w0 ", "w1 ", "w2 ", "event: end"].map(|what| all.matches(what).count());
    assert_eq!(frames, [1; 4], "{all}");
    assert_eq!(read_until(&mut again.reader, "more").await, "");
    // All of it is there until whoever wanted it has it.
    let mut once_more = agent.resume(&id(1), 2).unwrap();
    let rest = read_until(&mut once_more.reader, "report-seq").await;
    assert!(all.ends_with(&rest) && rest.contains("w2 ") && !rest.contains("w1 "), "{rest}");
    assert_eq!(agent.pools()[0].replicas[0].held, [id(1)]);
    agent.done(&id(1));
    assert_eq!(agent.resume(&id(1), 2).unwrap_err(), ResumeError::Gone);
    assert_eq!((agent.held_bytes(), agent.drivers.lock().len()), (0, 0));
    assert!(agent.pools()[0].replicas[0].held.is_empty());
}

// CLOUD-1567
#[tokio::test]
async fn a_stop_reaches_the_engine_with_a_reader_and_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut read = begin(&agent, 1, Retention::Keep);
    engine.may.add_permits(1);
    read_until(&mut read.reader, "w0 ").await;
    read.reader.stop();
    timeout(SOON, engine.given_up.notified()).await.unwrap();
    assert_eq!((agent.held_bytes(), agent.running()), (0, 0));
    // Its slot is given back by the engine's word, or by time.
    agent.with_core(|core, now| core.expire_releases(now + Duration::from_secs(60)));

    let mut detached = begin(&agent, 2, Retention::Keep);
    engine.may.add_permits(1);
    read_until(&mut detached.reader, "w0 ").await;
    drop(detached.reader);
    assert_eq!(agent.running(), 1);
    agent.stop_attempt(&id(2));
    timeout(SOON, engine.given_up.notified()).await.unwrap();
    assert_eq!((agent.held_bytes(), agent.running()), (0, 0));
}

// CLOUD-1567
#[tokio::test]
async fn what_was_stopped_or_asked_for_before_it_came_is_refused_when_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    agent.stop_attempt(&id(1));
    assert_eq!(agent.resume(&id(2), 0).unwrap_err(), ResumeError::Unknown);
    for attempt in [1, 2] {
        let request = asked(attempt, TaskRequest::completion(ModelRef::new("m").unwrap(), "x"), None);
        let refused = agent.infer(&pool(), request, Retention::Keep, None).unwrap_err();
        assert_eq!(refused.code.as_str(), "ATTEMPT_DUPLICATE");
    }
}

// CLOUD-1562
#[tokio::test]
async fn over_an_exchange_the_end_of_the_connection_is_the_stop_and_the_last_byte_makes_it_done() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut exchange = begin(&agent, 1, Retention::Attached).reader.into_exchange();
    engine.may.add_permits(1);
    let mut seen = String::new();
    while !seen.contains("w0 ") {
        let Ok(bytes) = timeout(SOON, exchange.next()).await.unwrap().unwrap();
        seen.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    drop(exchange);
    timeout(SOON, engine.given_up.notified()).await.unwrap();
    assert_eq!((agent.held_bytes(), agent.running()), (0, 0));
    agent.with_core(|core, now| core.expire_releases(now + Duration::from_secs(60)));

    engine.may.add_permits(3);
    let mut reader = begin(&agent, 2, Retention::Attached).reader;
    let all = read_until(&mut reader, "report-seq").await;
    assert!(all.contains("w2 ") && all.contains("event: end"), "{all}");
    assert_eq!((agent.held_bytes(), agent.drivers.lock().len()), (0, 0), "the last byte was handed over");
}
