//! A log whose stream may be generated again: what its first attempt has passed on is kept beside it, and
//! a second attempt's events stand in it only as far as they are new.
//!
//! What is compared is known to a [`StreamComparer`] only. It lies with the log, under the log's fence: so it
//! has taken what the log has taken and nothing else, whenever and however an attempt ends.

use bytes::Bytes;
use pool_registry_types::AttemptId;

use super::{AppendError, Segment, TaskLog};
use crate::passage::AnswerHead;

/// Holds a second attempt's events against those of the first one, which were passed on.
///
/// Events come whole, end to end, in pieces that mean nothing.
pub trait StreamComparer: std::fmt::Debug + Send {
    /// Events of the first attempt were passed on.
    fn passed(&mut self, events: &Bytes);

    /// Whether a second attempt may begin.
    fn may_begin(&self) -> bool;

    /// What comes from now on is the second attempt's, which may begin.
    fn begin(&mut self);

    /// What is new in events of the second attempt. The error says what differs; nothing of them is to be
    /// passed on then, and nothing that follows.
    fn compare(&mut self, events: &Bytes) -> Result<Bytes, &'static str>;

    /// Whether something new has come of the second attempt.
    fn has_caught_up(&self) -> bool;

    /// What it keeps, bytes.
    fn len_bytes(&self) -> usize;
}

/// What a log knows of its attempts beside their bytes.
#[derive(Debug)]
pub(super) struct Repeating {
    comparer: Box<dyn StreamComparer>,
    /// Whose events were passed on first.
    first: Option<AttemptId>,
    second: Option<AttemptId>,
}

impl Repeating {
    pub(super) fn len_bytes(&self) -> usize {
        self.comparer.len_bytes()
    }
}

impl TaskLog {
    /// Its stream may be generated again, as the comparer knows it. Nothing was written yet.
    pub fn compare_with(&mut self, comparer: Box<dyn StreamComparer>) {
        self.repeating = Some(Box::new(Repeating { comparer, first: None, second: None }));
    }

    /// Whether its stream was one that may be generated again and is none any more.
    pub(crate) fn cannot_be_repeated(&self) -> bool {
        self.repeating.as_ref().is_some_and(|repeating| !repeating.comparer.may_begin())
    }

    /// Whether what was written is awaited again, or an attempt that generates it.
    pub fn is_catching_up(&self) -> bool {
        let Some(repeating) = self.repeating.as_ref().filter(|_| !self.finished) else { return false };
        match self.writer {
            _ if repeating.first.is_none() => false,
            None => true,
            writer => writer != repeating.first && !repeating.comparer.has_caught_up(),
        }
    }

    /// An attempt that generates the stream again has to be answered with a stream too.
    pub(crate) fn check_head(&self, attempt: AttemptId, head: &AnswerHead) -> Result<(), AppendError> {
        let is_second = self.repeating.as_ref().is_some_and(|repeating| {
            repeating.first.is_some_and(|first| first != attempt) && self.writer == Some(attempt)
        });
        if is_second && !(head.is_event_stream() && (200..300).contains(&head.status)) {
            return Err(AppendError::Differs("it was answered with no stream"));
        }
        Ok(())
    }

    /// What of a piece of the attempt's answer is new; nothing where all of it was passed on before. A piece
    /// without a byte is the end.
    pub(crate) fn compared(
        &mut self,
        attempt: AttemptId,
        piece: Segment,
    ) -> Result<Option<Segment>, AppendError> {
        let first = self.next_index();
        let Some(repeating) = &mut self.repeating else { return Ok(Some(piece)) };
        if self.finished || self.writer != Some(attempt) {
            return Err(AppendError::Fenced);
        }
        if repeating.first.is_none_or(|first| first == attempt) {
            repeating.first = Some(attempt);
            if !piece.bytes.is_empty() {
                repeating.comparer.passed(&piece.bytes);
            }
            return Ok(Some(piece));
        }
        if repeating.second != Some(attempt) {
            if repeating.second.is_some() || !repeating.comparer.may_begin() {
                return Err(AppendError::Differs("it cannot be compared"));
            }
            repeating.second = Some(attempt);
            repeating.comparer.begin();
        }
        if piece.bytes.is_empty() {
            let is_whole = repeating.comparer.has_caught_up();
            return if is_whole { Ok(Some(Segment::frame(first, piece.bytes))) } else { Err(SHORTER) };
        }
        let new = repeating.comparer.compare(&piece.bytes).map_err(AppendError::Differs)?;
        Ok((!new.is_empty()).then(|| Segment::frame(first, new)))
    }
}

const SHORTER: AppendError = AppendError::Differs("it has ended before what was sent");

#[cfg(test)]
#[path = "repeating_tests.rs"]
mod tests;
