//! What POSTs bring.

use pool_registry_types::{AttemptId, ErrorBody, ErrorCode, Moment};

use super::writer::Attachment;
use super::{ALIVE_EVERY, AttemptHost, ConnectionId, NodeLanes, NotResumed};
use crate::content::{Acceptance, to_json};
use crate::records::{Kind, MAX_RECORD_BYTES, RecordHead};
use crate::wire::{ControlAnswer, ControlBody, LinkKey, SingleBody, Start, StartError, StartsBody};

/// Why a POST was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostRefusal {
    /// `409 STALE_LINK`: its stops and what it says is done counted, nothing else.
    #[error("the link is neither in use nor offered")]
    Stale,
    /// `401 BAD_TOKEN`: nothing is started; what was seen and is done counted.
    #[error("what the link was opened with does not count any more")]
    Credential,
}

/// Of a refusal's message that is too long.
const MAX_MESSAGE_CHARS: usize = 1_000;

impl NodeLanes {
    /// `POST /v2/attempts`.
    pub fn starts(
        &mut self,
        now: Moment,
        body: StartsBody,
        host: &mut impl AttemptHost,
    ) -> Result<(), PostRefusal> {
        for attempt in &body.done {
            host.done(now, attempt);
        }
        let id = self.named(now, body.key, host).ok_or(PostRefusal::Stale)?;
        for seen in body.seen {
            let numbers = self.lanes.get(&body.key.lane).map(|lane| &lane.numbers);
            if let Some(attempt) = numbers.and_then(|numbers| numbers.get(&seen.number)) {
                host.seen(now, attempt, seen.next);
            }
        }
        self.check_credential(id)?;
        for start in body.start {
            self.begin(now, body.key, id, start, host);
        }
        Ok(())
    }

    /// `POST /v2/attempts/{attempt_id}`; a start of another attempt than the path says is refused.
    pub fn single(
        &mut self,
        now: Moment,
        attempt: AttemptId,
        body: SingleBody,
        host: &mut impl AttemptHost,
    ) -> Result<(), PostRefusal> {
        let id = self.named(now, body.key, host).ok_or(PostRefusal::Stale)?;
        self.check_credential(id)?;
        match body.start {
            Ok(start) if start.facts.attempt_id != attempt => {
                let message = format!("attempt_id: is {}, and {attempt} in the path", start.facts.attempt_id);
                let error = ErrorBody::new(ErrorCode::InvalidParams, message);
                self.refuse(id, start.facts.number, error);
            }
            start => self.begin(now, body.key, id, start, host),
        }
        Ok(())
    }

    fn check_credential(&self, id: ConnectionId) -> Result<(), PostRefusal> {
        match self.connections.get(&id).and_then(|connection| connection.expires) {
            Some(_) => Err(PostRefusal::Credential),
            None => Ok(()),
        }
    }

    /// `POST /v2/attempts/control`: stops before resumes.
    pub fn control(
        &mut self,
        now: Moment,
        body: &ControlBody,
        host: &mut impl AttemptHost,
    ) -> Result<ControlAnswer, PostRefusal> {
        for attempt in &body.cancel {
            self.detach(attempt);
            host.stop(now, attempt);
        }
        let key = body.key();
        let id = self.named(now, key, host).ok_or(PostRefusal::Stale)?;
        let mut answer = ControlAnswer::default();
        for order in &body.resume {
            let attempt = order.attempt_id;
            if self.has_newer(key, attempt, order.number) {
                continue;
            }
            match host.resume(now, order) {
                Ok(acceptance) => {
                    let late = host.progress(now, &attempt).map(|progress| progress.next);
                    self.attach(now, key, id, attempt, order.number, order.from, late, &acceptance);
                }
                Err(not) => {
                    self.detach(&attempt);
                    match not {
                        NotResumed::Unknown => answer.unknown.push(attempt),
                        NotResumed::Gone => answer.gone.push(attempt),
                    }
                }
            }
        }
        Ok(answer)
    }

    /// An order that was overtaken: the highest number counts.
    fn has_newer(&self, key: LinkKey, attempt: AttemptId, number: u64) -> bool {
        let attached = self.attached.get(&attempt);
        attached.is_some_and(|attached| attached.lane == key.lane && attached.number >= number)
    }

    /// Takes a start, and says so on the link.
    fn begin(
        &mut self,
        now: Moment,
        key: LinkKey,
        id: ConnectionId,
        start: Result<Start, StartError>,
        host: &mut impl AttemptHost,
    ) {
        let (number, refused) = match start {
            Ok(start) => {
                let (number, attempt) = (start.facts.number, start.facts.attempt_id);
                if self.has_newer(key, attempt, number) {
                    return;
                }
                if self.leaving {
                    return self.refuse(id, number, ErrorBody::new(ErrorCode::Draining, "the node leaves"));
                }
                match host.accept(now, &start) {
                    Ok(acceptance) => {
                        let from = start.facts.first_index;
                        return self.attach(now, key, id, attempt, number, from, None, &acceptance);
                    }
                    Err(error) => (number, error),
                }
            }
            Err(error) => {
                let Some(number) = error.number else {
                    self.unreadable += 1;
                    return;
                };
                (number, ErrorBody::new(ErrorCode::InvalidParams, format!("{error}: {}", error.source)))
            }
        };
        self.refuse(id, number, refused);
    }

    /// What is longer than a record is cut to what it is about.
    fn refuse(&mut self, id: ConnectionId, number: u64, error: ErrorBody) {
        let mut bytes = to_json(&error);
        if bytes.len() > MAX_RECORD_BYTES {
            let message: String = error.message.chars().take(MAX_MESSAGE_CHARS).collect();
            bytes = to_json(&ErrorBody::new(error.code, message));
        }
        self.write_pending(id, RecordHead::new(Kind::Refused, number, 0, 0), &bytes);
    }

    fn write_pending(&mut self, id: ConnectionId, head: RecordHead, bytes: &[u8]) {
        if let Some(connection) = self.connections.get_mut(&id) {
            head.write(&mut connection.pending, bytes, super::writer::TURN_BYTES)
                .expect("what a POST is answered by is short");
        }
        self.ask_to_write(id);
    }

    /// The attempt is read by this link, under this number, from its record `from` on. `late`: how far
    /// it had come before.
    #[expect(clippy::too_many_arguments, reason = "what is attached, to what, and what is said of it")]
    fn attach(
        &mut self,
        now: Moment,
        key: LinkKey,
        id: ConnectionId,
        attempt: AttemptId,
        number: u64,
        from: u64,
        late: Option<u64>,
        acceptance: &Acceptance,
    ) {
        self.detach(&attempt);
        let Some(lane) = self.lanes.get_mut(&key.lane) else { return };
        if lane.numbers.is_empty()
            && let Some(connection) = self.connections.get_mut(&id)
        {
            connection.alive_at = connection.alive_at.min(now + ALIVE_EVERY);
        }
        lane.numbers.insert(number, attempt);
        self.attached.insert(attempt, Attachment::new(key.lane, number, late, from));
        self.write_pending(id, RecordHead::new(Kind::Accepted, number, 0, 0), &to_json(acceptance));
        self.appended(&attempt);
    }

    /// The link carries the attempt no more.
    pub(super) fn detach(&mut self, attempt: &AttemptId) {
        let Some(attached) = self.attached.remove(attempt) else { return };
        let Some(lane) = self.lanes.get_mut(&attached.lane) else { return };
        lane.numbers.remove(&attached.number);
        if let Some(place) = attached.place {
            lane.live.remove(&place);
            lane.late.remove(&place);
            lane.deferred.remove(&place);
        }
        let in_use = lane.in_use;
        if let Some(connection) = in_use.and_then(|id| self.connections.get_mut(&id))
            && let Some(goals) = &mut connection.goals
        {
            goals.remove(attempt);
        }
        if attached.is_in_parts() {
            self.part_over(attached.lane);
        }
    }

    /// The lane has lost its reader. Returns whether there was something to read.
    pub(super) fn detach_all(&mut self, now: Moment, lane: u16, host: &mut impl AttemptHost) -> bool {
        let Some(lane) = self.lanes.get_mut(&lane) else { return false };
        let attempts = std::mem::take(&mut lane.numbers);
        lane.live.clear();
        lane.late.clear();
        lane.deferred.clear();
        (lane.live_bytes, lane.late_bytes, lane.in_parts) = (0, 0, 0);
        for attempt in attempts.values() {
            self.attached.remove(attempt);
            host.detach(now, attempt);
        }
        !attempts.is_empty()
    }
}
