//! The node's end of all links: which of them count, and what is written to each.
//!
//! [`NodeLanes`] is told of GETs, POSTs and their ends; attempts themselves belong to an
//! [`AttemptHost`], which is handed in: it takes, keeps and stops them, and supplies what they have
//! made. A lane has one link in use. A GET beside it is an *offer*, which displaces nothing before a
//! POST names it.

mod posts;
mod writer;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use pool_registry_types::{AttemptId, ErrorBody, Moment};

use crate::Rule;
use crate::content::{Acceptance, AnswerHead, Bye, ByeReason, FrameTokens, Hello, to_json};
use crate::records::{Kind, MAX_RECORD_BYTES, RecordHead};
use crate::wire::{LifeId, LinkKey, LinkQuery, ResumeOrder, Start};

pub use posts::PostRefusal;

use writer::Attachment;

/// An offer that no POST names ends. Source: .specs/01 CLOUD-2610.
const OFFER_KEPT: Duration = Duration::from_secs(5);
/// Most of them in a lane; the oldest ends first.
const MAX_OFFERS: usize = 8;
/// Lanes of a control plane: one for each of its threads.
const MAX_LANES: u16 = 256;
/// A lane that brings no POST for so long has no reader. Source: .specs/01 CLOUD-2659.
const NO_POST: Duration = Duration::from_secs(9);
/// What runs goes on for so long on a link whose credential does not count any more. Source: .specs/01
/// CLOUD-2656.
const CREDENTIAL_GRACE: Duration = Duration::from_secs(60);
/// Answers that a link has not taken, bytes, beyond which it takes no POST but ends: a POST adds to them
/// what it may say at most.
const MAX_PENDING_BYTES: usize = 4 * 1024 * 1024;
/// Between two `alive` of a link.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
const ALIVE_EVERY_WHEN_EMPTY: Duration = Duration::from_secs(10);

/// The attempts of a node, as its links use them.
pub trait AttemptHost {
    /// Takes the attempt, or says why not. It has a reader from then on.
    fn accept(&mut self, now: Moment, start: &Start) -> Result<Acceptance, ErrorBody>;
    /// The attempt has another reader, from `order.from` on; what is before it was seen. One that was
    /// never accepted is remembered, and is unknown however often it is asked for: an answer may be lost.
    fn resume(&mut self, now: Moment, order: &ResumeOrder) -> Result<Acceptance, NotResumed>;
    /// Ends the attempt; one that comes later is refused.
    fn stop(&mut self, now: Moment, attempt: &AttemptId);
    /// Nobody will ask for the attempt again, if it has ended.
    fn done(&mut self, now: Moment, attempt: &AttemptId);
    /// What is before `next` will not be asked for again.
    fn seen(&mut self, now: Moment, attempt: &AttemptId, next: u64);
    /// The attempt has no reader any more, or all of it was given to one.
    fn detach(&mut self, now: Moment, attempt: &AttemptId);
    /// What comes next of it is more than a link can carry: the attempt ends with this error behind
    /// what is before `next`, and nothing from there on is supplied any more.
    fn fail(&mut self, now: Moment, attempt: &AttemptId, next: u64, error: ErrorBody);
    /// What its reader has not been given: whole frames of at most `most` bytes, or one longer one.
    fn supply(&mut self, attempt: &AttemptId, most: usize) -> Supply;
    /// Nothing where it is not held.
    fn progress(&self, now: Moment, attempt: &AttemptId) -> Option<Progress>;
}

/// Why an attempt is not read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotResumed {
    /// It was never accepted, and never will be.
    #[error("the attempt was never accepted here")]
    Unknown,
    /// It was, and is not held from there any more.
    #[error("the attempt is not held from there any more")]
    Gone,
}

/// What comes next of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Supply {
    Head(AnswerHead),
    Frames {
        first: u64,
        count: u32,
        bytes: Bytes,
    },
    /// Of the frames that follow.
    TokenIds {
        first: u64,
        frames: Vec<FrameTokens>,
    },
    Error(ErrorBody),
    /// All was supplied: `next` is the index behind the last frame.
    End {
        next: u64,
        report_seq: u64,
    },
    /// Nothing for now: [`NodeLanes::appended`] is called when there is.
    Waiting,
    /// It is not held any more.
    Gone,
}

/// How far an attempt has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The index behind its last frame.
    pub next: u64,
    pub ended: bool,
    /// Its driver was polled within two seconds.
    pub lives: bool,
}

/// A GET; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(u64);

/// What the shell is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeAction {
    /// Call [`NodeLanes::fill`]: there is something to write.
    Write(ConnectionId),
    /// Close the response, once what was filled is written.
    Close(ConnectionId),
    /// Attempts have lost their reader: report within half a second.
    PokeSession,
}

/// Why a GET is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GetRefusal {
    /// `409 WRONG_NODE`.
    #[error("this is another boot of the node")]
    WrongBoot,
    /// `409 STALE_LINK`.
    #[error("the lane has a link that is newer, or of the life that the node is registered with")]
    Stale,
    /// `400 INVALID_PARAMS`.
    #[error("lane: must be below {MAX_LANES}")]
    Lane,
    /// `503 DRAINING`.
    #[error("the node leaves")]
    Leaving,
}

/// A response that is written to.
#[derive(Debug)]
struct Connection {
    key: LinkKey,
    since: Moment,
    /// Records that wait for nothing.
    pending: Vec<u8>,
    /// A `Write` was asked for and not carried out.
    asked: bool,
    alive_at: Moment,
    /// What was ready when an `alive` was due, and is written before it.
    goals: Option<BTreeMap<AttemptId, Progress>>,
    bye: Option<ByeReason>,
    /// When the grace of a credential that does not count any more ends.
    expires: Option<Moment>,
}

/// One thread of the control plane.
#[derive(Debug, Default)]
struct Lane {
    in_use: Option<ConnectionId>,
    offers: BTreeSet<ConnectionId>,
    last_post: Moment,
    /// The attempts that its link in use carries, and of those that have something the queues.
    numbers: BTreeMap<u64, AttemptId>,
    live: BTreeMap<u64, AttemptId>,
    /// Those that were resumed, until they have come as far as the others.
    late: BTreeMap<u64, AttemptId>,
    live_bytes: usize,
    late_bytes: usize,
    /// Attempts of which a record in parts is being written, and those that wait to begin one.
    in_parts: usize,
    deferred: BTreeMap<u64, AttemptId>,
    /// The last place in one of these queues.
    place: u64,
}

/// All links of a node.
#[derive(Debug)]
pub struct NodeLanes {
    hello: Hello,
    /// That of the control plane with which the node is registered.
    life: Option<LifeId>,
    connections: BTreeMap<ConnectionId, Connection>,
    lanes: BTreeMap<u16, Lane>,
    attached: BTreeMap<AttemptId, Attachment>,
    last: u64,
    leaving: bool,
    unreadable: u64,
    switched_off: Option<Rule>,
    actions: VecDeque<NodeAction>,
}

impl NodeLanes {
    pub fn new(hello: Hello) -> Self {
        Self {
            hello,
            life: None,
            connections: BTreeMap::new(),
            lanes: BTreeMap::new(),
            attached: BTreeMap::new(),
            last: 0,
            leaving: false,
            unreadable: 0,
            switched_off: None,
            actions: VecDeque::new(),
        }
    }

    /// Only for the simulator: see [`Rule`].
    pub fn switch_off(&mut self, rule: Option<Rule>) {
        self.switched_off = rule;
    }

    fn enforces(&self, rule: Rule) -> bool {
        self.switched_off != Some(rule)
    }

    pub fn next_action(&mut self) -> Option<NodeAction> {
        self.actions.pop_front()
    }

    /// The node has registered with that life of a control plane, which may take every lane.
    pub fn registered(&mut self, life: LifeId) {
        self.life = Some(life);
    }

    /// Links that are open.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Attempts that have a reader.
    pub fn attached(&self) -> usize {
        self.attached.len()
    }

    /// Starts of which not even the number could be read, so far.
    pub fn unreadable_starts(&self) -> u64 {
        self.unreadable
    }

    // ---- GETs ----

    /// A GET: it gets its hello, and is an offer. Errors: the answer is 400 or 409.
    pub fn get(&mut self, now: Moment, query: &LinkQuery) -> Result<ConnectionId, GetRefusal> {
        if query.boot_id != self.hello.boot_id {
            return Err(GetRefusal::WrongBoot);
        }
        if self.leaving {
            return Err(GetRefusal::Leaving);
        }
        if query.lane >= MAX_LANES {
            return Err(GetRefusal::Lane);
        }
        let key = query.key();
        let in_use = self.in_use(key.lane).map(|(_, in_use)| in_use.key);
        let own = in_use.is_some_and(|in_use| in_use.life == key.life);
        let is_older = own && in_use.is_some_and(|in_use| key.n <= in_use.n);
        if is_older || self.offer(key).is_some() || !own && self.life != Some(key.life) {
            return Err(GetRefusal::Stale);
        }
        self.last += 1;
        let id = ConnectionId(self.last);
        let mut pending = Vec::new();
        RecordHead::new(Kind::Hello, 0, 0, 0)
            .write(&mut pending, &to_json(&self.hello), MAX_RECORD_BYTES)
            .expect("a hello is short");
        let connection = Connection {
            key,
            since: now,
            pending,
            asked: false,
            alive_at: now + ALIVE_EVERY_WHEN_EMPTY,
            goals: None,
            bye: None,
            expires: None,
        };
        self.connections.insert(id, connection);
        let offers = &mut self.lanes.entry(key.lane).or_default().offers;
        offers.insert(id);
        let oldest = (offers.len() > MAX_OFFERS).then(|| offers.pop_first()).flatten();
        if let Some(oldest) = oldest {
            self.close(oldest);
        }
        self.ask_to_write(id);
        Ok(id)
    }

    /// The connection of a GET has ended.
    pub fn closed(&mut self, now: Moment, id: ConnectionId, host: &mut impl AttemptHost) {
        let Some(connection) = self.connections.remove(&id) else { return };
        self.lose_reader(now, connection.key.lane, id, host);
    }

    pub(super) fn close(&mut self, id: ConnectionId) {
        if self.connections.remove(&id).is_some() {
            self.actions.push_back(NodeAction::Close(id));
        }
    }

    /// The lane has no link in use any more, where it was this one.
    fn lose_reader(&mut self, now: Moment, lane: u16, id: ConnectionId, host: &mut impl AttemptHost) {
        let Some(entry) = self.lanes.get_mut(&lane) else { return };
        entry.offers.remove(&id);
        if entry.in_use != Some(id) {
            return;
        }
        entry.in_use = None;
        if self.detach_all(now, lane, host) {
            self.actions.push_back(NodeAction::PokeSession);
        }
    }

    fn in_use(&self, lane: u16) -> Option<(ConnectionId, &Connection)> {
        let id = self.lanes.get(&lane)?.in_use?;
        Some((id, self.connections.get(&id)?))
    }

    fn offer(&self, key: LinkKey) -> Option<ConnectionId> {
        let offers = &self.lanes.get(&key.lane)?.offers;
        let is_it = |id: &&ConnectionId| self.connections.get(id).is_some_and(|offer| offer.key == key);
        offers.iter().find(is_it).copied()
    }

    /// The link that a POST names, which is in use from now on. Nothing where there is none, or where it
    /// has not taken what POSTs before have brought: that one ends.
    fn named(&mut self, now: Moment, key: LinkKey, host: &mut impl AttemptHost) -> Option<ConnectionId> {
        if let Some((id, in_use)) = self.in_use(key.lane)
            && in_use.key == key
            && in_use.pending.len() > MAX_PENDING_BYTES
        {
            self.close(id);
            self.lose_reader(now, key.lane, id, host);
            return None;
        }
        let id = match self.in_use(key.lane) {
            Some((id, in_use)) if in_use.key == key => id,
            Some((id, _)) if self.offer(key).is_none() && !self.enforces(Rule::StaleRefused) => id,
            _ => {
                let id = self.offer(key)?;
                self.adopt(now, key, id, host);
                id
            }
        };
        if let Some(lane) = self.lanes.get_mut(&key.lane) {
            lane.last_post = now;
        }
        Some(id)
    }

    /// The offer was named: what came before it ends, and with it who read by it.
    fn adopt(&mut self, now: Moment, key: LinkKey, id: ConnectionId, host: &mut impl AttemptHost) {
        if self.enforces(Rule::LinkBeginsEmpty) {
            self.detach_all(now, key.lane, host);
        }
        let Some(lane) = self.lanes.get_mut(&key.lane) else { return };
        let mut ended: Vec<ConnectionId> = lane.in_use.replace(id).into_iter().collect();
        lane.offers.remove(&id);
        let earlier = |offer: &&ConnectionId| {
            let other = self.connections.get(offer).map(|offer| offer.key);
            other.is_none_or(|other| other.life != key.life || other.n < key.n)
        };
        ended.extend(lane.offers.iter().filter(earlier));
        lane.offers.retain(|offer| !ended.contains(offer));
        for id in ended {
            self.close(id);
        }
    }

    // ---- time ----

    /// What the connection was opened with counts, or does not any more.
    pub fn credential(&mut self, now: Moment, id: ConnectionId, counts: bool) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.expires = (!counts).then(|| connection.expires.unwrap_or(now + CREDENTIAL_GRACE));
        }
    }

    /// The node leaves: each link says so, behind what is ready. No GET and no start is taken any more.
    pub fn leave(&mut self) {
        self.leaving = true;
        let ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        for id in ids {
            self.say_bye(id, ByeReason::Leaving);
        }
    }

    fn say_bye(&mut self, id: ConnectionId, reason: ByeReason) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.bye.get_or_insert(reason);
        }
        self.ask_to_write(id);
    }

    /// When [`NodeLanes::timer`] is to be called.
    pub fn next_deadline(&self) -> Moment {
        let lanes = self.lanes.values().flat_map(|lane| {
            let offers = lane.offers.iter().filter_map(|id| self.connections.get(id));
            let offers = offers.map(|offer| offer.since + OFFER_KEPT);
            let is_proven = !lane.numbers.is_empty() && self.enforces(Rule::PostsProveReader);
            let post = is_proven.then(|| lane.last_post + NO_POST);
            offers.chain(post)
        });
        let connections = self.connections.values().flat_map(|connection| {
            let alive = (connection.goals.is_none() && !connection.asked).then_some(connection.alive_at);
            alive.into_iter().chain(connection.expires.filter(|_| connection.bye.is_none()))
        });
        lanes.chain(connections).min().unwrap_or(Moment::NEVER)
    }

    /// The moment of [`NodeLanes::next_deadline`] has come.
    pub fn timer(&mut self, now: Moment, host: &mut impl AttemptHost) {
        let late = |offer: &Connection| now >= offer.since + OFFER_KEPT;
        let offers = self.lanes.values().flat_map(|lane| &lane.offers);
        let offers = offers.filter(|id| self.connections.get(id).is_none_or(late));
        for id in offers.copied().collect::<Vec<_>>() {
            for lane in self.lanes.values_mut() {
                lane.offers.remove(&id);
            }
            self.close(id);
        }
        let counts = self.enforces(Rule::PostsProveReader);
        let unread = |lane: &Lane| counts && !lane.numbers.is_empty() && now >= lane.last_post + NO_POST;
        let unread: Vec<(u16, ConnectionId)> = self
            .lanes
            .iter()
            .filter(|(_, lane)| unread(lane))
            .filter_map(|(lane, entry)| Some((*lane, entry.in_use?)))
            .collect();
        for (lane, id) in unread {
            self.close(id);
            self.lose_reader(now, lane, id, host);
        }
        let due: Vec<(ConnectionId, bool)> = self
            .connections
            .iter()
            .map(|(id, connection)| (*id, connection, connection.expires.is_some_and(|at| now >= at)))
            .filter(|(_, connection, expired)| *expired || now >= connection.alive_at)
            .map(|(id, _, expired)| (id, expired))
            .collect();
        for (id, expired) in due {
            if expired {
                self.say_bye(id, ByeReason::Credential);
            }
            self.ask_to_write(id);
        }
    }

    fn ask_to_write(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !std::mem::replace(&mut connection.asked, true)
        {
            self.actions.push_back(NodeAction::Write(id));
        }
    }
}

/// The bytes of a bye.
fn bye_bytes(reason: ByeReason) -> Vec<u8> {
    to_json(&Bye { reason })
}
