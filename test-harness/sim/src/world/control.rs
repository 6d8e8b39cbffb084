//! The control plane's shell in the simulation: logs, relays and timers around the core.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pool_registry_types::node::{Capabilities, Intent, IntentOrder, LiveAnswer, Liveness, RegisterRequest};
use pool_registry_types::placement::Labels;
use pool_registry_types::task::{Determinism, Priority, Recovery, ResumeMode, TaskRequest};
use pool_registry_types::{
    AttemptId, BootId, ErrorBody, ErrorCode, MachineId, ModelRef, Moment, NodeId, SessionId, TaskId,
};
use task_scheduler::{
    Answer, CloseReason, ControlCore, Counters, Dispatch, Effect, Event, HowEnded, Policy, ReplyTo,
    SessionPolicy, StreamWatch, TaskLog,
};
use uuid::Uuid;

use super::{Call, CallAnswer, Caller, Conn, Piece, What, World};
use crate::draw::{MAX_TURNS, Replays};
use crate::witness::Life;

/// One attempt as the control plane relays it.
#[derive(Debug)]
struct Relay {
    task: TaskId,
    node_id: NodeId,
    conn: u64,
    watch: StreamWatch,
    accepted: bool,
    /// The final frame that came; the closing word is awaited.
    last: Option<HowEnded>,
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
}

impl World {
    pub(crate) fn start_control(&mut self) {
        self.lives += 1;
        let plan = &self.plan;
        let policy = Policy {
            timing: plan.timing,
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
            switched_off: plan.switched_off,
        };
        let incarnation = self.random.u64(..);
        self.control = Some(Control {
            life: self.lives,
            core: ControlCore::new(policy, incarnation),
            logs: BTreeMap::new(),
            relays: BTreeMap::new(),
            replies: BTreeMap::new(),
            next_reply: 0,
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
            self.drop_conn(conn);
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
        let effects = control.core.apply(now, event);
        if let Some((node_id, seq)) = &before.heartbeat {
            // Taken or not is seen from the number of the last report.
            let taken =
                before.report_seq != Some(*seq) && control.core.registry().report_seq(node_id) == Some(*seq);
            if let Some(life) = self.witness.life.get_mut(node_id)
                && taken
            {
                *life = Life { heartbeat: now, any: now, seq: *seq };
            }
        }
        self.judge(&before, &effects);
        self.note_liveness();
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
        let clocks = self.witness.clocks(now, &control.core, &self.plan);
        self.check(clocks);
    }

    fn note_liveness(&mut self) {
        let Some(control) = self.control.as_ref().filter(|_| self.trace.is_some()) else { return };
        let seen: BTreeMap<NodeId, Liveness> =
            control.core.view(self.now).nodes.into_iter().map(|n| (n.node_id, n.liveness)).collect();
        let changed: Vec<(NodeId, Liveness)> = seen
            .iter()
            .filter(|(id, liveness)| self.liveness_noted.get(*id) != Some(liveness))
            .map(|(id, liveness)| (id.clone(), *liveness))
            .collect();
        self.liveness_noted = seen;
        for (id, liveness) in changed {
            self.note(|_| format!("{id} is {liveness:?}"));
        }
    }

    /// What one event may and must do, seen from outside.
    fn judge(&mut self, before: &Before, effects: &[Effect]) {
        let Some(control) = self.control.as_ref() else { return };
        let liveness = |id: &NodeId| control.core.registry().liveness(id);
        let mut broken = None;
        let mut crossed = false;
        if let Some(node_id) = &before.dial_failed {
            self.witness.last_dial_failure = Some(self.now);
            if liveness(node_id) == Some(Liveness::Online) {
                broken = Some(format!("[7] {node_id} is online after a failed connection"));
            }
        }
        for effect in effects {
            let Effect::CloseAttempt { attempt, why, .. } = effect else { continue };
            let Some(relay) = control.relays.get(attempt) else { continue };
            let conn = self.conns.get(&relay.conn);
            let node = conn.map(|c| &self.nodes[c.node]);
            let runs = node.is_some_and(|n| n.core.as_ref().is_some_and(|core| core.is_running(attempt)));
            let ended_well = conn.is_some_and(|c| c.ended_well && self.links[c.node].is_calm(self.now));
            match why {
                CloseReason::Vanished if runs => {
                    broken = Some(format!("[8] a report ended attempt {attempt}, which runs"));
                }
                CloseReason::Vanished | CloseReason::NodeLeft if ended_well => {
                    broken = Some(format!("[8] a report took the end of attempt {attempt} away"));
                }
                CloseReason::Neighbour => {
                    broken = Some(format!("a broken stream ended its neighbour {attempt}"));
                }
                _ => {}
            }
        }
        for effect in effects {
            match effect {
                Effect::Reply { answer: Ok(Answer::Heartbeat(answer)), .. } => {
                    if let Some(open) =
                        answer.cancel_attempts.iter().find(|id| control.relays.contains_key(id))
                    {
                        broken = Some(format!("attempt {open} is called an orphan and is open"));
                    }
                    crossed |= before.heartbeat.as_ref().is_some_and(|(node_id, _)| {
                        control.relays.values().any(|relay| relay.node_id == *node_id && !relay.accepted)
                    });
                }
                Effect::Reply { answer: Ok(Answer::Registered(answer)), .. }
                    if !self.witness.epochs.insert(answer.epoch.to_string()) =>
                {
                    broken = Some(format!("epoch {} was given twice", answer.epoch));
                }
                _ => {}
            }
        }
        if let Some((node_id, liveness_before)) = &before.others_of {
            for (other, was) in liveness_before {
                // Only time may change another node while this one speaks.
                if other != node_id && liveness(other) == Some(Liveness::Online) && *was != Liveness::Online {
                    broken = Some(format!("[8] {node_id} speaks, and {other} comes online"));
                }
            }
        }
        if crossed {
            self.coverage.hit("race: report crossed a dispatch");
        }
        if let Some(broken) = broken {
            self.check(Err(broken));
        }
    }

    fn carry_out(&mut self, life: u64, effect: Effect) {
        match effect {
            Effect::Reply { to, answer } => self.reply(to, answer),
            Effect::OpenLog { task, log } => {
                let plan = &self.plan.tasks[self.names[&task]];
                let admitted = self.witness.admitted(self.now, task, plan);
                self.check(admitted);
                if let Some(control) = self.control.as_mut() {
                    control.logs.insert(task, TaskLog::new(log));
                }
            }
            Effect::Dispatch(dispatch) => self.dispatch(life, *dispatch),
            Effect::CloseAttempt { task, attempt, why } => {
                self.note(|w| format!("t{} closing: {why:?}", w.names[&task]));
                let delay = if self.random.u8(..4) == 0 { self.random.u64(..120) } else { 0 };
                self.after_ms(delay, What::Fence { life, task, attempt });
            }
            Effect::CloseTask { task, error } => self.close_task(task, &error),
            Effect::Forget { .. } | Effect::Changed(_) => {}
            Effect::TellIntent { to, node_id, order, .. } => {
                self.witness.wants(&node_id, order.intent);
                let node: usize = node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
                if self.links[node].blocked() {
                    let outcome = Err("no answer in time".to_owned());
                    self.answer_intent(life, node, to, order, 2_000, outcome);
                } else {
                    let delay = self.delay();
                    self.after_ms(delay, What::IntentArrives { life, node, to, order });
                }
            }
            Effect::Probe { node_id, address } => {
                let node: usize = node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
                if self.links[node].blocked() {
                    let answer = Err("no answer in time".to_owned());
                    self.after_ms(2_000, What::ProbeAnswered { life, node_id, address, answer });
                } else {
                    let delay = self.delay();
                    self.after_ms(delay, What::ProbeArrives { life, node, address });
                }
            }
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
                self.witness.engine_is_new(&node_id);
                self.witness.life.insert(node_id, life);
                let reply = self.reply_to(To::Caller(caller, Kind::Register));
                self.apply(Event::Register { reply, request });
            }
            Call::Heartbeat(beat) => {
                let reply = self.reply_to(To::Caller(caller, Kind::Heartbeat));
                if self.witness.life.get(&node_id).is_some_and(|life| life.seq > beat.seq && beat.seq > 1) {
                    self.coverage.hit("message: overtaken");
                }
                self.apply(Event::Heartbeat { reply, node_id, beat });
            }
            Call::Deregister(epoch) => {
                let reply = self.reply_to(To::Caller(caller, Kind::Deregister));
                self.apply(Event::Deregister { reply, node_id: node_id.clone(), epoch: Some(epoch) });
                if self.control.as_ref().is_some_and(|c| c.core.registry().liveness(&node_id).is_none()) {
                    self.witness.life.remove(&node_id);
                    self.witness.draining.remove(&node_id);
                }
            }
        }
    }

    fn reply(&mut self, reply: ReplyTo, answer: Result<Answer, ErrorBody>) {
        let Some(to) = self.control.as_mut().and_then(|c| c.replies.remove(&reply)) else {
            return self.check(Err("answered twice, or nobody".into()));
        };
        match (to, answer) {
            (To::Caller(caller, Kind::Register), answer) => {
                let answer = answer.map(|answer| match answer {
                    Answer::Registered(answer) => answer,
                    other => unreachable!("not an answer to a registration: {other:?}"),
                });
                self.send_answer(caller, CallAnswer::Registered(answer));
            }
            (To::Caller(caller, Kind::Heartbeat), answer) => {
                let answer = answer.map(|answer| match answer {
                    Answer::Heartbeat(answer) => answer,
                    other => unreachable!("not an answer to a heartbeat: {other:?}"),
                });
                self.send_answer(caller, CallAnswer::Heartbeat(answer));
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
                self.note(|w| format!("t{} answered: {}", w.names[&task], brief(&answer)));
            }
            (To::Client(task), Err(error)) => {
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

    // ---- clients ----

    pub(crate) fn submit(&mut self, task: usize, again: bool) {
        if self.control.is_none() {
            return;
        }
        let plan = self.plan.tasks[task].clone();
        let id = Self::task_id(task);
        self.names.insert(id, task);
        let known = self.witness.tasks.contains_key(&id);
        if again && known {
            self.coverage.hit("task: submitted twice");
        }
        let model = ModelRef::new(&format!("m{}", plan.model)).expect("a valid model");
        let request = TaskRequest {
            priority: if plan.batch { Priority::Batch } else { Priority::Interactive },
            deadline_ms: plan.deadline_ms,
            session_id: plan.session.map(|session| SessionId(Uuid::from_u128(session))),
            recovery: if plan.recovery.is_some() { Recovery::Continue } else { Recovery::Fail },
            determinism: match plan.recovery {
                Some(Replays::FromTheStart) => Determinism::Strict,
                _ => Determinism::BestEffort,
            },
            seed: plan.recovery.map(|_| 1),
            placement: plan.wishes.clone(),
            ..TaskRequest::completion(model, "x")
        };
        let reply = self.reply_to(To::Client(id));
        self.apply(Event::Submit { reply, task_id: id, request: Arc::new(request) });
    }

    // ---- operators ----

    pub(crate) fn want(&mut self, node: usize, intent: Intent) {
        if self.control.is_none() {
            return;
        }
        self.coverage.hit(match intent {
            Intent::Draining => "fault: node drained",
            Intent::Serving => "fault: node resumed",
        });
        let node_id = self.node_id(node);
        let reply = self.reply_to(To::Operator);
        self.apply(Event::Want { reply, node_id, intent });
    }

    pub(crate) fn intent_answered(
        &mut self,
        life: u64,
        node_id: NodeId,
        reply: ReplyTo,
        order: IntentOrder,
        outcome: Result<(), String>,
    ) {
        if self.control.as_ref().is_some_and(|control| control.life == life) {
            self.apply(Event::IntentTold { reply, node_id, order, outcome });
        }
    }

    /// A process with the name of a node that lives comes from elsewhere: it is refused, and the
    /// node does not notice.
    pub(crate) fn twin(&mut self, node: usize) {
        let node_id = self.node_id(node);
        let liveness = self.control.as_ref().and_then(|c| c.core.registry().liveness(&node_id));
        if liveness.is_none_or(|liveness| liveness == Liveness::Offline) {
            return;
        }
        let request = RegisterRequest {
            node_id: node_id.clone(),
            machine_id: MachineId::new("machine").expect("a valid machine id"),
            boot_id: BootId(Uuid::from_u128(u128::MAX)),
            address: "http://twin".into(),
            version: "sim".into(),
            intent: Intent::Serving,
            labels: Labels::new(),
            pools: Vec::new(),
            capabilities: Capabilities::default(),
        };
        // What is due by now is let pass before.
        self.apply(Event::Timer);
        let still = self.control.as_ref().and_then(|c| c.core.registry().liveness(&node_id));
        if still.is_none_or(|liveness| liveness == Liveness::Offline) {
            return;
        }
        let reply = self.reply_to(To::Twin(node_id));
        self.apply(Event::Register { reply, request });
    }

    pub(crate) fn cancel(&mut self, task: usize) {
        let id = Self::task_id(task);
        if self.control.is_none() || !self.names.contains_key(&id) {
            return;
        }
        match self.witness.tasks.get(&id) {
            None => {}
            Some(seen) if seen.terminal.is_some() => self.coverage.hit("task: cancel after the end"),
            Some(seen) if seen.open.is_some() => self.coverage.hit("task: canceled while running"),
            Some(_) => self.coverage.hit("task: canceled while queued"),
        }
        let reply = self.reply_to(To::Client(id));
        self.apply(Event::Cancel { reply, task_id: id });
    }

    fn close_task(&mut self, task: TaskId, error: &ErrorBody) {
        self.note(|w| format!("t{} ends: {}", w.names[&task], error.code));
        match error.code {
            ErrorCode::DeadlineExceeded => self.coverage.hit("core: deadline exceeded"),
            ErrorCode::DecodeTimeout => self.coverage.hit("core: decode timeout"),
            ErrorCode::PoolUnavailable => self.coverage.hit("core: tries exhausted"),
            ErrorCode::ModelNotAvailable => self.coverage.hit("core: model not available"),
            ErrorCode::NodeUnavailable => self.coverage.hit("core: node unavailable"),
            _ => {}
        }
        let closed = self.witness.closed(task, error.code);
        self.check(closed);
        let log = self.control.as_mut().and_then(|c| c.logs.get_mut(&task));
        let Some(log) = log else { return self.check(Err(format!("{task} has no log"))) };
        if log.is_finished() {
            return self.check(Err(format!("[2] {task} is closed a second time")));
        }
        log.close(format!("error {}\n", error.code).as_bytes());
        self.read(task);
    }

    fn read(&mut self, task: TaskId) {
        if let Some(log) = self.control.as_ref().and_then(|c| c.logs.get(&task)) {
            let read = self.witness.read(task, log);
            self.check(read);
        }
    }

    // ---- relays ----

    fn dispatch(&mut self, life: u64, dispatch: Dispatch) {
        self.note(|w| {
            format!("t{} to {}, attempt {}", w.names[&dispatch.task], dispatch.pool, dispatch.attempt_number)
        });
        self.coverage.dispatches += 1;
        let now = self.now;
        match dispatch.resume {
            Some(ResumeMode::Append) => self.coverage.hit("task: continued from what was sent"),
            Some(ResumeMode::Replay) => self.coverage.hit("task: replayed"),
            None => {}
        }
        if dispatch.request.placement.as_ref().is_some_and(|wishes| wishes.pinned_node().is_some()) {
            self.coverage.hit("task: pinned");
        }
        if dispatch.warm_replica.is_some() {
            self.coverage.hit("task: of a warm session");
        }
        let Some(control) = self.control.as_mut() else { return };
        let dispatched = self.witness.dispatched(now, &dispatch, &control.core.view(now));
        if dispatched.is_err() {
            return self.check(dispatched);
        }
        let (task, attempt) = (dispatch.task, dispatch.attempt);
        let Some(log) = control.logs.get_mut(&task) else { return };
        log.open(attempt);
        self.next_conn += 1;
        let conn = self.next_conn;
        let watch = StreamWatch::new(now, dispatch.deadlines, dispatch.task_deadline);
        let first_check = watch.next_deadline();
        let node_id = dispatch.pool.node_id.clone();
        let node: usize = node_id.as_str()[1..].parse().expect("simulated ids are n<number>");
        control.relays.insert(attempt, Relay { task, node_id, conn, watch, accepted: false, last: None });
        self.at(first_check, What::RelayTimer { life, attempt });
        self.conns.insert(
            conn,
            Conn {
                node,
                dispatch,
                life,
                cp_open: true,
                node_open: false,
                not_before: now,
                held: Vec::new(),
                drop_held: false,
                ended_well: false,
            },
        );
        if self.links[node].blocked() {
            self.after_ms(2_000, What::StreamArrives { conn, piece: Piece::Reset("connecting timed out") });
        } else {
            let delay = self.delay();
            self.after_ms(delay, What::OpenArrives { conn });
        }
    }

    pub(crate) fn stream_arrives(&mut self, conn: u64, piece: Piece) {
        let Some(c) = self.conns.get(&conn) else { return };
        let (attempt, task, life) = (c.dispatch.attempt, c.dispatch.task, c.life);
        let (open, node_id) = (c.cp_open, c.dispatch.pool.node_id.clone());
        let now = self.now;
        if !open && matches!(piece, Piece::Token(0)) {
            self.coverage.hit("race: first token crossed a close");
        }
        let Some(control) = self.control.as_mut().filter(|control| open && control.life == life) else {
            return;
        };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let Some(_) = control.logs.get_mut(&task) else { return };
        if relay.watch.bytes(now) {
            self.apply(Event::Heard { attempt });
        }
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.get_mut(&attempt) else { return };
        let Some(log) = control.logs.get_mut(&task) else { return };
        match piece {
            Piece::Headers { report_seq, replica_id } => {
                relay.watch.accepted(now);
                relay.accepted = true;
                self.apply(Event::Accepted { attempt, replica_id, report_seq });
            }
            Piece::Refusal(body) => self.end_relay(attempt, HowEnded::Refused(body), None),
            Piece::Token(i) => {
                let first = relay.watch.token(now);
                match log.append(attempt, i, format!("token {i}\n").as_bytes()) {
                    Ok(()) => {
                        self.witness.life.entry(node_id.clone()).and_modify(|l| l.any = now);
                        self.witness.got_through(task);
                        self.read(task);
                        let event = if first { Event::Started { attempt } } else { Event::Alive { node_id } };
                        self.apply(event);
                    }
                    Err(refused) => self.check(Err(format!("[3] {task}: {refused}"))),
                }
            }
            Piece::End(i) => {
                if log.finish(attempt, i, b"end\n").is_ok() {
                    relay.last = Some(HowEnded::Finished);
                    self.note(|w| format!("t{} ends: {i} tokens", w.names[&task]));
                    self.read(task);
                }
            }
            Piece::Error(body) => relay.last = Some(HowEnded::NodeError(body)),
            Piece::Closing(seq) => {
                let how = relay.last.take().unwrap_or_else(|| HowEnded::Broken("no final frame".into()));
                self.end_relay(attempt, how, Some(seq));
            }
            Piece::KeepAlive => {}
            Piece::Reset(reason) => {
                let how = match relay.last.take() {
                    Some(last) => last,
                    None if relay.accepted => HowEnded::Broken(reason.into()),
                    None => HowEnded::NeverSent(reason.into()),
                };
                self.end_relay(attempt, how, None);
            }
        }
    }

    pub(crate) fn relay_timer(&mut self, life: u64, attempt: AttemptId) {
        let now = self.now;
        let Some(control) = self.control.as_ref().filter(|control| control.life == life) else { return };
        let Some(relay) = control.relays.get(&attempt) else { return };
        match relay.watch.overdue(now) {
            Some(overdue) => {
                let how = relay.last.clone().unwrap_or(HowEnded::TimedOut(overdue));
                self.end_relay(attempt, how, None);
            }
            None => {
                let control = self.control.as_mut().filter(|control| control.life == life);
                let Some(relay) = control.and_then(|control| control.relays.get_mut(&attempt)) else {
                    return;
                };
                let quiet = relay.watch.grows_quiet(now);
                let next = relay.watch.next_deadline();
                self.at(next, What::RelayTimer { life, attempt });
                if quiet {
                    self.apply(Event::Quiet { attempt });
                }
            }
        }
    }

    pub(crate) fn fence(&mut self, life: u64, task: TaskId, attempt: AttemptId) {
        let Some(control) = self.control.as_ref().filter(|control| control.life == life) else { return };
        if let Some(relay) = control.relays.get(&attempt) {
            if relay.last.is_some() || control.logs.get(&task).is_some_and(TaskLog::is_finished) {
                self.coverage.hit("race: end crossed a close");
            }
            self.end_relay(attempt, HowEnded::Closed, None);
        }
    }

    /// Fences the log, tells the core, drops the connection.
    fn end_relay(&mut self, attempt: AttemptId, how: HowEnded, closed_after: Option<u64>) {
        let Some(control) = self.control.as_mut() else { return };
        let Some(relay) = control.relays.remove(&attempt) else { return };
        let Some(log) = control.logs.get_mut(&relay.task) else { return };
        let fence = log.fence(attempt);
        let how = if fence.finished { HowEnded::Finished } else { how };
        self.note(|w| format!("t{} attempt over: {}", w.names[&relay.task], brief_end(&how)));
        self.witness.ended(self.now, relay.task, attempt, &how, fence.tokens_written);
        self.drop_conn(relay.conn);
        self.apply(Event::Ended { attempt, tokens_written: fence.tokens_written, how, closed_after });
        let poison = self.witness.poison();
        self.check(poison);
    }

    fn drop_conn(&mut self, conn: u64) {
        let delay = self.delay();
        let Some(c) = self.conns.get_mut(&conn) else { return };
        c.cp_open = false;
        if self.links[c.node].blocked() {
            c.drop_held = true;
        } else {
            self.after_ms(delay, What::DropArrives { conn });
        }
    }

    pub(crate) fn probe_answered(
        &mut self,
        life: u64,
        node_id: NodeId,
        address: String,
        answer: Result<LiveAnswer, String>,
    ) {
        if self.control.as_ref().is_some_and(|control| control.life == life) {
            self.apply(Event::Probed { node_id, address, answer });
        }
    }
}

/// What is needed of the time before an event to judge what it did.
struct Before {
    /// The node and the number of its report.
    heartbeat: Option<(NodeId, u64)>,
    /// The number of the last report taken before.
    report_seq: Option<u64>,
    dial_failed: Option<NodeId>,
    others_of: Option<(NodeId, Vec<(NodeId, Liveness)>)>,
}

impl Before {
    fn of(event: &Event, control: &Control) -> Self {
        let mut before = Self { heartbeat: None, report_seq: None, dial_failed: None, others_of: None };
        match event {
            Event::Heartbeat { node_id, beat, .. } => {
                before.heartbeat = Some((node_id.clone(), beat.seq));
                before.report_seq = control.core.registry().report_seq(node_id);
                if beat.seq % 8 == 0 {
                    let nodes = control.core.view(Moment::ZERO).nodes;
                    let others = nodes.into_iter().map(|n| (n.node_id, n.liveness)).collect();
                    before.others_of = Some((node_id.clone(), others));
                }
            }
            Event::Ended { attempt, how, .. } => {
                let node = control.core.attempt_pool(attempt).map(|pool| pool.node_id.clone());
                before.dial_failed = node.filter(|_| matches!(how, HowEnded::NeverSent(_)));
            }
            Event::Probed { node_id, answer: Err(_), .. } => before.dial_failed = Some(node_id.clone()),
            _ => {}
        }
        before
    }
}

fn brief(answer: &Answer) -> String {
    match answer {
        Answer::Submitted(accepted) => format!("accepted, {} before it", accepted.queue_position),
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
        HowEnded::NodeError(body) => format!("node error, {}", body.message),
        HowEnded::TimedOut(overdue) => format!("timed out, {overdue:?}"),
        HowEnded::TooLong => "too long".into(),
        HowEnded::Closed => "closed".into(),
    }
}
