//! The control plane's shell of its lanes: their calls, their deadlines, and what they say of attempts
//! and of nodes.

use std::collections::BTreeMap;
use std::time::Duration;

use attempt_link::ResumeGate;
use attempt_link::control::{
    Action, ConnectionEnd, ControlLane, LaneState, Lost, PostId, PostOutcome, StartTaken,
};
use attempt_link::wire::Start;
use bytes::Bytes;
use pool_registry_types::node::{LINK_FEATURE, RegisterRequest};
use pool_registry_types::view::{LinkState, LinkView};
use pool_registry_types::{AttemptId, BootId, Moment, NodeId};
use task_scheduler::{Event, LinkEvidence};

use super::super::{What, World};
use super::{life_id, number_of};
use crate::draw::Mutant;

/// Each node has one lane.
const LANE: u16 = 0;
/// After a stall: nothing is judged before.
const READ_AFTER_STALL: Duration = Duration::from_millis(20);
/// What ran on an interrupted link is lost within this.
const LOST_WITHIN: Duration = Duration::from_secs(13);
/// No lane is looked at again before.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// Where what comes of an attempt goes.
#[derive(Debug, Default)]
struct Reader {
    /// When it was handed to its lane.
    since: Moment,
    /// The last byte of its start may have gone.
    sent: bool,
    accepted: bool,
}

/// One node's lane.
#[derive(Debug)]
pub(crate) struct LaneEntry {
    boot_id: BootId,
    /// Boots that it was one of.
    boots: u32,
    lane: ControlLane,
    readers: BTreeMap<AttemptId, Reader>,
    due: Option<Moment>,
    shown: Option<LinkView>,
    none: Option<&'static str>,
    /// Its node is served by exchanges until it registers again.
    serves_without: bool,
    why: &'static str,
    short_dial: bool,
    short_post: bool,
    lives: bool,
    /// Since when it stands as it does.
    since: Moment,
    unreported: bool,
    reads_until: Moment,
    gone: bool,
}

/// The lanes of one life.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    gate: ResumeGate<usize>,
    entries: BTreeMap<usize, LaneEntry>,
}

impl World {
    fn lane(&mut self, node: usize) -> Option<&mut LaneEntry> {
        self.control.as_mut()?.lanes_mut().entries.get_mut(&node)
    }

    fn seen_lane(&self, node: usize) -> Option<&LaneEntry> {
        self.control.as_ref()?.lanes().entries.get(&node)
    }

    /// Whether attempts on the node go by its link.
    pub(crate) fn has_lane(&self, node: usize) -> bool {
        self.seen_lane(node).is_some_and(|entry| !entry.gone && !entry.serves_without)
    }

    /// How many boots of the node were taken in this life.
    pub(crate) fn lane_boots(&self, node: usize) -> u32 {
        self.seen_lane(node).map_or(0, |entry| entry.boots)
    }

    /// Since when the link of the node is up; nothing where it is not.
    pub(crate) fn up_since(&self, node: usize) -> Option<Moment> {
        let entry = self.seen_lane(node)?;
        (entry.lane.state() == LaneState::Up).then_some(entry.since)
    }

    /// Whether it is interrupted.
    pub(crate) fn is_interrupted(&self, node: usize) -> bool {
        self.seen_lane(node).is_some_and(|entry| entry.lane.state() == LaneState::Interrupted)
    }

    /// How the lane of a node that is known stands, and since when.
    pub(crate) fn lane_state(&self, node: usize) -> Option<(LaneState, Moment)> {
        let entry = self.seen_lane(node).filter(|entry| !entry.gone)?;
        Some((entry.lane.state(), entry.since))
    }

    // ---- nodes ----

    /// The node has registered, and its registration was taken.
    pub(crate) fn link_registered(&mut self, request: &RegisterRequest) {
        let node = number_of(&request.node_id);
        if !request.features.iter().any(|feature| feature == LINK_FEATURE) {
            return self.link_gone(&request.node_id);
        }
        let (now, life, boot_id) = (self.now, life_id(self.lives), request.boot_id);
        let rule = Mutant::link(self.plan.switched_off);
        if let Some(entry) = self.lane(node) {
            let is_new = entry.boot_id != boot_id;
            (entry.gone, entry.none, entry.serves_without) = (false, None, false);
            (entry.boot_id, entry.unreported, entry.lives) = (boot_id, true, false);
            entry.lane.registered(now, boot_id);
            if is_new {
                entry.boots += 1;
                self.watches[node].is_excused(now);
            }
        } else if let Some(control) = self.control.as_mut() {
            let mut lane = ControlLane::new(now, life, LANE, boot_id);
            lane.switch_off(rule);
            let entry = LaneEntry {
                boot_id,
                boots: 1,
                lane,
                readers: BTreeMap::new(),
                due: None,
                shown: None,
                none: None,
                serves_without: false,
                why: "",
                short_dial: false,
                short_post: false,
                lives: false,
                since: now,
                unreported: true,
                reads_until: now,
                gone: false,
            };
            control.lanes_mut().entries.insert(node, entry);
        }
        self.drive_lane(node);
        self.check_boot(node, boot_id);
    }

    /// [11] Nothing waits for what ran in another boot.
    fn check_boot(&mut self, node: usize, boot_id: BootId) {
        let (Some(control), Some(entry)) = (self.control.as_ref(), self.seen_lane(node)) else { return };
        let is_over = |attempt: &&AttemptId| control.boot_of(attempt).is_some_and(|boot| boot != boot_id);
        if let Some(attempt) = entry.readers.keys().find(is_over) {
            self.check(Err(format!("[11] n{node} has restarted, and {attempt} waits for it")));
        }
    }

    /// The node is not known any more. What runs there may still bring its end.
    pub(crate) fn link_gone(&mut self, node_id: &NodeId) {
        let node = number_of(node_id);
        if let Some(entry) = self.lane(node) {
            entry.gone = true;
            self.drive_lane(node);
        }
    }

    // ---- attempts ----

    pub(super) fn lane_starts(&mut self, node: usize, start: Start) {
        let (now, attempt) = (self.now, start.facts.attempt_id);
        let Some(entry) = self.lane(node) else { return };
        if entry.lane.start(now, start).is_err() {
            return self.check(Err(format!("[11] {attempt} is started twice")));
        }
        entry.readers.insert(attempt, Reader { since: now, ..Reader::default() });
        self.drive_lane(node);
    }

    pub(crate) fn lane_cancels(&mut self, node: usize, attempt: AttemptId) {
        if let Some(entry) = self.lane(node) {
            entry.readers.remove(&attempt);
        }
        self.with_lane(node, |lane, now| lane.cancel(now, attempt));
    }

    pub(crate) fn lane_is_done(&mut self, node: usize, attempt: AttemptId) {
        self.with_lane(node, |lane, now| lane.done(now, attempt));
    }

    // ---- the network ----

    pub(super) fn lane_received(&mut self, node: usize, n: u64, bytes: Bytes) {
        self.with_lane(node, |lane, now| lane.received(now, n, bytes));
    }

    pub(super) fn lane_closed(&mut self, node: usize, n: u64, end: ConnectionEnd, denied: Option<u16>) {
        let is_own = self.shortage > 0;
        if self.lane(node).is_some_and(|entry| entry.lane.held_bytes() > 0) {
            self.coverage.hit("link: cut within a record in parts");
        }
        if let Some(entry) = self.lane(node) {
            entry.short_dial = is_own;
        }
        if let Some(status) = denied {
            self.lane_is_denied(node, status);
        }
        self.with_lane(node, |lane, now| lane.closed(now, n, end));
    }

    pub(crate) fn post_taken(&mut self, life: u64, node: usize, id: PostId, whole: bool) {
        if life == self.lives {
            self.with_lane(node, |lane, now| match whole {
                true => lane.post_sent(now, id),
                false => lane.post_progress(now, id),
            });
        }
    }

    pub(crate) fn post_ends(&mut self, life: u64, node: usize, id: PostId, outcome: PostOutcome) {
        if life != self.lives {
            return;
        }
        let is_own = self.shortage > 0;
        if let Some(entry) = self.lane(node) {
            entry.short_post = is_own;
        }
        self.with_lane(node, |lane, now| lane.post_ended(now, id, outcome));
    }

    pub(crate) fn live_answered(&mut self, life: u64, node: usize, boot: BootId) {
        let entry = self.lane(node).filter(|entry| entry.boot_id == boot);
        if let Some(entry) = entry {
            entry.lives = true;
            if life == self.lives {
                self.with_lane(node, |lane, now| lane.live_answered(now));
            }
        }
    }

    pub(crate) fn lane_timer(&mut self, life: u64, node: usize, armed: Moment) {
        let now = self.now;
        if life != self.lives {
            return;
        }
        let Some(entry) = self.lane(node).filter(|entry| entry.due == Some(armed)) else { return };
        entry.due = None;
        // A token may have moved it to later.
        if entry.lane.next_deadline() <= now {
            entry.lane.timer(now);
        }
        self.drive_lane(node);
    }

    fn with_lane(&mut self, node: usize, act: impl FnOnce(&mut ControlLane, Moment)) {
        let now = self.now;
        if let Some(entry) = self.lane(node) {
            act(&mut entry.lane, now);
            self.drive_lane(node);
        }
    }

    // ---- what lanes want ----

    fn drive_lane(&mut self, node: usize) {
        let mut turns = vec![node];
        while let Some(node) = turns.pop() {
            while let Some(action) = self.lane(node).and_then(|entry| entry.lane.next_action()) {
                turns.extend(self.lane_action(node, action));
            }
            let over = |entry: &&mut LaneEntry| {
                entry.gone && entry.readers.is_empty() && entry.lane.state() != LaneState::None
            };
            if let Some(left) = self.lane(node).filter(over).map(|entry| entry.lane.close()) {
                for action in left {
                    turns.extend(self.lane_action(node, action));
                }
            }
            self.review_lane(node);
        }
    }

    fn tell(&mut self, node: usize, evidence: LinkEvidence) {
        let (life, node_id) = (self.lives, self.node_id(node));
        let event = Box::new(Event::LinkEvidence { node_id, lane: 0, evidence });
        self.after_ms(0, What::LinkSays { life, event });
    }

    /// Returns the node whose turn it is to resume.
    fn lane_action(&mut self, node: usize, action: Action) -> Option<usize> {
        let now = self.now;
        if let Some((attempt, is_last)) = action.attempt() {
            self.deliver(node, attempt, is_last, action);
            return None;
        }
        match action {
            Action::Dial(query) => self.dial(node, query),
            Action::Close { n } => {
                if let Some(get) = self.get_of(node, n) {
                    self.hang_up(get);
                }
            }
            Action::Post { id, request, fresh } => self.post(node, id, request, fresh),
            // What has gone up already arrives all the same.
            Action::AbandonPost { .. } => {}
            Action::ProbeLive => self.ask_live(node),
            Action::WantResume => {
                let lanes = self.control.as_mut()?.lanes_mut();
                if lanes.gate.ask(node) {
                    lanes.entries.get_mut(&node)?.lane.may_resume(now);
                } else {
                    self.coverage.hit("link: waits for its turn to resume");
                }
            }
            Action::ResumeOver => {
                let lanes = self.control.as_mut()?.lanes_mut();
                let other = lanes.gate.over(&node)?;
                lanes.entries.get_mut(&other)?.lane.may_resume(now);
                return Some(other);
            }
            Action::ReadSockets => self.lane(node)?.reads_until = now + READ_AFTER_STALL,
            Action::Connected => {
                self.coverage.hit("link: up");
                let entry = self.lane(node)?;
                (entry.short_dial, entry.lives) = (false, false);
                self.link_connects(node);
            }
            Action::Interrupted { reason } => {
                let entry = self.lane(node)?;
                (entry.why, entry.short_dial) = (reason.as_str(), false);
                self.note(|_| format!("the link of n{node} is interrupted: {}", reason.as_str()));
                self.link_interrupted(node, reason);
            }
            Action::MoveQuiet => self.lane_moves_quiet(node),
            Action::CannotConnect => {
                if !self.lane(node)?.short_post {
                    self.tell(node, LinkEvidence::CannotConnect("no connection for a POST".into()));
                }
            }
            Action::OrdersDoNotArrive => {
                self.coverage.hit("link: orders do not arrive");
                self.tell(node, LinkEvidence::OrdersDoNotArrive);
            }
            Action::OrdersArrive => self.tell(node, LinkEvidence::OrdersArrive),
            Action::PostStatus { status } => self.lane_post_status(node, status),
            Action::NoLink => {
                self.coverage.hit("link: node served without");
                self.lane(node)?.serves_without = true;
                self.lane_is_none(node, "it lives and says no hello");
            }
            Action::Bye => {
                self.coverage.hit("link: bye");
                self.lane_is_none(node, "the node has left");
            }
            Action::OtherBoot { .. } => {
                self.coverage.hit("link: another boot");
                self.watches[node].is_excused(now);
                self.lane_is_none(node, "the node has restarted");
            }
            other => self.check(Err(format!("[11] {other:?} is nobody's"))),
        }
        None
    }

    fn lane_is_none(&mut self, node: usize, reason: &'static str) {
        if let Some(entry) = self.lane(node) {
            entry.none = Some(reason);
        }
    }

    /// Two ways say that the node is gone.
    fn lane_moves_quiet(&mut self, node: usize) {
        let now = self.now;
        let Some(entry) = self.lane(node).filter(|entry| !entry.short_dial && !entry.lives) else { return };
        let is_unsent = |id: AttemptId, reader: &Reader| !reader.sent && entry.lane.is_queued(id);
        let unsent = entry.readers.iter().filter(|(id, reader)| is_unsent(**id, reader)).map(|(id, _)| *id);
        for attempt in unsent.collect::<Vec<_>>() {
            self.deliver(node, attempt, true, Action::NeverSent { attempt });
            if let Some(entry) = self.lane(node) {
                entry.lane.cancel(now, attempt);
            }
        }
        self.coverage.hit("link: quiet");
        self.tell(node, LinkEvidence::Quiet("its link cannot be taken up again".into()));
    }

    /// What it has not accepted goes elsewhere.
    fn lane_is_denied(&mut self, node: usize, status: u16) {
        let now = self.now;
        for attempt in self.unaccepted(node) {
            let taken = self.lane(node).map_or(StartTaken::No, |entry| entry.lane.start_taken(attempt));
            let action = match taken {
                StartTaken::UnderWay => continue,
                StartTaken::Maybe => {
                    self.stopped_by_link(attempt);
                    Action::Lost { attempt, reason: Lost::NotResumed }
                }
                StartTaken::No => Action::PostStatus { status },
            };
            self.deliver(node, attempt, true, action);
            if let Some(entry) = self.lane(node) {
                entry.lane.cancel(now, attempt);
            }
        }
        self.tell(node, LinkEvidence::Denied(format!("it answers HTTP {status}")));
    }

    fn lane_post_status(&mut self, node: usize, status: u16) {
        if !matches!(status, 401 | 403) {
            for attempt in self.unaccepted(node) {
                self.deliver(node, attempt, false, Action::PostStatus { status });
            }
        }
    }

    fn unaccepted(&mut self, node: usize) -> Vec<AttemptId> {
        let readers = self.lane(node).map(|entry| &entry.readers).into_iter().flatten();
        readers.filter(|(_, reader)| !reader.accepted).map(|(id, _)| *id).collect()
    }

    fn deliver(&mut self, node: usize, attempt: AttemptId, is_last: bool, action: Action) {
        let Some(entry) = self.lane(node) else { return };
        let Some(reader) = entry.readers.get_mut(&attempt) else { return };
        let accepts = matches!(action, Action::Accepted { .. } | Action::Resumed { .. });
        reader.accepted |= accepts;
        reader.sent |= accepts || matches!(action, Action::Sent { .. } | Action::Restart { .. });
        if is_last {
            entry.readers.remove(&attempt);
        }
        self.relay_hears(attempt, action);
    }

    /// Brings up to date what the core knows of the lane, and when it is looked at next.
    fn review_lane(&mut self, node: usize) {
        let (now, life, node_id) = (self.now, self.lives, self.node_id(node));
        let Some(entry) = self.lane(node) else { return };
        let link = entry.view();
        if entry.shown.as_ref() != Some(&link) {
            if entry.shown.as_ref().map(|shown| shown.state) != Some(link.state) {
                entry.since = now;
            }
            entry.shown = Some(link.clone());
            entry.unreported = true;
        }
        let waits = |reader: &Reader| now > entry.since.max(reader.since) + LOST_WITHIN;
        let is_late = entry.lane.state() == LaneState::Interrupted
            && entry.lane.attempts() > 0
            && entry.readers.values().any(waits);
        let tells = !entry.gone && std::mem::take(&mut entry.unreported);
        let next = entry.lane.next_deadline().max(entry.reads_until).max(now + LEAST_WAIT);
        let is_sooner = next != Moment::NEVER && entry.due.is_none_or(|due| next < due);
        if is_sooner {
            entry.due = Some(next);
            self.at(next, What::LaneTimer { life, node, armed: next });
        }
        if is_late && !self.long_stalled() {
            self.check(Err(format!("[11] attempts wait for the link of n{node}, which does not come back")));
        }
        if tells {
            self.after_ms(
                0,
                What::LinkSays { life, event: Box::new(Event::Link { node_id, lane: 0, link }) },
            );
        }
    }
}

impl LaneEntry {
    fn view(&self) -> LinkView {
        let (state, reason) = match self.lane.state() {
            LaneState::Up => (LinkState::Up, None),
            LaneState::Connecting => (LinkState::Connecting, None),
            LaneState::Interrupted => (LinkState::Interrupted, Some(self.why)),
            LaneState::None => (LinkState::None, self.none),
        };
        LinkView { state, reason: reason.map(str::to_owned) }
    }
}
