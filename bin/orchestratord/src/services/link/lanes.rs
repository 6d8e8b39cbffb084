//! The lanes of one thread: each node's [`ControlLane`], the deadlines of all, and who may resume.
//!
//! [`Lanes`] is a value. It is told what has happened, hands what a lane says of an attempt to the
//! attempt's reader, and collects what is to be done at the network ([`Call`]) and told to the control
//! core. It does no I/O and reads no clock; around it is `services/link/driver.rs`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use attempt_link::ResumeGate;
use attempt_link::control::{
    Action, ConnectionEnd, ControlLane, LaneState, Lost, PostId, PostOutcome, PostRequest, StartTaken,
};
use attempt_link::wire::{LinkQuery, Start};
use bytes::Bytes;
use pool_registry_types::view::{LinkState, LinkView};
use pool_registry_types::{AttemptId, BootId, LifeId, Moment, NodeId};
use task_scheduler::{Event, LinkEvidence};
use task_stream::denial;

use super::links::{AttemptSink, LinkTable, SinkOfLane};

/// After a stall of this process: what has arrived meanwhile is read for so long before anything is
/// judged. Source: .specs/01 CLOUD-2658.
const READ_AFTER_STALL: Duration = Duration::from_millis(20);
/// No lane is looked at again before.
const LEAST_WAIT: Duration = Duration::from_millis(1);
/// A node that is not known any more may come back in the same boot, which remembers its lane.
const GONE_KEPT: Duration = Duration::from_secs(3600);
const SAYS_NO_HELLO: &str = "it lives and says no hello";
const HAS_LEFT: &str = "the node has left";
const RESTARTED: &str = "the node has restarted";

/// What is to be done at the network, in this order.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Call {
    Dial { node_id: NodeId, address: String, query: LinkQuery },
    Close { node_id: NodeId, n: u64 },
    Post { node_id: NodeId, address: String, id: PostId, request: PostRequest, fresh: bool },
    Abandon { node_id: NodeId, id: PostId },
    ProbeLive { node_id: NodeId, address: String },
}

/// Where what comes of an attempt goes.
#[derive(Debug)]
struct Reader {
    sink: SinkOfLane,
    /// The last byte of its start may have gone.
    sent: bool,
    accepted: bool,
}

/// One node's lane. It is kept as long as this process lives, or nearly so: its numbers are used once.
#[derive(Debug)]
struct Entry {
    address: String,
    boot_id: BootId,
    lane: ControlLane,
    readers: BTreeMap<AttemptId, Reader>,
    /// Sinks that are to be flushed.
    dirty: Vec<Arc<dyn AttemptSink>>,
    /// Where it stands among the deadlines.
    due: Option<Moment>,
    /// As it was told last.
    shown: Option<LinkView>,
    /// Why it is not dialled, and whether the node is served without it.
    none: Option<&'static str>,
    /// Why it is interrupted.
    why: &'static str,
    /// The last dial, and the last POST, failed for want of something of our own: that proves nothing.
    short_dial: bool,
    short_post: bool,
    /// No hello has come since it registered, and it lives.
    lives: bool,
    /// Since when it stands as it does.
    since: Moment,
    dropped: u64,
    /// What its lane keeps of records that are not whole, as it was counted.
    parts: usize,
    /// The control core does not know how it stands.
    unreported: bool,
    /// After a stall: nothing is judged before.
    reads_until: Moment,
    /// Since when the node is not known any more.
    gone: Option<Moment>,
}

/// All lanes of a thread.
#[derive(Debug)]
pub(super) struct Lanes {
    life: LifeId,
    /// The thread's own: each node has one lane here.
    lane: u16,
    table: Arc<LinkTable>,
    entries: BTreeMap<NodeId, Entry>,
    due: BTreeSet<(Moment, NodeId)>,
    gate: ResumeGate<NodeId>,
    calls: VecDeque<Call>,
    events: VecDeque<Event>,
}

impl Lanes {
    pub(super) fn new(life: LifeId, lane: u16, table: Arc<LinkTable>) -> Self {
        Self {
            life,
            lane,
            table,
            entries: BTreeMap::new(),
            due: BTreeSet::new(),
            gate: ResumeGate::default(),
            calls: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    pub(super) fn next_call(&mut self) -> Option<Call> {
        self.calls.pop_front()
    }

    /// What the control core is to be told.
    pub(super) fn events(&mut self) -> &mut VecDeque<Event> {
        &mut self.events
    }

    pub(super) fn next_deadline(&self) -> Moment {
        self.due.first().map_or(Moment::NEVER, |(at, _)| *at)
    }

    // ---- nodes ----

    /// A node with a link has registered.
    pub(super) fn registered(&mut self, now: Moment, node_id: &NodeId, address: String, boot_id: BootId) {
        if let Some(entry) = self.entries.get_mut(node_id) {
            (entry.address, entry.gone, entry.none) = (address, None, None);
            entry.boot_id = boot_id;
            (entry.unreported, entry.lives) = (true, false);
            entry.lane.registered(now, boot_id);
        } else {
            let entry = Entry {
                address,
                boot_id,
                lane: ControlLane::new(now, self.life, self.lane, boot_id),
                readers: BTreeMap::new(),
                dirty: Vec::new(),
                due: None,
                shown: None,
                none: None,
                why: "",
                short_dial: false,
                short_post: false,
                lives: false,
                since: now,
                dropped: 0,
                parts: 0,
                unreported: true,
                reads_until: now,
                gone: None,
            };
            self.entries.insert(node_id.clone(), entry);
        }
        self.carry_out_actions(now, node_id);
    }

    /// The node is not known any more. What runs there may still bring its end.
    pub(super) fn gone(&mut self, now: Moment, node_id: &NodeId) {
        self.forget_gone(now);
        if let Some(entry) = self.entries.get_mut(node_id) {
            entry.gone.get_or_insert(now);
        }
        self.carry_out_actions(now, node_id);
    }

    fn forget_gone(&mut self, now: Moment) {
        let (due, parts) = (&mut self.due, &self.table.parts_bytes);
        self.entries.retain(|node_id, entry| {
            let is_over = entry.readers.is_empty() && entry.gone.is_some_and(|at| now >= at + GONE_KEPT);
            if let Some(at) = entry.due.filter(|_| is_over) {
                due.remove(&(at, node_id.clone()));
            }
            if is_over {
                parts.fetch_sub(std::mem::take(&mut entry.parts), Ordering::Relaxed);
            }
            !is_over
        });
    }

    /// Nothing is dialled any more: the process ends.
    pub(super) fn close(&mut self, now: Moment) {
        let nodes: Vec<NodeId> = self.entries.keys().cloned().collect();
        for node_id in nodes {
            self.close_lane(now, &node_id);
            self.carry_out_actions(now, &node_id);
        }
    }

    // ---- attempts ----

    pub(super) fn start(&mut self, now: Moment, node_id: &NodeId, start: Start, sink: SinkOfLane) {
        // Without a lane its sink is released, which ends it.
        let Some(entry) = self.entries.get_mut(node_id) else { return };
        let attempt = start.facts.attempt_id;
        // One that is there already is not begun again, and its sink is released.
        if entry.lane.start(now, start).is_ok() {
            entry.readers.insert(attempt, Reader { sink, sent: false, accepted: false });
        }
        self.carry_out_actions(now, node_id);
    }

    pub(super) fn cancel(&mut self, now: Moment, node_id: &NodeId, attempt: AttemptId) {
        if let Some(entry) = self.entries.get_mut(node_id) {
            entry.readers.remove(&attempt);
        }
        self.with(now, node_id, |lane| lane.cancel(now, attempt));
    }

    /// The attempt's end is in its log.
    pub(super) fn done(&mut self, now: Moment, node_id: &NodeId, attempt: AttemptId) {
        self.with(now, node_id, |lane| lane.done(now, attempt));
    }

    // ---- the network ----

    pub(super) fn received(&mut self, now: Moment, node_id: &NodeId, n: u64, bytes: Bytes) {
        self.with(now, node_id, |lane| lane.received(now, n, bytes));
    }

    /// The GET has ended; `denied`: by an answer that does not let us in. `is_own`: for want of something
    /// of our own.
    pub(super) fn closed(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        n: u64,
        end: ConnectionEnd,
        denied: Option<u16>,
        is_own: bool,
    ) {
        if let Some(entry) = self.entries.get_mut(node_id) {
            entry.short_dial = is_own;
        }
        self.count_shortage(is_own);
        if let Some(status) = denied {
            self.denied(now, node_id, status);
        }
        self.with(now, node_id, |lane| lane.closed(now, n, end));
    }

    pub(super) fn post_progress(&mut self, now: Moment, node_id: &NodeId, id: PostId) {
        self.with(now, node_id, |lane| lane.post_progress(now, id));
    }

    pub(super) fn post_sent(&mut self, now: Moment, node_id: &NodeId, id: PostId) {
        self.with(now, node_id, |lane| lane.post_sent(now, id));
    }

    /// `is_own`: it came to nothing for want of something of our own.
    pub(super) fn post_ended(
        &mut self,
        now: Moment,
        node_id: &NodeId,
        id: PostId,
        outcome: PostOutcome,
        is_own: bool,
    ) {
        self.count_shortage(is_own);
        let Some(entry) = self.entries.get_mut(node_id) else { return };
        entry.short_post = is_own;
        entry.lane.post_ended(now, id, outcome);
        self.carry_out_actions(now, node_id);
    }

    fn count_shortage(&self, is_own: bool) {
        self.table.own_shortages.fetch_add(u64::from(is_own), Ordering::Relaxed);
    }

    /// Its health call was answered, in the boot that is dialled.
    pub(super) fn live_answered(&mut self, now: Moment, node_id: &NodeId, boot_id: BootId) {
        if let Some(entry) = self.entries.get_mut(node_id).filter(|entry| entry.boot_id == boot_id) {
            entry.lives = true;
            self.with(now, node_id, |lane| lane.live_answered(now));
        }
    }

    /// The moment of [`Lanes::next_deadline`] has come.
    pub(super) fn timer(&mut self, now: Moment) {
        while let Some((at, node_id)) = self.due.first().cloned()
            && at <= now
        {
            self.due.pop_first();
            let Some(entry) = self.entries.get_mut(&node_id) else { continue };
            entry.due = None;
            // A token may have moved it to later.
            if entry.lane.next_deadline() <= now {
                entry.lane.timer(now);
            }
            self.carry_out_actions(now, &node_id);
        }
    }

    fn with(&mut self, now: Moment, node_id: &NodeId, act: impl FnOnce(&mut ControlLane)) {
        if let Some(entry) = self.entries.get_mut(node_id) {
            act(&mut entry.lane);
            self.carry_out_actions(now, node_id);
        }
    }

    // ---- what lanes want ----

    /// Carries out what the lane wants, and what that brings for others.
    fn carry_out_actions(&mut self, now: Moment, node_id: &NodeId) {
        let mut others = Vec::new();
        self.carry_out_of(now, node_id, &mut others);
        while let Some(other) = others.pop() {
            self.carry_out_of(now, &other, &mut others);
        }
    }

    fn carry_out_of(&mut self, now: Moment, node_id: &NodeId, others: &mut Vec<NodeId>) {
        while let Some(entry) = self.entries.get_mut(node_id)
            && let Some(action) = entry.lane.next_action()
        {
            others.extend(self.act(now, node_id, action));
        }
        if let Some(entry) = self.entries.get_mut(node_id)
            && entry.gone.is_some()
            && entry.readers.is_empty()
            && entry.lane.state() != LaneState::None
        {
            others.extend(self.close_lane(now, node_id));
        }
        self.review(now, node_id);
    }

    /// Nothing is dialled any more, and what still runs by the lane is lost. Returns the node whose turn
    /// it is to resume.
    fn close_lane(&mut self, now: Moment, node_id: &NodeId) -> Option<NodeId> {
        let left = self.entries.get_mut(node_id).map(|entry| entry.lane.close()).unwrap_or_default();
        let turns: Vec<NodeId> =
            left.into_iter().filter_map(|action| self.act(now, node_id, action)).collect();
        turns.into_iter().next()
    }

    /// Returns the node whose turn it is to resume, where one's was over.
    fn act(&mut self, now: Moment, node_id: &NodeId, action: Action) -> Option<NodeId> {
        let entry = self.entries.get_mut(node_id)?;
        if let Some((attempt, is_last)) = action.attempt() {
            entry.deliver(now, attempt, is_last, action);
            return None;
        }
        let (node_id, address) = (node_id.clone(), entry.address.clone());
        match action {
            Action::Dial(query) => self.calls.push_back(Call::Dial { node_id, address, query }),
            Action::Close { n } => self.calls.push_back(Call::Close { node_id, n }),
            Action::Post { id, request, fresh } => {
                self.calls.push_back(Call::Post { node_id, address, id, request, fresh });
            }
            Action::AbandonPost { id } => self.calls.push_back(Call::Abandon { node_id, id }),
            Action::ProbeLive => self.calls.push_back(Call::ProbeLive { node_id, address }),
            Action::WantResume => {
                let is_its_turn = self.gate.ask(node_id);
                if is_its_turn {
                    entry.lane.may_resume(now);
                }
            }
            Action::ResumeOver => {
                let other = self.gate.over(&node_id)?;
                self.entries.get_mut(&other)?.lane.may_resume(now);
                return Some(other);
            }
            Action::ReadSockets => entry.reads_until = now + READ_AFTER_STALL,
            Action::Connected => (entry.short_dial, entry.lives) = (false, false),
            Action::Interrupted { reason } => {
                (entry.why, entry.short_dial) = (reason.as_str(), false);
                tracing::warn!(%node_id, reason = entry.why, "a link is interrupted");
            }
            Action::MoveQuiet => self.move_quiet(now, &node_id),
            Action::CannotConnect if !entry.short_post => {
                let reason = "no connection could be made for a POST".to_owned();
                self.tell(&node_id, LinkEvidence::CannotConnect(reason));
            }
            Action::OrdersDoNotArrive => self.tell(&node_id, LinkEvidence::OrdersDoNotArrive),
            Action::OrdersArrive => self.tell(&node_id, LinkEvidence::OrdersArrive),
            Action::PostStatus { status } => self.post_status(now, &node_id, status),
            Action::NoLink => self.is_none(&node_id, SAYS_NO_HELLO),
            Action::Bye => self.is_none(&node_id, HAS_LEFT),
            Action::OtherBoot { .. } => self.is_none(&node_id, RESTARTED),
            // What is about an attempt was handed on above.
            _ => {}
        }
        None
    }

    fn tell(&mut self, node_id: &NodeId, evidence: LinkEvidence) {
        self.events.push_back(Event::LinkEvidence { node_id: node_id.clone(), lane: self.lane, evidence });
    }

    /// The link is not dialled any more. Shown before what waited there hears of it.
    fn is_none(&mut self, node_id: &NodeId, reason: &'static str) {
        let Some(entry) = self.entries.get_mut(node_id) else { return };
        entry.none = Some(reason);
        if reason == SAYS_NO_HELLO {
            self.table.change(node_id, self.lane, |shown| shown.serves_without = true);
        }
    }

    /// Two ways say that the node is gone. What was not sent there ends as such, at no cost. A node that
    /// lives and has no link is not gone.
    fn move_quiet(&mut self, now: Moment, node_id: &NodeId) {
        let says_nothing = |entry: &&mut Entry| entry.short_dial || entry.lives;
        let Some(entry) = self.entries.get_mut(node_id).filter(|entry| !says_nothing(entry)) else { return };
        let is_unsent = |id: AttemptId, reader: &Reader| !reader.sent && entry.lane.is_queued(id);
        let unsent = entry.readers.iter().filter(|(id, reader)| is_unsent(**id, reader)).map(|(id, _)| *id);
        for attempt in unsent.collect::<Vec<_>>() {
            entry.deliver(now, attempt, true, Action::NeverSent { attempt });
            entry.lane.cancel(now, attempt);
        }
        self.tell(node_id, LinkEvidence::Quiet("its link cannot be taken up again".into()));
    }

    /// The node does not let us in: what it has not accepted goes elsewhere, at no cost where the node
    /// cannot have it. What runs goes on.
    fn denied(&mut self, now: Moment, node_id: &NodeId, status: u16) {
        if let Some(entry) = self.entries.get_mut(node_id) {
            for attempt in entry.unaccepted() {
                let action = match entry.lane.start_taken(attempt) {
                    StartTaken::UnderWay => continue,
                    StartTaken::Maybe => Action::Lost { attempt, reason: Lost::NotResumed },
                    StartTaken::No => Action::PostStatus { status },
                };
                entry.pass(now, attempt, action);
                entry.readers.remove(&attempt);
                entry.lane.cancel(now, attempt);
            }
        }
        self.tell(node_id, LinkEvidence::Denied(denial(status, None)));
    }

    /// A POST was not taken. Whether the node lets us in shows the dial that follows: the link may only
    /// be older than our token. What became of its starts is the resume's to say.
    fn post_status(&mut self, now: Moment, node_id: &NodeId, status: u16) {
        tracing::debug!(%node_id, status, "a POST of a link is not taken");
        let Some(entry) = self.entries.get_mut(node_id) else { return };
        if !matches!(status, 401 | 403) {
            for attempt in entry.unaccepted() {
                entry.pass(now, attempt, Action::PostStatus { status });
            }
        }
    }

    /// Flushes what it has brought, and brings up to date what is shown of the lane and its place among
    /// the deadlines.
    fn review(&mut self, now: Moment, node_id: &NodeId) {
        let Some(entry) = self.entries.get_mut(node_id) else { return };
        entry.flush(now);
        let dropped = entry.lane.dropped_records();
        self.table.dropped.fetch_add(dropped - entry.dropped, Ordering::Relaxed);
        entry.dropped = dropped;
        entry.count_parts(&self.table.parts_bytes);
        let link = entry.view();
        if entry.shown.as_ref() != Some(&link) {
            let was = entry.shown.as_ref().map(|shown| shown.state);
            if was == Some(LinkState::Interrupted) && link.state != LinkState::Interrupted {
                let span = now.since(entry.since);
                self.table.was_interrupted(span, link.state == LinkState::Up);
                tracing::info!(%node_id, state = ?link.state, elapsed_ms = span.as_millis(), "an interruption is over");
            }
            if was != Some(link.state) {
                entry.since = now;
            }
            self.table.change(node_id, self.lane, |shown| shown.link = link.clone());
            entry.shown = Some(link.clone());
            entry.unreported = true;
        }
        if entry.gone.is_none() && std::mem::take(&mut entry.unreported) {
            self.events.push_back(Event::Link { node_id: node_id.clone(), lane: self.lane, link });
        }
        let next = entry.lane.next_deadline().max(entry.reads_until).max(now + LEAST_WAIT);
        // One that stands too early is looked at when it comes.
        if next != Moment::NEVER && entry.due.is_none_or(|due| next < due) {
            if let Some(due) = entry.due.replace(next) {
                self.due.remove(&(due, node_id.clone()));
            }
            self.due.insert((next, node_id.clone()));
        }
    }
}

impl Entry {
    fn count_parts(&mut self, all: &AtomicUsize) {
        let is = self.lane.held_bytes();
        let was = std::mem::replace(&mut self.parts, is);
        if is >= was {
            all.fetch_add(is - was, Ordering::Relaxed);
        } else {
            all.fetch_sub(was - is, Ordering::Relaxed);
        }
    }

    fn view(&self) -> LinkView {
        let (state, reason) = match self.lane.state() {
            LaneState::Up => (LinkState::Up, None),
            LaneState::Connecting => (LinkState::Connecting, None),
            LaneState::Interrupted => (LinkState::Interrupted, Some(self.why)),
            LaneState::None => (LinkState::None, self.none),
        };
        LinkView { state, reason: reason.map(str::to_owned) }
    }

    fn unaccepted(&self) -> Vec<AttemptId> {
        self.readers.iter().filter(|(_, reader)| !reader.accepted).map(|(id, _)| *id).collect()
    }

    /// Hands on what comes of an attempt. The last of it ends its reader.
    fn deliver(&mut self, now: Moment, attempt: AttemptId, is_last: bool, action: Action) {
        if let Some(reader) = self.readers.get_mut(&attempt) {
            let accepts = matches!(action, Action::Accepted { .. } | Action::Resumed { .. });
            reader.accepted |= accepts;
            reader.sent |= accepts || matches!(action, Action::Sent { .. } | Action::Restart { .. });
        }
        self.pass(now, attempt, action);
        if is_last {
            self.readers.remove(&attempt);
        }
    }

    fn pass(&mut self, now: Moment, attempt: AttemptId, action: Action) {
        if let Some(reader) = self.readers.get(&attempt) {
            self.dirty.extend(reader.sink.take(now, action));
        }
    }

    fn flush(&mut self, now: Moment) {
        for sink in self.dirty.drain(..) {
            sink.flush(now);
        }
    }
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
