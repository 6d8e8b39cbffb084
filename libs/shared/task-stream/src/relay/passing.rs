//! What becomes of an engine's answer that is passed on as it came: what is held, and what is shown.
//!
//! Nothing is shown that could not be taken back: of an event stream nothing before its first event,
//! of another answer nothing before its end. So an attempt that is lost before leaves no trace, and its
//! task is placed again. What is longer than [`MOST_HELD`] is shown as it comes from then on, and so is an
//! answer for which there is no room beside those that others hold back.
//!
//! The node counts events or bytes; the log counts what came together, whose parts nobody asks for.

use std::sync::Arc;

use bytes::Bytes;
use pool_registry_types::{Moment, NodeId};

use super::{Action, Relay};
use crate::end::HowEnded;
use crate::hold_budget::{HeldBack, HoldBudget};
use crate::log::{AppendError, Segment};
use crate::passage::{AnswerHead, PassedHead, is_comments};
use crate::staged::Staged;

/// Longest part of one answer that is held back, bytes. Source: .specs/01 CLOUD-2833.
const MOST_HELD: usize = 8 * 1024 * 1024;

impl Relay {
    /// What comes is the engine's own answer: it is passed on as it is, and no part of an answer that
    /// is no event stream before it is whole or too long to be held. What is held back counts in `room`.
    #[must_use]
    pub fn passing_on(mut self, room: Arc<HoldBudget>) -> Self {
        let node_id = self.assignment.pool.node_id.clone();
        let mut passing = Passing::new(node_id, room);
        // Its node counts what it answers itself, whatever stands in the log.
        (passing.next, self.reading.taken) = (self.assignment.first_index, 0);
        Self { passing: Some(Box::new(passing)), ..self }
    }

    /// On a link: status and headers of an answer that is passed on.
    pub fn head(&mut self, head: AnswerHead) {
        if let Some(passing) = &mut self.passing {
            passing.head(head);
        }
    }

    /// On a link: `count` frames from `first` on, or bytes of an answer that is no event stream; they
    /// count with the next [`Relay::flush`].
    pub fn frames(&mut self, now: Moment, first: u64, count: u32, bytes: &Bytes) {
        let Some(passing) = &mut self.passing else { return self.chunk(now, bytes) };
        if self.ended || self.reading.broken.is_some() {
            return;
        }
        if self.watch.bytes(now) {
            self.actions.push_back(Action::Heard);
        }
        let (reading, next) = (&mut self.reading, first.saturating_add(u64::from(count)));
        match passing.take(reading.taken, first, bytes, &mut reading.staged) {
            Passed::Shown => reading.news.tokens = true,
            Passed::Held => reading.news.unlogged = true,
            Passed::Comments => reading.news.works = true,
            Passed::Before => return,
            Passed::Gap => {
                let error = AppendError::Gap { expected: reading.taken, got: first };
                reading.broken = Some(HowEnded::Broken(error.to_string()));
            }
        }
        reading.taken = reading.taken.max(next);
    }

    /// What was written may be what makes another attempt impossible: the core is told so once.
    pub(super) fn note_repeatable(&mut self) {
        let Some(passing) = &mut self.passing else { return };
        if self.reading.staged.cannot_be_repeated && !std::mem::replace(&mut passing.is_reported, true) {
            self.actions.push_back(Action::CannotBeRepeated);
        }
    }

    /// The node says that the attempt is over. Without an error before it the answer is whole.
    pub(super) fn passed_whole(&mut self) {
        let Some(passing) = &mut self.passing else { return };
        let reading = &mut self.reading;
        let in_order = !self.ended && reading.last.is_none() && reading.broken.is_none();
        if in_order && passing.finish(&mut reading.staged) {
            reading.news.tokens = true;
            reading.last = Some(HowEnded::Finished);
        }
    }
}

/// An answer on its way.
#[derive(Debug)]
pub(super) struct Passing {
    node_id: NodeId,
    head: Option<AnswerHead>,
    is_event_stream: bool,
    held: Vec<Bytes>,
    held_back: HeldBack,
    is_shown: bool,
    /// The index in the log of what is shown next.
    next: u64,
    /// That it cannot be generated again was said.
    is_reported: bool,
}

/// What was done with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passed {
    /// It is for the log.
    Shown,
    Held,
    /// It is nothing but comments, and nothing was shown yet.
    Comments,
    /// All of it has come before.
    Before,
    /// Something is missing before it, or its attempt has not said what it is.
    Gap,
}

impl Passing {
    fn new(node_id: NodeId, room: Arc<HoldBudget>) -> Self {
        Self {
            node_id,
            head: None,
            is_event_stream: false,
            held: Vec::new(),
            held_back: HeldBack::new(room),
            is_shown: false,
            next: 0,
            is_reported: false,
        }
    }

    /// The first one counts: a resume says it again.
    fn head(&mut self, head: AnswerHead) {
        if self.head.is_none() && !self.is_shown {
            self.is_event_stream = head.is_event_stream();
            self.head = Some(head);
        }
    }

    /// Takes what came from `first` on, where `taken` is next.
    fn take(&mut self, taken: u64, first: u64, bytes: &Bytes, staged: &mut Staged) -> Passed {
        if first > taken || self.head.is_none() && !self.is_shown {
            return Passed::Gap;
        }
        let bytes = self.behind(bytes, taken - first);
        if bytes.is_empty() {
            return Passed::Before;
        }
        if self.is_shown {
            self.show(bytes, staged);
            return Passed::Shown;
        }
        let is_comments = self.is_event_stream && is_comments(&bytes);
        let is_shown = self.is_event_stream && !is_comments
            || self.held_back.bytes() + bytes.len() > MOST_HELD
            || !self.held_back.add(bytes.len());
        self.held.push(bytes);
        if is_shown {
            self.begin(staged);
            return Passed::Shown;
        }
        if is_comments { Passed::Comments } else { Passed::Held }
    }

    /// The answer is whole. Returns whether there was one.
    fn finish(&mut self, staged: &mut Staged) -> bool {
        if !self.is_shown && self.head.is_none() {
            return false;
        }
        self.begin(staged);
        // The end of the log is a frame without a byte.
        self.show(Bytes::new(), staged);
        staged.terminal = true;
        true
    }

    fn begin(&mut self, staged: &mut Staged) {
        if let Some(head) = self.head.take() {
            staged.head = Some(Box::new(PassedHead { head, node_id: self.node_id.clone() }));
        }
        self.is_shown = true;
        for bytes in std::mem::take(&mut self.held) {
            self.show(bytes, staged);
        }
        // From here on they count with the log.
        self.held_back.release();
    }

    fn show(&mut self, bytes: Bytes, staged: &mut Staged) {
        staged.segments.push(Segment::frame(self.next, bytes));
        self.next += 1;
    }

    /// What stands behind the first `count` events, or bytes.
    fn behind(&self, bytes: &Bytes, count: u64) -> Bytes {
        if count == 0 {
            return bytes.clone();
        }
        let mut at = usize::try_from(count).unwrap_or(usize::MAX);
        if self.is_event_stream {
            let (mut rest, mut searched) = (&bytes[..], 0);
            for _ in 0..count {
                let Some(end) = pool_registry_types::sse::frame_end(rest, &mut searched) else {
                    rest = &[];
                    break;
                };
                (rest, searched) = (&rest[end..], 0);
            }
            at = bytes.len() - rest.len();
        }
        bytes.slice(at.min(bytes.len())..)
    }
}

#[cfg(test)]
#[path = "passing_tests.rs"]
mod tests;
