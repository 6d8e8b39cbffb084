//! The control plane's shell in the simulation: logs, relays and timers around the core.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::node::{
    Capabilities, Intent, IntentOrder, Liveness, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::placement::Labels;
use pool_registry_types::pool::{EngineKind, PoolState};
use pool_registry_types::task::{KvHint, Priority, Reasoning, ResumeMode, Workload};
use pool_registry_types::trace::TraceContext;
use pool_registry_types::view::ClusterChange;
use pool_registry_types::{
    AttemptId, BootId, ErrorBody, ErrorCode, HolderId, MachineId, ModelRef, Moment, NodeId, SessionId,
    SessionKey, TaskId,
};
use task_scheduler::{
    Answer, CloseReason, ControlCore, Counters, Dispatch, Effect, Event, HowEnded, LinkEvidence, Overdue,
    Policy, ProbeOutcome, ReplyTo, SessionPolicy,
};
use task_stream::{Action, BodyDigest, TaskLog, TaskSpec};
use uuid::Uuid;

use super::held::Closing;
use super::links::{Lanes, Linked, life_id};
use super::streams::{STOPPED_WITHIN_MS, Stop};
use super::{Call, CallAnswer, Caller, Conn, Loads, Piece, What, World};
use crate::draw::{MAX_TURNS, Mutant, Replays};
use crate::oracle::Life;
use crate::transcript::Writer;

mod clients;
mod relays;
mod review;

use review::{Before, look_at};

/// One attempt as the control plane relays it.
#[derive(Debug)]
struct Relay {
    task: TaskId,
    node_id: NodeId,
    via: Via,
    relay: task_stream::Relay,
    /// The moment at which it is to be called.
    armed: Moment,
    accepted: bool,
    /// What has arrived and was not read yet.
    unread: Vec<Vec<u8>>,
    stop: Stop,
}

/// How an attempt goes to its node.
#[derive(Debug)]
enum Via {
    /// By an exchange of its own.
    Conn(u64),
    Link(Linked),
}

impl Via {
    fn conn(&self) -> Option<u64> {
        match self {
            Self::Conn(conn) => Some(*conn),
            Self::Link(_) => None,
        }
    }
}

#[derive(Debug, Clone)]
enum To {
    Caller(Caller, Kind),
    Client(TaskId),
    Operator,
    /// A process with the name of a node that lives.
    Twin(NodeId),
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Register,
    Heartbeat,
    Deregister,
}

/// One life of the control plane.
#[derive(Debug)]
pub(crate) struct Control {
    life: u64,
    core: ControlCore,
    logs: BTreeMap<TaskId, TaskLog>,
    relays: BTreeMap<AttemptId, Relay>,
    replies: BTreeMap<ReplyTo, To>,
    next_reply: u64,
    /// The last report was taken.
    report_taken: bool,
    lanes: Lanes,
}

impl Control {
    pub(crate) fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    pub(crate) fn lanes_mut(&mut self) -> &mut Lanes {
        &mut self.lanes
    }

    /// Whether the attempt is not over.
    pub(crate) fn is_open(&self, attempt: AttemptId) -> bool {
        self.relays.contains_key(&attempt)
    }

    /// The boot of its node that an attempt by a link was sent to.
    pub(crate) fn boot_of(&self, attempt: &AttemptId) -> Option<BootId> {
        match &self.relays.get(attempt)?.via {
            Via::Link(linked) => Some(linked.dispatch.boot_id),
            Via::Conn(_) => None,
        }
    }

    /// The attempt, if it goes by a link and is not over.
    pub(crate) fn linked_mut(&mut self, attempt: AttemptId) -> Option<&mut Linked> {
        match &mut self.relays.get_mut(&attempt)?.via {
            Via::Link(linked) => Some(linked),
            Via::Conn(_) => None,
        }
    }

    pub(crate) fn log(&self, task: TaskId) -> Option<&TaskLog> {
        self.logs.get(&task)
    }
}

impl World {
    pub(crate) fn start_control(&mut self) {
        self.loads = Loads { disturbed: Some(self.now), ..Loads::default() };
        self.lives += 1;
        let plan = &self.plan;
        let policy = Policy {
            timing: plan.timing,
            max_nodes: 1_000,
            strategy: plan.strategy,
            admission_capacity: plan.capacity,
            full_lane: plan.full_lane,
            sessions: SessionPolicy {
                ttl: Duration::from_secs(86_400),
                max_turns: MAX_TURNS,
                token_budget: None,
                time_budget: None,
            },
            queue_timeout: plan.queue_timeout,
            first_token_timeout: plan.first_token_timeout,
            token_idle_timeout: plan.token_idle_timeout,
            task_retention: Duration::from_secs(3_600),
            retained_tasks: 10_000,
            switched_off: Mutant::core(plan.switched_off),
        };
        let incarnation = self.random.u64(..);
        self.control = Some(Control {
            life: self.lives,
            core: ControlCore::new(policy, incarnation),
            logs: BTreeMap::new(),
            relays: BTreeMap::new(),
            replies: BTreeMap::new(),
            next_reply: 0,
            report_taken: false,
            lanes: Lanes::default(),
        });
        let life = self.lives;
        self.note(|_| format!("the control plane starts, life {life}"));
        self.apply(Event::Timer);
    }

    /// The process is gone: every connection of it breaks.
    pub(crate) fn stop_control(&mut self) {
        self.absorb_counters();
        self.control = None;
        self.note(|_| "the control plane dies".into());
        let conns: Vec<u64> = self.conns.keys().copied().collect();
        for conn in conns {
            self.drop_conn(conn, Closing::Lost);
        }
    }

    fn absorb_counters(&mut self) {
        let Some(control) = &self.control else { return };
        let c: Counters = control.core.counters();
        for (name, n) in [
            ("core: node suspect", c.suspects),
            ("core: node offline", c.offlines),
            ("core: node returned", c.returns),
            ("core: mass silence", c.mass_silences),
            ("core: stall noticed", c.stalls),
            ("core: attempt vanished", c.vanished),
            ("core: unknown heartbeat", c.unknown_heartbeats),
            ("core: old report ignored", c.old_reports),
            ("core: dispatch refused", c.refused_dispatches),
            ("core: task placed again", c.replaced),
            ("core: worker reset", c.worker_resets),
            ("core: task rejected", c.rejected),
            ("task: killed two engines", c.poisoned),
            ("core: replay differed", c.replays_differed),
            ("core: breaker tripped", c.trips),
            ("core: dropped for a newer", c.dropped),
            ("core: moved from a silent node", c.moved),
        ] {
            self.coverage.add(name, n);
        }
    }

    /// To be called once, at the end.
    pub fn close_books(&mut self) {
        self.absorb_counters();
    }

    // ---- the loop ----

    /// One turn of the control loop, as the production shell makes it.
    fn apply(&mut self, event: Event) {
        let Some(control) = self.control.as_mut() else { return };
        let now = self.now;
        let before = Before::of(&event, control);
        let registers = match &event {
            Event::Register { request, .. } => Some(request.clone()),
            _ => None,
        };
        let mut in_order = Ok(());
        if self.plan.read && self.readers.u8(..4) == 0 {
            look_at(&mut control.core, now, &mut self.readers);
            self.coverage.hit("core: read between events");
            let mut kept = control.core.check_order(now).map_err(|why| why.to_string());
            if control.core.snapshot(now).view() != control.core.view(now) {
                kept = kept.and(Err("a snapshot of the nodes is not what they are".into()));
            }
            in_order = kept.map_err(|why| format!("[order] {why}"));
        }
        let effects = control.core.apply(now, event);
        for effect in &effects {
            let mut hasher = DefaultHasher::new();
            (self.digest, format!("{effect:?}")).hash(&mut hasher);
            self.digest = hasher.finish();
        }
        if let Some((node_id, seq)) = &before.heartbeat {
            // Taken or not is seen from the number of the last report.
            let taken =
                before.report_seq != Some(*seq) && control.core.registry().report_seq(node_id) == Some(*seq);
            control.report_taken = taken;
            if let Some(life) = self.oracle.life.get_mut(node_id)
                && taken
            {
                *life = Life { heartbeat: now, any: now, seq: *seq };
                self.oracle.reported(now, &before.models);
                self.oracle.reports_away(node_id, before.away);
            }
        }
        self.check(in_order);
        self.review(&before, &effects);
        self.note_liveness();
        let is_refused = effects.iter().any(|effect| matches!(effect, Effect::Reply { answer: Err(_), .. }));
        if let Some(request) = registers.filter(|_| !is_refused) {
            // Before anything is sent there.
            self.link_registered(&request);
        }
        let life = self.lives;
        for effect in effects {
            self.carry_out(life, effect);
        }
        if let Some(armed) = self.control.as_ref().and_then(|control| control.core.next_deadline()) {
            self.at(armed, What::ControlTimer { life, armed });
        }
        let Some(control) = self.control.as_ref() else { return };
        if control.core.registry().reservation_count() != control.core.running() {
            let (reserved, running) = (control.core.registry().reservation_count(), control.core.running());
            self.check(Err(format!("[4] {reserved} reservations for {running} attempts")));
        }
        let Some(control) = self.control.as_ref() else { return };
        let clocks = self.oracle.clocks(now, &control.core, &self.plan);
        self.check(clocks);
    }

    fn note_liveness(&mut self) {
        let Some(control) = self.control.as_ref().filter(|_| self.trace.is_some()) else { return };
        let seen: BTreeMap<NodeId, Liveness> =
            control.core.view(self.now).nodes.into_iter().map(|n| (n.node_id, n.liveness)).collect();
        let changed: Vec<(NodeId, Liveness)> = seen
            .iter()
            .filter(|(id, liveness)| self.liveness_seen.get(*id) != Some(liveness))
            .map(|(id, liveness)| (id.clone(), *liveness))
            .collect();
        self.liveness_seen = seen;
        for (id, liveness) in changed {
            self.note(|_| format!("{id} is {liveness:?}"));
        }
    }

    fn carry_out(&mut self, life: u64, effect: Effect) {
        match effect {
            Effect::Reply { to, answer } => self.reply(to, answer),
            Effect::OpenLog { task, log } => {
                let plan = &self.plan.tasks[self.names[&task]];
                let admitted = self.oracle.admitted(self.now, task, plan, self.plan.queue_timeout);
                self.check(admitted);
                if let Some(control) = self.control.as_mut() {
                    control.logs.insert(task, TaskLog::bounded(log, self.plan.log_bytes));
                }
                self.opened(task, log);
            }
            Effect::Dispatch(dispatch) => self.dispatch(life, *dispatch),
            Effect::CloseAttempt { task, attempt, why } => {
                self.note(|w| format!("t{} closing: {why:?}", w.names[&task]));
                let delay = if self.random.u8(..4) == 0 { self.random.u64(..120) } else { 0 };
                self.after_ms(delay, What::Fence { life, task, attempt });
            }
            Effect::CloseTask { task, error } => self.close_task(task, &error),
            Effect::Forget { .. } | Effect::Note(_) => {}
            Effect::Changed { change, .. } => {
                if let ClusterChange::Node { node_id, liveness: None, .. } = &change {
                    self.link_gone(node_id);
                }
                self.follow(&change);
            }
            Effect::Load { pool, .. } => {
                let node: usize = pool.node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
                self.loads.asked.insert(node, self.now);
                if self.links[node].blocked() || self.random.u8(..6) == 0 {
                    self.coverage.hit("message: load order lost");
                } else {
                    let delay = self.delay();
                    self.after_ms(delay, What::LoadArrives { node });
                }
            }
            Effect::DeliverIntent { to, node_id, order, .. } => {
                self.oracle.wants(&node_id, order.intent);
                let node: usize = node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
                if self.links[node].blocked() {
                    let outcome = Err("no answer in time".to_owned());
                    self.answer_intent(life, node, to, order, 2_000, outcome);
                } else {
                    let delay = self.delay();
                    self.after_ms(delay, What::IntentArrives { life, node, to, order });
                }
            }
            Effect::Probe { node_id, address, .. } if self.shortage > 0 => {
                let outcome = ProbeOutcome::Inconclusive;
                self.after_ms(5, What::ProbeAnswered { life, node_id, address, outcome });
            }
            Effect::Probe { node_id, address, authorized } => {
                let node: usize = node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
                if self.links[node].blocked() {
                    let outcome = ProbeOutcome::Failed("no answer in time".into());
                    self.after_ms(2_000, What::ProbeAnswered { life, node_id, address, outcome });
                } else {
                    let delay = self.delay();
                    self.after_ms(delay, What::ProbeArrives { life, node, address, authorized });
                }
            }
        }
    }

    /// What the control plane shows of pools that could be loaded.
    fn follow(&mut self, change: &ClusterChange) {
        let number = |node_id: &NodeId| node_id.as_str()[1..].parse::<usize>().ok();
        let node = match change {
            ClusterChange::Pool { node_id, state, .. } => {
                let Some(node) = number(node_id) else { return };
                self.loads.shown.entry(node).or_default().1 = *state == Some(PoolState::Loadable);
                node
            }
            ClusterChange::Node { node_id, liveness, intent } => {
                let Some(node) = number(node_id) else { return };
                let serves = (*liveness, *intent) == (Some(Liveness::Online), Some(Intent::Serving));
                self.loads.shown.entry(node).or_default().0 = serves;
                node
            }
            ClusterChange::Task { .. } => return,
        };
        if self.loads.shown.get(&node) == Some(&(true, true)) {
            self.loads.loadable.entry(node).or_insert(self.now);
        } else {
            self.loads.loadable.remove(&node);
        }
    }

    pub(crate) fn control_timer(&mut self, life: u64, armed: Moment) {
        let due =
            self.control.as_ref().is_some_and(|c| c.life == life && c.core.next_deadline() == Some(armed));
        if due {
            self.apply(Event::Timer);
        }
    }

    // ---- calls ----

    fn reply_to(&mut self, to: To) -> ReplyTo {
        let control = self.control.as_mut().expect("only asked while the control plane lives");
        control.next_reply += 1;
        let reply = ReplyTo(control.next_reply);
        control.replies.insert(reply, to);
        reply
    }

    pub(crate) fn call_arrives(&mut self, caller: Caller, call: Call) {
        if self.control.is_none() {
            return;
        }
        let node_id = self.node_id(caller.node);
        let now = self.now;
        match call {
            Call::Register(request) => {
                let life = Life { heartbeat: now, any: now, seq: 0 };
                self.oracle.engine_is_new(&node_id);
                let known = self.control.as_ref().and_then(|c| c.core.registry().address(&node_id));
                if known.is_none_or(|(_, boot_id)| boot_id != request.boot_id) {
                    self.oracle.boot_is_new(now, &node_id);
                }
                self.oracle.life.insert(node_id, life);
                let reply = self.reply_to(To::Caller(caller, Kind::Register));
                self.apply(Event::Register { reply, request, registrar: None });
            }
            Call::Heartbeat(beat) => {
                let reply = self.reply_to(To::Caller(caller, Kind::Heartbeat));
                if self.oracle.life.get(&node_id).is_some_and(|life| life.seq > beat.seq && beat.seq > 1) {
                    self.coverage.hit("message: overtaken");
                }
                self.apply(Event::Heartbeat { reply, node_id, beat });
            }
            Call::Deregister(epoch) => {
                let reply = self.reply_to(To::Caller(caller, Kind::Deregister));
                self.apply(Event::Deregister { reply, node_id: node_id.clone(), epoch: Some(epoch) });
                if self.control.as_ref().is_some_and(|c| c.core.registry().liveness(&node_id).is_none()) {
                    self.oracle.life.remove(&node_id);
                }
            }
        }
    }

    fn reply(&mut self, reply: ReplyTo, answer: Result<Answer, ErrorBody>) {
        let Some(to) = self.control.as_mut().and_then(|c| c.replies.remove(&reply)) else {
            return self.check(Err("answered twice, or nobody".into()));
        };
        let life = life_id(self.lives);
        match (to, answer) {
            (To::Caller(caller, Kind::Register), answer) => {
                let answer = answer.map(|answer| match answer {
                    Answer::Registered(answer) => RegisterAnswer { life: Some(life), ..answer },
                    other => unreachable!("not an answer to a registration: {other:?}"),
                });
                self.send_answer(caller, CallAnswer::Registered(answer));
            }
            (To::Caller(caller, Kind::Heartbeat), answer) => {
                let answer = answer.map(|answer| match answer {
                    Answer::Heartbeat(answer) => answer,
                    other => unreachable!("not an answer to a heartbeat: {other:?}"),
                });
                let taken = self.control.as_ref().is_some_and(|control| control.report_taken);
                self.send_answer(caller, CallAnswer::Heartbeat { answer, taken });
            }
            (To::Caller(caller, Kind::Deregister), _) => self.send_answer(caller, CallAnswer::Deregistered),
            (To::Operator, answer) => self.note(|_| format!("the operator is answered: {answer:?}")),
            (To::Twin(_), Err(error)) if error.code == ErrorCode::NodeIdConflict => {
                self.coverage.hit("fault: twin registered");
                self.note(|_| "the twin is refused".into());
            }
            (To::Twin(node_id), answer) => {
                self.check(Err(format!("[8] a twin of the live {node_id} was answered {answer:?}")));
            }
            (To::Client(task), Ok(answer)) => {
                if answer == Answer::Canceled {
                    self.coverage.hit("core: cancel answered at the end");
                    let ended = self.oracle.cancel_answered(task);
                    self.check(ended);
                }
                self.note(|w| format!("t{} answered: {}", w.names[&task], brief(&answer)));
            }
            (To::Client(task), Err(error)) => {
                if let Some(control) = self.control.as_ref() {
                    let plan = &self.plan.tasks[self.names[&task]];
                    let refused = self.oracle.refused(self.now, &error, plan, &control.core, &self.plan);
                    self.check(refused);
                }
                match error.code {
                    ErrorCode::ModelNotAvailable => self.coverage.hit("core: model not available"),
                    ErrorCode::BudgetExceeded => self.coverage.hit("core: budget exceeded"),
                    ErrorCode::NodeUnavailable => self.coverage.hit("core: node unavailable"),
                    _ => {}
                }
                self.note(|w| format!("t{} refused: {}", w.names[&task], error.code));
            }
        }
    }
}

fn brief(answer: &Answer) -> String {
    match answer {
        Answer::Submitted(accepted) => match accepted.queue_position {
            Some(before) => format!("accepted, {before} before it"),
            None => "accepted, and nothing could take it".into(),
        },
        Answer::Canceled => "canceled".into(),
        other => format!("{other:?}"),
    }
}

fn brief_end(how: &HowEnded) -> String {
    match how {
        HowEnded::Finished => "finished".into(),
        HowEnded::Refused(body) => format!("refused, {}", body.code),
        HowEnded::NeverSent(reason) => format!("never sent, {reason}"),
        HowEnded::NoAnswer(reason) => format!("no answer, {reason}"),
        HowEnded::Broken(reason) => format!("broken, {reason}"),
        HowEnded::Denied(reason) => format!("denied, {reason}"),
        HowEnded::Rejected(body) => format!("rejected, {}", body.code),
        HowEnded::NodeFailed(reason) => format!("node failed, {reason}"),
        HowEnded::OwnShortage { reason, .. } => format!("own shortage, {reason}"),
        HowEnded::OwnDefect(reason) => format!("own defect, {reason}"),
        HowEnded::NodeError(body) => format!("node error, {}", body.message),
        HowEnded::TimedOut(overdue) => format!("timed out, {overdue:?}"),
        HowEnded::TooLong => "too long".into(),
        HowEnded::Differs(reason) => format!("differs, {reason}"),
        HowEnded::Closed => "closed".into(),
    }
}
