//! Streamed answers. The status waits for the engine's first event, for a while; from then on the client
//! hears comments until that comes, then the engine's own events, and one error event of ours where they
//! break off. While what it has is generated again it hears comments too.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use daemon_kit::ApiError;
use futures::stream;
use openai_gateway::error;
use pool_registry_types::task::TaskState;
use pool_registry_types::{ErrorBody, ErrorCode};
use task_stream::{EndMarker, OpenAiRoute};
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::{failed, name, passed};
use super::passed_events::PassedEvents;
use super::running::Running;
use super::{document, whole};
use crate::services::streams::{ReadFrames, ReadPosition};

/// How long the status waits, and how often a client that waits hears so. Source: .specs/01 CLOUD-2838.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest wait for where the task stands.
const PLACE_WITHIN: Duration = Duration::from_millis(100);
const WAITING: &str = ": waiting\n\n";

pub(super) async fn answer(running: Running, route: OpenAiRoute) -> Result<Response, ApiError> {
    let task_id = running.task_id();
    let Ok((bytes, is_over)) = timeout(PATIENCE, running.unread()).await else {
        let mut response = Response::new(body(Reader::new(running, route)));
        complete(&mut response);
        name(response.headers_mut(), task_id, None);
        return Ok(response);
    };
    let Some(head) = running.head() else {
        let mut running = running;
        running.finish();
        let error = running.stream.error().cloned();
        return error.map_or_else(|| Err(crate::api::defect()), |error| Ok(failed(error, task_id, None)));
    };
    if head.head.is_event_stream() {
        let mut reader = Reader::new(running, route);
        reader.begin();
        let mut response = passed(&head, task_id, body(reader));
        complete(&mut response);
        return Ok(response);
    }
    if !(200..300).contains(&head.head.status) {
        return whole::rest(running, bytes, is_over);
    }
    let mut reader = Reader::new(running, route);
    reader.begin();
    let mut response = Response::new(body(reader));
    complete(&mut response);
    name(response.headers_mut(), task_id, Some(&head));
    Ok(response)
}

/// What every stream says of itself.
fn complete(response: &mut Response) {
    let out = response.headers_mut();
    out.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("text/event-stream; charset=utf-8"));
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    let (name, value) = crate::api::UNBUFFERED;
    out.insert(name, HeaderValue::from_static(value));
}

fn body(reader: Reader) -> Body {
    Body::from_stream(stream::unfold(reader, |mut reader| async move {
        reader.more().await.map(|bytes| (Ok::<_, Infallible>(bytes), reader))
    }))
}

/// How far an answer has come.
#[derive(Debug)]
enum Phase {
    /// Nothing of the engine's has come; when the client hears so next.
    Waiting(Instant),
    /// Events are passed on.
    Events,
    /// The engine answers whole, and that becomes one event once it is here.
    Whole,
    /// It is here, and passes on as the data of an event.
    Document,
    Over,
}

/// The one reader of a stream.
#[derive(Debug)]
struct Reader {
    running: Running,
    route: OpenAiRoute,
    phase: Phase,
    next: ReadPosition,
    /// What was passed on.
    passed: PassedEvents,
    has_ended: bool,
}

impl Reader {
    fn new(running: Running, route: OpenAiRoute) -> Self {
        let phase = Phase::Waiting(Instant::now());
        let passed = PassedEvents::new(route.end_marker());
        Self { running, route, phase, next: ReadPosition::BEGIN, passed, has_ended: false }
    }

    /// The engine's answer is here: from now on it is passed on, or read to its end.
    fn begin(&mut self) {
        let is_event_stream = self.running.head().is_some_and(|head| {
            head.head.is_event_stream()
                && StatusCode::from_u16(head.head.status).is_ok_and(|s| s.is_success())
        });
        self.phase = if is_event_stream { Phase::Events } else { Phase::Whole };
    }

    async fn more(&mut self) -> Option<Bytes> {
        loop {
            match self.phase {
                Phase::Over => return None,
                Phase::Waiting(at) => {
                    if timeout_at(at, self.running.unread()).await.is_err() {
                        self.phase = Phase::Waiting(Instant::now() + PATIENCE);
                        return Some(self.place().await);
                    }
                    self.begin();
                }
                Phase::Whole => return self.begin_whole().await,
                Phase::Document => return self.go_on_with_document().await,
                Phase::Events => {
                    let Some(piece) = self.next_events().await else {
                        return Some(Bytes::from_static(WAITING.as_bytes()));
                    };
                    let ReadFrames { bytes, place, is_last } = piece;
                    self.next = place;
                    self.count(&bytes, place.part == 0);
                    return if is_last { self.end(bytes) } else { Some(bytes) };
                }
            }
        }
    }

    /// What is to be passed on next; nothing where it is generated again, and the client waits between
    /// events.
    async fn next_events(&self) -> Option<ReadFrames> {
        let (running, at) = (&self.running, self.next);
        if !running.stream.is_repeatable() {
            return Some(running.next_piece(at).await);
        }
        loop {
            match timeout(PATIENCE, running.next_piece(at)).await {
                Ok(piece) => return Some(piece),
                Err(_) if at.part == 0 && running.stream.is_catching_up() => return None,
                Err(_) => {}
            }
        }
    }

    /// Where a task that waits stands.
    async fn place(&self) -> Bytes {
        let published = &self.running.control.published;
        let record = self.running.record();
        let queued = record.filter(|record| record.state == TaskState::Queued);
        let place = async {
            let record = queued?;
            published.waiting(&record).await.ok().flatten().and_then(|waiting| waiting.queue_position)
        };
        // A loop that is busy has more to do than this.
        match timeout(PLACE_WITHIN, place).await {
            Ok(Some(position)) => format!(": queued {position}\n\n").into(),
            _ => Bytes::from_static(WAITING.as_bytes()),
        }
    }

    /// Counts the events, and looks whether the last one is the engine's own end. `is_whole`: the bytes end
    /// with an event.
    fn count(&mut self, bytes: &Bytes, is_whole: bool) {
        if !bytes.is_empty() {
            self.has_ended = self.passed.pass(bytes, is_whole);
            if self.has_ended {
                // Whoever goes now has all of it.
                self.running.passed_end();
            }
        }
    }

    fn end(&mut self, bytes: Bytes) -> Option<Bytes> {
        self.phase = Phase::Over;
        self.running.finish();
        let broke = self.running.stream.error().filter(|_| !self.has_ended);
        let Some(error) = broke else { return (!bytes.is_empty()).then_some(bytes) };
        let event = error::event(self.route, error, self.passed.count());
        Some(if bytes.is_empty() { event } else { [bytes, event].concat().into() })
    }

    /// An answer that is no stream, once it is here: its error, or the beginning of itself as one event.
    async fn begin_whole(&mut self) -> Option<Bytes> {
        let all = loop {
            match self.running.stream.whole() {
                Ok(all) => break all,
                Err(changed) => changed.await,
            }
        };
        let is_good = self.running.head().is_some_and(|head| (200..300).contains(&head.head.status));
        let error = self.running.stream.error().cloned();
        if error.is_none() && is_good && document::is_json(&all) {
            self.phase = Phase::Document;
            return Some(Bytes::from_static(document::BEFORE));
        }
        self.phase = Phase::Over;
        self.running.finish();
        let none = self.passed.count();
        Some(match error {
            Some(error) => error::event(self.route, &error, none),
            None if is_good => {
                let message = "the engine answered something else than a stream";
                error::event(self.route, &ErrorBody::new(ErrorCode::WorkerReset, message), none)
            }
            // A refusal, of which a node passes on as much as is short.
            None => error::engine_event(self.route, &all.into_bytes(), none),
        })
    }

    async fn go_on_with_document(&mut self) -> Option<Bytes> {
        let ReadFrames { bytes, place, is_last } = self.running.next_piece(self.next).await;
        self.next = place;
        let part = document::in_line(&bytes);
        if !is_last {
            return Some(part);
        }
        self.phase = Phase::Over;
        self.running.finish();
        let is_done = self.route.end_marker() == Some(EndMarker::Done);
        let end: &[u8] = if is_done { b"data: [DONE]\n\n" } else { b"" };
        Some([&part, document::BEHIND, end].concat().into())
    }
}
