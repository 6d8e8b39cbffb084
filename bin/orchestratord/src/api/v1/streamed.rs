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
use pool_registry_types::ErrorBody;
use pool_registry_types::task::TaskState;
use task_stream::{EndMarker, OpenAiRoute};
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::{failed, name, passed};
use super::running::Running;
use super::whole;

/// How long the status waits, and how often a client that waits hears so. Source: .specs/01 CLOUD-2838.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest wait for where the task stands.
const PLACE_WITHIN: Duration = Duration::from_millis(100);
/// Of an engine's whole answer to a request for a stream so much is read.
const MAX_WHOLE_BYTES: usize = 8 * 1024 * 1024;
/// The events by which a response ends.
const RESPONSE_ENDS: [&[u8]; 3] =
    [b"event: response.completed", b"event: response.failed", b"event: response.incomplete"];
const WAITING: &str = ": waiting\n\n";

/// Bytes, the index behind them, and whether nothing follows.
type Piece = (Bytes, u64, bool);

pub(super) async fn answer(running: Running, route: OpenAiRoute) -> Result<Response, ApiError> {
    let task_id = running.task_id();
    let Ok(first) = timeout(PATIENCE, next_piece(&running, 0)).await else {
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
        reader.taken = Some(first);
        reader.begin();
        let mut response = passed(&head, task_id, body(reader));
        complete(&mut response);
        return Ok(response);
    }
    if !(200..300).contains(&head.head.status) {
        return whole::rest(running, first);
    }
    let mut reader = Reader::new(running, route);
    reader.taken = Some(first);
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
    out.insert("x-accel-buffering", HeaderValue::from_static("no"));
}

async fn next_piece(running: &Running, next: u64) -> Piece {
    loop {
        match running.stream.pass(next) {
            Ok(piece) => return piece,
            Err(changed) => changed.await,
        }
    }
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
    /// The engine answers whole, and that becomes one event.
    Whole(Vec<u8>),
    Over,
}

/// The one reader of a stream.
#[derive(Debug)]
struct Reader {
    running: Running,
    route: OpenAiRoute,
    phase: Phase,
    next: u64,
    /// A piece that was read already.
    taken: Option<Piece>,
    /// Events that were passed on.
    passed: u64,
    has_ended: bool,
}

impl Reader {
    fn new(running: Running, route: OpenAiRoute) -> Self {
        let phase = Phase::Waiting(Instant::now());
        Self { running, route, phase, next: 0, taken: None, passed: 0, has_ended: false }
    }

    /// The engine's answer is here: from now on it is passed on, or read to its end.
    fn begin(&mut self) {
        let is_event_stream = self.running.head().is_some_and(|head| {
            head.head.is_event_stream()
                && StatusCode::from_u16(head.head.status).is_ok_and(|s| s.is_success())
        });
        self.phase = if is_event_stream { Phase::Events } else { Phase::Whole(Vec::new()) };
    }

    async fn more(&mut self) -> Option<Bytes> {
        loop {
            if matches!(self.phase, Phase::Over) {
                return None;
            }
            let (bytes, next, is_over) = match self.taken.take() {
                Some(piece) => piece,
                None => match self.phase {
                    Phase::Waiting(at) => match timeout_at(at, next_piece(&self.running, self.next)).await {
                        Ok(piece) => {
                            self.begin();
                            piece
                        }
                        Err(_) => {
                            self.phase = Phase::Waiting(Instant::now() + PATIENCE);
                            return Some(self.place().await);
                        }
                    },
                    Phase::Events if self.running.stream.is_repeatable() => {
                        match timeout(PATIENCE, next_piece(&self.running, self.next)).await {
                            Ok(piece) => piece,
                            Err(_) if self.running.stream.is_catching_up() => {
                                return Some(Bytes::from_static(WAITING.as_bytes()));
                            }
                            Err(_) => continue,
                        }
                    }
                    _ => next_piece(&self.running, self.next).await,
                },
            };
            self.next = next;
            if let Phase::Whole(all) = &mut self.phase {
                if all.len() + bytes.len() <= MAX_WHOLE_BYTES {
                    all.extend_from_slice(&bytes);
                }
                if is_over {
                    return self.end_whole();
                }
                continue;
            }
            self.count(&bytes);
            if !is_over {
                return Some(bytes);
            }
            return self.end(bytes);
        }
    }

    /// Where a task that waits stands.
    async fn place(&self) -> Bytes {
        let published = &self.running.control.published;
        let record = self.running.record();
        let queued = record.filter(|record| record.state == TaskState::Queued);
        let place = async {
            let record = queued?;
            published.queue_position(&record).await.ok().flatten()
        };
        // A loop that is busy has more to do than this.
        match timeout(PLACE_WITHIN, place).await {
            Ok(Some(position)) => format!(": queued {position}\n\n").into(),
            _ => Bytes::from_static(WAITING.as_bytes()),
        }
    }

    /// Counts the events, and looks whether the last one is the engine's own end.
    fn count(&mut self, bytes: &Bytes) {
        if self.route == OpenAiRoute::Responses {
            let lines = bytes.split(|byte| matches!(byte, b'\n' | b'\r'));
            self.passed += lines.filter(|line| line.starts_with(b"data:")).count() as u64;
        }
        if !bytes.is_empty() {
            let end = bytes.trim_ascii_end();
            self.has_ended = match self.route.end_marker() {
                Some(EndMarker::Done) => end.ends_with(b"[DONE]"),
                Some(EndMarker::MessageStop) => end.ends_with(b"\"message_stop\"}"),
                Some(EndMarker::Response) => {
                    let mut lines = bytes.split(|byte| matches!(byte, b'\n' | b'\r'));
                    lines.any(|line| RESPONSE_ENDS.contains(&line))
                }
                None => false,
            };
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
        let event = error::event(self.route, error, self.passed);
        Some(if bytes.is_empty() { event } else { [bytes, event].concat().into() })
    }

    /// An answer that is no stream: its error, or itself, as one event.
    fn end_whole(&mut self) -> Option<Bytes> {
        let Phase::Whole(all) = std::mem::replace(&mut self.phase, Phase::Over) else { return None };
        self.running.finish();
        if let Some(error) = self.running.stream.error() {
            return Some(error::event(self.route, error, self.passed));
        }
        let is_good = self.running.head().is_some_and(|head| (200..300).contains(&head.head.status));
        if !is_good {
            return Some(error::engine_event(self.route, &all, self.passed));
        }
        let Some(data) = one_line(&all) else {
            let error = ErrorBody::new(
                pool_registry_types::ErrorCode::WorkerReset,
                "the engine answered something else than a stream",
            );
            return Some(error::event(self.route, &error, self.passed));
        };
        let end = if self.route.end_marker() == Some(EndMarker::Done) { "data: [DONE]\n\n" } else { "" };
        Some(format!("data: {data}\n\n{end}").into())
    }
}

/// A JSON document as the data of an event.
fn one_line(document: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(document).ok()?.trim();
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    if text.contains(['\n', '\r']) { Some(value.to_string()) } else { Some(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_becomes_one_line_and_stays_as_it_is_where_it_is_one() {
        assert_eq!(one_line(b" {\"a\": 1.50} ").as_deref(), Some("{\"a\": 1.50}"));
        assert_eq!(one_line(b"{\"a\":\n1}").as_deref(), Some("{\"a\":1}"));
        assert_eq!(one_line(b"<html>"), None);
    }
}
