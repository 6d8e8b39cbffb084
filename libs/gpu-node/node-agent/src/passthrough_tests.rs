//! Requests and answers that are passed on, on an engine that answers what the test has written.

use std::sync::atomic::{AtomicUsize, Ordering};

use attempt_link::node::Supply;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use uuid::Uuid;

use super::*;
use crate::attempt_log::tests::{node, pool};
use crate::infer::tests::id;
use crate::records::PassedOn;

/// Nothing here takes as long.
const SOON: Duration = Duration::from_secs(10);

/// What an engine does behind its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Closes,
    /// For its caller.
    Waits,
    /// It sends events, each in a chunk, as long as they are taken.
    GoesOn,
}

/// An engine that answers every request with these bytes.
struct Engine {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
    given_up: Arc<Notify>,
    connections: Arc<AtomicUsize>,
}

impl Engine {
    async fn answering(answer: &'static [u8], then: Then) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let engine =
            Self { url, asked: Arc::default(), given_up: Arc::default(), connections: Arc::default() };
        let connections = Arc::clone(&engine.connections);
        let (asked, given_up) = (Arc::clone(&engine.asked), Arc::clone(&engine.given_up));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(serve(stream, answer, then, Arc::clone(&asked), Arc::clone(&given_up)));
            }
        });
        engine
    }

    fn request(&self) -> String {
        self.asked.lock().last().unwrap().clone()
    }
}

async fn serve(
    mut stream: TcpStream,
    answer: &[u8],
    then: Then,
    asked: Arc<Mutex<Vec<String>>>,
    given_up: Arc<Notify>,
) {
    let mut request = Vec::new();
    loop {
        let mut bytes = [0; 4096];
        let read = stream.read(&mut bytes).await.unwrap_or(0);
        if read == 0 {
            return given_up.notify_one();
        }
        request.extend_from_slice(&bytes[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if length.is_some_and(|length| body.len() < length.parse().unwrap()) {
            continue;
        }
        request.clear();
        if text.starts_with("GET") {
            let list = "HTTP/1.1 200 OK\r\ncontent-length: 21\r\n\r\n{\"data\":[{\"id\":\"m\"}]}";
            stream.write_all(list.as_bytes()).await.unwrap();
            continue;
        }
        asked.lock().push(text);
        stream.write_all(answer).await.unwrap();
        match then {
            Then::Closes => return,
            Then::Waits => {}
            Then::GoesOn => {
                while stream.write_all(b"9\r\ndata: 1\n\n\r\n".as_slice()).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                return given_up.notify_one();
            }
        }
    }
}

fn request(attempt: u128, route: OpenAiRoute, body: &'static str) -> PassedRequest {
    PassedRequest {
        task_id: TaskId(Uuid::from_u128(0xa)),
        attempt_id: id(attempt),
        node_id: NodeId::new("a").unwrap(),
        boot_id: BootId(Uuid::from_u128(1)),
        log_id: LogId(Uuid::from_u128(0xc)),
        replica_hint: None,
        model: ModelRef::new("m").unwrap(),
        passage: Passage {
            route,
            stream: false,
            query: Some("beta=true".into()),
            headers: vec![("openai-beta".into(), "x=1".into()), ("x-title".into(), "t".into())],
            model_at: None,
        },
        body: Bytes::from_static(body.as_bytes()),
    }
}

/// The head, what came behind it, how often, and how it ended.
async fn read(mut on: PassedOn) -> (Option<AnswerHead>, String, u64, Option<ErrorBody>) {
    let (mut head, mut bytes, mut next, mut ended) = (None, Vec::new(), 0, None);
    loop {
        match timeout(SOON, on.reader.next()).await.unwrap() {
            Some(Supply::Head(answer)) => head = Some(answer),
            Some(Supply::Frames { first, count, bytes: more }) => {
                assert_eq!(first, next);
                next += u64::from(count);
                bytes.extend_from_slice(&more);
            }
            Some(Supply::Error(error)) => ended = Some(error),
            Some(Supply::End { next: behind, .. }) => {
                assert_eq!(behind, next);
                return (head, String::from_utf8(bytes).unwrap(), next, ended);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Of a whole exchange: what [`read`] says, and the request as the engine had it.
async fn exchange(
    answer: &'static [u8],
    then: Then,
    route: OpenAiRoute,
) -> (Option<AnswerHead>, String, u64, Option<ErrorBody>, String) {
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::answering(answer, then).await;
    let agent = node(&folder, engine.url.clone());
    let body = "{\"model\" : \"m\", \"x\":1.50, \"x\":2}";
    let on = agent.pass_on(&pool(), request(1, route, body), None).unwrap();
    let (head, bytes, next, ended) = read(on).await;
    (head, bytes, next, ended, engine.request())
}

// CLOUD-2830
#[tokio::test]
async fn a_request_goes_to_the_engines_route_as_it_came_and_the_answer_comes_back_so() {
    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-own: 1\r\nkeep-alive: timeout=5\r\ncontent-length: 9\r\n\r\n{\"a\": 1 }";
    let (head, bytes, next, ended, asked) = exchange(answer, Then::Waits, OpenAiRoute::Embeddings).await;
    let headers = vec![("content-type".into(), "application/json".into()), ("x-own".into(), "1".into())];
    assert_eq!(head, Some(AnswerHead { status: 200, headers }));
    assert_eq!((bytes.as_str(), next, ended), ("{\"a\": 1 }", 9, None));
    assert!(asked.starts_with("POST /v1/embeddings?beta=true HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains("openai-beta: x=1\r\n") && asked.contains("x-title: t\r\n"), "{asked}");
    assert!(asked.contains("content-type: application/json\r\n"), "{asked}");
    assert!(asked.ends_with("\r\n\r\n{\"model\" : \"m\", \"x\":1.50, \"x\":2}"), "{asked}");
}

// CLOUD-2835
#[tokio::test]
async fn of_a_stream_whole_events_are_passed_on_and_without_its_end_its_engine_has_died() {
    let whole = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n: hi\r\n\r\ndata: {\"a\":1}\n\ndata: [DONE]\n\n";
    let (head, bytes, next, ended, _) = exchange(whole, Then::Closes, OpenAiRoute::ChatCompletions).await;
    assert!(head.unwrap().is_event_stream());
    assert_eq!((bytes.as_str(), next), (": hi\r\n\r\ndata: {\"a\":1}\n\ndata: [DONE]\n\n", 3));
    assert_eq!(ended, None);
    let cut = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\ndata: {\"a\":1}\n\ndata: {\"a\"";
    let (_, bytes, next, ended, _) = exchange(cut, Then::Closes, OpenAiRoute::ChatCompletions).await;
    assert_eq!((bytes.as_str(), next), ("data: {\"a\":1}\n\n", 1));
    let ended = ended.unwrap();
    assert_eq!((ended.code, ended.cause), (ErrorCode::WorkerReset, Some(EndCause::EngineDied)));
    let short = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{\"a\":";
    let (_, bytes, _, ended, _) = exchange(short, Then::Closes, OpenAiRoute::Rerank).await;
    assert_eq!((bytes.as_str(), ended.unwrap().cause), ("{\"a\":", Some(EndCause::EngineDied)));
}

// CLOUD-2835
#[tokio::test]
async fn pieces_that_have_arrived_together_are_passed_on_to_the_last_one() {
    for (kind, route) in
        [("text/event-stream", OpenAiRoute::Completions), ("application/json", OpenAiRoute::Embeddings)]
    {
        let mut answer =
            format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n");
        let mut expected = String::new();
        for n in 0..300 {
            let event = if n == 299 { "data: [DONE]\n\n".to_owned() } else { format!("data: {n}\n\n") };
            answer.push_str(&format!("{:x}\r\n{event}\r\n", event.len()));
            expected.push_str(&event);
        }
        answer.push_str("0\r\n\r\n");
        let (_, bytes, _, ended, _) =
            exchange(Box::leak(answer.into_bytes().into()), Then::Waits, route).await;
        assert_eq!((bytes == expected, ended), (true, None), "{kind}");
    }
}

// CLOUD-2836
#[tokio::test]
async fn what_the_client_did_wrong_is_an_answer_and_what_the_engine_could_not_is_an_error() {
    let wrong = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 29\r\n\r\n{\"error\":{\"message\":\"no: x\"}}";
    let (head, bytes, _, ended, _) = exchange(wrong, Then::Waits, OpenAiRoute::Completions).await;
    assert_eq!((head.unwrap().status, bytes.as_str()), (400, "{\"error\":{\"message\":\"no: x\"}}"));
    assert_eq!(ended, None);
    let failed = b"HTTP/1.1 500 Internal\r\ncontent-length: 2\r\n\r\nno";
    let (head, bytes, _, ended, _) = exchange(failed, Then::Waits, OpenAiRoute::Completions).await;
    assert_eq!((head, bytes.as_str()), (None, ""));
    assert_eq!(ended.unwrap().cause, Some(EndCause::Engine5xx));
}

// CLOUD-2837
#[tokio::test]
async fn a_stop_gives_the_engines_request_up_before_and_behind_its_first_byte() {
    let begun = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\na\r\ndata: {}\n\n\r\n";
    for (answer, has_begun) in [(&begun[..], true), (&b""[..], false)] {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::answering(answer, Then::Waits).await;
        let agent = node(&folder, engine.url.clone());
        let mut on = agent.pass_on(&pool(), request(1, OpenAiRoute::Completions, "{}"), None).unwrap();
        if has_begun {
            assert!(matches!(timeout(SOON, on.reader.next()).await.unwrap(), Some(Supply::Head(_))));
            assert!(matches!(timeout(SOON, on.reader.next()).await.unwrap(), Some(Supply::Frames { .. })));
        } else {
            while engine.asked.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        }
        on.reader.stop();
        timeout(SOON, engine.given_up.notified()).await.unwrap();
    }
}

// CLOUD-2850
#[tokio::test]
async fn an_engine_that_goes_on_behind_its_end_is_left_and_one_that_ends_its_answer_keeps_its_connection() {
    let begun = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\ne\r\ndata: [DONE]\n\n\r\n";
    let folder = tempfile::tempdir().unwrap();
    let engine = Engine::answering(begun, Then::GoesOn).await;
    let agent = node(&folder, engine.url.clone());
    let on = agent.pass_on(&pool(), request(1, OpenAiRoute::ChatCompletions, "{}"), None).unwrap();
    let (_, bytes, _, ended) = read(on).await;
    assert!(bytes.starts_with("data: [DONE]\n\n"), "{bytes}");
    assert_eq!(ended, None);
    timeout(SOON, engine.given_up.notified()).await.unwrap();

    let whole = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
    let engine = Engine::answering(whole, Then::Waits).await;
    let agent = node(&folder, engine.url.clone());
    let mut connections = Vec::new();
    for attempt in 2..5 {
        let on = agent.pass_on(&pool(), request(attempt, OpenAiRoute::ChatCompletions, "{}"), None).unwrap();
        assert_eq!(read(on).await.1, "data: [DONE]\n\n");
        connections.push(engine.connections.load(Ordering::Relaxed));
    }
    assert_eq!(connections.first(), connections.last(), "they are used again");
}
