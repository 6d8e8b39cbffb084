//! [`ControlCore`]: four verbs — `apply`, `next_deadline`, and the two that read.
//!
//! Every event is handled, then the queue is served: whatever freed a slot or brought a pool
//! places a waiting task in the same `apply`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use multi_node_placement::{Candidate, PoolIndex, Standing, TaskShape, choose, count_refusals};
use pool_registry_types::moment::millis;
use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, Intent, Liveness, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::task::{
    AttemptView, Priority, TaskAccepted, TaskRequest, TaskState, TaskStreams, TaskView,
};
use pool_registry_types::view::ClusterView;
use pool_registry_types::{
    AttemptId, Epoch, ErrorBody, ErrorCode, LogId, ModelRef, Moment, NodeId, PoolKey, TaskId, routes,
};
use service_registry::{HeartbeatOutcome, Registry, Rule, Settings, Timing, Transition};
use uuid::Uuid;

use crate::attempts::{
    Attempt, AttemptRecord, CloseReason, HowEnded, MAX_ENGINE_DEATHS, MAX_TRIES, Outcome, judge,
};
use crate::event::{Answer, Dispatch, Effect, Event, ReplyTo};
use crate::queue::Queue;
use crate::watch::{AttemptDeadlines, Overdue};

/// A pool that refused a dispatch counts as full this long, or until its next report.
const HOLD: Duration = Duration::from_millis(250);
/// First pause before a pool that failed a task is given it again; doubles each time.
const RETRY_BACKOFF: Duration = Duration::from_millis(250);
/// How long the stream of an attempt that a report does not list may still bring its end: the
/// report and the stream are two connections, and the report may be the faster one.
/// Source: .specs/01 CLOUD-1407.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);
/// A timer that comes this much late means that our own loop stood still.
const STALL: Duration = Duration::from_secs(1);
/// Most ended tasks that are kept for readers; beyond, the oldest goes.
pub const MAX_RETAINED_TASKS: usize = 10_000;
/// Attempts of a task that are kept for readers; beyond, refused ones are not.
const MAX_RECORDS: usize = 32;
/// Weight of the newest service time in the running mean.
const SERVICE_TIME_WEIGHT: f64 = 0.2;
/// What a client is told to wait when nothing was measured yet.
const DEFAULT_BACKOFF_MS: u64 = 1_000;

/// What an operator decides.
#[derive(Debug, Clone)]
pub struct Policy {
    pub timing: Timing,
    /// Waiting tasks per lane and priority.
    pub admission_capacity: usize,
    pub queue_timeout: Duration,
    pub first_token_timeout: Duration,
    pub token_idle_timeout: Duration,
    /// How long an ended task can be read.
    pub task_retention: Duration,
    /// For the simulator only: the rule that a mutant lacks.
    pub switched_off: Option<Rule>,
}

/// Response headers come when the slot is taken, before any prefill. Source: .specs/01 CLOUD-1501.
pub const ACCEPTANCE_TIMEOUT: Duration = Duration::from_secs(5);
/// A node sends at least a comment every second.
pub const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

/// What happened so far; only ever rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub submitted: u64,
    pub attached: u64,
    pub rejected: u64,
    pub dispatched: u64,
    pub completed: u64,
    pub failed: u64,
    pub canceled: u64,
    pub refused_dispatches: u64,
    pub replaced: u64,
    pub worker_resets: u64,
    pub vanished: u64,
    pub orphans: u64,
    pub suspects: u64,
    pub offlines: u64,
    pub returns: u64,
    pub registrations: u64,
    pub conflicts: u64,
    pub unknown_heartbeats: u64,
    pub old_reports: u64,
    pub stalls: u64,
    pub mass_silences: u64,
    pub poisoned: u64,
}

#[derive(Debug, Clone)]
enum Stage {
    Queued,
    Running(AttemptId),
    Ended { at: Moment, state: TaskState, error: Option<ErrorBody> },
}

#[derive(Debug)]
struct Task {
    log: LogId,
    model: ModelRef,
    priority: Priority,
    /// Dropped when the task has ended.
    request: Option<Arc<TaskRequest>>,
    fingerprint: u64,
    number: u64,
    admitted: Moment,
    last_dispatch: Option<Moment>,
    stage: Stage,
    /// When the present wait in the queue must be over.
    wait_until: Moment,
    deadline: Option<Moment>,
    /// No pool that failed the task is given it before this.
    not_before: Moment,
    tries: u32,
    engine_deaths: u32,
    tried: Vec<PoolKey>,
    attempts: Vec<AttemptRecord>,
    dispatches: u32,
    cancel_waits: Vec<ReplyTo>,
}

/// The control plane's whole decision.
#[derive(Debug)]
pub struct ControlCore {
    policy: Policy,
    incarnation: u64,
    started: Option<Moment>,
    ids_given: u64,
    registry: Registry,
    index: PoolIndex,
    /// Which pools of a node the index has.
    indexed: BTreeMap<NodeId, BTreeSet<PoolKey>>,
    /// Models for which a slot or a task has come.
    stirred: BTreeSet<ModelRef>,
    tasks: BTreeMap<TaskId, Task>,
    attempts: BTreeMap<AttemptId, Attempt>,
    queue: Queue,
    /// Wait deadlines and backoff ends of queued tasks.
    alarms: BTreeSet<(Moment, TaskId)>,
    /// Attempts that a report did not list, and when they are closed for it.
    vanishing: BTreeSet<(Moment, AttemptId)>,
    ended: VecDeque<(Moment, TaskId)>,
    service_ms: BTreeMap<ModelRef, f64>,
    draining: bool,
    armed: Option<Moment>,
    counters: Counters,
}

impl ControlCore {
    /// `incarnation` is drawn at random at each start: epochs, attempt ids and log ids derive
    /// from it, and so differ between two lives.
    pub fn new(policy: Policy, incarnation: u64) -> Self {
        let settings = Settings { timing: policy.timing, incarnation, switched_off: policy.switched_off };
        Self {
            policy,
            incarnation,
            started: None,
            ids_given: 0,
            registry: Registry::new(settings),
            index: PoolIndex::new(),
            indexed: BTreeMap::new(),
            stirred: BTreeSet::new(),
            tasks: BTreeMap::new(),
            attempts: BTreeMap::new(),
            queue: Queue::default(),
            alarms: BTreeSet::new(),
            vanishing: BTreeSet::new(),
            ended: VecDeque::new(),
            service_ms: BTreeMap::new(),
            draining: false,
            armed: None,
            counters: Counters::default(),
        }
    }

    fn enforces(&self, rule: Rule) -> bool {
        self.policy.switched_off != Some(rule)
    }

    /// Takes an event in and says what is to be done.
    pub fn apply(&mut self, now: Moment, event: Event) -> Vec<Effect> {
        let timer = matches!(event, Event::Timer);
        let mut effects = Vec::new();
        let mut admitted = None;
        self.started.get_or_insert(now);
        if let Some(armed) = self.armed
            && now > armed + STALL
        {
            let stall = now.since(armed);
            self.registry.stalled(now, stall);
            self.started = self.started.map(|at| (at + stall).min(now));
            self.counters.stalls += 1;
        }
        match event {
            Event::Register { reply, request } => self.register(now, reply, request, &mut effects),
            Event::Heartbeat { reply, node_id, beat } => {
                self.heartbeat(now, reply, &node_id, beat, &mut effects);
            }
            Event::Deregister { reply, node_id, epoch } => {
                self.deregister(now, reply, &node_id, epoch.as_ref(), &mut effects);
            }
            Event::Probed { node_id, address, answer } => {
                let transition = self.registry.probed(now, &node_id, &address, answer);
                self.sync_node(&node_id);
                self.note(transition.as_slice());
            }
            Event::Alive { node_id } => self.registry.alive(now, &node_id),
            Event::Submit { reply, task_id, request } => {
                admitted = self.submit(now, reply, task_id, &request, &mut effects);
            }
            Event::Cancel { reply, task_id } => self.cancel(now, reply, task_id, &mut effects),
            Event::Accepted { attempt, replica_id, report_seq } => {
                self.registry.accepted(&attempt, report_seq);
                if let Some(record) = self.record_mut(attempt) {
                    record.replica = Some(replica_id);
                }
            }
            Event::Started { attempt } => {
                if let Some(node_id) = self.attempts.get(&attempt).map(|a| a.pool.node_id.clone()) {
                    self.registry.alive(now, &node_id);
                }
            }
            Event::Ended { attempt, tokens_written, how, closed_after } => {
                self.ended(now, attempt, tokens_written, &how, closed_after, &mut effects);
            }
            Event::Timer => {}
            Event::Drain => self.draining = true,
            Event::CutOff => self.cut_off(now, &mut effects),
        }
        self.pass_time(now, &mut effects);
        self.place(now, &mut effects);
        if let Some((to, id)) = admitted {
            effects.push(Effect::Reply { to, answer: Ok(Answer::Submitted(self.accepted_body(id))) });
        }
        if timer || self.enforces(Rule::TimerRearmed) || self.armed.is_none() {
            // What is due already is due now: a deadline in the past would look like a stall.
            self.armed = self.compute_deadline().map(|at| at.max(now));
        }
        effects
    }

    /// When [`Event::Timer`] is due; to be asked for after every `apply`.
    pub fn next_deadline(&self) -> Option<Moment> {
        self.armed
    }

    fn compute_deadline(&self) -> Option<Moment> {
        let lanes = self.queue.models().map(|model| self.model_lease(model));
        let retention = self.ended.front().map(|(at, _)| *at + self.policy.task_retention);
        let alarm = self.alarms.first().map(|(at, _)| *at);
        let vanishing = self.vanishing.first().map(|(at, _)| *at);
        lanes.chain(retention).chain(alarm).chain(vanishing).chain(self.registry.next_deadline()).min()
    }

    // ---- nodes ----

    fn register(&mut self, now: Moment, to: ReplyTo, request: RegisterRequest, effects: &mut Vec<Effect>) {
        let (node_id, intent) = (request.node_id.clone(), request.intent);
        let answer = match self.registry.register(now, request) {
            Ok(registered) => {
                self.counters.registrations += 1;
                self.close_all(now, &registered.ended, CloseReason::NodeRestarted, effects);
                self.sync_node(&node_id);
                Ok(Answer::Registered(RegisterAnswer {
                    node_id,
                    epoch: registered.epoch,
                    heartbeat_interval_ms: millis(self.policy.timing.heartbeat_interval),
                    node_timeout_ms: millis(self.policy.timing.node_timeout),
                    intent,
                }))
            }
            Err(conflict) => {
                self.counters.conflicts += 1;
                let mut body = ErrorBody::new(ErrorCode::NodeIdConflict, conflict.to_string())
                    .retry_after_ms(millis(self.policy.timing.heartbeat_interval));
                body.node_id = Some(node_id);
                Err(body)
            }
        };
        effects.push(Effect::Reply { to, answer });
    }

    fn heartbeat(
        &mut self,
        now: Moment,
        to: ReplyTo,
        node_id: &NodeId,
        beat: Heartbeat,
        effects: &mut Vec<Effect>,
    ) {
        let intent = beat.intent;
        let cancel_attempts = match self.registry.heartbeat(now, node_id, beat) {
            Ok(HeartbeatOutcome::Ignored) => {
                self.counters.old_reports += 1;
                Vec::new()
            }
            Ok(HeartbeatOutcome::Taken { returned, vanished, orphans }) => {
                self.counters.returns += u64::from(returned);
                self.counters.orphans += orphans.len() as u64;
                self.await_ends(now, &vanished);
                self.sync_node(node_id);
                orphans
            }
            Err(unknown) => {
                self.counters.unknown_heartbeats += 1;
                let mut body = ErrorBody::new(ErrorCode::NodeUnknown, unknown.to_string());
                body.node_id = Some(node_id.clone());
                effects.push(Effect::Reply { to, answer: Err(body) });
                return;
            }
        };
        let heartbeat_interval_ms = millis(self.policy.timing.heartbeat_interval);
        let answer = HeartbeatAnswer { heartbeat_interval_ms, cancel_attempts, intent };
        effects.push(Effect::Reply { to, answer: Ok(Answer::Heartbeat(answer)) });
    }

    fn deregister(
        &mut self,
        now: Moment,
        to: ReplyTo,
        node_id: &NodeId,
        epoch: Option<&Epoch>,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(ended) = self.registry.deregister(node_id, epoch) {
            self.close_all(now, &ended, CloseReason::NodeLeft, effects);
            self.sync_node(node_id);
        }
        effects.push(Effect::Reply { to, answer: Ok(Answer::Deregistered) });
    }

    /// Brings the index up to what the registry knows of a node's pools.
    fn sync_node(&mut self, node_id: &NodeId) {
        let mut keys = self.indexed.remove(node_id).unwrap_or_default();
        keys.extend(self.registry.pool_ids(node_id).map(|pool| PoolKey::new(node_id.clone(), pool.clone())));
        for key in &keys {
            self.sync_pool(key);
        }
    }

    fn sync_pool(&mut self, key: &PoolKey) {
        // Who avoids a pool that failed it may take that one again once the others are out.
        if let Some(before) = self.index.get(key) {
            self.stirred.extend(before.models.iter().cloned());
        }
        let Some(facts) = self.registry.pool_facts(key) else {
            self.index.remove(key);
            if let Some(keys) = self.indexed.get_mut(&key.node_id) {
                keys.remove(key);
            }
            return;
        };
        let standing = match (facts.liveness, facts.intent) {
            (Liveness::Offline, _) => Standing::Offline,
            (Liveness::Suspect, _) => Standing::Suspect,
            (Liveness::Online, Intent::Draining) => Standing::Draining,
            (Liveness::Online, Intent::Serving) if facts.report.draining => Standing::Draining,
            (Liveness::Online, Intent::Serving) if !facts.report.ready => Standing::NotReady,
            (Liveness::Online, Intent::Serving) => Standing::Placeable,
        };
        let candidate = Candidate {
            key: key.clone(),
            standing,
            engine: facts.report.engine,
            models: facts.report.models.clone(),
            ctx_max: facts.report.ctx_max,
            slots_total: facts.slots_total,
            slots_busy: facts.slots_busy,
            held: facts.held,
            vram_free_bytes: facts.report.vram_free_bytes,
        };
        if standing == Standing::Placeable && candidate.has_free_slot() {
            self.stirred.extend(candidate.models.iter().cloned());
        }
        self.index.upsert(candidate);
        self.indexed.entry(key.node_id.clone()).or_default().insert(key.clone());
    }

    fn note(&mut self, transitions: &[Transition]) {
        for transition in transitions {
            match transition.to {
                Liveness::Online => self.counters.returns += 1,
                Liveness::Suspect => self.counters.suspects += 1,
                Liveness::Offline => self.counters.offlines += 1,
            }
        }
    }

    // ---- tasks ----

    /// Returns whom to tell of the task's place once the queue was served.
    fn submit(
        &mut self,
        now: Moment,
        to: ReplyTo,
        id: TaskId,
        request: &Arc<TaskRequest>,
        effects: &mut Vec<Effect>,
    ) -> Option<(ReplyTo, TaskId)> {
        let fingerprint = fingerprint(request);
        if let Some(task) = self.tasks.get(&id) {
            let answer = if task.fingerprint == fingerprint {
                self.counters.attached += 1;
                Ok(Answer::Submitted(self.accepted_body(id)))
            } else {
                let message = format!("task_id {id} is taken by a task with another body");
                Err(ErrorBody::new(ErrorCode::TaskConflict, message))
            };
            effects.push(Effect::Reply { to, answer });
            return None;
        }
        if let Err(error) = self.admissible(now, request) {
            self.counters.rejected += 1;
            effects.push(Effect::Reply { to, answer: Err(error) });
            return None;
        }
        self.counters.submitted += 1;
        self.ids_given += 1;
        let deadline = request.deadline_ms.map(|left| now + Duration::from_millis(left));
        let log = LogId(self.next_id());
        let task = Task {
            log,
            model: request.model_ref.clone(),
            priority: request.priority,
            request: Some(Arc::clone(request)),
            fingerprint,
            number: self.ids_given,
            admitted: now,
            last_dispatch: None,
            stage: Stage::Queued,
            wait_until: Moment::NEVER,
            deadline,
            not_before: now,
            tries: 0,
            engine_deaths: 0,
            tried: Vec::new(),
            attempts: Vec::new(),
            dispatches: 0,
            cancel_waits: Vec::new(),
        };
        self.tasks.insert(id, task);
        effects.push(Effect::OpenLog { task: id, log });
        self.enqueue(now, id, now + self.policy.queue_timeout);
        Some((to, id))
    }

    fn admissible(&self, now: Moment, request: &TaskRequest) -> Result<(), ErrorBody> {
        let model = &request.model_ref;
        if self.draining {
            return Err(ErrorBody::new(ErrorCode::Draining, "the control plane is shutting down"));
        }
        if self.model_lease(model) <= now {
            return Err(self.model_not_available(model));
        }
        if self.queue.depth(model, request.priority) >= self.policy.admission_capacity {
            let message = format!("the queue of {model} holds {} tasks", self.policy.admission_capacity);
            let mut error = ErrorBody::new(ErrorCode::AdmissionReject, message);
            error.retry_after_ms = Some(self.backoff_ms(model).max(1));
            error.policy_label = Some("reject".into());
            return Err(error);
        }
        Ok(())
    }

    /// Until when a task may wait for the model: one node timeout after it was last reported,
    /// and one after our own start, when the nodes have yet to come.
    fn model_lease(&self, model: &ModelRef) -> Moment {
        let started = self.started.unwrap_or_default();
        let since = self.registry.model_reported(model).map_or(started, |at| at.max(started));
        since + self.policy.timing.node_timeout
    }

    fn model_not_available(&self, model: &ModelRef) -> ErrorBody {
        let online: Vec<&str> = self.registry.online_nodes().iter().map(|id| id.as_str()).collect();
        let nodes = if online.is_empty() { "none".into() } else { online.join(", ") };
        ErrorBody::new(
            ErrorCode::ModelNotAvailable,
            format!("no node has reported a pool with model {model} lately (online nodes: {nodes})"),
        )
    }

    fn enqueue(&mut self, now: Moment, id: TaskId, bound: Moment) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = Stage::Queued;
        task.wait_until = task.deadline.map_or(bound, |deadline| deadline.min(bound));
        self.alarms.insert((task.wait_until, id));
        if task.not_before > now {
            self.alarms.insert((task.not_before, id));
        }
        self.queue.push(&task.model, task.priority, task.number, id);
        self.stirred.insert(task.model.clone());
    }

    fn cancel(&mut self, now: Moment, to: ReplyTo, id: TaskId, effects: &mut Vec<Effect>) {
        let canceled = Ok(Answer::Canceled);
        match self.tasks.get_mut(&id) {
            None => {
                let error = ErrorBody::new(ErrorCode::NotFound, format!("no task {id}"));
                effects.push(Effect::Reply { to, answer: Err(error) });
            }
            Some(Task { stage: Stage::Ended { .. }, .. }) => {
                effects.push(Effect::Reply { to, answer: canceled });
            }
            Some(Task { stage: Stage::Queued, .. }) => {
                self.leave_queue(id);
                self.fail(now, id, ErrorBody::new(ErrorCode::Canceled, "canceled while queued"), effects);
                effects.push(Effect::Reply { to, answer: canceled });
            }
            Some(task @ Task { stage: Stage::Running(_), .. }) => {
                let Stage::Running(attempt) = task.stage else { unreachable!("matched as running") };
                task.cancel_waits.push(to);
                self.close(now, attempt, CloseReason::Canceled, effects);
            }
        }
    }

    /// The daemon ends: every task that has not ended gets its terminal event.
    fn cut_off(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        self.draining = true;
        let queued: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| matches!(task.stage, Stage::Queued))
            .map(|(id, _)| *id)
            .collect();
        for id in queued {
            self.leave_queue(id);
            let error = ErrorBody::new(
                ErrorCode::Draining,
                "the control plane was shut down before the task started",
            );
            self.fail(now, id, error, effects);
        }
        let running: Vec<AttemptId> = self.attempts.keys().copied().collect();
        self.close_all(now, &running, CloseReason::CutOff, effects);
    }

    fn leave_queue(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        self.queue.remove(&task.model, task.priority, task.number, id);
        self.alarms.remove(&(task.wait_until, id));
        self.alarms.remove(&(task.not_before, id));
    }

    /// Ends a task that has no attempt with a terminal error of ours.
    fn fail(&mut self, now: Moment, id: TaskId, error: ErrorBody, effects: &mut Vec<Effect>) {
        let state = if error.code == ErrorCode::Canceled {
            self.counters.canceled += 1;
            TaskState::Canceled
        } else {
            self.counters.failed += 1;
            self.counters.worker_resets += u64::from(error.code == ErrorCode::WorkerReset);
            TaskState::Failed
        };
        effects.push(Effect::CloseTask { task: id, error: error.clone() });
        self.finish(now, id, state, Some(error), effects);
    }

    fn finish(
        &mut self,
        now: Moment,
        id: TaskId,
        state: TaskState,
        error: Option<ErrorBody>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.stage = Stage::Ended { at: now, state, error };
        task.request = None;
        for to in std::mem::take(&mut task.cancel_waits) {
            effects.push(Effect::Reply { to, answer: Ok(Answer::Canceled) });
        }
        self.ended.push_back((now, id));
        if self.ended.len() > MAX_RETAINED_TASKS {
            self.forget_oldest(effects);
        }
    }

    fn forget_oldest(&mut self, effects: &mut Vec<Effect>) {
        if let Some((_, id)) = self.ended.pop_front() {
            self.tasks.remove(&id);
            effects.push(Effect::Forget { task: id });
        }
    }

    // ---- attempts ----

    fn record_mut(&mut self, attempt: AttemptId) -> Option<&mut AttemptRecord> {
        let task = self.attempts.get(&attempt)?.task;
        self.tasks.get_mut(&task)?.attempts.iter_mut().find(|record| record.id == attempt)
    }

    fn close_all(
        &mut self,
        now: Moment,
        attempts: &[AttemptId],
        why: CloseReason,
        effects: &mut Vec<Effect>,
    ) {
        for attempt in attempts {
            self.close(now, *attempt, why, effects);
        }
    }

    /// Gives the streams of attempts that a report does not list time to bring their ends.
    fn await_ends(&mut self, now: Moment, vanished: &[AttemptId]) {
        let patience = if self.enforces(Rule::ReportPatience) { REPORT_PATIENCE } else { Duration::ZERO };
        for id in vanished {
            if let Some(attempt) = self.attempts.get_mut(id)
                && !attempt.vanishing
            {
                attempt.vanishing = true;
                self.vanishing.insert((now + patience, *id));
            }
        }
    }

    /// Asks for the end of an attempt. The first reason stands, except that a cancel overrides.
    fn close(&mut self, now: Moment, id: AttemptId, why: CloseReason, effects: &mut Vec<Effect>) {
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        let closing = attempt.closing.is_some();
        if !closing || matches!(why, CloseReason::Canceled | CloseReason::CutOff) {
            attempt.closing = Some(why);
        }
        if closing {
            return;
        }
        effects.push(Effect::CloseAttempt { task: attempt.task, attempt: id, why });
        if !self.enforces(Rule::FenceBeforePlace) {
            self.ended(now, id, 0, &HowEnded::Closed, None, effects);
        }
    }

    fn ended(
        &mut self,
        now: Moment,
        id: AttemptId,
        tokens_written: u64,
        how: &HowEnded,
        closed_after: Option<u64>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(attempt) = self.attempts.remove(&id) else { return };
        self.registry.release(&id, closed_after);
        let node_id = attempt.pool.node_id.clone();
        match how {
            HowEnded::NeverSent(reason) => {
                let transition = self.registry.dial_failed(now, &node_id, reason.clone());
                self.note(transition.as_slice());
                self.registry.hold(&attempt.pool, now + HOLD);
                self.sync_node(&node_id);
            }
            HowEnded::NoAnswer(_) | HowEnded::TimedOut(Overdue::Acceptance) => {
                let reason = "it took a connection and gave no answer".to_owned();
                let transition = self.registry.dial_failed(now, &node_id, reason);
                self.note(transition.as_slice());
                self.sync_node(&node_id);
            }
            HowEnded::Broken(_) | HowEnded::TimedOut(Overdue::Silence) => {
                self.registry.want_probe(now, &node_id);
                if !self.enforces(Rule::OwnLiveness) {
                    let neighbours = self.registry.attempts_of(&node_id);
                    self.close_all(now, &neighbours, CloseReason::Neighbour, effects);
                }
            }
            HowEnded::Refused(error) => {
                self.registry.hold(&attempt.pool, now + HOLD);
                if error.code == ErrorCode::WrongNode {
                    self.registry.want_probe(now, &node_id);
                }
            }
            HowEnded::NodeError(error)
                if matches!(error.code, ErrorCode::PoolUnready | ErrorCode::ReplicaExhausted) =>
            {
                self.registry.hold(&attempt.pool, now + HOLD);
            }
            _ => {}
        }
        self.sync_pool(&attempt.pool);

        let mut outcome = judge(how, attempt.closing, tokens_written, &attempt.pool);
        if outcome == Outcome::FreeRefusal {
            self.counters.refused_dispatches += 1;
            if !self.enforces(Rule::RefusalIsFree) {
                let error = ErrorBody::new(ErrorCode::ReplicaExhausted, "refused");
                outcome = Outcome::Retry { engine_died: false, error };
            }
        }
        let id_of_task = attempt.task;
        let Some(task) = self.tasks.get_mut(&id_of_task) else { return };
        if let Some(record) = task.attempts.iter_mut().find(|record| record.id == id) {
            record.outcome = describe(how, &outcome);
        }
        match outcome {
            Outcome::Completed => {
                let took = now.millis_since(attempt.dispatched);
                let model = task.model.clone();
                self.counters.completed += 1;
                self.measure(model, took);
                self.finish(now, id_of_task, TaskState::Completed, None, effects);
            }
            Outcome::Canceled => {
                let error = ErrorBody::new(ErrorCode::Canceled, "canceled while running");
                self.fail(now, id_of_task, error, effects);
            }
            Outcome::Failed(error) => self.fail(now, id_of_task, error, effects),
            Outcome::FreeRefusal | Outcome::FreeReplace => {
                self.counters.replaced += u64::from(outcome == Outcome::FreeReplace);
                // What costs no try must not go on for ever: the wait goes on where it was.
                let wait_until = task.wait_until;
                if task.attempts.len() > MAX_RECORDS {
                    task.attempts.retain(|record| record.id != id);
                }
                self.enqueue(now, id_of_task, wait_until);
            }
            Outcome::Retry { engine_died, error } => {
                task.tries += 1;
                task.engine_deaths += u32::from(engine_died);
                if !task.tried.contains(&attempt.pool) {
                    task.tried.push(attempt.pool.clone());
                }
                let poisoned = task.engine_deaths >= MAX_ENGINE_DEATHS;
                let tries = task.tries;
                if poisoned && self.policy.switched_off != Some(Rule::PoisonLimit) || tries >= MAX_TRIES {
                    self.counters.poisoned += u64::from(poisoned);
                    let error = exhausted(task, error);
                    self.fail(now, id_of_task, error, effects);
                } else {
                    task.not_before = now + RETRY_BACKOFF * 2_u32.pow(tries - 1);
                    self.counters.replaced += 1;
                    self.enqueue(now, id_of_task, now + self.policy.queue_timeout);
                }
            }
        }
    }

    fn measure(&mut self, model: ModelRef, took_ms: u64) {
        let took = took_ms as f64;
        let mean = self.service_ms.entry(model).or_insert(took);
        *mean += SERVICE_TIME_WEIGHT * (took - *mean);
    }

    // ---- time ----

    fn pass_time(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        let guarded = self.registry.mass_silence_since().is_some();
        let transitions = self.registry.expire(now);
        if !guarded && self.registry.mass_silence_since().is_some() {
            self.counters.mass_silences += 1;
        }
        self.note(&transitions);
        for transition in transitions {
            self.sync_node(&transition.node_id);
            if transition.to == Liveness::Offline {
                let attempts = self.registry.attempts_of(&transition.node_id);
                self.close_all(now, &attempts, CloseReason::NodeOffline, effects);
            }
        }
        for node_id in self.registry.take_forgotten() {
            self.sync_node(&node_id);
        }
        for pool in self.registry.take_lifted_holds() {
            self.sync_pool(&pool);
        }
        for (node_id, address) in self.registry.take_due_probes(now) {
            effects.push(Effect::Probe { node_id, address });
        }
        while let Some((at, id)) = self.alarms.first().copied()
            && at <= now
        {
            self.alarms.pop_first();
            self.alarm(now, id, effects);
        }
        while let Some((at, id)) = self.vanishing.first().copied()
            && at <= now
        {
            self.vanishing.pop_first();
            if self.attempts.contains_key(&id) {
                self.counters.vanished += 1;
                self.close(now, id, CloseReason::Vanished, effects);
            }
        }
        let gone: Vec<ModelRef> =
            self.queue.models().filter(|model| self.model_lease(model) <= now).cloned().collect();
        for model in gone {
            self.end_lane(now, &model, effects);
        }
        while self.ended.front().is_some_and(|(at, _)| *at + self.policy.task_retention <= now) {
            self.forget_oldest(effects);
        }
    }

    /// A queued task's wait, or its backoff, is over.
    fn alarm(&mut self, now: Moment, id: TaskId, effects: &mut Vec<Effect>) {
        let Some(task) = self.tasks.get(&id) else { return };
        if !matches!(task.stage, Stage::Queued) {
            return;
        }
        self.stirred.insert(task.model.clone());
        if task.wait_until > now {
            return;
        }
        let waited = now.millis_since(task.admitted);
        let shape = shape(task, now);
        let why = shape.map_or_else(String::new, |shape| count_refusals(&self.index, &shape));
        let message = format!("not started within {waited} ms ({why})");
        self.leave_queue(id);
        self.fail(now, id, ErrorBody::new(ErrorCode::DeadlineExceeded, message), effects);
    }

    fn end_lane(&mut self, now: Moment, model: &ModelRef, effects: &mut Vec<Effect>) {
        let Some(lane) = self.queue.lane(model) else { return };
        let waiting: Vec<TaskId> =
            lane.waiting(Priority::Interactive).chain(lane.waiting(Priority::Batch)).collect();
        for id in waiting {
            self.leave_queue(id);
            self.fail(now, id, self.model_not_available(model), effects);
        }
    }

    // ---- placement ----

    /// Starts what can start, in the lanes that a slot or a task has stirred.
    fn place(&mut self, now: Moment, effects: &mut Vec<Effect>) {
        let mut models: Vec<ModelRef> = std::mem::take(&mut self.stirred).into_iter().collect();
        models.retain(|model| self.queue.lane(model).is_some());
        models.sort_by_key(|model| self.queue.oldest(model));
        for model in models {
            while let Some((id, pool)) = self.next_start(now, &model) {
                self.start(now, id, pool, effects);
            }
        }
        // Starting tasks changes pools, which stirs lanes that were just served.
        self.stirred.clear();
    }

    /// The oldest task, in the order of priorities, for which there is a slot.
    fn next_start(&self, now: Moment, model: &ModelRef) -> Option<(TaskId, PoolKey)> {
        let lane = self.queue.lane(model)?;
        if !self.index.has_free(model) {
            return None;
        }
        lane.order().into_iter().flat_map(|priority| lane.waiting(priority)).find_map(|id| {
            let shape = shape(self.tasks.get(&id)?, now)?;
            Some((id, choose(&self.index, &shape).ok()?.pool))
        })
    }

    fn start(&mut self, now: Moment, id: TaskId, pool: PoolKey, effects: &mut Vec<Effect>) {
        let attempt = AttemptId(self.next_id());
        let Some((address, boot_id)) = self.registry.address(&pool.node_id) else { return };
        let address = address.to_owned();
        self.leave_queue_to_start(id);
        let deadlines = self.deadlines(id);
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Some(request) = task.request.clone() else { return };
        task.stage = Stage::Running(attempt);
        task.last_dispatch = Some(now);
        task.dispatches += 1;
        task.attempts.push(AttemptRecord {
            id: attempt,
            pool: pool.clone(),
            replica: None,
            outcome: "running".into(),
        });
        effects.push(Effect::Dispatch(Box::new(Dispatch {
            task: id,
            attempt,
            log: task.log,
            pool: pool.clone(),
            address,
            boot_id,
            first_index: 0,
            attempt_number: task.dispatches,
            queue_wait_ms: now.millis_since(task.admitted),
            deadlines,
            task_deadline: task.deadline,
            request,
        })));
        self.counters.dispatched += 1;
        self.attempts.insert(
            attempt,
            Attempt { task: id, pool: pool.clone(), dispatched: now, closing: None, vanishing: false },
        );
        self.registry.reserve(&pool, attempt);
        self.sync_pool(&pool);
    }

    fn leave_queue_to_start(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id) else { return };
        self.queue.start(&task.model, task.priority, task.number, id);
        self.alarms.remove(&(task.wait_until, id));
        self.alarms.remove(&(task.not_before, id));
    }

    fn deadlines(&self, id: TaskId) -> AttemptDeadlines {
        if !self.enforces(Rule::AttemptDeadlines) {
            return AttemptDeadlines::UNBOUNDED;
        }
        let asked = self.tasks.get(&id).and_then(|task| task.request.as_ref()?.timeouts).unwrap_or_default();
        let or = |asked: Option<u64>, default: Duration| asked.map_or(default, Duration::from_millis);
        AttemptDeadlines {
            acceptance: ACCEPTANCE_TIMEOUT,
            first_token: or(asked.first_token_ms, self.policy.first_token_timeout),
            token_idle: or(asked.token_idle_ms, self.policy.token_idle_timeout),
            silence: SILENCE_TIMEOUT,
        }
    }

    fn next_id(&mut self) -> Uuid {
        self.ids_given += 1;
        let mut bytes = [0_u8; 16];
        bytes[..8].copy_from_slice(&self.incarnation.to_be_bytes());
        bytes[8..].copy_from_slice(&self.ids_given.to_be_bytes());
        Uuid::new_v8(bytes)
    }

    // ---- reading ----

    fn accepted_body(&self, id: TaskId) -> TaskAccepted {
        let task = &self.tasks[&id];
        let position = match task.stage {
            Stage::Queued => self.queue.position(&task.model, task.priority, task.number),
            Stage::Running(_) | Stage::Ended { .. } => 0,
        };
        let queued = matches!(task.stage, Stage::Queued);
        TaskAccepted {
            task_id: id,
            queue_position: u32::try_from(position).unwrap_or(u32::MAX),
            predicted_start_ms: if queued { self.predict_ms(&task.model, position + 1) } else { Some(0) },
            backoff_ms: if queued { self.backoff_ms(&task.model) } else { 0 },
            streams: TaskStreams { sse: routes::TASK_EVENTS.replace("{id}", &id.to_string()) },
        }
    }

    /// Milliseconds until `starts` more tasks of the model have started, by the mean service
    /// time and the slots there are; nothing before either is known.
    fn predict_ms(&self, model: &ModelRef, starts: usize) -> Option<u64> {
        let mean = *self.service_ms.get(model)?;
        let slots = self.index.slots_of(model);
        if slots == 0 {
            return None;
        }
        let predicted = mean * starts as f64 / f64::from(slots);
        Some(Duration::try_from_secs_f64(predicted / 1e3).map_or(u64::MAX, millis))
    }

    fn backoff_ms(&self, model: &ModelRef) -> u64 {
        self.predict_ms(model, 1).unwrap_or(DEFAULT_BACKOFF_MS)
    }

    /// The nodes as of now.
    pub fn view(&self, now: Moment) -> ClusterView {
        self.registry.view(now)
    }

    pub fn task_view(&self, now: Moment, id: TaskId) -> Option<TaskView> {
        let task = self.tasks.get(&id)?;
        let (state, end, error) = match &task.stage {
            Stage::Queued => (TaskState::Queued, now, None),
            Stage::Running(_) => (TaskState::Running, now, None),
            Stage::Ended { at, state, error } => (*state, *at, error.clone()),
        };
        let queued = state == TaskState::Queued;
        let position = self.queue.position(&task.model, task.priority, task.number);
        let wait_end = if queued { now } else { task.last_dispatch.unwrap_or(end) };
        let attempts = task.attempts.iter().map(|record| AttemptView {
            attempt_id: record.id,
            node_id: record.pool.node_id.clone(),
            pool_id: record.pool.pool_id.clone(),
            replica_id: record.replica.clone(),
            outcome: record.outcome.clone(),
        });
        Some(TaskView {
            task_id: id,
            log_id: task.log,
            model_ref: task.model.clone(),
            priority: task.priority,
            state,
            queue_position: queued.then(|| u32::try_from(position).unwrap_or(u32::MAX)),
            queue_wait_ms: wait_end.millis_since(task.admitted),
            elapsed_ms: end.millis_since(task.admitted),
            attempts: attempts.collect(),
            error,
        })
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Waiting tasks of each lane and priority.
    pub fn queue_depths(&self) -> Vec<(ModelRef, Priority, usize)> {
        let of = |model: &ModelRef, priority| (model.clone(), priority, self.queue.depth(model, priority));
        self.queue.models().flat_map(|m| [of(m, Priority::Interactive), of(m, Priority::Batch)]).collect()
    }

    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    pub fn running(&self) -> usize {
        self.attempts.len()
    }

    /// Where an attempt that has not ended runs.
    pub fn attempt_pool(&self, attempt: &AttemptId) -> Option<&PoolKey> {
        self.attempts.get(attempt).map(|attempt| &attempt.pool)
    }

    pub fn is_draining(&self) -> bool {
        self.draining
    }
}

fn shape(task: &Task, now: Moment) -> Option<TaskShape<'_>> {
    let request = task.request.as_ref()?;
    Some(TaskShape {
        model: &task.model,
        engine: request.required_engine(),
        ctx: request.ctx,
        tried: &task.tried,
        may_repeat: task.not_before <= now,
    })
}

/// The body's identity for a repeated `task_id`; equal for equal bodies in this process.
fn fingerprint(request: &TaskRequest) -> u64 {
    let mut hasher = DefaultHasher::new();
    serde_json::to_vec(&TaskRequest { task_id: None, ..request.clone() })
        .expect("a task request is always JSON")
        .hash(&mut hasher);
    hasher.finish()
}

fn exhausted(task: &Task, last: ErrorBody) -> ErrorBody {
    if last.code == ErrorCode::DecodeTimeout {
        return last;
    }
    let causes: Vec<String> = task.attempts.iter().map(|a| format!("{}: {}", a.pool, a.outcome)).collect();
    let message = format!("all {} tries failed ({})", task.tries, causes.join("; "));
    ErrorBody { code: ErrorCode::PoolUnavailable, message, retriable: true, ..last }
}

fn describe(how: &HowEnded, outcome: &Outcome) -> String {
    match (how, outcome) {
        (_, Outcome::Completed) => "finished".into(),
        (_, Outcome::Canceled) => "canceled".into(),
        (HowEnded::Refused(error), _) => format!("refused: {}", error.code),
        (HowEnded::NeverSent(reason), _) => format!("not connected: {reason}"),
        (_, Outcome::FreeRefusal) => "refused: POOL_UNREADY".into(),
        (_, Outcome::FreeReplace) => "not connected".into(),
        (_, Outcome::Failed(error) | Outcome::Retry { error, .. }) => error.message.clone(),
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
