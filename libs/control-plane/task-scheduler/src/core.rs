//! [`ControlCore`]: `apply` decides, and `next_deadline` says when it wants to be called again. What
//! else it answers is read, or handed over for readers, and changes no decision.
//!
//! Every event is handled, then time is let pass, then the queue is served: whatever freed a
//! slot or brought a pool places a waiting task in the same `apply`. The rooms: [`nodes`] takes
//! what nodes say, [`tasks`] what clients ask, [`ends`] how attempts end, [`time`] what passes by
//! itself, [`waiting`] says what is waited for, [`placing`] starts what can start, [`repeating`] says where a stream is generated again, and
//! [`reading`] shows it. Beside them, [`lanes`] says how
//! long a model is waited for, [`pins`] a node; [`loading`] asks for engines, and [`predicting`] foretells.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use multi_node_placement::{
    Availability, Candidate, Choice, Lack, NoPlacement, PoolIndex, PoolRow, Refused, Spread, Strategy,
    TaskShape, ToLoad, choose, choose_to_load, count_refusals, explain, explain_one, might_take, refused,
    temporarily_unavailable,
};
use pool_registry_types::engines::EngineSet;
use pool_registry_types::error::EndCause;
use pool_registry_types::moment::millis;
use pool_registry_types::node::{
    Heartbeat, HeartbeatAnswer, Intent, IntentAnswer, IntentOrder, Liveness, RegisterAnswer, RegisterRequest,
};
use pool_registry_types::placement::{Explanation, PoolName, PoolVerdict, Refusal, WaitingFor};
use pool_registry_types::pool::{PoolReport, PoolState};
use pool_registry_types::snapshot::ClusterSnapshot;
use pool_registry_types::task::{
    AttemptView, KvHint, Metrics, Priority, ResumeMode, SessionView, TaskAccepted, TaskPage, TaskState,
    TaskStreams, TaskSummary, TaskView, Workload, unsupported,
};
use pool_registry_types::view::{ClusterChange, ClusterView};
use pool_registry_types::{
    AttemptId, Backoff, Epoch, ErrorBody, ErrorCode, HolderId, LogId, Lookup, ModelRef, Moment, NodeId,
    PoolId, PoolKey, ReplicaId, SessionKey, TaskId, routes,
};
use service_registry::{
    HeartbeatOutcome, IndexMismatch, Rule, ServiceRegistry, Settings, Timing, Transition,
};
use task_stream::{AttemptDeadlines, BodyDigest, HowEnded, Overdue, TaskSpec};
use uuid::Uuid;

use crate::attempts::{
    Attempt, AttemptRecord, CloseReason, Evidence, MAX_ENGINE_DEATHS, MAX_TRIES, Maker, Outcome, classify,
};
use crate::event::{Answer, Dispatch, Effect, Event, LinkEvidence, Note, ReplyTo, TaskEnd};
use crate::groups::{Ask, Next};
use crate::pace::{Forecast, Measurement, Paces, remaining_ms};
use crate::queue::{Lane, Queue};
use crate::sessions::{SessionPolicy, Sessions};

mod ends;
mod lanes;
mod loading;
mod nodes;
mod pins;
mod placing;
mod predicting;
pub(crate) mod reading;
mod repeating;
mod tasks;
mod time;
pub(crate) mod waiting;

/// A pool that refused a dispatch counts as full this long, or until its next report.
const HOLD: Duration = Duration::from_millis(250);
/// In which nothing is placed because we have nothing to dial with, by how often that came in a row.
const SHORTAGE_PAUSES: Backoff = Backoff::new(HOLD, Duration::from_secs(4));
/// Before a pool that failed a task is given it again, by the task's tries so far.
const RETRY_PAUSES: Backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(1));
/// How long the stream of an attempt that a report does not list may still bring its end: the
/// report and the stream are two connections, and the report may be the faster one.
/// Source: .specs/01 CLOUD-1407.
const REPORT_PATIENCE: Duration = Duration::from_secs(2);
/// A timer that comes this much late means that our own loop stood still.
const STALL: Duration = Duration::from_secs(1);
/// Attempts of a task that are kept for readers; beyond, refused ones are not.
const MAX_RECORDS: usize = 32;
/// What a client is told to wait when nothing was measured yet.
const DEFAULT_BACKOFF_MS: u64 = 1_000;

/// What becomes of a task that comes to a full lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FullLane {
    /// It is refused.
    #[default]
    Reject,
    /// It is taken, and the one that waits longest is dropped for it.
    DropLru,
}

/// What an operator decides.
#[derive(Debug, Clone)]
pub struct Policy {
    pub timing: Timing,
    /// Most nodes that are known at a time.
    pub max_nodes: usize,
    pub strategy: Strategy,
    /// Waiting tasks per lane and priority.
    pub admission_capacity: usize,
    pub full_lane: FullLane,
    pub sessions: SessionPolicy,
    pub queue_timeout: Duration,
    pub first_token_timeout: Duration,
    pub token_idle_timeout: Duration,
    /// How long an ended task can be read.
    pub task_retention: Duration,
    /// Most ended tasks that are kept for readers; beyond, the oldest goes.
    pub retained_tasks: usize,
    /// For the simulator only: the rule that a mutant lacks.
    pub switched_off: Option<Rule>,
}

/// Response headers come when the slot is taken, before any prefill. Source: .specs/01 CLOUD-1501.
pub(crate) const ACCEPTANCE_TIMEOUT: Duration = Duration::from_secs(5);
/// A node sends at least a comment every second.
pub(crate) const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

/// What happened so far; only ever rises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    pub submitted: u64,
    pub attached: u64,
    pub rejected: u64,
    /// Of these, for a lane that was full.
    pub full: u64,
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
    /// Attempts that went on after tokens of an earlier one.
    pub continued: u64,
    pub replays_differed: u64,
    /// Dropped from a full lane.
    pub dropped: u64,
    /// Times that a breaker of a pool or a node tripped.
    pub trips: u64,
    /// Attempts moved away from nodes that fell silent, before their streams ran out of time.
    pub moved: u64,
    /// Times that a node was asked to start the engines of a pool.
    pub loads: u64,
    /// Times that a node itself refused the control plane.
    pub denials: u64,
    /// Tasks that alone brought an engine down.
    pub culprits: u64,
    /// Times that we could not dial for want of something of our own.
    pub own_shortages: u64,
}

#[derive(Debug, Clone)]
enum Stage {
    Queued,
    Running(AttemptId),
    Ended { at: Moment, state: TaskState, error: Option<Box<ErrorBody>> },
}

#[derive(Debug)]
struct Task {
    /// As its holder knows it.
    id: TaskId,
    holder: HolderId,
    log: LogId,
    model: ModelRef,
    priority: Priority,
    origin: Arc<Origin>,
    /// Dropped when the task has ended.
    spec: Option<Arc<TaskSpec>>,
    /// By which a repeated `task_id` is told from a conflict.
    digest: BodyDigest,
    /// What its session's budget leaves, where it sets no bound on tokens itself.
    budget_bound: Option<u32>,
    number: u64,
    admitted: Moment,
    last_dispatch: Option<Moment>,
    /// The first of any attempt.
    first_token: Option<Moment>,
    stage: Stage,
    /// When the present wait in the queue must be over.
    wait_until: Moment,
    deadline: Option<Moment>,
    /// No pool that failed the task is given it before this.
    not_before: Moment,
    tries: u32,
    engine_deaths: u32,
    tried: Vec<PoolKey>,
    /// Pools whose engines have shown that they cannot do what it asks; they were tried too.
    lacking: Vec<PoolKey>,
    /// It may be what brought an engine down: never on one engine with another that may.
    suspect: bool,
    /// What nodes found wrong with it, while another is to be asked.
    rejection: Option<Box<Rejection>>,
    /// A node has taken it: whoever finds it wrong is wrong itself.
    taken: bool,
    attempts: Vec<AttemptRecord>,
    dispatches: u32,
    cancel_waits: Vec<ReplyTo>,
    session: Option<SessionKey>,
    /// How it goes on when an attempt is lost after tokens.
    continuation: Option<ResumeMode>,
    /// What has made the tokens that were sent, where they may have to be made again here.
    maker: Option<Maker>,
    /// Frames in its log before a terminal one.
    sent: u64,
    /// Tokens that are left out of its log.
    unlogged: u64,
    /// What engines of pools have answered to it (5xx).
    engine_failures: Vec<EngineFailure>,
    /// How long its attempts have run, together.
    ran: Duration,
    /// Milliseconds after which it was predicted to start.
    predicted_ms: Option<u64>,
}

/// By what a task is found again by whoever sent it.
#[derive(Debug)]
struct Origin {
    correlation_id: String,
    /// The name of the token that it was submitted with.
    caller: Option<String>,
}

/// What nodes have found wrong with a task that is not believed yet.
#[derive(Debug)]
struct Rejection {
    error: ErrorBody,
    by: Vec<PoolKey>,
    /// When its wait is over, had nobody found it wrong.
    bound: Moment,
}

/// An engine's failure with one task.
#[derive(Debug)]
struct EngineFailure {
    pool: PoolKey,
    at: Moment,
    answer: String,
}

/// When a pool last served a task, and when another task than that one.
#[derive(Debug, Clone, Copy)]
struct Served {
    task: TaskId,
    at: Moment,
    another_at: Option<Moment>,
}

impl Task {
    /// What it shares with others that ask for the same; nothing for a task that waits for its own
    /// pause since it has had a try, or that must keep apart from others.
    fn ask(&self, policy: &Policy) -> Option<Ask> {
        let with_constraints = policy.switched_off != Some(Rule::PinsHold);
        let plain = self.spec.as_deref().filter(|_| self.tries == 0 && !self.suspect);
        plain.map(|spec| Ask::of(spec, with_constraints, &self.tried, &self.lacking))
    }

    fn is_queued(&self) -> bool {
        matches!(self.stage, Stage::Queued)
    }

    fn pinned_node(&self) -> Option<&NodeId> {
        self.spec.as_ref()?.placement.as_ref()?.pinned_node()
    }
}

/// The control plane's whole decision.
#[derive(Debug)]
pub struct ControlCore {
    policy: Policy,
    incarnation: u64,
    started: Option<Moment>,
    ids_given: u64,
    registry: ServiceRegistry,
    index: PoolIndex,
    /// The pools of each node that were last shown and indexed.
    synced: Lookup<NodeId, BTreeMap<PoolId, PoolRow>>,
    /// What is known of them beside the index, by their rows in it.
    shown_pools: Vec<Option<nodes::Shown>>,
    /// Models for which a slot or a task has come.
    dirty: BTreeSet<ModelRef>,
    /// By their keys: the ids that clients choose, but for `renamed`.
    tasks: Lookup<TaskId, Box<Task>, std::hash::RandomState>,
    /// The keys of tasks whose id another holder's task had for its key when they came.
    renamed: BTreeMap<(TaskId, HolderId), TaskId>,
    attempts: Lookup<AttemptId, Attempt>,
    queue: Queue,
    /// Wait deadlines and backoff ends of queued tasks.
    alarms: BTreeSet<(Moment, TaskId)>,
    /// Attempts that a report did not list, and when they are closed for it.
    vanishing: BTreeSet<(Moment, AttemptId)>,
    ended: VecDeque<(Moment, TaskId)>,
    /// Tasks in the order of their admission.
    by_number: BTreeMap<u64, TaskId>,
    sessions: Sessions,
    paces: Paces,
    forecasts: BTreeMap<ModelRef, Forecast>,
    /// Waiting tasks that may run on one node only.
    pinned: BTreeMap<NodeId, BTreeSet<TaskId>>,
    /// The loadable pools that were asked for.
    loads_asked: Lookup<PoolKey, loading::LoadAsked>,
    /// When to look again at the lanes whose pools are not loaded; one time for each.
    load_alarms: BTreeSet<(Moment, ModelRef)>,
    load_alarm_of: BTreeMap<ModelRef, Moment>,
    /// Nodes whose pinned tasks are to be looked at.
    dirty_pins: BTreeSet<NodeId>,
    /// Models that no node has any more, and for which only tasks wait whose nodes are suspect.
    lapsed: BTreeSet<ModelRef>,
    /// The other lanes, by when their models are not waited for any more.
    leases: lanes::Leases,
    /// We have nothing to dial with: nothing is placed before this.
    short_until: Option<Moment>,
    /// What waiting tasks wait for.
    waits: waiting::Waits,
    /// How often in a row; none after an attempt was taken.
    shortages: u32,
    /// Where tasks run of which each may have brought an engine down; one entry an attempt.
    suspects_at: Vec<PoolKey>,
    /// Tasks that have come, gone or changed since [`ControlCore::take_changed`].
    touched: BTreeSet<TaskId>,
    /// One node timeout after our start has passed: who is not known now is not there.
    grace_over: bool,
    /// Models that are not placed any more.
    retired: BTreeSet<ModelRef>,
    /// Models that the catalog or an alias names.
    named: BTreeSet<ModelRef>,
    /// What followers were told last.
    shown_nodes: Lookup<NodeId, (Liveness, Intent)>,
    /// Of tasks with whose they are.
    changes: Vec<(Option<HolderId>, ClusterChange)>,
    /// Nodes whose liveness has changed during this event.
    restless: BTreeSet<NodeId>,
    draining: bool,
    armed: Option<Moment>,
    counters: Counters,
}

impl ControlCore {
    /// `incarnation` is drawn at random at each start: epochs, attempt ids and log ids derive
    /// from it, and so differ between two lives.
    pub fn new(policy: Policy, incarnation: u64) -> Self {
        let settings = Settings {
            timing: policy.timing,
            max_nodes: policy.max_nodes,
            incarnation,
            switched_off: policy.switched_off,
        };
        Self {
            index: PoolIndex::new(policy.strategy),
            sessions: Sessions::new(policy.sessions),
            policy,
            incarnation,
            started: None,
            ids_given: 0,
            registry: ServiceRegistry::new(settings),
            synced: Lookup::default(),
            shown_pools: Vec::new(),
            dirty: BTreeSet::new(),
            tasks: Lookup::default(),
            renamed: BTreeMap::new(),
            attempts: Lookup::default(),
            queue: Queue::default(),
            alarms: BTreeSet::new(),
            vanishing: BTreeSet::new(),
            ended: VecDeque::new(),
            by_number: BTreeMap::new(),
            paces: Paces::default(),
            forecasts: BTreeMap::new(),
            pinned: BTreeMap::new(),
            loads_asked: Lookup::default(),
            load_alarms: BTreeSet::new(),
            load_alarm_of: BTreeMap::new(),
            dirty_pins: BTreeSet::new(),
            lapsed: BTreeSet::new(),
            leases: lanes::Leases::default(),
            short_until: None,
            waits: waiting::Waits::default(),
            shortages: 0,
            suspects_at: Vec::new(),
            touched: BTreeSet::new(),
            grace_over: false,
            retired: BTreeSet::new(),
            named: BTreeSet::new(),
            shown_nodes: Lookup::default(),
            changes: Vec::new(),
            restless: BTreeSet::new(),
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
            // The ends that were given time to come wait in our own mailbox.
            let vanishing = std::mem::take(&mut self.vanishing);
            self.vanishing = vanishing.into_iter().map(|(_, id)| (now + REPORT_PATIENCE, id)).collect();
            self.started = self.started.map(|at| (at + stall).min(now));
            self.leases.extended();
            self.counters.stalls += 1;
        }
        match event {
            Event::Register { reply, request, registrar } => {
                self.register(now, reply, request, registrar.as_ref(), &mut effects);
            }
            Event::Heartbeat { reply, node_id, beat } => {
                self.heartbeat(now, reply, &node_id, beat, &mut effects);
            }
            Event::Deregister { reply, node_id, epoch } => {
                self.deregister(now, reply, &node_id, epoch.as_ref(), &mut effects);
            }
            Event::Probed { node_id, address, outcome } => {
                let transition = self.registry.probed(now, &node_id, &address, outcome);
                self.sync_node(&node_id);
                self.note(transition.as_slice());
                self.move_quiet(now, &node_id, &mut effects);
            }
            Event::Link { node_id, lane, link } => self.registry.link_stands(&node_id, lane, link),
            Event::LinkEvidence { node_id, lane, evidence } => {
                self.link_evidence(now, &node_id, lane, evidence, &mut effects);
            }
            Event::TokensChanged => self.registry.tokens_changed(now),
            Event::Alive { node_id } => self.registry.alive(now, &node_id),
            Event::Submit { reply, spec } => admitted = self.submit(now, reply, spec, &mut effects),
            Event::Cancel { reply, task_id } => self.cancel(now, reply, task_id, &mut effects),
            Event::Accepted { attempt, replica_id, report_seq } => {
                if let Some(known) = self.attempts.get(&attempt) {
                    self.registry.accepted(&known.pool, &attempt, report_seq);
                }
                self.shortages = 0;
                if self.short_until.take().is_some() {
                    self.dirty.extend(self.queue.models().cloned());
                }
                self.taken(now, attempt);
                if let Some(record) = self.record_mut(attempt) {
                    record.replica = Some(replica_id.clone());
                }
                if let Some(attempt) = self.attempts.get_mut(&attempt) {
                    attempt.replica = Some(replica_id);
                    self.touched.insert(attempt.task);
                }
            }
            Event::Started { attempt } => self.started(now, attempt),
            Event::Quiet { attempt } => self.quiet(now, attempt, &mut effects),
            Event::Heard { attempt } => {
                if let Some(attempt) = self.attempts.get_mut(&attempt) {
                    attempt.quiet = false;
                }
            }
            Event::CannotBeRepeated { attempt } => self.cannot_be_repeated(attempt),
            Event::Ended { attempt, tokens_written, unlogged, how, final_report } => {
                if let Some(attempt) = self.attempts.get(&attempt)
                    && let Some(task) = self.tasks.get_mut(&attempt.task)
                {
                    task.unlogged = unlogged;
                }
                self.ended(now, attempt, tokens_written, &how, final_report, &mut effects);
            }
            Event::Want { reply, node_id, intent } => self.want(reply, node_id, intent, &mut effects),
            Event::IntentDelivered { reply, node_id, order, kept_by_node } => {
                self.intent_delivered(reply, node_id, &order, kept_by_node, &mut effects);
            }
            Event::SetRetired { model, retired } => self.set_retired(model, retired),
            Event::SetNamed { model, named: true } => drop(self.named.insert(model)),
            Event::SetNamed { model, named: false } => drop(self.named.remove(&model)),
            Event::DeleteSession { reply, session } => {
                let answer = if self.sessions.delete(session) {
                    Ok(Answer::SessionDeleted)
                } else {
                    Err(ErrorBody::new(ErrorCode::NotFound, format!("no session {}", session.session_id)))
                };
                effects.push(Effect::Reply { to: reply, answer });
            }
            Event::Timer => {}
            Event::Drain => self.draining = true,
            Event::CutOff => self.cut_off(now, &mut effects),
        }
        self.pass_time(now, &mut effects);
        self.review_pins(now, &mut effects);
        self.place(now, &mut effects);
        if let Some((to, id)) = admitted {
            effects
                .push(Effect::Reply { to, answer: Ok(Answer::Submitted(self.accepted_body(now, id, true))) });
        }
        let changes = self.changes.drain(..);
        effects.extend(changes.map(|(holder, change)| Effect::Changed { holder, change }));
        self.note_nodes(now, &mut effects);
        if timer || self.enforces(Rule::TimerRearmed) || self.armed.is_none() {
            // What is due already is due now: a deadline in the past would look like a stall.
            self.review_leases();
            self.armed = self.compute_deadline().map(|at| at.max(now));
        }
        effects
    }

    /// When [`Event::Timer`] is due; to be asked for after every `apply`.
    pub fn next_deadline(&self) -> Option<Moment> {
        self.armed
    }

    fn compute_deadline(&self) -> Option<Moment> {
        let lanes = self.leases.first().map(|seen| seen + self.registry.lease());
        let retention = self.ended.front().map(|(at, _)| *at + self.policy.task_retention);
        let alarm = self.alarms.first().map(|(at, _)| *at);
        let vanishing = self.vanishing.first().map(|(at, _)| *at);
        let grace = (!self.grace_over && !self.pinned.is_empty()).then(|| self.grace_end());
        let loads = self.load_alarms.first().map(|(at, _)| *at);
        let sessions = self.sessions.next_deadline();
        let own = [lanes, retention, alarm, vanishing, grace, loads, sessions, self.short_until];
        own.into_iter().flatten().chain(self.registry.next_deadline()).min()
    }
}
#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
