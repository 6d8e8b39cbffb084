//! A node's shell of its lanes: its attempts as links use them, and what is written when.

use std::collections::BTreeMap;

use attempt_link::content::{Acceptance, Hello};
use attempt_link::control::{PostOutcome, PostRequest};
use attempt_link::node::{
    AttemptHost, ConnectionId, NodeAction, NodeLanes, NotResumed, PostRefusal, Progress, Supply,
};
use attempt_link::wire::{ControlAnswer, ResumeOrder, Start, read_single, read_starts};
use bytes::Bytes;
use node_core::{Ask, NodeCore, Retention};
use pool_registry_types::{AttemptId, BootId, ErrorBody, ErrorCode, LifeId, Moment, NodeId, ReplicaId};

use super::super::held::Closing;
use super::super::node::Run;
use super::super::{What, World};
use crate::draw::{Mutant, NodeFault};

/// Bytes that are written to a link at a time.
const WRITE_BYTES: usize = 64 * 1024;

/// What the lanes have done to an attempt, and is still to be done of it.
#[derive(Debug)]
pub(crate) enum Deed {
    Accepted { start: Box<Start>, replica: ReplicaId },
    Stopped(AttemptId),
    Failed(AttemptId),
    Detached(AttemptId),
}

/// The node's attempts, as links use them.
pub(super) struct Host<'a> {
    node_id: NodeId,
    boot_id: BootId,
    core: &'a mut NodeCore,
    fault: Option<NodeFault>,
    runs: &'a BTreeMap<AttemptId, Run>,
    deeds: Vec<Deed>,
}

impl AttemptHost for Host<'_> {
    fn accept(&mut self, now: Moment, start: &Start) -> Result<Acceptance, ErrorBody> {
        match self.fault {
            Some(NodeFault::Rejects) => {
                return Err(ErrorBody::new(ErrorCode::InvalidParams, "it does not know a field"));
            }
            Some(NodeFault::Refuses(code)) => return Err(ErrorBody::new(code, "not now")),
            _ => {}
        }
        let facts = &start.facts;
        let ask = Ask {
            node_id: &self.node_id,
            boot_id: self.boot_id,
            attempt: facts.attempt_id,
            model: Some(&facts.spec.model_ref),
            task: Some(facts.task_id),
            hint: None,
            first_index: facts.first_index,
            retention: if facts.keep { Retention::Keep } else { Retention::Unseen },
        };
        let accepted = self.core.accept(now, &facts.pool_id, &ask)?;
        self.core.held_mut().link(&facts.attempt_id, facts.log_id, node_core::Cursor::first());
        let replica = accepted.replica_id.clone();
        self.deeds.push(Deed::Accepted { start: Box::new(start.clone()), replica });
        Ok(Acceptance { replica_id: accepted.replica_id, report_seq: accepted.report_seq })
    }

    fn resume(&mut self, now: Moment, order: &ResumeOrder) -> Result<Acceptance, NotResumed> {
        self.core.resume_by_link(now, order)
    }

    fn stop(&mut self, now: Moment, attempt: &AttemptId) {
        self.core.stopped(now, attempt);
        self.deeds.push(Deed::Stopped(*attempt));
    }

    fn done(&mut self, _: Moment, attempt: &AttemptId) {
        self.core.held_mut().done(attempt);
    }

    fn seen(&mut self, _: Moment, attempt: &AttemptId, next: u64) {
        self.core.held_mut().seen(attempt, next);
    }

    fn detach(&mut self, now: Moment, attempt: &AttemptId) {
        self.core.held_mut().unlink(now, attempt);
        self.deeds.push(Deed::Detached(*attempt));
    }

    fn fail(&mut self, _: Moment, attempt: &AttemptId, next: u64, error: ErrorBody) {
        self.core.held_mut().fail(attempt, next, error);
        self.deeds.push(Deed::Failed(*attempt));
    }

    fn supply(&mut self, attempt: &AttemptId, most: usize) -> Supply {
        self.core.held_mut().supply(attempt, most)
    }

    fn progress(&self, _: Moment, attempt: &AttemptId) -> Option<Progress> {
        let (next, ended) = self.core.held().progress(attempt)?;
        let lives = self.runs.get(attempt).is_some_and(|run| !run.stuck);
        Some(Progress { next, ended, lives })
    }
}

impl World {
    pub(crate) fn start_lanes(&mut self, node: usize) {
        if self.plan.nodes[node].link {
            let (node_id, boot_id) = (self.node_id(node), self.nodes[node].boot);
            let hello = Hello { node_id, boot_id, version: "sim".into() };
            let rule = Mutant::link(self.plan.switched_off);
            let mut lanes = NodeLanes::new(hello);
            lanes.switch_off(rule);
            self.nodes[node].lanes = Some(lanes);
            if let Some(core) = self.nodes[node].core.as_mut() {
                core.switch_off(rule);
            }
        }
    }

    pub(crate) fn lanes_registered(&mut self, node: usize, life: LifeId) {
        if let Some(lanes) = self.nodes[node].lanes.as_mut() {
            lanes.registered(life);
        }
    }

    /// Something with the lanes of a node that lives, and what it brings for attempts.
    pub(super) fn at_lanes<T>(
        &mut self,
        node: usize,
        act: impl FnOnce(Moment, &mut NodeLanes, &mut Host<'_>) -> T,
    ) -> Option<T> {
        let (now, node_id, fault) = (self.now, self.node_id(node), self.node_faults[node].0);
        let sim = &mut self.nodes[node];
        let (Some(core), Some(lanes)) = (sim.core.as_mut(), sim.lanes.as_mut()) else { return None };
        let mut host = Host { node_id, boot_id: sim.boot, core, fault, runs: &sim.runs, deeds: Vec::new() };
        let result = act(now, lanes, &mut host);
        for deed in host.deeds {
            self.carry_out_deed(node, deed);
        }
        Some(result)
    }

    fn carry_out_deed(&mut self, node: usize, deed: Deed) {
        match deed {
            Deed::Accepted { start, replica } => self.begin_by_link(node, &start, replica),
            Deed::Stopped(attempt) => self.closing_arrives(node, attempt, Closing::Stop),
            Deed::Failed(attempt) => self.cancel_run(node, attempt),
            Deed::Detached(attempt) => self.link_detached(node, attempt),
        }
    }

    /// There is more of an attempt, or its end.
    pub(crate) fn appended_to_link(&mut self, node: usize, attempt: AttemptId) {
        if let Some(lanes) = self.nodes[node].lanes.as_mut() {
            lanes.appended(&attempt);
        }
        self.run_lanes(node);
    }

    /// Does what the lanes want done.
    pub(super) fn run_lanes(&mut self, node: usize) {
        while let Some(action) = self.nodes[node].lanes.as_mut().and_then(NodeLanes::next_action) {
            match action {
                NodeAction::Write(conn) => self.write_link(node, conn),
                NodeAction::Close(conn) => {
                    if let Some(get) = self.nodes[node].open.remove(&conn) {
                        self.node_closes(get);
                    }
                }
                NodeAction::PokeSession => {
                    let now = self.now;
                    if let Some(core) = self.nodes[node].core.as_mut() {
                        core.report_now(now);
                    }
                    self.pump(node);
                }
            }
        }
        let boot = self.nodes[node].boot;
        let Some(armed) = self.nodes[node].lanes.as_ref().map(NodeLanes::next_deadline) else { return };
        let sim = &mut self.nodes[node];
        if armed != Moment::NEVER && sim.lanes_armed.is_none_or(|before| armed < before) {
            sim.lanes_armed = Some(armed);
            self.at(armed, What::LanesTimer { node, boot, armed });
        }
    }

    pub(crate) fn lanes_timer(&mut self, node: usize, armed: Moment) {
        let now = self.now;
        let sim = &mut self.nodes[node];
        if sim.lanes_armed != Some(armed) {
            return;
        }
        sim.lanes_armed = None;
        if sim.lanes.as_ref().is_some_and(|lanes| lanes.next_deadline() <= now) {
            self.at_lanes(node, |now, lanes, host| lanes.timer(now, host));
        }
        self.run_lanes(node);
    }

    /// The connection takes what there is, as far as it has room.
    fn write_link(&mut self, node: usize, conn: ConnectionId) {
        loop {
            let Some(get) = self.nodes[node].open.get(&conn).copied() else { return };
            let mut out = Vec::new();
            let more =
                self.at_lanes(node, |now, lanes, host| lanes.fill(now, conn, &mut out, WRITE_BYTES, host));
            let is_empty = out.is_empty();
            let takes = self.takes(get, out);
            if more != Some(true) || !takes {
                return;
            }
            if is_empty {
                return self.check(Err(format!("[11] n{node} has more for its link, and writes nothing")));
            }
        }
    }

    /// It takes more.
    pub(crate) fn link_takes(&mut self, node: usize, conn: ConnectionId) {
        self.write_link(node, conn);
        self.run_lanes(node);
    }

    // ---- POSTs ----

    /// Returns what is answered, if anything.
    pub(super) fn take_post(&mut self, node: usize, request: PostRequest) -> Option<PostOutcome> {
        if self.nodes[node].core.is_none() || self.nodes[node].lanes.is_none() {
            return Some(PostOutcome::NotSent);
        }
        let starts = !matches!(request, PostRequest::Control(_));
        match self.node_faults[node].0 {
            Some(NodeFault::Denies) => return Some(PostOutcome::Status(401)),
            Some(NodeFault::Fails) if starts => return Some(PostOutcome::Status(500)),
            Some(NodeFault::Resets) if starts => return Some(PostOutcome::Broken),
            Some(NodeFault::SaysNothing) if starts => return None,
            _ => {}
        }
        let read = "what a lane writes can be read";
        let (key, ids, answered) = match request {
            PostRequest::Starts(body) => {
                let body = read_starts(&body).expect(read);
                let (key, ids) =
                    (body.key, body.start.iter().flatten().map(|s| s.facts.attempt_id).collect());
                let taken = self.at_lanes(node, |now, lanes, host| lanes.starts(now, body, host));
                (key, ids, taken.map(|taken| taken.map(|()| ControlAnswer::default())))
            }
            PostRequest::Single { attempt, body } => {
                let body = read_single(&Bytes::from(body.concat())).expect(read);
                let key = body.key;
                let taken = self.at_lanes(node, |now, lanes, host| lanes.single(now, attempt, body, host));
                (key, vec![attempt], taken.map(|taken| taken.map(|()| ControlAnswer::default())))
            }
            PostRequest::Control(body) => {
                let ids = body.resume.iter().map(|order| order.attempt_id).collect();
                let taken = self.at_lanes(node, |now, lanes, host| lanes.control(now, &body, host));
                (body.key(), ids, taken)
            }
        };
        if answered.as_ref().is_some_and(Result::is_ok) {
            self.check_named(node, key, &ids);
        }
        self.run_lanes(node);
        Some(match answered? {
            Ok(answer) => {
                if !answer.unknown.is_empty() {
                    self.coverage.hit("link: start unknown");
                }
                PostOutcome::Answered(answer)
            }
            Err(PostRefusal::Stale) => PostOutcome::Stale,
            Err(PostRefusal::Credential) => PostOutcome::Status(401),
        })
    }

    /// Whether what links were opened with counts.
    pub(crate) fn credentials(&mut self, node: usize, count: bool) {
        let open: Vec<ConnectionId> = self.nodes[node].open.keys().copied().collect();
        self.at_lanes(node, |now, lanes, _| {
            open.iter().for_each(|conn| lanes.credential(now, *conn, count));
        });
        self.run_lanes(node);
    }

    /// The node leaves.
    pub(crate) fn lanes_leave(&mut self, node: usize) {
        if let Some(lanes) = self.nodes[node].lanes.as_mut() {
            lanes.leave();
        }
        self.run_lanes(node);
    }
}
