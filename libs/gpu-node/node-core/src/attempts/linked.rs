//! Attempts on a link: what it is supplied with, and what it has seen.
//!
//! Whole frames come in records that are cut out of the pieces; the ids of their tokens, the error and
//! the end are records of their own. Comments without a frame go in a record of no frames.

use attempt_link::content::{AnswerHead, FrameTokens};
use attempt_link::node::Supply;
use bytes::Bytes;
use pool_registry_types::{AttemptId, ErrorBody, LogId, Moment};

use super::{Cursor, Held, Piece, Retention};

/// How a link reads an attempt.
#[derive(Debug)]
pub(super) struct Linked {
    log: LogId,
    /// Absent where no link does for now, or all was supplied.
    cursor: Option<Cursor>,
    /// The tokens of frames before this one were supplied.
    tokens_from: u64,
    head_supplied: bool,
    error_supplied: bool,
}

impl Piece {
    /// From the byte on whole frames of at most `most` bytes, or one that is longer: the index of the first
    /// one, how many, and where they end. Comments behind the last frame of the piece come with it where
    /// they fit, or alone.
    fn cut(&self, from: usize, most: usize) -> (u64, u64, usize) {
        let before = self.ends.frames_within(from);
        let (all, end) = (self.ends.frames(), self.bytes.len());
        let first = self.first + before;
        let fits = self.ends.frames_within(from.saturating_add(most)).max(before + 1).min(all);
        if before == all || fits == all && end - from <= most {
            return (first, all - before, end);
        }
        (first, fits - before, self.ends.end_of(fits))
    }

    /// The first tokens that are known in a row of the frames from `from` to before `to`, with the index
    /// of their first frame.
    fn tokens_in_row(&self, from: u64, to: u64) -> Option<(u64, Vec<FrameTokens>)> {
        let at = self.tokens.partition_point(|(index, _)| *index < from);
        let first = self.tokens.get(at).map(|(index, _)| *index).filter(|index| *index < to)?;
        let row = self.tokens[at..].iter().zip(first..to).take_while(|((index, _), next)| index == next);
        Some((first, row.map(|((_, tokens), _)| tokens.clone()).collect()))
    }
}

impl Held {
    /// A link follows the attempt that was just accepted, or was resumed with this cursor.
    pub fn link(&mut self, attempt: &AttemptId, log: LogId, cursor: Cursor) {
        if let Some(entry) = self.entries.get_mut(attempt) {
            let linked = Linked {
                log,
                cursor: Some(cursor),
                tokens_from: 0,
                head_supplied: false,
                error_supplied: false,
            };
            entry.linked = Some(linked);
        }
    }

    /// The engine's answer has this head, before anything of it is appended.
    pub fn set_head(&mut self, attempt: &AttemptId, head: AnswerHead) {
        if let Some(entry) = self.entries.get_mut(attempt) {
            entry.head = Some(Box::new(head));
        }
    }

    /// The log of an attempt that came over a link.
    pub fn log(&self, attempt: &AttemptId) -> Option<LogId> {
        Some(self.entries.get(attempt)?.linked.as_ref()?.log)
    }

    /// No link follows the attempt any more.
    pub fn unlink(&mut self, now: Moment, attempt: &AttemptId) {
        let linked = self.entries.get_mut(attempt).and_then(|entry| entry.linked.as_mut());
        if let Some(cursor) = linked.and_then(|linked| linked.cursor.take()) {
            self.detach(now, attempt, &cursor);
        }
    }

    /// The index behind the last frame, and whether the attempt has ended. Nothing where it is not held.
    pub fn progress(&self, attempt: &AttemptId) -> Option<(u64, bool)> {
        let entry = self.entries.get(attempt)?;
        Some((entry.next, entry.ended.is_some()))
    }

    /// What its link has not been given: in a record of at most `most` bytes, or one longer frame.
    pub fn supply(&mut self, attempt: &AttemptId, most: usize) -> Supply {
        let Some(entry) = self.entries.get_mut(attempt) else { return Supply::Gone };
        let Some(linked) = &mut entry.linked else { return Supply::Gone };
        let Some(cursor) = linked.cursor.as_mut().filter(|cursor| cursor.reader == entry.reader) else {
            return Supply::Gone;
        };
        if let Some(head) = &entry.head
            && !std::mem::replace(&mut linked.head_supplied, true)
        {
            return Supply::Head((**head).clone());
        }
        let at = |cursor: &Cursor| usize::try_from(cursor.piece - entry.dropped).unwrap_or(usize::MAX);
        while let Some(piece) = entry.pieces.get(at(cursor)) {
            if cursor.offset >= piece.bytes.len() {
                (cursor.piece, cursor.offset) = (cursor.piece + 1, 0);
                continue;
            }
            let (first, count, end) = piece.cut(cursor.offset, most);
            if let Some((first, frames)) = piece.tokens_in_row(first.max(linked.tokens_from), first + count) {
                linked.tokens_from = first + frames.len() as u64;
                return Supply::TokenIds { first, frames };
            }
            let bytes: Bytes = piece.bytes.slice(cursor.offset..end);
            cursor.offset = end;
            return Supply::Frames { first, count: u32::try_from(count).unwrap_or(u32::MAX), bytes };
        }
        if entry.ended.is_none() {
            return Supply::Waiting;
        }
        if !std::mem::replace(&mut linked.error_supplied, true)
            && let Some(error) = &entry.ending.error
        {
            return Supply::Error(error.clone());
        }
        linked.cursor = None;
        let end = Supply::End { next: entry.next, report_seq: entry.ending.report_seq };
        self.change(attempt, |entry| entry.read = true);
        end
    }

    /// The attempt ends with the error behind the record before `next`, once its driver has ended: what
    /// comes after it is dropped.
    pub fn fail(&mut self, attempt: &AttemptId, next: u64, error: ErrorBody) {
        let Some(entry) = self.entries.get_mut(attempt) else { return };
        while let Some(piece) = entry.pieces.pop_back_if(|piece| piece.first >= next) {
            self.bytes -= piece.cost();
            entry.room -= piece.cost();
            entry.bytes -= piece.bytes.len();
        }
        if let Some(piece) = entry.pieces.back_mut().filter(|piece| piece.next() > next) {
            let frames = next - piece.first;
            let end = piece.ends.end_of(frames);
            entry.bytes -= piece.bytes.len() - end;
            piece.bytes.truncate(end);
            piece.ends.truncate(frames);
            piece.tokens.retain(|(index, _)| *index < next);
        }
        entry.next = entry.next.min(next);
        if entry.ended.is_some() {
            entry.ending.error = Some(error);
        } else {
            entry.failing = Some(error);
        }
    }

    /// What stands before the record `next` was seen: of an attempt whose window this moves it goes.
    /// Returns whether there is less now. Comments behind the last frame that was seen come again, and stay.
    pub fn seen(&mut self, attempt: &AttemptId, next: u64) -> bool {
        let mut went = false;
        loop {
            let Some(entry) = self.entries.get(attempt) else { return went };
            let cursor = entry.linked.as_ref().and_then(|linked| linked.cursor.as_ref());
            let is_passed = cursor.is_some_and(|cursor| cursor.piece > entry.dropped);
            let is_seen = |piece: &Piece| {
                piece.next() < next
                    || piece.next() == next && piece.ends.end_of(piece.ends.frames()) == piece.bytes.len()
            };
            let goes = is_passed && entry.pieces.front().is_some_and(is_seen);
            if !goes || entry.start.retention != Retention::Unseen {
                return went;
            }
            self.drop_first(attempt);
            went = true;
        }
    }
}
