//! What an engine's stream says, event by event.
//!
//! What the part that matters says is enough: an event is read when its text, its thoughts, its
//! reason to end or its error can be read, whatever stands beside them. Every event counts as a
//! sign of life; what it brings are texts and thoughts, which are both tokens.

use std::borrow::Cow;

use pool_registry_types::limits;
use pool_registry_types::sse::Frame;
use pool_registry_types::task::FinishReason;

use super::json::{Json, Object};
use super::refusal::{self, Refusal, shown};
use super::thoughts::{Delta, Splitter};

/// Most ids of tokens that wait for the text of theirs.
const MOST_WAITING: usize = 256 * 1024;

/// Reads the ids of the tokens of an event, and the count of all so far.
pub(super) type TokenIds = fn(&Object<'_>) -> (Vec<u32>, u32);

/// The shape of an answer: how its events are read, and how it ends.
#[derive(Debug)]
pub(crate) struct Reply {
    /// For messages and tests.
    pub name: &'static str,
    /// One JSON document instead of a stream.
    pub is_document: bool,
    /// No event is the last one: the stream is whole when its message ends in order.
    pub ends_by_closing: bool,
    pub(super) read: fn(&mut Reader, &Object<'_>) -> EngineEvent,
    /// Absent where no event has ids.
    pub(super) token_ids: Option<TokenIds>,
}

impl PartialEq for Reply {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// What one event of an engine says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum EngineEvent {
    /// Nothing that comes from the model.
    Nothing,
    /// The model works; there may be nothing to read in it.
    Delta(Delta),
    /// The last event; it may bring something too.
    End { delta: Delta, tokens_out: u64, finish_reason: FinishReason },
    /// The engine gave up.
    Failed(String),
    /// It says in its stream what others say by a status: that it does not take the request.
    Refused(Box<Refusal>),
}

/// Reads a stream; remembers what an end refers back to.
#[derive(Debug)]
pub(crate) struct Reader {
    reply: &'static Reply,
    /// Events of the model.
    events: u64,
    /// Events that brought something.
    deltas: u64,
    /// Tokens that may come at most, for streams that do not say why they end.
    bound: Option<u64>,
    /// The engine's own count of tokens.
    pub(super) counted: Option<u32>,
    pub(super) finish_reason: Option<FinishReason>,
    /// Which of its names for thoughts this engine uses: some write the same under two.
    pub(super) thought_field: Option<&'static str>,
    /// Separates thoughts from a text that holds both.
    splitter: Option<Splitter>,
    /// Where they are wanted, and as long as they can be its tokens'.
    ids: Option<NewIds>,
}

/// The engine's ids of the tokens since they were taken last, and its count of all. Some tokens bring no
/// text of their own: half a character, or the beginning of a stop text.
#[derive(Debug, Default)]
struct NewIds {
    new: Vec<u32>,
    count: u64,
    /// The count when they were taken last, and events since.
    counted: u64,
    events: u64,
}

impl Reader {
    pub(crate) fn new(reply: &'static Reply, wants_ids: bool) -> Self {
        Self {
            reply,
            events: 0,
            deltas: 0,
            bound: None,
            counted: None,
            finish_reason: None,
            thought_field: None,
            splitter: None,
            ids: wants_ids.then(NewIds::default),
        }
    }

    #[must_use]
    pub(crate) fn bounded_by(mut self, bound: Option<u64>) -> Self {
        self.bound = bound;
        self
    }

    pub(crate) fn split_by(&mut self, splitter: Option<Splitter>) {
        self.splitter = splitter;
    }

    /// Whether anything has come yet.
    pub(super) fn is_empty(&self) -> bool {
        self.deltas == 0
    }

    /// The ids of the tokens since they were taken last, which `text` ends, and the count of all tokens so
    /// far; nothing where they are not wanted. An engine whose tokens cannot be those of its text is asked
    /// for none any more: the stream goes on from its text.
    pub(crate) fn take_ids(&mut self, text: &str) -> Option<(Vec<u32>, u64)> {
        let ids = self.ids.as_mut()?;
        let most = limits::most_tokens(text.len(), std::mem::take(&mut ids.events));
        let grown = ids.count - std::mem::replace(&mut ids.counted, ids.count);
        let new = std::mem::take(&mut ids.new);
        if grown > most {
            self.ids = None;
            return None;
        }
        Some((new, ids.count))
    }

    /// The stream has ended in order, after its last event. Returns what an end event would have
    /// said where none is written; nothing where that end is none.
    pub(crate) fn closed(&mut self) -> Option<EngineEvent> {
        let whole = self.finish_reason.is_some() || (self.reply.ends_by_closing && self.events > 0);
        whole.then(|| self.end(Delta::default(), self.counted, self.finish_reason))
    }

    /// The connection was lost. What has said why it ended is whole all the same.
    pub(crate) fn lost(&mut self) -> Option<EngineEvent> {
        self.finish_reason?;
        self.closed()
    }

    /// The answer was one whole document that ended in order, and did not say why it ends.
    pub(crate) fn closed_whole(&mut self) -> EngineEvent {
        match self.closed() {
            Some(end) => end,
            None if self.is_empty() => EngineEvent::Failed("its answer is a document without a text".into()),
            None => self.end(Delta::default(), self.counted, None),
        }
    }

    /// What stands at an orderly end without its empty line.
    pub(crate) fn read_last(&mut self, frame: &Frame<'_>) -> EngineEvent {
        let over = self.finish_reason.is_some();
        match self.read(frame) {
            EngineEvent::Failed(_) | EngineEvent::Refused(_) if over => EngineEvent::Nothing,
            // Half an event is none: the end says what is missing, where there is one.
            EngineEvent::Failed(_) if !self.reply.ends_by_closing && !carries(frame) => EngineEvent::Nothing,
            reported => reported,
        }
    }

    pub(crate) fn read(&mut self, frame: &Frame<'_>) -> EngineEvent {
        if let Some(line) = frame.unknown
            && let Some(error) = error_in_a_line(line)
        {
            return error;
        }
        let Some(data) = &frame.data else { return EngineEvent::Nothing };
        let data = data.trim();
        if frame.event == "error" {
            return Json::object(data).map_or_else(|| failed(data), error_event);
        }
        match data {
            "" => return EngineEvent::Nothing,
            "[DONE]" | "\"[DONE]\"" | "DONE" => return self.done(),
            _ if data.starts_with(':') => return EngineEvent::Nothing,
            _ => {}
        }
        let Some(event) = Object::read(data) else {
            return error_in_a_line(data).unwrap_or_else(|| failed(&format!("unreadable event: {data}")));
        };
        if event.get("error").says_something() || event.get("object").text().as_deref() == Some("error") {
            return error_event(event.json());
        }
        self.events += 1;
        if let Some((ids, token_ids)) = self.ids.as_mut().zip(self.reply.token_ids) {
            let (new, all) = token_ids(&event);
            ids.events += 1;
            ids.count = u64::from(all).max(ids.count.saturating_add(new.len() as u64));
            if ids.new.len() + new.len() > MOST_WAITING {
                self.ids = None;
            } else {
                ids.new.extend(&new);
            }
        }
        match (self.reply.read)(self, &event) {
            EngineEvent::Delta(delta) => {
                let delta = self.split(delta);
                self.deltas += u64::from(!delta.is_empty());
                EngineEvent::Delta(delta)
            }
            reported => reported,
        }
    }

    /// The marker that stands after everything.
    fn done(&mut self) -> EngineEvent {
        if self.events == 0 {
            return EngineEvent::Failed("its stream has an end and nothing before it".into());
        }
        self.end(Delta::default(), self.counted, self.finish_reason)
    }

    /// The end of the stream, with what comes with it.
    pub(super) fn end(
        &mut self,
        delta: Delta,
        counted: Option<u32>,
        finish_reason: Option<FinishReason>,
    ) -> EngineEvent {
        let mut delta = self.split(delta);
        if let Some(splitter) = &mut self.splitter {
            delta.append(&splitter.finish());
        }
        self.deltas += u64::from(!delta.is_empty());
        // An engine that counts says 0 only when nothing came.
        let tokens_out = counted.map(u64::from).filter(|count| *count > 0).unwrap_or(self.deltas);
        let cut = self.bound.is_some_and(|bound| tokens_out >= bound);
        let by_itself = if cut { FinishReason::Length } else { FinishReason::Stop };
        EngineEvent::End { delta, tokens_out, finish_reason: finish_reason.unwrap_or(by_itself) }
    }

    fn split(&mut self, delta: Delta) -> Delta {
        match &mut self.splitter {
            Some(splitter) => splitter.push(&delta.text),
            None => delta,
        }
    }
}

/// Whether an event is whole enough to say that something is amiss.
fn carries(frame: &Frame<'_>) -> bool {
    let whole = frame.data.as_deref().is_some_and(|data| Json::object(data.trim()).is_some());
    whole || frame.event == "error" || frame.unknown.is_some()
}

/// Errors that some servers write beside the standard: a field of that name, or a bare object.
fn error_in_a_line(line: &str) -> Option<EngineEvent> {
    if let Some(reported) = line.strip_prefix("error:") {
        return Some(Json::object(reported).map_or_else(|| failed(reported.trim()), error_event));
    }
    let bare = Json::object(line).filter(|event| event.get("error").says_something())?;
    Some(error_event(bare))
}

/// An error event: a refusal or a failure.
fn error_event(event: Json<'_>) -> EngineEvent {
    match refusal::in_stream(event) {
        Some(refusal) => EngineEvent::Refused(Box::new(refusal)),
        None => EngineEvent::Failed(refusal::reported(event)),
    }
}

fn failed(what: &str) -> EngineEvent {
    EngineEvent::Failed(shown(what))
}

/// The text of a string, of parts with a text each, or of a number that stands where a text should.
pub(super) fn text_of(value: Json<'_>) -> Cow<'_, str> {
    if let Some(text) = value.text() {
        return text;
    }
    if let Some(text) = value.get("text").text() {
        return text;
    }
    if let Some(number) = value.number() {
        return Cow::Borrowed(number);
    }
    let texts: Vec<Cow<'_, str>> = value.items().filter_map(|part| part.get("text").text()).collect();
    Cow::Owned(texts.concat())
}
