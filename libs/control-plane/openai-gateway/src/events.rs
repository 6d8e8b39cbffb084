//! An engine's stream as whole events, and what each is.
//!
//! The reader is fed bytes as they arrive, cut anywhere, and yields each event's bytes as they came:
//! slices of what was fed, but for events that lie across a cut. Comments, line ends and broken
//! characters are the engine's and stay. What an event says is read beside its bytes, and an event
//! that cannot be read is passed on like others. Not known here: what was sent to a client.

mod chunk;

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use pool_registry_types::sse::{BYTE_ORDER_MARK, frame_end};
use task_stream::{EndMarker, OpenAiRoute};

pub(crate) use chunk::{Chunk, IDENTITY};
pub use chunk::{TextField, Usage};

/// Longest event, bytes. Source: .specs/01 CLOUD-2810.
pub const MAX_EVENT_BYTES: usize = 8 * 1024 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event of the engine is longer than {MAX_EVENT_BYTES} bytes")]
pub struct EventTooLong;

/// What an event is to whoever passes it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Nothing that a reader of events sees: comments and empty lines.
    Comment,
    Content,
    /// The end marker of the route: the stream is whole.
    End,
    /// The engine's own error, which ends the stream too.
    Error,
}

/// One event of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamEvent {
    /// As they came, the empty line at the end included.
    pub bytes: Bytes,
    pub kind: EventKind,
    pub(crate) chunk: Chunk,
}

impl StreamEvent {
    /// Whether something was made: one such event counts as a token where the engine tells no usage.
    pub fn has_token(&self) -> bool {
        self.chunk.has_other || TextField::ALL.into_iter().any(|field| self.text_bytes(field) > 0)
    }

    /// Bytes of a field's text as JSON has it, without its quotes.
    pub fn text_bytes(&self, field: TextField) -> usize {
        self.chunk.texts[field.place()].as_ref().map_or(0, |place| place.len().saturating_sub(2))
    }

    pub fn usage(&self) -> Option<Usage> {
        self.chunk.usage
    }

    pub fn finish_reason(&self) -> Option<&str> {
        self.chunk.finish_reason.as_deref()
    }
}

/// Cuts a stream of one route into its events.
#[derive(Debug)]
pub struct EventReader {
    route: OpenAiRoute,
    /// What was fed last and is not yielded; empty while `joined` has something.
    fed: Bytes,
    /// What was cut, with all that came behind it.
    joined: BytesMut,
    /// Bytes of either that were searched for the end of an event.
    searched: usize,
    has_begun: bool,
}

impl EventReader {
    pub fn new(route: OpenAiRoute) -> Self {
        Self { route, fed: Bytes::new(), joined: BytesMut::new(), searched: 0, has_begun: false }
    }

    pub fn feed(&mut self, bytes: Bytes) {
        if self.fed.is_empty() && self.joined.is_empty() {
            self.fed = bytes;
            return;
        }
        self.joined.extend_from_slice(&std::mem::take(&mut self.fed));
        self.joined.extend_from_slice(&bytes);
    }

    /// The next whole event, if there is one. A carriage return at the end of what was fed may be half
    /// of a line end, so that its event is whole with the byte after it.
    pub fn next_event(&mut self) -> Result<Option<StreamEvent>, EventTooLong> {
        let held: &[u8] = if self.joined.is_empty() { &self.fed } else { &self.joined };
        let end = frame_end(held, &mut self.searched);
        // Whether its end has come or not: how the bytes were cut decides nothing.
        if end.unwrap_or(held.len()) > MAX_EVENT_BYTES {
            return Err(EventTooLong);
        }
        Ok(end.map(|end| self.take(end)))
    }

    /// What stands behind the last whole event when the stream has ended in order: an event whose last
    /// line end is a carriage return, or an end whose empty line was left out. Half an event is none.
    pub fn last_event(&mut self) -> Option<StreamEvent> {
        let rest = self.fed.len().max(self.joined.len());
        let event = (rest > 0 && rest <= MAX_EVENT_BYTES).then(|| self.take(rest))?;
        let is_whole = event.bytes.ends_with(b"\r\r") || event.bytes.ends_with(b"\n\r");
        (is_whole || matches!(event.kind, EventKind::End | EventKind::Error)).then_some(event)
    }

    fn take(&mut self, end: usize) -> StreamEvent {
        self.searched = 0;
        let bytes =
            if self.joined.is_empty() { self.fed.split_to(end) } else { self.joined.split_to(end).freeze() };
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        let (kind, chunk) = read(self.route, &bytes, is_first);
        StreamEvent { bytes, kind, chunk }
    }
}

/// What a whole answer says of itself at its end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerFacts {
    pub usage: Option<Usage>,
    pub finish_reason: Option<String>,
}

/// Reads a whole answer. Of one that is no JSON object nothing is known.
pub fn read_answer(answer: &[u8]) -> AnswerFacts {
    let chunk = std::str::from_utf8(answer).map(Chunk::read).unwrap_or_default();
    AnswerFacts { usage: chunk.usage, finish_reason: chunk.finish_reason }
}

fn read(route: OpenAiRoute, event: &[u8], is_first: bool) -> (EventKind, Chunk) {
    let lines = Lines::of(event, is_first);
    let data = std::str::from_utf8(&lines.data).unwrap_or_default();
    let chunk = Chunk::read(data);
    let is_named = |name: &str| lines.name == name.as_bytes();
    let is_end = match route.end_marker() {
        Some(EndMarker::Done) => lines.data.trim_ascii() == b"[DONE]",
        Some(EndMarker::MessageStop) => chunk.is_message_stop || is_named("message_stop"),
        Some(EndMarker::Response) => {
            chunk.is_response_end
                || ["response.completed", "response.failed", "response.incomplete"].into_iter().any(is_named)
        }
        None => false,
    };
    let kind = if !lines.has_fields {
        EventKind::Comment
    } else if is_end {
        EventKind::End
    } else if lines.has_error || is_named("error") || chunk.is_error {
        EventKind::Error
    } else {
        EventKind::Content
    };
    let chunk = if chunk.is_read { chunk.moved(|at| lines.place(at)) } else { chunk };
    (kind, chunk)
}

/// The fields of an event.
struct Lines<'a> {
    name: &'a [u8],
    /// Several lines of it are joined with a line feed.
    data: Cow<'a, [u8]>,
    /// Where each line of the data begins: in the data, and in the event.
    starts: Vec<(usize, usize)>,
    /// A field of the name `error`, which llama.cpp had.
    has_error: bool,
    has_fields: bool,
}

impl<'a> Lines<'a> {
    fn of(event: &'a [u8], is_first: bool) -> Self {
        let mut lines = Lines {
            name: b"",
            data: Cow::Borrowed(b""),
            starts: Vec::new(),
            has_error: false,
            has_fields: false,
        };
        let skipped = if is_first && event.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        let mut at = skipped;
        // The two halves of a CRLF are an empty line between them, which says nothing inside an event.
        for line in event[skipped..].split(|byte| matches!(byte, b'\n' | b'\r')) {
            lines.line(line, at);
            at += line.len() + 1;
        }
        lines
    }

    fn line(&mut self, line: &'a [u8], at: usize) {
        if line.is_empty() || line.starts_with(b":") {
            return;
        }
        self.has_fields = true;
        let name_end = line.iter().position(|byte| *byte == b':').unwrap_or(line.len());
        let value = line.get(name_end + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..name_end] {
            b"event" => self.name = value,
            b"error" => self.has_error = true,
            b"data" => {
                let in_event = at + line.len() - value.len();
                if self.starts.is_empty() {
                    self.data = Cow::Borrowed(value);
                    self.starts.push((0, in_event));
                } else {
                    let data = self.data.to_mut();
                    data.push(b'\n');
                    self.starts.push((data.len(), in_event));
                    data.extend_from_slice(value);
                }
            }
            _ => {}
        }
    }

    /// Where in the event a byte of the data stands.
    fn place(&self, at: usize) -> usize {
        let line = self.starts.iter().rev().find(|(in_data, _)| *in_data <= at);
        line.map_or(at, |(in_data, in_event)| in_event + at - in_data)
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
