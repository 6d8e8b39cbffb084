//! The comparer beside a task's log: pieces of whole events in, what is new of them out.

use bytes::{Bytes, BytesMut};
use task_stream::{OpenAiRoute, StreamComparer};

use super::{Compared, Difference, Replay};
use crate::events::{EventReader, StreamEvent};

/// [`Replay`] of a route's stream as it lies in pieces.
#[derive(Debug)]
pub struct StreamReplay {
    route: OpenAiRoute,
    replay: Replay,
    /// Of the attempt that is read.
    reader: EventReader,
}

impl StreamReplay {
    pub fn new(route: OpenAiRoute) -> Self {
        Self { route, replay: Replay::new(), reader: EventReader::new(route) }
    }

    /// The events of a piece; nothing where it has something else.
    fn events(&mut self, piece: &Bytes) -> Option<Vec<StreamEvent>> {
        self.reader.feed(piece.clone());
        let (mut events, mut read) = (Vec::new(), 0);
        while let Some(event) = self.reader.next_event().ok()? {
            read += event.bytes.len();
            events.push(event);
        }
        // A piece ends where an event does, whatever may follow its last carriage return.
        if read < piece.len() {
            events.push(self.reader.last_event()?);
        }
        Some(events)
    }
}

impl StreamComparer for StreamReplay {
    fn passed(&mut self, events: &Bytes) {
        if !self.replay.may_begin() {
            return;
        }
        match self.events(events) {
            Some(events) => events.iter().for_each(|event| self.replay.passed(event)),
            None => self.replay.unreadable(),
        }
    }

    fn may_begin(&self) -> bool {
        self.replay.may_begin()
    }

    fn begin(&mut self) {
        self.reader = EventReader::new(self.route);
        // Whoever asks has asked whether it may.
        let _ = self.replay.begin();
    }

    fn compare(&mut self, events: &Bytes) -> Result<Bytes, &'static str> {
        let mut new: Vec<Bytes> = Vec::new();
        for event in self.events(events).ok_or(Difference::Incomparable.as_str())? {
            match self.replay.compare(&event) {
                Compared::Known => {}
                Compared::Pass(bytes) => new.push(bytes),
                Compared::Differs(difference) => return Err(difference.as_str()),
            }
        }
        if let [one] = new.as_mut_slice() {
            return Ok(std::mem::take(one));
        }
        let mut joined = BytesMut::with_capacity(new.iter().map(Bytes::len).sum());
        new.iter().for_each(|event| joined.extend_from_slice(event));
        Ok(joined.freeze())
    }

    fn has_caught_up(&self) -> bool {
        self.replay.has_caught_up()
    }

    fn len_bytes(&self) -> usize {
        self.replay.len_bytes()
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
