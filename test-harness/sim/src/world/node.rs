//! Nodes of the simulated cluster: the production `NodeCore` over engines that are a few timers.

use std::collections::BTreeMap;
use std::time::Duration;

use attempt_link::node::{ConnectionId, NodeLanes};
use attempt_link::wire::LinkKey;
use node_core::supervisor::Happened;
use node_core::{
    Ask, BeatFailure, Busy, Cursor, Identity, NodeCore, NodeEffect, Readiness, RegisterFailure, ReplicaSpec,
    Retention, Session, Verdict,
};
use pool_registry_types::error::EndCause;
use pool_registry_types::node::{
    Capabilities, Intent, IntentOrder, LINK_FEATURE, LiveAnswer, OPENAI_FEATURE,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolState};
use pool_registry_types::sse::write_frame;
use pool_registry_types::task::ResumeMode;
use pool_registry_types::{
    AttemptId, BootId, ErrorBody, ErrorCode, LabelName, LogId, MachineId, ModelRef, Moment, PoolId,
    ReplicaId, TaskId,
};
use task_scheduler::{Denied, HowEnded, ProbeOutcome, ReplyTo};
use uuid::Uuid;

use super::held::Closing;
use super::supervised::Supervision;
use super::{Call, CallAnswer, Caller, Piece, What, World};
use crate::draw::{NodeFault, NodePlan, Replays, ZONES};
use crate::transcript::token;

mod attempts;
mod engines;

/// A request that an engine works on.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) via: Via,
    task: TaskId,
    log: LogId,
    pub(crate) began: Moment,
    /// Its tokens come with their ids.
    with_ids: bool,
    /// A replay that will not begin with what had been sent.
    differs: bool,
    pub(crate) replica: ReplicaId,
    next: u64,
    /// Bytes that were made of it, and how many its readers have taken, some of them twice.
    pub(crate) made: usize,
    pub(crate) taken: usize,
    /// Since when its engine is held back.
    pub(crate) full_since: Option<Moment>,
    tokens: u64,
    /// Its driver is polled no more.
    pub(crate) stuck: bool,
    poison: bool,
    /// Brings the engine down from within.
    crashes: bool,
    hung: bool,
}

/// How the control plane reads an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// By an exchange of its own.
    Conn(u64),
    /// By the node's link; its node keeps all of it, or what was not seen.
    Link { keep: bool },
}

/// How an attempt ends at its node.
enum Last {
    End(u64),
    Error(ErrorBody),
}

/// One machine: process, engines, and what is wrong with them.
#[derive(Debug)]
pub(crate) struct SimNode {
    pub(crate) core: Option<NodeCore>,
    pub(crate) boot: BootId,
    pub(crate) started: Moment,
    pub(crate) stopped: u32,
    /// What comes while the process is stopped.
    pub(crate) deferred: Vec<What>,
    pub(crate) runs: BTreeMap<AttemptId, Run>,
    /// Attempts that it has kept after their end.
    pub(crate) ended: Vec<AttemptId>,
    pub(crate) hung: u32,
    pub(crate) slow: u32,
    pub(crate) sick: u32,
    pub(crate) foreign: u32,
    /// Its engine answers no look.
    pub(crate) busy: u32,
    looks: u32,
    /// Requests that were broken off and that the engine still works on.
    ghosts: BTreeMap<AttemptId, (ReplicaId, Moment)>,
    engine_down: bool,
    call_under_way: Option<u64>,
    /// When that was made.
    call_made: Moment,
    /// When the last report was made whose answer came.
    pub(crate) answered: Option<Moment>,
    /// Where the node starts its engine itself.
    pub(crate) supervision: Option<Supervision>,
    /// Where it has links: their lanes, those that are open, and when they are looked at next.
    pub(crate) lanes: Option<NodeLanes>,
    pub(crate) open: BTreeMap<ConnectionId, u64>,
    pub(crate) lanes_armed: Option<Moment>,
    /// Of attempts on links: the index behind what was made last, and when that was.
    pub(crate) made: BTreeMap<AttemptId, (u64, Moment)>,
    /// The link of the last POST that was read.
    pub(crate) named: Option<LinkKey>,
}

impl SimNode {
    pub(crate) fn down() -> Self {
        Self {
            core: None,
            boot: BootId(Uuid::nil()),
            started: Moment::ZERO,
            stopped: 0,
            deferred: Vec::new(),
            runs: BTreeMap::new(),
            ended: Vec::new(),
            hung: 0,
            slow: 0,
            sick: 0,
            foreign: 0,
            busy: 0,
            looks: 0,
            ghosts: BTreeMap::new(),
            engine_down: false,
            call_under_way: None,
            call_made: Moment::ZERO,
            answered: None,
            supervision: None,
            lanes: None,
            open: BTreeMap::new(),
            lanes_armed: None,
            made: BTreeMap::new(),
            named: None,
        }
    }
}

fn pool_id() -> PoolId {
    PoolId::new("pool-0").expect("a valid pool id")
}

/// The pool of a replica: those of the second one are called otherwise.
fn pool_of(replica: &ReplicaId) -> PoolId {
    if replica.as_str().starts_with('s') {
        PoolId::new("pool-1").expect("a valid pool id")
    } else {
        pool_id()
    }
}

/// The replicas of a node, with their models.
fn replicas(plan: &NodePlan) -> Vec<(ReplicaId, usize)> {
    let of = |letter: char, model: usize| {
        let id = move |n| ReplicaId::new(&format!("{letter}{n}")).expect("a valid replica id");
        (0..plan.replicas).map(move |n| (id(n), model))
    };
    of('r', plan.model).chain(plan.second.into_iter().flat_map(|model| of('s', model))).collect()
}

/// When something is due at a node, for its session or of what it keeps.
fn next_deadline(core: &NodeCore) -> Option<Moment> {
    core.next_deadline().into_iter().chain(core.held().next_deadline()).min()
}

/// Every second node has engines of another kind.
pub(super) fn kind_of(node: usize) -> EngineKind {
    if node.is_multiple_of(2) { EngineKind::LlamaCpp } else { EngineKind::Vllm }
}

impl World {
    pub(crate) fn start_node(&mut self, node: usize) {
        if self.nodes[node].core.is_some() {
            return;
        }
        self.next_boot += 1;
        let boot = BootId(Uuid::from_u128(u128::from(self.next_boot)));
        let node_id = self.node_id(node);
        let name = |text| LabelName::new(text).expect("a valid label");
        let zone = ZONES[usize::from(self.plan.nodes[node].zone)];
        let identity = Identity {
            labels: Labels::from([(name("zone"), name(zone))]),
            address: format!("http://{node_id}"),
            machine_id: MachineId::new("machine").expect("a valid machine id"),
            node_id,
            boot_id: boot,
            version: "sim".into(),
            capabilities: Capabilities::default(),
            features: {
                let link = self.plan.nodes[node].link.then_some(LINK_FEATURE);
                link.into_iter().chain([OPENAI_FEATURE]).map(str::to_owned).collect()
            },
        };
        let session = Session::new(self.now, self.plan.timing.heartbeat_interval, self.random.u64(..));
        let (slow, sick, busy) = (self.nodes[node].slow, self.nodes[node].sick, self.nodes[node].busy);
        let asked = self.stored_intents[node];
        if asked == Intent::Draining {
            self.coverage.hit("core: drain kept over a restart");
        }
        let mut core = NodeCore::new(identity, session, asked);
        core.bound_held(self.plan.held_bytes);
        core.bound_attempts(self.plan.attempt_bytes);
        let (core, started) = (Some(core), self.now);
        self.nodes[node] = SimNode { core, boot, started, slow, sick, busy, ..SimNode::down() };
        self.start_lanes(node);
        self.note(|_| format!("n{node} starts"));
        let load = self.random.u64(10..3_000);
        self.nodes[node].engine_down = true;
        if self.plan.nodes[node].on_demand {
            self.start_supervision(node);
        } else {
            self.after_ms(load, What::EngineBack { node, boot });
        }
        self.after_ms(1_000, What::Observe { node, boot });
        self.pump(node);
    }

    /// Performs what the node's core finds due, and arms its timer.
    pub(crate) fn pump(&mut self, node: usize) {
        let now = self.now;
        let boot = self.nodes[node].boot;
        while let Some(attempt) = self.nodes[node].core.as_mut().and_then(|core| core.held_mut().expired(now))
        {
            self.coverage.hit("stream: stopped without a reader");
            self.check_window(node, attempt);
            self.cancel_run(node, attempt);
        }
        loop {
            let Some(core) = self.nodes[node].core.as_mut() else { return };
            drop(core.held_mut().take_removed());
            let Some(effect) = core.due(now) else { break };
            self.next_call += 1;
            let caller = Caller { node, boot, call: self.next_call };
            self.nodes[node].call_under_way = Some(caller.call);
            self.nodes[node].call_made = now;
            match effect {
                NodeEffect::Register(request) => self.send_call(caller, Call::Register(request)),
                NodeEffect::Heartbeat(mut beat) => {
                    // Its own clock, whatever that says.
                    let clock = i64::try_from(now.as_millis()).unwrap_or(0) + self.clocks[node];
                    beat.timestamp = clock.to_string();
                    self.send_call(caller, Call::Heartbeat(beat));
                }
                NodeEffect::Deregister(epoch) => self.send_call(caller, Call::Deregister(epoch)),
                other => self.obey(node, other),
            }
        }
        let next = self.nodes[node].core.as_ref().and_then(next_deadline);
        if let Some(armed) = next {
            self.at(armed, What::NodeTimer { node, boot, armed });
        }
    }

    pub(crate) fn handle_at_node(&mut self, what: What) {
        let (node, boot) = match &what {
            What::AnswerArrives { caller, .. } | What::CallTimesOut { caller } => {
                (caller.node, Some(caller.boot))
            }
            What::OpenArrives { conn }
            | What::DropArrives { conn }
            | What::ResumeArrives { conn, .. }
            | What::ReaderBack { conn }
            | What::KeepAlive { conn } => match self.conns.get(conn) {
                Some(c) => (c.node, None),
                None => return,
            },
            What::UpArrives { node, .. }
            | What::ProbeArrives { node, .. }
            | What::IntentArrives { node, .. }
            | What::LoadArrives { node } => (*node, None),
            What::NodeTimer { node, boot, .. }
            | What::EngineStep { node, boot, .. }
            | What::StopAgain { node, boot, .. }
            | What::SlotReleased { node, boot, .. }
            | What::EngineBack { node, boot }
            | What::EngineLoaded { node, boot, .. }
            | What::EngineGone { node, boot, .. }
            | What::Observe { node, boot }
            | What::LinkTakes { node, boot, .. }
            | What::LanesTimer { node, boot, .. }
            | What::LeaveNow { node, boot, .. } => (*node, Some(*boot)),
            other => unreachable!("not an event of a node: {other:?}"),
        };
        if boot.is_some_and(|boot| boot != self.nodes[node].boot) {
            return;
        }
        if self.nodes[node].stopped > 0 {
            // A probe of a stopped process connects and gets no answer.
            if let What::ProbeArrives { life, address, .. } = what {
                let outcome = ProbeOutcome::Failed("no answer in time".into());
                return self.answer_probe(life, node, address, 2_000, outcome);
            }
            if let What::IntentArrives { life, to, order, .. } = what {
                let outcome = Err("no answer in time".to_owned());
                return self.answer_intent(life, node, to, order, 5_000, outcome);
            }
            self.nodes[node].deferred.push(what);
            return;
        }
        match what {
            What::AnswerArrives { caller, answer } => self.answer_arrives(node, caller, answer),
            What::CallTimesOut { caller } => self.call_times_out(node, caller),
            What::OpenArrives { conn } => self.open_arrives(node, conn),
            What::DropArrives { conn } => self.drop_arrives(node, conn),
            What::ResumeArrives { conn, from } => self.resume_arrives(node, conn, from),
            What::ReaderBack { conn } => self.reader_back(conn),
            What::StopAgain { attempt, .. } => self.closing_arrives(node, attempt, Closing::Stop),
            What::KeepAlive { conn } => self.keep_alive(conn),
            What::ProbeArrives { life, address, authorized, .. } => {
                self.probe_arrives(life, node, address, authorized);
            }
            What::IntentArrives { life, to, order, .. } => {
                self.intent_arrives(life, node, to, order);
            }
            What::NodeTimer { armed, .. } => {
                if self.nodes[node].core.as_ref().and_then(next_deadline) == Some(armed) {
                    self.pump(node);
                }
            }
            What::UpArrives { up, .. } => self.up_arrives(node, up),
            What::LinkTakes { conn, .. } => self.link_takes(node, conn),
            What::LanesTimer { armed, .. } => self.lanes_timer(node, armed),
            What::EngineStep { attempt, .. } => self.engine_step(node, attempt),
            What::SlotReleased { attempt, .. } => {
                // The engine has noticed; the node hears of it at its next look.
                if let Some((replica, _)) = self.nodes[node].ghosts.remove(&attempt) {
                    self.count(node, &replica);
                }
                self.pump(node);
            }
            What::EngineBack { .. } => self.engine_back(node),
            What::EngineLoaded { run, .. } => self.engine_loaded(node, run),
            What::EngineGone { run, .. } => self.engine_gone(node, run),
            What::LoadArrives { .. } => {
                self.supervise(node, Happened::Load { pool_id: pool_id() });
                self.pump(node);
            }
            What::Observe { boot, .. } => {
                self.observe(node);
                self.supervise(node, Happened::Timer);
                self.after_ms(1_000, What::Observe { node, boot });
                self.pump(node);
            }
            What::LeaveNow { boot, down_ms, grace_end, .. } => {
                let now = self.now;
                let core = self.nodes[node].core.as_ref();
                let awaits = core.is_some_and(|core| core.held().awaits_done(now));
                if (awaits || !self.nodes[node].runs.is_empty()) && now < grace_end {
                    return self.after_ms(20, What::LeaveNow { node, boot, down_ms, grace_end });
                }
                if self.watches[node].is_troubled(now) && self.plan.nodes[node].link {
                    self.coverage.hit("link: node left with its link down");
                }
                self.lanes_leave(node);
                if let Some(core) = self.nodes[node].core.as_mut() {
                    core.leave();
                }
                self.pump(node);
                self.crash_node(node, down_ms);
            }
            other => unreachable!("not an event of a node: {other:?}"),
        }
    }

    fn answer_arrives(&mut self, node: usize, caller: Caller, answer: CallAnswer) {
        let now = self.now;
        let sim = &mut self.nodes[node];
        if sim.call_under_way.take_if(|call| *call == caller.call).is_none() {
            return;
        }
        let Some(core) = sim.core.as_mut() else { return };
        let effects = match answer {
            CallAnswer::Registered(answer) => {
                let life = answer.as_ref().ok().and_then(|answer| answer.life);
                let effects = core.registered(now, answer.map_err(RegisterFailure::Refused));
                if let Some(life) = life {
                    self.lanes_registered(node, life);
                }
                effects
            }
            CallAnswer::Heartbeat { answer, taken } => {
                if taken && answer.is_ok() {
                    sim.answered = Some(sim.call_made);
                }
                let unknown = |body: ErrorBody| match body.code {
                    ErrorCode::NodeUnknown => BeatFailure::Unknown,
                    _ => BeatFailure::Failed(body.message),
                };
                core.heartbeat_answered(now, answer.map_err(unknown))
            }
            CallAnswer::Deregistered => {
                core.deregistered();
                Vec::new()
            }
        };
        for effect in effects {
            self.obey(node, effect);
        }
        self.pump(node);
    }

    /// What an answer of the control plane asks for.
    fn obey(&mut self, node: usize, effect: NodeEffect) {
        match effect {
            NodeEffect::Cancel(attempt) => {
                self.coverage.hit("core: orphan ended");
                self.cancel_run(node, attempt);
            }
            NodeEffect::TakeIntent(order) => drop(self.take_intent(node, &order)),
            NodeEffect::Waiting(pools) => {
                self.supervise(node, Happened::Waiting(pools.into_iter().collect()));
            }
            other => unreachable!("not an order: {other:?}"),
        }
    }

    /// Returns whether the order is for the registration that holds.
    fn take_intent(&mut self, node: usize, order: &IntentOrder) -> bool {
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return false };
        if !core.counts(order) {
            return core.session().epoch() == Some(&order.epoch);
        }
        self.stored_intents[node] = order.intent;
        core.set_intent(now, order);
        self.note(|_| format!("n{node} takes {:?} over", order.intent));
        true
    }

    fn intent_arrives(&mut self, life: u64, node: usize, to: ReplyTo, order: IntentOrder) {
        let there = self.take_intent(node, &order);
        self.pump(node);
        let outcome = there.then_some(()).ok_or_else(|| "connection refused".to_owned());
        let delay = self.delay();
        self.answer_intent(life, node, to, order, delay, outcome);
    }

    pub(crate) fn answer_intent(
        &mut self,
        life: u64,
        node: usize,
        to: ReplyTo,
        order: IntentOrder,
        ms: u64,
        outcome: Result<(), String>,
    ) {
        let node_id = self.node_id(node);
        let outcome = if self.links[node].blocked() { Err("no answer in time".into()) } else { outcome };
        self.after_ms(ms, What::IntentAnswered { life, node_id, to, order, outcome });
    }

    fn call_times_out(&mut self, node: usize, caller: Caller) {
        let now = self.now;
        let sim = &mut self.nodes[node];
        if sim.call_under_way.take_if(|call| *call == caller.call).is_none() {
            return;
        }
        if let Some(core) = sim.core.as_mut() {
            if core.session().is_registered() {
                core.heartbeat_answered(now, Err(BeatFailure::Failed("lost".into())));
            } else {
                core.registered(now, Err(RegisterFailure::Unreachable("lost".into())));
            }
        }
        self.pump(node);
    }

    fn probe_arrives(&mut self, life: u64, node: usize, address: String, authorized: bool) {
        let node_id = self.node_id(node);
        let live = LiveAnswer { node_id, boot_id: self.nodes[node].boot };
        let outcome = match self.nodes[node].core {
            Some(_) => {
                let denies = self.node_faults[node].0 == Some(NodeFault::Denies);
                let says = if denies { Err(Denied("it answers HTTP 401".into())) } else { Ok(()) };
                ProbeOutcome::Answered { live, authorized: authorized.then_some(says) }
            }
            None => ProbeOutcome::Failed("connection refused".into()),
        };
        let delay = self.delay();
        self.answer_probe(life, node, address, delay, outcome);
    }

    fn answer_probe(&mut self, life: u64, node: usize, address: String, ms: u64, outcome: ProbeOutcome) {
        let node_id = self.node_id(node);
        let outcome = if self.links[node].blocked() {
            ProbeOutcome::Failed("no answer in time".into())
        } else {
            outcome
        };
        self.after_ms(ms, What::ProbeAnswered { life, node_id, address, outcome });
    }

    // ---- lives and deaths ----

    pub(crate) fn crash_node(&mut self, node: usize, down_ms: u64) {
        if self.nodes[node].core.is_none() {
            return;
        }
        self.note(|_| format!("n{node} dies"));
        let conns: Vec<u64> = self.conns.iter().filter(|(_, c)| c.node == node).map(|(id, _)| *id).collect();
        for conn in conns {
            let open = self.conns.get_mut(&conn).is_some_and(|c| std::mem::take(&mut c.node_open));
            if open {
                self.send_piece(conn, Piece::Reset("connection reset"));
            }
        }
        self.links_lose_node(node);
        self.watches[node].is_excused(self.now);
        let (slow, sick, busy) = (self.nodes[node].slow, self.nodes[node].sick, self.nodes[node].busy);
        self.nodes[node] = SimNode { slow, sick, busy, ..SimNode::down() };
        self.after_ms(down_ms, What::NodeBack { node });
    }

    /// SIGTERM: drain, finish what runs, leave.
    pub(crate) fn leave_node(&mut self, node: usize, down_ms: u64) {
        let now = self.now;
        let boot = self.nodes[node].boot;
        if let Some(core) = self.nodes[node].core.as_mut() {
            self.coverage.hit("fault: node left and came back");
            self.watches[node].is_excused(now);
            core.drain(now);
            self.pump(node);
            let grace_end = now + Duration::from_secs(10);
            self.after_ms(20, What::LeaveNow { node, boot, down_ms, grace_end });
        }
    }

    pub(crate) fn continue_node(&mut self, node: usize) {
        let sim = &mut self.nodes[node];
        sim.stopped = sim.stopped.saturating_sub(1);
        if sim.stopped == 0 {
            for what in std::mem::take(&mut sim.deferred) {
                self.handle_at_node(what);
            }
        }
    }
}
