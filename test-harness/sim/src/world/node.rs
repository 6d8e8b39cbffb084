//! Nodes of the simulated cluster: the production `NodeCore` over engines that are a few timers.

use std::collections::BTreeMap;
use std::time::Duration;

use node_core::supervisor::Happened;
use node_core::{
    Ask, BeatFailure, Busy, Cursor, Identity, NodeCore, NodeEffect, Readiness, ReplicaSpec, Retention,
    Session, Verdict,
};
use pool_registry_types::error::EndCause;
use pool_registry_types::node::{Capabilities, Intent, IntentOrder, LiveAnswer};
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

/// A request that an engine works on.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) conn: u64,
    task: TaskId,
    log: LogId,
    pub(crate) began: Moment,
    /// Its tokens come with their ids.
    with_ids: bool,
    /// A replay that will not begin with what had been sent.
    differs: bool,
    pub(crate) replica: ReplicaId,
    next: u64,
    tokens: u64,
    poison: bool,
    /// Brings the engine down from within.
    crashes: bool,
    hung: bool,
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
}

impl SimNode {
    pub(crate) fn down() -> Self {
        Self {
            core: None,
            boot: BootId(Uuid::nil()),
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
        };
        let session = Session::new(self.now, self.plan.timing.heartbeat_interval, self.random.u64(..));
        let (slow, sick, busy) = (self.nodes[node].slow, self.nodes[node].sick, self.nodes[node].busy);
        let asked = self.stored_intents[node];
        if asked == Intent::Draining {
            self.coverage.hit("core: drain kept over a restart");
        }
        let mut core = NodeCore::new(identity, session, asked);
        core.bound_held(self.plan.held_bytes);
        let core = Some(core);
        self.nodes[node] = SimNode { core, boot, slow, sick, busy, ..SimNode::down() };
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
            | What::KeepAlive { conn } => match self.conns.get(conn) {
                Some(c) => (c.node, None),
                None => return,
            },
            What::ProbeArrives { node, .. }
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
            CallAnswer::Registered(answer) => core.registered(now, answer.map_err(Some)),
            CallAnswer::Heartbeat { answer, taken } => {
                if taken && answer.is_ok() {
                    sim.answered = Some(sim.call_made);
                }
                let unknown = |body: ErrorBody| match body.code {
                    ErrorCode::NodeUnknown => BeatFailure::Unknown,
                    _ => BeatFailure::Failed,
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
                core.heartbeat_answered(now, Err(BeatFailure::Failed));
            } else {
                core.registered(now, Err(None));
            }
        }
        self.pump(node);
    }

    // ---- engines ----

    pub(super) fn engine_back(&mut self, node: usize) {
        let plan = self.plan.nodes[node].clone();
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        for (replica_id, model) in replicas(&plan) {
            let pool_id = pool_of(&replica_id);
            let spec = ReplicaSpec {
                replica_id: replica_id.clone(),
                engine: EngineKind::LlamaCpp,
                engine_version: None,
                url: "http://engine".into(),
                models: vec![ModelRef::new(&format!("m{model}")).expect("a valid model")],
                engine_names: BTreeMap::new(),
                names_from_engine: false,
                slots: plan.slots,
                ctx_max: None,
                device_mask: None,
                warning: None,
            };
            core.bind(now, &pool_id, spec).expect("replicas of a pool agree");
            core.engine_began(&pool_id, &replica_id);
        }
        self.nodes[node].engine_down = false;
        self.oracle.engine_is_new(&self.node_id(node));
        self.observe(node);
        self.pump(node);
    }

    /// The node looks at its engines.
    fn observe(&mut self, node: usize) {
        let (now, all) = (self.now, replicas(&self.plan.nodes[node]));
        let sim = &mut self.nodes[node];
        sim.looks += 1;
        let (down, silent) = (sim.engine_down, sim.busy > 0);
        // A look that is not answered takes three seconds, and one more passes until the next.
        let late = silent && !sim.looks.is_multiple_of(4);
        for (replica, _) in all {
            let pool_id = pool_of(&replica);
            let Some(core) = self.nodes[node].core.as_mut() else { return };
            let readiness = match (down, silent) {
                (true, _) => Readiness::Gone("connection refused".into()),
                (false, true) => Readiness::Silent("no answer in time".into()),
                (false, false) => Readiness::Ready,
            };
            let was_ready = core.is_ready(&pool_id, &replica);
            if down || !late {
                core.observed(now, &pool_id, &replica, readiness);
            }
            let is_back = !was_ready && core.is_ready(&pool_id, &replica);
            core.expire_releases(now);
            if is_back {
                // Whoever comes back after it was away may be another engine.
                self.oracle.engine_is_new(&self.node_id(node));
            }
            self.count(node, &replica);
        }
        self.check_busy(node);
    }

    /// The node asks how busy an engine is.
    fn count(&mut self, node: usize, replica: &ReplicaId) {
        let now = self.now;
        let sim = &mut self.nodes[node];
        let running = sim.runs.values().filter(|run| run.replica == *replica).count();
        let ghosts = sim.ghosts.values().filter(|(ghost, _)| ghost == replica).count();
        let Some(core) = sim.core.as_mut() else { return };
        let count = u32::try_from(running + ghosts).unwrap_or(u32::MAX) + sim.foreign;
        let busy = if sim.busy > 0 || sim.engine_down { Busy::NoAnswer } else { Busy::Reported(count) };
        core.counted(now, now, &pool_of(replica), replica, busy);
    }

    /// An engine that brings bytes is never taken for dead, and one that works has its model.
    fn check_busy(&mut self, node: usize) {
        let (now, sim) = (self.now, &self.nodes[node]);
        let Some(core) = sim.core.as_ref().filter(|_| sim.busy > 0 && !sim.engine_down) else { return };
        let works = sim.runs.values().any(|run| pool_of(&run.replica) == pool_id());
        if sim.stopped > 0 || !works {
            return;
        }
        let reports = core.pool_reports(now);
        let Some(report) = reports.iter().find(|report| report.pool_id == pool_id()) else { return };
        let was_ready = report.state != PoolState::Loadable && !report.replicas.is_empty();
        let mut broken = Ok(());
        if was_ready && !report.draining && !report.state.has_model() {
            broken = Err(format!("n{node} works, and its pool is {:?}", report.state));
        }
        self.coverage.hit("core: busy engine kept its model");
        self.check(broken);
    }

    /// The engine goes on for a while with what was broken off.
    pub(super) fn haunt(&mut self, node: usize, attempt: AttemptId, replica: ReplicaId) {
        let boot = self.nodes[node].boot;
        self.nodes[node].ghosts.insert(attempt, (replica, self.now));
        let drawn = self.random.u64(10..=500);
        // Now and then it takes long to notice.
        let after = if drawn.is_multiple_of(8) { drawn * 16 } else { drawn };
        if after > 500 {
            self.coverage.hit("core: slot kept by the engine's word");
        }
        self.after_ms(after, What::SlotReleased { node, boot, attempt });
    }

    /// [4] An engine never works on more requests than it has slots, those broken off included.
    fn check_slots(&mut self, node: usize, replica: &ReplicaId) {
        let sim = &self.nodes[node];
        let running = sim.runs.values().filter(|run| run.replica == *replica).count();
        // Without the engine's word a slot is kept for 30 s: a node that was stopped may have had none.
        let kept = |since: &Moment| self.now < *since + Duration::from_secs(30);
        let ghosts = sim.ghosts.values().filter(|(ghost, since)| ghost == replica && kept(since)).count();
        let slots = self.plan.nodes[node].slots as usize;
        if running + ghosts > slots {
            self.check(Err(format!("[4] the engine of n{node} works on {running} and {ghosts} of {slots}")));
        }
    }

    pub(crate) fn kill_engine(&mut self, node: usize, down_ms: u64) {
        let boot = self.nodes[node].boot;
        if self.nodes[node].core.is_none() || self.nodes[node].engine_down {
            return;
        }
        self.note(|_| format!("n{node}: the engine dies"));
        self.engines_end(node, None);
        if let Some(run) = self.supervised_engine(node) {
            return self.engine_gone(node, run);
        }
        self.fail_runs(node);
        self.after_ms(down_ms, What::EngineBack { node, boot });
        self.pump(node);
    }

    /// The engine is down: what runs on it dies.
    pub(super) fn fail_runs(&mut self, node: usize) {
        self.nodes[node].engine_down = true;
        self.nodes[node].ghosts.clear();
        self.observe(node);
        let runs: Vec<AttemptId> = self.nodes[node].runs.keys().copied().collect();
        for attempt in runs {
            let verdict = self.nodes[node].core.as_ref().map(|core| core.verdict(&attempt));
            let crash = match verdict {
                Some(Verdict::Known(crash)) => crash,
                Some(Verdict::Awaited) | None => None,
            };
            let error =
                ErrorBody::new(ErrorCode::WorkerReset, "the engine died").with_cause(EndCause::EngineDied);
            self.end_run(node, attempt, Last::Error(ErrorBody { crash, ..error }), true);
        }
    }

    /// The engines of the node end; by a signal of their own where one of them has crashed.
    fn engines_end(&mut self, node: usize, signal: Option<&'static str>) {
        let (now, all) = (self.now, replicas(&self.plan.nodes[node]));
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        for (replica, _) in all {
            core.engine_ended(now, &pool_of(&replica), &replica, signal);
        }
    }

    /// What runs now never moves again; what comes while the engine hangs neither.
    pub(crate) fn hang_engine(&mut self, node: usize) {
        self.nodes[node].hung += 1;
        for run in self.nodes[node].runs.values_mut() {
            run.hung = true;
        }
    }

    fn engine_step(&mut self, node: usize, attempt: AttemptId) {
        let boot = self.nodes[node].boot;
        let pace = self.plan.pace_ms * if self.nodes[node].slow > 0 { 20 } else { 1 };
        let Some(run) = self.nodes[node].runs.get_mut(&attempt) else { return };
        if run.hung {
            return;
        }
        if self.nodes[node].sick > 0 {
            let error = ErrorBody::new(ErrorCode::WorkerReset, "HTTP 500").with_cause(EndCause::Engine5xx);
            return self.end_run(node, attempt, Last::Error(error), true);
        }
        let Some(run) = self.nodes[node].runs.get_mut(&attempt) else { return };
        if run.poison || run.crashes {
            let down_ms = self.random.u64(500..4_000);
            if run.crashes {
                self.note(|_| format!("n{node}: the engine crashes"));
                self.engines_end(node, Some("SIGSEGV"));
            }
            return self.kill_engine(node, down_ms);
        }
        if run.differs {
            let error = ErrorBody::new(ErrorCode::WorkerReset, "the replay differs");
            let error = error.with_cause(EndCause::ReplayDiffers);
            return self.end_run(node, attempt, Last::Error(error), false);
        }
        let (conn, i, task) = (run.conn, run.next, run.task);
        let (log, with_ids) = (run.log, run.with_ids);
        if self.plan.tasks[self.names[&task]].bad {
            self.coverage.hit("task: bad for every engine");
            let error =
                ErrorBody::new(ErrorCode::WorkerReset, "a bad request").with_cause(EndCause::Engine5xx);
            return self.end_run(node, attempt, Last::Error(error), true);
        }
        let Some(run) = self.nodes[node].runs.get_mut(&attempt) else { return };
        if i >= run.tokens {
            return self.end_run(node, attempt, Last::End(i), true);
        }
        run.next += 1;
        let now = self.now;
        if let Some(core) = self.nodes[node].core.as_mut() {
            core.heard(now, &attempt);
        }
        let odd = self.plan.nodes[node].odd;
        self.voices.entry(task).or_insert(odd);
        let node_id = self.node_id(node);
        let made = token(log, attempt, &node_id, i, with_ids);
        self.append(node, attempt, conn, (i, made, true));
        let wait = self.random.u64(..=pace);
        self.after_ms(wait, What::EngineStep { node, boot, attempt });
    }

    /// The last words of an attempt: the final frame and the closing comment.
    fn end_run(&mut self, node: usize, attempt: AttemptId, last: Last, idle: bool) {
        let Some(run) = self.nodes[node].runs.remove(&attempt) else { return };
        let now = self.now;
        let Some(core) = self.nodes[node].core.as_mut() else { return };
        let seq = if idle { core.ended(&attempt) } else { core.ended_before_release(now, &attempt) };
        if !idle {
            self.haunt(node, attempt, run.replica.clone());
        }
        let ended_well = matches!(last, Last::End(_));
        if ended_well && let Some(core) = self.nodes[node].core.as_mut() {
            core.cleared(&attempt);
        }
        let mut frame = Vec::new();
        match &last {
            Last::End(i) => write_frame(&mut frame, Some((&run.log, *i)), "end", "{}"),
            Last::Error(error) => {
                let data = serde_json::to_string(error).expect("an error is always JSON");
                write_frame(&mut frame, None, "error", &data);
            }
        }
        self.append(node, attempt, run.conn, (run.next, frame, true));
        let seq = format!(": report-seq {seq}\n\n").into_bytes();
        self.finish(node, attempt, run.conn, (run.next + 1, seq));
        if let Some(conn) = self.conns.get_mut(&run.conn) {
            conn.node_open = false;
            conn.ended_at_node = true;
            conn.ended_well = ended_well;
        }
    }

    fn cancel_run(&mut self, node: usize, attempt: AttemptId) {
        let error = ErrorBody::new(ErrorCode::Canceled, "canceled").with_cause(EndCause::Canceled);
        self.end_run(node, attempt, Last::Error(error), false);
    }

    // ---- streams ----

    fn open_arrives(&mut self, node: usize, conn: u64) {
        let Some(c) = self.conns.get(&conn) else { return };
        let (dispatch, keeps) = (c.dispatch.clone(), c.keeps);
        let plan = &self.plan.tasks[self.names[&dispatch.task]];
        let (tokens, poison, crashes) = (plan.tokens, plan.poison, plan.crashes);
        let with_ids = plan.recovery == Some(Replays::FromTheEnd);
        let hung = self.nodes[node].hung > 0;
        let boot = self.nodes[node].boot;
        let now = self.now;
        let replays = dispatch.resume == Some(ResumeMode::Replay);
        let voice = self.voices.get(&dispatch.task).copied();
        let differs = replays && voice.is_some_and(|odd| odd != self.plan.nodes[node].odd);
        let Some(core) = self.nodes[node].core.as_mut() else {
            return self.send_piece(conn, Piece::Reset("connection refused"));
        };
        if let (Some(fault), _) = self.node_faults[node] {
            return self.answer_badly(conn, fault);
        }
        let ask = Ask {
            node_id: &dispatch.pool.node_id,
            boot_id: dispatch.boot_id,
            attempt: dispatch.attempt,
            model: Some(&dispatch.spec.model_ref),
            task: Some(dispatch.task),
            hint: None,
            first_index: dispatch.first_index,
            retention: if keeps { Retention::Keep } else { Retention::Attached },
        };
        match core.accept(now, &dispatch.pool.pool_id, &ask) {
            Err(refusal) => self.send_piece(conn, Piece::Refusal(refusal)),
            Ok(accepted) => {
                let run = Run {
                    conn,
                    task: dispatch.task,
                    log: dispatch.log,
                    began: now,
                    with_ids,
                    differs,
                    replica: accepted.replica_id.clone(),
                    next: dispatch.first_index,
                    tokens,
                    poison,
                    crashes,
                    hung,
                };
                self.nodes[node].runs.insert(dispatch.attempt, run);
                self.check_slots(node, &accepted.replica_id);
                if let Some(c) = self.conns.get_mut(&conn) {
                    (c.node_open, c.cursor) = (true, Some(Cursor::first()));
                }
                let report_seq = accepted.report_seq;
                self.send_piece(conn, Piece::Headers { report_seq, replica_id: accepted.replica_id });
                let slow = if self.nodes[node].slow > 0 { 20 } else { 1 };
                // What was sent before comes once more, and is swallowed.
                let again = if replays { dispatch.first_index * self.plan.pace_ms / 4 } else { 0 };
                let first = self.random.u64(..=self.plan.first_token_ms) * slow + again;
                self.after_ms(first, What::EngineStep { node, boot, attempt: dispatch.attempt });
                self.after_ms(1_000, What::KeepAlive { conn });
            }
        }
    }

    /// The node itself does not take the attempt.
    fn answer_badly(&mut self, conn: u64, fault: NodeFault) {
        let how = match fault {
            NodeFault::Denies => HowEnded::Denied("it answers HTTP 401".into()),
            NodeFault::Rejects => {
                HowEnded::Rejected(ErrorBody::new(ErrorCode::InvalidParams, "it does not know a field"))
            }
            NodeFault::Fails => HowEnded::NodeFailed("it answers HTTP 500".into()),
            NodeFault::Refuses(code) => HowEnded::Refused(ErrorBody::new(code, "not now")),
            NodeFault::Resets => HowEnded::NoAnswer("connection reset".into()),
            NodeFault::SaysNothing => return,
        };
        self.send_piece(conn, Piece::Answer(Box::new(how)));
    }

    fn keep_alive(&mut self, conn: u64) {
        if self.conns.get(&conn).is_some_and(|c| c.node_open) {
            self.send_bytes(conn, b": ka\n\n", false);
            self.after_ms(1_000, What::KeepAlive { conn });
        }
    }

    /// The control plane has dropped the connection: the engine's request is dropped too.
    fn drop_arrives(&mut self, node: usize, conn: u64) {
        let Some(c) = self.conns.remove(&conn) else { return };
        let (attempt, now) = (c.dispatch.attempt, self.now);
        if c.keeps {
            self.closing_arrives(node, attempt, c.closing);
            if let Some(cursor) = c.cursor.filter(|_| c.closing == Closing::Lost) {
                self.detach(now, node, attempt, &cursor);
            }
            return;
        }
        if let Some(core) = self.nodes[node].core.as_mut().filter(|_| c.node_open) {
            core.stopped(&attempt);
        }
        if c.node_open
            && let Some(run) = self.nodes[node].runs.remove(&attempt)
        {
            if let Some(core) = self.nodes[node].core.as_mut() {
                core.ended_before_release(now, &attempt);
            }
            self.haunt(node, attempt, run.replica);
        }
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
