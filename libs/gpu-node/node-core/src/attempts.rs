//! What a node keeps of its attempts' streams: bytes by index, who reads them, and what goes when.
//!
//! A *driver* appends to an attempt's buffer, a *reader* takes from it by its [`Cursor`]. A reader that
//! goes ends nothing: it may come again, at the record that it wants next. An attempt ends by its
//! driver, or is stopped: by an order, because nobody has read it for [`DETACHED`], or because its
//! reader has left its window full for [`WINDOW_FULL`]. What has ended stays until it is *done*, for at
//! most [`ENDED`].
//!
//! Records are the attempt's own frames, counted from its first index; a comment belongs to the frame
//! that follows it and comes again with it. What a record means is not known here. Nothing is copied:
//! a reader takes the bytes that the driver has given.
//!
//! A reader of an exchange has its cursor itself. That of an attempt on a link stands with the attempt
//! ([`Held::supply`]), which then has beside its bytes what a link says apart.

mod linked;
mod piece;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use attempt_link::content::AnswerHead;
use bytes::Bytes;
use pool_registry_types::{AttemptId, ErrorBody, Moment, PoolId, ReplicaId};

use linked::Linked;
pub use piece::{Ends, Piece};

/// Most bytes that are kept of one attempt, and most that a reader may be behind. Source: .specs/01
/// CLOUD-1561.
pub const MAX_ATTEMPT_BYTES: usize = 8 * 1024 * 1024;
/// What all attempts take together unless a setting says otherwise, bytes.
pub const HELD_BYTES: usize = 256 * 1024 * 1024;
/// How long an attempt runs on without a reader: longer than a control plane waits for a connection.
const DETACHED: Duration = Duration::from_secs(15);
/// How long a reader may leave its window full.
const WINDOW_FULL: Duration = Duration::from_secs(30);
/// How long an attempt that has ended is kept for a reader to come again.
const ENDED: Duration = Duration::from_secs(60);
/// How long a node that leaves waits for what has ended to be done, after the last end.
const DONE_WITHIN: Duration = Duration::from_secs(2);
/// What an attempt, and each of its pieces, takes beside its bytes.
const ATTEMPT_BYTES: usize = 512;
const PIECE_BYTES: usize = 96;

/// How much of an attempt's stream is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retention {
    /// All of it until the attempt is done: a reader may come again at any record.
    Keep,
    /// What was not seen yet, which is said ([`Held::seen`]): nobody will ask for the rest again.
    Unseen,
    /// What was not handed over yet. The attempt is done with its last byte.
    Attached,
}

/// What a link says of an attempt's end beside its frames.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ending {
    /// Why it ended without a final frame.
    pub error: Option<ErrorBody>,
    /// The number of the last report made before the end.
    pub report_seq: u64,
}

/// The stream has grown past what is kept of an attempt; the piece was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer has more than {most} bytes, which is the most that is kept of an attempt")]
pub struct TooLong {
    most: usize,
}

/// Why a reader cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// It was never accepted in this boot, and never will be.
    #[error("the attempt was never accepted here")]
    Unknown,
    /// It was, and is not held from that record on any more.
    #[error("the attempt is not held from there any more")]
    Gone,
}

/// Where a reader stands. Void once the attempt was given another reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    reader: u32,
    /// Pieces of the attempt that it has taken or passed over.
    piece: u64,
    /// Bytes of the next one that it does not want.
    offset: usize,
}

impl Cursor {
    /// Of the reader that an attempt is accepted with.
    pub fn first() -> Self {
        Self { reader: 0, piece: 0, offset: 0 }
    }
}

/// What a reader finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    Bytes(Bytes),
    /// Nothing for now.
    Waiting,
    /// All was handed over, or the attempt is not held any more.
    Over,
    /// Another reader follows the attempt.
    Replaced,
}

/// A reader goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    pub cursor: Cursor,
    pub replica_id: ReplicaId,
    /// The number of the last report made before the acceptance.
    pub report_seq: u64,
}

/// An attempt as it is accepted.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub(crate) pool_id: PoolId,
    pub(crate) replica_id: ReplicaId,
    pub(crate) report_seq: u64,
    pub(crate) first_index: u64,
    pub(crate) retention: Retention,
}

#[derive(Debug)]
struct Entry {
    start: Start,
    pieces: VecDeque<Piece>,
    /// Pieces before the first one that is still here.
    dropped: u64,
    /// The first record that is still here, and the one that comes next.
    first: u64,
    next: u64,
    /// Of the pieces that are here.
    bytes: usize,
    /// Memory that they take, what each takes beside its bytes included.
    room: usize,
    /// Of its request, until the engine has it.
    payload: usize,
    /// The number of the present reader.
    reader: u32,
    detached: Option<Moment>,
    full: Option<Moment>,
    ended: Option<Moment>,
    ending: Ending,
    /// It is to end with this, and nothing more comes of it.
    failing: Option<ErrorBody>,
    /// Of an attempt on a link.
    linked: Option<Linked>,
    /// Of an answer that is passed on as the engine gave it.
    head: Option<Box<AnswerHead>>,
    /// The present reader has had all of it.
    read: bool,
    /// It was asked to end.
    stopping: bool,
    /// As it stands in [`Held::due`] and in [`Held::spare`].
    due: Option<Moment>,
    spare: Option<Moment>,
}

impl Entry {
    fn cost(&self) -> usize {
        ATTEMPT_BYTES + self.payload + self.room
    }

    /// Since when it may go to make room: it has ended, and no reader is on its way through it.
    fn spare(&self) -> Option<Moment> {
        self.ended.filter(|_| self.read || self.detached.is_some())
    }

    /// Returns the memory that it takes.
    fn push(&mut self, attempt: &AttemptId, piece: Piece) -> usize {
        debug_assert_eq!(piece.first, self.next, "a piece of attempt {attempt} is out of order");
        let cost = piece.cost();
        self.next = piece.next();
        self.bytes += piece.bytes.len();
        self.room += cost;
        self.pieces.push_back(piece);
        cost
    }

    fn deadline(&self) -> Option<Moment> {
        if let Some(ended) = self.ended {
            return Some(ended + ENDED);
        }
        let detached = self.detached.map(|since| since + DETACHED);
        let full = self.full.map(|since| since + WINDOW_FULL);
        detached.into_iter().chain(full).min().filter(|_| !self.stopping)
    }
}

/// All attempts of a node whose bytes it has.
#[derive(Debug)]
pub struct Held {
    entries: BTreeMap<AttemptId, Entry>,
    /// When something is to be dropped or stopped.
    due: BTreeSet<(Moment, AttemptId)>,
    /// What has ended, the oldest first, and those of it that may go to make room.
    ended: BTreeSet<(Moment, AttemptId)>,
    spare: BTreeSet<(Moment, AttemptId)>,
    /// What all of them take, and what those do that may go.
    bytes: usize,
    spare_bytes: usize,
    bound: usize,
    /// What was removed, and is still to be freed.
    removed: Vec<VecDeque<Piece>>,
    /// Most that is kept of one, and most that its reader may be behind.
    attempt_bound: usize,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            due: BTreeSet::new(),
            ended: BTreeSet::new(),
            spare: BTreeSet::new(),
            bytes: 0,
            spare_bytes: 0,
            bound: HELD_BYTES,
            removed: Vec::new(),
            attempt_bound: MAX_ATTEMPT_BYTES,
        }
    }
}

impl Held {
    pub(crate) fn set_bound(&mut self, bytes: usize) {
        self.bound = bytes;
    }

    pub(crate) fn set_attempt_bound(&mut self, bytes: usize) {
        self.attempt_bound = bytes;
    }

    /// What all attempts take together, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn bound(&self) -> usize {
        self.bound
    }

    /// How many attempts there are, running or ended.
    pub fn attempts(&self) -> usize {
        self.entries.len()
    }

    pub fn contains(&self, attempt: &AttemptId) -> bool {
        self.entries.contains_key(attempt)
    }

    /// Whether the attempt has ended and is kept for a reader.
    pub fn has_ended(&self, attempt: &AttemptId) -> bool {
        self.entries.get(attempt).is_some_and(|entry| entry.ended.is_some())
    }

    /// Since when nobody reads the attempt.
    pub fn detached_since(&self, attempt: &AttemptId) -> Option<Moment> {
        self.entries.get(attempt)?.detached
    }

    /// Whether an attempt ended so lately that a node which leaves waits until it is done.
    pub fn awaits_done(&self, now: Moment) -> bool {
        self.ended.last().is_some_and(|(ended, _)| now < *ended + DONE_WITHIN)
    }

    /// When something is to be dropped or stopped next.
    pub fn next_deadline(&self) -> Option<Moment> {
        self.due.first().map(|(at, _)| *at)
    }

    /// The attempts and where each runs or ran.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&AttemptId, &PoolId, &ReplicaId)> {
        self.entries.iter().map(|(id, entry)| (id, &entry.start.pool_id, &entry.start.replica_id))
    }

    // ---- the driver ----

    /// Whether there is no room for another attempt, whatever is removed that may go.
    pub fn is_full(&self) -> bool {
        self.bytes - self.spare_bytes + ATTEMPT_BYTES > self.bound
    }

    /// An attempt is accepted, with its first reader.
    pub(crate) fn begin(&mut self, attempt: AttemptId, start: Start) {
        let entry = Entry {
            pieces: VecDeque::new(),
            dropped: 0,
            first: start.first_index,
            next: start.first_index,
            bytes: 0,
            room: 0,
            payload: 0,
            reader: Cursor::first().reader,
            detached: None,
            full: None,
            ended: None,
            ending: Ending::default(),
            failing: None,
            linked: None,
            head: None,
            read: false,
            stopping: false,
            due: None,
            spare: None,
            start,
        };
        self.bytes += entry.cost();
        self.entries.insert(attempt, entry);
        self.make_room();
    }

    /// The attempt's request takes so many bytes, until the engine has it: 0 from then on.
    pub fn count_payload(&mut self, attempt: &AttemptId, bytes: usize) {
        let Some(entry) = self.entries.get_mut(attempt) else { return };
        self.bytes = self.bytes - entry.payload + bytes;
        entry.payload = bytes;
        self.make_room();
    }

    /// Whether the driver may go on: the reader is not too far behind. What makes the window full is
    /// taken all the same, so it is full by one piece more.
    pub fn has_room(&self, attempt: &AttemptId) -> bool {
        self.entries
            .get(attempt)
            .is_none_or(|entry| entry.start.retention == Retention::Keep || entry.bytes < self.attempt_bound)
    }

    /// Takes what the driver has made. What is not held any more is nobody's.
    pub fn append(&mut self, now: Moment, attempt: &AttemptId, piece: Piece) -> Result<(), TooLong> {
        let Some(entry) = self.entries.get_mut(attempt) else { return Ok(()) };
        if entry.failing.is_some() {
            return Ok(());
        }
        let kept = entry.start.retention == Retention::Keep;
        if kept && entry.bytes + piece.bytes.len() > self.attempt_bound {
            return Err(TooLong { most: self.attempt_bound });
        }
        self.bytes += entry.push(attempt, piece);
        if !kept && entry.bytes >= self.attempt_bound && entry.full.is_none() {
            self.change(attempt, |entry| entry.full = Some(now));
        }
        self.make_room();
        Ok(())
    }

    /// The attempt has ended, with these last bytes or, where its driver has failed, without any.
    pub fn finish(&mut self, now: Moment, attempt: &AttemptId, last: Option<Piece>, ending: Ending) {
        let Some(entry) = self.entries.get_mut(attempt).filter(|entry| entry.ended.is_none()) else { return };
        let failing = entry.failing.take();
        if let Some(piece) = last.filter(|_| failing.is_none()) {
            self.bytes += entry.push(attempt, piece);
        }
        entry.ending = Ending { error: failing.or(ending.error), ..ending };
        self.bytes -= std::mem::take(&mut entry.payload);
        self.change(attempt, |entry| entry.ended = Some(now));
        self.ended.insert((now, *attempt));
        self.make_room();
    }

    // ---- the reader ----

    /// Hands over what comes next, whole pieces as the driver gave them.
    pub fn take(&mut self, attempt: &AttemptId, cursor: &mut Cursor) -> Taken {
        loop {
            let Some(entry) = self.entries.get_mut(attempt) else { return Taken::Over };
            if entry.reader != cursor.reader {
                return Taken::Replaced;
            }
            let at = usize::try_from(cursor.piece - entry.dropped).unwrap_or(usize::MAX);
            let Some(piece) = entry.pieces.get(at) else {
                if entry.ended.is_none() {
                    return Taken::Waiting;
                }
                match entry.start.retention {
                    Retention::Attached => self.remove(attempt),
                    Retention::Keep | Retention::Unseen => {
                        self.change(attempt, |entry| entry.read = true);
                        self.make_room();
                    }
                }
                return Taken::Over;
            };
            let bytes = piece.bytes.slice(cursor.offset..);
            (cursor.piece, cursor.offset) = (cursor.piece + 1, 0);
            if entry.start.retention == Retention::Attached {
                self.drop_first(attempt);
            }
            if !bytes.is_empty() {
                return Taken::Bytes(bytes);
            }
        }
    }

    /// The first piece will not be asked for again.
    fn drop_first(&mut self, attempt: &AttemptId) {
        let Some(entry) = self.entries.get_mut(attempt) else { return };
        let Some(piece) = entry.pieces.pop_front() else { return };
        self.bytes -= piece.cost();
        entry.room -= piece.cost();
        entry.bytes -= piece.bytes.len();
        entry.dropped += 1;
        entry.first = piece.next();
        let is_last = entry.start.retention == Retention::Attached && entry.ended.is_some();
        if is_last && entry.pieces.is_empty() {
            self.remove(attempt);
        } else if entry.full.is_some() && entry.bytes < self.attempt_bound {
            self.change(attempt, |entry| entry.full = None);
        }
    }

    /// The reader goes. Returns whether the attempt goes on without it, or with another one.
    pub fn detach(&mut self, now: Moment, attempt: &AttemptId, cursor: &Cursor) -> bool {
        let Some(entry) = self.entries.get(attempt) else { return false };
        let goes_on = entry.ended.is_none();
        if entry.reader == cursor.reader {
            self.change(attempt, |entry| entry.detached = Some(now));
            self.make_room();
        }
        goes_on
    }

    /// Another reader follows the attempt from the record `from` on, with the comments before it; the
    /// one before it is void.
    pub(crate) fn resume(&mut self, attempt: &AttemptId, from: u64) -> Result<Resumed, ResumeError> {
        let entry = self.entries.get(attempt).ok_or(ResumeError::Gone)?;
        if from < entry.first || from > entry.next {
            return Err(ResumeError::Gone);
        }
        // Comments behind the frame before it may end an earlier piece.
        let at = entry.pieces.partition_point(|piece| piece.next() < from);
        let unwanted = |piece: &Piece| piece.ends.end_of(from.saturating_sub(piece.first));
        let cursor = Cursor {
            reader: entry.reader + 1,
            piece: entry.dropped + at as u64,
            offset: entry.pieces.get(at).map_or(0, unwanted),
        };
        let (replica_id, report_seq) = (entry.start.replica_id.clone(), entry.start.report_seq);
        self.change(attempt, |entry| {
            (entry.reader, entry.detached, entry.read) = (cursor.reader, None, false);
        });
        Ok(Resumed { cursor, replica_id, report_seq })
    }

    // ---- the end ----

    /// Nobody will ask for the attempt's bytes again. One that runs is stopped, not done.
    pub fn done(&mut self, attempt: &AttemptId) {
        if self.has_ended(attempt) {
            self.remove(attempt);
        }
    }

    pub(crate) fn remove(&mut self, attempt: &AttemptId) {
        let Some(entry) = self.entries.remove(attempt) else { return };
        self.bytes -= entry.cost();
        if let Some(at) = entry.due {
            self.due.remove(&(at, *attempt));
        }
        if let Some(at) = entry.ended {
            self.ended.remove(&(at, *attempt));
        }
        if let Some(at) = entry.spare {
            self.spare.remove(&(at, *attempt));
            self.spare_bytes -= entry.cost();
        }
        if !entry.pieces.is_empty() {
            self.removed.push(entry.pieces);
        }
    }

    /// What was removed since the last call. To free it takes its time, for which nobody who wants the
    /// node's core should wait: whoever has changed something takes this, and drops it outside.
    pub fn take_removed(&mut self) -> Vec<VecDeque<Piece>> {
        std::mem::take(&mut self.removed)
    }

    /// Drops what has ended long enough ago. Returns an attempt that runs and is to be stopped; to be
    /// called until it returns none.
    pub fn expired(&mut self, now: Moment) -> Option<AttemptId> {
        loop {
            let (at, attempt) = *self.due.first()?;
            if at > now {
                return None;
            }
            if !self.has_ended(&attempt) {
                self.change(&attempt, |entry| entry.stopping = true);
                return Some(attempt);
            }
            self.remove(&attempt);
        }
    }

    /// Removes what may go, the oldest first, until no more than the bound is taken. What runs stays, and
    /// what has ended while its reader is on its way through it.
    fn make_room(&mut self) {
        while self.bytes > self.bound
            && let Some((_, oldest)) = self.spare.first().copied()
        {
            self.remove(&oldest);
        }
    }

    /// Changes what decides about an attempt's deadline, and whether it may go.
    fn change(&mut self, attempt: &AttemptId, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.entries.get_mut(attempt) else { return };
        change(entry);
        let (due, spare) = (entry.deadline(), entry.spare());
        if let Some(before) = std::mem::replace(&mut entry.due, due) {
            self.due.remove(&(before, *attempt));
        }
        self.due.extend(due.map(|at| (at, *attempt)));
        // Nothing comes to it or goes from it while it may go.
        if let Some(before) = std::mem::replace(&mut entry.spare, spare) {
            self.spare.remove(&(before, *attempt));
            self.spare_bytes -= entry.cost();
        }
        if let Some(at) = spare {
            self.spare.insert((at, *attempt));
            self.spare_bytes += entry.cost();
        }
    }
}

#[cfg(test)]
#[path = "attempts_tests.rs"]
mod tests;

#[cfg(test)]
mod linked_tests;
