//! The oracle: what a client and an omniscient observer see, held against the invariants.
//!
//! It keeps books of its own from effects, events and the bytes in the logs, and never asks
//! the core whether the core is right. Numbers in brackets are those of the contract's list.

use std::collections::{BTreeMap, BTreeSet};

use pool_registry_types::error::EndCause;
use pool_registry_types::node::{Intent, Liveness};
use pool_registry_types::placement::PlacementConstraints;
use pool_registry_types::pool::EngineKind;
use pool_registry_types::view::{ClusterView, NodeView};
use pool_registry_types::{
    AttemptId, ErrorBody, ErrorCode, ModelRef, Moment, NodeId, PoolId, PoolKey, TaskId,
};
use task_scheduler::{ControlCore, Dispatch, HowEnded, Overdue};
use task_stream::TaskLog;

use crate::draw::{MAX_TURNS, Plan, Replays, TaskPlan};
use crate::transcript::{Transcript, Writer};

mod dispatch;
mod ends;

/// What is known of one task.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) model: usize,
    pub(crate) batch: bool,
    pub(crate) number: u64,
    pub(crate) queued_since: Option<Moment>,
    pub(crate) open: Option<(AttemptId, PoolKey)>,
    tried: Vec<PoolKey>,
    tries: u32,
    engine_deaths: u32,
    /// What is read of its log as soon as it stands there.
    transcript: Transcript,
    pub(crate) terminal: Option<String>,
    constraints: Option<PlacementConstraints>,
    continues: bool,
    /// What it has sent is generated again here, by the kind of engines that it began on.
    passes_on: bool,
    kind: Option<EngineKind>,
    /// The attempt that does so.
    again: Option<AttemptId>,
    /// It was said that it cannot be.
    is_final: bool,
    /// A replay of it did not begin with what had been sent.
    differed: bool,
    /// The pools whose engines failed with it, when, and how.
    engine_failures: Vec<(PoolKey, Moment, String)>,
    /// A pool failed it and served another since the last time that it was failed so.
    own_fault: bool,
    dispatches: u32,
    /// Before this, no wait of it is over.
    patient_until: Moment,
    /// Its own, which ends it wherever it is.
    deadline: Option<Moment>,
    /// It alone has brought an engine down.
    culprit: bool,
    /// It is one of several that may have.
    suspect: bool,
    /// The pools whose nodes have found it wrong, while none has taken it.
    rejected_by: Vec<PoolKey>,
    /// A node has taken it.
    taken: bool,
    /// A client wants its end.
    canceled: bool,
    /// Interactive starts in a row while it waited and could have had the slot.
    passed_over: u32,
}

impl Seen {
    /// Whether the attempt generates again what another one has sent.
    pub(crate) fn has_gone_on(&self, attempt: AttemptId) -> bool {
        self.again == Some(attempt)
    }

    /// Whether an engine of the kind may go on with it.
    fn goes_on_with(&self, kind: Option<EngineKind>) -> bool {
        !self.passes_on || self.transcript.tokens == 0 || self.kind == kind
    }
}

/// Errors of one pool's engine in a row, those side by side and those of one task counted once.
#[derive(Debug, Default, Clone)]
struct Sick {
    /// The tasks that it has failed since one got through, each with its first failure; zero for one
    /// that its node has found wrong.
    tasks: BTreeMap<TaskId, Moment>,
    /// The last failure that was new then.
    last: Moment,
    /// The last token of one that had got through before: what failed until then does not count.
    token: Moment,
}

/// Failures of a node itself in a row, those side by side counted once.
#[derive(Debug, Default, Clone, Copy)]
struct Failing {
    times: u32,
    last: Moment,
}

impl Sick {
    /// The pool has failed a task that was sent there at `dispatched`.
    fn failed(&mut self, now: Moment, dispatched: Moment, task: TaskId, at: Moment) {
        let side_by_side = self.last != Moment::ZERO && dispatched <= self.last;
        if !side_by_side && !self.tasks.contains_key(&task) {
            self.tasks.insert(task, at);
            self.last = now;
        }
    }

    /// The failures that count.
    fn in_a_row(&self) -> impl Iterator<Item = Moment> {
        self.tasks.values().copied().filter(|at| *at > self.token)
    }

    /// Since when the pool is left alone.
    fn rests_from(&self) -> Moment {
        self.in_a_row().max().unwrap_or_default()
    }
}

/// What the observer knows of a node's signs of life.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Life {
    pub(crate) heartbeat: Moment,
    pub(crate) any: Moment,
    pub(crate) seq: u64,
}

/// The books of one life of the control plane.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    pub(crate) tasks: BTreeMap<TaskId, Seen>,
    pub(crate) life: BTreeMap<NodeId, Life>,
    pub(crate) epochs: BTreeSet<String>,
    /// The last time at which the control plane itself stood still.
    pub(crate) stalled_until: Moment,
    pub(crate) stall_total_ms: u64,
    /// When most nodes were silent the last time.
    most_silent: Option<Moment>,
    /// When a node that had been dialled well before could not be dialled.
    last_dial_failure: Option<Moment>,
    /// Nodes that could be dialled the last time.
    well: BTreeSet<NodeId>,
    /// Nodes that refused the control plane itself, and have not let it in since.
    denied: BTreeSet<NodeId>,
    failing: BTreeMap<NodeId, Failing>,
    /// Nodes whose last report had a pool that takes nothing and is not drained.
    away: BTreeSet<NodeId>,
    /// When each model was last reported.
    models: BTreeMap<usize, Moment>,
    retired: BTreeSet<usize>,
    pub(crate) offline_at: BTreeMap<NodeId, Moment>,
    /// Nodes that an operator has drained and not resumed.
    pub(crate) draining: BTreeSet<NodeId>,
    sick: BTreeMap<PoolKey, Sick>,
    /// When the last other process was taken for a node's.
    booted: BTreeMap<NodeId, Moment>,
    /// The tasks that each pool's engines failed since one got through, whichever engines they were.
    failed: BTreeMap<PoolKey, BTreeSet<TaskId>>,
    /// Streams of a node that broke since one came whole.
    broken: BTreeMap<NodeId, u32>,
    /// When each pool last brought a task a token or an end, and which task.
    served: BTreeMap<PoolKey, Vec<(Moment, TaskId)>>,
    /// When each open attempt was dispatched.
    dispatched: BTreeMap<AttemptId, Moment>,
    /// Tasks admitted of each session.
    turns: BTreeMap<u128, u32>,
    next_number: u64,
}

/// A broken invariant.
pub(crate) type Broken = String;

impl Oracle {
    /// The control plane starts anew: its tasks are gone, the epochs it gave are not.
    pub(crate) fn next_life(&mut self) {
        let epochs = std::mem::take(&mut self.epochs);
        *self = Self { epochs, next_number: self.next_number, ..Self::default() };
    }

    /// A session never gets more turns than it has.
    pub(crate) fn admitted(
        &mut self,
        now: Moment,
        id: TaskId,
        plan: &TaskPlan,
        queue_timeout: std::time::Duration,
    ) -> Result<(), Broken> {
        self.next_number += 1;
        let deadline = plan.deadline_ms.map(|ms| now + std::time::Duration::from_millis(ms));
        let seen = Seen {
            model: plan.model,
            batch: plan.batch,
            number: self.next_number,
            queued_since: Some(now),
            constraints: plan.constraints.clone(),
            continues: plan.recovery.is_some(),
            passes_on: plan.recovery == Some(Replays::PassedOn),
            deadline,
            patient_until: deadline.unwrap_or(Moment::NEVER).min(now + queue_timeout),
            ..Seen::default()
        };
        self.tasks.insert(id, seen);
        let Some(session) = plan.session else { return Ok(()) };
        let turns = self.turns.entry(session).or_default();
        *turns += 1;
        if *turns > MAX_TURNS {
            return Err(format!("session {session} was given turn {turns}"));
        }
        Ok(())
    }

    /// What the task has sent cannot be generated again. Returns whether that is new.
    pub(crate) fn cannot_be_repeated(&mut self, task: TaskId) -> bool {
        let Some(seen) = self.tasks.get_mut(&task).filter(|seen| !seen.is_final) else { return false };
        (seen.is_final, seen.continues) = (true, false);
        true
    }

    /// A client wants the end of its task.
    pub(crate) fn canceled(&mut self, task: TaskId) {
        if let Some(seen) = self.tasks.get_mut(&task).filter(|seen| seen.terminal.is_none()) {
            seen.canceled = true;
        }
    }

    /// [2] A cancel is answered only when the task has its end.
    pub(crate) fn cancel_answered(&self, task: TaskId) -> Result<(), Broken> {
        match self.tasks.get(&task) {
            Some(seen) if seen.terminal.is_none() => {
                Err(format!("[2] the cancel of {task} is answered before its end"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn session_deleted(&mut self, session: u128) {
        self.turns.remove(&session);
    }

    pub(crate) fn retires(&mut self, model: usize, retired: bool) {
        if retired {
            self.retired.insert(model)
        } else {
            self.retired.remove(&model)
        };
    }

    /// A report was taken that has these models in pools which have them, load them or could.
    pub(crate) fn reported(&mut self, now: Moment, models: &[ModelRef]) {
        for model in models {
            if let Ok(model) = model.as_str()[1..].parse() {
                self.models.insert(model, now);
            }
        }
    }

    /// Somebody answered at the node's address with its name.
    pub(crate) fn dialled(&mut self, node_id: &NodeId) {
        self.well.insert(node_id.clone());
    }

    pub(crate) fn dial_failed(&mut self, now: Moment, node_id: &NodeId) {
        if self.well.remove(node_id) {
            self.last_dial_failure = Some(now);
        }
    }

    /// The node has let the control plane in, or is another process.
    pub(crate) fn let_in(&mut self, node_id: &NodeId) -> bool {
        self.denied.remove(node_id)
    }

    /// An operator's order has reached the core.
    pub(crate) fn wants(&mut self, node_id: &NodeId, intent: Intent) {
        match intent {
            Intent::Draining => self.draining.insert(node_id.clone()),
            Intent::Serving => self.draining.remove(node_id),
        };
    }

    /// The engines of the node are not the ones that failed.
    pub(crate) fn engine_is_new(&mut self, node_id: &NodeId) {
        self.sick.retain(|pool, _| pool.node_id != *node_id);
    }

    /// A report was taken in which a pool of the node is away, or not. Whoever comes back may be
    /// another engine, and counts as one from the first report on that says so, or that does not any
    /// more.
    pub(crate) fn reports_away(&mut self, node_id: &NodeId, away: bool) {
        let was_away = if away { !self.away.insert(node_id.clone()) } else { self.away.remove(node_id) };
        if away || was_away {
            self.engine_is_new(node_id);
        }
    }

    /// Another process has the node's name.
    pub(crate) fn boot_is_new(&mut self, now: Moment, node_id: &NodeId) {
        self.booted.insert(node_id.clone(), now);
        self.denied.remove(node_id);
        self.failing.remove(node_id);
        self.broken.remove(node_id);
        self.well.remove(node_id);
    }

    /// A token of the task has come: its pool is well. The first one, and the end, are a success.
    pub(crate) fn got_through(&mut self, now: Moment, task: TaskId, success: bool) {
        if let Some((_, pool)) = self.tasks.get(&task).and_then(|seen| seen.open.as_ref()) {
            if !success {
                // What had failed by then is still side by side with what was sent before it, and fails
                // once more for the same reason.
                self.sick.entry(pool.clone()).and_modify(|sick| sick.token = now);
                return;
            }
            self.sick.remove(pool);
            self.failed.remove(pool);
            self.broken.remove(&pool.node_id);
            self.failing.remove(&pool.node_id);
            let served = self.served.entry(pool.clone()).or_default();
            served.retain(|(_, other)| *other != task);
            served.push((now, task));
        }
    }

    /// A node has taken the task: who had found it wrong has failed it.
    pub(crate) fn accepted(&mut self, now: Moment, task: TaskId) {
        let Some(seen) = self.tasks.get_mut(&task) else { return };
        seen.taken = true;
        for pool in std::mem::take(&mut seen.rejected_by) {
            self.rejected_wrongly(now, now, task, pool);
        }
    }

    /// The pool's node has found wrong what another one has taken: it has failed the task.
    fn rejected_wrongly(&mut self, now: Moment, dispatched: Moment, task: TaskId, pool: PoolKey) {
        // It makes no failure of its engine, and such ones that were sent before are side by side with it.
        self.sick.entry(pool.clone()).or_default().failed(now, dispatched, task, Moment::ZERO);
        self.failed.entry(pool).or_default().insert(task);
    }

    /// Whether the pool has served another task than this one since then.
    fn served_another(&self, pool: &PoolKey, task: TaskId, since: Moment) -> bool {
        let served = self.served.get(pool);
        served.is_some_and(|served| served.iter().any(|(at, other)| *other != task && *at > since))
    }

    /// Three different tasks trip a pool, and not three tries of one.
    pub(crate) fn tripped_early(&self, pool: &PoolKey, tripped: bool) -> Result<(), Broken> {
        let tasks = self.failed.get(pool).map_or(0, BTreeSet::len);
        let streams = self.broken.get(&pool.node_id).copied().unwrap_or(0);
        if tripped && tasks < 3 && streams < 3 {
            return Err(format!("{pool} is tripped by {tasks} tasks"));
        }
        Ok(())
    }

    /// [1] [2] [3]: every frame once, in order, one terminal, nothing after it, and no more than a log
    /// may have.
    pub(crate) fn read(
        &mut self,
        task: TaskId,
        log: &TaskLog,
        writers: &[Writer],
        max_bytes: usize,
    ) -> Result<(), Broken> {
        let seen = self.tasks.get_mut(&task).ok_or("a log without a task")?;
        seen.transcript.read(log, usize::MAX, writers).map_err(|broken| format!("{broken} ({task})"))?;
        if seen.transcript.bytes > max_bytes {
            return Err(format!("[3] the log of {task} has {} bytes of {max_bytes}", seen.transcript.bytes));
        }
        if seen.transcript.terminal.is_some() {
            seen.terminal.clone_from(&seen.transcript.terminal);
            seen.queued_since = None;
        }
        Ok(())
    }

    /// Who is silent at this moment, by the observer's own books.
    fn silent_at(&self, at: Moment, plan: &Plan) -> usize {
        self.life.values().filter(|life| at >= life.heartbeat + plan.timing.silence()).count()
    }

    /// [7] silence is noticed in time, and not taken for death when it is our own; [6] waits end.
    pub(crate) fn clocks(&mut self, now: Moment, core: &ControlCore, plan: &Plan) -> Result<(), Broken> {
        const GRACE: std::time::Duration = std::time::Duration::from_secs(1);
        for (id, seen) in &self.tasks {
            if let Some(since) = seen.queued_since
                && seen.terminal.is_none()
                && now > since.max(self.stalled_until) + plan.queue_timeout + GRACE
            {
                return Err(format!("[6] {id} has waited since {} ms", since.as_millis()));
            }
        }
        let stall = std::time::Duration::from_millis(self.stall_total_ms);
        // Where most are silent at once, the control plane may suspect itself, for one more timeout.
        if self.life.len() >= 3 && self.silent_at(now, plan) * 2 > self.life.len() {
            self.most_silent = Some(now);
        }
        for (node_id, life) in &self.life {
            let Some(liveness) = core.registry().liveness(node_id) else { continue };
            let silence = plan.timing.silence() + GRACE + stall;
            if liveness == Liveness::Online && now > life.heartbeat + silence {
                return Err(format!(
                    "[7] {node_id} is online, {} ms after its last heartbeat",
                    now.millis_since(life.heartbeat)
                ));
            }
            let leases = if self.most_silent.is_some_and(|at| at >= life.any) { 2 } else { 1 };
            let longest = plan.timing.node_timeout * leases + GRACE + stall;
            if liveness != Liveness::Offline && now > life.any + longest {
                return Err(format!(
                    "[7] {node_id} is {liveness:?}, {} ms after its last sign",
                    now.millis_since(life.any)
                ));
            }
            if liveness == Liveness::Offline && !self.offline_at.contains_key(node_id) {
                self.offline_at.insert(node_id.clone(), now);
                let lease = plan.timing.node_timeout;
                if now < life.any + lease {
                    return Err(format!(
                        "[7] {node_id} is offline, {} ms after its last sign",
                        now.millis_since(life.any)
                    ));
                }
                // All fell silent within one interval, and no connection failed: it is us.
                let first = self.life.values().map(|l| l.heartbeat).min().unwrap_or_default();
                let last = self.life.values().map(|l| l.heartbeat).max().unwrap_or_default();
                let together = last.since(first) < plan.timing.heartbeat_interval;
                let silent = self.silent_at(now, plan);
                let connected = self.last_dial_failure.is_none_or(|at| at < first);
                if self.life.len() >= 3
                    && silent == self.life.len()
                    && together
                    && connected
                    && now < life.any + lease * 2
                    && self.stall_total_ms == 0
                {
                    return Err(format!("[7] {node_id} is offline although all fell silent at once"));
                }
            }
            if liveness != Liveness::Offline {
                self.offline_at.remove(node_id);
            }
        }
        Ok(())
    }

    /// Whether the task has waited for as long without ever having been dispatched.
    pub(crate) fn waited_since(&self, task: TaskId, now: Moment, span: std::time::Duration) -> bool {
        let seen = self.tasks.get(&task);
        seen.is_some_and(|seen| seen.dispatches == 0 && seen.queued_since.is_some_and(|at| at + span <= now))
    }

    /// [1] at rest, every admitted task has its terminal event.
    pub(crate) fn at_rest(&self) -> Result<(), Broken> {
        match self.tasks.iter().find(|(_, seen)| seen.terminal.is_none()) {
            Some((id, seen)) => Err(format!(
                "[1] {id} has no end (queued since {:?}, open {:?})",
                seen.queued_since.map(Moment::as_millis),
                seen.open
            )),
            None => Ok(()),
        }
    }
}
