//! Readers that come and go, on an engine of the test's own that makes a token when it may.

use std::time::Duration;

use pool_registry_types::ModelRef;
use pool_registry_types::task::TaskRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;
use uuid::Uuid;

use super::*;
use crate::attempt_log::tests::{asked, node, pool};

/// Nothing here takes as long.
const SOON: Duration = Duration::from_secs(10);

/// An engine that makes so many tokens, each when it may, and so long.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) url: String,
    pub(crate) may: Arc<Semaphore>,
    /// A request was given up by the node.
    pub(crate) given_up: Arc<Notify>,
}

impl Engine {
    pub(crate) async fn start() -> Self {
        Self::making(3, 0).await
    }

    async fn making(tokens: usize, more_bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let engine = Self { url, may: Arc::new(Semaphore::new(0)), given_up: Arc::default() };
        let (may, given_up) = (Arc::clone(&engine.may), Arc::clone(&engine.given_up));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&may), Arc::clone(&given_up), (tokens, more_bytes)));
            }
        });
        engine
    }
}

async fn serve(mut stream: TcpStream, may: Arc<Semaphore>, given_up: Arc<Notify>, makes: (usize, usize)) {
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
            return complete(stream, &may, &given_up, makes).await;
        }
    }
}

async fn complete(mut stream: TcpStream, may: &Semaphore, given_up: &Notify, makes: (usize, usize)) {
    let (tokens, more_bytes) = makes;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    for n in 0..tokens {
        let mut byte = [0];
        tokio::select! {
            permit = may.acquire() => permit.unwrap().forget(),
            _ = stream.read(&mut byte) => return given_up.notify_one(),
        }
        let end =
            if n + 1 == tokens { r#","stop":true,"stop_type":"limit","tokens_predicted":3"# } else { "" };
        let more = "x".repeat(more_bytes);
        let event = format!("data: {{\"content\":\"w{n} {more}\"{end}}}\n\n");
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        // The node may have given the request up.
        if stream.write_all(chunk.as_bytes()).await.is_err() {
            return given_up.notify_one();
        }
    }
    let _ = stream.write_all(b"0\r\n\r\n").await;
}

fn begin(agent: &Arc<Agent>, attempt: u128, retention: Retention) -> Inference {
    let request = asked(attempt, TaskRequest::completion(ModelRef::new("m").unwrap(), "x"), None);
    agent.infer(&pool(), request, 100, retention, None).unwrap()
}

pub(crate) fn id(attempt: u128) -> AttemptId {
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

// CLOUD-1515
#[tokio::test]
async fn a_comment_comes_after_a_second_without_anything_and_none_while_tokens_flow() {
    // Polled by its reader, and by a task of its own.
    for (attempt, retention) in [(1, Retention::Attached), (2, Retention::Keep)] {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::making(30, 0).await;
        let agent = node(&folder, engine.url.clone());
        let mut reader = begin(&agent, attempt, retention).reader;
        let may = Arc::clone(&engine.may);
        // Tokens flow for longer than a second, and then none comes for as long.
        let pacing = tokio::spawn(async move {
            for _ in 0..28 {
                may.add_permits(1);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        let (mut comments, mut all, mut before) = (0, String::new(), Instant::now());
        while !all.contains("report-seq") {
            let Some(bytes) = timeout(SOON, reader.next()).await.unwrap() else { break };
            if bytes.as_ref() == KEEP_ALIVE {
                // Tokens come each 50 ms. The time is taken a little late, more so on a slow machine.
                assert!(before.elapsed() >= KEEP_ALIVE_AFTER / 2, "{:?} after {all}", before.elapsed());
                comments += 1;
                if all.contains("w27 ") {
                    engine.may.add_permits(2);
                }
            } else {
                all.push_str(std::str::from_utf8(&bytes).unwrap());
            }
            before = Instant::now();
        }
        pacing.await.unwrap();
        assert!(comments >= 1 && all.contains("w29 "), "{comments} comments in {all}");
    }
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
        let refused = agent.infer(&pool(), request, 100, Retention::Keep, None).unwrap_err();
        assert_eq!(refused.code.as_str(), "ATTEMPT_DUPLICATE");
    }
}

// CLOUD-1562
// CLOUD-1565
#[tokio::test]
async fn over_an_exchange_the_end_of_the_connection_is_the_stop_and_the_last_byte_makes_it_done() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut exchange = begin(&agent, 1, Retention::Attached).reader.into_exchange();
    assert_eq!(agent.held_bytes(), 512 + 100, "the request is counted until the engine has it");
    engine.may.add_permits(1);
    let mut seen = String::new();
    while !seen.contains("w0 ") {
        let Ok(bytes) = timeout(SOON, exchange.next()).await.unwrap().unwrap();
        seen.push_str(std::str::from_utf8(&bytes).unwrap());
    }
    assert_eq!(agent.held_bytes(), 512, "what was handed over is not kept");
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

/// Waits for what others bring about.
async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("not within its time: {what}"));
}

// CLOUD-1560
// CLOUD-1567
#[tokio::test]
async fn a_reader_that_stands_still_keeps_neither_another_one_nor_a_stop_from_its_attempt() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut still = begin(&agent, 1, Retention::Keep);
    engine.may.add_permits(1);
    let before = read_until(&mut still.reader, "w0 ").await;
    // It is there, and is not asked for more.
    let mut again = agent.resume(&id(1), 0).unwrap();
    engine.may.add_permits(1);
    let all = read_until(&mut again.reader, "w1 ").await;
    assert!(all.starts_with(&before), "{all}");
    agent.stop_attempt(&id(1));
    timeout(SOON, engine.given_up.notified()).await.unwrap();
    assert_eq!(agent.running(), 0);
    assert_eq!(read_until(&mut again.reader, "more").await, "");
    assert_eq!(read_until(&mut still.reader, "more").await, "");
    assert_eq!(timeout(SOON, still.reader.next()).await.unwrap(), None, "also when it is asked again");
}

// CLOUD-1560
#[tokio::test]
async fn an_attached_attempt_is_its_readers_until_that_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut first = begin(&agent, 1, Retention::Attached);
    engine.may.add_permits(1);
    read_until(&mut first.reader, "w0 ").await;
    assert_eq!(agent.resume(&id(1), 1).unwrap_err(), ResumeError::Gone);
    drop(first.reader);
    let mut again = agent.resume(&id(1), 1).unwrap();
    engine.may.add_permits(2);
    let rest = read_until(&mut again.reader, "report-seq").await;
    assert!(rest.contains("w1 ") && rest.contains("event: end") && !rest.contains("w0 "), "{rest}");
    assert_eq!((agent.held_bytes(), agent.drivers.lock().len()), (0, 0));
}

// CLOUD-1563
#[tokio::test]
async fn an_attempt_that_has_no_reader_for_its_time_is_ended_at_its_engine_and_its_end_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    let mut read = begin(&agent, 1, Retention::Keep);
    engine.may.add_permits(1);
    read_until(&mut read.reader, "w0 ").await;
    drop(read.reader);
    let now = agent.now();
    let due = agent.expire_held(now).unwrap();
    assert!(due > now && due <= now + Duration::from_secs(15));
    assert_eq!(agent.running(), 1);
    agent.expire_held(due);
    timeout(SOON, engine.given_up.notified()).await.unwrap();
    until("its end is kept", || agent.with_core(|core, _| core.held().has_ended(&id(1)))).await;
    let mut again = agent.resume(&id(1), 1).unwrap();
    let rest = read_until(&mut again.reader, "report-seq").await;
    assert!(rest.contains("CANCELED"), "{rest}");
}

// CLOUD-1563
#[tokio::test]
#[ignore = "long"]
async fn what_nobody_reads_ends_within_twenty_seconds_without_a_control_plane_or_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    let agent = node(&folder, engine.url.clone());
    agent.keep_streams(1 << 24);
    let mut read = begin(&agent, 1, Retention::Keep);
    engine.may.add_permits(1);
    read_until(&mut read.reader, "w0 ").await;
    drop(read.reader);
    timeout(Duration::from_secs(20), engine.given_up.notified()).await.unwrap();
    agent.stop().await;
}

// CLOUD-1561
#[tokio::test]
async fn a_reader_that_is_behind_holds_the_engine_back_and_gets_all_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::making(400, 16 * 1024).await;
    engine.may.add_permits(400);
    let agent = node(&folder, engine.url.clone());
    agent.with_core(|core, _| core.bound_attempts(256 * 1024));
    // It goes, so that the driver goes on by itself.
    drop(begin(&agent, 1, Retention::Attached).reader);
    let mut reader = agent.resume(&id(1), 0).unwrap().reader;
    until("the window is full", || agent.held_bytes() > 256 * 1024).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(agent.running(), 1, "with {} bytes before its reader", agent.held_bytes());
    let all = read_until(&mut reader, "report-seq").await;
    assert!(all.contains("event: end") && all.matches("event: token").count() == 400, "{} bytes", all.len());
}

// CLOUD-1561
#[tokio::test]
async fn a_kept_answer_beyond_its_bound_ends_as_too_long_with_what_came_before() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::making(400, 16 * 1024).await;
    let agent = node(&folder, engine.url.clone());
    agent.with_core(|core, _| core.bound_attempts(256 * 1024));
    let mut reader = begin(&agent, 1, Retention::Keep).reader;
    engine.may.add_permits(1);
    let before = read_until(&mut reader, "event: token").await;
    // All but the last, for which the engine waits.
    engine.may.add_permits(398);
    let all = before + &read_until(&mut reader, "report-seq").await;
    assert!(all.contains("w0 ") && all.contains("PAYLOAD_TOO_LARGE"), "{} bytes", all.len());
    assert!(all.len() < 260 * 1024, "{} bytes", all.len());
    timeout(SOON, engine.given_up.notified()).await.unwrap();
}

// CLOUD-1568
#[tokio::test]
async fn a_node_that_leaves_waits_for_the_ends_that_it_has_kept() {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::start().await;
    engine.may.add_permits(3);
    let agent = node(&folder, engine.url.clone());
    let mut reader = begin(&agent, 1, Retention::Keep).reader;
    read_until(&mut reader, "report-seq").await;
    let leaving = {
        let agent = Arc::clone(&agent);
        tokio::spawn(async move { agent.drain_and_leave(Duration::from_secs(60)).await })
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!leaving.is_finished());
    agent.done(&id(1));
    timeout(SOON, leaving).await.unwrap().unwrap();
}
