//! Whether a second attempt makes the text that the first one has made, and where it goes on.
//!
//! A stream that is deterministic by its own words is generated again when its engine is lost. While
//! the first attempt runs, [`Replay`] keeps the text that was passed on; when it has died, the events
//! of the second go through [`Replay::compare`] until they bring something new, and after that to have
//! the first one's identity. The idea needed to read this: an engine cuts the same text into other
//! chunks each time, so texts are compared and never events. What differs is said and nothing of it
//! passed on. Not known here: when an attempt has died, and how much time there is.

mod stream;

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use crate::events::{Chunk, EventKind, IDENTITY, StreamEvent, TextField};
use crate::request::scan::text;

pub use stream::StreamReplay;

/// Longest text that is kept for a replay, events that have a token. Source: .specs/01 CLOUD-2815.
pub const MAX_REPLAY_TOKENS: u32 = 32_000;
/// The same, bytes.
pub const MAX_REPLAY_BYTES: usize = 1024 * 1024;

/// Why a stream cannot be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReplayed {
    #[error("its text is too long to be made again")]
    TooLong,
    #[error("it has more than text")]
    MoreThanText,
    #[error("it has an event that cannot be read")]
    Unreadable,
    #[error("it has ended")]
    Ended,
    #[error("it was replayed already")]
    Again,
}

/// Why a second attempt is not the first one again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    #[error("another text, from byte {at} on")]
    Text { at: usize },
    #[error("a text that goes on where another had begun")]
    Order,
    #[error("an end before the text's")]
    Shorter,
    #[error("a text behind its end")]
    Longer,
    #[error("another reason to finish")]
    FinishReason,
    #[error("an event that cannot be compared")]
    Incomparable,
}

impl Difference {
    /// The same without the place.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Text { .. } => "it has another text",
            Self::Order => "its texts come in another order",
            Self::Shorter => "it has ended before what was sent",
            Self::Longer => "it has a text behind its end",
            Self::FinishReason => "it has another reason to finish",
            Self::Incomparable => "it has an event that cannot be compared",
        }
    }
}

/// What becomes of an event of the second attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compared {
    /// All of it was passed on before.
    Known,
    /// To be passed on.
    Pass(Bytes),
    /// The stream has to end with an error.
    Differs(Difference),
}

/// A stream of one choice, across the death of its first attempt.
#[derive(Debug)]
pub struct Replay {
    state: State,
    passed: Passed,
}

#[derive(Debug)]
enum State {
    /// The first attempt is passed on.
    First,
    Impossible(NotReplayed),
    Second(Second),
}

/// What the client has.
#[derive(Debug, Default)]
struct Passed {
    has_events: bool,
    texts: [String; 4],
    tokens: u32,
    /// JSON values of the first event that has them.
    identity: [Option<String>; 4],
    roles: u32,
    finish_reason: Option<String>,
    /// The usage of the whole answer, which comes with or behind the reason to finish.
    has_usage: bool,
}

/// How far the second attempt is.
#[derive(Debug, Default)]
struct Second {
    /// Bytes of each text that came again.
    at: [usize; 4],
    has_finished: bool,
    has_passed: bool,
    has_ended: bool,
}

impl Default for Replay {
    fn default() -> Self {
        Self::new()
    }
}

impl Replay {
    pub fn new() -> Self {
        Self { state: State::First, passed: Passed::default() }
    }

    /// Events with a token that were passed on, as far as they are kept.
    pub fn tokens(&self) -> u32 {
        self.passed.tokens
    }

    /// Why a replay is impossible, if it is.
    pub fn impossible(&self) -> Option<NotReplayed> {
        match self.state {
            State::First => None,
            State::Impossible(why) => Some(why),
            State::Second(_) => Some(NotReplayed::Again),
        }
    }

    /// Whether a second attempt may begin.
    pub fn may_begin(&self) -> bool {
        self.impossible().is_none()
    }

    /// What is kept of what was passed on, bytes.
    pub fn len_bytes(&self) -> usize {
        let passed = &self.passed;
        let finish = passed.finish_reason.iter().map(String::capacity);
        let identity = passed.identity.iter().flatten().map(String::capacity);
        size_of::<Self>()
            + passed.texts.iter().map(String::capacity).chain(identity).chain(finish).sum::<usize>()
    }

    /// What was passed on had something that is no event.
    fn unreadable(&mut self) {
        if matches!(self.state, State::First) {
            self.passed = Passed::default();
            self.state = State::Impossible(NotReplayed::Unreadable);
        }
    }

    /// An event of the first attempt was passed on.
    pub fn passed(&mut self, event: &StreamEvent) {
        if !matches!(self.state, State::First) {
            return;
        }
        if let Err(why) = self.passed.record(event) {
            // What cannot be compared is not kept.
            self.passed = Passed::default();
            self.state = State::Impossible(why);
        }
    }

    /// The first attempt has died: what comes from now on is the second one's.
    pub fn begin(&mut self) -> Result<(), NotReplayed> {
        if let Some(why) = self.impossible() {
            return Err(why);
        }
        self.state = State::Second(Second::default());
        Ok(())
    }

    /// Whether something of the second attempt was passed on, so that it needs no more patience than
    /// another stream.
    pub fn has_caught_up(&self) -> bool {
        matches!(&self.state, State::Second(second) if second.has_passed)
    }

    /// Compares an event of the second attempt. After a difference there is nothing to be compared.
    pub fn compare(&mut self, event: &StreamEvent) -> Compared {
        let State::Second(second) = &mut self.state else {
            return Compared::Differs(Difference::Incomparable);
        };
        if second.has_ended {
            return Compared::Differs(Difference::Longer);
        }
        let compared = second.compare(&mut self.passed, event);
        match &compared {
            Compared::Pass(_) => second.has_passed = true,
            Compared::Differs(_) => second.has_ended = true,
            Compared::Known => {}
        }
        compared
    }
}

impl Passed {
    fn record(&mut self, event: &StreamEvent) -> Result<(), NotReplayed> {
        match event.kind {
            EventKind::Comment => return Ok(()),
            EventKind::End | EventKind::Error => return Err(NotReplayed::Ended),
            EventKind::Content => {}
        }
        let chunk = &event.chunk;
        check(chunk)?;
        self.has_events = true;
        for field in TextField::ALL {
            let text = text_of(event, field).ok_or(NotReplayed::Unreadable)?;
            if !text.is_empty() && self.finish_reason.is_some() {
                return Err(NotReplayed::Ended);
            }
            self.texts[field.place()].push_str(&text);
        }
        self.tokens += u32::from(event.has_token());
        if self.tokens > MAX_REPLAY_TOKENS
            || self.texts.iter().map(String::len).sum::<usize>() > MAX_REPLAY_BYTES
        {
            return Err(NotReplayed::TooLong);
        }
        for place in 0..IDENTITY.len() {
            if self.identity[place].is_none() {
                self.identity[place] = value(event, chunk.identity[place].as_ref()).map(str::to_owned);
            }
        }
        self.roles = self.roles.saturating_add(u32::from(chunk.role.is_some()));
        if let Some(reason) = &chunk.finish_reason {
            self.finish_reason = Some(reason.clone());
        }
        self.has_usage |= chunk.usage.is_some() && self.finish_reason.is_some();
        Ok(())
    }
}

/// Whether an event has nothing but what is compared.
fn check(chunk: &Chunk) -> Result<(), NotReplayed> {
    if !chunk.is_read || chunk.finish.is_some() != chunk.finish_reason.is_some() {
        Err(NotReplayed::Unreadable)
    } else if chunk.is_more_than_text || chunk.has_other {
        Err(NotReplayed::MoreThanText)
    } else {
        Ok(())
    }
}

impl Second {
    fn compare(&mut self, passed: &mut Passed, event: &StreamEvent) -> Compared {
        match event.kind {
            EventKind::Comment if self.has_passed => Compared::Pass(event.bytes.clone()),
            EventKind::Comment => Compared::Known,
            EventKind::Error => {
                self.has_ended = true;
                Compared::Pass(event.bytes.clone())
            }
            EventKind::End => {
                let is_whole =
                    self.is_caught_up(passed) && (self.has_finished || passed.finish_reason.is_none());
                if !is_whole {
                    return Compared::Differs(Difference::Shorter);
                }
                self.has_ended = true;
                Compared::Pass(event.bytes.clone())
            }
            EventKind::Content => match self.changes(passed, event) {
                Ok(Some(changes)) => Compared::Pass(changed(&event.bytes, changes)),
                Ok(None) => Compared::Known,
                Err(difference) => Compared::Differs(difference),
            },
        }
    }

    fn is_caught_up(&self, passed: &Passed) -> bool {
        self.at.iter().zip(&passed.texts).all(|(at, text)| *at == text.len())
    }

    /// What has to be changed in an event before it is passed on; nothing where it has nothing new.
    fn changes(
        &mut self,
        passed: &mut Passed,
        event: &StreamEvent,
    ) -> Result<Option<Vec<Change>>, Difference> {
        let chunk = &event.chunk;
        check(chunk).map_err(|_| Difference::Incomparable)?;
        let mut changes = Vec::new();
        let mut is_new = false;
        for field in TextField::ALL {
            is_new |= self.text(passed, event, field, &mut changes)?;
        }
        if is_new && !self.is_caught_up(passed) {
            // The other field had begun before.
            return Err(Difference::Order);
        }
        if is_new && passed.finish_reason.is_some() {
            return Err(Difference::Longer);
        }
        if let (Some(reason), Some(place)) = (&chunk.finish_reason, &chunk.finish) {
            if !self.is_caught_up(passed) {
                return Err(Difference::Shorter);
            }
            self.has_finished = true;
            match &passed.finish_reason {
                None => {
                    passed.finish_reason = Some(reason.clone());
                    is_new = true;
                }
                Some(before) if before == reason => changes.push((place.clone(), "null".to_owned())),
                Some(_) => return Err(Difference::FinishReason),
            }
        }
        // Of a first attempt without an event everything is new.
        is_new |= !passed.has_events;
        if chunk.usage.is_some() && self.has_finished && !passed.has_usage {
            passed.has_usage = true;
            is_new = true;
        }
        if !is_new && !self.has_passed {
            return Ok(None);
        }
        // It was passed on already, unless the engine gives it with every event.
        if let Some(role) = chunk.role.clone().filter(|_| !self.has_passed && passed.roles == 1) {
            changes.push((role, "null".to_owned()));
        }
        for (first, place) in passed.identity.iter().zip(&chunk.identity) {
            if let (Some(first), Some(place)) = (first, place) {
                changes.push((place.clone(), first.clone()));
            }
        }
        Ok(Some(changes))
    }

    /// Compares one field's text, and cuts off what was passed on. Returns whether there is more of it.
    fn text(
        &mut self,
        passed: &Passed,
        event: &StreamEvent,
        field: TextField,
        changes: &mut Vec<Change>,
    ) -> Result<bool, Difference> {
        let text = text_of(event, field).ok_or(Difference::Incomparable)?;
        let at = &mut self.at[field.place()];
        let left = &passed.texts[field.place()].as_bytes()[*at..];
        let known = left.len().min(text.len());
        if let Some(differs) = left.iter().zip(text.as_bytes()).position(|(left, new)| left != new) {
            return Err(Difference::Text { at: *at + differs });
        }
        *at += known;
        if known > 0
            && let Some(place) = event.chunk.texts[field.place()].clone()
        {
            let raw = value(event, Some(&place)).unwrap_or_default();
            let cut = raw_length(raw, known).ok_or(Difference::Incomparable)?;
            changes.push((place.start + 1..place.start + 1 + cut, String::new()));
        }
        Ok(text.len() > known)
    }
}

/// A place in an event, and what stands there instead.
type Change = (Range<usize>, String);

fn changed(bytes: &Bytes, mut changes: Vec<Change>) -> Bytes {
    changes.retain(|(place, instead)| bytes[place.clone()] != *instead.as_bytes());
    if changes.is_empty() {
        return bytes.clone();
    }
    changes.sort_by_key(|(place, _)| place.start);
    let (mut made, mut at) = (BytesMut::with_capacity(bytes.len()), 0);
    for (place, instead) in changes {
        made.extend_from_slice(&bytes[at..place.start]);
        made.extend_from_slice(instead.as_bytes());
        at = place.end;
    }
    made.extend_from_slice(&bytes[at..]);
    made.freeze()
}

/// The JSON value at a place of an event.
fn value<'a>(event: &'a StreamEvent, place: Option<&Range<usize>>) -> Option<&'a str> {
    std::str::from_utf8(event.bytes.get(place?.clone())?).ok()
}

/// A field's text, empty where the event has none. None for what stands for no text.
fn text_of(event: &StreamEvent, field: TextField) -> Option<std::borrow::Cow<'_, str>> {
    match &event.chunk.texts[field.place()] {
        None => Some("".into()),
        Some(place) => text(value(event, Some(place))?),
    }
}

/// Bytes that the first `decoded` bytes of a string's text take in it, behind its quote. None where a
/// character would be cut.
fn raw_length(raw: &str, decoded: usize) -> Option<usize> {
    let inside = raw.get(1..)?;
    let (mut at, mut stands_for) = (0, 0);
    while stands_for < decoded {
        let rest = inside.get(at..)?;
        let character = rest.chars().next()?;
        let (taken, bytes) =
            if character == '\\' { escape(rest)? } else { (character.len_utf8(), character.len_utf8()) };
        at += taken;
        stands_for += bytes;
    }
    (stands_for == decoded).then_some(at)
}

/// The length of an escape, and of the character that it stands for, bytes.
fn escape(rest: &str) -> Option<(usize, usize)> {
    if rest.as_bytes().get(1) != Some(&b'u') {
        return Some((2, 1));
    }
    let code = u32::from_str_radix(rest.get(2..6)?, 16).ok()?;
    // Half of a pair: the other one follows, since the string stands for a text.
    char::from_u32(code).map_or(Some((12, 4)), |character| Some((6, character.len_utf8())))
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
