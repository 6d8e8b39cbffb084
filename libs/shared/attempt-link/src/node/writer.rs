//! What is written to a link, and in which order.
//!
//! Attempts that have something take turns of about ten kilobytes. What was missed during an
//! interruption takes at most every second byte, as long as others have something. An `alive` stands
//! behind all that was ready when it fell due.

use bytes::{Buf, Bytes};
use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, Moment};

use super::{
    ALIVE_EVERY, ALIVE_EVERY_WHEN_EMPTY, AttemptHost, ConnectionId, Lane, NodeAction, NodeLanes, Progress,
    Supply, bye_bytes,
};
use crate::content::{End, Position, to_json};
use crate::records::{
    Kind, MAX_PARTS_BYTES, MAX_WHOLE_BYTES, POSITION_BYTES, RecordHead, write_positions, write_token_ids,
};

/// What an attempt writes before it is another one's turn, bytes. Source: .specs/01 CLOUD-2635.
pub(super) const TURN_BYTES: usize = 10 * 1024;
/// Attempts of which a record in parts is written at a time: a reader keeps them until they are whole.
/// Together with a record of the link's own they are what a reader keeps. Source: .specs/01 CLOUD-2603.
const MAX_IN_PARTS: usize = MAX_PARTS_BYTES / MAX_WHOLE_BYTES - 1;
/// Most attempts that an `alive` names: more than run on a node.
const MAX_ALIVE: usize = MAX_WHOLE_BYTES / POSITION_BYTES;

/// An attempt on a link.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) lane: u16,
    pub(super) number: u64,
    /// Where it stands in one of the lane's queues, or stood before its turn.
    pub(super) place: Option<u64>,
    /// How far it had come when it was resumed, until that is written.
    late: Option<u64>,
    /// The index behind what was written.
    written: u64,
    /// A record that is longer than a turn: what of it was not written, and whether any was.
    parts: Option<(RecordHead, Bytes, bool)>,
    /// It was ended, because a record of it was too long.
    failed: bool,
}

impl Attachment {
    pub(super) fn new(lane: u16, number: u64, late: Option<u64>, from: u64) -> Self {
        Self { lane, number, place: None, late, written: from, parts: None, failed: false }
    }

    /// It is one of those that [`MAX_IN_PARTS`] bounds.
    pub(super) fn is_in_parts(&self) -> bool {
        self.parts.as_ref().is_some_and(|(_, _, begun)| *begun)
    }
}

/// What a turn came to.
enum Turn {
    Wrote,
    /// There is something else of it.
    Again,
    /// Others in parts go first: it waits until one of them is whole.
    Deferred,
    /// Nothing is there any more.
    Waiting,
    Over,
}

impl NodeLanes {
    /// There is more of the attempt than was supplied.
    pub fn appended(&mut self, attempt: &AttemptId) {
        let Some(attached) = self.attached.get_mut(attempt) else { return };
        let Some(lane) = self.lanes.get_mut(&attached.lane) else { return };
        if attached.place.is_none() {
            attached.place = Some(lane.enqueue(*attempt, attached.late.is_some()));
        }
        if let Some(id) = lane.in_use {
            self.ask_to_write(id);
        }
    }

    /// Appends what is to be written to the link now, until `out` has `most` bytes or there is no more.
    /// Returns whether there is: then it is called again once the connection takes more.
    pub fn fill(
        &mut self,
        now: Moment,
        id: ConnectionId,
        out: &mut Vec<u8>,
        most: usize,
        host: &mut impl AttemptHost,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        connection.asked = false;
        out.append(&mut connection.pending);
        let lane = connection.key.lane;
        let in_use = self.lanes.get(&lane).is_some_and(|entry| entry.in_use == Some(id));
        if in_use {
            self.begin_alive(now, id, lane, host);
            while out.len() < most
                && let Some((attempt, is_late)) = self.next_turn(lane)
            {
                let before = out.len();
                let turn = self.turn(now, &attempt, out, host);
                let is_empty = matches!(turn, Turn::Waiting);
                match turn {
                    Turn::Wrote | Turn::Again | Turn::Waiting => {}
                    Turn::Deferred => {
                        self.defer(lane, attempt);
                        continue;
                    }
                    Turn::Over => {
                        self.detach(&attempt);
                        host.detach(now, &attempt);
                    }
                }
                self.after_turn(id, lane, &attempt, is_late, out.len() - before, is_empty);
                self.write_alive(now, id, lane, out, host);
            }
        } else if let Some(connection) = self.connections.get_mut(&id).filter(|offer| now >= offer.alive_at) {
            connection.alive_at = now + ALIVE_EVERY_WHEN_EMPTY;
            RecordHead::new(Kind::Alive, 0, 0, 0).write_short(out, &[]);
        }
        if in_use {
            self.write_alive(now, id, lane, out, host);
        }
        let has_more = in_use && self.lanes.get(&lane).is_some_and(Lane::has_more);
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        if !has_more && let Some(reason) = connection.bye {
            RecordHead::new(Kind::Bye, 0, 0, 0).write_short(out, &bye_bytes(reason));
            self.connections.remove(&id);
            self.actions.push_back(NodeAction::Close(id));
            self.lose_reader(now, lane, id, host);
            return false;
        }
        connection.asked = has_more;
        has_more
    }

    /// Whose turn it is, and whether it is one that was resumed. It stands in no queue meanwhile.
    fn next_turn(&mut self, lane: u16) -> Option<(AttemptId, bool)> {
        let lane = self.lanes.get_mut(&lane)?;
        if lane.live.is_empty() || lane.late.is_empty() {
            (lane.live_bytes, lane.late_bytes) = (0, 0);
        }
        let is_late = lane.live.is_empty() || !lane.late.is_empty() && lane.late_bytes < lane.live_bytes;
        let queue = if is_late { &mut lane.late } else { &mut lane.live };
        Some((queue.pop_first()?.1, is_late))
    }

    fn turn(
        &mut self,
        now: Moment,
        attempt: &AttemptId,
        out: &mut Vec<u8>,
        host: &mut impl AttemptHost,
    ) -> Turn {
        let Some(attached) = self.attached.get_mut(attempt) else { return Turn::Over };
        let Some(lane) = self.lanes.get_mut(&attached.lane) else { return Turn::Over };
        let (lane_number, number) = (attached.lane, attached.number);
        if attached.parts.is_none() {
            let (head, bytes) = match host.supply(attempt, TURN_BYTES) {
                Supply::Waiting => return Turn::Waiting,
                Supply::Gone => return Turn::Over,
                Supply::End { next, report_seq } => {
                    let head = RecordHead::new(Kind::End, number, next, 0);
                    head.write_short(out, &to_json(&End { report_seq }));
                    return Turn::Over;
                }
                Supply::Frames { first, count, bytes } => {
                    (RecordHead::new(Kind::Frames, number, first, count), bytes)
                }
                Supply::TokenIds { first, frames } => {
                    let mut bytes = Vec::new();
                    for frame in &frames {
                        write_token_ids(&mut bytes, frame.total, &frame.ids);
                    }
                    let count = u32::try_from(frames.len()).unwrap_or(u32::MAX);
                    (RecordHead::new(Kind::TokenIds, number, first, count), bytes.into())
                }
                Supply::Head(head) => (RecordHead::new(Kind::Head, number, 0, 0), to_json(&head).into()),
                Supply::Error(error) => (RecordHead::new(Kind::Error, number, 0, 0), to_json(&error).into()),
            };
            if bytes.len() <= TURN_BYTES {
                head.write_short(out, &bytes);
                attached.wrote(head);
                return Turn::Wrote;
            }
            if bytes.len() > MAX_WHOLE_BYTES {
                if std::mem::replace(&mut attached.failed, true) {
                    return Turn::Over;
                }
                let message = format!("a record of {} bytes, of which {MAX_WHOLE_BYTES} go", bytes.len());
                host.fail(now, attempt, attached.written, ErrorBody::new(ErrorCode::Internal, message));
                return Turn::Again;
            }
            attached.parts = Some((head, bytes, false));
        }
        let Some((head, bytes, begun)) = &mut attached.parts else { return Turn::Waiting };
        if !*begun {
            if lane.in_parts >= MAX_IN_PARTS {
                return Turn::Deferred;
            }
            *begun = true;
            lane.in_parts += 1;
        }
        let part = bytes.len().min(TURN_BYTES);
        let more = bytes.len() > part;
        RecordHead { more, ..*head }.write_short(out, &bytes[..part]);
        bytes.advance(part);
        if !more {
            let head = *head;
            attached.parts = None;
            attached.wrote(head);
            self.part_over(lane_number);
        }
        Turn::Wrote
    }

    /// It stands in no queue of those that take turns before one of the records in parts is whole.
    fn defer(&mut self, lane: u16, attempt: AttemptId) {
        if let Some(lane) = self.lanes.get_mut(&lane) {
            let place = self.attached.get(&attempt).and_then(|attached| attached.place);
            lane.deferred.extend(place.map(|place| (place, attempt)));
        }
    }

    /// A record in parts is whole, or is none any more: one that waits for its place has the next turn
    /// of its queue.
    pub(super) fn part_over(&mut self, lane: u16) {
        let Some(lane) = self.lanes.get_mut(&lane) else { return };
        lane.in_parts -= 1;
        let Some((place, next)) = lane.deferred.pop_first() else { return };
        let is_late = self.attached.get(&next).is_some_and(|attached| attached.late.is_some());
        let queue = if is_late { &mut lane.late } else { &mut lane.live };
        queue.insert(place, next);
    }

    /// The attempt stands in its queue again, unless nothing is there.
    fn after_turn(
        &mut self,
        id: ConnectionId,
        lane: u16,
        attempt: &AttemptId,
        is_late: bool,
        bytes: usize,
        is_empty: bool,
    ) {
        let Some(lane) = self.lanes.get_mut(&lane) else { return };
        let counted = if is_late { &mut lane.late_bytes } else { &mut lane.live_bytes };
        *counted += bytes;
        let goals = self.connections.get_mut(&id).and_then(|connection| connection.goals.as_mut());
        let Some(attached) = self.attached.get_mut(attempt) else {
            goals.map(|goals| goals.remove(attempt));
            return;
        };
        if is_empty {
            // All that was there is written.
            attached.place = None;
            attached.late = None;
            goals.map(|goals| goals.remove(attempt));
            return;
        }
        if let Some(goals) = goals {
            let reached =
                |goal: &Progress| attached.written >= goal.next && !goal.ended && !attached.is_in_parts();
            if goals.get(attempt).is_some_and(reached) {
                goals.remove(attempt);
            }
        }
        attached.late = attached.late.filter(|late| attached.written < *late);
        attached.place = Some(lane.enqueue(*attempt, attached.late.is_some()));
    }

    /// An `alive` is due: what is ready now is written before it.
    fn begin_alive(&mut self, now: Moment, id: ConnectionId, lane: u16, host: &impl AttemptHost) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if now < connection.alive_at || connection.goals.is_some() {
            return;
        }
        let Some(lane) = self.lanes.get(&lane) else { return };
        let ready = lane.live.values().chain(lane.late.values()).chain(lane.deferred.values());
        let goals = ready.filter_map(|attempt| Some((*attempt, host.progress(now, attempt)?)));
        connection.goals = Some(goals.collect());
    }

    fn write_alive(
        &mut self,
        now: Moment,
        id: ConnectionId,
        lane: u16,
        out: &mut Vec<u8>,
        host: &impl AttemptHost,
    ) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.goals.as_ref().is_none_or(|goals| !goals.is_empty()) {
            return;
        }
        connection.goals = None;
        let Some(lane) = self.lanes.get(&lane) else { return };
        let every = if lane.numbers.is_empty() { ALIVE_EVERY_WHEN_EMPTY } else { ALIVE_EVERY };
        connection.alive_at = now + every;
        let named = lane.numbers.iter().take(MAX_ALIVE).filter_map(|(number, attempt)| {
            let progress = host.progress(now, attempt)?;
            (progress.lives || progress.ended).then_some(Position { number: *number, next: progress.next })
        });
        let mut bytes = Vec::new();
        write_positions(&mut bytes, named);
        let count = u32::try_from(bytes.len() / POSITION_BYTES).unwrap_or(u32::MAX);
        RecordHead::new(Kind::Alive, 0, 0, count)
            .write(out, &bytes, TURN_BYTES)
            .expect("no more are named than one record has room for");
    }
}

impl Attachment {
    fn wrote(&mut self, head: RecordHead) {
        if head.kind == Kind::Frames {
            self.written = head.first.saturating_add(u64::from(head.count));
        }
    }
}

impl Lane {
    /// Puts an attempt behind those that have something. Returns its place.
    fn enqueue(&mut self, attempt: AttemptId, is_late: bool) -> u64 {
        self.place += 1;
        let queue = if is_late { &mut self.late } else { &mut self.live };
        queue.insert(self.place, attempt);
        self.place
    }

    /// One that is deferred waits for another one in a queue.
    fn has_more(&self) -> bool {
        !self.live.is_empty() || !self.late.is_empty()
    }
}
